"""`correct`: every path against float64, which NumPy computes on the host."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .functions import BY_NUMBA, by_numba, public
from .run import EPS, WAYS, Run, plans

Array = Any
NONE = (None, None, None, None)


class Shape(NamedTuple):
    """An array (O, C, I) and where it lies: `full` is allocated, `view` leads from there to the view."""

    name: str
    full: tuple[int, ...]
    view: Callable[[Array], Array]
    reason: str
    offset: float = 3.0  # mean of the data over its deviation


def _first(*shape: int) -> tuple[tuple[int, ...], Callable[[Array], Array]]:
    return shape, lambda a: a


def _last(rows: int, channels: int) -> tuple[tuple[int, ...], Callable[[Array], Array]]:
    return (rows, channels), lambda a: a.reshape(rows, channels, 1)


SMALL = [
    Shape("3x5x33", *_first(3, 5, 33), "odd runs"),
    Shape("4x6x64", *_first(4, 6, 64), "whole vectors"),
    Shape("50x24 last", *_last(50, 24), "columns"),
]
SHAPES = [
    *SMALL,
    Shape("8x64x3136", *_first(8, 64, 3136), "56x56", 1e3),
    Shape("25088x64 last", *_last(25088, 64), "the same, channels last", 1e3),
    Shape("4x2048x49", *_first(4, 2048, 49), "7x7: narrow rows as columns"),
    Shape("16x32x729", *_first(16, 32, 729), "27x27: windows"),
    Shape("2x3x262144", *_first(2, 3, 262144), "three channels of 4 MB: many ranks", 1e4),
    Shape("128x1024 last", *_last(128, 1024), "an MLP"),
    Shape("300000x3 last", *_last(300000, 3), "rows of three: folded"),
    Shape("7x3 last", *_last(7, 3), "hardly anything"),
    Shape("1x1x1000003", *_first(1, 1, 1000003), "one channel of a prime length"),
    Shape("2x100000x4", *_first(2, 100000, 4), "100,000 channels"),
    Shape("70000x4x4", *_first(70000, 4, 4), "more rows than a grid's y and z have"),
    Shape("slice", (9, 24, 100), lambda a: a[:, 5:18], "channels of a larger array"),
    Shape("off by one", (6, 5, 129), lambda a: a[:, :, 1:], "runs that start between vectors"),
    Shape("every second", (5, 6, 80), lambda a: a[:, :, ::2], "what no kernel walks: copied"),
]
DTYPES = ("float32", "float16", "bfloat16", "float64")
# Errors in eps of the dtype, relative to max(1, |result|), of dx and sums to the magnitudes of what they add up,
# beyond which a result is wrong. A half type rounds once. float32 data has coefficients and a deviation rounded to
# float32: 3 eps for y, some more for dx, of three terms. float64's reference may itself be off by many eps.
LIMITS = {"float32": 8.0, "float16": 0.55, "bfloat16": 0.55, "float64": 256.0}
UNIT = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 2.0**-52}


def elements(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to the dtype; bfloat16 as int16 bits."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16)


def numbers(array: np.ndarray) -> np.ndarray:
    """What the elements mean, in float32 or wider."""
    if array.dtype == np.int16:
        return (array.astype(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if array.dtype == np.float16 else array


class Truth:
    """One shape and dtype: its data, and what float64 makes of them. The data is poison outside the view."""

    def __init__(self, shape: Shape, dtype: str) -> None:
        reference: Any = importlib.import_module("fastbn.kernels.reference")
        self.shape, self.dtype = shape, dtype
        rng = np.random.default_rng(list(f"{shape.name} {dtype}".encode()))
        offset = shape.offset if dtype in ("float32", "float64") else 1.0
        self.x = self._within(rng, offset)
        self.dy = self._within(rng, 0.5)
        x, dy = numbers(shape.view(self.x)), numbers(shape.view(self.dy))
        C = int(x.shape[1])
        number: Any = np.float64 if dtype == "float64" else np.float32
        self.given = rng.uniform(0.5, 1.5, C).astype(number), rng.normal(size=C).astype(number)
        self.frozen = rng.normal(size=C).astype(number), rng.uniform(0.5, 2.0, C).astype(number)
        self.table, self.table_frozen = np.empty((6, C)), np.empty((6, C))
        wide = np.empty(x.shape)
        self.y, self.y_frozen, self.dx, self.dx_frozen = (wide.copy() for _ in range(4))
        sums = np.empty((4, C))
        reference.forward(x, self.y, self.table, (*self.given, None, None), EPS)
        reference.forward(x, self.y_frozen, self.table_frozen, (*self.given, *self.frozen), EPS)
        reference.backward(dy, x, self.dx, self.table, sums[0], sums[1], False)
        reference.backward(dy, x, self.dx_frozen, self.table_frozen, sums[2], sums[3], True)
        self.dgamma, self.dbeta, self.dgamma_frozen, self.dbeta_frozen = sums
        e = x - self.table[0, :, None] - self.table[1, :, None]
        g = dy - dy.mean((0, 2), dtype=np.float64, keepdims=True)
        slope = (g * e).mean((0, 2), keepdims=True) * self.table[3, :, None] ** 2
        spread = np.sqrt(np.square(g).mean((0, 2), keepdims=True))  # the mean of dy is off by eps of this
        parts = np.abs(g) + np.abs(e * slope) + spread
        self.size_dx = np.maximum(1.0, np.abs(self.table[4, :, None] * self.table[3, :, None]) * parts)
        self.size_dbeta = np.abs(dy).sum((0, 2), dtype=np.float64)
        self.size_dgamma, self.size_dgamma_frozen = (
            np.abs(dy * (x - table[0, :, None] - table[1, :, None]) * table[3, :, None]).sum((0, 2), dtype=np.float64)
            for table in (self.table, self.table_frozen)
        )

    def _within(self, rng: np.random.Generator, offset: float) -> np.ndarray:
        full = np.full(self.shape.full, np.nan)
        view = self.shape.view(full)
        view[...] = np.asarray(rng.normal(size=view.shape) + offset * rng.normal(size=(1, view.shape[1], 1)))
        return elements(full, self.dtype)

    @functools.cached_property
    def poison(self) -> np.ndarray:
        return elements(np.full(self.shape.full, np.nan), self.dtype)

    def off(self, got: np.ndarray, expected: np.ndarray, size: np.ndarray | None = None, unit: float = 0.0) -> float:
        """The largest error in eps, relative to max(1, |expected|) or `size`; inf where a NaN is left."""
        scale = np.maximum(1.0, np.abs(expected) if size is None else size)
        error = np.abs(numbers(got).astype(np.float64) - expected) / scale
        return float(error.max() / (unit or UNIT[self.dtype])) if np.isfinite(error).all() else math.inf


def check(device: Any, truth: Truth, way: str | None, repeats: int) -> dict[str, Any]:
    """Forward, backward and their frozen forms on one path: errors in eps; whether every repeat had the same bits."""
    put, view, launch = device.put, truth.shape.view, device.launch
    x, dy = view(put(truth.x)), view(put(truth.dy))
    C = x.shape[1]
    number = truth.given[0].dtype
    given = [put(a) for a in truth.given]
    frozen = [put(a) for a in truth.frozen]
    tables = [put(truth.table), put(truth.table_frozen)]
    seen: list[list[bytes]] = []
    errors: dict[str, float] = {}
    for _ in range(repeats):
        full = [put(truth.poison) for _ in range(4)]
        y, dx, y_frozen, dx_frozen = (view(a) for a in full)
        table, table_frozen = put(np.full((6, C), np.nan)), put(np.full((6, C), np.nan))
        sums = [put(np.full(C, np.nan, number)) for _ in range(4)]
        if repeats > 1:
            device.disturb()
        with launch.planned(**({} if way is None else {"way": way})):
            launch.forward(x, y, table, (*given, None, None), EPS)
            launch.backward(dy, x, dx, tables[0], sums[0], sums[1], False)
        launch.forward(x, y_frozen, table_frozen, (*given, *frozen), EPS)
        launch.backward(dy, x, dx_frozen, tables[1], sums[2], sums[3], True)
        got = [device.get(a) for a in (*full, table, table_frozen, *sums)]
        seen.append([a.tobytes() for a in got])
        if len(seen) > 1:
            continue
        outside = [truth.poison.copy() for _ in range(4)]
        for a, b in zip(got, outside, strict=False):
            view(b)[...] = view(a)
            errors["outside"] = max(errors.get("outside", 0.0), float(a.tobytes() != b.tobytes()))
        expected = (truth.y, truth.dx, truth.y_frozen, truth.dx_frozen)
        for name, a, b in zip(("y", "dx", "y frozen", "dx frozen"), got, expected, strict=False):
            errors[name] = truth.off(view(a), b, truth.size_dx if name == "dx" else None)
        unit = UNIT["float64" if number == np.float64 else "float32"]
        # hi less hi and lo less lo: hi + lo would be rounded at the size of the mean, 10^4 deviations.
        error = np.abs((got[4][:2] - truth.table[:2]).sum(0)) / np.sqrt(truth.table[2])
        errors["mean"] = float(error.max() / unit)
        errors["invstd"] = truth.off(got[4][3] / truth.table[3], np.ones(C), unit=unit)
        errors["dgamma"] = truth.off(got[6], truth.dgamma, truth.size_dgamma, unit)
        errors["dbeta"] = truth.off(got[7], truth.dbeta, truth.size_dbeta, unit)
        errors["dgamma frozen"] = truth.off(got[8], truth.dgamma_frozen, truth.size_dgamma_frozen, unit)
        errors["dbeta frozen"] = truth.off(got[9], truth.dbeta_frozen, truth.size_dbeta, unit)
    same = all(bits == seen[0] for bits in seen)
    limit = LIMITS[truth.dtype]
    limits = dict.fromkeys(errors, LIMITS["float64" if number == np.float64 else "float32"])
    limits |= dict.fromkeys(("y", "dx", "y frozen", "dx frozen"), limit) | {"outside": 0.5}
    wrong = [name for name, error in errors.items() if not error <= limits[name]]
    return {"ok": same and not wrong, "same_bits": same, "wrong": wrong, "eps": errors} | _planned(device, x, dy, way)


def possible(device: Any, truth: Truth, way: str | None) -> bool:
    """Whether the planner can force this way."""
    x, dy = truth.shape.view(device.put(truth.x)), truth.shape.view(device.put(truth.dy))
    try:
        return way is None or None not in plans(device, x, dy, way)
    except ValueError:
        return False


def correct(run: Run) -> None:
    shapes = SMALL if run.small else SHAPES[:8] if run.quick else SHAPES
    repeats = 1 if run.small else 3
    dtypes = ("float32", "float16") if run.small else DTYPES
    truths = functools.lru_cache(maxsize=1)(Truth)

    def cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        for dtype in dtypes:
            for shape in shapes:
                for way in WAYS:
                    name = f"{shape.name} {dtype} {way or 'planned'}"
                    if not run.rows.has("correct", name) and possible(run.device, truths(shape, dtype), way):
                        yield name, functools.partial(check, run.device, truths(shape, dtype), way, repeats)

    run.each("correct", cases())
    if not run.small:
        extra = [("graph " + str(way or "planned"), functools.partial(graph, run.device, way)) for way in WAYS]
        extra += [("in place", functools.partial(in_place, run.device)), ("NaN", functools.partial(stray, run.device))]
        extra += [(f"public {kind}", functools.partial(public, run.device, kind)) for kind in ("CuPy", "PyTorch")]
        extra += [
            (f"{name} {kind} {way or 'planned'}", functools.partial(beyond, run.device, name, kind, way))
            for way in ((None,) if run.quick else (None, "SPLIT"))
            for name in BEYOND
            for kind in BEYOND_SHAPES
        ]
        if not run.quick:
            extra += [("2^31 elements", functools.partial(giant, run.device))]
        # Last, as numba.cuda compiles for some seconds.
        kinds = ("Numba", "Numba by numba.cuda")
        extra += [(f"public {kind}", functools.partial(public, run.device, kind)) for kind in kinds]
        extra += [
            (f"{name} {kind}", functools.partial(by_numba, run.device, name, kind))
            for name in BY_NUMBA
            for kind in ("CuPy", "PyTorch", "Numba")
        ]
        run.each("correct", extra)


def _arrays(device: Any, *shape: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(5)
    x = rng.normal(3, 2, shape).astype(np.float32)
    return x, device.put(x), device.put(np.full_like(x, np.nan)), device.put(np.full((6, shape[1]), np.nan))


def graph(device: Any, way: str | None) -> dict[str, Any]:
    """Three replays of a captured call give the bits of the call."""
    _, x, y, table = _arrays(device, 16, 32, 3136)
    with device.launch.planned(**({} if way is None else {"way": way})):
        device.launch.forward(x, y, table, NONE, EPS)
        plain = device.get(y)
        again = device.put(np.full_like(plain, np.nan))
        device.replay(lambda: device.launch.forward(x, again, table, NONE, EPS), 3)
    return {"ok": device.get(again).tobytes() == plain.tobytes() and bool(np.isfinite(plain).all())}


# What a call may ask for beyond batch norm: an activation and its parameter, a residual, groups by id, weights.
BEYOND: dict[str, tuple[str, float, bool, bool, str]] = {
    "relu of a sum": ("relu", 0.0, True, False, ""),
    "gelu": ("gelu", 0.0, False, False, ""),
    "elu in groups": ("elu", 1.5, True, True, ""),
    "weights": ("", 0.0, False, False, "normalize"),
    "relu of a masked sum in groups": ("relu", 0.0, True, True, "zero"),
}
BEYOND_SHAPES = {"first": (16, 64, 784), "last": (3136, 64, 1)}


def beyond(device: Any, name: str, kind: str, way: str | None) -> dict[str, Any]:
    """y, dx, dgamma, dbeta and dresidual in float32, beside the reference's; two repeats of the same bits."""
    reference: Any = importlib.import_module("fastbn.kernels.reference")
    extras: Any = importlib.import_module("fastbn.extras")
    activation, parameter, summed, grouped, masked = BEYOND[name]
    shape = BEYOND_SHAPES[kind]
    C = shape[1]
    rng = np.random.default_rng(list(f"{name} {kind}".encode()))
    x, dy, r = rng.normal(1, 2, (3, *shape)).astype(np.float32)
    starts = order = None
    if grouped:
        starts, order = np.array([0, 3, 3, 9, 16]) * shape[0] // 16, rng.permutation(shape[0])
    sets = 1 if starts is None else len(starts) - 1
    more = extras.Extras(activation, parameter, r if summed else None, None, starts=starts, order=order)
    on = {"residual": device.put(r) if summed else None}
    if masked:
        w = (rng.gamma(1, 1, (shape[0], 1, shape[2])) * (rng.random((shape[0], 1, shape[2])) < 0.8)).astype(np.float32)
        rows: list[Any] = (
            [slice(None)] if starts is None or order is None else [order[i:j] for i, j in itertools.pairwise(starts)]
        )
        mass = np.array([w[row].sum(dtype=np.float64) for row in rows])
        more = more._replace(weights=w, mass=mass, masked=masked)
        on |= {"weights": device.put(w), "mass": device.put(np.full(sets, np.nan))}
    wide, dr, dx = (np.empty(shape) for _ in range(3))
    table, sums = np.empty((6, C * sets)), np.empty((2, C * sets))
    # Away from the kink, where a slope would be another one by a rounding.
    reference.forward(x, wide, table, NONE, EPS, more._replace(activation="", masked="normalize"))
    x = np.where(np.abs(wide) < 1e-4, x + np.float32(0.01), x)
    reference.forward(x, wide, table, NONE, EPS, more)
    reference.backward(dy, x, dx, table, *sums, False, more._replace(dresidual=dr))
    given_x, given_dy, seen, found = device.put(x), device.put(dy), [], []
    for _ in range(2):
        outs = [device.put(np.full(shape, np.nan, np.float32)) for _ in range(3)]
        out_table, out_sums = (
            device.put(np.full(table.shape, np.nan)),
            device.put(np.full(sums.shape, np.nan, np.float32)),
        )
        with device.launch.planned(**({} if way is None else {"way": way})):
            device.launch.forward(given_x, outs[0], out_table, NONE, EPS, more._replace(**on))
            back = more._replace(**on, dresidual=outs[2] if summed else None)
            device.launch.backward(given_dy, given_x, outs[1], device.put(table), *out_sums, False, back)
        found = [device.get(a) for a in (*outs, out_table, out_sums)]
        seen.append([a.tobytes() for a in found])
    errors = {}
    for label, got, right in zip(("y", "dx", "dr"), found, (wide, dx, dr if summed else None), strict=False):
        if right is not None:
            error = np.abs(got - right) / np.maximum(4.0, np.abs(right))  # z is the sum of three terms
            errors[label] = float(error.max() / UNIT["float32"])
    size = np.abs(dr).sum((0, 2)).max() + 1
    errors["sums"] = float(np.abs(found[4] - sums).max() / size / UNIT["float32"])
    wrong = [label for label, error in errors.items() if not error <= LIMITS["float32"]]
    return {"ok": not wrong and seen[0] == seen[1], "same_bits": seen[0] == seen[1], "wrong": wrong, "eps": errors}


def in_place(device: Any) -> dict[str, Any]:
    """y may be x, dx may be dy."""
    _, x, y, table = _arrays(device, 8, 16, 3136)
    device.launch.forward(x, y, table, NONE, EPS)
    dx = device.put(np.zeros(x.shape, np.float32))
    device.launch.backward(y, x, dx, table, None, None, False)
    wanted = device.get(y).tobytes(), device.get(dx).tobytes()
    device.launch.backward(y, x, y, table, None, None, False)
    device.launch.forward(x, x, table, NONE, EPS)
    return {"ok": (device.get(x).tobytes(), device.get(y).tobytes()) == wanted}


def stray(device: Any) -> dict[str, Any]:
    """A NaN stays in its channel, and a constant channel gives beta exactly."""
    host, _, y, table = _arrays(device, 4, 8, 1000)
    host[2, 3, 500] = np.nan
    host[:, 5] = 1e10
    beta = np.arange(8, dtype=np.float32)
    device.launch.forward(device.put(host), y, table, (None, device.put(beta), None, None), EPS)
    lost = np.isnan(device.get(y)).any((0, 2))
    return {"ok": list(np.flatnonzero(lost)) == [3] and bool((device.get(y)[:, 5] == 5.0).all())}


def giant(device: Any) -> dict[str, Any]:
    """More than 2^31 elements: the same rows over and over have the moments of one, so all of them give its y."""
    cupy, rows = device.cupy, 262_200
    host = elements(np.random.default_rng(6).normal(1, 2, (64, 8, 1024)), "float16")
    x = cupy.empty((rows, 8, 1024), np.float16)
    small = cupy.asarray(host)
    for first in range(0, rows, 64):
        part = x[first : first + 64]
        cupy.copyto(part, small[: len(part)])
    table = cupy.empty((6, 8))
    start = time.monotonic()
    device.launch.forward(x, x, table, NONE, EPS)
    tail, head = cupy.asnumpy(x[rows - 64 - rows % 64 :][:64]), cupy.asnumpy(x[:64])
    expected, wide = np.empty(host.shape), np.empty((6, 8))
    kernels: Any = importlib.import_module("fastbn.kernels.reference")
    kernels.forward(numbers(host), expected, wide, NONE, EPS)
    # The last block of rows isn't whole: 56 rows more in 262,200 move a mean by up to 2^-14 of a deviation.
    errors = [float(np.abs(numbers(a) - expected).max()) for a in (head, tail)]
    return {"ok": max(errors) < 4e-3, "elements": x.size, "errors": errors, "seconds": time.monotonic() - start}


def _planned(device: Any, x: Any, dy: Any, way: str | None) -> dict[str, Any]:
    """What the planner took for forward and backward."""
    found = {}
    for name, plan in zip(("forward", "backward"), plans(device, x, dy, way), strict=True):
        found[name] = "copied first" if plan is None else f"{plan.walk.layout} V{plan.walk.V} {plan.way} K{plan.K}"
    return found
