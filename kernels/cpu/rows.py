"""One block of the rows schedule: runs inside a channel (NCHW, (C, N), a single channel).

A tile is some neighbouring channels; a block of it is the runs of a few outer indices, or a segment of one. Short runs
(7×7, 14×14) are walked tile by tile in the order of memory, long ones one channel at a time: then the tile is one. A
tile is mapped in the loop that sums the next one, run beside run (`in_turn`).

What has no unit stride, or runs of fewer elements than a vector, is gathered: a block's values of a channel come to a
scratch run, and results are scattered from one.
"""

import numpy as np

from .activations import absent, keeps, onwards, residual_of
from .cut import GATHER, PAST
from .formulas import called, formula
from .lanes import LANES, first, keep_whole, nothing, spread, total
from .maps import (
    fetch_all,
    in_double,
    is_rare,
    joined_numbers,
    lens,
    map_one,
    map_part,
    numbers_of,
    shift_all,
    sizes_of,
)
from .memory import before_line, load, load_part, pointer, save, shifted, spread_of
from .parts import by_type, part, unless_none
from .sums import AHEAD, run_sums
from .views import row

# Constants go to parts as runtime values below (`np.int64(0)`): Numba compiles them again for each literal.

SAMPLE = 2 * LANES
KEPT = 3  # row of a lens: which channel of those kept this one is, or -1


@part()
def block(k, shape, plan):  # type: ignore[no-untyped-def]
    """Block k of a tile: outer o0 to o1, and in each of its runs n elements from i0 on."""
    runs, segments, length = plan.height, plan.segments, plan.length
    o = (k // segments) * runs
    i = (k % segments) * length
    return o, min(o + runs, shape[0]), i, min(length, shape[2] - i)


@part()
def _samples(k, shape, plan, few):  # type: ignore[no-untyped-def]
    """What is walked of block k: how many samples, the runs and elements of each, the steps from one to the next.

    All of it: run by run, or at once where it is gathered. Or `few` values at least, from here and there: neighbours
    are alike, and a pivot that is far from the mean costs more than all samples.
    """
    o0, o1, _, n = block(k, shape, plan)
    runs, gather = o1 - o0, plan.flags & GATHER != 0
    if few >= runs * n:
        return (1, runs, n, runs, n) if gather else (runs, 1, n, 1, 0)
    m = min(n, few, SAMPLE)
    each = (min(few, SAMPLE) + m - 1) // m if gather else 1
    count = (few + each * m - 1) // (each * m)
    return count, each, m, max(1, (runs - each + 1) // count), (n - m) // count


@part()
def following(o, i, o0, o1, runs, step, further):  # type: ignore[no-untyped-def]
    """Where the sample after that at (o, i) starts: runs again from o0 on, once they have come to o1."""
    return o + step if o + step + runs <= o1 else o0, i + further


@part()
def rows_count(k, shape, plan, few):  # type: ignore[no-untyped-def]
    """Values of a channel in block k, or in its samples of `few` values at least."""
    count, runs, n, _, _ = _samples(k, shape, plan, few)
    return count * runs * n


@part()
def rows_first(x, k, c0, pivot, plan, order):  # type: ignore[no-untyped-def]
    """pivot (G,) <- the first values of the channels from c0 on in block k."""
    o0, _, i0, _ = block(k, x.shape, plan)
    o, like = index(order, o0), spread(pivot[0])
    for c in range(pivot.size):
        pivot[c] = first(load_part(at(x, o, c0 + c, i0), 0, 1, like))


@part()
def index(order, o):  # type: ignore[no-untyped-def]
    """Outer index o of a set: they follow each other where there is no order."""
    return order[o] if order.size > 0 else o


@formula
def at(a, o, c, i):  # type: ignore[no-untyped-def]
    """A pointer to an element; None of None."""
    return None if a is None else pointer(a, o * a.strides[0] + c * a.strides[1] + i * a.strides[2])


@unless_none()
def gathered(a, c, o0, o1, i0, n, order, scratch):  # type: ignore[no-untyped-def]
    k = 0
    for o in range(o0, o1):
        p = index(order, o)
        for i in range(i0, i0 + n):
            scratch[k] = a[p, c, i]
            k += 1
    return pointer(scratch, 0)


@unless_none(1)
def scatter(scratch, a, c, o0, o1, i0, n, order):  # type: ignore[no-untyped-def]
    k = 0
    for o in range(o0, o1):
        p = index(order, o)
        for i in range(i0, i0 + n):
            a[p, c, i] = scratch[k]
            k += 1


@unless_none()
def repeated(w, o, i0, n, scratch):  # type: ignore[no-untyped-def]
    """The weights of a run, and behind them those of its start, as the run of the next channel has the same."""
    source, target, zero = at(w, o, 0, i0), pointer(scratch, 0), nothing(spread(scratch[0]))
    for i in range(0, n, LANES):
        save(target, i, load_part(source, i, min(LANES, n - i), zero))
    save(target, n, load(source, 0, zero))
    return target


@formula
def _room(a, scratch):  # type: ignore[no-untyped-def]
    """Where the results of a block go until they are scattered to `a`."""
    return None if a is None else pointer(scratch, 0)


@formula
def lanes_of(sums, i, c):  # type: ignore[no-untyped-def]
    """Where the lanes of channel c are in row i of the sums."""
    return pointer(sums, i * sums.strides[0] + 8 * LANES * c)


@part()
def add_up(sums, s):  # type: ignore[no-untyped-def]
    """s (M, G) <- the sums of lanes in the rows of sums, and these <- 0."""
    like = spread(0.0)
    for i in range(s.shape[0]):
        for c in range(s.shape[1]):
            lanes = lanes_of(sums, i, c)
            s[i, c] = total(load(lanes, 0, like))
            save(lanes, 0, nothing(like))


@part()
def _then(a, run, o, n, order):  # type: ignore[no-untyped-def]
    """n elements before the run of the next outer index, whose start is fetched beside the end of this one."""
    if n < max(AHEAD, a.shape[2]) or a.strides[2] != a.itemsize or o + 1 >= a.shape[0]:
        return run
    return shifted(run, (index(order, o + 1) - index(order, o)) * a.strides[0] - n * a.itemsize)


@formula
def _then_all(sources, runs, o, n, order):  # type: ignore[no-untyped-def]
    """As `_then`, of each."""
    return tuple(called(_then, a, run, o, n, order) for a, run in zip(sources, runs, strict=True))


@part()
def rows_sums(sources, r, w, k, c0, pivots, sums, plan, scratch, few, how, lenses, order):  # type: ignore[no-untyped-def]
    """Lanes of sums (M, 16 G) += those of the channels from c0 on; pivots (G,) of each source set the type.

    For all of block k, or for samples of `few` values.
    """
    keep_whole()
    shape = sources[0].shape
    o0, o1, i0, _ = block(k, shape, plan)
    samples, count, n, step, further = _samples(k, shape, plan, few)
    gather, o, i, residual = plan.flags & GATHER, o0, i0, residual_of(how, r)
    for _ in range(samples):
        p = index(order, o)
        for c in range(pivots[0].size):
            if _kept_summed(
                how, r, sources, w, c0, c, o, count, i, n, pivots, sums, gather != 0, scratch, lenses, order
            ):
                continue
            if gather:
                runs = _gathered_all(sources, c0 + c, o, o + count, i, n, order, scratch)
                run_r = gathered(residual, c0 + c, o, o + count, i, n, order, scratch[1][2])
                run_w = gathered(w, 0, o, o + count, i, n, order, scratch[2][0])
            else:
                runs, run_r, run_w = at_all(sources, p, c0 + c, i), at(residual, p, c0 + c, i), at(w, p, 0, i)
            run_sums(
                runs, run_r, run_w, count * n, pivots_of(pivots, c), lanes_of(sums, 0, c), sums.strides[0], how,
                lens(lenses, c), _then_all(sources, runs, o, n, order),
            )  # fmt: skip
        o, i = following(o, i, o0, o1, count, step, further)


# Channels whose x was kept, where that of others is had back from y: their runs, by what knows no y. `lenses` say which
# of those kept a channel is, or -1. Of other kinds of calls there are none, as a constant.


@by_type
def _any_kept(how, r, lenses, channels):  # type: ignore[no-untyped-def]
    """Whether a tile has such channels."""
    return _are_kept if keeps(how, r) else lambda *_: False


def _are_kept(how, r, lenses, channels):  # type: ignore[no-untyped-def]
    some = False
    for c in range(channels):
        some = some or lenses[KEPT, c] >= 0.0
    return some


@part()
def _kept_runs(sources, r, j, c, o, count, i, n, gather, order, scratch):  # type: ignore[no-untyped-def]
    """Of dy, and of channel j of what was kept."""
    if gather:
        of_x, of_dy = row(scratch[0], 0, scratch[0].shape[1]), row(scratch[1], 0, scratch[1].shape[1])
        return gathered(sources[0], c, o, o + count, i, n, order, of_dy), gathered(
            r, j, o, o + count, i, n, order, of_x
        )
    p = index(order, o)
    return at(sources[0], p, c, i), at(r, p, j, i)


@by_type
def _kept_summed(how, r, sources, w, c0, c, o, count, i, n, pivots, sums, gather, scratch, lenses, order):  # type: ignore[no-untyped-def]
    """As `rows_sums` does it, and True, if the channel's x was kept."""
    return _sum_of_kept if keeps(how, r) else lambda *_: False


def _sum_of_kept(how, r, sources, w, c0, c, o, count, i, n, pivots, sums, gather, scratch, lenses, order):  # type: ignore[no-untyped-def]
    if lenses[KEPT, c] < 0.0:
        return False
    runs = _kept_runs(sources, r, np.int64(lenses[KEPT, c]), c0 + c, o, count, i, n, gather, order, scratch)
    run_w = gathered(w, 0, o, o + count, i, n, order, scratch[2][0]) if gather else at(w, index(order, o), 0, i)
    run_sums(
        runs, None, run_w, count * n, pivots_of(pivots, c), lanes_of(sums, 0, c), sums.strides[0], onwards(how),
        lens(lenses, c), runs,
    )  # fmt: skip
    return True


@by_type
def _kept_mapped(
    how, r, sources, target, w, c0, c, o, count, i, n, numbers, rare, past, gather, scratch, like, order
):  # type: ignore[no-untyped-def]  # fmt: skip
    """As `rows_map` does it, and True, if the channel's x was kept."""
    return _map_of_kept if keeps(how, r) else lambda *_: False


def _map_of_kept(
    how, r, sources, target, w, c0, c, o, count, i, n, numbers, rare, past, gather, scratch, like, order
):  # type: ignore[no-untyped-def]  # fmt: skip
    lenses, one = numbers[2], np.int64(1)
    if lenses[KEPT, c] < 0.0:
        return False
    runs = _kept_runs(sources, r, np.int64(lenses[KEPT, c]), c0 + c, o, count, i, n, gather, order, scratch)
    if gather:
        result, own = pointer(scratch[1][1], 0), (None, gathered(w, 0, o, o + count, i, n, order, scratch[2][0]), None)
        _map_run(runs, result, own, count * n, c, one, numbers, rare, False, runs, onwards(how), like)
        scatter(scratch[1][1], target, c0 + c, o, o + count, i, n, order)
    else:
        p = index(order, o)
        own = None, at(w, p, 0, i), None
        _map_run(runs, at(target, p, c0 + c, i), own, n, c, one, numbers, rare, past, runs, onwards(how), like)
    return True


@part()
def keep_rows(k, x, kept, lost, j0, j1, plan, order):  # type: ignore[no-untyped-def]
    """kept (O, n, I) <- x, of its channels lost[j0:j1] and block k."""
    o0, o1, i0, n = block(k, x.shape, plan)
    for o in range(o0, o1):
        p = index(order, o)
        for j in range(j0, j1):
            for i in range(i0, i0 + n):
                kept[p, j, i] = x[p, lost[j], i]


@formula
def pivots_of(pivots, c):  # type: ignore[no-untyped-def]
    """In all lanes, of a channel."""
    return tuple(spread_of(pivot, 0, c) for pivot in pivots)


@formula
def at_all(sources, o, c, i):  # type: ignore[no-untyped-def]
    """As `at`, of each."""
    return tuple(at(a, o, c, i) for a in sources)


@part()
def map_runs(sources, target, beside, n, c, count, numbers, past, ahead, how, like):  # type: ignore[no-untyped-def]
    """Runs of n elements of `count` channels from c on, one behind the other without a gap; n >= 16 if they are many.

    Vectors go over the borders of runs, so that lines are stored whole; `ahead` is what will be read next.
    """
    m, i, end = count * n, 0, n
    p = numbers_of(how, beside, numbers, c)
    if past:
        i = min(m, before_line(target))
    if i > 0:  # a masked store of nothing still held up the stores behind it: 0.22 against 0.09 ns an element
        map_part(sources, target, beside, 0, 0, i, how, like, p)
    while i + LANES <= m:
        while i + LANES <= end:
            fetch_all(ahead, i)
            map_one(sources, target, beside, i, i - end + n, past, how, like, p)
            i += LANES
        if i + LANES <= m:
            c += 1
            q = numbers_of(how, beside, numbers, c)
            if i < end:
                fetch_all(ahead, i)
                map_one(sources, target, beside, i, i - end + n, past, how, like, joined_numbers(end - i, p, q))
                i += LANES
            p = q
            end += n
    if i < m:
        fetch_all(ahead, i)
        map_part(sources, target, beside, i, i - end + n, m - i, how, like, p)


@part()
def _map_run(sources, target, beside, n, c, count, numbers, rare, past, ahead, how, like):  # type: ignore[no-untyped-def]
    """As `map_runs`, of channels all alike: by float64 where the fast numbers won't do for the first of them."""
    if rare > 0 and is_rare(numbers, c) != 0.0:
        map_runs(sources, target, beside, n, c, count, in_double(numbers), past, ahead, how, like)
    else:
        map_runs(sources, target, beside, n, c, count, numbers, past, ahead, how, like)


@unless_none(0, lambda *args: True)
def _adjacent(a, n):  # type: ignore[no-untyped-def]
    return a.shape[1] == 1 or a.strides[1] == n * a.itemsize


@formula
def _gathered_all(sources, c, o0, o1, i0, n, order, scratch):  # type: ignore[no-untyped-def]
    """As `gathered`, of each: dy to the first run of y's type, x to its own."""
    runs = (scratch[1], scratch[0])[-len(sources) :]
    return tuple(
        called(gathered, a, c, o0, o1, i0, n, order, row(run, 0, run.shape[1]))
        for a, run in zip(sources, runs, strict=True)
    )


@part()
def rows_map(sources, target, beside, k, c0, ca, numbers, rare, plan, scratch, how, like, order):  # type: ignore[no-untyped-def]
    """Block k of the channels from c0 on, backwards; those from ca on are fetched, if >= 0, or what comes next.

    `rare`: for how many of them the fast numbers won't do.
    """
    keep_whole()
    shape, g, past, (kept, w, dr) = target.shape, numbers[0].shape[1], plan.flags & PAST != 0, beside
    r = residual_of(how, kept)
    o0, o1, i0, n = block(k, shape, plan)
    if plan.flags & GATHER:
        for c in range(g):
            if _kept_mapped(
                how, kept, sources, target, w, c0, c, o0, o1 - o0, i0, n, numbers, rare, past, True, scratch, like,
                order,
            ):  # fmt: skip
                continue
            runs = _gathered_all(sources, c0 + c, o0, o1, i0, n, order, scratch)
            run_r = gathered(r, c0 + c, o0, o1, i0, n, order, scratch[1][2])
            run_w = gathered(w, 0, o0, o1, i0, n, order, scratch[2][0])
            result, m = pointer(scratch[1][1], 0), (o1 - o0) * n
            own = run_r, run_w, _room(dr, scratch[1][3])
            _map_run(runs, result, own, m, c, np.int64(1), numbers, rare, plan.flags < 0, runs, how, like)
            scatter(scratch[1][1], target, c0 + c, o0, o1, i0, n, order)
            scatter(scratch[1][3], dr, c0 + c, o0, o1, i0, n, order)
        return
    whole = n >= LANES and (rare == 0 or rare == g or absent(numbers[1])) and (absent(w) or g > 1)
    whole = whole and _adjacent(sources[0], n) and _adjacent(sources[-1], n) and _adjacent(target, n)
    whole = whole and _adjacent(r, n) and _adjacent(dr, n) and not _any_kept(how, kept, numbers[2], g)
    count = g if whole else 1
    oa, _, ia, _ = block(plan.blocks - 1 - k, shape, plan)
    for o in range(o1 - 1, o0 - 1, -1):  # what was read last is in cache
        p = index(order, o)
        run_w = repeated(w, p, i0, n, scratch[2][0]) if whole else at(w, p, 0, i0)
        for c in range(0, g, count):
            if _kept_mapped(
                how, kept, sources, target, w, c0, c, o, np.int64(1), i0, n, numbers, rare, past, False, scratch, like,
                order,
            ):  # fmt: skip
                continue
            runs = at_all(sources, p, c0 + c, i0)
            ahead = shift_all(runs, sizes_of(sources), AHEAD)
            if ca >= 0:
                there = index(order, min(oa + o1 - 1 - o, shape[0] - 1))
                ahead = at_all(sources, there, min(ca + c, shape[1] - 1), ia)
            own = at(r, p, c0 + c, i0), run_w, at(dr, p, c0 + c, i0)
            _map_run(runs, at(target, p, c0 + c, i0), own, n, c, count, numbers, rare, past, ahead, how, like)
