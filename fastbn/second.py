"""Forward mode and second order: `jvp`, the tangent of `forward`, and `backward_backward`, the gradient of `backward`.

Both are linear in what they are given, with a few numbers for each channel, so that one pass of sums and one map over
memory do all of it; the formulas are derived in `fastbn.kernels.cpu.second`. For arrays on a GPU, of whatever library,
they are numba.cuda's; those of other libraries in main memory are read and made as by `forward`.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from .arguments import check_array, check_caller, check_out, check_place, check_real, describe, native
from .arrays import Span, family_of_values
from .dispatch import get_backend, kernels, second_order_on_device
from .layout import Views, channels_of
from .runs import elements, flat, new, own, placed, samples, shaped
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
        Any strides; of x's library, in main memory or on a GPU: what `forward` takes, this takes.
    saved : Saved
        From `forward`, which tells x, gamma and the statistics; it may be used again. Not with an activation, a
        residual, `save="y"`, whole numbers or a `comm` of several ranks.
    gamma_t, beta_t : array of the channels' shape, or None for 0
        As gamma and beta in `forward`: with x on a GPU, beside it.
    out : array of x's shape and dtype, optional
        Where y_t goes, of x's library, unless its arrays are never written to, as JAX's; it may be x_t.

    Returns
    -------
    y_t : array of x's library, shape, dtype and memory layout

    Raises
    ------
    TypeError, ValueError
        Before anything is written; also for arrays on a GPU with `set_backend("cupy")`, which has no second order.
    RuntimeError
        For arrays on a GPU where numba-cuda is missing: its kernels read CuPy's and PyTorch's arrays, too.

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
    numbers = _tangents(where, "gamma_t", gamma_t, "beta_t", beta_t, saved)
    x = _x_of(where, saved, gamma_t is not None)
    y_t = _place(where, "out", out, saved, {"x_t": u}, {"x": saved._x})
    _run(where, u, None, x, y_t, None, saved, numbers, None)
    return own(y_t, saved._caller, out)


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
        The gradient of L with respect to dx, of x's library, as in `jvp`.
    ddgamma, ddbeta : array of the channels' shape, or None for 0
        Those with respect to dgamma and dbeta.
    dy : array of y's shape and dtype
        As it was given to `backward`, of x's library.
    saved : Saved
        As in `jvp`.
    need : three bools
        Which of gx, ggamma and gdy to compute. The others are None.
    out : (gx, ggamma, gdy) with None where there is none, optional
        Where results go, as in `jvp`, without any other memory of that size. gx and gdy may go to ddx or dy.

    Returns
    -------
    gx, gdy : arrays of x's library, shape, dtype and memory layout
    ggamma : float32 array of x's library, of the channels' shape (float64 for float64 x)

    Raises
    ------
    TypeError, ValueError, RuntimeError
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
    given_x, given_gamma, given_dy = places = (None, None, None) if out is None else out
    caller = saved._caller
    x = _x_of(where, saved, ddgamma is not None)
    may_be, apart = {"ddx": u, "dy": g}, {"x": saved._x}
    gx = _place(where, "out (gx)", given_x, saved, may_be, apart) if need_x else None
    apart = apart | {"gx": gx}
    gdy = _place(where, "out (gdy)", given_dy, saved, may_be, apart) if need_dy else None
    channels, kind = channels_of(saved._shape, saved._axes), number_type(_dtype_of(saved).itemsize)
    ggamma = None
    if need_gamma:
        if given_gamma is not None:
            apart = apart | {"ddx": u, "dy": g, "gdy": gdy}
            given_gamma = check_out(where, "out (ggamma)", given_gamma, channels.shape, kind, g, {}, apart, caller)
        ggamma = flat(given_gamma, channels.number, kind, saved._like)
    _run(where, u, g, x, gdy, gx, saved, numbers, ggamma)
    found = gx, shaped(ggamma, given_gamma, channels.shape), gdy
    return tuple([own(a, caller, place) for a, place in zip(found, places, strict=True)])


def _check_saved(where: str, saved: Any) -> None:
    if not isinstance(saved, Saved):
        raise TypeError(f"{where}: saved is {describe(saved)}; expected the second result of fastbn.forward")
    if saved._units is not None:
        raise ValueError(f"{where}: forward had whole numbers ({saved.dtype}); expected floats. Convert x")
    if saved._shared is not None and saved._shared.ranks.size > 1:
        raise ValueError(
            f"{where}: forward had a comm of {saved._shared.ranks.size} ranks, whose sums are not added up here yet; "
            "expected a batch that is all on this rank. Call forward without comm"
        )
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


def _dtype_of(saved: Saved) -> np.dtype[Any]:
    """That of x's elements, as the kernels read them on a GPU."""
    dtype: np.dtype[Any] = saved.dtype if saved._like is None else saved._like.dtype
    return dtype


def _like_x(where: str, name: str, value: Any, saved: Saved) -> Any:
    if value is None:
        return None
    array = check_array(where, name, value)
    check_place(where, name, value, saved._like)
    check_caller(where, name, value, saved._caller)
    if array.shape != saved._shape or native(array.dtype) != native(_dtype_of(saved)):
        advice = "Is it for another forward pass?" if array.shape != saved._shape else f"Convert it: {name}.astype(...)"
        raise ValueError(
            f"{where}: {name} is a {describe(value)}; expected {saved.dtype} of shape {saved._shape}, like x. {advice}"
        )
    return array


def _place(where: str, name: str, out: Any, saved: Saved, may_be: dict[str, Any], apart: dict[str, Any]) -> Any:
    beside = next((a for a in (saved._like, *may_be.values()) if a is not None), None)
    dtype = _dtype_of(saved) if out is not None else native(_dtype_of(saved))
    return placed(where, name, out, saved, dtype, beside, may_be, apart, saved._caller)


def _tangents(where: str, one: str, gamma: Any, other: str, beta: Any, saved: Saved) -> Any:
    """(2, C) float64; on a GPU a pair, of (C,) or None each."""
    channels, given = channels_of(saved._shape, saved._axes), ((one, gamma), (other, beta))
    if (like := saved._like) is not None:
        return tuple([None if a is None else check_real(where, name, a, channels.shape, like) for name, a in given])
    numbers = np.zeros((2, channels.number))
    for row, (name, value) in zip(numbers, given, strict=True):
        if value is not None:
            row[...] = check_real(where, name, value, channels.shape)
    return numbers


def _x_of(where: str, saved: Saved, scaled: bool) -> Any:
    """x, or None where it doesn't count."""
    if saved.frozen and not scaled:
        return None
    if saved._x is None:
        raise ValueError(
            f"{where}: saved has no x, which `out` overwrote; expected x, but for frozen statistics without a tangent "
            "of gamma. Give forward an `out` of its own"
        )
    return saved._x


def _run(where: str, u: Any, g: Any, x: Any, r: Any, z: Any, saved: Saved, numbers: Any, ggamma: Any) -> None:
    """Fills r, z and the gradient of gamma (C,), those that are wanted."""
    first = next((a for a in (x, u, g) if a is not None), None)
    like = r if first is None else first
    on_device = isinstance(like, Span)
    backend: Any = second_order_on_device(where, like) if on_device else kernels(where, like)
    if like.size == 0:
        if ggamma is not None:
            family_of_values(ggamma).clear(ggamma)
        return
    inputs = [a for a in (x, u, g) if a is not None]
    asked = saved._asked
    views = Views(saved._axes, inputs or [r], [r, z], samples(asked, r))
    seen = iter(elements(views.views, backend))
    if not inputs:
        next(seen)
    read = {id(a): next(seen) for a in inputs}
    more = None if asked is None else asked.seen(views, saved._masses, None, None, False)
    of = [*(None if a is None else read[id(a)] for a in (u, g, x)), *seen, saved._table, numbers, saved.frozen]
    if on_device:
        parts = ggamma
        if ggamma is not None and asked is not None and asked.groups is not None:
            parts = new((saved._table.shape[1],), number_type(like.dtype.itemsize), like)
        backend.second(*of, parts, more)
        if parts is not ggamma:
            family_of_values(ggamma).total(parts, ggamma)
    else:
        name = "reference" if get_backend() == "reference" else "cpu.second"
        found = importlib.import_module(f"fastbn.kernels.{name}").second(*of, ggamma is not None, more)
        if ggamma is not None:
            ggamma[...] = found.sum(axis=0)
    views.finish()
