"""The plots of a run, as PNG: a roofline, and bars against peers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .measure import Row
from .peers import PEERS
from .report import speeds
from .shapes import base

STYLES = {"forward": "o", "backward": "s", "infer": "^", "moments": "v"}
COLOURS = {"first": "#0072b2", "last": "#d55e00", "nc": "#009e73"}
LAYOUTS = {"first": "channels first", "last": "channels last", "nc": "(N, C)"}


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw what there are rows for; the files written. Raises OSError where the folder can't be written."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = [row for row in rows if row.library == "fastbn" and row.ms is not None]
    found = []
    for dtype in dict.fromkeys(row.dtype for row in ours):
        found.append(roofline([row for row in ours if row.dtype == dtype], folder / f"roofline-{dtype}.png"))
        for function in STYLES:
            chosen = [row for row in rows if row.dtype == dtype and row.function == function]
            path = against_peers(chosen, folder / f"peers-{function}-{dtype}.png")
            found += [path] if path else []
    return found


def roofline(rows: Sequence[Row], path: Path) -> Path:
    """GB/s by the size of x, with the copy as the ceiling; `out=` where there is one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    ax = figure.subplots()
    shown = [row for row in rows if row.out or row.function == "moments"] or list(rows)
    copies: dict[float, list[float]] = {}
    for row in rows:
        copies.setdefault(row.mbytes, []).append(2 * row.mbytes / row.copy_ms)
    sizes = sorted(copies)
    ax.plot(sizes, [np.median(copies[s]) for s in sizes], color="black", linewidth=1.5, label="copy")
    for function, layout in dict.fromkeys((row.function, row.layout) for row in shown):
        points = [(r.mbytes, r.gbytes) for r in shown if (r.function, r.layout) == (function, layout)]
        label = f"{function}, {LAYOUTS[layout]}"
        ax.plot(*zip(*points, strict=True), STYLES[base(function)], color=COLOURS[layout], label=label, alpha=0.7)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("x, MB")
    ax.set_ylabel("GB/s: each array that must be read or written, once")
    ax.set_title(f"Achieved bandwidth, {rows[0].dtype}; the copy is the ceiling")
    ax.grid(True, which="both", alpha=0.25)
    ax.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)
    return path


def against_peers(rows: Sequence[Row], path: Path) -> Path | None:
    """Each peer's time over fastbn's, case by case; None where nothing was compared."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    pairs = [(row, ratios) for row, ratios in speeds(rows) if any(isinstance(r, float) for r in ratios.values())]
    if not pairs:
        return None
    peers = [peer for peer in PEERS if any(isinstance(ratios.get(peer), float) for _, ratios in pairs)]
    figure = Figure(figsize=(9, 1.6 + 0.2 * len(peers) * len(pairs)), layout="constrained")
    ax = figure.subplots()
    for number, peer in enumerate(peers):
        bars = [(place, r) for place, (_, ratios) in enumerate(pairs) if isinstance(r := ratios.get(peer), float)]
        places = [place + (number + 0.5) / (len(peers) + 1) for place, _ in bars]
        drawn = ax.barh(places, [r for _, r in bars], 1 / (len(peers) + 1), label=peer)
        ax.bar_label(drawn, fmt="%.1f", fontsize=6, padding=2)
    ax.axvline(1, color="black", linewidth=1)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # the labels of all nine ran into each other
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    names = [f"{row.case.removesuffix(' ' + row.dtype)}{', out=' if row.out else ''}" for row, _ in pairs]
    ax.set_yticks(np.arange(len(pairs)) + 0.4, names, fontsize=7)
    ax.set_ylim(len(pairs), -0.2)
    ax.set_xlabel("the peer's time over fastbn's: right of 1, fastbn is faster")
    ax.set_title(f"{rows[0].function}, {rows[0].dtype}", loc="left")
    # above the bars: within the axes it lay on a number
    ax.legend(fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=120)
    return path
