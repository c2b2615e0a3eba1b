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

from .activations import absent, has_edge, is_frozen, is_plain, looks, used_of
from .blocks import merge_comoments, merge_moments, not_negative, paired, settle
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
from .compile import Kernel, compiled
from .lanes import (
    LANES,
    borrowed,
    call,
    claim,
    fence,
    fma,
    hold,
    keep_whole,
    narrowest,
    outer,
    place,
)
from .parts import by_type, nothing_of, part, unless_none
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
ALL = np.int64(1 << 62)  # a literal would be a type of its own, and all that takes it compiled again

# A plan: 0 by columns?, 1 channels of a tile, 2 blocks, 3 blocks of a piece; then of rows: 4 runs of a block,
# 5 segments of a run, 6 elements of a segment; of columns: 4 rows of a block, 5 period, 6 fold; 7 flags.


@part()
def _width(channels, plan):  # type: ignore[no-untyped-def]
    """Columns or lanes of a tile; a vector may be loaded from any of them on."""
    return channels * (plan[5] * plan[6] if plan[0] else LANES) + LANES


@part(_nrt=True)
def _memory(x, y, plan, stage, like, depth, wide, narrow, weighted):  # type: ignore[no-untyped-def]
    """All that a work item needs: `borrowed` says why nothing below it may own an array. It hands on views of rows.

    By channel of a tile: (13, G) float64, 5 coefficients or merged sums, 5 totals and a lens; (10, G) in the elements'
    type, 2 pivots and 8 coefficients. By column or lane: `depth` sums; by column: `wide` coefficients or pivots in
    float64 and `narrow` ones in the elements' type. Then what is gathered: of x, of all of y's type, of weights, of
    which a run and its start again has room too.
    """
    g = min(plan[1], x.shape[1])
    w = _width(g, plan)
    scratch = plan[4] * plan[6] if plan[7] & GATHER else 0
    numbers, sums, columns = np.empty((13, g)), np.zeros((depth, w if stage & SUM else 0)), w if plan[0] else 0
    singles, like_columns = np.full((10, g), like), np.full((narrow, columns), like)
    weights = scratch if scratch > 0 else plan[6] + LANES if weighted and not plan[0] else 0
    gathered = np.empty((1, scratch), x.dtype), np.empty((4, scratch), y.dtype), np.full((1, weights), like)
    return numbers, sums, np.zeros((wide, columns)), singles, like_columns, gathered[0], gathered[1], gathered[2]


@part(inline="always")
def _lent(m):  # type: ignore[no-untyped-def]
    gathered = borrowed(m[5]), borrowed(m[6]), borrowed(m[7])
    return borrowed(m[0]), borrowed(m[1]), borrowed(m[2]), borrowed(m[3]), borrowed(m[4]), gathered


# Sets of outer indices with statistics of their own. The plan is that of the largest; a set has its own blocks.


@part()
def _start(order, start):  # type: ignore[no-untyped-def]
    """Where a set starts in the arrays themselves: with an order, each of its indices says that."""
    return 0 if order.size > 0 else start


@part(_nrt=True)
def _order_of(order, start, count):  # type: ignore[no-untyped-def]
    return outer(order, start, count) if order.size > 0 else order


@part()
def _planned(shape, plan):  # type: ignore[no-untyped-def]
    """The plan, with the blocks of this shape."""
    if plan[0]:
        rows = shape[0] if plan[5] > 1 else shape[0] * shape[2]
        blocks = ((rows + plan[6] - 1) // plan[6] + plan[4] - 1) // plan[4]
    else:
        blocks = (shape[0] + plan[4] - 1) // plan[4] * plan[5]
    return plan[0], plan[1], blocks, plan[3], plan[4], plan[5], plan[6], plan[7]


@part(inline="always")
def _count(k, shape, plan, few):  # type: ignore[no-untyped-def]
    return float(columns_count(k, shape, plan, few) if plan[0] else rows_count(k, shape, plan, few))


@part(inline="always")
def _deviations(x, k, c0, pivot, sums, near, scratch, plan, few, w, order):  # type: ignore[no-untyped-def]
    """sums (2, W) += x - pivot and its square, for block k of the channels from c0 on, or `few` values of it.

    With weights w sums (3, W) has their sums too.
    """
    if plan[0]:
        columns_deviations(x, k, c0, pivot.size, near, sums, plan, few, w, order)
    else:
        rows_deviations(x, k, c0, pivot, sums, plan, scratch, few, w, order)


@part(inline="always")
def _products(dy, x, k, c0, pivot, hi, sums, near, scratch, plan, few, how, r, w, order, lenses, spread_lenses):  # type: ignore[no-untyped-def]
    """sums (5, W) += g = dy - pivot, d = x - hi, g d, g^2 and d^4."""
    if plan[0]:
        columns_products(dy, x, k, c0, pivot.size, near, sums, plan, few, how, r, w, order, spread_lenses)
    else:
        rows_products(dy, x, k, c0, pivot, hi, sums, plan, scratch, few, how, r, w, order, lenses)


@part(inline="always")
def _by_channel(sums, totals, plan):  # type: ignore[no-untyped-def]
    """totals (M, G) <- sums (M, W), and these <- 0."""
    if plan[0]:
        gather_columns(sums, totals, plan)
    else:
        add_up(sums, totals)


@part()
def _mean(x, k, c0, pivot, totals, sums, near, scratch, plan, few, w, order):  # type: ignore[no-untyped-def]
    """pivot (G,) and near (1, W) <- about the means of block k, or of `few` values of it: in the type of pivot.

    0 where nothing has weight.
    """
    pivot[:] = 0
    near[0] = 0
    _deviations(x, k, c0, pivot, sums, near, scratch, plan, few, w, order)
    _by_channel(sums, totals, plan)
    _divide(pivot, totals, _count(k, x.shape, plan, few), w)
    if plan[0]:
        spread_column(pivot, near[0], plan)


@part()
def _divide(pivot, totals, count, w):  # type: ignore[no-untyped-def]
    for c in range(pivot.size):
        n = _counted(totals, c, count, w)
        pivot[c] = totals[0, c] / n if n > 0.0 else 0.0


@unless_none(3, lambda *args: args[2])
def _counted(totals, c, count, w):  # type: ignore[no-untyped-def]
    """How many values the sums have: `count`, or the sum of their weights."""
    return totals[2, c]


@part()
def _few(shape, plan):  # type: ignore[no-untyped-def]
    return FEW[1] if plan[0] else min(FEW[0], max(64, shape[0] * shape[2] // 8))


@part()
def _near_enough(s, q, n, share):  # type: ignore[no-untyped-def]
    """That the variance is `share` of the squares around the pivot at least, and no square was too small or large.

    By a half the pivot is one standard deviation off at most, by a tenth three: enough where the squares serve for
    nothing else. Slopes of 0 and 1 let the mean of 16 values be more than one off in one of 512 channels, often.
    """
    return (q - s * s / n >= share * q and 1e-30 * n < q < 1e30 * n) or (q == 0.0 and s == 0.0)


@part(inline="always")
def _forward_sum(p, c0, x, part, plan, memory, w, order):  # type: ignore[no-untyped-def]
    """part (P, 4, G) of piece p of a tile: count, hi, lo, M2."""
    k0, k1 = p * plan[3], min((p + 1) * plan[3], plan[2])
    g = min(plan[1], x.shape[1] - c0)
    numbers, all_sums, near64, singles, near, scratch = memory
    depth = all_sums.shape[0]
    totals, sums, pivot = numbers[6 : 6 + depth, :g], all_sums[:, : _width(g, plan)], singles[0, :g]
    part[p, 0] = 0.0
    if k0 >= k1:  # of a set smaller than the plan's; of an empty one, all that is merged
        part[p] = 0.0
        return
    again = plan[7] & EXACT != 0
    if not again:
        _mean(x, k0, c0, pivot, totals, sums, near, scratch, plan, _few(x.shape, plan), w, order)
        count = 0.0
        for k in range(k0, k1):
            _deviations(x, k, c0, pivot, sums, near, scratch, plan, ALL, w, order)
            count += _count(k, x.shape, plan, ALL)
        _by_channel(sums, totals, plan)
        for c in range(g):
            s, q, n = totals[0, c], totals[1, c], _counted(totals, c, count, w)
            if _near_enough(s, q, n, 0.5) and n > 0.0:
                part[p, 0, c], part[p, 1, c] = n, pivot[c]
                part[p, 2, c], part[p, 3, c] = s / n, q - s * s / n
            again |= part[p, 0, c] == 0.0
    if again:
        mean, merged = numbers[0, :g], numbers[1:5, :g]
        merged[:] = 0.0
        for k in range(k0, k1):
            _mean(x, k, c0, mean, totals, sums, near64, scratch, plan, ALL, w, order)
            _deviations(x, k, c0, mean, sums, near64, scratch, plan, ALL, w, order)
            _by_channel(sums, totals, plan)
            count = _count(k, x.shape, plan, ALL)
            for c in range(g):
                s, q, m = totals[0, c], totals[1, c], _counted(totals, c, count, w)
                if m > 0.0:
                    merged[0, c], merged[1, c], merged[2, c], merged[3, c] = merge_moments(
                        merged[0, c], merged[1, c], merged[2, c], merged[3, c],
                        m, mean[c], s / m, not_negative(q - s * s / m),
                    )  # fmt: skip
        for c in range(g):
            if plan[7] & EXACT or part[p, 0, c] == 0.0:
                for i in range(4):
                    part[p, i, c] = merged[i, c]


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


@part()
def _forward_coefficients(s0, c0, stats, affine, numbers, singles, exact, double):  # type: ignore[no-untyped-def]
    """By channel. numbers (3, G): hi, a, b for y = a (x - hi) + b. singles (6, G): h, a, al, b, bl in float32 for
    y = (a d + b) + (al d + bl), d = x - h; and 1 where they won't do. Returns whether there is such a channel. Float64
    data (`double`) has its own numbers there; other data in which all is `exact` has none that will do.

    A mean within 1000 standard deviations goes to b: d = x is exact then, and so is x - h with h near x otherwise.
    """
    rare = False
    _lenses(s0, c0, stats, affine, numbers)
    for c in range(numbers.shape[1]):
        hi, lo, invstd, beta = stats[0, s0 + c], stats[1, s0 + c], stats[3, s0 + c], affine[1, c0 + c]
        a = numbers[1, c]
        if exact:
            singles[0, c], singles[1, c], singles[2, c] = hi, a, a * 2.0**-60
            singles[3, c], singles[4, c], singles[5, c] = beta - a * lo, 0.0, not double
            rare |= not double
            continue
        singles[0, c] = 0.0 if abs(hi * invstd) <= 1024.0 else hi
        b = beta - a * ((hi - singles[0, c]) + lo)
        _split(a, singles, 1, 2, c)
        singles[3, c] = b
        singles[4, c] = b - singles[3, c]
        fits = (1e-30 < abs(a) < 1e30 or a == 0.0) and abs(b) < 1e30
        singles[5, c] = not fits
        rare |= not fits
    return rare


@part()
def _split(value, singles, i, k, c):  # type: ignore[no-untyped-def]
    """value as float32 and what that leaves, of one sign: an infinite factor then makes two infinities of one sign."""
    singles[i, c] = value
    if abs(singles[i, c]) > abs(value):
        singles[i, c] = singles[i, c] * (1.0 - 2.0**-24)
    singles[k, c] = value - singles[i, c]
    if singles[k, c] == 0.0:
        singles[k, c] = value * 2.0**-44


@part()
def _lenses(s0, c0, stats, affine, numbers):  # type: ignore[no-untyped-def]
    """By channel, numbers (3, G): hi, a, b of gamma xhat + beta = a (x - hi) + b."""
    for c in range(numbers.shape[1]):
        a = affine[0, c0 + c] * stats[3, s0 + c]
        numbers[0, c], numbers[1, c], numbers[2, c] = stats[0, s0 + c], a, affine[1, c0 + c] - a * stats[1, s0 + c]


@by_type
def _lenses_of(how, r, s0, c0, stats, affine, numbers, singles, exact):  # type: ignore[no-untyped-def]
    """The lenses that `bent` takes: h, a, b of z = a (x - h) + b, or for an edge s and t in place of h and a."""
    if has_edge(how, r):
        return _edges
    return _plain_lenses if looks(how) else nothing_of


@by_type
def _columns_of(how, r, wide, narrow):  # type: ignore[no-untyped-def]
    """Where lenses are by column: an edge is in x's type, and as wide columns would be pushed out of L1."""
    return (lambda how, r, wide, narrow: narrow) if has_edge(how, r) else (lambda how, r, wide, narrow: wide)


def _plain_lenses(how, r, s0, c0, stats, affine, numbers, singles, exact):  # type: ignore[no-untyped-def]
    _lenses(s0, c0, stats, affine, numbers)


def _edges(how, r, s0, c0, stats, affine, numbers, singles, exact):  # type: ignore[no-untyped-def]
    """singles (10, G): two rows to work in, and six as the forward map's."""
    slot, own = singles[0, :1], singles[2:8, : numbers.shape[1]]
    _forward_coefficients(s0, c0, stats, affine, numbers, own, exact, slot.itemsize == 8)
    for c in range(numbers.shape[1]):
        lens = numbers[0, c], numbers[1, c], numbers[2, c]
        numbers[0, c], numbers[1, c] = _edge(lens, own, c, exact or own[5, c] != 0, slot)


@part()
def _below(u, s, lens, singles, c, exactly, slot):  # type: ignore[no-untyped-def]
    """Whether the forward map finds z <= 0 for x = s u."""
    if exactly:
        return fma(s * u - lens[0], lens[1], lens[2]) <= 0.0
    slot[0] = s * u
    return paired(slot[0], singles[0, c], singles[1, c], singles[2, c], singles[3, c], singles[4, c]) <= 0.0


@part()
def _rounded(slot, value):  # type: ignore[no-untyped-def]
    slot[0] = value
    return float(slot[0])


@part()
def _edge(lens, singles, c, exactly, slot):  # type: ignore[no-untyped-def]
    """s and t for which s x <= t exactly where forward finds z = a (x - h) + b <= 0, of x in the type of slot (1,).

    t is the root, rounded to that type, or a neighbour of it; further off where rounding has made steps of z wide.
    """
    h, a, b = lens
    if a == 0.0:  # NaN stays NaN
        return 0.0, 1.0 if _below(0.0, 1.0, lens, singles, c, exactly, slot) else -1.0
    s = 1.0 if a > 0.0 else -1.0
    if math.isnan(h) or math.isnan(a) or math.isnan(b):
        return s, math.nan
    top = _rounded(slot, 1.7976931348623157e308)
    top = top if math.isfinite(top) else 3.4028234663852886e38
    low = min(_rounded(slot, s * (h - b / a)), top)
    if not low > -top:  # NaN too, which would be sought for ever
        low = -top
    high = low
    step = max(abs(low) * (2.0**-24 if top < 1e39 else 2.0**-53), 1e-300)
    while _below(high, s, lens, singles, c, exactly, slot):
        if high == top:
            return s, top
        low, high, step = high, min(_rounded(slot, high + step), top), 2.0 * step
    while not _below(low, s, lens, singles, c, exactly, slot):
        if low == -top:
            return s, -math.inf
        high, low, step = low, max(_rounded(slot, low - step), -top), 2.0 * step
    while True:
        middle = _rounded(slot, 0.5 * low + 0.5 * high)
        if not low < middle < high:
            return s, low
        if _below(middle, s, lens, singles, c, exactly, slot):
            low = middle
        else:
            high = middle


@by_type
def _unless_unused(how, w):  # type: ignore[no-untyped-def]
    """Weights as a forward map takes them: None where they mean nothing but statistics."""
    return (lambda how, w: None) if how.simple else (lambda how, w: w)


@part(inline="always")
def _forward_map(p0, p1, s0, c0, ca, x, y, stats, affine, summed, plan, memory, how, r, w, order):  # type: ignore[no-untyped-def]
    """Pieces p0 to p1 of a tile, backwards if they were summed: what was read last is in cache.

    The channels from ca on are fetched meanwhile, if it is >= 0.
    """
    g = min(plan[1], x.shape[1] - c0)
    all_numbers, _, spread_numbers, all_singles, spread_singles, scratch = memory
    numbers, singles = all_numbers[:3, :g], all_singles[2:8, :g]
    exact = plan[7] & EXACT != 0
    rare = _forward_coefficients(s0, c0, stats, affine, numbers, singles, exact, x.itemsize == 8)
    if plan[0]:
        spread_columns(numbers, spread_numbers, plan)
        if not exact:
            spread_columns(singles, spread_singles, plan)
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
    """x, y (O, C, I), stats (4, G C), affine (2, C), part (cells or items, P, 4, channels of a tile).

    y is not touched without the MAP stage. starts (G + 1,), order (O,) or (0,), r (O, C, I) and w (O, 1, I) or None.
    """
    keep_whole()
    x, y, stats, affine, part = borrowed(x), borrowed(y), borrowed(stats), borrowed(affine), borrowed(part)
    claims, starts, order, r, w = borrowed(claims), borrowed(starts), borrowed(order), borrowed(r), borrowed(w)
    owned = _memory(x, y, plan, stage, narrowest(x), 2 if absent(w) else 3, 3, 6, not absent(w))
    memory = _lent(owned)
    pieces, tiles = part_sizes(x.shape, plan)
    u = _claimed(k, items, claims)
    while u >= 0:
        first, last, stop = _borders(u, items, (starts.size - 1) * tiles, pieces, stage)
        for cell in range(first // pieces, (last + pieces - 1) // pieces):
            g, t = cell // tiles, cell % tiles
            count, c0 = starts[g + 1] - starts[g], t * plan[1]
            n0 = _start(order, starts[g])
            s0, channels = g * x.shape[1] + c0, min(plan[1], x.shape[1] - c0)
            xs, ys, rs, ws = (
                outer(x, n0, count),
                outer(y, n0, count),
                outer(r, n0, count),
                outer(w, n0, count),
            )
            own, order_of = _planned(xs.shape, plan), _order_of(order, starts[g], count)
            p0, p1 = max(0, first - cell * pieces), min(pieces, last - cell * pieces)
            sums = place(part, k if stage & SUM and stage & FINISH else cell)
            if stage & SUM:
                for p in range(p0, p1):
                    _forward_sum(p, c0, xs, sums, own, memory, ws, order_of)
            if stage & FINISH:
                for c in range(channels):
                    _forward_finish(c, s0 + c, stats, sums, eps, part.shape[0] > 0)
            if stage & MAP:
                ahead = c0 + plan[1] if (cell + 1) * pieces < stop and t + 1 < tiles and plan[7] & NEXT else -1
                _forward_map(
                    p0, p1, s0, c0, ahead, xs, ys, stats, affine, part.shape[0] > 0, own, memory, how, rs,
                    _unless_unused(how, ws), order_of,
                )  # fmt: skip
        u = _claimed(k, items, claims)
    fence()
    hold(owned)


@part()
def part_sizes(shape, plan):  # type: ignore[no-untyped-def]
    """Pieces of a tile, and tiles of a set."""
    return (plan[2] + plan[3] - 1) // plan[3], (shape[1] + plan[1] - 1) // plan[1]


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
def _borders(u, items, cells, pieces, stage):  # type: ignore[no-untyped-def]
    """Unit u: the pieces of all cells from first to last, and where its share stops. A cell is a tile of a set.

    With the FINISH stage it has whole cells.
    """
    units = UNITS if items > 1 else 1
    step, work = (pieces, cells) if stage & FINISH else (1, cells * pieces)
    first, last, stop = work * u // (items * units), work * (u + 1) // (items * units), work * (u // units + 1) // items
    return first * step, last * step, stop * step


@Kernel
def forward_kernel(
    items, item, x, y, stats, affine, eps, part, claims, plan, stage, starts, order, how, r, w
):  # type: ignore[no-untyped-def]  # fmt: skip
    """`forward_item`, whose address is `item`, for all items."""
    for k in prange(items):
        call(item, (np.int64(k), items, x, y, stats, affine, eps, part, claims, plan, stage, starts, order, how, r, w))


@part(inline="always")
def _backward_sum(p, s0, c0, dy, x, stats, part, plan, memory, how, r, w, order):  # type: ignore[no-untyped-def]
    """part (P, 5, G) of piece p of a tile: count, mean of dy as hi and lo, mean of x - hi, co-moment."""
    k0, k1 = p * plan[3], min((p + 1) * plan[3], plan[2])
    g = min(plan[1], x.shape[1] - c0)
    numbers, all_sums, near64, singles, near, scratch = memory
    totals, sums, pivot, hi = numbers[5:10, :g], all_sums[:, : _width(g, plan)], singles[0, :g], singles[1, :g]
    lenses, spread_lenses = numbers[10:, :g], _columns_of(how, r, near64[5:], near[8:])
    part[p, 0] = 0.0
    if k0 >= k1:
        part[p] = 0.0
        return
    again = plan[7] & EXACT != 0
    if not again:
        few = _few(x.shape, plan)
        for c in range(g):
            hi[c] = stats[0, s0 + c]
        if plan[0]:
            spread_column(hi, near[1], plan)
        _mean_of_dy(
            dy, x, k0, c0, pivot, hi, totals, sums, near, scratch, plan, few, how, r, w, order, lenses, spread_lenses
        )
        n = 0.0
        for k in range(k0, k1):
            _products(
                dy,
                x,
                k,
                c0,
                pivot,
                hi,
                sums,
                near,
                scratch,
                plan,
                ALL,
                how,
                r,
                w,
                order,
                lenses,
                spread_lenses,
            )
            n += _count(k, x.shape, plan, ALL)
        _by_channel(sums, totals, plan)
        for c in range(g):
            var, off = stats[2, s0 + c], totals[1, c] / n
            # A value with all of the variance has a gradient near 0, the difference of two terms: v must be exact then.
            spread_out = totals[4, c] <= (x.shape[0] * x.shape[2] * var) ** 2 / 64.0 and 1e-15 < var < 1e15
            if _near_enough(totals[0, c], totals[3, c], n, 0.1) and spread_out and off * off <= var:
                part[p, 0, c], part[p, 1, c], part[p, 2, c] = n, pivot[c], totals[0, c] / n
                part[p, 3, c] = off - (stats[0, s0 + c] - hi[c])
                part[p, 4, c] = totals[2, c] - totals[0, c] * off
            again |= part[p, 0, c] == 0.0
    if again:
        mean, merged, hi64 = numbers[0, :g], numbers[1:5, :g], stats[0, s0 : s0 + g]
        merged[:] = 0.0
        if plan[0]:
            spread_column(hi64, near64[1], plan)
        n = 0.0
        for k in range(k0, k1):
            _mean_of_dy(
                dy, x, k, c0, mean, hi64, totals, sums, near64, scratch, plan, ALL, how, r, w, order, lenses,
                spread_lenses,
            )  # fmt: skip
            _products(
                dy,
                x,
                k,
                c0,
                mean,
                hi64,
                sums,
                near64,
                scratch,
                plan,
                ALL,
                how,
                r,
                w,
                order,
                lenses,
                spread_lenses,
            )
            _by_channel(sums, totals, plan)
            m = _count(k, x.shape, plan, ALL)
            for c in range(g):
                s, d, e = totals[0, c] / m, totals[1, c] / m, totals[2, c] - totals[0, c] * totals[1, c] / m
                _, merged[0, c], merged[1, c], merged[2, c], merged[3, c] = merge_comoments(
                    n, merged[0, c], merged[1, c], merged[2, c], merged[3, c], m, mean[c], s, d, e
                )
            n += m
        for c in range(g):
            if plan[7] & EXACT or part[p, 0, c] == 0.0:
                part[p, 0, c], part[p, 1, c], part[p, 2, c] = n, merged[0, c], merged[1, c]
                part[p, 3, c], part[p, 4, c] = merged[2, c], merged[3, c]


@by_type
def _mean_of_dy(*args):  # type: ignore[no-untyped-def]
    """As `_mean`, of dy f'(z) where there is an activation."""
    return _mean_of_dy_itself if args[12].simple else _mean_of_dy_bent


def _mean_of_dy_itself(
    dy, x, k, c0, pivot, hi, totals, sums, near, scratch, plan, few, how, r, w, order, lenses, spread_lenses
):  # type: ignore[no-untyped-def]  # fmt: skip
    own = scratch[1], scratch[1], scratch[2]  # dy's type, not x's
    _mean(dy, k, c0, pivot, totals[:2], sums[:2], near, own, plan, few, None, order)


def _mean_of_dy_bent(
    dy, x, k, c0, pivot, hi, totals, sums, near, scratch, plan, few, how, r, w, order, lenses, spread_lenses
):  # type: ignore[no-untyped-def]  # fmt: skip
    pivot[:] = 0
    near[0] = 0
    _products(dy, x, k, c0, pivot, hi, sums, near, scratch, plan, few, how, r, w, order, lenses, spread_lenses)
    _by_channel(sums, totals, plan)
    n = _count(k, x.shape, plan, few)
    _divide(pivot, totals, n, None)
    if few < ALL:
        # Where most slopes are 0, the mean of a few values is more than a standard deviation off now and then, in one
        # of a tile's channels nearly always, and all would be summed again.
        for c in range(pivot.size):
            if pivot[c] * pivot[c] <= 0.25 * (totals[3, c] / n - pivot[c] * pivot[c]):
                pivot[c] = 0.0
    if plan[0]:
        spread_column(pivot, near[0], plan)


@part(inline="always")
def _backward_finish(c, s, stats, grads, part):  # type: ignore[no-untyped-def]
    """grads (6, G C): mean of dy as hi and lo, covariance, mean of x - mean; in training dgamma, and dbeta."""
    n = hi = lo = t = m = 0.0
    for p in range(part.shape[0]):
        n, hi, lo, t, m = merge_comoments(
            n, hi, lo, t, m, part[p, 0, c], part[p, 1, c], part[p, 2, c], part[p, 3, c], part[p, 4, c]
        )
    grads[0, s], grads[1, s] = settle(hi, lo)
    grads[2, s] = m / n if n > 0.0 else 0.0
    grads[3, s] = t - stats[1, s]
    grads[4, s] = n * grads[2, s] * stats[3, s]
    grads[5, s] = n * grads[0, s] + n * grads[1, s]


@part()
def _backward_coefficients(s0, c0, stats, affine, grads, numbers, singles, n, mass, frozen, exact):  # type: ignore[no-untyped-def]
    """By channel. numbers (5, G): ghi, hi, a, b, c for dx = a (dy - ghi) + (b (x - hi) + c).

    singles (8, G): the same in float32, where c has what the rounding of ghi and hi takes away; 1 where they won't do,
    as of all if `exact`; and what the rounding of a and b takes away. Returns for how many channels they won't do.

    With weights, whose sum is `mass` (of n values; 0 without), their factor of the second term has the mean of dy too:
    dx = a dy + w (b (x - hi) + c). Of frozen statistics a alone is left.
    """
    rare = 0
    for c in range(numbers.shape[1]):
        ghi, glo, hi, lo = grads[0, s0 + c], grads[1, s0 + c], stats[0, s0 + c], stats[1, s0 + c]
        invstd, covariance = stats[3, s0 + c], grads[2, s0 + c]
        a = affine[0, c0 + c] * invstd
        if mass > 0.0:
            covariance = (n * covariance + grads[5, s0 + c] * grads[3, s0 + c]) / mass
            glo += ghi
            glo *= n / mass
            ghi = 0.0
        if frozen:
            ghi = glo = lo = covariance = 0.0
        b = -a * (covariance * invstd) * invstd
        numbers[0, c], numbers[1, c], numbers[2, c], numbers[3, c], numbers[4, c] = ghi, hi, a, b, -(a * glo + b * lo)
        singles[0, c], singles[1, c] = ghi, hi
        _split(a, singles, 2, 6, c)
        _split(b, singles, 3, 7, c)
        rest = numbers[4, c] + a * (singles[0, c] - ghi) + b * (singles[1, c] - hi)
        singles[4, c] = rest
        fits = (1e-30 < abs(a) < 1e30 or a == 0.0) and (1e-30 < abs(b) < 1e30 or b == 0.0) and abs(rest) < 1e30
        if exact or not fits:
            rare += 1
        singles[5, c] = exact or not fits
    return rare


@part(inline="always")
def _backward_map(
    p0, p1, s0, c0, ca, dy, x, dx, stats, affine, grads, plan, memory, how, r, w, dr, order, mass
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Pieces p0 to p1 of a tile, backwards; the channels from ca on are fetched meanwhile, if it is >= 0."""
    g = min(plan[1], x.shape[1] - c0)
    all_numbers, _, spread_numbers, all_singles, spread_singles, scratch = memory
    numbers, singles, lenses, spread_lenses = (
        all_numbers[:5, :g],
        all_singles[2:, :g],
        all_numbers[10:, :g],
        _columns_of(how, r, spread_numbers[5:], spread_singles[8:]),
    )
    n, exact = float(x.shape[0] * x.shape[2]), plan[7] & EXACT != 0
    rare = _backward_coefficients(s0, c0, stats, affine, grads, numbers, singles, n, mass, is_frozen(how) != 0.0, exact)
    used = used_of(how, r, w, x, numbers, singles)
    if used.itemsize == 8:
        rare = 0
    spread_used = used_of(how, r, w, x, spread_numbers, spread_singles)
    if plan[0]:
        spread_columns(used, spread_used, plan)
        if rare:
            spread_columns(numbers, spread_numbers, plan)
    k0, k1 = p0 * plan[3], min(p1 * plan[3], plan[2])
    for k in range(k1 - 1, k0 - 1, -1):
        if plan[0]:
            columns_gradient(
                dy, x, dx, k, c0, g, spread_numbers, spread_used, rare, plan, how, r, w, dr, order, spread_lenses
            )
        else:
            rows_gradient(dy, x, dx, k, c0, ca, numbers, used, rare, plan, scratch, how, r, w, dr, order, lenses)


@compiled
def backward_item(
    k, items, dy, x, dx, stats, affine, grads, part, claims, plan, stage, starts, order, how, r, w, dr, mass
):  # type: ignore[no-untyped-def]  # fmt: skip
    """dy, x, dx (O, C, I), stats (4, G C), affine (2, C), grads (6, G C), part (cells or items, P, 5, channels).

    starts (G + 1,), order (O,) or (0,), r and dr (O, C, I) or None, w (O, 1, I) or None, mass (G,) or None.
    """
    keep_whole()
    dy, x, dx, part, claims = borrowed(dy), borrowed(x), borrowed(dx), borrowed(part), borrowed(claims)
    stats, affine, grads, starts = borrowed(stats), borrowed(affine), borrowed(grads), borrowed(starts)
    order, r, w, dr, mass = borrowed(order), borrowed(r), borrowed(w), borrowed(dr), borrowed(mass)
    owned = _memory(x, dx, plan, stage, narrowest(x), 5, 8, 11, not absent(w))
    memory = _lent(owned)
    pieces, tiles = part_sizes(x.shape, plan)
    u, seen = _claimed(k, items, claims), -1
    while u >= 0:
        first, last, stop = _borders(u, items, (starts.size - 1) * tiles, pieces, stage)
        for cell in range(first // pieces, (last + pieces - 1) // pieces):
            g, t = cell // tiles, cell % tiles
            count, c0 = starts[g + 1] - starts[g], t * plan[1]
            n0 = _start(order, starts[g])
            s0, channels = g * x.shape[1] + c0, min(plan[1], x.shape[1] - c0)
            xs, dys, dxs = outer(x, n0, count), outer(dy, n0, count), outer(dx, n0, count)
            rs, ws, drs = outer(r, n0, count), outer(w, n0, count), outer(dr, n0, count)
            own, order_of = _planned(xs.shape, plan), _order_of(order, starts[g], count)
            p0, p1 = max(0, first - cell * pieces), min(pieces, last - cell * pieces)
            sums = place(part, k if stage & SUM and stage & FINISH else cell)
            if not is_plain(how) and cell != seen:
                seen, lenses = cell, memory[0][10:, :channels]
                _lenses_of(how, r, s0, c0, stats, affine, lenses, memory[3], not absent(w) or plan[7] & EXACT != 0)
                if plan[0]:
                    spread_columns(lenses, _columns_of(how, r, memory[2][5:], memory[4][8:]), plan)
            if stage & SUM:
                for p in range(p0, p1):
                    _backward_sum(p, s0, c0, dys, xs, stats, sums, own, memory, how, rs, ws, order_of)
            if stage & FINISH:
                for c in range(channels):
                    _backward_finish(c, s0 + c, stats, grads, sums)
            if stage & MAP:
                ahead = c0 + plan[1] if (cell + 1) * pieces < stop and t + 1 < tiles and plan[7] & NEXT else -1
                _backward_map(
                    p0, p1, s0, c0, ahead, dys, xs, dxs, stats, affine, grads, own, memory, how, rs, ws, drs, order_of,
                    _mass_of(mass, g),
                )  # fmt: skip
        u = _claimed(k, items, claims)
    fence()
    hold(owned)


@unless_none(0, lambda *args: 0.0)
def _mass_of(mass, g):  # type: ignore[no-untyped-def]
    return mass[g]


@Kernel
def backward_kernel(
    items, item, dy, x, dx, stats, affine, grads, part, claims, plan, stage, starts, order, how, r, w, dr, mass
):  # type: ignore[no-untyped-def]  # fmt: skip
    """`backward_item`, whose address is `item`, for all items."""
    for k in prange(items):
        call(
            item,
            (
                np.int64(k),
                items,
                dy,
                x,
                dx,
                stats,
                affine,
                grads,
                part,
                claims,
                plan,
                stage,
                starts,
                order,
                how,
                r,
                w,
                dr,
                mass,
            ),
        )
