"""The kernels of one GPU library for arrays of every family: what `fastbn.dispatch` gives for a Span."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np

from .arrays import CUPY, NUMBA, Described, OnDevice, Span


class _Kernels:
    """Kernels of one library's arrays, for arrays of every family: `fastbn.dispatch.Kernels`."""

    own: OnDevice
    name: str

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels

    def element_view(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        return dtype

    def forward(
        self, x: Span, y: Span | None, table: Any, given: tuple[Any, ...], eps: float, more: Any = None
    ) -> None:
        with self._on([x]):
            small = self._small(x.family, (table, *given))
            call = self._array(x), y and self._array(y), small[0], small[1:], eps
            self._kernels.forward(*call, *self._more(x, more), **_kind(x))

    def backward(
        self, dy: Span, x: Span, dx: Span | None, table: Any, dgamma: Any, dbeta: Any, frozen: bool, more: Any = None
    ) -> None:
        with self._on([x, dy]):
            small = self._small(x.family, (table, dgamma, dbeta))
            call = self._array(dy), self._array(x), dx and self._array(dx), *small, frozen
            self._kernels.backward(*call, *self._more(x, more), **_kind(x))

    def _more(self, x: Span, more: Any) -> tuple[Any, ...]:
        """`more` with the library's own arrays, or nothing; an error where the kernels lack what it asks for."""
        if more is None:
            return ()
        if lacking := [name for name in more.features() if name not in self._kernels.FEATURES]:
            has = ", ".join(sorted(self._kernels.FEATURES)) or "none of these"
            raise TypeError(
                f"fastbn: {' and '.join(lacking)} can't be had from the backend {self.name!r}, which has {has}; x is a "
                f"{x}. Do that part with your array library, or copy x to main memory"
            )
        large = {name: getattr(more, name) for name in ("residual", "dresidual", "weights")}
        own = {name: a and self._array(a) for name, a in large.items()}
        if more.weights is not None:  # else the mass is NumPy's, and nothing to kernels
            own["mass"] = self._small(x.family, (more.mass,))[0]
        return (more._replace(**own),)

    def _small(self, family: OnDevice, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arrays of C numbers as the library's own."""
        if family is self.own:
            return arrays
        return tuple([None if a is None else self._array(family.locate(a)) for a in arrays])

    def _on(self, arrays: list[Span]) -> Any:
        """A context with the device and the stream to run on."""
        raise NotImplementedError

    def _array(self, span: Span) -> Any:
        """The library's own array on the span's memory."""
        raise NotImplementedError


def _kind(x: Span) -> dict[str, bool]:
    """What kernels are told of x that its elements don't say."""
    return {"whole": True} if x.whole else {}


class CuPyKernels(_Kernels):
    """They choose the device themselves, and take CuPy's current stream."""

    own, name = CUPY, "cupy"

    def _on(self, arrays: list[Span]) -> Any:
        stream = arrays[0].family.stream(arrays)
        return _NOTHING if stream is None else self._with_stream(stream, arrays[0].device)

    @contextlib.contextmanager
    def _with_stream(self, stream: int, device: int) -> Iterator[None]:
        cuda = import_module("cupy").cuda
        with cuda.Device(device), cuda.ExternalStream(stream) if stream else cuda.Stream.null:
            yield

    def _array(self, span: Span) -> Any:
        if span.family is CUPY:
            return sys.modules["cupy"].ndarray(span.shape, span.dtype, span.value.data, span.strides)
        cupy = import_module("cupy")
        memory = cupy.cuda.UnownedMemory(span.address, span.bounds()[1] - span.address, span.value, span.device)
        return cupy.ndarray(span.shape, span.dtype, cupy.cuda.MemoryPointer(memory, 0), span.strides)


class NumbaKernels(_Kernels):
    """They take their stream from an array that has one."""

    own, name = NUMBA, "numba-cuda"

    def second(
        self, u: Any, g: Any, x: Any, r: Any, z: Any, table: Any, tangents: tuple[Any, Any], frozen: bool, ggamma: Any,
        more: Any,
    ) -> None:  # fmt: skip
        """Of `fastbn.kernels.numba_cuda.second`, imported when it is asked for."""
        large = u, g, x, r, z
        like = next(a for a in (x, *large) if a is not None)
        with self._on([like]):
            table, p, q, ggamma = self._small(like.family, (table, *tangents, ggamma))
            call = *(a and self._array(a) for a in large), table, (p, q), frozen, ggamma, *self._more(like, more)
            import_module("fastbn.kernels.numba_cuda.second").second(*call)

    def _on(self, arrays: list[Span]) -> Any:
        return import_module("numba.cuda").gpus[arrays[0].device]

    def _array(self, span: Span) -> Any:
        if span.family is NUMBA:
            arrays = import_module("fastbn.kernels.numba_cuda.arrays")
            return arrays.view(span.value, span.shape, span.strides)
        stream = span.family.stream([span])
        if stream is None:
            stream = sys.modules["cupy"].cuda.get_current_stream().ptr
        more = {"typestr": span.dtype.str, "data": (span.address, False), "stream": stream or 1}  # 1: the default one
        return import_module("numba.cuda").as_cuda_array(Described(more, span, "cuda_array"), sync=False)


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_NOTHING = _Nothing()
