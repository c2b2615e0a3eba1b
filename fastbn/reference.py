"""The same functions as textbook NumPy in float64: slow, plain, and what the kernels are judged by.

Results are float64 whatever x is, so that a float32 result can be held against one that was not rounded.
`forward`, `backward`, `infer` and `moments` are as in `fastbn`, with no `out`, on arrays of any strides; they
share neither the view nor the kernels with `fastbn.forward`.

>>> import numpy as np, fastbn
>>> x = np.random.default_rng(0).normal(1e5, 1, (4, 3, 8)).astype(np.float32)
>>> y, _ = fastbn.forward(x)
>>> exact, _ = fastbn.reference.forward(x)
>>> bool(np.abs(y - exact).max() < 2.4e-7)
True
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .arguments import Axis, check_array, check_axis, check_channels, check_eps, check_frozen
from .kernels.reference import average, centred, gradient, normalize
from .moments import Moments


class Saved(NamedTuple):
    """Of the reference's `forward`, for its `backward`."""

    d: np.ndarray
    var: np.ndarray
    gamma: np.ndarray
    eps: float
    axes: tuple[int, ...]
    moments: Moments | None


def forward(
    x: np.ndarray, gamma: Any = None, beta: Any = None, *, axis: Axis = 1, eps: float = 1e-5, frozen: Any = None
) -> tuple[np.ndarray, Saved]:
    """y in float64, and what `backward` needs."""
    where = "fastbn.reference.forward"
    axes, reduced, channels = _axes(where, x, axis)
    eps = check_eps(where, eps)
    wide = tuple(x.shape[a] if a in axes else 1 for a in range(x.ndim))
    one = np.ones(wide) if gamma is None else check_channels(where, "gamma", gamma, channels).reshape(wide)
    zero = np.zeros(wide) if beta is None else check_channels(where, "beta", beta, channels).reshape(wide)
    found = None
    if x.size == 0:
        d, var = np.zeros(x.shape), np.zeros(wide)
        found = Moments(0, np.zeros(channels), np.zeros(channels), np.float64)
    elif frozen is None:
        d, hi, lo = centred(x, reduced)
        with np.errstate(all="ignore"):
            var = average(d * d, reduced)
        count = x.size // math.prod(channels)
        found = Moments(count, (hi + lo).reshape(channels), count * var.reshape(channels), np.float64)
    else:
        mean, var = (f.reshape(wide).astype(np.float64) for f in check_frozen(where, frozen, channels))
        d = x.astype(np.float64) - mean
    moments = None if frozen is not None else found
    return normalize(d, var, one, zero, eps), Saved(d, var, one, eps, reduced, moments)


def backward(dy: np.ndarray, saved: Saved) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx, dgamma, dbeta in float64."""
    dy = check_array("fastbn.reference.backward", "dy", dy).astype(np.float64)
    channels = tuple(n for a, n in enumerate(dy.shape) if a not in saved.axes)
    with np.errstate(all="ignore"):
        std = np.sqrt(saved.var + saved.eps)
        dgamma = (dy * (saved.d / std)).sum(saved.axes).reshape(channels)
        dbeta = dy.sum(saved.axes).reshape(channels)
        if saved.moments is None:
            return saved.gamma / std * dy, dgamma, dbeta
        if dy.size == 0:
            return dy, dgamma, dbeta
        return gradient(dy, saved.d, saved.var, saved.gamma, saved.eps, saved.axes), dgamma, dbeta


def infer(
    x: np.ndarray, mean: Any, var: Any, gamma: Any = None, beta: Any = None, *, axis: Axis = 1, eps: float = 1e-5
) -> np.ndarray:
    """y in float64, by given statistics."""
    return forward(x, gamma, beta, axis=axis, eps=eps, frozen=(mean, var))[0]


def moments(x: np.ndarray, *, axis: Axis = 1) -> Moments:
    """Count, mean and M2 in float64."""
    found = forward(x, axis=axis)[1].moments
    assert found is not None
    return found


def _axes(where: str, x: np.ndarray, axis: Axis) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    check_array(where, "x", x)
    axes = check_axis(where, x, axis)
    return axes, tuple(a for a in range(x.ndim) if a not in axes), tuple(x.shape[a] for a in axes)
