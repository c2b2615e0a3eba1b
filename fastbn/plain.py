"""Plain calls, the short way: what one comes to is read off shape, strides and dtype, and kept.

Of a call on a small array, checks and views take longest. What doesn't depend on values is found once, by the same
functions as in any other call; what is left for each call is the parameters' check, the kernel and new arrays.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from .arguments import are_ready, check_eps, check_frozen, check_real, check_sign, is_normalized, overlap
from .arrays import FLOAT32, FLOAT64, Span, dense_strides, on_device
from .dispatch import Kernels, kernels
from .extras import Asked, Extras
from .kept import lost_channels
from .layout import Channels, Collapse, Few, channels_of, collapse, is_aligned
from .moments import Moments
from .runs import elements
from .saved import number_type


class Way(NamedTuple):
    """What plain calls on arrays of one shape, memory layout and dtype come to."""

    axes: tuple[int, ...]
    channels: Channels
    seen: Collapse  # the view of x, and of new arrays like it
    strides: tuple[int, ...]  # of new arrays
    sums: np.dtype[Any]  # of dgamma and dbeta
    bits: bool  # whether kernels may take elements under another dtype

    def views(self, backend: Kernels, *arrays: np.ndarray) -> list[Any]:
        seen = [*map(self.seen.view, arrays)]
        return elements(seen, backend) if self.bits else seen

    def takes(self, out: Any, like: np.ndarray, *others: np.ndarray) -> bool:
        """Whether `out` is like what would be made for a result like `like`, and has nothing in common with others."""
        if type(out) is not np.ndarray or out.dtype is not like.dtype or out.shape != like.shape:
            return False
        return out.strides == self.strides and _apart(out, *others)

    def new_sums(self) -> tuple[np.ndarray, np.ndarray]:
        return np.empty(self.channels.number, self.sums), np.empty(self.channels.number, self.sums)

    def places(self, dy: np.ndarray, x: np.ndarray, out: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Where dx, dgamma and dbeta go; None where `out` needs the other checks, or is something of these itself."""
        number, sums = self.channels.number, self.sums
        if out is None:
            return np.empty_like(x), *self.new_sums()
        dx, *rest = out if type(out) is tuple and len(out) == 3 else (out, None, None)
        if dx is None:
            dx = np.empty_like(x)
        elif not self.takes(dx, dy, dy, x):
            return None
        found = [dx]
        for given in rest:
            if given is None:
                found.append(np.empty(number, sums))
                continue
            alike = type(given) is np.ndarray and given.dtype is sums and given.shape == (number,)
            if not (alike and given.strides == (sums.itemsize,) and _apart(given, dy, x, *found)):
                return None
            found.append(given)
        return found[0], found[1], found[2]


def _apart(out: np.ndarray, *others: np.ndarray) -> bool:
    flags = out.flags
    if not (flags.writeable and flags.aligned):
        return False
    owner = out if out.base is None else out.base
    own = type(owner) is np.ndarray and owner.flags.owndata
    for other in others:
        whose = other if other.base is None else other.base
        if own and whose is not owner and type(whose) is np.ndarray and whose.flags.owndata:  # nine times 0.3 us saved
            continue
        if np.may_share_memory(out, other):
            return False
    return True


@functools.lru_cache(maxsize=4096)
def way_of(shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any], axis: int) -> Way | None:
    """None where a call needs more: copies, a warning, an error, or nothing to be done at all."""
    if not (-len(shape) <= axis < len(shape) > 1 and is_normalized(dtype) and dtype.isnative):
        return None
    axes = (axis % len(shape),)
    channels = channels_of(shape, axes)
    if channels.number == 0 or channels.values < 2:
        return None
    new = dense_strides(shape, dtype.itemsize, strides)
    if (seen := collapse(shape, axes, strides, new)) is None:
        return None
    return Way(axes, channels, seen, new, number_type(dtype.itemsize), dtype not in (FLOAT32, FLOAT64))


def forward_plainly(
    where: str, way: Way, x: np.ndarray, y: np.ndarray, gamma: Any, beta: Any, eps: Any, frozen: Any,
    asked: Asked | None = None,
) -> tuple[np.ndarray, Asked | None, Few | None] | None:  # fmt: skip
    """Fills y, and gives the table (6, C), `asked`, and what is kept of x. `asked` has an activation at most, and what
    is saved: with "y" it comes back with the channels that y doesn't tell of, whose x is kept. None where those are
    all, with nothing written."""
    eps, given = check_eps(where, eps), _given(where, way, x, gamma, beta, frozen)
    backend, number = kernels(where, x), way.channels.number
    more = few = None
    if asked is not None:
        if asked.save == "y" and len(at := lost_channels(where, number, given[0], given[1], x.dtype, asked)):
            if len(at) == number:
                return None
            asked, few = asked._replace(lost=at), Few.beside(way.seen.view(y), way.seen, len(at))
        more = asked.bare(kept=_elements_of(few, backend))
    table = np.empty((6, number))
    read, written = way.views(backend, x, y)
    backend.forward(read, written, table, given, eps, more)
    return table, asked, few


def _elements_of(few: Few | None, backend: Kernels) -> Any:
    return None if few is None else elements([few.seen], backend)[0]


def infer_plainly(
    where: str, x: Any, mean: Any, var: Any, gamma: Any, beta: Any, axis: int, eps: Any, out: Any,
    more: Extras | None,
) -> Any:  # fmt: skip
    """y by given statistics, without a table; None where a call needs more. `more` has an activation at most."""
    if (way := way_of(x.shape, x.strides, x.dtype, axis)) is None or not x.flags.aligned:
        return None
    y = np.empty_like(x) if out is None else out
    if not (y.strides == way.strides if out is None else way.takes(out, x, x)):
        return None
    eps, given = check_eps(where, eps), _given(where, way, x, gamma, beta, (mean, var))
    backend = kernels(where, x)
    read, written = way.views(backend, x, y)
    backend.forward(read, written, None, given, eps, more)
    return y


def _given(where: str, way: Way, x: np.ndarray, gamma: Any, beta: Any, frozen: Any) -> tuple[Any, ...]:
    shape = way.channels.shape
    pair = (None, None) if frozen is None else frozen
    if type(pair) is tuple and len(pair) == 2 and are_ready(given := (gamma, beta, *pair), shape):
        if frozen is None:
            return given
        if pair[0] is not None and pair[1] is not None:
            check_sign(where, "var", pair[1])
            return given
    gamma = None if gamma is None else check_real(where, "gamma", gamma, shape, x)
    beta = None if beta is None else check_real(where, "beta", beta, shape, x)
    return gamma, beta, *((None, None) if frozen is None else check_frozen(where, frozen, shape, x))


def moments_plainly(where: str, way: Way, x: np.ndarray) -> Moments:
    """What `fastbn.moments` gives."""
    backend, table, count = kernels(where, x), np.empty((6, way.channels.number)), way.channels.values
    (read,) = way.views(backend, x)
    backend.forward(read, None, table, (None, None, None, None), 1.0)
    m2 = table[2]
    if x.itemsize < 8:  # float64 can have their squares; `errstate` takes 0.8 us
        m2 *= count
    else:
        with np.errstate(all="ignore"):
            m2 *= count
    return Moments.found(count, table[0], m2, way.sums, table[1])


def backward_plainly(
    where: str, way: Way, dy: np.ndarray, x: np.ndarray, places: tuple[np.ndarray, np.ndarray, np.ndarray],
    table: np.ndarray, frozen: bool, asked: Asked | None = None, few: Few | None = None,
) -> None:  # fmt: skip
    """Fills dx, dgamma and dbeta, as of `Way.places`; `asked` and `few` as forward gave them."""
    backend, more = kernels(where, x), None
    if asked is not None:
        more = asked.bare(asked.save == "y", _elements_of(few, backend))
    read_dy, read_x, written = way.views(backend, dy, x, places[0])
    backend.backward(read_dy, read_x, written, table, places[1], places[2], frozen, more)


def forward_on_device(
    where: str, x: Any, gamma: Any, beta: Any, axis: int, eps: Any, out: Any
) -> tuple[Way, Span, Span, Any] | None:
    """The way, x, y and the table of a plain training pass on a GPU; None where a call needs more."""
    family = on_device(x)
    if family is None or family.refusal(x, "x") is not None:
        return None
    read = family.locate(x)
    if (
        read.dtype is None
        or (way := way_of(read.shape, read.strides, read.dtype, axis)) is None
        or not is_aligned(read)
    ):
        return None
    for given in (gamma, beta):
        if given is not None and not family.fits(given, way.channels.shape, read.device):  # type: ignore[arg-type]
            return None
    y = family.like(read, way.strides) if out is None else _located(family, out, "out")
    if y is None or not _alike(y, read, way.strides) or (out is not None and overlap(read, y)):
        return None
    eps = check_eps(where, eps)
    backend, seen = kernels(where, read), way.seen.seen
    table = family.new((6, way.channels.number), FLOAT64, read.device)
    backend.forward(seen(read), seen(y), table, (gamma, beta, None, None), eps)
    return way, read, y, table


def backward_on_device(where: str, way: Way, dy: Any, x: Span, table: Any, out: Any) -> tuple[Any, Any, Any] | None:
    """dx, dgamma and dbeta of such a pass; None where dy or `out` need the other checks."""
    given = _located(x.family, dy, "dy")
    if given is None or not (_alike(given, x, x.strides) or _alike(given, x, way.strides)):
        return None
    if (places := _places_on_device(way, given, x, out)) is None:
        return None
    dx, dgamma, dbeta = places
    seen = way.seen.seen
    kernels(where, given).backward(seen(given), seen(x), seen(dx), table, dgamma, dbeta, False)
    return dx.value, dgamma, dbeta


def _places_on_device(way: Way, dy: Span, x: Span, out: Any) -> tuple[Span, Any, Any] | None:
    """As `Way.places`."""
    family, shape = x.family, (way.channels.number,)
    large, *small = out if type(out) is tuple and len(out) == 3 else (out, None, None)
    dx = family.like(x, way.strides) if large is None else _located(family, large, "out")
    if dx is None or not _alike(dx, x, way.strides):
        return None
    if large is not None and (overlap(dx, dy) or overlap(dx, x)):
        return None
    apart, sums = [dy, x, dx], []
    for a in small:
        if a is None:
            sums.append(family.new(shape, way.sums, x.device))
            continue
        found = _located(family, a, "out")
        if found is None or not family.fits(a, shape, x.device) or found.dtype != way.sums:
            return None
        if any(overlap(found, other) for other in apart):
            return None
        apart.append(found)
        sums.append(a)
    return dx, sums[0], sums[1]


def _located(family: Any, value: Any, name: str) -> Span | None:
    """Where `value` lies; None where it isn't an array of this family."""
    if not family.owns(value) or family.refusal(value, name) is not None:
        return None
    found: Span = family.locate(value)
    return found


def _alike(a: Span, x: Span, strides: tuple[int, ...]) -> bool:
    """Whether `a` is like x, under these strides."""
    return (a.type, a.shape, a.strides, a.device) == (x.type, x.shape, strides, x.device) and is_aligned(a)
