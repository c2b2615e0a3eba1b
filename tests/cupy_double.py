"""A driver that isn't there: CuPy arrays over main memory, and launches that are recorded and then emulated.

Doubled are only the calls that need a driver: device facts, streams, memory, loading, occupancy, launches, and CuPy's
own copies. Everything else is CuPy's and ours, down to the bytes of the argument at the address that a launch is given.
The double refuses what a driver refuses: more shared memory than was asked for, a cooperative grid that isn't resident
as a whole, a cluster that doesn't divide its grid, a launch from a thread without a context.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import cupy
import numpy as np
from cupy.cuda import driver, runtime
from emulator import LAYOUTS, WAYS
from emulator import library as built
from fastbn.kernels.cuda import launch as cuda
from fastbn.kernels.cuda import launches as planner

HOPPER = {
    "multiProcessorCount": 132,
    "sharedMemPerBlockOptin": 227 << 10,
    "sharedMemPerMultiprocessor": 228 << 10,
    "cooperativeLaunch": 1,
    "l2CacheSize": 50 << 20,
    "memoryClockRate": 2_619_000,
    "memoryBusWidth": 5120,
    "major": 9,
    "minor": 0,
}
TYPES = ["float", "f16", "bf16", "double"]  # by their numbers in instances.cpp
WALL = 64  # bytes of canaries on both sides of an allocation
# In eps of the type, relative to max(1, |result|). A half type is rounded once; float32 has coefficients, deviation and
# product rounded, 3 eps of |y - beta|, hence of |y| + |beta| < 3 max(1, |y|); float64 much the same beside a reference
# that is as exact. dx has two products and three sums.
MOST = {"float32": 10.0, "float64": 64.0, "float16": 0.52, "bfloat16": 0.52}


class Refused(driver.CUDADriverError):  # type: ignore[misc]
    """The driver's own error asks the driver for its text."""

    def __init__(self, text: str) -> None:
        RuntimeError.__init__(self, text)


class Started(NamedTuple):
    """A launch, as the driver was given it."""

    expression: str
    options: tuple[str, ...]
    grid: int
    threads: int
    shared: int
    cooperative: bool
    cluster: int
    device: int
    stream: int
    argument: bytes

    @property
    def pointers(self) -> planner.Pointers:
        return planner.Pointers(*planner.HEAD.unpack_from(self.argument)[: len(planner.Pointers._fields)])

    @property
    def way(self) -> str:
        return self.expression.rpartition("::")[2].rstrip(">")


class Stream:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class Kernel:
    """Stands for a loaded kernel; its handle is a number."""

    def __init__(self, expression: str, options: tuple[str, ...], device: int, ptr: int) -> None:
        self.expression, self.options, self.device, self.ptr = expression, options, device, ptr
        self.dynamic = 48 << 10  # bytes of shared memory that a launch may ask for, at first
        cluster = [option.partition("=")[2] for option in options if option.startswith("-DFASTBN_CLUSTER=")]
        self.cluster = int(cluster[0]) if cluster else 1


class Double:
    """What the driver knows: `devices` their facts, `current` the device and `stream` the stream that calls go to."""

    def __init__(self, monkeypatch: Any, emulate: Any = None) -> None:
        self.devices = [dict(HOPPER), dict(HOPPER)]
        self.stream = 0
        self.capturing: set[int] = set()
        self.resident = 32  # blocks on a multiprocessor, where registers don't allow less
        self.refuse_clusters = False
        self.emulate = emulate
        self.started: list[Started] = []
        self.allocated: list[tuple[int, int]] = []  # device, bytes
        self.cleared: list[tuple[int, int]] = []  # bytes, stream
        self.copied: list[tuple[int, ...]] = []  # shapes
        self.replayed: list[tuple[int, ...]] = []  # copies from main memory: target, source, bytes, stream
        self.compiled: list[tuple[str, tuple[str, ...], tuple[int, int]]] = []
        self._memory: dict[int, np.ndarray] = {}  # by address
        self._kernels: dict[int, Kernel] = {}
        self._of_thread = threading.local()
        for module, names in (
            (runtime, ("getDevice", "getDeviceProperties", "streamIsCapturing", "memsetAsync", "memcpyAsync", "free")),
            (driver, ("launchKernel", "launchCooperativeKernel", "funcGetAttribute", "funcSetAttribute")),
            (driver, ("occupancyMaxActiveBlocksPerMultiprocessor",)),
            (cupy.cuda, ("get_current_stream", "Device", "alloc_pinned_memory")),
            (cupy, ("copyto", "array")),
        ):
            for name in names:
                monkeypatch.setattr(module, name, getattr(self, name))
        monkeypatch.setattr(cuda, "machine_code", self.machine_code)
        monkeypatch.setattr(cuda, "Module", functools.partial(_Module, self))
        monkeypatch.setattr(cuda, "_local", cuda._Local())
        monkeypatch.setattr(cuda, "_ready", {})
        monkeypatch.setattr(cuda, "_captured", [])
        cuda.device.cache_clear()
        cuda._kernel.cache_clear()
        self._before = cupy.cuda.get_allocator()
        cupy.cuda.set_allocator(self.allocate)

    def close(self) -> None:
        """Puts CuPy's allocator back, and looks at the canaries."""
        cupy.cuda.set_allocator(self._before)
        cuda.device.cache_clear()
        cuda._kernel.cache_clear()
        for memory in self._memory.values():
            assert (memory[:WALL] == 0xA5).all(), "written before an array"
            assert (memory[-WALL:] == 0xA5).all(), "written past an array"

    # ---- memory

    def allocate(self, size: int) -> Any:
        """NaN in every element, canaries on both sides, aligned to 256 bytes like CuPy's."""
        raw = np.full(size + 2 * WALL + 256, 0xA5, np.uint8)
        start = -(raw.ctypes.data + WALL) % 256
        memory = raw[start : start + size + 2 * WALL]
        memory[WALL : WALL + size] = 0xFF
        address = memory.ctypes.data + WALL
        self._memory[address] = memory
        self.allocated.append((self.current, size))
        return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, size, raw, self.current), 0)

    def array(self, values: np.ndarray, like: np.ndarray | None = None) -> Any:
        """A CuPy array with these values; `like`, a NumPy array, gives memory order, gaps and offset."""
        if like is None:
            like = values
        base = like
        while base.base is not None:
            base = base.base
        memory = self.allocate(base.nbytes) + (like.ctypes.data - base.ctypes.data)
        made = cupy.ndarray(values.shape, values.dtype, memory, like.strides)
        self.host(made)[...] = values
        return made

    def host(self, array: Any) -> np.ndarray:
        """The NumPy array over the same memory."""
        first = array.data.ptr + sum(min(0, (n - 1) * s) for n, s in zip(array.shape, array.strides, strict=True))
        last = array.data.ptr + sum(max(0, (n - 1) * s) for n, s in zip(array.shape, array.strides, strict=True))
        size = last + array.itemsize - first
        memory = np.frombuffer((ctypes.c_char * size).from_address(first), np.uint8)
        return np.ndarray(array.shape, array.dtype, memory, array.data.ptr - first, array.strides)

    def copyto(self, target: Any, source: Any) -> None:
        self.copied.append(target.shape)
        self.host(target)[...] = self.host(source)

    def memsetAsync(self, address: int, value: int, size: int, stream: int) -> None:
        ctypes.memset(address, value, size)
        self.cleared.append((size, stream))

    def alloc_pinned_memory(self, size: int) -> Any:
        return _Pinned(size)

    def memcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        assert kind == runtime.memcpyHostToDevice
        self.replayed.append((target, source, size, stream))
        ctypes.memmove(target, source, size)

    def _memory_of(self, address: int) -> tuple[int, int] | None:
        for start, memory in self._memory.items():
            if start <= address < start + memory.nbytes - 2 * WALL:
                return start, memory.nbytes - 2 * WALL
        return None

    # ---- devices and streams

    @property
    def current(self) -> int:
        return getattr(self._of_thread, "device", 0)

    def getDevice(self) -> int:
        return self.current

    def getDeviceProperties(self, number: int) -> dict[str, int]:
        return self.devices[number]

    def Device(self, number: int) -> Any:
        return _Within(self, number)

    def get_current_stream(self) -> Stream:
        return Stream(self.stream + 1000 * self.current)

    def streamIsCapturing(self, stream: int) -> bool:
        return stream in self.capturing

    def free(self, address: int) -> None:
        assert address == 0, "it makes a context and frees nothing"
        self._contexts.add(self.current)

    @property
    def _contexts(self) -> set[int]:
        if not hasattr(self._of_thread, "contexts"):
            self._of_thread.contexts = set()
        contexts: set[int] = self._of_thread.contexts
        return contexts

    # ---- kernels

    def machine_code(self, expression: str, options: tuple[str, ...], capability: tuple[int, int]) -> tuple[bytes, str]:
        self.compiled.append((expression, options, capability))
        return repr((expression, options)).encode(), "lowered"

    def load(self, code: bytes) -> Kernel:
        kernel = Kernel(*eval(code), self.current, 7000 + len(self._kernels))
        self._kernels[kernel.ptr] = kernel
        return kernel

    def funcGetAttribute(self, attribute: int, kernel: int) -> int:
        assert kernel in self._kernels
        return {1: 0, 3: 0, 4: 64}[attribute]  # static shared memory, local memory, registers

    def funcSetAttribute(self, kernel: int, attribute: int, value: int) -> None:
        assert attribute == 8, "dynamic shared memory"
        if value > self.devices[self.current]["sharedMemPerBlockOptin"]:
            raise Refused("CUDA_ERROR_INVALID_VALUE")
        self._kernels[kernel].dynamic = value

    def occupancyMaxActiveBlocksPerMultiprocessor(self, kernel: int, threads: int, shared: int) -> int:
        assert self._kernels[kernel].device == self.current
        assert threads % 32 == 0
        registers = planner.RESIDENT["d"] if "double" in self._kernels[kernel].expression else planner.resident("f")
        by_shared = self.devices[self.current]["sharedMemPerMultiprocessor"] // (shared + 1024)
        return min(self.resident, registers // threads, by_shared)

    def launchKernel(
        self, kernel: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared: int, stream: int,
        addresses: int, extra: int,
    ) -> None:  # fmt: skip
        assert extra == 0
        self._start(kernel, (gx, gy, gz), (bx, by, bz), shared, stream, addresses, False)

    def launchCooperativeKernel(
        self, kernel: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared: int, stream: int,
        addresses: int,
    ) -> None:  # fmt: skip
        self._start(kernel, (gx, gy, gz), (bx, by, bz), shared, stream, addresses, True)

    def _start(
        self, handle: int, grid: tuple[int, ...], block: tuple[int, ...], shared: int, stream: int, addresses: int,
        cooperative: bool,
    ) -> None:  # fmt: skip
        kernel, facts = self._kernels[handle], self.devices[self.current]
        assert grid[1:] == block[1:] == (1, 1)
        if self.current not in self._contexts:
            raise Refused("CUDA_ERROR_INVALID_CONTEXT")
        if kernel.device != self.current or stream // 1000 != self.current:
            raise Refused("CUDA_ERROR_INVALID_HANDLE")
        if shared > kernel.dynamic or block[0] > 1024 or grid[0] % kernel.cluster:
            raise Refused("CUDA_ERROR_INVALID_VALUE")
        if kernel.cluster > 1 and (self.refuse_clusters or facts["major"] < 9):
            raise Refused("CUDA_ERROR_INVALID_CLUSTER_SIZE")
        most = self.occupancyMaxActiveBlocksPerMultiprocessor(handle, block[0], shared) * facts["multiProcessorCount"]
        if cooperative and (grid[0] > most or not facts["cooperativeLaunch"]):
            raise Refused("CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE")
        (address,) = (ctypes.c_uint64 * 1).from_address(addresses)
        argument = ctypes.string_at(address, planner.PARAMS_SIZE)
        launch = Started(
            kernel.expression, kernel.options, grid[0], block[0], shared, cooperative, kernel.cluster, self.current,
            stream, argument,
        )  # fmt: skip
        self.started.append(launch)
        if self.emulate is not None:
            self.emulate(launch, [m for p in launch.pointers if p and (m := self._memory_of(p))])


class _Within:
    """`with cupy.cuda.Device(number)`."""

    def __init__(self, double: Double, number: int) -> None:
        self.double, self.number = double, number

    def __enter__(self) -> None:
        self.before = self.double.current
        self.double._of_thread.device = self.number

    def __exit__(self, *_: Any) -> None:
        self.double._of_thread.device = self.before


class _Pinned(bytearray):
    """Pinned memory."""

    @property
    def ptr(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self))


class _Module:
    def __init__(self, double: Double) -> None:
        self.double = double

    def load(self, code: bytes) -> None:
        self.kernel = self.double.load(code)

    def get_function(self, name: str) -> Kernel:
        assert name == "lowered"
        return self.kernel


def emulation(library: ctypes.CDLL) -> Any:
    """Carries a launch out, by the argument's own bytes; arrays may be touched, and nothing else."""

    def emulate(launch: Started, arrays: list[tuple[int, int]]) -> None:
        kind, width, backward, layout, way = re.findall(r"[\w]+(?=[,>])", launch.expression)
        options = tuple(option for option in launch.options if "CLUSTER" not in option)
        loaded = library
        if options:  # other code, of which this instance is enough
            loaded = built(f"ONE({TYPES.index(kind)}, {kind}, {width}, {backward}, {layout}, {way})", options=options)
        instance = (TYPES.index(kind), int(width), backward == "true", LAYOUTS.index(layout), WAYS.index(way))
        # Windows are read whole, within their 16 bytes: allocations are of 256.
        flat = [number for start, size in arrays for number in (start, -(-size // 16) * 16)]
        pairs = (ctypes.c_uint64 * len(flat))(*flat), len(arrays)
        at_once = 0 if launch.cooperative else launch.cluster
        failed = loaded.fastbn_launch(
            (ctypes.c_int * 5)(*instance), launch.argument, launch.grid, launch.threads, launch.shared, launch.cluster,
            at_once, 2, *pairs, *pairs,
        )  # fmt: skip
        assert failed == b"", f"{launch.expression}: {failed.decode()}"

    return emulate


def small_devices(monkeypatch: Any, emulator: Any) -> Iterator[Double]:
    """Launches are emulated, on devices of four multiprocessors: a grid over 132 takes the emulator seconds."""
    double = Double(monkeypatch, emulate=emulator)
    for facts in double.devices:
        facts["multiProcessorCount"] = 4
    yield double
    double.close()
