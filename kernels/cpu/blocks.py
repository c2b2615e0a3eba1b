"""The building blocks: sums and maps over one contiguous run, and the merging of sums.

`block_*` and `merge_*` take arrays and numbers, compute in float64, and are callable from any @njit code. The `run_*`
functions under them take pointers and compute in float32 or float64 lanes, by the type of the pivot or of the
coefficients; the schedules use them directly.

Sums are sums of deviations from a pivot near the mean: small and exact, however large the mean (two-pass with
correction: Chan, Golub & LeVeque 1983). They merge by Chan's formula in float64, with the mean as an unevaluated
pair hi + lo.
"""

import numpy as np
from numba import njit, types

from .activations import bent, counted, loaded, loaded_part, plain
from .formulas import either, formula
from .lanes import (
    LANES,
    before_line,
    count_nonzero,
    fetch,
    fma,
    joined,
    load,
    load_part,
    nothing,
    pointer,
    reserve,
    save,
    save_part,
    shifted,
    spread,
    stream,
    total,
    where_less,
    where_nonzero,
    wide,
)
from .parts import part
from .views import hold

# Squares of numbers on a grid leave remainders of 0, 1 and 4 eighths, which a float32 sum of a hundred drops more often
# than it rounds them up: the variance of data at 1e4 was 5e-7 too small. So lanes pass sums on after 16 additions.
CHAIN = 16 * LANES

AHEAD = 64 * LANES  # elements: reading 103 MB took 3.0 ms without fetching, 2.5 with
SOON = 16 * LANES  # elements ahead of a store: infer of 26 MB that no cache had took 2.1 ms without reserving, 1.5 with


@formula
def add_lanes(sums, lanes):  # type: ignore[no-untyped-def]
    """sums[:16] += lanes, as float64. Adding lanes up is left for the end: it would hold up the loads behind it."""
    more = wide(lanes)
    save(sums, 0, load(sums, 0, more) + more)


@formula
def later(a, offset):  # type: ignore[no-untyped-def]
    """A pointer, `offset` bytes on; None of None."""
    return None if a is None else shifted(a, offset)


@formula
def weighed(d, f):  # type: ignore[no-untyped-def]
    """d, and d by its weight f; 0 where that is 0: what has no weight isn't looked at."""
    if f is None:
        return d, d
    d = where_nonzero(f, d, nothing(d))
    return d, d * f


@formula
def heavier(m, f):  # type: ignore[no-untyped-def]
    """m and a weight."""
    return m if f is None else m + f


@formula
def add_mass(w, masses, m):  # type: ignore[no-untyped-def]
    """As `add_lanes`, where there are weights."""
    if w is not None:
        add_lanes(masses, m)


@part()
def run_deviations(x, w, n, pivot, sums, line, then):  # type: ignore[no-untyped-def]
    """Lanes of two or three sums, `line` bytes apart, += w d, w d^2 and w, d = x - pivot, in the pivot's type.

    Without weights (None) w is 1 and has no sum. Behind the n elements, those from then[n] on are fetched.
    """
    near = spread(pivot)
    even = odd = no_deviations(near)
    i = 0
    while i < n:
        stop = min(n, i + 2 * CHAIN)
        after = x if i + AHEAD < n else then
        while i + 2 * LANES <= stop:
            fetch(after, i + AHEAD)
            fetch(after, i + AHEAD + LANES)
            even, odd = with_pair(even, odd, x, i, w, i, near)
            i += 2 * LANES
        while i < stop:  # twice at most; lanes behind the end hold the pivot, whose deviation is 0
            even = with_deviation(even, load_part(x, i, stop - i, near) - near, loaded_part(w, i, stop - i, near))
            i += LANES
        if i < n:
            add_deviations(w, sums, line, even, odd)
            even = odd = no_deviations(near)
    add_deviations(w, sums, line, even, odd)


@formula
def no_deviations(like):  # type: ignore[no-untyped-def]
    """Sums of w d, w d^2 and w, before there are any."""
    return (nothing(like),) * 3


@formula
def with_deviation(held, d, w):  # type: ignore[no-untyped-def]
    """The sums with lanes of d and of weights. Without weights (None) w is 1 and has no sum."""
    s, q, m = held
    d, a = weighed(d, w)
    return s + a, fma(a, d, q), heavier(m, w)


@formula
def with_pair(even, odd, x, i, w, i_w, near):  # type: ignore[no-untyped-def]
    """The same, of two vectors from i on, by weights from i_w on."""
    even = with_deviation(even, load(x, i, near) - near, loaded(w, i_w, near))
    return even, with_deviation(odd, load(x, i + LANES, near) - near, loaded(w, i_w + LANES, near))


@formula
def add_deviations(w, sums, line, even, odd):  # type: ignore[no-untyped-def]
    s, q, m = (a + b for a, b in zip(even, odd, strict=True))
    add_lanes(sums, s)
    add_lanes(shifted(sums, line), q)
    add_mass(w, shifted(sums, 2 * line), m)


@part()
def run_products(dy, x, n, pivot, hi, sums, line, how, r, w, lens, then_dy, then_x):  # type: ignore[no-untyped-def]
    """Lanes of five sums, `line` bytes apart, += g = dy - pivot, d = x - hi, g d, g^2 and d^4, in the pivot's type.

    Of n pairs; no d^4 in float64. What is fetched behind them is from then_dy[n] and then_x[n] on.

    With an activation dy is dy f'(z), by `activations.bent`, whose lens is h, a, b in float64.
    """
    near_dy, near_x = spread(pivot), spread(hi)
    held = no_products(near_dy)
    i = 0
    while i < n:
        stop = min(n, i + CHAIN)
        after_dy, after_x = (dy, x) if i + AHEAD < n else (then_dy, then_x)
        while i + LANES <= stop:
            fetch(after_dy, i + AHEAD)
            fetch(after_x, i + AHEAD)
            seen = pairs(dy, x, r, i, w, i, near_dy, near_x)
            held = with_products(held, how, seen, near_dy, near_x, lens)
            i += LANES
        if i < stop:
            k = stop - i
            seen = pairs_part(dy, x, r, i, w, i, k, near_dy, near_x)
            held = with_part(held, k, how, seen, near_dy, near_x, lens)
            i += LANES
        if i < n:
            pass_on(sums, line, held)
            held = no_products(near_dy)
    pass_on(sums, line, held)


@formula
def pairs(dy, x, r, i, w, i_w, like_dy, like_x):  # type: ignore[no-untyped-def]
    """Sixteen of dy, x and the residual, from i on, and of the weights from i_w on."""
    return load(dy, i, like_dy), load(x, i, like_x), loaded(r, i, like_x), loaded(w, i_w, like_x)


@formula
def pairs_part(dy, x, r, i, w, i_w, k, like_dy, like_x):  # type: ignore[no-untyped-def]
    """The first k of them."""
    seen = load_part(dy, i, k, like_dy), load_part(x, i, k, like_x), loaded_part(r, i, k, like_x)
    return (*seen, loaded_part(w, i_w, k, like_x))


@formula
def no_products(like):  # type: ignore[no-untyped-def]
    """Sums of g, d, g d, g^2 and d^4, before there are any."""
    return (nothing(like),) * 5


@formula
def with_products(held, how, seen, near_dy, near_x, lens):  # type: ignore[no-untyped-def]
    """The sums with lanes of dy, x, the residual and the weights."""
    return _with(held, *_deviations(how, seen, near_dy, near_x, lens))


@formula
def with_part(held, k, how, seen, near_dy, near_x, lens):  # type: ignore[no-untyped-def]
    """The same, of the first k lanes."""
    g, d = _deviations(how, seen, near_dy, near_x, lens)
    return _with(held, joined(k, g, nothing(g)), joined(k, d, nothing(d)))


def _deviations(how, seen, near_dy, near_x, lens):  # type: ignore[no-untyped-def]
    dy, x, r, w = seen
    g, d = bent(how, dy, x, *lens, r)
    return counted(how, g, w) - near_dy, counted(how, d - near_x, w)


def _with(held, g, d):  # type: ignore[no-untyped-def]
    s, t, p, q, f = held
    return s + g, t + d, fma(g, d, p), fma(g, g, q), fourth(d, f)


@formula
def pass_on(sums, line, held):  # type: ignore[no-untyped-def]
    """Lanes of the sums, `line` bytes apart, += those."""
    *four, f = held
    for i, lanes in enumerate(four):
        add_lanes(shifted(sums, i * line), lanes)
    add_fourth(shifted(sums, 4 * line), f)


# Sums of d^4 tell where float32 won't do (`gradient._first`): in float64 there are none.


@formula
def fourth(d, f):  # type: ignore[no-untyped-def]
    """f + d^4, of float32 lanes; of others f."""
    e = d * d
    return fma(e, e, f) if d.dtype == types.float32 else f


@formula
def add_fourth(sums, f):  # type: ignore[no-untyped-def]
    if f.dtype == types.float32:
        add_lanes(sums, f)


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
    run_deviations(run, None, n, pivot, sums, 8 * LANES, run)
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
    run_products(*runs, n, pivot, np.float64(hi), sums, line, plain(), None, None, (like, like, like), *runs)
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
