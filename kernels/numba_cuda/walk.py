"""How kernels walk their arrays: which values a thread takes, and where these lie.

Arrays of data come flat, from their lowest address on; `place` = (origin, stride of outer, of channel, of inner, step,
over) says where in them is what, in elements. `cut` = (channels, inner, turn, values, share, pieces, lanes): a block
takes `lanes` channels, and of their O I values, inner running fastest, those of piece k: [k share, (k + 1) share). A
thread stays in its channel; from one value to its next, the inner index grows by `turn` and the address by `step`, or
by `over` where the index passes the end of its axis. So no loop divides, and any strides will do.

`FOLLOWED` is that. Where more than the addresses counts (a residual, sets), the outer index is `TRACKED`, and `LISTED`
for sets of outer indices: the blocks of set g walk what lists[lists[g]:lists[g + 1]] names, each as one array of its
own. `cut` is two longer then: (.., far, tiles), by which the outer index grows, and blocks of a set across channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .target import cuda


class Walk(NamedTuple):
    """Device functions. `s` is the column of the table; `row` an outer index, or what else `moved` wants to know."""

    first_value: Any  # (block, cut, more) -> c, s, piece, j, o, i, row, end, rows
    start: Any  # (place, o, row, c, i) -> address of the thread's first value
    turned: Any  # (o, i, cut, more) -> o, i, row of its next
    moved: Any  # (at, place, row, c, i) -> address of that


@cuda.jit(device=True)
def where(place, row, c, i):  # type: ignore[no-untyped-def]
    return place[0] + row * place[1] + c * place[2] + i * place[3]


@cuda.jit(device=True)
def first_followed(block, cut, _more):  # type: ignore[no-untyped-def]
    """Channel, column and piece of this thread; its first value: number, outer, inner; the piece's end; block's rows.

    Threads beyond the channels have no values, and the column 0.
    """
    channels, inner, _, values, share, pieces, lanes = cut
    t = cuda.threadIdx.x
    tile = block // pieces
    piece = block - tile * pieces
    row = t // lanes
    j = piece * share + row
    o = j // inner
    c = tile * lanes + (t - row * lanes)
    s = c
    end = (piece + 1) * share
    if end > values:  # Numba's own CUDA target has no `min`
        end = values
    if c >= channels:
        end = s = 0
    return c, s, piece, j, o, j - o * inner, False, end, cuda.blockDim.x // lanes


@cuda.jit(device=True)
def start_followed(place, o, _over, c, i):  # type: ignore[no-untyped-def]
    return where(place, o, c, i)


@cuda.jit(device=True)
def turned_followed(o, i, cut, _more):  # type: ignore[no-untyped-def]
    """Whether the inner index passed the end is all that the addresses want to know: `o` stays as it was."""
    i += cut[2]
    over = i >= cut[1]
    return o, i - cut[1] if over else i, over


@cuda.jit(device=True)
def moved_followed(at, place, over, _c, _i):  # type: ignore[no-untyped-def]
    return at + (place[5] if over else place[4])


FOLLOWED = Walk(first_followed, start_followed, turned_followed, moved_followed)


@cuda.jit(device=True)
def first_tracked(block, cut, more):  # type: ignore[no-untyped-def]
    c, s, piece, j, o, i, _, end, rows = first_followed(block, cut[:7], more)
    return c, s, piece, j, o, i, o, end, rows


@cuda.jit(device=True)
def start_tracked(place, _o, row, c, i):  # type: ignore[no-untyped-def]
    return where(place, row, c, i)


@cuda.jit(device=True)
def turned_tracked(o, i, cut, _more):  # type: ignore[no-untyped-def]
    i += cut[2]
    o += cut[7]
    if i >= cut[1]:
        i -= cut[1]
        o += 1
    return o, i, o


@cuda.jit(device=True)
def moved_tracked(_at, place, row, c, i):  # type: ignore[no-untyped-def]
    return where(place, row, c, i)


TRACKED = Walk(first_tracked, start_tracked, turned_tracked, moved_tracked)


@cuda.jit(device=True)
def named(o, lists):  # type: ignore[no-untyped-def]
    """The outer index at place o of the lists; behind the last there is none, and none is read."""
    return lists[np.uint64(o)] if o < lists.size else np.int64(0)


@cuda.jit(device=True)
def first_listed(block, cut, more):  # type: ignore[no-untyped-def]
    channels, inner, turn, _, share, pieces, lanes, _, tiles = cut
    blocks = tiles * pieces
    g = block // blocks
    first = more.lists[g]
    values = (more.lists[g + 1] - first) * inner
    own = channels, inner, turn, values, share, pieces, lanes
    c, s, piece, j, o, i, _, end, rows = first_followed(block - g * blocks, own, more)
    o += first
    return c, g * channels + s, piece, j, o, i, named(o, more.lists), end, rows


@cuda.jit(device=True)
def turned_listed(o, i, cut, more):  # type: ignore[no-untyped-def]
    o, i, _ = turned_tracked(o, i, cut, more)
    return o, i, named(o, more.lists)


LISTED = Walk(first_listed, start_tracked, turned_listed, moved_tracked)
