"""What maps are given of each channel, in a table's numbers: coefficients of lines, lenses, and the edges of kinks."""

import math

from .activations import has_edge, looks
from .blocks import paired
from .lanes import fma
from .parts import by_type, nothing_of, part


@part()
def forward_coefficients(s0, stats, affine, numbers, singles, exact, double):  # type: ignore[no-untyped-def]
    """By channel. numbers (3, G): hi, a, b for y = a (x - hi) + b. singles (6, G): h, a, al, b, bl in float32 for
    y = (a d + b) + (al d + bl), d = x - h; and 1 where they won't do. Returns whether there is such a channel. Float64
    data (`double`) has its own numbers there; other data in which all is `exact` has none that will do.

    A mean within 1000 standard deviations goes to b: d = x is exact then, and so is x - h with h near x otherwise.
    """
    rare = False
    _lenses(s0, stats, affine, numbers)
    for c in range(numbers.shape[1]):
        hi, lo, invstd, beta = stats[0, s0 + c], stats[1, s0 + c], stats[3, s0 + c], affine[1, s0 + c]
        a = numbers[1, c]
        if exact:
            singles[0, c], singles[1, c], singles[2, c] = hi, a, a * 2.0**-60
            singles[3, c], singles[4, c], singles[5, c] = beta - a * lo, 0.0, not double
            rare |= not double
            continue
        singles[0, c] = 0.0 if abs(hi * invstd) <= 1024.0 else hi
        b = beta - a * ((hi - singles[0, c]) + lo)
        _split(a, singles, 1, 2, c)
        singles[3, c] = b
        singles[4, c] = b - singles[3, c]
        fits = (1e-30 < abs(a) < 1e30 or a == 0.0) and abs(b) < 1e30
        singles[5, c] = not fits
        rare |= not fits
    return rare


@part()
def _split(value, singles, i, k, c):  # type: ignore[no-untyped-def]
    """value as float32 and what that leaves, of one sign: an infinite factor then makes two infinities of one sign."""
    singles[i, c] = value
    if abs(singles[i, c]) > abs(value):
        singles[i, c] = singles[i, c] * (1.0 - 2.0**-24)
    singles[k, c] = value - singles[i, c]
    if singles[k, c] == 0.0:
        singles[k, c] = value * 2.0**-44


@part()
def _lenses(s0, stats, affine, numbers):  # type: ignore[no-untyped-def]
    """By channel, numbers (3, G): hi, a, b of gamma xhat + beta = a (x - hi) + b."""
    for c in range(numbers.shape[1]):
        a = affine[0, s0 + c] * stats[3, s0 + c]
        numbers[0, c], numbers[1, c], numbers[2, c] = stats[0, s0 + c], a, affine[1, s0 + c] - a * stats[1, s0 + c]


@part()
def backward_coefficients(s0, stats, affine, grads, numbers, singles, n, mass, frozen, exact):  # type: ignore[no-untyped-def]
    """By channel. numbers (5, G): ghi, hi, a, b, c for dx = a (dy - ghi) + (b (x - hi) + c).

    singles (8, G): the same in float32, where c has what the rounding of ghi and hi takes away; 1 where they won't do,
    as of all if `exact`; and what the rounding of a and b takes away. Returns for how many channels they won't do.

    With weights, whose sum is `mass` (of n values; 0 without), their factor of the second term has the mean of dy too:
    dx = a dy + w (b (x - hi) + c). Of frozen statistics a alone is left.
    """
    rare = 0
    for c in range(numbers.shape[1]):
        ghi, glo, hi, lo = grads[0, s0 + c], grads[1, s0 + c], stats[0, s0 + c], stats[1, s0 + c]
        invstd, covariance = stats[3, s0 + c], grads[2, s0 + c]
        a = affine[0, s0 + c] * invstd
        if mass > 0.0:
            covariance = (n * covariance + grads[5, s0 + c] * grads[3, s0 + c]) / mass
            glo += ghi
            glo *= n / mass
            ghi = 0.0
        if frozen:
            ghi = glo = lo = covariance = 0.0
        b = -a * (covariance * invstd) * invstd
        numbers[0, c], numbers[1, c], numbers[2, c], numbers[3, c], numbers[4, c] = ghi, hi, a, b, -(a * glo + b * lo)
        singles[0, c], singles[1, c] = ghi, hi
        _split(a, singles, 2, 6, c)
        _split(b, singles, 3, 7, c)
        rest = numbers[4, c] + a * (singles[0, c] - ghi) + b * (singles[1, c] - hi)
        singles[4, c] = rest
        fits = (1e-30 < abs(a) < 1e30 or a == 0.0) and (1e-30 < abs(b) < 1e30 or b == 0.0) and abs(rest) < 1e30
        if exact or not fits:
            rare += 1
        singles[5, c] = exact or not fits
    return rare


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
    _lenses(s0, stats, affine, numbers)


def _edges(how, r, s0, stats, affine, numbers, singles, exact):  # type: ignore[no-untyped-def]
    """singles (10, G): two rows to work in, and six as the forward map's."""
    slot, own = singles[0, :1], singles[2:8, : numbers.shape[1]]
    forward_coefficients(s0, stats, affine, numbers, own, exact, slot.itemsize == 8)
    for c in range(numbers.shape[1]):
        lens = numbers[0, c], numbers[1, c], numbers[2, c]
        numbers[0, c], numbers[1, c] = edge(lens, own, c, exact or own[5, c] != 0, slot)


@part()
def below(u, s, lens, singles, c, exactly, slot):  # type: ignore[no-untyped-def]
    """Whether the forward map finds z <= 0 for x = s u."""
    if exactly:
        return fma(s * u - lens[0], lens[1], lens[2]) <= 0.0
    slot[0] = s * u
    return paired(slot[0], singles[0, c], singles[1, c], singles[2, c], singles[3, c], singles[4, c]) <= 0.0


@part()
def _rounded(slot, value):  # type: ignore[no-untyped-def]
    slot[0] = value
    return float(slot[0])


@part()
def edge(lens, singles, c, exactly, slot):  # type: ignore[no-untyped-def]
    """s and t for which s x <= t exactly where forward finds z = a (x - h) + b <= 0, of x in the type of slot (1,).

    t is the root, rounded to that type, or a neighbour of it; further off where rounding has made steps of z wide.
    """
    h, a, b = lens
    if a == 0.0:  # NaN stays NaN
        return 0.0, 1.0 if below(0.0, 1.0, lens, singles, c, exactly, slot) else -1.0
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
    while below(high, s, lens, singles, c, exactly, slot):
        if high == top:
            return s, top
        low, high, step = high, min(_rounded(slot, high + step), top), 2.0 * step
    while not below(low, s, lens, singles, c, exactly, slot):
        if low == -top:
            return s, -math.inf
        high, low, step = low, max(_rounded(slot, low - step), -top), 2.0 * step
    while True:
        middle = _rounded(slot, 0.5 * low + 0.5 * high)
        if not low < middle < high:
            return s, low
        if below(middle, s, lens, singles, c, exactly, slot):
            low = middle
        else:
            high = middle
