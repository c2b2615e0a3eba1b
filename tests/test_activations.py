"""Activations and residuals: against the reference, and where two lines meet."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cases import DTYPES
from extras import SHAPES, check

import fastbn
from fastbn.extras import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("backend")


# Each activation and dtype compiles kernels of its own for 15 s; `test_activation_functions` has the rest.
@pytest.mark.parametrize(
    ("activation", "dtype"), [("relu", DTYPES[0]), ("gelu", DTYPES[0]), ("relu", DTYPES[3])], ids=str
)
def test_activations(activation, dtype, rng):
    for shape, axis in SHAPES.values():
        residuals = {"gelu": (False,), "relu": (False, True) if dtype is DTYPES[0] else (True,)}[activation]
        for residual, frozen in itertools.product(residuals, (False, True)):
            check(rng, shape, axis, dtype, activation=activation, residual=residual, frozen=frozen)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(8, 5, 7, 33), (200, 33), (4, 9, 9, 3)], ids=str)
def test_a_residual_that_is_repeated(shape, frozen, rng):
    """Channels last, where its rows lie on each other: a step of 0 was taken for no residual, and others were read."""
    one = (1,) * (len(shape) - 2)
    for rows in ((1, *one), (shape[0], *one), (1, *shape[1:-1])):
        check(rng, shape, -1, DTYPES[0], activation="relu", residual=(*rows, shape[-1]), frozen=frozen)


def test_a_residual_that_is_overwritten(rng):
    """The slopes of an activation need it: backward says that it is gone; without an activation it isn't needed."""
    many = rng.normal(0, 1, (41, 6)).astype(np.float32)
    x, dy = rng.normal(rng.normal(0, 2, 6), 1, (2, 40, 6)).astype(np.float32)
    gamma, beta = rng.normal(1, 0.5, 6), rng.normal(0, 1, 6)
    for activation in ("relu", None):
        r = many[:-1].copy()
        want, saved = fastbn.forward(x, gamma, beta, residual=r, activation=activation)
        right = fastbn.backward(dy, saved)
        y, saved = fastbn.forward(x, gamma, beta, residual=r, activation=activation, out=r)
        assert y is r
        np.testing.assert_array_equal(y, want)
        if activation is None:
            np.testing.assert_allclose(fastbn.backward(dy, saved)[0], right[0], atol=1e-6)
            continue
        with pytest.raises(ValueError, match=r"saved has no residual, which `out` overwrote"):
            fastbn.backward(dy, saved)
        _, saved = fastbn.forward(x, gamma, beta, residual=many[:-1], activation=activation)
        with pytest.raises(ValueError, match=r"out \(dx\) overlaps residual in memory"):
            fastbn.backward(dy, saved, out=(many[1:], None, None))
        with pytest.raises(ValueError, match=r"out \(dresidual\) overlaps residual in memory"):
            fastbn.backward(dy, saved, out=(None, None, None, many[1:]))
        found = fastbn.backward(dy, saved, out=(many[:-1], None, None))
        np.testing.assert_array_equal(found[0], right[0])
        with pytest.raises(ValueError, match=r"saved has no residual, which `out` overwrote"):
            fastbn.backward(dy, saved)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_the_references(activation, rng, backend):
    if backend == "cpu":
        pytest.skip("compiled for three of them above")
    for shape, axis in SHAPES.values():
        check(rng, shape, axis, DTYPES[1], activation=activation, residual=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_functions(activation, dtype, rng, backend):
    """f, f' and f^-1 of sixteen numbers at a time: within 8 eps, relative to 1 where they are small; NaN and Inf."""
    if backend == "reference":
        pytest.skip("it is what they are held against")
    import numba
    from fastbn.kernels.cpu import activations as a
    from fastbn.kernels.cpu.lanes import spread
    from fastbn.kernels.cpu.memory import load, pointer, save
    from fastbn.kernels.reference import activate, deactivate, slope

    invertible = activation in ("leaky_relu", "elu")
    straighten = a.straighten if invertible else a.slope

    def run(how, z, out):
        like = spread(z[0])
        for i in range(0, z.size, 16):
            v = load(pointer(z, 0), i, like)
            f = a_bend(how, v)
            save(pointer(out, 0), i, f)
            save(pointer(out, out.strides[0]), i, a_slope(how, v))
            save(pointer(out, 2 * out.strides[0]), i, a_straighten(how, f))

    a_bend, a_slope, a_straighten = a.bend, a.slope, straighten
    real = numba.from_dtype(np.dtype(dtype))
    signature = (a.How(activation, False, False), numba.types.Array(real, 1, "C"), numba.types.Array(real, 2, "C"))
    dispatcher = numba.njit(error_model="numpy")(run)
    dispatcher.compile(signature)
    parameter = ACTIVATIONS[activation] or 0.0
    small = np.array([0.0, -0.0, 1e-30, -1e-30, 3.0, -3.0, 6.0, 2.9999, -2.9999, 5.9999, 1e-3, -1e-3, 20, -20, 80, -80])
    z = np.concatenate([small, rng.normal(0, 3, 4000), np.linspace(-40, 40, 2000), rng.normal(0, 1e-3, 976)]).astype(
        dtype
    )
    out = np.empty((3, z.size), dtype)
    entry = dispatcher.overloads[signature].entry_point
    entry((parameter, 1.0, 0.0, 0.0), z, out)
    wide = z.astype(np.float64)
    exact = activate(activation, parameter, wide), slope(activation, parameter, wide)
    limit = 8 * np.finfo(dtype).eps  # exp by way of a power of 2, and three or four more roundings
    for got, want in zip(out[:2], exact, strict=True):
        assert (np.abs(got - want) <= limit * np.maximum(1, np.abs(want))).all()
    if invertible:
        back = deactivate(activation, parameter, out[0].astype(np.float64))
        kept = out[0] > -0.999  # nearer to elu's limit, -1, y says ever less of z
        assert (np.abs(out[2] - back)[kept] <= 8 * np.finfo(dtype).eps * np.maximum(1, np.abs(back[kept]))).all()
    edge = np.resize(np.array([np.nan, np.inf, -np.inf, 1e30, np.finfo(dtype).max], dtype), 16)
    out = np.empty((3, 16), dtype)
    entry((parameter, 1.0, 0.0, 0.0), edge, out)
    assert np.isnan(out[0, 0])
    want = activate(activation, parameter, edge[1:2].astype(np.float64))[0]
    assert out[0, 1] == want or abs(out[0, 1] - want) < 1e-6
    want = activate(activation, parameter, edge[3:5].astype(np.float64))
    np.testing.assert_allclose(out[0, 3:5].astype(np.float64), want, rtol=limit)


@pytest.mark.parametrize(
    ("dtype", "short"),
    [(np.float32, False), (np.float32, True), (np.float64, False)],
    ids=["float32", "half", "float64"],
)
def test_the_edge_of_two_lines_is_where_z_changes_its_sign(dtype, short, rng, backend):
    """Backward compares x with a threshold where forward computes z: for every x they must agree."""
    if backend == "reference":
        pytest.skip("has no such threshold")
    import numba
    from fastbn.kernels.cpu import activations
    from fastbn.kernels.cpu import coefficients as parts

    how = activations.always(activations.How("relu", False, False, short))

    @numba.njit
    def coefficients(h, a, b, exactly, slot, numbers, singles):
        """As of a mean of h, gamma a, beta b and a deviation of 1."""
        table = np.array([[h], [0.0], [1.0], [1.0], [a], [b]])
        parts.forward_coefficients(how(), table, numbers, singles, exactly, slot.itemsize == 8)
        return exactly or singles[5, 0] != 0

    @numba.njit
    def edge(numbers, singles, exactly, slot):
        return parts.edge(how(), (numbers[0, 0], numbers[1, 0], numbers[2, 0]), singles, 0, exactly, slot)

    @numba.njit
    def below(x, numbers, singles, exactly, slot):
        lens = numbers[0, 0], numbers[1, 0], numbers[2, 0]
        return parts.below(how(), x, 1.0, lens, singles, 0, exactly, slot)

    numbers, singles, fast = np.zeros((3, 1)), np.zeros((6, 1), dtype), 0
    slot = np.zeros(1, dtype)
    for i in range(3000):
        h, a, b = rng.normal(size=3) * 10.0 ** rng.integers(-6, 7, 3)
        a, b, h = 0.0 if i % 50 == 1 else a, 0.0 if i % 50 == 2 else b, 0.0 if i % 50 == 3 else h
        exactly = coefficients(h, a, b, dtype is np.float64 or i % 3 == 0, slot, numbers, singles)
        fast += not exactly
        s, t = edge(numbers, singles, exactly, slot)
        x0 = dtype(s * t)
        others = np.concatenate(
            [rng.normal(size=4) * 10.0 ** rng.integers(-9, 9, 4), [0.0, h, np.inf, -np.inf, np.nan]]
        )
        with np.errstate(all="ignore"):
            xs = [x0, np.nextafter(x0, dtype(np.inf)), np.nextafter(x0, dtype(-np.inf)), *others.astype(dtype)]
            for x in map(float, xs):
                assert below(x, numbers, singles, exactly, slot) == (s * x <= t), (h, a, b, x, exactly)
    assert fast > 1500 or dtype is np.float64
    for h, a, b in itertools.product((0.0, 3.0, np.inf, np.nan), (1.0, -2.0, np.inf, np.nan), (0.5, -np.inf, np.nan)):
        exactly = coefficients(h, a, b, dtype is np.float64, slot, numbers, singles)
        s, t = edge(numbers, singles, exactly, slot)
        for x in (-1.0, 2.0, 1e30):
            assert below(x, numbers, singles, exactly, slot) == (s * x <= t), (h, a, b, x, exactly)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("values", [90, 900], ids=["few", "many"])
def test_backward_takes_the_line_that_forward_took(activation, dtype, values, rng, backend):
    """For x within ulps of the kink, in both layouts; gamma so small that float32 won't do is among them."""
    C, top = 9, 1e38
    mean, var = rng.normal(size=C) * 10.0 ** rng.integers(-3, 4, C), rng.uniform(0.2, 3, C)
    gamma, beta = rng.normal(size=C), rng.normal(size=C)
    gamma[0], beta[4:], mean[4:] = 1e-33, 0.0, [2.5, 3.0, -7.0, 0.1875, 100.0]  # x is the mean there, and z is 0
    root = np.clip(mean - beta / gamma * np.sqrt(var + 1e-5), -top, top)
    x = np.repeat(root.astype(dtype)[:, None], values, 1)
    x += np.spacing(np.abs(0.9 * x)) * rng.integers(-6, 7, (C, values)).astype(dtype)
    for axis, given in ((0, x), (1, np.ascontiguousarray(x.T))):
        y, saved = fastbn.forward(given, gamma, beta, axis=axis, frozen=(mean, var), activation=activation)
        dx, _, _ = fastbn.backward(np.ones_like(given), saved)
        slope = dx.astype(np.float64) / np.expand_dims(gamma / np.sqrt(var + 1e-5), 1 - axis)
        assert 0 < (slope < 0.5).sum() < x.size
        np.testing.assert_array_equal(slope < 0.5, y <= 0)
