"""Numba device arrays: what they hold, views of them, copies, launches."""

from __future__ import annotations

from typing import Any

import numpy as np

from .plan import ceil
from .target import SIMULATED, cuda


def address(a: Any) -> int:
    """Of its first element."""
    described = a.__array_interface__ if SIMULATED else a.__cuda_array_interface__
    return int(described["data"][0])


def bounds(a: Any) -> tuple[int, int]:
    """The first address that the array touches, and the one behind the last."""
    start = address(a)
    if not a.size:
        return start, start
    reach = [(n - 1) * s for n, s in zip(a.shape, a.strides, strict=True)]
    return start + sum(min(0, r) for r in reach), start + sum(max(0, r) for r in reach) + a.dtype.itemsize


def device(a: Any) -> int:
    """The id of the device that holds the array."""
    return 0 if SIMULATED else int(a.gpu_data.context.device.id)


def on(a: Any) -> Any:
    """A context in which the array's device is the current one."""
    return cuda.gpus[device(a)]


class _Memory:
    """Memory of another array, as NumPy takes it: the simulator's device is the host."""

    def __init__(self, described: dict[str, Any], owner: Any) -> None:
        self.__array_interface__, self.owner = described, owner


def _array_at(
    start: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: np.dtype[Any], owner: Any
) -> Any:
    described = {"shape": shape, "strides": strides, "typestr": dtype.str, "data": (start, False), "version": 3}
    if SIMULATED:
        return type(owner)(np.asarray(_Memory(described, owner)), stream=owner.stream)
    new = cuda.from_cuda_array_interface(described, owner=owner)
    new.stream = owner.stream
    return new


def view(
    a: Any, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, dtype: np.dtype[Any] | None = None
) -> Any:
    """An array on the same memory, `offset` bytes behind the first element of `a`; strides in bytes, of any sign."""
    return _array_at(address(a) + offset, tuple(shape), tuple(strides), a.dtype if dtype is None else dtype, a)


def flat(a: Any) -> Any:
    """All memory from the lowest element to the highest, as one contiguous array."""
    low, high = bounds(a)
    if low % a.dtype.itemsize:
        raise ValueError(f"an array of {a.dtype} at address {low:#x}: expected a multiple of {a.dtype.itemsize}")
    return _array_at(low, ((high - low) // a.dtype.itemsize,), None, a.dtype, a)


def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any], stream: Any = 0) -> Any:
    """A new dense array; strides in bytes, a permutation of those of a contiguous one."""
    return cuda.device_array(shape, dtype, strides=strides, stream=stream)


def put(a: np.ndarray, stream: Any = 0) -> Any:
    """A contiguous array, copied to the current device."""
    return cuda.to_device(a, stream=stream)


def host(a: Any) -> np.ndarray:
    """A copy as a NumPy array; it waits for the array's stream."""
    if not a.size:
        return np.empty(a.shape, a.dtype)
    with on(a):
        dense = cuda.device_array(tuple(a.shape), a.dtype, stream=a.stream)
        copy(a, dense)
        return np.asarray(dense.copy_to_host())


def copy(source: Any, target: Any) -> None:
    """target[...] = source: of one shape and dtype, at least 1-D; any strides that are multiples of an element."""
    if not source.size:
        return
    size = source.dtype.itemsize
    places = [(*(s // size for s in a.strides), (address(a) - bounds(a)[0]) // size) for a in (source, target)]
    shape = tuple(source.shape)
    arguments = (flat(source), places[0], flat(target), places[1], shape, source.size)
    with on(source):
        launch(copy_all, min(8192, ceil(source.size, 128)), 128, stream_of(source, target), arguments)


def stream_of(*arrays: Any) -> Any:
    """The stream of the first array that has one; 0 is Numba's default stream."""
    return next((a.stream for a in arrays if a is not None and a.stream), 0)


def stream_number(stream: Any) -> int:
    """The address of a stream: Numba's, or another library's by its protocol (cuda.core's have no `__int__`)."""
    if not stream:
        return 0
    return int(stream) if hasattr(stream, "__int__") else int(stream.__cuda_stream__()[1])


class _Grid(int):
    """A number of blocks that Numba doesn't warn of.

    It warns of every launch configuration whose three numbers of blocks have a product under 128, as a small array's
    has. A filter of warnings is the whole process's, other threads' too, and can miss the message, which has escape
    codes in front where colorama is installed. Of this number the product is never less.
    """

    def __mul__(self, other: int) -> int:
        return max(128, int(self) * other)


@cuda.jit
def copy_all(source, come, target, go, shape, values):  # type: ignore[no-untyped-def]
    """target flat = source flat; come, go: strides of the axes of `shape` in elements, then the origin."""
    j = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    while j < values:
        left, at, to = j, come[len(shape)], go[len(shape)]
        for k in range(len(shape) - 1, -1, -1):
            rest = left // shape[k]
            at += (left - rest * shape[k]) * come[k]
            to += (left - rest * shape[k]) * go[k]
            left = rest
        target[np.uint64(to)] = source[np.uint64(at)]
        j += cuda.gridDim.x * cuda.blockDim.x


def launch(kernel: Any, grid: int, threads: int, stream: Any, arguments: tuple[Any, ...]) -> None:
    if not SIMULATED:  # simulated kernels compute with it
        grid = _Grid(grid)
    kernel[grid, threads, stream](*arguments)
