"""Second order and forward mode: the kernel of `jvp` and of `backward_backward`, on the views of `fastbn.kernels`.

Both are one map from (u, g, x) to (r, z), whose coefficients by channel come from five sums. With d = x - mean,
s = invstd, a = gamma s, weights w with sum W (1 and n where there are none), backward's results are

``dx = a (g - w G / W - w d s^2 D / W)``, ``dgamma = s D``, ``dbeta = G``, with G = sum g and D = sum g d.

For cotangents u, p, q of these, the loss L = sum u dx + p dgamma + q dbeta has, with M = sum w u / W, E = sum w u d
and A = sum g (u - M),

``dL/dg = a (u - M - d s^2 E / W) + p s d + q``, which is r, and also y's tangent for those u, p, q of x, gamma, beta;
``dL/dgamma = s (A - s^2 D E / W)``;
``dL/dx = e g + w (f u - s^3 / W (dL/ds) d - (e G + f W M) / W)``, which is z, with
e = p s - a s^2 E / W, f = -a s^2 D / W and dL/ds = gamma A - 3 a s D E / W + p D.

(dL/dx: L depends on x by d and by s, where ds/dx = -s^3 w d / W, and d by x itself and by the mean, dmean/dx = w / W.)
Frozen statistics are constants: r = a u + p s d + q, z = p s g, dL/dgamma = s sum g u.

All is computed in float64 lanes, whatever the elements. For the sums u and g are taken relative to pivots, means of
some first values, so that products stay small at any offset; x relative to its known mean. So they are in the map of
float64 data and of sets of few values; in that of the others pivots go to the constants, where float64 has eight digits
to spare (11 coefficients by column took 1.2 times as long as 7).

A unit of work is a piece of a tile of channels of a group, or a tile with all its pieces, which is mapped while it is
in cache. Borders depend on the shape alone, and partial sums merge in order.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from .. import threads
from ..cut import Cut
from ..items import Twins
from ..lanes import LANES
from ..plan import ORDERED, WEIGHTED, Sizes, ceil, plan_of
from ..schedule import FINISH, MAP, SUM
from .kernel import COEFFICIENTS, second_item
from .runs import FROZEN, KEEP, NO_R, NO_Z, SKIP

DEPTH = 10  # of partial sums
FEW = 512  # values of a channel that make a pivot
# Rows of 1024 columns whole, though eleven coefficients of each in float64 are more than L1: by tiles of 256 (1 KB of a
# row of 4) backward_backward took 1.3 to 1.6 times as long, by runs in tiles of half the size up to 1.2.
SIZES = Sizes(block=4096, slab=1_600_000, serial=250_000, asleep=600_000, past=6_000_000)


def _nothing(shape: tuple[int, ...], dtype: np.dtype[Any], cut: Cut) -> np.ndarray:
    """Stands for an array that isn't there: as many zeros as are read at once, wherever that is."""
    run = np.zeros(max(cut.length, cut.tile * cut.period * cut.fold) + LANES, dtype)
    return np.lib.stride_tricks.as_strided(run, shape, (0, 0, 0))


def second(
    u: np.ndarray | None,
    g: np.ndarray | None,
    x: np.ndarray | None,
    r: np.ndarray | None,
    z: np.ndarray | None,
    table: np.ndarray,
    tangents: np.ndarray,
    frozen: bool,
    need_gamma: bool,
    more: Any = None,
) -> np.ndarray | None:
    """r and z written, those that are not None; returns dL/dgamma (Q, C) by set, if it is needed.

    u, g, x, r, z (O, C, I): None for u, g or x stands for 0. table (6, Q C); tangents (2, C): p and q; `more`: weights,
    masked, mass, order and starts as in `fastbn.kernels`. r and z may be u, g or x, and not each other.
    """
    like = next(a for a in (u, g, x, r, z) if a is not None)
    # Where they are alike, results have the same bits without some of the arrays.
    strides = tuple([(like if a is None else a).strides for a in (u, g, x, r, z)])
    shape, channels = like.shape, like.shape[1]
    weights = order = None
    starts, skip = np.array([0, shape[0]]), "normalize"
    if more is not None:
        order, skip = more.order, more.masked
        starts = starts if more.starts is None else more.starts
        weights = more.weights
    sets = len(starts) - 1
    flags = (FROZEN if frozen else 0) | (NO_R if r is None else 0) | (NO_Z if z is None else 0)
    flags |= {"normalize": 0, "zero": SKIP, "keep": SKIP | KEEP}[skip]
    sizes = np.empty((2, sets))
    of_sets = np.diff(starts)
    sizes[:] = of_sets * shape[2]
    if weights is not None:
        sizes[1] = more.mass
        if skip != "normalize":
            counts = np.count_nonzero(weights if order is None else weights[order], axis=(1, 2))
            sizes[0] = np.diff(np.concatenate([[0], np.cumsum(counts)])[starts])
    largest, special = max(1, int(of_sets.max())), 0 if order is None else ORDERED
    least = int(of_sets[of_sets > 0].min(initial=largest))
    plan = plan_of(
        (largest, *shape[1:]), strides, (like.itemsize, like.itemsize, 0), SUM | MAP, SIZES, least, shape[0],
        special | (0 if weights is None else WEIGHTED),
    )  # fmt: skip
    cut, pieces, tiles = plan.cut._replace(flags=plan.cut.flags | flags), plan.pieces, sets * plan.tiles
    stages = FINISH | (0 if frozen and not need_gamma else SUM) | (0 if r is z is None else MAP)
    part = (np.empty if stages & SUM else np.zeros)((sets * pieces, DEPTH, channels))
    co, ggamma = np.empty((sets, COEFFICIENTS, channels)), np.empty((sets, channels))
    places = np.empty(0, np.int64) if order is None else order
    given = [u, g, x, r, z]
    if any(a is None for a in given):
        absent = _nothing(shape, like.dtype, cut)
        given = [absent if a is None else a for a in given]
    numbers = np.ascontiguousarray(table.reshape(6, sets, channels).swapaxes(0, 1))
    few = ceil(FEW, cut.period * cut.fold) if cut.across else FEW
    twins = _twins(like.dtype, None if weights is None else weights.dtype)
    count = threads.threads_for(plan.work, SIZES)
    if count == 1 or plan.whole(tiles, count):
        turns = [(min(count, tiles), stages)]
    else:
        items = min(count, tiles * pieces)
        turns = [(items, stages & SUM), (1, FINISH), (items, stages & MAP)]
    for items, some in turns:
        if some:
            args = (*given, weights, places, starts, numbers, tangents, sizes, part, co, ggamma, np.zeros(1, np.int64))
            threads.run(twins, items, *args, few, cut, some, parallel=items > 1)
    return ggamma if need_gamma else None


@functools.cache
def _twins(dtype: np.dtype[Any], weights: np.dtype[Any] | None) -> Twins:
    integer, real = numba.types.int64, numba.types.float64
    given, written = (numba.types.Array(numba.from_dtype(dtype), 3, "A", readonly=b) for b in (True, False))
    kind = numba.types.none if weights is None else numba.types.Array(numba.from_dtype(weights), 3, "C", readonly=True)
    list_, numbers, three = (numba.types.Array(t, n, "C") for t, n in ((integer, 1), (real, 2), (real, 3)))
    return Twins(
        second_item,
        (
            given, given, given, written, written, kind, list_, list_, three, numbers, numbers, three, three, numbers,
            list_, integer, numba.types.NamedUniTuple(integer, len(Cut._fields), Cut), integer,
        ),
    )  # fmt: skip
