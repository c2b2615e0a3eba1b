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
    x: np.ndarray,
    y: np.ndarray | None,
    table: np.ndarray,
    given: tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None, np.ndarray | None],
    eps: float,
) -> None:
    gamma, beta, mean, var = given
    table[4] = 1.0 if gamma is None else gamma
    table[5] = 0.0 if beta is None else beta
    with np.errstate(all="ignore"):
        if mean is None:
            d, hi, lo = centred(x, (0, 2))
            table[0], table[1] = hi[0, :, 0], lo[0, :, 0]
            table[2] = average(d * d, (0, 2))[0, :, 0]
        else:
            d = x.astype(np.float64) - mean[:, None]
            table[0], table[1], table[2] = mean, 0.0, var
        table[3] = 1.0 / np.sqrt(table[2] + eps)
        if y is not None:
            y[...] = normalize(d, table[2, :, None], table[4, :, None], table[5, :, None], eps)


def backward(
    dy: np.ndarray,
    x: np.ndarray,
    dx: np.ndarray | None,
    table: np.ndarray,
    dgamma: np.ndarray | None,
    dbeta: np.ndarray | None,
    frozen: bool,
) -> None:
    hi, lo, _, invstd, gamma, _ = table[:, :, None]
    n = x.shape[0] * x.shape[2]
    g, mean, rest = centred(dy, (0, 2))
    with np.errstate(all="ignore"):
        d = (x.astype(np.float64) - hi) - lo
        covariance = average(g * d, (0, 2))
        total = n * mean + n * rest
        if dbeta is not None:
            dbeta[...] = total[0, :, 0]
        if dgamma is not None:  # given statistics are not x's own: the mean of d isn't 0
            off = total * average(d, (0, 2)) if frozen else 0.0
            dgamma[...] = ((n * covariance + off) * invstd)[0, :, 0]
        if dx is not None:
            dx[...] = gamma * invstd * (dy.astype(np.float64) if frozen else g - d * invstd * (covariance * invstd))
