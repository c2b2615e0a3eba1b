"""Arrays of other libraries in main memory: NumPy reads and writes them where they lie, results go back as their kind.

Whatever speaks DLPack or `__array_interface__` comes in. PyTorch and JAX are known by name, as NumPy alone can't read
their bfloat16; as in `fastbn.arrays`, they are found by type among libraries that are imported already.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from importlib import import_module
from typing import Any

import numpy as np

from .arrays import INT16, TORCH, memory_order, on_device


@dataclasses.dataclass(frozen=True)
class Caller:
    """The library that an array came from, and how its results are to be made; equal for arrays that may meet."""

    kind: str
    make: Any = None  # a function that wraps a NumPy array; without one results stay NumPy's

    immutable = False

    def view(self, value: Any) -> np.ndarray:
        """`value` in place, read by NumPy; an exception of any kind if it can't be."""
        return np.asarray(value) if hasattr(value, "__array_interface__") else np.from_dlpack(value)

    def refusal(self, value: Any, name: str) -> str | None:  # noqa: ARG002
        """Why an array can't be taken although it is of this library, and what to do."""
        return None

    def wrap(self, result: np.ndarray) -> Any:
        """A new NumPy array as one of the library's, on the same memory."""
        return result if self.make is None else self.make(result)

    def empty(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """A dense array that `wrap` needs no copy of, with its axes in memory as under `strides`."""
        sizes, places = memory_order(shape, strides)
        return np.empty(sizes, dtype).transpose(places)

    def result(self, found: np.ndarray | None, out: Any) -> Any:
        """What the caller gets: the array that they gave for it, or a new one of their kind."""
        return None if found is None else self.wrap(found) if out is None else out


class _Torch(Caller):
    def view(self, value: Any) -> np.ndarray:
        tensor = value.detach()
        if value.dtype is not sys.modules["torch"].bfloat16:
            return tensor.numpy()  # type: ignore[no-any-return]
        return tensor.view(sys.modules["torch"].int16).numpy().view(_bfloat16())  # type: ignore[no-any-return]

    def refusal(self, value: Any, name: str) -> str | None:
        if value.device.type != "cpu":
            return f"its device is {value.device}, neither the CPU nor CUDA; pass {name}.cpu()"
        return TORCH.refusal(value, name)

    def wrap(self, result: np.ndarray) -> Any:
        torch = sys.modules["torch"]
        if result.dtype.name != "bfloat16":
            return torch.from_numpy(result)
        return torch.from_numpy(result.view(INT16)).view(torch.bfloat16)


class _Jax(Caller):
    immutable = True

    def view(self, value: Any) -> np.ndarray:
        return np.asarray(value)

    def refusal(self, value: Any, name: str) -> str | None:
        jax = sys.modules["jax"]
        if isinstance(value, jax.core.Tracer):
            return "it is traced by jax.jit, jax.grad or jax.vmap, and has no values yet; call fastbn.jax.batch_norm"
        if any(device.platform != "cpu" for device in value.devices()):
            return f"it is on {value.devices()}; pass jax.device_put({name}, jax.devices('cpu')[0])"
        return None

    def wrap(self, result: np.ndarray) -> Any:
        return sys.modules["jax"].device_put(result, self.make, may_alias=True)

    def empty(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """JAX copies what does not begin at a multiple of 64 bytes, as NumPy's large arrays never do."""
        sizes, places = memory_order(shape, strides)
        size = dtype.itemsize * int(np.prod(sizes))
        memory = np.empty(size + 64, np.uint8)
        start = -memory.ctypes.data % 64
        return memory[start : start + size].view(dtype).reshape(sizes).transpose(places)


TENSORS = _Torch("PyTorch tensor")


def caller_of(value: Any) -> Caller | None:
    """The library of an array in main memory; None for NumPy's, for arrays on a GPU, and for what is no array."""
    tensor: Any = getattr(sys.modules.get("torch"), "Tensor", ())
    if isinstance(value, tensor):
        return None if value.is_cuda else TENSORS
    if isinstance(value, (np.ndarray, np.generic)) or on_device(value) is not None:
        return None
    array: Any = getattr(sys.modules.get("jax"), "Array", ())
    if isinstance(value, array):
        traced = isinstance(value, sys.modules["jax"].core.Tracer)
        return _Jax("JAX array", None if traced else value.sharding)
    if hasattr(value, "__dlpack__") or hasattr(value, "__array_interface__"):
        package = type(value).__module__.partition(".")[0]
        namespace = value.__array_namespace__() if hasattr(value, "__array_namespace__") else sys.modules.get(package)
        return Caller(f"{package} array", getattr(namespace, "from_dlpack", None))
    return None


@functools.cache
def _bfloat16() -> np.dtype[Any]:
    try:
        found: np.dtype[Any] = np.dtype(import_module("ml_dtypes").bfloat16)
        return found
    except ImportError:
        raise ImportError("NumPy reads bfloat16 by the package ml_dtypes; pip install ml_dtypes") from None


def check_host(function: str, name: str, value: Any) -> Any:
    """`value` as NumPy's array on the same memory, if it is one of another library there; else as it came."""
    if (caller := caller_of(value)) is None:
        return value
    if (reason := caller.refusal(value, name)) is not None:
        raise TypeError(f"{function}: {name} is a {type_and_shape(caller, value)}, and {reason}")
    try:
        return caller.view(value)
    except Exception as cause:
        raise TypeError(
            f"{function}: {name} is a {type_and_shape(caller, value)}, which NumPy can't read in place: "
            f"{' '.join(str(cause).split())}. Pass a NumPy array of its values"
        ) from cause


def seen(value: Any) -> Any:
    """`value` as NumPy's array on the same memory, if it is a result that went out as another library's."""
    return value if type(value) is np.ndarray or (caller := caller_of(value)) is None else caller.view(value)


def type_and_shape(caller: Caller, value: Any) -> str:
    kind = str(getattr(value, "dtype", "")).rpartition(".")[2]
    return f"{kind} {caller.kind} of shape {tuple(getattr(value, 'shape', ()))}".strip()
