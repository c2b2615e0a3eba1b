"""One block of the rows schedule: runs inside a channel (NCHW, (C, N), a single channel).

A tile is some neighbouring channels; a block of it is the runs of a few outer indices, or a segment of one. Short runs
(7×7, 14×14) are walked tile by tile in the order of memory, long ones one channel at a time: then the tile is one.

What has no unit stride, or runs of fewer elements than a vector, is gathered: a block's values of a channel come to a
scratch run, and results are scattered from one.
"""

from .blocks import run_deviations, run_gradient, run_normalize, run_products
from .compile import part
from .lanes import (
    LANES,
    before_line,
    fetch,
    fma,
    joined,
    keep_whole,
    load,
    load_part,
    nothing,
    pointer,
    save,
    save_part,
    spread,
    stream,
    total,
)

# Flags of a plan: store past the caches; gather; all in float64; fetch the next tile while one is mapped.
PAST, GATHER, EXACT, NEXT = 1, 2, 4, 8


@part()
def _borders(k, shape, plan):  # type: ignore[no-untyped-def]
    """Block k of a tile: outer o0 to o1, and in each of its runs n elements from i0 on."""
    runs, segments, length = plan[4], plan[5], plan[6]
    o = (k // segments) * runs
    i = (k % segments) * length
    return o, min(o + runs, shape[0]), i, min(length, shape[2] - i)


@part()
def rows_count(k, shape, plan, few):  # type: ignore[no-untyped-def]
    """Values of a channel in block k, or in its first runs of `few` values at least."""
    o0, o1, _, n = _borders(k, shape, plan)
    return min(o1 - o0, (few + n - 1) // n) * n


@part()
def _at(a, o, c, i):  # type: ignore[no-untyped-def]
    return pointer(a, o * a.strides[0] + c * a.strides[1] + i * a.strides[2])


@part()
def _gathered(a, c, o0, o1, i0, n, scratch):  # type: ignore[no-untyped-def]
    k = 0
    for o in range(o0, o1):
        for i in range(i0, i0 + n):
            scratch[k] = a[o, c, i]
            k += 1
    return pointer(scratch, 0)


@part()
def _scatter(scratch, a, c, o0, o1, i0, n):  # type: ignore[no-untyped-def]
    k = 0
    for o in range(o0, o1):
        for i in range(i0, i0 + n):
            a[o, c, i] = scratch[k]
            k += 1


@part()
def _lanes(sums, i, c):  # type: ignore[no-untyped-def]
    return pointer(sums, i * sums.strides[0] + 8 * LANES * c)


@part()
def add_up(sums, s):  # type: ignore[no-untyped-def]
    """s (M, G) <- the sums of lanes in the rows of sums, and these <- 0."""
    like = spread(0.0)
    for i in range(s.shape[0]):
        for c in range(s.shape[1]):
            lanes = _lanes(sums, i, c)
            s[i, c] = total(load(lanes, 0, like))
            save(lanes, 0, nothing(like))


@part()
def rows_deviations(x, k, c0, pivot, sums, plan, scratch, few):  # type: ignore[no-untyped-def]
    """Lanes of sums (2, 16 G) += x - pivot and its square, for the channels from c0 on; pivot (G,) sets the type.

    For all of block k, or for its first runs of `few` values at least.
    """
    keep_whole()
    o0, o1, i0, n = _borders(k, x.shape, plan)
    o1 = min(o1, o0 + (few + n - 1) // n)
    if plan[7] & GATHER:
        for c in range(pivot.size):
            run = _gathered(x, c0 + c, o0, o1, i0, n, scratch[0])
            run_deviations(run, (o1 - o0) * n, pivot[c], _lanes(sums, 0, c), _lanes(sums, 1, c))
        return
    for o in range(o0, o1):
        for c in range(pivot.size):
            run_deviations(_at(x, o, c0 + c, i0), n, pivot[c], _lanes(sums, 0, c), _lanes(sums, 1, c))


@part()
def rows_products(dy, x, k, c0, pivot, hi, sums, plan, scratch):  # type: ignore[no-untyped-def]
    """Lanes of sums (5, 16 G) += g = dy - pivot, d = x - hi, g d, g^2 and d^4."""
    keep_whole()
    o0, o1, i0, n = _borders(k, x.shape, plan)
    gather = plan[7] & GATHER
    for o in range(o0, o0 + 1 if gather else o1):
        for c in range(pivot.size):
            if gather:
                run_dy = _gathered(dy, c0 + c, o0, o1, i0, n, scratch[0])
                run_x = _gathered(x, c0 + c, o0, o1, i0, n, scratch[1])
                count = (o1 - o0) * n
            else:
                run_dy, run_x, count = _at(dy, o, c0 + c, i0), _at(x, o, c0 + c, i0), n
            lanes = _lanes(sums, 0, c), _lanes(sums, 1, c), _lanes(sums, 2, c), _lanes(sums, 3, c), _lanes(sums, 4, c)
            run_products(run_dy, run_x, count, pivot[c], hi[c], *lanes)


@part()
def _five(numbers, c):  # type: ignore[no-untyped-def]
    """The first five of a channel's coefficients, each in all lanes."""
    return (
        spread(numbers[0, c]),
        spread(numbers[1, c]),
        spread(numbers[2, c]),
        spread(numbers[3, c]),
        spread(numbers[4, c]),
    )


@part()
def _joined(n, p, q):  # type: ignore[no-untyped-def]
    return (
        joined(n, p[0], q[0]),
        joined(n, p[1], q[1]),
        joined(n, p[2], q[2]),
        joined(n, p[3], q[3]),
        joined(n, p[4], q[4]),
    )


@part()
def _put(y, i, lanes, past):  # type: ignore[no-untyped-def]
    if past:
        stream(y, i, lanes)
    else:
        save(y, i, lanes)


@part()
def _normalized(v, p):  # type: ignore[no-untyped-def]
    """y = (a d + b) + (al d + bl), d = x - h: off by 1 eps at most."""
    h, a, al, b, bl = p
    d = v - h
    return fma(d, a, b) + fma(d, al, bl)


@part()
def _normalize_runs(x, y, n, c, count, singles, past, ahead):  # type: ignore[no-untyped-def]
    """Runs of n >= 16 elements of `count` channels from c on, one behind the other without a gap.

    Vectors go over the borders of runs, so that lines are stored whole; `ahead` is what will be read next.
    """
    m, i, end = count * n, 0, n
    p = _five(singles, c)
    if past:
        i = min(m, before_line(y))
    if i > 0:  # a masked store of nothing still held up the stores behind it: 0.22 against 0.09 ns an element
        save_part(y, 0, i, _normalized(load_part(x, 0, i, p[0]), p))
    while i + LANES <= m:
        while i + LANES <= end:
            fetch(ahead, i)
            _put(y, i, _normalized(load(x, i, p[0]), p), past)
            i += LANES
        if i + LANES <= m:
            c += 1
            q = _five(singles, c)
            if i < end:
                fetch(ahead, i)
                _put(y, i, _normalized(load(x, i, p[0]), _joined(end - i, p, q)), past)
                i += LANES
            p = q
            end += n
    if i < m:
        fetch(ahead, i)
        save_part(y, i, m - i, _normalized(load_part(x, i, m - i, p[0]), p))


@part()
def _adjacent(a, n):  # type: ignore[no-untyped-def]
    return a.shape[1] == 1 or a.strides[1] == n * a.itemsize


@part()
def rows_normalize(x, y, k, c0, ca, doubles, singles, rare, plan, scratch):  # type: ignore[no-untyped-def]
    """y of block k of the channels from c0 on, backwards; those from ca on are fetched, forwards, if >= 0."""
    keep_whole()
    o0, o1, i0, n = _borders(k, x.shape, plan)
    oa, _, ia, _ = _borders(plan[2] - 1 - k, x.shape, plan)
    past, g = plan[7] & PAST != 0, singles.shape[1]
    whole = n >= LANES and not rare and _adjacent(x, n) and _adjacent(y, n)
    if plan[7] & GATHER:
        for c in range(g):
            run, result, m = _gathered(x, c0 + c, o0, o1, i0, n, scratch[0]), pointer(scratch[1], 0), (o1 - o0) * n
            _normalize_run(run, result, m, c, doubles, singles, False, run)
            _scatter(scratch[1], y, c0 + c, o0, o1, i0, n)
        return
    for o in range(o1 - 1, o0 - 1, -1):  # what was read last is in cache
        for c in range(0, g, g if whole else 1):
            ahead = run = _at(x, o, c0 + c, i0)
            if ca >= 0:
                ahead = _at(x, min(oa + o1 - 1 - o, x.shape[0] - 1), min(ca + c, x.shape[1] - 1), ia)
            if whole:
                _normalize_runs(run, _at(y, o, c0, i0), n, 0, g, singles, past, ahead)
            else:
                _normalize_run(run, _at(y, o, c0 + c, i0), n, c, doubles, singles, past, ahead)


@part()
def _normalize_run(x, y, n, c, doubles, singles, past, ahead):  # type: ignore[no-untyped-def]
    if n < LANES or singles[5, c] != 0:
        run_normalize(x, y, n, doubles[0, c], doubles[1, c], doubles[2, c], past, ahead)
    else:
        _normalize_runs(x, y, n, c, 1, singles, past, ahead)


@part()
def _slope(g, d, p):  # type: ignore[no-untyped-def]
    """dx = a (dy - ghi) + (b (x - hi) + c)."""
    ghi, hi, a, b, c = p
    return fma(g - ghi, a, fma(d - hi, b, c))


@part()
def _gradient_runs(dy, x, dx, n, c, count, used, past, ahead_dy, ahead_x):  # type: ignore[no-untyped-def]
    """As `_normalize_runs`, for gradients."""
    m, i, end = count * n, 0, n
    p = _five(used, c)
    if past:
        i = min(m, before_line(dx))
    if i > 0:
        save_part(dx, 0, i, _slope(load_part(dy, 0, i, p[0]), load_part(x, 0, i, p[0]), p))
    while i + LANES <= m:
        while i + LANES <= end:
            fetch(ahead_dy, i)
            fetch(ahead_x, i)
            _put(dx, i, _slope(load(dy, i, p[0]), load(x, i, p[0]), p), past)
            i += LANES
        if i + LANES <= m:
            c += 1
            q = _five(used, c)
            if i < end:
                fetch(ahead_dy, i)
                fetch(ahead_x, i)
                _put(dx, i, _slope(load(dy, i, p[0]), load(x, i, p[0]), _joined(end - i, p, q)), past)
                i += LANES
            p = q
            end += n
    if i < m:
        fetch(ahead_dy, i)
        fetch(ahead_x, i)
        save_part(dx, i, m - i, _slope(load_part(dy, i, m - i, p[0]), load_part(x, i, m - i, p[0]), p))


@part()
def _gradient_run(dy, x, dx, n, c, doubles, used, rare, past, ahead_dy, ahead_x):  # type: ignore[no-untyped-def]
    if n < LANES or (rare and used[5, c] != 0):
        ghi, hi, a, b, rest = doubles[0, c], doubles[1, c], doubles[2, c], doubles[3, c], doubles[4, c]
        run_gradient(dy, x, dx, n, ghi, hi, a, b, rest, past, ahead_dy, ahead_x)
    else:
        _gradient_runs(dy, x, dx, n, c, 1, used, past, ahead_dy, ahead_x)


@part()
def rows_gradient(dy, x, dx, k, c0, ca, doubles, used, rare, plan, scratch):  # type: ignore[no-untyped-def]
    """dx of block k of the channels from c0 on, backwards; those from ca on are fetched, forwards, if >= 0."""
    keep_whole()
    o0, o1, i0, n = _borders(k, x.shape, plan)
    oa, _, ia, _ = _borders(plan[2] - 1 - k, x.shape, plan)
    past, g = plan[7] & PAST != 0, used.shape[1]
    whole = n >= LANES and not rare and _adjacent(dy, n) and _adjacent(x, n) and _adjacent(dx, n)
    if plan[7] & GATHER:
        for c in range(g):
            run_dy = _gathered(dy, c0 + c, o0, o1, i0, n, scratch[0])
            run_x = _gathered(x, c0 + c, o0, o1, i0, n, scratch[1])
            result, m = pointer(scratch[2], 0), (o1 - o0) * n
            _gradient_run(run_dy, run_x, result, m, c, doubles, used, rare, False, run_dy, run_x)
            _scatter(scratch[2], dx, c0 + c, o0, o1, i0, n)
        return
    for o in range(o1 - 1, o0 - 1, -1):
        for c in range(0, g, g if whole else 1):
            ahead_dy = run_dy = _at(dy, o, c0 + c, i0)
            ahead_x = run_x = _at(x, o, c0 + c, i0)
            if ca >= 0:
                there, next_c = min(oa + o1 - 1 - o, x.shape[0] - 1), min(ca + c, x.shape[1] - 1)
                ahead_dy, ahead_x = _at(dy, there, next_c, ia), _at(x, there, next_c, ia)
            if whole:
                _gradient_runs(run_dy, run_x, _at(dx, o, c0, i0), n, 0, g, used, past, ahead_dy, ahead_x)
            else:
                target = _at(dx, o, c0 + c, i0)
                _gradient_run(run_dy, run_x, target, n, c, doubles, used, rare, past, ahead_dy, ahead_x)
