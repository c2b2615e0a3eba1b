"""The command line: `python -m fastbn info` and `python -m fastbn demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__, demo, info


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastbn", description="Batch normalization for arrays.")
    parser.add_argument("--version", action="version", version=f"fastbn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    about = commands.add_parser("info", help="versions, backends, threads, cache folder")
    about.add_argument("--json", action="store_true", help="as JSON")
    about.set_defaults(run=lambda args: info.show(args.json))
    experiments = commands.add_parser("demo", help="what batch normalization does for deep nets, on real digits")
    demo.add_arguments(experiments)
    experiments.set_defaults(run=demo.run)
    args = parser.parse_args(argv)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
