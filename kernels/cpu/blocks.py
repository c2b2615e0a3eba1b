"""The building blocks: sums and maps over one contiguous run, and the merging of sums. Callable from any @njit code.

Blocks are short enough for the L1 cache, so a second look at the data costs no memory traffic. The first
look finds the block's mean, the second sums deviations from it; deviations are small and exact, however
large the mean (two-pass with correction: Chan, Golub & LeVeque 1983). Blocks merge by Chan's formula in
float64, with the mean as an unevaluated pair hi + lo.

The first look adds up in the elements' type (float32 for the half types): it only has to land near the mean.
All else is float64, so squares neither under- nor overflow and even five values keep their last bits. On 25 to
100 MB of float32 the sums cost 20 to 30 % of a copy's time more for that, the map 0 to 5 % (`bench/FACTS.md`).
"""

import math

from numba import njit

from .numbers import keep_whole, narrow, widen

SUMS = {"reassoc", "contract", "arcp", "nsz"}  # vectorises reductions, and still propagates NaN and Inf
MAPS = {"contract", "nsz"}  # no reassoc: it would turn (x - hi) - lo into x - (hi + lo)


@njit(fastmath=SUMS, error_model="numpy")
def _near_mean(x, zero):  # type: ignore[no-untyped-def]
    """x (n,) -> about its mean; added up in the type of `zero`."""
    keep_whole()
    total = zero
    for i in range(x.size):
        total += widen(x[i])
    return float(narrow(total / x.size, zero))


@njit(error_model="numpy")
def _pivot(x):  # type: ignore[no-untyped-def]
    pivot = _near_mean(x, widen(x.dtype.type(0)))
    return pivot if math.isfinite(pivot) else _near_mean(x, 0.0)  # float32 sums overflow near 3e38


@njit(fastmath=SUMS, error_model="numpy")
def _deviations(x, pivot):  # type: ignore[no-untyped-def]
    """x (n,) -> sum of x - pivot, sum of its square."""
    keep_whole()
    s = 0.0
    q = 0.0
    for i in range(x.size):
        d = float(widen(x[i])) - pivot
        s += d
        q += d * d
    return s, q


@njit(error_model="numpy")
def not_negative(m2):  # type: ignore[no-untyped-def]
    """M2 without the rounding that can take it below 0; NaN stays."""
    return 0.0 if m2 < 0.0 else m2


@njit(error_model="numpy")
def block_moments(x):  # type: ignore[no-untyped-def]
    """x (n,), n >= 1 -> mean_hi, mean_lo, M2."""
    pivot = _pivot(x)
    s, q = _deviations(x, pivot)
    return pivot, s / x.size, not_negative(q - s * s / x.size)


@njit(error_model="numpy")
def merge_moments(n, hi, lo, m2, nb, hib, lob, m2b):  # type: ignore[no-untyped-def]
    """Chan's formula: (count, mean_hi, mean_lo, M2) of two sets of values -> those of their union."""
    if n == 0.0:
        return nb, hib, lob, m2b
    if nb == 0.0:
        return n, hi, lo, m2
    total = n + nb
    delta = (hib - hi) + (lob - lo)
    step = delta * (nb / total)
    moved = hi + step  # two-sum: what the rounding of hi + step loses goes to lo
    back = moved - hi
    lost = (hi - (moved - back)) + (step - back)
    return total, moved, lo + lost, m2 + m2b + delta * delta * (n * nb / total)


@njit(fastmath=SUMS, error_model="numpy")
def _products(dy, x, pivot, hi):  # type: ignore[no-untyped-def]
    """dy, x (n,) -> sum of dy - pivot, sum of x - hi, sum of their products."""
    keep_whole()
    s = 0.0
    t = 0.0
    p = 0.0
    for i in range(dy.size):
        g = float(widen(dy[i])) - pivot
        d = float(widen(x[i])) - hi
        s += g
        t += d
        p += g * d
    return s, t, p


@njit(error_model="numpy")
def block_comoments(dy, x, hi):  # type: ignore[no-untyped-def]
    """dy, x (n,), n >= 1 -> mean of dy as hi and lo, mean of x - hi, co-moment sum (dy - mean)(x - mean).

    hi is any value near the mean of x, the same for all blocks that are to be merged.
    """
    pivot = _pivot(dy)
    s, t, p = _products(dy, x, pivot, hi)
    return pivot, s / dy.size, t / dy.size, p - s * t / dy.size


@njit(error_model="numpy")
def merge_comoments(n, hi, lo, t, p, nb, hib, lob, tb, pb):  # type: ignore[no-untyped-def]
    """Chan's formula for (count, mean of dy as hi and lo, mean of x, co-moment) of two sets of pairs."""
    total, moved, rest, _ = merge_moments(n, hi, lo, 0.0, nb, hib, lob, 0.0)
    if n == 0.0:
        return total, moved, rest, tb, pb
    if nb == 0.0:
        return total, moved, rest, t, p
    delta = (hib - hi) + (lob - lo)
    step = tb - t
    return total, moved, rest, t + step * (nb / total), p + pb + delta * step * (n * nb / total)


@njit(error_model="numpy")
def settle(hi, lo):  # type: ignore[no-untyped-def]
    """The pair hi + lo with |lo| at most half an ulp of hi. An infinite or NaN hi keeps lo = 0."""
    total = hi + lo
    lost = lo - (total - hi)
    return (total, lost) if math.isfinite(total) else (total, 0.0)


@njit(fastmath=MAPS, error_model="numpy")
def block_normalize(x, y, hi, lo, scale, beta):  # type: ignore[no-untyped-def]
    """y (n,) = scale ((x - hi) - lo) + beta. y may be x."""
    keep_whole()
    like = y.dtype.type(0)
    for i in range(x.size):
        y[i] = narrow(((widen(x[i]) - hi) - lo) * scale + beta, like)


@njit(fastmath=MAPS, error_model="numpy")
def block_gradient(dy, x, dx, ghi, glo, hi, lo, a, b):  # type: ignore[no-untyped-def]
    """dx (n,) = a ((dy - ghi) - glo) + b ((x - hi) - lo). dx may be dy or x."""
    keep_whole()
    like = dx.dtype.type(0)
    for i in range(dy.size):
        centred = (widen(dy[i]) - ghi) - glo
        dx[i] = narrow(centred * a + ((widen(x[i]) - hi) - lo) * b, like)
