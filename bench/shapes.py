"""The table of named shapes, and what a run selects from it; the tests read it too, shrunk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

LAYOUTS = ("first", "last", "nc")  # channels first, channels last, and (N, C), which is both
DTYPES = ("float32", "float64", "float16", "bfloat16")
FUNCTIONS = ("forward", "backward", "infer", "moments")

# What may be asked for beyond: "forward+relu" and so on are fastbn's alone, and are compared with the plain function.
EXTRAS = ("relu", "gelu", "residual", "weights", "groups", "ids", "y")
SECOND = ("backward+second", "backward+jvp")  # backward_backward and forward mode, compared with backward


def base(function: str) -> str:
    """The plain function of one with more: "forward" of "forward+relu".

    >>> base("forward+relu")
    'forward'
    """
    return function.partition("+")[0]


class Shape(NamedTuple):
    """A named shape, (N, C, ...) whatever its layout in memory."""

    name: str
    dims: tuple[int, ...]
    group: str
    reason: str
    layouts: tuple[str, ...] = ("first", "last")
    order: tuple[int, ...] | None = None  # axes by stride, largest first, where that is neither of the two layouts
    slack: int = 0  # channels on either side that belong to a larger array
    twin: tuple[str, str] | None = None  # a plain shape and layout of much the same size, to compare time per byte

    def small(self) -> Shape:
        """The same, of 1 to 11 along each axis: for tests. 1, 3 and 7 stay as they are."""
        return self._replace(dims=tuple(n if n <= 7 else 5 + n % 7 for n in self.dims), slack=min(self.slack, 2))

    def empty(self, layout: str, dtype: np.dtype[Any]) -> np.ndarray:
        """An array with these dims, laid out so."""
        axes = range(len(self.dims))
        order = self.order or ((0, *axes[2:], 1) if layout == "last" else tuple(axes))
        whole = [n + 2 * self.slack * (a == 1) for a, n in enumerate(self.dims)]
        array = np.empty([whole[a] for a in order], dtype).transpose(np.argsort(order))
        return array[:, self.slack : self.slack + self.dims[1]]


RESNET = [(64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)]  # channels, side
BATCH_32 = (32, 64, 56, 56)  # 25.7 MB in float32
PLAIN, LARGE = "resnet50-64x56", "resnet50-64x112"

SHAPES = [
    *(Shape(f"resnet50-{c}x{s}", (32, c, s, s), "resnet50", "training, batch 32") for c, s in RESNET),
    *(
        Shape(f"resnet50-{c}x{s}-b{b}", (b, c, s, s), "resnet50-small", f"batch {b}: cached, few values a channel")
        for b in (1, 8)
        for c, s in RESNET
    ),
    Shape("unet-64x256", (16, 64, 256, 256), "unet", "268 MB, long runs"),
    Shape("signal-256x4000", (64, 256, 4000), "signal", "1-D, 262 MB"),
    Shape("volume-32x64", (2, 32, 64, 64, 64), "volume", "3-D, two samples"),
    Shape("mlp-32x64", (32, 64), "mlp", "small: what the call itself costs", ("nc",)),
    Shape("mlp-256x1024", (256, 1024), "mlp", "1 MB: cached", ("nc",)),
    Shape("mlp-8192x1024", (8192, 1024), "mlp", "34 MB", ("nc",)),
    Shape("points-1000000x32", (1_000_000, 32), "points", "two cache lines a row", ("nc",), twin=(LARGE, "last")),
    Shape("points-100000x3", (100_000, 3), "points", "rows of 12 bytes", ("nc",)),
    Shape("wide-32x1000000", (32, 1_000_000), "wide", "more channels than fit a cache", ("nc",), twin=(LARGE, "last")),
    Shape("features-9000x3000", (9000, 3000), "features", "rows of three tiles, 108 MB", ("nc",)),
    Shape("cifar-512x4", (128, 512, 4, 4), "runs", "training on small images: runs of 16"),
    Shape("series-10x16", (6000, 10, 16), "runs", "many short series of few channels"),
    Shape("odd-7x13x5x3", (7, 13, 5, 3), "odd", "tiny, nothing divides anything"),
    Shape("odd-31x61x53x47", (31, 61, 53, 47), "odd", "primes, 19 MB"),
    Shape("odd-3x101", (3, 101), "odd", "fewer rows than a block", ("nc",)),
    Shape("permuted-cnhw", BATCH_32, "awkward", "channels outermost", ("first",), (1, 0, 2, 3), twin=(PLAIN, "first")),
    Shape(
        "permuted-hncw", BATCH_32, "awkward", "runs of one image row", ("first",), (2, 0, 1, 3), twin=(PLAIN, "first")
    ),
    Shape("sliced-first", BATCH_32, "awkward", "64 of 80 channels", ("first",), slack=8, twin=(PLAIN, "first")),
    Shape("sliced-last", BATCH_32, "awkward", "64 of 80 channels", ("last",), slack=8, twin=(PLAIN, "last")),
    Shape(
        "transposed-100352x64",
        (100_352, 64),
        "awkward",
        "(N, C) lying as (C, N)",
        ("nc",),
        (1, 0),
        twin=(PLAIN, "last"),
    ),
    Shape(
        "channels-1", (128, 1, 224, 224), "awkward", "C = 1: both layouts are one", ("first",), twin=(PLAIN, "first")
    ),
    Shape("channels-3-first", (64, 3, 224, 224), "awkward", "C = 3", ("first",), twin=(PLAIN, "first")),
    Shape("channels-3-last", (64, 3, 224, 224), "awkward", "C = 3", ("last",), twin=(PLAIN, "last")),
    *(
        Shape(f"growth-{mb}MB", (round(mb * 1e6 / 802_816), 64, 56, 56), "growth", "time per byte by size", ("first",))
        for mb in (4, 32, 256, 1000, 4000)
    ),
]
BY_NAME = {shape.name: shape for shape in SHAPES}
ONLY_BY_NAME = {"growth"}  # groups that a sweep over everything leaves out: 4 GB arrays
QUICK = ("resnet50-64x56", "resnet50-512x28", "resnet50-2048x7", "mlp-32x64", "mlp-8192x1024", "points-100000x3")


class Case(NamedTuple):
    """One array: a shape, a layout, a dtype."""

    shape: Shape
    layout: str
    dtype: str

    @property
    def name(self) -> str:
        """As tables and test ids show it."""
        return " ".join([self.shape.name, *([self.layout] if len(self.shape.layouts) > 1 else []), self.dtype])

    @property
    def size(self) -> int:
        """How many elements x has."""
        return math.prod(self.shape.dims)

    @property
    def bytes(self) -> int:
        """The size of x."""
        return self.size * (2 if self.dtype in ("float16", "bfloat16") else 8 if self.dtype == "float64" else 4)

    def twin(self) -> Case | None:
        """What time per element is compared with: float32 for a half type, a plain layout for an awkward one."""
        if self.dtype in ("float16", "bfloat16"):
            return self._replace(dtype="float32")
        if self.shape.twin is None:
            return None
        name, layout = self.shape.twin
        return Case(BY_NAME[name], layout, self.dtype)


@dataclass(frozen=True)
class Selection:
    """Which cases and calls; `shape` holds names or groups, and what is None selects everything."""

    shape: tuple[str, ...] | None = None
    layout: tuple[str, ...] | None = None
    dtype: tuple[str, ...] | None = None
    function: tuple[str, ...] | None = None
    out: tuple[bool, ...] | None = None  # True: `out=` is given; False: fresh results
    at_least_mb: float = 0.0

    def __post_init__(self) -> None:
        known: dict[str, set[Any]] = {
            "shape": {*BY_NAME, *(shape.group for shape in SHAPES)},
            "layout": set(LAYOUTS),
            "dtype": set(DTYPES),
            "function": {*FUNCTIONS, *SECOND, *(f"{name}+{more}" for name in FUNCTIONS for more in EXTRAS)},
            "out": {True, False},
        }
        for field, names in known.items():
            for name in getattr(self, field) or ():
                if name not in names:
                    raise ValueError(f"no {field} {name!r}; expected one of {', '.join(map(str, sorted(names)))}")

    def cases(self) -> list[Case]:
        """The selected cases, in the table's order."""
        return list(self._cases())

    def calls(self) -> list[tuple[str, bool]]:
        """The selected functions, each with and without `out=`; moments has no `out`."""
        functions = self.function or FUNCTIONS
        both = self.out or (True, False)
        return [(name, out) for name in functions for out in ((False,) if base(name) == "moments" else both)]

    def _cases(self) -> Iterator[Case]:
        for shape in SHAPES:
            named = self.shape is not None and bool({shape.name, shape.group} & set(self.shape))
            if not named and (self.shape is not None or shape.group in ONLY_BY_NAME):
                continue
            for layout in shape.layouts:
                for dtype in self.dtype or DTYPES:
                    case = Case(shape, layout, dtype)
                    if layout in (self.layout or LAYOUTS) and case.bytes >= self.at_least_mb * 1e6:
                        yield case
