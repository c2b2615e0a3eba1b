"""What a run found: as a table on the screen, as JSON, as the README's table."""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .bars import Verdict
from .measure import CACHE, NOT_OFFERED, Row
from .peers import PEERS, Library

KEPT = 6  # rows that a bar names, of those that fall short


def about(libraries: Iterable[Library], skipped: Mapping[str, str], threads: int) -> dict[str, Any]:
    """The machine and the settings of this run."""
    versions = {"python": platform.python_version(), "numpy": np.__version__, "numba": metadata.version("numba")}
    versions |= {library.name: library.version for library in libraries if library.name != "NumPy"}
    return {
        "machine": platform.machine(),
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", ""),
        "threading_layer": threading_layer(),
        "versions": versions,
        "skipped": dict(skipped),
    }


def threading_layer() -> str:
    """Numba's, if anything has run in parallel."""
    numba: Any = importlib.import_module("numba")
    try:
        return str(numba.threading_layer())
    except ValueError:
        return "none yet"


def processor() -> str:
    """The CPU's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def save(path: Path, facts: Mapping[str, Any], rows: Sequence[Row], seconds: Mapping[str, float]) -> None:
    """Write a run as JSON."""
    found = [{k: _short(v) for k, v in asdict(row).items()} for row in rows]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in found)
    head = json.dumps({**facts, "processes": {k: _short(v) for k, v in seconds.items()}}, indent=1)
    path.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """A run as it was saved: the facts, and the rows."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for row in facts.pop("rows"):
        figures = {name: math.nan if row[name] is None else row[name] for name in ("low", "high", "copy_ms")}
        rows.append(Row(**{**row, **figures, "dims": tuple(row["dims"])}))
    return facts, rows


def speeds(rows: Sequence[Row]) -> list[tuple[Row, dict[str, float | str]]]:
    """fastbn's rows, each with its peers' times over its own (above 1, fastbn is faster), or why there is none."""
    by: dict[Any, dict[str, Row]] = {}
    for row in rows:
        by.setdefault(row.key, {})[row.library] = row
    found = []
    for group in by.values():
        ours = group.get("fastbn")
        if ours is not None:
            found.append((ours, {peer: _ratio(ours, group[peer]) for peer in PEERS if peer in group}))
    return found


def _ratio(ours: Row, theirs: Row) -> float | str:
    if ours.ms is None or theirs.ms is None:
        return "" if theirs.note == NOT_OFFERED else theirs.note.partition(":")[0]
    return theirs.ms / ours.ms


def show(rows: Sequence[Row]) -> None:
    """The table on the screen."""
    from rich.table import Table

    peers = [peer for peer in PEERS if any(row.library == peer for row in rows)]
    table = Table(title="Medians; × a peer: its time over fastbn's", caption=f"c: x under {CACHE / 1e6:.0f} MB, cached")
    more = ("× plain",) if any(row.plain for row in rows) else ()  # of "forward+relu" and the like
    for heading in ("case", "function", "ms", "quartiles", "GB/s", "× copy", *more, *(f"× {peer}" for peer in peers)):
        table.add_column(heading, justify="left" if heading in ("case", "function") else "right")
    for row, ratios in speeds(rows):
        call = f"{row.function}{' out=' if row.out else ''}"
        cells = [f"{row.case}{' c' if row.cached else ''}", call]
        if row.ms is None:
            cells += [f"[red]{row.note}[/]", "", "", "", *("" for _ in more)]
        else:
            cells += [
                _number(row.ms),
                f"{_number(row.low)}–{_number(row.high)}",
                f"{row.gbytes:.1f}",
                f"{row.copies:.2f}",
                *(f"{row.plain:.2f}" if row.plain else "" for _ in more),
            ]
        table.add_row(*cells, *(_coloured(ratios.get(peer, "")) for peer in peers))
    console().print(table)


def console() -> Any:
    """The screen; wide enough for a row where output goes to a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 150)


def _number(ms: float) -> str:
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"


def _coloured(ratio: float | str) -> str:
    if isinstance(ratio, str):
        return f"[red]{ratio}[/]" if ratio else ""
    return f"{ratio:.2f}" if ratio >= 1 else f"[red]{ratio:.2f}[/]"


def show_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Each bar with its value, and what falls short."""
    from rich.table import Table

    table = Table("bar", "measured", "value", "limit", "", title="Bars; the value is the mean or the worst")
    for v in verdicts:
        measured = {"us": "µs", "seconds": "s", "copies": "× copy"}.get(v.bar.measure, f"× {v.bar.measure}")
        verdict = "[green]pass[/]" if v.passed else f"[red]{shortfall(v)}[/]"
        table.add_row(v.bar.name, f"{measured}, {v.bar.over}", f"{v.value:.3g}", v.bar.limit, verdict)
    screen = console()
    screen.print(table)
    for v in verdicts:
        for name, value in v.short[:KEPT]:
            screen.print(f"{v.bar.name}: {name}: {value:.3g}, limit {v.bar.limit}", highlight=False, soft_wrap=True)
        for name in v.missing[:KEPT]:
            screen.print(f"{v.bar.name}: not measured: {name}", highlight=False, soft_wrap=True)


def shortfall(verdict: Verdict) -> str:
    """How many rows fall short, or are missing."""
    words = [f"short: {len(verdict.short)}"] if verdict.short else []
    return ", ".join([*words, *([f"missing: {len(verdict.missing)}"] if verdict.missing else [])])


def readme_table(facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The README's table: ResNet-50's layers in float32, `out=` given, from the JSON of a committed run."""
    functions = ("forward", "backward", "infer")
    lines: dict[str, list[str]] = {}
    for row, ratios in speeds(rows):
        if row.group == "resnet50" and row.dtype == "float32" and row.out and row.function in functions:
            name = f"{'×'.join(map(str, row.dims))}, channels {row.layout}"
            cells = lines.setdefault(name, [name, f"{row.mbytes:.0f}", *[""] * 2 * len(functions)])
            peer = ratios.get("PyTorch", "")
            place = 2 + 2 * functions.index(row.function)
            cells[place : place + 2] = [f"{row.copies:.2f}", peer if isinstance(peer, str) else f"{peer:.1f}"]
    head = ["x", "MB", *(f"{f}, {unit}" for f in functions for unit in ("× copy", "× PyTorch"))]
    text = "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines.values()])
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"{text}\n\n({facts['cpu']}, {facts['threads']} threads; {versions}.)"
