"""Device functions: elements as numbers, and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from .target import cuda

# Elements: float32, float64 and float16 as they are, bfloat16 as int16 bits; x of float32's kernels may be of whole
# numbers, which are exact in float32. An index without a sign spares Numba's test for negative ones.


@cuda.jit(device=True)
def load_single(x, at):  # type: ignore[no-untyped-def]
    return np.float32(x[np.uint64(at)])


@cuda.jit(device=True)
def save_single(y, at, value):  # type: ignore[no-untyped-def]
    y[np.uint64(at)] = np.float32(value)


@cuda.jit(device=True)
def load_double(x, at):  # type: ignore[no-untyped-def]
    return x[np.uint64(at)]


@cuda.jit(device=True)
def save_double(y, at, value):  # type: ignore[no-untyped-def]
    y[np.uint64(at)] = value


@cuda.jit(device=True)
def save_half(y, at, value):  # type: ignore[no-untyped-def]
    y[np.uint64(at)] = np.float16(value)


@cuda.jit(device=True)
def load_bfloat(x, at):  # type: ignore[no-untyped-def]
    return np.int32(np.int32(x[np.uint64(at)]) << 16).view(np.float32)


@cuda.jit(device=True)
def save_bfloat(y, at, value):  # type: ignore[no-untyped-def]
    """Rounds to the nearest, ties to even: a carry out of the lower half moves the upper one."""
    bits = np.int64(np.float32(value).view(np.int32))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    y[np.uint64(at)] = np.int16(bits if value == value else 0x7FC0)


def access_of(name: str) -> tuple[Any, Any]:
    """How elements of a dtype are loaded, and how they are saved."""
    load = {"float64": load_double, "int16": load_bfloat}.get(name, load_single)
    save = {"float64": save_double, "float16": save_half, "int16": save_bfloat}.get(name, save_single)
    return load, save


@cuda.jit(device=True)
def in_range(a):  # type: ignore[no-untyped-def]
    """Whether float32 may scale by it; NaN: no."""
    return a == 0.0 or 1e-30 < abs(a) < 1e30


def where_asked(there: bool, function: Any, otherwise: Any) -> Any:
    """A device function: Numba mustn't see what `more` doesn't have."""
    return cuda.jit(function if there else otherwise, device=True)
