"""The reference: textbook batch normalization in float64 NumPy, on arrays of any shape. It judges the kernels.

It shares no code with them. The mean is taken twice (the mean of x, then that of what is left), which is all
that float64 needs to be right at any offset; `tests/test_reference.py` holds it against mpmath.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def average(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Mean over `axes`, kept as 1. NumPy adds pairwise along the last axis alone; elsewhere 4000 values cost 20 eps."""
    kept = [a for a in range(x.ndim) if a not in axes]
    last = np.ascontiguousarray(x.transpose(*kept, *axes)).reshape(*(x.shape[a] for a in kept), -1)
    return np.expand_dims(last.mean(-1), axes)


def centred(x: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x - mean over `axes`, and the mean as hi and lo; float64, with the reduced axes kept as 1."""
    x = x.astype(np.float64)
    with np.errstate(all="ignore"):  # Inf - Inf is NaN, and meant to be
        hi = average(x, axes)
        rest = x - hi
        lo = average(rest, axes)
        return rest - lo, hi, lo


def normalize(d: np.ndarray, var: np.ndarray, gamma: np.ndarray, beta: np.ndarray, eps: float) -> np.ndarray:
    """gamma d / sqrt(var + eps) + beta."""
    with np.errstate(all="ignore"):
        return np.asarray(gamma / np.sqrt(var + eps) * d + beta)


def gradient(
    dy: np.ndarray, d: np.ndarray, var: np.ndarray, gamma: np.ndarray, eps: float, axes: tuple[int, ...]
) -> np.ndarray:
    """dx of training: gamma / std (dy - mean(dy) - xhat mean(dy xhat)), with xhat = d / std."""
    with np.errstate(all="ignore"):
        std = np.sqrt(var + eps)
        g, _, _ = centred(dy, axes)
        xhat = d / std
        return np.asarray(gamma / std * (g - xhat * average(g * xhat, axes)))


# The contract of `fastbn.kernels`, on (O, C, I) views.


def element_view(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """NumPy computes with every element as it is."""
    return dtype if dtype in (np.float16, np.float32, np.float64) or dtype.name == "bfloat16" else None


def forward(
    x: np.ndarray, y: np.ndarray | None, stats: np.ndarray, affine: np.ndarray, eps: float, frozen: bool
) -> None:
    if frozen:
        d = (x.astype(np.float64) - stats[0, :, None]) - stats[1, :, None]
    else:
        d, hi, lo = centred(x, (0, 2))
        stats[0], stats[1] = hi[0, :, 0], lo[0, :, 0]
        with np.errstate(all="ignore"):
            stats[2] = average(d * d, (0, 2))[0, :, 0]
    with np.errstate(all="ignore"):
        stats[3] = 1.0 / np.sqrt(stats[2] + eps)
        if y is not None:
            y[...] = normalize(d, stats[2, :, None], affine[0, :, None], affine[1, :, None], eps)


def backward(
    dy: np.ndarray, x: np.ndarray, dx: np.ndarray | None, stats: np.ndarray, affine: np.ndarray, grads: np.ndarray
) -> None:
    g, hi, lo = centred(dy, (0, 2))
    with np.errstate(all="ignore"):
        d = (x.astype(np.float64) - stats[0, :, None]) - stats[1, :, None]
        grads[0], grads[1] = hi[0, :, 0], lo[0, :, 0]
        grads[2] = average(g * d, (0, 2))[0, :, 0]
        grads[3] = average(d, (0, 2))[0, :, 0] + stats[1]
        if dx is not None:
            xhat = d * stats[3, :, None]
            slope = grads[2, :, None] * stats[3, :, None]
            dx[...] = affine[0, :, None] * stats[3, :, None] * (g - xhat * slope)
