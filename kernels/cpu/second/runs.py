"""Sums and maps of second order along runs inside a channel, in float64 lanes."""

from ..activations import loaded, loaded_part
from ..cut import EXACT, GATHER, PAST
from ..formulas import called, formula
from ..lanes import LANES, fma, keep_whole, nothing, where_nonzero
from ..maps import fetch_all, load_parts, loads, write
from ..memory import before_line, pointer, save_part, shifted, spread_of
from ..parts import part, unless_none
from ..rows import at, at_all, block, gathered, index, lanes_of, scatter
from ..sums import AHEAD, add_lanes, load_about, load_parts_about
from ..views import row

# Flags beside those of `cut`; SKIP, KEEP: for weights of 0. EXACT: u, g and x are taken relative to pivots in the map.
FROZEN, SKIP, KEEP, NO_R, NO_Z = 32, 64, 128, 256, 512

# Sums: 0 w u, 1 g, 2 w u d, 3 g d, 4 g u; with weights also 5 u, 6 d, 7 w d; all less their pivots, which
# `part` has as 8, 9.
# Coefficients: 0 pivot of u, 1 of g, 2 hi; r = a u + b d + c: 3 a, 4 b, 5 c;
# z = e g + k + w (f u + h d + l): 6 e, 7 f, 8 h, 9 l, 10 k.


@part()
def added(t, values, near, w, skip):  # type: ignore[no-untyped-def]
    """The lanes of the sums, and a vector more of u, g and x, with lanes of their weights or None."""
    u, g, d = about(values, near)
    if w is None:
        return t[0] + u, t[1] + g, fma(u, d, t[2]), fma(g, d, t[3]), fma(g, u, t[4]), t[5], t[6], t[7]
    zero = nothing(u)
    v, wd = w * where_nonzero(w, u, zero), w * where_nonzero(w, d, zero)
    vd = v * where_nonzero(w, d, zero)
    if skip:
        u, g, d = where_nonzero(w, u, zero), where_nonzero(w, g, zero), where_nonzero(w, d, zero)
    return t[0] + v, t[1] + g, t[2] + vd, fma(g, d, t[3]), fma(g, u, t[4]), t[5] + u, t[6] + d, t[7] + wd


@formula
def none_of(like):  # type: ignore[no-untyped-def]
    """The sums before there are any."""
    return (nothing(like),) * 8


@formula
def keep(t, w, sums, line):  # type: ignore[no-untyped-def]
    """Adds lanes to the sums in memory, `line` bytes apart."""
    for i, lanes in enumerate(t[:5] if w is None else t):
        add_lanes(shifted(sums, i * line), lanes)


@formula
def about(values, near):  # type: ignore[no-untyped-def]
    """Less their pivots."""
    return tuple(v - h for v, h in zip(values, near, strict=True))


@part()
def _sum_run(sources, w, n, near, skip, sums, line):  # type: ignore[no-untyped-def]
    """The lanes in memory += the sums over a run of n elements of one channel, of u, g and x about pivots."""
    t, i, like = none_of(near[0]), 0, near[0]
    while i + LANES <= n:
        fetch_all(sources, i + AHEAD)
        t = added(t, load_about(sources, i, near), near, loaded(w, i, like), skip)
        i += LANES
    if i < n:
        t = added(t, load_parts_about(sources, i, n - i, near), near, loaded_part(w, i, n - i, like), skip)
    keep(t, w, sums, line)


@part()
def results(values, w, co, flags):  # type: ignore[no-untyped-def]
    """r and z for lanes of u, g and x."""
    u = values[0]
    v, g, d = about(values, co[:3]) if flags & EXACT else values
    r = fma(v, co[3], fma(d, co[4], co[5]))
    if flags & FROZEN:  # u and x don't count, and may be infinite; pivots are 0
        z = g * co[6]
    elif w is None:
        z = fma(g, co[6], fma(v, co[7], fma(d, co[8], co[9])))
    else:
        z = fma(g, co[6], fma(w, fma(v, co[7], fma(d, co[8], co[9])), co[10]))
    if w is not None and flags & SKIP:
        zero = nothing(u)
        r, z = where_nonzero(w, r, u if flags & KEEP else zero), where_nonzero(w, z, zero)
    return r, z


@formula
def save_parts(targets, i, n, lanes):  # type: ignore[no-untyped-def]
    for target, values in zip(targets, lanes, strict=True):
        save_part(target, i, n, values)


@formula
def write_all(targets, i, lanes, past):  # type: ignore[no-untyped-def]
    for target, values, by in zip(targets, lanes, past, strict=True):
        write(target, i, values, by)


@part()
def borders_past(targets, n, flags):  # type: ignore[no-untyped-def]
    """Elements before a line of r and of z, and whether each is stored past the caches from there on."""
    if flags & PAST == 0 or n < 8 * LANES:
        return 0, (False, False)
    i, of_z = before_line(targets[0]), before_line(targets[1])
    if flags & NO_R:
        i = of_z
    return i, (flags & NO_R == 0, flags & NO_Z == 0 and of_z == i)


@part()
def _map_run(sources, w, targets, n, co, flags):  # type: ignore[no-untyped-def]
    """r and z of a run of n elements of one channel."""
    like = co[0]
    i, past = borders_past(targets, n, flags)
    if i > 0:
        both = results(load_parts(sources, 0, i, like), loaded_part(w, 0, i, like), co, flags)
        save_parts(targets, 0, i, both)
    while i + LANES <= n:
        both = results(loads(sources, i, like), loaded(w, i, like), co, flags)
        write_all(targets, i, both, past)
        i += LANES
    if i < n:
        both = results(load_parts(sources, i, n - i, like), loaded_part(w, i, n - i, like), co, flags)
        save_parts(targets, i, n - i, both)


@part()
def instead(targets, unread, flags):  # type: ignore[no-untyped-def]
    """Where r and z go: to a run that nobody reads where they aren't wanted."""
    (of_r, of_z), run = targets, pointer(unread, 0)
    return run if flags & NO_R else of_r, run if flags & NO_Z else of_z


@formula
def _gathered(sources, c, o0, o1, i0, n, order, scratch):  # type: ignore[no-untyped-def]
    """Values of a channel of each, in the first rows of scratch."""
    runs = [row(scratch, k, scratch.shape[1]) for k in range(len(sources))]
    return tuple(called(gathered, a, c, o0, o1, i0, n, order, run) for a, run in zip(sources, runs, strict=True))


@unless_none(0, lambda *args: None)
def _weights_of(w, o, i, gather, room):  # type: ignore[no-untyped-def]
    return pointer(room, 0) if gather else at(w, o, 0, i)


@formula
def _pivots_of(near, c):  # type: ignore[no-untyped-def]
    """A channel's, each in all lanes."""
    return tuple(spread_of(near, i, c) for i in range(3))


@formula
def _coefficients_of(co, c):  # type: ignore[no-untyped-def]
    return tuple(spread_of(co, i, c) for i in range(11))


@part()
def rows_sums(sources, w, k, c0, near, sums, plan, few, order, scratch, room):  # type: ignore[no-untyped-def]
    """Lanes of sums (8, 16 G) += those of block k, or of its first runs of `few` values at least."""
    keep_whole()
    o0, o1, i0, n = block(k, sources[0].shape, plan)
    o1 = min(o1, o0 + (few + n - 1) // n)
    gather, skip, line = plan.flags & GATHER != 0, plan.flags & SKIP != 0, sums.strides[0]
    if gather:
        gathered(w, 0, o0, o1, i0, n, order, room)
    count = max(1, o1 - o0) if gather else 1
    for o in range(o0, o1, count):
        p = index(order, o)
        run_w = _weights_of(w, p, i0, gather, room)
        for c in range(near.shape[1]):
            if gather:
                runs = _gathered(sources, c0 + c, o0, o1, i0, n, order, scratch)
            else:
                runs = at_all(sources, p, c0 + c, i0)
            _sum_run(runs, run_w, count * n, _pivots_of(near, c), skip, lanes_of(sums, 0, c), line)


@part()
def rows_map(sources, targets, w, k, c0, co, plan, order, scratch, room, unread):  # type: ignore[no-untyped-def]
    """r and z of block k for the channels from c0 on, of coefficients co (11, G), backwards: what was read last is in
    cache."""
    keep_whole()
    o0, o1, i0, n = block(k, sources[0].shape, plan)
    flags, gather = plan.flags, plan.flags & GATHER != 0
    if gather:
        gathered(w, 0, o0, o1, i0, n, order, room)
        flags &= ~PAST
    count = max(1, o1 - o0) if gather else 1
    for o in range(o1 - count, o0 - 1, -count):
        p = index(order, o)
        run_w = _weights_of(w, p, i0, gather, room)
        for c in range(co.shape[1]):
            if gather:
                runs = _gathered(sources, c0 + c, o0, o1, i0, n, order, scratch)
                written = pointer(scratch, 3 * scratch.strides[0]), pointer(scratch, 4 * scratch.strides[0])
            else:
                runs = at_all(sources, p, c0 + c, i0)
                written = instead(at_all(targets, p, c0 + c, i0), unread, flags)
            _map_run(runs, run_w, written, count * n, _coefficients_of(co, c), flags)
            if gather and not flags & NO_R:
                scatter(scratch[3], targets[0], c0 + c, o0, o1, i0, n, order)
            if gather and not flags & NO_Z:
                scatter(scratch[4], targets[1], c0 + c, o0, o1, i0, n, order)
