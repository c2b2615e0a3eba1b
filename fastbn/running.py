"""RunningStats: the mean and variance that evaluation uses, updated when the caller says so."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arguments import check_channels, check_shape, check_variances, describe, finite
from .arrays import NUMPY, Family, place_of
from .moments import Moments, check_like


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
    like : array, optional
        The statistics live where it lives: NumPy, or a GPU's CuPy arrays or PyTorch tensors. Not given, they are made
        where the first batch is, and are NumPy's till then. (Moments of Numba device arrays are NumPy's.)

    An empty batch changes nothing, and a batch of no more than `ddof` values leaves the variance as it was:
    neither knows one.

    Raises
    ------
    ValueError
        For a momentum or decay outside [0, 1], or both given; in `update`, for other channels.
    TypeError
        In `update`, for moments that live elsewhere; for Numba device arrays as `like`.

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
        like: Any = None,
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
        self._fixed = like is not None  # to where it lives
        self._start(*check_like("fastbn.RunningStats", like))

    def _start(self, family: Family, device: int) -> None:
        self._family, self._device = family, device
        self._mean, self._var = family.put(np.zeros(self.shape), device), family.put(np.ones(self.shape), device)

    @property
    def mean(self) -> Any:
        """Running mean: a copy; assign to change it."""
        return self._read(self._mean)

    @mean.setter
    def mean(self, value: Any) -> None:
        self._mean = check_channels("fastbn.RunningStats", "mean", value, self.shape, self._mean).reshape(self.shape)
        self._fixed = True

    @property
    def var(self) -> Any:
        """Running variance: a copy; assign to change it."""
        return self._read(self._var)

    @var.setter
    def var(self, value: Any) -> None:
        found = check_variances("fastbn.RunningStats", value, self.shape, beside=self._var)
        self._var = found.reshape(self.shape)
        self._fixed = True

    def exact(self, copy: bool = True) -> tuple[Any, Any]:
        """Mean and variance in float64, as they are kept; without `copy` not to be written to."""
        kept = self._mean, self._var
        return (self._family.copy(kept[0]), self._family.copy(kept[1])) if copy else kept

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
        mean, var = moments.exact(self.ddof, copy=False)
        self._meet(mean)
        self.dtype = np.promote_types(self.dtype, moments.dtype)
        self.batches += 1
        with np.errstate(all="ignore"):
            self._mean = self._mixed(self._mean, mean, self.batches)
            if moments.count > self.ddof:
                self.variances += 1
                self._var = self._mixed(self._var, var, self.variances)

    def _meet(self, mean: Any) -> None:
        """Move to where the first batch lives, if nothing is kept yet."""
        family, device = place_of(mean)
        if family is not self._family or device != self._device:
            if self._fixed:
                raise TypeError(
                    f"fastbn.RunningStats.update: moments has a {describe(mean)}; expected what these statistics are: "
                    f"{describe(self._mean)}. Make them with like=x"
                )
            self._start(family, device)
        self._fixed = True

    def _mixed(self, old: Any, new: Any, batches: int) -> Any:
        weight = 1 / batches if self.momentum is None else self.momentum
        if weight in (0, 1):  # nothing of the other value counts, not even its NaN
            return new if weight else old
        return (1 - weight) * old + weight * new

    def _read(self, values: Any) -> Any:
        copy = self._family.rounded(values, self.dtype)
        if self._family is NUMPY:
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
