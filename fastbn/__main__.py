"""The command line: `python -m fastbn info`, `warmup`, `demo` and `bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import fastbn.bench as bench

from . import __version__, demo, info, warmup


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastbn", description="Batch normalization for arrays.")
    parser.add_argument("--version", action="version", version=f"fastbn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    about = commands.add_parser("info", help="versions, backends, threads, cache folder")
    about.add_argument("--json", action="store_true", help="as JSON")
    about.set_defaults(run=lambda args: info.show(args.json))
    ahead = commands.add_parser("warmup", help="compile the CPU kernels now, not on the first call")
    warmup.add_arguments(ahead)
    ahead.set_defaults(run=warmup.run)
    experiments = commands.add_parser("demo", help="what batch normalization does for deep nets, on real digits")
    demo.add_arguments(experiments)
    experiments.set_defaults(run=demo.run)
    speed = commands.add_parser("bench", help="how fast each function is, beside a copy and other libraries")
    bench.add_arguments(speed)
    words = sys.argv[1:] if argv is None else list(argv)
    speed.set_defaults(run=bench.run, words=words)
    args = parser.parse_args(words)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
