"""The building blocks: sums and maps over one contiguous run, and the merging of sums.

`block_*` and `merge_*` take arrays and numbers, compute in float64, and are callable from any @njit code; under
them are the sums and maps of the schedules.

Sums are sums of deviations from a pivot near the mean: small and exact, however large the mean (two-pass with
correction: Chan, Golub & LeVeque 1983). They merge by Chan's formula in float64, with the mean as an unevaluated
pair hi + lo.
"""

import numpy as np
from numba import njit

from .activations import plain
from .formulas import formula
from .lanes import LANES, count_nonzero, nothing, spread, total, where_less, where_nonzero
from .memory import load, pointer
from .parts import part
from .rows import map_runs
from .sums import run_sums
from .views import borrowed, hold


@formula
def not_negative(m2):  # type: ignore[no-untyped-def]
    """M2 without the rounding that can take it below 0; NaN stays. Of lanes or of a number, as all that follow."""
    zero = nothing(m2)
    return where_less(m2, zero, zero, m2)


@formula
def settle(hi, lo):  # type: ignore[no-untyped-def]
    """The pair hi + lo with |lo| at most half an ulp of hi. An infinite or NaN hi keeps lo = 0."""
    total = hi + lo
    return total, where_nonzero(total - total, nothing(hi), lo - (total - hi))


@part()
def joined_moments(n, hi, lo, m2, nb, hib, lob, m2b):  # type: ignore[no-untyped-def]
    """Chan's formula, for lanes or numbers: (count, mean_hi, mean_lo, M2) of two sets -> those of their union."""
    if count_nonzero(n, LANES) == 0:
        return nb, hib, lob, m2b
    return _joined_moments(n, hi, lo, m2, nb, hib, lob, m2b)


@formula
def _joined_moments(n, hi, lo, m2, nb, hib, lob, m2b):  # type: ignore[no-untyped-def]
    total = n + nb
    share = nb / total
    delta = (hib - hi) + (lob - lo)
    step = delta * share
    moved = hi + step  # two-sum: what the rounding of hi + step loses goes to lo
    back = moved - hi
    lost = (hi - (moved - back)) + (step - back)
    hi, hib = where_nonzero(n, hi, hib), where_nonzero(n, moved, hib)
    rest = where_nonzero(n, where_nonzero(nb, lo + lost, lo), lob)
    m2, both = where_nonzero(n, m2, m2b), where_nonzero(n, m2 + m2b + delta * delta * (n * share), m2b)
    return total, where_nonzero(nb, hib, hi), rest, where_nonzero(nb, both, m2)


@part()
def joined_comoments(n, hi, lo, t, p, nb, hib, lob, tb, pb):  # type: ignore[no-untyped-def]
    """The same for (count, mean of dy as hi and lo, mean of x, co-moment) of two sets of pairs."""
    if count_nonzero(n, LANES) == 0:
        return nb, hib, lob, tb, pb
    return _joined_comoments(n, hi, lo, t, p, nb, hib, lob, tb, pb)


@formula
def _joined_comoments(n, hi, lo, t, p, nb, hib, lob, tb, pb):  # type: ignore[no-untyped-def]
    zero = nothing(n)
    total, moved, rest, _ = _joined_moments(n, hi, lo, zero, nb, hib, lob, zero)
    share = nb / total
    delta, step = (hib - hi) + (lob - lo), tb - t
    t, tb = where_nonzero(n, t, tb), where_nonzero(n, t + step * share, tb)
    p, pb = where_nonzero(n, p, pb), where_nonzero(n, p + pb + delta * step * (n * share), pb)
    return total, moved, rest, where_nonzero(nb, tb, t), where_nonzero(nb, pb, p)


@njit(error_model="numpy")
def merge_moments(n, hi, lo, m2, nb, hib, lob, m2b):  # type: ignore[no-untyped-def]
    """Chan's formula: (count, mean_hi, mean_lo, M2) of two sets of values -> those of their union."""
    a, b = (np.float64(n), np.float64(hi), np.float64(lo), np.float64(m2)), (np.float64(nb), np.float64(hib))
    return joined_moments(*a, *b, np.float64(lob), np.float64(m2b))


@njit(error_model="numpy")
def merge_comoments(n, hi, lo, t, p, nb, hib, lob, tb, pb):  # type: ignore[no-untyped-def]
    """Chan's formula for (count, mean of dy as hi and lo, mean of x, co-moment) of two sets of pairs."""
    a = np.float64(n), np.float64(hi), np.float64(lo), np.float64(t), np.float64(p)
    return joined_comoments(*a, np.float64(nb), np.float64(hib), np.float64(lob), np.float64(tb), np.float64(pb))


@njit
def _run(array):  # type: ignore[no-untyped-def]
    if array.size > 1 and array.strides[0] != array.itemsize:
        raise ValueError("fastbn's block functions take contiguous arrays; pass a copy")
    return pointer(array, 0)


@part(_nrt=True)
def _sums(run, n, pivot):  # type: ignore[no-untyped-def]
    lanes = np.zeros(2 * LANES)
    sums, like = pointer(lanes, 0), spread(0.0)
    run_sums((run,), None, None, n, (spread(pivot),), sums, 8 * LANES, None, None, (run,))
    s, q = total(load(sums, 0, like)), total(load(sums, LANES, like))
    hold(lanes)  # Numba lets go of an array behind its last use
    return s, q


@njit(error_model="numpy")
def block_moments(x):  # type: ignore[no-untyped-def]
    """x (n,), n >= 1, contiguous -> mean_hi, mean_lo, M2."""
    run = _run(x)
    pivot = _sums(run, x.size, 0.0)[0] / x.size
    s, q = _sums(run, x.size, pivot)
    return pivot, s / x.size, not_negative(q - s * s / x.size)


@njit(error_model="numpy")
def block_comoments(dy, x, hi):  # type: ignore[no-untyped-def]
    """dy, x (n,), n >= 1, contiguous -> mean of dy as hi and lo, mean of x - hi, co-moment sum (dy - mean)(x - mean).

    hi is any value near the mean of x, the same for all blocks that are to be merged.
    """
    run, n = _run(dy), dy.size
    pivot = _sums(run, n, 0.0)[0] / n
    lanes, like, line = np.zeros(5 * LANES), spread(0.0), 8 * LANES
    sums = pointer(lanes, 0)
    runs = run, _run(x)
    near = spread(pivot), spread(np.float64(hi))
    run_sums(runs, None, None, n, near, sums, line, plain(), (like, like, like), runs)
    s, t, p = total(load(sums, 0, like)), total(load(sums, LANES, like)), total(load(sums, 2 * LANES, like))
    hold(lanes)
    return pivot, s / n, t / n, p - s * t / n


@part()
def _map(sources, target, n, numbers):  # type: ignore[no-untyped-def]
    of_one = np.int64(0), np.int64(1)
    map_runs(sources, target, (None, None, None), n, *of_one, numbers, False, sources, plain(), spread(0.0))


@njit(error_model="numpy")
def block_normalize(x, y, hi, lo, scale, beta):  # type: ignore[no-untyped-def]
    """y (n,) = scale ((x - hi) - lo) + beta; both contiguous. y may be x."""
    lens = np.array([[float(hi)], [float(scale)], [beta - float(scale) * lo]])
    _map((_run(x),), _run(y), x.size, (borrowed(lens), None, None))
    hold(lens)


@njit(error_model="numpy")
def block_gradient(dy, x, dx, ghi, glo, hi, lo, a, b):  # type: ignore[no-untyped-def]
    """dx (n,) = a ((dy - ghi) - glo) + b ((x - hi) - lo); all contiguous. dx may be dy or x."""
    rest = -(float(a) * glo + float(b) * lo)
    line = np.array([[float(ghi)], [float(hi)], [float(a)], [float(b)], [rest]])
    _map((_run(dy), _run(x)), _run(dx), dy.size, (borrowed(line), borrowed(line), borrowed(line)))
    hold(line)
