"""One block of the rows schedule: runs inside a channel (NCHW, (C, N), a single channel).

A tile is some neighbouring channels; a block of it is the runs of a few outer indices, or a segment of one. Short runs
(7×7, 14×14) are walked tile by tile in the order of memory, long ones one channel at a time: then the tile is one.

What has no unit stride, or runs of fewer elements than a vector, is gathered: a block's values of a channel come to a
scratch run, and results are scattered from one.
"""

from .blocks import run_deviations, run_gradient, run_normalize, run_normalize_single, run_products, run_stream
from .compile import part
from .lanes import LANES, keep_whole, load, narrowest, nothing, pointer, save, shifted, spread, total

PAST, GATHER, EXACT = 1, 2, 4  # flags of a plan: store past the caches; gather; all in float64

# Runs of fewer elements are gathered to whole lines before they go past the caches: a line that is stored in two parts
# costs both ways (in L1, ns an element: 0.29 in place of 0.06 with runs of 49, 0.15 in place of 0.04 with 196).
SHORT = 512
BUFFER = 4096


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
def _is_short(y, n):  # type: ignore[no-untyped-def]
    return n < SHORT and n == y.shape[2] and y.strides[1] == n * y.itemsize


@part()
def _normalize_run(x, y, n, c, doubles, singles, past, ahead):  # type: ignore[no-untyped-def]
    if singles[5, c] != 0:
        run_normalize(x, y, n, doubles[0, c], doubles[1, c], doubles[2, c], past, ahead)
    else:
        h, a, al, b, bl = singles[0, c], singles[1, c], singles[2, c], singles[3, c], singles[4, c]
        run_normalize_single(x, y, n, h, a, al, b, bl, past, ahead)


@part()
def rows_normalize(x, y, k, c0, ca, doubles, singles, plan, scratch):  # type: ignore[no-untyped-def]
    """y of block k of the channels from c0 on, backwards; those from ca on are fetched, forwards, if >= 0."""
    keep_whole()
    o0, o1, i0, n = _borders(k, x.shape, plan)
    oa, _, ia, _ = _borders(plan[2] - 1 - k, x.shape, plan)
    if plan[7] & GATHER:
        for c in range(doubles.shape[1]):
            run, result = _gathered(x, c0 + c, o0, o1, i0, n, scratch[0]), pointer(scratch[1], 0)
            _normalize_run(run, result, (o1 - o0) * n, c, doubles, singles, False, run)
            _scatter(scratch[1], y, c0 + c, o0, o1, i0, n)
        return
    past = plan[7] & PAST != 0
    short = past and _is_short(y, n)
    for o in range(o1 - 1, o0 - 1, -1):  # what was read last is in cache
        held, buffer, place = 0, pointer(scratch[1], 0), _at(y, o, c0, i0)
        for c in range(doubles.shape[1]):
            ahead = run = _at(x, o, c0 + c, i0)
            if ca >= 0:
                ahead = _at(x, min(oa + o1 - 1 - o, x.shape[0] - 1), min(ca + c, x.shape[1] - 1), ia)
            if not short:
                _normalize_run(run, _at(y, o, c0 + c, i0), n, c, doubles, singles, past, ahead)
                continue
            _normalize_run(run, shifted(buffer, held * y.itemsize), n, c, doubles, singles, False, ahead)
            held += n
            if held + n > BUFFER or c + 1 == doubles.shape[1]:
                run_stream(buffer, place, held, spread(singles[0, 0]))
                place, held = shifted(place, held * y.itemsize), 0


@part()
def _gradient_run(dy, x, dx, n, c, doubles, used, rare, past, ahead_dy, ahead_x):  # type: ignore[no-untyped-def]
    if rare and used[5, c] != 0:
        ghi, hi, a, b, rest = doubles[0, c], doubles[1, c], doubles[2, c], doubles[3, c], doubles[4, c]
        run_gradient(dy, x, dx, n, ghi, hi, a, b, rest, past, ahead_dy, ahead_x)
    else:
        g, h, a1, b1, rest1 = used[0, c], used[1, c], used[2, c], used[3, c], used[4, c]
        run_gradient(dy, x, dx, n, g, h, a1, b1, rest1, past, ahead_dy, ahead_x)


@part()
def rows_gradient(dy, x, dx, k, c0, ca, doubles, used, rare, plan, scratch):  # type: ignore[no-untyped-def]
    """dx of block k of the channels from c0 on, backwards; those from ca on are fetched, forwards, if >= 0."""
    keep_whole()
    o0, o1, i0, n = _borders(k, x.shape, plan)
    oa, _, ia, _ = _borders(plan[2] - 1 - k, x.shape, plan)
    if plan[7] & GATHER:
        for c in range(doubles.shape[1]):
            run_dy = _gathered(dy, c0 + c, o0, o1, i0, n, scratch[0])
            run_x = _gathered(x, c0 + c, o0, o1, i0, n, scratch[1])
            _gradient_run(
                run_dy, run_x, pointer(scratch[2], 0), (o1 - o0) * n, c, doubles, used, rare, False, run_dy, run_x
            )
            _scatter(scratch[2], dx, c0 + c, o0, o1, i0, n)
        return
    past = plan[7] & PAST != 0
    short = past and _is_short(dx, n)
    for o in range(o1 - 1, o0 - 1, -1):
        held, buffer, place = 0, pointer(scratch[2], 0), _at(dx, o, c0, i0)
        for c in range(doubles.shape[1]):
            ahead_dy = run_dy = _at(dy, o, c0 + c, i0)
            ahead_x = run_x = _at(x, o, c0 + c, i0)
            if ca >= 0:
                there, next_c = min(oa + o1 - 1 - o, x.shape[0] - 1), min(ca + c, x.shape[1] - 1)
                ahead_dy, ahead_x = _at(dy, there, next_c, ia), _at(x, there, next_c, ia)
            if not short:
                _gradient_run(run_dy, run_x, _at(dx, o, c0 + c, i0), n, c, doubles, used, rare, past, ahead_dy, ahead_x)
                continue
            target = shifted(buffer, held * dx.itemsize)
            _gradient_run(run_dy, run_x, target, n, c, doubles, used, rare, False, ahead_dy, ahead_x)
            held += n
            if held + n > BUFFER or c + 1 == doubles.shape[1]:
                run_stream(buffer, place, held, spread(narrowest(x)))
                place, held = shifted(place, held * dx.itemsize), 0
