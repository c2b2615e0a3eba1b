"""Which launches of `bn.cu` for which arrays: pure arithmetic on shapes and strides, so it is tested without a GPU.

`walk` says how arrays are walked and `launches` what is launched then, on each of several ways; `plan` builds the
candidates and takes the one whose modelled time is least.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from .launches import (
    BANDWIDTH,
    BLOCK,
    CLUSTER,
    GRID,
    HOPPER,
    MAP,
    SPLIT,
    THREADS,
    WARP,
    Device,
    Plan,
    build,
    crowd,
    moved,
    over,
    resident,
    size_of,
    vectors,
)
from .walk import COLUMNS, PLAIN, More, View, Walk, walk

LEAST = 48 << 10  # bytes of shared memory that a block may have on every device
MOST_RANKS = 256  # of the split path

# What the model believes, in microseconds and bytes: fitted to 4,673 timings of 120 calls on an H200 (4.2 TB/s a copy).
# The plan that it takes is on average 3 % slower than the best candidate there, at worst 22 %.
START = {BLOCK: 2.26, CLUSTER: 1.94, GRID: 6.91, SPLIT: 7.43, MAP: 2.26}  # a launch, or two
ROUND = {BLOCK: 3.0, CLUSTER: 6.91, GRID: 5.09, SPLIT: 6.92, MAP: 0.0}  # of a block, in which it waits for no memory:
FEWER_THREADS = 0.313  # of 1024 threads, else (threads / 1024) ** FEWER_THREADS of it;
HIDDEN = 0.088  # other blocks of the multiprocessor work then: 1 / blocks ** HIDDEN of it counts
MORE_SUMS = 1.45  # backward, of columns: four channels' sums are merged in each thread's place
ROUND_APART = 5.48  # of groups that begin apart: the others work then
MERGE = 2.6e-4  # for each partial sum that a block adds up, times the root of the blocks beside it
FETCH = 1.79  # for each batch of them
L2_BANDWIDTH = 4.25e4  # a multiprocessor's share of what L2 still has when it is read again in reverse,
L2_SHARE = 0.834  # which is this part of L2
TILES = {32: 0.639, 64: 0.755, 128: 0.93}  # bandwidth of narrow tiles: their rows lie far apart
BUSY = 614  # threads that keep a multiprocessor's memory busy
SUMS_IN_FLIGHT = 4  # other ranks' sums that a thread loads at once: bn.cu's RANKS


def model(p: Plan, device: Device = HOPPER) -> tuple[float, float, float]:
    """Microseconds; bytes to and from device memory; the floor in bytes (every array once)."""
    w = p.walk
    floor, again = map(float, moved(p))
    at_once = min(p.items, p.grid // p.K) if p.way == GRID else p.items  # items whose second read is still to come
    hot = min(again, L2_SHARE * device.l2 / at_once * p.items)
    on_sm = max(1, min(device.smem_sm // (p.shared + 1024), resident(p.letter) // p.threads, 32))
    blocks = min(p.grid, device.sms * on_sm)
    if p.way == CLUSTER:  # a cluster stays inside a group of multiprocessors: of 33 clusters of four, 32 didn't fit
        blocks = max(p.K, min(blocks, (device.sms * 7 // 8 if p.K > 2 else device.sms) * on_sm) // p.K * p.K)
    tile = p.tx * w.V * size_of(p.letter) if w.layout == COLUMNS else 256
    bandwidth = device.bandwidth * BANDWIDTH * next((part for most, part in TILES.items() if tile <= most), 1.0)
    rounds = p.grid / blocks if p.way != GRID else float(over(p.items, p.grid // p.K))
    waste = math.ceil(rounds) / rounds if rounds < 4 else 1.0
    time = (floor + again - hot) / bandwidth / min(1.0, blocks * p.threads / (device.sms * BUSY)) * waste
    time += hot / (device.sms * L2_BANDWIDTH)
    idle = ROUND_APART if p.delay else ROUND[p.way] / max(1.0, blocks / device.sms) ** HIDDEN
    if p.backward and w.layout == COLUMNS:
        idle *= MORE_SUMS
    idle *= (p.threads / THREADS[-1]) ** FEWER_THREADS
    time += math.ceil(rounds) * idle
    if p.way in (GRID, SPLIT):
        batches = over(p.K, SUMS_IN_FLIGHT * max(1, min(WARP, p.threads // p.G)))
        merging = MERGE * p.G * p.K * (blocks / device.sms) ** 0.5 + FETCH * batches
        time += merging * (math.ceil(rounds) if p.way == GRID else 1)
    return START[p.way] + time, floor + again - hot, floor


def candidates(w: Walk, letter: str, backward: bool, device: Device, frozen: bool) -> Iterator[Plan]:
    """Every plan worth a thought."""
    tiles = (128, 256, 64, 32) if w.layout == COLUMNS and w.fold == 1 else (128,)
    for tile, threads in itertools.product(tiles, THREADS):
        if threads > resident(letter):
            continue
        one = build(w, letter, backward, device, frozen=frozen, tile=tile, threads=threads)
        slots = device.slots(letter, threads)
        most = vectors(w, one.tx) // threads  # ranks whose threads have a vector each
        if threads > THREADS[0] and most < 4:
            continue
        most = max(2, most)

        def of(way: str, K: int, given: int | None = threads, tile: int = tile) -> Plan:
            return build(w, letter, backward, device, way, K, frozen=frozen, tile=tile, threads=given)

        fewer = None if threads == THREADS[0] else threads  # or fewer than 256
        yield of(BLOCK, 1, fewer)
        for K in (2, 4, 8):
            if device.cluster >= K and most >= K:
                yield of(CLUSTER, K, fewer)
        if device.cooperative:
            ranks = {slots // n for n in (one.items, max(1, slots // 16), 1, 2, 4, 8)}
            for K in sorted({min(max(2, K), slots, most) for K in ranks}):
                if K > 1 and _all_resident(p := of(GRID, K), device):
                    yield p
        for waves in (1, 2, 4):  # whole ones: a block too many would be waited for by all
            yield of(SPLIT, _ranks(w, one, waves * slots))


def _all_resident(p: Plan, device: Device) -> bool:
    """Whether shared memory has room for all blocks of a grid that waits for each other."""
    return (p.shared + 1024) * crowd(p.letter, p.threads) <= device.smem_sm


def _ranks(w: Walk, one: Plan, blocks: int, most: int = MOST_RANKS) -> int:
    """Ranks of an item for so many blocks, eight vectors a thread or more."""
    work = over(vectors(w, one.tx), 8 * one.threads)
    return max(1, min(blocks // one.items, work, most))


def plan(
    view: View,
    letter: str,
    backward: bool,
    device: Device = HOPPER,
    *,
    frozen: bool = False,
    way: str | None = None,
    stable: bool = False,
    more: More = PLAIN,
    sums: bool = True,
) -> Plan:
    """The launches for these arrays. letter: "f" float32, "d" float64, "e" float16, "E" bfloat16.

    frozen: forward with given mean and variance, backward with dx = a dy. way: BLOCK, CLUSTER, GRID or SPLIT instead of
    the fastest. stable: ranks, threads and tile by the arrays alone, as for the default device; any device gives the
    same bits then. sums: whether dgamma or dbeta is wanted. Raises Unwalkable where the arrays must be copied first.
    """
    w = walk(view, more)
    if frozen and not (backward and sums and view.x is not None):
        first = build(w, letter, backward, device, MAP, frozen=True, threads=THREADS[0])
        K = _ranks(w, first, 16 * device.slots(letter, THREADS[0]), 1 << 16)
        return build(w, letter, backward, device, MAP, K, frozen=True, threads=THREADS[0])
    if stable:
        return _as(_best(w, letter, backward, HOPPER, frozen, None, LEAST), device, way)
    return _best(w, letter, backward, device, frozen, way)


def _best(
    w: Walk, letter: str, backward: bool, device: Device, frozen: bool, way: str | None, least: int = 1 << 30
) -> Plan:
    """The fastest of the candidates that fit; the first one where two are equal. least: bytes that do, too."""
    found = [p for p in candidates(w, letter, backward, device, frozen) if p.shared <= device.smem_block]
    found = [p for p in found if way in (None, p.way) and p.split().shared <= least]
    if not found:
        raise ValueError(f"{way} isn't possible on {device}")
    return min(found, key=lambda p: round(model(p, device)[0], 6))


def _as(p: Plan, device: Device, way: str | None) -> Plan:
    """The sums of plan p, bit for bit, on another device."""
    if way is None:
        fits = {
            BLOCK: p.K == 1,
            CLUSTER: device.cluster >= p.K and p.way == CLUSTER,
            GRID: device.cooperative and device.slots(p.letter, p.threads) >= p.K,
            SPLIT: True,
        }
        way = next(name for name, possible in fits.items() if possible)
    tile = p.tx * p.walk.V * size_of(p.letter)
    return build(p.walk, p.letter, p.backward, device, way, p.K, frozen=p.frozen, threads=p.threads, tile=tile)
