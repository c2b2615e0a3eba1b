"""Which kernels an array goes to: found by the array's type, imported on first use."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from types import TracebackType
from typing import Any, Protocol, cast

import numpy as np

from .adapters import CuPyKernels, NumbaKernels
from .arguments import describe
from .arrays import Span
from .extras import Extras

BACKENDS = ("auto", "cpu", "cupy", "numba-cuda", "reference")
_NUMPY_KERNELS = {"auto": "cpu", "cpu": "cpu", "reference": "reference"}
_DEVICE_KERNELS = {"cupy": ("cupy", "cuda", CuPyKernels), "numba-cuda": ("numba.cuda", "numba_cuda", NumbaKernels)}


class Kernels(Protocol):
    """The contract in `fastbn.kernels`, as types; arrays are NumPy's, or Spans."""

    def element_view(self, dtype: np.dtype[Any]) -> np.dtype[Any] | None: ...

    def forward(
        self, x: Any, y: Any, table: Any, given: tuple[Any, ...], eps: float, more: Extras | None = None
    ) -> None: ...

    def backward(
        self, dy: Any, x: Any, dx: Any, table: Any, dgamma: Any, dbeta: Any, frozen: bool, more: Extras | None = None
    ) -> None: ...

    def gradient_sums(self, dy: Any, x: Any, table: Any, more: Extras | None = None) -> Any: ...

    def gradient_map(
        self, dy: Any, x: Any, dx: Any, table: Any, sums: Any, count: float, more: Extras | None = None
    ) -> None: ...


def _known(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: {name!r} is no backend; expected one of {', '.join(BACKENDS)}")
    return name


_backend = _known(os.environ.get("FASTBN_BACKEND") or "auto", "the environment variable FASTBN_BACKEND")


class set_backend:
    """Choose the kernels for all calls of this process from now on, or for a with-block.

    `name` is "auto" (by the array's type). For NumPy arrays: "cpu" (Numba), or "reference" (float64 NumPy: slow, and
    the judge of the others). For arrays on a GPU: "cupy" (CUDA C; "auto" takes it where CuPy is installed) or
    "numba-cuda" (portable, and slower; it alone has `jvp`, `backward_backward` and whole numbers, for which "auto"
    takes it). A call with arrays of the other place is then a TypeError. An unknown name raises ValueError, and one
    whose library, driver or device is missing RuntimeError. The environment variable FASTBN_BACKEND sets the same at
    import, when nothing but the name is checked.

    >>> import fastbn
    >>> with fastbn.set_backend("reference"):
    ...     fastbn.get_backend()
    'reference'
    >>> fastbn.get_backend()
    'auto'
    """

    def __init__(self, name: str) -> None:
        global _backend
        self._before = _backend
        _known(name, "fastbn.set_backend")
        if name in _DEVICE_KERNELS and (reason := missing(name)) is not None:
            raise RuntimeError(f"fastbn.set_backend: {name!r} can't be used: {reason}")
        _backend = name

    def __enter__(self) -> set_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _backend
        _backend = self._before


def get_backend() -> str:
    """The name that `set_backend` or FASTBN_BACKEND set last; "auto" at first.

    >>> import fastbn
    >>> fastbn.get_backend()
    'auto'
    """
    return _backend


def kernels(where: str, x: Any) -> Kernels:
    """Those for x, which is a NumPy array or a Span."""
    if not isinstance(x, Span):
        if (name := _NUMPY_KERNELS.get(_backend)) is None:
            raise TypeError(
                f"{where}: x is a {describe(x)} in main memory, and the backend {_backend!r} is for arrays on a GPU; "
                'pass one, or call fastbn.set_backend("auto")'
            )
        return _load(name)
    if x.whole and _backend in ("auto", "cupy"):  # CuPy's have one type of elements for x and y
        return _numba_alone(where, x, "whole numbers")
    if _backend in _DEVICE_KERNELS:
        return _load_for_device(_backend, where)
    if _backend != "auto":
        raise TypeError(
            f"{where}: x is a {x}, and the backend {_backend!r} is for NumPy arrays; "
            'copy it to main memory, or call fastbn.set_backend("auto")'
        )
    first, *others = x.family.backends
    return _load_for_device(first if not others or _installed("cupy") else others[0], where)


def second_order_on_device(where: str, x: Span) -> Any:
    """What has `second` for x."""
    return _numba_alone(where, x, "second order") if _backend in ("auto", "cupy") else kernels(where, x)


def _numba_alone(where: str, x: Span, what: str) -> Kernels:
    """The kernels of numba.cuda: alone among those for arrays on a GPU they have `what`, for arrays of any library."""
    if _backend == "cupy":
        raise TypeError(
            f"{where}: x is a {x}, and the backend 'cupy' has no {what}; expected 'numba-cuda', whose kernels "
            'read such arrays, too. Call fastbn.set_backend("auto"), which takes them for this'
        )
    try:
        return _load_for_device("numba-cuda", where)
    except RuntimeError as cause:
        raise RuntimeError(
            f"{where}: x is a {x}, and {what} on a GPU is for numba-cuda's kernels, which can't be used: "
            f"{missing('numba-cuda')}"
        ) from cause


@functools.cache
def _load(name: str) -> Kernels:
    return cast(Kernels, importlib.import_module(f"fastbn.kernels.{name}"))


@functools.cache
def _load_for_device(name: str, where: str) -> Kernels:
    library, module, adapter = _DEVICE_KERNELS[name]
    try:
        importlib.import_module(library)
    except Exception as cause:  # one that is installed may raise anything
        raise RuntimeError(f"{where}: the backend {name!r} can't be used: {missing(name)}") from cause
    return cast(Kernels, adapter(_load(module)))


@functools.cache
def _installed(library: str) -> bool:
    """Whether it is there: a broken one is then named by the call, and not passed over."""
    if library in sys.modules:
        return sys.modules[library] is not None
    return importlib.util.find_spec(library) is not None


def missing(backend: str) -> str | None:
    """What the backend "cupy" or "numba-cuda" lacks on this machine, and where to get it; None: nothing."""
    library, _, _ = _DEVICE_KERNELS[backend]
    try:
        module = importlib.import_module(library)
    except Exception as cause:
        return f"{library} can't be imported ({cause}). {_INSTALL}"
    try:
        if backend == "cupy":
            count = module.cuda.runtime.getDeviceCount()
        else:
            count = len(module.gpus) if module.is_available() else 0
            if (error := module.cuda_error()) is not None:
                raise RuntimeError(error)
    except Exception as cause:
        return f"no CUDA driver can be used ({' '.join(str(cause).split())}). Install NVIDIA's driver"
    return None if count else "there is no CUDA device here"


_INSTALL = "pip install 'fastbn[cuda13]', or 'fastbn[cuda12]' for a driver of CUDA 12"
