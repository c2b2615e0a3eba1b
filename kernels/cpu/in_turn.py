"""Rows of a tile mapped in the loop that sums those of the next one: memory reads and writes at once."""

from numba import types

from .activations import fast_numbers, loaded_part, read_as
from .blocks import (
    AHEAD,
    CHAIN,
    add_deviations,
    no_deviations,
    no_products,
    pairs,
    pairs_part,
    pass_on,
    with_deviation,
    with_pair,
    with_part,
    with_products,
)
from .lanes import LANES, before_line, fetch, load_part, narrowest, shifted, spread
from .maps import joined_numbers, lens, map_one, map_part, numbers_of
from .parts import by_type, nothing_of, part, unless_none
from .rows import PAST, at, block, lanes_of, repeated


@unless_none(0, lambda *args: None)
def _weights_of(w, o, i0, n, channels, scratch):  # type: ignore[no-untyped-def]
    """Of a run; as by `repeated` where another one follows it."""
    return repeated(w, o, i0, n, scratch) if channels > 1 else at(w, o, 0, i0)


@part()
def _row_two(
    sources, target, beside, m, n, past, how, numbers, like, row, row_w, runs, count, then, pivot, sums
):  # type: ignore[no-untyped-def]  # fmt: skip
    """y of m elements, runs of n, as `map_runs`, and sums of `runs` runs of other channels as `run_deviations`.

    To the same bits. Memory reads and writes at once, and nothing is read twice into L2: 1.1 copies where one after the
    other takes 1.3 with what comes next fetched meanwhile, and 1.5 without.
    """
    p, c, i, end, near = numbers_of(how, beside, numbers, 0), 0, 0, min(m, n), spread(pivot[0])
    size, line = runs * count, sums.strides[0]
    reach = min(AHEAD, size // (2 * LANES) * 2 * LANES)
    if past:
        i = min(m, before_line(target))
    if i > 0:
        map_part(sources, target, beside, 0, 0, i, how, like, p)
    for k in range(max(runs, (m + n - 1) // n)):
        if k < runs:
            near, lanes, start = spread(pivot[k]), lanes_of(sums, 0, k), k * count
            even = odd = no_deviations(near)
            j, to = start, start + count
            while j < to:
                stop = min(to, j + 2 * CHAIN)
                while j + 2 * LANES <= stop:
                    after = row if j + reach < size else then
                    fetch(after, j + reach)
                    fetch(after, j + reach + LANES)
                    even, odd = with_pair(even, odd, row, j, row_w, j - start, near)
                    j += 2 * LANES
                    if i + 2 * LANES <= end:
                        for _ in range(2):
                            map_one(sources, target, beside, i, i - end + n, past, how, like, p)
                            i += LANES
                while j < stop:
                    weights = loaded_part(row_w, j - start, stop - j, near)
                    even = with_deviation(even, load_part(row, j, stop - j, near) - near, weights)
                    j += LANES
                if j < to:
                    add_deviations(row_w, lanes, line, even, odd)
                    even = odd = no_deviations(near)
            add_deviations(row_w, lanes, line, even, odd)
        while i + LANES <= end:
            map_one(sources, target, beside, i, i - end + n, past, how, like, p)
            i += LANES
        if i + LANES <= m:
            c += 1
            q = numbers_of(how, beside, numbers, c)
            if i < end:
                map_one(sources, target, beside, i, i - end + n, past, how, like, joined_numbers(end - i, p, q))
                i += LANES
            p = q
            end += n
    if i < m:
        map_part(sources, target, beside, i, i - end + n, m - i, how, like, p)


@by_type
def rows_two(x, y, k, c0, pivot, sums, plan, cm, doubles, singles, how, r, w, seen, scratch):  # type: ignore[no-untyped-def]
    """Sums of block k of the channels from c0 on, and y of those from cm on, of the block as far from the last one.

    As by `rows_deviations` with weights w and by `rows_map` with `seen`, backwards; in x's type.
    """
    return _rows_two if (pivot.dtype == types.float64) == (x.dtype == types.float64) else nothing_of


def _rows_two(x, y, k, c0, pivot, sums, plan, cm, doubles, singles, how, r, w, seen, scratch):  # type: ignore[no-untyped-def]
    o0, o1, i0, n = block(k, x.shape, plan)
    a0, a1, j0, m = block(plan[2] - 1 - k, x.shape, plan)
    numbers = doubles, fast_numbers(how, r, seen, singles), None
    like, past = spread(singles[0, 0]), plan[7] & PAST != 0
    g, channels = pivot.size, min(plan[1], x.shape[1] - cm)
    for i in range(max(o1 - o0, a1 - a0)):
        o, a, then = min(o0 + i, o1 - 1), max(a1 - 1 - i, a0), min(o0 + i + 1, x.shape[0] - 1)
        _row_two(
            (at(x, a, cm, j0),), at(y, a, cm, j0),
            (at(r, a, cm, j0), _weights_of(seen, a, j0, m, channels, scratch), None),
            channels * m if i < a1 - a0 else 0, m, past, how, numbers, like, at(x, o, c0, i0),
            at(w, o, 0, i0), g if i < o1 - o0 else 0, n, shifted(at(x, then, c0, i0), -g * n * x.itemsize), pivot,
            sums,
        )  # fmt: skip


@part()
def _gradient_two(
    sources, target, beside, m, n, past, how, numbers, like, row_dy, row_x, row_r, row_w, runs, count, then_dy, then_x,
    pivot, hi, sums, own,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """dx of m elements, runs of n, as `map_runs`, and sums of `runs` others, by the lenses `own`: see `_row_two`.

    2.0 copies where one after the other takes 2.3; with what comes next fetched meanwhile 2.7.
    """
    p, c, i, end, near_dy = numbers_of(how, beside, numbers, 0), 0, 0, min(m, n), spread(pivot[0])
    size = runs * count
    reach = min(AHEAD, size // LANES * LANES)
    if past:
        i = min(m, before_line(target))
    if i > 0:
        map_part(sources, target, beside, 0, 0, i, how, like, p)
    for run in range(max(runs, (m + n - 1) // n)):
        if run < runs:
            near_dy, near_x, bend_of = spread(pivot[run]), spread(hi[run]), lens(own, run)
            held = no_products(near_dy)
            j, start, to = run * count, run * count, (run + 1) * count
            while j < to:
                stop = min(to, j + CHAIN)
                while j < stop:
                    k = min(LANES, stop - j)
                    after_dy, after_x = (row_dy, row_x) if j + reach < size else (then_dy, then_x)
                    fetch(after_dy, j + reach)
                    fetch(after_x, j + reach)
                    if k == LANES:
                        seen = pairs(row_dy, row_x, row_r, j, row_w, j - start, near_dy, near_x)
                        held = with_products(held, how, seen, near_dy, near_x, bend_of)
                    else:
                        seen = pairs_part(row_dy, row_x, row_r, j, row_w, j - start, k, near_dy, near_x)
                        held = with_part(held, k, how, seen, near_dy, near_x, bend_of)
                    j += LANES
                    if i + LANES <= end:
                        map_one(sources, target, beside, i, i - end + n, past, how, like, p)
                        i += LANES
                if j < to:
                    pass_on(lanes_of(sums, 0, run), sums.strides[0], held)
                    held = no_products(near_dy)
            pass_on(lanes_of(sums, 0, run), sums.strides[0], held)
        while i + LANES <= end:
            map_one(sources, target, beside, i, i - end + n, past, how, like, p)
            i += LANES
        if i + LANES <= m:
            c += 1
            q = numbers_of(how, beside, numbers, c)
            if i < end:
                map_one(sources, target, beside, i, i - end + n, past, how, like, joined_numbers(end - i, p, q))
                i += LANES
            p = q
            end += n
    if i < m:
        map_part(sources, target, beside, i, i - end + n, m - i, how, like, p)


@by_type
def rows_products_two(
    dy, x, dx, k, c0, pivot, hi, sums, plan, cm, used, how, r, w, dr, lenses, waiting, scratch
):  # type: ignore[no-untyped-def]  # fmt: skip
    """As `rows_two`: sums of block k of channels c0 and on, by `lenses`, and dx of channels cm and on, by `waiting`."""
    return _rows_products_two if (pivot.dtype == types.float64) == (x.dtype == types.float64) else nothing_of


def _rows_products_two(
    dy, x, dx, k, c0, pivot, hi, sums, plan, cm, used, how, r, w, dr, lenses, waiting, scratch
):  # type: ignore[no-untyped-def]  # fmt: skip
    o0, o1, i0, n = block(k, x.shape, plan)
    a0, a1, j0, m = block(plan[2] - 1 - k, x.shape, plan)
    past, g, channels = plan[7] & PAST != 0, pivot.size, min(plan[1], x.shape[1] - cm)
    numbers, like = (used, used, waiting), read_as(how, r, spread(narrowest(x)), spread(used[0, 0]))
    for i in range(max(o1 - o0, a1 - a0)):
        o, a, then = min(o0 + i, o1 - 1), max(a1 - 1 - i, a0), min(o0 + i + 1, x.shape[0] - 1)
        back = -g * n * x.itemsize
        _gradient_two(
            (at(dy, a, cm, j0), at(x, a, cm, j0)), at(dx, a, cm, j0),
            (at(r, a, cm, j0), _weights_of(w, a, j0, m, channels, scratch), at(dr, a, cm, j0)),
            channels * m if i < a1 - a0 else 0, m, past, how, numbers, like, at(dy, o, c0, i0), at(x, o, c0, i0),
            at(r, o, c0, i0), at(w, o, 0, i0), g if i < o1 - o0 else 0, n, shifted(at(dy, then, c0, i0), back),
            shifted(at(x, then, c0, i0), back), pivot, hi, sums, lenses,
        )  # fmt: skip
