"""Cases for the numba.cuda kernels: shapes, layouts in memory, types, and numbers to fill them with."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from typing import Any

import numpy as np
from cases import BFLOAT16

FLOAT32, FLOAT64, FLOAT16 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Of an (O, C, I) view: the order of its axes in memory, slowest first, and what it takes of each."""

    order: tuple[int, int, int] = (0, 1, 2)
    steps: tuple[int, int, int] = (1, 1, 1)  # negative: from the end; 0: one index for all
    margin: int = 0  # elements around it, along each axis

    def place(self, shape: tuple[int, int, int], itemsize: int) -> tuple[tuple[int, ...], list[int], int]:
        """Shape of the memory, in its order; strides of the view and offset of its first element, in bytes."""
        memory = [max(1, (n - 1) * abs(s) + 1) + 2 * self.margin for n, s in zip(shape, self.steps, strict=True)]
        dense = [0, 0, 0]
        behind = itemsize
        for axis in reversed(self.order):
            dense[axis], behind = behind, behind * memory[axis]
        first = [self.margin + (n - 1) * -min(0, s) for n, s in zip(shape, self.steps, strict=True)]
        return (
            tuple(memory[axis] for axis in self.order),
            [d * s for d, s in zip(dense, self.steps, strict=True)],
            sum(f * d for f, d in zip(first, dense, strict=True)),
        )


ROWS = Layout()
COLUMNS = Layout(order=(0, 2, 1))
TURNED = Layout(order=(1, 2, 0))
WINDOW = Layout(margin=2)
COLUMN_WINDOW = Layout(order=(0, 2, 1), margin=1)
STEPS = Layout(steps=(2, 3, 2), margin=1)
REVERSED = Layout(steps=(-1, -1, -1))
REVERSED_COLUMNS = Layout(order=(0, 2, 1), steps=(1, -1, -2), margin=1)
BROADCAST_OUTER = Layout(steps=(0, 1, 1))
BROADCAST_INNER = Layout(steps=(1, 1, 0))
BROADCAST_CHANNELS = Layout(steps=(1, 0, 1))

# threads, lanes, warp, blocks, most: so small that a small array has many pieces, rounds of eight and a rest.
TINY = (4, 2, 2, 4, 16)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int] = (3, 3, 13)
    dtype: np.dtype = FLOAT32
    x: Layout = ROWS
    y: Layout | None = None  # and dx; that of x if not given
    dy: Layout | None = None
    sizes: tuple[int, int, int, int, int] = TINY
    given: str = "float32"  # gamma, beta, mean and var; or "nothing"
    frozen: bool = False
    in_place: str = ""  # where dx goes: "dy" or "x"; y goes to x then
    want: str = "y dx dgamma dbeta"
    offset: float = 0.3
    scale: float = 1.0
    dy_offset: float = 0.0
    spoil: str = ""  # what is done to channel 1
    eps: float = 1e-5


def named(dtype: np.dtype) -> str:
    return str(dtype.name)


CASES = [
    Case("rows", (4, 3, 21)),
    Case("one long channel", (1, 1, 150)),
    Case("no inner axis, channels far apart", (1, 5, 33)),
    Case("channels last", (3, 5, 11), x=COLUMNS),
    Case("channels last, no inner axis", (33, 5, 1)),
    Case("channels slowest", (9, 4, 5), x=TURNED),
    Case("rows of a wider array", (3, 3, 13), x=WINDOW),
    Case("channels last of a wider array", (3, 3, 13), x=COLUMN_WINDOW),
    Case("every other", (3, 3, 13), x=STEPS),
    Case("reversed", (3, 3, 13), x=REVERSED),
    Case("reversed channels last", (3, 5, 7), x=REVERSED_COLUMNS),
    Case("stride 0 outside", (4, 3, 9), x=BROADCAST_OUTER, y=ROWS, dy=ROWS),
    Case("stride 0 inside", (4, 3, 9), x=BROADCAST_INNER, y=COLUMNS, dy=ROWS),
    Case("stride 0 along channels", (4, 3, 9), x=BROADCAST_CHANNELS, y=ROWS, dy=ROWS),
    Case("dy with stride 0", (4, 3, 9), dy=BROADCAST_OUTER),
    Case("three layouts", (4, 3, 9), x=ROWS, y=COLUMNS, dy=TURNED),
    Case("three layouts, channels last first", (4, 3, 9), x=COLUMN_WINDOW, y=REVERSED, dy=STEPS),
    # A block takes 32 values of a channel in a round (4 threads, 8 each), or 16 of two channels.
    *(Case(f"{n} values", (1, 2, n)) for n in (1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 129)),
    *(Case(f"{n} rows of {c} channels", (n, c, 1)) for n in (1, 7, 15, 16, 17, 33) for c in (2, 3)),
    *(Case(f"{c} channels", (2, c, 5), x=layout) for c in (1, 2, 4, 5) for layout in (ROWS, COLUMNS)),
    Case("inner as long as a turn", (11, 2, 4)),
    Case("inner shorter than a turn", (23, 2, 3)),
    Case("wider blocks", (5, 3, 61), sizes=(16, 4, 4, 8, 16)),
    Case("wider blocks, channels last", (5, 7, 31), x=COLUMNS, sizes=(16, 4, 4, 8, 16)),
    Case("one piece", (3, 3, 13), sizes=(4, 2, 2, 1, 10**6)),
    Case("many pieces", (2, 2, 101), sizes=(4, 2, 2, 1000, 8)),
    *(
        Case(
            f"{named(dtype)}, {kind}, {'frozen' if frozen else 'training'}", (3, 3, 13), dtype, x=layout, frozen=frozen
        )
        for dtype in (FLOAT64, FLOAT16, BFLOAT16)
        for kind, layout in (("rows", ROWS), ("channels last", COLUMNS))
        for frozen in (False, True)
    ),
    Case("frozen", frozen=True),
    Case("frozen, channels last", x=COLUMNS, frozen=True, given="float64"),
    Case("float64 parameters", given="float64"),
    Case("float64 parameters of float16", dtype=FLOAT16, given="float64"),
    Case("no parameters", given="nothing"),
    Case("no parameters, dx only", given="nothing", want="y dx"),
    *(
        Case(f"{want or 'statistics only'}{', frozen' * frozen}", want=want, frozen=frozen)
        for want in ("", "dx", "dgamma", "dbeta", "y dgamma dbeta")
        for frozen in (False, True)
    ),
    Case("dx to dy", in_place="dy"),
    Case("dx to x", in_place="x"),
    Case("dx to x, channels last", x=COLUMNS, in_place="x"),
    Case("dx to dy, frozen", in_place="dy", frozen=True),
    *(
        Case(f"at {offset:g}, {kind}", (3, 3, 23), x=layout, offset=offset)
        for offset in (1e2, 1e4, 1e6, 1e8)
        for kind, layout in (("rows", ROWS), ("channels last", COLUMNS))
    ),
    Case("float64 at 1e6", (3, 3, 23), FLOAT64, offset=1e6),
    Case("float64 at 1e6, channels last", (3, 3, 23), FLOAT64, x=COLUMNS, offset=1e6),
    Case("float16 at 30", (3, 3, 23), FLOAT16, offset=30),
    Case("dy at 1e4", (3, 3, 23), dy_offset=1e4),
    Case("both at 1e4, float64, channels last", (3, 3, 23), FLOAT64, x=COLUMNS, offset=1e4, dy_offset=1e4),
    *(
        Case(f"{spoil} in a channel, {named(dtype)}", (3, 3, 23), dtype, x=layout, spoil=spoil, offset=offset)
        for dtype, layout in ((FLOAT32, ROWS), (FLOAT32, COLUMNS), (FLOAT64, ROWS), (BFLOAT16, ROWS))
        for spoil, offset in (
            ("an outlier", 3.0),
            ("NaN", 3.0),
            ("infinity", 3.0),
            ("NaN in dy", 3.0),
            ("one value", 1 / 3),
            ("one value of dy", 1 / 3),
        )
    ),
    Case("one value at 1e10", spoil="one value", offset=1e10),
    Case("huge", (3, 3, 23), scale=1e38, eps=1e-30, offset=0.0),
    Case("squares overflow", (3, 3, 23), scale=1e20, offset=1e21, eps=1e-30),
    Case("squares underflow", (3, 3, 23), scale=1e-30, offset=0.0, eps=1e-62),
    Case("subnormal", (3, 3, 23), scale=1e-42, offset=0.0, eps=1e-30),
    Case("a gamma beyond float32", (3, 3, 23), BFLOAT16, given="float64", spoil="extreme gamma"),
]
assert len({case.name + case.x.__repr__() for case in CASES}) == len(CASES)


@dataclasses.dataclass(frozen=True)
class MoreCase(Case):
    """What goes beyond batch norm."""

    want: str = "y dx dgamma dbeta dresidual"
    activation: str = ""
    parameter: float = 0.0
    residual: Layout | None = None
    dresidual: Layout | None = None  # that of the residual if not given
    sets: tuple[int, ...] = ()  # how many outer indices each has
    rows: int = 1  # outer indices that stay together when the sets' are shuffled; 0: nothing is shuffled
    weights: str = dataclasses.field(default="", repr=False)  # "positions", "mask", "samples", "none"
    masked: str = dataclasses.field(default="normalize", repr=False)


ALL: dict[str, Any] = {"activation": "silu", "residual": ROWS, "sets": (2, 0, 1, 3), "shape": (6, 3, 11)}
MORE_CASES = [
    *(
        MoreCase(
            f"{name}{', a residual' * (residual is not None)}",
            (3, 3, 23),
            activation=name,
            parameter=p,
            residual=residual,
        )
        for name, p in (
            ("relu", 0.0),
            ("leaky_relu", 0.2),
            ("relu6", 0.0),
            ("elu", 1.5),
            ("silu", 0.0),
            ("gelu", 0.0),
            ("sigmoid", 0.0),
            ("tanh", 0.0),
            ("hardswish", 0.0),
        )
        for residual in (None, ROWS)
    ),
    MoreCase("a residual alone", residual=WINDOW),
    MoreCase("a residual alone, frozen", residual=COLUMNS, frozen=True),
    MoreCase("four layouts", (4, 3, 9), activation="elu", parameter=0.7, residual=TURNED, y=COLUMNS, dy=STEPS),
    MoreCase(
        "five layouts, channels last first",
        (4, 3, 9),
        activation="relu",
        x=COLUMN_WINDOW,
        residual=REVERSED,
        dresidual=TURNED,
        y=STEPS,
        dy=COLUMNS,
    ),
    MoreCase("a residual, channels slowest", (9, 4, 5), x=TURNED, activation="tanh", residual=TURNED),
    MoreCase("a residual, no inner axis", (33, 5, 1), activation="gelu", residual=ROWS),
    MoreCase("a residual, inner shorter than a turn", (23, 2, 3), activation="relu", residual=ROWS),
    MoreCase("a residual, inner as long as a turn", (11, 2, 4), activation="relu", residual=ROWS),
    MoreCase("equal sets", (6, 3, 13), sets=(2, 2, 2), rows=0),
    MoreCase("sets of sizes, some empty", (6, 3, 13), sets=(0, 1, 0, 3, 2, 0), rows=0),
    MoreCase("shuffled sets", (6, 3, 13), sets=(1, 3, 0, 2)),
    MoreCase("one set", (5, 3, 13), sets=(5,)),
    MoreCase("each its own", (4, 3, 13), sets=(1, 1, 1, 1)),
    MoreCase("one value a set", (4, 3, 1), sets=(1, 1, 1, 1)),
    MoreCase("sets, channels last", (6, 5, 11), x=COLUMNS, sets=(1, 3, 0, 2)),
    MoreCase("sets, channels last, no inner axis", (35, 5, 1), sets=(20, 0, 14, 1)),
    MoreCase("sets of rows that follow, shuffled", (36, 5, 1), sets=(9, 0, 24, 3), rows=3),
    MoreCase("sets of rows that follow", (36, 5, 1), sets=(8, 0, 24, 4), rows=0),
    MoreCase("sets, channels slowest", (9, 4, 5), x=TURNED, sets=(4, 5)),
    MoreCase("sets, inner shorter than a turn", (23, 2, 3), sets=(17, 6)),
    MoreCase("sets of many pieces", (9, 2, 33), sets=(1, 6, 0, 2), sizes=(4, 2, 2, 1000, 8)),
    MoreCase("sets, wider blocks", (9, 7, 31), x=COLUMNS, sets=(5, 4), sizes=(16, 4, 4, 8, 16)),
    MoreCase("sets without parameters", (6, 3, 13), sets=(1, 3, 2), given="nothing"),
    MoreCase("sets at 1e6", (6, 3, 23), sets=(1, 3, 2), offset=1e6),
    *(
        MoreCase(
            f"all, {named(dtype)}, {kind}, {'frozen' if frozen else 'training'}",
            **{**ALL, "residual": layout, "dtype": dtype, "x": layout, "frozen": frozen},
        )
        for dtype in (FLOAT32, FLOAT64, FLOAT16, BFLOAT16)
        for kind, layout in (("rows", ROWS), ("channels last", COLUMNS))
        for frozen in (False, True)
    ),
    *(
        MoreCase(
            f"{want or 'statistics only'}{', frozen' * frozen}, {name}", **{**more, "want": want, "frozen": frozen}
        )
        for want in ("", "dx", "dresidual", "dgamma", "dbeta dresidual", "y dgamma dbeta")
        for name, more in (("all", ALL), ("a residual", {"residual": ROWS}))
        for frozen in (False, True)
    ),
    *(
        MoreCase(f"dx to {place}{', frozen' * frozen}", **{**ALL, "in_place": place, "frozen": frozen})
        for place in ("dy", "x")
        for frozen in (False, True)
    ),
    *(
        MoreCase(f"{spoil}{', frozen' * frozen}", **{**ALL, "activation": "relu", "spoil": spoil, "frozen": frozen})
        for spoil in ("NaN", "infinity", "NaN in dy", "an outlier")
        for frozen in (False, True)
    ),
    MoreCase("squares overflow", (3, 3, 23), scale=1e20, offset=1e21, eps=1e-30, activation="elu", parameter=1.0),
    MoreCase("a gamma beyond float32", (3, 3, 23), BFLOAT16, given="float64", spoil="extreme gamma", activation="tanh"),
    *(
        MoreCase(f"kinks of {name}, {named(dtype)}", (2, 6, 21), dtype, activation=name, parameter=p, given="kinks")
        for name, p in (("relu", 0.0), ("leaky_relu", 0.25), ("relu6", 0.0), ("elu", 0.5), ("hardswish", 0.0))
        for dtype in (FLOAT32, FLOAT64)
    ),
]
assert len({case.name for case in MORE_CASES}) == len(MORE_CASES)

MASKED = "normalize", "zero", "keep"
POSITIONS: dict[str, Any] = {"weights": "positions"}
WEIGHTED_CASES = [
    *(
        MoreCase(f"{kind}, {masked}{', frozen' * frozen}", (3, 3, 23), weights=kind, masked=masked, frozen=frozen)
        for kind in ("positions", "mask", "samples", "none")
        for masked in MASKED
        for frozen in (False, True)
    ),
    *(
        MoreCase(
            f"all, {named(dtype)}, {kind}, {masked}{', frozen' * frozen}",
            **{**ALL, "residual": layout, "dtype": dtype, "x": layout, "frozen": frozen, "masked": masked, **POSITIONS},
        )
        for dtype in (FLOAT32, FLOAT64, FLOAT16, BFLOAT16)
        for kind, layout in (("rows", ROWS), ("channels last", COLUMNS))
        for masked in MASKED
        for frozen in (False, True)
        if not frozen or dtype == FLOAT32
    ),
    *(
        MoreCase(f"NaN where w is 0, {masked}{', frozen' * frozen}", frozen=frozen, masked=masked, **more)
        for masked in MASKED
        for frozen in (False, True)
        for more in ({"weights": "mask", "activation": "relu", "spoil": "absent", "sizes": (2, 2, 2, 4, 16)},)
    ),
    MoreCase("NaN where w is 0, channels last", x=COLUMNS, weights="mask", masked="zero", spoil="absent"),
    MoreCase("NaN where w is 0, half", dtype=FLOAT16, weights="positions", masked="keep", spoil="absent"),
    *(MoreCase(f"{n} values", (1, 2, n), **POSITIONS) for n in (2, 7, 8, 9, 31, 32, 33, 65, 129)),
    *(MoreCase(f"{n} rows of 3 channels", (n, 3, 1), **POSITIONS, masked="zero") for n in (7, 16, 17, 33)),
    MoreCase("channels slowest", (9, 4, 5), x=TURNED, **POSITIONS),
    MoreCase("one channel", (9, 1, 5), **POSITIONS),
    MoreCase("three layouts", (4, 3, 9), x=COLUMN_WINDOW, y=REVERSED, dy=STEPS, **POSITIONS, masked="keep"),
    MoreCase("inner shorter than a turn", (23, 2, 3), **POSITIONS),
    MoreCase("wider blocks, channels last", (5, 7, 31), x=COLUMNS, sizes=(16, 4, 4, 8, 16), **POSITIONS),
    MoreCase("many pieces", (2, 2, 101), sizes=(4, 2, 2, 1000, 8), **POSITIONS, masked="zero"),
    *(
        MoreCase(
            f"sets, one without weights, {masked}",
            (6, 3, 23),
            sets=(1, 3, 0, 2),
            spoil="a set",
            masked=masked,
            **POSITIONS,
        )
        for masked in MASKED
    ),
    MoreCase("sets of rows that follow", (36, 5, 1), sets=(9, 0, 24, 3), rows=3, **POSITIONS, masked="zero"),
    MoreCase("sets, channels last", (6, 5, 11), x=COLUMNS, sizes=(16, 4, 4, 8, 16), sets=(2, 4), **POSITIONS),
    *(MoreCase(f"at {offset:g}", (3, 3, 23), offset=offset, **POSITIONS) for offset in (1e2, 1e4, 1e6)),
    MoreCase("float64 at 1e6", (3, 3, 23), FLOAT64, offset=1e6, **POSITIONS),
    MoreCase("dy at 1e3", (3, 3, 23), dy_offset=1e3, **POSITIONS),
    MoreCase("one value", (3, 3, 23), spoil="one value", offset=1 / 3, **POSITIONS),
    MoreCase("an outlier", (3, 3, 23), spoil="an outlier", offset=3.0, **POSITIONS),
    MoreCase("NaN in a channel", (3, 3, 23), spoil="NaN", weights="samples", masked="keep"),
    MoreCase("squares overflow", (3, 3, 23), scale=1e20, offset=1e21, eps=1e-30, **POSITIONS),
    MoreCase("squares underflow", (3, 3, 23), scale=1e-30, offset=0.0, eps=1e-62, **POSITIONS),
    MoreCase("small weights", (3, 3, 23), spoil="small weights", **POSITIONS),
    *(
        MoreCase(f"{want or 'statistics only'}, {masked}", **{**ALL, "want": want, "masked": masked, **POSITIONS})
        for want in ("", "dx", "dresidual", "dgamma", "dbeta")
        for masked in ("normalize", "keep")
    ),
    *(
        MoreCase(f"dx to {place}, {masked}{', frozen' * frozen}", in_place=place, frozen=frozen, masked=masked, **more)
        for place in ("dy", "x")
        for masked in MASKED
        for frozen in (False, True)
        for more in ({**ALL, **POSITIONS},)
    ),
]
assert len({case.name for case in WEIGHTED_CASES}) == len(WEIGHTED_CASES)


@dataclasses.dataclass
class Inputs:
    x: np.ndarray
    dy: np.ndarray
    given: tuple[Any, Any, Any, Any]  # gamma, beta, mean, var


def inputs(case: Case) -> Inputs:
    """The same in every process."""
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
    values, dy = rng.normal(size=(2, *case.shape))
    values = np.clip(values, -3, 3) * case.scale + case.offset
    dy += case.dy_offset
    with np.errstate(over="ignore"):
        x, dy = values.astype(case.dtype), dy.astype(case.dtype)
    channels = case.shape[1]
    if channels > 1:
        if case.spoil in ("NaN", "infinity", "an outlier"):
            x[0, 1, 0] = {"NaN": np.nan, "infinity": np.inf, "an outlier": 1e6}[case.spoil]
        elif case.spoil == "NaN in dy":
            dy[-1, 1, -1] = np.nan
        elif case.spoil in ("one value", "one value of dy"):
            spoilt = x if case.spoil == "one value" else dy
            spoilt[:, 1] = spoilt[0, 1, 0]
    for layout, array in ((case.x, x), (case.dy or case.x, dy)):
        for axis, step in enumerate(layout.steps):
            if step == 0:
                array[...] = array.take([0], axis)
    given: list[Any] = [None] * 4
    if case.given != "nothing":
        number = "float32" if case.given == "kinks" else case.given
        gamma, beta, mean = rng.normal(size=(3, channels)).astype(number)
        mean = (mean + case.offset).astype(number)
        if case.spoil == "extreme gamma":
            gamma[1] = 1e42
        if case.given == "kinks":  # z is there, exactly
            gamma[:5], beta[:5] = 0, (0, -0.0, 6, -3, 3)
        given = [gamma, beta, mean, rng.uniform(0.5, 2, channels).astype(number)]
    if not case.frozen:
        given[2:] = None, None
    return Inputs(x, dy, tuple(given))


@dataclasses.dataclass
class MoreInputs(Inputs):
    residual: np.ndarray | None
    starts: np.ndarray | None
    order: np.ndarray | None
    weights: np.ndarray | None = None  # (O, 1, I)

    def mass(self) -> np.ndarray | None:
        """(G,)"""
        if self.weights is None:
            return None
        outer = self.weights.shape[0]
        order = np.arange(outer) if self.order is None else self.order
        starts = np.array([0, outer]) if self.starts is None else self.starts
        return np.array([self.weights[order[i:j]].sum(dtype=np.float64) for i, j in itertools.pairwise(starts)])


def more_inputs(case: MoreCase) -> MoreInputs:
    """x, and given statistics, are other ones in each set; with weights."""
    data = _without_weights(case)
    if not case.weights:
        return data
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()) + 2)
    outer, _, inner = case.shape
    number = FLOAT64 if case.dtype == FLOAT64 else FLOAT32
    w = {
        "positions": rng.gamma(1.0, 1.0, (outer, 1, inner)) * (rng.random((outer, 1, inner)) < 0.8),
        "mask": rng.random((outer, 1, inner)) < 0.6,
        "samples": np.broadcast_to((np.arange(outer) * 2 % 3)[:, None, None], (outer, 1, inner)),
        "none": np.zeros((outer, 1, inner)),
    }[case.weights].astype(number)
    if case.spoil == "a set":
        assert data.order is not None
        w[data.order[1:4]] = 0
    elif case.spoil == "small weights":
        w *= number.type(2.0**-120)
    elif case.spoil == "absent":
        here = np.broadcast_to(w == 0, case.shape)
        data.x[here] = np.resize([np.nan, np.inf, -np.inf], here.sum())
        if case.masked != "normalize":
            data.dy[here] = np.resize([np.inf, np.nan], here.sum())
    data.weights = w
    return data


def _without_weights(case: MoreCase) -> MoreInputs:
    data = inputs(case)
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()) + 1)
    residual = rng.normal(size=case.shape).astype(case.dtype) if case.residual else None
    if not case.sets:
        return MoreInputs(data.x, data.dy, data.given, residual, None, None)
    shift = rng.normal(size=(case.shape[0], 1, 1)) * 2 * case.scale
    x = (data.x.astype(np.float64) + shift).astype(case.dtype)
    gamma, beta, mean, var = data.given
    if mean is not None:
        mean, var = (np.concatenate([a + 0.25 * k for k in range(len(case.sets))]).astype(a.dtype) for a in (mean, var))
    starts, order = np.cumsum([0, *case.sets]), None
    if case.rows:
        order = rng.permutation(case.shape[0] // case.rows)
        order = (order[:, None] * case.rows + np.arange(case.rows)).ravel()
    return MoreInputs(x, data.dy, (gamma, beta, mean, var), residual, starts, order)


def window(memory: np.ndarray, layout: Layout, shape: tuple[int, int, int]) -> np.ndarray:
    """The view of NumPy memory that a layout describes."""
    _, strides, offset = layout.place(shape, memory.itemsize)
    return np.ndarray(shape, memory.dtype, memory, offset, strides)  # type: ignore[call-overload]


def filled(layout: Layout, shape: tuple[int, int, int], dtype: np.dtype, values: np.ndarray | None) -> np.ndarray:
    """Memory that holds NaN, but for the values."""
    memory = np.full(layout.place(shape, dtype.itemsize)[0], np.nan, dtype)
    if values is not None:
        window(memory, layout, shape)[...] = values
    return memory
