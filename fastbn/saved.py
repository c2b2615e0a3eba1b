"""What `forward` keeps for `backward`."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arguments import Axis, check_array, check_axis, dtype_of, whole
from .arrays import FLOAT32, FLOAT64, Span, family_of_values
from .distributed import Shared
from .extras import Asked, ask
from .host import Caller, caller_of, check_host
from .layout import channels_of
from .moments import Moments


class Saved:
    """What `forward` keeps for `backward`: x itself (no copy), and C numbers.

    `moments` is what forward found in x: pass it to `RunningStats.update`. None with frozen statistics; a list, with
    groups.

    >>> import numpy as np, fastbn
    >>> fastbn.forward(np.ones((4, 2), np.float32))[1]
    Saved(float32 x of shape (4, 2), channel axes (1,), frozen=False)
    """

    __slots__ = (
        *("_asked", "_axes", "_caller", "_like", "_lost", "_masses", "_shape", "_shared", "_strides", "_table"),
        *("_overwritten", "_units", "_way", "_x", "dtype", "frozen"),
    )

    def __init__(
        self, walked: Any, x: Any, axes: tuple[int, ...], table: Any, frozen: bool, asked: Asked | None = None,
        masses: Any = None, lost: Any = None, units: tuple[float, float] | None = None,
        caller: Caller | None = None,
    ) -> None:  # fmt: skip
        self._caller = caller  # the library that x came from, if x is NumPy's view of another's array
        self._x = walked  # x, or the copy of it that the kernels could walk; None if overwritten; y if asked to
        self._like = None  # the Span of x, without its memory unless that is kept anyway
        self.dtype = dtype_of(x)
        if isinstance(x, Span):
            self._like = x if x is walked else x.without_memory()
        self._shape = x.shape
        self._strides = x.strides
        self._axes = axes
        self._table = table  # (6, C): mean hi, mean lo, var, 1 / sqrt(var + eps), gamma, beta; (6, G C) with groups
        self.frozen = frozen
        self._asked = asked
        # (G,), by set: sums of weights, beside x, or numbers of values, in main memory; None without weights and groups
        self._masses = masses
        self._lost = lost  # with save="y": x of the channels that can't be had back from y
        self._units = units  # scale and zero point of whole numbers
        self._overwritten = False  # whether an `out` went over the residual, which the slopes of an activation need
        self._way: Any = None  # of a plain call on NumPy arrays: `fastbn.plain`
        self._shared: Shared | None = None  # with `comm`: the ranks whose batch this is a part of

    @property
    def moments(self) -> Any:
        """Moments of x (None if frozen), made when asked for: that takes as long as normalizing a small array.

        With weights on a GPU their count, a sum of weights, is copied from there, for which the device is waited for.
        """
        if self.frozen:
            return None
        total = None if self._shared is None else self._shared.values
        dtype = self.dtype if self._like is None else self._like.dtype
        return moments_of(self._shape, self._axes, self._table, dtype, self._asked, self._masses, self._units, total)

    @classmethod
    def of(cls, x: Any, table: Any, frozen: bool, axis: Axis = 1, activation: Any = None) -> Saved:
        """Of x and the `table` of a forward pass with an activation at most, for frameworks that keep arrays
        themselves between passes."""
        caller = None if type(x) is np.ndarray else caller_of(x)
        walked = check_array("fastbn.Saved.of", "x", x)
        table = check_host("fastbn.Saved.of", "table", table)
        axes = check_axis("fastbn.Saved.of", walked, axis)
        asked = None
        if activation is not None:
            asked = ask("fastbn.Saved.of", walked, axes, walked.dtype, activation=activation)
        return cls(walked, walked, axes, table, frozen, asked, caller=caller)

    @property
    def table(self) -> Any:
        """(6, C) float64, what was found: mean as a pair hi + lo, biased variance, 1 / sqrt(var + eps), gamma, beta."""
        return self._table

    def __repr__(self) -> str:
        return f"Saved({self.dtype} x of shape {self._shape}, channel axes {self._axes}, frozen={self.frozen})"


def moments_of(
    shape: tuple[int, ...], axes: tuple[int, ...], table: Any, dtype: np.dtype[Any], asked: Asked | None,
    masses: Any, units: tuple[float, float] | None, total: float | None = None,
) -> Any:  # fmt: skip
    """Moments, or with groups a list of them."""
    channels = channels_of(shape, axes)
    numbers = family_of_values(table).numbers(table)
    kind = number_type(dtype.itemsize)
    with np.errstate(all="ignore"):
        (mean, lo), var = numbers[:2], numbers[2]
        if units is not None:
            mean, lo, var = units[0] * ((mean + lo) - units[1]), None, units[0] ** 2 * var
        if asked is None or masses is None:
            count, shape = channels.values if total is None else whole(total), channels.shape
            lo = None if lo is None else lo.reshape(shape)
            return _found(count, mean.reshape(shape), var.reshape(shape), kind, lo)
        shape = asked.sets, *channels.shape
        mean, var, lo = mean.reshape(shape), var.reshape(shape), None if lo is None else lo.reshape(shape)
        family = family_of_values(masses)
        masses = family.host(family.numbers(masses))
        counts = [float(m) if asked.weights is not None else int(m) for m in masses]
        found = [_found(n, mean[g], var[g], kind, None if lo is None else lo[g]) for g, n in enumerate(counts)]
    return found[0] if asked.groups is None else found


def _found(count: float, mean: Any, var: Any, kind: np.dtype[Any], lo: Any) -> Any:
    if count == 0:  # units would make -scale * zero_point of the 0
        mean, lo = 0 * var, None
    return Moments.found(count, mean, count * var, kind, lo)


def number_type(itemsize: int) -> np.dtype[Any]:
    """Of statistics and gradients: float64 for float64 data, float32 for all others, which are smaller."""
    return FLOAT64 if itemsize == 8 else FLOAT32
