"""The floor: a copy of x's bytes, by whichever way of copying is fastest here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

PIECES = 64  # more than threads, so that a slow one doesn't hold up the others
LINE = 64  # bytes


@intrinsic
def _stream_line(_typing: Any, _target: Any, _source: Any) -> Any:
    """Copy a line from one address to another, which is a multiple of 64, past the caches.

    A plain store reads the line that it is about to overwrite: half as much traffic again.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        line = ir.VectorType(ir.IntType(32), LINE // 4).as_pointer()
        store = builder.store(
            builder.load(builder.inttoptr(args[1], line), align=1), builder.inttoptr(args[0], line), align=LINE
        )
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return numba.types.void(numba.types.intp, numba.types.intp), codegen


@intrinsic
def _fence(_typing: Any) -> Any:
    """Stores past the caches are seen by other threads after a fence only."""

    def codegen(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return numba.types.void(), codegen


@numba.njit(parallel=True)
def streaming_copy(x: np.ndarray, y: np.ndarray) -> None:
    """Copy x to y, both (bytes,) of uint8, on all threads, past the caches."""
    lead = min(x.size, -y.ctypes.data % LINE)  # bytes before the first whole line of y
    lines = (x.size - lead) // LINE
    y[:lead] = x[:lead]
    for k in numba.prange(PIECES):
        source, target = x.ctypes.data + lead, y.ctypes.data + lead
        for j in range(lines * k // PIECES, lines * (k + 1) // PIECES):
            _stream_line(target + j * LINE, source + j * LINE)  # type: ignore[call-arg]
        _fence()  # type: ignore[call-arg]
    y[lead + lines * LINE :] = x[lead + lines * LINE :]


@numba.njit(parallel=True)
def parallel_copy(x: np.ndarray, y: np.ndarray) -> None:
    """Copy x to y, both (bytes,) of uint8, on all threads, through the caches."""
    for k in numba.prange(PIECES):
        start, stop = x.size * k // PIECES // LINE * LINE, x.size * (k + 1) // PIECES // LINE * LINE
        if k == PIECES - 1:
            stop = x.size
        y[start:stop] = x[start:stop]


def copies(source: np.ndarray, target: np.ndarray, torch: Any) -> dict[str, Callable[[], Any]]:
    """Ways to copy one (bytes,) array of uint8 to another, by name; `torch` is the module, or None."""
    found: dict[str, Callable[[], Any]] = {
        "numpy": partial(np.copyto, target, source),
        "streaming": partial(streaming_copy, source, target),
        "parallel": partial(parallel_copy, source, target),
    }
    if torch is not None:
        found["torch"] = partial(torch.from_numpy(target).copy_, torch.from_numpy(source))
    return found
