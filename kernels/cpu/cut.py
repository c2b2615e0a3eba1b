"""What a plan says to the kernels: how they walk a set."""

from typing import NamedTuple

import numpy as np

ALL = np.int64(1 << 62)  # a literal would be a type of its own, and all that takes it compiled again

# Flags: store past the caches; gather; all in float64; fetch the next tile while one is mapped, or sum it meanwhile.
PAST, GATHER, EXACT, NEXT, TWO = 1, 2, 4, 8, 16


class Cut(NamedTuple):
    """Compiled code reads these names."""

    across: int  # 1: rows across the channels; 0: runs along the inner axis
    tile: int  # channels that are taken at once
    blocks: int  # of a tile
    piece: int  # blocks whose sums are one
    height: int  # runs, or folded rows, of a block
    segments: int  # that a run is cut into
    length: int  # elements of a segment
    period: int  # columns of a channel, side by side
    fold: int  # rows that are taken as one
    flags: int
