"""A batch norm of known statistics as a scale and a shift, and folded into the layer before or behind it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .arguments import check_array, check_channels, check_eps, check_variances, describe, integer
from .host import check_host

_KINDS = "linear", "conv", "conv_transpose"


def affine(
    mean: Any, var: Any, gamma: Any = None, beta: Any = None, eps: float = 1e-5
) -> tuple[np.ndarray, np.ndarray]:
    """Evaluation as one multiplication and one addition.

    ``scale = gamma / sqrt(var + eps)``, ``shift = beta - mean scale``, and ``y = scale x + shift`` is what
    `fastbn.infer` gives, up to rounding: with a mean of many deviations, scale x and shift are large and nearly cancel,
    which costs |mean| / std eps of x's dtype in y. `infer` avoids that.

    Parameters
    ----------
    mean, var, gamma, beta : arrays of the channels' shape, in main memory
        gamma None is 1, beta None is 0. `*running.exact()` gives mean and var of RunningStats.
    eps : float

    Returns
    -------
    scale, shift : arrays of the channels' shape
        Computed in float64; float32 if all that was given is float32 or narrower, else float64.

    Raises
    ------
    TypeError, ValueError
        For shapes that differ, numbers that aren't real, a negative variance, eps not above 0.

    >>> import fastbn
    >>> scale, shift = fastbn.affine(mean=[5, 0], var=[4, 1], gamma=[1, 3], beta=[0, 1], eps=1e-12)
    >>> scale.round(6).tolist(), shift.round(6).tolist()
    ([0.5, 3.0], [-2.5, 1.0])
    """
    where, shape, given = "fastbn.affine", np.shape(mean), (mean, var, gamma, beta)
    mean, _, scale, beta = _statistics(where, shape, *given, eps)
    dtypes = [np.asarray(check_host(where, "", a)).dtype for a in given if a is not None]
    single = all(d.itemsize <= 4 and d.kind not in "iub" for d in dtypes)
    dtype = np.float32 if single else np.float64
    with np.errstate(over="ignore"):
        return scale.reshape(shape).astype(dtype), (beta - mean * scale).reshape(shape).astype(dtype)


def fold(
    weight: np.ndarray,
    bias: Any,
    mean: Any,
    var: Any,
    gamma: Any,
    beta: Any,
    eps: float,
    *,
    kind: str = "linear",
    groups: int = 1,
    order: str = "after",
    padding: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of one layer that does what a linear layer or convolution and a batch norm do in evaluation.

    With ``scale = gamma / sqrt(var + eps)``, for a batch norm that comes "after" the layer, over its outputs o, or
    "before" it, over its inputs i (k runs over a convolution's window):

    ``after:  W'[o, i, k] = scale[o] W[o, i, k],  b'[o] = scale[o] (b[o] - mean[o]) + beta[o]``

    ``before: W'[o, i, k] = scale[i] W[o, i, k],  b'[o] = b[o] + sum over i, k of W[o, i, k] (beta - mean scale)[i]``

    Parameters
    ----------
    weight : array of float16, bfloat16, float32 or float64
        In PyTorch's layouts: (out, in) of "linear", (out, in / groups, *window) of "conv", and
        (in, out / groups, *window) of "conv_transpose". Windows of any number of axes.
    bias : array (out,), or None for 0
    mean, var, gamma, beta : arrays of (out,) channels, or (in,) if order="before"
        gamma None is 1, beta None is 0. `*running.exact()` gives mean and var of RunningStats.
    eps : float
    kind : "linear", "conv" or "conv_transpose"
    groups : int
        Of a convolution.
    order : "after" or "before"
        Where the batch norm is. "before" is for linear layers, and for convolutions without padding.
    padding : int, tuple of ints, "valid" or "same", needed for a convolution with order="before"
        What the convolution pads its input with on each side. A batch norm can't go behind its padding: the layer's
        border is 0, where the batch norm's output is not, so that one bias would be wrong at the border. (With "same"
        only a window of 1 pads nothing.) By the same reason it can't go into a transposed convolution, whose outputs
        get from one to all of the window's values, by their place.

    Returns
    -------
    weight, bias : new arrays of the weight's dtype
        Computed in float64, rounded once.

    Raises
    ------
    ValueError
        For shapes that don't fit, and where no folding is right (see `padding`).
    TypeError
        For arrays that aren't NumPy's, or not real numbers.

    >>> import numpy as np, fastbn
    >>> weight, bias = np.float32([[1, 2], [3, 4]]), np.float32([1, 1])
    >>> fastbn.fold(weight, bias, mean=[1, 5], var=[4, 1], gamma=[1, 2], beta=[0, 3], eps=1e-12)
    (array([[0.5, 1. ], [6. , 8. ]], dtype=float32), array([ 0., -5.], dtype=float32))
    """
    where = "fastbn.fold"
    weight = check_array(where, "weight", weight)
    if not isinstance(weight, np.ndarray):
        raise TypeError(f"{where}: weight is a {describe(weight)}; expected a NumPy array. Copy it to main memory")
    for name, value, known in (("kind", kind, _KINDS), ("order", order, ("after", "before"))):
        if value not in known:
            raise ValueError(f"{where}: {name} is {describe(value)}; expected one of {', '.join(map(repr, known))}")
    if kind == "linear" and weight.ndim != 2:
        raise ValueError(f"{where}: weight has shape {weight.shape}; expected (out, in) for kind='linear'")
    if kind != "linear" and weight.ndim < 3:
        first = "(out, in / groups, *window)" if kind == "conv" else "(in, out / groups, *window)"
        raise ValueError(f"{where}: weight has shape {weight.shape}; expected {first} for kind={kind!r}")
    parts = integer(groups, 1)
    if parts is None or (kind == "linear" and parts != 1):
        raise ValueError(f"{where}: groups is {describe(groups)}; expected 1 or more, and 1 for kind='linear'")
    if weight.shape[0] % parts:
        raise ValueError(f"{where}: weight has shape {weight.shape}, whose first axis {parts} groups don't divide")
    if order == "before":
        _check_before(where, kind, weight.shape[2:], padding)
    # (groups, out / groups, in / groups, window): every layout is a view of this one.
    first, second, window = weight.shape[0] // parts, weight.shape[1], math.prod(weight.shape[2:])
    grouped = weight.astype(np.float64).reshape(parts, first, second, window)
    if kind == "conv_transpose":
        grouped = grouped.swapaxes(1, 2)
    outputs, inputs = parts * grouped.shape[1], parts * grouped.shape[2]
    b = np.zeros(outputs) if bias is None else check_channels(where, "bias", bias, (outputs,))
    channels = outputs if order == "after" else inputs
    mean, _, scale, beta = _statistics(where, (channels,), mean, var, gamma, beta, eps)
    if order == "after":
        folded = grouped * scale.reshape(parts, -1, 1, 1)
        b = (b - mean) * scale + beta
    else:
        folded = grouped * scale.reshape(parts, 1, -1, 1)
        shift = (beta - mean * scale).reshape(parts, -1, 1)
        b = b + (grouped.sum(3) @ shift).reshape(-1)
    if kind == "conv_transpose":
        folded = folded.swapaxes(1, 2)
    with np.errstate(over="ignore"):  # a half type may not hold it: Inf says so
        return folded.reshape(weight.shape).astype(weight.dtype), b.astype(weight.dtype)


def _statistics(
    where: str, shape: tuple[int, ...], mean: Any, var: Any, gamma: Any, beta: Any, eps: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, var, scale and beta, in float64 (C,), checked."""
    mean = check_channels(where, "mean", mean, shape)
    var = check_variances(where, var, shape)
    scale = np.ones(mean.size) if gamma is None else check_channels(where, "gamma", gamma, shape)
    beta = np.zeros(mean.size) if beta is None else check_channels(where, "beta", beta, shape)
    return mean, var, scale / np.sqrt(var + check_eps(where, eps)), beta


def _check_before(where: str, kind: str, window: tuple[int, ...], padding: Any) -> None:
    if kind == "linear":
        return
    if kind == "conv_transpose":
        raise ValueError(
            f"{where}: kind='conv_transpose' with order='before' can't be folded: how many of the window's values "
            "reach an output depends on its place, so no one bias is right for all. Keep the batch norm as it is"
        )
    if padding is None:
        raise ValueError(
            f"{where}: padding is missing; expected the convolution's own with order='before', as only one that pads "
            "nothing can be folded. Pass padding=0 if it has none"
        )
    if isinstance(padding, str):
        if padding not in ("valid", "same"):
            raise ValueError(f"{where}: padding is {padding!r}; expected numbers, 'valid' or 'same'")
        sizes: tuple[Any, ...] = (0,) if padding == "valid" else tuple(n - 1 for n in window)
    else:
        sizes = tuple(padding) if isinstance(padding, (tuple, list)) else (padding,)
    if any(integer(n, 0) is None for n in sizes):
        raise ValueError(f"{where}: padding is {describe(padding)}; expected numbers from 0, 'valid' or 'same'")
    if any(sizes):
        raise ValueError(
            f"{where}: padding is {describe(padding)}, which can't be folded with order='before': the padding's zeros "
            "come after the batch norm, which would not give 0 there, so one bias would be wrong at the border. Keep "
            "the batch norm as it is, or train with it after the convolution"
        )
