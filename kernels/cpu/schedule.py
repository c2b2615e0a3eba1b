"""How work is cut, and what the two kernels do alike: sums of a block, pivots, units that threads claim.

An array is cut into tiles of channels, a tile into pieces, a piece into blocks. All borders depend on the shape alone
and all merging is in order, so one thread or many give the same bits. What a block is, `rows` and `columns` know.

With SUM and FINISH, a unit of work is a span of tiles that go through all stages one after the other: a tile is
mapped while its data is still in cache. Memory should read and write at once, so a tile of rows is mapped in the loop
that sums the next one (`TWO`); where it can't, in forward, what comes next is fetched meanwhile. Without one of them, a
unit is a span of pieces: that is how few tiles feed many threads.

**Sums** of float32 and half data are taken in float32 lanes around a pivot, the mean of the piece's first values: small
deviations, whatever the mean. The piece's channel is summed again in float64, block by block, where those values
weren't like the rest (the pivot is more than one standard deviation off), where squares, by weight too, leave 1e-30 to
1e30, where one value has much of the variance (backward), and where something isn't finite. Float64 data and channels
of few values (nothing averages the last additions out) go that way at once: a block is summed around the pivot of the
last one, and where it is like none before, around its own mean.
"""

import math

import numpy as np

from .activations import absent
from .columns import columns_count, columns_sums, gather_columns, spread_column, weights_room
from .cut import GATHER, PAST, Cut
from .formulas import formula
from .items import claim
from .lanes import LANES, first, nothing, spread, where_at_most, where_less, where_nonzero
from .memory import before_line, blank, give, narrowest, pointer, spread_of, take
from .parts import part, unless_none
from .rows import add_up, rows_count, rows_first, rows_sums
from .views import carved, corner, in_step, outer

SUM, FINISH, MAP = 1, 2, 4

# Units of an item's share. Threads claim them one by one, at last those of others: one that wakes late, or on another
# thread's processor, finds its share done. With fixed shares, two threads that had slept took as long as one.
UNITS = 8

# Values of a channel, at least and at most, or rows of columns, whose mean is the pivot of a piece. Of 16 rows, of
# which a mask leaves 11, one in a thousand is a standard deviation off: of 1024 channels nearly all was summed twice.
FEW = 128, 256, 32
# The same for data of fewer bits than its sums, see `share_of`. One value of n is sqrt(n - 1) standard deviations off
# at most.
NARROW = 1, 2
SINGLE, DOUBLE = 1e30, 1e250  # what squares in lanes of float32 and float64 may be at most, and at least its inverse


@part()
def tile_width(channels, plan):  # type: ignore[no-untyped-def]
    """Columns or lanes of a tile; a vector may be loaded from any of them on."""
    return channels * (plan.period * plan.fold if plan.across else LANES) + LANES


@part()
def _columns(x, plan, stage, weighted):  # type: ignore[no-untyped-def]
    """What there is room for: channels, columns of sums, columns of coefficients, gathered elements, and weights."""
    g = min(plan.tile, x.shape[1])
    w = (tile_width(g, plan) + LANES - 1) // LANES * LANES
    scratch = plan.height * plan.length if plan.flags & GATHER else 0
    weights = 0
    if weighted:
        weights = weights_room(w, plan) if plan.across else scratch if scratch > 0 else plan.length + LANES
    return g, w if stage & SUM else 0, w if plan.across else 0, scratch, weights


@part()
def _lent(memory, x, y, plan, stage, wants, weighted):  # type: ignore[no-untyped-def]
    """Matrices in a work item's memory, and how many bytes it takes; of those first ones that start as 0."""
    g, s, c, scratch, weights = _columns(x, plan, stage, weighted)
    (depth, wide, narrow), like = wants, narrowest(x)
    sums, at = carved(memory, 0, depth, s, 0.0)
    columns, at = carved(memory, at, wide + 1, c, 0.0)
    singles, at = carved(memory, at, 18, g, like)
    like_columns, at = carved(memory, at, narrow + 1, c, like)
    of_weights, blank_to = carved(memory, at, 1, weights, like)
    numbers, at = carved(memory, blank_to, 32, g, 0.0)
    of_x, at = carved(memory, at, 1, scratch, x)
    of_y, at = carved(memory, at, 4, scratch, y)
    gathered = of_x, of_y, of_weights
    return (numbers, sums, columns, singles, like_columns, gathered), blank_to, at


@part(_nrt=True)
def memory_of(any_matrix, x, y, plan, stage, wants, weighted):  # type: ignore[no-untyped-def]
    """All that a work item needs: `borrowed` says why nothing below it may own an array."""
    _, _, count = _lent(any_matrix, x, y, plan, stage, wants, weighted)
    return np.empty((1, count // 8))


@part()
def lent(memory, x, y, plan, stage, wants, weighted):  # type: ignore[no-untyped-def]
    """Matrices of its memory. What is done hands on views of rows.

    By channel of a tile: (32, G) float64, 5 coefficients, 5 totals, a lens of 5 rows, 5 merged sums, that of a tile
    that waits to be mapped, of 4, two rows for what was far from its pivot, and a table that goes with y; (18, G) in
    the elements' type, 2 pivots, 8 coefficients, and room to look for edges. As many as `wants` says: by column or
    lane, sums; by column, coefficients or pivots in float64, and in the elements' type, and room for `in_step`. Then
    what is gathered: of x, of all of y's type, of weights, of which a run and its start again has room too, or what
    columns lay out.
    """
    views, blank_to, _ = _lent(memory, x, y, plan, stage, wants, weighted)
    blank(corner(memory, 0, 1, blank_to // 8), 1)
    numbers, sums, columns, singles, like_columns, gathered = views
    # Where whole lines are stored, lines of coefficients are loaded whole: backward of (6272, 1024) float64 took 6.4 to
    # 6.9 ms, now 6.0 to 6.2. By the allocator, each vector of them lay across two lines or none did.
    start = before_line(pointer(y, 0)) if plan.flags & PAST else 0
    return numbers, sums, in_step(columns, start), singles, in_step(like_columns, start), gathered


# Sets of outer indices with statistics of their own. The plan is that of the largest; a set has its own blocks.


@part()
def start_of(order, start):  # type: ignore[no-untyped-def]
    """Where a set starts in the arrays themselves: with an order, each of its indices says that."""
    return 0 if order.size > 0 else start


@part(_nrt=True)
def listed(order, start, count):  # type: ignore[no-untyped-def]
    return outer(order, start, count) if order.size > 0 else order


@part()
def _in_blocks(plan, blocks, height):  # type: ignore[no-untyped-def]
    return Cut(
        plan.across, plan.tile, blocks, plan.piece, height, plan.segments, plan.length, plan.period, plan.fold,
        plan.flags,
    )  # fmt: skip


@part()
def planned(shape, plan):  # type: ignore[no-untyped-def]
    """The plan, with the blocks of this shape."""
    if plan.across:
        rows = shape[0] if plan.period > 1 else shape[0] * shape[2]
        blocks = ((rows + plan.fold - 1) // plan.fold + plan.height - 1) // plan.height
    else:
        blocks = (shape[0] + plan.height - 1) // plan.height * plan.segments
    return _in_blocks(plan, blocks, plan.height)


@part()
def quartered(plan):  # type: ignore[no-untyped-def]
    """The plan by blocks of a quarter of the height, four for one; the last ones may be empty."""
    return _in_blocks(plan, 4 * plan.blocks, plan.height // 4)


@part()
def count_of(k, shape, plan, few):  # type: ignore[no-untyped-def]
    return float(columns_count(k, shape, plan, few) if plan.across else rows_count(k, shape, plan, few))


@part()
def first_from(lost, c):  # type: ignore[no-untyped-def]
    """Which of ascending channels is the first one not below c."""
    low, high = 0, lost.size
    while low < high:
        middle = (low + high) // 2
        if lost[middle] < c:
            low = middle + 1
        else:
            high = middle
    return low


@unless_none(0, lambda *_: False)
def any_lost(lost, c0, channels):  # type: ignore[no-untyped-def]
    """Whether a tile has channels whose x is kept."""
    return first_from(lost, c0) < first_from(lost, c0 + channels)


@part()
def add_block(sources, r, w, k, c0, pivots, near, sums, plan, scratch, few, how, lenses, order):  # type: ignore[no-untyped-def]
    """sums (M, W) += those of block k of the channels from c0 on, or of `few` values of it.

    pivots (G,) of each source, and near, which has them by column; lenses (3 or 5, G), and by column, or None and None.
    """
    if plan.across:
        columns_sums(sources, r, w, k, c0, pivots[0].size, near, sums, plan, few, how, lenses[1], order, scratch[2][0])
    else:
        rows_sums(sources, r, w, k, c0, pivots, sums, plan, scratch, few, how, lenses[0], order)


@part()
def deviations(x, k, c0, pivot, sums, near, scratch, plan, few, w, order):  # type: ignore[no-untyped-def]
    """The same, of x alone."""
    add_block((x,), None, w, k, c0, (pivot,), near, sums, plan, scratch, few, None, (None, None), order)


@part()
def by_channel(sums, totals, plan):  # type: ignore[no-untyped-def]
    """totals (M, G) <- sums (M, W), and these <- 0."""
    if plan.across:
        gather_columns(sums, totals, plan)
    else:
        add_up(sums, totals)


@part()
def mean_of(x, k, c0, pivot, totals, sums, near, scratch, plan, few, w, order):  # type: ignore[no-untyped-def]
    """pivot (G,) and near (1, W) <- about the means of block k, or of `few` values of it: in the type of pivot.

    0 where nothing has weight.
    """
    if few == NARROW[0] and not plan.across:
        rows_first(x, k, c0, pivot, plan, order)
        return
    blank(pivot, 1)
    blank(near, 1)
    deviations(x, k, c0, pivot, sums, near, scratch, plan, few, w, order)
    by_channel(sums, totals, plan)
    divide(pivot, totals, count_of(k, x.shape, plan, few), w)
    if plan.across:
        spread_column(pivot, near[0], plan)


@part()
def divide(pivot, totals, count, w):  # type: ignore[no-untyped-def]
    """pivot (G,) <- sums / counts; 0 where nothing has weight."""
    for c in range(0, pivot.size, LANES):
        g = min(LANES, pivot.size - c)
        n = counted_in(totals, c, g, count, w)
        give(pivot, 0, c, g, mean_in(take(totals, 0, c, g, spread(0.0)), n, count, w))


@formula
def counted_in(totals, c, g, count, w):  # type: ignore[no-untyped-def]
    """How many values the sums of g channels from c on have: `count`, or the sum of their weights."""
    return spread(count) if w is None else take(totals, 2, c, g, spread(0.0))


@formula
def mean_in(sums, n, count, w):  # type: ignore[no-untyped-def]
    """Sums over how many values they have: `count`, or those of lanes n, if not 0. Sixteen divisions take 32 cycles."""
    return sums * (1.0 / count) if w is None else where_nonzero(n, sums / n, nothing(n))


@formula
def mass_or(mass, g, count):  # type: ignore[no-untyped-def]
    """The sum of a set's weights; without weights `count`."""
    return count if mass is None else first(spread_of(mass, 0, g))


@part()
def few_of(shape, plan):  # type: ignore[no-untyped-def]
    return FEW[2] if plan.across else min(FEW[1], max(FEW[0], shape[0] * shape[2] // 32))


@part()
def few_in_double(x, plan, w):  # type: ignore[no-untyped-def]
    """The same where sums are taken in float64; of numbers of less than 64 bits few are enough, see `share_of`."""
    if x.itemsize == 8 or not absent(w):
        return few_of(x.shape, plan)
    return np.int64(NARROW[1] if plan.across else NARROW[0])


@part()
def share_of(x, share):  # type: ignore[no-untyped-def]
    """For `near_enough` in float64: a pivot that is 30 standard deviations off costs 1000 eps of float64, which data of
    fewer bits doesn't show."""
    return share if x.itemsize == 8 else 2.0**-10


@formula
def near_enough(mean, q, n, share, most):  # type: ignore[no-untyped-def]
    """1 where the variance is `share` of the squares around the pivot at least, and these are of 1 / most to most.

    Of n values, squares q, and their mean, less the pivot. By a half the pivot is one standard deviation off at most,
    by a tenth three: enough where the squares serve for nothing else. Slopes of 0 and 1 let the mean of a few values be
    more than one off in one of many channels, often.
    """
    one, zero = spread(1.0), spread(0.0)
    near = where_at_most(spread(share) * q, q - mean * (mean * n), one, zero)
    near = where_less(spread(1.0 / most) * n, q, where_less(q, spread(most) * n, near, zero), zero)
    return where_nonzero(q, near, where_nonzero(mean, near, one))


@part()
def adopt(own, far, pivot, near, plan):  # type: ignore[no-untyped-def]
    """pivot (G,) and near (W,) <- own (G,) where these are far off, channel by channel."""
    for c in range(pivot.size):
        if far[c] != 0.0 and math.isfinite(own[c]):
            pivot[c] = own[c]
    if plan.across:
        spread_column(pivot, near, plan)


@part()
def part_sizes(shape, plan):  # type: ignore[no-untyped-def]
    """Pieces of a tile, and tiles of a set."""
    return (plan.blocks + plan.piece - 1) // plan.piece, (shape[1] + plan.tile - 1) // plan.tile


@part()
def claimed(k, items, claims, last):  # type: ignore[no-untyped-def]
    """The next unit of item k's own share that nobody has claimed, else one of another's; -1 if there is none.

    One item alone has one unit, and the `last` one says whether it is done: it needs no claims.
    """
    if items == 1:
        return 0 if last < 0 else -1
    for i in range(items):
        share = (k + i) % items
        u = claim(claims, share)
        if u < UNITS:
            return share * UNITS + u
    return -1


@part()
def borders(u, items, cells, pieces, stage):  # type: ignore[no-untyped-def]
    """Unit u: the pieces of all cells from first to last, and where its share stops. A cell is a tile of a set.

    Where cells are summed and finished it has whole ones.
    """
    units = UNITS if items > 1 else 1
    step, work = (pieces, cells) if stage & SUM and stage & FINISH else (1, cells * pieces)
    first, last, stop = work * u // (items * units), work * (u + 1) // (items * units), work * (u // units + 1) // items
    return first * step, last * step, stop * step
