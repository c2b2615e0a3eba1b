"""Batch normalization on arrays: forward, backward, infer, moments. Here is all that makes it batch norm.

A call checks its arguments, sees its arrays as (outer, channels, inner), and hands them to the kernels
together with C-sized arrays: parameters, gradients, and a table (6, C) of what was found, from which moments are made.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any, TypeVar

import numpy as np

from .arguments import (
    Axis,
    check_array,
    check_axis,
    check_eps,
    check_frozen,
    check_out,
    check_place,
    check_real,
    describe,
    native,
    same_memory,
)
from .arrays import FLOAT32, FLOAT64, Span, family_of, family_of_values
from .dispatch import Kernels, kernels
from .layout import Views, channels_of, empty
from .moments import Moments

Array = TypeVar("Array")  # a NumPy or CuPy array, a PyTorch CUDA tensor, a Numba device array


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

    __slots__ = ("_axes", "_like", "_shape", "_strides", "_table", "_x", "dtype", "frozen")

    def __init__(self, walked: Any, x: Any, axes: tuple[int, ...], table: Any, frozen: bool) -> None:
        self._x = walked  # x, or the copy of it that the kernels could walk; None if overwritten
        self._like = None  # the Span of x, without its memory unless that is kept anyway
        self.dtype = x.dtype
        if isinstance(x, Span):
            self._like, self.dtype = x if x is walked else x.without_memory(), x.type
        self._shape = x.shape
        self._strides = x.strides
        self._axes = axes
        self._table = table  # (6, C): mean hi, mean lo, var, 1 / sqrt(var + eps), gamma, beta
        self.frozen = frozen

    @property
    def moments(self) -> Moments | None:
        """Moments of x (None if frozen), made when asked for: that takes as long as normalizing a small array."""
        return None if self.frozen else _moments(self._shape, self._axes, self._table, self.dtype.itemsize)

    def __repr__(self) -> str:
        return f"Saved({self.dtype} x of shape {self._shape}, channel axes {self._axes}, frozen={self.frozen})"


def forward(
    x: Array,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    frozen: Any = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Normalize each channel by its own mean and variance (training), or by given ones (evaluation).

    ``y = gamma (x - mean) / sqrt(var + eps) + beta``, with mean and biased variance over all axes but `axis`
    (Ioffe & Szegedy 2015, algorithm 1).

    Parameters
    ----------
    x : array, at least 2-D, of float16, bfloat16, float32 or float64
        NumPy's, or on a GPU: CuPy's, a PyTorch CUDA tensor (autograd does not see the call), a Numba device array.
        Results are of its kind and on its device; all other arrays must be so too, as nothing is copied from one place
        to another. Any strides. It is kept, not copied, for `backward`, except as `fastbn.layout.Views` says. float64
        values from 1e154 on have no float64 variance.
    gamma, beta : array of the channels' shape, optional
        Scale and shift; 1 and 0 if not given. On a GPU best contiguous, and float32 or float64: else it is converted.
    axis : int or tuple of int
        The channel axis, or all axes that statistics keep: (0, 1) of (N, C, H, W) is instance norm.
    eps : float
        Added to the variance, in its unit.
    frozen : (mean, var) or RunningStats, optional
        Normalize by these in place of x's own; they count as constants in `backward`. On a GPU a negative variance is
        not looked for, as that would wait for the device: y is NaN there.
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
    dy: Array,
    saved: Saved,
    *,
    need: tuple[bool, bool, bool] = (True, True, True),
    out: Any = None,
) -> tuple[Array | None, Array | None, Array | None]:
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
    like = saved._like
    given_dy = check_array(where, "dy", dy)
    check_place(where, "dy", dy, like)
    dtype = saved.dtype if like is None else like.dtype
    if given_dy.shape != saved._shape or (given_dy.dtype != dtype and native(given_dy.dtype) != native(dtype)):
        advice = (
            "Is it for another forward pass?" if given_dy.shape != saved._shape else "Convert it: dy.astype(y.dtype)"
        )
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
    numbers = _number_type(dtype.itemsize)
    dx = None
    if need_dx:
        if given_dx is not None:
            dx = check_out(where, "out (dx)", given_dx, saved._shape, dtype, given_dy, {"dy": given_dy, "x": x}, {})
        else:
            dx = empty(saved._shape, saved._strides, dtype) if like is None else like.family.like(like, like.strides)
    apart = {"dy": given_dy, "x": x, "dx": dx}
    if need_dgamma and given_dgamma is not None:
        given_dgamma = check_out(where, "out (dgamma)", given_dgamma, channels.shape, numbers, given_dy, {}, apart)
        apart["dgamma"] = given_dgamma
    if need_dbeta and given_dbeta is not None:
        given_dbeta = check_out(where, "out (dbeta)", given_dbeta, channels.shape, numbers, given_dy, {}, apart)
    dgamma = _flat(given_dgamma, channels.number, numbers, like) if need_dgamma else None
    dbeta = _flat(given_dbeta, channels.number, numbers, like) if need_dbeta else None
    _run_backward(where, given_dy, given_dy if x is None else x, dx, saved, dgamma, dbeta)
    if given_dx is not None and dx is not None and x is not None and same_memory(dx, x):
        saved._x = None
    dx = dx if like is None else _own(dx)
    return dx, _shaped(dgamma, given_dgamma, channels.shape), _shaped(dbeta, given_dbeta, channels.shape)


def infer(
    x: Array,
    mean: Any,
    var: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """Normalize by given statistics, keeping nothing: ``y = gamma (x - mean) / sqrt(var + eps) + beta``.

    `mean` and `var` are arrays of the channels' shape; a variance below 0 is a ValueError, on a GPU NaN. All
    else, errors included, is as in `forward` with `frozen=(mean, var)`.

    >>> import numpy as np, fastbn
    >>> fastbn.infer(np.float32([[7, 1], [5, 1]]), mean=[5, 0], var=[4, 1], eps=1e-8).tolist()
    [[1.0, 1.0], [0.0, 1.0]]
    """
    y: Array = _forward("fastbn.infer", x, gamma, beta, axis, eps, (mean, var), out)[0]
    return y


def moments(x: Any, *, axis: Axis = 1) -> Moments:
    """Count, mean and M2 of each channel over all other axes, by blocks (Chan, Golub & LeVeque 1983).

    `x` and `axis` are as in `forward`, and so are the errors. An empty x gives a count of 0.

    >>> import numpy as np, fastbn
    >>> fastbn.moments(np.float32([[1, 10], [3, 10]]))
    Moments(count=2, mean=[2, 10], var=[1, 0])
    """
    where = "fastbn.moments"
    x = check_array(where, "x", x)
    axes = check_axis(where, x, axis)
    table = _new((6, channels_of(x.shape, axes).number), FLOAT64, x)
    _run_forward(where, x, None, axes, table, (None, None, None, None), 1.0)
    return _moments(x.shape, axes, table, x.dtype.itemsize)


def _forward(
    where: str, x: Any, gamma: Any, beta: Any, axis: Axis, eps: float, frozen: Any, out: Any
) -> tuple[Any, Saved]:
    x = check_array(where, "x", x)
    axes = check_axis(where, x, axis)
    eps = check_eps(where, eps)
    channels = channels_of(x.shape, axes)
    gamma = None if gamma is None else check_real(where, "gamma", gamma, channels.shape, x)
    beta = None if beta is None else check_real(where, "beta", beta, channels.shape, x)
    mean, var = (None, None) if frozen is None else check_frozen(where, frozen, channels.shape, x)
    if out is not None:
        y = check_out(where, "out", out, x.shape, x.dtype, x, {"x": x}, {})
    else:
        y = x.family.like(x, x.strides) if isinstance(x, Span) else np.empty_like(x, subok=False)
    if frozen is None and channels.values == 1:
        _warn_of_one_value(x, axis)
    table = _new((6, channels.number), FLOAT64, x)
    kept = _run_forward(where, x, y, axes, table, (gamma, beta, mean, var), eps)
    if out is not None and same_memory(x, y):
        kept = None
    return _own(y), Saved(kept, x, axes, table, frozen is not None)


def _new(shape: tuple[int, ...], dtype: np.dtype[Any], x: Any) -> Any:
    """A contiguous array beside x."""
    return x.family.new(shape, dtype, x.device) if isinstance(x, Span) else np.empty(shape, dtype)


def _own(a: Any) -> Any:
    """The caller's own kind of array."""
    return a.value if isinstance(a, Span) else a


def _warn_of_one_value(x: Any, axis: Axis) -> None:
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


def _moments(shape: tuple[int, ...], axes: tuple[int, ...], table: Any, itemsize: int) -> Moments:
    channels = channels_of(shape, axes)
    numbers = family_of_values(table).numbers(table)
    with np.errstate(all="ignore"):
        mean, m2 = numbers[0] + numbers[1], channels.values * numbers[2]
    mean, m2 = mean.reshape(channels.shape), m2.reshape(channels.shape)
    return Moments.found(channels.values, mean, m2, _number_type(itemsize))


def _number_type(itemsize: int) -> np.dtype[Any]:
    """Of statistics and gradients: float64 for float64 data, float32 for all others, which are smaller."""
    return FLOAT64 if itemsize == 8 else FLOAT32


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


def _flat(given: Any, number: int, dtype: np.dtype[Any], like: Span | None) -> Any:
    """(C,) for kernels to write to: the array given for it, or a new one."""
    if given is None or not _dense(given):
        return np.empty(number, dtype) if like is None else _new((number,), dtype, like)
    return _own(given).reshape(-1)


def _shaped(values: Any, given: Any, shape: tuple[int, ...]) -> Any:
    """`values` (C,) in the channels' shape and in the array given for them, if there is one."""
    if values is None or (given is None and len(shape) == 1):
        return values
    if given is None:
        return values.reshape(shape)
    if not _dense(given):
        filled = values.reshape(shape)
        family_of(given).assign(given, given.family.locate(filled) if isinstance(given, Span) else filled)
    return _own(given)


def _dense(a: Any) -> bool:
    return bool(a.dense if isinstance(a, Span) else a.flags.c_contiguous)


def _elements(views: list[Any], backend: Kernels) -> list[Any]:
    """The views under the dtype in which the kernels take their elements."""
    wanted = backend.element_view(views[0].dtype)
    return views if wanted is views[0].dtype else [None if v is None else v.view(wanted) for v in views]


def _run_forward(
    where: str, x: Any, y: Any, axes: tuple[int, ...], table: Any, given: tuple[Any, ...], eps: float
) -> Any:
    """Fills y and table; returns x as the kernels walked it, which `backward` will walk again."""
    backend = kernels(where, x)
    if x.size == 0:
        family_of_values(table).clear(table)
        return x
    views = Views(axes, [x], [y])
    read, written = _elements(views.views, backend)
    backend.forward(read, written, table, given, eps)
    views.finish()
    return views.inputs[0]


def _run_backward(where: str, dy: Any, x: Any, dx: Any, saved: Saved, dgamma: Any, dbeta: Any) -> None:
    """Fills dx, dgamma and dbeta, those that are wanted."""
    backend = kernels(where, dy)
    if dy.size == 0:
        for sums in (dgamma, dbeta):
            if sums is not None:
                family_of_values(sums).clear(sums)
        return
    views = Views(saved._axes, [x, dy], [dx])  # x first: results take its memory layout
    read_x, read_dy, written = _elements(views.views, backend)
    backend.backward(read_dy, read_x, written, saved._table, dgamma, dbeta, saved.frozen)
    views.finish()
