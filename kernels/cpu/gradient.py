"""The backward kernel: sums of a tile, what they make of a channel, the map."""

import numpy as np

from .activations import absent, is_frozen, is_plain, keeps, read_as, residual_of, used_of
from .blocks import joined_comoments, settle
from .coefficients import backward_coefficients, columns_of, lenses_of, make_invertible
from .columns import columns_map, find_kept, many_columns, near_rows, spread_column, spread_columns, start_again
from .compile import compiled
from .cut import ALL, EXACT, TWO
from .formulas import called, formula, full
from .in_turn import rows_two
from .items import by_all, fence
from .lanes import LANES, count_nonzero, keep_whole, nothing, spread, where_at_most, where_less, where_nonzero
from .memory import blank, choose_rows, four_of, give, give_rows, narrowest, some_of, take
from .parts import by_type, nothing_of, part
from .rows import KEPT, rows_map
from .schedule import (
    DOUBLE,
    FINISH,
    MAP,
    SINGLE,
    SUM,
    add_block,
    adopt,
    any_lost,
    borders,
    by_channel,
    claimed,
    count_of,
    divide,
    few_in_double,
    few_of,
    first_from,
    lent,
    listed,
    mass_or,
    mean_of,
    memory_of,
    near_enough,
    part_sizes,
    planned,
    share_of,
    start_of,
    tile_width,
)
from .views import borrowed, columns_from, corner, hold, moved, outer, place, rest, row

IN_DOUBLE = 4  # sums of products, in float64: d^4 is for what float32 can't do


@formula
def _lens_rows(how, r):  # type: ignore[no-untyped-def]
    return KEPT + 2 if keeps(how, r) else KEPT


@formula
def _residual_or_kept(r, kept):  # type: ignore[no-untyped-def]
    """What backward needs beside x: a residual, or where x is had back from y, x that was kept (`keeps`). Of borrowed
    ones: Numba takes what a formula gives for a reference of its own, and would free it."""
    return r if kept is None else kept


@formula
def _beside_tile(how, r, lost, c0):  # type: ignore[no-untyped-def]
    """r, and where it is what was kept, from the tile's first channel of it on."""
    return moved(r, called(first_from, lost, c0) * r.strides[1]) if keeps(how, r) else r


@by_type
def _say_kept(how, r, lost, c0, lenses):  # type: ignore[no-untyped-def]
    """lenses (5, G): which of the tile's channels whose x is kept a channel is, or -1.

    Of the tile's: among all of them it may be a number that float32 hasn't.
    """
    return _which_are_kept if keeps(how, r) else nothing_of


def _which_are_kept(how, r, lost, c0, lenses):  # type: ignore[no-untyped-def]
    start, stop = first_from(lost, c0), first_from(lost, c0 + lenses.shape[1])
    for c in range(lenses.shape[1]):
        lenses[KEPT, c] = -1.0
    for j in range(start, stop):
        lenses[KEPT, lost[j] - c0] = j - start


@part()
def _backward_sum(p, c0, dy, x, table, part, plan, memory, how, r, w, order, cm, dx, dr):  # type: ignore[no-untyped-def]
    """part (P, 5, G) of piece p of a tile: count, mean of dy as hi and lo, mean of x - hi, co-moment; meanwhile channel
    cm is mapped, if >= 0 (`rows_two`)."""
    k0, k1 = p * plan.piece, min((p + 1) * plan.piece, plan.blocks)
    g = min(plan.tile, x.shape[1] - c0)
    numbers, all_sums, near64, singles, near, scratch = memory
    room = scratch[2][0]
    totals, sums = corner(numbers, 5, 5, g), corner(all_sums, 0, 5, tile_width(g, plan))
    pivot, hi = row(singles, 0, g), row(singles, 1, g)
    lenses = corner(numbers, 10, _lens_rows(how, r), g), columns_of(how, r, rest(near64, 5), rest(near, 8))
    both, beside, used = (dy, x), (residual_of(how, r), w, dr), used_of(how, r, x, numbers, rest(singles, 2))
    waiting, like = (numbers, used, rest(numbers, 20)), read_as(how, r, spread(narrowest(x)), spread(used[0, 0]))
    mine = place(part, p)
    if k0 >= k1:
        part[p] = 0.0
        return
    again = plan.flags & EXACT != 0
    if not again:
        few = few_of(x.shape, plan)
        for c in range(0, g, LANES):
            some = min(LANES, g - c)
            give(hi, 0, c, some, take(table, 0, c, some, spread(0.0)))
        if plan.across:
            spread_column(hi, near[1], plan)
        _mean_of_dy(dy, x, k0, c0, pivot, hi, totals, sums, near, scratch, plan, few, how, r, w, order, lenses)
        n = 0.0
        for k in range(k0, k1):
            if cm >= 0:
                rows_two(both, dx, beside, k, c0, w, (pivot, hi), lenses[0], sums, plan, cm, waiting, how, like, room)
            else:
                add_block(both, r, w, k, c0, (pivot, hi), near, sums, plan, scratch, ALL, how, lenses, order)
            n += count_of(k, x.shape, plan, ALL)
        by_channel(sums, totals, plan)
        again = _first(pivot, hi, totals, table, mine, n, float(x.shape[0] * x.shape[2]))
    if again:
        mean, merged, hi64 = row(numbers, 15, g), corner(numbers, 16, 4, g), row(table, 0, g)
        own, far = row(numbers, 24, g), row(numbers, 25, g)
        blank(merged, merged.shape[0])
        if plan.across:
            spread_column(hi64, near64[1], plan)
        few = few_in_double(x, plan, w)
        _mean_of_dy(dy, x, k0, c0, mean, hi64, totals, sums, near64, scratch, plan, few, how, r, w, order, lenses)
        n, share = 0.0, share_of(x, 0.25)
        for k in range(k0, k1):
            if cm >= 0 and plan.flags & EXACT:
                rows_two(both, dx, beside, k, c0, w, (mean, hi64), lenses[0], sums, plan, cm, waiting, how, like, room)
            else:
                add_block(both, r, w, k, c0, (mean, hi64), near64, sums, plan, scratch, ALL, how, lenses, order)
            by_channel(outer(sums, 0, IN_DOUBLE), outer(totals, 0, IN_DOUBLE), plan)
            m = count_of(k, x.shape, plan, ALL)
            if _join(mean, totals, merged, far, n, m, share):
                _mean_of_dy(dy, x, k, c0, own, hi64, totals, sums, near64, scratch, plan, ALL, how, r, w, order, lenses)
                add_block(both, r, w, k, c0, (own, hi64), near64, sums, plan, scratch, ALL, how, lenses, order)
                by_channel(outer(sums, 0, IN_DOUBLE), outer(totals, 0, IN_DOUBLE), plan)
                for c in range(0, g, LANES):
                    some = min(LANES, g - c)
                    _merge(c, some, take(far, 0, c, some, spread(0.0)), own, totals, merged, n, m)
                adopt(own, far, mean, near64[0], plan)
            n += m
        _replace(merged, mine, n, plan.flags & EXACT != 0)


@part()
def _first(pivot, hi, totals, table, part, n, values):  # type: ignore[no-untyped-def]
    """part (5, G) <- a piece's sums about the pivots; a count of 0 where these won't do, and whether there are any.

    They won't where a pivot is too far off, nor where one value has much of the variance: its gradient is near 0, the
    difference of two terms, and must be exact.
    """
    some = 0
    for c in range(0, pivot.size, LANES):
        g = min(LANES, pivot.size - c)
        some += g - count_nonzero(_first_of(c, g, pivot, hi, totals, table, part, n, values), g)
    return some > 0


@formula
def _first_of(c, g, pivot, hi, totals, table, part, n, values):  # type: ignore[no-untyped-def]
    zero, one, over = spread(0.0), spread(1.0), 1.0 / n
    s, t, p, q, f = some_of(totals, range(5), c, g)
    mean, off, var = s * over, t * over, take(table, 2, c, g, zero)
    all_of_it = values * var
    near = near_enough(mean, q, spread(n), 0.1, SINGLE)
    near = where_at_most(64.0 * f, all_of_it * all_of_it, near, zero)
    near = where_less(full(one, 1e-15), var, where_less(var, full(one, 1e15), near, zero), zero)
    kept = where_at_most(off * off, var, near, zero) * n
    moved = off - (take(table, 0, c, g, zero) - take(hi, 0, c, g, zero))
    give_rows(part, 0, c, g, (kept, take(pivot, 0, c, g, zero), mean, moved, p - s * off))
    return kept


@part()
def _join(pivot, totals, merged, far, n, m, share):  # type: ignore[no-untyped-def]
    """As forward's: merged (4, G) of n values, and a block of m; dy may be 1.7 standard deviations from the pivot."""
    some = 0
    for c in range(0, pivot.size, LANES):
        g = min(LANES, pivot.size - c)
        near = _near(totals, c, g, m, share)
        off = spread(1.0) - near
        give(far, 0, c, g, off)
        some += count_nonzero(off, g)
        _merge(c, g, near, pivot, totals, merged, n, m)
    return some > 0


@formula
def _near(totals, c, g, m, share):  # type: ignore[no-untyped-def]
    zero = spread(0.0)
    return near_enough(take(totals, 0, c, g, zero) * (1.0 / m), take(totals, 3, c, g, zero), spread(m), share, DOUBLE)


@part()
def _merge(c, g, taken, pivot, totals, merged, n, m):  # type: ignore[no-untyped-def]
    """merged (4, G) of n values and what is taken of g channels from c on; what isn't stays as it is."""
    both = joined_comoments(spread(n), *four_of(merged, 0, c, g), *_block_of(c, g, pivot, totals, m))
    choose_rows(merged, 0, c, g, spread(1.0) - taken, both[1:])


@formula
def _block_of(c, g, pivot, totals, m):  # type: ignore[no-untyped-def]
    """A block's own count, mean of dy as pivot and rest, mean of x - hi, and co-moment."""
    s, t, p = some_of(totals, range(3), c, g)
    d = t * (1.0 / m)
    return spread(m), take(pivot, 0, c, g, spread(0.0)), s * (1.0 / m), d, p - s * d


@part()
def _replace(merged, part, n, all_of_it):  # type: ignore[no-untyped-def]
    """part (5, G) <- n and merged (4, G), or where its count is 0."""
    for c in range(0, merged.shape[1], LANES):
        g = min(LANES, merged.shape[1] - c)
        kept = spread(0.0) if all_of_it else take(part, 0, c, g, spread(0.0))
        give(part, 0, c, g, spread(n))
        choose_rows(part, 1, c, g, kept, four_of(merged, 0, c, g))


@by_type
def _mean_of_dy(
    dy, x, k, c0, pivot, hi, totals, sums, near, scratch, plan, few, how, r, w, order, lenses
):  # type: ignore[no-untyped-def]  # fmt: skip
    """As `mean_of`, of dy f'(z) where there is an activation."""
    return _mean_of_dy_itself if how.simple else _mean_of_dy_bent


def _mean_of_dy_itself(
    dy, x, k, c0, pivot, hi, totals, sums, near, scratch, plan, few, how, r, w, order, lenses
):  # type: ignore[no-untyped-def]  # fmt: skip
    own = scratch[1], scratch[1], scratch[2]  # dy's type, not x's
    mean_of(dy, k, c0, pivot, outer(totals, 0, 2), outer(sums, 0, 2), near, own, plan, few, None, order)


def _mean_of_dy_bent(
    dy, x, k, c0, pivot, hi, totals, sums, near, scratch, plan, few, how, r, w, order, lenses
):  # type: ignore[no-untyped-def]  # fmt: skip
    blank(pivot, 1)
    blank(near, 1)
    add_block((dy, x), r, w, k, c0, (pivot, hi), near, sums, plan, scratch, few, how, lenses, order)
    by_channel(sums, totals, plan)
    n = count_of(k, x.shape, plan, few)
    divide(pivot, totals, n, None)
    if few < ALL:
        # Where most slopes are 0, the mean of a few values is more than a standard deviation off now and then, in one
        # of a tile's channels nearly always, and all would be summed again.
        for c in range(0, pivot.size, LANES):
            g = min(LANES, pivot.size - c)
            mean, q = take(pivot, 0, c, g, spread(0.0)), take(totals, 3, c, g, spread(0.0))
            give(pivot, 0, c, g, where_at_most(spread(5.0 * n) * (mean * mean), q, spread(0.0), mean))
    if plan.across:
        spread_column(pivot, near[0], plan)


@part()
def _backward_finish(s0, table, grads, dgamma, dbeta, part, values, how, r, w, lenses):  # type: ignore[no-untyped-def]
    """Of a tile, grads (5, G): mean of dy as hi and lo, covariance, mean of x - mean, and sum of dy; dgamma and dbeta,
    if not empty, from s0 on."""
    for c in range(0, table.shape[1], LANES):
        k = min(LANES, table.shape[1] - c)
        sums = (spread(0.0), spread(0.0), spread(0.0), spread(0.0), spread(0.0))
        for p in range(part.shape[0]):
            of = place(part, p)
            sums = joined_comoments(*sums, take(of, 0, c, k, spread(0.0)), *four_of(of, 1, c, k))
        total, product = _give_sums(
            c, k, table, grads, sums, float(values), how, r, w, take(lenses, KEPT, c, k, spread(-1.0))
        )
        if dgamma.size > 0:
            give(dgamma, 0, s0 + c, k, product)
        if dbeta.size > 0:
            give(dbeta, 0, s0 + c, k, total)


@formula
def _give_sums(c, k, table, grads, sums, values, how, r, w, kept):  # type: ignore[no-untyped-def]
    """grads of k channels; the sum of dy is given back, and dgamma.

    x less its mean adds up to 0, and dgamma has nothing of what rounding left of that. Not so by weights, nor of an x
    had back from y, not `kept` (0 and above), nor of constants.
    """
    n, hi, lo, t, m = sums
    zero, (hi, lo) = nothing(n), settle(hi, lo)
    covariance, total = where_nonzero(n, m * (1.0 / values), zero), n * hi + n * lo
    mean, product = t - take(table, 1, c, k, zero), n * covariance
    give_rows(grads, 0, c, k, (hi, lo, covariance, mean, total))
    off = product + total * mean
    own = where_nonzero(spread(is_frozen(how)), off, product)
    if w is not None or (how.inverse and not keeps(how, r)):
        own = off
    elif how.inverse:
        own = where_less(kept, zero, off, own)
    return total, own * take(table, 3, c, k, zero)


@part()
def _backward_numbers(x, table, grads, plan, memory, how, r, w, mass):  # type: ignore[no-untyped-def]
    """What the map of a tile takes of its channels, in `memory`; and for how many of them float32 won't do."""
    g, exact, n = table.shape[1], plan.flags & EXACT != 0, float(x.shape[0] * x.shape[2])
    numbers, singles = corner(memory[0], 0, 5, g), corner(memory[3], 2, 8, g)
    by_column = plan.across and not many_columns(plan)
    if by_column:
        numbers, singles = corner(memory[2], 0, 5, g), corner(memory[4], 0, 8, g)
    rare = backward_coefficients(table, grads, numbers, singles, n, mass, is_frozen(how) != 0.0, exact)
    used = used_of(how, r, x, numbers, singles)
    if used.itemsize == 8:
        rare = 0
    if by_column:
        start_again(used)
        if rare:
            start_again(numbers)
    elif plan.across:
        spread_columns(used, used_of(how, r, x, memory[2], memory[4]), plan)
        if rare:
            spread_columns(numbers, memory[2], plan)
    return rare


@part()
def _backward_map(p0, p1, c0, dy, x, dx, rare, plan, memory, how, r, w, dr, order, lenses):  # type: ignore[no-untyped-def]
    """Pieces p0 to p1 of a tile, backwards."""
    g = min(plan.tile, x.shape[1] - c0)
    numbers, _, columns, singles, like_columns, scratch = memory
    doubles = corner(numbers, 0, 5, g)
    of_rows = doubles, used_of(how, r, x, doubles, corner(singles, 2, 8, g)), lenses
    lenses_by_column = columns_of(how, r, rest(columns, 5), rest(like_columns, 8))
    of_columns = columns, used_of(how, r, x, columns, like_columns), lenses_by_column
    like = read_as(how, r, spread(narrowest(x)), spread(of_rows[1][0, 0]))
    k0, k1 = p0 * plan.piece, min(p1 * plan.piece, plan.blocks)
    for k in range(k1 - 1, k0 - 1, -1):
        if plan.across:
            beside, room, reach = (r, w, dr), scratch[2][0], near_rows(g, plan)
            columns_map((dy, x), dx, beside, k, c0, g, of_columns, rare, plan, how, like, order, room, reach)
        else:  # what comes next isn't fetched meanwhile, as by forward: with two arrays of 103 MB 12.0 ms for 11.6
            rows_map((dy, x), dx, (r, w, dr), k, c0, np.int64(-1), of_rows, rare, plan, scratch, how, like, order)


@part()
def _hand_on(lenses, waiting):  # type: ignore[no-untyped-def]
    """waiting (4, G) <- three rows of lenses, and no channel that is kept: no tile waits that has one.

    One array set to another costs 3 s: Numba compiles strings for its error.
    """
    for c in range(lenses.shape[1]):
        for i in range(KEPT):
            waiting[i, c] = lenses[i, c]
        waiting[KEPT, c] = -1.0


@part()
def _map_waiting(g, c0, dy, x, dx, starts, order, plan, memory, how, r, w, dr):  # type: ignore[no-untyped-def]
    """Set g's tile of the channels from c0 on, whose map waited for the next one's sums."""
    n0, outers = start_of(order, starts[g]), starts[g + 1] - starts[g]
    xs, (pieces, _) = outer(x, n0, outers), part_sizes(x.shape, plan)
    _backward_map(
        np.int64(0), pieces, c0, outer(dy, n0, outers), xs, outer(dx, n0, outers), np.int64(0),
        planned(xs.shape, plan), memory, how, outer(r, n0, outers), outer(w, n0, outers), outer(dr, n0, outers), order,
        rest(memory[0], 20),
    )  # fmt: skip


@formula
def _table_of(how, table, memory):  # type: ignore[no-untyped-def]
    """A tile's table; where x is had back from y, that which goes with y."""
    return corner(memory[0], 26, 6, table.shape[1]) if how.inverse else table


@part()
def _backward_units(
    k, items, dy, x, dx, table, grads, dgamma, dbeta, part, claims, plan, stage, starts, order, how, r, w,
    dr, mass, lost, memory
):  # type: ignore[no-untyped-def]  # fmt: skip
    """As forward's."""
    keep_whole()
    pieces, tiles = part_sizes(x.shape, plan)
    u, seen, ready, rare, waiting = claimed(k, items, claims, np.int64(-1)), -1, -1, np.int64(0), np.int64(-1)
    in_turn, of = plan.flags & TWO != 0 and stage == SUM | FINISH | MAP, np.int64(0)
    while u >= 0:
        first, last, _ = borders(u, items, (starts.size - 1) * tiles, pieces, stage)
        for cell in range(first // pieces, (last + pieces - 1) // pieces):
            g, t = cell // tiles, cell % tiles
            count, c0 = starts[g + 1] - starts[g], t * plan.tile
            n0 = start_of(order, starts[g])
            s0, channels = g * x.shape[1] + c0, min(plan.tile, x.shape[1] - c0)
            xs, dys, dxs = outer(x, n0, count), outer(dy, n0, count), outer(dx, n0, count)
            rs, ws, drs = _beside_tile(how, outer(r, n0, count), lost, c0), outer(w, n0, count), outer(dr, n0, count)
            own, order_of = planned(xs.shape, plan), listed(order, starts[g], count)
            found, of_x = columns_from(grads, s0, channels), columns_from(table, s0, channels)
            of_tile = _table_of(how, of_x, memory)
            p0, p1 = max(0, first - cell * pieces), min(pieces, last - cell * pieces)
            sums = place(part, k if stage & SUM and stage & FINISH else cell)
            some_kept = any_lost(lost, c0, channels)
            if waiting >= 0 and (some_kept or g != of):  # what maps beside sums has no eye for channels, nor sets
                _map_waiting(of, waiting, dy, x, dx, starts, order, plan, memory, how, r, w, dr)
                waiting = np.int64(-1)
            if not is_plain(how) and cell != seen:
                seen, lenses = cell, corner(memory[0], 10, _lens_rows(how, r), channels)
                _say_kept(how, r, lost, c0, lenses)
                make_invertible(how, r, of_x, rest(lenses, KEPT), of_tile)
                exactly = not absent(w) or plan.flags & EXACT != 0
                lenses_of(how, r, of_tile, lenses, rest(memory[3], 10), exactly)
                if plan.across:
                    by_column = columns_of(how, r, rest(memory[2], 5), rest(memory[4], 8))
                    spread_columns(lenses, by_column, plan)
                    find_kept(how, r, by_column, channels, plan)
            if stage & SUM:
                for p in range(p0, p1):
                    _backward_sum(p, c0, dys, xs, of_tile, sums, own, memory, how, rs, ws, order_of, waiting, dxs, drs)
                waiting = np.int64(-1)
            if stage & FINISH:
                kept = corner(memory[0], 10, KEPT + 1, channels)
                values = xs.shape[0] * xs.shape[2]
                _backward_finish(s0, of_tile, found, dgamma, dbeta, sums, values, how, rs, ws, kept)
            if stage & MAP:
                if stage & SUM or cell != ready:
                    rare = _backward_numbers(xs, of_tile, found, own, memory, how, rs, ws, mass_or(mass, g, 0.0))
                    ready = cell
                if in_turn and rare == 0 and not some_kept:
                    waiting, of = c0, g
                    _hand_on(rest(memory[0], 10), rest(memory[0], 20))
                    continue
                _backward_map(
                    p0, p1, c0, dys, xs, dxs, rare, own, memory, how, rs, ws, drs, order_of, rest(memory[0], 10)
                )
        u = claimed(k, items, claims, u)
    if waiting >= 0:
        _map_waiting(of, waiting, dy, x, dx, starts, order, plan, memory, how, r, w, dr)


@compiled
def backward_item(
    k, items, dy, x, dx, table, grads, dgamma, dbeta, part, claims, plan, stage, starts, order, how, r, w, dr,
    mass, lost, kept, every
):  # type: ignore[no-untyped-def]  # fmt: skip
    """dy, x, dx (O, C, I), table (6, G C), grads (5, G C), dgamma and dbeta (G C,) or (0,), part
    (cells or items, P, 5, channels).

    starts (G + 1,), order (O,) or (0,), r and dr (O, C, I) or None, w (O, 1, I) or None, mass (G,) or None. Where x is
    had back from y, kept (O, n, I) has x of the channels `lost` (n,), both of which may be None.
    """
    keep_whole()
    if k < 0:
        by_all(every, items, (dy, x, dx, table, grads, dgamma, dbeta, part, claims, plan, stage, starts, order,
                              how, r, w, dr, mass, lost, kept, every))  # fmt: skip
        return
    lens = np.int64(_lens_rows(how, _residual_or_kept(borrowed(r), borrowed(kept))))
    wants = np.int64(5), 5 + lens, 8 + lens
    owned = memory_of(borrowed(table), borrowed(x), borrowed(dx), plan, stage, wants, not absent(w))
    memory = lent(borrowed(owned), borrowed(x), borrowed(dx), plan, stage, wants, not absent(w))
    _backward_units(
        k, items, borrowed(dy), borrowed(x), borrowed(dx), borrowed(table), borrowed(grads),
        borrowed(dgamma), borrowed(dbeta), borrowed(part), borrowed(claims), plan, stage, borrowed(starts),
        borrowed(order), how, _residual_or_kept(borrowed(r), borrowed(kept)), borrowed(w), borrowed(dr), borrowed(mass),
        borrowed(lost), memory,
    )  # fmt: skip
    fence()
    hold(owned)
