"""The floor: a copy of x's bytes, by whichever way of copying is fastest here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np

PIECES = 64  # more than threads, so that a slow one doesn't hold up the others


@numba.njit(parallel=True, cache=True)
def streaming_copy(x: np.ndarray, y: np.ndarray) -> None:
    """Copy x to y, both (bytes,) of uint8, on all threads; pieces begin at multiples of 64 bytes."""
    for k in numba.prange(PIECES):
        start, stop = x.size * k // PIECES // 64 * 64, x.size * (k + 1) // PIECES // 64 * 64
        if k == PIECES - 1:
            stop = x.size
        y[start:stop] = x[start:stop]


def copies(source: np.ndarray, target: np.ndarray, torch: Any) -> dict[str, Callable[[], Any]]:
    """Ways to copy one (bytes,) array of uint8 to another, by name; `torch` is the module, or None."""
    found: dict[str, Callable[[], Any]] = {
        "numpy": partial(np.copyto, target, source),
        "streaming": partial(streaming_copy, source, target),
    }
    if torch is not None:
        found["torch"] = partial(torch.from_numpy(target).copy_, torch.from_numpy(source))
    return found
