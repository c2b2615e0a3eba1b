"""The rows schedule: contiguous runs inside one channel (NCHW, (C, N), a single channel).

A channel's values are cut into blocks, blocks are gathered in pieces, and pieces merge into the channel.
All borders depend on the shape alone and all merging is in order, so one thread or many give the same bits.
A block is a piece of one run, or several short runs; what is not contiguous is gathered in a scratch block.

A driver runs over work items. With every stage asked for, an item is a channel, whose map follows its sums
while x is still in cache. With one stage asked for, an item is a piece: that is how few channels feed many
threads.

The stages are inlined before they are compiled: every level of calls between compiled functions has LLVM optimize
all below it once more (7.7 s against 6.0 for the largest kernel, cold).
"""

import math

import numpy as np
from numba import njit, prange

from .blocks import (
    block_comoments,
    block_gradient,
    block_moments,
    block_normalize,
    merge_comoments,
    merge_moments,
    settle,
)
from .compile import Kernel
from .numbers import run

SUM, FINISH, MAP = 1, 2, 4


@njit(error_model="numpy")
def _borders(k, shape, plan):  # type: ignore[no-untyped-def]
    """Block k of a channel: runs o0 to o1, and in each of them n elements from i0 on."""
    runs, segments, length = plan[0], plan[1], plan[2]
    o = (k // segments) * runs
    i = (k % segments) * length
    return o, min(o + runs, shape[0]), i, min(length, shape[2] - i)


@njit(error_model="numpy")
def _contiguous(a, c, o0, o1, i0, n, scratch):  # type: ignore[no-untyped-def]
    """The block of a (O, C, I) as one contiguous run: in place where it is one, else copied to scratch."""
    if a.strides[2] == a.itemsize and o1 - o0 == 1:
        return run(a, o0, c, i0, n)
    k = 0
    for o in range(o0, o1):
        if a.strides[2] == a.itemsize:
            source = run(a, o, c, i0, n)
            for i in range(n):
                scratch[k + i] = source[i]
        else:
            for i in range(n):
                scratch[k + i] = a[o, c, i0 + i]
        k += n
    return scratch[:k]


@njit(error_model="numpy")
def _scatter(values, a, c, o0, o1, i0, n):  # type: ignore[no-untyped-def]
    k = 0
    for o in range(o0, o1):
        for i in range(n):
            a[o, c, i0 + i] = values[k + i]
        k += n


@njit(error_model="numpy", inline="always")
def _forward_sum(c, p, x, part, plan):  # type: ignore[no-untyped-def]
    n = hi = lo = m2 = 0.0
    scratch = np.empty(plan[0] * plan[2], x.dtype)
    for k in range(p * plan[4], min((p + 1) * plan[4], plan[3])):
        o0, o1, i0, length = _borders(k, x.shape, plan)
        block = _contiguous(x, c, o0, o1, i0, length, scratch)
        hib, lob, m2b = block_moments(block)
        n, hi, lo, m2 = merge_moments(n, hi, lo, m2, float(block.size), hib, lob, m2b)
    part[p, 0, c], part[p, 1, c], part[p, 2, c], part[p, 3, c] = n, hi, lo, m2


@njit(error_model="numpy", inline="always")
def _forward_finish(c, stats, part, eps):  # type: ignore[no-untyped-def]
    """part (P, 4, C): count, hi, lo, M2; no pieces (P = 0) keep the mean and variance that stats holds."""
    n = hi = lo = m2 = 0.0
    for p in range(part.shape[0]):
        n, hi, lo, m2 = merge_moments(n, hi, lo, m2, part[p, 0, c], part[p, 1, c], part[p, 2, c], part[p, 3, c])
    if part.shape[0] > 0:
        stats[0, c], stats[1, c] = settle(hi, lo)
        stats[2, c] = m2 / n
    stats[3, c] = 1.0 / math.sqrt(stats[2, c] + eps)


@njit(error_model="numpy", inline="always")
def _forward_map(c, p, x, y, stats, affine, plan):  # type: ignore[no-untyped-def]
    hi, lo, scale, beta = stats[0, c], stats[1, c], affine[0, c] * stats[3, c], affine[1, c]
    direct = y.strides[2] == y.itemsize
    scratch = np.empty(plan[2], x.dtype)
    result = np.empty(0 if direct else plan[2], y.dtype)
    for k in range(min((p + 1) * plan[4], plan[3]) - 1, p * plan[4] - 1, -1):  # what was read last is in cache
        o0, o1, i0, n = _borders(k, x.shape, plan)
        for o in range(o0, o1):
            source = _contiguous(x, c, o, o + 1, i0, n, scratch)
            if direct:
                block_normalize(source, run(y, o, c, i0, n), hi, lo, scale, beta)
            else:
                block_normalize(source, result[:n], hi, lo, scale, beta)
                _scatter(result, y, c, o, o + 1, i0, n)


@njit(error_model="numpy")
def _forward_item(k, x, y, stats, affine, eps, part, plan, stage):  # type: ignore[no-untyped-def]
    pieces = (plan[3] + plan[4] - 1) // plan[4]
    c, first, last = (k, 0, pieces) if stage & FINISH else (k // pieces, k % pieces, k % pieces + 1)
    if stage & SUM:
        for p in range(first, last):
            _forward_sum(c, p, x, part, plan)
    if stage & FINISH:
        _forward_finish(c, stats, part, eps)
    if stage & MAP:
        for p in range(last - 1, first - 1, -1):  # what was read last is in cache
            _forward_map(c, p, x, y, stats, affine, plan)


@Kernel
def rows_forward(items, x, y, stats, affine, eps, part, plan, stage):  # type: ignore[no-untyped-def]
    """x, y (O, C, I), stats (4, C), affine (2, C), part (P, 4, C); y is not touched without the MAP stage."""
    for k in prange(items):
        _forward_item(np.int64(k), x, y, stats, affine, eps, part, plan, stage)


@njit(error_model="numpy", inline="always")
def _backward_sum(c, p, dy, x, stats, part, plan):  # type: ignore[no-untyped-def]
    n = hi = lo = t = m = 0.0
    scratch_dy = np.empty(plan[0] * plan[2], dy.dtype)
    scratch_x = np.empty(plan[0] * plan[2], x.dtype)
    for k in range(p * plan[4], min((p + 1) * plan[4], plan[3])):
        o0, o1, i0, length = _borders(k, x.shape, plan)
        block_dy = _contiguous(dy, c, o0, o1, i0, length, scratch_dy)
        block_x = _contiguous(x, c, o0, o1, i0, length, scratch_x)
        hib, lob, tb, mb = block_comoments(block_dy, block_x, stats[0, c])
        n, hi, lo, t, m = merge_comoments(n, hi, lo, t, m, float(block_x.size), hib, lob, tb, mb)
    part[p, 0, c], part[p, 1, c], part[p, 2, c], part[p, 3, c], part[p, 4, c] = n, hi, lo, t, m


@njit(error_model="numpy", inline="always")
def _backward_finish(c, grads, part):  # type: ignore[no-untyped-def]
    """part (P, 5, C): count, mean of dy as hi and lo, mean of x - hi, co-moment."""
    n = hi = lo = t = m = 0.0
    for p in range(part.shape[0]):
        n, hi, lo, t, m = merge_comoments(
            n, hi, lo, t, m, part[p, 0, c], part[p, 1, c], part[p, 2, c], part[p, 3, c], part[p, 4, c]
        )
    grads[0, c], grads[1, c] = settle(hi, lo)
    grads[2, c] = m / n
    grads[3, c] = t


@njit(error_model="numpy", inline="always")
def _backward_map(c, p, dy, x, dx, stats, affine, grads, plan):  # type: ignore[no-untyped-def]
    hi, lo, ghi, glo = stats[0, c], stats[1, c], grads[0, c], grads[1, c]
    a = affine[0, c] * stats[3, c]
    b = -a * (grads[2, c] * stats[3, c]) * stats[3, c]
    direct = dx.strides[2] == dx.itemsize
    scratch_dy = np.empty(plan[2], dy.dtype)
    scratch_x = np.empty(plan[2], x.dtype)
    result = np.empty(0 if direct else plan[2], dx.dtype)
    for k in range(min((p + 1) * plan[4], plan[3]) - 1, p * plan[4] - 1, -1):
        o0, o1, i0, n = _borders(k, x.shape, plan)
        for o in range(o0, o1):
            run_dy = _contiguous(dy, c, o, o + 1, i0, n, scratch_dy)
            run_x = _contiguous(x, c, o, o + 1, i0, n, scratch_x)
            if direct:
                block_gradient(run_dy, run_x, run(dx, o, c, i0, n), ghi, glo, hi, lo, a, b)
            else:
                block_gradient(run_dy, run_x, result[:n], ghi, glo, hi, lo, a, b)
                _scatter(result, dx, c, o, o + 1, i0, n)


@njit(error_model="numpy")
def _backward_item(k, dy, x, dx, stats, affine, grads, part, plan, stage):  # type: ignore[no-untyped-def]
    pieces = (plan[3] + plan[4] - 1) // plan[4]
    c, first, last = (k, 0, pieces) if stage & FINISH else (k // pieces, k % pieces, k % pieces + 1)
    if stage & SUM:
        for p in range(first, last):
            _backward_sum(c, p, dy, x, stats, part, plan)
    if stage & FINISH:
        _backward_finish(c, grads, part)
    if stage & MAP:
        for p in range(last - 1, first - 1, -1):  # what was read last is in cache
            _backward_map(c, p, dy, x, dx, stats, affine, grads, plan)


@Kernel
def rows_backward(items, dy, x, dx, stats, affine, grads, part, plan, stage):  # type: ignore[no-untyped-def]
    """dy, x, dx (O, C, I), stats (4, C), affine (2, C), grads (4, C), part (P, 5, C)."""
    for k in prange(items):
        _backward_item(np.int64(k), dy, x, dx, stats, affine, grads, part, plan, stage)
