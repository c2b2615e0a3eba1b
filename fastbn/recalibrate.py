"""Exact statistics of a whole data set, read batch by batch, in place of running averages."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np

from .arguments import Axis, check_axis, check_shape, describe, integer
from .arrays import on_device
from .batchnorm import moments
from .distributed import ranks_of
from .host import check_host
from .layer import BatchNorm
from .moments import Moments
from .running import RunningStats

_PIECE = 32 << 20  # bytes of an array that is read piece by piece, unless `chunk` says how much
_PATIENCE = 2.0  # seconds without a progress bar


def recalibrate(
    batches: Any, target: Any, *, axis: Axis | None = None, chunk: int | None = None, progress: bool = True,
    comm: Any = None, scale: float = 1.0, zero_point: float = 0.0,
) -> Moments:  # fmt: skip
    """Mean and variance of all values of all batches, exactly, whatever the batches' sizes and order.

    Every batch is reduced to its `Moments`, and these merge in a fixed tree (Chan, Golub & LeVeque 1983): the result is
    that of `fastbn.moments` on everything at once, to 1e-12 in float64. It is not the average of the batches'
    variances, which PyTorch's `update_bn` takes, and which leaves out how their means differ; nor E[x^2] - E[x]^2,
    which fvcore's `update_bn_stats` takes, and which cancels at an offset.

    Parameters
    ----------
    batches : iterable, callable, or one array
        An iterator, list or data loader of batches; each an array as for `fastbn.moments`, `Moments` of one, or a
        function without arguments that gives either when its turn comes. Or a function that gives such an iterable
        (a generator function). Only one batch is held at a time, and empty ones don't count.
        Or one array with all the data, of any library that `fastbn.moments` takes, which may be a `numpy.memmap` larger
        than the memory: it is read piece by piece, where it lies.
    target : int, tuple of int, RunningStats or BatchNorm
        Channels, to be checked; or what is to get the result in place of its running statistics, by its own `ddof`.
        Nothing in it changes if anything fails.
    axis : int or tuple of int, optional
        The channel axis. Not given, the layer's own, or 1.
    chunk : int, optional
        For one array: how many rows, along its first axis that is no channel axis, are read at a time. Not given, as
        many as make 32 MB.
    progress : bool
        Show a progress bar once it takes over two seconds, if `rich` is installed and stderr is a terminal.
    comm : communicator or fastbn.Ranks, optional
        The batches are this rank's part of them, or none, and the result is that of all ranks, the same bits on each:
        one message at the end. The kinds are those of `fastbn.forward`.
    scale, zero_point : float
        What whole numbers in all arrays stand for, as in `fastbn.moments`. `Moments` are taken as they are.

    Returns
    -------
    Moments
        Of everything. Save them, merge others into them, take a batch back out.

    Raises
    ------
    ValueError
        For other channels than the target's; without any value; for a target with ddof, if no more values than that; if
        chunk is less than 1, or given for what isn't one array.
    TypeError
        For what is neither array nor iterable, and for batches that `fastbn.moments` refuses.

    In a net, a layer's input depends on the layers before it: recalibrate these first, or take `saved.moments` of all
    layers from one pass over the data in training mode.

    >>> import numpy as np, fastbn
    >>> x = np.sort(np.random.default_rng(0).normal(1e4, 1, (1000, 2)), axis=0).astype(np.float32)
    >>> bn = fastbn.BatchNorm(2, ddof=0)
    >>> fastbn.recalibrate(np.array_split(x, 7), bn).count
    1000
    >>> bool(np.allclose(bn.running.var, x.astype(float).var(0), rtol=1e-6))
    True
    """
    where = "fastbn.recalibrate"
    running = target.running if isinstance(target, BatchNorm) else target if isinstance(target, RunningStats) else None
    shape = check_shape(where, target) if running is None else running.shape
    if axis is None:
        axis = target.axis if isinstance(target, BatchNorm) else 1
    ranks = None if comm is None else ranks_of(where, comm)
    with contextlib.nullcontext() if ranks is None else ranks.joined(where):
        units = {"scale": scale, "zero_point": zero_point}
        found, full = _merged(where, batches, axis, chunk, progress, shape, ranks is not None, units)
    if ranks is not None:
        found = found.allreduce(ranks)
        full = Moments(full, np.zeros(1), np.zeros(1), np.float64).allreduce(ranks).count
        if not found.count:
            raise ValueError(f"{where}: batches has no values on any rank; expected at least one")
    if running is not None:
        running.replace(found, full)
    return found


def _merged(
    where: str, batches: Any, axis: Axis, chunk: int | None, progress: bool, shape: tuple[int, ...], may_be_empty: bool,
    units: dict[str, float],
) -> tuple[Moments, int]:  # fmt: skip
    """The moments of all batches, and how many had values."""
    items, total = _items(where, batches, axis, chunk)
    full = 0

    def each() -> Iterator[Moments]:
        nonlocal full
        number = -1
        for number, item in enumerate(_shown(items, total) if progress else items):
            item = item() if callable(item) else item
            part = item if isinstance(item, Moments) else moments(item, axis=axis, **units)
            if part.shape != shape:
                raise ValueError(
                    f"{where}: batch {number} (from 0) has channels of shape {part.shape}; expected {shape}, like "
                    f"target. Is axis={axis} the channel axis?"
                )
            full += part.count > 0
            yield part
        if may_be_empty and not full:
            yield Moments(0, np.zeros(shape), np.zeros(shape))
        elif not full:
            raise ValueError(f"{where}: batches has no values, in {number + 1} batches; expected at least one")

    return Moments.merge_all(each()), full


def pieces(x: Any, axes: tuple[int, ...], rows: int | None = None) -> Iterator[Any]:
    """Views of x, one behind the other along its first axis that is not among `axes` (ascending; x is at least 2-D).

    >>> [piece.shape for piece in pieces(np.ones((5, 3)), (1,), 2)]
    [(2, 3), (2, 3), (1, 3)]
    """
    axis, rows = _cut(x, axes, rows)
    for start in range(0, max(1, x.shape[axis]), rows):
        yield x[(slice(None),) * axis + (slice(start, start + rows),)]


def _cut(x: Any, axes: tuple[int, ...], rows: int | None) -> tuple[int, int]:
    axis = next((a for a in range(x.ndim) if a not in axes), 0)
    if len(axes) == x.ndim:  # one sample, whose channels stay together
        return 0, max(1, x.shape[0])
    if rows is None:
        size = np.prod(x.shape, dtype=float) / max(1, x.shape[axis]) * x.dtype.itemsize
        rows = max(1, int(_PIECE / max(1, size)))
    return axis, rows


def _items(where: str, batches: Any, axis: Axis, chunk: int | None) -> tuple[Iterable[Any], int | None]:
    """What to go through, and how much it is, if that is known."""
    given, chunk = chunk, None if chunk is None else integer(chunk, 1)
    if given is not None and chunk is None:
        raise ValueError(f"{where}: chunk is {describe(given)}; expected a number of rows, 1 or more, or None")
    if callable(batches) and not hasattr(batches, "__iter__"):
        batches = batches()
    batches = check_host(where, "batches", batches)
    if isinstance(batches, np.ndarray) or on_device(batches) is not None:
        axes = check_axis(where, batches, axis)
        along, rows = _cut(batches, axes, chunk)
        return pieces(batches, axes, rows), -(-batches.shape[along] // rows)
    if chunk is not None:
        raise ValueError(f"{where}: chunk is {chunk}, but batches is {describe(batches)}; chunk is for one array")
    if isinstance(batches, (str, bytes)) or not hasattr(batches, "__iter__"):
        raise TypeError(
            f"{where}: batches is {describe(batches)}; expected an iterable of arrays, or one array with all the data"
        )
    try:
        return batches, len(batches)
    except TypeError:
        return batches, None


def _shown(items: Iterable[Any], total: int | None) -> Iterator[Any]:
    """The items, with a progress bar on stderr once they take long, where somebody can see it."""
    start, bar, done = time.monotonic(), None, 0
    watched = sys.stderr is not None and sys.stderr.isatty() and find_spec("rich") is not None
    try:
        for done, item in enumerate(items):
            if bar is not None:
                bar(done)
            elif watched and time.monotonic() - start > _PATIENCE:
                bar, stop = _bar(total)
            yield item
        if bar is not None:
            bar(done + 1)
    finally:
        if bar is not None:
            stop()


def _bar(total: int | None) -> tuple[Callable[[int], None], Callable[[], None]]:
    """A bar that runs: how to move it, and how to end it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    shown = Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)
    task = shown.add_task("recalibrating, batch", total=total)
    shown.start()
    return lambda done: shown.update(task, completed=done), shown.stop
