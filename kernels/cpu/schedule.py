"""The two kernels: sums, then what they make of a channel, then the map, tile by tile.

An array is cut into tiles of channels, a tile into pieces, a piece into blocks. All borders depend on the shape alone
and all merging is in order, so one thread or many give the same bits. What a block is, `rows` and `columns` know.

With the FINISH stage, a unit of work is a span of tiles that go through all stages one after the other: a tile is
mapped while its data is still in cache, and meanwhile the next one is fetched, so that memory reads and writes at once.
Without it, a unit is a span of pieces: that is how few tiles feed many threads.

**Sums** of float32 and half data are taken in float32 lanes around a pivot, the mean of the piece's first values: small
deviations, whatever the mean. The piece's channel is summed again in float64, with a pivot of its own for every block,
where those values weren't like the rest (the pivot is more than one standard deviation off), where squares leave 1e-30
to 1e30, where one value has much of the variance (backward), and where something isn't finite. Float64 data and
channels of few values (nothing averages the last additions out) go that way at once.
"""

import math

import numpy as np
from numba import prange

from .blocks import merge_comoments, merge_moments, not_negative, settle
from .columns import (
    columns_count,
    columns_deviations,
    columns_gradient,
    columns_normalize,
    columns_products,
    gather_columns,
    spread_column,
    spread_columns,
)
from .compile import Kernel, compiled, part
from .lanes import LANES, borrowed, call, claim, fence, finest, hold, keep_whole, narrowest
from .rows import (
    EXACT,
    GATHER,
    NEXT,
    add_up,
    rows_count,
    rows_deviations,
    rows_gradient,
    rows_normalize,
    rows_products,
)

SUM, FINISH, MAP = 1, 2, 4

# Units of an item's share. Threads claim them one by one, at last those of others: one that wakes late, or on another
# thread's processor, finds its share done. With fixed shares, two threads that had slept took as long as one.
UNITS = 8

FEW = 1024, 16  # values of a channel (or an eighth of them), or rows of columns, whose mean is the pivot of a piece
ALL = 1 << 62

# A plan: 0 by columns?, 1 channels of a tile, 2 blocks, 3 blocks of a piece; then of rows: 4 runs of a block,
# 5 segments of a run, 6 elements of a segment; of columns: 4 rows of a block, 5 period, 6 fold; 7 flags.


@part()
def _width(channels, plan):  # type: ignore[no-untyped-def]
    """Columns or lanes of a tile; a vector may be loaded from any of them on."""
    return channels * (plan[5] * plan[6] if plan[0] else LANES) + LANES


@part()
def _memory(x, plan, stage, like, depth, wide, narrow):  # type: ignore[no-untyped-def]
    """All that a work item needs: `borrowed` says why nothing below it may own an array. It hands on views of rows.

    By channel of a tile: (10, G) float64, 5 coefficients or merged sums, and 5 totals; (8, G) in the elements' type, 2
    pivots and 6 coefficients. By column or lane: `depth` sums; by column: `wide` coefficients or pivots in float64 and
    `narrow` ones in the elements' type. Then scratch.
    """
    g = min(plan[1], x.shape[1])
    w = _width(g, plan)
    scratch = plan[4] * plan[6] if plan[7] & GATHER else 0
    numbers, sums, columns = np.empty((10, g)), np.zeros((depth, w if stage & SUM else 0)), w if plan[0] else 0
    singles, like_columns = np.full((8, g), like), np.full((narrow, columns), like)
    return numbers, sums, np.zeros((wide, columns)), singles, like_columns, np.empty((3, scratch), x.dtype)


@part(inline="always")
def _lent(m):  # type: ignore[no-untyped-def]
    return borrowed(m[0]), borrowed(m[1]), borrowed(m[2]), borrowed(m[3]), borrowed(m[4]), borrowed(m[5])


@part(inline="always")
def _count(k, shape, plan, few):  # type: ignore[no-untyped-def]
    return float(columns_count(k, shape, plan, few) if plan[0] else rows_count(k, shape, plan, few))


@part(inline="always")
def _deviations(x, k, c0, pivot, sums, near, scratch, plan, few):  # type: ignore[no-untyped-def]
    """sums (2, W) += x - pivot and its square, for block k of the channels from c0 on, or `few` values of it."""
    if plan[0]:
        columns_deviations(x, k, c0, pivot.size, near, sums, plan, few)
    else:
        rows_deviations(x, k, c0, pivot, sums, plan, scratch, few)


@part(inline="always")
def _products(dy, x, k, c0, pivot, hi, sums, near, scratch, plan):  # type: ignore[no-untyped-def]
    """sums (5, W) += g = dy - pivot, d = x - hi, g d, g^2 and d^4."""
    if plan[0]:
        columns_products(dy, x, k, c0, pivot.size, near, sums, plan)
    else:
        rows_products(dy, x, k, c0, pivot, hi, sums, plan, scratch)


@part(inline="always")
def _by_channel(sums, totals, plan):  # type: ignore[no-untyped-def]
    """totals (M, G) <- sums (M, W), and these <- 0."""
    if plan[0]:
        gather_columns(sums, totals, plan)
    else:
        add_up(sums, totals)


@part()
def _mean(x, k, c0, pivot, totals, sums, near, scratch, plan, few):  # type: ignore[no-untyped-def]
    """pivot (G,) and near (1, W) <- about the means of block k, or of `few` values of it: in the type of pivot."""
    pivot[:] = 0
    near[0] = 0
    _deviations(x, k, c0, pivot, sums, near, scratch, plan, few)
    _by_channel(sums, totals, plan)
    count = _count(k, x.shape, plan, few)
    for c in range(pivot.size):
        pivot[c] = totals[0, c] / count
    if plan[0]:
        spread_column(pivot, near[0], plan)


@part()
def _few(shape, plan):  # type: ignore[no-untyped-def]
    return FEW[1] if plan[0] else min(FEW[0], max(64, shape[0] * shape[2] // 8))


@part()
def _near_enough(s, q, n):  # type: ignore[no-untyped-def]
    """That the pivot of s and q is at most a standard deviation off, and that no square was too small or large."""
    return (q - s * s / n >= 0.5 * q and 1e-30 * n < q < 1e30 * n) or (q == 0.0 and s == 0.0)


@part(inline="always")
def _forward_sum(p, c0, x, part, plan, memory):  # type: ignore[no-untyped-def]
    """part (P, 4, C) of piece p of a tile: count, hi, lo, M2."""
    k0, k1 = p * plan[3], min((p + 1) * plan[3], plan[2])
    g = min(plan[1], x.shape[1] - c0)
    numbers, all_sums, near64, singles, near, scratch = memory
    totals, sums, pivot = numbers[5:7, :g], all_sums[:2, : _width(g, plan)], singles[0, :g]
    again = plan[7] & EXACT != 0
    if not again:
        _mean(x, k0, c0, pivot, totals, sums, near, scratch, plan, _few(x.shape, plan))
        n = 0.0
        for k in range(k0, k1):
            _deviations(x, k, c0, pivot, sums, near, scratch, plan, ALL)
            n += _count(k, x.shape, plan, ALL)
        _by_channel(sums, totals, plan)
        for c in range(g):
            s, q = totals[0, c], totals[1, c]
            part[p, 0, c0 + c] = 0.0
            if _near_enough(s, q, n):
                part[p, 0, c0 + c], part[p, 1, c0 + c] = n, pivot[c]
                part[p, 2, c0 + c], part[p, 3, c0 + c] = s / n, q - s * s / n
            again |= part[p, 0, c0 + c] == 0.0
    if again:
        mean, merged = numbers[0, :g], numbers[1:4, :g]
        merged[:] = 0.0
        n = 0.0
        for k in range(k0, k1):
            _mean(x, k, c0, mean, totals, sums, near64, scratch, plan, ALL)
            _deviations(x, k, c0, mean, sums, near64, scratch, plan, ALL)
            _by_channel(sums, totals, plan)
            m = _count(k, x.shape, plan, ALL)
            for c in range(g):
                s, q = totals[0, c], totals[1, c]
                _, merged[0, c], merged[1, c], merged[2, c] = merge_moments(
                    n, merged[0, c], merged[1, c], merged[2, c], m, mean[c], s / m, not_negative(q - s * s / m)
                )
            n += m
        for c in range(g):
            if plan[7] & EXACT or part[p, 0, c0 + c] == 0.0:
                part[p, 0, c0 + c], part[p, 1, c0 + c] = n, merged[0, c]
                part[p, 2, c0 + c], part[p, 3, c0 + c] = merged[1, c], merged[2, c]


@part(inline="always")
def _forward_finish(c, stats, part, eps):  # type: ignore[no-untyped-def]
    """No pieces (P = 0) keep the mean and the variance that stats holds."""
    n = hi = lo = m2 = 0.0
    for p in range(part.shape[0]):
        n, hi, lo, m2 = merge_moments(n, hi, lo, m2, part[p, 0, c], part[p, 1, c], part[p, 2, c], part[p, 3, c])
    if part.shape[0] > 0:
        stats[0, c], stats[1, c] = settle(hi, lo)
        stats[2, c] = m2 / n
    stats[3, c] = 1.0 / math.sqrt(stats[2, c] + eps)


@part()
def _forward_coefficients(c0, stats, affine, numbers, singles, exact, double):  # type: ignore[no-untyped-def]
    """By channel. numbers (3, G): hi, a, b for y = a (x - hi) + b. singles (6, G): h, a, al, b, bl in float32 for
    y = (a d + b) + (al d + bl), d = x - h; and 1 where they won't do. Returns whether there is such a channel. Float64
    data (`double`) has its own numbers there; other data in which all is `exact` has none that will do.

    A mean within 1000 standard deviations goes to b: d = x is exact then, and so is x - h with h near x otherwise.
    a is rounded towards 0: an infinite x then makes two infinite terms of one sign.
    """
    rare = False
    for c in range(numbers.shape[1]):
        hi, lo, invstd, beta = stats[0, c0 + c], stats[1, c0 + c], stats[3, c0 + c], affine[1, c0 + c]
        a = affine[0, c0 + c] * invstd
        numbers[0, c], numbers[1, c], numbers[2, c] = hi, a, beta - a * lo
        if exact:
            singles[0, c], singles[1, c], singles[2, c] = hi, a, a * 2.0**-60
            singles[3, c], singles[4, c], singles[5, c] = beta - a * lo, 0.0, not double
            rare |= not double
            continue
        singles[0, c] = 0.0 if abs(hi * invstd) <= 1024.0 else hi
        b = beta - a * ((hi - singles[0, c]) + lo)
        singles[1, c] = a
        if abs(singles[1, c]) > abs(a):
            singles[1, c] = singles[1, c] * (1.0 - 2.0**-24)
        singles[2, c] = a - singles[1, c]
        if singles[2, c] == 0.0:
            singles[2, c] = a * 2.0**-44
        singles[3, c] = b
        singles[4, c] = b - singles[3, c]
        fits = (1e-30 < abs(a) < 1e30 or a == 0.0) and abs(b) < 1e30
        singles[5, c] = not fits
        rare |= not fits
    return rare


@part(inline="always")
def _forward_map(p0, p1, c0, ca, x, y, stats, affine, summed, plan, memory):  # type: ignore[no-untyped-def]
    """Pieces p0 to p1 of a tile, backwards if they were summed: what was read last is in cache.

    The channels from ca on are fetched meanwhile, if it is >= 0.
    """
    g = min(plan[1], x.shape[1] - c0)
    all_numbers, _, spread_numbers, all_singles, spread_singles, scratch = memory
    numbers, singles = all_numbers[:3, :g], all_singles[2:, :g]
    exact = plan[7] & EXACT != 0
    rare = _forward_coefficients(c0, stats, affine, numbers, singles, exact, x.itemsize == 8)
    if plan[0]:
        spread_columns(numbers, spread_numbers, plan)
        if not exact:
            spread_columns(singles, spread_singles, plan)
    k0, k1 = p0 * plan[3], min(p1 * plan[3], plan[2])
    for i in range(k1 - k0):
        k = k1 - 1 - i if summed else k0 + i
        if plan[0]:
            columns_normalize(x, y, k, c0, g, spread_numbers, spread_singles, rare, plan)
        else:
            rows_normalize(x, y, k, c0, ca, numbers, singles, rare, plan, scratch)


@compiled
def forward_item(k, items, x, y, stats, affine, eps, part, claims, plan, stage):  # type: ignore[no-untyped-def]
    """x, y (O, C, I), stats (4, C), affine (2, C), part (P, 4, C); y is not touched without the MAP stage."""
    keep_whole()
    x, y, stats, affine, part = borrowed(x), borrowed(y), borrowed(stats), borrowed(affine), borrowed(part)
    claims = borrowed(claims)
    owned = _memory(x, plan, stage, narrowest(x), 2, 3, 6)
    memory = _lent(owned)
    u = _claimed(k, items, claims)
    while u >= 0:
        first, last, stop, pieces = _borders(u, items, x.shape, plan, stage)
        for t in range(first // pieces, (last + pieces - 1) // pieces):
            p0, p1, c0 = max(0, first - t * pieces), min(pieces, last - t * pieces), t * plan[1]
            if stage & SUM:
                for p in range(p0, p1):
                    _forward_sum(p, c0, x, part, plan, memory)
            if stage & FINISH:
                for c in range(c0, min(c0 + plan[1], x.shape[1])):
                    _forward_finish(c, stats, part, eps)
            if stage & MAP:
                ahead = c0 + plan[1] if (t + 1) * pieces < stop and plan[7] & NEXT else -1
                _forward_map(p0, p1, c0, ahead, x, y, stats, affine, part.shape[0] > 0, plan, memory)
        u = _claimed(k, items, claims)
    fence()
    hold(owned)


@part()
def _claimed(k, items, claims):  # type: ignore[no-untyped-def]
    """The next unit of item k's own share that nobody has claimed, else one of another's; -1 if there is none."""
    units = UNITS if items > 1 else 1
    for i in range(items):
        share = (k + i) % items
        u = claim(claims, share)
        if u < units:
            return share * units + u
    return -1


@part()
def _borders(u, items, shape, plan, stage):  # type: ignore[no-untyped-def]
    """Unit u: the pieces of all tiles from first to last, where its share stops, and the number of pieces of a tile.

    With the FINISH stage it has whole tiles.
    """
    units = UNITS if items > 1 else 1
    pieces = (plan[2] + plan[3] - 1) // plan[3]
    tiles = (shape[1] + plan[1] - 1) // plan[1]
    step, work = (pieces, tiles) if stage & FINISH else (1, tiles * pieces)
    first, last, stop = work * u // (items * units), work * (u + 1) // (items * units), work * (u // units + 1) // items
    return first * step, last * step, stop * step, pieces


@Kernel
def forward_kernel(items, item, x, y, stats, affine, eps, part, claims, plan, stage):  # type: ignore[no-untyped-def]
    """`forward_item`, whose address is `item`, for all items."""
    for k in prange(items):
        call(item, (np.int64(k), items, x, y, stats, affine, eps, part, claims, plan, stage))


@part(inline="always")
def _backward_sum(p, c0, dy, x, stats, part, plan, memory):  # type: ignore[no-untyped-def]
    """part (P, 5, C) of piece p of a tile: count, mean of dy as hi and lo, mean of x - hi, co-moment."""
    k0, k1 = p * plan[3], min((p + 1) * plan[3], plan[2])
    g = min(plan[1], x.shape[1] - c0)
    numbers, all_sums, near64, singles, near, scratch = memory
    totals, sums, pivot, hi = numbers[5:, :g], all_sums[:, : _width(g, plan)], singles[0, :g], singles[1, :g]
    again = plan[7] & EXACT != 0
    if not again:
        _mean(dy, k0, c0, pivot, totals[:2], sums[:2], near, scratch, plan, _few(x.shape, plan))
        for c in range(g):
            hi[c] = stats[0, c0 + c]
        if plan[0]:
            spread_column(hi, near[1], plan)
        n = 0.0
        for k in range(k0, k1):
            _products(dy, x, k, c0, pivot, hi, sums, near, scratch, plan)
            n += _count(k, x.shape, plan, ALL)
        _by_channel(sums, totals, plan)
        for c in range(g):
            var, off = stats[2, c0 + c], totals[1, c] / n
            # A value with all of the variance has a gradient near 0, the difference of two terms: v must be exact then.
            spread_out = totals[4, c] <= (x.shape[0] * x.shape[2] * var) ** 2 / 64.0 and 1e-15 < var < 1e15
            part[p, 0, c0 + c] = 0.0
            if _near_enough(totals[0, c], totals[3, c], n) and spread_out and off * off <= var:
                part[p, 0, c0 + c], part[p, 1, c0 + c], part[p, 2, c0 + c] = n, pivot[c], totals[0, c] / n
                part[p, 3, c0 + c] = off - (stats[0, c0 + c] - hi[c])
                part[p, 4, c0 + c] = totals[2, c] - totals[0, c] * off
            again |= part[p, 0, c0 + c] == 0.0
    if again:
        mean, merged, hi64 = numbers[0, :g], numbers[1:5, :g], stats[0, c0 : c0 + g]
        merged[:] = 0.0
        if plan[0]:
            spread_column(hi64, near64[1], plan)
        n = 0.0
        for k in range(k0, k1):
            _mean(dy, k, c0, mean, totals[:2], sums[:2], near64, scratch, plan, ALL)
            _products(dy, x, k, c0, mean, hi64, sums, near64, scratch, plan)
            _by_channel(sums, totals, plan)
            m = _count(k, x.shape, plan, ALL)
            for c in range(g):
                s, d, e = totals[0, c] / m, totals[1, c] / m, totals[2, c] - totals[0, c] * totals[1, c] / m
                _, merged[0, c], merged[1, c], merged[2, c], merged[3, c] = merge_comoments(
                    n, merged[0, c], merged[1, c], merged[2, c], merged[3, c], m, mean[c], s, d, e
                )
            n += m
        for c in range(g):
            if plan[7] & EXACT or part[p, 0, c0 + c] == 0.0:
                part[p, 0, c0 + c], part[p, 1, c0 + c], part[p, 2, c0 + c] = n, merged[0, c], merged[1, c]
                part[p, 3, c0 + c], part[p, 4, c0 + c] = merged[2, c], merged[3, c]


@part(inline="always")
def _backward_finish(c, stats, grads, part):  # type: ignore[no-untyped-def]
    """grads (6, C): mean of dy as hi and lo, covariance, mean of x - hi; in training dgamma, and dbeta."""
    n = hi = lo = t = m = 0.0
    for p in range(part.shape[0]):
        n, hi, lo, t, m = merge_comoments(
            n, hi, lo, t, m, part[p, 0, c], part[p, 1, c], part[p, 2, c], part[p, 3, c], part[p, 4, c]
        )
    grads[0, c], grads[1, c] = settle(hi, lo)
    grads[2, c] = m / n
    grads[3, c] = t
    grads[4, c] = n * grads[2, c] * stats[3, c]
    grads[5, c] = n * grads[0, c] + n * grads[1, c]


@part()
def _backward_coefficients(c0, stats, affine, grads, numbers, singles):  # type: ignore[no-untyped-def]
    """By channel, numbers (5, G) and singles (6, G): ghi, hi, a, b, c for dx = a (dy - ghi) + (b (x - hi) + c).

    In singles c has what the rounding of ghi and hi takes away, and the sixth is 1 where they won't do. Returns
    whether there is such a channel.
    """
    rare = False
    for c in range(numbers.shape[1]):
        ghi, glo, hi, lo = grads[0, c0 + c], grads[1, c0 + c], stats[0, c0 + c], stats[1, c0 + c]
        invstd = stats[3, c0 + c]
        a = affine[0, c0 + c] * invstd
        b = -a * (grads[2, c0 + c] * invstd) * invstd
        numbers[0, c], numbers[1, c], numbers[2, c], numbers[3, c], numbers[4, c] = ghi, hi, a, b, -(a * glo + b * lo)
        singles[0, c], singles[1, c], singles[2, c], singles[3, c] = ghi, hi, a, b
        rest = numbers[4, c] + a * (singles[0, c] - ghi) + b * (singles[1, c] - hi)
        singles[4, c] = rest
        fits = (1e-30 < abs(a) < 1e30 or a == 0.0) and (1e-30 < abs(b) < 1e30 or b == 0.0) and abs(rest) < 1e30
        singles[5, c] = not fits
        rare |= not fits
    return rare


@part(inline="always")
def _backward_map(p0, p1, c0, ca, dy, x, dx, stats, affine, grads, plan, memory):  # type: ignore[no-untyped-def]
    """Pieces p0 to p1 of a tile, backwards; the channels from ca on are fetched meanwhile, if it is >= 0.

    In float64, but for half types, where float32 costs 2^-13 of an ulp and takes half the time.
    """
    g = min(plan[1], x.shape[1] - c0)
    all_numbers, _, spread_numbers, all_singles, spread_singles, scratch = memory
    numbers, singles = all_numbers[:5, :g], all_singles[2:, :g]
    rare = _backward_coefficients(c0, stats, affine, grads, numbers, singles) and finest(x, False, True)
    used, spread_used = finest(x, numbers, singles), finest(x, spread_numbers, spread_singles)
    if plan[0]:
        spread_columns(used, spread_used, plan)
        if rare:
            spread_columns(numbers, spread_numbers, plan)
    k0, k1 = p0 * plan[3], min(p1 * plan[3], plan[2])
    for k in range(k1 - 1, k0 - 1, -1):
        if plan[0]:
            columns_gradient(dy, x, dx, k, c0, g, spread_numbers, spread_used, rare, plan)
        else:
            rows_gradient(dy, x, dx, k, c0, ca, numbers, used, rare, plan, scratch)


@compiled
def backward_item(k, items, dy, x, dx, stats, affine, grads, part, claims, plan, stage):  # type: ignore[no-untyped-def]
    """dy, x, dx (O, C, I), stats (4, C), affine (2, C), grads (6, C), part (P, 5, C)."""
    keep_whole()
    dy, x, dx, part, claims = borrowed(dy), borrowed(x), borrowed(dx), borrowed(part), borrowed(claims)
    stats, affine, grads = borrowed(stats), borrowed(affine), borrowed(grads)
    owned = _memory(x, plan, stage, narrowest(x), 5, 5, 6)
    memory = _lent(owned)
    u = _claimed(k, items, claims)
    while u >= 0:
        first, last, stop, pieces = _borders(u, items, x.shape, plan, stage)
        for t in range(first // pieces, (last + pieces - 1) // pieces):
            p0, p1, c0 = max(0, first - t * pieces), min(pieces, last - t * pieces), t * plan[1]
            if stage & SUM:
                for p in range(p0, p1):
                    _backward_sum(p, c0, dy, x, stats, part, plan, memory)
            if stage & FINISH:
                for c in range(c0, min(c0 + plan[1], x.shape[1])):
                    _backward_finish(c, stats, grads, part)
            if stage & MAP:
                ahead = c0 + plan[1] if (t + 1) * pieces < stop and plan[7] & NEXT else -1
                _backward_map(p0, p1, c0, ahead, dy, x, dx, stats, affine, grads, plan, memory)
        u = _claimed(k, items, claims)
    fence()
    hold(owned)


@Kernel
def backward_kernel(items, item, dy, x, dx, stats, affine, grads, part, claims, plan, stage):  # type: ignore[no-untyped-def]
    """`backward_item`, whose address is `item`, for all items."""
    for k in prange(items):
        call(item, (np.int64(k), items, dy, x, dx, stats, affine, grads, part, claims, plan, stage))
