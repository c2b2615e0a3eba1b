"""The kernel of second order: sums of a tile, coefficients of its channels, the map."""

from typing import Any

import numpy as np
from numba import types

from ..columns import spread_columns, weights_room
from ..compile import compiled
from ..cut import EXACT, GATHER
from ..formulas import intrinsic
from ..items import by_all, claim, fence
from ..lanes import keep_whole
from ..memory import blank
from ..parts import part, unless_none
from ..rows import block, index
from ..schedule import FINISH, MAP, SUM, by_channel, listed, planned, start_of, tile_width
from ..views import borrowed, carved, corner, hold, outer, place, row
from .columns import columns_map, columns_sums
from .runs import FROZEN, NO_R, NO_Z, SKIP, rows_map, rows_sums

SUMS = 8
COEFFICIENTS = 11


@intrinsic
def weight_of(_typing: Any, w: Any) -> Any:
    """0 in the type of the weights, float64 where there are none."""
    kind = types.float64 if w == types.none else w.dtype
    return kind(w), lambda context, _builder, _signature, _args: context.get_constant(kind, 0)


@part()
def _block(sources, w, k, c0, near, memory, plan, few, order):  # type: ignore[no-untyped-def]
    _, sums, columns, scratch, weights, _ = memory
    if plan.across:
        columns_sums(sources, w, k, c0, near.shape[1], columns, sums, plan, few, order, weights)
    else:
        rows_sums(sources, w, k, c0, near, sums, plan, few, order, scratch, weights)


@part()
def _first_values(k, shape, plan, few):  # type: ignore[no-untyped-def]
    """The first values of a channel in block k: from which outer index of the set to which, and n elements from i0 on.

    Where columns are a channel each, rows are counted instead, one outer index's elements behind the other's.
    """
    if plan.across:
        each = shape[2] if plan.period > 1 else 1
        rows, r0 = min(few, plan.height) * plan.fold, k * plan.height * plan.fold
        return r0, max(r0, min(r0 + rows, shape[0] * shape[2] // each)), np.int64(0), each
    o0, o1, i0, n = block(k, shape, plan)
    return o0, min(o1, o0 + (few + n - 1) // n), i0, n


@unless_none(0, lambda *args: args[-1])
def _with_weight(w, k, order, shape, plan, few, values):  # type: ignore[no-untyped-def]
    """How many of the first `values` have weight, where others aren't counted."""
    if plan.flags & SKIP == 0:
        return values
    first, last, i0, n = _first_values(k, shape, plan, few)
    inner, count = 1 if plan.across == 0 or plan.period > 1 else shape[2], 0
    for r in range(first, last):
        o = r // inner
        for i in range(i0 + r - o * inner, i0 + r - o * inner + n):
            if w[index(order, o), 0, i] != 0:
                count += 1
    return count


@part()
def _pivots(sources, w, c0, table, near, totals, memory, plan, few, order):  # type: ignore[no-untyped-def]
    """near (3, G) <- means of the first values of u and g that count, and hi; the same whichever piece asks."""
    shape, columns = sources[0].shape, memory[2]
    blank(near, 3)
    if plan.across:
        blank(columns, 3)
    if plan.blocks > 0 and not plan.flags & FROZEN:
        k = count = 0
        while count == 0 and k < plan.blocks:  # the first block in which something counts
            first, last, _, n = _first_values(k, shape, plan, few)
            count, k = _with_weight(w, k, order, shape, plan, few, (last - first) * n), k + 1
        _block(sources, w, np.int64(k - 1), c0, near, memory, plan, few, order)
        by_channel(memory[1], totals, plan)
        for c in range(near.shape[1]):
            near[0, c], near[1, c] = totals[0 if w is None else 5, c] / max(1, count), totals[1, c] / max(1, count)
    for c in range(near.shape[1]):
        near[2, c] = table[0, c0 + c]
    if plan.across:
        spread_columns(near, columns, plan)


@part()
def _sums(sources, w, p, c0, near, totals, memory, plan, order, part):  # type: ignore[no-untyped-def]
    """part (10, C) of piece p: the sums and the pivots."""
    for k in range(p * plan.piece, min((p + 1) * plan.piece, plan.blocks)):
        _block(sources, w, np.int64(k), c0, near, memory, plan, np.int64(1 << 62), order)
    by_channel(memory[1], totals, plan)
    for c in range(near.shape[1]):
        for m in range(SUMS):
            part[m, c0 + c] = totals[m, c]
        part[8, c0 + c], part[9, c0 + c] = near[0, c], near[1, c]


@part()
def _coefficients(q, c, table, tangents, sizes, part, co, ggamma, weighted, pieces, plan):  # type: ignore[no-untyped-def]
    """Of a channel of a set. Pivots go to the constants, unless digits are short (EXACT)."""
    _finish(q, c, table, tangents, sizes, part, co, ggamma, weighted, pieces, plan)
    if plan.flags & EXACT == 0:
        pu, pg, hi = co[q, 0, c], co[q, 1, c], co[q, 2, c]
        co[q, 5, c] -= co[q, 3, c] * pu + co[q, 4, c] * hi
        co[q, 9, c] -= co[q, 7, c] * pu + co[q, 8, c] * hi
        co[q, 10 if weighted else 9, c] -= co[q, 6, c] * pg


@part()
def _finish(q, c, table, tangents, sizes, part, co, ggamma, weighted, pieces, plan):  # type: ignore[no-untyped-def]
    """Coefficients (11, C) of a channel of a group, and dL/dgamma. The letters are those of this module's docstring."""
    v = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    for i in range(q * pieces, (q + 1) * pieces):
        v = (
            v[0] + part[i, 0, c], v[1] + part[i, 1, c], v[2] + part[i, 2, c], v[3] + part[i, 3, c],
            v[4] + part[i, 4, c], v[5] + part[i, 5, c], v[6] + part[i, 6, c], v[7] + part[i, 7, c],
        )  # fmt: skip
    wu, g, wud, gd, gu, u, d, wd = v
    pu, pg = part[q * pieces, 8, c], part[q * pieces, 9, c]
    hi, lo, s, gamma = table[q, 0, c], table[q, 1, c], table[q, 3, c], table[q, 4, c]
    a, p = gamma * s, tangents[0, c]
    co[q, 0, c], co[q, 1, c], co[q, 2, c], co[q, 3, c] = pu, pg, hi, a
    co[q, 10, c] = 0.0
    if plan.flags & FROZEN:  # pivots are 0
        co[q, 4, c], co[q, 5, c], co[q, 6, c] = p * s, tangents[1, c] - p * s * lo, p * s
        co[q, 7, c] = co[q, 8, c] = co[q, 9, c] = 0.0
        ggamma[q, c] = s * gu
        return
    n, W = sizes[0, q], sizes[1, q]
    if W == 0.0:  # y is beta
        co[q, 4, c] = co[q, 6, c] = co[q, 7, c] = co[q, 8, c] = co[q, 9, c] = ggamma[q, c] = 0.0
        co[q, 5, c] = tangents[1, c]
        return
    if weighted:  # the mean of d by weights, as exact as float64 has it: `pg d` would show the error of float32's
        lo = wd / W
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
def _map(sources, targets, w, p, c0, co, memory, plan, order):  # type: ignore[no-untyped-def]
    """Piece p of a tile, backwards."""
    _, _, columns, scratch, weights, unread = memory
    for k in range(min((p + 1) * plan.piece, plan.blocks) - 1, p * plan.piece - 1, -1):
        if plan.across:
            columns_map(sources, targets, w, k, c0, co.shape[1], columns, plan, order, weights, unread)
        else:
            rows_map(sources, targets, w, k, c0, co, plan, order, scratch, weights, unread)


@part()
def _lent(memory, x, like, plan):  # type: ignore[no-untyped-def]
    """Matrices in a work item's memory, all of which starts as 0, and how many bytes it takes."""
    width = tile_width(plan.tile, plan)
    gathered = plan.height * plan.length if plan.flags & GATHER else 0
    run = max(plan.length, width if plan.across else 0)
    numbers, at = carved(memory, 0, 11, plan.tile, 0.0)
    sums, at = carved(memory, at, SUMS, width, 0.0)
    columns, at = carved(memory, at, COEFFICIENTS, width if plan.across else 0, 0.0)
    scratch, at = carved(memory, at, 5, gathered, x)
    room = weights_room(width, plan) if plan.across else max(gathered, plan.length)
    weights, at = carved(memory, at, 1, room, like)
    unread, at = carved(memory, at, 1, run if plan.flags & (NO_R | NO_Z) else 0, x)
    return (numbers, sums, columns, scratch, row(weights, 0, room), unread), at


@part(_nrt=True)
def _memory(any_matrix, x, like, plan):  # type: ignore[no-untyped-def]
    """`views.borrowed` says why nothing below a work item may own an array."""
    return np.zeros((1, _lent(any_matrix, x, like, plan)[1] // 8))


@part()
def _second_units(
    u, g, x, r, z, w, order, starts, table, tangents, sizes, part, co, ggamma, claims, few, plan, stage, memory
):  # type: ignore[no-untyped-def]  # fmt: skip
    """What there is for an item to do."""
    keep_whole()
    channels, pieces = table.shape[2], part.shape[0] // sizes.shape[1]
    tiles, split = (channels + plan.tile - 1) // plan.tile, 1 if stage & FINISH else pieces
    work = sizes.shape[1] * tiles * split
    unit = claim(claims, 0)
    while unit < work:
        q, rest = unit // (tiles * split), unit % (tiles * split)
        c0, p = rest // split * plan.tile, rest % split
        p0, p1 = (0, pieces) if stage & FINISH else (p, p + 1)
        g0, g1 = c0, min(c0 + plan.tile, channels)
        n0, count = start_of(order, starts[q]), starts[q + 1] - starts[q]
        sources = outer(u, n0, count), outer(g, n0, count), outer(x, n0, count)
        targets, weights = (outer(r, n0, count), outer(z, n0, count)), outer(w, n0, count)
        own, order_of, numbers = planned(sources[0].shape, plan), listed(order, starts[q], count), place(table, q)
        near, totals = corner(memory[0], 0, 3, g1 - g0), corner(memory[0], 3, SUMS, g1 - g0)
        if stage & SUM:
            _pivots(sources, weights, c0, numbers, near, totals, memory, own, few, order_of)
            for p in range(p0, p1):
                _sums(sources, weights, p, c0, near, totals, memory, own, order_of, place(part, q * pieces + p))
        if stage & FINISH:
            for c in range(g0, g1):
                _coefficients(q, c, table, tangents, sizes, part, co, ggamma, w is not None, pieces, plan)
        if stage & MAP:
            mine = co[q, :, g0:g1]
            if plan.across:
                spread_columns(mine, memory[2], plan)
            for p in range(p1 - 1, p0 - 1, -1):
                _map(sources, targets, weights, p, c0, mine, memory, own, order_of)
        unit = claim(claims, 0)


@compiled
def second_item(
    k, items, u, g, x, r, z, w, order, starts, table, tangents, sizes, part, co, ggamma, claims, few, plan, stage,
    every
):  # type: ignore[no-untyped-def]  # fmt: skip
    """u, g, x, r, z (O, C, I): zeros with steps of 0 where there is none, which isn't written; w (O, 1, I) or None;
    order (O,) or (0,), starts (Q + 1,), table (Q, 6, C), tangents (2, C), sizes (2, Q): count and sum of weights; part
    (Q P, 10, C), co (Q, 11, C), ggamma (Q, C). few: values, or folded rows, that make a pivot."""
    keep_whole()
    if k < 0:
        by_all(every, items, (u, g, x, r, z, w, order, starts, table, tangents, sizes, part, co, ggamma, claims, few,
                              plan, stage, every))  # fmt: skip
        return
    owned = _memory(borrowed(tangents), borrowed(x), weight_of(w), plan)
    memory, _ = _lent(borrowed(owned), borrowed(x), weight_of(w), plan)
    _second_units(
        borrowed(u), borrowed(g), borrowed(x), borrowed(r), borrowed(z), borrowed(w), borrowed(order),
        borrowed(starts), borrowed(table), borrowed(tangents), borrowed(sizes), borrowed(part), borrowed(co),
        borrowed(ggamma), borrowed(claims), few, plan, stage, memory,
    )  # fmt: skip
    fence()
    hold(owned)
