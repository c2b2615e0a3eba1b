"""The two kernels: sums, then what they make of a channel, then the map, tile by tile.

An array is cut into tiles of channels, a tile into pieces, a piece into blocks. All borders depend on the shape alone
and all merging is in order, so one thread or many give the same bits. What a block is, `rows` and `columns` know.

With the FINISH stage, a work item is a span of tiles that go through all stages one after the other: a tile is mapped
while its data is still in cache, and meanwhile the next one is fetched, so that memory reads and writes at once.
Without it, an item is a piece of a tile: that is how few tiles feed many threads.

**Sums** of float32 and half data are taken in float32 lanes around a pivot, the mean of the piece's first block: small
deviations, whatever the mean. Where that block wasn't like the rest (the pivot is more than one standard deviation
off), where squares leave 1e-30 to 1e30, or where something isn't finite, the piece's channel is summed again in float64
with a pivot of its own for every block. Float64 data and channels of few values (nothing averages the last additions
out) go that way at once.
"""

import math

import numpy as np
from numba import njit, prange

from .blocks import merge_comoments, merge_moments, not_negative, settle
from .columns import (
    columns_count,
    columns_deviations,
    columns_gradient,
    columns_normalize,
    columns_products,
    spread_columns,
)
from .compile import Kernel
from .lanes import LANES, fence, narrowest
from .rows import EXACT, GATHER, rows_count, rows_deviations, rows_gradient, rows_normalize, rows_products

SUM, FINISH, MAP = 1, 2, 4

# A plan: 0 by columns?, 1 channels of a tile, 2 blocks, 3 blocks of a piece; then of rows: 4 runs of a block,
# 5 segments of a run, 6 elements of a segment; of columns: 4 rows of a block, 5 period, 6 fold; 7 flags.


@njit(error_model="numpy", inline="always")
def _scratch(x, plan):  # type: ignore[no-untyped-def]
    size = plan[4] * plan[6] if plan[0] == 0 and plan[7] & GATHER else 1
    return np.empty((3, size), x.dtype)


@njit(error_model="numpy", inline="always")
def _columns(count, channels, plan, like):  # type: ignore[no-untyped-def]
    """(count, W + 16): a vector may be loaded from any column on."""
    width = channels * plan[5] * plan[6] + LANES if plan[0] else 1
    return np.full((count, width), like)


@njit(error_model="numpy", inline="always")
def _count(k, shape, plan):  # type: ignore[no-untyped-def]
    return float(columns_count(k, shape, plan) if plan[0] else rows_count(k, shape, plan))


@njit(error_model="numpy", inline="always")
def _deviations(x, k, c0, pivot, s, plan, scratch, near, sums):  # type: ignore[no-untyped-def]
    """s (2, G) += sums of x - pivot and of its square, for the channels from c0 on."""
    if plan[0]:
        columns_deviations(x, k, c0, pivot, s[0], s[1], plan, near, sums)
    else:
        rows_deviations(x, k, c0, pivot, s[0], s[1], plan, scratch)


@njit(error_model="numpy", inline="always")
def _block_mean(x, k, c0, pivot, s, plan, scratch, near, sums):  # type: ignore[no-untyped-def]
    """pivot (G,) <- the means of block k, about: in the type of pivot. s (2, G) or more <- 0."""
    pivot[:] = 0
    s[:] = 0.0
    _deviations(x, k, c0, pivot, s, plan, scratch, near, sums)
    count = _count(k, x.shape, plan)
    for c in range(pivot.size):
        pivot[c] = s[0, c] / count
    s[:] = 0.0


@njit(error_model="numpy")
def _near_enough(s, q, n):  # type: ignore[no-untyped-def]
    """That the pivot of s and q is at most a standard deviation off, and that no square was too small or large."""
    return (q - s * s / n >= 0.5 * q and 1e-30 * n < q < 1e30 * n) or (q == 0.0 and s == 0.0)


@njit(error_model="numpy", inline="always")
def _forward_sum(t, p, x, part, plan, like):  # type: ignore[no-untyped-def]
    """part (P, 4, C) of piece p of tile t: count, hi, lo, M2."""
    c0 = t * plan[1]
    g = min(plan[1], x.shape[1] - c0)
    k0, k1 = p * plan[3], min((p + 1) * plan[3], plan[2])
    scratch, sums = _scratch(x, plan), _columns(4, g, plan, 0.0)
    s = np.empty((2, g))
    again = plan[7] & EXACT != 0
    if not again:
        near, pivot = _columns(1, g, plan, like), np.full(g, like)
        _block_mean(x, k0, c0, pivot, s, plan, scratch, near, sums)
        n = 0.0
        for k in range(k0, k1):
            _deviations(x, k, c0, pivot, s, plan, scratch, near, sums)
            n += _count(k, x.shape, plan)
        for c in range(g):
            part[p, 0, c0 + c] = 0.0
            if _near_enough(s[0, c], s[1, c], n):
                part[p, 0, c0 + c], part[p, 1, c0 + c] = n, pivot[c]
                part[p, 2, c0 + c], part[p, 3, c0 + c] = s[0, c] / n, s[1, c] - s[0, c] * s[0, c] / n
            again |= part[p, 0, c0 + c] == 0.0
    if again:
        near64, pivot64, merged = _columns(1, g, plan, 0.0), np.empty(g), np.zeros((3, g))
        n = 0.0
        for k in range(k0, k1):
            _block_mean(x, k, c0, pivot64, s, plan, scratch, near64, sums)
            _deviations(x, k, c0, pivot64, s, plan, scratch, near64, sums)
            m = _count(k, x.shape, plan)
            for c in range(g):
                m2 = not_negative(s[1, c] - s[0, c] * s[0, c] / m)
                _, merged[0, c], merged[1, c], merged[2, c] = merge_moments(
                    n, merged[0, c], merged[1, c], merged[2, c], m, pivot64[c], s[0, c] / m, m2
                )
            n += m
        for c in range(g):
            if plan[7] & EXACT or part[p, 0, c0 + c] == 0.0:
                part[p, 0, c0 + c] = n
                part[p, 1:, c0 + c] = merged[:, c]


@njit(error_model="numpy", inline="always")
def _forward_finish(c, stats, part, eps):  # type: ignore[no-untyped-def]
    """No pieces (P = 0) keep the mean and the variance that stats holds."""
    n = hi = lo = m2 = 0.0
    for p in range(part.shape[0]):
        n, hi, lo, m2 = merge_moments(n, hi, lo, m2, part[p, 0, c], part[p, 1, c], part[p, 2, c], part[p, 3, c])
    if part.shape[0] > 0:
        stats[0, c], stats[1, c] = settle(hi, lo)
        stats[2, c] = m2 / n
    stats[3, c] = 1.0 / math.sqrt(stats[2, c] + eps)


@njit(error_model="numpy")
def _single(hi, lo, invstd, a, beta, numbers):  # type: ignore[no-untyped-def]
    """numbers (6,) <- h, a, al, b, bl for y = (a d + b) + (al d + bl), d = x - h, in float32; and 1 if they won't do.

    A mean within 1000 standard deviations goes to b: d = x is exact then, and so is x - h with h near x otherwise.
    a is rounded towards 0: an infinite x then makes two infinite terms of one sign.
    """
    numbers[0] = 0.0 if abs(hi * invstd) <= 1024.0 else hi
    b = beta - a * ((hi - numbers[0]) + lo)
    numbers[1] = a
    if abs(numbers[1]) > abs(a):
        numbers[1] = numbers[1] * (1.0 - 2.0**-24)
    numbers[2] = a - numbers[1]
    if numbers[2] == 0.0:
        numbers[2] = a * 2.0**-44
    numbers[3] = b
    numbers[4] = b - numbers[3]
    numbers[5] = not ((1e-30 < abs(a) < 1e30 or a == 0.0) and abs(b) < 1e30)


@njit(error_model="numpy", inline="always")
def _forward_coefficients(c0, stats, affine, doubles, singles, exact):  # type: ignore[no-untyped-def]
    """By channel: doubles (4, G) hi, lo, a, beta; singles (6, G) as in `_single`. Returns whether one won't do."""
    rare = False
    for c in range(doubles.shape[1]):
        hi, lo, invstd, beta = stats[0, c0 + c], stats[1, c0 + c], stats[3, c0 + c], affine[1, c0 + c]
        a = affine[0, c0 + c] * invstd
        doubles[0, c], doubles[1, c], doubles[2, c], doubles[3, c] = hi, lo, a, beta
        _single(hi, lo, invstd, a, beta, singles[:, c])
        if exact:
            singles[5, c] = 1
        rare |= singles[5, c] != 0
    return rare


@njit(error_model="numpy", inline="always")
def _forward_map(t, p0, p1, ahead, x, y, stats, affine, plan, like):  # type: ignore[no-untyped-def]
    """Pieces p0 to p1 of tile t, backwards; the blocks of tile `ahead`, if >= 0, are fetched forwards."""
    c0 = t * plan[1]
    g = min(plan[1], x.shape[1] - c0)
    doubles, singles = np.empty((4, g)), np.full((6, g), like)
    rare = _forward_coefficients(c0, stats, affine, doubles, singles, plan[7] & EXACT != 0)
    scratch = _scratch(x, plan)
    wide_doubles, wide_singles = _columns(4, g, plan, 0.0), _columns(6, g, plan, like)
    if plan[0]:
        spread_columns(doubles, wide_doubles, plan)
        spread_columns(singles, wide_singles, plan)
    for k in range(min(p1 * plan[3], plan[2]) - 1, p0 * plan[3] - 1, -1):
        if plan[0]:
            columns_normalize(x, y, k, c0, wide_doubles, wide_singles, rare, plan)
        else:
            rows_normalize(x, y, k, plan[2] - 1 - k, c0, ahead * plan[1], doubles, singles, plan, scratch)
    fence()


@njit(error_model="numpy", inline="always")
def _forward_item(k, items, x, y, stats, affine, eps, part, plan, stage):  # type: ignore[no-untyped-def]
    like = narrowest(x)
    pieces = (plan[2] + plan[3] - 1) // plan[3]
    tiles = (x.shape[1] + plan[1] - 1) // plan[1]
    if stage & FINISH:
        first, last, p0, p1 = tiles * k // items, tiles * (k + 1) // items, 0, pieces
    else:
        first, last, p0, p1 = k // pieces, k // pieces + 1, k % pieces, k % pieces + 1
    for t in range(first, last):
        if stage & SUM:
            for p in range(p0, p1):
                _forward_sum(t, p, x, part, plan, like)
        if stage & FINISH:
            for c in range(t * plan[1], min((t + 1) * plan[1], x.shape[1])):
                _forward_finish(c, stats, part, eps)
        if stage & MAP:
            ahead = t + 1 if t + 1 < last and stage & SUM else -1
            _forward_map(t, p0, p1, ahead, x, y, stats, affine, plan, like)


@Kernel
def forward_kernel(items, x, y, stats, affine, eps, part, plan, stage):  # type: ignore[no-untyped-def]
    """x, y (O, C, I), stats (4, C), affine (2, C), part (P, 4, C); y is not touched without the MAP stage."""
    for k in prange(items):
        _forward_item(np.int64(k), items, x, y, stats, affine, eps, part, plan, stage)


@njit(error_model="numpy", inline="always")
def _products(dy, x, k, c0, pivot, hi, s, plan, scratch, near, sums):  # type: ignore[no-untyped-def]
    """s (4, G) += sums of g = dy - pivot, d = x - hi, g d and g^2."""
    if plan[0]:
        columns_products(dy, x, k, c0, pivot, hi, s, plan, near, sums)
    else:
        rows_products(dy, x, k, c0, pivot, hi, s, plan, scratch)


@njit(error_model="numpy", inline="always")
def _backward_sum(t, p, dy, x, stats, part, plan, like):  # type: ignore[no-untyped-def]
    """part (P, 5, C) of piece p of tile t: count, mean of dy as hi and lo, mean of x - hi, co-moment."""
    c0 = t * plan[1]
    g = min(plan[1], x.shape[1] - c0)
    k0, k1 = p * plan[3], min((p + 1) * plan[3], plan[2])
    scratch, sums = _scratch(x, plan), _columns(4, g, plan, 0.0)
    s = np.empty((4, g))
    again = plan[7] & EXACT != 0
    if not again:
        near, pivot, hi = _columns(2, g, plan, like), np.full(g, like), np.full(g, like)
        hi[:] = stats[0, c0 : c0 + g]
        _block_mean(dy, k0, c0, pivot, s, plan, scratch, near, sums)
        n = 0.0
        for k in range(k0, k1):
            _products(dy, x, k, c0, pivot, hi, s, plan, scratch, near, sums)
            n += _count(k, x.shape, plan)
        for c in range(g):
            part[p, 0, c0 + c] = 0.0
            var, off = stats[2, c0 + c], s[1, c] / n
            if _near_enough(s[0, c], s[3, c], n) and 1e-30 < var < 1e30 and off * off <= var:
                part[p, 0, c0 + c], part[p, 1, c0 + c], part[p, 2, c0 + c] = n, pivot[c], s[0, c] / n
                part[p, 3, c0 + c] = off - (stats[0, c0 + c] - hi[c])
                part[p, 4, c0 + c] = s[2, c] - s[0, c] * off
            again |= part[p, 0, c0 + c] == 0.0
    if again:
        near64, pivot64, hi64 = _columns(2, g, plan, 0.0), np.empty(g), stats[0, c0 : c0 + g].copy()
        merged = np.zeros((4, g))
        n = 0.0
        for k in range(k0, k1):
            _block_mean(dy, k, c0, pivot64, s, plan, scratch, near64, sums)
            _products(dy, x, k, c0, pivot64, hi64, s, plan, scratch, near64, sums)
            m = _count(k, x.shape, plan)
            for c in range(g):
                e, d, p64 = s[0, c] / m, s[1, c] / m, s[2, c] - s[0, c] * s[1, c] / m
                _, merged[0, c], merged[1, c], merged[2, c], merged[3, c] = merge_comoments(
                    n, merged[0, c], merged[1, c], merged[2, c], merged[3, c], m, pivot64[c], e, d, p64
                )
            n += m
        for c in range(g):
            if plan[7] & EXACT or part[p, 0, c0 + c] == 0.0:
                part[p, 0, c0 + c] = n
                part[p, 1:, c0 + c] = merged[:, c]


@njit(error_model="numpy", inline="always")
def _backward_finish(c, grads, part):  # type: ignore[no-untyped-def]
    n = hi = lo = t = m = 0.0
    for p in range(part.shape[0]):
        n, hi, lo, t, m = merge_comoments(
            n, hi, lo, t, m, part[p, 0, c], part[p, 1, c], part[p, 2, c], part[p, 3, c], part[p, 4, c]
        )
    grads[0, c], grads[1, c] = settle(hi, lo)
    grads[2, c] = m / n
    grads[3, c] = t


@njit(error_model="numpy", inline="always")
def _backward_map(t, p0, p1, ahead, dy, x, dx, stats, affine, grads, plan):  # type: ignore[no-untyped-def]
    c0 = t * plan[1]
    g = min(plan[1], x.shape[1] - c0)
    doubles = np.empty((6, g))
    for c in range(g):
        doubles[0, c], doubles[1, c] = grads[0, c0 + c], grads[1, c0 + c]
        doubles[2, c], doubles[3, c] = stats[0, c0 + c], stats[1, c0 + c]
        invstd = stats[3, c0 + c]
        a = affine[0, c0 + c] * invstd
        doubles[4, c], doubles[5, c] = a, -a * (grads[2, c0 + c] * invstd) * invstd
    scratch = _scratch(x, plan)
    wide_doubles = _columns(6, g, plan, 0.0)
    if plan[0]:
        spread_columns(doubles, wide_doubles, plan)
    for k in range(min(p1 * plan[3], plan[2]) - 1, p0 * plan[3] - 1, -1):
        if plan[0]:
            columns_gradient(dy, x, dx, k, c0, wide_doubles, plan)
        else:
            rows_gradient(dy, x, dx, k, plan[2] - 1 - k, c0, ahead * plan[1], doubles, plan, scratch)
    fence()


@njit(error_model="numpy", inline="always")
def _backward_item(k, items, dy, x, dx, stats, affine, grads, part, plan, stage):  # type: ignore[no-untyped-def]
    like = narrowest(x)
    pieces = (plan[2] + plan[3] - 1) // plan[3]
    tiles = (x.shape[1] + plan[1] - 1) // plan[1]
    if stage & FINISH:
        first, last, p0, p1 = tiles * k // items, tiles * (k + 1) // items, 0, pieces
    else:
        first, last, p0, p1 = k // pieces, k // pieces + 1, k % pieces, k % pieces + 1
    for t in range(first, last):
        if stage & SUM:
            for p in range(p0, p1):
                _backward_sum(t, p, dy, x, stats, part, plan, like)
        if stage & FINISH:
            for c in range(t * plan[1], min((t + 1) * plan[1], x.shape[1])):
                _backward_finish(c, grads, part)
        if stage & MAP:
            ahead = t + 1 if t + 1 < last and stage & SUM else -1
            _backward_map(t, p0, p1, ahead, dy, x, dx, stats, affine, grads, plan)


@Kernel
def backward_kernel(items, dy, x, dx, stats, affine, grads, part, plan, stage):  # type: ignore[no-untyped-def]
    """dy, x, dx (O, C, I), stats (4, C), affine (2, C), grads (4, C), part (P, 5, C)."""
    for k in prange(items):
        _backward_item(np.int64(k), items, dy, x, dx, stats, affine, grads, part, plan, stage)
