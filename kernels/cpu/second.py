"""Second order and forward mode: the kernel of `jvp` and of `backward_backward`, on the views of `fastbn.kernels`.

Both are one map from (u, g, x) to (r, z), whose coefficients by channel come from five sums. With d = x - mean,
s = invstd, a = gamma s, weights w with sum W (1 and n where there are none), backward's results are

``dx = a (g - w G / W - w d s^2 D / W)``, ``dgamma = s D``, ``dbeta = G``, with G = sum g and D = sum g d.

For cotangents u, p, q of these, the loss L = sum u dx + p dgamma + q dbeta has, with M = sum w u / W, E = sum w u d
and A = sum g (u - M),

``dL/dg = a (u - M - d s^2 E / W) + p s d + q``, which is r, and also y's tangent for those u, p, q of x, gamma, beta;
``dL/dgamma = s (A - s^2 D E / W)``;
``dL/dx = e g + w (f u - s^3 / W (dL/ds) d - (e G + f W M) / W)``, which is z, with
e = p s - a s^2 E / W, f = -a s^2 D / W and dL/ds = gamma A - 3 a s D E / W + p D.

(dL/dx: L depends on x by d and by s, where ds/dx = -s^3 w d / W, and d by x itself and by the mean, dmean/dx = w / W.)
Frozen statistics are constants: r = a u + p s d + q, z = p s g, dL/dgamma = s sum g u.

All is computed in float64 lanes, whatever the elements. For the sums u and g are taken relative to pivots, means of
some first values, so that products stay small at any offset; x relative to its known mean. So they are in the map of
float64 data; in that of the others pivots go to the constants, where float64 has eight digits to spare (11 coefficients
by column took 1.2 times as long as 7).

A unit of work is a piece of a tile of channels of a group, or a tile with all its pieces, which is mapped while it is
in cache. Borders depend on the shape alone, and partial sums merge in order.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import prange, types
from numba.extending import intrinsic

from . import threads
from .blocks import write
from .compile import Kernel, compiled
from .lanes import (
    LANES,
    before_line,
    borrowed,
    call,
    claim,
    fence,
    fetch,
    fma,
    hold,
    keep_whole,
    load,
    load_part,
    nothing,
    pointer,
    save,
    save_part,
    shifted,
    spread,
    total,
    where_nonzero,
)
from .parts import part
from .rows import gathered, index, scatter

SUM, FINISH, MAP = 1, 2, 4
PAST, GATHER, FROZEN, SKIP, KEEP, NO_R, NO_Z, PIVOTED = (
    1,
    2,
    4,
    8,
    16,
    32,
    64,
    128,
)  # flags: SKIP and KEEP are for weights of 0
SUMS, DEPTH, COEFFICIENTS = 7, 9, 11
AHEAD = 64 * LANES
ROWS = 8  # of columns, that are added in registers
HEIGHT = 64  # folded rows of a block

# Sums: 0 w u, 1 g, 2 w u d, 3 g d, 4 g u; with weights also 5 u, 6 d; all less their pivots, which `part` has as 7, 8.
# Coefficients: 0 pivot of u, 1 of g, 2 hi; r = a u + b d + c: 3 a, 4 b, 5 c;
# z = e g + k + w (f u + h d + l): 6 e, 7 f, 8 h, 9 l, 10 k.
# A plan: 0 columns?, 1 channels of a tile, 2 pieces, 3 blocks of a group at most, 4 runs of a block or folded rows,
# 5 segments of a run, 6 elements of a segment, 7 period, 8 fold, 9 flags, 10 first values for a pivot,
# 11 elements of a whole run.


@intrinsic  # type: ignore[untyped-decorator]
def weight_of(_typing: Any, w: Any) -> Any:
    """0 in the type of the weights, float64 where there are none."""
    kind = types.float64 if w == types.none else w.dtype
    return kind(w), lambda context, _builder, _signature, _args: context.get_constant(kind, 0)


@part()
def _added(t, u, g, d, lanes, w, skip):  # type: ignore[no-untyped-def]
    """The lanes of the sums, and one vector more. Without weights (w is None) lanes don't count."""
    if w is None:
        return t[0] + u, t[1] + g, fma(u, d, t[2]), fma(g, d, t[3]), fma(g, u, t[4]), t[5], t[6]
    zero = nothing(u)
    v = lanes * where_nonzero(lanes, u, zero)
    vd = v * where_nonzero(lanes, d, zero)
    if skip:
        u, g, d = where_nonzero(lanes, u, zero), where_nonzero(lanes, g, zero), where_nonzero(lanes, d, zero)
    return t[0] + v, t[1] + g, t[2] + vd, fma(g, d, t[3]), fma(g, u, t[4]), t[5] + u, t[6] + d


@part()
def _none(like):  # type: ignore[no-untyped-def]
    zero = nothing(like)
    return zero, zero, zero, zero, zero, zero, zero


@part()
def _add(sums, j, lanes):  # type: ignore[no-untyped-def]
    save(sums, j, load(sums, j, lanes) + lanes)


@part()
def _keep(t, w, sums, line, j):  # type: ignore[no-untyped-def]
    """Adds lanes to the sums in memory, `line` bytes apart."""
    _add(sums, j, t[0])
    _add(shifted(sums, line), j, t[1])
    _add(shifted(sums, 2 * line), j, t[2])
    _add(shifted(sums, 3 * line), j, t[3])
    _add(shifted(sums, 4 * line), j, t[4])
    if w is not None:
        _add(shifted(sums, 5 * line), j, t[5])
        _add(shifted(sums, 6 * line), j, t[6])


@part()
def _weights(w, run, i, n, like):  # type: ignore[no-untyped-def]
    if w is None:
        return nothing(like)
    return load(run, i, like) if n >= LANES else load_part(run, i, n, nothing(like))


@part()
def _sum_run(u, g, x, w, run, n, pu, pg, hi, skip, sums, line):  # type: ignore[no-untyped-def]
    """The lanes in memory += the sums over a run of n elements of one channel."""
    pu, pg, hi = spread(pu), spread(pg), spread(hi)
    t = _none(pu)
    i = 0
    while i + LANES <= n:
        fetch(u, i + AHEAD)
        fetch(g, i + AHEAD)
        fetch(x, i + AHEAD)
        t = _added(
            t, load(u, i, pu) - pu, load(g, i, pu) - pg, load(x, i, pu) - hi, _weights(w, run, i, LANES, pu), w, skip
        )
        i += LANES
    if i < n:
        m = n - i
        du, dg, dx = load_part(u, i, m, pu) - pu, load_part(g, i, m, pg) - pg, load_part(x, i, m, hi) - hi
        t = _added(t, du, dg, dx, _weights(w, run, i, m, pu), w, skip)
    _keep(t, w, sums, line, 0)


@part()
def _results(u, g, d, lanes, w, co, flags):  # type: ignore[no-untyped-def]
    """r and z for lanes of u, g and x."""
    v = u
    if flags & PIVOTED:
        v, g, d = u - co[0], g - co[1], d - co[2]
    r = fma(v, co[3], fma(d, co[4], co[5]))
    if flags & FROZEN:  # u and x don't count, and may be infinite; pivots are 0
        z = g * co[6]
    elif w is None:
        z = fma(g, co[6], fma(v, co[7], fma(d, co[8], co[9])))
    else:
        z = fma(g, co[6], fma(lanes, fma(v, co[7], fma(d, co[8], co[9])), co[10]))
    if w is not None and flags & SKIP:
        zero = nothing(u)
        r, z = where_nonzero(lanes, r, u if flags & KEEP else zero), where_nonzero(lanes, z, zero)
    return r, z


@part()
def _map_run(u, g, x, w, run, r, z, n, co, flags):  # type: ignore[no-untyped-def]
    """r and z of a run of n elements of one channel."""
    like = co[0]
    past_r = past_z = False
    i = 0
    if flags & PAST and n >= 8 * LANES:
        i = before_line(z if flags & NO_R else r)
        past_r, past_z = flags & NO_R == 0, flags & NO_Z == 0 and before_line(z) == i
        if i > 0:
            one, two = _results(
                load_part(u, 0, i, like), load_part(g, 0, i, like), load_part(x, 0, i, like),
                _weights(w, run, 0, i, like), w, co, flags,
            )  # fmt: skip
            save_part(r, 0, i, one)
            save_part(z, 0, i, two)
    while i + LANES <= n:
        one, two = _results(
            load(u, i, like), load(g, i, like), load(x, i, like), _weights(w, run, i, LANES, like), w, co, flags
        )
        write(r, i, one, past_r)
        write(z, i, two, past_z)
        i += LANES
    if i < n:
        m = n - i
        one, two = _results(
            load_part(u, i, m, like), load_part(g, i, m, like), load_part(x, i, m, like), _weights(w, run, i, m, like),
            w, co, flags,
        )  # fmt: skip
        save_part(r, i, m, one)
        save_part(z, i, m, two)


# Rows: runs inside a channel.


@part()
def _run_of(a, o, c, i, instead):  # type: ignore[no-untyped-def]
    """A pointer into an array, or to what stands in for one that isn't there."""
    if a.shape[0] == 0:
        return pointer(instead, 0)
    return pointer(a, o * a.strides[0] + c * a.strides[1] + i * a.strides[2])


@part()
def _weights_of(w, o, i, gathered, scratch):  # type: ignore[no-untyped-def]
    if w is None or gathered:
        return pointer(scratch, 0)
    return pointer(w, (o * w.shape[2] + i) * w.itemsize)


@part()
def _gather(a, c, order, o0, o1, i0, n, scratch):  # type: ignore[no-untyped-def]
    if a.shape[0] > 0:
        gathered(a, c, o0, o1, i0, n, order, scratch)


@part()
def _scatter(scratch, a, c, order, o0, o1, i0, n):  # type: ignore[no-untyped-def]
    if a.shape[0] > 0:
        scatter(scratch, a, c, o0, o1, i0, n, order)


@part()
def _rows_borders(k, q, starts, plan):  # type: ignore[no-untyped-def]
    """Block k of group q: outer o0 to o1 (places in the order), n elements from i0 on."""
    o0 = min(starts[q] + (k // plan[5]) * plan[4], starts[q + 1])
    i0 = (k % plan[5]) * plan[6]
    return o0, min(o0 + plan[4], starts[q + 1]), i0, min(plan[6], plan[11] - i0)


@part()
def _rows_sums(u, g, x, w, order, starts, q, k, c0, near, sums, plan, scratch, weights, few):  # type: ignore[no-untyped-def]
    """Lanes of sums (7, 16 G) += those of block k, or of its first runs of `few` values at least."""
    keep_whole()
    o0, o1, i0, n = _rows_borders(k, q, starts, plan)
    o1 = min(o1, o0 + (few + n - 1) // n)
    skip, line = plan[9] & SKIP != 0, sums.strides[0]
    if plan[9] & GATHER:
        if o1 > o0:
            gathered(w, 0, o0, o1, i0, n, order, weights)
            for c in range(near.shape[1]):
                _gather(u, c0 + c, order, o0, o1, i0, n, scratch[0])
                _gather(g, c0 + c, order, o0, o1, i0, n, scratch[1])
                _gather(x, c0 + c, order, o0, o1, i0, n, scratch[2])
                _sum_run(
                    pointer(scratch[0], 0), pointer(scratch[1], 0), pointer(scratch[2], 0),
                    w, _weights_of(w, 0, 0, True, weights), (o1 - o0) * n, near[0, c], near[1, c], near[2, c], skip,
                    pointer(sums, 8 * LANES * c), line,
                )  # fmt: skip
        return
    for o in range(o0, o1):
        place = index(order, o)
        for c in range(near.shape[1]):
            _sum_run(
                _run_of(u, place, c0 + c, i0, scratch[0]), _run_of(g, place, c0 + c, i0, scratch[0]),
                _run_of(x, place, c0 + c, i0, scratch[0]), w, _weights_of(w, place, i0, False, weights), n,
                near[0, c], near[1, c], near[2, c], skip, pointer(sums, 8 * LANES * c), line,
            )  # fmt: skip


@part()
def _spread_eleven(co, c):  # type: ignore[no-untyped-def]
    return (
        spread(co[0, c]), spread(co[1, c]), spread(co[2, c]), spread(co[3, c]), spread(co[4, c]), spread(co[5, c]),
        spread(co[6, c]), spread(co[7, c]), spread(co[8, c]), spread(co[9, c]), spread(co[10, c]),
    )  # fmt: skip


@part()
def _rows_map(u, g, x, w, r, z, order, starts, q, k, c0, width, co, plan, scratch, weights):  # type: ignore[no-untyped-def]
    """r and z of block k for `width` channels from c0 on, backwards: what was read last is in cache."""
    keep_whole()
    o0, o1, i0, n = _rows_borders(k, q, starts, plan)
    flags = plan[9]
    if flags & GATHER:
        if o1 > o0:
            gathered(w, 0, o0, o1, i0, n, order, weights)
            for c in range(c0, c0 + width):
                _gather(u, c, order, o0, o1, i0, n, scratch[0])
                _gather(g, c, order, o0, o1, i0, n, scratch[1])
                _gather(x, c, order, o0, o1, i0, n, scratch[2])
                _map_run(
                    pointer(scratch[0], 0), pointer(scratch[1], 0), pointer(scratch[2], 0),
                    w, _weights_of(w, 0, 0, True, weights), pointer(scratch[3], 0), pointer(scratch[4], 0),
                    (o1 - o0) * n, _spread_eleven(co, c), flags & ~PAST,
                )  # fmt: skip
                _scatter(scratch[3], r, c, order, o0, o1, i0, n)
                _scatter(scratch[4], z, c, order, o0, o1, i0, n)
        return
    for o in range(o1 - 1, o0 - 1, -1):
        place = index(order, o)
        for c in range(c0, c0 + width):
            _map_run(
                _run_of(u, place, c, i0, scratch[0]), _run_of(g, place, c, i0, scratch[0]),
                _run_of(x, place, c, i0, scratch[0]), w, _weights_of(w, place, i0, False, weights),
                _run_of(r, place, c, i0, scratch[1]), _run_of(z, place, c, i0, scratch[1]), n, _spread_eleven(co, c),
                flags,
            )  # fmt: skip


# Columns: rows across the channels. Column j of a tile of G channels belongs to channel (j // period) % G.


@part()
def _width(channels, plan):  # type: ignore[no-untyped-def]
    """Columns or lanes of a tile; a vector may be loaded from any of them on."""
    return channels * (plan[7] * plan[8] if plan[0] else LANES) + (LANES if plan[0] else 0)


@part()
def _group_rows(q, starts, plan):  # type: ignore[no-untyped-def]
    return (starts[q + 1] - starts[q]) * (1 if plan[7] > 1 else plan[11])


@part()
def _place(a, o, i, c0):  # type: ignore[no-untyped-def]
    """Offset in bytes: 0 in an array that isn't there."""
    return 0 if a.shape[0] == 0 else o * a.strides[0] + i * a.strides[2] + c0 * a.strides[1]


@part()
def _find_rows(arrays, w, q, r0, rows, c0, order, starts, plan, places, weights):  # type: ignore[no-untyped-def]
    """places (5, ROWS) <- offsets of folded rows, weights (ROWS,) <- theirs."""
    inner = 1 if plan[7] > 1 else plan[11]
    row = r0 * plan[8]
    o = row // inner
    i = row - o * inner
    for k in range(rows):
        place = index(order, starts[q] + o)
        places[0, k], places[1, k] = _place(arrays[0], place, i, c0), _place(arrays[1], place, i, c0)
        places[2, k], places[3, k] = _place(arrays[2], place, i, c0), _place(arrays[3], place, i, c0)
        places[4, k] = _place(arrays[4], place, i, c0)
        if w is not None:
            weights[k] = w[place, 0, i]
        i += plan[8]
        while i >= inner:
            i -= inner
            o += 1


@part()
def _some_rows(q, r, r1, channels, starts, plan):  # type: ignore[no-untyped-def]
    """How many folded rows from r on are of one width, 16 at most, and that width: the last one can be shorter."""
    left = _group_rows(q, starts, plan)
    last = (left + plan[8] - 1) // plan[8] - 1
    rows = min(ROWS, r1 - r)
    if r + rows - 1 == last and rows > 1 and left % plan[8]:
        rows -= 1
    return rows, min(plan[8], left - r * plan[8]) * channels * plan[7]


@part()
def _base(a, instead):  # type: ignore[no-untyped-def]
    return pointer(instead, 0) if a.shape[0] == 0 else pointer(a, 0)


@part()
def _columns_sums(u, g, x, w, r, z, order, starts, q, k, c0, channels, near, sums, plan, scratch, weights, places, few):  # type: ignore[no-untyped-def]
    """Columns of sums (7, W) += those of block k, or of its first `few` rows; near (3, W) has the pivots by column."""
    keep_whole()
    rows_in_all = (_group_rows(q, starts, plan) + plan[8] - 1) // plan[8]
    first, end = k * plan[4], min((k + 1) * plan[4], rows_in_all)
    end, skip, line = min(end, first + few), plan[9] & SKIP != 0, sums.strides[0]
    us, gs, xs = _base(u, scratch[0]), _base(g, scratch[0]), _base(x, scratch[0])
    like = spread(0.0)
    all_near, all_sums = pointer(near, 0), pointer(sums, 0)
    row = near.strides[0]
    while first < end:
        rows, n = _some_rows(q, first, end, channels, starts, plan)
        _find_rows((u, g, x, r, z), w, q, first, rows, c0, order, starts, plan, places, weights)
        skip_u, skip_g = places[0, rows - 1] - places[0, 0], places[1, rows - 1] - places[1, 0]
        skip_x = places[2, rows - 1] - places[2, 0]
        for j in range(0, n, LANES):
            pu, pg = load(all_near, j, like), load(shifted(all_near, row), j, like)
            hi = load(shifted(all_near, 2 * row), j, like)
            t = _none(like)
            m = n - j
            if m >= LANES:
                for i in range(rows):
                    ru, rg, rx = shifted(us, places[0, i]), shifted(gs, places[1, i]), shifted(xs, places[2, i])
                    fetch(shifted(ru, skip_u), j)
                    fetch(shifted(rg, skip_g), j)
                    fetch(shifted(rx, skip_x), j)
                    du, dg, dx = load(ru, j, like) - pu, load(rg, j, like) - pg, load(rx, j, like) - hi
                    t = _added(t, du, dg, dx, spread(np.float64(weights[i])), w, skip)
            else:
                for i in range(rows):
                    du = load_part(shifted(us, places[0, i]), j, m, pu) - pu
                    dg = load_part(shifted(gs, places[1, i]), j, m, pg) - pg
                    dx = load_part(shifted(xs, places[2, i]), j, m, hi) - hi
                    t = _added(t, du, dg, dx, spread(np.float64(weights[i])), w, skip)
            _keep(t, w, all_sums, line, j)
        first += rows


@part()
def _eleven(co, row, j):  # type: ignore[no-untyped-def]
    like = spread(0.0)
    return (
        load(co, j, like), load(shifted(co, row), j, like), load(shifted(co, 2 * row), j, like),
        load(shifted(co, 3 * row), j, like), load(shifted(co, 4 * row), j, like), load(shifted(co, 5 * row), j, like),
        load(shifted(co, 6 * row), j, like), load(shifted(co, 7 * row), j, like), load(shifted(co, 8 * row), j, like),
        load(shifted(co, 9 * row), j, like), load(shifted(co, 10 * row), j, like),
    )  # fmt: skip


@part()
def _columns_map_row(u, g, x, w, lanes, r, z, n, co, row, flags):  # type: ignore[no-untyped-def]
    like = lanes
    past_r = past_z = False
    j = 0
    if flags & PAST and n >= 8 * LANES:
        j = before_line(z if flags & NO_R else r)
        past_r, past_z = flags & NO_R == 0, flags & NO_Z == 0 and before_line(z) == j
        if j > 0:
            one, two = _results(
                load_part(u, 0, j, like), load_part(g, 0, j, like), load_part(x, 0, j, like), lanes, w,
                _eleven(co, row, 0), flags,
            )  # fmt: skip
            save_part(r, 0, j, one)
            save_part(z, 0, j, two)
    while j + LANES <= n:
        one, two = _results(load(u, j, like), load(g, j, like), load(x, j, like), lanes, w, _eleven(co, row, j), flags)
        write(r, j, one, past_r)
        write(z, j, two, past_z)
        j += LANES
    if j < n:
        m = n - j
        one, two = _results(
            load_part(u, j, m, like), load_part(g, j, m, like), load_part(x, j, m, like), lanes, w,
            _eleven(co, row, j), flags,
        )  # fmt: skip
        save_part(r, j, m, one)
        save_part(z, j, m, two)


@part()
def _columns_map(u, g, x, w, r, z, order, starts, q, k, c0, channels, co, plan, scratch, weights, places):  # type: ignore[no-untyped-def]
    """r and z of block k; co (11, W) by column."""
    keep_whole()
    flags = plan[9]
    rows_in_all = (_group_rows(q, starts, plan) + plan[8] - 1) // plan[8]
    first, end = k * plan[4], min((k + 1) * plan[4], rows_in_all)
    us, gs, xs = _base(u, scratch[0]), _base(g, scratch[0]), _base(x, scratch[0])
    rs, zs = _base(r, scratch[1]), _base(z, scratch[1])
    all_co, row = pointer(co, 0), co.strides[0]
    while first < end:
        rows, n = _some_rows(q, first, end, channels, starts, plan)
        _find_rows((u, g, x, r, z), w, q, first, rows, c0, order, starts, plan, places, weights)
        for i in range(rows):  # one behind the other: loads of a row 4 KB on would wait for this one's stores
            _columns_map_row(
                shifted(us, places[0, i]), shifted(gs, places[1, i]), shifted(xs, places[2, i]), w,
                spread(np.float64(weights[i])), shifted(rs, places[3, i]), shifted(zs, places[4, i]), n, all_co, row,
                flags,
            )  # fmt: skip
        first += rows


@part()
def _to_columns(values, columns, plan):  # type: ignore[no-untyped-def]
    """columns (M, W) <- values (M, G) by channel, and from the start again."""
    for m in range(values.shape[0]):
        j = 0
        for _ in range(plan[8]):
            for c in range(values.shape[1]):
                for _ in range(plan[7]):
                    columns[m, j] = values[m, c]
                    j += 1


@part()
def _to_channels(sums, totals, plan):  # type: ignore[no-untyped-def]
    """totals (7, G) <- the columns or lanes of sums, added up, and these <- 0."""
    if plan[0] == 0:
        like = spread(0.0)
        for m in range(SUMS):
            for c in range(totals.shape[1]):
                totals[m, c] = total(load(pointer(sums, m * sums.strides[0] + 8 * LANES * c), 0, like))
        sums[:] = 0.0
        return
    totals[:] = 0.0
    for m in range(SUMS):
        j = 0
        for _ in range(plan[8]):
            for c in range(totals.shape[1]):
                for _ in range(plan[7]):
                    totals[m, c] += sums[m, j]
                    j += 1
    sums[:] = 0.0


# Units of work.


@part(inline="always")
def _block(arrays, w, order, starts, q, k, c0, near, memory, plan, few):  # type: ignore[no-untyped-def]
    u, g, x, r, z = arrays
    sums, columns, scratch, weights, places = memory[1], memory[2], memory[3], memory[4], memory[5]
    if plan[0]:
        _columns_sums(
            u, g, x, w, r, z, order, starts, q, k, c0, near.shape[1], columns, sums, plan, scratch, weights, places, few
        )
    else:
        _rows_sums(u, g, x, w, order, starts, q, k, c0, near, sums, plan, scratch, weights, few)


@part()
def _pivots(arrays, w, order, starts, q, c0, table, near, totals, memory, plan):  # type: ignore[no-untyped-def]
    """near (3, G) <- means of the first values of u and g, and hi; the same whichever piece asks."""
    near[:] = 0.0
    if plan[0]:
        memory[2][:3] = 0.0
    if not plan[9] & FROZEN:
        _block(arrays, w, order, starts, q, np.int64(0), c0, near, memory, plan, plan[10])
        _to_channels(memory[1], totals, plan)
        if plan[0]:
            count = min(min(plan[10], plan[4]) * plan[8], _group_rows(q, starts, plan)) * plan[7]
        else:
            o0, o1, _, n = _rows_borders(0, q, starts, plan)
            count = min(o1 - o0, (plan[10] + n - 1) // n) * n
        for c in range(near.shape[1]):
            near[0, c], near[1, c] = totals[0 if w is None else 5, c] / max(1, count), totals[1, c] / max(1, count)
    for c in range(near.shape[1]):
        near[2, c] = table[q, 0, c0 + c]
    if plan[0]:
        _to_columns(near, memory[2], plan)


@part()
def _sums(arrays, w, order, starts, q, p, c0, near, totals, memory, plan, part):  # type: ignore[no-untyped-def]
    """part (9, C) of piece p: the sums and the pivots."""
    for k in range(p * plan[3] // plan[2], (p + 1) * plan[3] // plan[2]):
        _block(arrays, w, order, starts, q, np.int64(k), c0, near, memory, plan, np.int64(1 << 62))
    _to_channels(memory[1], totals, plan)
    row = q * plan[2] + p
    for c in range(near.shape[1]):
        for m in range(SUMS):
            part[row, m, c0 + c] = totals[m, c]
        part[row, 7, c0 + c], part[row, 8, c0 + c] = near[0, c], near[1, c]


@part()
def _coefficients(q, c, table, tangents, sizes, part, co, ggamma, weighted, plan):  # type: ignore[no-untyped-def]
    """Of a channel of a set. Pivots go to the constants, but for float64 data, which has no digits to spare."""
    _finish(q, c, table, tangents, sizes, part, co, ggamma, weighted, plan)
    if plan[9] & PIVOTED == 0:
        pu, pg, hi = co[q, 0, c], co[q, 1, c], co[q, 2, c]
        co[q, 5, c] -= co[q, 3, c] * pu + co[q, 4, c] * hi
        co[q, 9, c] -= co[q, 7, c] * pu + co[q, 8, c] * hi
        co[q, 10 if weighted else 9, c] -= co[q, 6, c] * pg


@part()
def _finish(q, c, table, tangents, sizes, part, co, ggamma, weighted, plan):  # type: ignore[no-untyped-def]
    """Coefficients (11, C) of a channel of a group, and dL/dgamma. The letters are those of this module's docstring."""
    v = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    for row in range(q * plan[2], (q + 1) * plan[2]):
        v = (
            v[0] + part[row, 0, c], v[1] + part[row, 1, c], v[2] + part[row, 2, c], v[3] + part[row, 3, c],
            v[4] + part[row, 4, c], v[5] + part[row, 5, c], v[6] + part[row, 6, c],
        )  # fmt: skip
    wu, g, wud, gd, gu, u, d = v
    pu, pg = part[q * plan[2], 7, c], part[q * plan[2], 8, c]
    hi, lo, s, gamma = table[q, 0, c], table[q, 1, c], table[q, 3, c], table[q, 4, c]
    a, p = gamma * s, tangents[0, c]
    co[q, 0, c], co[q, 1, c], co[q, 2, c], co[q, 3, c] = pu, pg, hi, a
    co[q, 10, c] = 0.0
    if plan[9] & FROZEN:  # pivots are 0
        co[q, 4, c], co[q, 5, c], co[q, 6, c] = p * s, tangents[1, c] - p * s * lo, p * s
        co[q, 7, c] = co[q, 8, c] = co[q, 9, c] = 0.0
        ggamma[q, c] = s * gu
        return
    n, W = sizes[0, q], sizes[1, q]
    if W == 0.0:  # y is beta
        co[q, 4, c] = co[q, 6, c] = co[q, 7, c] = co[q, 8, c] = co[q, 9, c] = ggamma[q, c] = 0.0
        co[q, 5, c] = tangents[1, c]
        return
    mean = wu / W  # of u, less its pivot; deviations of x add up to 0
    E, D, A = (wud - lo * wu) / W, gd - lo * g, gu - mean * g
    if weighted:
        D += pg * (d - n * lo)
        A += pg * (u - n * mean)
    K = s * s * E
    f = -a * s * s * D / W
    e = p * s - a * K
    ggamma[q, c] = s * (A - D * K)
    h = -(s * s * s) * (gamma * A - 3.0 * gamma * D * K + p * D) / W
    b = p * s - a * K
    co[q, 4, c], co[q, 5, c] = b, tangents[1, c] - a * mean - b * lo
    co[q, 6, c], co[q, 7, c], co[q, 8, c] = e, f, h
    if weighted:
        co[q, 9, c], co[q, 10, c] = -(e * (g + n * pg) + f * wu) / W - h * lo, e * pg
    else:
        co[q, 9, c] = -(e * g + f * wu) / W - h * lo


@part()
def _map(arrays, w, order, starts, q, p, c0, g, co, memory, plan):  # type: ignore[no-untyped-def]
    """Piece p of a tile, backwards."""
    u, g_, x, r, z = arrays
    columns, scratch, weights, places = memory[2], memory[3], memory[4], memory[5]
    for k in range((p + 1) * plan[3] // plan[2] - 1, p * plan[3] // plan[2] - 1, -1):
        if plan[0]:
            _columns_map(
                u, g_, x, w, r, z, order, starts, q, k, c0, g, columns, plan, scratch, weights, places
            )  # fmt: skip
        else:
            _rows_map(u, g_, x, w, r, z, order, starts, q, k, c0, g, co[q], plan, scratch, weights)


@part(_nrt=True)
def _memory(x, like, some, plan):  # type: ignore[no-untyped-def]
    """Of a work item: `borrowed` says why nothing below it may own an array."""
    tile = plan[1]
    width = _width(tile, plan)
    run = max(plan[6], width) if plan[0] else plan[4] * plan[6] if plan[9] & GATHER else plan[6]
    scratch = np.zeros((5, run if plan[9] & GATHER or some else 0), x.dtype)
    weights = np.full(run if plan[9] & GATHER else ROWS, like)
    columns = np.zeros((COEFFICIENTS, width if plan[0] else 0))
    return np.zeros((10, tile)), np.zeros((SUMS, width)), columns, scratch, weights, np.zeros((5, ROWS), np.int64)


@part(inline="always")
def _lent(m):  # type: ignore[no-untyped-def]
    return borrowed(m[0]), borrowed(m[1]), borrowed(m[2]), borrowed(m[3]), borrowed(m[4]), borrowed(m[5])


@compiled
def second_item(
    _k, _items, u, g, x, r, z, w, order, starts, table, tangents, sizes, part, co, ggamma, claims, plan, stage
):  # type: ignore[no-untyped-def]
    """u, g, x, r, z (O, C, I), u, g, r, z or none of it; w (O, 1, I) or None; order (O,) or (0,), starts (Q + 1,),
    table (Q, 6, C), tangents (2, C), sizes (2, Q): count and sum of weights; part (Q P, 9, C), co (Q, 11, C),
    ggamma (Q, C)."""
    keep_whole()
    arrays = (borrowed(u), borrowed(g), borrowed(x), borrowed(r), borrowed(z))
    w, order, starts, claims = borrowed(w), borrowed(order), borrowed(starts), borrowed(claims)
    table, tangents, sizes, part = borrowed(table), borrowed(tangents), borrowed(sizes), borrowed(part)
    co, ggamma = borrowed(co), borrowed(ggamma)
    some = u.shape[0] == 0 or g.shape[0] == 0 or r.shape[0] == 0 or z.shape[0] == 0 or x.shape[0] == 0
    owned = _memory(x, weight_of(w), some, plan)
    memory = _lent(owned)
    channels = table.shape[2]
    tiles, split = (channels + plan[1] - 1) // plan[1], 1 if stage & FINISH else plan[2]
    work = sizes.shape[1] * tiles * split
    unit = claim(claims, 0)
    while unit < work:
        q, rest = unit // (tiles * split), unit % (tiles * split)
        c0, p = rest // split * plan[1], rest % split
        p0, p1 = (0, plan[2]) if stage & FINISH else (p, p + 1)
        c1 = min(c0 + plan[1], channels)
        near, totals = memory[0][:3, : c1 - c0], memory[0][3:, : c1 - c0]
        if stage & SUM:
            _pivots(arrays, w, order, starts, q, c0, table, near, totals, memory, plan)
            for p in range(p0, p1):
                _sums(arrays, w, order, starts, q, p, c0, near, totals, memory, plan, part)
        if stage & FINISH:
            for c in range(c0, c1):
                _coefficients(q, c, table, tangents, sizes, part, co, ggamma, w is not None, plan)
        if stage & MAP:
            if plan[0]:
                _to_columns(co[q, :, c0:c1], memory[2], plan)
            for p in range(p1 - 1, p0 - 1, -1):
                _map(arrays, w, order, starts, q, p, c0, c1 - c0, co, memory, plan)
        unit = claim(claims, 0)
    fence()
    hold(owned)


@Kernel
def second_kernel(
    items, item, u, g, x, r, z, w, order, starts, table, tangents, sizes, part, co, ggamma, claims, plan, stage
):  # type: ignore[no-untyped-def]
    """`second_item`, whose address is `item`, for all items."""
    for k in prange(items):
        call(item, (
            np.int64(k), items, u, g, x, r, z, w, order, starts, table, tangents, sizes, part, co, ggamma, claims, plan,
            stage,
        ))  # fmt: skip


class Sizes(NamedTuple):
    """What a plan cuts a shape by; tests make them tiny."""

    block: int = 4096  # elements of a run at most, and of what is gathered
    slab: int = 600_000  # bytes of three arrays' tile of rows
    line: int = 2048  # bytes of a tile of rows that follow each other in memory, at least
    columns: int = 256  # columns of a tile: their sums and coefficients stay in L1
    few: int = 512  # values of a channel that make a pivot
    serial: int = 65536  # elements below which all runs on one thread
    past: int = 30_000_000  # bytes of all arrays above which stores go past the caches


SIZES = Sizes()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, int, int], strides: tuple[tuple[int, int, int], ...], itemsize: int, largest: int, flags: int,
    orderly: bool, weighted: bool, sizes: Sizes,
) -> tuple[int, ...]:  # fmt: skip
    """`largest`: outer indices of the largest group; `orderly`: those of a group follow each other."""
    outer, channels, inner = shape
    if itemsize == 8:
        flags |= PIVOTED
    if outer * channels * inner * itemsize * len(strides) > sizes.past:
        flags |= PAST
    across = channels > 1 and all(s[1] == itemsize and (inner == 1 or s[2] != itemsize) for s in strides)
    short = 1 < inner < LANES and all(s[2] == itemsize and s[1] == inner * itemsize for s in strides) and not weighted
    few_channels = weighted and channels < LANES  # whose rows can't be folded: each has its weight
    if (across and not few_channels) or short:
        period = inner if short else 1
        rows, width = largest if short else largest * inner, channels * period
        gapless = all((s[0] if short or inner == 1 else s[2]) == width * itemsize for s in strides)
        level = short or inner == 1 or outer == 1 or all(s[0] == inner * s[2] for s in strides)
        fold = 1
        if gapless and level and orderly and not weighted and 2 * width <= sizes.columns:
            fold = max(1, min(sizes.columns // width, rows // ROWS))
        tile = channels if fold > 1 else max(1, min(channels, sizes.columns // period))
        blocks = _ceil(_ceil(rows, fold), HEIGHT)
        few = _ceil(sizes.few, fold * period)
        pieces = max(1, min(64, blocks // 4, 8192 // channels))
        return 1, tile, pieces, blocks, HEIGHT, 1, 1, period, fold, flags, few, inner
    gather = (inner > 1 and any(s[2] != itemsize for s in strides)) or inner < min(LANES, sizes.block)
    if gather:
        flags |= GATHER
    segments = _ceil(inner, sizes.block)
    length = inner if segments == 1 else min(sizes.block, _ceil(_ceil(inner, segments), 2 * LANES) * 2 * LANES)
    segments = _ceil(inner, length)
    runs = max(1, min(largest, sizes.block // length))
    tile = max(sizes.slab // (3 * largest * inner * itemsize), sizes.line // (inner * itemsize), 1)
    if gather:
        tile = max(tile, 16)  # whose elements share lines
    tile = min(tile, _ceil(channels, 16))
    blocks = _ceil(largest, runs) * segments
    pieces = max(1, min(64, blocks // 4, 8192 // channels))
    return 0, tile, pieces, blocks, runs, segments, length, 1, 1, flags, sizes.few, inner


def second(
    u: np.ndarray | None,
    g: np.ndarray | None,
    x: np.ndarray | None,
    r: np.ndarray | None,
    z: np.ndarray | None,
    table: np.ndarray,
    tangents: np.ndarray,
    frozen: bool,
    need_gamma: bool,
    more: Any = None,
) -> np.ndarray | None:
    """r and z written, those that are not None; returns dL/dgamma (Q, C) by set, if it is needed.

    u, g, x, r, z (O, C, I): None for u, g or x stands for 0. table (6, Q C); tangents (2, C): p and q; `more`: weights,
    masked, mass, order and starts as in `fastbn.kernels`. r and z may be u, g or x, and not each other.
    """
    arrays = [a for a in (u, g, x, r, z) if a is not None]
    like = arrays[0]
    shape, channels = like.shape, like.shape[1]
    absent = np.empty((0, *shape[1:]), like.dtype)
    weights = order = None
    starts, skip = np.array([0, shape[0]]), "normalize"
    if more is not None:
        order, skip = more.order, more.masked
        starts = starts if more.starts is None else more.starts
        weights = more.weights
    sets = len(starts) - 1
    flags = (FROZEN if frozen else 0) | (NO_R if r is None else 0) | (NO_Z if z is None else 0)
    flags |= {"normalize": 0, "zero": SKIP, "keep": SKIP | KEEP}[skip]
    sizes = np.empty((2, sets))
    sizes[:] = np.diff(starts) * shape[2]
    if weights is not None:
        sizes[1] = more.mass
        if skip != "normalize":
            counts = np.count_nonzero(weights if order is None else weights[order], axis=(1, 2))
            sizes[0] = np.diff(np.concatenate([[0], np.cumsum(counts)])[starts])
    largest = max(1, int(np.diff(starts).max()))
    plan = _plan(
        shape, tuple([a.strides for a in arrays]), like.itemsize, largest, flags, order is None, weights is not None,
        SIZES,
    )  # fmt: skip
    tiles, pieces = sets * _ceil(channels, plan[1]), plan[2]
    stages = FINISH | (0 if frozen and not need_gamma else SUM) | (0 if r is z is None else MAP)
    part = (np.empty if stages & SUM else np.zeros)((sets * pieces, DEPTH, channels))
    co, ggamma = np.empty((sets, COEFFICIENTS, channels)), np.empty((sets, channels))
    places = np.empty(0, np.int64) if order is None else order
    given = [absent if a is None else a for a in (u, g, x, r, z)]
    numbers = np.ascontiguousarray(table.reshape(6, sets, channels).swapaxes(0, 1))
    twins = _twins(like.dtype, None if weights is None else weights.dtype)
    count = 1 if like.size < SIZES.serial else threads.threads()

    def run(items: int, some: int) -> None:
        args = (*given, weights, places, starts, numbers, tangents, sizes, part, co, ggamma, np.zeros(1, np.int64))
        threads.run(twins, items, *args, plan, some, parallel=items > 1)

    if count == 1:
        run(1, stages)
    elif tiles >= 4 * count or (tiles >= count and tiles % count == 0) or pieces == 1:
        run(min(count, tiles), stages)
    else:
        if stages & SUM:
            run(min(count, tiles * pieces), SUM)
        run(1, FINISH)
        if stages & MAP:
            run(min(count, tiles * pieces), MAP)
    return ggamma if need_gamma else None


@functools.cache
def _twins(dtype: np.dtype[Any], weights: np.dtype[Any] | None) -> Any:
    from . import _Twins  # which imports nothing of this module

    integer, real = numba.types.int64, numba.types.float64
    given, written = (numba.types.Array(numba.from_dtype(dtype), 3, "A", readonly=b) for b in (True, False))
    kind = numba.types.none if weights is None else numba.types.Array(numba.from_dtype(weights), 3, "C", readonly=True)
    list_, numbers, three = (numba.types.Array(t, n, "C") for t, n in ((integer, 1), (real, 2), (real, 3)))
    return _Twins(
        second_item,
        second_kernel,
        (
            given, given, given, written, written, kind, list_, list_, three, numbers, numbers, three, three, numbers,
            list_, numba.types.UniTuple(integer, 12), integer,
        ),
    )  # fmt: skip
