"""How a shape is cut into tiles, pieces and blocks: read off shape, strides and sizes of elements alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

from .cut import EXACT, GATHER, NEXT, PAST, TWO, Cut
from .lanes import LANES
from .schedule import SUM

WEIGHTED, ORDERED, CURVED = 1, 2, 4  # what is special about a call; the last one: its activation has exp or erf


def _past() -> int:
    """A twelfth of the last cache; 15 MB at least, and where its size isn't told.

    Below, stores through the caches are as fast, and leave results there. With 480 MB of L3, beside four other
    libraries: backward of arrays of 26 MB took 1.5 to 2.4 copies through the caches and 2.2 to 2.9 past them, forward
    of 34 MB 1.8 and 2.0, of 51 MB 1.4 and 1.3. A map alone, as infer's, has twice as much: of 51 MB it took 1.0 copies,
    and 1.2 past the caches.
    """
    most = 0
    for level in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            size = level.read_text().strip()
            most = max(most, int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1:], 0))
    return max(15_000_000, most // 12)


@dataclasses.dataclass(frozen=True, eq=False)  # to hash twelve numbers takes 1 us
class Sizes:
    """What a plan cuts a shape by. Borders depend on these and on the shape; tests make them tiny."""

    block: int = 16384  # values of a channel in a block of rows: a block costs 50 ns, these 1.4 us
    piece: int = 64  # blocks of a piece at most: its pivot fits where data doesn't drift within 4 MB of float32
    slab: int = (
        410_000  # bytes of a tile of rows, so that it and the next one fit into L2 (1 MB); 32 × 56² × 4 and less
    )
    line: int = 2048  # bytes of a tile of rows that follow each other in memory, at least
    most: int = 32  # channels of a tile of rows: their sums stay in L1
    far: tuple[int, int, int] = (256, 4_000_000, 128)  # runs and bytes of a channel that no cache holds; tiles then
    columns: int = 1024  # columns of a tile: its sums and coefficients stay in L1 and L2
    short: tuple[int, int] = (32, 64)  # elements of a run that is walked as columns, see `_is_short`; of small arrays
    large: int = 10_000_000  # bytes of an array that is not small
    folded: int = 256  # columns of a folded row: by 1024, forward of (100,000, 3) took 1.4 times as long
    weighted: int = 128  # the same with weights, which are laid out by column, 16 rows at once
    height: int = 256  # rows of a block of columns, or more of few: each block merges; by 64, 1.02 to 1.1 of the time
    few: int = 256  # values of a channel below which all is done in float64
    serial: int = 600_000  # of `Plan.work`: less runs on one thread; of 0.5 MB two took 0.8 to 1.2 of the time
    asleep: int = 2_000_000  # the same where threads sleep between regions: of 1.6 MB 1.0 to 1.5, of 3.2 MB 0.8 to 1.1
    ahead: int = 1_000_000  # bytes of a tile above which the next one isn't fetched: both don't fit into L2 (2 MB)
    past: int = dataclasses.field(default_factory=_past)  # bytes of an array from which stores go past the caches


class Plan(NamedTuple):
    """How a shape is cut, read off the shape and the strides alone."""

    tiles: int
    pieces: int  # of a tile
    cut: Cut
    work: int  # bytes of x, half types' as float32: what they take is alike; less of a light map alone

    def whole(self, cells: int, count: int) -> bool:
        """Whether so many threads take cell by cell, all stages of each: else stage by stage, piece by piece."""
        return cells >= 4 * count or (cells >= count and cells % count == 0) or self.pieces == 1


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def alike(number: int, most: int) -> int:
    """The size of so few parts, all alike, that none is larger than `most`."""
    return ceil(number, ceil(number, most))


@functools.lru_cache(maxsize=1024)
def plan_of(
    shape: tuple[int, int, int], strides: tuple[tuple[int, int, int], ...], sized: tuple[int, int, int], stages: int,
    sizes: Sizes, least: int, most: int, special: int,
) -> Plan:  # fmt: skip
    """Of the largest set; the smallest has `least` outer indices, all have `most`; `special` has the flags above.

    `sized`: bytes of an element of x and of the other arrays, and which of the strides are x's.
    """
    own, other, at = sized
    items = tuple(own if i == at else other for i in range(len(strides)))
    _, channels, inner = shape
    size, itemsize = most * channels * inner, items[0]
    flags = EXACT if itemsize == 8 or least * inner < sizes.few else 0
    # Memory decides: across the channels where they are next to each other, else along the inner axis.
    each = list(zip(strides, items, strict=True))
    across = channels > 1 and all(s[1] == n and (inner == 1 or s[2] != n) for s, n in each)
    packed = all(s[2] == n and s[1] == inner * n for s, n in each)
    short = packed and _is_short(shape, items[0], stages, sizes)
    flags |= PAST if size * sum(items) > sizes.past * len(items) * (1 if stages & SUM else 2) else 0
    if across or short:
        found = _by_columns(shape, strides, items, flags, stages, inner if short else 1, sizes, special)
    else:
        found = _by_rows(shape, strides, items, flags, stages, sizes, special)
    # A map alone waits for memory, by which elements count as they are; sums, curves and strides are work for each.
    light = not (stages & SUM or special & CURVED or found[-1].flags & GATHER)
    return Plan(*found, size * sum(items) * 3 // 8 if light else size * max(4, itemsize))


def _is_short(shape: tuple[int, int, int], itemsize: int, stages: int, sizes: Sizes) -> bool:
    """Whether a channel's runs are so short that an outer index's elements are walked as one row.

    Runs of 16 and more only where a column has many of them, as its sums join by channel: (5589, 10, 16) took 5 times
    as long by runs, (1000, 64, 40) 1.7 times, (2048, 64, 64) 0.8.
    """
    outer, channels, inner = shape
    if inner < LANES:
        return inner > 1
    if not stages & SUM:
        return channels * inner <= sizes.folded
    wide = channels * inner > sizes.columns and outer * channels * inner * itemsize > sizes.large
    return inner <= sizes.short[0 if wide else 1] and outer >= 4 * inner


def _by_rows(
    shape: tuple[int, int, int], strides: tuple[tuple[int, int, int], ...], items: tuple[int, ...], flags: int,
    stages: int, sizes: Sizes, special: int,
) -> tuple[int, int, Cut]:  # fmt: skip
    outer, channels, inner = shape
    itemsize = items[0]
    apart = inner > 1 and any(s[2] != n for s, n in zip(strides, items, strict=True))
    if apart or inner < min(LANES, sizes.block):
        flags |= GATHER
    reads = max(1, len(strides) - 1)
    if stages & SUM or flags & GATHER:
        segments = ceil(inner, sizes.block)
        length = inner if segments == 1 else ceil(ceil(inner, segments), 2 * LANES) * 2 * LANES
        runs = min(outer, max(1, sizes.block // inner))
        slab, short = reads * outer * inner * itemsize, inner * itemsize < sizes.line
        tile = max(sizes.slab // slab, sizes.line // (inner * itemsize), 1)
        if flags & GATHER:
            tile = max(tile, 16)  # whose elements share lines
        tile = min(tile, sizes.most, ceil(channels, 16))
        if outer >= sizes.far[0] and (short or slab > sizes.far[1]):
            # By channel, each run was in another page: forward of 1 GB took 109 ms, now 90; of 26 MB in 1792 times 64
            # runs of 224 bytes, 2.5 ms by 9 channels, now 1.7, and backward 5.0, now 2.6; of (600, 30, 100) by 1 and 2
            # channels 1.7 times as long. Alike: (1706, 77, 80) took 1.75 times as long by 64 and 13.
            tile = alike(channels, sizes.far[2])
        near = slab * tile <= sizes.ahead
        adjacent = length == inner and all(s[1] == inner * n for s, n in zip(strides, items, strict=True))
        joint = tile == 1 or (adjacent and near)
        if joint and not flags & GATHER and length >= LANES and not special & ORDERED:
            flags |= TWO if itemsize == 8 or not flags & EXACT else 0  # `in_turn` has no float64 sums of other types
        flags |= NEXT if near else 0
    else:  # a map alone goes in the order of memory
        length, runs = min(inner, 16 * sizes.block), 1
        tile = channels if outer >= 16 else ceil(channels, 16)
    segments = ceil(inner, length)
    blocks = ceil(outer, runs) * segments
    piece = 1 if not stages & SUM else sizes.piece if channels >= 64 * tile else min(sizes.piece, ceil(blocks, 16))
    return ceil(channels, tile), ceil(blocks, piece), Cut(0, tile, blocks, piece, runs, segments, length, 1, 1, flags)


def _by_columns(
    shape: tuple[int, int, int], strides: tuple[tuple[int, int, int], ...], items: tuple[int, ...], flags: int,
    stages: int, period: int, sizes: Sizes, special: int,
) -> tuple[int, int, Cut]:  # fmt: skip
    outer, channels, inner = shape
    rows = outer if period > 1 else outer * inner
    fold = _fold(shape, strides, items, rows, period, sizes, special)
    tile = channels if fold > 1 else _tile(channels, rows, period, items[0], stages, sizes, special)
    rows = ceil(rows, fold)
    height = _height(rows, tile * period * fold, sizes)
    blocks = ceil(rows, height)
    piece = max(min(8, ceil(blocks, 16)), ceil(blocks, max(1, min(64, 32768 // channels))))
    cut = Cut(1, tile, blocks, piece, height, 1, 1, period, fold, flags)
    return ceil(channels, tile), ceil(blocks, piece), cut


def _fold(
    shape: tuple[int, int, int], strides: tuple[tuple[int, int, int], ...], items: tuple[int, ...], rows: int,
    period: int, sizes: Sizes, special: int,
) -> int:  # fmt: skip
    """How many rows are walked as one."""
    outer, channels, inner = shape
    width = channels * period
    most = sizes.folded // max(1, len(strides) - 1)  # coefficients of a gradient are twice as large
    if special & WEIGHTED:
        most = min(most, sizes.weighted)
    across = [s[0] if period > 1 or inner == 1 else s[2] for s in strides]
    gapless = all(s == width * n for s, n in zip(across, items, strict=True))
    level = period > 1 or inner == 1 or outer == 1 or all(s[0] == inner * s[2] for s in strides)
    fold = max(1, min(most // width, rows // 16)) if gapless and level and 2 * width <= most else 1
    if special & ORDERED:  # of one sample, if at all
        fold = next(n for n in range(fold, 0, -1) if inner % n == 0) if period == 1 else 1
    return fold


def _tile(channels: int, rows: int, period: int, itemsize: int, stages: int, sizes: Sizes, special: int) -> int:
    """Channels of a tile where rows aren't folded."""
    many = rows >= sizes.height
    most = (8 if many and not special & WEIGHTED else 2) * sizes.columns  # weights may be laid out for 16 rows
    if not stages & SUM and channels * period <= most:
        # Whole rows are one run: infer of (1568, 2048) float64 took 1.90 ms by halves, 1.31 so; of (5627, 2079) float32
        # 2.83 and 2.32, float16 1.75 and 1.07. Of 9000 columns and more, whose coefficients L2 can't have, longer.
        return channels
    # Not fewer to keep a tile in L2: rows of 256 bytes took 2 to 5 times as long, as loads wait for stores of other
    # rows to the same place in a page. More of large arrays: forward of 1040 columns took 1.2 to 2 times as long by
    # halves, of 2048 1.0 to 1.25 times, of float64 no longer; 32 rows of a million by 2048 1.4 times.
    large = many and rows * channels * period * itemsize > sizes.large  # else threads would share one tile
    columns = sizes.columns * (3 if itemsize == 8 else 4) // 2 if large else sizes.columns
    tile = max(1, columns // period)
    if tile >= channels:
        return channels
    # Alike: 1040 channels as 1024 and 16 took twice as long as 1024.
    return min(tile, ceil(alike(channels, tile), LANES) * LANES)


def _height(rows: int, width: int, sizes: Sizes) -> int:
    """Rows of a block of so many columns."""
    height = max(sizes.height, min(sizes.height * sizes.columns // width, 4 * sizes.height))
    blocks = ceil(rows, height)
    if blocks < 16:  # alike, and 2, 4, 8 or 16 of them: as much for each thread
        step = min(16, sizes.height)
        height = max(ceil(height, 4), ceil(ceil(rows, 1 << blocks.bit_length()), step) * step)
    return height
