"""Sums and maps of second order along runs inside a channel, in float64 lanes."""

from ..formulas import formula
from ..lanes import (
    LANES,
    before_line,
    fetch,
    fma,
    keep_whole,
    load,
    load_part,
    nothing,
    pointer,
    save_part,
    shifted,
    spread,
    spread_of,
    where_nonzero,
)
from ..maps import write
from ..parts import part
from ..rows import gathered, index, scatter
from ..sums import AHEAD, add_lanes

PAST, GATHER, FROZEN, SKIP, KEEP, NO_R, NO_Z, PIVOTED = 1, 2, 4, 8, 16, 32, 64, 128  # SKIP, KEEP: for weights of 0

# Sums: 0 w u, 1 g, 2 w u d, 3 g d, 4 g u; with weights also 5 u, 6 d; all less their pivots, which `part` has as 7, 8.
# Coefficients: 0 pivot of u, 1 of g, 2 hi; r = a u + b d + c: 3 a, 4 b, 5 c;
# z = e g + k + w (f u + h d + l): 6 e, 7 f, 8 h, 9 l, 10 k.
# A plan: 0 columns?, 1 channels of a tile, 2 pieces, 3 blocks of a group at most, 4 runs of a block or folded rows,
# 5 segments of a run, 6 elements of a segment, 7 period, 8 fold, 9 flags, 10 first values for a pivot,
# 11 elements of a whole run.


@part()
def added(t, u, g, d, lanes, w, skip):  # type: ignore[no-untyped-def]
    """The lanes of the sums, and one vector more. Without weights (w is None) lanes don't count."""
    if w is None:
        return t[0] + u, t[1] + g, fma(u, d, t[2]), fma(g, d, t[3]), fma(g, u, t[4]), t[5], t[6]
    zero = nothing(u)
    v = lanes * where_nonzero(lanes, u, zero)
    vd = v * where_nonzero(lanes, d, zero)
    if skip:
        u, g, d = where_nonzero(lanes, u, zero), where_nonzero(lanes, g, zero), where_nonzero(lanes, d, zero)
    return t[0] + v, t[1] + g, t[2] + vd, fma(g, d, t[3]), fma(g, u, t[4]), t[5] + u, t[6] + d


@formula
def none_of(like):  # type: ignore[no-untyped-def]
    """The sums before there are any."""
    return (nothing(like),) * 7


@formula
def keep(t, w, sums, line):  # type: ignore[no-untyped-def]
    """Adds lanes to the sums in memory, `line` bytes apart."""
    for i, lanes in enumerate(t[:5] if w is None else t):
        add_lanes(shifted(sums, i * line), lanes)


@part()
def weights_at(w, run, i, n, like):  # type: ignore[no-untyped-def]
    if w is None:
        return nothing(like)
    return load(run, i, like) if n >= LANES else load_part(run, i, n, nothing(like))


@part()
def _sum_run(u, g, x, w, run, n, pu, pg, hi, skip, sums, line):  # type: ignore[no-untyped-def]
    """The lanes in memory += the sums over a run of n elements of one channel."""
    pu, pg, hi = spread(pu), spread(pg), spread(hi)
    t = none_of(pu)
    i = 0
    while i + LANES <= n:
        fetch(u, i + AHEAD)
        fetch(g, i + AHEAD)
        fetch(x, i + AHEAD)
        t = added(
            t, load(u, i, pu) - pu, load(g, i, pu) - pg, load(x, i, pu) - hi, weights_at(w, run, i, LANES, pu), w, skip
        )
        i += LANES
    if i < n:
        m = n - i
        du, dg, dx = load_part(u, i, m, pu) - pu, load_part(g, i, m, pg) - pg, load_part(x, i, m, hi) - hi
        t = added(t, du, dg, dx, weights_at(w, run, i, m, pu), w, skip)
    keep(t, w, sums, line)


@part()
def results(u, g, d, lanes, w, co, flags):  # type: ignore[no-untyped-def]
    """r and z for lanes of u, g and x."""
    v = u
    if flags & PIVOTED:
        v, g, d = u - co[0], g - co[1], d - co[2]
    r = fma(v, co[3], fma(d, co[4], co[5]))
    if flags & FROZEN:  # u and x don't count, and may be infinite; pivots are 0
        z = g * co[6]
    elif w is None:
        z = fma(g, co[6], fma(v, co[7], fma(d, co[8], co[9])))
    else:
        z = fma(g, co[6], fma(lanes, fma(v, co[7], fma(d, co[8], co[9])), co[10]))
    if w is not None and flags & SKIP:
        zero = nothing(u)
        r, z = where_nonzero(lanes, r, u if flags & KEEP else zero), where_nonzero(lanes, z, zero)
    return r, z


@part()
def _map_run(u, g, x, w, run, r, z, n, co, flags):  # type: ignore[no-untyped-def]
    """r and z of a run of n elements of one channel."""
    like = co[0]
    past_r = past_z = False
    i = 0
    if flags & PAST and n >= 8 * LANES:
        i = before_line(z if flags & NO_R else r)
        past_r, past_z = flags & NO_R == 0, flags & NO_Z == 0 and before_line(z) == i
        if i > 0:
            one, two = results(
                load_part(u, 0, i, like), load_part(g, 0, i, like), load_part(x, 0, i, like),
                weights_at(w, run, 0, i, like), w, co, flags,
            )  # fmt: skip
            save_part(r, 0, i, one)
            save_part(z, 0, i, two)
    while i + LANES <= n:
        one, two = results(
            load(u, i, like), load(g, i, like), load(x, i, like), weights_at(w, run, i, LANES, like), w, co, flags
        )
        write(r, i, one, past_r)
        write(z, i, two, past_z)
        i += LANES
    if i < n:
        m = n - i
        one, two = results(
            load_part(u, i, m, like), load_part(g, i, m, like), load_part(x, i, m, like),
            weights_at(w, run, i, m, like), w, co, flags,
        )  # fmt: skip
        save_part(r, i, m, one)
        save_part(z, i, m, two)


@part()
def _run_of(a, o, c, i, instead):  # type: ignore[no-untyped-def]
    """A pointer into an array, or to what stands in for one that isn't there."""
    if a.shape[0] == 0:
        return pointer(instead, 0)
    return pointer(a, o * a.strides[0] + c * a.strides[1] + i * a.strides[2])


@part()
def _weights_of(w, o, i, gathered, scratch):  # type: ignore[no-untyped-def]
    if w is None or gathered:
        return pointer(scratch, 0)
    return pointer(w, (o * w.shape[2] + i) * w.itemsize)


@part()
def _gather(a, c, order, o0, o1, i0, n, scratch):  # type: ignore[no-untyped-def]
    if a.shape[0] > 0:
        gathered(a, c, o0, o1, i0, n, order, scratch)


@part()
def _scatter(scratch, a, c, order, o0, o1, i0, n):  # type: ignore[no-untyped-def]
    if a.shape[0] > 0:
        scatter(scratch, a, c, o0, o1, i0, n, order)


@part()
def rows_borders(k, q, starts, plan):  # type: ignore[no-untyped-def]
    """Block k of group q: outer o0 to o1 (places in the order), n elements from i0 on."""
    o0 = min(starts[q] + (k // plan[5]) * plan[4], starts[q + 1])
    i0 = (k % plan[5]) * plan[6]
    return o0, min(o0 + plan[4], starts[q + 1]), i0, min(plan[6], plan[11] - i0)


@part()
def rows_sums(u, g, x, w, order, starts, q, k, c0, near, sums, plan, scratch, weights, few):  # type: ignore[no-untyped-def]
    """Lanes of sums (7, 16 G) += those of block k, or of its first runs of `few` values at least."""
    keep_whole()
    o0, o1, i0, n = rows_borders(k, q, starts, plan)
    o1 = min(o1, o0 + (few + n - 1) // n)
    skip, line = plan[9] & SKIP != 0, sums.strides[0]
    if plan[9] & GATHER:
        if o1 > o0:
            gathered(w, 0, o0, o1, i0, n, order, weights)
            for c in range(near.shape[1]):
                _gather(u, c0 + c, order, o0, o1, i0, n, scratch[0])
                _gather(g, c0 + c, order, o0, o1, i0, n, scratch[1])
                _gather(x, c0 + c, order, o0, o1, i0, n, scratch[2])
                _sum_run(
                    pointer(scratch[0], 0), pointer(scratch[1], 0), pointer(scratch[2], 0),
                    w, _weights_of(w, 0, 0, True, weights), (o1 - o0) * n, near[0, c], near[1, c], near[2, c], skip,
                    pointer(sums, 8 * LANES * c), line,
                )  # fmt: skip
        return
    for o in range(o0, o1):
        place = index(order, o)
        for c in range(near.shape[1]):
            _sum_run(
                _run_of(u, place, c0 + c, i0, scratch[0]), _run_of(g, place, c0 + c, i0, scratch[0]),
                _run_of(x, place, c0 + c, i0, scratch[0]), w, _weights_of(w, place, i0, False, weights), n,
                near[0, c], near[1, c], near[2, c], skip, pointer(sums, 8 * LANES * c), line,
            )  # fmt: skip


@formula
def _eleven(co, c):  # type: ignore[no-untyped-def]
    """A channel's coefficients, each in all lanes."""
    return tuple(spread_of(co, i, c) for i in range(11))


@part()
def rows_map(u, g, x, w, r, z, order, starts, q, k, c0, width, co, plan, scratch, weights):  # type: ignore[no-untyped-def]
    """r and z of block k for `width` channels from c0 on, backwards: what was read last is in cache."""
    keep_whole()
    o0, o1, i0, n = rows_borders(k, q, starts, plan)
    flags = plan[9]
    if flags & GATHER:
        if o1 > o0:
            gathered(w, 0, o0, o1, i0, n, order, weights)
            for c in range(c0, c0 + width):
                _gather(u, c, order, o0, o1, i0, n, scratch[0])
                _gather(g, c, order, o0, o1, i0, n, scratch[1])
                _gather(x, c, order, o0, o1, i0, n, scratch[2])
                _map_run(
                    pointer(scratch[0], 0), pointer(scratch[1], 0), pointer(scratch[2], 0),
                    w, _weights_of(w, 0, 0, True, weights), pointer(scratch[3], 0), pointer(scratch[4], 0),
                    (o1 - o0) * n, _eleven(co, c), flags & ~PAST,
                )  # fmt: skip
                _scatter(scratch[3], r, c, order, o0, o1, i0, n)
                _scatter(scratch[4], z, c, order, o0, o1, i0, n)
        return
    for o in range(o1 - 1, o0 - 1, -1):
        place = index(order, o)
        for c in range(c0, c0 + width):
            _map_run(
                _run_of(u, place, c, i0, scratch[0]), _run_of(g, place, c, i0, scratch[0]),
                _run_of(x, place, c, i0, scratch[0]), w, _weights_of(w, place, i0, False, weights),
                _run_of(r, place, c, i0, scratch[1]), _run_of(z, place, c, i0, scratch[1]), n, _eleven(co, c),
                flags,
            )  # fmt: skip
