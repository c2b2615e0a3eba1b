"""Doubles of CuPy and PyTorch in main memory, and of the kernels for CuPy arrays, which run the reference.

Arrays of a double know their device and refuse what the real ones refuse: becoming a NumPy array unasked, and the
company of another library or device. The doubles count what is allocated, and keep the current device and stream.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from fastbn.kernels import reference

import fastbn
from fastbn import arrays, dispatch


class State:
    """Of the machine: two devices, the current one, and CuPy's current stream."""

    def __init__(self) -> None:
        self.device, self.stream = 0, 0
        self.allocated: list[tuple[tuple[int, ...], int]] = []  # shape and device
        self.calls: list[Call] = []
        self.transfers: list[str] = []

    @contextlib.contextmanager
    def current(self, **new: int) -> Any:
        before = {name: getattr(self, name) for name in new}
        vars(self).update(new)
        yield
        vars(self).update(before)


class Call(NamedTuple):
    name: str
    device: int
    stream: int
    shape: tuple[int, ...]


class Pointer(NamedTuple):
    ptr: int
    device_id: int
    owner: Any


class _Described:
    def __init__(self, owner: Any, **described: Any) -> None:
        self.owner, self.__array_interface__ = owner, {"version": 3, **described}


def at(pointer: Pointer, shape: Any, dtype: Any, strides: Any) -> np.ndarray:
    dtype = np.dtype(dtype)
    bits = np.dtype(np.int16) if dtype == ml_dtypes.bfloat16 else dtype
    found = np.asarray(
        _Described(pointer, data=(pointer.ptr, False), shape=tuple(shape), strides=strides, typestr=bits.str)
    )
    return found.view(dtype)


class Array:
    """What both libraries' arrays do."""

    state: State

    def __init__(self, host: np.ndarray, device: int) -> None:
        self.on_host, self.on_device = host, device

    def _made(self, host: np.ndarray) -> Any:
        new = type(self).__new__(type(self))
        Array.__init__(new, np.asarray(host), self.on_device)
        return new

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("implicit conversion to a NumPy array")

    __array_ufunc__ = None

    def _other(self, other: Any) -> Any:
        if isinstance(other, Array):
            assert type(other) is type(self), "arrays of two libraries"
            assert other.on_device == self.on_device, "arrays on two devices"
            return other.on_host
        assert isinstance(other, (int, float)), f"a {type(other)} met an array on a device"
        return other

    def _index(self, index: Any) -> Any:
        """Of slices and numbers, and of whole numbers on the same device."""
        parts = index if isinstance(index, tuple) else (index,)
        assert not any(isinstance(i, np.ndarray) for i in parts), "an index in main memory"
        return tuple(self._other(i) if isinstance(i, Array) else i for i in parts)

    def __getitem__(self, index: Any) -> Any:
        return self._made(self.on_host[self._index(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.on_host[self._index(index)] = self._other(value)

    def reshape(self, *shape: Any) -> Any:
        return self._made(self.on_host.reshape(*shape))

    def __iadd__(self, other: Any) -> Any:
        np.add(self.on_host, self._other(other), out=self.on_host, casting="same_kind")
        return self

    def __imul__(self, other: Any) -> Any:
        np.multiply(self.on_host, self._other(other), out=self.on_host, casting="same_kind")
        return self

    def max(self) -> Any:
        return self.on_host.max()

    def sum(self, axis: int, dtype: Any) -> Any:
        return self._made(self.on_host.sum(axis, np.dtype(getattr(dtype, "_numpy", dtype))))


def _operation(name: str) -> Any:
    function = getattr(operator, name)
    return (
        lambda self, other: self._made(function(self.on_host, self._other(other))),
        lambda self, other: self._made(function(self._other(other), self.on_host)),
    )


def _selected(mask: Any, one: Any, other: Any) -> Any:
    """cupy.where and torch.where."""
    return mask._made(np.where(mask.on_host, mask._other(one), mask._other(other)))


_FUNCTIONS = {
    "where": _selected,
    "isfinite": lambda values: values._made(np.isfinite(values.on_host)),
    "expm1": lambda values: values._made(np.expm1(values.on_host)),
    "zeros_like": lambda values: values._made(np.zeros_like(values.on_host)),
    "stack": lambda rows: rows[0]._made(np.stack([rows[0]._other(row) for row in rows])),
}

for _name in ("add", "sub", "mul", "truediv", "pow"):
    for _attribute, _function in zip((f"__{_name}__", f"__r{_name}__"), _operation(_name), strict=True):
        setattr(Array, _attribute, _function)
for _name, _operator in (("lt", "lt"), ("gt", "gt"), ("and", "and_")):
    setattr(Array, f"__{_name}__", _operation(_operator)[0])


def fake_cupy(state: State) -> Any:
    class ndarray(Array):
        def __init__(self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None) -> None:
            if memptr is None:
                state.allocated.append((tuple(shape), state.device))
                super().__init__(np.full(shape, 77, dtype), state.device)
            else:
                super().__init__(at(memptr, shape, dtype, strides), memptr.device_id)

        dtype = property(lambda self: self.on_host.dtype)
        shape = property(lambda self: self.on_host.shape)
        strides = property(lambda self: self.on_host.strides)
        data = property(lambda self: Pointer(self.on_host.ctypes.data, self.on_device, self.on_host))

        def transpose(self, axes: Any) -> Any:
            return self._made(self.on_host.transpose(axes))

        def astype(self, dtype: Any) -> Any:
            with np.errstate(over="ignore"):
                return self._made(self.on_host.astype(dtype))

        def copy(self) -> Any:
            return self._made(self.on_host.copy())

    def array(values: np.ndarray) -> Any:
        new = ndarray(values.shape, values.dtype)
        new.on_host[...] = values
        state.transfers.append("to")
        return new

    def asnumpy(values: Any) -> np.ndarray:
        state.transfers.append("from")
        return values.on_host.copy()

    def copyto(target: Any, source: Any) -> None:
        target[...] = source

    cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(getDevice=lambda: state.device, getDeviceCount=lambda: 2),
        Device=lambda number: state.current(device=number),
        ExternalStream=lambda pointer: state.current(stream=pointer),
        Stream=types.SimpleNamespace(null=state.current(stream=0)),
        UnownedMemory=lambda ptr, _size, owner, device: Pointer(ptr, device, owner),
        MemoryPointer=lambda memory, _offset: memory,
    )
    return types.SimpleNamespace(
        ndarray=ndarray,
        cuda=cuda,
        array=array,
        asnumpy=asnumpy,
        copyto=copyto,
        **_FUNCTIONS,
        empty=lambda shape, dtype: ndarray(shape, dtype),
    )


class TorchDtype:
    """It has no name, no kind and no char, and before PyTorch 2.1 no itemsize."""

    def __init__(self, name: str) -> None:
        self._numpy = np.dtype(getattr(ml_dtypes, name, name))
        self.is_complex = self._numpy.kind == "c"

    def __str__(self) -> str:
        return f"torch.{self._numpy.name}"


def fake_torch(state: State) -> Any:
    names = "float16", "float32", "float64", "uint8", "int8", "int16", "int32", "bool", "complex64", "bfloat16"
    kinds = {name: TorchDtype(name) for name in names}

    class Tensor(Array):
        requires_grad, layout, negative, is_cuda = False, "strided", False, True
        dtype = property(lambda self: kinds[self.on_host.dtype.name])
        shape = property(lambda self: self.on_host.shape)

        def stride(self) -> tuple[int, ...]:
            return tuple(s // self.on_host.itemsize for s in self.on_host.strides)

        def data_ptr(self) -> int:
            return self.on_host.ctypes.data

        def element_size(self) -> int:
            return self.on_host.itemsize

        def get_device(self) -> int:
            return self.on_device

        def is_neg(self) -> bool:
            return self.negative

        def clone(self) -> Any:
            return self._made(self.on_host.copy())

        def to(self, kind: Any, copy: bool) -> Any:
            with np.errstate(over="ignore"):
                return self._made(self.on_host.astype(kind._numpy, copy=copy))

        def cpu(self) -> Any:
            state.transfers.append("from")
            return types.SimpleNamespace(numpy=lambda: self.on_host)

    def empty_strided(shape: Any, strides: Any, dtype: Any, device: Any) -> Any:
        state.allocated.append((tuple(shape), device[1]))
        size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0
        memory = np.full(size, 77, dtype._numpy)
        strides = tuple(s * memory.itemsize for s in strides)
        pointer = Pointer(memory.ctypes.data, device[1], memory)
        return Tensor(at(pointer, shape, dtype._numpy, strides), device[1])

    def tensor(values: np.ndarray, device: Any) -> Any:
        state.transfers.append("to")
        return Tensor(values.copy(), device[1])

    return types.SimpleNamespace(
        Tensor=Tensor,
        strided="strided",
        tensor=tensor,
        empty_strided=empty_strided,
        from_dlpack=lambda values: Tensor(values.on_host, values.on_device),
        device=lambda kind, number: (kind, number),
        is_grad_enabled=lambda: True,
        cuda=types.SimpleNamespace(current_stream=lambda number: types.SimpleNamespace(cuda_stream=1000 + number)),
        **kinds,
        **_FUNCTIONS,
    )


class Kernels:
    """`fastbn.kernels.cuda` or `.numba_cuda`: it holds its callers to the contract, and runs the reference."""

    FEATURES = frozenset({"activation", "residual", "groups", "weights", "save='y'"})

    def __init__(self, state: State, cupy: Any) -> None:
        self.state, self.cupy = state, cupy

    def forward(
        self, x: Any, y: Any, table: Any, given: tuple[Any, ...], eps: float, more: Any = None, whole: bool = False
    ) -> None:
        assert (given[2] is None) == (given[3] is None)
        (x, y), (table, *given), more = self._taken("forward", (x, y), (table, *given), more, whole)
        if more is not None and more.weights is not None and given[2] is None:
            more.mass[...] = [more.weights[rows].sum(dtype=np.float64) for rows in reference._sets(x.shape[0], more)]
        reference.forward(x, y, table, tuple(given), eps, more)

    def backward(
        self, dy: Any, x: Any, dx: Any, table: Any, dgamma: Any, dbeta: Any, frozen: bool, more: Any = None,
        whole: bool = False,
    ) -> None:  # fmt: skip
        wanted = np.float64 if x.dtype == np.float64 else np.float32
        assert all(a is None or a.dtype == wanted for a in (dgamma, dbeta))
        large, small, more = self._taken("backward", (dy, x, dx), (table, None, None, dgamma, dbeta), more, whole)
        reference.backward(*large, small[0], *small[3:], frozen, more)

    def _taken(
        self, name: str, large: tuple[Any, ...], numbers: tuple[Any, ...], more: Any, whole: bool
    ) -> tuple[Any, ...]:
        table, *small = numbers
        sets = 1 if more is None or more.starts is None else len(more.starts) - 1
        count = len(large)
        if more is not None:
            large = (*large, more.residual, more.dresidual)
            if more.weights is not None:
                more = self._weighed(more, large[0], sets, table.on_device)
        shape, dtype = large[0].shape, large[0].dtype
        assert len(shape) == 3
        assert min(shape) > 0, "an empty array came to a kernel"
        arrays = [a for a in (*large, table, *small) if a is not None]
        assert all(type(a) is self.cupy.ndarray for a in arrays)
        assert {a.on_device for a in arrays} == {table.on_device}
        assert all(a is None or a.shape == shape for a in large)
        dtypes = [np.dtype(np.float32) if whole else dtype] * len(large)
        if whole:  # x alone is of another type
            at = 0 if name == "forward" else 1
            dtypes[at] = large[at].dtype
            assert dtypes[at].name in ("uint8", "int8", "uint16", "int16")
        assert all(a is None or a.dtype == kind for a, kind in zip(large, dtypes, strict=True))
        assert (table.shape, table.dtype) == ((6, sets * shape[1]), np.float64)
        assert all(a.on_host.flags.aligned for a in arrays)
        for i, a in enumerate(small):
            wanted = (shape[1] * (sets if i > 1 else 1),)
            assert a is None or (a.shape == wanted and a.on_host.flags.c_contiguous and a.dtype.char in "fd")
        self.state.calls.append(Call(name, self.state.device, self.state.stream, shape))
        half = dtype == np.int16 and not whole
        hosts = [None if a is None else a.on_host.view(ml_dtypes.bfloat16) if half else a.on_host for a in large]
        if more is not None:
            more = more._replace(residual=hosts[count], dresidual=hosts[count + 1])
        return hosts[:count], [None if a is None else a.on_host for a in (table, *small)], more

    def _weighed(self, more: Any, x: Any, sets: int, device: int) -> Any:
        """With NumPy's weights and sums of them."""
        w, mass = more.weights, more.mass
        assert all(type(a) is self.cupy.ndarray and a.on_device == device for a in (w, mass))
        assert (w.shape, w.dtype) == ((x.shape[0], 1, x.shape[2]), np.float64 if x.dtype == np.float64 else np.float32)
        assert w.on_host.flags.c_contiguous
        assert (mass.shape, mass.dtype) == ((sets,), np.float64)
        return more._replace(weights=w.on_host, mass=mass.on_host)


def numba_cuda_of(state: State, cupy: Any, seen: list[tuple[int, Any, bool]]) -> Any:
    """What stands for numba.cuda and sees others' arrays by __cuda_array_interface__; `seen`: device, stream, sync."""

    def as_cuda_array(described: Any, sync: bool) -> Any:
        assert not sync  # the stream orders it
        facts = described.__cuda_array_interface__
        seen.append((state.device, facts["stream"], sync))
        array = cupy.ndarray.__new__(cupy.ndarray)
        host = np.asarray(types.SimpleNamespace(__array_interface__=facts, owner=described))
        Array.__init__(array, host, state.device)
        return array

    class Gpus:
        def __getitem__(self, number: int) -> Any:
            return state.current(device=number)

    cupy.cuda.get_current_stream = lambda: types.SimpleNamespace(ptr=state.stream)
    return types.SimpleNamespace(gpus=Gpus(), as_cuda_array=as_cuda_array, is_available=bool)


def in_their_places(monkeypatch: Any, state: State) -> Iterator[tuple[Any, Any]]:
    """CuPy's double and PyTorch's, imported as they are, with the kernels'."""
    cupy, torch = fake_cupy(state), fake_torch(state)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.delitem(vars(arrays.TORCH), "_elements", raising=False)
    real = dispatch._load
    monkeypatch.setattr(dispatch, "_load", lambda name: Kernels(state, cupy) if name == "cuda" else real(name))
    dispatch._load_for_device.cache_clear()
    dispatch._installed.cache_clear()
    with fastbn.set_backend("auto"):
        yield cupy, torch
    dispatch._load_for_device.cache_clear()
    dispatch._installed.cache_clear()
    vars(arrays.TORCH).pop("_elements", None)
