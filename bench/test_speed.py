"""pytest-benchmark cases, a test for each case, function and library: `pytest bench -k "mlp and forward"`.

Interleaving is what makes ratios hold on a busy machine, and pytest-benchmark runs one thing after another: for
comparisons use `python -m fastbn bench`. Plain `pytest` doesn't collect this file.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
from fastbn.bench import measure, peers
from fastbn.bench.arrays import Arrays
from fastbn.bench.shapes import Case, Selection

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
EVERYTHING = Selection()


@functools.cache
def library(kind: Any) -> Any:
    """The library, or why it is not there."""
    try:
        return kind(THREADS)
    except ImportError as error:
        return str(error) or "not installed"


@functools.lru_cache(maxsize=1)
def arrays(case: Case) -> Arrays:
    """The case's arrays, until the next case."""
    return Arrays(case)


@pytest.mark.parametrize("kind", peers.LIBRARIES, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("function", "out"), EVERYTHING.calls(), ids=lambda v: {True: "out=", False: "fresh"}.get(v, v)
)
@pytest.mark.parametrize("case", EVERYTHING.cases(), ids=lambda case: case.name)
def test_speed(benchmark: Any, case: Case, function: str, out: bool, kind: Any) -> None:
    found = library(kind)
    if isinstance(found, str):
        pytest.skip(found)
    call = measure.prepare(found, arrays(case), function, out)
    if call == measure.NOT_OFFERED:
        pytest.skip(f"{found.name} has no such function")
    assert isinstance(call, peers.Call), call
    benchmark.group = f"{case.name} {function}{' out=' if out else ''}"
    benchmark(call.run)
