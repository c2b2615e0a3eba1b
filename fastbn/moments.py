"""Moments: count, mean and sum of squared deviations of each channel, and how two of them make one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .arguments import check_channels, check_variances, describe, finite, integer
from .arrays import NUMBA, NUMPY, family_of_values, place_of

_STATE = "count", "mean", "mean_lo", "m2", "dtype"


class Moments:
    """Count, mean and M2 (the sum of squared deviations from the mean) of every channel.

    They merge exactly as if the data had been one array (Chan, Golub & LeVeque 1983):

    ``count = na + nb``, ``mean = ma + (mb - ma) nb / count``, ``M2 = M2a + M2b + (mb - ma)^2 na nb / count``.

    Parameters
    ----------
    count : int, or float
        How many values each channel has, or the sum of their weights.
    mean, m2 : array of the channels' shape
        Mean, in the unit of the data, and M2, in its square (weighted, if the data are).
    dtype : optional
        In which `mean`, `m2` and `var` are given: float32 (default), or float64, which float64 data have. Inside
        they are float64 always, as a float32 mean of 1e5 would be off by 0.4 % of a standard deviation of 1; and what
        float64 rounds off a mean is kept beside it, so that parts merge to 1e-12 of the whole at any offset.

    All of it is of x's array library, and on its device; but for Numba device arrays, which can't be computed with,
    it is NumPy's, copied when `saved.moments` is asked for. Negative values in an M2 on a GPU give NaN, not an error.

    ``a + b`` and ``sum(list)`` merge, `Moments.merge_all` does so in a tree, and ``a - b`` takes b back out of a.
    `to_dict` and `from_dict` save and load: ``np.savez(file, **m.to_dict())``.

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
    >>> m - fastbn.moments(x[2:])
    Moments(count=2, mean=[2, 10], var=[1, 0])
    """

    __slots__ = ("_hi", "_lo", "_m2", "count", "dtype", "shape")

    def __init__(self, count: float, mean: Any, m2: Any, dtype: Any = np.float32) -> None:
        self.shape: tuple[int, ...] = tuple(np.shape(mean))
        self.count = _checked_count("fastbn.Moments", count)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        if self.dtype not in (np.float32, np.float64):
            raise ValueError(f"fastbn.Moments: dtype is {self.dtype}; expected float32 or float64")
        self._hi = check_channels("fastbn.Moments", "mean", mean, self.shape, mean).reshape(self.shape)
        self._lo: Any = None  # the mean is hi + lo; None is 0
        self._m2 = check_variances("fastbn.Moments", m2, self.shape, "m2", mean).reshape(self.shape)

    @classmethod
    def found(cls, count: float, mean: Any, m2: Any, dtype: Any, lo: Any = None) -> Moments:
        """From float64 results of our own, unchecked: the checks take as long as normalizing a small array."""
        new = cls.__new__(cls)
        new.count, new._hi, new._lo, new._m2, new.dtype = count, mean, lo, m2, np.dtype(dtype)
        new.shape = tuple(mean.shape)
        return new

    @property
    def mean(self) -> Any:
        """Mean of every channel (0 for no values)."""
        return _rounded(self._mean(), self.dtype)

    @property
    def m2(self) -> Any:
        """Sum of squared deviations from the mean."""
        return _rounded(self._m2, self.dtype)

    def var(self, ddof: int = 0) -> Any:
        """Variance, M2 / (count - ddof): NaN where the count does not exceed `ddof`.

        With weights the count is their sum; ddof=1 is then right for weights that count repetitions of a value.
        """
        return _rounded(self.exact(ddof, copy=False)[1], self.dtype)

    def exact(self, ddof: int = 0, copy: bool = True) -> tuple[Any, Any]:
        """Mean and variance in float64, whatever the data were; without `copy` not to be written to."""
        if (number := integer(ddof)) is None:
            raise TypeError(f"fastbn.Moments: ddof is {describe(ddof)}; expected a whole number")
        free = self.count - number
        mean = self._mean()
        if copy and self._lo is None:
            mean = family_of_values(mean).copy(mean)
        return mean, self._m2 / free if free > 0 else self._m2 * np.nan

    def finite(self) -> Any:
        """Per channel: whether mean and M2 are neither NaN nor Inf."""
        isfinite = family_of_values(self._hi).xp.isfinite
        return isfinite(self._mean()) & isfinite(self._m2)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values together; `a + b` and `sum(list)` do the same."""
        self._check_beside("merge", other)
        dtype = np.promote_types(self.dtype, other.dtype)
        count = self.count + other.count
        if not (self.count and other.count):
            rest = other if other.count else self
            return Moments.found(count, rest._hi, rest._m2, dtype, rest._lo)
        a, b = (self, other) if self.count >= other.count else (other, self)
        share = b.count / count
        with np.errstate(all="ignore"):  # Inf - Inf is NaN, and meant to be
            delta = a._to(b)
            hi, lo = a._moved(delta * share)
            m2 = a._m2 + b._m2 + delta * delta * (a.count * share)
        return Moments.found(count, hi, m2, dtype, lo)

    @classmethod
    def merge_all(cls, parts: Iterable[Moments]) -> Moments:
        """Any number of moments as one, merged in a balanced tree that depends on their number alone.

        The same parts give the same bits, and errors of rounding grow with the logarithm of their number. `parts` may
        be an iterator: as many are kept at a time as its length has binary digits.

        >>> import numpy as np, fastbn
        >>> fastbn.Moments.merge_all(fastbn.moments(np.full((2, 1), float(k))) for k in range(4))
        Moments(count=8, mean=[1.5], var=[1.25])
        """
        merged: list[tuple[int, Moments]] = []  # of how many parts, halving at least from each to the next
        for part in parts:
            if not isinstance(part, Moments):
                raise TypeError(f"fastbn.Moments.merge_all: parts has a {type(part).__name__}; expected Moments alone")
            size = 1
            while merged and merged[-1][0] == size:
                part, size = merged.pop()[1].merge(part), 2 * size
            merged.append((size, part))
        if not merged:
            raise ValueError(
                "fastbn.Moments.merge_all: parts is empty; expected at least one, which tells the channels"
            )
        part = merged.pop()[1]
        while merged:
            part = merged.pop()[1].merge(part)
        return part

    def subtract(self, other: Moments) -> Moments:
        """What is left when the values of `other` are taken out of these again; `a - b` does the same.

        ``(a + b) - b`` is a, up to rounding: of 1e-16 of the mean and M2 of the whole, which is much where little is
        left. An M2 that rounding takes below 0 becomes 0. Sums of weights that differ by less than rounding count as
        equal: nothing is left then, and its mean is 0.

        Raises
        ------
        ValueError
            If `other` has more values, or in a channel more M2 than it can have as a part (on a GPU that isn't looked
            at, and becomes 0); for other channels.
        TypeError
            For arrays that aren't in one place.
        """
        self._check_beside("subtract", other)
        dtype = np.promote_types(self.dtype, other.dtype)
        count = self.count - other.count
        if isinstance(count, float) and abs(count) <= 4 * np.finfo(float).eps * self.count:
            count = 0.0
        if count < 0:
            raise ValueError(
                f"fastbn.Moments.subtract: other has a count of {other.count}; expected at most {self.count}, as it is "
                "to be a part of these. Is it the other way round?"
            )
        if not count:
            return Moments.found(count, _zeros_like(self._hi), _zeros_like(self._m2), dtype)
        if not other.count:
            return Moments.found(count, self._hi, self._m2, dtype, self._lo)
        with np.errstate(all="ignore"):
            delta = self._to(other)
            hi, lo = self._moved(delta * (-other.count / count))
            m2 = self._m2 - other._m2 - delta * delta * (self.count * (other.count / count))
        self._check_part(m2)
        m2 = family_of_values(m2).xp.where(m2 < 0, 0.0, m2)
        return Moments.found(count, hi, m2, dtype, lo)

    def to_dict(self) -> dict[str, np.ndarray]:
        """All of it as NumPy arrays, wherever it lives: `np.savez(file, **m.to_dict())`.

        count (int64 or float64), mean and mean_lo (float64: the mean is their sum, of which the first is the float64
        next to it), m2 (float64), and dtype (a name).
        """
        host = family_of_values(self._hi).host
        mean = host(self._mean())
        lo = np.zeros(self.shape)
        if self._lo is not None:
            with np.errstate(all="ignore"):
                lo = (host(self._hi) - mean) + host(self._lo)
        return dict(
            zip(_STATE, (np.array(self.count), mean, lo, host(self._m2), np.array(str(self.dtype))), strict=True)
        )

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], *, like: Any = None) -> Moments:
        """From `to_dict`, or an opened npz file: the same bits. They live where `like` does (NumPy's without one).

        >>> import io, numpy as np, fastbn
        >>> m, file = fastbn.moments(np.float32([[1, 10], [3, 10]])), io.BytesIO()
        >>> np.savez(file, **m.to_dict())
        >>> fastbn.Moments.from_dict(np.load(io.BytesIO(file.getvalue())))
        Moments(count=2, mean=[2, 10], var=[1, 0])
        """
        where = "fastbn.Moments.from_dict"
        if not isinstance(state, Mapping) or set(state) != set(_STATE):
            came = sorted(map(str, state)) if isinstance(state, Mapping) else describe(state)
            raise ValueError(f"{where}: state has {came}; expected {sorted(_STATE)}, as from to_dict")
        shape = np.shape(state["mean"])
        numbers = (check_channels(where, name, state[name], shape) for name in ("mean", "mean_lo"))
        arrays = (*numbers, check_variances(where, state["m2"], shape, "m2"))
        count = state["count"]
        count = _checked_count(where, count.item() if isinstance(count, np.ndarray) and count.ndim == 0 else count)
        dtype = str(state["dtype"])
        if dtype not in ("float32", "float64"):
            raise ValueError(f"{where}: dtype is {dtype!r}; expected 'float32' or 'float64'")
        family, device = check_like(where, like)
        hi, lo, m2 = (family.put(a.reshape(shape), device) for a in arrays)
        return cls.found(count, hi, m2, dtype, lo)

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

    def __sub__(self, other: object) -> Moments:
        return self.subtract(other) if isinstance(other, Moments) else NotImplemented

    def __repr__(self) -> str:
        family = family_of_values(self._hi)

        def few(values: Any) -> str:
            flat = family.host(values).reshape(-1)
            return "[" + ", ".join([f"{v:.4g}" for v in flat[:6]] + ["..."] * (flat.size > 6)) + "]"

        count = self.count if isinstance(self.count, int) else f"{self.count:.6g}"
        mean, var = self.exact(copy=False)
        return f"Moments(count={count}, mean={few(mean)}, var={few(var)})"

    def _mean(self) -> Any:
        return self._hi if self._lo is None else self._hi + self._lo

    def _to(self, other: Moments) -> Any:
        """From this mean to the other's: far less than either at an offset, so what rounding takes off comes along."""
        delta, lost = _two_sum(other._hi, -1.0 * self._hi)
        if other._lo is not None:
            lost = lost + other._lo
        if self._lo is not None:
            lost = lost - self._lo
        return delta + lost

    def _moved(self, shift: Any) -> tuple[Any, Any]:
        """This mean plus `shift`, as hi and lo."""
        hi, lost = _two_sum(self._hi, shift)
        return hi, lost if self._lo is None else lost + self._lo

    def _check_beside(self, method: str, other: Any) -> None:
        where = f"fastbn.Moments.{method}"
        if not isinstance(other, Moments):
            raise TypeError(f"{where}: other is a {type(other).__name__}; expected Moments")
        if other.shape != self.shape:
            raise ValueError(
                f"{where}: other has channels of shape {other.shape}; expected {self.shape}. "
                "Were both made with the same axis?"
            )
        (mine, here), (others, there) = place_of(self._hi), place_of(other._hi)
        if mine is not others or here != there:
            raise TypeError(
                f"{where}: other holds {_where(others, there)}, and self {_where(mine, here)}; expected "
                "both in one place. Copy those of one"
            )

    def _check_part(self, m2: Any) -> None:
        """No M2 so far below 0 that not even numbers rounded to float32 on the way explain it."""
        if isinstance(m2, np.ndarray):
            with np.errstate(all="ignore"):
                wrong = m2 < -1e-6 * self._m2 - self.count * (1e-7 * self._hi) ** 2
            if number := np.count_nonzero(wrong):
                raise ValueError(
                    f"fastbn.Moments.subtract: other has more M2 than a part of these can, in {number} of {wrong.size} "
                    "channels; expected moments that were merged into these before"
                )


def check_like(function: str, like: Any) -> tuple[Any, int]:
    """Where arrays like `like` are to be made: NumPy's without one."""
    family, device = place_of(like)
    if family is NUMBA or (family is NUMPY and like is not None and not isinstance(like, np.ndarray)):
        raise TypeError(
            f"{function}: like is a {describe(like)}; expected a NumPy array, a CuPy array or a PyTorch CUDA tensor, "
            "which can be computed with"
        )
    return family, device


def _checked_count(function: str, value: Any) -> int | float:
    """A whole number of values, or a sum of weights."""
    if (number := finite(value)) is None or number < 0:
        raise ValueError(
            f"{function}: count is {describe(value)}; expected a number of values, or of weights, 0 or more"
        )
    return number if (exact := integer(value)) is None else exact


def _two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """a + b, and what rounding took off it (Knuth's; 0 where the sum is infinite or NaN)."""
    total = a + b
    part = total - a
    lost = (a - (total - part)) + (b - part)
    xp = family_of_values(total).xp
    return total, xp.where(xp.isfinite(lost), lost, 0.0)


def _zeros_like(values: Any) -> Any:
    family = family_of_values(values)
    new = family.copy(values)
    family.clear(new)
    return new


def _rounded(values: Any, dtype: np.dtype[Any]) -> Any:
    return family_of_values(values).rounded(values, dtype)


def _where(family: Any, device: int) -> str:
    return f"{family.kind}s" + ("" if family is NUMPY else f" on device {device}")
