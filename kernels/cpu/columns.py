"""The columns schedule: the contiguous run is the channels (NHWC, (N, C)).

Rows of C channels are cut into tiles of channels, blocks of rows that stay in cache, and pieces of several
blocks; all borders depend on the shape alone and merging is in order, as in the rows schedule.

A work item is a tile with every stage asked for, and a piece of a tile with one stage asked for.
"""

import math

import numpy as np
from numba import njit, prange

from .blocks import MAPS, SUMS, merge_comoments, merge_moments, not_negative, settle
from .compile import Kernel
from .numbers import keep_whole, narrow, run, widen
from .rows import FINISH, MAP, SUM


@njit(error_model="numpy")
def _row(a, r, c0, width, scratch):  # type: ignore[no-untyped-def]
    """Channels c0 to c0 + width of row r of a (O, C, I): in place if contiguous, else copied to scratch."""
    o = r // a.shape[2]
    i = r - o * a.shape[2]
    if a.strides[1] == a.itemsize:
        return run(a, o, c0, i, width)
    for j in range(width):
        scratch[j] = a[o, c0 + j, i]
    return scratch[:width]


@njit(error_model="numpy")
def _store_row(values, a, r, c0, width):  # type: ignore[no-untyped-def]
    o = r // a.shape[2]
    i = r - o * a.shape[2]
    for j in range(width):
        a[o, c0 + j, i] = values[j]


# The loops over rows stand inside these functions: called once a row, the map took 1.7 times as long at C = 64.


@njit(fastmath=SUMS, error_model="numpy")
def _add(a, r0, r1, c0, total, scratch):  # type: ignore[no-untyped-def]
    keep_whole()
    for r in range(r0, r1):
        row = _row(a, r, c0, total.size, scratch)
        for j in range(total.size):
            total[j] += widen(row[j])


@njit(fastmath=SUMS, error_model="numpy")
def _add_deviations(x, r0, r1, c0, pivot, s, q, scratch):  # type: ignore[no-untyped-def]
    keep_whole()
    for r in range(r0, r1):
        row = _row(x, r, c0, pivot.size, scratch)
        for j in range(pivot.size):
            d = float(widen(row[j])) - pivot[j]
            s[j] += d
            q[j] += d * d


@njit(fastmath=SUMS, error_model="numpy")
def _add_products(dy, x, r0, r1, c0, pivot, hi, s, t, p, scratch):  # type: ignore[no-untyped-def]
    keep_whole()
    for r in range(r0, r1):
        row_dy = _row(dy, r, c0, pivot.size, scratch[0])
        row_x = _row(x, r, c0, pivot.size, scratch[1])
        for j in range(pivot.size):
            g = float(widen(row_dy[j])) - pivot[j]
            d = float(widen(row_x[j])) - hi[j]
            s[j] += g
            t[j] += d
            p[j] += g * d


@njit(error_model="numpy", inline="always")
def _pivots(a, r0, r1, c0, pivot, total, scratch):  # type: ignore[no-untyped-def]
    """pivot (W,) float64 <- about the mean of rows r0 to r1 of a tile, added up in the type of total (W,)."""
    total[:] = 0
    _add(a, r0, r1, c0, total, scratch)
    for j in range(total.size):
        pivot[j] = narrow(total[j] / (r1 - r0), total[j])
        if not math.isfinite(pivot[j]):  # float32 sums overflow near 3e38; the other channels keep their bits
            wide = 0.0
            for r in range(r0, r1):
                wide += widen(a[r // a.shape[2], c0 + j, r % a.shape[2]])
            pivot[j] = wide / (r1 - r0)


@njit(error_model="numpy")
def _merge_columns(n, hi, lo, m2, nb, hib, lob, m2b):  # type: ignore[no-untyped-def]
    """`merge_moments` of whole rows of channels; hi, lo and m2 are updated."""
    keep_whole()
    for j in range(hi.size):
        _, hi[j], lo[j], m2[j] = merge_moments(n, hi[j], lo[j], m2[j], nb, hib[j], lob[j], m2b[j])


@njit(error_model="numpy")
def _merge_columns_co(n, hi, lo, t, m, nb, hib, lob, tb, mb):  # type: ignore[no-untyped-def]
    """`merge_comoments` of whole rows of channels; hi, lo, t and m are updated."""
    keep_whole()
    for j in range(hi.size):
        _, hi[j], lo[j], t[j], m[j] = merge_comoments(n, hi[j], lo[j], t[j], m[j], nb, hib[j], lob[j], tb[j], mb[j])


@njit(error_model="numpy", inline="always")
def _forward_sum(tile, p, x, part, plan):  # type: ignore[no-untyped-def]
    c0 = tile * plan[0]
    width = min(plan[0], x.shape[1] - c0)
    height, rows = plan[1], x.shape[0] * x.shape[2]
    scratch = np.empty(width, x.dtype)
    total = np.full(width, widen(x.dtype.type(0)))
    pivot, s, q = np.empty(width), np.empty(width), np.empty(width)
    part[p, :, c0 : c0 + width] = 0.0
    hi, lo, m2 = part[p, 1, c0 : c0 + width], part[p, 2, c0 : c0 + width], part[p, 3, c0 : c0 + width]
    n = 0.0
    for k in range(p * plan[3], min((p + 1) * plan[3], plan[2])):
        r0, r1 = k * height, min((k + 1) * height, rows)
        _pivots(x, r0, r1, c0, pivot, total, scratch)
        s[:] = 0.0
        q[:] = 0.0
        _add_deviations(x, r0, r1, c0, pivot, s, q, scratch)
        for j in range(width):
            q[j] = not_negative(q[j] - s[j] * s[j] / (r1 - r0))
            s[j] /= r1 - r0
        _merge_columns(n, hi, lo, m2, float(r1 - r0), pivot, s, q)
        n += float(r1 - r0)
    part[p, 0, c0 : c0 + width] = n


@njit(error_model="numpy", inline="always")
def _forward_finish(tile, stats, part, eps, plan):  # type: ignore[no-untyped-def]
    """part (P, 4, C): count, hi, lo, M2; no pieces (P = 0) keep the mean and variance that stats holds."""
    c0 = tile * plan[0]
    c1 = min(c0 + plan[0], stats.shape[1])
    if part.shape[0] > 0:
        n = part[0, 0, c0]
        hi, lo, m2 = part[0, 1, c0:c1].copy(), part[0, 2, c0:c1].copy(), part[0, 3, c0:c1].copy()
        for p in range(1, part.shape[0]):
            _merge_columns(n, hi, lo, m2, part[p, 0, c0], part[p, 1, c0:c1], part[p, 2, c0:c1], part[p, 3, c0:c1])
            n += part[p, 0, c0]
        for c in range(c0, c1):
            stats[0, c], stats[1, c] = settle(hi[c - c0], lo[c - c0])
            stats[2, c] = m2[c - c0] / n
    for c in range(c0, c1):
        stats[3, c] = 1.0 / math.sqrt(stats[2, c] + eps)


@njit(fastmath=MAPS, error_model="numpy")
def _normalize(x, y, r0, r1, c0, hi, lo, scale, beta, scratch):  # type: ignore[no-untyped-def]
    keep_whole()
    like = y.dtype.type(0)
    direct = y.strides[1] == y.itemsize
    for r in range(r1 - 1, r0 - 1, -1):  # what was read last is in cache
        source = _row(x, r, c0, hi.size, scratch[0])
        target = _row(y, r, c0, hi.size, scratch[1]) if direct else scratch[1]
        for j in range(hi.size):
            target[j] = narrow(((widen(source[j]) - hi[j]) - lo[j]) * scale[j] + beta[j], like)
        if not direct:
            _store_row(target, y, r, c0, hi.size)


@njit(error_model="numpy", inline="always")
def _forward_map(tile, p, x, y, stats, affine, plan):  # type: ignore[no-untyped-def]
    c0 = tile * plan[0]
    c1 = min(c0 + plan[0], x.shape[1])
    first, last = p * plan[3] * plan[1], min((p + 1) * plan[3] * plan[1], x.shape[0] * x.shape[2])
    scale = affine[0, c0:c1] * stats[3, c0:c1]
    scratch = np.empty((2, c1 - c0), x.dtype)
    _normalize(x, y, first, last, c0, stats[0, c0:c1], stats[1, c0:c1], scale, affine[1, c0:c1], scratch)


@njit(error_model="numpy")
def _forward_item(k, x, y, stats, affine, eps, part, plan, stage):  # type: ignore[no-untyped-def]
    pieces = (plan[2] + plan[3] - 1) // plan[3]
    c, first, last = (k, 0, pieces) if stage & FINISH else (k // pieces, k % pieces, k % pieces + 1)
    if stage & SUM:
        for p in range(first, last):
            _forward_sum(c, p, x, part, plan)
    if stage & FINISH:
        _forward_finish(c, stats, part, eps, plan)
    if stage & MAP:
        for p in range(last - 1, first - 1, -1):  # what was read last is in cache
            _forward_map(c, p, x, y, stats, affine, plan)


@Kernel
def columns_forward(items, x, y, stats, affine, eps, part, plan, stage):  # type: ignore[no-untyped-def]
    """x, y (O, C, I), stats (4, C), affine (2, C), part (P, 4, C); y is not touched without the MAP stage."""
    for k in prange(items):
        _forward_item(np.int64(k), x, y, stats, affine, eps, part, plan, stage)


@njit(error_model="numpy", inline="always")
def _backward_sum(tile, p, dy, x, stats, part, plan):  # type: ignore[no-untyped-def]
    c0 = tile * plan[0]
    width = min(plan[0], x.shape[1] - c0)
    height, rows = plan[1], x.shape[0] * x.shape[2]
    scratch = np.empty((2, width), x.dtype)
    total = np.full(width, widen(x.dtype.type(0)))
    pivot, s, d, q = np.empty(width), np.empty(width), np.empty(width), np.empty(width)
    part[p, :, c0 : c0 + width] = 0.0
    hi, lo = part[p, 1, c0 : c0 + width], part[p, 2, c0 : c0 + width]
    t, m = part[p, 3, c0 : c0 + width], part[p, 4, c0 : c0 + width]
    n = 0.0
    for k in range(p * plan[3], min((p + 1) * plan[3], plan[2])):
        r0, r1 = k * height, min((k + 1) * height, rows)
        _pivots(dy, r0, r1, c0, pivot, total, scratch[0])
        s[:] = 0.0
        d[:] = 0.0
        q[:] = 0.0
        _add_products(dy, x, r0, r1, c0, pivot, stats[0, c0 : c0 + width], s, d, q, scratch)
        for j in range(width):
            q[j] -= s[j] * d[j] / (r1 - r0)
            s[j] /= r1 - r0
            d[j] /= r1 - r0
        _merge_columns_co(n, hi, lo, t, m, float(r1 - r0), pivot, s, d, q)
        n += float(r1 - r0)
    part[p, 0, c0 : c0 + width] = n


@njit(error_model="numpy", inline="always")
def _backward_finish(tile, grads, part, plan):  # type: ignore[no-untyped-def]
    """part (P, 5, C): count, mean of dy as hi and lo, mean of x - hi, co-moment."""
    c0 = tile * plan[0]
    c1 = min(c0 + plan[0], grads.shape[1])
    n = part[0, 0, c0]
    hi, lo = part[0, 1, c0:c1].copy(), part[0, 2, c0:c1].copy()
    t, m = part[0, 3, c0:c1].copy(), part[0, 4, c0:c1].copy()
    for p in range(1, part.shape[0]):
        hib, lob, tb, mb = part[p, 1, c0:c1], part[p, 2, c0:c1], part[p, 3, c0:c1], part[p, 4, c0:c1]
        _merge_columns_co(n, hi, lo, t, m, part[p, 0, c0], hib, lob, tb, mb)
        n += part[p, 0, c0]
    for c in range(c0, c1):
        grads[0, c], grads[1, c] = settle(hi[c - c0], lo[c - c0])
        grads[2, c] = m[c - c0] / n
        grads[3, c] = t[c - c0]


@njit(fastmath=MAPS, error_model="numpy")
def _gradient(dy, x, dx, r0, r1, c0, ghi, glo, hi, lo, a, b, scratch):  # type: ignore[no-untyped-def]
    keep_whole()
    like = dx.dtype.type(0)
    direct = dx.strides[1] == dx.itemsize
    for r in range(r1 - 1, r0 - 1, -1):
        row_dy = _row(dy, r, c0, hi.size, scratch[0])
        row_x = _row(x, r, c0, hi.size, scratch[1])
        target = _row(dx, r, c0, hi.size, scratch[2]) if direct else scratch[2]
        for j in range(hi.size):
            centred = (widen(row_dy[j]) - ghi[j]) - glo[j]
            target[j] = narrow(centred * a[j] + ((widen(row_x[j]) - hi[j]) - lo[j]) * b[j], like)
        if not direct:
            _store_row(target, dx, r, c0, hi.size)


@njit(error_model="numpy", inline="always")
def _backward_map(tile, p, dy, x, dx, stats, affine, grads, plan):  # type: ignore[no-untyped-def]
    c0 = tile * plan[0]
    c1 = min(c0 + plan[0], x.shape[1])
    first, last = p * plan[3] * plan[1], min((p + 1) * plan[3] * plan[1], x.shape[0] * x.shape[2])
    invstd = stats[3, c0:c1]
    a = affine[0, c0:c1] * invstd
    b = -a * (grads[2, c0:c1] * invstd) * invstd
    scratch = np.empty((3, c1 - c0), x.dtype)
    hi, lo, ghi, glo = stats[0, c0:c1], stats[1, c0:c1], grads[0, c0:c1], grads[1, c0:c1]
    _gradient(dy, x, dx, first, last, c0, ghi, glo, hi, lo, a, b, scratch)


@njit(error_model="numpy")
def _backward_item(k, dy, x, dx, stats, affine, grads, part, plan, stage):  # type: ignore[no-untyped-def]
    pieces = (plan[2] + plan[3] - 1) // plan[3]
    c, first, last = (k, 0, pieces) if stage & FINISH else (k // pieces, k % pieces, k % pieces + 1)
    if stage & SUM:
        for p in range(first, last):
            _backward_sum(c, p, dy, x, stats, part, plan)
    if stage & FINISH:
        _backward_finish(c, grads, part, plan)
    if stage & MAP:
        for p in range(last - 1, first - 1, -1):  # what was read last is in cache
            _backward_map(c, p, dy, x, dx, stats, affine, grads, plan)


@Kernel
def columns_backward(items, dy, x, dx, stats, affine, grads, part, plan, stage):  # type: ignore[no-untyped-def]
    """dy, x, dx (O, C, I), stats (4, C), affine (2, C), grads (4, C), part (P, 5, C)."""
    for k in prange(items):
        _backward_item(np.int64(k), dy, x, dx, stats, affine, grads, part, plan, stage)
