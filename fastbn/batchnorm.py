"""Batch normalization on arrays: forward, backward, infer, moments. Here is all that makes it batch norm.

A call checks its arguments, sees its arrays as (outer, channels, inner), and hands them to the kernels
together with C-sized arrays: parameters, gradients, and a table (6, C) of what was found, from which moments are made.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np

from .arguments import (
    FLOAT32,
    FLOAT64,
    Axis,
    check_array,
    check_axis,
    check_eps,
    check_frozen,
    check_out,
    check_real,
    describe,
    native,
    same_memory,
)
from .dispatch import Given, Kernels, kernels
from .layout import Views, channels_of, empty
from .moments import Moments


class OneValueWarning(UserWarning):
    """Training on one value per channel: its deviation from its own mean is 0, so y is beta and dx is 0.

    >>> import warnings, numpy as np, fastbn
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", fastbn.OneValueWarning)
    ...     y, saved = fastbn.forward(np.float32([[7, 8]]), beta=[1, 2])
    >>> y.tolist()
    [[1.0, 2.0]]
    """


class Saved:
    """What `forward` keeps for `backward`: x itself (no copy), and C numbers.

    `moments` is what forward found in x: pass it to `RunningStats.update`. None with frozen statistics.

    >>> import numpy as np, fastbn
    >>> fastbn.forward(np.ones((4, 2), np.float32))[1]
    Saved(float32 x of shape (4, 2), channel axes (1,), frozen=False)
    """

    __slots__ = ("_axes", "_shape", "_strides", "_table", "_x", "dtype", "frozen")

    def __init__(
        self,
        walked: np.ndarray | None,
        x: np.ndarray,
        axes: tuple[int, ...],
        table: np.ndarray,
        frozen: bool,
    ) -> None:
        self._x = walked  # x, or the copy of it that the kernels could walk; None if overwritten
        self._shape = x.shape
        self._strides = x.strides
        self._axes = axes
        self._table = table  # (6, C): mean hi, mean lo, var, 1 / sqrt(var + eps), gamma, beta
        self.dtype = x.dtype
        self.frozen = frozen

    @property
    def moments(self) -> Moments | None:
        """Moments of x (None if frozen), made when asked for: that takes as long as normalizing a small array."""
        return None if self.frozen else _moments(self._shape, self._axes, self._table, self.dtype)

    def __repr__(self) -> str:
        return f"Saved({self.dtype} x of shape {self._shape}, channel axes {self._axes}, frozen={self.frozen})"


def forward(
    x: np.ndarray,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    frozen: Any = None,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, Saved]:
    """Normalize each channel by its own mean and variance (training), or by given ones (evaluation).

    ``y = gamma (x - mean) / sqrt(var + eps) + beta``, with mean and biased variance over all axes but `axis`
    (Ioffe & Szegedy 2015, algorithm 1).

    Parameters
    ----------
    x : array, at least 2-D, of float16, bfloat16, float32 or float64
        Any strides. It is kept, not copied, for `backward`, except as `fastbn.layout.Views` says. float64 values
        from 1e154 on have no float64 variance.
    gamma, beta : array of the channels' shape, optional
        Scale and shift; 1 and 0 if not given.
    axis : int or tuple of int
        The channel axis, or all axes that statistics keep: (0, 1) of (N, C, H, W) is instance norm.
    eps : float
        Added to the variance, in its unit.
    frozen : (mean, var) or RunningStats, optional
        Normalize by these in place of x's own; they count as constants in `backward`.
    out : array of x's shape and dtype, optional
        Where y goes, without any other memory of that size. It may be x; then only the gradients that don't need
        x can be had from `saved`.

    Returns
    -------
    y : array of x's shape, dtype and memory layout
    saved : Saved
        For `backward`; `saved.moments` for `RunningStats.update`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        Before anything is written.

    Warns
    -----
    OneValueWarning
        If each channel has a single value to train on.

    >>> import numpy as np, fastbn
    >>> x = np.float32([[1, 1e6], [3, 1e6 + 4]])
    >>> y, saved = fastbn.forward(x, gamma=[1, 2], beta=[0, 1])
    >>> y.round(3).tolist()
    [[-1.0, -1.0], [1.0, 3.0]]
    >>> saved.moments.mean.tolist()
    [2.0, 1000002.0]
    """
    return _forward("fastbn.forward", x, gamma, beta, axis, eps, frozen, out)


def backward(
    dy: np.ndarray,
    saved: Saved,
    *,
    need: tuple[bool, bool, bool] = (True, True, True),
    out: Any = None,
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """The gradients of a loss with respect to x, gamma and beta, from that with respect to y.

    With xhat = (x - mean) / std and std = sqrt(var + eps), over all values of a channel (Ioffe & Szegedy 2015,
    section 3):

    ``dbeta = sum dy``, ``dgamma = sum dy xhat``, and in training
    ``dx = gamma / std (dy - mean(dy) - xhat mean(dy xhat))``; with frozen statistics ``dx = gamma / std dy``.

    Parameters
    ----------
    dy : array of y's shape and dtype
        Any strides.
    saved : Saved
        From `forward`; it may be used again.
    need : three bools
        Which of dx, dgamma and dbeta to compute. The others are None.
    out : array, or (dx, dgamma, dbeta) with None where there is none, optional
        Where results go; dx may go to dy, or to x, of which nothing is left for another `backward` then.

    Returns
    -------
    dx : array of x's shape, dtype and memory layout
    dgamma, dbeta : float32 arrays of the channels' shape (float64 for float64 x)

    Raises
    ------
    TypeError, ValueError
        Before anything is written; also if x is needed and forward's `out` overwrote it.

    >>> import numpy as np, fastbn
    >>> y, saved = fastbn.forward(np.float32([[1.0], [3.0], [5.0]]))
    >>> dx, dgamma, dbeta = fastbn.backward(np.float32([[1], [0], [0]]), saved)
    >>> [float(v) for v in (1e3 * dx).round().flat], round(float(dgamma[0]), 3), float(dbeta[0])
    ([102.0, -204.0, 102.0], -1.225, 1.0)
    """
    where = "fastbn.backward"
    if not isinstance(saved, Saved):
        raise TypeError(f"{where}: saved is {describe(saved)}; expected the second result of fastbn.forward")
    check_array(where, "dy", dy)
    if dy.shape != saved._shape or (dy.dtype != saved.dtype and native(dy.dtype) != native(saved.dtype)):
        advice = "Is it for another forward pass?" if dy.shape != saved._shape else "Convert it: dy.astype(y.dtype)"
        raise ValueError(
            f"{where}: dy is a {describe(dy)}; expected {saved.dtype} of shape {saved._shape}, like y. {advice}"
        )
    need_dx, need_dgamma, need_dbeta = _need(where, need)
    given_dx, given_dgamma, given_dbeta = _three(where, out)
    x = saved._x
    frozen = saved.frozen
    if x is None and (need_dgamma or (need_dx and not frozen)):
        raise ValueError(
            f"{where}: saved has no x, which `out` overwrote; expected x for dgamma, and for dx in training. "
            "Give forward an `out` of its own, or backward need=(False, False, True)"
        )
    channels = channels_of(saved._shape, saved._axes)
    numbers = _number_type(saved.dtype)
    dx = None
    if need_dx:
        if given_dx is not None:
            dx = check_out(where, "out (dx)", given_dx, saved._shape, saved.dtype, {"dy": dy, "x": x}, {})
        else:
            dx = empty(saved._shape, saved._strides, saved.dtype)
    apart = {"dy": dy, "x": x, "dx": dx}
    if need_dgamma and given_dgamma is not None:
        apart["dgamma"] = check_out(where, "out (dgamma)", given_dgamma, channels.shape, numbers, {}, apart)
    if need_dbeta and given_dbeta is not None:
        check_out(where, "out (dbeta)", given_dbeta, channels.shape, numbers, {}, apart)
    dgamma = _flat(given_dgamma, channels.number, numbers) if need_dgamma else None
    dbeta = _flat(given_dbeta, channels.number, numbers) if need_dbeta else None
    _run_backward(dy, dy if x is None else x, dx, saved, dgamma, dbeta)
    if given_dx is not None and dx is not None and x is not None and same_memory(dx, x):
        saved._x = None
    return dx, _shaped(dgamma, given_dgamma, channels.shape), _shaped(dbeta, given_dbeta, channels.shape)


def infer(
    x: np.ndarray,
    mean: Any,
    var: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Normalize by given statistics, keeping nothing: ``y = gamma (x - mean) / sqrt(var + eps) + beta``.

    `mean` and `var` are arrays of the channels' shape; a variance below 0 is a ValueError. All else, errors
    included, is as in `forward` with `frozen=(mean, var)`.

    >>> import numpy as np, fastbn
    >>> fastbn.infer(np.float32([[7, 1], [5, 1]]), mean=[5, 0], var=[4, 1], eps=1e-8).tolist()
    [[1.0, 1.0], [0.0, 1.0]]
    """
    return _forward("fastbn.infer", x, gamma, beta, axis, eps, (mean, var), out)[0]


def moments(x: np.ndarray, *, axis: Axis = 1) -> Moments:
    """Count, mean and M2 of each channel over all other axes, by blocks (Chan, Golub & LeVeque 1983).

    `x` and `axis` are as in `forward`, and so are the errors. An empty x gives a count of 0.

    >>> import numpy as np, fastbn
    >>> fastbn.moments(np.float32([[1, 10], [3, 10]]))
    Moments(count=2, mean=[2, 10], var=[1, 0])
    """
    where = "fastbn.moments"
    check_array(where, "x", x)
    axes = check_axis(where, x, axis)
    channels = channels_of(x.shape, axes)
    table = np.empty((6, channels.number))
    _run_forward(x, None, axes, table, (None, None, None, None), 1.0)
    return _moments(x.shape, axes, table, x.dtype)


def _forward(
    where: str, x: np.ndarray, gamma: Any, beta: Any, axis: Axis, eps: float, frozen: Any, out: np.ndarray | None
) -> tuple[np.ndarray, Saved]:
    check_array(where, "x", x)
    axes = check_axis(where, x, axis)
    eps = check_eps(where, eps)
    channels = channels_of(x.shape, axes)
    gamma = None if gamma is None else check_real(where, "gamma", gamma, channels.shape)
    beta = None if beta is None else check_real(where, "beta", beta, channels.shape)
    mean, var = (None, None) if frozen is None else check_frozen(where, frozen, channels.shape)
    y = np.empty_like(x, subok=False) if out is None else check_out(where, "out", out, x.shape, x.dtype, {"x": x}, {})
    if frozen is None and channels.values == 1:
        _warn_of_one_value(x, axis)
    table = np.empty((6, channels.number))
    kept: np.ndarray | None = _run_forward(x, y, axes, table, (gamma, beta, mean, var), eps)
    if out is not None and same_memory(x, out):
        kept = None
    return y, Saved(kept, x, axes, table, frozen is not None)


def _warn_of_one_value(x: np.ndarray, axis: Axis) -> None:
    """Before anything is written, as the warning may be an error; named after the caller's line."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("fastbn."):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"fastbn.forward: one value per channel (x of shape {x.shape}, axis={axis}), so y is beta and dx is 0; "
        "train on more values, or pass frozen=(mean, var)",
        OneValueWarning,
        stacklevel=level,
    )


def _moments(shape: tuple[int, ...], axes: tuple[int, ...], table: np.ndarray, dtype: np.dtype[Any]) -> Moments:
    channels = channels_of(shape, axes)
    with np.errstate(all="ignore"):
        mean, m2 = table[0] + table[1], channels.values * table[2]
    return Moments.found(channels.values, mean.reshape(channels.shape), m2.reshape(channels.shape), _number_type(dtype))


def _number_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Of statistics and gradients: float64 for float64 data, float32 for all others, which are smaller."""
    return FLOAT64 if dtype.itemsize == 8 else FLOAT32


def _need(where: str, need: Any) -> tuple[bool, bool, bool]:
    if not isinstance(need, (tuple, list)) or len(need) != 3:
        raise TypeError(f"{where}: need is {describe(need)}; expected three bools, for dx, dgamma and dbeta")
    return bool(need[0]), bool(need[1]), bool(need[2])


def _three(where: str, out: Any) -> tuple[Any, Any, Any]:
    if not isinstance(out, (tuple, list)):
        return out, None, None
    if len(out) != 3:
        raise ValueError(f"{where}: out has {len(out)} entries; expected three: dx, dgamma and dbeta, or None for each")
    return out[0], out[1], out[2]


def _flat(given: np.ndarray | None, number: int, dtype: np.dtype[Any]) -> np.ndarray:
    """(C,) for kernels to write to: the array given for it, or a new one."""
    if given is None or not given.flags.c_contiguous:
        return np.empty(number, dtype)
    return given.reshape(-1)


def _shaped(values: np.ndarray | None, given: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """`values` (C,) in the channels' shape and in the array given for them, if there is one."""
    if values is None:
        return None
    if given is None:
        return values if len(shape) == 1 else values.reshape(shape)
    if not given.flags.c_contiguous:
        given[...] = values.reshape(shape)
    return given


def _elements(views: list[np.ndarray | None], backend: Kernels) -> list[Any]:
    """The views under the dtype in which the kernels take their elements."""
    first = views[0]
    assert first is not None
    wanted = backend.element_view(first.dtype)
    return views if wanted is first.dtype else [None if v is None else v.view(wanted) for v in views]


def _run_forward(
    x: np.ndarray, y: np.ndarray | None, axes: tuple[int, ...], table: np.ndarray, given: Given, eps: float
) -> np.ndarray:
    """Fills y and table; returns x as the kernels walked it, which `backward` will walk again."""
    if x.size == 0:
        table[...] = 0.0
        return x
    backend = kernels()
    views = Views(axes, [x], [y])
    read, written = _elements(views.views, backend)
    backend.forward(read, written, table, given, eps)
    views.finish()
    walked: np.ndarray = views.inputs[0]
    return walked


def _run_backward(
    dy: np.ndarray,
    x: np.ndarray,
    dx: np.ndarray | None,
    saved: Saved,
    dgamma: np.ndarray | None,
    dbeta: np.ndarray | None,
) -> None:
    """Fills dx, dgamma and dbeta, those that are wanted."""
    if dy.size == 0:
        for sums in (dgamma, dbeta):
            if sums is not None:
                sums[...] = 0.0
        return
    backend = kernels()
    views = Views(saved._axes, [x, dy], [dx])  # x first: results take its memory layout
    read_x, read_dy, written = _elements(views.views, backend)
    backend.backward(read_dy, read_x, written, saved._table, dgamma, dbeta, saved.frozen)
    views.finish()
