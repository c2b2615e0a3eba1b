"""Arrays of other libraries: whose they are, where they lie, and what each library has to do for us.

An array's family is found by its type, among libraries that are imported already: looking imports nothing. Kernels come
in two kinds, for CuPy arrays and for Numba device arrays; an array of any family is handed to either without a copy, on
the stream that its own library would use. Results are made by that library, so that they are the caller's own kind.
"""

from __future__ import annotations

import functools
import math
import sys
from importlib import import_module
from typing import Any

import numpy as np

FLOAT32, FLOAT64, INT16 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int16)
_ELEMENTS = "efdBbHh"  # dtype.char of what kernels read as it is: floats, and whole numbers of up to 16 bits


class Span:
    """A large array of another library, as checks and views see it: they then call nothing of that library.

    Arrays of C numbers have none, and go to the kernels as they are.

    `value` is the array, `type` its library's name for the numbers in it; `dtype` is how kernels read them (bfloat16 as
    int16 bits, which `whole` tells from whole numbers; None: not at all). address, shape and strides (bytes) are the
    view's, not the array's, in one that was `seen`.
    """

    __slots__ = ("address", "device", "dtype", "family", "shape", "strides", "type", "value")

    def __init__(
        self,
        family: OnDevice,
        value: Any,
        address: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: Any,
        type: Any,
        device: int,
    ) -> None:
        self.family, self.value, self.address, self.shape, self.strides = family, value, address, shape, strides
        self.dtype, self.type, self.device = dtype, type, device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dense(self) -> bool:
        """C-contiguous."""
        return self.strides == dense_strides(self.shape, self.dtype.itemsize) or self.size <= 1

    @property
    def whole(self) -> bool:
        """Whether its elements are whole numbers: int16 that its library doesn't call so is bfloat16."""
        return self.dtype.kind in "iu" and _is_named(self.type, self.dtype)

    def seen(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> Span:
        """The same memory in another shape."""
        return Span(self.family, self.value, self.address, shape, strides, self.dtype, self.type, self.device)

    def without_memory(self) -> Span:
        """To make arrays like it."""
        return Span(self.family, None, 0, self.shape, self.strides, self.dtype, self.type, self.device)

    def result(self) -> Span:
        """A new array for y or a residual's gradient: of the same type, and float32 for whole numbers."""
        kind = self.family.described(self.shape, FLOAT32, self.device) if self.whole else self
        return self.family.like(kind, self.strides)

    def bounds(self) -> tuple[int, int]:
        """The first address that it touches, and the one behind the last."""
        low, high = _reach(self.shape, self.strides, self.dtype.itemsize)
        return self.address + low, self.address + high

    def addresses(self) -> np.ndarray:
        """A NumPy array over the same addresses, for NumPy's overlap checks: it must never be read."""
        return np.asarray(Described({"typestr": self.dtype.str, "data": (self.address, False)}, self, "array"))

    def __str__(self) -> str:
        name = str(self.type).removeprefix("torch.")
        return f"{name} {self.family.kind} of shape {self.shape} on device {self.device}"


class Described:
    """What NumPy and Numba read to see memory as an array of theirs; it keeps the memory's owner."""

    def __init__(self, more: dict[str, Any], span: Span, kind: str) -> None:
        self.owner = span.value
        described = {"shape": span.shape, "strides": span.strides, "version": 3, **more}
        setattr(self, f"__{kind}_interface__", described)


@functools.lru_cache(maxsize=64)  # the words take 3 us
def _is_named(kind: Any, dtype: np.dtype[Any]) -> bool:
    return str(kind).removeprefix("torch.") == dtype.name


@functools.lru_cache(maxsize=4096)
def memory_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape with its axes as they lie in memory, and the place of each axis there."""
    order = sorted(range(len(shape)), key=lambda a: -abs(strides[a]))
    return tuple(shape[a] for a in order), tuple(order.index(a) for a in range(len(shape)))


@functools.lru_cache(maxsize=4096)
def dense_strides(shape: tuple[int, ...], itemsize: int, like: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Strides of an array without gaps, in C order, or with its axes in memory as under the strides `like`."""
    sizes, places = (shape, range(len(shape))) if like is None else memory_order(shape, like)
    return tuple(itemsize * math.prod(max(1, n) for n in sizes[place + 1 :]) for place in places)


@functools.lru_cache(maxsize=4096)
def _reach(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Bytes from the first element to the lowest address and behind the highest."""
    if 0 in shape:
        return 0, 0
    reach = [s * (n - 1) for s, n in zip(strides, shape, strict=True)]
    return sum(min(0, r) for r in reach), sum(max(0, r) for r in reach) + itemsize


class Family:
    """What C numbers need of their array library, for moments and layers; these are NumPy's answers."""

    kind = "NumPy array"

    def __reduce__(self) -> str:
        """Each is one of its kind, and is told by that: statistics that were copied or pickled too."""
        return next(name for name, value in globals().items() if value is self)

    @property
    def xp(self) -> Any:
        """Where `where`, `isfinite` and `expm1` are found, which are called alike in all libraries."""
        return np

    def assign(self, target: Any, source: Any) -> None:
        """target[...] = source, for arrays as checks see them."""
        target[...] = source

    def clear(self, values: Any) -> None:
        values[...] = 0

    def numbers(self, values: Any) -> Any:
        """An array that can be computed with: the same one, if it can."""
        return values

    def put(self, values: np.ndarray, _device: int) -> Any:
        """Copied from NumPy."""
        return values.copy()

    def host(self, values: Any) -> np.ndarray:
        """Copied to NumPy."""
        return np.array(values)

    def copy(self, values: Any) -> Any:
        return values.copy()

    def rounded(self, values: Any, dtype: np.dtype[Any]) -> Any:
        """Copied, in another type."""
        with np.errstate(over="ignore"):  # the variance of float32 data of 1e20 is inf in float32
            return values.astype(dtype)

    def in_units(self, values: Any, step: float, zero: float) -> Any:
        """values / step + zero, in float64."""
        return self.rounded(values, FLOAT64) / step + zero

    def total(self, parts: Any, target: Any) -> None:
        """target (C,) = the sums over sets of parts (G C,), set by set."""
        target[...] = parts.reshape(-1, target.shape[0]).sum(axis=0, dtype=np.float64)

    def device(self, _values: Any) -> int:
        return 0


class OnDevice(Family):
    """What is needed of a library for arrays on a GPU."""

    convert: str  # the call that makes such an array
    backends: tuple[str, ...] = ("cupy", "numba-cuda")  # that can read it; the first one that is installed does

    def owns(self, value: Any) -> bool:
        raise NotImplementedError

    def locate(self, value: Any) -> Span:
        """The array as checks see it."""
        raise NotImplementedError

    def refusal(self, value: Any, name: str) -> str | None:
        """Why an array can't be taken although it is of this family, and what to do."""
        raise NotImplementedError

    def fits(self, value: Any, shape: tuple[int], device: int) -> bool:
        """Whether it is a contiguous array (C,) of float32 or float64 there. May be wrong about a few that are."""
        raise NotImplementedError

    def new(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: int) -> Any:
        """A new C-contiguous array."""
        raise NotImplementedError

    def like(self, x: Span, strides: tuple[int, ...]) -> Span:
        """A new array of x's shape and type without gaps, in the memory order of `strides`."""
        raise NotImplementedError

    def real(self, value: Any) -> bool:
        """Whether its elements are bools or real numbers."""
        return value.dtype.kind in "biuf" or value.dtype.name == "bfloat16"

    def described(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: int) -> Span:
        """A Span without memory, to make arrays like it."""
        return Span(self, None, 0, shape, (), dtype, self.named(dtype), device)

    def named(self, dtype: np.dtype[Any]) -> Any:
        """The library's own name of a dtype."""
        return dtype

    def stream(self, arrays: list[Span]) -> int | None:
        """The address of the stream to run on; None: CuPy's current one."""
        raise NotImplementedError

    def assign(self, target: Span, source: Span) -> None:
        """target[...] = source: repeated along axes of size 1, and converted."""
        target.value[...] = source.value

    def device(self, values: Any) -> int:
        return self.locate(values).device


class _CuPy(OnDevice):
    kind, convert = "CuPy array", "cupy.asarray({})"
    xp = property(lambda _: sys.modules["cupy"])

    def owns(self, value: Any) -> bool:
        return isinstance(value, getattr(sys.modules.get("cupy"), "ndarray", ()))

    def locate(self, value: Any) -> Span:
        dtype, memory = value.dtype, value.data
        elements = dtype if dtype.char in _ELEMENTS else INT16 if dtype.name == "bfloat16" else None
        return Span(self, value, memory.ptr, value.shape, value.strides, elements, dtype, memory.device_id)

    def refusal(self, value: Any, name: str) -> str | None:
        if type(value) is sys.modules["cupy"].ndarray:
            return None
        return f"a subclass of cupy.ndarray may mean its elements otherwise; pass {name}.view(cupy.ndarray)"

    def fits(self, value: Any, shape: tuple[int], device: int) -> bool:
        return (
            type(value) is sys.modules["cupy"].ndarray
            and value.shape == shape
            and value.dtype.char in "fd"
            and value.strides[0] == value.dtype.itemsize
            and value.data.device_id == device
        )

    def new(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        cupy = sys.modules["cupy"]
        if cupy.cuda.runtime.getDevice() == device:
            return cupy.ndarray(shape, dtype)
        with cupy.cuda.Device(device):
            return cupy.ndarray(shape, dtype)

    def like(self, x: Span, strides: tuple[int, ...]) -> Span:
        sizes, places = memory_order(x.shape, strides)
        value = self.new(sizes, x.type, x.device)
        return self.locate(value if sizes == x.shape else value.transpose(places))

    def assign(self, target: Span, source: Span) -> None:
        sys.modules["cupy"].copyto(target.value, source.value)

    def stream(self, _arrays: list[Span]) -> None:
        return None

    def put(self, values: np.ndarray, device: int) -> Any:
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(device):
            return cupy.array(values)

    def host(self, values: Any) -> np.ndarray:
        return np.array(sys.modules["cupy"].asnumpy(values))

    def rounded(self, values: Any, dtype: Any) -> Any:
        return values.astype(dtype)


class _Torch(OnDevice):
    kind, convert = "PyTorch CUDA tensor", "torch.as_tensor({}, device=x.device)"
    xp = property(lambda _: sys.modules["torch"])

    def owns(self, value: Any) -> bool:
        tensor: Any = getattr(sys.modules.get("torch"), "Tensor", ())
        return isinstance(value, tensor) and bool(value.is_cuda)

    @functools.cached_property
    def _elements(self) -> dict[Any, np.dtype[Any]]:
        torch = sys.modules["torch"]
        names = "float16", "float32", "float64", "uint8", "int8", "uint16", "int16"  # uint16: since PyTorch 2.3
        same = {getattr(torch, name): np.dtype(name) for name in names if hasattr(torch, name)}
        return {**same, torch.bfloat16: INT16}

    def locate(self, value: Any) -> Span:
        kind, item = value.dtype, value.element_size()
        strides = tuple([item * s for s in value.stride()])
        shape, elements = tuple(value.shape), self._elements.get(kind)
        return Span(self, value, value.data_ptr(), shape, strides, elements, kind, value.get_device())

    def refusal(self, value: Any, name: str) -> str | None:
        torch = sys.modules["torch"]
        if value.layout is not torch.strided:
            return f"its layout is {value.layout}; pass {name}.to_dense()"
        if value.is_neg():
            return f"its sign is kept apart from its memory; pass {name}.resolve_neg()"
        if value.requires_grad and torch.is_grad_enabled():
            return (
                f"it requires a gradient, which autograd would not get from here; pass {name}.detach(), or call "
                "fastbn.torch.batch_norm"
            )
        return None

    def fits(self, value: Any, shape: tuple[int], device: int) -> bool:
        torch = sys.modules["torch"]
        return (
            isinstance(value, torch.Tensor)
            and value.shape == shape
            and (value.dtype is torch.float32 or value.dtype is torch.float64)
            and value.stride() == (1,)
            and value.get_device() == device
            and self.refusal(value, "") is None
        )

    def _make(self, shape: tuple[int, ...], strides: tuple[int, ...], kind: Any, device: int) -> Any:
        torch = sys.modules["torch"]
        return torch.empty_strided(shape, strides, dtype=kind, device=torch.device("cuda", device))

    def new(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: int) -> Any:
        return self._make(shape, dense_strides(shape, 1), self.named(dtype), device)

    def real(self, value: Any) -> bool:
        return not value.dtype.is_complex

    def named(self, dtype: np.dtype[Any]) -> Any:
        return getattr(sys.modules["torch"], dtype.name)

    def like(self, x: Span, strides: tuple[int, ...]) -> Span:
        return self.locate(self._make(x.shape, dense_strides(x.shape, 1, strides), x.type, x.device))

    def put(self, values: np.ndarray, device: int) -> Any:
        torch = sys.modules["torch"]
        return torch.tensor(values, device=torch.device("cuda", device))

    def host(self, values: Any) -> np.ndarray:
        return np.array(values.cpu().numpy())

    def copy(self, values: Any) -> Any:
        return values.clone()

    def rounded(self, values: Any, dtype: np.dtype[Any]) -> Any:
        return values.to(self.named(dtype), copy=True)

    def total(self, parts: Any, target: Any) -> None:
        target[...] = parts.reshape(-1, target.shape[0]).sum(0, dtype=sys.modules["torch"].float64)

    def stream(self, arrays: list[Span]) -> int:
        return int(sys.modules["torch"].cuda.current_stream(arrays[0].device).cuda_stream)


class _Numba(OnDevice):
    """Numba's device arrays have no arithmetic: moments are copied to main memory, where they are asked for."""

    kind, convert = "Numba device array", "numba.cuda.to_device({})"

    def owns(self, value: Any) -> bool:
        return bool(getattr(type(value), "__cuda_ndarray__", False))

    @property
    def backends(self) -> tuple[str, ...]:  # type: ignore[override]
        simulated = sys.modules["numba"].config.ENABLE_CUDASIM
        return ("numba-cuda",) if simulated else ("cupy", "numba-cuda")

    @functools.cached_property
    def _arrays(self) -> Any:
        return import_module("fastbn.kernels.numba_cuda.arrays")

    def locate(self, value: Any) -> Span:
        dtype, device = value.dtype, self._arrays.device(value)
        shape, elements = tuple(value.shape), dtype if dtype.char in _ELEMENTS and dtype.isnative else None
        return Span(self, value, self._arrays.address(value), shape, tuple(value.strides), elements, dtype, device)

    def refusal(self, _value: Any, _name: str) -> None:
        return None

    def fits(self, value: Any, shape: tuple[int], device: int) -> bool:  # noqa: ARG002
        return False

    def new(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        return self._make(shape, dense_strides(shape, dtype.itemsize), dtype, device)

    def _make(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, device: int) -> Any:
        with sys.modules["numba.cuda"].gpus[device]:
            return self._arrays.empty(shape, strides, dtype)

    def like(self, x: Span, strides: tuple[int, ...]) -> Span:
        return self.locate(self._make(x.shape, dense_strides(x.shape, x.dtype.itemsize, strides), x.type, x.device))

    def assign(self, target: Span, source: Span) -> None:
        """Of one shape and one type, as Numba's arrays have no arithmetic."""
        self._arrays.copy(source.value, target.value)

    def clear(self, values: Any) -> None:
        values.copy_to_device(np.zeros(tuple(values.shape), values.dtype))

    def numbers(self, values: Any) -> np.ndarray:
        return np.array(self._arrays.host(values))

    def in_units(self, values: Any, step: float, zero: float) -> Any:
        """By way of main memory, as there is no arithmetic where they are: it waits for the device."""
        made = self.new(tuple(values.shape), FLOAT64, self._arrays.device(values))
        made.copy_to_device(self.numbers(values).astype(np.float64) / step + zero)
        return made

    def total(self, parts: Any, target: Any) -> None:
        """As `in_units`."""
        host = self.numbers(parts).reshape(-1, target.shape[0])
        target.copy_to_device(host.sum(axis=0, dtype=np.float64).astype(host.dtype))

    def stream(self, arrays: list[Span]) -> int:
        return int(next((a.value.stream for a in arrays if a.value.stream), 0))  # `handle`'s type varies


NUMPY, CUPY, TORCH, NUMBA = Family(), _CuPy(), _Torch(), _Numba()
_FAMILIES: tuple[OnDevice, ...] = CUPY, TORCH, NUMBA


def on_device(value: Any) -> OnDevice | None:
    """The family on a GPU that `value` is of, if it is of any."""
    for family in _FAMILIES:
        if family.owns(value):
            return family
    return None


def family_of(found: Any) -> Family:
    """Of what `locate` gives."""
    return found.family if isinstance(found, Span) else NUMPY


def family_of_values(values: Any) -> Family:
    """Of an array as its library made it, whatever it is made of."""
    return NUMPY if type(values) is np.ndarray else on_device(values) or NUMPY


def place_of(values: Any) -> tuple[Family, int]:
    """The family and the device: arrays that share both can be computed with."""
    family = family_of_values(values)
    return family, family.device(values)
