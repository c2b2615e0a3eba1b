"""What maps are given of each channel, in a table's numbers: coefficients of lines, lenses, and the edges of kinks."""

import math

from .activations import has_edge, looks
from .blocks import through
from .lanes import (
    LANES,
    count_nonzero,
    fma,
    give,
    magnitude,
    negative,
    rounded,
    spread,
    take,
    where_at_most,
    where_less,
    where_nonzero,
)
from .parts import by_type, nothing_of, part


@part()
def forward_coefficients(how, s0, stats, affine, numbers, singles, exact, double):  # type: ignore[no-untyped-def]
    """By channel. numbers (3, G): hi, a, b for y = a (x - hi) + b. singles (6, G): h, a, al, b, bl in float32 for
    y = (a d + b) + (al d + bl), d = x - h; and 1 where they won't do. Returns whether there is such a channel. Float64
    data (`double`) has its own numbers there; other data in which all is `exact` has none that will do.

    A mean within 1000 standard deviations goes to b: d = x is exact then, and so is x - h with h near x otherwise.
    Within 16 where al and bl are left out (`through`): the rounding of a and b stays.
    """
    rare, one, zero = 0, spread(1.0), spread(0.0)
    for c in range(0, numbers.shape[1], LANES):
        g = min(LANES, numbers.shape[1] - c)
        hi, a, b = _lens(s0 + c, g, stats, affine)
        _give_three(numbers, c, g, hi, a, b)
        fits = zero
        if exact:
            _give_three(singles, c, g, hi, a, a * spread(2.0**-60))
            give(singles, 3, c, g, b)
            give(singles, 4, c, g, zero)
            fits = one if double else zero
        else:
            invstd, lo = take(stats, 3, s0 + c, g, zero), take(stats, 1, s0 + c, g, zero)
            near = where_at_most(magnitude(hi * invstd), spread(_near(how)), zero, rounded(hi, singles))
            first, second = _split(a, singles)
            _give_three(singles, c, g, near, first, second)
            b = take(affine, 1, s0 + c, g, zero) - a * ((hi - near) + lo)
            head = rounded(b, singles)
            give(singles, 3, c, g, head)
            give(singles, 4, c, g, b - head)
            fits = where_less(magnitude(b), spread(1e30), _fits(a), zero)
        give(singles, 5, c, g, one - fits)
        rare += count_nonzero(one - fits, g)
    return rare > 0


@by_type
def _near(how):  # type: ignore[no-untyped-def]
    return (lambda how: 16.0) if how.short else (lambda how: 1024.0)


@part()
def _give_three(rows, c, g, first, second, third):  # type: ignore[no-untyped-def]
    give(rows, 0, c, g, first)
    give(rows, 1, c, g, second)
    give(rows, 2, c, g, third)


@part()
def _fits(a):  # type: ignore[no-untyped-def]
    """1 where a is 0 or of 1e-30 to 1e30, else 0, as of NaN."""
    one, zero, size = spread(1.0), spread(0.0), magnitude(a)
    return where_less(spread(1e-30), size, where_less(size, spread(1e30), one, zero), where_nonzero(a, zero, one))


@part()
def _split(value, singles):  # type: ignore[no-untyped-def]
    """value as float32 and what that leaves, of one sign: an infinite factor then makes two infinities of one sign."""
    first = rounded(value, singles)
    less = rounded(first * spread(1.0 - 2.0**-24), singles)
    first = where_less(magnitude(value), magnitude(first), less, first)
    rest = rounded(value - first, singles)
    return first, where_nonzero(rest, rest, value * spread(2.0**-44))


@part()
def _lens(s, g, stats, affine):  # type: ignore[no-untyped-def]
    """Of g channels, hi, a, b of gamma xhat + beta = a (x - hi) + b."""
    zero = spread(0.0)
    a = take(affine, 0, s, g, zero) * take(stats, 3, s, g, zero)
    return take(stats, 0, s, g, zero), a, take(affine, 1, s, g, zero) - a * take(stats, 1, s, g, zero)


@part()
def backward_coefficients(s0, stats, affine, grads, numbers, singles, n, mass, frozen, exact):  # type: ignore[no-untyped-def]
    """By channel. numbers (5, G): ghi, hi, a, b, c for dx = a (dy - ghi) + (b (x - hi) + c).

    singles (8, G): the same in float32, where c has what the rounding of ghi and hi takes away; 1 where they won't do,
    as of all if `exact`; and what the rounding of a and b takes away. Returns for how many channels they won't do.

    With weights, whose sum is `mass` (of n values; 0 without), their factor of the second term has the mean of dy too:
    dx = a dy + w (b (x - hi) + c). Of frozen statistics a alone is left.
    """
    rare, one, zero = 0, spread(1.0), spread(0.0)
    for c in range(0, numbers.shape[1], LANES):
        g, s = min(LANES, numbers.shape[1] - c), s0 + c
        ghi, glo, hi, lo = (
            take(grads, 0, s, g, zero), take(grads, 1, s, g, zero), take(stats, 0, s, g, zero),
            take(stats, 1, s, g, zero),
        )  # fmt: skip
        invstd, covariance = take(stats, 3, s, g, zero), take(grads, 2, s, g, zero)
        a = take(affine, 0, s, g, zero) * invstd
        if mass > 0.0:
            shift = take(grads, 4, s, g, zero) * take(grads, 3, s, g, zero)
            covariance = (spread(n) * covariance + shift) / spread(mass)
            glo = (glo + ghi) * spread(n / mass)
            ghi = zero
        if frozen:
            ghi = glo = hi = lo = covariance = zero
        b = negative(a) * (covariance * invstd) * invstd
        rest = negative(a * glo + b * lo)
        _give_three(numbers, c, g, ghi, hi, a)
        give(numbers, 3, c, g, b)
        give(numbers, 4, c, g, rest)
        first, second = rounded(ghi, singles), rounded(hi, singles)
        (a_first, a_rest), (b_first, b_rest) = _split(a, singles), _split(b, singles)
        rest = rest + a * (first - ghi) + b * (second - hi)
        _give_three(singles, c, g, first, second, a_first)
        _give_three_more(singles, c, g, b_first, rest, a_rest, b_rest)
        fits = zero
        if not exact:
            fits = where_less(magnitude(rest), spread(1e30), _fits(a) * _fits(b), zero)
        give(singles, 5, c, g, one - fits)
        rare += count_nonzero(one - fits, g)
    return rare


@part()
def _give_three_more(rows, c, g, b, rest, a_rest, b_rest):  # type: ignore[no-untyped-def]
    give(rows, 3, c, g, b)
    give(rows, 4, c, g, rest)
    give(rows, 6, c, g, a_rest)
    give(rows, 7, c, g, b_rest)


@by_type
def lenses_of(how, r, s0, stats, affine, numbers, singles, exact):  # type: ignore[no-untyped-def]
    """The lenses that `bent` takes: h, a, b of z = a (x - h) + b, or for an edge s and t in place of h and a."""
    if has_edge(how, r):
        return _edges
    return _plain_lenses if looks(how) else nothing_of


@by_type
def columns_of(how, r, wide, narrow):  # type: ignore[no-untyped-def]
    """Where lenses are by column: an edge is in x's type, and as wide columns would be pushed out of L1."""
    return (lambda how, r, wide, narrow: narrow) if has_edge(how, r) else (lambda how, r, wide, narrow: wide)


def _plain_lenses(how, r, s0, stats, affine, numbers, singles, exact):  # type: ignore[no-untyped-def]
    for c in range(0, numbers.shape[1], LANES):
        g = min(LANES, numbers.shape[1] - c)
        hi, a, b = _lens(s0 + c, g, stats, affine)
        _give_three(numbers, c, g, hi, a, b)


def _edges(how, r, s0, stats, affine, numbers, singles, exact):  # type: ignore[no-untyped-def]
    """singles (10, G): two rows to work in, and six as the forward map's."""
    slot, own = singles[0, :1], singles[2:8, : numbers.shape[1]]
    forward_coefficients(how, s0, stats, affine, numbers, own, exact, slot.itemsize == 8)
    for c in range(numbers.shape[1]):
        lens = numbers[0, c], numbers[1, c], numbers[2, c]
        numbers[0, c], numbers[1, c] = edge(how, lens, own, c, exact or own[5, c] != 0, slot)


@part()
def below(how, u, s, lens, singles, c, exactly, slot):  # type: ignore[no-untyped-def]
    """Whether the forward map finds z <= 0 for x = s u."""
    if exactly:
        return fma(s * u - lens[0], lens[1], lens[2]) <= 0.0
    slot[0] = s * u
    return through(how, slot[0], singles[0, c], singles[1, c], singles[2, c], singles[3, c], singles[4, c]) <= 0.0


@part()
def _rounded(slot, value):  # type: ignore[no-untyped-def]
    slot[0] = value
    return float(slot[0])


@part()
def edge(how, lens, singles, c, exactly, slot):  # type: ignore[no-untyped-def]
    """s and t for which s x <= t exactly where forward finds z = a (x - h) + b <= 0, of x in the type of slot (1,).

    t is the root, rounded to that type, or a neighbour of it; further off where rounding has made steps of z wide.
    """
    h, a, b = lens
    if a == 0.0:  # NaN stays NaN
        return 0.0, 1.0 if below(how, 0.0, 1.0, lens, singles, c, exactly, slot) else -1.0
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
    while below(how, high, s, lens, singles, c, exactly, slot):
        if high == top:
            return s, top
        low, high, step = high, min(_rounded(slot, high + step), top), 2.0 * step
    while not below(how, low, s, lens, singles, c, exactly, slot):
        if low == -top:
            return s, -math.inf
        high, low, step = low, max(_rounded(slot, low - step), -top), 2.0 * step
    while True:
        middle = _rounded(slot, 0.5 * low + 0.5 * high)
        if not low < middle < high:
            return s, low
        if below(how, middle, s, lens, singles, c, exactly, slot):
            low = middle
        else:
            high = middle
