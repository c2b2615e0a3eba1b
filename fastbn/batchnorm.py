"""Batch normalization on arrays: forward, backward, infer, moments. Here is all that makes it batch norm.

A call checks its arguments, sees its arrays as (outer, channels, inner), and hands them to the kernels
together with C-sized arrays: parameters, gradients, and a table (6, C) of what was found, from which moments are made.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from .arguments import (
    Axis,
    check_array,
    check_axis,
    check_caller,
    check_eps,
    check_frozen,
    check_out,
    check_place,
    check_real,
    describe,
    dtype_of,
    native,
    same_memory,
)
from .arrays import FLOAT32, FLOAT64, NUMBA, Span, family_of_values
from .distributed import ALONE, Ranks, Shared, ranks_of, rows_of, statistics
from .extras import Asked, ask, asked_alone
from .host import caller_of
from .kept import lost_channels
from .layout import channels_of, dense_copy
from .moments import Moments
from .plain import (
    backward_on_device,
    backward_plainly,
    forward_on_device,
    forward_plainly,
    infer_plainly,
    moments_plainly,
    way_of,
)
from .runs import (
    flat,
    new,
    own,
    placed,
    run_backward,
    run_backward_shared,
    run_backward_with,
    run_forward,
    run_forward_shared,
    shaped,
)
from .saved import Saved, moments_of, number_type
from .units import in_whole_numbers, is_unitless, units_of

_ALL = True, True, True  # of dx, dgamma and dbeta

Array = TypeVar("Array")  # a NumPy, JAX or CuPy array, a PyTorch tensor, a Numba device array, others with DLPack


class OneValueWarning(UserWarning):
    """Training on one value per channel: its deviation from its own mean is 0, so y is beta and dx is 0.

    >>> import warnings, numpy as np, fastbn
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", fastbn.OneValueWarning)
    ...     y, saved = fastbn.forward(np.float32([[7, 8]]), beta=[1, 2])
    >>> y.tolist()
    [[1.0, 2.0]]
    """


def forward(
    x: Array,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    frozen: Any = None,
    out: Array | None = None,
    weights: Any = None,
    masked: str = "normalize",
    groups: Any = None,
    residual: Array | None = None,
    activation: Any = None,
    save: str = "x",
    scale: float = 1.0,
    zero_point: float = 0.0,
    comm: Any = None,
) -> tuple[Array, Saved]:
    """Normalize each channel by its own mean and variance (training), or by given ones (evaluation).

    ``y = gamma (x - mean) / sqrt(var + eps) + beta``, with mean and biased variance over all axes but `axis`
    (Ioffe & Szegedy 2015, algorithm 1).

    Parameters
    ----------
    x : array, at least 2-D, of float16, bfloat16, float32 or float64
        NumPy's or another library's in main memory: a PyTorch tensor, a JAX array, or whatever has `__dlpack__` or
        `__array_interface__`, read where it lies; its channels' numbers may be NumPy's, and moments are. Or on a GPU:
        CuPy's, a PyTorch CUDA tensor, a Numba device array. Autograd does not see the call: `fastbn.torch` and
        `fastbn.jax` are for it.
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
        x can be had from `saved`, unless `save` is "y". It may be the residual; with an activation there are no
        gradients then.
    weights : bools or numbers of 0 or more, optional
        How much each position counts in mean and variance: ``mean = sum w x / sum w``, and so on. Of x's shape with 1
        (or nothing) for the channels, or 1 where it is the same for all; (N,) is one for each sample. True and False
        are a mask: x is normalized as if the positions with 0 were not there, whatever they hold. The largest must be
        1e-30 to 1e30, so that squares by weight stay in range. On a GPU they are an array beside x, copied once, and
        wrong numbers are not looked for, as that would wait for the device: results are meaningless there.
        `saved.moments` waits for the device then, as its count is the sum of weights.
    masked : "normalize", "zero" or "keep"
        What y holds where the weight is 0: what it would hold elsewhere, 0, or x. Where all weights are 0, there are no
        statistics, and what is normalized is beta.
    groups : int, list of int, or array of int, optional
        Samples with statistics of their own: so many groups of equal size (the first ones have one more if need be),
        groups of these sizes, or the group of each sample. A sample is an index of the first axis that is no channel
        axis. Then `frozen` has statistics of shape (groups, channels), and `saved.moments` is a list.
    residual : array of y's shape and dtype, optional
        Added before the activation.
    activation : str, or (str, float), optional
        What is done to y in the same pass: "relu", "leaky_relu" (slope, 0.01), "relu6", "elu" (scale, 1), "silu",
        "gelu" (by erf), "sigmoid", "tanh" or "hardswish"; in brackets the parameter of those that have one.
    save : "x" or "y"
        What is kept for `backward`. With "y", x may be overwritten by `out=x`, as x is had back from y: without an
        activation or with one that can be inverted (leaky_relu, elu). x is kept for channels whose gamma is below
        beta / 64 or makes y subnormal, and of those that elu brings near its limit four standard deviations below the
        mean; further off, y of elu may tell little of x. To know the channels, gamma and beta on a GPU are copied from
        there, for which the device is waited for.
    scale, zero_point : float
        x may be of whole numbers q (uint8, int8, uint16, int16), which stand for ``scale (q - zero_point)``, with a
        scale above 0. y is float32 then, and x isn't copied. `masked="keep"` takes no units. On a GPU these calls go by
        the backend "numba-cuda", whose package must be installed; for a Numba device array with `frozen` statistics
        and units, mean and var are copied to main memory and back, for which the device is waited for.
    comm : communicator or fastbn.Ranks, optional
        x is this rank's part of a batch that is spread over processes, and mean and variance are those of the whole of
        it: what kinds there are, and how long to wait for other ranks, is in `fastbn.Ranks`. All ranks must make the
        call, with as many channels, one dtype and one eps; their numbers of samples may differ, and be 0. Then
        `saved.moments` are the whole batch's, and `backward` is a collective too. Not with groups; with `frozen`
        statistics nothing is sent.

    Returns
    -------
    y : array of x's shape, dtype and memory layout
    saved : Saved
        For `backward`; `saved.moments` for `RunningStats.update`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        Before anything is written.
    RanksError
        With `comm`, on all ranks: if they don't agree, if one raised another error, or if one doesn't answer.

    Warns
    -----
    OneValueWarning
        If each channel has a single value to train on (on all ranks together).

    >>> import numpy as np, fastbn
    >>> x = np.float32([[1, 1e6], [3, 1e6 + 4]])
    >>> y, saved = fastbn.forward(x, gamma=[1, 2], beta=[0, 1])
    >>> y.round(3).tolist()
    [[-1.0, -1.0], [1.0, 3.0]]
    >>> saved.moments.mean.tolist()
    [2.0, 1000002.0]
    """
    more = None
    if not (weights is groups is residual is activation is None and masked == "normalize" and save == "x"):
        more = (weights, masked, groups, residual, activation, save)
    if comm is None:
        return _forward("fastbn.forward", x, gamma, beta, axis, eps, frozen, out, more, scale, zero_point)
    ranks = ranks_of("fastbn.forward", comm)
    with contextlib.nullcontext() if frozen is not None else ranks.joined("fastbn.forward"):
        return _forward("fastbn.forward", x, gamma, beta, axis, eps, frozen, out, more, scale, zero_point, ranks)


def backward(
    dy: Array,
    saved: Saved,
    *,
    need: Sequence[bool] = _ALL,
    out: Any = None,
    reduce_params: bool = False,
) -> tuple[Any, ...]:
    """The gradients of a loss with respect to x, gamma and beta, from that with respect to y.

    With xhat = (x - mean) / std and std = sqrt(var + eps), over all values of a channel (Ioffe & Szegedy 2015,
    section 3):

    ``dbeta = sum dy``, ``dgamma = sum dy xhat``, and in training
    ``dx = gamma / std (dy - mean(dy) - xhat mean(dy xhat))``; with frozen statistics ``dx = gamma / std dy``.

    With an activation, dy is first multiplied by its slope, which is computed from x again: nothing else was kept. The
    product is the gradient of a residual. With weights w, of sum W, the true gradient of what `forward` computed is
    ``dx = gamma / std (dy - w (sum dy + xhat sum dy xhat) / W)``.

    Parameters
    ----------
    dy : array of y's shape and dtype
        Any strides.
    saved : Saved
        From `forward`; it may be used again.
    need : three bools (four with a residual)
        Which of dx, dgamma and dbeta to compute. The others are None.
    out : array, or (dx, dgamma, dbeta) with None where there is none, optional
        Where results go; dx may go to dy, or to x, of which nothing is left for another `backward` then.
    reduce_params : bool
        If forward had `comm`: whether dgamma and dbeta are the sums over all ranks, the same bits on each, or (False)
        those of this rank's dy, to be summed or averaged with the gradients of all other parameters of the net. dx is
        that of the whole batch in either case; where a loss is averaged over ranks, so is all that follows from it.
        All ranks must ask for the same (in `need` too).

    Returns
    -------
    dx : array of x's shape, dtype and memory layout
    dgamma, dbeta : float32 arrays of the channels' shape (float64 for float64 x)
    dresidual : array like dx, if forward had a residual

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
    if saved._shared is None:
        return _backward(where, dy, saved, need, out, False)
    with saved._shared.ranks.joined(where):
        return _backward(where, dy, saved, need, out, reduce_params)


def _backward(where: str, dy: Any, saved: Saved, need: Any, out: Any, reduce_params: bool) -> tuple[Any, ...]:
    way, x = saved._way, saved._x
    if way is not None and isinstance(x, Span) and need is _ALL:
        if (made := backward_on_device(where, way, dy, x, saved._table, out)) is not None:
            return made
    elif way is not None and x is not None and type(dy) is np.ndarray and need is _ALL:
        alike = dy.shape == saved._shape and dy.dtype is saved.dtype and dy.strides in (saved._strides, way.strides)
        if alike and dy.flags.aligned and (into := way.places(dy, x, out)) is not None:
            backward_plainly(where, way, dy, x, into, saved._table, saved.frozen, saved._asked, saved._lost)
            return tuple(into)
    like = saved._like
    given_dy = check_array(where, "dy", dy)
    check_place(where, "dy", dy, like)
    caller = saved._caller
    check_caller(where, "dy", dy, caller)
    whole = saved._units is not None
    dtype = FLOAT32 if whole else saved.dtype if like is None else like.dtype
    if given_dy.shape != saved._shape or (given_dy.dtype != dtype and native(given_dy.dtype) != native(dtype)):
        advice = (
            "Is it for another forward pass?" if given_dy.shape != saved._shape else "Convert it: dy.astype(y.dtype)"
        )
        kind = dtype if like is None or whole else saved.dtype
        raise ValueError(f"{where}: dy is a {describe(dy)}; expected {kind} of shape {saved._shape}, like y. {advice}")
    asked = saved._asked
    results = 4 if asked is not None and asked.residual is not None else 3
    need_dx, need_dgamma, need_dbeta, need_dr = _need(where, need, results)
    given_dx, given_dgamma, given_dbeta, given_dr = places = _places(where, out, results)
    frozen = saved.frozen
    if need_dx and saved._units is not None:
        raise ValueError(
            f"{where}: dx of whole numbers ({saved.dtype}) is asked for; they have no gradient. "
            "Pass need=(False, True, True)"
        )
    sloped = asked is not None and asked.activation != ""
    if x is None and (need_dgamma or (need_dx and not frozen) or sloped):
        raise ValueError(
            f"{where}: saved has no x, which `out` overwrote; expected x for dgamma, and for dx in training or "
            "with an activation. Give forward an `out` of its own, or backward need=(False, False, True)"
        )
    if saved._overwritten:
        raise ValueError(
            f"{where}: saved has no residual, which `out` overwrote; expected it, as the activation's slopes "
            "depend on it. Give forward and backward an `out` of its own"
        )
    channels = channels_of(saved._shape, saved._axes)
    numbers = number_type(dtype.itemsize)
    dx = dr = None
    residual = _residual_of(asked)

    def large(name: str, given: Any, apart: dict[str, Any]) -> Any:
        may_be = {"dy": given_dy, "residual": residual} | ({"x": x} if name == "dx" else {})
        return placed(where, f"out ({name})", given, saved, dtype, given_dy, may_be, apart, caller)

    if need_dx:
        dx = large("dx", given_dx, {})
    if need_dr:
        dr = large("dresidual", given_dr, {"x": x, "dx": dx})
    apart = {"dy": given_dy, "x": x, "dx": dx, "dresidual": dr, "residual": residual}
    if need_dgamma and given_dgamma is not None:
        given_dgamma = check_out(
            where, "out (dgamma)", given_dgamma, channels.shape, numbers, given_dy, {}, apart, caller
        )
        apart["dgamma"] = given_dgamma
    if need_dbeta and given_dbeta is not None:
        given_dbeta = check_out(where, "out (dbeta)", given_dbeta, channels.shape, numbers, given_dy, {}, apart, caller)
    dgamma = flat(given_dgamma, channels.number, numbers, like) if need_dgamma else None
    dbeta = flat(given_dbeta, channels.number, numbers, like) if need_dbeta else None
    read = given_dy if x is None else x
    if saved._shared is not None:
        run_backward_shared(where, given_dy, read, dx, dr, saved, dgamma, dbeta, reduce_params)
    elif asked is None:
        run_backward(where, given_dy, read, dx, saved, dgamma, dbeta, frozen)
    else:
        run_backward_with(where, given_dy, read, dx, dr, saved, dgamma, dbeta)
    if given_dx is not None and dx is not None and x is not None and same_memory(dx, x):
        saved._x = None
    if residual is not None:
        saved._overwritten = any(a is not None and same_memory(a, residual) for a in (dx, dr))
    if like is not None:
        dx, dr = own(dx), own(dr)
    found: tuple[Any, ...] = (
        dx,
        shaped(dgamma, given_dgamma, channels.shape),
        shaped(dbeta, given_dbeta, channels.shape),
    )
    found = found if results == 3 else (*found, dr)
    return found if caller is None else tuple(map(caller.result, found, places))


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
    weights: Any = None,
    masked: str = "normalize",
    groups: Any = None,
    residual: Array | None = None,
    activation: Any = None,
    scale: float = 1.0,
    zero_point: float = 0.0,
) -> Array:
    """Normalize by given statistics, keeping nothing: ``y = gamma (x - mean) / sqrt(var + eps) + beta``.

    `mean` and `var` are arrays of the channels' shape; a variance below 0 is a ValueError, on a GPU NaN. All
    else, errors included, is as in `forward` with `frozen=(mean, var)`.

    >>> import numpy as np, fastbn
    >>> fastbn.infer(np.float32([[7, 1], [5, 1]]), mean=[5, 0], var=[4, 1], eps=1e-8).tolist()
    [[1.0, 1.0], [0.0, 1.0]]
    """
    where, more = "fastbn.infer", None
    if not (weights is groups is residual is activation is None and masked == "normalize"):
        more = (weights, masked, groups, residual, activation, "x")
    y: Array | None = None
    if _is_bare(more) and type(x) is np.ndarray and type(axis) is int and is_unitless(scale, zero_point):
        asked = None if more is None else asked_alone(where, activation)
        y = infer_plainly(where, x, mean, var, gamma, beta, axis, eps, out, asked and asked.bare())
    if y is None:
        y = _forward(where, x, gamma, beta, axis, eps, (mean, var), out, more, scale, zero_point)[0]
    return y


def moments(x: Any, *, axis: Axis = 1, weights: Any = None, scale: float = 1.0, zero_point: float = 0.0) -> Moments:
    """Count, mean and M2 of each channel over all other axes, by blocks (Chan, Golub & LeVeque 1983).

    `x`, `axis` and the rest are as in `forward`, and so are the errors. An empty x gives a count of 0; with weights,
    the count is their sum, for which a GPU is waited for.

    >>> import numpy as np, fastbn
    >>> fastbn.moments(np.float32([[1, 10], [3, 10]]))
    Moments(count=2, mean=[2, 10], var=[1, 0])
    """
    where = "fastbn.moments"
    if type(x) is np.ndarray and type(axis) is int and weights is None and is_unitless(scale, zero_point):
        way = way_of(x.shape, x.strides, x.dtype, axis)
        if way is not None and x.flags.aligned:
            return moments_plainly(where, way, x)
    x = check_array(where, "x", x, whole=True)
    axes = check_axis(where, x, axis)
    table = new((6, channels_of(x.shape, axes).number), FLOAT64, x)
    asked = None if weights is None else ask(where, x, axes, x.dtype, weights)
    units = units_of(where, x, scale, zero_point)
    masses = run_forward(where, x, None, axes, table, (None, None, None, None), 1.0, asked)[0]
    found: Moments = moments_of(x.shape, axes, table, x.dtype, asked, masses, units)
    return found


def normalize(
    x: Array,
    moments: Moments,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    comm: Any = None,
) -> tuple[Array, Saved]:
    """The second half of `forward`: normalize x by moments that were made before, in training.

    ``forward(x, comm=comm)`` is ``normalize(x, moments(x).allreduce(comm), comm=comm)``. In parts, there is time for
    other work while the ranks' moments travel:

    >>> import numpy as np, fastbn
    >>> class Mirror:  # stands for two ranks with the same data
    ...     def allgather(self, data):
    ...         return data, data
    >>> comm, x = Mirror(), np.float32([[1, 10], [3, 10]])
    >>> pending = fastbn.moments(x).allreduce(comm, wait=False)
    >>> other_work = x @ x.T  # such as the branch beside this one
    >>> y, saved = fastbn.normalize(x, pending.wait(), comm=comm)
    >>> y.round(3).tolist(), saved.moments.count
    ([[-1.0, 0.0], [1.0, 0.0]], 4)

    `moments` are those of the whole batch, of which x is a part; `comm` is who has the rest of it, for `backward`. The
    arguments, results and errors are otherwise those of `forward`.
    """
    where = "fastbn.normalize"
    if not isinstance(moments, Moments):
        raise TypeError(
            f"{where}: moments is {describe(moments)}; expected those of the batch, as of fastbn.moments(x)"
        )
    checked = check_array(where, "x", x)
    x_shape = channels_of(checked.shape, check_axis(where, checked, axis)).shape
    if moments.shape != x_shape:
        raise ValueError(
            f"{where}: moments has channels of shape {moments.shape}; expected {x_shape}. Is axis the same?"
        )
    if moments.count == 0 and checked.size:
        raise ValueError(f"{where}: moments has a count of 0, and x {checked.size} values; expected those of the batch")
    ranks = ranks_of(where, ALONE if comm is None else comm)
    return _forward(where, x, gamma, beta, axis, eps, None, out, None, 1.0, 0.0, ranks, moments)


def _forward(
    where: str, x: Any, gamma: Any, beta: Any, axis: Axis, eps: float, frozen: Any, out: Any,
    more: tuple[Any, ...] | None, scale: float, zero_point: float, ranks: Ranks | None = None,
    known: Moments | None = None,
) -> tuple[Any, Saved]:  # fmt: skip
    plain = _is_bare(more) and ranks is None and is_unitless(scale, zero_point)
    if plain and type(x) is np.ndarray and type(axis) is int:  # nearly always
        way = way_of(x.shape, x.strides, x.dtype, axis)
        if way is not None and x.flags.aligned:
            like_x = np.empty_like(x) if out is None else out
            asked = None if more is None else asked_alone(where, *more[4:])
            saves_y = asked is not None and asked.save == "y"
            over = () if saves_y and out is x else (x,)  # what y must have a memory apart from
            if like_x.strides == way.strides if out is None else way.takes(out, x, *over):
                made = forward_plainly(where, way, x, like_x, gamma, beta, eps, frozen, asked)
                if made is not None:
                    table, asked, few = made
                    saved = Saved(like_x if saves_y else x, x, way.axes, table, frozen is not None, asked, None, few)
                    saved._way = way
                    return like_x, saved
    elif plain and more is None and type(axis) is int and frozen is None:
        there = forward_on_device(where, x, gamma, beta, axis, eps, out)
        if there is not None:
            way, read, written, table = there
            saved = Saved(read, read, way.axes, table, False)
            saved._way = way
            return written.value, saved
    caller = None if type(x) is np.ndarray else caller_of(x)
    x = check_array(where, "x", x, whole=True)
    axes = check_axis(where, x, axis)
    eps = check_eps(where, eps)
    channels = channels_of(x.shape, axes)
    gamma = None if gamma is None else check_real(where, "gamma", gamma, channels.shape, x)
    beta = None if beta is None else check_real(where, "beta", beta, channels.shape, x)
    units = units_of(where, x, scale, zero_point)
    result = x.dtype if units is None else FLOAT32
    asked = None if more is None else ask(where, x, axes, result, *more)
    if units not in (None, (1.0, 0.0)) and asked is not None and asked.masked == "keep":
        raise ValueError(
            f"{where}: masked='keep' with a scale or a zero_point; expected 'normalize' or 'zero', as the whole "
            "numbers themselves would be kept"
        )
    mean = var = None
    if frozen is not None:
        shape = channels.shape if asked is None or asked.groups is None else (asked.sets, *channels.shape)
        mean, var = check_frozen(where, frozen, shape, x)
    if out is not None:
        y = check_out(where, "out", out, x.shape, result, x, {"x": x}, {}, caller)
        if asked is not None and asked.residual is not None:
            check_out(where, "out", out, x.shape, result, x, {"residual": asked.residual}, {}, caller)
    elif caller is not None:
        y = caller.empty(x.shape, x.strides, result)
    else:
        y = x.result() if isinstance(x, Span) else np.empty_like(x, dtype=result, subok=False)
    if frozen is None and ranks is None and channels.values == 1:
        _warn_of_one_value(x, axis)
    table = new((6, channels.number * (1 if asked is None else asked.sets)), FLOAT64, x)
    whole = None
    if (
        asked is not None
        and asked.save == "y"
        and len(at := lost_channels(where, channels.number, gamma, beta, result, asked))
    ):
        if len(at) == channels.number or units is not None:  # gamma begins at 0; whole numbers are smaller than y
            whole, asked = dense_copy(x, x), asked._replace(save="x")
        else:
            asked = asked._replace(lost=at)
    if units is not None:
        mean, var, eps = in_whole_numbers(mean, var, eps, units)
    if ranks is None or frozen is not None:
        shared = None
        masses, kept, lost = run_forward(where, x, y, axes, table, (gamma, beta, mean, var), eps, asked)
    else:
        lost = None
        found = _shared_statistics(where, x, axes, table, eps, asked, units, ranks, axis, known)
        shared, masses, kept = run_forward_shared(where, x, y, axes, table, (gamma, beta), eps, asked, *found)
    if whole is not None:
        kept = whole
    elif asked is not None and asked.save == "y":
        kept = y
    elif out is not None and same_memory(x, y):
        kept = None
    residual = _residual_of(asked)
    overwritten = residual is not None and out is not None and same_memory(residual, y)
    y = own(y, caller, out)
    saved = Saved(kept, x, axes, table, frozen is not None, asked, masses, lost, units, caller)
    saved._shared, saved._overwritten = shared, overwritten
    return y, saved


def _is_bare(more: tuple[Any, ...] | None) -> bool:
    """Whether an activation at most is asked for, and what is kept."""
    if more is None:
        return True
    weights, masked, groups, residual, _, save = more
    return bool(weights is groups is residual is None and masked == "normalize" and type(save) is str)


def _residual_of(asked: Asked | None) -> Any:
    """Where gradients depend on it, else None."""
    return None if asked is None or asked.activation == "" else asked.residual


def _shared_statistics(
    where: str, x: Any, axes: tuple[int, ...], table: Any, eps: float, asked: Asked | None,
    units: tuple[float, float] | None, ranks: Ranks, axis: Axis, known: Moments | None,
) -> tuple[Shared, np.ndarray]:  # fmt: skip
    """Mean hi, mean lo and variance (3, C) of the whole batch, from this rank's sums and one message."""
    channels = channels_of(x.shape, axes)
    if isinstance(x, Span) and x.family is NUMBA:
        raise TypeError(f"{where}: x is a {x}, which can't be computed with across ranks. Pass cupy.asarray(x)")
    if asked is not None and asked.groups is not None:
        raise ValueError(f"{where}: groups and comm are both given; expected one. Groups are each rank's own")
    if asked is not None and asked.save == "y":
        raise ValueError(f"{where}: save='y' and comm are both given; expected save='x', from which gradients are made")
    if known is not None:
        rows = rows_of(known)
        rows[2] /= known.count or 1
        shared = Shared(ranks, ranks.calls, known.count, eps)
    else:
        plain = None if asked is None or asked.weights is None else asked.plain()
        masses = run_forward(where, x, None, axes, table, (None, None, None, None), eps, plain)[0]
        host = family_of_values(table).host
        count = float(channels.values if masses is None else host(masses)[0])
        shared, rows = statistics(where, ranks, host(table), count, dtype_of(x), eps, units)
    if shared.values == 1:
        _warn_of_one_value(x, axis)
    return shared, rows


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


def _need(where: str, need: Any, results: int) -> tuple[bool, bool, bool, bool]:
    if not isinstance(need, (tuple, list)) or len(need) not in (3, results):
        named = "dx, dgamma and dbeta" if results == 3 else "dx, dgamma and dbeta (and dresidual)"
        raise TypeError(f"{where}: need is {describe(need)}; expected three bools, for {named}")
    rest = results == 4 and (bool(need[3]) if len(need) == 4 else True)
    return bool(need[0]), bool(need[1]), bool(need[2]), rest


def _places(where: str, out: Any, results: int) -> tuple[Any, Any, Any, Any]:
    if not isinstance(out, (tuple, list)):
        return out, None, None, None
    if len(out) not in (3, results):
        raise ValueError(f"{where}: out has {len(out)} entries; expected three: dx, dgamma and dbeta, or None for each")
    return out[0], out[1], out[2], out[3] if len(out) == 4 else None
