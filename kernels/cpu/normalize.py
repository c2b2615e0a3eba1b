"""The forward kernel: sums of a tile, what they make of a channel, the map."""

import math

import numpy as np
from numba import prange

from .activations import absent
from .blocks import merge_moments, not_negative, settle
from .coefficients import forward_coefficients
from .columns import columns_normalize, spread_columns
from .compile import Kernel, compiled
from .lanes import borrowed, call, fence, hold, keep_whole, narrowest, outer, place
from .parts import by_type, part
from .rows import EXACT, NEXT, rows_normalize
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
    few_of,
    lent,
    listed,
    mean_of,
    memory_of,
    near_enough,
    part_sizes,
    planned,
    start_of,
    tile_width,
)


@part(inline="always")
def _forward_sum(p, c0, x, part, plan, memory, w, order):  # type: ignore[no-untyped-def]
    """part (P, 4, G) of piece p of a tile: count, hi, lo, M2."""
    k0, k1 = p * plan[3], min((p + 1) * plan[3], plan[2])
    g = min(plan[1], x.shape[1] - c0)
    numbers, all_sums, near64, singles, near, scratch = memory
    depth = all_sums.shape[0]
    totals, sums, pivot = numbers[6 : 6 + depth, :g], all_sums[:, : tile_width(g, plan)], singles[0, :g]
    part[p, 0] = 0.0
    if k0 >= k1:  # of a set smaller than the plan's; of an empty one, all that is merged
        part[p] = 0.0
        return
    again = plan[7] & EXACT != 0
    if not again:
        mean_of(x, k0, c0, pivot, totals, sums, near, scratch, plan, few_of(x.shape, plan), w, order)
        count = 0.0
        for k in range(k0, k1):
            deviations(x, k, c0, pivot, sums, near, scratch, plan, ALL, w, order)
            count += count_of(k, x.shape, plan, ALL)
        by_channel(sums, totals, plan)
        for c in range(g):
            s, q, n = totals[0, c], totals[1, c], counted_in(totals, c, count, w)
            if near_enough(s, q, n, 0.5, SINGLE) and n > 0.0:
                part[p, 0, c], part[p, 1, c] = n, pivot[c]
                part[p, 2, c], part[p, 3, c] = s / n, q - s * s / n
            again |= part[p, 0, c] == 0.0
    if again:
        mean, merged, own, far = numbers[0, :g], numbers[1:5, :g], numbers[13, :g], numbers[14, :g]
        merged[:] = 0.0
        mean_of(x, k0, c0, mean, totals, sums, near64, scratch, plan, few_of(x.shape, plan), w, order)
        for k in range(k0, k1):
            deviations(x, k, c0, mean, sums, near64, scratch, plan, ALL, w, order)
            by_channel(sums, totals, plan)
            count = count_of(k, x.shape, plan, ALL)
            if _join(mean, totals, merged, far, count, w):
                mean_of(x, k, c0, own, totals, sums, near64, scratch, plan, ALL, w, order)
                deviations(x, k, c0, own, sums, near64, scratch, plan, ALL, w, order)
                by_channel(sums, totals, plan)
                for c in range(g):
                    if far[c] != 0.0:
                        _merge(c, own[c], totals, merged, counted_in(totals, c, count, w))
                adopt(own, far, mean, near64[0], plan)
        for c in range(g):
            if plan[7] & EXACT or part[p, 0, c] == 0.0:
                for i in range(4):
                    part[p, i, c] = merged[i, c]


@part()
def _join(pivot, totals, merged, far, count, w):  # type: ignore[no-untyped-def]
    """merged (4, G) and a block's sums about the pivots; far (G,) <- 1 where these were too far off, which is returned
    for whether there are any: these are left out."""
    some = False
    for c in range(pivot.size):
        n, far[c] = counted_in(totals, c, count, w), 0.0
        if n == 0.0:
            continue
        if near_enough(totals[0, c], totals[1, c], n, 0.5, DOUBLE):
            _merge(c, pivot[c], totals, merged, n)
        else:
            far[c], some = 1.0, True
    return some


@part()
def _merge(c, pivot, totals, merged, n):  # type: ignore[no-untyped-def]
    s, q = totals[0, c], totals[1, c]
    merged[0, c], merged[1, c], merged[2, c], merged[3, c] = merge_moments(
        merged[0, c], merged[1, c], merged[2, c], merged[3, c], n, pivot, s / n, not_negative(q - s * s / n)
    )


@part(inline="always")
def _forward_finish(c, s, stats, part, eps, summed):  # type: ignore[no-untyped-def]
    """For channel c of a tile, s of the table: its mean and variance, unless the table has them. All 0 of no weight."""
    n = hi = lo = m2 = 0.0
    if summed:
        for p in range(part.shape[0]):
            n, hi, lo, m2 = merge_moments(n, hi, lo, m2, part[p, 0, c], part[p, 1, c], part[p, 2, c], part[p, 3, c])
        stats[0, s], stats[1, s] = settle(hi, lo)
        stats[2, s] = m2 / n if n > 0.0 else 0.0
    stats[3, s] = 1.0 / math.sqrt(stats[2, s] + eps) if n > 0.0 or not summed else 0.0


@by_type
def _unless_unused(how, w):  # type: ignore[no-untyped-def]
    """Weights as a forward map takes them: None where they mean nothing but statistics."""
    return (lambda how, w: None) if how.simple else (lambda how, w: w)


@part(inline="always")
def _forward_numbers(s0, g, stats, affine, plan, memory, double):  # type: ignore[no-untyped-def]
    """What the map of a tile takes of its channels, in `memory`; and whether float32 won't do for one of them."""
    numbers, singles, exact = memory[0][:3, :g], memory[3][2:8, :g], plan[7] & EXACT != 0
    rare = forward_coefficients(s0, stats, affine, numbers, singles, exact, double)
    if plan[0]:
        spread_columns(numbers, memory[2], plan)
        if not exact:
            spread_columns(singles, memory[4], plan)
    return rare


@part(inline="always")
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
    k, items, x, y, stats, affine, eps, part, claims, plan, stage, starts, order, how, r, w
):  # type: ignore[no-untyped-def]  # fmt: skip
    """x, y (O, C, I), stats (4, G C), affine (2, G C), part (cells or items, P, 4, channels of a tile).

    y is not touched without the MAP stage. starts (G + 1,), order (O,) or (0,), r (O, C, I) and w (O, 1, I) or None.
    """
    keep_whole()
    x, y, stats, affine, part = borrowed(x), borrowed(y), borrowed(stats), borrowed(affine), borrowed(part)
    claims, starts, order, r, w = borrowed(claims), borrowed(starts), borrowed(order), borrowed(r), borrowed(w)
    owned = memory_of(x, y, plan, stage, narrowest(x), 2 if absent(w) else 3, 3, 6, not absent(w))
    memory = lent(owned)
    pieces, tiles = part_sizes(x.shape, plan)
    u, ready, rare = claimed(k, items, claims), -1, False
    while u >= 0:
        first, last, stop = borders(u, items, (starts.size - 1) * tiles, pieces, stage)
        for cell in range(first // pieces, (last + pieces - 1) // pieces):
            g, t = cell // tiles, cell % tiles
            count, c0 = starts[g + 1] - starts[g], t * plan[1]
            n0 = start_of(order, starts[g])
            s0, channels = g * x.shape[1] + c0, min(plan[1], x.shape[1] - c0)
            xs, ys, rs, ws = (
                outer(x, n0, count),
                outer(y, n0, count),
                outer(r, n0, count),
                outer(w, n0, count),
            )
            own, order_of = planned(xs.shape, plan), listed(order, starts[g], count)
            p0, p1 = max(0, first - cell * pieces), min(pieces, last - cell * pieces)
            sums = place(part, k if stage & SUM and stage & FINISH else cell)
            if stage & SUM:
                for p in range(p0, p1):
                    _forward_sum(p, c0, xs, sums, own, memory, ws, order_of)
            if stage & FINISH:
                for c in range(channels):
                    _forward_finish(c, s0 + c, stats, sums, eps, part.shape[0] > 0)
            if stage & MAP:
                if stage & SUM or cell != ready:  # a tile's map is cut into many units where there is nothing else
                    rare = _forward_numbers(s0, channels, stats, affine, own, memory, x.itemsize == 8)
                    ready = cell
                ahead = -1
                if (cell + 1) * pieces < stop and t + 1 < tiles and plan[7] & NEXT:
                    ahead = c0 + plan[1]
                _forward_map(
                    p0, p1, c0, ahead, xs, ys, rare, part.shape[0] > 0, own, memory, how, rs, _unless_unused(how, ws),
                    order_of,
                )  # fmt: skip
        u = claimed(k, items, claims)
    fence()
    hold(owned)


@Kernel
def forward_kernel(
    items, item, x, y, stats, affine, eps, part, claims, plan, stage, starts, order, how, r, w
):  # type: ignore[no-untyped-def]  # fmt: skip
    """`forward_item`, whose address is `item`, for all items."""
    for k in prange(items):
        call(item, (np.int64(k), items, x, y, stats, affine, eps, part, claims, plan, stage, starts, order, how, r, w))
