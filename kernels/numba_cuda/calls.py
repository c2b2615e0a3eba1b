"""From a call's arrays to what the kernels take: plans, lists of sets, workspaces."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

from .arrays import device, flat, put, stream_number, view
from .kernels import PLAIN, How, More
from .plan import Sizes, plan_of
from .target import cuda

_kept = threading.local()


def has_sets(more: Any) -> bool:
    return more.starts is not None and len(more.starts) > 2


def weights_of(more: Any, frozen: bool) -> Any:
    """With given statistics they can but mask."""
    return None if frozen and more.masked == "normalize" else more.weights


def mode_of(more: Any, weights: Any) -> str:
    return "" if weights is None else str(more.masked)


def planned(arrays: tuple[Any, ...], how: How, more: Any, stream: Any, sizes: Sizes, whole: bool = False) -> Any:
    """The plan; `cut` as kernels take it; each array as they do, flat and with its place; their argument `more`.

    Weights, if there are any, are the last array. The first one may be of `whole` numbers beside float32.
    """
    there = [a for a in arrays if a is not None]
    shape, strides, own = tuple(there[0].shape), [tuple(a.strides) for a in there], there[0].dtype.itemsize
    size = 4 if whole else own  # a plan counts in elements of one size
    strides[0] = tuple(s * size // own for s in strides[0])
    if how.weights:  # contiguous, the same for all channels
        strides[-1] = shape[2] * size, 0, size
    sets, lists = (), ()
    if how.sets:
        lists, height, rows = lists_of(more.starts, more.order, shape)
        sets = len(more.starts) - 1, height
        if rows > 1:
            shape, strides = (shape[0] // rows, shape[1], rows), [(rows * o, c, o) for o, c, _ in strides]
        lists = _on_device(lists, there[0], stream)
    cut = plan_of(shape, size, tuple(strides), sizes, *sets)
    seen = iter([(flat(a), place) for a, place in zip(there, cut.places, strict=True)])
    taken = [((), ()) if a is None else next(seen) for a in arrays]
    also: Any = () if how == PLAIN else More(lists, parameter=float(more.parameter))
    return cut, cut.tracked if how.tracked else cut.cut, taken, also


def lists_of(starts: np.ndarray, order: np.ndarray | None, shape: tuple[int, ...]) -> tuple[np.ndarray, int, int]:
    """As `walk.LISTED` takes them; the height of the largest set; and outer indices of an entry.

    In channels-last memory a sample is many outer indices, one behind the other: an entry, with these as inner axis.
    """
    order = np.arange(shape[0]) if order is None else order
    rows = 1
    if shape[2] == 1:
        breaks = np.flatnonzero(np.diff(order) != 1) + 1
        rows = int(np.gcd.reduce([*starts, *breaks, order[0], *order[breaks]]))
    lists = np.concatenate([starts // rows + len(starts), order[::rows] // rows])
    return lists, int(np.diff(starts).max()) // rows, rows


def _on_device(lists: np.ndarray, a: Any, stream: Any) -> Any:
    """A copy beside `a`: that of this thread's last call on this stream, if the lists are the same."""
    key = device(a), stream_number(stream), "lists"
    known, there = vars(_kept).get(key, (None, None))
    if known is None or not np.array_equal(known, lists):
        there = put(lists, stream)
        vars(_kept)[key] = lists, there
    return there


def workspace(a: Any, stream: Any, size: int) -> Any:
    """float64 numbers: the same ones for all calls of this thread on this stream, which follow one another."""
    key = device(a), stream_number(stream)
    kept = vars(_kept)
    if key not in kept or kept[key].size < size:
        kept[key] = cuda.device_array(size, np.float64)
    return kept[key]


def cube(work: Any, start: int, shape: tuple[int, ...]) -> Any:
    return view(work, shape, tuple(8 * math.prod(shape[k + 1 :]) for k in range(len(shape))), 8 * start)
