"""Which launches of `bn.cu` for which arrays: pure arithmetic on shapes and strides, so it is tested without a GPU.

An array (O, C, I) is walked in one of three ways. RUNS: channel by channel, each run of I elements in whole 16-byte
vectors. WINDOWS: the same where runs start or end inside a vector (27x27, 55x55): vectors begin at the 16-byte border
below, their lanes outside the run are masked. COLUMNS: row by row, where channels lie side by side; I columns a channel
(7x7 runs are too short to be walked one by one; but by weights they are, as the columns of a row share a weight then).

K blocks (ranks) share an item: a channel of RUNS and WINDOWS, a tile of COLUMNS. Ways for them to agree on its sums:

    BLOCK    K = 1: nothing to agree on
    CLUSTER  K <= 8 blocks of one cluster, by distributed shared memory
    GRID     any K of a cooperative launch, by barriers in global memory
    SPLIT    two launches, STATS and APPLY: any device
    MAP      no sums at all: APPLY alone, with frozen statistics

What fits is kept in shared memory between the two passes; the rest is read twice. Groups of GRID that take several
items in turn begin apart, so that memory works for some while others agree. `plan` builds the candidates and takes the
one whose modelled time is least.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

# Contraction is spelled out in the source (fma), so that every instance rounds alike: the same bits on every way.
# NVRTC 12 takes a generic lambda inside a kernel for a host function unless told otherwise, NVRTC 13 doesn't.
COMPILE_OPTIONS = ("-std=c++17", "-fmad=false", "-default-device")

RUNS, WINDOWS, COLUMNS = "RUNS", "WINDOWS", "COLUMNS"
BLOCK, CLUSTER, GRID, SPLIT, MAP = "BLOCK", "CLUSTER", "GRID", "SPLIT", "MAP"
HALVES = {SPLIT: ("STATS", "APPLY"), MAP: ("APPLY",)}  # the launches of a way, where it isn't one of its own name
TYPES = {"f": "float", "d": "double", "e": "fastbn::f16", "E": "fastbn::bf16"}

VECTOR = 16  # bytes: the widest access there is
WARP = 32
WIDEST = 4  # columns of a vector: sums of eight channels don't fit in a thread's registers
AHEAD = 64  # bytes that fly in for a thread at once: bn.cu's AHEAD
THREADS = (256, 512, 1024)  # of a block, where there is work for them
RESIDENT = {"d": 512}  # threads of a multiprocessor, else 1024: bn.cu's launch bounds, 128 and 64 registers a thread
NARROW = 256  # bytes: shorter runs are walked as columns where they can be
LEAST = 48 << 10  # bytes of shared memory that a block may have on every device
MOST_RANKS = 256  # of the split path


@functools.cache
def source() -> str:
    """bn.cu with its parts in the place where it includes them: one text for every compiler."""
    folder = Path(__file__).parent
    text = (folder / "bn.cu").read_text(encoding="utf-8")
    return re.sub(r'#include "(\w+\.cuh)"\n', lambda part: (folder / part[1]).read_text(encoding="utf-8"), text)


class Unwalkable(ValueError):
    """The kernel can't walk arrays with these strides; a contiguous copy it can."""


@dataclass(frozen=True)
class Device:
    """What the planner needs to know of a GPU. The default is an H100 (SXM)."""

    sms: int = 132
    smem_block: int = 227 << 10  # bytes of shared memory a block may have (opt-in)
    smem_sm: int = 228 << 10  # bytes of a multiprocessor; each resident block costs 1 KiB more than it asks for
    cluster: int = 8  # largest portable cluster, 1 where there are none (below sm_90)
    cooperative: bool = True
    l2: int = 50 << 20  # bytes
    bandwidth: float = 3.35e6  # of device memory, bytes in a microsecond, by its data sheet

    def slots(self, letter: str, threads: int) -> int:
        """Blocks that are resident at once."""
        return self.sms * _crowd(letter, threads)


HOPPER = Device()


def resident(letter: str) -> int:
    """Threads that a multiprocessor holds."""
    return RESIDENT.get(letter, 1024)


def _crowd(letter: str, threads: int) -> int:
    """Blocks that a multiprocessor holds, if there is shared memory for them."""
    return resident(letter) // max(threads, THREADS[0])


class More(NamedTuple):
    """What a call asks for beyond batch norm and further arrays."""

    activation: str = ""
    sets: int = 1  # of outer indices, each with statistics of its own
    height: int = 0  # outer indices of the largest set
    listed: bool = False  # sets are listed in device memory; else they are of one height, one behind the other
    rows: int = 1  # outer indices of an entry of the list
    weights: str = ""  # "normalize", "zero" or "keep": by weights, the same for all channels, and what where one is 0
    inverse: bool = False  # backward has y in place of x, and inverts the activation

    def options(self, arrays: Iterable[str]) -> tuple[str, ...]:
        """bn.cu's macros."""
        activation = (f"-DFASTBN_ACTIVATION={self.activation.upper()}",) if self.activation else ()
        present = {"RESIDUAL": "r" in arrays, "DRESIDUAL": "dr" in arrays, "SETS": self.sets > 1 or self.listed,
                   "INVERSE": self.inverse}  # fmt: skip
        weights = (f"-DFASTBN_WEIGHTS={self.weights.upper()}",) if self.weights else ()
        return (*activation, *(f"-DFASTBN_{name}=1" for name, there in present.items() if there), *weights)


PLAIN = More()


class View(NamedTuple):
    """The arrays of a call: shape (O, C, I), strides in bytes (None: no such array), addresses modulo 16.

    Forward: x, y (None: statistics only), r. Backward: x, dy, dx as y (None: not wanted), r where there is an
    activation, dr where it is wanted; x is None where frozen statistics and no dgamma make it needless.
    """

    shape: tuple[int, int, int]
    x: tuple[int, int, int] | None
    y: tuple[int, int, int] | None
    dy: tuple[int, int, int] | None
    itemsize: int
    bases: tuple[int, ...] = ()  # addresses of x, y, dy, r, dr (0 if not given); only the remainder modulo 16 counts
    r: tuple[int, int, int] | None = None
    dr: tuple[int, int, int] | None = None


class Pointers(NamedTuple):
    """Device addresses, 0 where there is none. y is dx in backward; gamma, beta, mean, var are of one type."""

    x: int = 0
    dy: int = 0
    y: int = 0
    r: int = 0
    dr: int = 0
    table: int = 0  # (6, C) float64: hi, lo, var, invstd, gamma, beta
    gamma: int = 0
    beta: int = 0
    mean: int = 0
    var: int = 0
    dgamma: int = 0
    dbeta: int = 0
    workspace: int = 0
    barriers: int = 0
    starts: int = 0
    order: int = 0
    w: int = 0  # 16-byte aligned
    mass: int = 0


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the C++ name to compile, and how to start it. Its argument is `pack`'s bytes, by value."""

    expression: str
    options: tuple[str, ...]  # besides COMPILE_OPTIONS
    grid: int  # blocks
    threads: int  # of a block
    shared: int  # bytes of dynamic shared memory
    cooperative: bool
    cluster: int  # blocks of a cluster; the source fixes it (__cluster_dims__), so any launch call will do


@dataclass(frozen=True)
class Walk:
    """How the arrays are walked: (M, C, S) in vectors of V elements. Strides in elements, by array: (row, channel)."""

    layout: str
    V: int
    M: int  # rows, after folding; of the largest set
    C: int
    S: int  # elements of a run; columns of a channel
    fold: int  # COLUMNS: rows without a gap that are seen as one, to fill vectors
    strides: dict[str, tuple[int, int]] = field(hash=False)
    more: More = PLAIN

    @property
    def width(self) -> int:
        """COLUMNS: columns of a row."""
        return self.fold * self.C * self.S

    @property
    def vectors(self) -> int:
        """Vectors of a run. A window may begin up to V - 1 lanes before the run."""
        return (self.S + self.V - 2) // self.V + 1 if self.layout == WINDOWS else self.S // self.V


def walk(view: View, more: More = PLAIN) -> Walk:
    """The widest walk of these arrays; raises Unwalkable where there is none."""
    (outer, C, inner), size = view.shape, view.itemsize
    given = {"x": view.x, "y": view.y, "dy": view.dy, "r": view.r, "dr": view.dr}
    starts = (*view.bases, *[0] * len(given))
    arrays = [
        (name, strides, base)
        for (name, strides), base in zip(given.items(), starts, strict=False)
        if strides is not None
    ]
    for name, strides, base in arrays:
        if base % size or any(s % size for s, n in zip(strides, view.shape, strict=True) if n > 1):
            raise Unwalkable(f"{name} with strides {strides} isn't aligned to its elements of {size} bytes")
    outers, channels, inners = ([strides[axis] // size for _, strides, _ in arrays] for axis in range(3))
    alone = more.sets == 1 and not more.listed
    if not alone:
        outer = more.height
    M, S, rows = outer, inner, outers
    if more.listed:  # rows of a set may lie anywhere
        merges = False
    elif inner == 1:
        merges = (outer == 1 or set(outers) == {1}) and (C == 1 or set(channels) != {1})  # (C, N) in memory
    else:
        merges = set(inners) == {1} and all(row == inner for row in rows)  # (C, O, I) in memory, or one channel
    if merges:
        M, S, rows = 1, outer * inner, [outer * row for row in rows]
    elif inner > 1 and set(inners) != {1}:
        raise Unwalkable(f"runs of {inner} elements with strides of {inners} elements")
    elif inner == 1 and C > 1 and set(channels) != {1}:
        raise Unwalkable(f"neither rows nor channels lie side by side: strides {[s for _, s, _ in arrays]}")
    if M == 1 and alone:
        rows = [0] * len(arrays)
    if C == 1:
        channels = [S] * len(arrays)
    bases = [base // size for _, _, base in arrays]
    strides_of = {name: pair for (name, _, _), pair in zip(arrays, zip(rows, channels, strict=True), strict=True)}

    full = VECTOR // size
    widths = [full >> i for i in range(full.bit_length())]
    steps = [*bases, *rows, *(channels if C > 1 else ())]
    V = next(v for v in widths if not any(s % v for s in (S, *steps)))
    runs = Walk(RUNS, V, M, C, S, 1, strides_of, more)
    alike = all(len({s % full for s in same}) == 1 for same in (bases, rows, channels))
    if full > V and alike:
        windows = replace(runs, layout=WINDOWS, V=full)
        if windows.vectors < runs.vectors:
            runs = windows
    narrow = S * size < NARROW and not more.weights  # columns of a row share a weight: then a channel is one column
    if all(channel == S for channel in channels) and (S == 1 or narrow):
        columns = _columns(replace(runs, layout=COLUMNS), bases, rows, [v for v in widths if v <= WIDEST])
        if S == 1 or columns.V * runs.vectors >= S:
            return columns
    if M * runs.vectors >= 1 << 32:
        raise Unwalkable(f"a channel of {M * runs.vectors} vectors; they are counted in 32 bits")
    return runs


def _columns(w: Walk, bases: list[int], rows: list[int], widths: list[int]) -> Walk:
    """Rows of C S columns; where these don't fill vectors and rows have no gap, several rows as one."""
    width = w.C * w.S
    for v in widths:
        aligned = not any(base % v for base in bases)
        if aligned and width % v == 0 and not any(row % v for row in rows):
            return replace(w, V=v)
        fold = v // math.gcd(width, v)
        apart = w.more.listed or w.more.weights
        together = w.M % fold == 0 and not apart and all(row == width for row in rows)
        if aligned and together and fold * width // v <= THREADS[0]:
            folded = {name: (row * fold, channel) for name, (row, channel) in w.strides.items()}
            return replace(w, V=v, M=w.M // fold, fold=fold, strides=folded)
    raise AssertionError("v = 1 divides everything")


@dataclass(frozen=True)
class Plan:
    """A way to do one call. Fields as in bn.cu's Params; `reread` counts vectors, of one array, that are read twice."""

    walk: Walk
    letter: str
    backward: bool
    frozen: bool
    way: str
    threads: int
    K: int  # ranks of an item
    items: int
    slots: int  # vectors of an array that a thread has room for in shared memory: those it keeps, and those that fly in
    per: int  # vectors (RUNS, WINDOWS) or rows (COLUMNS) of a rank
    tx: int  # COLUMNS: threads across
    ty: int  # and down
    G: int  # channels of an item
    grid: int
    shared: int
    workspace: int  # bytes, 16-byte aligned; needn't be cleared
    barriers: int  # u32 words, zero before first use; they never need resetting
    reread: int
    delay: int = 0  # clock cycles by which the last group begins later than the first

    @functools.cached_property
    def launches(self) -> tuple[Launch, ...]:
        w, cluster = self.walk, self.K if self.way == CLUSTER else 1
        common = f"{TYPES[self.letter]}, {w.V}, {str(self.backward).lower()}, fastbn::{w.layout}"
        options = (f"-DFASTBN_CLUSTER={cluster}",) if self.way == CLUSTER else ()
        options += w.more.options(w.strides)
        return tuple(
            Launch(
                f"fastbn::bn<{common}, fastbn::{part}>",
                options,
                self.grid,
                self.threads,
                self.shared,
                self.way == GRID,
                cluster,
            )
            for part in HALVES.get(self.way, (self.way,))
        )

    def split(self) -> Plan:
        """The same work by the split path, with the same bits: for a cooperative grid that doesn't fit."""
        if self.way in (SPLIT, MAP):
            return self
        again = self.items * _vectors(self.walk, self.tx)
        ring = self.threads * self.walk.V * _size(self.letter) * _arrays(self.walk, self.backward, self.way)
        slots = min(self.slots, ahead(self.letter, self.walk.V, self.backward))
        shared = self.shared - (self.slots - slots) * ring
        space = _workspace(self.letter, self.G, self.K, self.items)
        return replace(
            self,
            way=SPLIT,
            slots=slots,
            grid=self.items * self.K,
            shared=shared,
            workspace=space,
            barriers=0,
            delay=0,
            reread=again if _maps(self.walk) else 0,
        )

    @functools.cached_property
    def _tail(self) -> bytes:
        w, size = self.walk, _size(self.letter)
        count, sets = w.M * w.fold * w.S, w.more.sets
        columns = w.layout == COLUMNS
        apart, inner = (self.ty, w.fold * w.S) if columns else (self.threads, w.vectors)
        rows, rest = (self.ty, 0) if columns else divmod(self.threads, w.vectors)
        strides = []
        for name in ("x", "dy", "y", "r", "dr"):
            row, channel = w.strides.get(name, (0, 0))
            strides += [size * row, size * rows * row, size * channel]
        weights = w.S * _number(self.letter)
        strides += [weights, rows * weights]
        lanes = max(0, min(5, (self.threads // self.G).bit_length() - 1))
        return TAIL.pack(
            *strides, count, 1 / count if count else 0.0, w.M, w.S, self.per, w.more.rows,
            sets, self.items // sets, w.C, self.items, self.slots, self.ty, self.G, w.fold,
            lanes, rest, self.frozen, self.delay, *itertools.chain(*map(_divisor, (self.K, self.tx, apart, inner))),
        )  # fmt: skip


HEAD = struct.Struct("<18Q2dQ")  # Pointers; eps, parameter; wide
# strides; count, 1 / count; M, S, per, rows; sets, tiles, C .. fold; lanes, rest, frozen, delay; four divisors
TAIL = struct.Struct("<17q2d4q8i16I")
PARAMS_SIZE = HEAD.size + TAIL.size


def pack(plan: Plan, pointers: Pointers, eps: float = 0.0, wide: bool = False, parameter: float = 0.0) -> bytes:
    """The kernel's argument, exactly the bytes of bn.cu's `Params`; the same for all launches of a plan.

    wide: gamma, beta, mean, var are float64, else float32. dgamma and dbeta are float64 for float64 data, else float32.
    parameter: of the activation.
    """
    return HEAD.pack(*pointers, eps, parameter, wide) + plan._tail


def _divisor(d: int) -> tuple[int, int, int]:
    """(d, m, s) so that j // d == (umulhi(j, m) + j) >> s for all 32-bit j (Granlund & Montgomery 1994)."""
    s = (d - 1).bit_length()
    return d, (((1 << 32) * ((1 << s) - d)) // d + 1) & 0xFFFFFFFF, s


def _over(a: int, b: int) -> int:
    return -(-a // b)


def _size(letter: str) -> int:
    return {"f": 4, "d": 8}.get(letter, 2)


def _number(letter: str) -> int:
    """Bytes of a parameter, a weight or a coefficient."""
    return 8 if letter == "d" else 4


def _partial(letter: str) -> int:
    """Bytes of one channel's partial sums: bn.cu's Partial."""
    return 32 if letter == "d" else 16


def _workspace(letter: str, G: int, K: int, slots: int) -> int:
    """Partial sums (slots, G, K), then counts (slots, K)."""
    return slots * K * (G * _partial(letter) + 8)


def _vectors(w: Walk, tx: int) -> int:
    """Vectors of one array in an item."""
    return w.M * (tx if w.layout == COLUMNS else w.vectors)


def _maps(w: Walk) -> bool:
    """Whether there is a second pass."""
    return "y" in w.strides or "dr" in w.strides


def _arrays(w: Walk, backward: bool, way: str) -> int:
    """Arrays that go by shared memory."""
    return 2 if backward and (way != MAP or w.more.activation) else 1


def ahead(letter: str, V: int, backward: bool) -> int:
    """Vectors of an array that fly in for a thread at once: bn.cu's AHEAD."""
    return min(8, AHEAD // (V * _size(letter)) // (2 if backward else 1))


def build(
    w: Walk,
    letter: str,
    backward: bool,
    device: Device = HOPPER,
    way: str = BLOCK,
    K: int = 1,
    *,
    frozen: bool = False,
    threads: int | None = None,
    keep: int | None = None,
    tile: int = 128,
) -> Plan:
    """The plan for a given way, ranks K, threads of a block, tile (bytes of columns); keep at most so many vectors."""
    size, number, partial = _size(letter), _number(letter), _partial(letter)
    columns = w.layout == COLUMNS
    tx, ty, G, tiles, work = 1, 1, 1, w.C, w.M * w.vectors
    if columns:  # tiles of whole vectors and whole channels; folded rows are one tile
        unit = w.width if w.fold > 1 else math.lcm(w.V, w.S)
        cols = unit * max(1, min(_over(w.width, unit), tile // (unit * size)))
        tx, G, tiles, work = cols // w.V, w.C if w.fold > 1 else cols // w.S, _over(w.width, cols), w.M
    items, total = tiles * w.more.sets, _vectors(w, tx)
    if threads is None:
        threads = max(64, min(THREADS[0], 1 << max(0, _over(_over(total, K), 2).bit_length() - 1)))
    if columns:
        threads = max(threads, _over(tx, WARP) * WARP)
        ty = threads // tx
    by_warp = not columns or WARP % tx == 0
    rows = threads // WARP if by_warp else ty
    counts = rows * (8 if w.more.weights and not backward else number)  # sums of weights are float64
    early = 6 if backward else 2  # numbers of a channel that fly in: bn.cu's EARLY
    fixed = G * (partial + (8 if backward else 4) * number + 8 * early) + 16 + _over(counts, 16) * 16
    fixed += rows * (tx * w.V + 1 if columns else 1) * partial

    per = _over(work, K)
    if way != CLUSTER:
        K = _over(work, per)  # no empty ranks where K is free
    ring = threads * w.V * size * _arrays(w, backward, way)
    crowd = _crowd(letter, threads) if way == GRID or threads >= THREADS[0] else 1
    room = max(0, min(device.smem_block, device.smem_sm // crowd - 1024) - fixed) // ring
    mine = _over(per, ty if columns else threads)  # vectors of the busiest thread
    groups = items
    if way == GRID:
        groups = min(items, max(1, device.slots(letter, threads) // K))
    want = 0 if way in (SPLIT, MAP) or not _maps(w) else mine
    flying = ahead(letter, w.V, backward)
    fits = room if mine <= room else max(0, room - flying)
    slots = min(mine, min(want, fits if keep is None else min(fits, keep, max(0, room - flying))) + flying)
    held = {GRID: 2 * groups, SPLIT: items}.get(way, 0)  # partial sums
    kept = min(total, (slots if want else 0) * (ty * tx if columns else threads) * K)
    again = 0 if way == MAP or not _maps(w) else (total - kept) * items
    made = Plan(
        walk=w,
        letter=letter,
        backward=backward,
        frozen=frozen,
        way=way,
        threads=threads,
        K=K,
        items=items,
        slots=slots,
        per=per,
        tx=tx,
        ty=ty,
        G=G,
        grid=groups * K,
        shared=fixed + slots * ring,
        workspace=_workspace(letter, G, K, held),
        barriers=groups if way == GRID else 0,
        reread=again,
    )
    rounds = _over(items, groups)
    if rounds < APART:
        return made
    return replace(made, delay=int(CLOCK * sum(_moved(made)) / (device.bandwidth * BANDWIDTH) / rounds))


def _moved(p: Plan) -> tuple[int, int]:
    """Bytes of every array once, and of what is read twice."""
    w, vector = p.walk, p.walk.V * _size(p.letter)
    return len(w.strides) * _vectors(w, p.tx) * p.items * vector, p.reread * vector * (2 if p.backward else 1)


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
BANDWIDTH = 0.776  # of the data sheet's
L2_BANDWIDTH = 4.25e4  # a multiprocessor's share of what L2 still has when it is read again in reverse,
L2_SHARE = 0.834  # which is this part of L2
TILES = {32: 0.639, 64: 0.755, 128: 0.93}  # bandwidth of narrow tiles: their rows lie far apart
BUSY = 614  # threads that keep a multiprocessor's memory busy
APART = 3  # rounds from which groups of GRID begin apart: one of them can work then while others agree
CLOCK = 1900  # cycles of a microsecond
SUMS_IN_FLIGHT = 4  # other ranks' sums that a thread loads at once: bn.cu's RANKS


def model(p: Plan, device: Device = HOPPER) -> tuple[float, float, float]:
    """Microseconds; bytes to and from device memory; the floor in bytes (every array once)."""
    w = p.walk
    floor, again = map(float, _moved(p))
    at_once = min(p.items, p.grid // p.K) if p.way == GRID else p.items  # items whose second read is still to come
    hot = min(again, L2_SHARE * device.l2 / at_once * p.items)
    on_sm = max(1, min(device.smem_sm // (p.shared + 1024), resident(p.letter) // p.threads, 32))
    blocks = min(p.grid, device.sms * on_sm)
    if p.way == CLUSTER:  # a cluster stays inside a group of multiprocessors: of 33 clusters of four, 32 didn't fit
        blocks = max(p.K, min(blocks, (device.sms * 7 // 8 if p.K > 2 else device.sms) * on_sm) // p.K * p.K)
    tile = p.tx * w.V * _size(p.letter) if w.layout == COLUMNS else 256
    bandwidth = device.bandwidth * BANDWIDTH * next((part for most, part in TILES.items() if tile <= most), 1.0)
    rounds = p.grid / blocks if p.way != GRID else float(_over(p.items, p.grid // p.K))
    waste = math.ceil(rounds) / rounds if rounds < 4 else 1.0
    time = (floor + again - hot) / bandwidth / min(1.0, blocks * p.threads / (device.sms * BUSY)) * waste
    time += hot / (device.sms * L2_BANDWIDTH)
    idle = ROUND_APART if p.delay else ROUND[p.way] / max(1.0, blocks / device.sms) ** HIDDEN
    if p.backward and w.layout == COLUMNS:
        idle *= MORE_SUMS
    idle *= (p.threads / THREADS[-1]) ** FEWER_THREADS
    time += math.ceil(rounds) * idle
    if p.way in (GRID, SPLIT):
        batches = _over(p.K, SUMS_IN_FLIGHT * max(1, min(WARP, p.threads // p.G)))
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
        most = _vectors(w, one.tx) // threads  # ranks whose threads have a vector each
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
    return (p.shared + 1024) * _crowd(p.letter, p.threads) <= device.smem_sm


def _ranks(w: Walk, one: Plan, blocks: int, most: int = MOST_RANKS) -> int:
    """Ranks of an item for so many blocks, eight vectors a thread or more."""
    work = _over(_vectors(w, one.tx), 8 * one.threads)
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
    tile = p.tx * p.walk.V * _size(p.letter)
    return build(p.walk, p.letter, p.backward, device, way, p.K, frozen=p.frozen, threads=p.threads, tile=tile)
