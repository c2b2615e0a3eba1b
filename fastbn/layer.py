"""BatchNorm: the functions as a layer with parameters, gradients and running statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .arguments import Axis, check_channels, check_eps, check_variances, describe
from .batchnorm import Array, backward, forward
from .distributed import ranks_of
from .extras import check_activation
from .host import seen
from .moments import check_like
from .running import RunningStats
from .saved import Saved

_STATE = "gamma", "beta", "running_mean", "running_var", "batches", "variances"
_SKIPS = "skipped", "skipped_variances"  # may be missing in a state: then nothing was skipped


class BatchNorm:
    """Batch normalization with its parameters: `bn(x)` forward, `bn.backward(dy)`, `bn.train()`, `bn.eval()`.

    In training a call normalizes by the batch and updates `bn.running`; in evaluation it normalizes by
    `bn.running`. Both can be differentiated.

    Parameters
    ----------
    channels : int or tuple of int
        Number of channels, or their shape if `axis` is a tuple.
    axis, eps : as in `fastbn.forward`
    momentum : float or None
        The weight of the *new* batch in the running statistics (PyTorch's sense); None is the cumulative
        average. Keras, Flax and ONNX mean the weight of the old value: pass theirs as `decay`.
    ddof : int
        1 for the unbiased running variance (PyTorch), 0 for the biased one (Keras, Flax).
    decay : float, optional
        1 - momentum.
    accumulate : bool
        Add each backward pass to `dgamma` and `dbeta` (until `zero_grad()`) in place of replacing them.
    dtype : float32 or float64
        Of the parameters and their gradients.
    like : array, optional
        Parameters, gradients and running statistics live where it lives, as x must: NumPy (not given), or a GPU's CuPy
        arrays or PyTorch tensors. (Numba device arrays can't be computed with: use the functions.)
    on_nonfinite, debias : as in `fastbn.RunningStats`
        What the running statistics do about NaN and Inf, and whether their initial 0 and 1 count. With "raise" a call
        raises when y is computed already: it is not returned, but was written to an `out`.
    activation : as in `fastbn.forward`
        What is done to y in the same pass; `bn(x, residual=r)` adds r before it.
    comm : communicator or fastbn.Ranks, optional
        Batches are spread over these ranks, as in `fastbn.forward`; in training `bn(x)` and `bn.backward(dy)` are
        collectives, and the running statistics are the same on all ranks.
    reduce_params : bool
        With `comm`: `dgamma` and `dbeta` are summed over the ranks. Leave it False where the gradients of all
        parameters are summed or averaged over the ranks anyway.

    Attributes
    ----------
    gamma, beta : arrays, yours to update in place
    dgamma, dbeta : arrays, filled by `backward`
    dresidual : array, the gradient of the last call's residual, by `backward`; None if there was none
    running : RunningStats
    training : bool

    Raises
    ------
    TypeError, ValueError
        As the functions; RuntimeError if `backward` comes before any forward pass.

    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(3)
    >>> x = np.random.default_rng(0).normal(5, 2, (8, 3, 4, 4)).astype(np.float32)
    >>> y = bn(x)
    >>> dx = bn.backward(np.ones_like(y))
    >>> bn.dbeta.tolist()
    [128.0, 128.0, 128.0]
    >>> bn.eval()
    BatchNorm(3, axis=1, eps=1e-05, momentum=0.1, evaluating, 1 batch seen)
    """

    def __init__(
        self,
        channels: int | tuple[int, ...],
        axis: Axis = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        ddof: int = 1,
        decay: float | None = None,
        accumulate: bool = False,
        dtype: Any = np.float32,
        like: Any = None,
        on_nonfinite: str = "propagate",
        debias: bool = False,
        activation: Any = None,
        comm: Any = None,
        reduce_params: bool = False,
    ) -> None:
        self.comm = None if comm is None else ranks_of("fastbn.BatchNorm", comm)
        self.reduce_params = reduce_params
        self.activation = activation
        check_activation("fastbn.BatchNorm", activation)
        self.dresidual: Any = None
        self.axis = axis
        self.eps = check_eps("fastbn.BatchNorm", eps)
        self._family, self._device = check_like("fastbn.BatchNorm", like)
        guards: dict[str, Any] = {"on_nonfinite": on_nonfinite, "debias": debias}
        self.running = RunningStats(channels, momentum, ddof, decay=decay, dtype=dtype, like=like, **guards)
        self.accumulate = accumulate
        self.training = True
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.float32, np.float64):
            raise TypeError(f"fastbn.BatchNorm: dtype is {self.dtype}; expected float32 or float64")
        self.gamma, self.beta, self.dgamma, self.dbeta = (
            self._family.put(np.full(self.running.shape, start, dtype), self._device) for start in (1, 0, 0, 0)
        )
        self._saved: Saved | None = None

    def __call__(
        self,
        x: Array,
        *,
        out: Array | None = None,
        weights: Any = None,
        masked: str = "normalize",
        residual: Array | None = None,
        groups: Any = None,
        save: str = "x",
        scale: float = 1.0,
        zero_point: float = 0.0,
    ) -> Array:
        """y; in training the running statistics take x in. The rest is as in `fastbn.forward`.

        The running statistics take all groups in as one batch, and in evaluation, where they stand for all samples,
        groups mean nothing.
        """
        frozen = None if self.training else self.running
        y, saved = forward(
            x, self.gamma, self.beta, axis=self.axis, eps=self.eps, frozen=frozen, out=out, weights=weights,
            masked=masked, residual=residual, activation=self.activation, comm=self.comm, save=save, scale=scale,
            zero_point=zero_point, groups=groups if self.training else None,
        )  # fmt: skip
        if (moments := saved.moments) is not None:
            self.running.update(moments)
        self._saved = saved
        return y

    def backward(self, dy: Array, *, out: Array | None = None) -> Array:
        """dx for the last forward pass; sets `dgamma` and `dbeta`, or adds to them. `out` is where dx goes."""
        if self._saved is None:
            raise RuntimeError("fastbn.BatchNorm.backward: no forward pass came before; call bn(x) first")
        dx: Array
        need = {} if self._saved._units is None else {"need": (False, True, True)}  # whole numbers have no gradient
        dx, dgamma, dbeta, *rest = backward(dy, self._saved, out=out, reduce_params=self.reduce_params, **need)
        self.dresidual = rest[0] if rest else None
        dgamma, dbeta = seen(dgamma), seen(dbeta)
        if self.accumulate:
            self.dgamma[...], self.dbeta[...] = self.dgamma + dgamma, self.dbeta + dbeta
        else:
            self.dgamma[...], self.dbeta[...] = dgamma, dbeta
        return dx

    def zero_grad(self) -> None:
        """Set `dgamma` and `dbeta` to 0."""
        self.dgamma[...] = 0
        self.dbeta[...] = 0

    def train(self, mode: bool = True) -> BatchNorm:
        """Normalize by the batch from now on (or, with False, by the running statistics)."""
        self.training = bool(mode)
        return self

    def eval(self) -> BatchNorm:
        """Normalize by the running statistics from now on."""
        return self.train(False)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all that is learned, as NumPy arrays wherever it lives: `np.savez(file, **bn.state_dict())`."""
        mean, var = self.running.exact(copy=False)
        arrays = (self.gamma, self.beta, mean, var)
        counts = np.array(self.running.batches), np.array(self.running.variances)
        skips = self.running._skip_counts()
        return dict(zip(_STATE + _SKIPS, (*map(self._family.host, arrays), *counts, *skips), strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`, or an opened npz file. Nothing changes if anything in it is wrong.

        One without `skipped` and `skipped_variances`, from before there were any, has skipped nothing.
        """
        where = "fastbn.BatchNorm.load_state_dict"
        if not isinstance(state, Mapping) or set(state) not in (set(_STATE), {*_STATE, *_SKIPS}):
            came = sorted(map(str, state)) if isinstance(state, Mapping) else describe(state)
            raise ValueError(
                f"{where}: state has {came}; expected {sorted(_STATE + _SKIPS)}. Rename or add what differs"
            )
        shape = self.running.shape
        gamma, beta, mean = (check_channels(where, k, state[k], shape) for k in ("gamma", "beta", "running_mean"))
        var = check_variances(where, state["running_var"], shape, "running_var")
        batches, variances = (_count(where, k, state[k]) for k in ("batches", "variances"))
        skips = [_counts(where, k, state.get(k, np.zeros(shape, int)), shape) for k in _SKIPS]
        gamma, beta, mean, var = (self._family.put(a.reshape(shape), self._device) for a in (gamma, beta, mean, var))
        self.gamma[...], self.beta[...] = gamma, beta
        self.running.mean, self.running.var = mean, var
        self.running.batches, self.running.variances = batches, variances
        self.running._set_skip_counts(*skips)

    def __repr__(self) -> str:
        shape, seen = self.running.shape, self.running.batches
        return (
            f"BatchNorm({shape[0] if len(shape) == 1 else shape}, axis={self.axis}, eps={self.eps}, "
            f"momentum={self.running.momentum}, {'training' if self.training else 'evaluating'}, "
            f"{seen} {'batch' if seen == 1 else 'batches'} seen)"
        )


def _count(where: str, name: str, value: Any) -> int:
    number = np.asarray(value)
    if number.shape != () or number.dtype.kind not in "iu" or number < 0:
        raise ValueError(f"{where}: {name} is {describe(value)}; expected a number of batches, 0 or more")
    return int(number)


def _counts(where: str, name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    numbers = np.asarray(value)
    if numbers.shape != shape or numbers.dtype.kind not in "iu" or (numbers < 0).any():
        raise ValueError(f"{where}: {name} is {describe(value)}; expected {shape} numbers of batches, 0 or more")
    return numbers
