"""Whole numbers with a scale and a zero point: against the reference on what they stand for."""

from __future__ import annotations

import numpy as np
import pytest
from extras import SHAPES, compare, groups_for, weights_for

import fastbn

pytestmark = pytest.mark.usefixtures("backend")


def test_units_that_would_turn_or_keep_whole_numbers_are_refused(rng):
    q = rng.integers(0, 9, (8, 3), np.uint8)
    for scale in (-1.0, 0.0, np.inf):
        with pytest.raises(ValueError, match=r"scale is .*; expected finite numbers, and a scale above 0"):
            fastbn.forward(q, scale=scale)
    mask = rng.random(8) < 0.7
    for units in ({"scale": 0.5}, {"zero_point": 3}):
        with pytest.raises(ValueError, match=r"masked='keep' with a scale or a zero_point; expected 'normalize' or"):
            fastbn.forward(q, weights=mask, masked="keep", **units)
    y, _ = fastbn.forward(q, weights=mask, masked="keep")
    np.testing.assert_array_equal(y[~mask], q[~mask])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", ["nchw", "nhwc narrow", "short runs"])
def test_whole_numbers(name, dtype, rng):
    """They are read as they are: y is that of scale (q - zero point), in float32, and so are moments."""
    shape, axis = SHAPES[name]
    info, scale, zero = np.iinfo(dtype), 0.037, 11.0
    q = rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    gamma, beta = rng.normal(1, 0.5, shape[axis]), rng.normal(0, 1, shape[axis])
    more = {"axis": axis, "scale": scale, "zero_point": zero}
    y, saved = fastbn.forward(q, gamma, beta, **more)
    x = scale * (q.astype(np.float64) - zero)
    exact, kept = fastbn.reference.forward(x, gamma, beta, axis=axis)
    assert y.dtype == np.float32
    compare("y", y, exact, y.dtype)
    for found in (saved.moments, fastbn.moments(q, **more)):
        np.testing.assert_allclose(found.mean, kept.moments.mean, rtol=2e-7, atol=2e-7 * scale * info.max)
        np.testing.assert_allclose(found.var(), kept.moments.var(), rtol=1e-6)
    again = fastbn.infer(q, *kept.moments.exact(), gamma, beta, **more)
    compare("infer", again, exact, y.dtype)
    dy = rng.normal(0, 1, shape).astype(np.float32)
    dx, dgamma, dbeta = fastbn.backward(dy, saved, need=(False, True, True))
    _, want_gamma, want_beta = fastbn.reference.backward(dy, kept)
    assert dx is None
    n = q.size / len(dgamma)
    assert np.abs(dgamma - want_gamma).max() <= 1e-6 * n
    assert np.abs(dbeta - want_beta).max() <= 1e-6 * n
    with pytest.raises(ValueError, match=r"dx of whole numbers .* no gradient.*need=\(False, True, True\)"):
        fastbn.backward(dy, saved)


@pytest.mark.parametrize(
    ("weights", "groups"), [("mask", "sizes"), ("positions", "ids")], ids=["mask, sizes", "positions, ids"]
)
@pytest.mark.parametrize("name", ["nchw", "nhwc narrow"])
def test_all_at_once(name, weights, groups, rng):
    """Weights, groups, a residual and ReLU: as the reference has it of what the whole numbers stand for."""
    shape, axis = SHAPES[name]
    scale, zero = 0.037, 113.0
    q = rng.integers(0, 255, shape, np.uint8, endpoint=True)
    gamma, beta = rng.normal(1, 0.5, shape[axis]), rng.normal(0, 1, shape[axis])
    more = {
        "axis": axis,
        "weights": weights_for(weights, rng, shape, axis),
        "masked": "zero",
        "groups": groups_for(groups, rng, shape, axis),
        "residual": rng.normal(0, 1, shape).astype(np.float32),
        "activation": "relu",
    }
    y, saved = fastbn.forward(q, gamma, beta, **more, scale=scale, zero_point=zero)
    exact, kept = fastbn.reference.forward(scale * (q.astype(np.float64) - zero), gamma, beta, **more)
    assert y.dtype == np.float32
    compare("y", y, exact, y.dtype)
    for found, want in zip(saved.moments, kept.moments, strict=True):
        np.testing.assert_allclose(found.count, want.count, rtol=1e-6)
        np.testing.assert_allclose(found.mean, want.mean, rtol=2e-7, atol=2e-7 * scale * 255)
        np.testing.assert_allclose(found.var(), want.var(), rtol=1e-6)
    dy = rng.normal(0, 1, shape).astype(np.float32)
    dx, *gradients = fastbn.backward(dy, saved, need=(False, True, True))
    _, *wanted = fastbn.reference.backward(dy, kept)
    assert dx is None
    n = q.size / len(gamma)
    for found, want in zip(gradients[:2], wanted[:2], strict=True):  # sums of n terms, each some eps off
        assert np.abs(found - want).max() <= 1e-6 * n
    np.testing.assert_array_equal(gradients[2], wanted[2])  # dy, or 0 where ReLU or the mask is


@pytest.mark.parametrize("scale", [1e200, 1e-170, 0.0, np.inf])
def test_units_whose_squares_overflow(scale, rng):
    q = rng.integers(0, 255, (6, 5)).astype(np.uint8)
    for call in (fastbn.forward, fastbn.moments, lambda q, scale: fastbn.infer(q, [5.0] * 5, [1.0] * 5, scale=scale)):
        with pytest.raises(ValueError, match=r"scale is .* a scale above 0, 1e-150 to 1e150"):
            call(q, scale=scale)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32], ids=lambda d: d.__name__)
@pytest.mark.parametrize("units", [{"scale": np.array([1.0, 0.5])}, {"zero_point": np.ones(3)}], ids=str)
def test_units_that_are_no_numbers(units, dtype, rng):
    x = rng.integers(0, 9, (4, 3)).astype(dtype)
    for call in (fastbn.forward, fastbn.moments, lambda x, **units: fastbn.infer(x, np.zeros(3), np.ones(3), **units)):
        with pytest.raises(ValueError, match="scale"):
            call(x, **units)


def test_moments_of_no_whole_numbers(rng):
    """Their mean is 0, not that of units: -scale zero_point."""
    q, units = rng.integers(0, 255, (6, 5)).astype(np.uint8), {"scale": 1 / 255, "zero_point": 113}
    _, saved = fastbn.forward(q, groups=np.array([2, 2, 2, 3, 3, 3]), **units)
    for nothing in (saved.moments[0], fastbn.moments(q[:0], **units)):
        assert nothing.count == 0
        np.testing.assert_array_equal(nothing.mean, 0)
    assert (np.abs(saved.moments[3].mean) > 0).all()
