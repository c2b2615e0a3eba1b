"""Some channels of an array, copied to others of another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import prange

from . import SIZES, _compiled, threads
from .compile import Kernel
from .lanes import fetch, pointer, reserve

# Rows ahead for which memory is asked. One of 64 channels of 103 MB: 2.5 ms by two threads with it, and 3.1 without;
# put back, where a line is read before it is written, 2.6 and 3.6. NumPy picks it in 4.6.
_AHEAD = 64
_LINE = 128  # bytes that memory moves for an element alone: its line's neighbour comes along


@Kernel
def _copy_kernel(items, source, target, at, to):  # type: ignore[no-untyped-def]
    """target (O, ., I) <- source (O, ., I): its channels `at` (n,) to the channels `to` (n,)."""
    outer, inner = source.shape[0], source.shape[2]
    for k in prange(items):
        first, last = outer * inner * k // items, outer * inner * (k + 1) // items
        for o in range(first // inner, (last + inner - 1) // inner):
            i0, i1 = max(0, first - o * inner), min(inner, last - o * inner)
            if inner > 1 and abs(source.strides[2]) < abs(source.strides[1]):
                for j in range(at.size):
                    for i in range(i0, i1):
                        target[o, to[j], i] = source[o, at[j], i]
                continue
            # Channels lie side by side: row by row.
            p, q = (o, i0 + _AHEAD) if inner > 1 else (o + _AHEAD, 0)
            read = p * source.strides[0] + q * source.strides[2]
            written = p * target.strides[0] + q * target.strides[2]
            for i in range(i0, i1):
                for j in range(at.size):
                    fetch(pointer(source, read + at[j] * source.strides[1]), 0)
                    reserve(pointer(target, written + to[j] * target.strides[1]), 0)
                    target[o, to[j], i] = source[o, at[j], i]
                read, written = read + source.strides[2], written + target.strides[2]


@functools.cache
def _entry(size: int, parallel: bool) -> Callable[..., None]:
    """For elements of so many bytes, which are whole numbers here, and arrays of any strides."""
    element, row = getattr(numba.types, f"uint{8 * size}"), numba.types.Array(numba.types.int64, 1, "C")
    arrays = [numba.types.Array(element, 3, "A", readonly=readonly) for readonly in (True, False)]
    dispatcher = _copy_kernel.parallel if parallel else _copy_kernel.serial
    found: Callable[..., None] = _compiled(dispatcher, (numba.types.int64, *arrays, row, row)).entry_point
    return found


class _Entries:
    """What `threads.run` calls."""

    def __init__(self, size: int) -> None:
        self._size = size

    def serial(self, items: int, *args: Any) -> None:
        _entry(self._size, False)(items, *args)

    def parallel(self, items: int, *args: Any) -> None:
        _entry(self._size, True)(items, *args)


def copy_channels(source: np.ndarray, at: np.ndarray, target: np.ndarray, to: np.ndarray) -> None:
    """target[:, to] = source[:, at], of arrays (O, C, I) with any strides and elements of one size."""
    bits = np.dtype(f"u{source.itemsize}")
    least = SIZES.asleep if threads.SLEEPY else SIZES.serial
    items = threads.threads() if source.shape[0] * source.shape[2] * len(at) * _LINE >= least else 1
    threads.run(_Entries(source.itemsize), items, source.view(bits), target.view(bits), at, to, parallel=items > 1)
