"""The forward kernel: sums of a tile, what they make of a channel, the map."""

import numpy as np

from .activations import absent, fast_numbers
from .blocks import joined_moments, not_negative, settle
from .coefficients import forward_coefficients
from .columns import columns_normalize, spread_columns
from .compile import compiled
from .in_turn import rows_two
from .items import by_all, fence
from .lanes import LANES, count_nonzero, give, keep_whole, narrowest, root, spread, take, where_nonzero
from .parts import by_type, part
from .rows import EXACT, NEXT, TWO, rows_normalize
from .schedule import (
    ALL,
    DOUBLE,
    FINISH,
    MAP,
    SINGLE,
    SUM,
    adopt,
    borders,
    by_channel,
    claimed,
    count_of,
    counted_in,
    deviations,
    few_in_double,
    few_of,
    lent,
    listed,
    mean_in,
    mean_of,
    memory_of,
    near_enough,
    part_sizes,
    planned,
    share_of,
    start_of,
    tile_width,
)
from .views import borrowed, hold, outer, place


@part(inline="always")
def _forward_sum(p, c0, x, part, plan, memory, w, order, cm, y, how, r):  # type: ignore[no-untyped-def]
    """part (P, 4, G) of piece p of a tile: count, hi, lo, M2; meanwhile channel cm is mapped, if >= 0 (`rows_two`)."""
    k0, k1 = p * plan[3], min((p + 1) * plan[3], plan[2])
    g = min(plan[1], x.shape[1] - c0)
    numbers, all_sums, near64, singles, near, scratch = memory
    depth = all_sums.shape[0]
    totals, sums, pivot = numbers[6 : 6 + depth, :g], all_sums[:, : tile_width(g, plan)], singles[0, :g]
    mine = place(part, p)
    if k0 >= k1:  # of a set smaller than the plan's; of an empty one, all that is merged
        part[p] = 0.0
        return
    again = plan[7] & EXACT != 0
    if not again:
        mean_of(x, k0, c0, pivot, totals, sums, near, scratch, plan, few_of(x.shape, plan), w, order)
        count = 0.0
        for k in range(k0, k1):
            if cm >= 0:
                rows_two(
                    x, y, k, c0, pivot, sums, plan, cm, numbers[:3], singles[2:8], how, r, w, _unless_unused(how, w),
                    scratch[2][0],
                )  # fmt: skip
            else:
                deviations(x, k, c0, pivot, sums, near, scratch, plan, ALL, w, order)
            count += count_of(k, x.shape, plan, ALL)
        by_channel(sums, totals, plan)
        again = _first(pivot, totals, mine, count, w)
    if again:
        mean, merged, own, far = numbers[15, :g], numbers[16:20, :g], numbers[13, :g], numbers[14, :g]
        merged[:] = 0.0
        mean_of(x, k0, c0, mean, totals, sums, near64, scratch, plan, few_in_double(x, plan, w), w, order)
        share = share_of(x, 0.5)
        for k in range(k0, k1):
            if cm >= 0 and plan[7] & EXACT:
                rows_two(
                    x, y, k, c0, mean, sums, plan, cm, numbers[:3], singles[2:8], how, r, w, _unless_unused(how, w),
                    scratch[2][0],
                )  # fmt: skip
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
        _replace(merged, mine, plan[7] & EXACT != 0)


@part()
def _first(pivot, totals, part, count, w):  # type: ignore[no-untyped-def]
    """part (4, G) <- a piece's sums about the pivots; 0 of them where these were too far off; whether any were."""
    zero, some = spread(0.0), 0
    for c in range(0, pivot.size, LANES):
        g = min(LANES, pivot.size - c)
        n, q = counted_in(totals, c, g, count, w), take(totals, 1, c, g, zero)
        mean = mean_in(take(totals, 0, c, g, zero), n, count, w)
        kept = where_nonzero(near_enough(mean, q, n, 0.5, SINGLE), n, zero)
        give(part, 0, c, g, kept)
        give(part, 1, c, g, take(pivot, 0, c, g, zero))
        give(part, 2, c, g, mean)
        give(part, 3, c, g, q - mean * (mean * n))
        some += g - count_nonzero(kept, g)
    return some > 0


@part()
def _join(pivot, totals, merged, far, count, w, share):  # type: ignore[no-untyped-def]
    """merged (4, G) and a block's sums about the pivots; far (G,) <- 1 where these were too far off, which is returned
    for whether there are any: these are left out."""
    one, zero, some = spread(1.0), spread(0.0), 0
    for c in range(0, pivot.size, LANES):
        g = min(LANES, pivot.size - c)
        n = counted_in(totals, c, g, count, w)
        mean = mean_in(take(totals, 0, c, g, zero), n, count, w)
        near = near_enough(mean, take(totals, 1, c, g, zero), n, share, DOUBLE)
        off = where_nonzero(n, one - near, zero)
        give(far, 0, c, g, off)
        some += count_nonzero(off, g)
        _merge(c, g, near, pivot, totals, merged, count, w)
    return some > 0


@part()
def _merge(c, g, taken, pivot, totals, merged, count, w):  # type: ignore[no-untyped-def]
    """merged (4, G) and what is taken of g channels from c on."""
    zero = spread(0.0)
    n = counted_in(totals, c, g, count, w)
    mean, q = mean_in(take(totals, 0, c, g, zero), n, count, w), take(totals, 1, c, g, zero)
    n0, hi, lo, m2 = joined_moments(
        take(merged, 0, c, g, zero), take(merged, 1, c, g, zero), take(merged, 2, c, g, zero),
        take(merged, 3, c, g, zero), where_nonzero(taken, n, zero), take(pivot, 0, c, g, zero), mean,
        not_negative(q - mean * (mean * n)),
    )  # fmt: skip
    give(merged, 0, c, g, n0)
    give(merged, 1, c, g, hi)
    give(merged, 2, c, g, lo)
    give(merged, 3, c, g, m2)


@part()
def _replace(merged, part, all_of_it):  # type: ignore[no-untyped-def]
    """part (4, G) <- merged (4, G), or where its count is 0."""
    zero = spread(0.0)
    for c in range(0, merged.shape[1], LANES):
        g = min(LANES, merged.shape[1] - c)
        kept = zero if all_of_it else take(part, 0, c, g, zero)
        for i in range(4):
            give(part, i, c, g, where_nonzero(kept, take(part, i, c, g, zero), take(merged, i, c, g, zero)))


@part()
def _forward_finish(s0, g, stats, part, eps, summed, count, w):  # type: ignore[no-untyped-def]
    """For g channels of a tile, from s0 of the table on: mean and variance, unless the table has them. All 0 of no
    weight."""
    one, zero = spread(1.0), spread(0.0)
    for c in range(0, g, LANES):
        s, k, n = s0 + c, min(LANES, g - c), one
        if summed:
            n = hi = lo = m2 = zero
            for p in range(part.shape[0]):
                of = place(part, p)
                n, hi, lo, m2 = joined_moments(
                    n, hi, lo, m2, take(of, 0, c, k, zero), take(of, 1, c, k, zero), take(of, 2, c, k, zero),
                    take(of, 3, c, k, zero),
                )  # fmt: skip
            hi, lo = settle(hi, lo)
            give(stats, 0, s, k, hi)
            give(stats, 1, s, k, lo)
            give(stats, 2, s, k, where_nonzero(n, mean_in(m2, n, count, w), zero))
        give(stats, 3, s, k, where_nonzero(n, one / root(take(stats, 2, s, k, zero) + spread(eps)), zero))


@by_type
def _unless_unused(how, w):  # type: ignore[no-untyped-def]
    """Weights as a forward map takes them: None where they mean nothing but statistics."""
    return (lambda how, w: None) if how.simple else (lambda how, w: w)


@part(inline="always")
def _forward_numbers(s0, g, stats, affine, plan, memory, double, how, r, w):  # type: ignore[no-untyped-def]
    """What the map of a tile takes of its channels, in `memory`; and whether float32 won't do for one of them."""
    numbers, singles, exact = memory[0][:3, :g], memory[3][2:8, :g], plan[7] & EXACT != 0
    rare = forward_coefficients(how, s0, stats, affine, numbers, singles, exact, double)
    if plan[0]:
        if exact or rare or absent(fast_numbers(how, r, w, memory[4])):
            spread_columns(numbers, memory[2], plan)
        if not exact:
            spread_columns(singles, memory[4], plan)
    return rare


@part()
def _forward_map(p0, p1, c0, ca, x, y, rare, summed, plan, memory, how, r, w, order):  # type: ignore[no-untyped-def]
    """Pieces p0 to p1 of a tile, backwards if they were summed: what was read last is in cache.

    The channels from ca on are fetched meanwhile, if it is >= 0.
    """
    g = min(plan[1], x.shape[1] - c0)
    all_numbers, _, spread_numbers, all_singles, spread_singles, scratch = memory
    numbers, singles = all_numbers[:3, :g], all_singles[2:8, :g]
    k0, k1 = p0 * plan[3], min(p1 * plan[3], plan[2])
    for i in range(k1 - k0):
        k = k1 - 1 - i if summed else k0 + i
        if plan[0]:
            columns_normalize(x, y, k, c0, g, spread_numbers, spread_singles, rare, plan, how, r, w, order)
        else:
            rows_normalize(x, y, k, c0, ca, numbers, singles, rare, plan, scratch, how, r, w, order)


@compiled
def forward_item(
    k, items, x, y, stats, affine, eps, part, claims, plan, stage, starts, order, how, r, w, every
):  # type: ignore[no-untyped-def]  # fmt: skip
    """x, y (O, C, I), stats (4, G C), affine (2, G C), part (cells or items, P, 4, channels of a tile).

    y is not touched without the MAP stage. starts (G + 1,), order (O,) or (0,), r (O, C, I) and w (O, 1, I) or None.
    """
    keep_whole()
    if k < 0:
        by_all(every, items, (x, y, stats, affine, eps, part, claims, plan, stage, starts, order, how, r, w, every))
        return
    x, y, stats, affine, part = borrowed(x), borrowed(y), borrowed(stats), borrowed(affine), borrowed(part)
    claims, starts, order, r, w = borrowed(claims), borrowed(starts), borrowed(order), borrowed(r), borrowed(w)
    owned = memory_of(x, y, plan, stage, narrowest(x), 2 if absent(w) else 3, np.int64(3), np.int64(6), not absent(w))
    memory = lent(owned, y, plan)
    pieces, tiles = part_sizes(x.shape, plan)
    u, ready, rare, waiting = claimed(k, items, claims, np.int64(-1)), -1, np.bool_(False), np.int64(-1)
    in_turn = plan[7] & TWO != 0 and stage == SUM | FINISH | MAP and starts.size == 2
    while u >= 0:
        first, last, stop = borders(u, items, (starts.size - 1) * tiles, pieces, stage)
        for cell in range(first // pieces, (last + pieces - 1) // pieces):
            g, t = cell // tiles, cell % tiles
            outers, c0 = starts[g + 1] - starts[g], t * plan[1]
            n0 = start_of(order, starts[g])
            s0, channels = g * x.shape[1] + c0, min(plan[1], x.shape[1] - c0)
            xs, ys, rs, ws = (
                outer(x, n0, outers),
                outer(y, n0, outers),
                outer(r, n0, outers),
                outer(w, n0, outers),
            )
            own, order_of = planned(xs.shape, plan), listed(order, starts[g], outers)
            p0, p1 = max(0, first - cell * pieces), min(pieces, last - cell * pieces)
            sums = place(part, k if stage & SUM and stage & FINISH else cell)
            if stage & SUM:
                for p in range(p0, p1):
                    _forward_sum(p, c0, xs, sums, own, memory, ws, order_of, waiting, ys, how, rs)
                waiting = np.int64(-1)
            if stage & FINISH:
                count = float(xs.shape[0] * xs.shape[2])
                _forward_finish(s0, channels, stats, sums, eps, part.shape[0] > 0, count, ws)
            if stage & MAP:
                if stage & SUM or cell != ready:  # a tile's map is cut into many units where there is nothing else
                    rare = _forward_numbers(
                        s0, channels, stats, affine, own, memory, x.itemsize == 8, how, rs, _unless_unused(how, ws)
                    )  # fmt: skip
                    ready = cell
                if in_turn and not rare:
                    waiting = c0
                    continue
                ahead = -1
                if (cell + 1) * pieces < stop and t + 1 < tiles and plan[7] & NEXT:
                    ahead = c0 + plan[1]
                _forward_map(
                    p0, p1, c0, ahead, xs, ys, rare, part.shape[0] > 0, own, memory, how, rs, _unless_unused(how, ws),
                    order_of,
                )  # fmt: skip
        u = claimed(k, items, claims, u)
    if waiting >= 0:
        n0, outers = start_of(order, starts[0]), starts[1] - starts[0]
        _forward_map(
            np.int64(0), pieces, waiting, np.int64(-1), outer(x, n0, outers), outer(y, n0, outers), rare,
            part.shape[0] > 0, planned(x.shape, plan), memory, how, outer(r, n0, outers),
            _unless_unused(how, outer(w, n0, outers)), order,
        )  # fmt: skip
    fence()
    hold(owned)
