"""What a caller may pass, and what is said to one who passes something else.

An error names the function, the argument, what came, what was expected, and what to do. Everything is checked
before anything is written.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.exceptions import AxisError, TooHardError

Axis = int | Sequence[int]
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def describe(value: Any) -> str:
    """`float32 array of shape (2, 3)`, or the type and value of what is no array."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array of shape {value.shape}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def check_array(function: str, name: str, value: Any) -> np.ndarray:
    """`value`, if it is a NumPy array of a floating type that is normalized, else TypeError."""
    if type(value) is not np.ndarray:
        if not isinstance(value, np.ndarray):
            raise TypeError(
                f"{function}: {name} is a {type(value).__module__}.{type(value).__qualname__}; expected a NumPy "
                "array. Convert it: np.asarray(...) for lists, np.from_dlpack(...) for tensors in main memory"
            )
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(
                f"{function}: {name} is a masked array, whose mask would be ignored; expected a plain NumPy array. "
                f"Pass {name}.filled(value), or only the rows that count"
            )
        if isinstance(value, np.matrix):
            raise TypeError(f"{function}: {name} is an np.matrix, which can't be 3-D; pass np.asarray({name})")
    dtype = value.dtype
    if _is_normalized(dtype):
        return value
    if dtype.kind in "biu":
        advice = f"Convert it: {name}.astype(np.float32)"
    elif dtype.kind == "c":
        advice = f"Normalize {name}.real and {name}.imag, each as an array of its own"
    else:
        advice = f"Convert it: {name}.astype(np.float64)"
    raise TypeError(
        f"{function}: {name} is a {describe(value)}; expected float16, bfloat16, float32 or float64. {advice}"
    )


@functools.lru_cache(maxsize=64)
def _is_normalized(dtype: np.dtype[Any]) -> bool:
    """In either byte order. Cached, as comparing a dtype with a type takes 0.1 µs, and asking for its name 1 µs."""
    dtype = native(dtype)
    return dtype in (np.float16, np.float32, np.float64) or dtype.name == "bfloat16"


def native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The same number type in this machine's byte order."""
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def check_axis(function: str, x: np.ndarray, axis: Axis) -> tuple[int, ...]:
    """The channel axes, ascending and from 0."""
    if type(axis) is int and -x.ndim <= axis < x.ndim > 1:  # nearly every call
        return (axis % x.ndim,)
    if x.ndim < 2:
        raise ValueError(
            f"{function}: x has shape {x.shape}; expected at least two axes, channels and something to average over. "
            "For one channel of n values, pass x.reshape(1, -1) with axis=0"
        )
    try:
        given = tuple(operator.index(a) for a in (axis if isinstance(axis, (tuple, list)) else (axis,)))
    except TypeError:
        raise TypeError(f"{function}: axis is {describe(axis)}; expected an int or a tuple of ints") from None
    for a in given:
        if not -x.ndim <= a < x.ndim:
            raise AxisError(
                f"{function}: axis={axis} is out of range for x of shape {x.shape}; expected {-x.ndim} to {x.ndim - 1}"
            )
    axes = tuple(sorted({a % x.ndim for a in given}))
    if not axes or len(axes) < len(given):
        raise ValueError(f"{function}: axis={axis} names {'an axis twice' if given else 'no axis'}; name each once")
    return axes


def finite(value: Any) -> float | None:
    """`value` as a float, if it is one finite real number."""
    if not isinstance(value, (int, float, np.floating, np.integer)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def check_eps(function: str, eps: Any) -> float:
    if type(eps) is float and 0.0 < eps < math.inf:  # nearly every call
        return eps
    if (number := finite(eps)) is not None and number > 0:
        return number
    raise ValueError(f"{function}: eps is {describe(eps)}; expected a finite number above 0, such as 1e-5")


def check_channels(function: str, name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter with one real number for each channel, as float64 of shape (C,)."""
    return check_real(function, name, value, shape).astype(np.float64)


def check_real(function: str, name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """As `check_channels`, not copied where kernels can read it: a contiguous float32 or float64 array."""
    array: np.ndarray = value
    if type(value) is not np.ndarray:
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{function}: {name} is a masked array; expected a plain array. Pass {name}.filled(value)")
        try:
            array = np.asarray(value)
        except ValueError:
            raise ValueError(f"{function}: {name} is ragged; expected {shape} real numbers") from None
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"{function}: {name} is a {describe(array)}; expected real numbers")
    if array.shape != shape:
        raise ValueError(
            f"{function}: {name} has shape {array.shape}; expected {shape}, one value for each channel of x. "
            "Is axis the channel axis?"
        )
    dtype = array.dtype
    if (dtype is not FLOAT32 and dtype is not FLOAT64) or not array.flags.c_contiguous:
        return np.ascontiguousarray(array, np.float64).reshape(-1)
    return array if array.ndim == 1 else array.reshape(-1)


def check_variances(function: str, value: Any, shape: tuple[int, ...], name: str = "var") -> np.ndarray:
    """As `check_channels`, with no value below 0."""
    return _check_sign(function, name, check_channels(function, name, value, shape))


def _check_sign(function: str, name: str, array: np.ndarray) -> np.ndarray:
    if np.count_nonzero(array < 0):  # .any() takes 1 µs
        raise ValueError(f"{function}: {name} has a negative value ({np.nanmin(array):.6g}); expected 0 or more")
    return array


def check_frozen(function: str, frozen: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance as by `check_real`, from a pair of them or from RunningStats."""
    if hasattr(frozen, "exact"):
        frozen = frozen.exact()
    if not isinstance(frozen, (tuple, list)) or len(frozen) != 2:
        raise TypeError(f"{function}: frozen is {describe(frozen)}; expected a pair (mean, var), or RunningStats")
    mean = check_real(function, "mean", frozen[0], shape)
    return mean, _check_sign(function, "var", check_real(function, "var", frozen[1], shape))


def check_shape(function: str, channels: Any) -> tuple[int, ...]:
    """The channels' shape, from their number or their shape."""
    shape = tuple(channels) if isinstance(channels, (tuple, list)) else (channels,)
    if not shape or not all(isinstance(n, (int, np.integer)) and n >= 0 for n in shape):
        raise ValueError(f"{function}: channels is {describe(channels)}; expected their number, or a tuple of numbers")
    return tuple(int(n) for n in shape)


def check_out(
    function: str,
    name: str,
    out: Any,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    may_be: dict[str, np.ndarray | None],
    apart_from: dict[str, np.ndarray | None],
) -> np.ndarray:
    """`out`, if a result of this shape and dtype can be written there without spoiling the arrays named."""
    target = check_array(function, name, out)
    if target.shape != shape or target.dtype != dtype:
        raise ValueError(
            f"{function}: {name} is a {describe(target)}; expected {dtype} of shape {shape}. "
            f"Make it with np.empty({shape}, {dtype.name!r})"
        )
    if not target.flags.writeable:
        raise ValueError(f"{function}: {name} is read-only; expected an array to write to. Pass a copy of it")
    if overlaps_itself(target):
        raise ValueError(
            f"{function}: {name} of shape {target.shape} has strides {target.strides}, under which elements share "
            "memory; expected an array with a place for each. Pass np.empty_like(x)"
        )
    for other, array in may_be.items():
        if array is not None and not same_memory(target, array) and overlap(target, array):
            raise ValueError(
                f"{function}: {name} overlaps {other} in memory without being {other}; expected the same array or one "
                "apart from it. Pass another array"
            )
    for other, array in apart_from.items():
        if array is not None and overlap(target, array):
            raise ValueError(f"{function}: {name} overlaps {other} in memory; expected an array apart from it")
    return target


def same_memory(a: np.ndarray, b: np.ndarray) -> bool:
    """True where element by element a is b."""
    if a is b:
        return True
    if not np.may_share_memory(a, b) or a.shape != b.shape:  # most arrays don't, and that takes 0.2 µs to see
        return False
    if any(s != t for s, t, n in zip(a.strides, b.strides, a.shape, strict=True) if n > 1):
        return False
    return bool(a.ctypes.data == b.ctypes.data)  # last, as an address takes 1 µs to get


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    if not np.may_share_memory(a, b):
        return False
    try:
        return bool(np.shares_memory(a, b, max_work=100_000))  # type: ignore[arg-type]
    except TooHardError:
        return True


def overlaps_itself(a: np.ndarray) -> bool:
    """True where two elements of `a` may share memory."""
    if a.flags.c_contiguous or a.size == 0:
        return False
    span = a.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if stride < span:
            return True
        span += stride * (size - 1)
    return False
