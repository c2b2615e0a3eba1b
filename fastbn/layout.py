"""Every array with a channel axis as one 3-D view (outer, channels, inner): the only file that knows NCHW from NHWC.

Memory decides, not the shape: axes are taken in the order of their strides, and neighbours that follow each
other without a gap become one. What is left must be one run of channel axes among at most two of others.
(N, C, H, W) gives (N, C, H W); the same on channels-last strides gives (N H W, C, 1).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Collapse(NamedTuple):
    """How to see an array as (O, C, I): transpose by `order`, then reshape."""

    order: tuple[int, ...]
    shape: tuple[int, int, int]

    def view(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(self.order).reshape(self.shape)


@functools.lru_cache(maxsize=4096)
def collapse(shape: tuple[int, ...], axes: tuple[int, ...], *strides: tuple[int, ...]) -> Collapse | None:
    """The common view of arrays of one shape (no axis of size 0) and these strides, or None if there is none.

    `axes` are the channel axes, ascending. The first array's strides set the order of the axes.

    >>> collapse((8, 3, 4, 4), (1,), (192, 64, 16, 4))  # float32, NCHW
    Collapse(order=(0, 1, 2, 3), shape=(8, 3, 16))
    >>> collapse((8, 3, 4, 4), (1,), (192, 4, 48, 12))  # the same shape in channels-last memory
    Collapse(order=(0, 2, 3, 1), shape=(128, 3, 1))
    >>> collapse((8, 3, 4, 4), (1,), (192, 64, 16, 4), (192, 4, 48, 12))  # one of each: (N, C, H W) fits both
    Collapse(order=(0, 1, 2, 3), shape=(8, 3, 16))
    """
    groups: list[list[int]] = []
    for axis in sorted((a for a in range(len(shape)) if shape[a] != 1), key=lambda a: -abs(strides[0][a])):
        last = groups[-1][-1] if groups else None
        follows = last is not None and all(s[last] == s[axis] * shape[axis] for s in strides)
        if last is not None and follows and (last in axes) == (axis in axes):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    channels = [g for g in groups if g[0] in axes]
    others = [g for g in groups if g[0] not in axes]
    if len(channels) > 1 or len(others) > 2 or any(g != sorted(g) for g in channels):
        return None
    c = channels[0] if channels else []
    if len(others) == 2:
        outer, inner = others
    elif others and c and groups[0] is others[0]:
        outer, inner = others[0], []
    else:
        outer, inner = [], others[0] if others else []
    ones = [a for a in range(len(shape)) if shape[a] == 1]

    def size(group: list[int]) -> int:
        return math.prod(shape[a] for a in group)

    return Collapse((*ones, *outer, *c, *inner), (size(outer), size(c), size(inner)))


def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """A dense array whose axes follow each other in memory as under `strides`: np.empty_like without the array."""
    order = sorted(range(len(shape)), key=lambda a: -abs(strides[a]))
    return np.empty([shape[a] for a in order], dtype).transpose(np.argsort(order))


class Views:
    """Inputs and outputs of one call as (O, C, I) views that agree axis by axis.

    No array is copied whose memory the kernels can walk. One that they can't is copied once, in as near to its
    own layout as they can: when it is byte-swapped or misaligned, when its strides do not collapse (an image
    cropped in height and width; channel axes with another axis between them in memory), or when they collapse
    in another way than those of the first input. An output of that kind is written by `finish`.
    """

    def __init__(
        self, axes: tuple[int, ...], inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]
    ) -> None:
        self._targets = [o for o in outputs if o is not None]
        given = len(inputs)
        whole: list[np.ndarray] = [*inputs, *self._targets]
        used = [a if a.dtype.isnative and a.flags.aligned else _dense(a, a, i < given) for i, a in enumerate(whole)]
        plan = _common(axes, used)
        if plan is None:
            if _common(axes, used[:1]) is None:
                used[0] = _packed(axes, used[0])
            for i in range(1, len(used)):
                if _common(axes, [used[0], used[i]]) is None:
                    used[i] = _dense(used[i], used[0], i < given)
            plan = _common(axes, used)
        if plan is None:
            used = [_dense(a, used[0], i < given) for i, a in enumerate(used)]
            plan = _common(axes, used)
        assert plan is not None, "arrays of equal strides collapse alike"
        self.inputs = used[:given]  # what was walked in place of the inputs, in their own shape
        self._results = used[given:]
        views = [plan.view(a) for a in used]
        written = iter(views[given:])
        self.views: list[np.ndarray | None] = [*views[:given], *(None if o is None else next(written) for o in outputs)]

    def finish(self) -> None:
        for target, result in zip(self._targets, self._results, strict=True):
            if result is not target:
                target[...] = result


def _common(axes: tuple[int, ...], arrays: Sequence[np.ndarray]) -> Collapse | None:
    return collapse(arrays[0].shape, axes, *(a.strides for a in arrays))


def _dense(a: np.ndarray, like: np.ndarray, filled: bool) -> np.ndarray:
    """A native, aligned array in the memory order of `like`; a copy of `a` if `filled`."""
    new = np.empty_like(like, dtype=a.dtype.newbyteorder("="), subok=False)
    if filled:
        new[...] = a
    return new


def _packed(axes: tuple[int, ...], a: np.ndarray) -> np.ndarray:
    """A copy of `a` that collapses: in its own order if that will do, else with the channel axes last."""
    new = _dense(a, a, True)
    if _common(axes, [new]) is None:
        order = [*(i for i in range(a.ndim) if i not in axes), *axes]
        new = np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))
    return new
