"""One block of the rows schedule: runs inside a channel (NCHW, (C, N), a single channel).

A tile is some neighbouring channels; a block of it is the runs of a few outer indices, or a segment of one. Short runs
(7×7, 14×14) are walked tile by tile in the order of memory, long ones one channel at a time: then the tile is one. A
tile is mapped in the loop that sums the next one, run beside run (`in_turn`).

What has no unit stride, or runs of fewer elements than a vector, is gathered: a block's values of a channel come to a
scratch run, and results are scattered from one.
"""

import numpy as np
from numba import types

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
    AHEAD,
    run_deviations,
    run_normalize,
    run_products,
    through,
    write,
)
from .formulas import formula
from .lanes import (
    LANES,
    before_line,
    fetch,
    first,
    fma,
    joined,
    keep_whole,
    load,
    load_part,
    narrowest,
    nothing,
    pointer,
    save,
    save_part,
    shifted,
    spread,
    spread_of,
    total,
    wide,
)
from .parts import by_type, part, unless_none

# Constants go to parts as runtime values below (`np.int64(0)`): Numba compiles them again for each literal.

# Flags of a plan: store past the caches; gather; all in float64; fetch the next tile while one is mapped, or sum it.
PAST, GATHER, EXACT, NEXT, TWO = 1, 2, 4, 8, 16

SAMPLE = 2 * LANES


@part()
def block(k, shape, plan):  # type: ignore[no-untyped-def]
    """Block k of a tile: outer o0 to o1, and in each of its runs n elements from i0 on."""
    runs, segments, length = plan[4], plan[5], plan[6]
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
    runs, gather = o1 - o0, plan[7] & GATHER != 0
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
def rows_deviations(x, k, c0, pivot, sums, plan, scratch, few, w, order):  # type: ignore[no-untyped-def]
    """Lanes of sums (2, 16 G) += x - pivot and its square, for the channels from c0 on; pivot (G,) sets the type.

    For all of block k, or for samples of `few` values. With weights w sums has a third row, for them.
    """
    keep_whole()
    o0, o1, i0, _ = block(k, x.shape, plan)
    samples, runs, n, step, further = _samples(k, x.shape, plan, few)
    gather, o, i = plan[7] & GATHER, o0, i0
    for _ in range(samples):
        p = index(order, o)
        for c in range(pivot.size):
            if gather:
                run = gathered(x, c0 + c, o, o + runs, i, n, order, scratch[0][0])
                run_w = gathered(w, 0, o, o + runs, i, n, order, scratch[2][0])
            else:
                run, run_w = at(x, p, c0 + c, i), at(w, p, 0, i)
            then = _then(x, run, o, n, order)
            run_deviations(run, run_w, runs * n, pivot[c], lanes_of(sums, 0, c), sums.strides[0], then)
        o, i = following(o, i, o0, o1, runs, step, further)


@part()
def _then(a, run, o, n, order):  # type: ignore[no-untyped-def]
    """n elements before the run of the next outer index, whose start is fetched beside the end of this one."""
    if n < max(AHEAD, a.shape[2]) or a.strides[2] != a.itemsize or o + 1 >= a.shape[0]:
        return run
    return shifted(run, (index(order, o + 1) - index(order, o)) * a.strides[0] - n * a.itemsize)


@formula
def lens(numbers, c):  # type: ignore[no-untyped-def]
    """h, a, b of z = a (x - h) + b, in all lanes."""
    return tuple(spread_of(numbers, i, c) for i in range(3))


@part()
def rows_products(dy, x, k, c0, pivot, hi, sums, plan, scratch, few, how, r, w, order, lenses):  # type: ignore[no-untyped-def]
    """Lanes of sums (5, 16 G) += g = dy - pivot, d = x - hi, g d, g^2 and d^4; lenses (3, G) as in `lens`."""
    keep_whole()
    o0, o1, i0, _ = block(k, x.shape, plan)
    samples, runs, n, step, further = _samples(k, x.shape, plan, few)
    gather, o, i = plan[7] & GATHER, o0, i0
    for _ in range(samples):
        p = index(order, o)
        for c in range(pivot.size):
            if gather:
                run_dy = gathered(dy, c0 + c, o, o + runs, i, n, order, scratch[1][0])
                run_x = gathered(x, c0 + c, o, o + runs, i, n, order, scratch[0][0])
                run_r = gathered(r, c0 + c, o, o + runs, i, n, order, scratch[1][2])
                run_w = gathered(w, 0, o, o + runs, i, n, order, scratch[2][0])
            else:
                run_dy, run_x = at(dy, p, c0 + c, i), at(x, p, c0 + c, i)
                run_r, run_w = at(r, p, c0 + c, i), at(w, p, 0, i)
            run_products(
                run_dy, run_x, runs * n, pivot[c], hi[c], lanes_of(sums, 0, c), sums.strides[0], how, run_r, run_w,
                lens(lenses, c), _then(dy, run_dy, o, n, order), _then(x, run_x, o, n, order),
            )  # fmt: skip
        o, i = following(o, i, o0, o1, runs, step, further)


@formula
def joined_numbers(n, p, q):  # type: ignore[no-untyped-def]
    """Numbers of a channel in the first n lanes, those of the next one behind them."""
    return tuple(joined(n, a, b) for a, b in zip(p, q, strict=True))


# A map computes in the elements' type where it may (`fast_numbers`), by `through`. Else in float64, by its lens.
# Backward looks at the same z: f may have a kink.


@formula
def numbers_of(fast, doubles, c):  # type: ignore[no-untyped-def]
    """What a map takes of channel c: five numbers, or the lens in float64."""
    return lens(doubles, c) if fast is None else tuple(spread_of(fast, i, c) for i in range(5))


@formula
def _normalized(how, v, p, r, w):  # type: ignore[no-untyped-def]
    if len(p) == 5:
        return bend(how, through(how, v, *p))
    return finished(how, fma(wide(v) - p[0], p[1], p[2]), v, r, w)


@part()
def _normalize_runs(x, y, n, c, count, fast, past, ahead, how, r, w, doubles, like):  # type: ignore[no-untyped-def]
    """Runs of n elements of `count` channels from c on, one behind the other without a gap; n >= 16 if they are many.

    Vectors go over the borders of runs, so that lines are stored whole; `ahead` is what will be read next.
    """
    m, i, end = count * n, 0, n
    p = numbers_of(fast, doubles, c)
    if past:
        i = min(m, before_line(y))
    if i > 0:  # a masked store of nothing still held up the stores behind it: 0.22 against 0.09 ns an element
        normalize_part(x, y, r, w, 0, 0, i, how, like, p)
    while i + LANES <= m:
        while i + LANES <= end:
            fetch(ahead, i)
            normalize_one(x, y, r, w, i, i - end + n, past, how, like, p)
            i += LANES
        if i + LANES <= m:
            c += 1
            q = numbers_of(fast, doubles, c)
            if i < end:
                fetch(ahead, i)
                normalize_one(x, y, r, w, i, i - end + n, past, how, like, joined_numbers(end - i, p, q))
                i += LANES
            p = q
            end += n
    if i < m:
        fetch(ahead, i)
        normalize_part(x, y, r, w, i, i - end + n, m - i, how, like, p)


@formula
def normalize_one(x, y, r, w, i, i_w, past, how, like, p):  # type: ignore[no-untyped-def]
    """A vector of y at i, by weights at i_w."""
    write(y, i, _normalized(how, load(x, i, like), p, loaded(r, i, like), loaded(w, i_w, like)), past)


@formula
def normalize_part(x, y, r, w, i, i_w, k, how, like, p):  # type: ignore[no-untyped-def]
    """The first k elements of one."""
    v, e = load_part(x, i, k, like), loaded_part(r, i, k, like)
    save_part(y, i, k, _normalized(how, v, p, e, loaded_part(w, i_w, k, like)))


@unless_none(0, lambda *args: True)
def _adjacent(a, n):  # type: ignore[no-untyped-def]
    return a.shape[1] == 1 or a.strides[1] == n * a.itemsize


@part()
def rows_normalize(x, y, k, c0, ca, doubles, singles, rare, plan, scratch, how, r, w, order):  # type: ignore[no-untyped-def]
    """y of block k of the channels from c0 on, backwards; those from ca on are fetched, if >= 0, or what comes next."""
    keep_whole()
    o0, o1, i0, n = block(k, x.shape, plan)
    oa, _, ia, _ = block(plan[2] - 1 - k, x.shape, plan)
    past, g = plan[7] & PAST != 0, singles.shape[1]
    fast, like = fast_numbers(how, r, w, singles), spread(singles[0, 0])
    whole = n >= LANES and (not rare or absent(fast)) and (absent(w) or g > 1)
    whole = whole and _adjacent(x, n) and _adjacent(y, n) and _adjacent(r, n)
    if plan[7] & GATHER:
        for c in range(g):
            run, m = gathered(x, c0 + c, o0, o1, i0, n, order, scratch[0][0]), (o1 - o0) * n
            run_r = gathered(r, c0 + c, o0, o1, i0, n, order, scratch[1][2])
            run_w = gathered(w, 0, o0, o1, i0, n, order, scratch[2][0])
            result = pointer(scratch[1][1], 0)
            _normalize_run(fast, run, result, m, c, doubles, singles, plan[7] < 0, run, how, run_r, run_w)
            scatter(scratch[1][1], y, c0 + c, o0, o1, i0, n, order)
        return
    for o in range(o1 - 1, o0 - 1, -1):  # what was read last is in cache
        p = index(order, o)
        run_w = repeated(w, p, i0, n, scratch[2][0]) if whole else at(w, p, 0, i0)
        for c in range(0, g, g if whole else 1):
            run = at(x, p, c0 + c, i0)
            ahead = shifted(run, AHEAD * x.itemsize)
            if ca >= 0:
                there = index(order, min(oa + o1 - 1 - o, x.shape[0] - 1))
                ahead = at(x, there, min(ca + c, x.shape[1] - 1), ia)
            target, run_r = at(y, p, c0 + c, i0), at(r, p, c0 + c, i0)
            if whole:
                _normalize_runs(run, target, n, np.int64(0), g, fast, past, ahead, how, run_r, run_w, doubles, like)
            else:
                _normalize_run(fast, run, target, n, c, doubles, singles, past, ahead, how, run_r, run_w)


@unless_none(0, lambda *args: _normalize_exactly(*args[1:]))
def _normalize_run(fast, x, y, n, c, doubles, singles, past, ahead, how, r, w):  # type: ignore[no-untyped-def]
    if singles[5, c] != 0:
        _normalize_exactly(x, y, n, c, doubles, singles, past, ahead, how, r, w)
    else:
        _normalize_runs(x, y, n, c, np.int64(1), fast, past, ahead, how, r, w, doubles, spread(singles[0, c]))


@by_type
def _normalize_exactly(x, y, n, c, doubles, singles, past, ahead, how, r, w):  # type: ignore[no-untyped-def]
    return _normalize_plainly if how.simple and isinstance(w, types.NoneType) else _normalize_with


def _normalize_plainly(x, y, n, c, doubles, singles, past, ahead, how, r, w):  # type: ignore[no-untyped-def]
    run_normalize(x, y, n, doubles[0, c], doubles[1, c], doubles[2, c], past, ahead)


def _normalize_with(x, y, n, c, doubles, singles, past, ahead, how, r, w):  # type: ignore[no-untyped-def]
    _normalize_runs(x, y, n, c, np.int64(1), None, past, ahead, how, r, w, doubles, spread(singles[0, c]))


@formula
def _slope(how, g, v, p, z, r, w):  # type: ignore[no-untyped-def]
    """dx by the numbers p, and dy f'(z), by the lens z."""
    bowed, d = bent(how, g, v, *z, r)
    bowed = counted(how, bowed, w)
    return line(how, g, bowed, d, p, w), bowed


@formula
def gradient_one(dy, x, dx, r, w, dr, i, i_w, past, how, like, p, z):  # type: ignore[no-untyped-def]
    """A vector of dx at i, by weights at i_w."""
    g, v, e = load(dy, i, like), load(x, i, like), loaded(r, i, like)
    s, b = _slope(how, g, v, p, z, e, loaded(w, i_w, like))
    write(dx, i, s, past)
    put(dr, i, b)


@formula
def gradient_part(dy, x, dx, r, w, dr, i, i_w, k, how, like, p, z):  # type: ignore[no-untyped-def]
    """The first k elements of one."""
    g, v, e = load_part(dy, i, k, like), load_part(x, i, k, like), loaded_part(r, i, k, like)
    s, b = _slope(how, g, v, p, z, e, loaded_part(w, i_w, k, like))
    save_part(dx, i, k, s)
    put_part(dr, i, k, b)


@formula
def coefficients_of(how, r, w, numbers, c):  # type: ignore[no-untyped-def]
    """What a map of gradients takes of channel c: seven numbers or five."""
    rows = (0, 1, 2, 3, 4, 6, 7) if in_singles(how, r, w, numbers) else range(5)
    return tuple(spread_of(numbers, i, c) for i in rows)


@part()
def _gradient_runs(dy, x, dx, n, c, count, used, past, ahead_dy, ahead_x, how, r, w, dr, lenses, narrow):  # type: ignore[no-untyped-def]
    """As `_normalize_runs`, for gradients; dr is where dy f'(z) goes, or None."""
    m, i, end = count * n, 0, n
    p, z = coefficients_of(how, r, w, used, c), lens(lenses, c)
    like = read_as(how, r, narrow, p[0])
    if past:
        i = min(m, before_line(dx))
    if i > 0:
        gradient_part(dy, x, dx, r, w, dr, 0, 0, i, how, like, p, z)
    while i + LANES <= m:
        while i + LANES <= end:
            fetch(ahead_dy, i)
            fetch(ahead_x, i)
            gradient_one(dy, x, dx, r, w, dr, i, i - end + n, past, how, like, p, z)
            i += LANES
        if i + LANES <= m:
            c += 1
            q, zq = coefficients_of(how, r, w, used, c), lens(lenses, c)
            if i < end:
                fetch(ahead_dy, i)
                fetch(ahead_x, i)
                both, seen = joined_numbers(end - i, p, q), joined_numbers(end - i, z, zq)
                gradient_one(dy, x, dx, r, w, dr, i, i - end + n, past, how, like, both, seen)
                i += LANES
            p, z = q, zq
            end += n
    if i < m:
        fetch(ahead_dy, i)
        fetch(ahead_x, i)
        gradient_part(dy, x, dx, r, w, dr, i, i - end + n, m - i, how, like, p, z)


@part()
def _gradient_run(
    dy, x, dx, n, c, doubles, used, rare, past, ahead_dy, ahead_x, how, r, w, dr, lenses, narrow
):  # type: ignore[no-untyped-def]  # fmt: skip
    if rare > 0 and used[5, c] != 0:
        _gradient_runs(dy, x, dx, n, c, np.int64(1), doubles, past, ahead_dy, ahead_x, how, r, w, dr, lenses, narrow)
    else:
        _gradient_runs(dy, x, dx, n, c, np.int64(1), used, past, ahead_dy, ahead_x, how, r, w, dr, lenses, narrow)


@part()
def rows_gradient(
    dy, x, dx, k, c0, doubles, used, rare, plan, scratch, how, r, w, dr, order, lenses
):  # type: ignore[no-untyped-def]  # fmt: skip
    """dx of block k of the channels from c0 on, backwards.

    The next tile isn't fetched meanwhile, as forward does: with two arrays of 103 MB it took 12.0 ms in place of 11.6.
    """
    keep_whole()
    o0, o1, i0, n = block(k, x.shape, plan)
    past, g, narrow = plan[7] & PAST != 0, used.shape[1], spread(narrowest(x))
    exact = rare == g
    whole = n >= LANES and (exact or rare == 0) and (absent(w) or g > 1)
    whole = whole and _adjacent(dy, n) and _adjacent(x, n) and _adjacent(dx, n) and _adjacent(r, n) and _adjacent(dr, n)
    if plan[7] & GATHER:
        for c in range(g):
            run_dy = gathered(dy, c0 + c, o0, o1, i0, n, order, scratch[1][0])
            run_x = gathered(x, c0 + c, o0, o1, i0, n, order, scratch[0][0])
            run_r = gathered(r, c0 + c, o0, o1, i0, n, order, scratch[1][2])
            run_w = gathered(w, 0, o0, o1, i0, n, order, scratch[2][0])
            result, m = pointer(scratch[1][1], 0), (o1 - o0) * n
            to_dr = _room(dr, scratch[1][3])
            _gradient_run(
                run_dy, run_x, result, m, c, doubles, used, rare, plan[7] < 0, run_dy, run_x, how, run_r, run_w, to_dr,
                lenses, narrow,
            )  # fmt: skip
            scatter(scratch[1][1], dx, c0 + c, o0, o1, i0, n, order)
            scatter(scratch[1][3], dr, c0 + c, o0, o1, i0, n, order)
        return
    for o in range(o1 - 1, o0 - 1, -1):
        p = index(order, o)
        run_w = repeated(w, p, i0, n, scratch[2][0]) if whole else at(w, p, 0, i0)
        for c in range(0, g, g if whole else 1):
            run_dy, run_x = at(dy, p, c0 + c, i0), at(x, p, c0 + c, i0)
            ahead_dy, ahead_x = shifted(run_dy, AHEAD * dy.itemsize), shifted(run_x, AHEAD * x.itemsize)
            target, run_r, run_dr = at(dx, p, c0 + c, i0), at(r, p, c0 + c, i0), at(dr, p, c0 + c, i0)
            if whole and exact:
                _gradient_runs(
                    run_dy, run_x, target, n, np.int64(0), g, doubles, past, ahead_dy, ahead_x, how, run_r, run_w,
                    run_dr, lenses, narrow,
                )  # fmt: skip
            elif whole:
                _gradient_runs(
                    run_dy, run_x, target, n, np.int64(0), g, used, past, ahead_dy, ahead_x, how, run_r, run_w,
                    run_dr, lenses, narrow,
                )  # fmt: skip
            else:
                _gradient_run(
                    run_dy, run_x, target, n, c, doubles, used, rare, past, ahead_dy, ahead_x, how, run_r, run_w,
                    run_dr, lenses, narrow,
                )  # fmt: skip
