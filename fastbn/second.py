"""Forward mode and second order: `jvp`, the tangent of `forward`, and `backward_backward`, the gradient of `backward`.

Both are linear in what they are given, with a few numbers for each channel, so that one pass of sums and one map over
memory do all of it; the formulas are derived in `fastbn.kernels.cpu.second`.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from .arguments import check_array, check_out, check_place, check_real, describe, native
from .arrays import Span
from .dispatch import get_backend, kernels
from .layout import Views, channels_of, empty
from .runs import elements, flat, samples, shaped
from .saved import Saved, number_type


def jvp(x_t: Any, saved: Saved, gamma_t: Any = None, beta_t: Any = None, *, out: Any = None) -> Any:
    """The tangent of y for tangents of x, gamma and beta: how y moves when they move, to first order (forward mode).

    With xhat = (x - mean) / std and means over all values of a channel, in training

    ``y_t = gamma / std (x_t - mean(x_t) - xhat mean(x_t xhat)) + gamma_t xhat + beta_t``,

    and with frozen statistics ``y_t = gamma / std x_t + gamma_t xhat + beta_t``. With weights, means are weighted; with
    groups, they are each group's own.

    Parameters
    ----------
    x_t : array of x's shape and dtype, or None for 0
        Any strides.
    saved : Saved
        From `forward`, which tells x, gamma and the statistics; it may be used again. Not with an activation, a
        residual, `save="y"` or whole numbers.
    gamma_t, beta_t : array of the channels' shape, or None for 0
    out : array of x's shape and dtype, optional
        Where y_t goes; it may be x_t.

    Returns
    -------
    y_t : array of x's shape, dtype and memory layout

    Raises
    ------
    TypeError, ValueError
        Before anything is written; also for arrays on a GPU, for which this is not there yet.

    >>> import numpy as np, fastbn
    >>> x = np.float64([[1.0], [3.0], [5.0]])
    >>> y, saved = fastbn.forward(x)
    >>> y_t = fastbn.jvp(np.float64([[1], [0], [0]]), saved, beta_t=[1.0])
    >>> (moved, _), step = fastbn.forward(x + 1e-6 * np.float64([[1], [0], [0]]), beta=[1e-6]), 1e-6
    >>> bool(np.allclose(y_t, (moved - y) / step, atol=1e-6))
    True
    """
    where = "fastbn.jvp"
    _check_saved(where, saved)
    u = _like_x(where, "x_t", x_t, saved)
    dtype, shape = saved.dtype, saved._shape
    numbers = _tangents(where, "gamma_t", gamma_t, "beta_t", beta_t, saved)
    x = _x_of(where, saved, gamma_t is not None)
    if out is not None:
        out = check_out(where, "out", out, shape, dtype, x if u is None else u, {"x_t": u}, {"x": saved._x})
    y_t = empty(shape, saved._strides, native(dtype)) if out is None else out
    _run(where, u, None, x, y_t, None, saved, numbers, False)
    return y_t


def backward_backward(
    ddx: Any,
    ddgamma: Any,
    ddbeta: Any,
    dy: Any,
    saved: Saved,
    *,
    need: tuple[bool, bool, bool] = (True, True, True),
    out: Any = None,
) -> tuple[Any, Any, Any]:
    """The gradients of a loss with respect to x, gamma and dy, from those with respect to `backward`'s results.

    That is the second derivative in closed form, for gradient penalties, Hessian products and meta-learning. With L the
    loss, u = ddx and xhat = (x - mean) / std, means and sums over all values of a channel, in training

    ``gdy = gamma / std (u - mean(u) - xhat mean(u xhat)) + ddgamma xhat + ddbeta``, as in `jvp`,
    ``ggamma = (sum dy (u - mean(u)) - mean(u xhat) sum dy xhat) / std``,

    and gx is a combination of dy, u, xhat and 1, for which see `fastbn.kernels.cpu.second`. With frozen statistics
    ``gdy = gamma / std u + ddgamma xhat + ddbeta``, ``ggamma = sum dy u / std`` and ``gx = ddgamma / std dy``.

    Parameters
    ----------
    ddx : array of x's shape and dtype, or None for 0
        The gradient of L with respect to dx.
    ddgamma, ddbeta : array of the channels' shape, or None for 0
        Those with respect to dgamma and dbeta.
    dy : array of y's shape and dtype
        As it was given to `backward`.
    saved : Saved
        As in `jvp`.
    need : three bools
        Which of gx, ggamma and gdy to compute. The others are None.
    out : (gx, ggamma, gdy) with None where there is none, optional
        Where results go, without any other memory of that size. gx and gdy may go to ddx or dy.

    Returns
    -------
    gx, gdy : arrays of x's shape, dtype and memory layout
    ggamma : float32 array of the channels' shape (float64 for float64 x)

    Raises
    ------
    TypeError, ValueError
        As in `jvp`.

    >>> import numpy as np, fastbn
    >>> x, dy = np.float64([[1.0], [3.0], [5.0]]), np.float64([[1.0], [0.0], [0.0]])
    >>> y, saved = fastbn.forward(x, [2.0])
    >>> dx = fastbn.backward(dy, saved)[0]
    >>> gx, ggamma, gdy = fastbn.backward_backward(dx, None, None, dy, saved)  # of the penalty sum dx^2 / 2
    >>> bool(np.allclose(ggamma, (dx**2).sum() / 2.0))  # dx is proportional to gamma
    True
    """
    where = "fastbn.backward_backward"
    _check_saved(where, saved)
    u, g = _like_x(where, "ddx", ddx, saved), _like_x(where, "dy", dy, saved)
    if g is None:
        raise TypeError(f"{where}: dy is None; expected the array that backward was given")
    numbers = _tangents(where, "ddgamma", ddgamma, "ddbeta", ddbeta, saved)
    if not isinstance(need, (tuple, list)) or len(need) != 3:
        raise TypeError(f"{where}: need is {describe(need)}; expected three bools, for gx, ggamma and gdy")
    if out is not None and (not isinstance(out, (tuple, list)) or len(out) != 3):
        raise ValueError(f"{where}: out is {describe(out)}; expected three: gx, ggamma and gdy, or None for each")
    need_x, need_gamma, need_dy = (bool(n) for n in need)
    given_x, given_gamma, given_dy = (None, None, None) if out is None else out
    shape, dtype = saved._shape, native(saved.dtype)
    x = _x_of(where, saved, ddgamma is not None)
    gx = gdy = None
    may_be, apart = {"ddx": u, "dy": g}, {"x": saved._x}
    if need_x:
        if given_x is None:
            gx = empty(shape, saved._strides, dtype)
        else:
            gx = check_out(where, "out (gx)", given_x, shape, saved.dtype, g, may_be, apart)
    apart = apart | {"gx": gx}
    if need_dy:
        if given_dy is None:
            gdy = empty(shape, saved._strides, dtype)
        else:
            gdy = check_out(where, "out (gdy)", given_dy, shape, saved.dtype, g, may_be, apart)
    channels, kind = channels_of(shape, saved._axes), number_type(dtype.itemsize)
    ggamma = None
    if need_gamma:
        if given_gamma is not None:
            apart = apart | {"ddx": u, "dy": g, "gdy": gdy}
            given_gamma = check_out(where, "out (ggamma)", given_gamma, channels.shape, kind, g, {}, apart)
        ggamma = flat(given_gamma, channels.number, kind, None)
    found = _run(where, u, g, x, gdy, gx, saved, numbers, need_gamma)
    if ggamma is not None:
        ggamma[...] = found
    return gx, shaped(ggamma, given_gamma, channels.shape), gdy


def _check_saved(where: str, saved: Any) -> None:
    if not isinstance(saved, Saved):
        raise TypeError(f"{where}: saved is {describe(saved)}; expected the second result of fastbn.forward")
    if saved._like is not None:
        raise TypeError(
            f"{where}: forward had a {saved._like}; expected NumPy arrays, as this is not there yet for arrays on "
            "a GPU. Copy x to main memory"
        )
    if saved._units is not None:
        raise ValueError(f"{where}: forward had whole numbers ({saved.dtype}); expected floats. Convert x")
    asked = saved._asked
    if asked is None:
        return
    if asked.activation or asked.residual is not None:
        what = f"activation={asked.activation!r}" if asked.activation else "residual"
        raise ValueError(
            f"{where}: forward had {what}, whose derivatives are not there yet; expected batch norm alone. "
            "Call forward without it, and do it apart"
        )
    if asked.save == "y":
        raise ValueError(f"{where}: forward had save='y', which keeps no x; expected save='x'")


def _like_x(where: str, name: str, value: Any, saved: Saved) -> np.ndarray | None:
    if value is None:
        return None
    array: np.ndarray = check_array(where, name, value)
    check_place(where, name, array, saved._like)
    if isinstance(array, Span):
        raise TypeError(f"{where}: {name} is a {describe(value)}; expected a NumPy array, like x. Copy it")
    if array.shape != saved._shape or native(array.dtype) != native(saved.dtype):
        advice = "Is it for another forward pass?" if array.shape != saved._shape else f"Convert it: {name}.astype(...)"
        raise ValueError(
            f"{where}: {name} is a {describe(value)}; expected {saved.dtype} of shape {saved._shape}, like x. {advice}"
        )
    return array


def _tangents(where: str, one: str, gamma: Any, other: str, beta: Any, saved: Saved) -> np.ndarray:
    """(2, C) float64."""
    channels = channels_of(saved._shape, saved._axes)
    numbers = np.zeros((2, channels.number))
    for row, name, value in zip(numbers, (one, other), (gamma, beta), strict=True):
        if value is not None:
            row[...] = check_real(where, name, value, channels.shape)
    return numbers


def _x_of(where: str, saved: Saved, scaled: bool) -> np.ndarray | None:
    """x, or None where it doesn't count."""
    if saved.frozen and not scaled:
        return None
    if saved._x is None:
        raise ValueError(
            f"{where}: saved has no x, which `out` overwrote; expected x, but for frozen statistics without a tangent "
            "of gamma. Give forward an `out` of its own"
        )
    x: np.ndarray = saved._x
    return x


def _run(
    where: str, u: Any, g: Any, x: Any, r: Any, z: Any, saved: Saved, numbers: np.ndarray, need_gamma: bool
) -> np.ndarray | None:
    """Fills r and z, those that are wanted; returns the gradient of gamma (C,), if it is."""
    first = next((a for a in (x, u, g) if a is not None), None)
    like = r if first is None else first
    backend = kernels(where, like)
    if like.size == 0:
        return np.zeros(numbers.shape[1])
    inputs = [a for a in (x, u, g) if a is not None]
    asked = saved._asked
    views = Views(saved._axes, inputs or [r], [r, z], samples(asked))
    seen = iter(elements(views.views, backend))
    if not inputs:
        next(seen)
    read = {id(a): next(seen) for a in inputs}
    written_r, written_z = seen
    more = None if asked is None else asked.seen(views, saved._masses, None, None, False)
    name = "reference" if get_backend() == "reference" else "cpu.second"
    second = importlib.import_module(f"fastbn.kernels.{name}").second
    of = [None if a is None else read[id(a)] for a in (u, g, x)]
    found = second(*of, written_r, written_z, saved._table, numbers, saved.frozen, need_gamma, more)
    views.finish()
    return None if found is None else found.sum(axis=0)
