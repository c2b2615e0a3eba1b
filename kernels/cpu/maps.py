"""A vector of a map: y of x, or dx of dy and x, by the numbers of its channels. The schedules know where it lies.

`sources` are x, or dy and x; `target` is what is written; `beside` has what may be None: the residual, weights, and
where the residual's gradient goes.

`numbers` of a tile's channels are three matrices: doubles, by which a map computes in float64, fast ones, for the
elements' type (`coefficients` has the formulas), and lenses. y has no lenses, and no fast numbers (None) where z must
be float64; backward looks at the same z: f may have a kink.
"""

from .activations import bend, bent, counted, finished, in_singles, line, loaded, loaded_part, put, put_part
from .formulas import either, formula
from .lanes import LANES, first, fma, joined, wide
from .memory import fetch, load, load_own, load_part, pointer, reserve, save, save_part, shifted, spread_of, stream

SOON = 16 * LANES  # elements ahead of a store: infer of 26 MB that no cache had took 2.1 ms without reserving, 1.5 with


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


@formula
def loads(sources, i, like):  # type: ignore[no-untyped-def]
    """As `load`, of each."""
    return tuple(load(s, i, like) for s in sources)


@formula
def load_parts(sources, i, n, like):  # type: ignore[no-untyped-def]
    return tuple(load_part(s, i, n, like) for s in sources)


@formula
def fetch_all(sources, i):  # type: ignore[no-untyped-def]
    for s in sources:
        fetch(s, i)


@formula
def shift_all(sources, steps, k):  # type: ignore[no-untyped-def]
    """Pointers, k steps on."""
    return tuple(shifted(s, k * step) for s, step in zip(sources, steps, strict=True))


@formula
def sizes_of(arrays):  # type: ignore[no-untyped-def]
    """Bytes of an element of each."""
    return tuple(a.itemsize for a in arrays)


@formula
def lens(numbers, c):  # type: ignore[no-untyped-def]
    """h, a, b of z = a (x - h) + b, in all lanes."""
    return None if numbers is None else tuple(spread_of(numbers, i, c) for i in range(3))


@formula
def in_double(numbers):  # type: ignore[no-untyped-def]
    """Numbers of which none are fast."""
    doubles, _, lenses = numbers
    return doubles, None if lenses is None else doubles, lenses


def _chosen(how, r, numbers):  # type: ignore[no-untyped-def]
    """In a formula: which rows of which matrix a map takes. Three for a lens in float64, or five; of gradients seven or
    five, and a lens."""
    doubles, fast, lenses = numbers
    if lenses is None:
        return [(doubles, range(3)) if fast is None else (fast, range(5))]
    return [(fast, (0, 1, 2, 3, 4, 6, 7) if in_singles(how, r, _first(fast)) else range(5)), (lenses, range(3))]


def _first(rows):  # type: ignore[no-untyped-def]
    return rows[0] if isinstance(rows, tuple) else rows


@formula
def numbers_of(how, beside, numbers, c):  # type: ignore[no-untyped-def]
    """What a map takes of channel c, in all lanes."""
    return tuple(tuple(spread_of(matrix, i, c) for i in rows) for matrix, rows in _chosen(how, beside[0], numbers))


@formula
def joined_numbers(n, p, q):  # type: ignore[no-untyped-def]
    """Numbers of a channel in the first n lanes, those of the next one behind them."""
    return tuple(
        tuple(joined(n, a, b) for a, b in zip(of_p, of_q, strict=True)) for of_p, of_q in zip(p, q, strict=True)
    )


@formula
def is_rare(numbers, c):  # type: ignore[no-untyped-def]
    """Not 0 where the fast numbers of a channel won't do. Gradients' numbers in float64 have no such row, as all do."""
    return 0.0 if numbers[1] is None else first(spread_of(numbers[1], 5, c))


@formula
def map_one(sources, target, beside, i, i_w, past, how, like, p):  # type: ignore[no-untyped-def]
    """A vector at i, by weights at i_w."""
    r, w, dr = beside
    result, bowed = _mapped(how, loads(sources, i, like), p, loaded(r, i, like), loaded(w, i_w, like))
    write(target, i, result, past)
    put(dr, i, bowed)


@formula
def map_part(sources, target, beside, i, i_w, k, how, like, p):  # type: ignore[no-untyped-def]
    """The first k elements of one."""
    r, w, dr = beside
    values = load_parts(sources, i, k, like)
    result, bowed = _mapped(how, values, p, loaded_part(r, i, k, like), loaded_part(w, i_w, k, like))
    save_part(target, i, k, result)
    put_part(dr, i, k, bowed)


def _mapped(how, values, p, r, w):  # type: ignore[no-untyped-def]
    """In a formula: y, or dx and dy f'(z)."""
    if len(values) == 2:
        return _slope(how, *values, *p, r, w)
    (v,), (p,) = values, p
    y = bend(how, through(how, v, *p)) if len(p) == 5 else finished(how, fma(wide(v) - p[0], p[1], p[2]), v, r, w)
    return y, None


def _slope(how, g, v, p, z, r, w):  # type: ignore[no-untyped-def]
    """dx by the numbers p, and dy f'(z), by the lens z."""
    bowed, d = bent(how, g, v, *z, r)
    bowed = counted(how, bowed, w)
    return line(how, g, bowed, d, p, w), bowed


def rows_of(matrix, n):  # type: ignore[no-untyped-def]
    """In a formula: pointers to the first n rows."""
    return tuple(pointer(matrix, i * matrix.strides[0]) for i in range(n))


@formula
def pointers_of(numbers):  # type: ignore[no-untyped-def]
    """To the rows of the three matrices: where each lane has a column of its own. The last two of lenses are there, and
    read, if `activations.keeps`."""
    doubles, fast, lenses = numbers
    if lenses is None:
        return rows_of(doubles, 3), None if fast is None else rows_of(fast, 6), None
    return rows_of(doubles, 5), rows_of(fast, 8), rows_of(lenses, 5)


@formula
def map_at(how, values, j, numbers, r, w):  # type: ignore[no-untyped-def]
    """As `map_one` computes it, in float64, by numbers of the columns from j on."""
    p = [tuple(load_own(matrix[i], j) for i in rows) for matrix, rows in _chosen(how, r, numbers)]
    result, bowed = _mapped(how, values, p, r, w)
    return wide(result), bowed
