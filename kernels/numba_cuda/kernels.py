"""The kernels: sums, what they make of a channel, maps.

Arrays of data come flat, from their lowest address on; `place` = (origin, stride of outer, of channel, of inner, step,
over) says where in them is what, in elements. `cut` = (channels, inner, turn, values, share, pieces, lanes): a block
takes `lanes` channels, and of their O I values, inner running fastest, those of piece k: [k share, (k + 1) share). A
thread stays in its channel; from one value to its next, the inner index grows by `turn` and the address by `step`, or
by `over` where the index passes the end of its axis. So no loop divides, and any strides will do.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numba import float64

from .blocks import (
    block_comoments,
    block_moments,
    gradient,
    merge_comoments,
    merge_moments,
    normalize,
    two_sum,
)
from .plan import VALUES
from .target import cuda

# Elements: float32, float64 and float16 as they are, bfloat16 as int16 bits. An index without a sign spares Numba's
# test for negative ones.


@cuda.jit(device=True)
def load_single(x, at):  # type: ignore[no-untyped-def]
    return np.float32(x[np.uint64(at)])


@cuda.jit(device=True)
def save_single(y, at, value):  # type: ignore[no-untyped-def]
    y[np.uint64(at)] = np.float32(value)


@cuda.jit(device=True)
def load_double(x, at):  # type: ignore[no-untyped-def]
    return x[np.uint64(at)]


@cuda.jit(device=True)
def save_double(y, at, value):  # type: ignore[no-untyped-def]
    y[np.uint64(at)] = value


@cuda.jit(device=True)
def save_half(y, at, value):  # type: ignore[no-untyped-def]
    y[np.uint64(at)] = np.float16(value)


@cuda.jit(device=True)
def load_bfloat(x, at):  # type: ignore[no-untyped-def]
    return np.int32(np.int32(x[np.uint64(at)]) << 16).view(np.float32)


@cuda.jit(device=True)
def save_bfloat(y, at, value):  # type: ignore[no-untyped-def]
    """Rounds to the nearest, ties to even: a carry out of the lower half moves the upper one."""
    bits = np.int64(np.float32(value).view(np.int32))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    y[np.uint64(at)] = np.int16(bits if value == value else 0x7FC0)


@cuda.jit(device=True)
def first_value(block, cut):  # type: ignore[no-untyped-def]
    """Channel and piece of this thread; its first value: number, outer, inner; the piece's end; rows of the block."""
    channels, inner, _, values, share, pieces, lanes = cut
    t = cuda.threadIdx.x
    tile = block // pieces
    piece = block - tile * pieces
    row = t // lanes
    j = piece * share + row
    o = j // inner
    c = tile * lanes + (t - row * lanes)
    end = (piece + 1) * share
    if end > values:  # Numba's own CUDA target has no `min`
        end = values
    if c >= channels:
        end = 0
    return c, piece, j, o, j - o * inner, end, cuda.blockDim.x // lanes


@cuda.jit(device=True)
def where(place, o, c, i):  # type: ignore[no-untyped-def]
    return place[0] + o * place[1] + c * place[2] + i * place[3]


@cuda.jit(device=True)
def turned(i, cut):  # type: ignore[no-untyped-def]
    """The inner index of the thread's next value, and whether it passed the end."""
    i += cut[2]
    over = i >= cut[1]
    return i - cut[1] if over else i, over


@cuda.jit(device=True)
def stride(place, over):  # type: ignore[no-untyped-def]
    return place[5] if over else place[4]


@cuda.jit(device=True)
def in_range(a):  # type: ignore[no-untyped-def]
    """Whether float32 may scale by it; NaN: no."""
    return a == 0.0 or 1e-30 < abs(a) < 1e30


class Kernels(NamedTuple):
    forward_sums: Any
    forward_map: Any
    backward_sums: Any
    backward_map: Any


@functools.cache
def kernels_of(name: str) -> Kernels:
    """The kernels for elements of a dtype. `real` is what they are computed in, but for sums and C numbers."""
    real: Any = np.float64 if name == "float64" else np.float32
    load = {"float64": load_double, "int16": load_bfloat}.get(name, load_single)
    save = {"float64": save_double, "float16": save_half, "int16": save_bfloat}.get(name, save_single)
    small, large, eighth = real(1e-30), real(1e30), real(0.125)

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
    def forward_sums(x, place, cut, part):  # type: ignore[no-untyped-def]
        """x flat -> part (4, pieces, C): count, mean as hi and lo, M2."""
        c, piece, j, o, i, end, rows = first_value(cuda.blockIdx.x, cut)
        at = where(place, o, c, i)
        v = cuda.local.array(VALUES, real)
        n = pivot = s = q = 0.0
        while j + (VALUES - 1) * rows < end:
            for e in range(VALUES):
                v[e] = load(x, at)
                i, over = turned(i, cut)
                at += stride(place, over)
            near, t, r = deviations(v)
            if n == 0.0:
                pivot = near
            d = near - pivot
            n += VALUES
            s += t + VALUES * d
            q += r + d * (2.0 * t + VALUES * d)
            j += VALUES * rows
        while j < end:
            value = float64(load(x, at))
            if n == 0.0:
                pivot = value
            d = value - pivot
            n += 1.0
            s += d
            q += d * d
            i, over = turned(i, cut)
            at += stride(place, over)
            j += rows
        hi = lo = m2 = 0.0
        if n > 0.0:
            hi, lo = two_sum(pivot, s / n)
            m2 = q - s * (s / n)
            if m2 < 0.0:  # by rounding; NaN stays
                m2 = 0.0
        n, hi, lo, m2 = block_moments(n, hi, lo, m2, cut[6])
        if cuda.threadIdx.x < cut[6] and c < cut[0]:
            part[0, piece, c], part[1, piece, c], part[2, piece, c], part[3, piece, c] = n, hi, lo, m2

    @cuda.jit
    def forward_map(x, place, y, target, cut, table, centred):  # type: ignore[no-untyped-def]
        """y flat = gamma invstd ((x - hi) - lo) + beta by table (6, C); hi, lo and beta count as 0 unless `centred`."""
        # From the end: what was read last for the sums is likeliest to be in the L2 cache.
        c, _, j, o, i, end, rows = first_value(cuda.gridDim.x - 1 - cuda.blockIdx.x, cut)
        if j >= end:
            return
        hi = lo = beta = 0.0
        scale = table[4, c] * table[3, c]
        if centred:
            hi, lo, beta = table[0, c], table[1, c], table[5, c]
        narrow = in_range(scale) and abs(hi) < 1e30 and abs(beta) < 1e30
        h, a, b = real(hi), real(scale), real(beta)
        rest = real((hi - float64(h)) + lo)
        at, to = where(place, o, c, i), where(target, o, c, i)
        v = cuda.local.array(VALUES, real)
        tos = cuda.local.array(VALUES, np.int64)
        while j + (VALUES - 1) * rows < end:
            for e in range(VALUES):
                v[e], tos[e] = load(x, at), to
                i, over = turned(i, cut)
                at += stride(place, over)
                to += stride(target, over)
            if narrow:
                for e in range(VALUES):
                    save(y, tos[e], normalize(v[e], h, rest, a, b))
            else:
                for e in range(VALUES):
                    save(y, tos[e], real(normalize(float64(v[e]), hi, lo, scale, beta)))
            j += VALUES * rows
        while j < end:
            save(y, to, real(normalize(float64(load(x, at)), hi, lo, scale, beta)))
            i, over = turned(i, cut)
            at += stride(place, over)
            to += stride(target, over)
            j += rows

    @cuda.jit
    def backward_sums(dy, origin, x, place, cut, table, part):  # type: ignore[no-untyped-def]
        """dy, x flat -> part (5, pieces, C): count, mean dy as hi and lo, mean of x - table[0], co-moment."""
        c, piece, j, o, i, end, rows = first_value(cuda.blockIdx.x, cut)
        hi = 0.0
        if c < cut[0]:
            hi = table[0, c]
        h = real(hi)
        at, of = where(place, o, c, i), where(origin, o, c, i)
        g = cuda.local.array(VALUES, real)
        d = cuda.local.array(VALUES, real)
        n = pivot = s = t = p = 0.0
        while j + (VALUES - 1) * rows < end:
            for e in range(VALUES):
                g[e], d[e] = load(dy, of), load(x, at) - h
                i, over = turned(i, cut)
                at += stride(place, over)
                of += stride(origin, over)
            near, u, w, r = codeviations(g, d)
            if n == 0.0:
                pivot = near
            move = near - pivot
            n += VALUES
            s += u + VALUES * move
            t += w
            p += r + move * w
            j += VALUES * rows
        while j < end:
            value, w = float64(load(dy, of)), float64(load(x, at)) - float64(h)
            if n == 0.0:
                pivot = value
            n += 1.0
            s += value - pivot
            t += w
            p += (value - pivot) * w
            i, over = turned(i, cut)
            at += stride(place, over)
            of += stride(origin, over)
            j += rows
        ghi = glo = mean_x = co = 0.0
        if n > 0.0:
            ghi, glo = two_sum(pivot, s / n)
            mean_x, co = t / n + (float64(h) - hi), p - s * (t / n)
        n, ghi, glo, mean_x, co = block_comoments(n, ghi, glo, mean_x, co, cut[6])
        if cuda.threadIdx.x < cut[6] and c < cut[0]:
            part[0, piece, c], part[1, piece, c], part[2, piece, c] = n, ghi, glo
            part[3, piece, c], part[4, piece, c] = mean_x, co

    @cuda.jit
    def backward_map(dy, origin, x, place, dx, target, cut, table, coefficients):  # type: ignore[no-untyped-def]
        """dx flat = a ((dy - ghi) - glo) + b ((x - hi) - lo); by table (6, C), coefficients (4, C)."""
        c, _, j, o, i, end, rows = first_value(cuda.gridDim.x - 1 - cuda.blockIdx.x, cut)
        if j >= end:
            return
        ghi, glo, a, b = coefficients[0, c], coefficients[1, c], coefficients[2, c], coefficients[3, c]
        hi, lo = table[0, c], table[1, c]
        narrow = in_range(a) and in_range(b) and abs(ghi) < 1e30 and abs(hi) < 1e30
        gh, h, near_a, near_b = real(ghi), real(hi), real(a), real(b)
        grest, rest = real((ghi - float64(gh)) + glo), real((hi - float64(h)) + lo)
        at, of, to = where(place, o, c, i), where(origin, o, c, i), where(target, o, c, i)
        g = cuda.local.array(VALUES, real)
        v = cuda.local.array(VALUES, real)
        tos = cuda.local.array(VALUES, np.int64)
        while j + (VALUES - 1) * rows < end:
            for e in range(VALUES):
                g[e], v[e], tos[e] = load(dy, of), load(x, at), to
                i, over = turned(i, cut)
                at += stride(place, over)
                of += stride(origin, over)
                to += stride(target, over)
            if narrow:
                for e in range(VALUES):
                    save(dx, tos[e], gradient(g[e], v[e], gh, grest, h, rest, near_a, near_b))
            else:
                for e in range(VALUES):
                    save(dx, tos[e], real(gradient(float64(g[e]), float64(v[e]), ghi, glo, hi, lo, a, b)))
            j += VALUES * rows
        while j < end:
            save(dx, to, real(gradient(float64(load(dy, of)), float64(load(x, at)), ghi, glo, hi, lo, a, b)))
            i, over = turned(i, cut)
            at += stride(place, over)
            of += stride(origin, over)
            to += stride(target, over)
            j += rows

    return Kernels(forward_sums, forward_map, backward_sums, backward_map)


# Bits of `given` and of `wanted`.
FROZEN, GAMMA, BETA = 1, 2, 4


@cuda.jit
def forward_finish(part, table, gamma, beta, mean, var, given, eps, lanes):  # type: ignore[no-untyped-def]
    """part (4, pieces, C), or mean and var (C,), -> table (6, C): mean as hi and lo, var, invstd, gamma, beta."""
    t = cuda.threadIdx.x
    row = t // lanes
    c = cuda.blockIdx.x * lanes + (t - row * lanes)
    n = hi = lo = m2 = 0.0
    if c < table.shape[1] and not given & FROZEN:
        for k in range(row, part.shape[1], cuda.blockDim.x // lanes):
            n, hi, lo, m2 = merge_moments(
                n, hi, lo, m2, part[0, k, c], part[1, k, c], part[2, k, c], part[3, k, c]
            )  # fmt: skip
    n, hi, lo, m2 = block_moments(n, hi, lo, m2, lanes)
    if row == 0 and c < table.shape[1]:
        if given & FROZEN:
            hi, lo, variance = float64(mean[c]), 0.0, float64(var[c])
        else:
            hi, lo = two_sum(hi, lo)
            variance = m2 / n
        table[0, c], table[1, c], table[2, c] = hi, lo, variance
        table[3, c] = 1.0 / math.sqrt(variance + eps)
        table[4, c] = float64(gamma[c]) if given & GAMMA else 1.0
        table[5, c] = float64(beta[c]) if given & BETA else 0.0


@cuda.jit
def backward_finish(part, table, dgamma, dbeta, coefficients, wanted, lanes):  # type: ignore[no-untyped-def]
    """part (5, pieces, C) -> dgamma, dbeta (C,), and coefficients (4, C): mean dy as hi and lo, a, b."""
    t = cuda.threadIdx.x
    row = t // lanes
    c = cuda.blockIdx.x * lanes + (t - row * lanes)
    n = hi = lo = mean_x = co = 0.0
    if c < table.shape[1]:
        for k in range(row, part.shape[1], cuda.blockDim.x // lanes):
            n, hi, lo, mean_x, co = merge_comoments(
                n, hi, lo, mean_x, co, part[0, k, c], part[1, k, c], part[2, k, c], part[3, k, c], part[4, k, c]
            )
    n, hi, lo, mean_x, co = block_comoments(n, hi, lo, mean_x, co, lanes)
    if row == 0 and c < table.shape[1]:
        invstd = table[3, c]
        a = table[4, c] * invstd
        coefficients[0, c], coefficients[1, c] = hi, lo
        coefficients[2, c], coefficients[3, c] = a, -a * invstd * invstd * (co / n)
        total = n * hi + n * lo
        if wanted & BETA:
            dbeta[c] = total
        if wanted & GAMMA:
            if wanted & FROZEN:  # the given mean is not x's own
                co += total * (mean_x - table[1, c])
            dgamma[c] = co * invstd


@cuda.jit
def copy_all(source, come, target, go, shape, values):  # type: ignore[no-untyped-def]
    """target flat = source flat; come, go: strides of the axes of `shape` in elements, then the origin."""
    j = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    while j < values:
        left, at, to = j, come[len(shape)], go[len(shape)]
        for k in range(len(shape) - 1, -1, -1):
            rest = left // shape[k]
            at += (left - rest * shape[k]) * come[k]
            to += (left - rest * shape[k]) * go[k]
            left = rest
        target[np.uint64(to)] = source[np.uint64(at)]
        j += cuda.gridDim.x * cuda.blockDim.x
