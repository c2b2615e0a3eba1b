"""Cases of second order for the numba.cuda kernels, and what runs them: `python numba_cuda_second.py RESULTS`.

As in numba_cuda_run: tests run it in Numba's simulator, in a process of its own; on a GPU it may run without.
"""

from __future__ import annotations

import dataclasses
import pickle
import sys
import warnings
import zlib
from typing import Any

import numpy as np
from cases import BFLOAT16
from numba_cuda_cases import (
    BROADCAST_OUTER,
    COLUMN_WINDOW,
    COLUMNS,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    MASKED,
    REVERSED,
    ROWS,
    STEPS,
    TURNED,
    WINDOW,
    Layout,
    MoreCase,
    filled,
    more_inputs,
)


@dataclasses.dataclass(frozen=True)
class SecondCase(MoreCase):
    """`dy` is the layout of g, `y` that of r; where there is none, it is that of x."""

    have: str = "u g x p q"
    want: str = "r z ggamma"
    u: Layout | None = None
    z: Layout | None = None
    u_offset: float = 0.0
    over: tuple[tuple[str, str], ...] = ()  # results that go where an argument is


SETS: dict[str, Any] = {"shape": (6, 3, 11), "sets": (2, 0, 1, 3)}
POSITIONS: dict[str, Any] = {"weights": "positions"}
FAR = {"offset": 1e4, "dy_offset": 1e4, "u_offset": -1e4}
SECOND_CASES = [
    SecondCase("rows", given="float64"),
    SecondCase("channels last", (3, 5, 11), x=COLUMNS),
    SecondCase("channels slowest, frozen", (9, 4, 5), x=TURNED, frozen=True),
    SecondCase("no inner axis, wider blocks", (61, 7, 1), sizes=(16, 4, 4, 8, 16)),
    SecondCase("many pieces", (2, 2, 101), sizes=(4, 2, 2, 1000, 8)),
    SecondCase("five layouts", (4, 3, 9), x=COLUMN_WINDOW, u=REVERSED, dy=STEPS, y=TURNED, z=WINDOW),
    SecondCase("five layouts by weights", (4, 3, 9), x=WINDOW, u=STEPS, dy=COLUMNS, y=REVERSED, z=TURNED, **POSITIONS),
    SecondCase("u with stride 0", (4, 3, 9), u=BROADCAST_OUTER),
    # A block takes 32 values of a channel in a round (4 threads, 8 each).
    *(SecondCase(f"{n} values", (1, 2, n)) for n in (1, 2, 9, 33, 64)),
    SecondCase("9 values by weights", (1, 2, 9), **POSITIONS),
    *(SecondCase(f"{d.name}, frozen", dtype=d, frozen=True) for d in (FLOAT64, FLOAT16, BFLOAT16)),
    *(
        SecondCase(f"all, {dtype.name}, {masked}", dtype=dtype, x=layout, masked=masked, **SETS, **POSITIONS)
        for dtype, layout, masked in (
            (FLOAT32, ROWS, "normalize"),
            (FLOAT64, COLUMNS, "zero"),
            (FLOAT16, ROWS, "keep"),
            (BFLOAT16, COLUMNS, "normalize"),
        )
    ),
    *(SecondCase(f"all, frozen, {masked}", masked=masked, frozen=True, **SETS, **POSITIONS) for masked in MASKED),
    SecondCase("sets of rows that follow", (36, 5, 1), sets=(9, 0, 24, 3), rows=3, masked="zero", **POSITIONS),
    SecondCase("equal sets", (6, 3, 13), sets=(2, 2, 2), rows=0),
    SecondCase("a set without weights", (6, 3, 23), sets=(1, 3, 0, 2), spoil="a set", masked="zero", **POSITIONS),
    SecondCase("no weights at all", weights="none"),
    SecondCase("small weights", spoil="small weights", **POSITIONS),
    *(SecondCase(f"a mask, {masked}", weights="mask", masked=masked) for masked in MASKED),
    *(
        SecondCase(f"NaN where w is 0, {masked}", weights="mask", masked=masked, spoil="absent", want=want)
        for masked, want in (("normalize", "r"), ("zero", "r z ggamma"), ("keep", "r z ggamma"))
    ),
    *(
        SecondCase(f"far from 0, {dtype.name}, {name}", (3, 3, 23), dtype, x=layout, **FAR, **more)
        for dtype, layout in ((FLOAT32, ROWS), (FLOAT64, COLUMNS))
        for name, more in (("all count", {}), ("by weights", POSITIONS), ("frozen", {"frozen": True}))
    ),
    SecondCase("an outlier", (3, 3, 23), spoil="an outlier", offset=3.0),
    SecondCase("one value of x", (3, 3, 23), spoil="one value", offset=1 / 3),
    SecondCase("NaN in a channel", (3, 3, 23), spoil="NaN"),
    SecondCase("infinity, frozen", (3, 3, 23), spoil="infinity", frozen=True),
    *(
        SecondCase(f"{have} -> {want}{', frozen' * frozen}", (3, 3, 9), have=have, want=want, frozen=frozen)
        for have, want, frozen in (
            ("u x", "r", False),
            ("x p", "r", False),
            ("u x p q", "r", True),
            ("u", "r", True),
            ("q", "r", True),
            ("u g x", "ggamma", False),
            ("g x p q", "r z ggamma", False),
            ("u g x p", "z", False),
            ("g x p", "r z", True),
            ("u g", "ggamma", True),
        )
    ),
    SecondCase("r over u, z over g", over=(("r", "u"), ("z", "g"))),
    SecondCase("r over g, z over x", x=COLUMNS, over=(("r", "g"), ("z", "x"))),
    SecondCase("z over u, sets", over=(("z", "u"),), masked="keep", **SETS, **POSITIONS),
]
assert len({case.name for case in SECOND_CASES}) == len(SECOND_CASES)


@dataclasses.dataclass
class SecondInputs:
    arrays: dict[str, np.ndarray]  # u, g and x, each there or not
    numbers: dict[str, np.ndarray]  # p and q
    table: np.ndarray
    weights: np.ndarray | None
    order: np.ndarray | None
    starts: np.ndarray | None


def second_inputs(case: SecondCase) -> SecondInputs:
    """The same in every process, with the table that the reference makes of x."""
    from fastbn.kernels import reference

    from fastbn.extras import Extras

    data = more_inputs(case)
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()) + 3)
    u = (rng.normal(size=case.shape) + case.u_offset).astype(case.dtype)
    if case.u is BROADCAST_OUTER:
        u[...] = u[:1]
    if case.spoil == "absent":
        assert data.weights is not None
        u[np.broadcast_to(data.weights == 0, case.shape)] = np.nan
    p, q = rng.normal(size=(2, case.shape[1])).astype(FLOAT32 if case.given == "nothing" else case.given)
    table = np.zeros((6, max(1, len(case.sets)) * case.shape[1]))
    more = Extras(weights=data.weights, masked=case.masked, order=data.order, starts=data.starts)
    with np.errstate(all="ignore"):
        reference.forward(data.x.astype(FLOAT64), None, table, data.given, case.eps, more)
    arrays = {name: a for name, a in (("u", u), ("g", data.dy), ("x", data.x)) if name in case.have.split()}
    numbers = {name: a for name, a in (("p", p), ("q", q)) if name in case.have.split()}
    return SecondInputs(arrays, numbers, table, data.weights, data.order, data.starts)


def layouts(case: SecondCase) -> dict[str, Layout]:
    found = {"u": case.u, "g": case.dy, "x": case.x, "r": case.y, "z": case.z}
    return {name: layout or case.x for name, layout in found.items()}


def run(case: SecondCase) -> dict[str, np.ndarray]:
    """What the kernels make of a case: memory of r and z, ggamma; memory of u, g and x afterwards."""
    from fastbn.kernels import numba_cuda
    from fastbn.kernels.numba_cuda import second

    from fastbn.extras import Extras

    second.SIZES = numba_cuda.Sizes(*case.sizes)
    data, shape = second_inputs(case), case.shape
    element, places, want = numba_cuda.element_view(case.dtype), layouts(case), case.want.split()
    assert element is not None

    def put(name: str) -> tuple[Any, Any]:
        memory = numba_cuda.put(filled(places[name], shape, case.dtype, data.arrays.get(name)).view(element))
        _, strides, offset = places[name].place(shape, case.dtype.itemsize)
        return memory, numba_cuda.view(memory, shape, strides, offset)

    there = {name: put(name) for name in data.arrays}
    over = dict(case.over)
    results = {name: there[over[name]] if name in over else put(name) for name in ("r", "z")}
    columns = data.table.shape[1]
    ggamma = numba_cuda.put(np.full(columns, np.nan, FLOAT64 if case.dtype == FLOAT64 else FLOAT32))
    weights = None if data.weights is None else numba_cuda.put(data.weights)
    more = None
    if weights is not None or case.sets:
        more = Extras(weights=weights, masked=case.masked, order=data.order, starts=data.starts)
    tangents = tuple(numba_cuda.put(data.numbers[n]) if n in data.numbers else None for n in ("p", "q"))
    second.second(
        *(there[n][1] if n in there else None for n in ("u", "g", "x")),
        *(results[n][1] if n in want else None for n in ("r", "z")),
        numba_cuda.put(data.table), tangents, case.frozen, ggamma if "ggamma" in want else None, more,
    )  # fmt: skip
    found = {name: numba_cuda.host(memory).view(case.dtype) for name, (memory, _) in {**there, **results}.items()}
    return {**found, "ggamma": numba_cuda.host(ggamma)}


def main(path: str) -> None:
    from numba import config

    if config.ENABLE_CUDASIM:
        from simulator import without_threads

        without_threads()
    warnings.simplefilter("ignore")  # NumPy's, of NaN in a simulated kernel
    results: dict[str, Any] = {}
    for index, case in enumerate(SECOND_CASES):
        try:
            results[str(index)] = run(case)
        except Exception as error:  # told by the test of this case
            results[str(index)] = error
    results["again"] = [run(case) for case in SECOND_CASES[:20:4]]
    with open(path, "wb") as file:
        pickle.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
