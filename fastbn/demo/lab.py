"""What experiments work with and give: a `Lab`, a `Budget` of runs, an `Outcome` of claims, and words for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from .training import Curve, Digits, Setting, train

Key = TypeVar("Key", bound=Hashable)
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Claim:
    """A sentence, the bar it must clear, the measured figure, and whether it did."""

    text: str
    bar: str
    figure: str
    passed: bool


@dataclass(frozen=True)
class Outcome:
    """What one experiment found, ready for the report."""

    name: str
    title: str
    setup: str
    claims: list[Claim]
    header: list[str]
    rows: list[list[str]]
    draw: Callable[[Path], None]
    note: str = ""


@dataclass(frozen=True)
class Budget:
    """How much to run: fewer seeds, settings and steps for a quick look."""

    name: str
    seeds: int
    paired_seeds: int
    depths: tuple[int, ...]
    rates: tuple[float, ...]
    grid_rates: tuple[float, ...]
    grid_scales: tuple[float, ...]
    grid_steps: int
    place_rates: tuple[float, ...]
    safe_rates: tuple[float, ...]
    norm_steps: int
    plain_steps: int
    memorizing_rates: tuple[float, ...]
    memorizing_steps: int
    deep_rates: tuple[float, ...]
    deep_steps: int


FULL = Budget(
    name="full",
    seeds=5,
    paired_seeds=8,
    depths=(10, 20, 30),
    rates=(0.1, 0.3, 1.0, 3.0, 10.0),
    grid_rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    grid_scales=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    grid_steps=150,
    place_rates=(1.0, 3.0),
    safe_rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    norm_steps=400,
    plain_steps=6000,
    memorizing_rates=(0.1, 0.3),
    memorizing_steps=1000,
    deep_rates=(0.01, 0.1, 1.0),
    deep_steps=120,
)
QUICK = Budget(
    name="quick",
    seeds=1,
    paired_seeds=3,
    depths=(10, 20),
    rates=(0.1, 1.0),
    grid_rates=(0.1, 1.0),
    grid_scales=(0.1, 1.0, 10.0),
    grid_steps=80,
    place_rates=(1.0,),
    safe_rates=(0.01, 0.1, 1.0, 10.0),
    norm_steps=200,
    plain_steps=2400,
    memorizing_rates=(0.1,),
    memorizing_steps=400,
    deep_rates=(0.1,),
    deep_steps=50,
)


@dataclass(frozen=True)
class Lab:
    """Where experiments run: the images, the budget, the seed, and who hears of progress."""

    digits: Digits
    budget: Budget
    seed: int
    progress: Callable[[int, int], None]  # runs done, runs in all

    def train(self, runs: Mapping[Key, Setting], seeds: Callable[[Key], int]) -> dict[Key, list[Curve]]:
        """A curve per seed for every named setting; `seeds` gives their number by the name."""
        total = sum(seeds(key) for key in runs)
        done = 0
        curves: dict[Key, list[Curve]] = {key: [] for key in runs}
        for key, setting in runs.items():
            for seed in range(seeds(key)):
                self.progress(done, total)
                curves[key].append(train(replace(setting, seed=(self.seed, seed)), self.digits))
                done += 1
        self.progress(total, total)
        return curves


@dataclass(frozen=True)
class Fewer:
    """How many times fewer steps; a lower bound from the limit of steps where the slow one never arrived."""

    slow: float
    fast: float
    limit: int

    @property
    def times(self) -> float:
        """The ratio; 0 where the fast one never arrived."""
        return min(self.slow, self.limit) / self.fast

    @property
    def without(self) -> str:
        """The slow one's steps in words."""
        return f"{self.slow:.0f}" if np.isfinite(self.slow) else f"over {self.limit}"

    def __str__(self) -> str:
        if np.isinf(self.fast):
            return "not reached with batch norm"
        return f"{'more than ' if np.isinf(self.slow) else ''}{self.times:.0f} times"


def paired(without: Floats, with_: Floats) -> tuple[float, float]:
    """Mean difference over the seeds and its standard error."""
    difference = with_ - without
    return float(difference.mean()), float(difference.std(ddof=1) / len(difference) ** 0.5)


def median_steps(curves: list[Curve], accuracy: float) -> float:
    """Median over the seeds of the steps to this accuracy."""
    return float(np.median([curve.steps_to(accuracy) for curve in curves]))


def trained(steps_taken: list[float]) -> str:
    """How many of the seeds arrived."""
    return f"{np.isfinite(steps_taken).sum()} of {len(steps_taken)}"


def steps(count: float) -> str:
    """A count of steps, or a dash where the accuracy was not reached."""
    return f"{count:.0f}" if np.isfinite(count) else "-"


def with_or_without(norm: bool) -> str:
    """The word for a net."""
    return "with" if norm else "without"


def listed(values: tuple[float, ...] | tuple[int, ...]) -> str:
    """Numbers in words: 1, 2 and 3."""
    first, last = values[:-1], values[-1]
    return f"{', '.join(f'{v:g}' for v in first)} and {last:g}" if first else f"{last:g}"
