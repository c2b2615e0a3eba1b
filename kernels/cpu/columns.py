"""One block of the columns schedule: rows that run across channels (NHWC, (N, C), and (N, C, I) with I below a vector).

A row of x (O, C, I) is the C channels of one (o, i), or, where I is short and C I are contiguous, the C I elements of
one o; then `period` I elements belong to a channel. Where rows of few channels follow each other without a gap, `fold`
of them are walked as one. So column j belongs to channel (j // period) % C, and everything by channel is spread over
columns before a block, and columns are added up to channels after it.

A tile is some neighbouring channels, a block some rows of it.
"""

import numpy as np
from numba import types

from .activations import absent, is_kept, keeps, loaded, loaded_part, put, put_part
from .cut import ALL, EXACT, PAST
from .formulas import called, formula
from .lanes import LANES, first, joined, keep_whole, spread, total, where_nonzero, wide
from .maps import (
    fetch_all,
    in_double,
    load_parts,
    loads,
    map_at,
    pointers_of,
    rows_of,
    shift_all,
    write,
)
from .memory import (
    before_line,
    blank,
    give,
    load,
    load_own,
    load_part,
    move,
    pointer,
    save,
    save_part,
    shifted,
    spread_at,
)
from .parts import by_type, nothing_of, part, unless_none
from .rows import KEPT, at, index
from .sums import add_sums, load_about, load_parts_about, no_sums, with_first, with_values

# Bytes of a row from which it is stored past the caches alone: its ends are parts of lines. Infer of 100 MB in rows of
# 1 KB took 8.3 ms through the caches and 8.8 past them, of 1536 bytes 8.1 and 6.8.
FULL = 1536
ROWS = 16  # whose sums stay in registers; no more are added in float32 (see `sums.CHAIN`)


@part()
def _rows(shape, plan):  # type: ignore[no-untyped-def]
    """How many rows there are, before they are folded."""
    return shape[0] if plan.period > 1 else shape[0] * shape[2]


@part()
def block_rows(k, shape, plan):  # type: ignore[no-untyped-def]
    """Block k of a tile: folded rows r0 to r1."""
    rows = (_rows(shape, plan) + plan.fold - 1) // plan.fold
    return k * plan.height, min((k + 1) * plan.height, rows)


@part()
def columns_count(k, shape, plan, few):  # type: ignore[no-untyped-def]
    """Values of a channel in block k, or in its first `few` rows."""
    r0, r1 = block_rows(k, shape, plan)
    r1 = min(r1, r0 + few)
    return (min(r1 * plan.fold, _rows(shape, plan)) - r0 * plan.fold) * plan.period


@part()
def _row(a, r, c0, plan, order):  # type: ignore[no-untyped-def]
    """Folded row r of a tile: a pointer, bytes to the next row, and how many rows those bytes hold for."""
    r *= plan.fold
    rows = _rows(a.shape, plan)
    if plan.period > 1 or a.shape[2] == 1:
        place, step, left = index(order, r) * a.strides[0], a.strides[0], _in_step(r, rows, order)
    else:
        o = r // a.shape[2]
        i = r - o * a.shape[2]
        place, step, left = index(order, o) * a.strides[0] + i * a.strides[2], a.strides[2], a.shape[2] - i
        if plan.fold > 1 and order.size == 0:
            left = rows - r  # folded rows are contiguous
    return pointer(a, place + c0 * a.strides[1]), step * plan.fold, (left + plan.fold - 1) // plan.fold


@part()
def _in_step(r, rows, order):  # type: ignore[no-untyped-def]
    """How many outer indices from r on follow each other."""
    if order.size == 0:
        return rows - r
    n = 1
    while n < ROWS and r + n < rows and order[r + n] == order[r] + n:
        n += 1
    return n


@formula
def _later(a, offset):  # type: ignore[no-untyped-def]
    """A pointer, `offset` bytes on, with what goes with it; None of None."""
    if a is None:
        return None
    return (shifted(a[0], offset), a[1]) if isinstance(a, tuple) else shifted(a, offset)


@part()
def many_columns(plan):  # type: ignore[no-untyped-def]
    """Whether a channel has more columns than one, so that weights, too, are by column: of runs, and of folded rows."""
    return plan.period > 1 or plan.fold > 1


@part()
def weights_room(width, plan):  # type: ignore[no-untyped-def]
    """Weights that are laid out at once: of ROWS rows by column, or sixteen alike for each row of a block."""
    return (ROWS * width if many_columns(plan) else max(ROWS, plan.height) * LANES) + LANES


@unless_none(0, lambda *args: None)
def laid_out(w, k, end, start, channels, period, width, order, room):  # type: ignore[no-untyped-def]
    """The weights of rows k to end (not folded) of a set that starts at `start`, one row behind the other.

    By column, or `width` alike for each row. They are contiguous in w, but for outer indices with an order.
    """
    inner, like, target, j = w.shape[2], spread(room[0]), pointer(room, 0), 0
    if period > 1:
        for o in range(k, end):
            source = at(w, index(order, start + o), 0, 0)
            for _ in range(channels):
                for i in range(0, inner, LANES):
                    save(target, j + i, load_part(source, i, inner - i, like))
                j += inner
        return target
    while k < end:
        o = k // inner if order.size > 0 else 0
        i = k - o * inner
        m = min(end - k, inner - i) if order.size > 0 else end - k
        source = shifted(at(w, index(order, start + o), 0, 0), i * w.itemsize)
        for n in range(m):
            lanes = spread_at(source, n, like)
            save(target, j, lanes)
            for c in range(LANES, width, LANES):
                save(target, j + c, lanes)
            j += width
        k += m
    return target


@part()
def weights_of(w, r, rows, shape, channels, plan, order, room):  # type: ignore[no-untyped-def]
    """Those of some folded rows from r on, by column or sixteen alike; and from a row's to the next one's, elements."""
    k, end = r * plan.fold, min((r + rows) * plan.fold, _rows(shape, plan))
    by_column = many_columns(plan)
    width = channels if by_column else np.int64(LANES)
    laid = laid_out(w, k, end, np.int64(0), channels, plan.period, width, order, room)
    return laid, channels * plan.period * plan.fold if by_column else np.int64(LANES)


@unless_none(0, lambda *args: (None, 0, 0))
def _part_of(a, r, c0, plan, order):  # type: ignore[no-untyped-def]
    """As `_row`, of an array that may be None."""
    return _row(a, r, c0, plan, order)


# What lies beside x: a residual, which is as x is; or where x is had back from y, that of the channels of which it was
# kept (`activations.keeps`), in rows of their own. Then a row is a pair, of a pointer and bytes to the next one.


@by_type
def _beside(how, a, r, c0, plan, order):  # type: ignore[no-untyped-def]
    """As `_part_of`."""
    return _beside_kept if keeps(how, a) else _beside_other


def _beside_other(how, a, r, c0, plan, order):  # type: ignore[no-untyped-def]
    return _part_of(a, r, c0, plan, order)


def _beside_kept(how, a, r, c0, plan, order):  # type: ignore[no-untyped-def]
    place, step, left = _row(a, r, np.int64(0), plan, order)
    return (place, step), step, left


@formula
def _places_at(place, j, lenses):  # type: ignore[no-untyped-def]
    """From column j on, where the first kept one stands in a row, and flags for which lanes; None of a residual."""
    if not isinstance(place, tuple):
        return None
    flags, there = (load_own(lenses[KEPT + k], j) for k in range(2))
    return called(_whole, first(there)), flags


@formula
def _beside_at(place, i, row, n, places, like):  # type: ignore[no-untyped-def]
    """n elements, or a vector of them (None), from `place[i]` on, for `bent`: or what is kept in a row."""
    if isinstance(place, tuple):
        there, flags = places
        return shifted(place[0], row * place[1]), there, LANES if n is None else n, flags
    return loaded(place, i, like) if n is None else loaded_part(place, i, n, like)


@part()
def _whole(number):  # type: ignore[no-untyped-def]
    return np.int64(number)


@formula
def _plainly_beside(place, i, like):  # type: ignore[no-untyped-def]
    """The same where nothing is kept of the vector."""
    return None if isinstance(place, tuple) else loaded(place, i, like)


@by_type
def _without(how, place, j, lenses):  # type: ignore[no-untyped-def]
    """How many vectors from column j on have nothing that was kept; 0 where this one does. They may end the row."""
    return _count_without if isinstance(place, types.BaseTuple) else lambda *_: ALL


def _count_without(how, place, j, lenses):  # type: ignore[no-untyped-def]
    return max(0, -np.int64(first(load_own(lenses[KEPT + 1], j))))


@by_type
def find_kept(how, r, lenses, channels, plan):  # type: ignore[no-untyped-def]
    """lenses (5, W) by column, which have the places of channels among those kept, or -1: flags for `bent` instead, and
    from each column on where the first one of a vector stands in a row of what was kept, or how many vectors have none,
    as a negative number."""
    return _find_kept if keeps(how, r) else nothing_of


def _find_kept(how, r, lenses, channels, plan):  # type: ignore[no-untyped-def]
    period, n = plan.period, r.shape[1]
    width, next_one, there = plan.fold * channels * period, np.int64(-1), np.int64(-1)
    for j in range(width + LANES - 1, -1, -1):  # rows follow each other, where a vector has the end of one
        if lenses[KEPT, j] >= 0.0:
            next_one, there = j, (j // (channels * period) * n + np.int64(lenses[KEPT, j])) * period + j % period
        if next_one >= 0 and next_one - j < LANES:
            lenses[KEPT + 1, j] = there
        else:
            lenses[KEPT + 1, j] = min(0.0, lenses[KEPT + 1, j + LANES]) - 1.0 if j + LANES < width else -1.0
        lenses[KEPT, j] += 1.0


@part()
def keep_columns(k, x, kept, lost, j0, j1, plan, order):  # type: ignore[no-untyped-def]
    """As `keep_rows`."""
    r, r1 = block_rows(k, x.shape, plan)
    while r < r1:
        place, step, left = _row(x, r, np.int64(0), plan, order)
        there, step_kept, _ = _row(kept, r, np.int64(0), plan, order)
        step, step_kept, rows = step // plan.fold, step_kept // plan.fold, min(left, r1 - r)
        count = min((r + rows) * plan.fold, _rows(x.shape, plan)) - r * plan.fold
        for j in range(j0, j1):
            for i in range(plan.period):
                source = shifted(place, lost[j] * x.strides[1] + i * x.strides[2])
                target = shifted(there, j * kept.strides[1] + i * kept.strides[2])
                for n in range(count):
                    move(shifted(target, n * step_kept), shifted(source, n * step))
        r += rows


@part()
def width_of(r, shape, channels, plan):  # type: ignore[no-untyped-def]
    """Columns of folded row r: fewer in the last one."""
    return min(plan.fold, _rows(shape, plan) - r * plan.fold) * channels * plan.period


@part()
def some_rows(r, most, channels, shape, plan):  # type: ignore[no-untyped-def]
    """How many folded rows from r on, of `most`, have sums in registers, and how many columns each of them has."""
    rows, n = min(ROWS, most), width_of(r, shape, channels, plan)
    if rows > 1 and width_of(r + rows - 1, shape, channels, plan) != n:
        rows -= 1
    return rows, n


@part()
def _again(row, n, like):  # type: ignore[no-untyped-def]
    """The first columns of n behind the last one: a vector may have the end of a row, and the start of the next."""
    for k in range(0, LANES, n):  # of few columns, again and again
        save_part(row, n + k, LANES - k, load(row, k, like))


@part()
def spread_column(values, columns, plan):  # type: ignore[no-untyped-def]
    """columns (fold G period + 16,) <- values (G,) by channel, and from the start again."""
    period, j, n, like = plan.period, 0, values.size, spread(values[0])
    source, target = pointer(values, 0), pointer(columns, 0)
    for _ in range(plan.fold):
        if period == 1:
            for c in range(0, n, LANES):
                save_part(target, j + c, n - c, load_part(source, c, n - c, like))
            j += n
            continue
        for c in range(n):
            lanes = spread_at(source, c, like)
            for i in range(0, period, LANES):  # what is behind the period is written over
                save(target, j + i, lanes)
            j += period
    _again(target, j, like)


@part()
def start_again(columns):  # type: ignore[no-untyped-def]
    """The first columns of each row behind its last one."""
    for i in range(columns.shape[0]):
        _again(pointer(columns, i * columns.strides[0]), columns.shape[1], spread(columns[i, 0]))


@part()
def spread_columns(values, columns, plan):  # type: ignore[no-untyped-def]
    """columns (M, W) <- values (M, G) by channel."""
    for i in range(values.shape[0]):
        spread_column(values[i], columns[i], plan)


@part()
def gather_columns(sums, totals, plan):  # type: ignore[no-untyped-def]
    """totals (M, G) <- the columns in the rows of sums, added up to channels, and these <- 0."""
    period, n, zero = plan.period, totals.shape[1], spread(0.0)
    if not many_columns(plan):
        for i in range(totals.shape[0]):
            for c in range(0, n, LANES):
                give(totals, i, c, min(LANES, n - c), load(pointer(sums, i * sums.strides[0]), c, zero))
                save(pointer(sums, i * sums.strides[0]), c, zero)
        return
    blank(totals, totals.shape[0])
    for i in range(totals.shape[0]):
        j = 0
        for _ in range(plan.fold):
            if period == 1:
                source, target = pointer(sums, i * sums.strides[0] + 8 * j), pointer(totals, i * totals.strides[0])
                for c in range(0, n, LANES):
                    added = load_part(source, c, n - c, zero) + load_part(target, c, n - c, zero)
                    save_part(target, c, n - c, added)
                j += n
                continue
            for c in range(n):
                added = zero
                for k in range(0, period, LANES):
                    added = added + load_part(pointer(sums, i * sums.strides[0]), j + k, period - k, zero)
                totals[i, c] += total(added)
                j += period
    blank(sums, totals.shape[0])


@part()
def _ahead(a, here, step, r, c0, plan, order):  # type: ignore[no-untyped-def]
    """The rows to fetch while those up to r are summed: the next ones, or the first ones of the next tile."""
    if r * plan.fold < _rows(a.shape, plan) or c0 >= a.shape[1]:
        return here, step
    place, step, _ = _row(a, np.int64(0), c0, plan, order)
    return place, step


@formula
def _ahead_of(sources, here, steps, r, c0, plan, order):  # type: ignore[no-untyped-def]
    """As `_ahead`, of each."""
    rows = [called(_ahead, *own, r, c0, plan, order) for own in zip(sources, here, steps, strict=True)]
    return tuple(zip(*rows, strict=True))


@formula
def _about(near, lenses, j, sources):  # type: ignore[no-untyped-def]
    """From column j on, the pivots of each, and h, a, b of z = a (x - h) + b."""
    pivots = tuple(load_own(p, j) for p in rows_of(near, len(sources)))
    return pivots, None if lenses is None else tuple(load_own(p, j) for p in rows_of(lenses, 3))


@formula
def _rows_of_lenses(lenses):  # type: ignore[no-untyped-def]
    return None if lenses is None else rows_of(lenses, KEPT + 2)  # the last two are there, and read, if `keeps`


@part()
def _add(sources, steps, res, step_r, w, step_w, by_column, rows, n, near, sums, how, lenses, ahead, steps_ahead):  # type: ignore[no-untyped-def]
    """Columns of sums (M, W) float64 += over some rows of n columns, in lanes of the type of near (1 or 2, W).

    Weights w are laid out, step_w elements for a row, `by_column` or not (1, 0).
    """
    i, of_lenses = 0, _rows_of_lenses(lenses)  # what is fetched is so in the order of memory
    for j in range(0, n, LANES):
        pivots, lens = _about(near, lenses, j, sources)
        held, like, k, places = no_sums(pivots), pivots[-1], n - j, _places_at(res, j, of_lenses)
        if j + LANES <= n:
            for r in range(rows):
                fetch_all(ahead, i)
                i += LANES
                if i >= n:
                    ahead, i = shift_all(ahead, steps_ahead, 1), 0
                values = load_about(shift_all(sources, steps, r), j, pivots)
                e = _beside_at(_later(res, r * step_r), j, np.int64(0), None, places, like)
                f = loaded(w, r * step_w + j * by_column, like)
                held = with_values(held, values, e, f, how, pivots, lens)
        else:  # lanes behind the last column belong to none of this tile, but to some of the next one
            for r in range(rows):
                values = load_parts_about(shift_all(sources, steps, r), j, k, pivots)
                e = _beside_at(_later(res, r * step_r), j, np.int64(0), k, places, like)
                f = loaded(w, r * step_w + j * by_column, like)
                held = with_first(held, k, values, e, f, how, pivots, lens)
        add_sums(w, pointer(sums, 8 * j), sums.strides[0], held)


@part()
def columns_sums(sources, res, w, k, c0, channels, near, sums, plan, few, how, lenses, order, room):  # type: ignore[no-untyped-def]
    """Columns of sums (M, W) += those of the channels from c0 on; near has the pivots of each source, by column.

    For all of block k, or for its first `few` rows. lenses (3 or 5, W + 16) have what `bent` takes, by column; weights
    are laid out in `room`.
    """
    keep_whole()
    by_column = np.int64(many_columns(plan))
    shape = sources[0].shape
    r, r1 = block_rows(k, shape, plan)
    r1 = min(r1, r + few)
    while r < r1:
        runs, steps, left = rows_from(sources, r, c0, plan, order)
        run_r, step_r, _ = _beside(how, res, r, c0, plan, order)
        rows, n = some_rows(r, min(left, r1 - r), channels, shape, plan)
        ahead, steps_ahead = _ahead_of(
            sources, shift_all(runs, steps, rows), steps, r + rows, c0 + channels, plan, order
        )
        weights, step_w = weights_of(w, r, rows, shape, channels, plan, order, room)
        _add(
            runs, steps, run_r, step_r, weights, step_w, by_column, rows, n, near, sums, how, lenses, ahead, steps_ahead
        )  # fmt: skip
        r += rows


@by_type
def _mapped(how, values, j, numbers, mode, r, w):  # type: ignore[no-untyped-def]
    """Lanes of y and None, or of dx and of dy f'(z), from column j on; numbers are `pointers_of` those of `maps`."""
    return _in_double if isinstance(numbers[1], types.NoneType) else _fast_or_not


def _in_double(how, values, j, numbers, mode, r, w):  # type: ignore[no-untyped-def]
    return map_at(how, values, j, in_double(numbers), r, w)


def _fast_or_not(how, values, j, numbers, mode, r, w):  # type: ignore[no-untyped-def]
    if mode == EXACT:
        return map_at(how, values, j, in_double(numbers), r, w)
    result, bowed = map_at(how, values, j, numbers, r, w)
    if mode != 0:
        exact, _ = map_at(how, values, j, in_double(numbers), r, w)
        result = where_nonzero(wide(load_own(numbers[1][5], j)), exact, result)
    return result, bowed


@formula
def _weights_from(w, laid, i, row, then, left, like):  # type: ignore[no-untyped-def]
    """Of the elements from i on: `left` of them are in `row`, those behind them in `then`."""
    if w is None:
        return None
    along, step = laid
    return joined(left, load(w, i * along + row * step, like), load(w, i * along + then * step, like))


@part()
def _within(j, row, width):  # type: ignore[no-untyped-def]
    """Column and row of what is in column j of a row, a few rows behind it at most: divisions took a third of the time
    of rows of 64."""
    while j >= width:
        j, row = j - width, row + 1
    return j, row


@formula
def _map_part(sources, target, beside, i, k, row, j, weight, numbers, mode, how, like):  # type: ignore[no-untyped-def]
    """k elements from i on, whose first is in column j of a row."""
    r, _, dr = beside
    values, e = load_parts(sources, i, k, like), _beside_at(r, i, row, k, _places_at(r, j, numbers[2]), like)
    result, bowed = called(_mapped, how, values, j, numbers, mode, e, weight)
    save_part(target, i, k, result)
    put_part(dr, i, k, bowed)


@by_type
def _map_kept(sources, target, r, i, row, j, weight, numbers, mode, past, how, like):  # type: ignore[no-untyped-def]
    """A vector with elements that were kept; there is no residual then, to give a gradient."""
    return _map_some_kept if isinstance(r, types.BaseTuple) else nothing_of


def _map_some_kept(sources, target, r, i, row, j, weight, numbers, mode, past, how, like):  # type: ignore[no-untyped-def]
    e = _beside_at(r, i, row, None, _places_at(r, j, numbers[2]), like)
    result, _ = _mapped(how, loads(sources, i, like), j, numbers, mode, e, weight)
    write(target, i, result, past)


@part()
def _map_run(sources, target, beside, n, width, last, numbers, mode, past, ahead, how, like, laid):  # type: ignore[no-untyped-def]
    """n elements from column 0 on, of rows 0 to `last` of `width` columns without a gap.

    Weights are `laid` out: (1, 0) by column, (0, LANES) by row, whose columns are a vector at least then.
    """
    i, row, (r, w, dr) = 0, 0, beside
    if past:
        i = min(n, before_line(target))
    if i > 0:
        _map_part(sources, target, beside, 0, i, 0, 0, loaded(w, 0, like), numbers, mode, how, like)
    j, row = _within(i, row, width)
    while i + LANES <= n:
        plain = _without(how, r, j, numbers[2])
        for _ in range(min(plain, (width - j + LANES - 1) // LANES, (n - i) // LANES)):
            fetch_all(ahead, i)
            f = _weights_from(w, laid, i, row, min(row + 1, last), width - j, like)
            result, bowed = _mapped(how, loads(sources, i, like), j, numbers, mode, _plainly_beside(r, i, like), f)
            write(target, i, result, past)
            put(dr, i, bowed)
            i, j = i + LANES, j + LANES
        if plain == 0:
            fetch_all(ahead, i)
            f = _weights_from(w, laid, i, row, min(row + 1, last), width - j, like)
            _map_kept(sources, target, r, i, row, j, f, numbers, mode, past, how, like)
            i, j = i + LANES, j + LANES
        j, row = _within(j, row, width)
    if i < n:
        f = _weights_from(w, laid, i, row, min(row + 1, last), width - j, like)
        _map_part(sources, target, beside, i, n - i, row, j, f, numbers, mode, how, like)


@formula
def rows_from(sources, r, c0, plan, order):  # type: ignore[no-untyped-def]
    """As `_row`, of each."""
    places, steps, left = zip(*[called(_row, a, r, c0, plan, order) for a in sources], strict=True)
    return places, steps, left[0]


@part()
def near_rows(channels, plan):  # type: ignore[no-untyped-def]
    """How far ahead rows are fetched where nothing asks for more: 1024 elements and a row."""
    return 1 + 1024 // (channels * plan.period * plan.fold)


@part()
def columns_map(
    sources, target, beside, k, c0, channels, numbers, rare, plan, how, like, order, room, reach
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Block k of the channels from c0 on; `rare`: for how many of them the fast numbers won't do. What lies `reach`
    rows further is fetched meanwhile."""
    keep_whole()
    shape, width, (r, w, dr) = target.shape, channels * plan.period * plan.fold, beside
    r0, r1 = block_rows(k, shape, plan)
    past, mode = plan.flags & PAST != 0, EXACT if plan.flags & EXACT or rare == channels else 1 if rare else 0
    rows, by_column = pointers_of(numbers), many_columns(plan)
    together, most = absent(w) or by_column or width >= LANES, ROWS if by_column and not absent(w) else plan.height
    laid = (np.int64(1), np.int64(0)) if by_column else (np.int64(0), np.int64(LANES))
    while r0 < r1:
        runs, steps, left = rows_from(sources, r0, c0, plan, order)
        run, step, _ = _row(target, r0, c0, plan, order)
        run_r, step_r, _ = _beside(how, r, r0, c0, plan, order)
        run_dr, step_dr, _ = _part_of(dr, r0, c0, plan, order)
        gapless = (
            step == width * target.itemsize
            and (absent(r) or is_kept(how, r) or step_r == step)
            and (absent(dr) or step_dr == step)
        )
        gapless = gapless and steps[0] == width * sources[0].itemsize and steps[-1] == width * sources[-1].itemsize
        count = min(left, r1 - r0)
        at_once = min(count, most) if gapless and together else 1
        lines = past and (at_once > 1 or width * target.itemsize >= FULL)
        for i in range(0, count, at_once):
            last = min(at_once, count - i) - 1
            n = last * width + width_of(r0 + i + last, shape, channels, plan)
            weights, _ = weights_of(w, r0 + i, last + 1, shape, channels, plan, order, room)
            own = _later(run_r, i * step_r), weights, _later(run_dr, i * step_dr)
            _map_run(
                shift_all(runs, steps, i), shifted(run, i * step), own, n, width, last, rows, mode, lines,
                shift_all(runs, steps, i + reach), how, like, laid,
            )  # fmt: skip
        r0 += count
