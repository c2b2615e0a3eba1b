"""The kernels on x: sums and maps. `walk.py` has what `place`, `cut` and `s` mean.

What a call asks for beyond batch norm (`How`) is compiled in: a plain call pays nothing for it. The arrays and numbers
for it are the argument `more`, which is () in a plain call.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numba import float64

from .activations import functions_of, inverse_of
from .blocks import (
    block_comoments,
    block_moments,
    gradient,
    normalize,
    two_sum,
    weighted_gradient,
)
from .elements import access_of, in_range, where_asked
from .plan import VALUES
from .target import cuda
from .walk import FOLLOWED, LISTED, TRACKED, where


class How(NamedTuple):
    """What a call asks for beyond batch norm. Each is compiled on its own."""

    activation: str = ""
    residual: bool = False  # z = gamma invstd (x - mean) + beta + r
    dresidual: bool = False  # backward_map writes g = dy f'(z)
    sets: bool = False  # of outer indices, with statistics of their own
    weights: str = ""  # statistics by weights, and what is done where one is 0: "normalize", "zero" or "keep"
    dx: bool = True  # backward_map writes dx
    constant: bool = False  # statistics are: dx = a g
    inverse: bool = False  # backward has y in place of x, and inverts the activation

    @property
    def tracked(self) -> bool:
        """Whether kernels want to know the outer index."""
        return self.residual or self.dresidual or self.sets or self.weights != ""


PLAIN = How()


class More(NamedTuple):
    """The argument `more`; what isn't asked for is ()."""

    lists: Any = ()  # int64: (G + 1,) where in it a set's outer indices start, then these
    r: Any = ()
    beside: Any = ()  # the place of r
    dr: Any = ()
    behind: Any = ()  # the place of dr
    w: Any = ()
    along: Any = ()  # the place of w
    parameter: float = 0.0  # of the activation


class Kernels(NamedTuple):
    forward_sums: Any
    forward_map: Any
    backward_sums: Any
    backward_map: Any


@functools.cache
def kernels_of(name: str, how: How = PLAIN) -> Kernels:
    """The kernels for elements of a dtype. `real` is what they are computed in, but for sums and C numbers."""
    real: Any = np.float64 if name == "float64" else np.float32
    load, save = access_of(name)
    small, large, eighth, zero, one = (real(k) for k in (1e-30, 1e30, 0.125, 0, 1))
    first_value, start, turned, moved = LISTED if how.sets else TRACKED if how.tracked else FOLLOWED
    f, slope = functions_of(how.activation, real)
    sloped, writes_dx, constant, inverse = how.activation != "", how.dx, how.constant, how.inverse
    meant = inverse_of(how.activation if inverse else "", real)  # what x stands for
    weighted, masked, keeps = how.weights != "", how.weights in ("zero", "keep"), how.weights == "keep"

    parameter = where_asked(sloped, lambda more: real(more.parameter), lambda _: zero)
    place_r = where_asked(
        how.residual, lambda more, row, c, i: where(more.beside, row, c, i), lambda _more, _row, _c, _i: 0
    )
    read_r = where_asked(how.residual, lambda more, at: load(more.r, at), lambda _more, _at: zero)
    plus = where_asked(how.residual, lambda z, r: z + r, lambda z, _: z)
    place_dr = where_asked(
        how.dresidual, lambda more, row, c, i: where(more.behind, row, c, i), lambda _more, _row, _c, _i: 0
    )
    place_w = where_asked(weighted, lambda more, row, c, i: where(more.along, row, c, i), lambda _more, _row, _c, _i: 0)
    read_w = where_asked(weighted, lambda more, at: more.w[np.uint64(at)], lambda _more, _at: one)
    absent = where_asked(masked, lambda w: w == zero, lambda _: False)
    save_dr = where_asked(how.dresidual, lambda more, at, g: save(more.dr, at, g), lambda _more, _at, _g: None)

    @cuda.jit(device=True)
    def numbers_of(table, s, centred):  # type: ignore[no-untyped-def]
        """What `linear` needs of a channel; hi, lo and beta count as 0 unless `centred`."""
        hi = lo = beta = 0.0
        scale = table[4, s] * table[3, s]
        if centred:
            hi, lo, beta = table[0, s], table[1, s], table[5, s]
        narrow = in_range(scale) and abs(hi) < 1e30 and abs(beta) < 1e30
        h = real(hi)
        return narrow, hi, lo, scale, beta, h, real((hi - float64(h)) + lo), real(scale), real(beta)

    # gamma invstd ((x - hi) - lo) + beta. One value as eight, so that backward sees the very sign that forward saw; of
    # eight, the numbers of the channel are looked at once.

    @cuda.jit(device=True)
    def near(x, k):  # type: ignore[no-untyped-def]
        return normalize(x, k[5], k[6], k[7], k[8])

    @cuda.jit(device=True)
    def far(x, k):  # type: ignore[no-untyped-def]
        return real(normalize(float64(x), k[1], k[2], k[3], k[4]))

    @cuda.jit(device=True)
    def linear(v, z, k):  # type: ignore[no-untyped-def]
        if k[0]:
            for e in range(VALUES):
                z[e] = near(v[e], k)
        else:
            for e in range(VALUES):
                z[e] = far(v[e], k)

    @cuda.jit(device=True)
    def linear_single(x, k):  # type: ignore[no-untyped-def]
        return near(x, k) if k[0] else far(x, k)

    @cuda.jit(device=True)
    def by_z(g, v, r, k, p):  # type: ignore[no-untyped-def]
        """g = dy f'(z) in the place of dy, for eight; what is masked is left to `present`."""
        if inverse:
            for e in range(VALUES):
                g[e] *= slope(v[e], p)
        elif sloped:
            z = cuda.local.array(VALUES, real)
            linear(v, z, k)
            for e in range(VALUES):
                g[e] *= slope(plus(z[e], r[e]), p)

    @cuda.jit(device=True)
    def by_z_single(dy, x, r, k, p):  # type: ignore[no-untyped-def]
        if inverse:
            return dy * slope(x, p)
        return dy * slope(plus(linear_single(x, k), r), p) if sloped else dy

    @cuda.jit(device=True)
    def present(value, w):  # type: ignore[no-untyped-def]
        return zero if absent(w) else value

    @cuda.jit(device=True)
    def unless_kept(value, w, kept):  # type: ignore[no-untyped-def]
        """What is written; `kept`, what was read there, where the mask keeps it."""
        return kept if keeps and absent(w) else value

    @cuda.jit(device=True)
    def terms_of(table, coefficients, s):  # type: ignore[no-untyped-def]
        """What the gradient by x needs of a channel. With constant statistics nobody wrote coefficients."""
        ghi = glo = b = 0.0
        a = table[4, s] * table[3, s]
        if not constant:
            ghi, glo, a, b = coefficients[0, s], coefficients[1, s], coefficients[2, s], coefficients[3, s]
        hi, lo = table[0, s], table[1, s]
        narrow = in_range(a) and in_range(b) and abs(ghi) < 1e30 and abs(hi) < 1e30
        gh, h = real(ghi), real(hi)
        grest, rest = real((ghi - float64(gh)) + glo), real((hi - float64(h)) + lo)
        return narrow, ghi, glo, hi, lo, a, b, gh, grest, h, rest, real(a), real(b)

    @cuda.jit(device=True)
    def near_by_x(g, x, w, k):  # type: ignore[no-untyped-def]
        if constant:  # where x is NaN, a g needn't be
            return k[11] * g
        if weighted:
            return weighted_gradient(g, x, w, k[7], k[8], k[9], k[10], k[11], k[12])
        return gradient(g, x, k[7], k[8], k[9], k[10], k[11], k[12])

    @cuda.jit(device=True)
    def far_by_x(g, x, w, k):  # type: ignore[no-untyped-def]
        if constant:
            return real(k[5] * float64(g))
        if weighted:
            return real(weighted_gradient(float64(g), float64(x), float64(w), k[1], k[2], k[3], k[4], k[5], k[6]))
        return real(gradient(float64(g), float64(x), k[1], k[2], k[3], k[4], k[5], k[6]))

    @cuda.jit(device=True)
    def mean(v):  # type: ignore[no-untyped-def]
        """By halves: the mean of equal values is that value."""
        return (((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))) * eighth

    @cuda.jit(device=True)
    def wide_mean(v):  # type: ignore[no-untyped-def]
        low = (float64(v[0]) + float64(v[1])) + (float64(v[2]) + float64(v[3]))
        return (low + ((float64(v[4]) + float64(v[5])) + (float64(v[6]) + float64(v[7])))) * 0.125

    @cuda.jit(device=True)
    def deviations(v):  # type: ignore[no-untyped-def]
        """Of eight values: their mean; the sums of the deviations from it as it is rounded, and of their squares."""
        near = mean(v)
        s = q = real(0.0)
        for e in range(VALUES):
            d = v[e] - near
            s += d
            q += d * d
        if small < q < large:
            return float64(near), float64(s), float64(q)
        pivot = wide_mean(v)  # squares, or the sum of the values, leave float32; or all are equal
        total = squares = 0.0
        for e in range(VALUES):
            w = float64(v[e]) - pivot
            total += w
            squares += w * w
        return pivot, total, squares

    @cuda.jit(device=True)
    def weighted_deviations(v, w):  # type: ignore[no-untyped-def]
        """The same by weights, and the sum of these first. What has none is absent, NaN or not."""
        some = near = s = q = zero
        mass = 0.0
        for e in range(VALUES):
            if w[e] != zero:
                some = v[e]  # about which equal values are their mean, exactly
                mass += float64(w[e])
        if mass == 0.0:
            return mass, 0.0, 0.0, 0.0
        for e in range(VALUES):
            if w[e] != zero:
                near += w[e] * (v[e] - some)
        near = some + near / real(mass)
        for e in range(VALUES):
            if w[e] != zero:
                d = v[e] - near
                s += w[e] * d
                q += w[e] * d * d
        if small < q < large:
            return mass, float64(near), float64(s), float64(q)
        pivot = 0.0
        for e in range(VALUES):
            if w[e] != zero:
                pivot += float64(w[e]) * (float64(v[e]) - float64(some))
        pivot = float64(some) + pivot / mass
        total = squares = 0.0
        for e in range(VALUES):
            if w[e] != zero:
                u = float64(v[e]) - pivot
                total += float64(w[e]) * u
                squares += float64(w[e]) * u * u
        return mass, pivot, total, squares

    @cuda.jit(device=True)
    def plain_deviations(v, _w):  # type: ignore[no-untyped-def]
        pivot, total, squares = deviations(v)
        return float64(VALUES), pivot, total, squares

    deviations_of = weighted_deviations if weighted else plain_deviations

    @cuda.jit(device=True)
    def codeviations(g, d):  # type: ignore[no-untyped-def]
        """Of eight pairs: the mean of g; the sums of the deviations u from it, of d, and of u d."""
        near = mean(g)
        s = t = p = real(0.0)
        for e in range(VALUES):
            u = g[e] - near
            s += u
            t += d[e]
            p += u * d[e]
        if small < abs(p) < large:
            return float64(near), float64(s), float64(t), float64(p)
        pivot = wide_mean(g)
        total = total_d = products = 0.0
        for e in range(VALUES):
            w = float64(g[e]) - pivot
            total += w
            total_d += float64(d[e])
            products += w * float64(d[e])
        return pivot, total, total_d, products

    @cuda.jit
    def forward_sums(x, place, cut, part, more):  # type: ignore[no-untyped-def]
        """x flat -> part (4, pieces, G C): count, or sum of weights, mean as hi and lo, M2."""
        c, s, piece, j, o, i, row, end, rows = first_value(cuda.blockIdx.x, cut, more)
        at = start(place, o, row, c, i)
        v = cuda.local.array(VALUES, real)
        w = cuda.local.array(VALUES, real)
        n = pivot = total = q = 0.0
        while j + (VALUES - 1) * rows < end:
            for e in range(VALUES):
                v[e], w[e] = load(x, at), read_w(more, place_w(more, row, c, i))
                o, i, row = turned(o, i, cut, more)
                at = moved(at, place, row, c, i)
            m, mean_x, t, r = deviations_of(v, w)
            if n == 0.0:
                pivot = mean_x
            d = mean_x - pivot
            n += m
            total += t + m * d
            q += r + d * (2.0 * t + m * d)
            j += VALUES * rows
        while j < end:
            value, m = float64(load(x, at)), float64(read_w(more, place_w(more, row, c, i)))
            if m != 0.0:
                if n == 0.0:
                    pivot = value
                d = value - pivot
                n += m
                total += m * d
                q += m * d * d
            o, i, row = turned(o, i, cut, more)
            at = moved(at, place, row, c, i)
            j += rows
        hi = lo = m2 = 0.0
        if n > 0.0:
            hi, lo = two_sum(pivot, total / n)
            m2 = q - total * (total / n)
            if m2 < 0.0:  # by rounding; NaN stays
                m2 = 0.0
        n, hi, lo, m2 = block_moments(n, hi, lo, m2, cut[6])
        if cuda.threadIdx.x < cut[6] and c < cut[0]:
            part[0, piece, s], part[1, piece, s], part[2, piece, s], part[3, piece, s] = n, hi, lo, m2

    @cuda.jit
    def forward_map(x, place, y, target, cut, table, centred, more):  # type: ignore[no-untyped-def]
        """y flat = f(gamma invstd ((x - hi) - lo) + beta + r) by table (6, G C); `numbers_of` has `centred`."""
        # From the end: what was read last for the sums is likeliest to be in the L2 cache.
        c, s, _, j, o, i, row, end, rows = first_value(cuda.gridDim.x - 1 - cuda.blockIdx.x, cut, more)
        if j >= end:
            return
        k, p = numbers_of(table, s, centred), parameter(more)
        at, to = start(place, o, row, c, i), start(target, o, row, c, i)
        v = cuda.local.array(VALUES, real)
        z = cuda.local.array(VALUES, real)
        r = cuda.local.array(VALUES, real)
        w = cuda.local.array(VALUES, real)
        tos = cuda.local.array(VALUES, np.int64)
        while j + (VALUES - 1) * rows < end:
            for e in range(VALUES):
                v[e], r[e], tos[e] = load(x, at), read_r(more, place_r(more, row, c, i)), to
                w[e] = read_w(more, place_w(more, row, c, i))
                o, i, row = turned(o, i, cut, more)
                at, to = moved(at, place, row, c, i), moved(to, target, row, c, i)
            linear(v, z, k)
            for e in range(VALUES):
                save(y, tos[e], unless_kept(present(f(plus(z[e], r[e]), p), w[e]), w[e], v[e]))
            j += VALUES * rows
        while j < end:
            value, weight = load(x, at), read_w(more, place_w(more, row, c, i))
            u = f(plus(linear_single(value, k), read_r(more, place_r(more, row, c, i))), p)
            save(y, to, unless_kept(present(u, weight), weight, value))
            o, i, row = turned(o, i, cut, more)
            at, to = moved(at, place, row, c, i), moved(to, target, row, c, i)
            j += rows

    @cuda.jit
    def backward_sums(dy, origin, x, place, cut, table, part, more):  # type: ignore[no-untyped-def]
        """dy, x flat -> part (5, pieces, G C): count, mean g as hi and lo, mean of x - table[0], co-moment."""
        c, s, piece, j, o, i, row, end, rows = first_value(cuda.blockIdx.x, cut, more)
        k, p = numbers_of(table, s, True), parameter(more)
        hi, h = k[1], k[5]
        at, of = start(place, o, row, c, i), start(origin, o, row, c, i)
        g = cuda.local.array(VALUES, real)
        d = cuda.local.array(VALUES, real)
        r = cuda.local.array(VALUES, real)
        w = cuda.local.array(VALUES, real)
        n = pivot = total = total_d = products = 0.0
        while j + (VALUES - 1) * rows < end:
            for e in range(VALUES):
                g[e], d[e], r[e] = load(dy, of), meant(load(x, at), p), read_r(more, place_r(more, row, c, i))
                w[e] = read_w(more, place_w(more, row, c, i))
                o, i, row = turned(o, i, cut, more)
                at, of = moved(at, place, row, c, i), moved(of, origin, row, c, i)
            by_z(g, d, r, k, p)
            for e in range(VALUES):
                g[e], d[e] = present(g[e], w[e]), present(d[e] - h, w[e])
            mean_g, u, t, ut = codeviations(g, d)
            if n == 0.0:
                pivot = mean_g
            move = mean_g - pivot
            n += VALUES
            total += u + VALUES * move
            total_d += t
            products += ut + move * t
            j += VALUES * rows
        while j < end:
            value, beside = meant(load(x, at), p), read_r(more, place_r(more, row, c, i))
            u, t = float64(by_z_single(load(dy, of), value, beside, k, p)), float64(value) - float64(h)
            if absent(read_w(more, place_w(more, row, c, i))):
                u = t = 0.0
            if n == 0.0:
                pivot = u
            n += 1.0
            total += u - pivot
            total_d += t
            products += (u - pivot) * t
            o, i, row = turned(o, i, cut, more)
            at, of = moved(at, place, row, c, i), moved(of, origin, row, c, i)
            j += rows
        ghi = glo = mean_x = co = 0.0
        if n > 0.0:
            ghi, glo = two_sum(pivot, total / n)
            mean_x, co = total_d / n + (float64(h) - hi), products - total * (total_d / n)
        n, ghi, glo, mean_x, co = block_comoments(n, ghi, glo, mean_x, co, cut[6])
        if cuda.threadIdx.x < cut[6] and c < cut[0]:
            part[0, piece, s], part[1, piece, s], part[2, piece, s] = n, ghi, glo
            part[3, piece, s], part[4, piece, s] = mean_x, co

    @cuda.jit
    def backward_map(dy, origin, x, place, dx, target, cut, table, coefficients, more):  # type: ignore[no-untyped-def]
        """dx flat = a ((g - ghi) - glo) + b ((x - hi) - lo), and g, by table (6, G C), coefficients (4, G C).

        By weights, a ((g - w ghi) - w glo) + w (b ((x - hi) - lo)).
        """
        c, s, _, j, o, i, row, end, rows = first_value(cuda.gridDim.x - 1 - cuda.blockIdx.x, cut, more)
        if j >= end:
            return
        k, q, p = numbers_of(table, s, True), terms_of(table, coefficients, s), parameter(more)
        at, of, to = start(place, o, row, c, i), start(origin, o, row, c, i), start(target, o, row, c, i)
        g = cuda.local.array(VALUES, real)
        v = cuda.local.array(VALUES, real)
        r = cuda.local.array(VALUES, real)
        w = cuda.local.array(VALUES, real)
        kept = cuda.local.array(VALUES, real)
        tos = cuda.local.array(VALUES, np.int64)
        drs = cuda.local.array(VALUES, np.int64)
        while j + (VALUES - 1) * rows < end:
            for e in range(VALUES):
                g[e], v[e], r[e] = load(dy, of), meant(load(x, at), p), read_r(more, place_r(more, row, c, i))
                w[e], kept[e] = read_w(more, place_w(more, row, c, i)), g[e]
                tos[e], drs[e] = to, place_dr(more, row, c, i)
                o, i, row = turned(o, i, cut, more)
                at, of = moved(at, place, row, c, i), moved(of, origin, row, c, i)
                to = moved(to, target, row, c, i)
            by_z(g, v, r, k, p)
            for e in range(VALUES):
                g[e] = present(g[e], w[e])
                save_dr(more, drs[e], g[e])
            if writes_dx:
                if q[0]:
                    for e in range(VALUES):
                        save(dx, tos[e], unless_kept(near_by_x(g[e], v[e], w[e], q), w[e], kept[e]))
                else:
                    for e in range(VALUES):
                        save(dx, tos[e], unless_kept(far_by_x(g[e], v[e], w[e], q), w[e], kept[e]))
            j += VALUES * rows
        while j < end:
            value, own = meant(load(x, at), p), load(dy, of)
            weight = read_w(more, place_w(more, row, c, i))
            u = present(by_z_single(own, value, read_r(more, place_r(more, row, c, i)), k, p), weight)
            save_dr(more, place_dr(more, row, c, i), u)
            if writes_dx:
                t = near_by_x(u, value, weight, q) if q[0] else far_by_x(u, value, weight, q)
                save(dx, to, unless_kept(t, weight, own))
            o, i, row = turned(o, i, cut, more)
            at, of = moved(at, place, row, c, i), moved(of, origin, row, c, i)
            to = moved(to, target, row, c, i)
            j += rows

    return Kernels(forward_sums, forward_map, backward_sums, backward_map)
