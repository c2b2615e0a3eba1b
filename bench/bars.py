"""The bars of `bars.toml`: what they need measured, and whether a run reaches them."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .measure import NOT_OFFERED, Row
from .shapes import Case, Selection

MEASURES = ("copies", "PyTorch", "twin", "plain", "growth", "us", "seconds")
Key = tuple[str, str, bool]  # case, function, out


@dataclass(frozen=True)
class Bar:
    """One line of the check."""

    name: str
    measure: str
    select: Selection = field(default_factory=Selection)
    over: str = "each"
    most: float = math.inf
    least: float = -math.inf
    process: str = ""  # of "seconds"

    @property
    def limit(self) -> str:
        """As words."""
        return f"≤ {self.most:g}" if self.most < math.inf else f"≥ {self.least:g}"

    def wanted(self) -> list[tuple[Case, Key]]:
        """What must have been measured, whether it was or not."""
        if self.measure == "seconds":
            return []
        wanted = [(c, (c.name, *call)) for c in self.select.cases() for call in self.select.calls()]
        return [(c, key) for c, key in wanted if self.measure != "twin" or c.twin() is not None]

    def miss(self, value: float) -> float:
        """By how much of the bar a value falls short; 0 or less: it doesn't."""
        return value / self.most - 1 if self.most < math.inf else self.least / value - 1 if value > 0 else math.inf


@dataclass(frozen=True)
class Bars:
    """The file."""

    bars: tuple[Bar, ...]
    near: float
    again: int

    def named(self, texts: Sequence[str] | None) -> Bars:
        """Those with one of the texts in their name. Raises ValueError if there is none."""
        if texts is None:
            return self
        found = tuple(bar for bar in self.bars if any(text in bar.name for text in texts))
        if not found:
            raise ValueError(f"no bar {' '.join(texts)!r}; expected part of a name, such as {self.bars[0].name!r}")
        return replace(self, bars=found)


@dataclass(frozen=True)
class Verdict:
    """What came of a bar: the worst value (or the mean), what fell short, what is missing."""

    bar: Bar
    value: float
    short: tuple[tuple[str, float], ...]  # with the values, worst first
    missing: tuple[str, ...]
    again: tuple[tuple[Case, Key], ...] = ()  # what to measure again, where that can turn the verdict

    @property
    def passed(self) -> bool:
        """A bar of which anything is missing is not passed."""
        return not self.short and not self.missing


def load(path: Path) -> Bars:
    """Read a file of bars. Raises ValueError on what it doesn't know, OSError where there is no file."""
    toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    content = toml.loads(path.read_text(encoding="utf-8"))
    bars = []
    try:
        for given in content["bar"]:
            select: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in given.pop("select", {}).items()
            }
            bars.append(Bar(select=Selection(**select), **given))
        known = all(
            bar.measure in MEASURES
            and bar.over in ("each", "geometric mean")
            and (bar.most < math.inf) != (bar.least > -math.inf)
            and (bar.wanted() or bar.process in ("warm", "cold"))
            for bar in bars
        )
        found = Bars(tuple(bars), float(content["near"]), int(content["again"]))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not bars or not known:
        raise ValueError(f"{path}: each bar needs a known measure, one of most and least, and cases; got {bars}")
    return found


def needs(bars: Sequence[Bar]) -> dict[Case, tuple[tuple[tuple[str, bool], ...], bool]]:
    """By case: the calls to measure, and whether its twin is needed."""
    calls: dict[Case, dict[tuple[str, bool], None]] = {}
    twins: set[Case] = set()
    for bar in bars:
        for case, (_, function, out) in bar.wanted():
            calls.setdefault(case, {})[function, out] = None
            twins |= {case} if bar.measure == "twin" else set()
    return {case: (tuple(found), case in twins) for case, found in calls.items()}


def judge(bar: Bar, rows: Sequence[Row], seconds: Mapping[str, float], near: float = 0.0) -> Verdict:
    """Hold a run's rows, and the seconds of its processes, against a bar."""
    by = {(row.key, row.library): row for row in rows}
    values: dict[str, float] = {}
    calls: dict[str, list[tuple[Case, Key]]] = {}
    missing: list[str] = []
    if bar.process in seconds:
        values[bar.process] = seconds[bar.process]
    elif bar.measure == "seconds":
        missing.append(f"{bar.process} process")
    for case, key in bar.wanted():
        row, peer = by.get((key, "fastbn")), by.get((key, "PyTorch"))
        name = {"us": "out=" if key[2] else "fresh"}.get(bar.measure, label(key))
        value = _value(bar.measure, row, peer)
        if value is not None:
            values[name] = values.get(name, 0.0) + value  # only those of "us" come together
            calls.setdefault(name, []).append((case, key))
        elif bar.measure != "PyTorch" or row is None or row.ms is None or peer is None or peer.note != NOT_OFFERED:
            missing.append(label(key))
    if bar.measure == "growth":
        smallest = next(iter(values.values()), math.nan)
        values = {name: value / smallest for name, value in values.items()}
    if bar.over == "geometric mean" and values:
        values, calls = _means(values, calls)
    order = sorted(values, key=lambda name: bar.miss(values[name]), reverse=True)
    if not order:
        return Verdict(bar, math.nan, (), tuple(missing) or ("everything",))
    short = tuple((name, values[name]) for name in order if not bar.miss(values[name]) <= 0)  # NaN falls short
    again: list[tuple[Case, Key]] = []
    if short and not missing and bar.miss(short[0][1]) <= near:
        names = order if bar.measure == "growth" else [name for name, _ in short]
        again = [call for name in names for call in calls.get(name, [])]
    return Verdict(bar, values[order[0]], short, tuple(missing), tuple(again))


def label(key: Key) -> str:
    """A call as people read it."""
    return f"{key[0]} {key[1]}{' out=' if key[2] else ''}"


def _means(
    values: Mapping[str, float], calls: Mapping[str, list[tuple[Case, Key]]]
) -> tuple[dict[str, float], dict[str, list[tuple[Case, Key]]]]:
    """The geometric mean of each dtype: a good one must not hide a bad one."""
    by: dict[str, list[str]] = {}
    for name in values:
        by.setdefault(f"mean of {calls[name][0][0].dtype}", []).append(name)
    means = {mean: math.exp(float(np.mean([np.log(values[name]) for name in names]))) for mean, names in by.items()}
    return means, {mean: [call for name in names for call in calls[name]] for mean, names in by.items()}


def _value(measure: str, row: Row | None, peer: Row | None) -> float | None:
    """What a bar looks at in fastbn's row and PyTorch's; None where it isn't there."""
    if row is None or row.ms is None:
        return None
    if measure == "PyTorch":
        return None if peer is None or peer.ms is None else peer.ms / row.ms
    if measure in ("twin", "plain"):
        return row.twin if measure == "twin" else row.plain
    return row.ms * 1e3 if measure == "us" else row.copies


def replaced(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The rows, with those that were measured again in place of the old ones."""
    return list({(row.key, row.library): row for row in [*rows, *new]}.values())
