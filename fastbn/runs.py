"""From checked arrays to kernels: views, what was asked for beyond batch norm, and whose statistics they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arguments import check_out
from .arrays import FLOAT64, Span, family_of, family_of_values, place_of
from .dispatch import Kernels, kernels
from .distributed import Shared, sums
from .extras import Asked, Extras
from .host import Caller
from .kept import assign_at, of_channels, picked, put_back
from .layout import Few, Samples, Views, channels_of, empty
from .saved import Saved, number_type


def new(shape: tuple[int, ...], dtype: np.dtype[Any], x: Any) -> Any:
    """A contiguous array beside x."""
    return x.family.new(shape, dtype, x.device) if isinstance(x, Span) else np.empty(shape, dtype)


def own(a: Any, caller: Caller | None = None, out: Any = None) -> Any:
    """The caller's own kind of array: the one that they gave for it, or a new one."""
    if caller is not None:
        return caller.result(a, out)
    return a.value if isinstance(a, Span) else a


def placed(
    where: str, name: str, out: Any, saved: Saved, dtype: np.dtype[Any], beside: Any, may_be: dict[str, Any],
    apart: dict[str, Any], caller: Caller | None = None,
) -> Any:  # fmt: skip
    """Where a result of x's size goes: to `out`, which may be some arrays and must lie apart from others, or to a new
    array."""
    if out is not None:
        return check_out(where, name, out, saved._shape, dtype, beside, may_be, apart, caller)
    if saved._like is not None:
        return saved._like.result()
    return (empty if caller is None else caller.empty)(saved._shape, saved._strides, dtype)


def flat(given: Any, number: int, dtype: np.dtype[Any], like: Span | None) -> Any:
    """(C,) for kernels to write to: the array given for it, or a new one."""
    if given is None or not _dense(given):
        return np.empty(number, dtype) if like is None else new((number,), dtype, like)
    return own(given).reshape(-1)


def shaped(values: Any, given: Any, shape: tuple[int, ...]) -> Any:
    """`values` (C,) in the channels' shape and in the array given for them, if there is one."""
    if values is None or (given is None and len(shape) == 1):
        return values
    if given is None:
        return values.reshape(shape)
    if not _dense(given):
        filled = values.reshape(shape)
        family_of(given).assign(given, given.family.locate(filled) if isinstance(given, Span) else filled)
    return own(given)


def _dense(a: Any) -> bool:
    return bool(a.dense if isinstance(a, Span) else a.flags.c_contiguous)


def elements(views: list[Any], backend: Kernels) -> list[Any]:
    """The views, all of one dtype, under that in which the kernels take their elements."""
    wanted = backend.element_view(views[0].dtype)
    return views if wanted is views[0].dtype else [None if v is None else v.view(wanted) for v in views]


def _each(views: list[Any], backend: Kernels) -> list[Any]:
    """The same, for views of several dtypes."""
    return [None if v is None else elements([v], backend)[0] for v in views]


def samples(asked: Asked | None, x: Any) -> Samples | None:
    """The axis that must come first, if groups of samples are asked for."""
    if asked is None or asked.groups is None:
        return None
    return Samples(asked.samples, asked.groups.order is not None and not isinstance(x, Span))


def run_forward(
    where: str, x: Any, y: Any, axes: tuple[int, ...], table: Any, given: tuple[Any, ...], eps: float,
    asked: Asked | None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Fills y and table; returns the masses of sets, x as the kernels walked it, which `backward` walks again, and x of
    the channels that are lost otherwise."""
    backend = kernels(where, x)
    masses = few = None
    lost: Any = None
    if asked is not None and (asked.weights is not None or asked.groups is not None):
        masses = asked.masses(channels_of(x.shape, axes), x.shape)
    if x.size == 0:
        family_of_values(table).clear(table)
        if masses is not None:
            family_of_values(masses).clear(masses)
        return masses, x, None
    if asked is None and x.dtype is (x if y is None else y).dtype:  # nearly every call
        views = Views(axes, [x], [y])
        read, written = elements(views.views, backend)
        backend.forward(read, written, table, given, eps)
        views.finish()
        return None, views.inputs[0], None
    residual = None if asked is None else asked.residual
    views = Views(axes, [x] if residual is None else [x, residual], [y], samples(asked, x))
    seen = _each(views.views, backend)
    more = None
    if asked is not None:
        if asked.lost is not None and isinstance(x, Span):
            lost = picked(x, axes, asked.lost)
        elif asked.lost is not None:
            lost = views.few(len(asked.lost))
            (few,) = elements([lost.seen], backend)
        more = asked.seen(views, masses, None if residual is None else seen[1], None, False, few)
    backend.forward(seen[0], seen[-1], table, given, eps, more)
    views.finish()
    return masses, views.inputs[0], lost


def run_forward_shared(
    where: str, x: Any, y: Any, axes: tuple[int, ...], table: Any, affine: tuple[Any, Any], eps: float,
    asked: Asked | None, shared: Shared, rows: np.ndarray,
) -> tuple[Shared, np.ndarray | None, Any]:  # fmt: skip
    """As `run_forward`, with the statistics of the whole batch."""
    family, device = place_of(table)
    hi, lo, var = rows
    gamma, beta = affine
    if shared.values == 0:  # no statistics anywhere, and none here
        return shared, *run_forward(where, x, y, axes, table, (gamma, beta, None, None), eps, asked)[:2]
    exact = isinstance(table, np.ndarray) and x.dtype == FLOAT64 and bool(lo.any())
    shift = beta
    with np.errstate(all="ignore"):
        invstd = 1 / np.sqrt(var + eps)
        if exact:  # given statistics have no lo: it goes into beta
            shift = (0.0 if beta is None else beta) - (1.0 if gamma is None else gamma) * invstd * lo
    given = gamma, shift, family.put(hi if exact else hi + lo, device), family.put(var, device)
    masses, kept, _ = run_forward(where, x, y, axes, table, given, eps, asked)
    if x.size == 0:
        table[:4] = family.put(np.stack([hi, lo, var, invstd]), device)
    elif exact:
        table[1], table[5] = lo, 0.0 if beta is None else beta
    return shared, None if masses is None else family.put(np.array([shared.values]), device), kept


def run_backward(where: str, dy: Any, x: Any, dx: Any, saved: Saved, dgamma: Any, dbeta: Any, frozen: bool) -> None:
    """Fills dx, dgamma and dbeta, those that are wanted."""
    backend = kernels(where, x)
    if dy.size == 0:
        _clear(dgamma, dbeta)
        return
    views = Views(saved._axes, [x, dy], [dx])  # x first: results take its memory layout
    read_x, read_dy, written = (elements if saved._units is None else _each)(views.views, backend)
    backend.backward(read_dy, read_x, written, saved._table, dgamma, dbeta, frozen)
    views.finish()


def _clear(*sums: Any) -> None:
    for values in sums:
        if values is not None:
            family_of_values(values).clear(values)


def _seen(
    backend: Kernels, dy: Any, x: Any, dx: Any, dr: Any, saved: Saved
) -> tuple[Views, tuple[Any, Any, Any], Extras | None]:
    """The views of a backward pass: (dy, x, dx), and what goes with them."""
    asked = saved._asked
    residual = None if asked is None else asked.residual
    inputs = [x, dy] if residual is None else [x, dy, residual]
    views = Views(saved._axes, inputs, [dx] if dr is None else [dx, dr], samples(asked, x))
    seen = _each(views.views, backend)
    more = None
    if asked is not None:
        residuals, few = (None if residual is None else seen[2], None if dr is None else seen[-1]), None
        if isinstance(saved._lost, Few):
            (few,) = elements([views.few_seen(saved._lost)], backend)
        more = asked.seen(views, saved._masses, *residuals, asked.save == "y", few)
    return views, (seen[1], seen[0], seen[len(inputs)]), more


def run_backward_with(where: str, dy: Any, x: Any, dx: Any, dr: Any, saved: Saved, dgamma: Any, dbeta: Any) -> None:
    """The same, with what was asked for beyond batch norm."""
    backend, asked = kernels(where, x), saved._asked
    assert asked is not None, "else run_backward does it"
    if dy.size == 0:
        _clear(dgamma, dbeta)
        return
    lost, lost_dy = asked.lost, None
    if lost is not None and isinstance(dy, Span):
        lost_dy = picked(dy, saved._axes, lost)  # before dx is written over dy
    views, seen, more = _seen(backend, dy, x, dx, dr, saved)
    sums = [dgamma, dbeta]
    if asked.groups is not None:
        kind = number_type(dy.dtype.itemsize)  # that of the sums: a dtype of theirs is their library's
        sums = [None if a is None else new((saved._table.shape[1],), kind, dy) for a in sums]
    backend.backward(*seen, saved._table, sums[0], sums[1], saved.frozen, more)
    views.finish()
    if asked.groups is not None:
        for total, parts in zip((dgamma, dbeta), sums, strict=True):
            if total is not None and parts is not None:
                family_of_values(total).total(parts, total)
    if lost_dy is not None:
        _run_lost(where, lost_dy, dx, saved, dgamma, asked, lost)


def _run_lost(where: str, dy: Span, dx: Any, saved: Saved, dgamma: Any, asked: Asked, at: Any) -> None:
    """dx and dgamma of the channels on a GPU that can't be had back from y, from their dy, and from their x, which was
    kept."""
    x = saved._lost
    found_dx = None if dx is None else x.family.like(x, x.strides)
    found = None if dgamma is None else new((len(at),), number_type(dy.dtype.itemsize), x)
    table = of_channels(saved._table, asked.sets, at)
    part = Saved(x, x, saved._axes, table, saved.frozen, asked._replace(save="x", lost=None), saved._masses)
    run_backward_with(where, dy, x, found_dx, None, part, found, None)
    if found_dx is not None:
        put_back(dx, saved._axes, at, found_dx)
    if dgamma is not None:
        assign_at(dgamma, at, found)


def run_backward_shared(
    where: str, dy: Any, x: Any, dx: Any, dr: Any, saved: Saved, dgamma: Any, dbeta: Any, reduce_params: bool
) -> None:
    """With the sums of all ranks: one message."""
    shared = saved._shared
    assert shared is not None, "of a forward pass with comm"
    local = total = np.zeros((2, saved._table.shape[1]))
    if not (dx is dgamma is dbeta is None):
        local = total = _sums(where, dy, x, saved)
    if dx is not None or (reduce_params and not (dgamma is dbeta is None)):
        total = sums(where, shared, local, saved.dtype)
    chosen = total if reduce_params else local
    family, device = place_of(saved._table)
    with np.errstate(all="ignore"):
        found = chosen[1] * family.host(saved._table)[3], chosen[0]
    for place, values in zip((dgamma, dbeta), found, strict=True):
        if place is not None:
            place[...] = values if isinstance(place, np.ndarray) else family.put(values, device)
    if dx is not None or dr is not None:
        _map(where, dy, x, dx, dr, saved, total, shared)


def _sums(where: str, dy: Any, x: Any, saved: Saved) -> np.ndarray:
    """(2, C) float64: sum g and sum g (x - mean), where g is dy times the activation's slope."""
    if dy.size == 0:
        return np.zeros((2, saved._table.shape[1]))
    if isinstance(dy, Span):
        return _sums_on_device(where, dy, x, saved)
    backend = kernels(where, dy)
    _, (read_dy, read_x, _), more = _seen(backend, dy, x, None, None, saved)
    found: np.ndarray = backend.gradient_sums(read_dy, read_x, saved._table, more)
    return found


def _map(where: str, dy: Any, x: Any, dx: Any, dr: Any, saved: Saved, sums: np.ndarray, shared: Shared) -> None:
    """dx and dresidual, from sums over the values of all ranks."""
    if dy.size == 0:
        return
    if isinstance(dy, Span):
        _map_on_device(where, dy, x, dx, dr, saved, sums, shared)
        return
    backend = kernels(where, dy)
    target = np.empty_like(dr) if dx is None else dx  # dresidual alone is rare: it costs a buffer
    views, seen, more = _seen(backend, dy, x, target, dr, saved)
    backend.gradient_map(*seen, saved._table, sums, shared.values, more)
    views.finish()


def _sums_on_device(where: str, dy: Span, x: Any, saved: Saved) -> np.ndarray:
    """As `_sums`, by the kernels for frozen statistics, whose sums are of any mean."""
    kind = number_type(dy.dtype.itemsize)
    found = [new((saved._table.shape[1],), kind, dy) for _ in range(2)]
    _run_constant(where, dy, x, None, None, saved, found[1], found[0])
    host = family_of_values(found[0]).host
    invstd = host(saved._table)[3]
    both = np.stack([host(found[0]), host(found[1])]).astype(np.float64)
    with np.errstate(all="ignore"):
        np.divide(both[1], invstd, out=both[1], where=invstd != 0)  # where no rank has weight, it is 0
    return both


def _run_constant(where: str, dy: Span, x: Any, dx: Any, dr: Any, saved: Saved, dgamma: Any, dbeta: Any) -> None:
    """Backward as if the statistics were constants: what kernels on a GPU add up and map without its means."""
    if saved._asked is None:
        run_backward(where, dy, x, dx, saved, dgamma, dbeta, True)
        return
    constant = Saved(x, x, saved._axes, saved._table, True, saved._asked, saved._masses)
    run_backward_with(where, dy, x, dx, dr, constant, dgamma, dbeta)


def _map_on_device(
    where: str, dy: Span, x: Any, dx: Any, dr: Any, saved: Saved, sums: np.ndarray, shared: Shared
) -> None:
    """As `_map`: what depends on x by forward's kernel, a dy by backward's for frozen statistics, and their sum."""
    rest = None
    if dx is not None:
        rest = dy.family.like(dx, dx.strides)
        _map_of_x(where, x, rest, saved, sums, shared)
    _run_constant(where, dy, x, dx, dr, saved, None, None)
    if rest is not None:
        target = dx.value
        target += rest.value


def _map_of_x(where: str, x: Any, rest: Span, saved: Saved, sums: np.ndarray, shared: Shared) -> None:
    """rest = -w gamma / std (sum g + xhat sum g xhat) / W, by forward's kernel for frozen statistics.

    Weights count by their ratios alone, and a half type holds the product: so they are divided by the largest.
    """
    family, device = place_of(saved._table)
    hi, lo, var, invstd, gamma, _ = family.host(saved._table)
    asked, weights, most = None, None, 1.0
    if saved._asked is not None and saved._asked.weights is not None:
        asked = saved._asked.plain()._replace(masked="zero")  # x may be NaN where they are 0
        weights = saved._asked.weights.value
        most = float(weights.max())
        most = most if 0 < most < np.inf else 1.0
    with np.errstate(all="ignore"):
        scale, shift = (-most * gamma * invstd * a / shared.values for a in (invstd * sums[1], sums[0]))
    given = tuple(family.put(a, device) for a in (scale, shift, hi + lo, var))
    run_forward(where, x, rest, saved._axes, new((6, len(hi)), FLOAT64, rest), given, shared.eps, asked)
    if weights is not None:
        values = rest.value
        values *= weights / most
