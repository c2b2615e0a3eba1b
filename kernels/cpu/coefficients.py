"""What maps are given of each channel, in a table's numbers: coefficients of lines, lenses, and the edges of kinks."""

import math

from .activations import has_edge, is_kept, keeps, looks
from .formulas import formula, full
from .lanes import (
    LANES,
    count_nonzero,
    fma,
    magnitude,
    negative,
    nothing,
    rounded,
    spread,
    where_at_most,
    where_less,
    where_nonzero,
)
from .maps import through
from .memory import give_rows, some_of, take
from .parts import by_type, nothing_of, part
from .views import corner, row


@part()
def forward_coefficients(how, table, numbers, singles, exact, double):  # type: ignore[no-untyped-def]
    """By channel of a tile's table (6, G). numbers (3, G): hi, a, b for y = a (x - hi) + b. singles (6, G): h, a, al,
    b, bl in float32 for y = (a d + b) + (al d + bl), d = x - h; and 1 where they won't do. Returns how many such there
    are. Float64 data (`double`) has its own numbers there; other data in which all is `exact` has none that will do,
    and of no rows none are written.

    A mean within 1000 standard deviations goes to b: d = x is exact then, and so is x - h with h near x otherwise.
    Within 16 where al and bl are left out (`through`): the rounding of a and b stays.
    """
    rare, misses = 0, spread(0.0) if double else spread(1.0)
    for c in range(0, numbers.shape[1], LANES):
        g = min(LANES, numbers.shape[1] - c)
        if not exact:
            misses = _numbers(how, c, g, table, numbers, singles)
        elif singles.shape[0] > 0:
            _exact_numbers(c, g, table, numbers, singles, misses)
        else:
            give_rows(numbers, 0, c, g, _lens(c, g, table))
        rare += count_nonzero(misses, g)
    return rare


@formula
def _exact_numbers(c, g, table, numbers, singles, misses):  # type: ignore[no-untyped-def]
    hi, a, b = _lens(c, g, table)
    give_rows(numbers, 0, c, g, (hi, a, b))
    give_rows(singles, 0, c, g, (hi, a, a * 2.0**-60, b, nothing(b), misses))


@formula
def _numbers(how, c, g, table, numbers, singles):  # type: ignore[no-untyped-def]
    zero, (hi, a, b) = spread(0.0), _lens(c, g, table)
    give_rows(numbers, 0, c, g, (hi, a, b))
    invstd, lo = take(table, 3, c, g, zero), take(table, 1, c, g, zero)
    most = full(hi, 16.0 if how.short else 1024.0)
    near = where_at_most(magnitude(hi * invstd), most, zero, rounded(hi, singles))
    b = take(table, 5, c, g, zero) - a * ((hi - near) + lo)
    head = rounded(b, singles)
    misses = 1.0 - where_less(magnitude(b), full(b, 1e30), _fits(a), zero)
    give_rows(singles, 0, c, g, (near, *_split(a, singles), head, b - head, misses))
    return misses


@formula
def _fits(a):  # type: ignore[no-untyped-def]
    """1 where a is 0 or of 1e-30 to 1e30, else 0, as of NaN."""
    one, zero, size = full(a, 1.0), full(a, 0.0), magnitude(a)
    return where_less(full(a, 1e-30), size, where_less(size, full(a, 1e30), one, zero), where_nonzero(a, zero, one))


@formula
def _split(value, singles):  # type: ignore[no-untyped-def]
    """value as float32 and what that leaves, of one sign: an infinite factor then makes two infinities of one sign."""
    first = rounded(value, singles)
    less = rounded(first * (1.0 - 2.0**-24), singles)
    first = where_less(magnitude(value), magnitude(first), less, first)
    rest = rounded(value - first, singles)
    return first, where_nonzero(rest, rest, value * 2.0**-44)


@formula
def _lens(c, g, table):  # type: ignore[no-untyped-def]
    """Of g channels, hi, a, b of gamma xhat + beta = a (x - hi) + b."""
    zero = spread(0.0)
    a = take(table, 4, c, g, zero) * take(table, 3, c, g, zero)
    return take(table, 0, c, g, zero), a, take(table, 5, c, g, zero) - a * take(table, 1, c, g, zero)


@by_type
def make_invertible(how, r, table, kept, own):  # type: ignore[no-untyped-def]
    """own (6, G) <- the table by which f^-1(y) = gamma xhat + beta may stand for x: its mean is beta and its 1 / std
    1 / gamma, with sign. Channels that are `kept` (0 and above) have x's own."""
    return _invertible if how.inverse else nothing_of


def _invertible(how, r, table, kept, own):  # type: ignore[no-untyped-def]
    for c in range(0, own.shape[1], LANES):
        g = min(LANES, own.shape[1] - c)
        _inverted(how, r, c, g, table, kept, own)


@formula
def _inverted(how, r, c, g, table, kept, own):  # type: ignore[no-untyped-def]
    found = some_of(table, range(6), c, g)
    _, _, var, invstd, gamma, beta = found
    scale = gamma * invstd
    made = beta, nothing(beta), scale * scale * var, 1.0 / gamma, gamma * scale, beta
    if keeps(how, r):
        which = take(kept, 0, c, g, spread(-1.0))
        made = [where_less(which, nothing(which), a, b) for a, b in zip(made, found, strict=True)]
    give_rows(own, 0, c, g, made)


@part()
def backward_coefficients(table, grads, numbers, singles, n, mass, frozen, exact):  # type: ignore[no-untyped-def]
    """By channel. numbers (5, G): ghi, hi, a, b, c for dx = a (dy - ghi) + (b (x - hi) + c).

    singles (8, G): the same in float32, where c has what the rounding of ghi and hi takes away; 1 where they won't do,
    as of all if `exact`; and what the rounding of a and b takes away. Returns for how many channels they won't do.

    With weights, whose sum is `mass` (of n values; 0 without), their factor of the second term has the mean of dy too:
    dx = a dy + w (b (x - hi) + c); singles have what the rounding of c takes away in the place of ghi then. Of frozen
    statistics a alone is left.
    """
    rare = 0
    for c in range(0, numbers.shape[1], LANES):
        g = min(LANES, numbers.shape[1] - c)
        dy, x = _means(c, g, table, grads)
        a, covariance = _scales(c, g, table, grads)
        if mass > 0.0:
            dy, covariance = _by_mass(c, g, grads, dy, covariance, n, mass)
        if frozen:
            dy = x = (spread(0.0), spread(0.0))
            covariance = spread(0.0)
        fit = spread(0.0) if exact else spread(1.0)
        rare += count_nonzero(_gradient_numbers(c, g, table, numbers, singles, dy, x, a, covariance, fit, mass), g)
    return rare


@formula
def _means(c, g, table, grads):  # type: ignore[no-untyped-def]
    """Means of dy and of x, as pairs."""
    return some_of(grads, range(2), c, g), some_of(table, range(2), c, g)


@formula
def _scales(c, g, table, grads):  # type: ignore[no-untyped-def]
    """gamma invstd, and the covariance."""
    zero = spread(0.0)
    return take(table, 4, c, g, zero) * take(table, 3, c, g, zero), take(grads, 2, c, g, zero)


@formula
def _by_mass(c, g, grads, dy, covariance, n, mass):  # type: ignore[no-untyped-def]
    """Where weights' sum is `mass`: the mean of dy goes to the second term, whose covariance is by mass too."""
    ghi, glo = dy
    mean, total = some_of(grads, (3, 4), c, g)
    return (nothing(ghi), (glo + ghi) * (n / mass)), (n * covariance + total * mean) / mass


@formula
def _gradient_numbers(c, g, table, numbers, singles, dy, x, a, covariance, fit, mass):  # type: ignore[no-untyped-def]
    """numbers and singles of g channels from c on; gives 1 where these won't do, as where they can't `fit`."""
    zero, (ghi, glo), (hi, lo) = spread(0.0), dy, x
    invstd = take(table, 3, c, g, zero)
    b = negative(a) * (covariance * invstd) * invstd
    rest = negative(a * glo + b * lo)
    give_rows(numbers, 0, c, g, (ghi, hi, a, b, rest))
    first, second = rounded(ghi, singles), rounded(hi, singles)
    (a_first, a_rest), (b_first, b_rest) = _split(a, singles), _split(b, singles)
    rest = rest + a * (first - ghi) + b * (second - hi)
    misses = 1.0 - where_less(magnitude(rest), full(rest, 1e30), _fits(a) * _fits(b) * fit, zero)
    first = where_nonzero(spread(mass), rest - rounded(rest, singles), first)
    give_rows(singles, 0, c, g, (first, second, a_first, b_first, rest, misses, a_rest, b_rest))
    return misses


@by_type
def lenses_of(how, r, table, numbers, singles, exact):  # type: ignore[no-untyped-def]
    """The lenses that `bent` takes: h, a, b of z = a (x - h) + b, or for an edge s and t in place of h and a.

    Where x of some channels is kept, the fourth row of numbers says of which.
    """
    if has_edge(how, r):
        return _edges
    return _plain_lenses if looks(how, r) else nothing_of


@formula
def columns_of(how, r, wide, narrow):  # type: ignore[no-untyped-def]
    """Where lenses are by column: an edge is in x's type, and as wide columns would be pushed out of L1."""
    return narrow if has_edge(how, r) else wide


def _plain_lenses(how, r, table, numbers, singles, exact):  # type: ignore[no-untyped-def]
    for c in range(0, numbers.shape[1], LANES):
        g = min(LANES, numbers.shape[1] - c)
        give_rows(numbers, 0, c, g, _lens(c, g, table))


def _edges(how, r, table, numbers, singles, exact):  # type: ignore[no-untyped-def]
    """singles (8, G): two rows to work in, and six as the forward map's."""
    slot, own = row(singles, 0, 1), corner(singles, 2, 6, numbers.shape[1])
    forward_coefficients(how, table, numbers, own, exact, slot.itemsize == 8)
    for c in range(numbers.shape[1]):
        if is_kept(how, r) and numbers[3, c] < 0.0:  # it is had back from y
            continue
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
