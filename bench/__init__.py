"""`python -m fastbn bench`: how fast each function is, beside a copy of the same bytes and beside other libraries.

command   what the command line does
shapes    the table of named shapes, and what a run selects from it
arrays    the arrays of one case, and the float64 reference that judges results before they are timed
peers     the libraries, a class each
floor     the copy
measure   turns, rounds, medians
startup   seconds of fresh processes
bars      what `--check` requires, in bars.toml
report    tables, JSON, the README's table
plots     PNG files
gpu_check a command of its own: what only a GPU can tell; gpu has its stages

rich, matplotlib and the libraries are imported only when the command runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .shapes import DTYPES, EXTRAS, FUNCTIONS, LAYOUTS, SECOND

__all__ = ["add_arguments", "run"]

BARS = Path(__file__).with_name("bars.toml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options to a parser."""
    several: dict[str, Any] = {"action": "extend", "type": lambda text: text.split(","), "metavar": "NAME,..."}
    parser.add_argument("--quick", action="store_true", help="six shapes, float32, `out=`: a minute or two")
    parser.add_argument("--shape", **several, help="names or groups of the table (--list shows it)")
    parser.add_argument("--layout", **several, help=", ".join(LAYOUTS))
    parser.add_argument("--dtype", **several, help=", ".join(DTYPES))
    parser.add_argument(
        "--function", **several, help=f"{', '.join(FUNCTIONS)}; and +{', +'.join(EXTRAS)}; {', '.join(SECOND)}"
    )
    parser.add_argument("--out", choices=("given", "fresh"), help="results given by `out=`, or fresh (default: both)")
    parser.add_argument("--peer", **several, help="NumPy, PyTorch, JAX, ONNX Runtime or none (default: all installed)")
    parser.add_argument("--threads", type=int, help="of every library (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the run there")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw PNG files there")
    parser.add_argument(
        "--check", type=Path, nargs="?", const=BARS, metavar="FILE", help="hold a run against bars (bars.toml)"
    )
    parser.add_argument("--bar", nargs="+", metavar="TEXT", help="with --check: only bars that have this in their name")
    parser.add_argument("--list", action="store_true", help="show the table of shapes")


def run(args: argparse.Namespace) -> int:
    """Measure, and show or check; the process's exit code.

    0: done, and all bars passed; 1: a bar falls short, or something is missing or wrong; 130: interrupted.
    """
    from .command import INTERRUPTED, benchmark, fail

    try:
        return benchmark(args)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
