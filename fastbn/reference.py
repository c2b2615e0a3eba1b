"""The same functions as textbook NumPy in float64: slow, plain, and what the kernels are judged by.

Results are float64 whatever x is, so that a float32 result can be held against one that was not rounded.
`forward`, `backward`, `infer` and `moments` are as in `fastbn`, with no `out` and no `save`, on arrays of any strides;
they share neither the view nor the kernels with `fastbn.forward`.

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
from .extras import Asked, ask
from .kernels.reference import activate, added, average, centred, gradient, normalize, second_order, slope
from .moments import Moments


class Saved(NamedTuple):
    """Of the reference's `forward`, for its `backward`."""

    d: np.ndarray  # x - mean; 0 where the weight is 0 and y isn't normalized
    var: np.ndarray
    gamma: np.ndarray
    eps: float
    axes: tuple[int, ...]
    moments: Any  # Moments, one for each group in a list with groups, None where frozen
    z: np.ndarray | None = None  # what the activation was taken of
    asked: Asked | None = None
    groups: tuple[tuple[np.ndarray, Saved], ...] = ()  # samples of each, and what it saved


def forward(
    x: np.ndarray,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    frozen: Any = None,
    weights: Any = None,
    masked: str = "normalize",
    groups: Any = None,
    residual: Any = None,
    activation: Any = None,
    scale: float = 1.0,
    zero_point: float = 0.0,
) -> tuple[np.ndarray, Saved]:
    """y in float64, and what `backward` needs."""
    where = "fastbn.reference.forward"
    check_array(where, "x", x, whole=True)
    if x.dtype.kind in "iu":
        x = scale * (x.astype(np.float64) - zero_point)
    axes, reduced, channels = _axes(where, x, axis)
    eps = check_eps(where, eps)
    asked = None
    if not (weights is groups is residual is activation is None and masked == "normalize"):
        dtype = np.dtype(np.float64) if residual is None else residual.dtype
        asked = ask(where, x, axes, dtype, weights, masked, groups, residual, activation)
    wide = tuple(x.shape[a] if a in axes else 1 for a in range(x.ndim))
    one = np.ones(wide) if gamma is None else check_channels(where, "gamma", gamma, channels).reshape(wide)
    zero = np.zeros(wide) if beta is None else check_channels(where, "beta", beta, channels).reshape(wide)
    sets = 1 if asked is None else asked.sets
    given = None
    if frozen is not None:
        shape = channels if asked is None or asked.groups is None else (sets, *channels)
        given = tuple(f.reshape(sets, *wide).astype(np.float64) for f in check_frozen(where, frozen, shape))
    if asked is None or asked.groups is None:
        return _one_set(x, one, zero, reduced, channels, eps, given and (given[0][0], given[1][0]), asked)
    order = np.arange(asked.groups.samples) if asked.groups.order is None else asked.groups.order
    y, saved = np.empty(x.shape), []
    for g in range(sets):
        samples = order[asked.groups.starts[g] : asked.groups.starts[g + 1]]
        own = asked._replace(
            weights=None if asked.weights is None else asked.weights.take(samples, asked.samples),
            residual=None if asked.residual is None else asked.residual.take(samples, asked.samples),
            groups=None,
        )
        stats = given and (given[0][g], given[1][g])
        part, kept = _one_set(x.take(samples, asked.samples), one, zero, reduced, channels, eps, stats, own)
        np.moveaxis(y, asked.samples, 0)[samples] = np.moveaxis(part, asked.samples, 0)
        saved.append((samples, kept))
    found = None if frozen is not None else [kept.moments for _, kept in saved]
    return y, Saved(y, y, one, eps, reduced, found, None, asked, tuple(saved))


def _one_set(
    x: np.ndarray, one: np.ndarray, zero: np.ndarray, reduced: tuple[int, ...], channels: tuple[int, ...], eps: float,
    given: Any, asked: Asked | None,
) -> tuple[np.ndarray, Saved]:  # fmt: skip
    w = None if asked is None or asked.weights is None else asked.weights.astype(np.float64)
    count: float = x.size // max(1, math.prod(channels))
    if w is not None and given is None:
        d, var, found = _by_weights(x, w, reduced, channels, one.shape)
    elif x.size == 0:
        d, var = np.zeros(x.shape), np.zeros(one.shape)
        found = Moments(0, np.zeros(channels), np.zeros(channels), np.float64)
    elif given is None:
        d, hi, lo = centred(x, reduced)
        with np.errstate(all="ignore"):
            var = average(d * d, reduced)
        found = Moments(int(count), (hi + lo).reshape(channels), count * var.reshape(channels), np.float64)
    else:
        mean, var = given
        d, found = x.astype(np.float64) - mean, None
    nothing = w is not None and given is None and not w.any()
    y = np.broadcast_to(zero, x.shape) + 0.0 if nothing else normalize(d, var, one, zero, eps)
    z = None
    if asked is not None:
        z = y if asked.residual is None else y + asked.residual.astype(np.float64)
        y = activate(asked.activation, asked.parameter, z)
        if w is not None and asked.masked != "normalize":
            y = np.where(w == 0, 0.0 if asked.masked == "zero" else x, y)
            d = np.where(w == 0, 0.0, d)
    return y, Saved(d, var, one, eps, reduced, found, z, asked)


def _by_weights(
    x: np.ndarray, w: np.ndarray, reduced: tuple[int, ...], channels: tuple[int, ...], wide: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, Moments]:
    """x - mean, variance and moments, where positions of weight 0 are absent."""
    mass = float(w.sum())
    if mass == 0:
        return np.zeros(x.shape), np.zeros(wide), Moments(0, np.zeros(channels), np.zeros(channels), np.float64)
    x = x.astype(np.float64)
    with np.errstate(all="ignore"):
        hi = added(np.where(w == 0, 0.0, w * x), reduced) / mass
        lo = added(np.where(w == 0, 0.0, w * (x - hi)), reduced) / mass
        d = (x - hi) - lo
        var = added(np.where(w == 0, 0.0, w * d * d), reduced) / mass
    return d, var, Moments(mass, (hi + lo).reshape(channels), (mass * var).reshape(channels), np.float64)


def backward(dy: np.ndarray, saved: Saved) -> tuple[np.ndarray, ...]:
    """dx, dgamma, dbeta in float64; and the gradient of the residual where there was one."""
    dy = check_array("fastbn.reference.backward", "dy", dy).astype(np.float64)
    channels = tuple(n for a, n in enumerate(dy.shape) if a not in saved.axes)
    if saved.groups:
        assert saved.asked is not None
        axis = saved.asked.samples
        dx, sums, dr = np.empty(dy.shape), np.zeros((2, *channels)), np.empty(dy.shape)
        for samples, kept in saved.groups:
            part, dgamma, dbeta, *rest = backward(dy.take(samples, axis), kept)
            np.moveaxis(dx, axis, 0)[samples] = np.moveaxis(part, axis, 0)
            sums += dgamma, dbeta
            if rest:
                np.moveaxis(dr, axis, 0)[samples] = np.moveaxis(rest[0], axis, 0)
        return (dx, *sums) if saved.asked.residual is None else (dx, *sums, dr)
    if saved.asked is not None:
        return _backward_with(dy, saved, saved.asked, channels)
    with np.errstate(all="ignore"):
        std = np.sqrt(saved.var + saved.eps)
        dgamma, dbeta = (added(v, saved.axes).reshape(channels) for v in (dy * (saved.d / std), dy))
        if saved.moments is None:
            return saved.gamma / std * dy, dgamma, dbeta
        if dy.size == 0:
            return dy, dgamma, dbeta
        return gradient(dy, saved.d, saved.var, saved.gamma, saved.eps, saved.axes), dgamma, dbeta


def _backward_with(dy: np.ndarray, saved: Saved, asked: Asked, channels: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    w = None if asked.weights is None else asked.weights.astype(np.float64)
    absent = np.zeros(dy.shape, bool)
    if w is not None and asked.masked != "normalize":
        absent |= w == 0
    mass = dy.size // max(1, math.prod(channels)) if w is None else float(w.sum())
    with np.errstate(all="ignore"):
        std = np.sqrt(saved.var + saved.eps)
        g = np.where(absent, 0.0, dy * slope(asked.activation, asked.parameter, saved.z if saved.z is not None else dy))
        xhat = saved.d / std
        if saved.moments is not None and mass == 0:
            xhat, std = np.zeros(dy.shape), np.full(std.shape, np.inf)
        sums, products = (added(s, saved.axes) for s in (g, np.where(absent, 0.0, g * xhat)))
        dx = saved.gamma / std * g
        if saved.moments is not None and mass > 0:
            term = saved.gamma / std * (sums + xhat * products) / mass
            dx = dx - (term if w is None else np.where(w == 0, 0.0, w * term))
        if asked.masked == "keep":
            dx = np.where(absent, dy, dx)
    found = dx, products.reshape(channels), sums.reshape(channels)
    return found if asked.residual is None else (*found, g)


def jvp(x_t: Any, saved: Saved, gamma_t: Any = None, beta_t: Any = None) -> np.ndarray:
    """The tangent of y in float64; None is 0."""
    return _second_order("fastbn.reference.jvp", x_t, gamma_t, beta_t, None, saved)[0]


def backward_backward(
    ddx: Any, ddgamma: Any, ddbeta: Any, dy: np.ndarray, saved: Saved
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradients with respect to x, gamma and dy in float64; None is 0."""
    where = "fastbn.reference.backward_backward"
    gdy, gx, ggamma = _second_order(where, ddx, ddgamma, ddbeta, check_array(where, "dy", dy), saved)
    return gx, ggamma, gdy


def _second_order(where: str, u: Any, p: Any, q: Any, dy: Any, saved: Saved) -> tuple[np.ndarray, ...]:
    shape, axes = saved.d.shape, saved.axes
    channels = tuple(n for a, n in enumerate(shape) if a not in axes)
    wide = tuple(1 if a in axes else n for a, n in enumerate(shape))
    one, two = (np.zeros(shape) if a is None else a.astype(np.float64) for a in (u, dy))
    if saved.groups:
        assert saved.asked is not None
        axis = saved.asked.samples
        r, z, ggamma = np.empty(shape), np.empty(shape), np.zeros(channels)
        for samples, kept in saved.groups:
            own = [a.take(samples, axis) for a in (one, two)]
            part = _second_order(where, own[0], p, q, own[1], kept)
            for target, values in zip((r, z), part, strict=False):
                np.moveaxis(target, axis, 0)[samples] = np.moveaxis(values, axis, 0)
            ggamma += part[2]
        return r, z, ggamma
    names = ("gamma", "beta")
    scales = [
        np.zeros(wide) if a is None else check_channels(where, name, a, channels).reshape(wide)
        for name, a in zip(names, (p, q), strict=True)
    ]
    asked = saved.asked
    w = None if asked is None or asked.weights is None else asked.weights.astype(np.float64)
    masked = "normalize" if asked is None else asked.masked
    s = 1.0 / np.sqrt(saved.var + saved.eps)
    frozen = saved.moments is None
    if one.size == 0:
        return one, one, np.zeros(channels)
    r, z, ggamma = second_order(one, two, saved.d, s, saved.gamma, scales[0], scales[1], axes, frozen, w, masked)
    return r, z, ggamma.reshape(channels)


def infer(
    x: np.ndarray,
    mean: Any,
    var: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    **more: Any,
) -> np.ndarray:
    """y in float64, by given statistics."""
    return forward(x, gamma, beta, axis=axis, eps=eps, frozen=(mean, var), **more)[0]


def moments(x: np.ndarray, *, axis: Axis = 1, weights: Any = None) -> Moments:
    """Count, mean and M2 in float64; by weights, their sum is the count."""
    found: Moments = forward(x, axis=axis, weights=weights)[1].moments
    return found


def _axes(where: str, x: np.ndarray, axis: Axis) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    axes = check_axis(where, x, axis)
    return axes, tuple(a for a in range(x.ndim) if a not in axes), tuple(x.shape[a] for a in axes)
