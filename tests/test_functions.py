"""Every function on every case, dtype and backend, against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
from cases import CASES, DTYPES, TOLERANCE, eps

import fastbn
from fastbn import reference

each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)


def draw(case, dtype, rng):
    """x with a mean and spread of its own in each channel, and gamma, beta, dy."""
    axes = case.axis if isinstance(case.axis, tuple) else (case.axis,)
    axes = sorted(a % len(case.shape) for a in axes)
    channels = tuple(case.shape[a] for a in axes)
    wide = [n if i in axes else 1 for i, n in enumerate(case.shape)]
    x = rng.normal(size=case.shape) * rng.uniform(0.5, 3, wide) + rng.normal(0, 3, wide)
    x = case.make(x.astype(dtype))
    dy = (rng.normal(size=case.shape) + rng.normal(0, 1, wide)).astype(dtype)
    gamma, beta = rng.normal(size=(2, *channels)).astype(np.float64 if dtype == np.float64 else np.float32)
    return x, gamma, beta, dy, channels


def assert_close(result, exact, dtype):
    """Within TOLERANCE eps of max(1, |exact|)."""
    error = np.abs(result.astype(np.float64) - exact) / np.maximum(1, np.abs(exact))
    assert error.max(initial=0) <= TOLERANCE[dtype.name] * eps(dtype)


def assert_sum_close(result, exact, terms, dtype):
    """A sum of `terms` against the sum of their sizes.

    float32 results are rounded once. float64 ones are sums of up to 1000 terms, rounded about log2(1000) = 10 times
    however they are paired, and their factors (mean, covariance, 1 / std, count) four times more.
    """
    number = np.float64 if dtype == np.float64 else np.float32
    assert result.dtype == number
    assert np.all(np.abs(result - exact) <= (14 if number is np.float64 else 1) * np.finfo(number).eps * terms)


def memory_order(a):
    """The axes of more than one element by stride: what an array's layout is."""
    return [i for i in np.argsort([-abs(s) for s in a.strides], kind="stable") if a.shape[i] > 1]


@each_dtype
@each_case
@pytest.mark.usefixtures("tiny")
def test_training(case, dtype, backend, rng):
    x, gamma, beta, dy, channels = draw(case, dtype, rng)
    before = x.copy()
    y, saved = fastbn.forward(x, gamma, beta, axis=case.axis)
    exact, exact_saved = reference.forward(x, gamma, beta, axis=case.axis)
    assert y.dtype == x.dtype
    assert memory_order(y) == memory_order(np.empty_like(x))
    assert_close(y, exact, dtype)

    dx, dgamma, dbeta = fastbn.backward(dy, saved)
    exact_dx, exact_dgamma, exact_dbeta = reference.backward(dy, exact_saved)
    assert dx.dtype == x.dtype
    assert_close(dx, exact_dx, dtype)
    others = exact_saved.axes
    xhat = exact_saved.d / np.sqrt(exact_saved.var + 1e-5)
    sizes = np.abs(dy.astype(np.float64)).sum(others).reshape(channels)
    assert_sum_close(
        dgamma, exact_dgamma, (np.abs(dy.astype(np.float64)) * np.abs(xhat)).sum(others).reshape(channels), dtype
    )
    assert_sum_close(dbeta, exact_dbeta, sizes, dtype)
    np.testing.assert_array_equal(x, before)

    again = fastbn.backward(dy, saved)  # saved is not used up
    for one, two in zip((dx, dgamma, dbeta), again, strict=True):
        np.testing.assert_array_equal(one, two)


@each_dtype
@each_case
@pytest.mark.usefixtures("tiny")
def test_frozen_and_infer(case, dtype, backend, rng):
    x, gamma, beta, dy, channels = draw(case, dtype, rng)
    mean, var = rng.normal(size=channels), rng.uniform(0.3, 4, channels)
    y, saved = fastbn.forward(x, gamma, beta, axis=case.axis, frozen=(mean, var), eps=1e-3)
    exact, exact_saved = reference.forward(x, gamma, beta, axis=case.axis, frozen=(mean, var), eps=1e-3)
    assert saved.moments is None
    assert_close(y, exact, dtype)
    inferred = fastbn.infer(x, mean, var, gamma, beta, axis=case.axis, eps=1e-3)
    np.testing.assert_array_equal(inferred, y)

    dx, dgamma, dbeta = fastbn.backward(dy, saved)
    exact_dx, exact_dgamma, exact_dbeta = reference.backward(dy, exact_saved)
    assert_close(dx, exact_dx, dtype)
    xhat = np.abs(exact_saved.d / np.sqrt(exact_saved.var + 1e-3))
    size = np.abs(dy.astype(np.float64))
    assert_sum_close(dgamma, exact_dgamma, (size * xhat).sum(exact_saved.axes).reshape(channels), dtype)
    assert_sum_close(dbeta, exact_dbeta, size.sum(exact_saved.axes).reshape(channels), dtype)


@each_dtype
@each_case
@pytest.mark.usefixtures("tiny")
def test_moments(case, dtype, backend, rng):
    x, *_ = draw(case, dtype, rng)
    found, exact = fastbn.moments(x, axis=case.axis), reference.moments(x, axis=case.axis)
    assert found.count == exact.count
    assert found.mean.dtype == (np.float64 if dtype == np.float64 else np.float32)
    (mean, var), (exact_mean, exact_var) = found.exact(), exact.exact()
    # A few roundings of a mean of size 1 to 10 and of a variance. Deviations from a pivot near the mean are summed in
    # float32 where there are enough of them, each rounded by half a float32 eps of itself.
    few = dtype == np.float64 or found.count < 256 or backend == "reference"
    off = 0.0 if few else 2.0**-24 * np.sqrt(exact_var)
    limit = off + 16 * 2.2e-16 * (1 + np.abs(exact_mean).max())
    np.testing.assert_array_less(np.abs(mean - exact_mean), limit)
    np.testing.assert_allclose(var, exact_var, rtol=64 * 2.2e-16 if few else 2.0**-23, atol=1e-30)
    saved = fastbn.forward(x, axis=case.axis)[1]
    if 0 in x.strides:  # y has none, so forward cuts x in another way
        np.testing.assert_allclose(saved.moments.exact(), found.exact(), rtol=2.0**-22 if not few else 1e-14)
    else:
        np.testing.assert_array_equal(saved.moments.exact(), found.exact())


@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True)], ids=str)
@each_dtype
def test_gamma_and_beta_are_optional(given, dtype, backend, rng):
    x, gamma, beta, dy, channels = draw(CASES[0], dtype, rng)
    gamma, beta = gamma if given[0] else None, beta if given[1] else None
    y, saved = fastbn.forward(x, gamma, beta)
    ones = np.ones(channels) if gamma is None else gamma
    zeros = np.zeros(channels) if beta is None else beta
    explicit, explicit_saved = fastbn.forward(x, ones, zeros)
    np.testing.assert_array_equal(y, explicit)
    for one, two in zip(fastbn.backward(dy, saved), fastbn.backward(dy, explicit_saved), strict=True):
        np.testing.assert_array_equal(one, two)
    assert_close(y, reference.forward(x, gamma, beta)[0], dtype)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("need", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
def test_need(need, frozen, backend, rng):
    x, gamma, beta, dy, channels = draw(CASES[0], np.dtype(np.float32), rng)
    statistics = (rng.normal(size=channels), rng.uniform(0.5, 2, channels)) if frozen else None
    saved = fastbn.forward(x, gamma, beta, frozen=statistics)[1]
    whole = fastbn.backward(dy, saved)
    for wanted, part, full in zip(need, fastbn.backward(dy, saved, need=need), whole, strict=True):
        assert (part is not None) == bool(wanted)
        if wanted:
            np.testing.assert_array_equal(part, full)


@pytest.mark.parametrize(
    "case", [c for c in CASES if "broadcast" not in c.name and c.name != "read-only"], ids=lambda c: c.name
)
@each_dtype
@pytest.mark.usefixtures("tiny")
def test_in_place(case, dtype, backend, rng):
    x, gamma, beta, dy, _ = draw(case, dtype, rng)
    dy = case.make(dy)
    y, saved = fastbn.forward(x, gamma, beta, axis=case.axis)
    dx, dgamma, dbeta = fastbn.backward(dy, saved)

    into_dy = dy.copy(order="K")
    results = fastbn.backward(into_dy, saved, out=(into_dy, np.empty_like(dgamma), np.empty_like(dbeta)))
    assert results[0] is into_dy
    np.testing.assert_array_equal(results[1], dgamma)
    np.testing.assert_array_equal(results[2], dbeta)
    np.testing.assert_array_equal(into_dy, dx)

    into_x = case.make(x.copy())
    assert fastbn.backward(dy, fastbn.forward(into_x, gamma, beta, axis=case.axis)[1], out=into_x)[0] is into_x
    np.testing.assert_array_equal(into_x, dx)

    into_x = case.make(x.copy())
    assert fastbn.forward(into_x, gamma, beta, axis=case.axis, out=into_x)[0] is into_x
    np.testing.assert_array_equal(into_x, y)


@pytest.mark.parametrize(
    "layout_out",
    [c for c in CASES if c.shape == (4, 5, 40) and "broad" not in c.name and c.name != "read-only"],
    ids=lambda c: c.name,
)
@pytest.mark.parametrize("layout_x", [c for c in CASES if c.shape == (4, 5, 40)], ids=lambda c: c.name)
@pytest.mark.usefixtures("tiny")
def test_layouts_of_x_dy_and_out_are_independent(layout_x, layout_out, backend, rng):
    x, gamma, beta, dy, _ = draw(layout_x, np.dtype(np.float32), rng)
    axis = layout_x.axis
    y, saved = fastbn.forward(x, gamma, beta, axis=axis)
    dx = fastbn.backward(dy, saved)[0]
    for memory in (layout_out.make, lambda a: np.ascontiguousarray(a.transpose(2, 0, 1)).transpose(1, 2, 0)):
        out = memory(np.zeros(x.shape, x.dtype)).view()
        if out.dtype != x.dtype:
            out = out.astype(x.dtype)
        fastbn.forward(x, gamma, beta, axis=axis, out=out)
        np.testing.assert_array_equal(out, y)
        laid = memory(dy).astype(x.dtype, order="K")
        close = fastbn.backward(laid, saved, out=out)[0]
        assert close is out
        # Another layout may sum in another order, in float64: the float32 results differ by one rounding at most.
        np.testing.assert_allclose(out, dx, rtol=1.2e-7, atol=1.2e-7)


@each_dtype
def test_empty(dtype, backend):
    for shape in ((0, 3), (4, 3, 0), (0, 3, 0)):
        x = np.empty(shape, dtype)
        y, saved = fastbn.forward(x, np.ones(3), np.ones(3))
        assert (y.shape, y.dtype) == (shape, dtype)
        assert saved.moments.count == 0
        dx, dgamma, dbeta = fastbn.backward(np.empty(shape, dtype), saved)
        assert (dx.shape, dx.dtype) == (shape, dtype)
        np.testing.assert_array_equal([dgamma, dbeta], np.zeros((2, 3)))
        assert fastbn.infer(x, np.zeros(3), np.ones(3)).shape == shape
        assert fastbn.moments(x).count == 0


@each_dtype
def test_no_channels(dtype, backend):
    x = np.empty((4, 0, 5), dtype)
    y, saved = fastbn.forward(x)
    dx, dgamma, dbeta = fastbn.backward(x, saved)
    assert y.shape == dx.shape == x.shape
    assert dgamma.shape == dbeta.shape == saved.moments.mean.shape == (0,)


@each_dtype
def test_one_value_per_channel(dtype, backend, rng):
    x, dy = rng.normal(3, 2, (2, 1, 7)).astype(dtype)
    gamma, beta = rng.normal(size=(2, 7)).astype(np.float32)
    with pytest.warns(fastbn.OneValueWarning, match="one value per channel"):
        y, saved = fastbn.forward(x, gamma, beta)
    np.testing.assert_array_equal(y[0], beta.astype(dtype))
    dx, dgamma, dbeta = fastbn.backward(dy, saved)
    np.testing.assert_array_equal(dx, 0)
    np.testing.assert_array_equal(dgamma, 0)
    np.testing.assert_array_equal(dbeta, dy[0].astype(dbeta.dtype))


def test_numbers_without_axes(rng):
    """As `np.load` gives them back."""
    x, gamma = rng.normal(rng.normal(), 2, (20, 3)).astype(np.float32), rng.normal(1, 0.5, 3)
    zero = np.array(0.25)
    for got, want in (
        (fastbn.forward(x, gamma, eps=zero)[0], fastbn.forward(x, gamma, eps=0.25)[0]),
        (fastbn.moments(x).var(np.array(2, np.uint8)), fastbn.moments(x).var(2)),
        (fastbn.forward(x.astype(np.int8), scale=zero)[0], fastbn.forward(x.astype(np.int8), scale=0.25)[0]),
        (fastbn.forward(x, groups=np.array(4))[0], fastbn.forward(x, groups=4)[0]),
    ):
        np.testing.assert_array_equal(got, want)
    layers = fastbn.BatchNorm(np.array(3), eps=zero, momentum=zero), fastbn.BatchNorm(3, eps=0.25, momentum=0.25)
    for layer in layers:
        layer(x)
    np.testing.assert_array_equal(layers[0].running.mean, layers[1].running.mean)
