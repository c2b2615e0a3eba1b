"""`python -m fastbn demo`: what batch normalization is known for, measured on real images.

Deep nets in plain NumPy (`net.py`) on scikit-learn's 8x8 digits (`training.py`), six experiments and a
seventh on what batch norm does not help with (`experiments.py`, on what `lab.py` gives them), and a report with plots
(`report.py`, `plots.py`). With `--ranks 4`, one experiment instead: training on four processes (`ranks.py`).
scikit-learn, matplotlib and rich are imported only when the demo runs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import fastbn

if TYPE_CHECKING:
    from rich.progress import TaskID

    from .lab import Budget, Outcome

__all__ = ["add_arguments", "run"]

NEEDED = ("sklearn", "matplotlib", "rich")
INTERRUPTED = 130  # the shell's code for Ctrl-C


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a parser."""
    parser.add_argument("--quick", action="store_true", help="fewer seeds and steps: seconds, not minutes")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the whole run (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("fastbn-demo"), help="folder of the report (default: fastbn-demo)"
    )
    parser.add_argument(
        "--backend", choices=("auto", "cpu", "reference"), help="kernels (default: fastbn's own choice)"
    )
    parser.add_argument(
        "--ranks", type=number_of_ranks, help="train on so many processes under mpiexec, and nothing else"
    )


def seed(text: str) -> int:
    """A seed: a whole number, zero or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"a seed is a whole number, zero or more; got {text}")
    return value


def number_of_ranks(text: str) -> int:
    """A number of processes, two or more."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"ranks are processes, two or more; got {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the experiments, print a summary, write the report; the process's exit code.

    0: done, whatever the claims' verdicts; 1: something is missing or cannot be written; 130: interrupted.
    """
    try:
        return demonstrate(args)
    except KeyboardInterrupt:  # outside the experiments: an import, a plot
        return fail("interrupted", INTERRUPTED)


def demonstrate(args: argparse.Namespace) -> int:
    """What `run` does; an interrupt during the experiments still leaves a report of the finished ones."""
    missing = [name for name in NEEDED if not importable(name)]
    if missing:
        return fail(f"{' and '.join(missing)} not found; pip install 'fastbn[demo]'")

    from . import experiments, lab, report

    if args.ranks is not None and (importlib.util.find_spec("mpi4py") is None or launcher() is None):
        return fail("mpi4py or mpiexec not found; pip install 'fastbn[demo,mpi]'")
    try:
        report.prepare(args.out)
    except OSError as error:
        return fail(f"cannot write to {args.out}: {error.strerror or error}")

    if args.ranks is not None:
        return on_ranks(args)
    budget = lab.QUICK if args.quick else lab.FULL
    outcomes: list[Outcome] = []
    interrupted = False
    start = time.perf_counter()
    backend = args.backend or fastbn.get_backend()
    try:
        with fastbn.set_backend(backend):
            experiment_all(args.seed, budget, outcomes)
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - start

    if outcomes:
        print_summary(outcomes)
        about = [
            f"{budget.name} run, seed {args.seed}, backend {backend}, {seconds:.0f} s",
            f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.machine()}",
        ]
        if args.quick:
            about.append("`--quick` runs fewer seeds, settings and steps: the figures are rough")
        if interrupted:
            about.append(f"interrupted: {len(outcomes)} of {len(experiments.EXPERIMENTS)} parts")
        try:
            path = report.write(args.out, outcomes, about)
        except OSError as error:
            return fail(f"cannot write to {args.out}: {error.strerror or error}")
        print(f"report: {path}")
    if interrupted:
        done = f"{len(outcomes)} of {len(experiments.EXPERIMENTS)} parts finished"
        return fail(f"interrupted, {done}{'' if outcomes else '; no report'}", INTERRUPTED)
    claims = [claim for outcome in outcomes for claim in outcome.claims]
    print(f"{sum(claim.passed for claim in claims)} of {len(claims)} claims passed in {seconds:.0f} s")
    return 0


def launcher() -> str | None:
    """mpiexec, if it is there."""
    from .ranks import mpiexec

    return mpiexec()


def on_ranks(args: argparse.Namespace) -> int:
    """The experiment on several processes: its summary and its plot."""
    from . import ranks, report

    plan = ranks.QUICK if args.quick else ranks.FULL
    start = time.perf_counter()
    print(f"training on {args.ranks} ranks: {2 * len(plan.rates) * plan.seeds} nets of {plan.steps} steps", flush=True)
    try:
        found = ranks.measure(args.ranks, plan, args.seed, args.backend or fastbn.get_backend())
    except RuntimeError as error:
        return fail(f"the ranks failed: {error}")
    outcome = ranks.outcome(args.ranks, plan, found)
    print_summary([outcome])
    about = [
        f"{plan.name} run, seed {args.seed}, {args.ranks} ranks, {time.perf_counter() - start:.0f} s",
        f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.machine()}",
    ]
    try:
        path = report.write_ranks(args.out, outcome, about)
    except OSError as error:
        return fail(f"cannot write to {args.out}: {error.strerror or error}")
    print(f"report: {path}")
    return 0


def experiment_all(seed: int, budget: Budget, outcomes: list[Outcome]) -> None:
    """Run every experiment with a live progress bar each, adding to `outcomes` as they finish."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    from .experiments import EXPERIMENTS
    from .lab import Lab
    from .training import Setting, load_digits, train

    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
    )
    # One BLAS thread: these products of 60 x 100 gain nothing from more, and the figures keep their bits.
    with Progress(*columns) as progress, threadpool_limits(1, user_api="blas"):
        first = progress.add_task("compiling the kernels", total=1)
        digits = load_digits(seed)
        for batch in (50, 60):
            train(Setting((True,), "ReLU", steps=1, batch=batch), digits)
        progress.update(first, completed=1)
        tasks = [progress.add_task(title, total=None, start=False) for title in EXPERIMENTS]
        for task, experiment in zip(tasks, EXPERIMENTS.values(), strict=True):
            progress.start_task(task)

            def advance(done: int, total: int, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            outcomes.append(experiment(Lab(digits, budget, seed, advance)))


def print_summary(outcomes: list[Outcome]) -> None:
    """The claims as a table on the screen."""
    from rich.console import Console
    from rich.table import Table

    from .report import summary

    table = Table("", "claim", "bar", "measured", "", title="What batch normalization did", show_lines=True)
    for *cells, verdict in summary(outcomes):
        colour = "green" if verdict == "PASS" else "red"
        table.add_row(*cells, f"[{colour}]{verdict}[/]")
    Console().print(table)


def importable(name: str) -> bool:
    """Whether a package can be imported."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def fail(message: str, code: int = 1) -> int:
    """Print one line to stderr; the exit code to end with."""
    print(f"fastbn demo: {message}", file=sys.stderr)
    return code
