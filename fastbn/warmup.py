"""`python -m fastbn warmup`: compiles the CPU kernels ahead of the first call, into the cache on disk."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np

from . import backward, backward_backward, forward, infer, jvp, moments, set_backend

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
        for name in args.dtype:
            _dtype(name)
    except ImportError as cause:
        print(f"fastbn warmup: {cause}; pip install it", file=sys.stderr)
        return 1
    kinds = [kind for kind in _WORK if kind != "second order" or args.second_order]
    jobs = [(kind, name) for name in args.dtype for kind in kinds]
    folder, start = compiler.cache_folder(), time.perf_counter()
    count = min(len(jobs), importlib.import_module("numba").config.NUMBA_NUM_THREADS) if folder else 1
    work = _apart if count > 1 and sys.executable else _compile
    with _progress(len(jobs)) as done, futures.ThreadPoolExecutor(count if work is _apart else 1) as pool:
        running = {pool.submit(work, *job): job for job in jobs}
        for finished in futures.as_completed(running):
            if problem := finished.exception():
                pool.shutdown(cancel_futures=True)
                print(f"fastbn warmup: {', '.join(running[finished])}: {problem}", file=sys.stderr)
                return 1
            done(", ".join(running[finished]))
    print(
        f"compiled or found in {time.perf_counter() - start:.1f} s; kept in {folder or 'memory alone: no cache folder'}"
    )
    return 0 if folder else 1


def _apart(kind: str, name: str) -> None:
    """In a process of its own, as Numba compiles in one thread of a process at a time; the cache on disk is shared."""
    code = f"from fastbn import warmup; warmup._compile({kind!r}, {name!r})"
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | paths, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"its process ended with {done.returncode}").splitlines()[-1])


def _compile(kind: str, name: str) -> None:
    """One kind of kernels, for one thread and for all."""
    importlib.import_module("fastbn.kernels.cpu.compile").notice.said = True  # it is said by the command
    for shape in (SMALL, LARGE):
        _WORK[kind](np.ones(shape, _dtype(name)))


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def _forward(x: np.ndarray) -> None:
    forward(x)
    moments(x)
    infer(x, np.zeros(x.shape[1]), np.ones(x.shape[1]))


def _saved(x: np.ndarray) -> Any:
    """Without forward's kernels, which another process compiles."""
    with set_backend("reference"):
        return forward(x)[1]


def _backward(x: np.ndarray) -> None:
    backward(x, _saved(x))


def _second_order(x: np.ndarray) -> None:
    saved = _saved(x)
    jvp(x, saved)
    backward_backward(x, None, None, x, saved)


_WORK = {"forward": _forward, "backward": _backward, "second order": _second_order}


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """What it gives is called with the name of each job that is done: a bar if rich is there, else lines."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda name: print(name, flush=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as shown:
        task = shown.add_task("compiling", total=total)
        yield lambda name: shown.update(task, description=name, advance=1)
