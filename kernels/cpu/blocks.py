"""The building blocks: sums and maps over one contiguous run, and the merging of sums.

`block_*` and `merge_*` take arrays and numbers, compute in float64, and are callable from any @njit code. The `run_*`
functions under them take pointers and compute in float32 or float64 lanes, by the type of the pivot or of the
coefficients; the schedules use them directly.

Sums are sums of deviations from a pivot near the mean: small and exact, however large the mean (two-pass with
correction: Chan, Golub & LeVeque 1983). They merge by Chan's formula in float64, with the mean as an unevaluated
pair hi + lo.
"""

import numpy as np
from numba import njit

from .activations import plain
from .formulas import either, formula
from .lanes import (
    LANES,
    before_line,
    count_nonzero,
    fetch,
    fma,
    load,
    load_part,
    nothing,
    pointer,
    reserve,
    save,
    save_part,
    spread,
    stream,
    total,
    where_less,
    where_nonzero,
)
from .parts import part
from .sums import CHAIN, add_chains, fetch_step, no_chains, step_of, with_rest, with_step
from .views import hold

AHEAD = 64 * LANES  # elements: reading 103 MB took 3.0 ms without fetching, 2.5 with
SOON = 16 * LANES  # elements ahead of a store: infer of 26 MB that no cache had took 2.1 ms without reserving, 1.5 with


@part()
def run_sums(sources, r, w, n, near, sums, line, how, lens, then):  # type: ignore[no-untyped-def]
    """Lanes of sums, `line` bytes apart, += those of n elements. Behind them, those from then[n] on are fetched."""
    held, step, i = no_chains(near), step_of(near), 0
    while i < n:
        stop = min(n, i + CHAIN * step)
        after = sources if i + AHEAD < n else then
        while i + step <= stop:
            fetch_step(after, i + AHEAD, near)
            held = with_step(held, sources, r, w, i, i, how, near, lens)
            i += step
        while i < stop:  # twice at most
            held = with_rest(held, sources, r, w, i, i, stop - i, how, near, lens)
            i += LANES
        if i < n:
            add_chains(w, sums, line, held)
            held = no_chains(near)
    add_chains(w, sums, line, held)


@formula
def write(y, i, lanes, past):  # type: ignore[no-untyped-def]
    """As `save`, or past the caches."""

    def plainly() -> None:
        reserve(y, i + SOON)
        save(y, i, lanes)

    either(past, lambda: stream(y, i, lanes), plainly)


@formula
def paired(x, h, a, al, b, bl):  # type: ignore[no-untyped-def]
    """(a d + b) + (al d + bl), d = x - h, of lanes or of numbers: a and b as pairs, off by 1 eps at most.

    Forward's map, and where backward seeks the kink of what forward has made: they must agree to the bit.
    """
    d = x - h
    return fma(d, a, b) + fma(d, al, bl)


@formula
def through(how, x, h, a, al, b, bl):  # type: ignore[no-untyped-def]
    """`paired`; without the second halves where results are of 16 bits."""
    return fma(x - h, a, b) if how.short else paired(x, h, a, al, b, bl)


@part()
def run_normalize(x, y, n, hi, a, b, past, ahead):  # type: ignore[no-untyped-def]
    """n elements of y = a (x - hi) + b in float64; stored past the caches if `past`. y may be x.

    `ahead` points to n elements that will be read next; they are fetched.
    """
    h, a, b = spread(hi), spread(a), spread(b)
    i = 0
    if past:
        i = min(n, before_line(y))
    if i > 0:  # a masked store of nothing still held up the stores behind it: 0.22 against 0.09 ns an element
        save_part(y, 0, i, fma(load_part(x, 0, i, h) - h, a, b))
    while i + LANES <= n:
        fetch(ahead, i)
        v = fma(load(x, i, h) - h, a, b)
        write(y, i, v, past)
        i += LANES
    if i < n:
        fetch(ahead, i)
        save_part(y, i, n - i, fma(load_part(x, i, n - i, h) - h, a, b))


@part()
def run_gradient(dy, x, dx, n, ghi, hi, a, b, c, past, ahead_dy, ahead_x):  # type: ignore[no-untyped-def]
    """n elements of dx = a (dy - ghi) + (b (x - hi) + c) in float64. dx may be dy or x."""
    gh, h, a, b, c = spread(ghi), spread(hi), spread(a), spread(b), spread(c)
    i = 0
    if past:
        i = min(n, before_line(dx))
    if i > 0:
        g, d = load_part(dy, 0, i, gh) - gh, load_part(x, 0, i, h) - h
        save_part(dx, 0, i, fma(g, a, fma(d, b, c)))
    while i + LANES <= n:
        fetch(ahead_dy, i)
        fetch(ahead_x, i)
        v = fma(load(dy, i, gh) - gh, a, fma(load(x, i, h) - h, b, c))
        write(dx, i, v, past)
        i += LANES
    if i < n:
        fetch(ahead_dy, i)
        fetch(ahead_x, i)
        g, d = load_part(dy, i, n - i, gh) - gh, load_part(x, i, n - i, h) - h
        save_part(dx, i, n - i, fma(g, a, fma(d, b, c)))


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


@njit(error_model="numpy")
def block_normalize(x, y, hi, lo, scale, beta):  # type: ignore[no-untyped-def]
    """y (n,) = scale ((x - hi) - lo) + beta; both contiguous. y may be x."""
    run, a = _run(x), np.float64(scale)
    run_normalize(run, _run(y), x.size, np.float64(hi), a, beta - a * lo, False, run)


@njit(error_model="numpy")
def block_gradient(dy, x, dx, ghi, glo, hi, lo, a, b):  # type: ignore[no-untyped-def]
    """dx (n,) = a ((dy - ghi) - glo) + b ((x - hi) - lo); all contiguous. dx may be dy or x."""
    runs, target = (_run(dy), _run(x)), _run(dx)
    rest = -(np.float64(a) * glo + np.float64(b) * lo)
    run_gradient(
        *runs, target, dy.size, np.float64(ghi), np.float64(hi), np.float64(a), np.float64(b), rest, False, *runs
    )
