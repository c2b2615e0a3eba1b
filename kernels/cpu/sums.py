"""A vector of sums: of x's deviations, or of products with dy's. The schedules know where it lies.

`sources` are x, or dy and x, and `near` the pivots of each, in lanes, whose type is that of the sums. Of x: w d, w d^2
and w, d = x - pivot; without weights (None) w is 1 and has no sum. Of dy and x: g = dy - pivot, d = x - hi, g d, g^2
and, in float32, d^4. With an activation dy is dy f'(z), by `activations.bent`, whose lens is h, a, b.
"""

from .activations import bent, counted, loaded, loaded_part
from .formulas import formula
from .lanes import LANES, fma, joined, nothing, where_nonzero, wide
from .memory import fetch, load, load_part, save, shifted
from .parts import part

# Squares of numbers on a grid leave remainders of 0, 1 and 4 eighths, which a float32 sum of a hundred drops more often
# than it rounds them up: the variance of data at 1e4 was 5e-7 too small. So lanes pass sums on after 16 additions.
CHAIN = 16

AHEAD = 64 * LANES  # elements: reading 103 MB took 3.0 ms without fetching, 2.5 with


@formula
def add_lanes(sums, lanes):  # type: ignore[no-untyped-def]
    """sums[:16] += lanes, as float64. Adding lanes up is left for the end: it would hold up the loads behind it."""
    more = wide(lanes)
    save(sums, 0, load(sums, 0, more) + more)


@formula
def load_about(sources, i, near):  # type: ignore[no-untyped-def]
    """As `load`, of each."""
    return tuple(load(s, i, h) for s, h in zip(sources, near, strict=True))


@formula
def load_parts_about(sources, i, n, near):  # type: ignore[no-untyped-def]
    """The first n of them, and pivots in the lanes behind."""
    return tuple(load_part(s, i, n, h) for s, h in zip(sources, near, strict=True))


@formula
def no_sums(near):  # type: ignore[no-untyped-def]
    """Before there are any."""
    return (nothing(near[0]),) * (3 if len(near) == 1 else 5)


@formula
def with_values(held, values, r, w, how, near, lens):  # type: ignore[no-untyped-def]
    """The sums with lanes of x, or of dy and x, of the residual and of weights."""
    if len(near) == 1:
        return _with_deviation(held, values[0] - near[0], w)
    return _with_products(held, *_deviations(how, values, r, w, near, lens))


@formula
def with_first(held, k, values, r, w, how, near, lens):  # type: ignore[no-untyped-def]
    """The same, of the first k lanes; values have the pivots in those behind them."""
    if len(near) == 1:
        return _with_deviation(held, values[0] - near[0], None if w is None else joined(k, w, nothing(w)))
    return _with_products(held, *(joined(k, d, nothing(d)) for d in _deviations(how, values, r, w, near, lens)))


def _with_deviation(held, d, w):  # type: ignore[no-untyped-def]
    s, q, m = held
    if w is None:
        return s + d, fma(d, d, q), m
    d = where_nonzero(w, d, nothing(d))  # what has no weight isn't looked at
    a = d * w
    return s + a, fma(a, d, q), m + w


def _deviations(how, values, r, w, near, lens):  # type: ignore[no-untyped-def]
    g, d = bent(how, *values, *lens, r)
    return counted(how, g, w) - near[0], counted(how, d - near[1], w)


def _with_products(held, g, d):  # type: ignore[no-untyped-def]
    s, t, p, q, f = held
    return s + g, t + d, fma(g, d, p), fma(g, g, q), _fourth(d, f)


def _fourth(d, f):  # type: ignore[no-untyped-def]
    """f + d^4, which tells where float32 won't do (`gradient._first`); of float64, f."""
    e = d * d
    return fma(e, e, f) if _is_single(d) else f


def _is_single(lanes):  # type: ignore[no-untyped-def]
    return lanes.dtype.bitwidth == 32


@formula
def add_sums(w, sums, line, held):  # type: ignore[no-untyped-def]
    """Lanes of the sums, `line` bytes apart, += those held."""
    without_last = w is None if len(held) == 3 else not _is_single(held[0])
    for i, lanes in enumerate(held[: len(held) - without_last]):
        add_lanes(shifted(sums, i * line), lanes)


# Along a run: x alone in two sums side by side, as the next addition would wait for the last one.


def _chains(near):  # type: ignore[no-untyped-def]
    return 2 if len(near) == 1 else 1


@formula
def step_of(near):  # type: ignore[no-untyped-def]
    """Elements that are added at once."""
    return LANES * _chains(near)


@formula
def no_chains(near):  # type: ignore[no-untyped-def]
    return (no_sums(near),) * _chains(near)


@formula
def fetch_step(sources, i, near):  # type: ignore[no-untyped-def]
    """Those from i on."""
    for n in range(_chains(near)):
        for s in sources:
            fetch(s, i + n * LANES)


@formula
def with_step(held, sources, r, w, i, i_w, how, near, lens):  # type: ignore[no-untyped-def]
    """The sums with those from i on, by weights from i_w on."""
    places = [n * LANES for n in range(len(held))]
    return tuple(
        _with_loaded(h, sources, r, w, i + n, i_w + n, how, near, lens) for h, n in zip(held, places, strict=True)
    )


def _with_loaded(held, sources, r, w, i, i_w, how, near, lens):  # type: ignore[no-untyped-def]
    values = load_about(sources, i, near)
    return with_values(held, values, loaded(r, i, near[-1]), loaded(w, i_w, near[-1]), how, near, lens)


@formula
def with_rest(held, sources, r, w, i, i_w, k, how, near, lens):  # type: ignore[no-untyped-def]
    """The sums with the first k of those."""
    values = load_parts_about(sources, i, k, near)
    e, f = loaded_part(r, i, k, near[-1]), loaded_part(w, i_w, k, near[-1])
    return with_first(held[0], k, values, e, f, how, near, lens), *held[1:]


@formula
def add_chains(w, sums, line, held):  # type: ignore[no-untyped-def]
    added = held[0] if len(held) == 1 else tuple(a + b for a, b in zip(*held, strict=True))
    add_sums(w, sums, line, added)


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
