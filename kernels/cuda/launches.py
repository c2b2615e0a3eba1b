"""What is launched for a walk on a given way, and its argument: the bytes of bn.cu's `Params`.

K blocks (ranks) share an item: a channel of RUNS and WINDOWS, a tile of COLUMNS. Ways for them to agree on its sums:

    BLOCK    K = 1: nothing to agree on
    CLUSTER  K <= 8 blocks of one cluster, by distributed shared memory
    GRID     any K of a cooperative launch, by barriers in global memory
    SPLIT    two launches, STATS and APPLY: any device
    MAP      no sums at all: APPLY alone, with frozen statistics

What fits is kept in shared memory between the two passes; the rest is read twice. Groups of GRID that take several
items in turn begin apart, so that memory works for some while others agree.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from .walk import ACROSS, COLUMNS, Walk

# Contraction is spelled out in the source (fma), so that every instance rounds alike: the same bits on every way.
# NVRTC 12 takes a generic lambda inside a kernel for a host function unless told otherwise, NVRTC 13 doesn't.
COMPILE_OPTIONS = ("-std=c++17", "-fmad=false", "-default-device")

BLOCK, CLUSTER, GRID, SPLIT, MAP = "BLOCK", "CLUSTER", "GRID", "SPLIT", "MAP"
HALVES = {SPLIT: ("STATS", "APPLY"), MAP: ("APPLY",)}  # the launches of a way, where it isn't one of its own name
TYPES = {"f": "float", "d": "double", "e": "fastbn::f16", "E": "fastbn::bf16"}

WARP = 32
AHEAD = 64  # bytes that fly in for a thread at once: bn.cu's AHEAD
THREADS = (ACROSS, 512, 1024)  # of a block, where there is work for them
RESIDENT = {"d": 512}  # threads of a multiprocessor, else 1024: bn.cu's launch bounds, 128 and 64 registers a thread

# Of a device like an H200; `plan` has what else is believed of it.
BANDWIDTH = 0.776  # of the data sheet's
APART = 3  # rounds from which groups of GRID begin apart: one of them can work then while others agree
CLOCK = 1900  # cycles of a microsecond


@functools.cache
def source() -> str:
    """bn.cu with its parts in the place where it includes them: one text for every compiler."""
    folder = Path(__file__).parent
    text = (folder / "bn.cu").read_text(encoding="utf-8")
    return re.sub(r'#include "(\w+\.cuh)"\n', lambda part: (folder / part[1]).read_text(encoding="utf-8"), text)


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
        return self.sms * crowd(letter, threads)


HOPPER = Device()


def resident(letter: str) -> int:
    """Threads that a multiprocessor holds."""
    return RESIDENT.get(letter, 1024)


def crowd(letter: str, threads: int) -> int:
    """Blocks that a multiprocessor holds, if there is shared memory for them."""
    return resident(letter) // max(threads, THREADS[0])


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
        again = self.items * vectors(self.walk, self.tx)
        ring = self.threads * self.walk.V * size_of(self.letter) * _arrays(self.walk, self.backward, self.way)
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
        w, size = self.walk, size_of(self.letter)
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


def over(a: int, b: int) -> int:
    return -(-a // b)


def size_of(letter: str) -> int:
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


def vectors(w: Walk, tx: int) -> int:
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
    return min(8, AHEAD // (V * size_of(letter)) // (2 if backward else 1))


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
    size, number, partial = size_of(letter), _number(letter), _partial(letter)
    columns = w.layout == COLUMNS
    tx, ty, G, tiles, work = 1, 1, 1, w.C, w.M * w.vectors
    if columns:  # tiles of whole vectors and whole channels; folded rows are one tile
        unit = w.width if w.fold > 1 else math.lcm(w.V, w.S)
        cols = unit * max(1, min(over(w.width, unit), tile // (unit * size)))
        tx, G, tiles, work = cols // w.V, w.C if w.fold > 1 else cols // w.S, over(w.width, cols), w.M
    items, total = tiles * w.more.sets, vectors(w, tx)
    if threads is None:
        threads = max(64, min(THREADS[0], 1 << max(0, over(over(total, K), 2).bit_length() - 1)))
    if columns:
        threads = max(threads, over(tx, WARP) * WARP)
        ty = threads // tx
    by_warp = not columns or WARP % tx == 0
    rows = threads // WARP if by_warp else ty
    counts = rows * (8 if w.more.weights and not backward else number)  # sums of weights are float64
    early = 6 if backward else 2  # numbers of a channel that fly in: bn.cu's EARLY
    fixed = G * (partial + (8 if backward else 4) * number + 8 * early) + 16 + over(counts, 16) * 16
    fixed += rows * (tx * w.V + 1 if columns else 1) * partial

    per = over(work, K)
    if way != CLUSTER:
        K = over(work, per)  # no empty ranks where K is free
    ring = threads * w.V * size * _arrays(w, backward, way)
    blocks = crowd(letter, threads) if way == GRID or threads >= THREADS[0] else 1
    room = max(0, min(device.smem_block, device.smem_sm // blocks - 1024) - fixed) // ring
    mine = over(per, ty if columns else threads)  # vectors of the busiest thread
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
    rounds = over(items, groups)
    if rounds < APART:
        return made
    return replace(made, delay=int(CLOCK * sum(moved(made)) / (device.bandwidth * BANDWIDTH) / rounds))


def moved(p: Plan) -> tuple[int, int]:
    """Bytes of every array once, and of what is read twice."""
    w, vector = p.walk, p.walk.V * size_of(p.letter)
    return len(w.strides) * vectors(w, p.tx) * p.items * vector, p.reread * vector * (2 if p.backward else 1)
