"""One block of the columns schedule: rows that run across channels (NHWC, (N, C), and (N, C, I) with I below a vector).

A row of x (O, C, I) is the C channels of one (o, i), or, where I is short and C I are contiguous, the C I elements of
one o; then `period` I elements belong to a channel. Where rows of few channels follow each other without a gap, `fold`
of them are walked as one. So column j belongs to channel (j // period) % C, and everything by channel is spread over
columns before a block, and columns are added up to channels after it.

A tile is some neighbouring channels, a block some rows of it.
"""

import numpy as np

from .activations import (
    absent,
    bend,
    bent,
    counted,
    fast_numbers,
    finished,
    in_singles,
    line,
    loaded,
    loaded_part,
    put,
    put_part,
    read_as,
)
from .blocks import (
    add_deviations,
    later,
    no_deviations,
    no_products,
    pass_on,
    through,
    with_deviation,
    with_part,
    with_products,
    write,
)
from .formulas import formula
from .lanes import (
    LANES,
    before_line,
    blank,
    fetch,
    fma,
    give,
    joined,
    keep_whole,
    load,
    load_own,
    load_part,
    narrowest,
    nothing,
    pointer,
    save,
    save_part,
    shifted,
    spread,
    spread_at,
    where_nonzero,
    wide,
)
from .parts import part, unless_none
from .rows import EXACT, PAST, index

FULL = 1024  # columns of a row from which it is stored past the caches alone: its ends are parts of lines
ROWS = 16  # whose sums stay in registers; no more are added in float32 (see `blocks.CHAIN`)


@part()
def _rows(shape, plan):  # type: ignore[no-untyped-def]
    """How many rows there are, before they are folded."""
    return shape[0] if plan[5] > 1 else shape[0] * shape[2]


@part()
def _borders(k, shape, plan):  # type: ignore[no-untyped-def]
    """Block k of a tile: folded rows r0 to r1."""
    rows = (_rows(shape, plan) + plan[6] - 1) // plan[6]
    return k * plan[4], min((k + 1) * plan[4], rows)


@part()
def columns_count(k, shape, plan, few):  # type: ignore[no-untyped-def]
    """Values of a channel in block k, or in its first `few` rows."""
    r0, r1 = _borders(k, shape, plan)
    r1 = min(r1, r0 + few)
    return (min(r1 * plan[6], _rows(shape, plan)) - r0 * plan[6]) * plan[5]


@part()
def _row(a, r, c0, plan, order):  # type: ignore[no-untyped-def]
    """Folded row r of a tile: a pointer, bytes to the next row, and how many rows those bytes hold for."""
    r *= plan[6]
    rows = _rows(a.shape, plan)
    if plan[5] > 1 or a.shape[2] == 1:
        place, step, left = index(order, r) * a.strides[0], a.strides[0], _in_step(r, rows, order)
    else:
        o = r // a.shape[2]
        i = r - o * a.shape[2]
        place, step, left = index(order, o) * a.strides[0] + i * a.strides[2], a.strides[2], a.shape[2] - i
        if plan[6] > 1:
            left = rows - r  # folded rows are contiguous
    return pointer(a, place + c0 * a.strides[1]), step * plan[6], (left + plan[6] - 1) // plan[6]


@part()
def _in_step(r, rows, order):  # type: ignore[no-untyped-def]
    """How many outer indices from r on follow each other."""
    if order.size == 0:
        return rows - r
    n = 1
    while n < ROWS and r + n < rows and order[r + n] == order[r] + n:
        n += 1
    return n


@unless_none(0, lambda *args: (None, 0))
def _weight(w, r, plan, order):  # type: ignore[no-untyped-def]
    """A pointer to the weight of row r, and bytes to that of the next one."""
    place, step, _ = _row(w, r, np.int64(0), plan, order)
    return place, step


@formula
def _weight_at(w, step, r, like):  # type: ignore[no-untyped-def]
    """The weight of row r from there on, in all lanes."""
    return None if w is None else spread_at(shifted(w, r * step), 0, like)


@unless_none(0, lambda *args: (None, 0, 0))
def _part_of(a, r, c0, plan, order):  # type: ignore[no-untyped-def]
    """As `_row`, of an array that may be None."""
    return _row(a, r, c0, plan, order)


@part()
def _width(r, shape, channels, plan):  # type: ignore[no-untyped-def]
    """Columns of folded row r: fewer in the last one."""
    return min(plan[6], _rows(shape, plan) - r * plan[6]) * channels * plan[5]


@part()
def spread_column(values, columns, plan):  # type: ignore[no-untyped-def]
    """columns (fold G period + 16,) <- values (G,) by channel, and from the start again."""
    period, j, n, like = plan[5], 0, values.size, spread(values[0])
    for _ in range(plan[6]):
        if period == 1:
            source, target = pointer(values, 0), pointer(columns, j * columns.itemsize)
            for c in range(0, n, LANES):
                save_part(target, c, n - c, load_part(source, c, n - c, like))
            j += n
            continue
        for c in range(n):
            for _ in range(period):
                columns[j] = values[c]
                j += 1
    for i in range(LANES):
        columns[j + i] = columns[i]


@part()
def spread_columns(values, columns, plan):  # type: ignore[no-untyped-def]
    """columns (M, W) <- values (M, G) by channel."""
    for i in range(values.shape[0]):
        spread_column(values[i], columns[i], plan)


@part()
def gather_columns(sums, totals, plan):  # type: ignore[no-untyped-def]
    """totals (M, G) <- the columns in the rows of sums, added up to channels, and these <- 0."""
    period, n, zero = plan[5], totals.shape[1], spread(0.0)
    if period == 1 and plan[6] == 1:
        for i in range(totals.shape[0]):
            for c in range(0, n, LANES):
                give(totals, i, c, min(LANES, n - c), load(pointer(sums, i * sums.strides[0]), c, zero))
                save(pointer(sums, i * sums.strides[0]), c, zero)
        return
    blank(totals, totals.shape[0])
    for i in range(totals.shape[0]):
        j = 0
        for _ in range(plan[6]):
            if period == 1:
                source, target = pointer(sums, i * sums.strides[0] + 8 * j), pointer(totals, i * totals.strides[0])
                for c in range(0, n, LANES):
                    added = load_part(source, c, n - c, zero) + load_part(target, c, n - c, zero)
                    save_part(target, c, n - c, added)
                    save_part(source, c, n - c, zero)
                j += n
                continue
            for c in range(n):
                for _ in range(period):
                    totals[i, c] += sums[i, j]
                    sums[i, j] = 0.0
                    j += 1


@part()
def _ahead(a, here, step, r, c0, plan, order):  # type: ignore[no-untyped-def]
    """The rows to fetch while those up to r are summed: the next ones, or the first ones of the next tile."""
    if r * plan[6] < _rows(a.shape, plan) or c0 >= a.shape[1]:
        return here, step
    place, step, _ = _row(a, np.int64(0), c0, plan, order)
    return place, step


@formula
def _within_tile(f, k):  # type: ignore[no-untyped-def]
    """Weights of the first k lanes; those behind belong to no column of this tile, but to some of the next one."""
    return None if f is None else joined(k, f, nothing(f))


@part()
def _add_deviations(x, step, rows, n, near, sums, w, step_w, ahead, step_ahead):  # type: ignore[no-untyped-def]
    """Columns of sums (2, W) float64 += over some rows of n columns, in lanes of the type of near (W,).

    By weights, if there are some: sums has a third row then, for them.
    """
    like, none = spread(near[0]), no_deviations(spread(near[0]))
    i = 0  # what is fetched is so in the order of memory
    for j in range(0, n, LANES):
        h, held = load(pointer(near, 0), j, like), none
        if j + LANES <= n:
            for r in range(rows):
                fetch(ahead, i)
                i += LANES
                if i >= n:
                    ahead, i = shifted(ahead, step_ahead), 0
                d = load(shifted(x, r * step), j, like) - h
                held = with_deviation(held, d, _weight_at(w, step_w, r, like))
        else:
            for r in range(rows):
                d = load_part(shifted(x, r * step), j, n - j, h) - h
                held = with_deviation(held, d, _within_tile(_weight_at(w, step_w, r, like), n - j))
        add_deviations(w, pointer(sums, 8 * j), sums.strides[0], held, none)


@part()
def columns_deviations(x, k, c0, channels, near, sums, plan, few, w, order):  # type: ignore[no-untyped-def]
    """Columns of sums (2, W) += x - pivot and its square, for the channels from c0 on; near (1, W) has the pivots.

    For all of block k, or for its first `few` rows. With weights w sums has a third row, for them.
    """
    keep_whole()
    r, r1 = _borders(k, x.shape, plan)
    r1 = min(r1, r + few)
    while r < r1:
        place, step, left = _row(x, r, c0, plan, order)
        n = _width(r, x.shape, channels, plan)
        rows = min(ROWS, left, r1 - r)
        if rows > 1 and _width(r + rows - 1, x.shape, channels, plan) != n:
            rows -= 1
        weight, step_w = _weight(w, r, plan, order)
        ahead, step_ahead = _ahead(x, shifted(place, rows * step), step, r + rows, c0 + channels, plan, order)
        _add_deviations(place, step, rows, n, near[0], sums, weight, step_w, ahead, step_ahead)
        r += rows


@part()
def _add_products(
    dy, x, step_dy, step_x, rows, n, near_dy, near_x, sums, how, r0, step_r, w, step_w, lenses, ahead_dy, ahead_x, steps
):  # type: ignore[no-untyped-def]  # fmt: skip
    like = spread(near_dy[0])
    i = 0
    for j in range(0, n, LANES):
        gh, dh, z = load(pointer(near_dy, 0), j, like), load(pointer(near_x, 0), j, like), _lens(lenses, j)
        held, k = no_products(like), n - j
        if j + LANES <= n:
            for r in range(rows):
                fetch(ahead_dy, i)
                fetch(ahead_x, i)
                i += LANES
                if i >= n:
                    ahead_dy, ahead_x, i = shifted(ahead_dy, steps[0]), shifted(ahead_x, steps[1]), 0
                m, e = _weight_at(w, step_w, r, like), loaded(later(r0, r * step_r), j, like)
                seen = load(shifted(dy, r * step_dy), j, like), load(shifted(x, r * step_x), j, like), e, m
                held = with_products(held, how, seen, gh, dh, z)
        else:
            for r in range(rows):
                m, e = _weight_at(w, step_w, r, like), loaded_part(later(r0, r * step_r), j, k, like)
                dys, xs = load_part(shifted(dy, r * step_dy), j, k, gh), load_part(shifted(x, r * step_x), j, k, dh)
                held = with_part(held, k, how, (dys, xs, e, m), gh, dh, z)
        pass_on(pointer(sums, 8 * j), sums.strides[0], held)


def _pointers(n):  # type: ignore[no-untyped-def]
    """A formula: to the first n rows of a matrix; None of None."""

    @formula
    def pointers(numbers):  # type: ignore[no-untyped-def]
        return None if numbers is None else tuple(pointer(numbers, i * numbers.strides[0]) for i in range(n))

    return pointers


_three, _five, _six, _eight = (_pointers(n) for n in (3, 5, 6, 8))


@formula
def _lens(lenses, j):  # type: ignore[no-untyped-def]
    """h, a, b of z = a (x - h) + b, from column j on."""
    return tuple(load_own(p, j) for p in _three(lenses))


@part()
def columns_products(dy, x, k, c0, channels, near, sums, plan, few, how, res, w, order, lenses):  # type: ignore[no-untyped-def]
    """Columns of sums (5, W) += g = dy - pivot, d = x - hi, g d, g^2 and d^4; near (2, W) has pivots and his.

    lenses (3, W + 16) has what `bent` takes, by column.
    """
    keep_whole()
    r, r1 = _borders(k, x.shape, plan)
    r1 = min(r1, r + few)
    while r < r1:
        run_dy, step_dy, left = _row(dy, r, c0, plan, order)
        run_x, step_x, _ = _row(x, r, c0, plan, order)
        run_r, step_r, _ = _part_of(res, r, c0, plan, order)
        weight, step_w = _weight(w, r, plan, order)
        n = _width(r, x.shape, channels, plan)
        rows = min(ROWS, left, r1 - r)
        if rows > 1 and _width(r + rows - 1, x.shape, channels, plan) != n:
            rows -= 1
        end, c1 = r + rows, c0 + channels
        ahead_dy, ahead_step = _ahead(dy, shifted(run_dy, rows * step_dy), step_dy, end, c1, plan, order)
        ahead_x, ahead_step_x = _ahead(x, shifted(run_x, rows * step_x), step_x, end, c1, plan, order)
        _add_products(
            run_dy, run_x, step_dy, step_x, rows, n, near[0], near[1], sums, how, run_r, step_r, weight, step_w, lenses,
            ahead_dy, ahead_x, (ahead_step, ahead_step_x),
        )  # fmt: skip
        r += rows


@formula
def _double(v, j, doubles):  # type: ignore[no-untyped-def]
    """Lanes of a (x - h) + b in float64."""
    h, a, b = (load_own(p, j) for p in doubles)
    return fma(wide(v) - h, a, b)


@unless_none(4, lambda how, v, j, doubles, fast, mode, r, w: _normalized_with(how, v, j, doubles, r, w))
def _normalized(how, v, j, doubles, fast, mode, r, w):  # type: ignore[no-untyped-def]
    """Lanes of y for lanes v of x from column j on."""
    if mode == EXACT:
        return _normalized_with(how, v, j, doubles, r, w)
    z = _through(how, v, j, fast)
    if mode == 0:
        return wide(bend(how, z))
    return _one_or_other(how, v, j, doubles, fast, z, r, w)


@formula
def _through(how, v, j, fast):  # type: ignore[no-untyped-def]
    return through(how, v, *(load_own(p, j) for p in fast[:5]))


@formula
def _one_or_other(how, v, j, doubles, fast, z, r, w):  # type: ignore[no-untyped-def]
    """z, or in float64 where the fast numbers won't do."""
    return wide(finished(how, where_nonzero(wide(load(fast[5], j, v)), _double(v, j, doubles), wide(z)), v, r, w))


@formula
def _normalized_with(how, v, j, doubles, r, w):  # type: ignore[no-untyped-def]
    """In float64."""
    return wide(finished(how, _double(v, j, doubles), v, r, w))


@formula
def _weights_from(w, step, row, then, left, like):  # type: ignore[no-untyped-def]
    """The weight of a row in the first `left` lanes, that of row `then` in those behind them."""
    return None if w is None else joined(left, _weight_at(w, step, row, like), _weight_at(w, step, then, like))


@part()
def _within(j, width):  # type: ignore[no-untyped-def]
    """j % width, where it is a few rows at most: divisions took a third of the time of rows of 64."""
    while j >= width:
        j -= width
    return j


@part()
def _normalize_run(x, y, n, width, last, like, doubles, fast, mode, past, ahead, how, r, w, step_w):  # type: ignore[no-untyped-def]
    """n elements from column 0 on, of rows 0 to `last` of `width` columns without a gap; with weights, of a vector at
    least."""
    i, row = 0, 0
    if past:
        i = min(n, before_line(y))
    if i > 0:
        v, f = load_part(x, 0, i, like), _weight_at(w, step_w, 0, like)
        save_part(y, 0, i, _normalized(how, v, np.int64(0), doubles, fast, mode, loaded_part(r, 0, i, like), f))
    j = _within(i, width)
    while i + LANES <= n:
        for _ in range(min((width - j + LANES - 1) // LANES, (n - i) // LANES)):
            fetch(ahead, i)
            f = _weights_from(w, step_w, row, min(row + 1, last), width - j, like)
            v = _normalized(how, load(x, i, like), j, doubles, fast, mode, loaded(r, i, like), f)
            write(y, i, v, past)
            i, j = i + LANES, j + LANES
        if j >= width:
            j, row = _within(j, width), row + 1
    if i < n:
        v, k, f = (
            load_part(x, i, n - i, like),
            n - i,
            _weights_from(w, step_w, row, min(row + 1, last), width - j, like),
        )
        save_part(y, i, k, _normalized(how, v, j, doubles, fast, mode, loaded_part(r, i, k, like), f))


@part()
def columns_normalize(x, y, k, c0, channels, doubles, singles, rare, plan, how, res, w, order):  # type: ignore[no-untyped-def]
    """y of block k of the channels from c0 on; doubles (3, W + 16) and singles (6, W + 16) by column."""
    keep_whole()
    r0, r1 = _borders(k, x.shape, plan)
    like = spread(singles[0, 0])
    past = plan[7] & PAST != 0
    mode = EXACT if plan[7] & EXACT else 1 if rare else 0
    d = _three(doubles)
    f = _six(fast_numbers(how, res, w, singles))
    width = channels * plan[5] * plan[6]
    reach = 1 + 1024 // width  # rows that are fetched ahead
    while r0 < r1:
        run, sx, left = _row(x, r0, c0, plan, order)
        target, sy, _ = _row(y, r0, c0, plan, order)
        run_r, sr, _ = _part_of(res, r0, c0, plan, order)
        weight, sw = _weight(w, r0, plan, order)
        gapless = sx == width * x.itemsize and sy == width * y.itemsize and (sr == sy or sr == 0)
        rows = min(left, r1 - r0)
        at_once = rows if gapless and (absent(w) or width >= LANES) else 1
        for i in range(0, rows, at_once):
            n = (at_once - 1) * width + _width(r0 + i + at_once - 1, x.shape, channels, plan)
            _normalize_run(
                shifted(run, i * sx), shifted(target, i * sy), n, width, at_once - 1, like, d, f, mode,
                past and (at_once > 1 or width >= FULL), shifted(run, (i + reach) * sx), how, later(run_r, i * sr),
                later(weight, i * sw), sw,
            )  # fmt: skip
        r0 += rows


@part()
def _slope(how, g, v, j, doubles, used, mode, lenses, r, w):  # type: ignore[no-untyped-def]
    """Lanes of dx for lanes g of dy and v of x from column j on, and of dy f'(z)."""
    bowed, d = _bowed(how, g, v, j, lenses, r, w)
    if mode == EXACT:
        return _line(how, g, bowed, d, j, doubles, w), bowed
    s = _fast_line(how, g, bowed, d, j, used, r, w)
    if mode != 0:
        s = where_nonzero(wide(load_own(used[5], j)), _line(how, g, bowed, d, j, doubles, w), s)
    return s, bowed


@formula
def _bowed(how, g, v, j, lenses, r, w):  # type: ignore[no-untyped-def]
    bowed, d = bent(how, g, v, *(load_own(p, j) for p in lenses), r)
    return counted(how, bowed, w), d


@formula
def _line(how, g, bowed, d, j, numbers, w):  # type: ignore[no-untyped-def]
    return wide(line(how, g, bowed, d, tuple(load_own(p, j) for p in numbers), w))


@formula
def _fast_line(how, g, bowed, d, j, used, r, w):  # type: ignore[no-untyped-def]
    rows = (0, 1, 2, 3, 4, 6, 7) if in_singles(how, r, w, used[0]) else range(5)
    return _line(how, g, bowed, d, j, [used[i] for i in rows], w)


@part()
def _gradient_run(
    dy, x, dx, n, width, last, like, doubles, used, mode, past, ahead_dy, ahead_x, how, r, w, step_w, dr, lenses
):  # type: ignore[no-untyped-def]  # fmt: skip
    """n elements from column 0 on, of rows 0 to `last` of `width` columns without a gap; with weights, of a vector at
    least."""
    i, row = 0, 0
    if past:
        i = min(n, before_line(dx))
    if i > 0:
        g, v, f = load_part(dy, 0, i, like), load_part(x, 0, i, like), _weight_at(w, step_w, 0, like)
        s, b = _slope(how, g, v, np.int64(0), doubles, used, mode, lenses, loaded_part(r, 0, i, like), f)
        save_part(dx, 0, i, s)
        put_part(dr, 0, i, b)
    j = _within(i, width)
    while i + LANES <= n:
        for _ in range(min((width - j + LANES - 1) // LANES, (n - i) // LANES)):
            fetch(ahead_dy, i)
            fetch(ahead_x, i)
            g, v, f = (
                load(dy, i, like),
                load(x, i, like),
                _weights_from(w, step_w, row, min(row + 1, last), width - j, like),
            )
            s, b = _slope(how, g, v, j, doubles, used, mode, lenses, loaded(r, i, like), f)
            write(dx, i, s, past)
            put(dr, i, b)
            i, j = i + LANES, j + LANES
        if j >= width:
            j, row = _within(j, width), row + 1
    if i < n:
        k, f = n - i, _weights_from(w, step_w, row, min(row + 1, last), width - j, like)
        g, v = load_part(dy, i, k, like), load_part(x, i, k, like)
        s, b = _slope(how, g, v, j, doubles, used, mode, lenses, loaded_part(r, i, k, like), f)
        save_part(dx, i, k, s)
        put_part(dr, i, k, b)


@part()
def columns_gradient(
    dy, x, dx, k, c0, channels, doubles, used, rare, plan, how, res, w, dr, order, lenses
):  # type: ignore[no-untyped-def]  # fmt: skip
    """dx of block k of the channels from c0 on; doubles (5, W + 16) and used (8, W + 16) by column."""
    keep_whole()
    r0, r1 = _borders(k, x.shape, plan)
    like = read_as(how, res, spread(narrowest(x)), spread(used[0, 0]))
    d, f, mode = _five(doubles), _eight(used), 0 if rare == 0 else 1 if rare < channels else EXACT
    z = _three(lenses)
    past, width = plan[7] & PAST != 0, channels * plan[5] * plan[6]
    together = absent(w) or width >= LANES
    reach = 1 + 1024 // width
    while r0 < r1:
        run_dy, step_dy, left = _row(dy, r0, c0, plan, order)
        run_x, step_x, _ = _row(x, r0, c0, plan, order)
        target, step_dx, _ = _row(dx, r0, c0, plan, order)
        run_r, step_r, _ = _part_of(res, r0, c0, plan, order)
        run_dr, step_dr, _ = _part_of(dr, r0, c0, plan, order)
        weight, step_w = _weight(w, r0, plan, order)
        step = width * x.itemsize
        gapless = step_dy == step_x == step_dx == step and step_r in (0, step) and step_dr in (0, step)
        rows = min(left, r1 - r0)
        at_once = rows if gapless and together else 1
        for i in range(0, rows, at_once):
            n = (at_once - 1) * width + _width(r0 + i + at_once - 1, x.shape, channels, plan)
            _gradient_run(
                shifted(run_dy, i * step_dy), shifted(run_x, i * step_x), shifted(target, i * step_dx), n, width,
                at_once - 1, like, d, f, mode, past and (at_once > 1 or width >= FULL),
                shifted(run_dy, (i + reach) * step_dy), shifted(run_x, (i + reach) * step_x), how,
                later(run_r, i * step_r), later(weight, i * step_w), step_w, later(run_dr, i * step_dr), z,
            )  # fmt: skip
        r0 += rows
