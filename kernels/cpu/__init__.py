"""The CPU backend: NumPy arrays, by Numba. The contract is in `fastbn.kernels`.

formulas  what is without loops, written by Python while Numba compiles
lanes     sixteen numbers at a time
formats   element formats, as such numbers and back
memory    such numbers from memory, and back
activations  residuals, activations and masks, sixteen numbers at a time
sums, maps  a vector of them, of x or of dy and x
rows      a block of runs inside one channel (NCHW)
in_turn   rows of a tile mapped while those of the next one are summed
columns   a block of rows across the channels (NHWC)
blocks    the building blocks for your own @njit code, and how sums merge
schedule  units of work, pivots and sums
coefficients  what maps are given of a channel
normalize, gradient  the two kernels: sums, what they make of a channel, maps
second    second order and forward mode
plan, cut  how a shape is cut, and what kernels are told of that
compile   njit with a disk cache that cannot fail a call
parts     what kernels are made of, for compiled code alone
items     all items of a kernel, by one thread or by all
views     arrays as an item has them
threads   when a parallel region may be entered
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import numba
import numpy as np

from . import threads
from .activations import CURVES, PLAIN, How
from .blocks import (
    block_comoments,
    block_gradient,
    block_moments,
    block_normalize,
    merge_comoments,
    merge_moments,
)
from .cut import Cut
from .formats import SIGNED16, UNSIGNED16
from .gradient import backward_item
from .items import Twins
from .normalize import forward_item
from .plan import CURVED, ORDERED, WEIGHTED, Plan, Sizes, plan_of
from .schedule import FINISH, MAP, SUM

__all__ = [
    "backward",
    "block_comoments",
    "block_gradient",
    "block_moments",
    "block_normalize",
    "element_view",
    "forward",
    "gradient_map",
    "gradient_sums",
    "merge_comoments",
    "merge_moments",
]


SIZES = Sizes()
SPAN = 65536  # channels


# uint16 and int16 are the bits of the half types here; whole numbers of 16 bits come under dtypes of their own.
_UNSIGNED16, _SIGNED16 = np.dtype([("unsigned", np.uint16)]), np.dtype([("signed", np.int16)])


@functools.cache
def element_view(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype under which elements of `dtype` come to the kernels, or None if they can't."""
    if dtype in (np.float32, np.float64, np.uint8, np.int8):
        return dtype
    if dtype == np.float16:
        return np.dtype(np.uint16)
    if dtype in (np.uint16, np.int16):
        return _UNSIGNED16 if dtype == np.uint16 else _SIGNED16
    return np.dtype(np.int16) if dtype.name == "bfloat16" else None


def forward(
    x: np.ndarray,
    y: np.ndarray | None,
    table: np.ndarray | None,
    given: tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None, np.ndarray | None],
    eps: float,
    more: Any = None,
) -> None:
    number, wanted = x.shape[1], _NO_SUMS[x.itemsize == 8].dtype
    if table is None and all(a is not None and a.dtype is wanted for a in given):
        table = _NO_TABLE  # each work item has one of its tile
    if table is not None or number <= SPAN:  # span by span, both threads waited for the same pages of a new table
        _forward(x, y, np.empty((6, number)) if table is None else table, given, eps, more, SIZES)
        return
    assert y is not None
    table, sizes = np.empty((6, SPAN)), _for_spans((x, y), False)
    for some in _spans(number):
        known = tuple([None if a is None else a[some] for a in given])
        _forward(x[:, some], y[:, some], table[:, : some.stop - some.start], known, eps, more, sizes)


def _spans(number: int) -> list[slice]:
    """So many channels that what belongs to them stays in a cache: a table of a million is 48 MB, whose pages alone
    take 7 ms to come where a copy of 32 times as many float32 takes 7."""
    return [slice(c, min(c + SPAN, number)) for c in range(0, number, SPAN)]


def _for_spans(arrays: tuple[np.ndarray, ...], summed: bool) -> Sizes:
    """Stores go past the caches by the size of all spans."""
    much = sum(a.nbytes for a in arrays) > SIZES.past * len(arrays) * (1 if summed else 2)
    return _all_past(SIZES) if much else SIZES


@functools.lru_cache(maxsize=8)
def _all_past(sizes: Sizes) -> Sizes:
    return dataclasses.replace(sizes, past=0)


def _forward(
    x: np.ndarray, y: np.ndarray | None, table: np.ndarray, given: tuple[Any, ...], eps: float, more: Any, sizes: Sizes
) -> None:  # fmt: skip
    gamma, beta, mean, var = given
    stages = FINISH | (0 if y is None else MAP) | (SUM if mean is None else 0)
    # The kernel takes those of its own type, and has the rows of the others from the table.
    nothing = _NO_SUMS[x.itemsize == 8]
    gamma = _read_or_put(gamma, 1.0, table[4], nothing) if stages & MAP else nothing
    beta = _read_or_put(beta, 0.0, table[5], nothing) if stages & MAP else nothing
    if mean is None:
        mean = var = nothing
    elif mean.dtype is not nothing.dtype or var.dtype is not nothing.dtype:
        table[0], table[1], table[2] = mean, 0.0, var
        mean = var = nothing
    if y is None:
        y = np.empty((0, 0, 0), np.float32 if _is_whole(x.dtype) else x.dtype)
    how, extras = None, _FORWARD_ALONE
    if more is not None:
        weights = more.weights if stages & SUM or more.masked != "normalize" else None
        how, value = _how(more, False, more.residual is None and (weights is None or more.masked == "normalize"))
        mass = None if weights is None else more.mass
        extras = _order(more), value, more.residual, weights, mass, more.lost, more.kept
    numbers = table, float(eps), (gamma, beta, mean, var)
    _carry_out(forward_item, (x, y), numbers, 4, stages, how, more, extras, sizes)


def _read_or_put(values: np.ndarray | None, absent: float, row: np.ndarray, nothing: np.ndarray) -> np.ndarray:
    """`values` for the kernel to read, if they are of its type, that of `nothing`; else the table's row gets them."""
    if values is not None and values.dtype is nothing.dtype:
        return values
    row[:] = absent if values is None else np.tile(values, len(row) // len(values))
    return nothing


_NO_ORDER = _NO_CLAIMS = np.zeros(0, np.int64)
_NO_PART = np.empty((0, 1, 1, 1))
_PLAINLY = (0.0, 1.0, 0.0, 0.0)
_NO_EXTRAS: tuple[Any, ...] = _NO_ORDER, _PLAINLY, *(None,) * 6  # of backward
_FORWARD_ALONE = _NO_EXTRAS[:7]


def _order(more: Any) -> np.ndarray:
    return _NO_ORDER if more.order is None else np.ascontiguousarray(more.order, np.int64)


_how_of = functools.cache(How)  # to make one takes 10 us


def _how(more: Any, frozen: bool, simple: bool) -> tuple[Any, tuple[float, ...]]:
    """The type by which extras are compiled, and its value; `simple` where an activation at most is asked for."""
    how = _how_of(more.activation, more.inverse, simple and not more.activation and not more.inverse)
    return how, (float(more.parameter), float(more.masked == "normalize"), float(more.masked == "keep"), float(frozen))


def _sets(more: Any) -> int:
    return 1 if more.starts is None else len(more.starts) - 1


def _is_whole(dtype: np.dtype[Any]) -> bool:
    return dtype.itemsize == 1 or dtype.kind == "V"


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
    if more is not None:
        _backward_with(dy, x, dx, table, dgamma, dbeta, frozen, more)
        return
    if x.shape[1] <= SPAN:
        _backward(dy, x, dx, table, dgamma, dbeta, frozen, SIZES)
        return
    sizes = _for_spans((dy, x) if dx is None else (dy, x, dx), True)
    for some in _spans(x.shape[1]):
        sums = [None if a is None else a[some] for a in (dgamma, dbeta)]
        into = None if dx is None else dx[:, some]
        _backward(dy[:, some], x[:, some], into, table[:, some], sums[0], sums[1], frozen, sizes)


def _backward(
    dy: np.ndarray, x: np.ndarray, dx: np.ndarray | None, table: np.ndarray, dgamma: np.ndarray | None,
    dbeta: np.ndarray | None, frozen: bool, sizes: Sizes,
) -> None:  # fmt: skip
    if not frozen or dgamma is not None or dbeta is not None:
        grads = np.empty((5, x.shape[1]))
        mapped = dx is not None and not frozen
        target = dx if mapped else np.empty((0, 0, 0), dy.dtype)
        stages = SUM | FINISH | (MAP if mapped else 0)
        sums = None if frozen else dgamma, dbeta
        _carry_back((dy, x, target), table, grads, sums, stages, None, None, _NO_EXTRAS, sizes)
    if not frozen:
        return
    with np.errstate(all="ignore"):
        if dgamma is not None:
            dgamma[...] = _products(x, grads) * table[3]
        if dx is not None:  # by the forward map, after the sums, as it may overwrite dy and x
            nothing = np.zeros(x.shape[1])
            _forward(dy, dx, np.empty_like(table), (table[4] * table[3], None, nothing, nothing), 1.0, None, sizes)


_NO_SUMS = np.empty(0, np.float32), np.empty(0)
_NO_TABLE = np.empty((6, 0))


def _carry_back(
    arrays: tuple[np.ndarray, ...], table: np.ndarray, grads: np.ndarray, sums: tuple[np.ndarray | None, ...],
    stages: int, how: Any, more: Any, extras: tuple[Any, ...], sizes: Sizes,
) -> None:  # fmt: skip
    """The backward kernel's stages; sums are dgamma and dbeta, which it takes empty where they are None."""
    none = _NO_SUMS[arrays[1].itemsize == 8]
    numbers = table, grads, *[none if a is None else a for a in sums]
    _carry_out(backward_item, arrays, numbers, 5, stages, how, more, extras, sizes)


def _backward_with(
    dy: np.ndarray, x: np.ndarray, dx: np.ndarray | None, table: np.ndarray, dgamma: Any, dbeta: Any, frozen: bool,
    more: Any,
) -> None:  # fmt: skip
    mapped = dx is not None or more.dresidual is not None
    summed = dgamma is not None or dbeta is not None or (dx is not None and not frozen)
    sets, channels = _sets(more), x.shape[1]
    grads = (np.empty if summed else np.zeros)((5, sets * channels))
    target: np.ndarray = np.empty((0, 0, 0), dy.dtype)
    if mapped:
        target = np.empty(dy.shape, dy.dtype) if dx is None else dx  # dresidual alone is rare: it costs a buffer
    how, extras = _gradient_extras(more, frozen)
    stages = (SUM | FINISH if summed else 0) | (MAP if mapped else 0)
    _carry_back((dy, x, target), table, grads, (dgamma, dbeta), stages, how, more, extras, SIZES)


def _gradient_extras(more: Any, frozen: bool) -> tuple[Any, tuple[Any, ...]]:
    """How they are compiled, and what the backward kernel takes of them."""
    if more is None:
        return None, _NO_EXTRAS
    weights = more.weights if not frozen or more.masked != "normalize" else None
    how, value = _how(more, frozen, not frozen and weights is None and more.dresidual is None)
    residual = more.residual if more.activation else None
    mass = None if weights is None else more.mass
    return how, (_order(more), value, residual, weights, more.dresidual, mass, more.lost, more.kept)


def _products(x: np.ndarray, grads: np.ndarray) -> Any:
    """sum dy (x - mean) by channel: the mean of x - mean isn't 0 where that is not x's own."""
    return x.shape[0] * x.shape[2] * grads[2] + grads[4] * grads[3]


def gradient_sums(dy: np.ndarray, x: np.ndarray, table: np.ndarray, more: Any = None) -> np.ndarray:
    grads, target = np.empty((5, x.shape[1])), np.empty((0, 0, 0), dy.dtype)
    how, extras = _gradient_extras(more, False)
    _carry_back((dy, x, target), table, grads, (None, None), SUM | FINISH, how, more, extras, SIZES)
    with np.errstate(all="ignore"):
        return np.stack([grads[4], _products(x, grads)])


def gradient_map(
    dy: np.ndarray, x: np.ndarray, dx: np.ndarray, table: np.ndarray, sums: np.ndarray, count: float, more: Any = None
) -> None:
    how, extras = _gradient_extras(more, False)
    if extras[5] is not None:  # the kernel divides by the mass then, and multiplies by the number of values here
        count = x.shape[0] * x.shape[2]
    grads = np.zeros((5, x.shape[1]))
    with np.errstate(all="ignore"):
        grads[0], grads[2] = sums / count
    _carry_back((dy, x, dx), table, grads, (None, None), MAP, how, more, extras, SIZES)


def _carry_out(
    item: Any, arrays: tuple[np.ndarray, ...], numbers: tuple[Any, ...], depth: int, stages: int, how: Any, more: Any,
    extras: tuple[Any, ...], sizes: Sizes,
) -> None:  # fmt: skip
    """Runs the stages; arrays (O, C, I) end in x and what is written, numbers are by channel, depth is part's."""
    x = arrays[-2]
    strides, kinds = tuple([a.strides for a in (arrays if stages & MAP else arrays[:-1])]), None
    special, sets = 0, None
    if more is not None:
        strides += tuple([a.strides for a in (extras[2], more.dresidual) if a is not None])
        kinds = tuple([None if a is None else a.dtype for a in extras[2:]])
        special = (0 if more.weights is None else WEIGHTED) | (0 if more.order is None else ORDERED)
        special |= CURVED if more.activation in CURVES else 0
        sets = None if more.starts is None else np.asarray(more.starts, np.int64).tobytes()
    make = _job if sets is None or len(sets) <= _LONGEST else _job.__wrapped__
    job = make(item, x.shape, strides, x.dtype, arrays[-1].dtype, stages, sizes, how, kinds, special, sets)
    count = threads.threads_for(job.plan.work, sizes)
    if (found := job.turns.get(count)) is None:
        found = job.turns[count] = _turns(job.plan, job.cells, stages, sizes, count)
    cells, turns = found
    part = np.empty((cells, job.plan.pieces, depth, job.plan.cut.tile)) if cells else _NO_PART
    for items, some in turns:
        claims = _NO_CLAIMS if items == 1 else np.zeros(items, np.int64)
        args = (*arrays, *numbers, part, claims, job.plan.cut, some, job.starts, *extras)
        threads.run(job.twins, items, *args, parallel=items > 1)


def _turns(plan: Plan, cells: int, stages: int, sizes: Sizes, count: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """For how many tiles at a time sums are kept, and what is done one after the other: by so many items, stages."""
    sums = 1 if stages & SUM else 0
    # By pieces too where statistics are given: each thread makes the coefficients of its own ones.
    whole = plan.whole(cells, count)
    twice = not whole and stages & SUM and stages & MAP  # threads are woken for the sums, and for the map
    if count == 1 or (twice and plan.work < 2 * threads.least(sizes)):
        return sums, ((1, stages),)
    items = min(count, cells if whole else cells * plan.pieces)
    if whole or not stages & SUM:
        return sums * (items if whole else cells), ((items, stages),)
    return cells, ((items, SUM), (1, FINISH), *([(items, MAP)] if stages & MAP else []))


class _Job(NamedTuple):
    """A kernel over arrays of some shape, strides and types: its compiled code, and how the work is cut."""

    twins: Twins
    plan: Plan
    cells: int  # tiles of all sets
    starts: np.ndarray  # of the sets; kernels only read it
    turns: dict[int, tuple[int, tuple[tuple[int, int], ...]]]  # what `_turns` gave for so many threads


_LONGEST = 2048  # bytes of sets' starts by which a job is remembered


@functools.lru_cache(maxsize=1024)
def _job(
    item: Any, shape: tuple[int, int, int], strides: tuple[tuple[int, int, int], ...], dtype: np.dtype[Any],
    result: np.dtype[Any], stages: int, sizes: Sizes, how: Any, kinds: tuple[Any, ...] | None, special: int,
    sets: bytes | None,
) -> _Job:  # fmt: skip
    """The same for all calls on such arrays; `sets` are the bytes of their starts (G + 1,) int64, None of one set."""
    outer, channels, inner = shape
    starts = np.array([0, outer]) if sets is None else np.frombuffer(sets, np.int64).copy()
    rows = np.diff(starts)
    most, least = int(rows.max(initial=0)), int(rows[rows > 0].min(initial=outer))
    sized = dtype.itemsize, result.itemsize, 0 if item is forward_item else 1
    plan = plan_of((most, channels, inner), strides, sized, stages, sizes, least, outer, special)
    twins = _twins(item, dtype, result, how, kinds)
    return _Job(twins, plan, (len(starts) - 1) * plan.tiles, starts, {})


@functools.cache
def _twins(item: Any, dtype: np.dtype[Any], result: np.dtype[Any], how: Any, kinds: tuple[Any, ...] | None) -> Twins:
    """For elements of these types, and for extras of the types `kinds`; `how` and `kinds` are None of a plain call."""
    if numba.config.DISABLE_JIT:
        raise RuntimeError(
            "fastbn's CPU kernels need Numba's compiler, which NUMBA_DISABLE_JIT turns off; unset it, or use "
            'fastbn.set_backend("reference")'
        )
    array, integer, real, none = numba.types.Array, numba.types.int64, numba.types.float64, numba.types.none
    whole = {_UNSIGNED16: UNSIGNED16, _SIGNED16: SIGNED16}.get(dtype)
    given, written = (
        array(whole or numba.from_dtype(dtype), 3, "A", readonly=True),
        array(numba.from_dtype(result), 3, "A"),
    )
    read, numbers, part = array(written.dtype, 3, "A", readonly=True), array(real, 2, "A"), array(real, 4, "C")
    row, reals = array(integer, 1, "C"), array(real, 1, "C")
    sums = reals if dtype.itemsize == 8 else array(numba.types.float32, 1, "C")
    known = numba.types.UniTuple(array(sums.dtype, 1, "C", readonly=True), 4)
    arrays, layouts = {
        forward_item: ((given, written, numbers, real, known, part), (read, None, reals, row, written)),
        backward_item: (
            (read, given, written, numbers, numbers, sums, sums, part),
            (read, None, written, reals, row, written),
        ),
    }[item]  # fmt: skip
    if kinds is None:
        kinds = (None,) * len(layouts)
    extras = [
        none if kind is None else layout or array(numba.from_dtype(kind), 3, "A", readonly=True)
        for kind, layout in zip(kinds, layouts, strict=True)
    ]
    how = how or PLAIN
    how = How(how.activation, how.inverse, how.simple, short=result.itemsize == 2)
    return Twins(
        item, (*arrays, row, numba.types.NamedUniTuple(integer, len(Cut._fields), Cut), integer, row, row, how, *extras)
    )
