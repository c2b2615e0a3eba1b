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

from .arrays import FLOAT32, FLOAT64, NUMBA, Span, on_device
from .host import Caller, caller_of, check_host, type_and_shape

Axis = int | Sequence[int]


def describe(value: Any) -> str:
    """`float32 array of shape (2, 3)`, or the type and value of what is no array."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array of shape {value.shape}" + (f", {value}" if value.ndim == 0 else "")
    if isinstance(value, Span):
        return str(value)
    if (family := on_device(value)) is not None:
        return str(family.locate(value))
    if (caller := caller_of(value)) is not None:
        return type_and_shape(caller, value)
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def dtype_of(x: Any) -> Any:
    """The dtype in words of x's library: kernels read bfloat16 on a GPU under int16."""
    return x.type if isinstance(x, Span) else x.dtype


def check_array(function: str, name: str, value: Any, whole: bool = False) -> Any:
    """`value`, if it is an array of a floating type that is normalized, else TypeError; one on a GPU as a Span.

    One of another library in main memory comes back as NumPy's, on the same memory. With `whole`, whole numbers of up
    to 16 bits are taken too.
    """
    if type(value) is not np.ndarray:
        value = check_host(function, name, value)
        if not isinstance(value, np.ndarray):
            if (family := on_device(value)) is not None:
                return _check_span(function, name, family.locate(value), whole)
            raise TypeError(
                f"{function}: {name} is a {type(value).__module__}.{type(value).__qualname__}; expected a NumPy "
                "array, a PyTorch tensor, a JAX array or another that has __dlpack__ or __array_interface__, or on a "
                "GPU a CuPy array, a PyTorch CUDA tensor or a Numba device array. Convert it: np.asarray(...) for "
                "lists and buffers, cupy.asarray(...) for arrays on a GPU"
            )
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(
                f"{function}: {name} is a masked array, whose mask would be ignored; expected a plain NumPy array. "
                f"Pass {name}.filled(value), or only the rows that count"
            )
        if isinstance(value, np.matrix):
            raise TypeError(f"{function}: {name} is an np.matrix, which can't be 3-D; pass np.asarray({name})")
    dtype = value.dtype
    if is_normalized(dtype) or (whole and dtype.kind in "iu" and dtype.itemsize <= 2):
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


def _check_span(function: str, name: str, span: Span, whole: bool = False) -> Span:
    if (reason := span.family.refusal(span.value, name)) is not None:
        raise TypeError(f"{function}: {name} is a {span}, and {reason}")
    if span.dtype is None or (span.whole and not whole):
        raise TypeError(
            f"{function}: {name} is a {span}; expected float16, bfloat16, float32 or float64 elements. Convert it"
        )
    return span


def check_place(function: str, name: str, value: Any, x: Any) -> Any:
    """`value`, located, if it is an array of x's library on x's device: nothing is copied to another place unasked."""
    if type(value) is np.ndarray and not isinstance(x, Span):  # nearly every call
        return value
    family = on_device(value)
    if not isinstance(x, Span):
        if family is not None:
            raise TypeError(
                f"{function}: {name} is a {describe(value)}; expected an array in main memory, like the rest, and "
                "nothing is copied there unasked. Copy it, or all others to the GPU"
            )
        return value
    if family is not x.family:
        place = " in main memory" if isinstance(value, np.ndarray) else ""
        hint = ", or make RunningStats and BatchNorm with like=x" if name in ("gamma", "beta", "mean", "var") else ""
        raise TypeError(
            f"{function}: {name} is a {describe(value)}{place}; expected a {x.family.kind} on device {x.device}, like "
            f"the rest, and nothing is copied there unasked. Pass {x.family.convert.format(name)}{hint}"
        )
    span = family.locate(value)
    if span.device != x.device:
        raise ValueError(
            f"{function}: {name} is a {span}; expected one on device {x.device}, like the rest, and nothing is copied "
            "there unasked. Copy it"
        )
    return span


def check_caller(function: str, name: str, value: Any, caller: Caller | None) -> None:
    """TypeError unless `value`, in the same place as x, is of the library that x came from (None: NumPy's)."""
    if (caller is not None or type(value) is not np.ndarray) and caller_of(value) != caller:
        kind = "NumPy array" if caller is None else caller.kind
        raise TypeError(f"{function}: {name} is a {describe(value)}; expected a {kind}, like x. Convert it")


@functools.lru_cache(maxsize=64)
def is_normalized(dtype: np.dtype[Any]) -> bool:
    """In either byte order. Cached, as comparing a dtype with a type takes 0.1 µs, and asking for its name 1 µs."""
    dtype = native(dtype)
    return dtype in (np.float16, np.float32, np.float64) or dtype.name == "bfloat16"


def native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The same number type in this machine's byte order."""
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def check_axis(function: str, x: Any, axis: Axis) -> tuple[int, ...]:
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


def integer(value: Any, least: float = -math.inf) -> int | None:
    """`value` as an int, if it is one whole number of `least` or more: a narrow or unsigned one would wrap in what is
    done with it."""
    value = _taken_out(value)
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        return None
    return int(value)


def _taken_out(value: Any) -> Any:
    """The number in an array without axes, as `np.load` gives one back."""
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value


def finite(value: Any) -> float | None:
    """`value` as a float, if it is one finite real number."""
    value = _taken_out(value)
    if not isinstance(value, (int, float, np.floating, np.integer)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def whole(count: float) -> float:
    """A count as an int, unless it is a sum of weights that isn't one."""
    return int(count) if float(count).is_integer() else count


def check_eps(function: str, eps: Any) -> float:
    if type(eps) is float and 0.0 < eps < math.inf:  # nearly every call
        return eps
    if (number := finite(eps)) is not None and number > 0:
        return number
    raise ValueError(f"{function}: eps is {describe(eps)}; expected a finite number above 0, such as 1e-5")


def check_channels(function: str, name: str, value: Any, shape: tuple[int, ...], beside: Any = None) -> Any:
    """A parameter with one real number for each channel, as a new float64 array (C,) of the library of `beside`."""
    if (family := on_device(beside)) is None:
        return check_real(function, name, value, shape).astype(np.float64)
    if family is NUMBA:
        raise TypeError(
            f"{function}: {name} is a {describe(value)}, which can't be computed with; expected NumPy or CuPy arrays "
            f"or PyTorch tensors. Pass {name}.copy_to_host()"
        )
    _check_parameter(function, name, value, shape, family.locate(beside))
    return family.rounded(value, FLOAT64).reshape(-1)


def check_real(function: str, name: str, value: Any, shape: tuple[int, ...], x: Any = None) -> Any:
    """As `check_channels`, not copied where kernels can read it: a contiguous float32 or float64 array beside x."""
    array: np.ndarray = value
    if isinstance(x, Span):
        return _check_parameter(function, name, value, shape, x)
    if value is not None and are_ready((value,), shape):
        return value
    if type(value) is not np.ndarray:
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{function}: {name} is a masked array; expected a plain array. Pass {name}.filled(value)")
        check_place(function, name, value, x)
        try:
            array = np.asarray(check_host(function, name, value))
        except ValueError:
            raise ValueError(f"{function}: {name} is ragged; expected {shape} real numbers") from None
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"{function}: {name} is a {describe(array)}; expected real numbers")
    if array.shape != shape:
        raise ValueError(_wrong_channels(function, name, array.shape, shape))
    array = array.reshape(-1)
    return array if are_ready((array,), array.shape) else np.ascontiguousarray(array, np.float64)


def are_ready(values: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    """Whether kernels read these parameters as they are, those that aren't None: in nearly every call."""
    if len(shape) != 1:
        return False
    for a in values:
        if a is None:
            continue
        if type(a) is not np.ndarray or a.shape != shape or not a.flags.c_contiguous:
            return False
        if a.dtype is not FLOAT32 and a.dtype is not FLOAT64:
            return False
    return True


def _wrong_channels(function: str, name: str, came: tuple[int, ...], shape: tuple[int, ...]) -> str:
    return (
        f"{function}: {name} has shape {came}; expected {shape}, one value for each channel of x. "
        "Is axis the channel axis?"
    )


def _check_parameter(function: str, name: str, value: Any, shape: tuple[int, ...], x: Span) -> Any:
    """A GPU's (C,): one that came in another type or with gaps is converted by its own library."""
    family = x.family
    if len(shape) == 1 and family.fits(value, shape, x.device):  # nearly every call
        return value
    span = _check_span(function, name, check_place(function, name, value, x))
    if span.shape != shape:
        raise ValueError(_wrong_channels(function, name, span.shape, shape))
    if span.dtype.char in "fd" and span.dense:
        return value if len(shape) == 1 else value.reshape(-1)
    if family is NUMBA:
        raise TypeError(
            f"{function}: {name} is a {span} with strides {span.strides}; expected a contiguous array of "
            "float32 or float64, as Numba device arrays can't be converted where they are"
        )
    new = family.new(shape, FLOAT64, x.device)
    family.assign(family.locate(new), family.locate(family.rounded(value, FLOAT64)))
    return new.reshape(-1)


def check_variances(function: str, value: Any, shape: tuple[int, ...], name: str = "var", beside: Any = None) -> Any:
    """As `check_channels`, with no value below 0; on a GPU that isn't looked at."""
    return check_sign(function, name, check_channels(function, name, value, shape, beside))


def check_sign(function: str, name: str, array: Any) -> Any:
    if not isinstance(array, np.ndarray) or not array.size:  # a GPU would be waited for
        return array
    # 6 us where caches are cold, 17 by the reduction, which has to be where there is a NaN: that isn't below 0.
    if not array.item(array.argmin()) >= 0 and np.fmin.reduce(array, axis=None) < 0:
        raise ValueError(f"{function}: {name} has a negative value ({np.nanmin(array):.6g}); expected 0 or more")
    return array


def check_frozen(function: str, frozen: Any, shape: tuple[int, ...], x: Any = None) -> tuple[Any, Any]:
    """Mean and variance as by `check_real`, from a pair of them or from RunningStats."""
    if type(frozen) is not tuple and hasattr(frozen, "exact"):
        frozen = frozen.exact(copy=False)
    if not isinstance(frozen, (tuple, list)) or len(frozen) != 2:
        raise TypeError(f"{function}: frozen is {describe(frozen)}; expected a pair (mean, var), or RunningStats")
    mean = check_real(function, "mean", frozen[0], shape, x)
    return mean, check_sign(function, "var", check_real(function, "var", frozen[1], shape, x))


def check_shape(function: str, channels: Any) -> tuple[int, ...]:
    """The channels' shape, from their number or their shape."""
    shape = tuple(channels) if isinstance(channels, (tuple, list)) else (channels,)
    numbers = [n for n in map(integer, shape) if n is not None and n >= 0]
    if not shape or len(numbers) < len(shape):
        raise ValueError(f"{function}: channels is {describe(channels)}; expected their number, or a tuple of numbers")
    return tuple(numbers)


def check_out(
    function: str,
    name: str,
    out: Any,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    x: Any,
    may_be: dict[str, Any],
    apart_from: dict[str, Any],
    caller: Caller | None = None,
) -> Any:
    """`out`, if a result of this shape and dtype can be written there, beside x, without spoiling the arrays named."""
    target = check_place(function, name, out, x)
    if caller is not None and caller.immutable:
        raise TypeError(f"{function}: {name} is given, but {caller.kind}s are never written to; expected None")
    target = _check_span(function, name, target) if isinstance(x, Span) else check_array(function, name, out)
    check_caller(function, name, out, caller)
    if target.shape != shape or target.dtype != dtype:
        kind = x.type if isinstance(x, Span) and x.dtype == dtype else dtype
        raise ValueError(
            f"{function}: {name} is a {describe(target)}; expected {kind} of shape {shape}. "
            + ("Make it of that type" if isinstance(x, Span) else f"Make it with np.empty({shape}, {dtype.name!r})")
        )
    if not isinstance(target, Span) and not target.flags.writeable:
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


def same_memory(a: Any, b: Any) -> bool:
    """True where element by element a is b."""
    if a is b:
        return True
    if isinstance(a, Span):
        return a.address == b.address and a.shape == b.shape and _same_strides(a, b)
    if not np.may_share_memory(a, b) or a.shape != b.shape:  # most arrays don't, and that takes 0.2 µs to see
        return False
    return _same_strides(a, b) and bool(a.ctypes.data == b.ctypes.data)  # last, as an address takes 1 µs to get


def _same_strides(a: Any, b: Any) -> bool:
    return not any(s != t for s, t, n in zip(a.strides, b.strides, a.shape, strict=True) if n > 1)


def overlap(a: Any, b: Any) -> bool:
    if isinstance(a, Span):
        (low, high), (start, end) = a.bounds(), b.bounds()
        if high <= start or end <= low:  # nearly every call
            return False
        a, b = a.addresses(), b.addresses()
    if not np.may_share_memory(a, b):
        return False
    try:
        return bool(np.shares_memory(a, b, max_work=100_000))  # type: ignore[arg-type]
    except TooHardError:
        return True


def overlaps_itself(a: Any) -> bool:
    """True where two elements of `a` may share memory."""
    if (a.dense if isinstance(a, Span) else a.flags.c_contiguous) or a.size == 0:
        return False
    span = a.dtype.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if stride < span:
            return True
        span += stride * (size - 1)
    return False
