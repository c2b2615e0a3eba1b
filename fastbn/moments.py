"""Moments: count, mean and sum of squared deviations of each channel, and how two of them make one."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arguments import check_channels, check_variances, describe, finite
from .arrays import NUMPY, family_of_values, place_of


class Moments:
    """Count, mean and M2 (the sum of squared deviations from the mean) of every channel.

    They merge exactly as if the data had been one array (Chan, Golub & LeVeque 1983):

    ``count = na + nb``, ``mean = ma + (mb - ma) nb / count``, ``M2 = M2a + M2b + (mb - ma)^2 na nb / count``.

    Parameters
    ----------
    count : int or float
        How many values each channel has, or the sum of their weights.
    mean, m2 : array of the channels' shape
        Mean, in the unit of the data, and M2, in its square.
    dtype : optional
        In which `mean`, `m2` and `var` are given: float32 (default), or float64, which float64 data have. Inside
        they are float64 always, as a float32 mean of 1e5 would be off by 0.4 % of a standard deviation of 1.

    All of it is of x's array library, and on its device; but for Numba device arrays, which can't be computed with,
    it is NumPy's, copied when `saved.moments` is asked for. Negative values in an M2 on a GPU give NaN, not an error.

    Raises
    ------
    ValueError
        For a negative count, or shapes that differ; by `merge`, for other channels.
    TypeError
        For arrays that aren't in one place.

    >>> import numpy as np, fastbn
    >>> x = np.float32([[1, 10], [3, 10], [8, 40]])
    >>> m = fastbn.moments(x[:2]) + fastbn.moments(x[2:])
    >>> m
    Moments(count=3, mean=[4, 20], var=[8.667, 200])
    >>> m.var(ddof=1)
    array([ 13., 300.], dtype=float32)
    """

    __slots__ = ("_m2", "_mean", "count", "dtype", "shape")

    def __init__(self, count: float, mean: Any, m2: Any, dtype: Any = np.float32) -> None:
        if finite(count) is None or count < 0:
            raise ValueError(f"fastbn.Moments: count is {describe(count)}; expected a number of values, 0 or more")
        self.shape: tuple[int, ...] = tuple(np.shape(mean))
        self.count = _whole(count)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._mean = check_channels("fastbn.Moments", "mean", mean, self.shape, mean).reshape(self.shape)
        self._m2 = check_variances("fastbn.Moments", m2, self.shape, "m2", mean).reshape(self.shape)

    @classmethod
    def found(cls, count: float, mean: Any, m2: Any, dtype: Any) -> Moments:
        """From float64 results of our own, unchecked: the checks take as long as normalizing a small array."""
        new = cls.__new__(cls)
        new.count, new._mean, new._m2, new.shape, new.dtype = count, mean, m2, tuple(mean.shape), np.dtype(dtype)
        return new

    @property
    def mean(self) -> Any:
        """Mean of every channel (0 for no values)."""
        return _rounded(self._mean, self.dtype)

    @property
    def m2(self) -> Any:
        """Sum of squared deviations from the mean."""
        return _rounded(self._m2, self.dtype)

    def var(self, ddof: int = 0) -> Any:
        """Variance, M2 / (count - ddof): NaN where the count does not exceed `ddof`."""
        return _rounded(self.exact(ddof, copy=False)[1], self.dtype)

    def exact(self, ddof: int = 0, copy: bool = True) -> tuple[Any, Any]:
        """Mean and variance in float64, whatever the data were; without `copy` not to be written to."""
        free = self.count - ddof
        mean = family_of_values(self._mean).copy(self._mean) if copy else self._mean
        return mean, self._m2 / free if free > 0 else self._m2 * np.nan

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values together; `a + b` and `sum(list)` do the same."""
        if not isinstance(other, Moments):
            raise TypeError(f"fastbn.Moments.merge: other is a {type(other).__name__}; expected Moments")
        if other.shape != self.shape:
            raise ValueError(
                f"fastbn.Moments.merge: other has channels of shape {other.shape}; expected {self.shape}. "
                "Were both made with the same axis?"
            )
        (mine, here), (others, there) = place_of(self._mean), place_of(other._mean)
        if mine is not others or here != there:
            raise TypeError(
                f"fastbn.Moments.merge: other holds {_where(others, there)}, and self {_where(mine, here)}; expected "
                "both in one place. Copy those of one"
            )
        dtype = np.promote_types(self.dtype, other.dtype)
        count = self.count + other.count
        if not (self.count and other.count):
            rest = other if other.count else self
            return Moments.found(count, rest._mean, rest._m2, dtype)
        with np.errstate(all="ignore"):  # Inf - Inf is NaN, and meant to be
            delta = other._mean - self._mean
            mean = self._mean + delta * (other.count / count)
            m2 = self._m2 + other._m2 + delta * delta * (self.count * other.count / count)
        return Moments.found(count, mean, m2, dtype)

    def allreduce(self, comm: Any, *, wait: bool = True) -> Any:
        """The moments of all ranks' values together, the same bits on each; `comm` is as in `fastbn.forward`.

        With `wait=False` the result is a `fastbn.distributed.Pending`, whose `wait()` returns them; other work can be
        done meanwhile. Raises `RanksError` as `forward` does.

        >>> import numpy as np, fastbn
        >>> class Mirror:  # stands for two ranks with the same data
        ...     def allgather(self, data):
        ...         return data, data
        >>> m = fastbn.moments(np.float32([[1, 10], [3, 10]]))
        >>> m.allreduce(Mirror())
        Moments(count=4, mean=[2, 10], var=[1, 0])
        >>> pending = m.allreduce(Mirror(), wait=False)
        >>> pending.wait().count
        4
        """
        from .distributed import allreduced

        pending = allreduced(self, comm)
        return pending.wait() if wait else pending

    def __add__(self, other: object) -> Moments:
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def __radd__(self, other: object) -> Moments:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # what sum() starts from

    def __repr__(self) -> str:
        family = family_of_values(self._mean)

        def few(values: Any) -> str:
            flat = family.host(values).reshape(-1)
            return "[" + ", ".join([f"{v:.4g}" for v in flat[:6]] + ["..."] * (flat.size > 6)) + "]"

        return f"Moments(count={self.count}, mean={few(self._mean)}, var={few(self.exact()[1])})"


def _whole(count: float) -> float:
    """As an int where it is one."""
    return int(count) if int(count) == count else float(count)


def _rounded(values: Any, dtype: np.dtype[Any]) -> Any:
    return family_of_values(values).rounded(values, dtype)


def _where(family: Any, device: int) -> str:
    return f"{family.kind}s" + ("" if family is NUMPY else f" on device {device}")
