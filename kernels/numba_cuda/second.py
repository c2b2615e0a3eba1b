"""Second order and forward mode: the kernels of `jvp` and `backward_backward` for arrays on a GPU.

The formulas, and their letters, are those of `fastbn.kernels.cpu.second`: one map from (u, g, x) to (r, z), whose
coefficients come from sums of each channel. Three launches: sums, C numbers, map; u, g and x are read twice, r and z
written once.

**Numbers.** All in float64, whatever the elements, in which a thread adds up deviations of u and g from its own first
values that count, so that products stay small at any offset; and of x from its known mean. That a first value is an
outlier costs digits, but no more than the outlier does in what it is a part of. Threads, and then pieces of a channel,
merge by Chan's formula, as means and co-moments of (u, g, d). With weights, those of (u, d) are another set beside
these, by weights, as dL/ds and A are sums over all values that count, each for one.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numba import float64

from .arrays import launch, on, stream_of
from .blocks import block_comoments
from .calls import cube, has_sets, mode_of, planned, weights_of, workspace
from .elements import access_of, where_asked
from .finish import BETA, FROZEN, GAMMA, of_set
from .kernels import PLAIN, How
from .plan import VALUES, Sizes
from .target import cuda
from .triples import (
    COMOMENTS,
    MOMENTS,
    added,
    block_triples,
    merge_triples,
    pair_of,
    triple_in,
    triple_of,
    weighed,
    with_weighted,
)
from .walk import FOLLOWED, LISTED, TRACKED, where

SIZES = Sizes()

COEFFICIENTS = 11
SUMMED, WANTED = 8, 16  # more bits beside GAMMA and BETA, of tangents, and FROZEN: whether there are sums; of ggamma


class There(NamedTuple):
    """Which arrays there are; one that isn't stands for 0, or for a result that nobody wants."""

    u: bool
    g: bool
    x: bool
    r: bool = False
    z: bool = False


def second(
    u: Any, g: Any, x: Any, r: Any, z: Any, table: Any, tangents: tuple[Any, Any], frozen: bool, ggamma: Any,
    more: Any = None,
) -> None:  # fmt: skip
    """As `fastbn.kernels.cpu.second`, with arrays of C numbers as forward's and backward's: tangents p and q, each None
    or (C,) of float32 or float64, and ggamma (G C,) written, or None, of the type that dgamma has."""
    p, q = tangents
    summed = ggamma is not None or not frozen
    flags = GAMMA * (p is not None) | BETA * (q is not None) | FROZEN * frozen | SUMMED * summed
    flags |= WANTED * (ggamma is not None)
    how, w = PLAIN, None
    if more is not None:
        w = weights_of(more, frozen)
        how = How(sets=has_sets(more), weights=mode_of(more, w))
    arrays = u, g, x, r, z
    like = next(a for a in (x, u, g, r, z) if a is not None)
    stream = stream_of(like, *arrays, table, w)
    with on(like):
        cut, walk, (first, *taken, weigh), also = planned((like, *arrays, w), how, more, stream, SIZES)
        taken = [first if a is None else t for a, t in zip(arrays, taken, strict=True)]  # not read, not written
        read, write = sum(taken[:3], ()), sum(taken[3:], ())
        columns, by_weights = table.shape[1], w is not None and not frozen
        depth = MOMENTS + COMOMENTS * by_weights
        work = workspace(like, stream, (depth * cut.pieces + COEFFICIENTS) * columns)
        coefficients = cube(work, 0, (COEFFICIENTS, columns))
        part = cube(work, COEFFICIENTS * columns, (depth, cut.pieces, columns))
        if also:
            also = also._replace(w=weigh[0], along=weigh[1])
        there, kind = There(*(a is not None for a in arrays)), like.dtype.name
        if summed:
            sums = sums_of(kind, how, by_weights, there._replace(r=False, z=False))
            launch(sums, cut.grid, cut.threads, stream, (*read, walk, table, part, also))
        blocks, threads, lanes = cut.finish
        numbers = [work if a is None else a for a in (p, q, ggamma)]
        launch(finish_of(by_weights), blocks, threads, stream, (part, table, *numbers, coefficients, flags, lanes))
        if r is not None or z is not None:
            arguments = (*read, *write, walk, table, coefficients, also)
            launch(map_of(kind, how, frozen, there), cut.grid, cut.threads, stream, arguments)


class _Elements(NamedTuple):
    """How elements of a dtype, and their weights, are read and written; `real` holds either."""

    real: Any
    load: Any
    save: Any
    place_w: Any
    read_w: Any
    absent: Any
    walk: Any


def _elements_of(name: str, how: How) -> _Elements:
    real: Any = np.float64 if name == "float64" else np.float32
    load, save = access_of(name)
    weighted, one = how.weights != "", real(1)
    place_w = where_asked(weighted, lambda more, row, c, i: where(more.along, row, c, i), lambda _more, _row, _c, _i: 0)
    read_w = where_asked(weighted, lambda more, at: more.w[np.uint64(at)], lambda _more, _at: one)
    absent = where_asked(how.weights in ("zero", "keep"), lambda w: w == real(0), lambda _: False)
    walk = LISTED if how.sets else TRACKED if how.tracked else FOLLOWED
    return _Elements(real, load, save, place_w, read_w, absent, walk)


def _loads_of(there: There, load: Any, real: Any) -> tuple[Any, ...]:
    zero = real(0)
    return tuple(where_asked(a, lambda array, at: load(array, at), lambda _array, _at: zero) for a in there[:3])


@functools.cache
def sums_of(name: str, how: How, by_weights: bool, there: There) -> Any:
    real, load, _, place_w, read_w, absent, (first_value, start, turned, moved) = _elements_of(name, how)
    load_u, load_g, load_x = _loads_of(there, load, real)
    less = where_asked(there.x, lambda x, hi: float64(x) - hi, lambda _x, _hi: 0.0)
    also_weighed = where_asked(by_weights, lambda t, u, d, w: weighed(t, u, d, w), lambda t, _u, _d, _w: t)

    @cuda.jit(device=True)
    def write_pairs(v, lanes, writes, piece, s, part):  # type: ignore[no-untyped-def]
        n, uh, ul, d, ud = pair_of(v)
        n, uh, ul, d, ud = block_comoments(n, uh, ul, d, ud, lanes)
        if writes:
            part[9, piece, s], part[10, piece, s], part[11, piece, s] = n, uh, ul
            part[12, piece, s], part[13, piece, s] = d, ud

    also_written = where_asked(
        by_weights,
        lambda v, lanes, writes, piece, s, part: write_pairs(v, lanes, writes, piece, s, part),
        lambda _v, _lanes, _writes, _piece, _s, _part: None,
    )

    @cuda.jit
    def second_sums(u, of_u, g, of_g, x, of_x, cut, table, part, more):  # type: ignore[no-untyped-def]
        """u, g, x flat -> part (9, pieces, G C), or (14, ..): what `merge_triples` has, and `merge_comoments`."""
        c, s, piece, j, o, i, row, end, rows = first_value(cuda.blockIdx.x, cut, more)
        hi = table[0, s]
        at_u, at_g, at_x = start(of_u, o, row, c, i), start(of_g, o, row, c, i), start(of_x, o, row, c, i)
        us = cuda.local.array(VALUES, real)
        gs = cuda.local.array(VALUES, real)
        xs = cuda.local.array(VALUES, real)
        ws = cuda.local.array(VALUES, real)
        t = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        v = (0.0, 0.0, 0.0, 0.0, 0.0)
        while j + (VALUES - 1) * rows < end:
            for e in range(VALUES):
                us[e], gs[e], xs[e] = load_u(u, at_u), load_g(g, at_g), load_x(x, at_x)
                ws[e] = read_w(more, place_w(more, row, c, i))
                o, i, row = turned(o, i, cut, more)
                at_u, at_g = moved(at_u, of_u, row, c, i), moved(at_g, of_g, row, c, i)
                at_x = moved(at_x, of_x, row, c, i)
            for e in range(VALUES):
                d = less(xs[e], hi)
                if not absent(ws[e]):
                    t = added(t, float64(us[e]), float64(gs[e]), d)
                v = also_weighed(v, float64(us[e]), d, float64(ws[e]))
            j += VALUES * rows
        while j < end:
            one, other, d = float64(load_u(u, at_u)), float64(load_g(g, at_g)), less(load_x(x, at_x), hi)
            w = read_w(more, place_w(more, row, c, i))
            if not absent(w):
                t = added(t, one, other, d)
            v = also_weighed(v, one, d, float64(w))
            o, i, row = turned(o, i, cut, more)
            at_u, at_g = moved(at_u, of_u, row, c, i), moved(at_g, of_g, row, c, i)
            at_x = moved(at_x, of_x, row, c, i)
            j += rows
        t = block_triples(triple_of(t), cut[6])
        writes = cuda.threadIdx.x < cut[6] and c < cut[0]
        if writes:
            part[0, piece, s], part[1, piece, s], part[2, piece, s] = t[0], t[1], t[2]
            part[3, piece, s], part[4, piece, s], part[5, piece, s] = t[3], t[4], t[5]
            part[6, piece, s], part[7, piece, s], part[8, piece, s] = t[6], t[7], t[8]
        also_written(v, cut[6], writes, piece, s, part)

    return second_sums


@functools.cache
def finish_of(by_weights: bool) -> Any:
    """What sums make of a channel; without weights, those of (u, d) are among the others."""
    merged = where_asked(by_weights, lambda v, part, k, c: with_weighted(v, part, k, c), lambda v, _part, _k, _c: v)
    whole = where_asked(
        by_weights,
        lambda v, _t, lanes: block_comoments(v[0], v[1], v[2], v[3], v[4], lanes),
        lambda _v, t, _lanes: (t[0], t[1], t[2], t[5], t[6]),
    )

    @cuda.jit
    def second_finish(part, table, p, q, ggamma, co, flags, lanes):  # type: ignore[no-untyped-def]
        """part (9 or 14, pieces, G C), table (6, G C), p and q (C,) -> ggamma (G C,), co (11, G C).

        co: 0 hi, 1 lo of mean u; 2, 3 of sum g / W; 4 mean d; r = a (u - mean) + b d + q: 5 a, 6 b, 7 q;
        z = e (g - w G / W) + w (f (u - mean) + h d): 8 e, 9 f, 10 h.
        """
        row = cuda.threadIdx.x // lanes
        c = cuda.blockIdx.x * lanes + (cuda.threadIdx.x - row * lanes)
        t = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        v = (0.0, 0.0, 0.0, 0.0, 0.0)
        if c < table.shape[1] and flags & SUMMED:
            for k in range(row, part.shape[1], cuda.blockDim.x // lanes):
                t = merge_triples(t, triple_in(part, k, c))
                v = merged(v, part, k, c)
        t = block_triples(t, lanes)
        W, uh, ul, lo, ud = whole(v, t, lanes)
        if row == 0 and c < table.shape[1]:
            n, mean_uh, mean_ul, gh, gl, d, _, gd, gu = t
            s, gamma, tangent, shift = table[3, c], table[4, c], 0.0, 0.0
            if flags & GAMMA:
                tangent = float64(p[of_set(c, p.shape[0])])
            if flags & BETA:
                shift = float64(q[of_set(c, q.shape[0])])
            a, ps = gamma * s, tangent * s
            b = e = ps
            f = h = share = found = 0.0
            if flags & FROZEN:
                found = s * (gu + n * (gh + gl) * (mean_uh + mean_ul))
                uh, ul, lo = 0.0, 0.0, table[1, c]
            elif W > 0.0:  # else s is 0, and y beta
                share = n / W
                total = n * gh + n * gl
                E, D = ud / W, gd + total * (d - lo)
                A, K = gu + total * ((mean_uh - uh) + (mean_ul - ul)), s * s * E
                found = s * (A - D * K)
                b = e = ps - a * K
                f = -a * s * s * D / W
                h = -(s * s * s) * (gamma * A - 3.0 * gamma * D * K + tangent * D) / W
            co[0, c], co[1, c], co[2, c], co[3, c], co[4, c] = uh, ul, share * gh, share * gl, lo
            co[5, c], co[6, c], co[7, c], co[8, c], co[9, c], co[10, c] = a, b, shift, e, f, h
            if flags & WANTED:
                ggamma[c] = found

    return second_finish


@functools.cache
def map_of(name: str, how: How, frozen: bool, there: There) -> Any:
    real, load, save, place_w, read_w, absent, (first_value, start, turned, moved) = _elements_of(name, how)
    load_u, load_g, load_x = _loads_of(there, load, real)
    less = where_asked(there.x, lambda x, hi, lo: (float64(x) - hi) - lo, lambda _x, _hi, _lo: 0.0)
    keeps, zero = how.weights == "keep", real(0)

    @cuda.jit(device=True)
    def tangent(u, x, w, k):  # type: ignore[no-untyped-def]
        """r"""
        if absent(w):
            return u if keeps else zero
        return real(k[6] * ((float64(u) - k[1]) - k[2]) + (k[7] * less(x, k[0], k[5]) + k[8]))

    @cuda.jit(device=True)
    def gradient(u, g, x, w, k):  # type: ignore[no-untyped-def]
        """z; with given statistics u and x don't count, and may be infinite."""
        if absent(w):
            return zero
        if frozen:
            return real(k[9] * float64(g))
        m = float64(w)
        term = k[10] * ((float64(u) - k[1]) - k[2]) + k[11] * less(x, k[0], k[5])
        return real(k[9] * ((float64(g) - m * k[3]) - m * k[4]) + m * term)

    save_r = where_asked(
        there.r,
        lambda r, at, u, x, w, k: save(r, at, tangent(u, x, w, k)),
        lambda _r, _at, _u, _x, _w, _k: None,
    )
    save_z = where_asked(
        there.z,
        lambda z, at, u, g, x, w, k: save(z, at, gradient(u, g, x, w, k)),
        lambda _z, _at, _u, _g, _x, _w, _k: None,
    )

    @cuda.jit
    def second_map(u, of_u, g, of_g, x, of_x, r, of_r, z, of_z, cut, table, co, more):  # type: ignore[no-untyped-def]
        """u, g, x flat -> r, z flat, by table (6, G C) and co (11, G C)."""
        c, s, _, j, o, i, row, end, rows = first_value(cuda.gridDim.x - 1 - cuda.blockIdx.x, cut, more)
        if j >= end:
            return
        k = (
            table[0, s], co[0, s], co[1, s], co[2, s], co[3, s], co[4, s], co[5, s], co[6, s], co[7, s], co[8, s],
            co[9, s], co[10, s],
        )  # fmt: skip
        at_u, at_g, at_x = start(of_u, o, row, c, i), start(of_g, o, row, c, i), start(of_x, o, row, c, i)
        to_r, to_z = start(of_r, o, row, c, i), start(of_z, o, row, c, i)
        us = cuda.local.array(VALUES, real)
        gs = cuda.local.array(VALUES, real)
        xs = cuda.local.array(VALUES, real)
        ws = cuda.local.array(VALUES, real)
        tos_r = cuda.local.array(VALUES, np.int64)
        tos_z = cuda.local.array(VALUES, np.int64)
        while j + (VALUES - 1) * rows < end:
            for e in range(VALUES):
                us[e], gs[e], xs[e] = load_u(u, at_u), load_g(g, at_g), load_x(x, at_x)
                ws[e], tos_r[e], tos_z[e] = read_w(more, place_w(more, row, c, i)), to_r, to_z
                o, i, row = turned(o, i, cut, more)
                at_u, at_g = moved(at_u, of_u, row, c, i), moved(at_g, of_g, row, c, i)
                at_x, to_r = moved(at_x, of_x, row, c, i), moved(to_r, of_r, row, c, i)
                to_z = moved(to_z, of_z, row, c, i)
            for e in range(VALUES):
                save_r(r, tos_r[e], us[e], xs[e], ws[e], k)
                save_z(z, tos_z[e], us[e], gs[e], xs[e], ws[e], k)
            j += VALUES * rows
        while j < end:
            one, other, value = load_u(u, at_u), load_g(g, at_g), load_x(x, at_x)
            w = read_w(more, place_w(more, row, c, i))
            save_r(r, to_r, one, value, w, k)
            save_z(z, to_z, one, other, value, w, k)
            o, i, row = turned(o, i, cut, more)
            at_u, at_g = moved(at_u, of_u, row, c, i), moved(at_g, of_g, row, c, i)
            at_x, to_r = moved(at_x, of_x, row, c, i), moved(to_r, of_r, row, c, i)
            to_z = moved(to_z, of_z, row, c, i)
            j += rows

    return second_map
