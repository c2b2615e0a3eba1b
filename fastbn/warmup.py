"""`python -m fastbn warmup`: compiles the CPU kernels ahead of the first call, into the cache on disk."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import backward, backward_backward, forward, infer, jvp, moments

SMALL, LARGE = (4, 3, 6, 6), (64, 64, 28, 28)  # on one thread, and on all
DTYPES = "float32", "float64", "float16", "bfloat16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES, help="of x; float32 if not given")
    parser.add_argument(
        "--second-order", action="store_true", help="jvp and backward_backward too, which take as long again"
    )


def run(args: argparse.Namespace) -> int:
    """Compile; 0, or 1 where that can't be done."""
    try:
        compiler = importlib.import_module("fastbn.kernels.cpu.compile")
        dtypes = {name: _dtype(name) for name in args.dtype}
    except ImportError as cause:
        print(f"fastbn warmup: {cause}; pip install it", file=sys.stderr)
        return 1
    compiler.notice.said = True  # all of it is said here
    steps = [
        (f"{kind}, {name}, {where}", work, np.ones(shape, dtype))
        for name, dtype in dtypes.items()
        for kind, work in (("forward", _forward), ("backward", _backward), ("second order", _second_order))
        if kind != "second order" or args.second_order
        for where, shape in (("one thread", SMALL), ("all threads", LARGE))
    ]
    start = time.perf_counter()
    with _progress(len(steps)) as begin:
        for name, work, x in steps:
            begin(name)
            work(x)
    folder = compiler.cache_folder()
    print(
        f"compiled or found in {time.perf_counter() - start:.1f} s; kept in {folder or 'memory alone: no cache folder'}"
    )
    return 0 if folder else 1


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def _forward(x: np.ndarray) -> None:
    forward(x)
    moments(x)
    infer(x, np.zeros(x.shape[1]), np.ones(x.shape[1]))


def _backward(x: np.ndarray) -> None:
    backward(x, forward(x)[1])


def _second_order(x: np.ndarray) -> None:
    saved = forward(x)[1]
    jvp(x, saved)
    backward_backward(x, None, None, x, saved)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """What it gives is called with the name of each step as that begins: a bar if rich is there, else lines."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda name: print(name, flush=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as shown:
        task, begun = shown.add_task("", total=total), 0

        def begin(name: str) -> None:
            nonlocal begun
            shown.update(task, description=name, completed=begun)
            begun += 1

        yield begin
