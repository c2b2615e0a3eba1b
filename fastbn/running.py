"""RunningStats: the mean and variance that evaluation uses, updated when the caller says so."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arguments import check_channels, check_shape, check_variances, describe, finite
from .moments import Moments


class RunningStats:
    """Running mean and variance of every channel.

    ``mean = (1 - momentum) mean + momentum batch_mean``, and the same for the variance, M2 / (count - ddof).

    Parameters
    ----------
    channels : int or tuple of int
        Number of channels, or their shape.
    momentum : float or None
        The weight of the *new* batch, in [0, 1] (PyTorch's sense). None gives every batch the same weight
        (cumulative average).
    ddof : int
        1 (default) for the unbiased variance that PyTorch keeps, 0 for the biased one of Keras and Flax.
    decay : float, optional
        The weight of the *old* value, which Keras, Flax and ONNX call momentum; sets momentum to 1 - decay.
    dtype : optional
        In which `mean` and `var` are read: float32, or float64 once float64 data have come. Inside they are
        float64, so that evaluation is as right at any offset as training is.

    An empty batch changes nothing, and a batch of no more than `ddof` values leaves the variance as it was:
    neither knows one.

    Raises
    ------
    ValueError
        For a momentum or decay outside [0, 1], or both given; in `update`, for other channels.

    >>> import numpy as np, fastbn
    >>> running = fastbn.RunningStats(2, momentum=0.5)
    >>> running.update(fastbn.moments(np.float32([[1, 10], [3, 10]])))
    >>> running.mean, running.var
    (array([1., 5.], dtype=float32), array([1.5, 0.5], dtype=float32))
    """

    def __init__(
        self,
        channels: int | tuple[int, ...],
        momentum: float | None = 0.1,
        ddof: int = 1,
        *,
        decay: float | None = None,
        dtype: Any = np.float32,
    ) -> None:
        if decay is not None:
            if momentum != 0.1:
                raise ValueError("fastbn.RunningStats: momentum and decay are both given; pass one of them")
            momentum = 1 - _weight("decay", decay)
        if not isinstance(ddof, (int, np.integer)) or ddof < 0:
            raise ValueError(f"fastbn.RunningStats: ddof is {describe(ddof)}; expected 0 or 1 (or more)")
        self.momentum = None if momentum is None else _weight("momentum", momentum)
        self.ddof = int(ddof)
        self.batches = 0  # taken in
        self.variances = 0  # of them, those large enough to have a variance
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.shape = check_shape("fastbn.RunningStats", channels)
        self._mean, self._var = np.zeros(self.shape), np.ones(self.shape)

    @property
    def mean(self) -> np.ndarray:
        """Running mean: a copy; assign to change it."""
        return self._read(self._mean)

    @mean.setter
    def mean(self, value: Any) -> None:
        self._mean = check_channels("fastbn.RunningStats", "mean", value, self.shape).reshape(self.shape)

    @property
    def var(self) -> np.ndarray:
        """Running variance: a copy; assign to change it."""
        return self._read(self._var)

    @var.setter
    def var(self, value: Any) -> None:
        self._var = check_variances("fastbn.RunningStats", value, self.shape).reshape(self.shape)

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance in float64, as they are kept."""
        return self._mean.copy(), self._var.copy()

    def update(self, moments: Moments) -> None:
        """Take in one batch: `saved.moments` of a forward pass, or `fastbn.moments(x)`."""
        if not isinstance(moments, Moments):
            raise TypeError(
                f"fastbn.RunningStats.update: moments is a {type(moments).__name__}; expected Moments, "
                "as in saved.moments (None after a frozen forward pass) or fastbn.moments(x)"
            )
        if moments.shape != self.shape:
            raise ValueError(
                f"fastbn.RunningStats.update: moments has channels of shape {moments.shape}; expected {self.shape}"
            )
        if moments.count == 0:
            return
        mean, var = moments.exact(self.ddof)
        self.dtype = np.promote_types(self.dtype, moments.dtype)
        self.batches += 1
        with np.errstate(all="ignore"):
            self._mean = self._mixed(self._mean, mean, self.batches)
            if moments.count > self.ddof:
                self.variances += 1
                self._var = self._mixed(self._var, var, self.variances)

    def _mixed(self, old: np.ndarray, new: np.ndarray, batches: int) -> np.ndarray:
        weight = 1 / batches if self.momentum is None else self.momentum
        if weight in (0, 1):  # nothing of the other value counts, not even its NaN
            return new if weight else old
        return np.asarray((1 - weight) * old + weight * new)

    def _read(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            copy = values.astype(self.dtype)
        copy.flags.writeable = False  # writing into a copy is an error, not lost
        return copy

    def __repr__(self) -> str:
        return (
            f"RunningStats(channels={self.shape[0] if len(self.shape) == 1 else self.shape}, "
            f"momentum={self.momentum}, ddof={self.ddof}, batches={self.batches})"
        )


def _weight(name: str, value: Any) -> float:
    if (number := finite(value)) is not None and 0 <= number <= 1:
        return number
    raise ValueError(f"fastbn.RunningStats: {name} is {describe(value)}; expected a number in [0, 1]")
