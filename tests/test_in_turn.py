"""Channels that are mapped while the next one is summed, and arrays of many channels, span by span."""

from __future__ import annotations

import numpy as np
import pytest
from cases import DTYPES, TOLERANCE, eps
from fastbn.kernels import cpu
from fastbn.kernels.cpu import cut, plan

import fastbn
from fastbn import reference

# Tiles of one channel, in blocks: one; three, the last of them short; two segments of each run; many. Then tiles of
# several channels, the last one of fewer, in runs of little more than a vector and of some; in one block, and in two.
SHAPES = {
    "one": (5, 7, 300), "three": (120, 3, 17, 18), "segments": (3, 4, 20_011), "many": (40, 5, 31, 33),
    "tiles": (30, 37, 4, 5), "tiles in blocks": (210, 37, 85), "longer runs": (9, 70, 7, 11),
}  # fmt: skip
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)


@pytest.fixture
def one_after_the_other(monkeypatch):
    """A function after whose call nothing is mapped while something else is summed."""

    def switch():
        monkeypatch.setattr(plan, "TWO", 0)
        _forget()

    yield switch
    monkeypatch.undo()
    _forget()


def _forget():
    plan.plan_of.cache_clear()
    cpu._job.cache_clear()


def _draw(rng, shape, dtype, axis=1):
    wide = [n if i == axis else 1 for i, n in enumerate(shape)]
    x = (rng.normal(size=shape) * rng.uniform(0.5, 3, wide) + rng.normal(0, 3, wide)).astype(dtype)
    dy = (rng.normal(size=shape) + rng.normal(0, 1, wide)).astype(dtype)
    gamma, beta = rng.normal(size=(2, shape[axis])).astype(np.float32)
    return x, dy, gamma, beta


def _assert_same(got, want):
    """NumPy knows no NaN of bfloat16."""
    np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


def _pass(x, dy, gamma, beta, **more):
    y, saved = fastbn.forward(x, gamma, beta, **more)
    return (y, saved.table.copy(), *fastbn.backward(dy, saved))


def _flags(x):
    """Of the plan of a forward pass."""
    seen = x.reshape(x.shape[0], x.shape[1], -1)
    sized = x.itemsize, x.itemsize, 0
    return plan.plan_of(seen.shape, (seen.strides,) * 2, sized, 7, cpu.SIZES, *[len(x)] * 2, 0).cut.flags


@pytest.mark.parametrize("past", [False, True], ids=["through the caches", "past them"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@each_dtype
def test_the_bits_are_those_of_one_after_the_other(dtype, shape, past, one_after_the_other, monkeypatch, rng):
    monkeypatch.setattr(cpu, "SIZES", cpu.Sizes(past=0 if past else 10**12))
    x, dy, gamma, beta = _draw(rng, shape, dtype)
    gamma[1] = 1e-38  # whose products float32 can't have: that channel is mapped by itself
    if len(shape) == 4:
        x[1, 2, 3, 4] = np.nan
    assert _flags(x) & cut.TWO
    found = _pass(x, dy, gamma, beta)
    unaligned = np.empty(x.size + 5, dtype)[5:].reshape(shape)
    _assert_same(fastbn.forward(x, gamma, beta, out=unaligned)[0], found[0])
    place, into = x.copy(), dy.copy()
    _assert_same(fastbn.forward(place, gamma, beta, out=place)[0], found[0])
    _assert_same(fastbn.backward(into, fastbn.forward(x, gamma, beta)[1], out=into)[0], found[2])

    exact, kept = reference.forward(x, gamma, beta)
    for name, got, want in (("y", found[0], exact), ("dx", found[2], reference.backward(dy, kept)[0])):
        error = np.abs(got.astype(np.float64) - want) / np.maximum(1, np.abs(want))
        assert (np.isnan(got.astype(np.float64)) == np.isnan(want)).all()
        assert np.nanmax(error) <= TOLERANCE[dtype.name] * eps(dtype), name

    one_after_the_other()
    assert not _flags(x) & cut.TWO
    for got, want in zip(found, _pass(x, dy, gamma, beta), strict=True):
        _assert_same(got, want)


@pytest.mark.parametrize("shape", ["one", "segments", "tiles", "tiles in blocks", "longer runs"])
@pytest.mark.parametrize(
    "extra", ["relu", "residual", "groups", "groups of unlike sizes", "weights", "weights and residual", "all"]
)
def test_with_extras(extra, shape, one_after_the_other, rng):
    """A group's last tile is mapped before the next group is summed."""
    shape = SHAPES[shape]
    x, dy, gamma, beta = _draw(rng, shape, np.float32)
    where = rng.uniform(0.1, 2, (shape[0], 1, *shape[2:])).astype(np.float32)
    where[0] = 0
    residual = rng.normal(size=x.shape).astype(np.float32)
    more = {
        "relu": {"activation": "relu"},
        "residual": {"residual": residual, "activation": "relu"},
        "groups": {"groups": 2},
        "groups of unlike sizes": {"groups": [2, 0, 1, shape[0] - 3]},
        "all": {"weights": where, "groups": 3, "residual": residual, "activation": "relu", "masked": "keep"},
        "weights": {"weights": where},
        "weights and residual": {"weights": where, "residual": residual, "activation": "gelu", "masked": "zero"},
    }[extra]
    found = _pass(x, dy, gamma, beta, **more)
    with fastbn.set_backend("reference"):
        double = {k: v.astype(np.float64) if k in ("residual", "weights") else v for k, v in more.items()}
        exact = _pass(x.astype(np.float64), dy.astype(np.float64), gamma, beta, **double)
    # dx is the difference of terms of the size of gamma invstd: 6 here and there, and 2 eps of 1 aren't 2 eps of those.
    wide = [1, -1] + [1] * (x.ndim - 2)
    terms = np.abs(gamma).reshape(wide) / x.std((0, *range(2, x.ndim)), dtype=np.float64).reshape(wide)
    compared = zip(found[0:3:2], exact[0:3:2], (1, np.maximum(1, terms)), strict=True)
    for got, want, least in list(compared)[: 1 if extra == "all" else 2]:  # a group has other weights and deviations
        error = np.abs(got - want) / np.maximum(least, np.abs(want))
        assert error.max() <= TOLERANCE["float32"] * eps(np.dtype(np.float32))
    one_after_the_other()
    for got, want in zip(found, _pass(x, dy, gamma, beta, **more), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("groups", [None, 2, [2, 0, 1, -3]], ids=str)
@pytest.mark.parametrize("shape", ["one", "segments", "tiles", "tiles in blocks", "longer runs"])
def test_with_y_saved(shape, groups, one_after_the_other, rng):
    """A tile with a channel that y doesn't tell of is mapped by itself, in whatever group."""
    shape = SHAPES[shape]
    x, dy, gamma, beta = _draw(rng, shape, np.float32)
    gamma = np.copysign(rng.uniform(0.5, 1, gamma.shape), gamma).astype(np.float32)
    gamma[[1, shape[1] // 2]] = 1e-4, 0
    if isinstance(groups, list):
        groups = [n if n >= 0 else shape[0] + n for n in groups]
    more = {"groups": groups, "activation": ("leaky_relu", 0.3)}
    found, exact = (_pass(x, dy, gamma, beta, **more, save=save) for save in "yx")
    for got, want in zip(found[:2], exact[:2], strict=True):
        np.testing.assert_array_equal(got, want)
    for got, want in zip(found[2:], exact[2:], strict=True):  # xhat is off by 64 eps at most
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max() * (x.size / got.size) ** 0.5)
    one_after_the_other()
    for got, want in zip(found, _pass(x, dy, gamma, beta, **more, save="y"), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("past", [1, 10**12], ids=["past the caches", "through them"])
@pytest.mark.parametrize(("shape", "axis"), [((6, 37), 1), ((37, 6), 0), ((3, 37, 4), 1), ((3, 4, 37), 2)], ids=str)
@each_dtype
def test_many_channels_span_by_span(dtype, shape, axis, past, monkeypatch, rng):
    x, dy, gamma, beta = _draw(rng, shape, dtype, axis)
    known = rng.normal(size=37), rng.uniform(0.5, 2, 37)

    def results():
        passes = []
        for frozen in (None, known):
            y, saved = fastbn.forward(x, gamma, beta, axis=axis, frozen=frozen)
            passes += [y, saved.table, *fastbn.backward(dy, saved), fastbn.backward(dy, saved, need=(0, 1, 0))[1]]
        return [fastbn.infer(x, *known, gamma, beta, axis=axis), fastbn.infer(x, *known, axis=axis), *passes]

    whole = results()
    monkeypatch.setattr(cpu, "SIZES", cpu.Sizes(past=past))
    monkeypatch.setattr(cpu, "SPAN", 16)
    spans = []
    monkeypatch.setattr(cpu, "_spans", lambda number, cut=cpu._spans: spans.append(cut(number)) or spans[-1])
    for got, want in zip(results(), whole, strict=True):
        np.testing.assert_array_equal(got, want)
    assert [s.stop - s.start for s in spans[0]] == [16, 16, 5]
    exact = reference.infer(x, *known, gamma, beta, axis=axis)
    error = np.abs(whole[0].astype(np.float64) - exact) / np.maximum(1, np.abs(exact))
    assert error.max() <= TOLERANCE[dtype.name] * eps(dtype)


@pytest.mark.parametrize("away", [3.0, 20.0, 1e3, 1e6])
@pytest.mark.parametrize("shape", [(40, 33), (8, 33, 9)], ids=str)
def test_first_values_that_are_not_like_the_rest(shape, away, rng):
    """The pivot of few values is the mean of the first two rows, or sixteen values: a bad one costs time, not bits."""
    x = rng.normal(1, 0.5, shape).astype(np.float32)
    x[:2] += np.float32(away * 0.5) * rng.choice([-1, 1], (2, *shape[1:])).astype(np.float32)
    dy = rng.normal(0.3, 1, shape).astype(np.float32)
    dy[:2] *= np.float32(away)
    gamma, beta = rng.normal(size=(2, 33)).astype(np.float32)
    y, table, dx, dgamma, dbeta = _pass(x, dy, gamma, beta)
    wide, axes = x.astype(np.longdouble), tuple(i for i in range(x.ndim) if i != 1)
    var = wide.var(axes)
    unit = np.finfo(np.float64).eps
    assert (np.abs(table[2] - var) / var).max() <= 1100 * unit  # a pivot 30 deviations off, and the sum's own rounding
    exact, kept = reference.forward(x, gamma, beta)
    limit = TOLERANCE["float32"] * eps(np.dtype(np.float32))
    assert (np.abs(y - exact) / np.maximum(1, np.abs(exact))).max() <= limit
    want, want_gamma, want_beta = reference.backward(dy, kept)
    assert (np.abs(dx - want) / np.maximum(1, np.abs(dy)).max()).max() <= limit
    sizes = np.abs(dy.astype(np.float64)).sum(axes)
    assert (np.abs(dgamma - want_gamma) <= 8 * eps(np.dtype(np.float32)) * sizes).all()
    assert (np.abs(dbeta - want_beta) <= eps(np.dtype(np.float32)) * sizes).all()


def test_light_first_values_far_off(rng):
    """A pivot from values of next to no weight, which the variance doesn't know: 1e7 deviations off."""
    x = rng.normal(1, 0.5, (200, 33)).astype(np.float32)
    x[:32] += np.float32(5e6)
    weights = rng.uniform(0.5, 2, 200).astype(np.float32)
    weights[:32] = 1e-18
    _, saved = fastbn.forward(x, weights=weights)
    wide, w = x.astype(np.longdouble), weights.astype(np.longdouble)[:, None]
    mean = (w * wide).sum(0) / w.sum()
    var = (w * (wide - mean) ** 2).sum(0) / w.sum()
    assert (np.abs(saved.table[2] - var) / var).max() <= 1100 * np.finfo(np.float64).eps


def test_float32_that_is_summed_in_float64(monkeypatch, rng):
    """As channels of few values are: no loop does that and maps another channel."""
    monkeypatch.setattr(cpu, "SIZES", cpu.Sizes(few=10**6))
    x, dy, gamma, beta = _draw(rng, SHAPES["one"], np.float32)
    assert not _flags(x) & cut.TWO
    y, _, dx, *_ = _pass(x, dy, gamma, beta)
    exact, kept = reference.forward(x, gamma, beta)
    for got, want in ((y, exact), (dx, reference.backward(dy, kept)[0])):
        error = np.abs(got - want) / np.maximum(1, np.abs(want))
        assert error.max() <= TOLERANCE["float32"] * eps(np.dtype(np.float32))
