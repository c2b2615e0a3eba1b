"""Timing: everything that is compared takes turns, round by round, in one process."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np

from .arrays import Arrays
from .floor import copies
from .peers import Call, Library
from .shapes import Case, base

SAMPLE = 200e-6  # seconds that a sample lasts at least, by repeating the call
SLOW = 10  # times the fastest: such a call takes part in three rounds only
CACHE = 25e6  # bytes of x under which x and y may stay in a cache from one call to the next
NOT_OFFERED = "not offered"
PASSES = {"forward": 2, "backward": 3, "infer": 2, "moments": 1}  # arrays of x's size read and written, each once


@dataclass(frozen=True)
class Budget:
    """How long to measure: about `seconds` for each case and function, but `rounds` at least and `most` at most."""

    seconds: float = 0.6
    rounds: int = 7
    most: int = 60

    def doubled(self) -> Budget:
        """For measuring again."""
        return Budget(2 * self.seconds, 2 * self.rounds, 2 * self.most)


FULL, QUICK, CHECK = Budget(1.0, 9), Budget(0.4), Budget(0.1, 5, 25)


@dataclass(frozen=True)
class Row:
    """What one library took for one function on one case. Times are in ms, medians but for the quartiles."""

    case: str
    shape: str
    dims: tuple[int, ...]
    group: str
    layout: str
    dtype: str
    function: str
    out: bool
    library: str
    ms: float | None  # None: not timed, and `note` says why
    low: float = math.nan  # quartiles
    high: float = math.nan
    rounds: int = 0
    repeats: int = 1  # calls in a sample
    mbytes: float = 0.0  # of x
    copy_ms: float = math.nan  # the fastest copy of x's bytes, in the same rounds
    copy_by: str = ""
    twin: float | None = None  # time per element over that of `Case.twin`
    plain: float | None = None  # of a function with more: time over that of the plain one, in the same rounds
    note: str = ""

    @property
    def key(self) -> tuple[str, str, bool]:
        """What is compared between libraries."""
        return self.case, self.function, self.out

    @property
    def copies(self) -> float:
        """The time as a multiple of the copy's."""
        return math.nan if self.ms is None else self.ms / self.copy_ms

    @property
    def cached(self) -> bool:
        """Whether x and y may stay in a cache from one call to the next."""
        return self.mbytes * 1e6 < CACHE

    @property
    def gbytes(self) -> float:
        """GB/s, counting each array that must be read or written once."""
        return math.nan if self.ms is None else PASSES[base(self.function)] * self.mbytes / self.ms


def orders(names: Sequence[Any]) -> Iterator[list[Any]]:
    """Orders of n names without end, of n in a row (2 n if n is odd) each name follows each other one equally often.

    What a call finds in the caches is what the one before has left there. Source: Williams 1949, "Experimental designs
    balanced for the estimation of residual effects of treatments".
    """
    count, lots = len(names), random.Random(0)
    first = [(k + 1) // 2 if k % 2 else (count - k // 2) % count for k in range(count)]  # 0, 1, n - 1, 2, n - 2, ...
    rows = [[(place + shift) % count for place in first] for shift in range(count)]
    rows += [row[::-1] for row in rows] if count % 2 else []
    while True:
        shuffled = lots.sample(list(names), count)
        for row in lots.sample(rows, len(rows)):
            yield [shuffled[place] for place in row]


def take_turns(calls: Mapping[Any, Callable[[], Any]], budget: Budget) -> dict[Any, tuple[list[float], int]]:
    """Seconds per call of each sample, and calls in a sample, by name.

    Each round calls all, in one of `orders`, and each as often as the others. One that is called again, where others
    aren't, finds its own data.
    """
    names, turns = list(calls), orders(list(calls))
    repeats: dict[Any, int] = {}
    estimate: dict[Any, float] = {}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for name, call in calls.items():
            repeats[name], estimate[name] = _warm(call)
        quickest = min(estimate[name] / repeats[name] for name in names)
        slow = {name for name in names if estimate[name] > max(0.1, SLOW * quickest)}
        often = max(repeats[name] for name in names if name not in slow)
        estimate |= {name: estimate[name] / repeats[name] * often for name in names if name not in slow}
        repeats |= {name: often for name in names if name not in slow}
        a_round = sum(estimate[name] for name in names if name not in slow)
        rounds = min(budget.most, max(budget.rounds, int(budget.seconds / max(a_round, 1e-6))))
        thirds = {0, rounds // 2, rounds - 1}
        samples: dict[Any, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            for name in next(turns):
                if name not in slow or number in thirds:
                    samples[name].append(_seconds(calls[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: (samples[name], repeats[name]) for name in names}


def _warm(call: Callable[[], Any]) -> tuple[int, float]:
    """How often to repeat the call for a sample, and the seconds that the sample takes."""
    times = 1
    taken = _seconds(call, 1)
    if taken < 100 * SAMPLE:  # a long call was made ready by the check of its result
        while (taken := _seconds(call, times) * times) < SAMPLE:
            times *= 2
    return times, taken


def _seconds(call: Callable[[], Any], times: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in repeat(None, times):
        call()
    return (time.perf_counter() - start) / times


def prepare(library: Library, arrays: Arrays, function: str, out: bool) -> Call | str:
    """The library's call, once it gave the right result; else why it isn't timed."""
    try:
        call = library.call(arrays, function, out)
        if call is None:
            return NOT_OFFERED
        if out:  # so that the results of another library can't pass for this one's
            (arrays.dx if base(function) == "backward" else arrays.y).fill(np.nan)
        error = arrays.error(function, call.read(call.run()))
    except Exception as cause:  # whatever a peer raises, the run goes on without it
        return f"failed: {type(cause).__name__}: {cause}"
    # PyTorch's bfloat16 gradients of permuted arrays are off by 2 to 4 eps: no other function, so they are timed
    most = max(library.error, 8 * float(np.spacing(np.ones((), arrays.dtype))))
    return call if error <= most else f"wrong: off by {error:.2g}"


def measure(
    case: Case,
    calls: Sequence[tuple[str, bool]],
    libraries: Sequence[Library],
    budget: Budget,
    twins: bool = False,
) -> Iterator[Row]:
    """Rows of one case, function by function; `twins` measures the case's twin with it.

    fastbn is the first library. A wrong result of a peer is a row with a note and no time.
    """
    arrays = Arrays(case)
    other = case.twin() if twins else None
    twin = None if other is None else Arrays(other)
    torch = next((library.torch for library in libraries if hasattr(library, "torch")), None)
    for plain in dict.fromkeys(base(function) for function, _ in calls):
        if outs := [out for name, out in calls if name == plain]:
            yield from _beside_others(arrays, twin, plain, outs, libraries, budget, torch)
        for function, out in calls:
            if function != plain and base(function) == plain:
                yield _beside_plain(arrays, function, out, libraries[0], budget, torch)


def _beside_others(
    arrays: Arrays, twin: Arrays | None, function: str, outs: Sequence[bool], libraries: Sequence[Library],
    budget: Budget, torch: Any,
) -> Iterator[Row]:  # fmt: skip
    """A plain function of all libraries, with and without `out=`, and of the twin."""
    found = {(library, out): prepare(library, arrays, function, out) for out in outs for library in libraries}
    runs: dict[Any, Any] = {key: call.run for key, call in found.items() if isinstance(call, Call)}
    if twin is not None:
        prepared = {("twin", out): prepare(libraries[0], twin, function, out) for out in outs}
        runs |= {key: call.run for key, call in prepared.items() if isinstance(call, Call)}
    times, copied = _times(runs, arrays, torch, budget)
    for (library, out), call in found.items():
        about = _about(arrays.case, function, out, library)
        if isinstance(call, str):
            yield Row(**about, ms=None, note=call)
            continue
        ratio = None
        if library is libraries[0] and twin is not None and ("twin", out) in times:
            theirs = float(np.median(times["twin", out][0])) / twin.case.size
            ratio = float(np.median(times[library, out][0])) / arrays.case.size / theirs
        yield Row(**about, **_figures(times[library, out]), **copied, mbytes=arrays.case.bytes / 1e6, twin=ratio)


def _beside_plain(
    arrays: Arrays, function: str, out: bool, library: Library, budget: Budget, torch: Any
) -> Row:  # fmt: skip
    """A function with more, beside the plain one and copies alone: where five others read the same x in between, ReLU
    took 1.4 times as long as none, for what they left in the caches; beside the plain one alone 1.0."""
    about = _about(arrays.case, function, out, library)
    # What y alone is read from nobody else reads, where x is in the caches for the sake of all: of 26 MB, the plain
    # function with an x of its own takes 6 to 14 % longer.
    beside = arrays.apart() if function == "backward+y" else arrays
    call, plain = prepare(library, arrays, function, out), prepare(library, beside, base(function), out)
    if isinstance(call, str):
        return Row(**about, ms=None, note=call)
    runs: dict[Any, Any] = {"more": call.run} | ({"plain": plain.run} if isinstance(plain, Call) else {})
    times, copied = _times(runs, arrays, torch, budget.doubled())
    ratio = float(np.median(times["more"][0]) / np.median(times["plain"][0])) if "plain" in times else None
    return Row(**about, **_figures(times["more"]), **copied, mbytes=arrays.case.bytes / 1e6, plain=ratio)


def _times(
    runs: Mapping[Any, Callable[[], Any]], arrays: Arrays, torch: Any, budget: Budget
) -> tuple[dict[Any, tuple[list[float], int]], dict[str, Any]]:
    """What `take_turns` gives for the calls and the copies, and what a row says of the fastest of those."""
    ways = copies(arrays.source(), arrays.target(), torch)
    for copy in ways.values():
        copy()  # compiles
    times = take_turns({**runs, **{("copy", way): run for way, run in ways.items()}}, budget)
    taken = {way: float(np.median(times["copy", way][0])) for way in ways}
    best = min(taken, key=taken.__getitem__)
    return times, {"copy_ms": taken[best] * 1e3, "copy_by": best}


def _about(case: Case, function: str, out: bool, library: Library) -> dict[str, Any]:
    shape = case.shape
    return {
        "case": case.name, "shape": shape.name, "dims": shape.dims, "group": shape.group, "layout": case.layout,
        "dtype": case.dtype, "function": function, "out": out, "library": library.name,
    }  # fmt: skip


def _figures(times: tuple[list[float], int]) -> dict[str, Any]:
    seconds, repeats = times
    low, middle, high = (float(v) * 1e3 for v in np.quantile(seconds, (0.25, 0.5, 0.75)))
    return {"ms": middle, "low": low, "high": high, "rounds": len(seconds), "repeats": repeats}
