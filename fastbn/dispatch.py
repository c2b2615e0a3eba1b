"""Which kernels an array goes to: found by the array's type, imported on first use."""

from __future__ import annotations

import functools
import importlib
import os
from types import TracebackType
from typing import Any, Protocol, cast

import numpy as np

BACKENDS = ("auto", "cpu", "cupy", "numba-cuda", "reference")
_NUMPY_KERNELS = {"auto": "cpu", "cpu": "cpu", "reference": "reference"}


Given = tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None, np.ndarray | None]  # gamma, beta, mean, var


class Kernels(Protocol):
    """The contract in `fastbn.kernels`, as types."""

    def element_view(self, dtype: np.dtype[Any]) -> np.dtype[Any] | None: ...

    def forward(self, x: np.ndarray, y: np.ndarray | None, table: np.ndarray, given: Given, eps: float) -> None: ...

    def backward(
        self,
        dy: np.ndarray,
        x: np.ndarray,
        dx: np.ndarray | None,
        table: np.ndarray,
        dgamma: np.ndarray | None,
        dbeta: np.ndarray | None,
        frozen: bool,
    ) -> None: ...


def _known(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: {name!r} is no backend; expected one of {', '.join(BACKENDS)}")
    if name not in _NUMPY_KERNELS:
        raise NotImplementedError(
            f"{where}: this version of fastbn has no kernels for {name!r} yet; "
            "expected one of auto, cpu, reference. Copy arrays to main memory, or wait for a later version"
        )
    return name


_backend = _known(os.environ.get("FASTBN_BACKEND") or "auto", "the environment variable FASTBN_BACKEND")


class set_backend:
    """Choose the kernels for all calls of this process from now on, or for a with-block.

    `name` is "auto" (by the array's type), "cpu" (Numba), or "reference" (float64 NumPy: slow, and the
    judge of the others); "cupy" and "numba-cuda" raise NotImplementedError in this version. An unknown
    name raises ValueError. The environment variable FASTBN_BACKEND sets the same at import.

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
        _backend = _known(name, "fastbn.set_backend")

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


def kernels() -> Kernels:
    """The kernels for NumPy arrays."""
    return _load(_NUMPY_KERNELS[_backend])


@functools.cache
def _load(name: str) -> Kernels:
    return cast(Kernels, importlib.import_module(f"fastbn.kernels.{name}"))
