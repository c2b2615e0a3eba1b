"""The portable GPU backend: Numba device arrays, by numba.cuda. The contract is in `fastbn.kernels`.

blocks    device functions: moments, how they merge, one value of y and of dx; for your own kernels too
kernels   sums, what they make of a channel, maps
plan      how a shape is cut
arrays    Numba's device arrays: views, copies, launches
target    numba.cuda, or what stands for it in Numba's simulator (NUMBA_ENABLE_CUDASIM=1), which runs all of this

Three launches a call: sums, C numbers, map; x is read twice and y written once (`bn.cu`, in CUDA C, reads once). These
kernels need shared memory and barriers only, and run on every GPU that Numba knows.

**Numbers.** A thread takes eight values at a time, in registers: their mean, and sums of the deviations from it, in the
arithmetic of the data. Those join float64 sums about the mean of the thread's first eight; threads, and then pieces of
a channel, merge by Chan's formula (Chan, Golub & LeVeque 1983) in trees whose order depends on the shape alone. An
outlier spoils the precision of its eight only. No atomics: the same arguments give the same bits, on every device.

**Streams.** A call runs on the stream of its first array that has one (`array.stream`: `cuda.as_cuda_array` takes it
from `__cuda_array_interface__`, `array.bind(stream)` sets it), else on Numba's default stream; it waits for nothing.

**In your own kernels.** The functions of `blocks`, which `@cuda.jit` code may call in blocks of 2^k threads, 256 at
most. A kernel that normalizes each row of a matrix by a block of its own:

    @cuda.jit
    def normalize_rows(x, y, gamma, beta, eps):  # x, y (rows, columns); gamma, beta (rows,)
        row = cuda.blockIdx.x
        n = hi = lo = m2 = 0.0
        for i in range(cuda.threadIdx.x, x.shape[1], cuda.blockDim.x):
            n, hi, lo, m2 = merge_moments(n, hi, lo, m2, 1.0, float64(x[row, i]), 0.0, 0.0)
        n, hi, lo, m2 = block_moments(n, hi, lo, m2, 1)
        scale = gamma[row] / math.sqrt(m2 / n + eps)
        for i in range(cuda.threadIdx.x, x.shape[1], cuda.blockDim.x):
            y[row, i] = normalize(float64(x[row, i]), hi, lo, scale, beta[row])
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

from .arrays import bounds, copy, device, empty, flat, host, launch, on, put, stream_of, view
from .blocks import (
    block_comoments,
    block_moments,
    gradient,
    merge_comoments,
    merge_moments,
    normalize,
)
from .kernels import BETA, FROZEN, GAMMA, backward_finish, forward_finish, kernels_of
from .plan import Sizes, plan_of
from .target import cuda

__all__ = [
    "FEATURES",
    "backward",
    "block_comoments",
    "block_moments",
    "bounds",
    "copy",
    "device",
    "element_view",
    "empty",
    "forward",
    "gradient",
    "host",
    "merge_comoments",
    "merge_moments",
    "normalize",
    "put",
    "view",
]

SIZES = Sizes()

FEATURES: frozenset[str] = frozenset()  # of `fastbn.kernels`' `more`: none

_kept = threading.local()


def element_view(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype under which elements of `dtype` come to the kernels, or None if they can't."""
    if dtype in (np.float16, np.float32, np.float64):
        return dtype
    return np.dtype(np.int16) if dtype.name == "bfloat16" else None


def forward(x: Any, y: Any, table: Any, given: tuple[Any, Any, Any, Any], eps: float) -> None:
    gamma, beta, mean, _ = given
    flags = GAMMA * (gamma is not None) | BETA * (beta is not None) | FROZEN * (mean is not None)
    cut, places, flats = _planned([x] if y is None else [x, y])
    stream, run = stream_of(x, y, table), kernels_of(x.dtype.name)
    with on(x):
        work = _workspace(x, stream, 4 * cut.pieces * x.shape[1])
        part = _cube(work, 0, (4, cut.pieces, x.shape[1]))
        if not flags & FROZEN:
            launch(run.forward_sums, cut.grid, cut.threads, stream, (flats[0], places[0], cut.cut, part))
        spare = next((a for a in given if a is not None), work)  # is not read
        blocks, threads, lanes = cut.finish
        arguments = (part, table, *(spare if a is None else a for a in given), flags, float(eps), lanes)
        launch(forward_finish, blocks, threads, stream, arguments)
        if y is not None:
            arguments = (flats[0], places[0], flats[1], places[1], cut.cut, table, True)
            launch(run.forward_map, cut.grid, cut.threads, stream, arguments)


def backward(dy: Any, x: Any, dx: Any, table: Any, dgamma: Any, dbeta: Any, frozen: bool) -> None:
    flags = GAMMA * (dgamma is not None) | BETA * (dbeta is not None) | FROZEN * frozen
    cut, places, flats = _planned([x, dy] if dx is None else [x, dy, dx])
    stream, run, channels = stream_of(dy, x, dx, table), kernels_of(x.dtype.name), x.shape[1]
    read = (flats[1], places[1], flats[0], places[0])
    with on(x):
        work = _workspace(x, stream, (5 * cut.pieces + 4) * channels)
        coefficients = _cube(work, 0, (4, channels))
        if flags != FROZEN:
            part = _cube(work, 4 * channels, (5, cut.pieces, channels))
            launch(run.backward_sums, cut.grid, cut.threads, stream, (*read, cut.cut, table, part))
            spare = next((a for a in (dgamma, dbeta) if a is not None), work)  # is not written
            blocks, threads, lanes = cut.finish
            gradients = [spare if a is None else a for a in (dgamma, dbeta)]
            launch(backward_finish, blocks, threads, stream, (part, table, *gradients, coefficients, flags, lanes))
        if dx is not None and frozen:
            arguments: tuple[Any, ...] = (*read[:2], flats[2], places[2], cut.cut, table, False)
            launch(run.forward_map, cut.grid, cut.threads, stream, arguments)
        elif dx is not None:
            arguments = (*read, flats[2], places[2], cut.cut, table, coefficients)
            launch(run.backward_map, cut.grid, cut.threads, stream, arguments)


def _planned(arrays: list[Any]) -> Any:
    x = arrays[0]
    cut = plan_of(tuple(x.shape), x.dtype.itemsize, tuple(tuple(a.strides) for a in arrays), SIZES)
    return cut, cut.places, [flat(a) for a in arrays]


def _workspace(a: Any, stream: Any, size: int) -> Any:
    """float64 numbers: the same ones for all calls of this thread on this stream, which follow one another."""
    key = device(a), int(stream) if stream else 0
    kept = vars(_kept)
    if key not in kept or kept[key].size < size:
        kept[key] = cuda.device_array(size, np.float64)
    return kept[key]


def _cube(work: Any, start: int, shape: tuple[int, ...]) -> Any:
    return view(work, shape, tuple(8 * math.prod(shape[k + 1 :]) for k in range(len(shape))), 8 * start)
