"""The CPU backend: NumPy arrays, by Numba. The contract is in `fastbn.kernels`.

numbers   elements to numbers and back, float16 and bfloat16 by their bits
blocks    sums and maps over one contiguous run; the building blocks for your own @njit code
rows      the schedule for runs inside one channel (NCHW)
columns   the schedule for runs across the channels (NHWC)
compile   njit with a disk cache that cannot fail a call
threads   when a parallel region may be entered
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

from . import threads
from .blocks import (
    block_comoments,
    block_gradient,
    block_moments,
    block_normalize,
    merge_comoments,
    merge_moments,
)
from .columns import columns_backward, columns_forward
from .rows import FINISH, MAP, SUM, rows_backward, rows_forward

__all__ = [
    "backward",
    "block_comoments",
    "block_gradient",
    "block_moments",
    "block_normalize",
    "element_view",
    "forward",
    "merge_comoments",
    "merge_moments",
]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a plan cuts a shape by. Borders depend on these and on the shape; tests make them tiny."""

    block: int = 4096  # elements of a block in the rows schedule: 16 KB of float32, half an L1 cache
    piece: int = 64  # blocks of a piece: 1 MB of float32
    tile: int = 512  # channels of a tile in the columns schedule
    area: int = 16384  # elements of a tile's block: 64 KB of float32, in the L2 cache
    height: int = 64  # rows of it at most: the variance of float64 data is off by 1.6 eps then, by 4.0 with 1365
    serial: int = 32768  # arrays of fewer elements run on one thread: entering a region costs 5 to 50 us


SIZES = Sizes()


def element_view(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype under which elements of `dtype` come to the kernels, or None if they can't."""
    if dtype in (np.float32, np.float64):
        return dtype
    if dtype == np.float16:
        return np.dtype(np.uint16)
    return np.dtype(np.int16) if dtype.name == "bfloat16" else None


def forward(
    x: np.ndarray,
    y: np.ndarray | None,
    stats: np.ndarray,
    affine: np.ndarray,
    eps: float,
    frozen: bool,
) -> None:
    stages = FINISH | (0 if frozen else SUM) | (0 if y is None else MAP)
    target = np.empty((0, 0, 0), x.dtype) if y is None else y
    _carry_out((rows_forward, columns_forward), (x, target), (stats, affine, float(eps)), 4, stages)


def backward(
    dy: np.ndarray,
    x: np.ndarray,
    dx: np.ndarray | None,
    stats: np.ndarray,
    affine: np.ndarray,
    grads: np.ndarray,
) -> None:
    stages = SUM | FINISH | (0 if dx is None else MAP)
    target = np.empty((0, 0, 0), x.dtype) if dx is None else dx
    _carry_out((rows_backward, columns_backward), (dy, x, target), (stats, affine, grads), 5, stages)


class _Plan(NamedTuple):
    """How a shape is cut, read off the shape and the strides of x alone."""

    by_rows: bool
    whole: int  # channels, or tiles of channels
    pieces: int  # of each
    borders: tuple[int, ...]  # as the kernels read them
    fold: int  # rows of few channels that are taken as one row of many


@functools.lru_cache(maxsize=1024)
def _plan(shape: tuple[int, int, int], strides: tuple[int, int, int], itemsize: int, sizes: Sizes) -> _Plan:
    outer, channels, inner = shape
    rows_of_channels = outer * inner
    if strides[1] == itemsize and channels > 1 and (inner == 1 or strides[2] != itemsize):
        fold = 1
        if channels * rows_of_channels >= sizes.serial:
            fits = range(min(sizes.tile // channels, rows_of_channels), 1, -1)
            fold = next((k for k in fits if rows_of_channels % k == 0), 1)
        # Rows of fewer than 8 channels are shorter than a vector; the rows schedule gathers them.
        if channels * fold >= 8:
            width = min(channels, sizes.tile)
            height = min(max(1, sizes.area // width), sizes.height)
            blocks = -(-rows_of_channels // height)
            pieces = -(-blocks // sizes.piece)
            return _Plan(False, -(-channels // width), pieces, (width, height, blocks, sizes.piece), fold)
    if inner < sizes.block:
        runs, length = min(outer, max(1, sizes.block // inner)), inner
    else:
        runs, length = 1, -(-inner // -(-inner // sizes.block))
    segments = -(-inner // length)
    blocks = -(-outer // runs) * segments
    return _Plan(True, channels, -(-blocks // sizes.piece), (runs, segments, length, blocks, sizes.piece), 1)


def _carry_out(
    kernels: tuple[Any, Any], arrays: tuple[np.ndarray, ...], numbers: tuple[Any, ...], depth: int, stages: int
) -> None:
    """Runs the stages; arrays (O, C, I) end in x and what is written, numbers are by channel, depth is part's."""
    x = arrays[-2]
    plan = _plan(x.shape, x.strides, x.itemsize, SIZES)
    kernel = _twins(kernels[0] if plan.by_rows else kernels[1], x.dtype)
    wide = _folded(plan.fold, arrays) if plan.fold > 1 else None
    pieces = plan.pieces if stages & SUM else 0
    if wide is None:
        part = np.empty((pieces, depth, x.shape[1]))
        _run(kernel, plan, stages, x.size, (*arrays, *numbers, part))
        return

    # k rows are one row of k C channels, and each channel's k results merge like pieces.
    def tiled() -> tuple[Any, ...]:
        return tuple(np.tile(n, plan.fold) if isinstance(n, np.ndarray) else n for n in numbers)

    wide_plan = _plan(wide[-2].shape, wide[-2].strides, x.itemsize, SIZES)
    part = np.empty((wide_plan.pieces if pieces else 0, depth, plan.fold * x.shape[1]))
    if stages & SUM:
        _run(kernel, wide_plan, SUM, x.size, (*wide, *tiled(), part))
    split = np.ascontiguousarray(part.reshape(-1, depth, plan.fold, x.shape[1]).swapaxes(1, 2))
    _run(kernel, plan, FINISH, x.size, (*arrays, *numbers, split.reshape(-1, depth, x.shape[1])))
    if stages & MAP:
        _run(kernel, wide_plan, MAP, x.size, (*wide, *tiled(), part))


def _folded(fold: int, arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...] | None:
    """Every `fold` rows as one, for arrays whose rows follow each other without a gap; None if one's don't."""
    wide = []
    for a in arrays:
        outer, channels, inner = a.shape
        rows = a.reshape(outer, channels) if inner == 1 else a[0].T if outer == 1 else None
        if a.size and (rows is None or not rows.flags.c_contiguous):
            return None
        wide.append(rows.reshape(-1, fold * channels, 1) if a.size else a)
    return tuple(wide)


def _run(kernel: Any, plan: _Plan, stages: int, size: int, args: tuple[Any, ...]) -> None:
    """All stages of a channel (or tile), then the next; where those are few, a stage of all, then the next."""
    count = threads.threads() if size >= SIZES.serial else 1
    pieces = plan.whole * plan.pieces
    if stages in (SUM, MAP):
        threads.run(kernel, pieces, *args, plan.borders, stages, parallel=count > 1)
    elif count == 1 or plan.whole >= 4 * count or plan.pieces == 1:
        threads.run(kernel, plan.whole, *args, plan.borders, stages, parallel=count > 1 and stages != FINISH)
    else:
        if stages & SUM:
            threads.run(kernel, pieces, *args, plan.borders, SUM, parallel=True)
        threads.run(kernel, plan.whole, *args, plan.borders, FINISH, parallel=False)
        if stages & MAP:
            threads.run(kernel, pieces, *args, plan.borders, MAP, parallel=True)


class _Twins:
    """A kernel for one element type, for arrays of any strides, read-only ones too: one compilation serves all."""

    def __init__(self, kernel: Any, signature: tuple[Any, ...]) -> None:
        self._kernel, self._signature = kernel, signature

    @functools.cached_property
    def serial(self) -> Callable[..., None]:
        return self._entry(self._kernel.serial)

    @functools.cached_property
    def parallel(self) -> Callable[..., None]:
        return self._entry(self._kernel.parallel)

    def _entry(self, dispatcher: Any) -> Callable[..., None]:
        # The compiled entry converts its arguments to the signature by itself. The dispatcher would look at the
        # layout of each array first, and compile again for every combination of layouts.
        dispatcher.compile(self._signature)
        entry: Callable[..., None] = dispatcher.overloads[self._signature].entry_point
        return entry


@functools.cache
def _twins(kernel: Any, dtype: np.dtype[Any]) -> _Twins:
    if numba.config.DISABLE_JIT:
        raise RuntimeError(
            "fastbn's CPU kernels need Numba's compiler, which NUMBA_DISABLE_JIT turns off; unset it, or use "
            'fastbn.set_backend("reference")'
        )
    integer, real = numba.types.int64, numba.types.float64
    element = numba.from_dtype(dtype)
    given, written = (numba.types.Array(element, 3, "A", readonly=readonly) for readonly in (True, False))
    numbers, part = numba.types.Array(real, 2, "C"), numba.types.Array(real, 3, "C")
    arrays, plan = {
        rows_forward: ((given, written, numbers, numbers, real, part), 5),
        columns_forward: ((given, written, numbers, numbers, real, part), 4),
        rows_backward: ((given, given, written, numbers, numbers, numbers, part), 5),
        columns_backward: ((given, given, written, numbers, numbers, numbers, part), 4),
    }[kernel]
    return _Twins(kernel, (integer, *arrays, numba.types.UniTuple(integer, plan), integer))
