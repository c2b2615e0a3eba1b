"""What is the matter with an array's channels: dead ones, NaN and Inf, offsets, values near the dtype's end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .arguments import Axis, check_array, check_axis, describe
from .batchnorm import moments
from .layout import channels_of
from .moments import Moments
from .recalibrate import pieces

_LISTED = 12  # channels in the printed table
_FLOAT16 = float(np.finfo(np.float16).max)


class Diagnosis:
    """What `fastbn.diagnose` found; `print` shows it as a table, the channels with findings first.

    Attributes, each an array of the channels' shape unless said otherwise
    ---------------------------------------------------------------------
    shape, axis, dtype : of x
    count : int
        Values per channel.
    nan, inf : int64
        How many values are NaN, and how many are infinite.
    mean, std, minimum, maximum : float64
        Of the finite values; NaN where there are none.
    offset : float64
        |mean| / std: Inf for a constant that isn't 0, 0 for one that is. What E[x^2] - E[x]^2 loses grows with its
        square (in float32 all is lost from 3e3 on), and what rounding of x itself has lost with it.
    constant, zero, dead : bool
        Whether all values are finite and equal; all 0; either of them.
    share : float64
        The largest |value| that is finite, as a share of the largest number of x's dtype.
    share_of_float16 : float64
        The same of float16's 65504: above 1, it would overflow there.

    >>> import numpy as np, fastbn
    >>> found = fastbn.diagnose(np.float16([[0, 1], [0, 60000]]))
    >>> found.dead.tolist(), found.share.round(3).tolist()
    ([True, False], [0.0, 0.916])
    """

    def __init__(self, x: np.ndarray, axes: tuple[int, ...]) -> None:
        channels = channels_of(x.shape, axes)
        shape = channels.shape
        self.shape, self.dtype, self.count = x.shape, x.dtype, channels.values if channels.number else 0
        self.axis = axes[0] if len(axes) == 1 else axes
        self.nan, self.inf = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.minimum, self.maximum = np.full(shape, np.inf), np.full(shape, -np.inf)
        rest = tuple(a for a in range(x.ndim) if a not in axes)
        parts = Moments.merge_all(self._look(piece, axes, rest) for piece in pieces(x, axes))
        self.mean, var = parts.exact()
        broken = np.argwhere((self.nan + self.inf) > 0)
        for channel in map(tuple, broken):
            self.mean[channel], var[channel] = _finite_moments(x, axes, channel)
        none = self.minimum > self.maximum  # no finite value
        for values in (self.mean, var, self.minimum, self.maximum):
            values[none] = np.nan
        self.std = np.sqrt(var)
        same = self.minimum == self.maximum
        self.std[same] = 0
        self.constant = same & (self.nan + self.inf == 0)
        self.zero = self.constant & (self.maximum == 0)
        self.dead = self.constant
        with np.errstate(all="ignore"):
            self.offset = np.where(self.mean == 0, 0.0, np.abs(self.mean) / self.std)
            largest = np.maximum(np.abs(self.minimum), np.abs(self.maximum))
        self.share, self.share_of_float16 = largest / _largest(x.dtype), largest / _FLOAT16

    def _look(self, x: np.ndarray, axes: tuple[int, ...], rest: tuple[int, ...]) -> Moments:
        """Take in a piece: one pass for its moments, and three by NumPy."""
        if x.size:
            x = (
                x
                if x.dtype.itemsize > 2 and x.dtype.isnative
                else x.astype(np.float32 if x.dtype.itemsize <= 4 else float)
            )
            finite = np.isfinite(x)
            if finite.all():
                low, high = x.min(rest), x.max(rest)
            else:
                nan = np.isnan(x).sum(rest)
                self.nan += nan
                self.inf += (~finite).sum(rest) - nan
                low, high = np.where(finite, x, np.inf).min(rest), np.where(finite, x, -np.inf).max(rest)
            self.minimum, self.maximum = np.minimum(self.minimum, low), np.maximum(self.maximum, high)
        return moments(x, axis=axes)

    def _found(self) -> list[tuple[np.ndarray, str, str]]:
        """Which channels, in a word, and in words."""
        return [
            (self.zero, "dead: all 0", "dead: all 0"),
            (self.constant & ~self.zero, "dead: constant", "dead: constant"),
            (self.nan > 0, "NaN", "with NaN"),
            (self.inf > 0, "Inf", "with Inf"),
            (
                (self.minimum < self.maximum) & (self.offset > 3e3),
                "offset",
                "with |mean| above 3000 std, where E[x^2] - E[x]^2 fails in float32",
            ),
            (self.share > 0.5, f"near the end of {self.dtype.name}", f"with values near the end of {self.dtype.name}"),
            (self.share_of_float16 > 1, "beyond float16", "with values beyond float16"),
        ]

    @property
    def findings(self) -> np.ndarray:
        """Per channel, what is the matter, in words; "" for nothing."""
        words = np.full(self.nan.shape, "", object)
        for mask, word, _ in self._found():
            words[mask] = [f"{w}, {word}" if w else word for w in words[mask]]
        return words

    def __str__(self) -> str:
        findings = self.findings.reshape(-1)
        found = np.flatnonzero(findings != "")
        lines = [
            f"{self.dtype.name} array of shape {self.shape}, channel axis {self.axis}: "
            f"{findings.size} channels of {self.count} values"
        ]
        if not findings.size:
            return lines[0]
        lines += [f"  {np.count_nonzero(mask)} {words}" for mask, _, words in self._found() if mask.any()]
        lines += ["  nothing found"] * (len(lines) == 1)
        rest = np.setdiff1d(np.arange(findings.size), found)
        listed = [*found, *rest][:_LISTED]
        heads = ("channel", "mean", "std", "|mean|/std", "min", "max", "NaN", "Inf", "of float16", "")
        numbers = (self.mean, self.std, self.offset, self.minimum, self.maximum)
        rows = []
        for c in listed:
            index = np.unravel_index(c, self.nan.shape)
            name = ", ".join(str(i) for i in index)
            cells = [f"{a[index]:.4g}" for a in numbers]
            counts = [str(a[index]) if a[index] else "-" for a in (self.nan, self.inf)]
            rows.append((name, *cells, *counts, _as_share(self.share_of_float16[index]), findings[c]))
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        for row in (heads, *rows):
            lines.append(
                "  ".join([*(cell.rjust(n) for cell, n in zip(row[:-1], widths, strict=False)), row[-1]]).rstrip()
            )
        if findings.size > len(listed):
            more = len(found) - len(listed)
            lines.append(
                f"... {findings.size - len(listed)} more, {f'{more} of them' if more > 0 else 'none'} with findings"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        found = f"{np.count_nonzero(self.findings != '')} of {self.nan.size} channels with findings"
        return f"Diagnosis({self.dtype.name} array of shape {self.shape}, {found})"


def diagnose(x: np.ndarray, axis: Axis = 1) -> Diagnosis:
    """Look at every channel of an array: is it dead, does it hold NaN or Inf, will its dtype do?

    Reads x in pieces of 32 MB (a `numpy.memmap` larger than memory works), four times: for the moments, by
    `fastbn.moments`, and for least, largest and non-finite values.

    Parameters
    ----------
    x : NumPy array of float16, bfloat16, float32 or float64, at least 2-D
    axis : int or tuple of int
        The channel axis, or all axes that statistics keep.

    Returns
    -------
    Diagnosis
        To print, or to read by its attributes.

    Raises
    ------
    TypeError
        For other arrays; for those on a GPU: copy them to main memory.
    ValueError, numpy.exceptions.AxisError
        As `fastbn.moments`.

    >>> import numpy as np, fastbn
    >>> x = np.float32([[1, 0, 4e4, 1], [2, 0, 4e4 + 1, np.inf], [3, 0, 4e4 + 2, 2]])
    >>> print(fastbn.diagnose(x))
    float32 array of shape (3, 4), channel axis 1: 4 channels of 3 values
      1 dead: all 0
      1 with Inf
      1 with |mean| above 3000 std, where E[x^2] - E[x]^2 fails in float32
    channel   mean     std  |mean|/std    min    max  NaN  Inf  of float16
          1      0       0           0      0      0    -    -       0.00%  dead: all 0
          2  4e+04  0.8165   4.899e+04  4e+04  4e+04    -    -      61.07%  offset
          3    1.5     0.5           3      1      2    -    1       0.00%  Inf
          0      2  0.8165       2.449      1      3    -    -       0.00%
    """
    where = "fastbn.diagnose"
    x = check_array(where, "x", x)
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{where}: x is a {describe(x)}; expected a NumPy array. Copy it to main memory")
    return Diagnosis(x, check_axis(where, x, axis))


def _finite_moments(x: np.ndarray, axes: tuple[int, ...], channel: tuple[int, ...]) -> tuple[float, float]:
    """Mean and variance of the finite values of one channel."""

    def each() -> Iterator[Moments]:
        for piece in pieces(x, axes):
            index: list[Any] = [slice(None)] * x.ndim
            for axis, c in zip(axes, channel, strict=True):
                index[axis] = c
            values = piece[tuple(index)].reshape(1, -1)
            yield moments(values[:, np.isfinite(values[0])], axis=0)

    mean, var = Moments.merge_all(each()).exact()
    return float(mean[0]), float(var[0])


def _as_share(value: float) -> str:
    """In percent, and above 100 % as a factor: that of float32's largest number is 5e33."""
    return f"{value:.4g}x" if value > 1 else f"{value:.2%}"


def _largest(dtype: np.dtype[Any]) -> float:
    """The largest finite number of a type."""
    if dtype.name == "bfloat16":
        return float(2.0**127 * (2 - 2.0**-7))
    return float(np.finfo(dtype).max)
