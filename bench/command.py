"""What `python -m fastbn bench` does, from options to exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from . import bars, measure, peers, plots, report, startup
from .bars import Bar, Bars, Key, Verdict
from .measure import Budget, Row
from .peers import Library
from .shapes import QUICK, SHAPES, Case, Selection

Plan = Mapping[Case, tuple[Sequence[tuple[str, bool]], bool]]  # the calls, and whether the case's twin is measured too
Keep = Callable[[list[Row], dict[str, float]], None]  # writes what was measured so far
INTERRUPTED = 130  # the shell's code for Ctrl-C
OFTEN = 30.0  # seconds between two times that rows are written, and lines where no terminal shows a bar


def benchmark(args: argparse.Namespace) -> int:
    """From options to exit code."""
    missing = [name for name in ("rich", *(["matplotlib"] if args.plot else [])) if not importable(name)]
    if missing:
        return fail(f"{' and '.join(missing)} not found; pip install 'fastbn[bench]'")
    if args.list:
        return show_shapes()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = cores if args.threads is None else args.threads
    try:
        if not 1 <= threads <= cores:
            raise ValueError(f"--threads {threads}; expected 1 to {cores}")
        required = bars.load(args.check).named(args.bar) if args.check else None
        plan, names = selected(args), selected_peers(args)
    except (ValueError, OSError) as error:
        return fail(str(error))
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        again_with_passive_waits(args.words)
    print("OMP_WAIT_POLICY=passive: else the OpenMP runtimes of two libraries spin against each other")
    if hasattr(os, "sched_setaffinity"):  # JAX takes as many threads as there are cores to use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    libraries, skipped = peers.load(names, threads)
    for name, reason in skipped.items():
        print(f"{name} is skipped: {reason}")

    def keep(rows: list[Row], seconds: dict[str, float]) -> None:
        if args.json:
            report.save(args.json, report.about(libraries, skipped, threads), rows, seconds)

    verdicts: list[Verdict] = []
    try:
        if required is None:
            rows = sweep(plan, libraries, measure.QUICK if args.quick else measure.FULL, lambda some: keep(some, {}))
        else:
            rows, verdicts = check(required, libraries, keep)
        if args.plot:
            print("drawn:", *plots.draw(rows, args.plot))
    except OSError as error:
        return fail(str(error))
    if required is not None:
        report.show_verdicts(verdicts)
        return 0 if all(verdict.passed for verdict in verdicts) else 1
    report.show(rows)
    wrong = sum(row.library == "fastbn" and row.ms is None for row in rows)
    return fail(f"fastbn gave no right result in {wrong} rows") if wrong else 0


def check(required: Bars, libraries: Sequence[Library], keep: Keep) -> tuple[list[Row], list[Verdict]]:
    """Measure what the bars need, again where noise may have decided, and judge; `keep` gets what there is so far."""
    seconds = processes(required.bars)
    plan = bars.needs(required.bars)

    def keep_with(before: list[Row]) -> Callable[[list[Row]], None]:
        return lambda some: keep(bars.replaced(before, some), seconds)

    rows = sweep(plan, libraries, measure.CHECK, keep_with([]))
    verdicts = []
    for bar in required.bars:
        verdict, budget = bars.judge(bar, rows, seconds, required.near), measure.CHECK
        for _ in range(required.again):
            if not verdict.again:
                break
            budget = budget.doubled()
            again = sweep(calls_of(verdict.again, plan), libraries, budget, keep_with(rows), "again:")
            rows = bars.replaced(rows, again)
            verdict = bars.judge(bar, rows, seconds, required.near)
        verdicts.append(verdict)
    return rows, verdicts


def selected(args: argparse.Namespace) -> Plan:
    """What the command line selects. Raises ValueError on an unknown name, or if nothing is left."""
    fields = ("shape", "layout", "dtype", "function")
    given: dict[str, Any] = {name: tuple(value) for name in fields if (value := getattr(args, name))}
    if args.out:
        given["out"] = (args.out == "given",)
    if args.quick:
        given = {"shape": QUICK, "dtype": ("float32",), "out": (True,), **given}
    selection = Selection(**given)
    plan = dict.fromkeys(selection.cases(), (tuple(selection.calls()), False))
    if not plan:
        raise ValueError(f"no case in {given}; --list shows the shapes and their layouts")
    return plan


def selected_peers(args: argparse.Namespace) -> tuple[str, ...]:
    """The peers of the command line; a check needs PyTorch alone. Raises ValueError on an unknown name."""
    if args.peer is None:
        return ("PyTorch",) if args.check else peers.PEERS
    known = {name.lower(): name for name in peers.PEERS}
    for name in args.peer:
        if name.lower() not in {*known, "none"}:
            raise ValueError(f"no peer {name!r}; expected some of {', '.join(peers.PEERS)}, or none")
    return tuple(known[name.lower()] for name in args.peer if name.lower() != "none")


def again_with_passive_waits(words: Sequence[str]) -> None:
    """Start this command again, in place of this process, with OpenMP threads that sleep while they wait.

    The runtimes read the variable once, when they start.
    """
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    os.execve(sys.executable, [sys.executable, "-m", "fastbn", *words], environment)


def sweep(
    plan: Plan, libraries: Sequence[Library], budget: Budget, keep: Callable[[list[Row]], None], title: str = ""
) -> list[Row]:
    """Measure every case of the plan; `keep` gets the rows now and then, and all in the end, or what there is if
    something ends it."""
    rows: list[Row] = []
    kept = time.monotonic()
    try:
        with progress(len(plan)) as advance:
            for case, (calls, twin) in plan.items():
                advance(f"{title} {case.name}".strip())
                rows += measure.measure(case, calls, libraries, budget, twin)
                if time.monotonic() - kept > OFTEN:  # a check takes half an hour, and may be killed
                    keep(rows)
                    kept = time.monotonic()
    finally:
        keep(rows)
    return rows


def calls_of(again: Sequence[tuple[Case, Key]], plan: Plan) -> Plan:
    """The part of the plan that measures these calls."""
    calls: dict[Case, list[tuple[str, bool]]] = {}
    for case, (_, function, out) in again:
        calls.setdefault(case, []).append((function, out))
    return {case: (tuple(found), plan[case][1]) for case, found in calls.items()}


def processes(required: Sequence[Bar]) -> dict[str, float]:
    """Seconds of the fresh processes that the bars name."""
    names = dict.fromkeys(bar.process for bar in required if bar.process)
    seconds = {}
    with progress(len(names)) as advance:
        for name in names:
            advance(f"fresh processes, kernel cache {name}")
            seconds[name] = startup.warm() if name == "warm" else startup.cold()
    return seconds


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar, or a line now and then where no terminal shows it; what it gives is called at the start of each
    step, with its name."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not report.console().is_terminal:
        yield _lines(total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True, refresh_per_second=2) as shown:
        task, started = shown.add_task("", total=total), 0

        def advance(name: str) -> None:
            nonlocal started
            shown.update(task, description=name, completed=started)
            started += 1

        yield advance


def _lines(total: int) -> Callable[[str], None]:
    start = said = time.monotonic()
    number = 0

    def advance(name: str) -> None:
        nonlocal said, number
        number, now = number + 1, time.monotonic()
        if now - said > OFTEN:
            said = now
            print(f"{number} of {total}, {now - start:.0f} s: {name}", flush=True)

    return advance


def show_shapes() -> int:
    """The table of shapes, with reasons."""
    from rich.table import Table

    table = Table("shape", "group", "dimensions", "layouts", "reason")
    for shape in SHAPES:
        table.add_row(shape.name, shape.group, "×".join(map(str, shape.dims)), ", ".join(shape.layouts), shape.reason)
    report.console().print(table)
    return 0


def importable(name: str) -> bool:
    """Whether a package can be imported."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def fail(message: str, code: int = 1) -> int:
    """Print one line to stderr; the exit code to end with."""
    print(f"fastbn bench: {message}", file=sys.stderr)
    return code
