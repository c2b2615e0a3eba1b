"""The same of rows across the channels: column j of a tile of G channels belongs to channel (j // period) % G."""

import numpy as np

from ..formulas import formula
from ..lanes import LANES, before_line, fetch, keep_whole, load, load_part, pointer, save_part, shifted, spread, total
from ..maps import write
from ..parts import part
from ..rows import index
from .runs import NO_R, NO_Z, PAST, SKIP, added, keep, none_of, results

SUMS = 7
ROWS = 8  # that are added in registers


@part()
def tile_width(channels, plan):  # type: ignore[no-untyped-def]
    """Columns or lanes of a tile; a vector may be loaded from any of them on."""
    return channels * (plan[7] * plan[8] if plan[0] else LANES) + (LANES if plan[0] else 0)


@part()
def group_rows(q, starts, plan):  # type: ignore[no-untyped-def]
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
    left = group_rows(q, starts, plan)
    last = (left + plan[8] - 1) // plan[8] - 1
    rows = min(ROWS, r1 - r)
    if r + rows - 1 == last and rows > 1 and left % plan[8]:
        rows -= 1
    return rows, min(plan[8], left - r * plan[8]) * channels * plan[7]


@part()
def _base(a, instead):  # type: ignore[no-untyped-def]
    return pointer(instead, 0) if a.shape[0] == 0 else pointer(a, 0)


@part()
def columns_sums(u, g, x, w, r, z, order, starts, q, k, c0, channels, near, sums, plan, scratch, weights, places, few):  # type: ignore[no-untyped-def]
    """Columns of sums (7, W) += those of block k, or of its first `few` rows; near (3, W) has the pivots by column."""
    keep_whole()
    rows_in_all = (group_rows(q, starts, plan) + plan[8] - 1) // plan[8]
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
            t = none_of(like)
            m = n - j
            if m >= LANES:
                for i in range(rows):
                    ru, rg, rx = shifted(us, places[0, i]), shifted(gs, places[1, i]), shifted(xs, places[2, i])
                    fetch(shifted(ru, skip_u), j)
                    fetch(shifted(rg, skip_g), j)
                    fetch(shifted(rx, skip_x), j)
                    du, dg, dx = load(ru, j, like) - pu, load(rg, j, like) - pg, load(rx, j, like) - hi
                    t = added(t, du, dg, dx, spread(np.float64(weights[i])), w, skip)
            else:
                for i in range(rows):
                    du = load_part(shifted(us, places[0, i]), j, m, pu) - pu
                    dg = load_part(shifted(gs, places[1, i]), j, m, pg) - pg
                    dx = load_part(shifted(xs, places[2, i]), j, m, hi) - hi
                    t = added(t, du, dg, dx, spread(np.float64(weights[i])), w, skip)
            keep(t, w, shifted(all_sums, 8 * j), line)
        first += rows


@formula
def _eleven(co, row, j):  # type: ignore[no-untyped-def]
    """The coefficients of the columns from j on, `row` bytes apart."""
    return tuple(load(shifted(co, i * row), j, spread(0.0)) for i in range(11))


@part()
def _columns_map_row(u, g, x, w, lanes, r, z, n, co, row, flags):  # type: ignore[no-untyped-def]
    like = lanes
    past_r = past_z = False
    j = 0
    if flags & PAST and n >= 8 * LANES:
        j = before_line(z if flags & NO_R else r)
        past_r, past_z = flags & NO_R == 0, flags & NO_Z == 0 and before_line(z) == j
        if j > 0:
            one, two = results(
                load_part(u, 0, j, like), load_part(g, 0, j, like), load_part(x, 0, j, like), lanes, w,
                _eleven(co, row, 0), flags,
            )  # fmt: skip
            save_part(r, 0, j, one)
            save_part(z, 0, j, two)
    while j + LANES <= n:
        one, two = results(load(u, j, like), load(g, j, like), load(x, j, like), lanes, w, _eleven(co, row, j), flags)
        write(r, j, one, past_r)
        write(z, j, two, past_z)
        j += LANES
    if j < n:
        m = n - j
        one, two = results(
            load_part(u, j, m, like), load_part(g, j, m, like), load_part(x, j, m, like), lanes, w,
            _eleven(co, row, j), flags,
        )  # fmt: skip
        save_part(r, j, m, one)
        save_part(z, j, m, two)


@part()
def columns_map(u, g, x, w, r, z, order, starts, q, k, c0, channels, co, plan, scratch, weights, places):  # type: ignore[no-untyped-def]
    """r and z of block k; co (11, W) by column."""
    keep_whole()
    flags = plan[9]
    rows_in_all = (group_rows(q, starts, plan) + plan[8] - 1) // plan[8]
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
def to_columns(values, columns, plan):  # type: ignore[no-untyped-def]
    """columns (M, W) <- values (M, G) by channel, and from the start again."""
    for m in range(values.shape[0]):
        j = 0
        for _ in range(plan[8]):
            for c in range(values.shape[1]):
                for _ in range(plan[7]):
                    columns[m, j] = values[m, c]
                    j += 1


@part()
def to_channels(sums, totals, plan):  # type: ignore[no-untyped-def]
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
