"""The same of rows across the channels, as `fastbn.kernels.cpu.columns` finds and folds them."""

import numpy as np

from ..activations import loaded
from ..columns import block_rows, many_columns, rows_from, some_rows, weights_of
from ..formulas import formula
from ..lanes import LANES, keep_whole, spread
from ..maps import fetch_all, load_parts, loads, rows_of, shift_all
from ..memory import load_own, pointer
from ..parts import part
from ..sums import load_about, load_parts_about
from .runs import SKIP, added, borders_past, instead, keep, none_of, results, save_parts, write_all


@formula
def _pivots_at(near, j):  # type: ignore[no-untyped-def]
    return tuple(load_own(p, j) for p in rows_of(near, 3))


@formula
def _coefficients_at(co, j):  # type: ignore[no-untyped-def]
    """Those of the columns from j on."""
    return tuple(load_own(p, j) for p in rows_of(co, 11))


@part()
def columns_sums(sources, w, k, c0, channels, near, sums, plan, few, order, room):  # type: ignore[no-untyped-def]
    """Columns of sums (8, W) += those of block k, or of its first `few` rows; near (3, W) has the pivots by column."""
    keep_whole()
    shape, skip, along = sources[0].shape, plan.flags & SKIP != 0, np.int64(many_columns(plan))
    r, end = block_rows(k, shape, plan)
    end = min(end, r + few)
    while r < end:
        runs, steps, left = rows_from(sources, r, c0, plan, order)
        rows, n = some_rows(r, min(left, end - r), channels, shape, plan)
        seen, step_w = weights_of(w, r, rows, shape, channels, plan, order, room)
        for j in range(0, n, LANES):
            pivots = _pivots_at(near, j)
            t, m = none_of(pivots[0]), n - j
            for i in range(rows):
                here, weight = shift_all(runs, steps, i), loaded(seen, i * step_w + j * along, pivots[0])
                if m >= LANES:
                    fetch_all(shift_all(here, steps, rows), j)
                    t = added(t, load_about(here, j, pivots), pivots, weight, skip)
                else:
                    t = added(t, load_parts_about(here, j, m, pivots), pivots, weight, skip)
            keep(t, w, pointer(sums, 8 * j), sums.strides[0])
        r += rows


@part()
def _map_row(sources, w, i, along, targets, n, co, like, flags):  # type: ignore[no-untyped-def]
    j, past = borders_past(targets, n, flags)
    if j > 0:
        both = results(load_parts(sources, 0, j, like), loaded(w, i, like), _coefficients_at(co, 0), flags)
        save_parts(targets, 0, j, both)
    while j + LANES <= n:
        weights = loaded(w, i + j * along, like)
        write_all(targets, j, results(loads(sources, j, like), weights, _coefficients_at(co, j), flags), past)
        j += LANES
    if j < n:
        weights, own = loaded(w, i + j * along, like), _coefficients_at(co, j)
        save_parts(targets, j, n - j, results(load_parts(sources, j, n - j, like), weights, own, flags))


@part()
def columns_map(sources, targets, w, k, c0, channels, co, plan, order, room, unread):  # type: ignore[no-untyped-def]
    """r and z of block k; co (11, W) by column."""
    keep_whole()
    shape, along = sources[0].shape, np.int64(many_columns(plan))
    r, end = block_rows(k, shape, plan)
    while r < end:
        runs, steps, left = rows_from(sources, r, c0, plan, order)
        written, steps_written, _ = rows_from(targets, r, c0, plan, order)
        rows, n = some_rows(r, min(left, end - r), channels, shape, plan)
        seen, step_w = weights_of(w, r, rows, shape, channels, plan, order, room)
        for i in range(rows):  # one behind the other: loads of a row 4 KB on would wait for this one's stores
            own = instead(shift_all(written, steps_written, i), unread, plan.flags)
            _map_row(shift_all(runs, steps, i), seen, i * step_w, along, own, n, co, spread(0.0), plan.flags)
        r += rows
