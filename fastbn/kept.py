"""What `save="y"` takes besides y: the x of channels that can't be had back from it, and a table for the others."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .arrays import NUMBA, Span, family_of_values, place_of
from .dispatch import get_backend
from .extras import Asked
from .layout import channels_of, collapse, empty

LONG = 1 << 18  # bytes of a channel


def lost_channels(
    where: str,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    gamma: Any,
    beta: Any,
    result: np.dtype[Any],
    asked: Asked,
) -> np.ndarray:
    """(n,): the channels whose x can't be had back from y, of the dtype `result`.

    y's rounding of eps |y| moves xhat by eps |beta / gamma|: at most 64 eps are allowed. Where y is subnormal it is
    rounded more. elu flattens towards its limit, where y's eps moves z by eps exp(-z), and exp(z) - 1 is off by eps
    near 0: xhat may be off by 1024 eps four standard deviations below the mean, of half types by 64.

    gamma and beta on a GPU are copied from there, for which the device is waited for.
    """
    number = channels_of(shape, axes).number
    found = []
    for values, absent in ((gamma, 1.0), (beta, 0.0)):
        try:
            host = np.full(number, absent) if values is None else _in_main_memory(values)
        except Exception as error:
            raise RuntimeError(
                f"{where}: save='y' reads gamma and beta in main memory, to see which channels can't be had back from "
                "y, and they can't be copied there. While a CUDA graph is captured, pass save='x'"
            ) from error
        found.append(host.astype(np.float64).reshape(-1))
    scale, shift = np.abs(found[0]), found[1]
    least = 2.0**-14 if result.char == "e" else 1e-30
    slope = asked.parameter if asked.activation else 1.0
    had = (scale >= np.abs(shift) * 2.0**-6) & (scale * min(1.0, slope) > least) & (scale * max(1.0, slope) < 1e30)
    if asked.activation == "elu":
        with np.errstate(over="ignore", invalid="ignore"):
            had &= np.exp(4.0 * scale - shift) <= (64.0 if result.itemsize == 2 else 1024.0) * scale
    return np.flatnonzero(~had)


def inverse_table(table: Any) -> Any:
    """For `backward` on z = gamma xhat + beta in place of x: its mean is beta, and its 1 / std 1 / gamma, with sign."""
    family, device = place_of(table)
    numbers = family.numbers(table)
    xp = np if isinstance(numbers, np.ndarray) else family.xp
    _, _, var, invstd, gamma, beta = numbers
    with np.errstate(all="ignore"):
        scale = gamma * invstd
        rows = beta, xp.zeros_like(beta), scale * scale * var, 1 / gamma, gamma * scale, beta
        made = xp.stack(rows)
    return _to_numba(made, device) if family is NUMBA else made


def of_channels(table: Any, sets: int, at: np.ndarray) -> Any:
    """(6, G n): the columns of these channels in a table (6, G C)."""
    family, device = place_of(table)
    numbers = family.numbers(table)
    index = at if isinstance(numbers, np.ndarray) else family.put(at, device)
    made = numbers.reshape(6, sets, -1)[:, :, index].reshape(6, -1)
    if family is NUMBA:
        return _to_numba(made, device)
    return np.ascontiguousarray(made) if isinstance(made, np.ndarray) else made


def assign_at(values: Any, at: np.ndarray, found: Any) -> None:
    """values[at] = found, of arrays (C,) and (n,)."""
    family, device = place_of(values)
    if family is NUMBA:
        host = _in_main_memory(values)
        host[at] = _in_main_memory(found)
        values.copy_to_device(host)
    else:
        values[at if isinstance(values, np.ndarray) else family.put(at, device)] = found


def picked(x: Any, axes: tuple[int, ...], at: np.ndarray) -> Any:
    """A copy of the channels `at`: of x's shape with n on one channel axis and 1 on the others, and in memory in x's
    order."""
    one = _one_of(x.shape, axes)
    shape = tuple(len(at) if a == one else 1 if a in axes else n for a, n in enumerate(x.shape))
    if isinstance(x, Span):
        new = x.family.like(Span(x.family, None, 0, shape, (), x.dtype, x.type, x.device), x.strides)
        for ours, theirs in _each(x, new, axes, at):
            x.family.assign(theirs, ours)
        return new
    made = empty(shape, x.strides, x.dtype)
    if not _copied(x, axes, at, made, False):
        _as_one(made, x.shape, axes)[...] = _last(x, axes)[(..., *_places(x.shape, axes, at))]
    return made


def put_back(x: Any, axes: tuple[int, ...], at: np.ndarray, values: Any) -> None:
    """The opposite."""
    if isinstance(x, Span):
        for ours, theirs in _each(x, values, axes, at):
            x.family.assign(ours, theirs)
    elif not _copied(x, axes, at, values, True):
        _last(x, axes)[(..., *_places(x.shape, axes, at))] = _as_one(values, x.shape, axes)


def _in_main_memory(values: Any) -> np.ndarray:
    family = family_of_values(values)
    return family.host(family.numbers(values))


def _to_numba(values: np.ndarray, device: int) -> Any:
    made = NUMBA.new(values.shape, values.dtype, device)
    made.copy_to_device(np.ascontiguousarray(values))
    return made


def _one_of(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """The first channel axis with more than one channel: views as (O, C, I) take those of one for no axis at all."""
    return next((a for a in axes if shape[a] > 1), axes[0])


def _places(shape: tuple[int, ...], axes: tuple[int, ...], at: np.ndarray) -> tuple[Any, ...]:
    """Indices on the channel axes of these channels."""
    return np.unravel_index(at, tuple(shape[a] for a in axes))


def _last(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """With the channel axes last."""
    return x.transpose(*[a for a in range(x.ndim) if a not in axes], *axes)


def _as_one(few: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    """The same of `picked` channels, without the axes that have one."""
    one = _one_of(shape, axes)
    index: tuple[Any, ...] = ..., *[slice(None) if a == one else 0 for a in axes]
    found: np.ndarray = _last(few, axes)[index]
    return found


def in_runs(*arrays: Any, axes: tuple[int, ...]) -> bool:
    """Whether each channel of those that there are is so long, and in runs, that a kernel takes it best where it lies.

    Two of 64 channels of 103 MB: 2.5 ms by copies, most of it new memory's pages, and 0.8 so; of fewer bytes a call
    takes as long as copies.
    """
    return all(a is None or (isinstance(a, np.ndarray) and _in_long_runs(a, axes)) for a in arrays)


def _in_long_runs(x: np.ndarray, axes: tuple[int, ...]) -> bool:
    plan = collapse(x.shape, axes, x.strides)
    if plan is None:
        return False
    outer, _, inner = plan.shape
    return inner > 1 and plan.view(x).strides[2] == x.itemsize and outer * inner * x.itemsize >= LONG


def each_channel(shape: tuple[int, ...], axes: tuple[int, ...], at: np.ndarray) -> Iterator[tuple[Any, Any]]:
    """Of each of the channels `at`: where it lies in an array of this shape, and where among what was `picked`."""
    one = _one_of(shape, axes)
    for j, place in enumerate(zip(*_places(shape, axes, at), strict=True)):
        own, few = dict(zip(axes, map(int, place), strict=True)), {a: j if a == one else 0 for a in axes}
        yield tuple(  # type: ignore[misc]
            tuple(slice(where[a], where[a] + 1) if a in where else slice(None) for a in range(len(shape)))
            for where in (own, few)
        )


def _each(x: Span, few: Span, axes: tuple[int, ...], at: np.ndarray) -> Iterator[tuple[Span, Span]]:
    """A channel of `x`, and that of `few` which belongs to it; a library has no call for all of them, but for each."""
    for ours, theirs in each_channel(x.shape, axes, at):
        yield x.family.locate(x.value[ours]), x.family.locate(few.value[theirs])


def _copied(x: np.ndarray, axes: tuple[int, ...], at: np.ndarray, few: np.ndarray, back: bool) -> bool:
    """few = x[:, at], or the opposite, by the kernel for that, if it can walk x."""
    if get_backend() == "reference" or not (x.size and x.dtype.isnative and x.flags.aligned):
        return False
    plan = collapse(x.shape, axes, x.strides)
    if plan is None:
        return False
    copy = importlib.import_module("fastbn.kernels.cpu.channels").copy_channels
    all_of_them, wide = np.arange(len(at)), plan.view(x)
    narrow = few.transpose(plan.order).reshape(plan.shape[0], len(at), plan.shape[2])
    if back:
        copy(narrow, all_of_them, wide, at)
    else:
        copy(wide, at, narrow, all_of_them)
    return True
