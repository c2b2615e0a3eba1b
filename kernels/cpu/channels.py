"""Some channels of an array, copied to others of another."""

from __future__ import annotations

import functools

import numba
import numpy as np

from . import SIZES, threads
from .compile import compiled
from .items import Twins, by_all
from .lanes import fetch, pointer, reserve

# Rows ahead for which memory is asked. One of 64 channels of 103 MB: 2.5 ms by two threads with it, and 3.1 without;
# put back, where a line is read before it is written, 2.6 and 3.6. NumPy picks it in 4.6.
_AHEAD = 64
_LINE = 128  # bytes that memory moves for an element alone: its line's neighbour comes along


@compiled
def _copy_item(k, items, source, target, at, to, every):  # type: ignore[no-untyped-def]
    """target (O, ., I) <- source (O, ., I): its channels `at` (n,) to the channels `to` (n,)."""
    if k < 0:
        by_all(every, items, (source, target, at, to, every))
        return
    outer, inner = source.shape[0], source.shape[2]
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
def _twins(size: int) -> Twins:
    """For elements of so many bytes, which are whole numbers here."""
    element, row = getattr(numba.types, f"uint{8 * size}"), numba.types.Array(numba.types.int64, 1, "C")
    arrays = [numba.types.Array(element, 3, "A", readonly=readonly) for readonly in (True, False)]
    return Twins(_copy_item, (*arrays, row, row))


def copy_channels(source: np.ndarray, at: np.ndarray, target: np.ndarray, to: np.ndarray) -> None:
    """target[:, to] = source[:, at], of arrays (O, C, I) with any strides and elements of one size."""
    bits = np.dtype(f"u{source.itemsize}")
    runs = all(a.strides[2] == a.itemsize for a in (source, target))
    moved = source.shape[0] * source.shape[2] * len(at) * (source.itemsize if runs else _LINE)
    items = threads.threads_for(moved, SIZES)
    threads.run(_twins(source.itemsize), items, source.view(bits), target.view(bits), at, to, parallel=items > 1)
