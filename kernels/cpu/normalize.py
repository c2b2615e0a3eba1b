"""The forward kernel: sums of a tile, what they make of a channel, the map."""

import numpy as np

from .activations import absent, fast_numbers
from .blocks import joined_moments, not_negative, settle
from .coefficients import forward_coefficients
from .columns import columns_map, keep_columns, many_columns, near_rows, spread_columns, start_again
from .compile import compiled
from .cut import ALL, EXACT, NEXT, TWO
from .formulas import formula
from .in_turn import rows_two
from .items import by_all, fence
from .lanes import LANES, count_nonzero, keep_whole, nothing, root, spread, where_less, where_nonzero
from .memory import blank, choose_rows, four_of, give, give_rows, take
from .parts import part, unless_none
from .rows import keep_rows, rows_map
from .schedule import (
    DOUBLE,
    FINISH,
    MAP,
    SINGLE,
    SUM,
    adopt,
    any_lost,
    borders,
    by_channel,
    claimed,
    count_of,
    counted_in,
    deviations,
    few_in_double,
    few_of,
    first_from,
    lent,
    listed,
    mass_or,
    mean_in,
    mean_of,
    memory_of,
    near_enough,
    part_sizes,
    planned,
    quartered,
    share_of,
    start_of,
    tile_width,
)
from .views import borrowed, columns_from, corner, hold, outer, place, rest, row

LIGHT = 1e-6  # the sum of a piece's weights


@part()
def _forward_sum(p, c0, x, part, plan, memory, w, order, cm, y, how, r):  # type: ignore[no-untyped-def]
    """part (P, 4, G) of piece p of a tile: count, hi, lo, M2; meanwhile channel cm is mapped, if >= 0 (`rows_two`)."""
    k0, k1 = p * plan.piece, min((p + 1) * plan.piece, plan.blocks)
    g = min(plan.tile, x.shape[1] - c0)
    numbers, all_sums, near64, singles, near, scratch = memory
    depth = all_sums.shape[0]
    totals, pivot = corner(numbers, 6, depth, g), row(singles, 0, g)
    sums = corner(all_sums, 0, depth, tile_width(g, plan))
    seen, mine = _unless_unused(how, w), place(part, p)
    beside, like = (r, seen, None), spread(singles[2, 0])
    waiting = numbers, fast_numbers(how, r, seen, rest(singles, 2)), None
    if k0 >= k1:  # of a set smaller than the plan's; of an empty one, all that is merged
        part[p] = 0.0
        return
    again = plan.flags & EXACT != 0
    if not again:
        mean_of(x, k0, c0, pivot, totals, sums, near, scratch, plan, few_of(x.shape, plan), w, order)
        count = 0.0
        for k in range(k0, k1):
            if cm >= 0:
                rows_two((x,), y, beside, k, c0, w, (pivot,), None, sums, plan, cm, waiting, how, like, scratch[2][0])
            else:
                deviations(x, k, c0, pivot, sums, near, scratch, plan, ALL, w, order)
            count += count_of(k, x.shape, plan, ALL)
        by_channel(sums, totals, plan)
        again = _first(pivot, totals, mine, count, w)
    if again:
        mean, merged = row(numbers, 15, g), corner(numbers, 16, 4, g)
        own, far = row(numbers, 24, g), row(numbers, 25, g)
        blank(merged, merged.shape[0])
        mean_of(x, k0, c0, mean, totals, sums, near64, scratch, plan, few_in_double(x, plan, w), w, order)
        share = share_of(x, 0.5)
        for k in range(k0, k1):
            if cm >= 0 and plan.flags & EXACT:
                rows_two((x,), y, beside, k, c0, w, (mean,), None, sums, plan, cm, waiting, how, like, scratch[2][0])
            else:
                deviations(x, k, c0, mean, sums, near64, scratch, plan, ALL, w, order)
            by_channel(sums, totals, plan)
            count = count_of(k, x.shape, plan, ALL)
            if _join(mean, totals, merged, far, count, w, share):
                mean_of(x, k, c0, own, totals, sums, near64, scratch, plan, ALL, w, order)
                deviations(x, k, c0, own, sums, near64, scratch, plan, ALL, w, order)
                by_channel(sums, totals, plan)
                for c in range(0, g, LANES):
                    n = min(LANES, g - c)
                    _merge(c, n, take(far, 0, c, n, spread(0.0)), own, totals, merged, count, w)
                adopt(own, far, mean, near64[0], plan)
        _replace(merged, mine, plan.flags & EXACT != 0)


@part()
def _first(pivot, totals, part, count, w):  # type: ignore[no-untyped-def]
    """part (4, G) <- a piece's sums about the pivots; 0 of them where these were too far off; whether any were."""
    some = 0
    for c in range(0, pivot.size, LANES):
        g = min(LANES, pivot.size - c)
        some += g - count_nonzero(_first_of(pivot, totals, part, c, g, count, w), g)
    return some > 0


def _about(totals, c, g, count, w):  # type: ignore[no-untyped-def]
    """In a formula: count, mean and squares of g channels from c on, about their pivots."""
    zero = spread(0.0)
    n = counted_in(totals, c, g, count, w)
    return n, mean_in(take(totals, 0, c, g, zero), n, count, w), take(totals, 1, c, g, zero)


@formula
def _first_of(pivot, totals, part, c, g, count, w):  # type: ignore[no-untyped-def]
    zero, (n, mean, q) = spread(0.0), _about(totals, c, g, count, w)
    near = near_enough(mean, q, n, 0.5, SINGLE)
    kept = where_nonzero(near if w is None else _unless_light(near, q, n), n, zero)
    give_rows(part, 0, c, g, (kept, take(pivot, 0, c, g, zero), mean, q - mean * (mean * n)))
    return kept


def _unless_light(near, q, n):  # type: ignore[no-untyped-def]
    """In a formula: 0 where squares by weight leave 1 / SINGLE to SINGLE, and where weights are light: then squares of
    0 may have been lost, for deviations of which the data's own squares are still in range."""
    zero = nothing(n)
    inside = where_less(spread(1.0 / SINGLE), q, where_less(q, spread(SINGLE), near, zero), zero)
    return where_less(n, spread(LIGHT), zero, where_nonzero(q, inside, near))


@part()
def _join(pivot, totals, merged, far, count, w, share):  # type: ignore[no-untyped-def]
    """merged (4, G) and a block's sums about the pivots; far (G,) <- 1 where these were too far off, which is returned
    for whether there are any: these are left out."""
    some = 0
    for c in range(0, pivot.size, LANES):
        g = min(LANES, pivot.size - c)
        off, near = _far_off(totals, c, g, count, w, share)
        give(far, 0, c, g, off)
        some += count_nonzero(off, g)
        _merge(c, g, near, pivot, totals, merged, count, w)
    return some > 0


@formula
def _far_off(totals, c, g, count, w, share):  # type: ignore[no-untyped-def]
    """1 where a pivot is too far off, and 1 where it is not."""
    n, mean, q = _about(totals, c, g, count, w)
    near = near_enough(mean, q, n, share, DOUBLE)
    return where_nonzero(n, 1.0 - near, spread(0.0)), near


@part()
def _merge(c, g, taken, pivot, totals, merged, count, w):  # type: ignore[no-untyped-def]
    """merged (4, G) and what is taken of g channels from c on."""
    both = joined_moments(*four_of(merged, 0, c, g), *_taken(c, g, taken, pivot, totals, count, w))
    give_rows(merged, 0, c, g, both)


@formula
def _taken(c, g, taken, pivot, totals, count, w):  # type: ignore[no-untyped-def]
    """Count, mean as pivot and rest, and M2 of what is taken of a block."""
    zero, (n, mean, q) = spread(0.0), _about(totals, c, g, count, w)
    return where_nonzero(taken, n, zero), take(pivot, 0, c, g, zero), mean, not_negative(q - mean * (mean * n))


@part()
def _replace(merged, part, all_of_it):  # type: ignore[no-untyped-def]
    """part (4, G) <- merged (4, G), or where its count is 0."""
    for c in range(0, merged.shape[1], LANES):
        g = min(LANES, merged.shape[1] - c)
        kept = spread(0.0) if all_of_it else take(part, 0, c, g, spread(0.0))
        choose_rows(part, 0, c, g, kept, four_of(merged, 0, c, g))


@part()
def _take_given(table, c0, own, given):  # type: ignore[no-untyped-def]
    """table (6, G) of a tile <- gamma and beta of the channels from c0 on, mean and variance from `own` on.

    Of those that are empty, the rows are as they should be.
    """
    gamma, beta, mean, var = given
    for c in range(0, table.shape[1], LANES):
        n = min(LANES, table.shape[1] - c)
        if gamma.shape[0]:
            give(table, 4, c, n, take(gamma, 0, c0 + c, n, spread(0.0)))
        if beta.shape[0]:
            give(table, 5, c, n, take(beta, 0, c0 + c, n, spread(0.0)))
        if mean.shape[0]:
            give(table, 0, c, n, take(mean, 0, own + c, n, spread(0.0)))
            give(table, 1, c, n, spread(0.0))
            give(table, 2, c, n, take(var, 0, own + c, n, spread(0.0)))


@part()
def _forward_finish(table, part, eps, summed, count):  # type: ignore[no-untyped-def]
    """Mean and variance of a tile's channels, unless its table (6, G) has them. All 0 of no weight.

    `count`: of values, or the exact sum of their weights. That in `part` was added in float32: equal weights round
    alike in all lanes, by which the variance was off by 2.5e-7.
    """
    for c in range(0, table.shape[1], LANES):
        k = min(LANES, table.shape[1] - c)
        moments = (spread(0.0), spread(0.0), spread(0.0), spread(0.0))
        for p in range(part.shape[0] if summed else 0):
            moments = joined_moments(*moments, *four_of(place(part, p), 0, c, k))
        if summed:
            _give_moments(table, c, k, moments, count)
            _give_invstd(table, c, k, moments[0], eps)
        else:
            _give_invstd(table, c, k, spread(1.0), eps)


@formula
def _give_moments(table, c, k, moments, count):  # type: ignore[no-untyped-def]
    n, hi, lo, m2 = moments
    give_rows(table, 0, c, k, (*settle(hi, lo), where_nonzero(n, m2 * (1.0 / count), nothing(n))))


@formula
def _give_invstd(table, c, k, n, eps):  # type: ignore[no-untyped-def]
    zero = nothing(n)
    give(table, 3, c, k, where_nonzero(n, 1.0 / root(take(table, 2, c, k, zero) + eps), zero))


@formula
def _unless_unused(how, w):  # type: ignore[no-untyped-def]
    """Weights as a forward map takes them: None where they mean nothing but statistics."""
    return None if how.simple else w


@part()
def _forward_numbers(table, plan, memory, double, how, r, w):  # type: ignore[no-untyped-def]
    """What the map of a tile takes of its channels, in `memory`; and for how many of them float32 won't do."""
    g, exact = table.shape[1], plan.flags & EXACT != 0
    numbers, singles = corner(memory[0], 0, 3, g), corner(memory[3], 2, 6, g)
    if plan.across and not many_columns(plan):
        numbers, singles = corner(memory[2], 0, 3, g), corner(memory[4], 0, 0 if exact else 6, g)
        rare = forward_coefficients(how, table, numbers, singles, exact, double)
        start_again(numbers)
        start_again(singles)
        return rare
    rare = forward_coefficients(how, table, numbers, singles, exact, double)
    if plan.across:
        if exact or rare or absent(fast_numbers(how, r, w, memory[4])):
            spread_columns(numbers, memory[2], plan)
        if not exact:
            spread_columns(singles, memory[4], plan)
    return rare


@part()
def _forward_map(p0, p1, c0, ca, x, y, rare, summed, plan, memory, how, r, w, order, kept, lost):  # type: ignore[no-untyped-def]
    """Pieces p0 to p1 of a tile, backwards if they were summed: what was read last is in cache.

    The channels from ca on are fetched meanwhile, if it is >= 0. Those that are `lost` are kept.
    """
    g = min(plan.tile, x.shape[1] - c0)
    numbers, _, columns, singles, like_columns, scratch = memory
    like = spread(singles[2, 0])
    of_rows = corner(numbers, 0, 3, g), fast_numbers(how, r, w, corner(singles, 2, 6, g)), None
    of_columns = columns, fast_numbers(how, r, w, like_columns), None
    k0, k1, reach = p0 * plan.piece, min(p1 * plan.piece, plan.blocks), near_rows(g, plan)
    if any_lost(lost, c0, g):  # of the next block some lines are read first: no prefetcher saw what came then
        if plan.across and plan.height % 4 == 0:  # it has to fit into L2, too
            plan, k0, k1 = quartered(plan), 4 * k0, 4 * k1
        reach = -plan.height if summed else plan.height
    for i in range(k1 - k0):
        k = k1 - 1 - i if summed else k0 + i
        _keep(lost, k, x, kept, c0, g, plan, order)  # before y is written: it may be x
        if plan.across:
            columns_map((x,), y, (r, w, None), k, c0, g, of_columns, rare, plan, how, like, order, scratch[2][0], reach)
        else:
            rows_map((x,), y, (r, w, None), k, c0, ca, of_rows, rare, plan, scratch, how, like, order)


@unless_none()
def _keep(lost, k, x, kept, c0, channels, plan, order):  # type: ignore[no-untyped-def]
    """kept (O, n, I) <- block k of x, of those of the channels that are lost."""
    j0, j1 = first_from(lost, c0), first_from(lost, c0 + channels)
    if j0 < j1 and plan.across:
        keep_columns(k, x, kept, lost, j0, j1, plan, order)
    elif j0 < j1:
        keep_rows(k, x, kept, lost, j0, j1, plan, order)


@part()
def _map_waiting(g, c0, x, y, summed, starts, order, plan, memory, how, r, w):  # type: ignore[no-untyped-def]
    """Set g's tile of the channels from c0 on, whose map waited for the next one's sums; what is lost was kept."""
    n0, outers = start_of(order, starts[g]), starts[g + 1] - starts[g]
    xs, (pieces, _) = outer(x, n0, outers), part_sizes(x.shape, plan)
    _forward_map(
        np.int64(0), pieces, c0, np.int64(-1), xs, outer(y, n0, outers), np.int64(0), summed, planned(xs.shape, plan),
        memory, how, outer(r, n0, outers), _unless_unused(how, outer(w, n0, outers)), order, None, None,
    )  # fmt: skip


@part()
def _forward_units(
    k, items, x, y, table, eps, given, part, claims, plan, stage, starts, order, how, r, w, mass, kept, lost, memory
):  # type: ignore[no-untyped-def]
    """What there is for item k to do; in a part, as Numba writes a page of code for each array that may own memory."""
    keep_whole()
    pieces, tiles = part_sizes(x.shape, plan)
    u, ready, rare, waiting = claimed(k, items, claims, np.int64(-1)), -1, np.int64(0), np.int64(-1)
    in_turn, of = plan.flags & TWO != 0 and stage == SUM | FINISH | MAP, np.int64(0)
    while u >= 0:
        first, last, stop = borders(u, items, (starts.size - 1) * tiles, pieces, stage)
        for cell in range(first // pieces, (last + pieces - 1) // pieces):
            g, t = cell // tiles, cell % tiles
            outers, c0 = starts[g + 1] - starts[g], t * plan.tile
            n0 = start_of(order, starts[g])
            channels = min(plan.tile, x.shape[1] - c0)
            of_tile = corner(memory[0], 26, 6, channels)  # where nobody wants the table
            if table.shape[1] > 0:
                of_tile = columns_from(table, g * x.shape[1] + c0, channels)
            xs, ys = outer(x, n0, outers), outer(y, n0, outers)
            rs, ws = outer(r, n0, outers), outer(w, n0, outers)
            own, order_of = planned(xs.shape, plan), listed(order, starts[g], outers)
            p0, p1 = max(0, first - cell * pieces), min(pieces, last - cell * pieces)
            sums = place(part, k if stage & SUM and stage & FINISH else cell)
            if waiting >= 0 and g != of:  # what maps beside sums sees one set's arrays
                _map_waiting(of, waiting, x, y, part.shape[0] > 0, starts, order, plan, memory, how, r, w)
                waiting = np.int64(-1)
            if stage & SUM:
                for p in range(p0, p1):
                    _forward_sum(p, c0, xs, sums, own, memory, ws, order_of, waiting, ys, how, rs)
                waiting = np.int64(-1)
            if stage & FINISH and (stage & SUM or cell != ready):  # each item for itself, where all is given
                _take_given(of_tile, c0, g * x.shape[1] + c0, given)
                count = mass_or(mass, g, float(xs.shape[0] * xs.shape[2]))
                _forward_finish(of_tile, sums, eps, part.shape[0] > 0, count)
            if stage & MAP:
                if stage & SUM or cell != ready:  # a tile's map is cut into many units where there is nothing else
                    rare = _forward_numbers(of_tile, own, memory, x.itemsize == 8, how, rs, _unless_unused(how, ws))
                    ready = cell
                if in_turn and rare == 0:
                    if any_lost(lost, c0, channels):  # a map beside sums keeps nothing
                        for block in range(own.blocks):
                            _keep(lost, block, xs, outer(kept, n0, outers), c0, channels, own, order_of)
                    waiting, of = c0, g
                    continue
                ahead = np.int64(-1)
                if (cell + 1) * pieces < stop and t + 1 < tiles and plan.flags & NEXT:
                    ahead = c0 + plan.tile
                _forward_map(
                    p0, p1, c0, ahead, xs, ys, rare, part.shape[0] > 0, own, memory, how, rs, _unless_unused(how, ws),
                    order_of, outer(kept, n0, outers), lost,
                )  # fmt: skip
        u = claimed(k, items, claims, u)
    if waiting >= 0:
        _map_waiting(of, waiting, x, y, part.shape[0] > 0, starts, order, plan, memory, how, r, w)


@compiled
def forward_item(
    k, items, x, y, table, eps, given, part, claims, plan, stage, starts, order, how, r, w, mass, lost, kept, every
):  # type: ignore[no-untyped-def]  # fmt: skip
    """x, y (O, C, I), table (6, G C) or (6, 0), part (cells or items, P, 4, channels of a tile). given: gamma,
    beta (C,), mean, var (G C,), each empty where its row is in the table already.

    y is not touched without the MAP stage. starts (G + 1,), order (O,) or (0,), r (O, C, I), w (O, 1, I) and mass (G,)
    or None. With the channels `lost` (n,), or None, kept (O, n, I) is written: their x.
    """
    keep_whole()
    if k < 0:
        by_all(every, items, (x, y, table, eps, given, part, claims, plan, stage, starts, order, how, r, w, mass,
                              lost, kept, every))  # fmt: skip
        return
    wants = 2 if absent(w) else 3, np.int64(3), np.int64(6)
    owned = memory_of(borrowed(table), borrowed(x), borrowed(y), plan, stage, wants, not absent(w))
    memory = lent(borrowed(owned), borrowed(x), borrowed(y), plan, stage, wants, not absent(w))
    _forward_units(
        k, items, borrowed(x), borrowed(y), borrowed(table), eps,
        (borrowed(given[0]), borrowed(given[1]), borrowed(given[2]), borrowed(given[3])), borrowed(part),
        borrowed(claims), plan, stage, borrowed(starts), borrowed(order), how, borrowed(r), borrowed(w), borrowed(mass),
        borrowed(kept), borrowed(lost), memory,
    )  # fmt: skip
    fence()
    hold(owned)
