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


def take_turns(calls: Mapping[str, Callable[[], Any]], budget: Budget) -> dict[str, tuple[list[float], int]]:
    """Seconds per call of each sample, and calls in a sample, by name.

    Each round calls all, in an order of its own, and each as often as the others: what a call finds in the caches is
    what the one before has left there. One that is called again, where others aren't, finds its own data.
    """
    names, shuffled = list(calls), random.Random(0)
    repeats: dict[str, int] = {}
    estimate: dict[str, float] = {}
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
        samples: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            for name in shuffled.sample(names, len(names)):
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
    twin = case.twin() if twins else None
    others = None if twin is None else Arrays(twin)
    torch = next((library.torch for library in libraries if hasattr(library, "torch")), None)
    for plain in dict.fromkeys(base(function) for function, _ in calls):
        wanted = [(name, out) for name, out in calls if base(name) == plain]
        beside = [(plain, out) for name, out in wanted if name != plain and (plain, out) not in wanted]
        outs = dict.fromkeys(out for name, out in wanted if name == plain)
        found = {
            (library, name, out): prepare(library, arrays, name, out)
            for name, out in [*wanted, *dict.fromkeys(beside)]
            for library in (libraries if name == plain and (name, out) in wanted else libraries[:1])
        }
        runs = {
            f"{library.name} {name} {out}": c.run for (library, name, out), c in found.items() if isinstance(c, Call)
        }
        ways = copies(arrays.source(), arrays.target(), torch)
        runs |= {f"copy {way}": run for way, run in ways.items()}
        for copy in ways.values():
            copy()  # compiles
        if others is not None and twin is not None:
            for out in outs:
                call = prepare(libraries[0], others, plain, out)
                runs |= {f"twin {out}": call.run} if isinstance(call, Call) else {}
        # What y alone is read from nobody else reads, where x is in the caches for the sake of all: of 26 MB, the plain
        # function with an x of its own takes 6 to 14 % longer.
        for out in dict.fromkeys(out for name, out in wanted if name == "backward+y"):
            call = prepare(libraries[0], arrays.apart(), plain, out)
            runs |= {f"apart {out}": call.run} if isinstance(call, Call) else {}
            del call
        times = take_turns(runs, budget)
        medians = {name: float(np.median(seconds)) for name, (seconds, _) in times.items()}
        best = min(ways, key=lambda way: medians[f"copy {way}"])
        for (library, function, out), call in found.items():
            if (function, out) not in wanted:
                continue
            about = (case.name, case.shape.name, case.shape.dims, case.shape.group, case.layout, case.dtype)
            if isinstance(call, str):
                yield Row(*about, function, out, library.name, None, note=call)
                continue
            name = f"{library.name} {function} {out}"
            simple = f"apart {out}" if function == "backward+y" else f"{library.name} {plain} {out}"
            seconds, repeats = times[name]
            low, high = (float(v) for v in np.quantile(seconds, (0.25, 0.75)))
            ratio = None
            if library is libraries[0] and twin is not None and f"twin {out}" in medians and function == plain:
                ratio = (medians[name] / case.size) / (medians[f"twin {out}"] / twin.size)
            yield Row(
                *about,
                function,
                out,
                library.name,
                medians[name] * 1e3,
                low * 1e3,
                high * 1e3,
                len(seconds),
                repeats,
                case.bytes / 1e6,
                medians[f"copy {best}"] * 1e3,
                best,
                ratio,
                medians[name] / medians[simple] if function != plain and simple in medians else None,
            )
        del found, runs, ways
