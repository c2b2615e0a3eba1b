"""`python -m fastbn.bench.gpu_check`: what only a GPU can tell, in one command, under eight minutes.

env       the machine, its tools, what the planner is told of the device
build     every kernel of the cases: seconds to compile, registers, spills, blocks on a multiprocessor
correct   every path against float64: three repeats beside other work, results poisoned, the same bits; graph replay
speed     ours, a copy of the same bytes, PyTorch's native kernels, cuDNN, torch.compile, in turns, by graph replay; the
          model beside the outcome; what a call costs the host
sanitize  compute-sanitizer's memcheck, racecheck and synccheck on small shapes
profile   bytes from and to device memory by ncu, beside the model's

A row of JSON is appended to the file as soon as it is known, so a run may be stopped at any point; what the file has
isn't measured again. Each stage has its share of the time, and one that fails is a row that says so. CuPy, PyTorch and
the tools are used where they are installed; nothing is fetched.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastbn.bench.gpu.build import build, env
from fastbn.bench.gpu.correct import correct
from fastbn.bench.gpu.run import Gpu, Rows, Run, words
from fastbn.bench.gpu.speed import speed
from fastbn.bench.gpu.tables import show
from fastbn.bench.gpu.tools import once, profile, sanitize

STAGES = ("env", "build", "correct", "speed", "sanitize", "profile")
QUICK = ("env", "build", "correct")
SECONDS = {"env": 15.0, "build": 60.0, "correct": 118.0, "speed": 180.0, "sanitize": 60.0, "profile": 45.0}  # 478
QUICK_SECONDS = {"env": 10.0, "build": 40.0, "correct": 60.0}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m fastbn.bench.gpu_check", description=(__doc__ or "").partition("\n")[0]
    )
    made.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)} (default: all of them)")
    made.add_argument("--quick", action="store_true", help="env, build, correct on few shapes: two minutes")
    made.add_argument("--out", type=Path, metavar="FILE", help="JSON lines; what it has isn't measured again")
    made.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="for gpu_check.jsonl, without --out")
    made.add_argument("--show", action="store_true", help="only the tables of what the file has")
    made.add_argument("--small", action="store_true", help=argparse.SUPPRESS)  # for sanitize
    made.add_argument("--once", action="store_true", help=argparse.SUPPRESS)  # for profile
    return made


def main(arguments: Sequence[str] | None = None, device: Any = None) -> int:
    """0: all is well; 1: something is wrong or failed; 2: no GPU; 130: interrupted. Bars that fall short only show."""
    options = parser().parse_args(arguments)
    for stage in options.stages:
        if stage not in STAGES:
            parser().error(f"{stage!r} is no stage; expected some of {', '.join(STAGES)}")
    rows = Rows(options.out or options.folder / "gpu_check.jsonl")
    if options.show:
        show(rows)
        return 0
    try:
        device = device or Gpu()
    except Exception as cause:
        print(f"no GPU: {words(cause)}", file=sys.stderr)
        return 2
    run = Run(rows, device, options.quick, options.small)
    if options.once:
        once(run)
        return 0
    stages: dict[str, Callable[[Run], None]] = {
        "env": env, "build": build, "correct": correct, "speed": speed, "sanitize": sanitize, "profile": profile,
    }  # fmt: skip
    seconds = QUICK_SECONDS if options.quick else SECONDS
    chosen = options.stages or (QUICK if options.quick else STAGES)
    for stage in (stage for stage in STAGES if stage in chosen):
        begin = time.monotonic()
        run.end = begin + seconds.get(stage, SECONDS[stage])
        print(f"{stage}: at most {run.end - begin:.0f} s", file=sys.stderr, flush=True)
        try:
            stages[stage](run)
        except KeyboardInterrupt:
            rows.add(stage, "stopped", note="interrupted")
            show(rows)
            return 130
        except Exception as cause:
            rows.add(stage, "failed", error=words(cause), trace=traceback.format_exc()[-1500:])
        rows.add(stage, "took", seconds=time.monotonic() - begin)
    if not options.small:
        show(rows)
    last = [row for stage in chosen for row in rows.of(stage)]
    return 1 if any("error" in row or row.get("ok") is False for row in last) else 0


if __name__ == "__main__":
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    sys.exit(main())
