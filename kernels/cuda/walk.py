"""How arrays (O, C, I) are walked: in vectors, in one of three ways, by shapes and strides alone.

RUNS: channel by channel, each run of I elements in whole 16-byte vectors. WINDOWS: the same where runs start or end
inside a vector (27x27, 55x55): vectors begin at the 16-byte border below, their lanes outside the run are masked.
COLUMNS: row by row, where channels lie side by side; I columns a channel (7x7 runs are too short to be walked one by
one; but by weights they are, as the columns of a row share a weight then).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

RUNS, WINDOWS, COLUMNS = "RUNS", "WINDOWS", "COLUMNS"

VECTOR = 16  # bytes: the widest access there is
WIDEST = 4  # columns of a vector: sums of eight channels don't fit in a thread's registers
NARROW = 256  # bytes: shorter runs are walked as columns where they can be
ACROSS = 256  # vectors of rows that are seen as one, at most: a block has as many threads where there is work for them


class Unwalkable(ValueError):
    """The kernel can't walk arrays with these strides; a contiguous copy it can."""


class More(NamedTuple):
    """What a call asks for beyond batch norm and further arrays."""

    activation: str = ""
    sets: int = 1  # of outer indices, each with statistics of its own
    height: int = 0  # outer indices of the largest set
    listed: bool = False  # sets are listed in device memory; else they are of one height, one behind the other
    rows: int = 1  # outer indices of an entry of the list
    weights: str = ""  # "normalize", "zero" or "keep": by weights, the same for all channels, and what where one is 0
    inverse: bool = False  # backward has y in place of x, and inverts the activation

    def options(self, arrays: Iterable[str]) -> tuple[str, ...]:
        """bn.cu's macros."""
        activation = (f"-DFASTBN_ACTIVATION={self.activation.upper()}",) if self.activation else ()
        present = {"RESIDUAL": "r" in arrays, "DRESIDUAL": "dr" in arrays, "SETS": self.sets > 1 or self.listed,
                   "INVERSE": self.inverse}  # fmt: skip
        weights = (f"-DFASTBN_WEIGHTS={self.weights.upper()}",) if self.weights else ()
        return (*activation, *(f"-DFASTBN_{name}=1" for name, there in present.items() if there), *weights)


PLAIN = More()


class View(NamedTuple):
    """The arrays of a call: shape (O, C, I), strides in bytes (None: no such array), addresses modulo 16.

    Forward: x, y (None: statistics only), r. Backward: x, dy, dx as y (None: not wanted), r where there is an
    activation, dr where it is wanted; x is None where frozen statistics and no dgamma make it needless.
    """

    shape: tuple[int, int, int]
    x: tuple[int, int, int] | None
    y: tuple[int, int, int] | None
    dy: tuple[int, int, int] | None
    itemsize: int
    bases: tuple[int, ...] = ()  # addresses of x, y, dy, r, dr (0 if not given); only the remainder modulo 16 counts
    r: tuple[int, int, int] | None = None
    dr: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Walk:
    """How the arrays are walked: (M, C, S) in vectors of V elements. Strides in elements, by array: (row, channel)."""

    layout: str
    V: int
    M: int  # rows, after folding; of the largest set
    C: int
    S: int  # elements of a run; columns of a channel
    fold: int  # COLUMNS: rows without a gap that are seen as one, to fill vectors
    strides: dict[str, tuple[int, int]] = field(hash=False)
    more: More = PLAIN

    @property
    def width(self) -> int:
        """COLUMNS: columns of a row."""
        return self.fold * self.C * self.S

    @property
    def vectors(self) -> int:
        """Vectors of a run. A window may begin up to V - 1 lanes before the run."""
        return (self.S + self.V - 2) // self.V + 1 if self.layout == WINDOWS else self.S // self.V


def walk(view: View, more: More = PLAIN) -> Walk:
    """The widest walk of these arrays; raises Unwalkable where there is none."""
    (outer, C, inner), size = view.shape, view.itemsize
    given = {"x": view.x, "y": view.y, "dy": view.dy, "r": view.r, "dr": view.dr}
    starts = (*view.bases, *[0] * len(given))
    arrays = [
        (name, strides, base)
        for (name, strides), base in zip(given.items(), starts, strict=False)
        if strides is not None
    ]
    for name, strides, base in arrays:
        if base % size or any(s % size for s, n in zip(strides, view.shape, strict=True) if n > 1):
            raise Unwalkable(f"{name} with strides {strides} isn't aligned to its elements of {size} bytes")
    outers, channels, inners = ([strides[axis] // size for _, strides, _ in arrays] for axis in range(3))
    alone = more.sets == 1 and not more.listed
    if not alone:
        outer = more.height
    M, S, rows = outer, inner, outers
    if more.listed:  # rows of a set may lie anywhere
        merges = False
    elif inner == 1:
        merges = (outer == 1 or set(outers) == {1}) and (C == 1 or set(channels) != {1})  # (C, N) in memory
    else:
        merges = set(inners) == {1} and all(row == inner for row in rows)  # (C, O, I) in memory, or one channel
    if merges:
        M, S, rows = 1, outer * inner, [outer * row for row in rows]
    elif inner > 1 and set(inners) != {1}:
        raise Unwalkable(f"runs of {inner} elements with strides of {inners} elements")
    elif inner == 1 and C > 1 and set(channels) != {1}:
        raise Unwalkable(f"neither rows nor channels lie side by side: strides {[s for _, s, _ in arrays]}")
    if M == 1 and alone:
        rows = [0] * len(arrays)
    if C == 1:
        channels = [S] * len(arrays)
    bases = [base // size for _, _, base in arrays]
    strides_of = {name: pair for (name, _, _), pair in zip(arrays, zip(rows, channels, strict=True), strict=True)}

    full = VECTOR // size
    widths = [full >> i for i in range(full.bit_length())]
    steps = [*bases, *rows, *(channels if C > 1 else ())]
    V = next(v for v in widths if not any(s % v for s in (S, *steps)))
    runs = Walk(RUNS, V, M, C, S, 1, strides_of, more)
    alike = all(len({s % full for s in same}) == 1 for same in (bases, rows, channels))
    if full > V and alike:
        windows = replace(runs, layout=WINDOWS, V=full)
        if windows.vectors < runs.vectors:
            runs = windows
    narrow = S * size < NARROW and not more.weights  # columns of a row share a weight: then a channel is one column
    if all(channel == S for channel in channels) and (S == 1 or narrow):
        columns = _columns(replace(runs, layout=COLUMNS), bases, rows, [v for v in widths if v <= WIDEST])
        if S == 1 or columns.V * runs.vectors >= S:
            return columns
    if M * runs.vectors >= 1 << 32:
        raise Unwalkable(f"a channel of {M * runs.vectors} vectors; they are counted in 32 bits")
    return runs


def _columns(w: Walk, bases: list[int], rows: list[int], widths: list[int]) -> Walk:
    """Rows of C S columns; where these don't fill vectors and rows have no gap, several rows as one."""
    width = w.C * w.S
    for v in widths:
        aligned = not any(base % v for base in bases)
        if aligned and width % v == 0 and not any(row % v for row in rows):
            return replace(w, V=v)
        fold = v // math.gcd(width, v)
        apart = w.more.listed or w.more.weights
        together = w.M % fold == 0 and not apart and all(row == width for row in rows)
        if aligned and together and fold * width // v <= ACROSS:
            folded = {name: (row * fold, channel) for name, (row, channel) in w.strides.items()}
            return replace(w, V=v, M=w.M // fold, fold=fold, strides=folded)
    raise AssertionError("v = 1 divides everything")
