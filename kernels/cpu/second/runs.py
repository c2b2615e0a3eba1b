"""Sums and maps of second order along runs inside a channel, in float64 lanes."""

from ..activations import loaded, loaded_part
from ..formulas import called, formula
from ..lanes import (
    LANES,
    before_line,
    fma,
    keep_whole,
    nothing,
    pointer,
    save_part,
    shifted,
    spread_of,
    where_nonzero,
)
from ..maps import fetch_all, load_parts, loads, write
from ..parts import part, unless_none
from ..rows import at, gathered, index, lanes_of, scatter
from ..sums import AHEAD, add_lanes, load_about, load_parts_about
from ..views import row

PAST, GATHER, FROZEN, SKIP, KEEP, NO_R, NO_Z, PIVOTED = 1, 2, 4, 8, 16, 32, 64, 128  # SKIP, KEEP: for weights of 0

# Sums: 0 w u, 1 g, 2 w u d, 3 g d, 4 g u; with weights also 5 u, 6 d, 7 w d; all less their pivots, which
# `part` has as 8, 9.
# Coefficients: 0 pivot of u, 1 of g, 2 hi; r = a u + b d + c: 3 a, 4 b, 5 c;
# z = e g + k + w (f u + h d + l): 6 e, 7 f, 8 h, 9 l, 10 k.
# A plan: 0 columns?, 1 channels of a tile, 2 pieces, 3 blocks of a group at most, 4 runs of a block or folded rows,
# 5 segments of a run, 6 elements of a segment, 7 period, 8 fold, 9 flags, 10 first values for a pivot,
# 11 elements of a whole run.


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
    v, g, d = about(values, co[:3]) if flags & PIVOTED else values
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
def _run_of(a, o, c, i, instead):  # type: ignore[no-untyped-def]
    """A pointer into an array, or what stands in for one that isn't there."""
    return instead if a.shape[0] == 0 else at(a, o, c, i)


@formula
def runs_of(arrays, o, c, i, instead):  # type: ignore[no-untyped-def]
    """The same of each."""
    return tuple(called(_run_of, a, o, c, i, instead) for a in arrays)


@formula
def stand_ins(scratch):  # type: ignore[no-untyped-def]
    """For sources and for targets that aren't there: zeros, which stay so, and a run that nobody reads."""
    return pointer(scratch, 0), pointer(scratch, scratch.strides[0])


@unless_none(0, lambda *args: None)
def _weights_of(w, o, i, gathered, scratch):  # type: ignore[no-untyped-def]
    return pointer(scratch, 0) if gathered else at(w, o, 0, i)


@part()
def _gather(a, c, order, o0, o1, i0, n, scratch):  # type: ignore[no-untyped-def]
    if a.shape[0] > 0:
        gathered(a, c, o0, o1, i0, n, order, scratch)
    return pointer(scratch, 0)


@formula
def _gathered(arrays, c, order, o0, o1, i0, n, scratch):  # type: ignore[no-untyped-def]
    """Values of a channel of each, in the first rows of scratch."""
    runs = [row(scratch, k, scratch.shape[1]) for k in range(len(arrays))]
    return tuple(called(_gather, a, c, order, o0, o1, i0, n, run) for a, run in zip(arrays, runs, strict=True))


@part()
def _scatter(scratch, a, c, order, o0, o1, i0, n):  # type: ignore[no-untyped-def]
    if a.shape[0] > 0:
        scatter(scratch, a, c, o0, o1, i0, n, order)


@part()
def rows_borders(k, q, starts, plan):  # type: ignore[no-untyped-def]
    """Block k of group q: outer o0 to o1 (places in the order), n elements from i0 on."""
    o0 = min(starts[q] + (k // plan.segments) * plan.height, starts[q + 1])
    i0 = (k % plan.segments) * plan.length
    return o0, min(o0 + plan.height, starts[q + 1]), i0, min(plan.length, plan.inner - i0)


@formula
def _near_of(near, c):  # type: ignore[no-untyped-def]
    """A channel's pivots, each in all lanes."""
    return tuple(spread_of(near, i, c) for i in range(3))


@part()
def rows_sums(sources, w, order, starts, q, k, c0, near, sums, plan, scratch, weights, few):  # type: ignore[no-untyped-def]
    """Lanes of sums (8, 16 G) += those of block k, or of its first runs of `few` values at least."""
    keep_whole()
    o0, o1, i0, n = rows_borders(k, q, starts, plan)
    o1 = min(o1, o0 + (few + n - 1) // n)
    gather, zeros, _ = plan.flags & GATHER != 0, *stand_ins(scratch)
    if gather:
        gathered(w, 0, o0, o1, i0, n, order, weights)
    count = max(1, o1 - o0) if gather else 1
    for o in range(o0, o1, count):
        p = index(order, o)
        run_w = _weights_of(w, p, i0, gather, weights)
        for c in range(near.shape[1]):
            if gather:
                runs = _gathered(sources, c0 + c, order, o0, o1, i0, n, scratch)
            else:
                runs = runs_of(sources, p, c0 + c, i0, zeros)
            skip, line = plan.flags & SKIP != 0, sums.strides[0]
            _sum_run(runs, run_w, count * n, _near_of(near, c), skip, lanes_of(sums, 0, c), line)


@formula
def _eleven(co, c):  # type: ignore[no-untyped-def]
    """A channel's coefficients, each in all lanes."""
    return tuple(spread_of(co, i, c) for i in range(11))


@part()
def rows_map(sources, w, targets, order, starts, q, k, c0, width, co, plan, scratch, weights):  # type: ignore[no-untyped-def]
    """r and z of block k for `width` channels from c0 on, backwards: what was read last is in cache."""
    keep_whole()
    o0, o1, i0, n = rows_borders(k, q, starts, plan)
    flags, (zeros, unread) = plan.flags, stand_ins(scratch)
    gather = flags & GATHER != 0
    if gather:
        gathered(w, 0, o0, o1, i0, n, order, weights)
        flags &= ~PAST
    count = max(1, o1 - o0) if gather else 1
    for o in range(o1 - count, o0 - 1, -count):
        p = index(order, o)
        run_w = _weights_of(w, p, i0, gather, weights)
        for c in range(c0, c0 + width):
            if gather:
                runs = _gathered(sources, c, order, o0, o1, i0, n, scratch)
                results = pointer(scratch, 3 * scratch.strides[0]), pointer(scratch, 4 * scratch.strides[0])
            else:
                runs, results = runs_of(sources, p, c, i0, zeros), runs_of(targets, p, c, i0, unread)
            _map_run(runs, run_w, results, count * n, _eleven(co, c), flags)
            if gather:
                _scatter(scratch[3], targets[0], c, order, o0, o1, i0, n)
                _scatter(scratch[4], targets[1], c, order, o0, o1, i0, n)
