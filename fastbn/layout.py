"""Every array with a channel axis as one 3-D view (outer, channels, inner): the only file that knows NCHW from NHWC.

Memory decides, not the shape: axes are taken in the order of their strides, and neighbours that follow each
other without a gap become one. What is left must be one run of channel axes among at most two of others.
(N, C, H, W) gives (N, C, H W); the same on channels-last strides gives (N H W, C, 1).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .arrays import Span, dense_strides, family_of, memory_order


class Channels(NamedTuple):
    """The channels of a shape: their own shape, their number, and how many values each has."""

    shape: tuple[int, ...]
    number: int
    values: int


@functools.lru_cache(maxsize=4096)
def channels_of(shape: tuple[int, ...], axes: tuple[int, ...]) -> Channels:
    """What the channel axes of a shape, ascending, come to.

    >>> channels_of((8, 3, 4, 4), (0, 1))
    Channels(shape=(8, 3), number=24, values=16)
    """
    channels = tuple(shape[a] for a in axes)
    number = math.prod(channels)
    return Channels(channels, number, math.prod(shape) // max(1, number))


class Samples(NamedTuple):
    """The axis that comes first in O, so that a sample is some outer indices, one behind the other."""

    axis: int
    alone: bool  # O is that axis, if it can be: they come in an order of their own


@dataclasses.dataclass(frozen=True)
class Collapse:
    """How to see an array as (O, C, I): transpose by `order`, then reshape."""

    order: tuple[int, ...]
    shape: tuple[int, int, int]
    last: tuple[int | None, ...] = dataclasses.field(repr=False)  # axis of O, of C and of I: its stride is theirs

    @functools.cached_property
    def in_order(self) -> bool:
        return self.order == tuple(range(len(self.order)))

    def view(self, array: np.ndarray) -> np.ndarray:
        return (array if self.in_order else array.transpose(self.order)).reshape(self.shape)

    def seen(self, span: Span) -> Span:
        """The same view, by its strides: a library's own reshape may copy."""
        (o, c, i), s = self.last, span.strides
        return span.seen(self.shape, (0 if o is None else s[o], 0 if c is None else s[c], 0 if i is None else s[i]))


@functools.lru_cache(maxsize=4096)
def collapse(
    shape: tuple[int, ...], axes: tuple[int, ...], *strides: tuple[int, ...], samples: Samples | None = None
) -> Collapse | None:
    """The common view of arrays of one shape (no axis of size 0) and these strides, or None if there is none.

    `axes` are the channel axes, ascending. The first array's strides set the order of the axes.

    >>> collapse((8, 3, 4, 4), (1,), (192, 64, 16, 4))  # float32, NCHW
    Collapse(order=(0, 1, 2, 3), shape=(8, 3, 16))
    >>> collapse((8, 3, 4, 4), (1,), (192, 4, 48, 12))  # the same shape in channels-last memory
    Collapse(order=(0, 2, 3, 1), shape=(128, 3, 1))
    >>> collapse((8, 3, 4, 4), (1,), (192, 64, 16, 4), (192, 4, 48, 12))  # one of each: (N, C, H W) fits both
    Collapse(order=(0, 1, 2, 3), shape=(8, 3, 16))
    >>> collapse((8, 3, 4, 4), (1,), (192, 4, 48, 12), samples=Samples(0, alone=True))
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
    if samples is not None and samples.axis not in ones:
        if not outer and inner[0] == samples.axis:
            outer, inner = inner[:1], inner[1:]
        elif not outer or outer[0] != samples.axis:
            return None
        elif samples.alone and not inner:
            outer, inner = outer[:1], outer[1:]

    def size(group: list[int]) -> int:
        return math.prod(shape[a] for a in group)

    ends = tuple(group[-1] if group else None for group in (outer, c, inner))
    return Collapse((*ones, *outer, *c, *inner), (size(outer), size(c), size(inner)), ends)


def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """A dense array whose axes follow each other in memory as under `strides`: np.empty_like without the array."""
    dense, places = memory_order(shape, strides)
    return np.empty(dense, dtype).transpose(places)


class Few(NamedTuple):
    """Some channels of an array, (O, n, I), as a view of it has all of them."""

    seen: np.ndarray
    plan: Collapse

    @classmethod
    def beside(cls, seen: np.ndarray, plan: Collapse, number: int) -> Few:
        """New ones, in memory as the view `seen` of all channels is."""
        outer, _, inner = plan.shape
        return cls(empty((outer, number, inner), seen.strides, seen.dtype), plan)


class Views:
    """Inputs and outputs of one call as (O, C, I) views that agree axis by axis.

    No array is copied whose memory the kernels can walk. One that they can't is copied once, in as near to its
    own layout as they can: when it is byte-swapped or misaligned, when its strides do not collapse (an image
    cropped in height and width; channel axes with another axis between them in memory), or when they collapse
    in another way than those of the first input. An output of that kind is written by `finish`.
    """

    __slots__ = ("_axes", "_copied", "_plan", "inputs", "views")

    def __init__(
        self, axes: tuple[int, ...], inputs: Sequence[Any], outputs: Sequence[Any], samples: Samples | None = None
    ) -> None:
        given = len(inputs)
        arrays: list[Any] = [*inputs, *outputs]
        used, plan = arrays, _common(axes, arrays, samples)
        spans = isinstance(arrays[0], Span)
        if plan is None or not all(map(is_aligned if spans else _is_plain, arrays)):
            used, plan = _walkable(axes, arrays, given, samples)
        self._axes, self._plan = axes, plan
        self.inputs = used[:given]  # what was walked in place of the inputs, in their own shape
        view: Any = plan.seen if spans else plan.view
        self.views = [None if a is None else view(a) for a in used]
        self._copied = [] if used is arrays else list(zip(arrays[given:], used[given:], strict=True))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(O, C, I)."""
        return self._plan.shape

    def positions(self, values: Any) -> Any:
        """What is the same for all channels, of x's shape with 1 on the channel axes, as (O, 1, I), contiguous."""
        (outer, _, inner), order = self._plan.shape, self._plan.order
        shape = outer, 1, inner
        if not isinstance(values, Span):
            return np.ascontiguousarray(values.transpose(order).reshape(shape))
        places = tuple(len(order) - order.index(a) for a in range(len(order)))  # strides that follow the view's order
        size = values.dtype.itemsize
        dense = dense_strides(values.shape, size, places)
        if any(s != d for s, d, n in zip(values.strides, dense, values.shape, strict=True) if n > 1):
            new = values.family.like(values, places)
            values.family.assign(new, values)
            values = new
        return values.seen(shape, dense_strides(shape, size))

    def few(self, number: int) -> Few:
        """A new array of so many channels, in memory as the first input is."""
        return Few.beside(self._first(), self._plan, number)

    def few_seen(self, few: Few) -> np.ndarray:
        """Such an array of another call on the same shape, as (O, n, I) in the memory order of the first input."""
        seen, plan = few
        outer, _, inner = self._plan.shape
        if plan.order != self._plan.order or plan.shape != self._plan.shape:
            shape, number = self.inputs[0].shape, seen.shape[1]
            one = next(a for a in self._axes if shape[a] > 1)  # all of them on one channel axis, and 1 on the others
            sizes = [number if a == one else 1 if a in self._axes else shape[a] for a in plan.order]
            each = seen.reshape(sizes).transpose(np.argsort(plan.order))
            seen = each.transpose(self._plan.order).reshape(outer, number, inner)
        wanted = empty(seen.shape, self._first().strides, seen.dtype)
        if any(s != t for s, t, n in zip(seen.strides, wanted.strides, seen.shape, strict=True) if n > 1):
            wanted[...] = seen
            return wanted
        return seen

    def _first(self) -> Any:
        return self.views[0]

    def finish(self) -> None:
        for target, result in self._copied:
            if result is not target:
                family_of(target).assign(target, result)


def is_aligned(a: Span | None) -> bool:
    return a is None or a.address % a.dtype.itemsize == 0


def _is_plain(a: np.ndarray | None) -> bool:
    return a is None or (a.dtype.isnative and a.flags.aligned)


def _common(axes: tuple[int, ...], arrays: Sequence[Any], samples: Samples | None) -> Collapse | None:
    """The common view of arrays and of None, which stands for a result that nobody wants."""
    strides = [a.strides for a in arrays if a is not None]
    if samples is None:
        return collapse(arrays[0].shape, axes, *strides)
    return collapse(arrays[0].shape, axes, *strides, samples=samples)


def _walkable(
    axes: tuple[int, ...], arrays: Sequence[Any], given: int, samples: Samples | None
) -> tuple[list[Any], Collapse]:
    """The arrays, the first `given` of them inputs, with copies for those that need one; and their common view."""
    plain: Any = is_aligned if isinstance(arrays[0], Span) else _is_plain
    used = [a if plain(a) else dense_copy(a, a, i < given) for i, a in enumerate(arrays)]
    plan = _common(axes, used, samples)
    if plan is None:
        if _common(axes, used[:1], samples) is None:
            used[0] = _packed(axes, used[0], samples)
        fits = [_common(axes, [used[0], a], samples) is not None for a in used]
        used = [a if fits[i] else dense_copy(a, used[0], i < given) for i, a in enumerate(used)]
        plan = _common(axes, used, samples)
    if plan is None:
        used = [a if a is None else dense_copy(a, used[0], i < given) for i, a in enumerate(used)]
        plan = _common(axes, used, samples)
    assert plan is not None, "arrays of equal strides collapse alike"
    return used, plan


def dense_copy(a: Any, like: Any, filled: bool = True) -> Any:
    """A native, aligned array in the memory order of `like`; a copy of `a` if `filled`."""
    if isinstance(a, Span):
        new: Any = a.family.like(a, like.strides)
    else:
        new = np.empty_like(like, dtype=a.dtype.newbyteorder("="), subok=False)
    if filled:
        family_of(a).assign(new, a)
    return new


def _packed(axes: tuple[int, ...], a: Any, samples: Samples | None) -> Any:
    """A copy of `a` that collapses: in its own order if that will do, else with the channel axes last."""
    new = dense_copy(a, a)
    if _common(axes, [new], samples) is None:
        order = [*(i for i in range(a.ndim) if i not in axes), *axes]
        if not isinstance(a, Span):
            return np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))
        new = a.family.like(a, tuple(a.ndim - order.index(i) for i in range(a.ndim)))
        a.family.assign(new, a)
    return new
