"""The same of rows across the channels: column j of a tile of G channels belongs to channel (j // period) % G."""

import numpy as np

from ..activations import loaded
from ..columns import laid_out
from ..formulas import formula
from ..lanes import LANES, keep_whole, load, load_own, pointer, spread, total
from ..maps import fetch_all, load_parts, loads, rows_of, shift_all
from ..parts import part
from ..rows import index
from ..sums import load_about, load_parts_about
from .runs import SKIP, added, borders_past, keep, none_of, results, runs_of, save_parts, stand_ins, write_all

SUMS = 8
ROWS = 8  # that are added in registers


@part()
def tile_width(channels, plan):  # type: ignore[no-untyped-def]
    """Columns or lanes of a tile; a vector may be loaded from any of them on."""
    return channels * (plan.period * plan.fold if plan.across else LANES) + (LANES if plan.across else 0)


@part()
def group_rows(q, starts, plan):  # type: ignore[no-untyped-def]
    return (starts[q + 1] - starts[q]) * (1 if plan.period > 1 else plan.inner)


@part()
def _place(a, o, i, c0):  # type: ignore[no-untyped-def]
    """Offset in bytes: 0 in an array that isn't there."""
    return 0 if a.shape[0] == 0 else o * a.strides[0] + i * a.strides[2] + c0 * a.strides[1]


@part()
def _find_rows(arrays, q, r0, rows, c0, order, starts, plan, places):  # type: ignore[no-untyped-def]
    """places (5, ROWS) <- offsets of folded rows."""
    inner = 1 if plan.period > 1 else plan.inner
    row = r0 * plan.fold
    o = row // inner
    i = row - o * inner
    for k in range(rows):
        place = index(order, starts[q] + o)
        places[0, k], places[1, k] = _place(arrays[0], place, i, c0), _place(arrays[1], place, i, c0)
        places[2, k], places[3, k] = _place(arrays[2], place, i, c0), _place(arrays[3], place, i, c0)
        places[4, k] = _place(arrays[4], place, i, c0)
        i += plan.fold
        while i >= inner:
            i -= inner
            o += 1


@part()
def _borders(k, q, starts, plan):  # type: ignore[no-untyped-def]
    """Block k of group q: folded rows from one to another."""
    rows = (group_rows(q, starts, plan) + plan.fold - 1) // plan.fold
    return k * plan.height, min((k + 1) * plan.height, rows)


@part()
def _some_rows(q, r, r1, channels, starts, plan):  # type: ignore[no-untyped-def]
    """How many folded rows from r on are of one width, 16 at most, and that width: the last one can be shorter."""
    left = group_rows(q, starts, plan)
    last = (left + plan.fold - 1) // plan.fold - 1
    rows = min(ROWS, r1 - r)
    if r + rows - 1 == last and rows > 1 and left % plan.fold:
        rows -= 1
    return rows, min(plan.fold, left - r * plan.fold) * channels * plan.period


@part()
def _sources_at(bases, places, i):  # type: ignore[no-untyped-def]
    """Row i of u, g and x."""
    return shift_all(bases, (places[0, i], places[1, i], places[2, i]), 1)


@part()
def _targets_at(bases, places, i):  # type: ignore[no-untyped-def]
    return shift_all(bases, (places[3, i], places[4, i]), 1)


@part()
def weights_room(width, plan):  # type: ignore[no-untyped-def]
    """Weights that are laid out at once: of ROWS rows by column, or sixteen alike for each."""
    return ROWS * (width if _by_column(plan) else LANES) + LANES


@part()
def _by_column(plan):  # type: ignore[no-untyped-def]
    return plan.period > 1 or plan.fold > 1


@part()
def _weights_of(w, r, rows, q, channels, order, starts, plan, room):  # type: ignore[no-untyped-def]
    """Those of some folded rows from r on, by column or sixteen alike; elements from a row's to the next one's."""
    k, end = r * plan.fold, min((r + rows) * plan.fold, group_rows(q, starts, plan))
    width = channels if _by_column(plan) else np.int64(LANES)
    weights = laid_out(w, k, end, starts[q], channels, plan.period, width, order, room)
    return weights, channels * plan.period * plan.fold if _by_column(plan) else np.int64(LANES)


@formula
def _pivots_at(near, j):  # type: ignore[no-untyped-def]
    return tuple(load_own(p, j) for p in rows_of(near, 3))


@part()
def columns_sums(arrays, w, order, starts, q, k, c0, channels, near, sums, plan, scratch, weights, places, few):  # type: ignore[no-untyped-def]
    """Columns of sums (8, W) += those of block k, or of its first `few` rows; near (3, W) has the pivots by column."""
    keep_whole()
    r, end = _borders(k, q, starts, plan)
    end, skip = min(end, r + few), plan.flags & SKIP != 0
    by_column, (zeros, _) = np.int64(_by_column(plan)), stand_ins(scratch)
    bases = runs_of(arrays[:3], 0, 0, 0, zeros)
    while r < end:
        rows, n = _some_rows(q, r, end, channels, starts, plan)
        _find_rows(arrays, q, r, rows, c0, order, starts, plan, places)
        seen, step_w = _weights_of(w, r, rows, q, channels, order, starts, plan, weights)
        last = rows - 1  # what is fetched is as far behind a row as this one is behind the first
        steps = places[0, last] - places[0, 0], places[1, last] - places[1, 0], places[2, last] - places[2, 0]
        for j in range(0, n, LANES):
            pivots = _pivots_at(near, j)
            t, m = none_of(pivots[0]), n - j
            for i in range(rows):
                sources = _sources_at(bases, places, i)
                weight = loaded(seen, i * step_w + j * by_column, pivots[0])
                if m >= LANES:
                    fetch_all(shift_all(sources, steps, 1), j)
                    t = added(t, load_about(sources, j, pivots), pivots, weight, skip)
                else:
                    t = added(t, load_parts_about(sources, j, m, pivots), pivots, weight, skip)
            keep(t, w, pointer(sums, 8 * j), sums.strides[0])
        r += rows


@formula
def _eleven(co, j):  # type: ignore[no-untyped-def]
    """The coefficients of the columns from j on."""
    return tuple(load_own(p, j) for p in rows_of(co, 11))


@part()
def _map_row(sources, w, i, by_column, targets, n, co, like, flags):  # type: ignore[no-untyped-def]
    j, past = borders_past(targets, n, flags)
    if j > 0:
        both = results(load_parts(sources, 0, j, like), loaded(w, i, like), _eleven(co, 0), flags)
        save_parts(targets, 0, j, both)
    while j + LANES <= n:
        weights = loaded(w, i + j * by_column, like)
        write_all(targets, j, results(loads(sources, j, like), weights, _eleven(co, j), flags), past)
        j += LANES
    if j < n:
        weights = loaded(w, i + j * by_column, like)
        save_parts(targets, j, n - j, results(load_parts(sources, j, n - j, like), weights, _eleven(co, j), flags))


@part()
def columns_map(arrays, w, order, starts, q, k, c0, channels, co, plan, scratch, weights, places):  # type: ignore[no-untyped-def]
    """r and z of block k; co (11, W) by column."""
    keep_whole()
    r, end = _borders(k, q, starts, plan)
    by_column, (zeros, unread) = np.int64(_by_column(plan)), stand_ins(scratch)
    bases, all_targets = runs_of(arrays[:3], 0, 0, 0, zeros), runs_of(arrays[3:], 0, 0, 0, unread)
    while r < end:
        rows, n = _some_rows(q, r, end, channels, starts, plan)
        _find_rows(arrays, q, r, rows, c0, order, starts, plan, places)
        seen, step_w = _weights_of(w, r, rows, q, channels, order, starts, plan, weights)
        for i in range(rows):  # one behind the other: loads of a row 4 KB on would wait for this one's stores
            sources, targets = _sources_at(bases, places, i), _targets_at(all_targets, places, i)
            _map_row(sources, seen, i * step_w, by_column, targets, n, co, spread(0.0), plan.flags)
        r += rows


@part()
def to_columns(values, columns, plan):  # type: ignore[no-untyped-def]
    """columns (M, W) <- values (M, G) by channel, and from the start again."""
    for m in range(values.shape[0]):
        j = 0
        for _ in range(plan.fold):
            for c in range(values.shape[1]):
                for _ in range(plan.period):
                    columns[m, j] = values[m, c]
                    j += 1


@part()
def to_channels(sums, totals, plan):  # type: ignore[no-untyped-def]
    """totals (8, G) <- the columns or lanes of sums, added up, and these <- 0."""
    if plan.across == 0:
        like = spread(0.0)
        for m in range(SUMS):
            for c in range(totals.shape[1]):
                totals[m, c] = total(load(pointer(sums, m * sums.strides[0] + 8 * LANES * c), 0, like))
        sums[:] = 0.0
        return
    totals[:] = 0.0
    for m in range(SUMS):
        j = 0
        for _ in range(plan.fold):
            for c in range(totals.shape[1]):
                for _ in range(plan.period):
                    totals[m, c] += sums[m, j]
                    j += 1
    sums[:] = 0.0
