"""The tables at the end, and the bars."""

from __future__ import annotations

import importlib
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .run import Rows

LARGE = 50e6  # bytes of x from which the bars count


class Bar(NamedTuple):
    """What a run must reach: `values` of its rows, and how they are judged."""

    name: str
    must: float
    aim: float
    most: bool  # values are to be at most this, else at least
    judged: str  # "worst", "median", or "share": of the rows that reach `must`, nine in ten
    values: Callable[[Rows], list[float]]


def _speeds(rows: Rows) -> list[dict[str, Any]]:
    return [row for row in rows.of("speed") if "copy" in row and row["mbytes"] * 1e6 >= LARGE]


def _over_copy(rows: Rows, name: str, layout: str) -> list[float]:
    """Times over the copies of as many bytes: forward one, backward one and a half."""
    passes = {"forward": 1.0, "backward": 1.5}[name]
    found = [row for row in _speeds(rows) if row["layout"] == layout]
    if layout == "last":  # only where it fits on chip, as the model says
        found = [row for row in found if row[f"model_{name}_bytes"] <= row[f"floor_{name}_bytes"]]
    return [row[f"ours_{name}"] / row["copy"] / passes for row in found]


def _faster(rows: Rows, name: str, peers: Sequence[str]) -> list[float]:
    found = []
    for row in _speeds(rows):
        times = [row[f"{peer}_{name}"] for peer in peers if f"{peer}_{name}" in row]
        found += [min(times) / row[f"ours_{name}"]] if times else []
    return found


def _best(rows: Rows) -> list[float]:
    peers = ("native", "cudnn", "compile")
    return _faster(rows, "forward", peers) + _faster(rows, "backward", peers)


def _near_floor(rows: Rows) -> list[float]:
    return [
        r["over_floor"] for r in rows.of("profile") if r.get("model_bytes", 0) and r["model_bytes"] <= r["floor_bytes"]
    ]


def _tiny(rows: Rows) -> list[float]:
    return [row["ours_forward"] for row in rows.of("speed") if row["case"].startswith("128x1024 ") and "copy" in row]


def _host(rows: Rows) -> list[float]:
    found = [row.get("forward, out=") for row in rows.of("speed") if row["case"] == "host"]
    return [value for value in found if isinstance(value, float)]


BARS = [
    Bar("forward, channels first / copy", 1.20, 1.08, True, "worst", lambda r: _over_copy(r, "forward", "first")),
    Bar(
        "backward, channels first / 1.5 copies", 1.25, 1.10, True, "worst", lambda r: _over_copy(r, "backward", "first")
    ),
    Bar("forward, channels last on chip / copy", 1.30, 1.15, True, "worst", lambda r: _over_copy(r, "forward", "last")),
    Bar("backward, the same / 1.5 copies", 1.30, 1.15, True, "worst", lambda r: _over_copy(r, "backward", "last")),
    Bar("DRAM bytes / floor, where the model says floor", 1.05, 1.02, True, "worst", _near_floor),
    Bar("over PyTorch native, forward", 1.3, 1.5, False, "median", lambda r: _faster(r, "forward", ("native",))),
    Bar("over PyTorch native, backward", 1.4, 1.6, False, "median", lambda r: _faster(r, "backward", ("native",))),
    Bar("over the best of PyTorch, on 90 % of rows", 1.0, 1.2, False, "share", _best),
    Bar("(128, 1024) by graph replay, microseconds", 4.0, 3.0, True, "worst", _tiny),
    Bar("host, forward with out=, microseconds", 12.0, 7.0, True, "worst", _host),
]


def verdict(bar: Bar, values: Sequence[float]) -> tuple[float, bool]:
    """The value that is judged, and whether it reaches `must`."""
    ordered = sorted(values, reverse=not bar.most)  # the worst last
    value = {"worst": ordered[-1], "median": statistics.median(values)}.get(bar.judged)
    if value is None:
        value = ordered[math.ceil(0.9 * len(ordered)) - 1]
    return value, value <= bar.must if bar.most else value >= bar.must


def tables(rows: Rows) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, headings, lines."""
    made: list[tuple[str, list[str], list[list[str]]]] = []
    checked = [row for row in rows.of("correct") if "ok" in row or "error" in row]
    if checked:
        bad = [row for row in checked if not row.get("ok", False)]
        lines = [
            [row["case"], row.get("error") or f"{row.get('wrong')}, same bits: {row.get('same_bits')}"] for row in bad
        ]
        made.append((f"Correct: {len(checked) - len(bad)} of {len(checked)} cases", ["case", "wrong"], lines))
    spilled = [row for row in rows.of("build") if row.get("spilled") or row.get("fits") is False or "error" in row]
    if rows.of("build"):
        lines = [
            [r["case"], str(r.get("registers", "")), str(r.get("spilled", "")), r.get("error", "")] for r in spilled
        ]
        title = f"Build: {len(rows.of('build'))} kernels, {len(spilled)} that spill, don't fit or fail"
        made.append((title, ["kernel", "registers", "spilled", "error"], lines))
    timed = [row for row in rows.of("speed") if "copy" in row]
    if timed:
        lines = []
        for row in timed:
            for name, passes in (("forward", 1.0), ("backward", 1.5)):
                us, peers = row[f"ours_{name}"], [row.get(f"{peer}_{name}") for peer in ("native", "cudnn", "compile")]
                cells = [f"{row['case']} {name}", row[f"plan_{name}"], f"{us:.1f}", f"{row[f'model_{name}']:.1f}"]
                cells += [f"{us / row['copy'] / passes:.2f}", *("" if p is None else f"{p / us:.2f}" for p in peers)]
                lines.append(cells)
        heads = ["case", "plan", "us", "model", "/ copy", "x native", "x cuDNN", "x compile"]
        made.append(("Speed: medians; x a peer: its time over ours", heads, lines))
    hosts = [row for row in rows.of("speed") if row["case"] == "host"]
    if hosts:
        lines = [[name, str(value)] for name, value in hosts[-1].items() if name not in ("stage", "case")]
        made.append(("Host: microseconds a call", ["call", "us"], lines))
    profiled = [row for row in rows.of("profile") if "dram_bytes" in row]
    if profiled:
        lines = [
            [r["case"], r["plan"], f"{r['dram_bytes'] / 1e6:.1f}", f"{r['over_model']:.3f}", f"{r['over_floor']:.3f}"]
            for r in profiled
        ]
        made.append(("DRAM by ncu", ["case", "plan", "MB", "/ model", "/ floor"], lines))
    lines = []
    for row in rows.of("sanitize"):
        lines.append([row["case"], str(row.get("ok", row.get("note", row.get("error")))), str(row.get("cases", ""))])
    if lines:
        made.append(("compute-sanitizer", ["tool", "clean", "cases"], lines))
    lines = []
    for bar in BARS:
        values = bar.values(rows)
        if values:
            value, passed = verdict(bar, values)
            sign = "<=" if bar.most else ">="
            judged = f"{value:.3g} ({bar.judged} of {len(values)})"
            lines.append([bar.name, f"{sign} {bar.must}", f"{sign} {bar.aim}", judged, "pass" if passed else "SHORT"])
    if lines:
        made.append(("Bars", ["bar", "must", "aim", "measured", ""], lines))
    return made


def show(rows: Rows) -> None:
    for title, headings, lines in tables(rows):
        print(f"\n{title}")
        if not lines:
            continue
        try:
            console: Any = importlib.import_module("rich.console")
            table = importlib.import_module("rich.table").Table(*headings)
            for line in lines:
                table.add_row(*(cell.replace("[", "\\[") for cell in line))
            console.Console(width=None if sys.stdout.isatty() else 160).print(table)
        except ImportError:
            widths = [max(len(line[i]) for line in [headings, *lines]) for i in range(len(headings))]
            for line in [headings, *lines]:
                print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
