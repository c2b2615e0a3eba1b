"""Weights, masks and groups: against the reference, and calls without them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cases import DTYPES
from extras import GROUPS, NARROW, SHAPES, WEIGHTS, check, compare, groups_for, weights_for

import fastbn

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[1], DTYPES[2]], ids=str)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", SHAPES)
def test_weights_and_groups(name, weights, groups, dtype, rng):
    shape, axis = SHAPES[name]
    w, g = weights_for(weights, rng, shape, axis), groups_for(groups, rng, shape, axis)
    if w is g is None:
        return
    for masked, frozen in itertools.product(
        ("normalize", "zero", "keep") if w is not None else ("normalize",), (False, True)
    ):
        check(rng, shape, axis, dtype, weights=w, groups=g, masked=masked, frozen=frozen)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("groups", ["none", "ids"])
@pytest.mark.parametrize("name", NARROW)
def test_weights_that_are_laid_out_by_column(name, groups, dtype, rng):
    shape, axis = NARROW[name]
    beyond = [{"masked": "zero", "activation": "relu", "residual": True}] if dtype == DTYPES[0] else []
    for more in ({}, {"masked": "keep"}, *beyond):
        w, g = weights_for("positions", rng, shape, axis), groups_for(groups, rng, shape, axis)
        check(rng, shape, axis, dtype, weights=w, groups=g, **more)


@pytest.mark.parametrize("kind", ["u1", "u8", "i1"])
def test_ids_and_sizes_of_any_whole_numbers(kind, rng):
    """Differences of unsigned ids are never below 0, and narrow sizes add up to less than they are."""
    x = rng.normal(rng.normal(0, 3), 1, (6, 3, 4)).astype(np.float32)
    gamma, beta = rng.normal(1, 0.5, 3), rng.normal(0, 1, 3)
    ids = np.array([1, 0, 1, 0, 2, 1])
    want = fastbn.forward(x, gamma, beta, groups=ids)[0]
    np.testing.assert_array_equal(fastbn.forward(x, gamma, beta, groups=ids.astype(kind))[0], want)
    many, sizes = rng.normal(0, 1, (300, 2)), [120, 120, 60]
    narrow = list(np.array(sizes, kind))
    np.testing.assert_array_equal(fastbn.forward(many, groups=narrow)[0], fastbn.forward(many, groups=sizes)[0])
    if kind == "u1":
        with pytest.raises(ValueError, match=r"add up to 262; expected 6,"):
            fastbn.forward(x, groups=[np.uint8(200), np.uint8(62)])


@pytest.mark.parametrize("groups", [[3, 3, 0], [0, 2, 0, 0, 4, 0, 0]])
def test_empty_groups_at_the_end(groups, rng):
    """They take nothing from those before them: counts, and gradients by weights."""
    x, dy, w = rng.normal(3, 2, (6, 2)), rng.normal(3, 2, (6, 2)), rng.gamma(1, 1, 6)
    assert [m.count for m in fastbn.forward(x, groups=groups)[1].moments] == groups
    found = [lib.forward(x, groups=groups, weights=w)[1] for lib in (fastbn, fastbn.reference)]
    for a, b in zip(found[0].moments, found[1].moments, strict=True):
        np.testing.assert_allclose(a.count, b.count, rtol=1e-14)
    both = zip(fastbn.backward(dy, found[0]), fastbn.reference.backward(dy, found[1]), strict=True)
    for a, b in both:
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("scale", [1e-29, 1e-20, 1e-10, 1e10, 1e29])
def test_weights_of_any_size(scale, axis, rng):
    """Only their ratios count; by squares of small numbers float32 lost all of them."""
    x = (rng.normal(0, 1e-8, (64, 3, 40)) + rng.normal(0, 1e-8, (1, 3, 1))).astype(np.float32)
    w = rng.random((64, 1, 40))
    w[:, :, 30:] = 0
    if axis == -1:
        x, w = np.ascontiguousarray(x.transpose(0, 2, 1)), w.transpose(0, 2, 1)
    gamma, beta = rng.normal(1, 0.5, 3), rng.normal(0, 1, 3)
    w = (w * scale).astype(np.float32)
    y, saved = fastbn.forward(x, gamma, beta, weights=w, axis=axis, eps=1e-20)
    exact, kept = fastbn.reference.forward(x.astype(np.float64), gamma, beta, weights=w, axis=axis, eps=1e-20)
    compare("y", y, exact, y.dtype)
    np.testing.assert_allclose(saved.moments.var(), kept.moments.var(), rtol=2e-7)


def test_weights_all_alike_leave_the_variance_alone(rng):
    """Their sum in float32 is off by the same in all lanes: the variance was by 2.5e-7, y by 3.7 eps at most."""
    x = rng.normal(rng.normal(0, 1, (1, 2, 1)), 1, (8, 2, 16384)).astype(np.float32)
    for one in (0.9350724, 0.7, 1.1):
        _, saved = fastbn.forward(x, weights=np.full(8, one))
        exact = x.astype(np.float64).var(axis=(0, 2))
        np.testing.assert_allclose(saved.moments.var(), exact, rtol=1e-7)


@pytest.mark.parametrize("more", [{"groups": 4}, {"activation": ("leaky_relu", 1.0)}], ids=["groups", "activation"])
def test_dgamma_where_dy_is_nearly_one_number(more, rng):
    """x less its mean adds up to 0; by what rounding left of that, times the sum of dy, dgamma was off by 3e-3."""
    x = rng.normal(rng.normal(0, 2, (1, 4, 1)), 1, (32, 4, 784)).astype(np.float32)
    dy = rng.normal(1, 1e-3, x.shape).astype(np.float32)
    gamma, beta = rng.normal(1, 0.5, 4), rng.normal(0, 1, 4)
    found = fastbn.backward(dy, fastbn.forward(x, gamma, beta, **more)[1])[1]
    exact = fastbn.reference.backward(dy, fastbn.reference.forward(x, gamma, beta, **more)[1])[1]
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6 * np.abs(exact).max())


def test_a_mask_is_the_compacted_array(rng):
    """Equal to dense batch norm on the rows that count, whatever the others hold."""
    x = rng.normal(1e5, 1, (200, 7)).astype(np.float32)
    mask = rng.random(200) < 0.5
    gamma, beta = rng.normal(1, 0.5, 7), rng.normal(0, 1, 7)
    dense, saved = fastbn.forward(x[mask], gamma, beta)
    dy = rng.normal(0, 1, x.shape).astype(np.float32)
    dx, dgamma, dbeta = fastbn.backward(dy[mask], saved)
    x[~mask] = np.resize([np.nan, np.inf, 1e30], (np.sum(~mask), 7))
    y, kept = fastbn.forward(x, gamma, beta, weights=mask, masked="zero")
    np.testing.assert_allclose(y[mask], dense, rtol=5e-7, atol=5e-7)
    assert not y[~mask].any()
    assert kept.moments.count == mask.sum()
    got = fastbn.backward(dy, kept)
    np.testing.assert_allclose(got[0][mask], dx, rtol=1e-6, atol=1e-6)
    assert not got[0][~mask].any()
    np.testing.assert_allclose(got[1], dgamma, rtol=1e-5)
    np.testing.assert_allclose(got[2], dbeta, rtol=1e-5)


def test_no_weight_at_all(rng):
    """What is normalized is beta, and nothing is known of the batch."""
    x = rng.normal(3, 1, (20, 6)).astype(np.float32)
    beta = rng.normal(0, 1, 6).astype(np.float32)
    y, saved = fastbn.forward(x, beta=beta, weights=np.zeros(20))
    np.testing.assert_array_equal(y, np.broadcast_to(beta, y.shape))
    assert saved.moments.count == 0
    running = fastbn.RunningStats(6)
    before = running.exact()
    running.update(saved.moments)
    np.testing.assert_array_equal(running.exact(), before)
    dx, dgamma, _ = fastbn.backward(x, saved)
    assert not dx.any()
    assert not dgamma.any()


def test_groups_are_calls_of_their_own(rng):
    """And one group a sample is instance norm."""
    x = rng.normal(3, 2, (11, 5, 8, 9)).astype(np.float32)
    gamma, beta = rng.normal(1, 0.5, 5), rng.normal(0, 1, 5)
    y, saved = fastbn.forward(x, gamma, beta, groups=3)
    parts = [fastbn.forward(part, gamma, beta) for part in np.split(x, [4, 8])]
    np.testing.assert_allclose(y, np.concatenate([part for part, _ in parts]), rtol=5e-7, atol=5e-7)
    for found, (_, own) in zip(saved.moments, parts, strict=True):
        assert found.count == own.moments.count
        np.testing.assert_allclose(found.mean, own.moments.mean, rtol=1e-6)
    for samples in (11, 300):  # so many are no key by which a plan is remembered
        x = rng.normal(3, 2, (samples, 5, 8, 9)).astype(np.float32)
        alone, saved = fastbn.forward(x, gamma, beta, groups=samples)
        wide = np.broadcast_to(gamma, (samples, 5)), np.broadcast_to(beta, (samples, 5))
        want, exact = fastbn.forward(x, *wide, axis=(0, 1))
        np.testing.assert_allclose(alone, want, rtol=5e-7, atol=5e-7)
        np.testing.assert_allclose(fastbn.backward(x, saved)[0], fastbn.backward(x, exact)[0], atol=2e-6)
