"""The CPU backend: NumPy arrays, by Numba. The contract is in `fastbn.kernels`.

lanes     sixteen numbers at a time, and the element formats
blocks    sums and maps over one contiguous run; the building blocks for your own @njit code
rows      a block of runs inside one channel (NCHW)
columns   a block of rows across the channels (NHWC)
schedule  the two kernels: sums, what they make of a channel, maps
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
from .lanes import LANES
from .rows import EXACT, GATHER, NEXT, PAST
from .schedule import FINISH, MAP, SUM, backward_item, backward_kernel, forward_item, forward_kernel

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

    block: int = 16384  # values of a channel in a block of rows: a block costs 50 ns, these 1.4 us
    piece: int = 64  # blocks of a piece at most: its pivot fits where data doesn't drift within 4 MB of float32
    slab: int = 400_000  # bytes of a tile of rows, so that it and the next one fit into L2 (1 MB)
    line: int = 2048  # bytes of a tile of rows that follow each other in memory, at least
    columns: int = 1024  # columns of a tile: its sums and coefficients stay in L1 and L2
    height: int = 64  # rows of a block of columns: as many are added in a lane
    few: int = 256  # values of a channel below which all is done in float64
    serial: int = 131072  # arrays of fewer elements run on one thread, which takes 40 us: a region costs 2 to 120
    asleep: int = 1_500_000  # the same where threads sleep between regions: a woken one brings nothing until then
    ahead: int = 1_000_000  # bytes of a tile above which the next one isn't fetched: both don't fit into L2 (2 MB)
    past: int = 30_000_000  # bytes of all arrays above which stores go past the caches: they are slower below


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
    table: np.ndarray,
    given: tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None, np.ndarray | None],
    eps: float,
    more: Any = None,
) -> None:
    gamma, beta, mean, var = given
    stages = FINISH | (0 if y is None else MAP)
    if mean is None:
        stages |= SUM
    else:
        table[0], table[1], table[2] = mean, 0.0, var
    affine = table[4:]
    affine[0] = 1.0 if gamma is None else gamma
    affine[1] = 0.0 if beta is None else beta
    target = np.empty((0, 0, 0), x.dtype) if y is None else y
    _carry_out(forward_kernel, (x, target), (table, affine, float(eps)), 4, stages)


def backward(
    dy: np.ndarray,
    x: np.ndarray,
    dx: np.ndarray | None,
    table: np.ndarray,
    dgamma: np.ndarray | None,
    dbeta: np.ndarray | None,
    frozen: bool,
    more: Any = None,
) -> None:
    if not frozen or dgamma is not None or dbeta is not None:
        grads = np.empty((6, x.shape[1]))
        mapped = dx is not None and not frozen
        target = dx if mapped else np.empty((0, 0, 0), x.dtype)
        stages = SUM | FINISH | (MAP if mapped else 0)
        _carry_out(backward_kernel, (dy, x, target), (table, table[4:], grads), 5, stages)
    with np.errstate(all="ignore"):
        if dgamma is not None and frozen:  # given statistics are not x's own: the mean of x - hi isn't 0
            dgamma[...] = (x.shape[0] * x.shape[2] * grads[2] + grads[5] * grads[3]) * table[3]
        elif dgamma is not None:
            dgamma[...] = grads[4]
        if dbeta is not None:
            dbeta[...] = grads[5]
        if frozen and dx is not None:  # by the forward map, after the sums, as it may overwrite dy and x
            nothing = np.zeros(x.shape[1])
            forward(dy, dx, np.empty_like(table), (table[4] * table[3], None, nothing, nothing), 1.0)


class _Plan(NamedTuple):
    """How a shape is cut, read off the shape and the strides alone."""

    tiles: int
    pieces: int  # of a tile
    numbers: tuple[int, ...]  # as the kernels read them


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, int, int], strides: tuple[tuple[int, int, int], ...], itemsize: int, stages: int, sizes: Sizes
) -> _Plan:
    outer, channels, inner = shape
    size = outer * channels * inner
    flags = EXACT if itemsize == 8 or outer * inner < sizes.few else 0
    # Memory decides: across the channels where they are next to each other, else along the inner axis.
    across = channels > 1 and all(s[1] == itemsize and (inner == 1 or s[2] != itemsize) for s in strides)
    short = 1 < inner < LANES and all(s[2] == itemsize and s[1] == inner * itemsize for s in strides)
    flags |= PAST if size * itemsize * len(strides) > sizes.past else 0
    if across or short:
        return _by_columns(shape, strides, itemsize, flags, inner if short else 1, stages, sizes)
    return _by_rows(shape, strides, itemsize, flags, stages, sizes)


def _by_rows(
    shape: tuple[int, int, int], strides: tuple[tuple[int, int, int], ...], itemsize: int, flags: int, stages: int,
    sizes: Sizes,
) -> _Plan:  # fmt: skip
    outer, channels, inner = shape
    apart = inner > 1 and any(s[2] != itemsize for s in strides)
    if apart or inner < min(LANES, sizes.block):
        flags |= GATHER
    reads = max(1, len(strides) - 1)
    if stages & SUM or flags & GATHER:
        segments = _ceil(inner, sizes.block)
        length = inner if segments == 1 else _ceil(_ceil(inner, segments), 2 * LANES) * 2 * LANES
        runs = min(outer, max(1, sizes.block // inner))
        tile = max(sizes.slab // (reads * outer * inner * itemsize), sizes.line // (inner * itemsize), 1)
        if inner * itemsize >= 2 * sizes.line:
            tile = 1
        if flags & GATHER:
            tile = max(tile, 16)  # whose elements share lines
        tile = min(tile, _ceil(channels, 16))
        flags |= NEXT if reads * tile * outer * inner * itemsize <= sizes.ahead else 0
    else:  # a map alone goes in the order of memory
        length, runs = min(inner, 16 * sizes.block), 1
        tile = channels if outer >= 16 else _ceil(channels, 16)
    segments = _ceil(inner, length)
    blocks = _ceil(outer, runs) * segments
    piece = 1 if not stages & SUM else sizes.piece if channels >= 64 * tile else min(sizes.piece, _ceil(blocks, 16))
    return _Plan(_ceil(channels, tile), _ceil(blocks, piece), (0, tile, blocks, piece, runs, segments, length, flags))


def _by_columns(
    shape: tuple[int, int, int], strides: tuple[tuple[int, int, int], ...], itemsize: int, flags: int, period: int,
    stages: int, sizes: Sizes,
) -> _Plan:  # fmt: skip
    outer, channels, inner = shape
    rows = outer if period > 1 else outer * inner
    fold, width = 1, channels * period
    folded = sizes.columns // max(1, len(strides) - 1)  # coefficients of a gradient are twice as large
    gapless = all((s[0] if period > 1 or inner == 1 else s[2]) == width * itemsize for s in strides)
    level = period > 1 or inner == 1 or outer == 1 or all(s[0] == inner * s[2] for s in strides)
    if gapless and level and 2 * width <= folded:
        fold = max(1, min(folded // width, rows // 16))
    tile, fits = max(1, sizes.columns // period), sizes.slab // (rows * period * itemsize)
    if fold > 1:
        tile = channels
    elif stages & SUM and fits * period * itemsize >= sizes.line // 8:  # a tile is mapped while in L2
        tile = max(min(tile, fits, _ceil(_ceil(channels, 8), LANES) * LANES), 1)
    tile = min(tile, channels)
    blocks = _ceil(_ceil(rows, fold), sizes.height)
    piece = max(min(8, _ceil(blocks, 16)), _ceil(blocks, max(1, min(64, 32768 // channels))))
    return _Plan(
        _ceil(channels, tile), _ceil(blocks, piece), (1, tile, blocks, piece, sizes.height, period, fold, flags)
    )


def _carry_out(kernel: Any, arrays: tuple[np.ndarray, ...], numbers: tuple[Any, ...], depth: int, stages: int) -> None:
    """Runs the stages; arrays (O, C, I) end in x and what is written, numbers are by channel, depth is part's."""
    x = arrays[-2]
    strides = tuple([a.strides for a in (arrays if stages & MAP else arrays[:-1])])
    plan = _plan(x.shape, strides, x.itemsize, stages, SIZES)
    part = np.empty((plan.pieces if stages & SUM else 0, depth, x.shape[1]))
    twins = _twins(kernel, x.dtype)
    count = 1 if x.size < (SIZES.asleep if threads.SLEEPY else SIZES.serial) else threads.threads()

    def run(items: int, some: int) -> None:
        args = (*arrays, *numbers, part, np.zeros(items, np.int64), plan.numbers, some)
        threads.run(twins, items, *args, parallel=items > 1)

    # Tile by tile, all stages of each; where tiles are too few for the threads, stage by stage, piece by piece.
    if count == 1:
        run(1, stages)
    elif plan.tiles >= 4 * count or (plan.tiles >= count and plan.tiles % count == 0) or plan.pieces == 1:
        run(min(count, plan.tiles), stages)
    else:
        items = min(count, plan.tiles * plan.pieces)
        if stages & SUM:
            run(items, SUM)
        run(1, FINISH)
        if stages & MAP:
            run(items, MAP)


class _Twins:
    """A kernel for one element type, for arrays of any strides, read-only ones too: one compilation serves all."""

    def __init__(self, item: Any, kernel: Any, arguments: tuple[Any, ...]) -> None:
        self._item, self._kernel, self._arguments = item, kernel, arguments

    def serial(self, _items: int, *args: Any) -> None:
        self._one(0, 1, *args)  # one item is all of the work

    def parallel(self, items: int, *args: Any) -> None:
        self._many(items, self._address, *args)

    @functools.cached_property
    def _compiled_item(self) -> Any:
        return _compiled(self._item, (numba.types.int64, numba.types.int64, *self._arguments))

    @functools.cached_property
    def _one(self) -> Callable[..., None]:
        # The compiled entry converts its arguments to the signature by itself. The dispatcher would look at the
        # layout of each array first, and compile again for every combination of layouts.
        entry: Callable[..., None] = self._compiled_item.entry_point
        return entry

    @functools.cached_property
    def _many(self) -> Callable[..., None]:
        signature = (numba.types.int64, numba.types.int64, *self._arguments)
        entry: Callable[..., None] = _compiled(self._kernel.parallel, signature).entry_point
        return entry

    @functools.cached_property
    def _address(self) -> int:
        item = self._compiled_item
        return int(item.library.get_pointer_to_function(item.fndesc.llvm_func_name))


def _compiled(dispatcher: Any, signature: tuple[Any, ...]) -> Any:
    dispatcher.compile(signature)
    return dispatcher.overloads[signature]


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
    claims = numba.types.Array(integer, 1, "C")
    item, arrays = {
        forward_kernel: (forward_item, (given, written, numbers, numbers, real, part)),
        backward_kernel: (backward_item, (given, given, written, numbers, numbers, numbers, part)),
    }[kernel]
    return _Twins(item, kernel, (*arrays, claims, numba.types.UniTuple(integer, 8), integer))
