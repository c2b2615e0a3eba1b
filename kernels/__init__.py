"""The kernels, one module per kind of array, and the contract that all of them keep.

A kernel sees three-dimensional views (O, C, I): outer, channels, inner, with any strides. It does all that is
proportional to the data, and the arithmetic on C numbers that goes with it; what is asked of it, and on which
arrays, is in `fastbn/batchnorm.py`. A backend has two functions:

``forward(x, y, table, given, eps)``
    x (O, C, I) read; y (O, C, I) written, or None; table (6, C) float64 written: mean as an unevaluated pair hi + lo,
    biased variance, invstd, gamma, beta. given = (gamma, beta, mean, var), each None or a contiguous (C,) array of
    float32 or float64; gamma None is 1, and beta None is 0. With mean and var (both or none) the statistics are these,
    hi = mean and lo = 0; else they are computed from x. Then

    ``invstd = 1 / sqrt(var + eps)``, ``y = gamma invstd ((x - hi) - lo) + beta``.

``backward(dy, x, dx, table, dgamma, dbeta, frozen)``
    dy, x (O, C, I) and table (6, C) read; dx (O, C, I) written, or None; dgamma, dbeta (C,) written, or None,
    contiguous, of float64 for float64 x and else of float32. Where x doesn't count (dgamma is None, and dx too unless
    `frozen`), it may be dy. With sums and means over the O I values of a channel,

    ``dbeta = sum dy``, ``dgamma = invstd sum dy ((x - hi) - lo)``,
    ``dx = a (dy - mean dy) + b ((x - hi) - lo)``, ``a = gamma invstd``, ``b = -a invstd^2 cov(dy, x)``;
    `frozen`, statistics are constants: ``dx = a dy``.

Both formulas are those of Ioffe & Szegedy (2015), algorithm 1 and section 3, with dy centred before it is
scaled: a constant dy then gives dx = 0 exactly, at any offset. y may be x, and dx may be dy or x; otherwise
outputs overlap nothing. O, C and I are at least 1; the stride of an axis of size 1 means nothing. All arrays are of
one kind and on one device. float16 comes as uint16 bits and bfloat16 as int16 bits where `element_view` says so. The
same arguments give the same bits, whatever the number of threads.

**In your own kernels.** The CPU backend's building blocks are plain `@njit` functions on contiguous runs, for
use in other `@njit` code (fused pipelines, other reductions):

>>> import numpy as np
>>> from numba import njit
>>> from fastbn.kernels.cpu import block_moments, block_normalize, merge_moments
>>> @njit
... def standardize(rows, out):
...     n = hi = lo = m2 = 0.0
...     for r in range(rows.shape[0]):
...         n, hi, lo, m2 = merge_moments(n, hi, lo, m2, float(rows.shape[1]), *block_moments(rows[r]))
...     for r in range(rows.shape[0]):
...         block_normalize(rows[r], out[r], hi, lo, 1.0 / (m2 / n) ** 0.5, 0.0)
>>> data = np.float32(1e6) + np.arange(8, dtype=np.float32).reshape(2, 4)
>>> out = np.empty_like(data)
>>> standardize(data, out)
>>> [round(float(v), 3) for v in out.reshape(-1)]
[-1.528, -1.091, -0.655, -0.218, 0.218, 0.655, 1.091, 1.528]
"""
