"""The kernels, one module per kind of array, and the contract that all of them keep.

A kernel sees three-dimensional views (O, C, I): outer, channels, inner, with any strides. It knows sums and
maps; what batch normalization makes of them is in `fastbn/batchnorm.py`. A backend has two functions:

``forward(x, y, stats, affine, eps, frozen)``
    x (O, C, I) read; y (O, C, I) written, or None; stats (4, C) float64: mean as an unevaluated pair hi + lo,
    biased variance, 1 / sqrt(variance + eps); affine (2, C) float64: gamma, beta. Unless `frozen`, the mean and
    the variance are computed from x; frozen, they are those that stats holds. Then

    ``stats[3] = 1 / sqrt(stats[2] + eps)``, ``y = gamma stats[3] ((x - hi) - lo) + beta``.

``backward(dy, x, dx, stats, affine, grads)``
    dy, x (O, C, I) read; dx (O, C, I) written, or None; grads (4, C) float64 written: the mean of dy as a pair
    hi + lo; the covariance ``v = sum (dy - mean dy) (x - mean x) / n``, equal to sum dy (x - mean x) / n; and
    the mean of x - stats[0], which frozen statistics leave large. Then

    ``dx = a ((dy - ghi) - glo) + b ((x - hi) - lo)``, ``a = gamma stats[3]``, ``b = -a stats[3]^2 v``.

Both formulas are those of Ioffe & Szegedy (2015), algorithm 1 and section 3, with dy centred before it is
scaled: a constant dy then gives dx = 0 exactly, at any offset. y may be x, and dx may be dy or x; otherwise
outputs overlap nothing. O, C and I are at least 1. float16 comes as uint16 bits and bfloat16 as int16 bits
where `element_view` says so. The same arguments give the same bits, whatever the number of threads.

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
