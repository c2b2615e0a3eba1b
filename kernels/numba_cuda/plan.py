"""How a shape is cut, read off the shape and the strides alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

VALUES = 8  # that a thread reads before it uses the first: 32 bytes in flight a thread, 64 KB in a full multiprocessor


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a plan cuts a shape by. The borders depend on these and on the shape; tests make them tiny."""

    threads: int = 256
    lanes: int = 32  # channels of a block where channels are next to each other in memory: 128 bytes of float32
    warp: int = 32  # threads of a block, at least
    blocks: int = 4096  # that the largest GPUs want: four times what 132 multiprocessors hold
    most: int = 512  # values that a thread adds up


class Plan(NamedTuple):
    """`cut` and `places` are what the kernels read; `walk.py` says how."""

    threads: int
    grid: int
    pieces: int
    cut: tuple[int, int, int, int, int, int, int]
    places: tuple[tuple[int, int, int, int, int, int], ...]  # of each array
    finish: tuple[int, int, int]  # blocks, threads and lanes of the C-sized kernels
    tracked: tuple[int, ...]  # `cut`, where kernels want to know the outer index


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def power_below(n: int) -> int:
    return 1 << (max(1, n).bit_length() - 1)


def power_above(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=1024)
def plan_of(
    shape: tuple[int, ...],
    itemsize: int,
    strides: tuple[tuple[int, ...], ...],
    sizes: Sizes,
    sets: int = 0,
    height: int = 0,
) -> Plan:
    """`strides`: of each array, in bytes; the first one's decide how threads lie.

    sets: of outer indices, each with statistics of its own, and blocks for the `height` of the largest; 0: no sets.

    >>> plan_of((8, 3, 16), 4, ((192, 64, 4),), Sizes()).cut  # 128 values of each channel, by 32 threads
    (3, 16, 0, 128, 256, 1, 1)
    >>> plan_of((128, 3, 1), 4, ((12, 4, 4),), Sizes()).cut  # channels last: four lanes, sixteen rows
    (3, 128, 16, 128, 128, 1, 4)
    """
    outer, channels, inner = shape
    steps = []
    for s in strides:
        if any(stride % itemsize for n, stride in zip(shape, s, strict=True) if n > 1):
            raise ValueError(f"strides of {s} bytes: expected multiples of the {itemsize} bytes of an element")
        steps.append([stride // itemsize if n > 1 else 0 for n, stride in zip(shape, s, strict=True)])
    if not sets and (inner == 1 or (outer > 1 and abs(steps[0][0]) < abs(steps[0][2]))):  # sums don't care which is
        outer, inner = inner, outer
        steps = [[i, c, o] for o, c, i in steps]
    values = (height if sets else outer) * inner
    across = channels > 1 and abs(steps[0][1]) == 1 and (inner == 1 or abs(steps[0][2]) != 1)
    lanes = min(power_above(channels), sizes.lanes, sizes.threads) if across else 1
    rows = min(sizes.threads, max(sizes.warp, power_below(values // VALUES) * lanes)) // lanes
    tiles, rounds, items = ceil(channels, lanes), ceil(values, rows * VALUES), max(1, sets)
    pieces = min(rounds, max(ceil(sizes.blocks, tiles * items), ceil(values, rows * sizes.most)))
    share = ceil(rounds, pieces) * rows * VALUES
    pieces = ceil(values, share)
    far, near = divmod(rows, inner)
    places = []
    for o, c, i in steps:
        origin = -sum(min(0, (n - 1) * s) for n, s in zip((outer, channels, inner), (o, c, i), strict=True))
        step = far * o + near * i
        places.append((origin, o, c, i, step, step + o - inner * i))
    threads = min(sizes.threads, max(sizes.warp, power_above(pieces)))
    columns = threads // min(threads, power_above(pieces))
    cut = channels, inner, near, values, share, pieces, lanes
    return Plan(
        rows * lanes,
        items * tiles * pieces,
        pieces,
        cut,
        tuple(places),
        (ceil(items * channels, columns), threads, columns),
        (*cut, far, tiles),
    )
