"""What `save="y"` takes besides y: the x of channels that can't be had back from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .arrays import NUMBA, Span, family_of_values, place_of
from .extras import Asked


def lost_channels(
    where: str,
    number: int,
    gamma: Any,
    beta: Any,
    result: np.dtype[Any],
    asked: Asked,
) -> np.ndarray:
    """(n,): those of so many channels whose x can't be had back from y, of the dtype `result`.

    y's rounding of eps |y| moves xhat by eps |beta / gamma|: at most 64 eps are allowed. Where y is subnormal it is
    rounded more. elu flattens towards its limit, where y's eps moves z by eps exp(-z), and exp(z) - 1 is off by eps
    near 0: xhat may be off by 512 eps five standard deviations below the mean; of half types by 64 at four. So dx is
    within 1e-5 of its largest in float32: 4.2e-6 at worst, of 1500 channels of 200,000 normal values with gamma 0.5 to
    3, beta -2 to 2 and a dy that grows with x, where 1024 eps at four deviations left 1.1e-4. (A dx that is but the
    rest of a difference has no such bound.) Of gamma 1, beta down to -1.2 is had back; of beta 0, gamma up to 1.3.

    gamma and beta on a GPU are copied from there, for which the device is waited for.
    """
    found = []
    for values, absent in ((gamma, 1.0), (beta, 0.0)):
        try:
            host = np.full(number, absent) if values is None else values
            found.append(host if isinstance(host, np.ndarray) else _in_main_memory(host))
        except Exception as error:
            raise RuntimeError(
                f"{where}: save='y' reads gamma and beta in main memory, to see which channels can't be had back from "
                "y, and they can't be copied there. While a CUDA graph is captured, pass save='x'"
            ) from error
    gamma, beta = (values.reshape(-1) for values in found)
    scale = np.abs(gamma, dtype=np.float64)
    least = 2.0**-14 if result.char == "e" else 1e-30
    slope = asked.parameter if asked.activation else 1.0
    had = scale >= np.maximum(np.abs(beta, dtype=np.float64) * 2.0**-6, least / min(1.0, slope))
    had &= scale < 1e30 / max(1.0, slope)
    if asked.activation == "elu":
        with np.errstate(over="ignore", invalid="ignore"):
            deviations, limit = (4.0, 64.0) if result.itemsize == 2 else (5.0, 512.0)
            had &= np.exp(deviations * scale - beta) <= limit * scale
    return np.flatnonzero(~had)


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


def picked(x: Span, axes: tuple[int, ...], at: np.ndarray) -> Span:
    """A copy of the channels `at`: of x's shape with n on one channel axis and 1 on the others, and in memory in x's
    order."""
    one = _one_of(x.shape, axes)
    shape = tuple(len(at) if a == one else 1 if a in axes else n for a, n in enumerate(x.shape))
    new = x.family.like(Span(x.family, None, 0, shape, (), x.dtype, x.type, x.device), x.strides)
    for ours, theirs in _each(x, new, axes, at):
        x.family.assign(theirs, ours)
    return new


def put_back(x: Span, axes: tuple[int, ...], at: np.ndarray, values: Span) -> None:
    """The opposite."""
    for ours, theirs in _each(x, values, axes, at):
        x.family.assign(ours, theirs)


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


def _each(x: Span, few: Span, axes: tuple[int, ...], at: np.ndarray) -> Iterator[list[Span]]:
    """A channel of `x`, and that of `few` which belongs to it; a library has no call for all of them, but for each."""
    one, places = _one_of(x.shape, axes), np.unravel_index(at, tuple(x.shape[a] for a in axes))
    for j, place in enumerate(zip(*places, strict=True)):
        ours, theirs = dict(zip(axes, map(int, place), strict=True)), {a: j if a == one else 0 for a in axes}
        yield [x.family.locate(array.value[_only(where, x.shape)]) for array, where in ((x, ours), (few, theirs))]


def _only(where: dict[int, int], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(where[a], where[a] + 1) if a in where else slice(None) for a in range(len(shape)))
