"""Right at any offset: what the README promises, on arrays large enough for many blocks."""

from __future__ import annotations

import numpy as np
import pytest
from cases import BFLOAT16, TOLERANCE, eps

import fastbn
from fastbn import reference

# Rows; columns; columns folded to wide rows; a channel in many pieces; long and narrow rows.
SHAPES = [((6, 5, 2000), 1), ((900, 70), 1), ((4000, 12), 1), ((2, 2, 300_000), 1), ((30, 40, 7), 1)]
layouts = pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)


def errors(x, axis, dtype, rng):
    """Largest errors of y and dx in eps of `dtype`, relative to max(1, |result|)."""
    channels = x.shape[axis]
    gamma, beta = rng.normal(size=(2, channels)).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(dtype)
    y, saved = fastbn.forward(x, gamma, beta, axis=axis)
    dx = fastbn.backward(dy, saved)[0]
    exact, exact_saved = reference.forward(x, gamma, beta, axis=axis)
    exact_dx = reference.backward(dy, exact_saved)[0]
    return [
        float((np.abs(a.astype(np.float64) - b) / np.maximum(1, np.abs(b))).max() / eps(dtype))
        for a, b in ((y, exact), (dx, exact_dx))
    ]


@pytest.mark.parametrize("ratio", [0, 1, 1e2, 1e4, 1e5, 1e6, 1e8])
@layouts
def test_float32_at_any_offset(shape, axis, ratio, rng):
    x = (rng.normal(size=shape) + ratio).astype(np.float32)
    assert max(errors(x, axis, x.dtype, rng)) <= TOLERANCE["float32"]


@pytest.mark.parametrize("ratio", [0, 1e2, 1e4, 1e6])
@layouts
def test_float64_at_any_offset(shape, axis, ratio, rng):
    x = rng.normal(size=shape) + ratio
    assert max(errors(x, axis, x.dtype, rng)) <= TOLERANCE["float64"]


@pytest.mark.parametrize("ratio", [0, 1, 15, 30, 1000])  # from 16 on, the mean is subtracted first
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=lambda d: d.name)
@layouts
def test_half_types(shape, axis, dtype, ratio, rng):
    x = (rng.normal(size=shape) + ratio).astype(dtype)
    assert max(errors(x, axis, dtype, rng)) <= TOLERANCE[dtype.name]


@pytest.mark.parametrize(("extreme", "scale"), [(1e42, 1e-10), (1e-50, 1e20)])
@layouts
def test_half_gradient_of_an_extreme_channel(shape, axis, extreme, scale, rng):
    """Its coefficients leave float32; those beside it stay as they are."""
    x, dy = rng.normal(size=(2, *shape)).astype(BFLOAT16)
    dy = (dy * BFLOAT16.type(scale)).astype(BFLOAT16)
    gamma = rng.normal(size=shape[axis])
    dx = fastbn.backward(dy, fastbn.forward(x, gamma, axis=axis)[1])[0]
    c = shape[axis] - 2
    gamma[c] = extreme
    dx2 = fastbn.backward(dy, fastbn.forward(x, gamma, axis=axis)[1])[0]
    exact = reference.backward(dy, reference.forward(x, gamma, axis=axis)[1])[0].take(c, axis)
    error = np.abs(dx2.take(c, axis).astype(np.float64) - exact) / np.maximum(extreme * scale, np.abs(exact))
    assert error.max() <= TOLERANCE["bfloat16"] * eps(BFLOAT16)
    others = np.delete(np.arange(shape[axis]), c)
    np.testing.assert_array_equal(dx2.take(others, axis), dx.take(others, axis))


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64)], ids=lambda d: d.name)
@layouts
def test_gradient_with_an_offset(shape, axis, dtype, rng):
    """dy is centred before it is scaled: sums of a large dy do not drown its spread."""
    x = (rng.normal(size=shape) + 5).astype(dtype)
    dy = (rng.normal(size=shape) + 1e4).astype(dtype)
    gamma = rng.normal(size=shape[axis])
    dx = fastbn.backward(dy, fastbn.forward(x, gamma, axis=axis)[1])[0]
    exact = reference.backward(dy, reference.forward(x, gamma, axis=axis)[1])[0]
    assert (np.abs(dx - exact) / np.maximum(1, np.abs(exact))).max() <= TOLERANCE[dtype.name] * eps(dtype)


@pytest.mark.parametrize("share", [1.0, 0.3, 0.03])
@layouts
def test_gradient_that_follows_x(shape, axis, share, rng):
    """Its two terms cancel, and float32 would leave their rounding, 7 eps; channels beside it stay as they are."""
    x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
    gamma, c = rng.normal(size=shape[axis]), shape[axis] - 2
    before = fastbn.backward(dy, fastbn.forward(x, gamma, axis=axis)[1])[0]
    at = tuple(c if a == axis else slice(None) for a in range(len(shape)))
    gamma[c] = 2.0
    dy[at] = x[at] + np.float32(share) * dy[at]
    dx = fastbn.backward(dy, fastbn.forward(x, gamma, axis=axis)[1])[0]
    exact = reference.backward(dy, reference.forward(x, gamma, axis=axis)[1])[0]
    assert (np.abs(dx - exact) / np.maximum(1, np.abs(exact))).max() <= TOLERANCE["float32"] * eps(x.dtype)
    others = np.delete(np.arange(shape[axis]), c)
    np.testing.assert_array_equal(dx.take(others, axis), before.take(others, axis))


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e10, -3e38, 1e-42, 65504.0])
@layouts
def test_constant_channel_gives_beta(shape, axis, value, rng):
    x = np.full(shape, value, np.float32)
    gamma, beta = rng.normal(size=(2, shape[axis])).astype(np.float32)
    dy = rng.normal(size=shape).astype(np.float32)
    y, saved = fastbn.forward(x, gamma, beta, axis=axis)
    wide = beta.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    assert (np.abs(y - wide) <= eps(x.dtype) * np.maximum(1, np.abs(wide))).all()
    np.testing.assert_array_equal(saved.moments.var(), 0)
    exact = reference.backward(dy, reference.forward(x.astype(np.float64), gamma, beta, axis=axis)[1])[0]
    dx = fastbn.backward(dy, saved)[0]
    assert (np.abs(dx - exact) / np.maximum(1, np.abs(exact))).max() <= 2 * eps(x.dtype)


@pytest.mark.parametrize("scale", [1e20, 1e38, 1e-20, 1e-38, 1e-42])
@layouts
def test_huge_and_subnormal_values(shape, axis, scale, rng):
    """Squares of these leave float32, sums of the largest do too."""
    x = (np.clip(rng.normal(size=shape), -3, 3) * scale).astype(np.float32)
    dy = rng.normal(size=shape).astype(np.float32)
    gamma, beta = rng.normal(size=(2, shape[axis])).astype(np.float32)
    y, saved = fastbn.forward(x, gamma, beta, axis=axis, eps=1e-30)
    exact, exact_saved = reference.forward(x, gamma, beta, axis=axis, eps=1e-30)
    assert np.isfinite(y).all()
    assert (np.abs(y - exact) / np.maximum(1, np.abs(exact))).max() <= 2 * eps(x.dtype)
    for dy_scaled in (dy, (np.clip(dy, -3, 3) * np.float32(min(scale, 1e38)))):
        dx = fastbn.backward(dy_scaled, saved)[0].astype(np.float64)
        exact_dx = reference.backward(dy_scaled, exact_saved)[0]
        size = np.abs(exact_dx).max()
        assert np.abs(dx - exact_dx).max() <= 2 * eps(x.dtype) * size + 1.5e-45  # half a subnormal step at the least


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "dtype", [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16], ids=lambda d: d.name
)
@layouts
def test_nan_stays_in_its_channel(shape, axis, dtype, bad, rng):
    x, dy = rng.normal(size=(2, *shape)).astype(dtype)
    gamma, beta = rng.normal(size=(2, shape[axis]))
    y, saved = fastbn.forward(x, gamma, beta, axis=axis)
    dx, dgamma, dbeta = fastbn.backward(dy, saved)
    c = shape[axis] - 2
    others = np.delete(np.arange(shape[axis]), c)
    for spoilt in ("x", "dy"):
        x2, dy2 = x.copy(), dy.copy()
        {"x": x2, "dy": dy2}[spoilt].swapaxes(0, axis)[c, -1] = bad
        y2, saved2 = fastbn.forward(x2, gamma, beta, axis=axis)
        dx2, dgamma2, dbeta2 = fastbn.backward(dy2, saved2)
        for new, old in ((y2, y), (dx2, dx)):
            np.testing.assert_array_equal(new.take(others, axis), old.take(others, axis))
        for new, old in ((dgamma2, dgamma), (dbeta2, dbeta)):
            np.testing.assert_array_equal(new[others], old[others])
        assert not np.isfinite(dx2.take(c, axis).astype(np.float64)).any()
        assert np.isnan(y2.take(c, axis).astype(np.float64)).all() == (spoilt == "x")
        assert not np.isfinite(dgamma2[c])
