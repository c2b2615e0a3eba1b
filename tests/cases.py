"""The arrays that every function is tried on: one table for all tests, a reason beside each case."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]

# What the dtype itself costs, relative to max(1, |result|): a half type rounds once (0.5 eps, and 2^-8 of that for
# the float32 in between); float32 is computed in float64 and rounded once, 2 eps are promised; float64 rounds about
# six times (variance, root, quotient, gamma, two products), and its variance may be off by a few eps more.
TOLERANCE = {"float32": 2.0, "float64": 8.0, "float16": 0.51, "bfloat16": 0.51}


def eps(dtype: np.dtype) -> float:
    return float(ml_dtypes.finfo(dtype).eps)


class Case(NamedTuple):
    name: str
    shape: tuple[int, ...]
    axis: int | tuple[int, ...]
    make: Callable[[np.ndarray], np.ndarray]  # from a C-contiguous array of `shape` to the same values, laid out anew
    reason: str


def _as_is(x: np.ndarray) -> np.ndarray:
    return x


def _through(*order: int) -> Callable[[np.ndarray], np.ndarray]:
    """Same shape and values, in the memory order of the transposition."""
    return lambda x: np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))


def _inside(*index: slice | int) -> Callable[[np.ndarray], np.ndarray]:
    """A window of a larger array that holds NaN elsewhere: reading a neighbour shows."""

    def make(x: np.ndarray) -> np.ndarray:
        big = np.full([3 * n + 2 for n in x.shape], np.nan, x.dtype)
        window = big[tuple(s if isinstance(s, slice) else slice(s, s + n) for s, n in zip(index, x.shape, strict=True))]
        window = window[tuple(slice(0, n) for n in x.shape)]
        window[...] = x
        return window

    return make


def _wider(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    """A slice along one axis of an array that holds NaN elsewhere."""

    def make(x: np.ndarray) -> np.ndarray:
        big = np.full([n + 5 * (i == axis) for i, n in enumerate(x.shape)], np.nan, x.dtype)
        window = big[tuple(slice(2 * (i == axis), 2 * (i == axis) + n) for i, n in enumerate(x.shape))]
        window[...] = x
        return window

    return make


def _reversed(*axes: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.flip(np.ascontiguousarray(np.flip(x, axes)), axes)


def _misaligned(x: np.ndarray) -> np.ndarray:
    raw = np.empty(x.nbytes + 1, np.uint8)
    new = raw[1:].view(x.dtype).reshape(x.shape)
    new[...] = x
    return new


def _swapped(x: np.ndarray) -> np.ndarray:
    return x.astype(x.dtype.newbyteorder(">"))


def _read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def _broadcast(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    """Stride 0 along an axis: the values of its first index, everywhere."""
    return lambda x: np.broadcast_to(x.take([0], axis), x.shape)


ALL = slice(None)
CASES = [
    Case("nchw", (4, 5, 6, 7), 1, _as_is, "the common one: runs of 42"),
    Case("nhwc", (4, 6, 7, 5), -1, _as_is, "channels last, 5 channels folded to wide rows when large"),
    Case("nhwc wide", (3, 5, 4, 70), 3, _as_is, "rows longer than a test's tile of 16 channels, ragged at its end"),
    Case("nchw on nhwc strides", (4, 9, 6, 7), 1, _through(0, 2, 3, 1), "memory decides, not the shape"),
    Case("(N, C)", (33, 12), 1, _as_is, "no inner axis"),
    Case("(C, N)", (12, 33), 0, _as_is, "no outer axis"),
    Case("(N, C) transposed", (33, 12), 1, _through(1, 0), "looks like columns, lies in rows"),
    Case("1-D signal", (5, 3, 301), 1, _as_is, "runs longer than a test's block, ragged at its end"),
    Case("deep runs", (97, 3, 21), 1, _as_is, "so many runs of a channel that it is walked by column, folded"),
    Case("wide deep runs", (70, 20, 17), 1, _as_is, "the same, in tiles"),
    Case("far runs", (12, 3, 70), 1, _as_is, "a channel of more runs and bytes than a test's cache holds"),
    Case("3-D volume", (2, 3, 4, 5, 6), 1, _as_is, "five axes"),
    Case("six axes", (2, 2, 3, 2, 2, 3), 2, _as_is, "channels in the middle"),
    Case("fortran", (4, 5, 6, 7), 1, lambda x: np.asfortranarray(x), "all strides ascend"),
    Case("batch slice", (4, 5, 6, 7), 1, _inside(slice(1, None, 2), 0, 0, 0), "gaps on all axes: one copy"),
    Case("channel slice", (4, 8, 42), 1, _wider(1), "channels of a wider array"),
    Case("channel slice nhwc", (40, 18), 1, _wider(1), "rows with gaps"),
    Case("cropped image", (3, 4, 8, 9), 1, _inside(0, 0, 2, 3), "height and width don't collapse: one copy"),
    Case("cropped nhwc", (3, 8, 9, 10), -1, _wider(1), "two levels of rows"),
    Case("cropped rows", (3, 10, 9, 10), 1, _wider(2), "gaps between images"),
    Case(
        "every other", (6, 5, 40), 1, _inside(slice(None, None, 2), slice(None, None, 2), slice(None, None, 2)), "steps"
    ),
    Case("every other nhwc", (6, 40, 10), 2, _inside(0, 0, slice(None, None, 2)), "no axis has unit stride"),
    Case("reversed", (4, 5, 40), 1, _reversed(0, 1, 2), "negative strides"),
    Case("reversed channels", (40, 20), 1, _reversed(1), "negative stride of the run"),
    Case("broadcast batch", (4, 5, 40), 1, _broadcast(0), "stride 0 outside"),
    Case("broadcast space", (40, 5, 4), 1, _broadcast(2), "stride 0 inside"),
    Case("broadcast channels", (40, 5, 4), 1, _broadcast(1), "stride 0 along the channels"),
    Case("read-only", (4, 5, 40), 1, _read_only, "another type to Numba"),
    Case("misaligned", (4, 5, 40), 1, _misaligned, "one byte off: one copy"),
    Case("byte-swapped", (4, 5, 40), 1, _swapped, "of another machine: one copy"),
    Case("byte-swapped nhwc", (4, 5, 40), 2, _swapped, "the same, channels last"),
    Case("instance norm", (4, 5, 60), (0, 1), _as_is, "statistics keep two axes"),
    Case("per pixel", (30, 4, 5), (1, 2), _as_is, "two channel axes, columns"),
    Case("split channels", (4, 30, 5), (0, 2), _as_is, "an axis between the channel axes: one copy"),
    Case(
        "per pixel, fortran", (30, 4, 5), (-1, -2), lambda x: np.asfortranarray(x), "channel axes the other way round"
    ),
    Case("one channel", (30, 1, 7), 1, _as_is, "C = 1"),
    Case("one channel cropped", (6, 1, 7, 8), 1, _inside(0, 0, 1, 1), "C = 1 and two axes that don't collapse"),
    Case("one row", (1, 6, 50), 1, _as_is, "N = 1"),
    Case("ones", (1, 6, 1, 1, 50), 1, _as_is, "axes of size 1"),
    Case("two values", (2, 6), 1, _as_is, "the fewest that have a variance"),
    Case("primes", (7, 13, 5, 3), 1, _as_is, "nothing divides anything"),
]
