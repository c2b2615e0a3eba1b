"""The CuPy launcher, whose launches the emulator carries out: the reference's numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("cupy", reason="CuPy isn't installed")

import cupy
from cupy_double import MOST
from fastbn.kernels import reference
from fastbn.kernels.cuda import launch as cuda

import fastbn

NONE = (None, None, None, None)
EPS = 1e-3

# Layouts of a (O, C, I) view, with the reason for each; the rest of the memory is NaN.
LAYOUTS = {
    "channels first": ((3, 5, 64), lambda a: a, "runs of whole vectors"),
    "odd runs": ((3, 5, 81), lambda a: a, "windows, or element by element"),
    "short runs": ((6, 8, 9), lambda a: a, "3x3: as columns"),
    "channels last": ((60, 16), lambda a: a[:, :, None], "columns"),
    "rows of three": ((64, 3), lambda a: a[:, :, None], "folded rows"),
    "channel slice": ((4, 12, 64), lambda a: a[:, 3:8], "a gap between rows"),
    "between vectors": (
        (4, 6, 72),
        lambda a: a[:, :, 1:65],
        "whole vectors apart, none at its border",
    ),
    "transposed": ((5, 90), lambda a: a.T[:, :, None], "(C, N) in memory"),
    "every second": ((4, 5, 60), lambda a: a[:, :, ::2], "what no kernel walks: copied"),
    "one value": ((1, 8, 1), lambda a: a, "hardly anything"),
}
TYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": np.int16}
UNIT = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def elements(values, dtype):
    """Rounded; bfloat16 as int16 bits."""
    if dtype != "bfloat16":
        return values.astype(TYPES[dtype])
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16)


def values(array):
    """What the elements mean."""
    if array.dtype == np.int16:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


class Arrays:
    """x, dy and outputs in one layout, and the reference's results."""

    def __init__(self, gpu, rng, layout, dtype, numbers=None):
        self.gpu, self.dtype, (self.full, self.view, _) = gpu, dtype, LAYOUTS[layout]
        self.x, self.dy, self.y, self.dx = (self.array() for _ in range(4))
        C = self.x.shape[1]
        for a, mean in ((self.x, 5.0), (self.dy, 0.5)):
            filled = rng.normal(size=a.shape) + mean * rng.normal(size=(1, C, 1))
            gpu.host(a)[...] = elements(filled, dtype)
        self.number = np.float64 if dtype == "float64" else np.float32
        made = [f(C).astype(numbers or self.number) for f in (rng.standard_normal, rng.standard_normal, rng.random)]
        self.gamma, self.beta, self.var = made
        self.mean = rng.normal(size=C).astype(numbers or self.number)
        self.table = gpu.array(np.full((6, C), np.nan))
        self.sums = [gpu.array(np.full(C, np.nan, self.number)) for _ in range(2)]

    def array(self):
        made = self.gpu.array(elements(np.full(self.full, np.nan), self.dtype))
        return self.view(made)

    def values(self, array):
        return values(self.gpu.host(array))

    def on_device(self, *parameters):
        return tuple(None if p is None else self.gpu.array(p) for p in parameters)

    def close(self, got, expected, what):
        error = np.abs(self.values(got) - expected) / np.maximum(1, np.abs(expected))
        assert np.isfinite(error).all(), what
        assert error.max() <= MOST[self.dtype] * UNIT[self.dtype], what

    def check_forward(self, given, y=True):
        x, C = self.values(self.x), self.x.shape[1]
        expected, table = np.empty(x.shape), np.empty((6, C))
        reference.forward(x, expected, table, given, EPS)
        cuda.forward(self.x, self.y if y else None, self.table, self.on_device(*given), EPS)
        got = self.gpu.host(self.table)
        # float32 sums of deviations from a pivot, merged in float64: 8 eps of the deviation, and of the variance
        unit = UNIT["float64" if self.dtype == "float64" else "float32"]
        scale = 8 * unit * (np.abs(table[0]) * 2.0**-20 + np.sqrt(table[2]) + EPS)
        assert (np.abs((got[0] - table[0]) + (got[1] - table[1])) <= scale).all()
        np.testing.assert_allclose(got[2:4], table[2:4], rtol=16 * unit, atol=1e-30)
        assert (got[4:] == table[4:]).all()
        if y:
            self.close(self.y, expected, "y")
        return table

    def check_backward(self, frozen, dx=True, dgamma=True, dbeta=True, table=None):
        x, dy, C = self.values(self.x), self.values(self.dy), self.x.shape[1]
        expected, sums = np.empty(x.shape), np.empty((2, C))
        reference.backward(dy, x, expected, table, *sums, frozen)
        self.gpu.host(self.table)[...] = table
        given = self.sums[0] if dgamma else None, self.sums[1] if dbeta else None
        cuda.backward(self.dy, self.x, self.dx if dx else None, self.table, *given, frozen)
        if dx:
            self.close(self.dx, expected, "dx")
        d = np.abs(dy) * np.abs((x - table[0, :, None] - table[1, :, None]) * table[3, :, None])
        sizes = d.sum((0, 2)), np.abs(dy).sum((0, 2))
        for wanted, got, right, size in zip((dgamma, dbeta), self.sums, sums, sizes, strict=True):
            if wanted:  # of the sum of magnitudes: float32 sums of deviations, merged in float64
                unit = UNIT["float64" if self.dtype == "float64" else "float32"]
                assert (np.abs(self.gpu.host(got) - right) <= 8 * unit * np.maximum(1, size)).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_backward(emulated, rng, layout, dtype):
    a = Arrays(emulated, rng, layout, dtype)
    table = a.check_forward((a.gamma, a.beta, None, None))
    a.check_backward(False, table=table)


@pytest.mark.parametrize("way", ["BLOCK", "CLUSTER", "GRID", "SPLIT"])
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_every_way(emulated, rng, layout, way):
    a = Arrays(emulated, rng, layout, "float32")
    with cuda.planned(way=way):
        table = a.check_forward((a.gamma, a.beta, None, None))
        a.check_backward(False, table=table)
    assert {s.way for s in emulated.started} == ({"STATS", "APPLY"} if way == "SPLIT" else {way})


def test_a_grid_that_is_split_gives_the_same_bits(emulated, rng):
    a = Arrays(emulated, rng, "channels first", "float32")
    found = []
    for resident in (32, 0):
        emulated.resident = resident
        cuda._ready.clear()
        with cuda.planned(way="GRID"):
            a.check_forward((a.gamma, a.beta, None, None))
        found.append((a.gpu.host(a.y).tobytes(), a.gpu.host(a.table).tobytes()))
    assert [s.way for s in emulated.started] == ["GRID", "STATS", "APPLY"]
    assert found[0] == found[1]


@pytest.mark.parametrize("numbers", [np.float32, np.float64])
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_frozen_statistics(emulated, rng, layout, numbers):
    a = Arrays(emulated, rng, layout, "float32", numbers)
    table = a.check_forward((a.gamma, a.beta, a.mean, a.var))
    assert [s.way for s in emulated.started] == ["APPLY"]
    a.check_backward(True, table=table)
    a.check_backward(True, dgamma=False, dbeta=False, table=table)
    a.check_backward(True, dx=False, table=table)
    a.check_backward(True, dgamma=False, table=table)


@pytest.mark.parametrize("absent", ["gamma", "beta", "both"])
def test_absent_parameters(emulated, rng, absent):
    """Absent gamma is 1, and absent beta is 0."""
    a = Arrays(emulated, rng, "channels first", "float32")
    given = None if absent in ("gamma", "both") else a.gamma, None if absent in ("beta", "both") else a.beta
    table = a.check_forward((*given, None, None))
    a.check_backward(False, table=table)


def test_moments_alone(emulated, rng):
    a = Arrays(emulated, rng, "odd runs", "float16")
    a.check_forward(NONE, y=False)
    assert np.isnan(a.values(a.y)).all()
    assert emulated.started[0].pointers.y == 0


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone(emulated, rng, wanted):
    a = Arrays(emulated, rng, "channels first", "float32")
    table = a.check_forward((a.gamma, a.beta, None, None))
    a.check_backward(False, *wanted, table=table)
    left = [not np.isfinite(emulated.host(array).astype(float)).any() for array in (a.dx, *a.sums)]
    assert left == [not w for w in wanted]


@pytest.mark.parametrize("layout", ["channels first", "channels last", "every second"])
@pytest.mark.parametrize("way", [None, "GRID"])
def test_in_place(emulated, rng, layout, way):
    a = Arrays(emulated, rng, layout, "float32")
    with cuda.planned(**({} if way is None or layout == "every second" else {"way": way})):
        given = a.on_device(a.gamma, a.beta, None, None)
        cuda.forward(a.x, a.y, a.table, given, EPS)
        cuda.backward(a.dy, a.x, a.dx, a.table, None, None, False)
        x = emulated.host(a.x).copy()
        cuda.backward(a.dy, a.x, a.dy, a.table, None, None, False)
        dx_over_dy = emulated.host(a.dy).tobytes()
        cuda.forward(a.x, a.x, a.table, given, EPS)
    assert emulated.host(a.x).tobytes() == emulated.host(a.y).tobytes() != x.tobytes()
    assert dx_over_dy == emulated.host(a.dx).tobytes()


def test_what_lies_between_is_left_alone(emulated, rng):
    """NaN before, and still there after: a slice's neighbours."""
    a = Arrays(emulated, rng, "channel slice", "float32")
    a.check_forward((a.gamma, a.beta, None, None))
    whole = a.view(np.zeros(a.full))
    base = emulated.host(a.y.base if a.y.base is not None else a.y)
    assert np.isnan(base).sum() == base.size - whole.size


def test_workspaces_serve_one_call_after_another(emulated, rng):
    """Barriers are left as they were found: no launch clears them."""
    a, b = Arrays(emulated, rng, "channels first", "float32"), Arrays(emulated, rng, "odd runs", "float32")
    with cuda.planned(way="GRID"):
        for one in (a, b, a, b):
            table = one.check_forward((one.gamma, one.beta, None, None))
            one.check_backward(False, table=table)
    assert len({s.pointers.barriers for s in emulated.started}) == 1
    assert len(emulated.cleared) == 1


def test_threads_on_two_devices(emulated, rng):
    made = []
    for number in (0, 1):
        with cupy.cuda.Device(number):
            made.append(Arrays(emulated, rng, "channels last", "float32"))
    for number, a in enumerate(made):
        with cupy.cuda.Device(number):
            table = a.check_forward((a.gamma, a.beta, None, None))
            a.check_backward(False, table=table)
    assert [number for number, _ in itertools.groupby(s.device for s in emulated.started)] == [0, 1]


# ---- the public functions

PUBLIC = {
    "channels first": lambda a: a,
    "channels last": lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "a channel slice": lambda a: np.concatenate([a, a, a], 1)[:, 3:7],
    "cropped": lambda a: np.pad(a, ((0, 0), (0, 0), (1, 2), (2, 1)))[:, :, 1:-2, 2:-1],
    "every second": lambda a: np.repeat(a, 2, 3)[:, :, :, ::2],
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", PUBLIC)
def test_public_functions_on_cupy_arrays(emulated, rng, layout, dtype):
    """As on NumPy arrays: y, dx, dgamma, dbeta, frozen y; types and memory layouts."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    number = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    x, dy = (PUBLIC[layout]((rng.normal(size=(3, 4, 4, 8)) + 3).astype(number)) for _ in range(2))
    gamma, beta, mean = rng.normal(size=(3, 4)).astype(np.float32)
    var = rng.uniform(0.5, 2, 4).astype(np.float32)
    with fastbn.set_backend("reference"):
        y, saved = fastbn.forward(x, gamma, beta)
        expected = [y, *fastbn.backward(dy, saved), fastbn.infer(x, mean, var, gamma, beta)]
    x, dy = emulated.array(x, x), emulated.array(dy, dy)
    gamma, beta, mean, var = (emulated.array(a) for a in (gamma, beta, mean, var))
    y, saved = fastbn.forward(x, gamma, beta)
    got = [y, *fastbn.backward(dy, saved), fastbn.infer(x, mean, var, gamma, beta)]
    eps = float(ml_dtypes.finfo(number).eps)
    for a, b in zip(got, expected, strict=True):
        assert type(a) is cupy.ndarray
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        # Two results of one rounding each, on either side of the truth; float32 and float64 round a few times more.
        # A gradient of gamma or beta is the sum of 96 values.
        scale = np.maximum(1, np.abs(b.astype(np.float64))) * (96 if b.ndim == 1 else 1)
        off = np.abs(emulated.host(a).astype(np.float64) - b.astype(np.float64)) / scale
        most = 1.01 * eps if b.dtype.itemsize == 2 else 16 * float(ml_dtypes.finfo(b.dtype).eps)
        assert off.max() <= most
    order = np.argsort([-s for s in x.strides], kind="stable").tolist()
    assert np.argsort([-s for s in y.strides], kind="stable").tolist() == order


def test_public_functions_write_where_they_are_told(emulated, rng):
    x = emulated.array(rng.normal(size=(4, 6, 50)).astype(np.float32))
    dy = emulated.array(rng.normal(size=x.shape).astype(np.float32))
    expected, saved = fastbn.forward(x)
    dx = fastbn.backward(dy, saved)[0]
    out = cupy.empty_like(x)
    y, saved = fastbn.forward(x, out=out)
    assert y is out
    assert emulated.host(out).tobytes() == emulated.host(expected).tobytes()
    assert fastbn.backward(dy, saved, out=dy)[0] is dy
    assert emulated.host(dy).tobytes() == emulated.host(dx).tobytes()
    assert fastbn.forward(x, out=x)[0] is x
    assert emulated.host(x).tobytes() == emulated.host(expected).tobytes()


def test_public_functions_run_on_the_arrays_device(emulated, rng):
    with cupy.cuda.Device(1):
        x = emulated.array(rng.normal(size=(4, 6, 50)).astype(np.float32))
    emulated.stream = 4
    y, saved = fastbn.forward(x)
    fastbn.backward(x, saved)
    assert y.data.device_id == 1
    assert {(s.device, s.stream) for s in emulated.started} == {(1, 1004)}
    assert emulated.current == 0
