"""The portable GPU backend: Numba device arrays, by numba.cuda. The contract is in `fastbn.kernels`.

blocks        device functions: moments, how they merge, one value of y and of dx; for your own kernels too
activations   device functions: activations and their slopes
walk          which values a thread takes, and where these lie
elements      device functions: elements as numbers, and back
kernels       sums and maps
finish        what sums make of a channel, and a table by which y stands for x
plan          how a shape is cut
arrays        Numba's device arrays: views, copies, launches
calls         from a call's arrays to what kernels take: plans, lists of sets, workspaces
second        second order and forward mode: sums, what they make of a channel, the map
triples       device functions for its sums
target        numba.cuda, or what stands for it in Numba's simulator (NUMBA_ENABLE_CUDASIM=1), which runs all of this

Three launches a call: sums, C numbers, map; x is read twice and y written once (`bn.cu`, in CUDA C, reads once). These
kernels need shared memory and barriers only, and run on every GPU that Numba knows.

**Numbers.** A thread takes eight values at a time, in registers: their mean, and sums of the deviations from it, in the
arithmetic of the data. Those join float64 sums about the mean of the thread's first eight; threads, and then pieces of
a channel, merge by Chan's formula (Chan, Golub & LeVeque 1983) in trees whose order depends on the shape alone. An
outlier spoils the precision of its eight only. No atomics: the same arguments give the same bits, on every device.

**Beyond batch norm.** An activation, a residual, sets of outer indices (`groups`) and weights are compiled into the
same three launches, each combination on its own when it first comes; a plain call pays nothing. Backward computes what
the slope is of from x again, by forward's roundings, in the sums and in the map; of y it has a fourth launch, for the
table that goes with it. Sets have blocks of their own, as many as the largest needs, and a list of outer indices on the
device, which is kept for the next call on the stream. A new one is copied from main memory, for which Numba waits until
the stream's earlier work is done.

Weights are one more array to read, where they count: in forward's sums, in backward's map, and, if they mask, in all. A
value counts by its weight in the sums of its eight, about their weighted mean; one whose weight is 0 is left out, NaN
or not. Sums of weights are float64.

**Whole numbers.** With `whole`, x is uint8, int8, uint16 or int16, and all else float32: these are float32's kernels
with an x of another type. Without it int16 is bfloat16.

**Streams.** A call runs on the stream of its first array that has one (`array.stream`: `cuda.as_cuda_array` takes it
from `__cuda_array_interface__`, `array.bind(stream)` sets it), else on Numba's default stream; it waits for nothing but
a new list of sets.

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

from typing import Any

import numpy as np

from .arrays import bounds, copy, device, empty, host, launch, on, put, stream_of, view
from .blocks import (
    block_comoments,
    block_moments,
    gradient,
    merge_comoments,
    merge_moments,
    normalize,
)
from .calls import cube, has_sets, mode_of, planned, weights_of, workspace
from .finish import BETA, FROZEN, GAMMA, finishes_of, invert_table
from .kernels import PLAIN, How, kernels_of
from .plan import Sizes, ceil

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

FEATURES = frozenset({"activation", "residual", "groups", "weights", "save='y'"})  # of `fastbn.kernels`' `more`


def element_view(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype under which elements of `dtype` come to the kernels, or None if they can't."""
    if dtype in (np.float16, np.float32, np.float64):
        return dtype
    return np.dtype(np.int16) if dtype.name == "bfloat16" else None


def forward(
    x: Any, y: Any, table: Any, given: tuple[Any, Any, Any, Any], eps: float, more: Any = None, whole: bool = False
) -> None:
    gamma, beta, mean, _ = given
    flags = GAMMA * (gamma is not None) | BETA * (beta is not None) | FROZEN * (mean is not None)
    how, r, w = PLAIN, None, None
    if more is not None:
        r, w = None if y is None else more.residual, weights_of(more, mean is not None)
        how = How("" if y is None else more.activation, r is not None, False, has_sets(more), mode_of(more, w))
    stream = stream_of(x, y, table, r, w)
    by_weights = w is not None and mean is None
    with on(x):
        cut, walk, (read, write, beside, weigh), also = planned((x, y, r, w), how, more, stream, SIZES, whole)
        run, columns = kernels_of("float32" if whole else x.dtype.name, how), table.shape[1]
        work = workspace(x, stream, 4 * cut.pieces * columns)
        part = cube(work, 0, (4, cut.pieces, columns))
        if also:
            also = also._replace(r=beside[0], beside=beside[1], w=weigh[0], along=weigh[1])
        if not flags & FROZEN:
            launch(run.forward_sums, cut.grid, cut.threads, stream, (*read, walk, part, also))
        spare = next((a for a in given if a is not None), work)  # is not read
        blocks, threads, lanes = cut.finish
        arguments = (part, table, *(spare if a is None else a for a in given), flags, float(eps), lanes)
        mass = more.mass if by_weights else ()
        launch(finishes_of(by_weights).forward, blocks, threads, stream, (*arguments, mass))
        if y is not None:
            launch(run.forward_map, cut.grid, cut.threads, stream, (*read, *write, walk, table, True, also))


def backward(
    dy: Any, x: Any, dx: Any, table: Any, dgamma: Any, dbeta: Any, frozen: bool, more: Any = None, whole: bool = False
) -> None:
    flags = GAMMA * (dgamma is not None) | BETA * (dbeta is not None) | FROZEN * frozen
    how, r, dr, w = PLAIN, None, None, None
    if more is not None:
        r, dr, w = more.residual if more.activation else None, more.dresidual, weights_of(more, frozen)
        how = How(more.activation, r is not None, dr is not None, has_sets(more), mode_of(more, w))
    scaled = frozen and not how.activation and dr is None  # dx = a dy
    if how != PLAIN and not scaled:
        inverse = more.inverse and how.activation != ""
        how = how._replace(dx=dx is not None, constant=frozen or dx is None, inverse=inverse)
    stream = stream_of(dy, x, dx, table, r, dr, w)
    by_weights = w is not None and not frozen
    with on(x):
        arrays = x, dy, dx, r, dr, w
        cut, walk, (read, come, write, beside, behind, weigh), also = planned(arrays, how, more, stream, SIZES, whole)
        run, columns = kernels_of("float32" if whole else x.dtype.name, how), table.shape[1]
        work = workspace(x, stream, (5 * cut.pieces + 10) * columns)
        coefficients = cube(work, 0, (4, columns))
        of_x, summed = table, flags & (GAMMA | BETA) or not (frozen or dx is None)
        if more is not None and more.inverse and (summed or not scaled):
            table = cube(work, 4 * columns, (6, columns))
            launch(invert_table, ceil(columns, 128), 128, stream, (of_x, table))
        if also:
            also = also._replace(r=beside[0], beside=beside[1], dr=behind[0], behind=behind[1])
            also = also._replace(w=weigh[0], along=weigh[1])
        if summed:
            part = cube(work, 10 * columns, (5, cut.pieces, columns))
            launch(run.backward_sums, cut.grid, cut.threads, stream, (*come, *read, walk, table, part, also))
            spare = next((a for a in (dgamma, dbeta) if a is not None), work)  # is not written
            blocks, threads, lanes = cut.finish
            gradients = [spare if a is None else a for a in (dgamma, dbeta)]
            mass = more.mass if by_weights else ()
            arguments = (part, table, *gradients, coefficients, flags, lanes, mass)
            launch(finishes_of(by_weights).backward, blocks, threads, stream, arguments)
        if scaled and dx is not None:
            launch(run.forward_map, cut.grid, cut.threads, stream, (*come, *write, walk, of_x, False, also))
        elif dx is not None or dr is not None:
            arguments = (*come, *read, *(come if dx is None else write), walk, table, coefficients, also)
            launch(run.backward_map, cut.grid, cut.threads, stream, arguments)
