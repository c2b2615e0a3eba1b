"""Batch normalization for JAX on the CPU: a function that jax.jit and jax.grad know.

JAX calls back into Python for it (`jax.pure_callback`), and copies the results into its own memory: two passes over y
that `fastbn.forward` on JAX arrays, outside jax.jit, does not make.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from .arguments import Axis, check_array, check_axis, check_eps, check_real, describe
from .batchnorm import backward, forward
from .layout import channels_of
from .saved import Saved
from .second import backward_backward

__all__ = ["batch_norm"]


def batch_norm(
    x: Any, gamma: Any = None, beta: Any = None, *, axis: Axis = 1, eps: float = 1e-5, frozen: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``y = gamma (x - mean) / sqrt(var + eps) + beta``, and the mean and biased variance of each channel.

    Gradients flow through y to x, gamma and beta, and those of gradients, too; there are no third ones. mean and var
    are constants to them: they are for running statistics, as in Flax ``ra = decay * ra + (1 - decay) * mean``.

    Parameters
    ----------
    x : JAX array, at least 2-D, of float16, bfloat16, float32 or float64
    gamma, beta : arrays of the channels' shape, optional
    axis : int or tuple of int
        The channel axis, or all axes that statistics keep. Keras and Flax have it last: -1.
    eps : float
    frozen : (mean, var), optional
        Normalize by these in place of x's own (evaluation).

    Returns
    -------
    y : array of x's shape and dtype
    mean, var : float32 arrays of the channels' shape (float64 for float64 x)

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `fastbn.forward`, while JAX traces; for values, such as a negative variance in `frozen`, within the callback,
        where JAX makes a JaxRuntimeError of it.

    >>> import jax, jax.numpy as jnp, fastbn.jax
    >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0]])
    >>> y, mean, var = jax.jit(fastbn.jax.batch_norm)(x, beta=jnp.ones(2))
    >>> y.round(3).tolist(), mean.tolist(), var.tolist()
    ([[0.0, 1.0], [2.0, 1.0]], [2.0, 5.0], [1.0, 0.0])
    >>> jax.grad(lambda x: (fastbn.jax.batch_norm(x)[0] * x).sum())(x).round(3).tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    """
    x = jax.numpy.asarray(x)
    given = [None if a is None else jax.numpy.asarray(a) for a in (gamma, beta, *_pair(frozen))]
    axes = _check(x, given, axis, eps)
    y, mean, var, _ = _normalize(x, *given, axes, float(eps))
    return y, jax.lax.stop_gradient(mean), jax.lax.stop_gradient(var)


def _pair(frozen: Any) -> tuple[Any, Any]:
    if frozen is None:
        return None, None
    if not isinstance(frozen, (tuple, list)) or len(frozen) != 2:
        raise TypeError(f"fastbn.jax.batch_norm: frozen is {describe(frozen)}; expected a pair (mean, var)")
    return frozen[0], frozen[1]


def _check(x: Any, given: list[Any], axis: Axis, eps: float) -> tuple[int, ...]:
    """What can be seen before there are values, on stand-ins of the same shape and type; returns the channel axes."""
    where = "fastbn.jax.batch_norm"
    stand_in = check_array(where, "x", _stand_in(x))
    axes = check_axis(where, stand_in, axis)
    check_eps(where, eps)
    for name, value in zip(("gamma", "beta", "mean", "var"), given, strict=True):
        if value is not None:
            check_real(where, name, _stand_in(value), channels_of(x.shape, axes).shape)
    return axes


def _stand_in(a: Any) -> np.ndarray:
    return np.broadcast_to(np.ones((), a.dtype), a.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _normalize(
    x: Any, gamma: Any, beta: Any, mean: Any, var: Any, axes: tuple[int, ...], eps: float
) -> tuple[Any, ...]:
    """y, mean and var, and the table as bits: it is float64, which JAX has only where it is told so."""
    channels = channels_of(x.shape, axes)
    small = jax.ShapeDtypeStruct(channels.shape, _number_type(x))
    bits = jax.ShapeDtypeStruct((6, 2 * channels.number), np.uint32)
    call = functools.partial(_forward, axes, eps)
    wanted = jax.ShapeDtypeStruct(x.shape, x.dtype), small, small, bits
    return tuple(jax.pure_callback(call, wanted, x, gamma, beta, mean, var, vmap_method="sequential"))


def _keep(x: Any, gamma: Any, beta: Any, mean: Any, var: Any, *rest: Any) -> tuple[tuple[Any, ...], Any]:
    found = _normalize(x, gamma, beta, mean, var, *rest)  # which has a gradient, where one of gradients is asked for
    like = None if beta is None else beta[:0]  # of no elements: it tells what beta's gradient is like
    return found, (x, found[3], mean, var, gamma, like)


def _gradients(axes: tuple[int, ...], _eps: float, kept: Any, cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
    x, table, mean, var, gamma, like = kept
    dx, *rest = _gradient(cotangents[0], x, gamma, table, axes, mean is not None, like is not None)
    dgamma, dbeta = (None if a is None else new.astype(a.dtype) for new, a in zip(rest, (gamma, like), strict=True))
    constants = (None if a is None else jax.numpy.zeros_like(a) for a in (mean, var))
    return dx, dgamma, dbeta, *constants


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _gradient(
    dy: Any, x: Any, gamma: Any, table: Any, axes: tuple[int, ...], frozen: bool, has_beta: bool
) -> tuple[Any, ...]:
    """dx, dgamma and dbeta. gamma's values are in the table: it is here for its own gradient of these."""
    small = jax.ShapeDtypeStruct(channels_of(x.shape, axes).shape, _number_type(x))
    need = gamma is not None, has_beta
    wanted = jax.ShapeDtypeStruct(x.shape, x.dtype), *(small if n else None for n in need)
    call = functools.partial(_backward, axes, frozen, need)
    return tuple(jax.pure_callback(call, wanted, dy, x, table, vmap_method="sequential"))


def _keep_gradient(dy: Any, x: Any, gamma: Any, table: Any, *rest: Any) -> tuple[tuple[Any, ...], Any]:
    return _gradient(dy, x, gamma, table, *rest), (dy, x, gamma, table)


def _gradients_again(
    axes: tuple[int, ...], frozen: bool, _has_beta: bool, kept: Any, cotangents: tuple[Any, ...]
) -> tuple[Any, ...]:
    dy, x, gamma, table = kept
    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    small = jax.ShapeDtypeStruct(channels_of(x.shape, axes).shape, _number_type(x))
    call = functools.partial(_backward_backward, axes, frozen, gamma is not None)
    wanted = like_x, None if gamma is None else small, like_x
    gx, ggamma, gdy = jax.pure_callback(call, wanted, *cotangents, dy, x, table, vmap_method="sequential")
    return gdy, gx, None if gamma is None else ggamma.astype(gamma.dtype), None


_normalize.defvjp(_keep, _gradients)
_gradient.defvjp(_keep_gradient, _gradients_again)


def _number_type(x: Any) -> Any:
    return np.float64 if x.dtype == np.float64 else np.float32


# JAX calls these three, with its arrays, which NumPy reads in place. Nothing of JAX may be called here: it would wait
# for itself.
def _forward(axes: tuple[int, ...], eps: float, x: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> tuple[Any, ...]:
    x, gamma, beta, mean, var = (None if a is None else np.asarray(a) for a in (x, gamma, beta, mean, var))
    frozen = None if mean is None else (mean, var)
    y, saved = forward(x, gamma, beta, axis=axes, eps=eps, frozen=frozen)
    table, shape = saved.table, channels_of(x.shape, axes).shape
    numbers = _number_type(x)
    with np.errstate(over="ignore"):
        found = [a.astype(numbers).reshape(shape) for a in (table[0] + table[1], table[2])]
    return y, *found, table.view(np.uint32)


def _backward(axes: tuple[int, ...], frozen: bool, need: tuple[bool, ...], dy: Any, x: Any, table: Any) -> Any:
    return backward(np.asarray(dy), _saved(x, table, frozen, axes), need=(True, *need))


def _backward_backward(axes: tuple[int, ...], frozen: bool, need_gamma: bool, *given: Any) -> Any:
    ddx, ddgamma, ddbeta, dy, x, table = (None if a is None else np.asarray(a) for a in given)
    saved = _saved(x, table, frozen, axes)
    return backward_backward(ddx, ddgamma, ddbeta, dy, saved, need=(True, need_gamma, True))


def _saved(x: Any, table: Any, frozen: bool, axes: tuple[int, ...]) -> Saved:
    return Saved.of(np.asarray(x), np.ascontiguousarray(np.asarray(table)).view(np.float64), frozen, axes)
