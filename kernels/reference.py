"""The reference: textbook batch normalization in float64 NumPy, on arrays of any shape. It judges the kernels.

It shares no code with them. The mean is taken twice (the mean of x, then that of what is left), which is all
that float64 needs to be right at any offset; `tests/test_reference.py` holds it against mpmath.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np


def added(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Sum over `axes`, kept as 1. NumPy adds pairwise along the last axis alone; elsewhere 4000 values cost 20 eps."""
    kept = [a for a in range(x.ndim) if a not in axes]
    size = math.prod(x.shape[a] for a in axes)
    last = np.ascontiguousarray(x.transpose(*kept, *axes)).reshape(*(x.shape[a] for a in kept), size)
    return np.expand_dims(last.sum(-1), axes)


def average(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Mean over `axes`, kept as 1."""
    return added(x, axes) / math.prod(x.shape[a] for a in axes)


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


# Activations f of z, their slopes, and the inverses of those that have one.

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(-np.logaddexp(0.0, -z)))


def activate(name: str, p: float, z: np.ndarray) -> np.ndarray:
    """f(z)."""
    with np.errstate(all="ignore"):
        return np.asarray({
            "": lambda: z,
            "relu": lambda: np.where(z <= 0, 0.0, z),
            "leaky_relu": lambda: np.where(z <= 0, p * z, z),
            "relu6": lambda: np.clip(z, 0.0, 6.0),
            "elu": lambda: np.where(z <= 0, p * np.expm1(np.minimum(z, 0)), z),
            "silu": lambda: z * _sigmoid(z),
            "gelu": lambda: 0.5 * z * (1.0 + _erf(z / math.sqrt(2.0))),
            "sigmoid": lambda: _sigmoid(z),
            "tanh": lambda: np.tanh(z),
            "hardswish": lambda: z * (np.clip(z + 3.0, 0.0, 6.0) / 6.0),
        }[name]())  # fmt: skip


def slope(name: str, p: float, z: np.ndarray) -> np.ndarray:
    """f'(z); at a kink that of the left side."""
    with np.errstate(all="ignore"):
        s = _sigmoid(z)
        return np.asarray({
            "": lambda: np.ones(z.shape),
            "relu": lambda: np.where(z <= 0, 0.0, 1.0),
            "leaky_relu": lambda: np.where(z <= 0, p, 1.0),
            "relu6": lambda: np.where((z <= 0) | (z >= 6), 0.0, 1.0),
            "elu": lambda: np.where(z <= 0, p * np.exp(np.minimum(z, 0)), 1.0),
            "silu": lambda: s + z * s * _sigmoid(-z),
            "gelu": lambda: 0.5 * (1.0 + _erf(z / math.sqrt(2.0))) + z * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi),
            "sigmoid": lambda: s * (1.0 - s),
            "tanh": lambda: 1.0 - np.tanh(z) ** 2,
            "hardswish": lambda: np.where(z <= -3, 0.0, np.where(z < 3, z / 3.0 + 0.5, 1.0)),
        }[name]())  # fmt: skip


def deactivate(name: str, p: float, y: np.ndarray) -> np.ndarray:
    """z of y = f(z)."""
    with np.errstate(all="ignore"):
        return {
            "": lambda: y,
            "leaky_relu": lambda: np.where(y <= 0, y / p, y),
            "elu": lambda: np.where(y <= 0, np.log1p(np.maximum(y / p, np.nextafter(-1.0, 0.0))), y),
        }[name]()


# The contract of `fastbn.kernels`, on (O, C, I) views.


def element_view(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """NumPy computes with every element as it is."""
    known = dtype in (np.float16, np.float32, np.float64, np.uint8, np.int8, np.uint16, np.int16)
    return dtype if known or dtype.name == "bfloat16" else None


def _sets(outer: int, more: Any) -> list[np.ndarray]:
    """The outer indices of each set."""
    order = np.arange(outer) if more.order is None else more.order
    starts = [0, outer] if more.starts is None else more.starts
    return [order[i:j] for i, j in itertools.pairwise(starts)]


def _counted(x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    """x in float64, with 0 in place of what doesn't count."""
    x = x.astype(np.float64)
    return x if w is None else np.where(w == 0, 0.0, x)


def _weighted(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean as hi and lo, and variance, by weights (O, 1, I) that aren't all 0."""
    x, mass = _counted(x, w), w.sum()
    with np.errstate(all="ignore"):
        hi = added(w * x, (0, 2)) / mass
        lo = added(w * (x - hi), (0, 2)) / mass
        d = np.where(w == 0, 0.0, (x - hi) - lo)
        return hi, lo, added(w * d * d, (0, 2)) / mass


def forward(
    x: np.ndarray,
    y: np.ndarray | None,
    table: np.ndarray | None,
    given: tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None, np.ndarray | None],
    eps: float,
    more: Any = None,
) -> None:
    gamma, beta, mean, var = given
    channels = x.shape[1]
    table = np.empty((6, channels)) if table is None else table
    if more is not None and more.lost is not None:
        more.kept[...] = x[:, more.lost]
    for g, rows in enumerate(_sets(x.shape[0], more) if more is not None else [np.arange(x.shape[0])]):
        part = slice(g * channels, (g + 1) * channels)
        t, xs = table[:, part], x[rows]
        w = None if more is None or more.weights is None else more.weights[rows].astype(np.float64)
        t[4] = 1.0 if gamma is None else gamma
        t[5] = 0.0 if beta is None else beta
        if mean is not None and var is not None:
            t[0], t[1], t[2] = mean[part], 0.0, var[part]
        elif xs.size == 0 or (w is not None and not w.any()):
            t[:4] = 0.0
        elif w is not None:
            t[0], t[1], t[2] = (a[0, :, 0] for a in _weighted(xs, w))
        else:
            d, hi, lo = centred(xs, (0, 2))
            t[0], t[1] = hi[0, :, 0], lo[0, :, 0]
            t[2] = average(d * d, (0, 2))[0, :, 0]
        with np.errstate(all="ignore"):
            if mean is not None or (xs.size and (w is None or w.any())):
                t[3] = 1.0 / np.sqrt(t[2] + eps)
            if y is None or not xs.size:
                continue
            result = _linear(xs, t)
            if more is not None:
                if more.residual is not None:
                    result = result + more.residual[rows]
                result = activate(more.activation, more.parameter, result)
                if w is not None and more.masked != "normalize":
                    result = np.where(w == 0, 0.0 if more.masked == "zero" else xs, result)
            y[rows] = result


def _linear(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    hi, lo, _, invstd, gamma, beta = table[:, :, None]
    return np.asarray(gamma * (((x.astype(np.float64) - hi) - lo) * invstd) + beta)


def backward(
    dy: np.ndarray,
    x: np.ndarray,
    dx: np.ndarray | None,
    table: np.ndarray,
    dgamma: np.ndarray | None,
    dbeta: np.ndarray | None,
    frozen: bool,
    more: Any = None,
) -> None:
    if more is not None:
        _backward_with(dy, x, dx, table, dgamma, dbeta, frozen, more)
        return
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


def _terms(dy: np.ndarray, x: np.ndarray, table: np.ndarray, more: Any, rows: Any) -> tuple[Any, ...]:
    """Of a set: dy, dy f'(z) and x - mean in float64, weights, and where y tells masked positions from others."""
    raw, v = dy[rows].astype(np.float64), x[rows].astype(np.float64)
    hi, lo = table[:2, :, None]
    if more is None:
        with np.errstate(all="ignore"):
            return raw, raw, (v - hi) - lo, None, None
    w = None if more.weights is None else more.weights[rows].astype(np.float64)
    absent = None if w is None or more.masked == "normalize" else w == 0
    with np.errstate(all="ignore"):
        if more.inverse:
            v = z = deactivate(more.activation, more.parameter, v)
            if more.lost is not None:
                v[:, more.lost] = more.kept[rows]
                z = z.copy()
                z[:, more.lost] = _linear(v, table)[:, more.lost]
        else:
            z = _linear(v, table)
            if more.residual is not None:
                z = z + more.residual[rows].astype(np.float64)
        g = raw * slope(more.activation, more.parameter, z)
        d = (v - hi) - lo
        if absent is not None:
            g, d = np.where(absent, 0.0, g), np.where(absent, 0.0, d)
    return raw, g, d, w, absent


def _slopes(
    terms: tuple[Any, ...], table: np.ndarray, sums: Any, products: Any, mass: float, frozen: bool, more: Any
) -> np.ndarray:
    """dx of a set."""
    raw, g, d, w, absent = terms
    invstd, gamma = table[3:5, :, None]
    with np.errstate(all="ignore"):
        a = gamma * invstd
        dx = a * g
        if not frozen and mass > 0:
            term = a * (sums[:, None] / mass) + a * invstd * (d * invstd) * (products[:, None] / mass)
            dx = dx - (term if w is None else np.where(w == 0, 0.0, w * term))
    return np.where(absent, raw, dx) if absent is not None and more.masked == "keep" else np.asarray(dx)


def inverse_table(table: np.ndarray, lost: np.ndarray | None = None) -> np.ndarray:
    """(6, C), by which gamma xhat + beta may stand for x: its mean is beta, and its 1 / std 1 / gamma, with sign; but x
    itself stands for those channels that are lost."""
    _, _, var, invstd, gamma, beta = table
    with np.errstate(all="ignore"):
        scale = gamma * invstd
        made = np.stack([beta, np.zeros_like(beta), scale**2 * var, 1 / gamma, gamma * scale, beta])
    if lost is not None:
        made[:, lost] = table[:, lost]
    return made


def _backward_with(
    dy: np.ndarray,
    x: np.ndarray,
    dx: np.ndarray | None,
    table: np.ndarray,
    dgamma: np.ndarray | None,
    dbeta: np.ndarray | None,
    frozen: bool,
    more: Any,
) -> None:
    channels = x.shape[1]
    for k, rows in enumerate(_sets(x.shape[0], more)):
        part = slice(k * channels, (k + 1) * channels)
        t = inverse_table(table[:, part], more.lost) if more.inverse else table[:, part]
        terms = _, g, d, w, _ = _terms(dy, x, t, more, rows)
        with np.errstate(all="ignore"):
            sums, products = _two_sums(g, d)
            if dbeta is not None:
                dbeta[part] = sums
            if dgamma is not None:
                dgamma[part] = products * t[3]
        if more.dresidual is not None:
            more.dresidual[rows] = g
        if dx is not None and d.size:
            mass = more.mass[k] if w is not None else d.shape[0] * d.shape[2]
            dx[rows] = _slopes(terms, t, sums, products, mass, frozen, more)


def _two_sums(g: np.ndarray, d: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.stack([added(values, (0, 2))[0, :, 0] for values in (g, g * d)])


def gradient_sums(dy: np.ndarray, x: np.ndarray, table: np.ndarray, more: Any = None) -> np.ndarray:
    _, g, d, _, _ = _terms(dy, x, table, more, slice(None))
    return _two_sums(g, d)


def gradient_map(
    dy: np.ndarray, x: np.ndarray, dx: np.ndarray, table: np.ndarray, sums: np.ndarray, count: float, more: Any = None
) -> None:
    terms = _terms(dy, x, table, more, slice(None))
    if more is not None and more.dresidual is not None:
        more.dresidual[...] = terms[1]
    dx[...] = _slopes(terms, table, *sums, count, False, more)


# Second order and forward mode, as in `fastbn.kernels.cpu.second`, whose letters these are.


def second_order(
    u: np.ndarray, g: np.ndarray, d: np.ndarray, s: np.ndarray, gamma: np.ndarray, p: np.ndarray, q: np.ndarray,
    axes: tuple[int, ...], frozen: bool, w: np.ndarray | None = None, masked: str = "normalize",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """r = dL/dg, which is jvp's tangent of y too, z = dL/dx, and dL/dgamma with the reduced axes kept as 1."""
    mass = math.prod(u.shape[a] for a in axes) if w is None else float(w.sum())
    v: Any = np.ones(()) if w is None else w
    counts = np.broadcast_to(np.asarray(True) if masked == "normalize" else v != 0, u.shape)

    def weighted(a: np.ndarray) -> np.ndarray:
        return v * np.where(v == 0, 0.0, a)

    def add(a: np.ndarray) -> np.ndarray:
        return added(a, axes)

    with np.errstate(all="ignore"):
        g, d = np.where(counts, g, 0.0), np.where(counts, d, 0.0)
        if frozen:
            r, z = gamma * s * u + p * s * d + q, np.where(counts, p * s * g, 0.0)
            ggamma = s * add(g * np.where(counts, u, 0.0))
        elif mass == 0:
            r, z, ggamma = np.broadcast_to(q, u.shape), np.zeros(u.shape), add(np.zeros(u.shape))
        else:
            e = u - add(weighted(u)) / mass
            e = e - add(weighted(e)) / mass
            f = np.where(counts, e, 0.0)
            if w is None:  # dy less its mean gives the same sums
                h = g - add(g) / mass
                h = h - add(h) / mass
            else:
                h = g
            k, m, a = s * s * add(weighted(d * e)) / mass, add(h * d), add(h * f)
            r = gamma * s * (e - d * k) + p * s * d + q
            ggamma = s * (a - m * k)
            slope_s = gamma * a - 3.0 * gamma * m * k + p * m
            c, b = p * s - gamma * s * k, -gamma * s**3 * m / mass
            if w is None:
                z = c * h + b * e - s**3 / mass * slope_s * d
            else:
                z = c * g + weighted(b * e - s**3 / mass * slope_s * d - c * add(g) / mass)
        if masked != "normalize":
            r, z = np.where(counts, r, u if masked == "keep" else 0.0), np.where(counts, z, 0.0)
    return r, z, ggamma


def second(
    u: np.ndarray | None, g: np.ndarray | None, x: np.ndarray | None, r: np.ndarray | None, z: np.ndarray | None,
    table: np.ndarray, tangents: np.ndarray, frozen: bool, need_gamma: bool, more: Any = None,
) -> np.ndarray | None:  # fmt: skip
    """The contract of `fastbn.kernels.cpu.second.second`."""
    like = next(a for a in (u, g, x, r, z) if a is not None)
    channels = like.shape[1]
    sets = [np.arange(like.shape[0])] if more is None else _sets(like.shape[0], more)
    found = np.zeros((len(sets), channels))
    p, q = tangents[:, :, None]
    for k, rows in enumerate(sets):
        hi, lo, _, invstd, gamma, _ = table[:, k * channels : (k + 1) * channels, None]
        shape = (len(rows), *like.shape[1:])
        one, two, three = (np.zeros(shape) if a is None else a[rows].astype(np.float64) for a in (u, g, x))
        w = None if more is None or more.weights is None else more.weights[rows].astype(np.float64)
        d = np.zeros(shape) if x is None else (three - hi) - lo
        masked = "normalize" if more is None else more.masked
        result, other, ggamma = second_order(one, two, d, invstd, gamma, p, q, (0, 2), frozen, w, masked)
        found[k] = ggamma[0, :, 0]
        if r is not None:
            r[rows] = result
        if z is not None:
            z[rows] = other
    return found if need_gamma else None
