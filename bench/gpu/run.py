"""What all stages share: rows of JSON, the run with its time, the device, and the plans for two arrays."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

EPS = 1e-5
WAYS = (None, "BLOCK", "CLUSTER", "GRID", "SPLIT")  # None: the planner's choice


class Rows:
    """JSON lines in a file, each written as it comes; a line that a kill cut short is left out on reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[dict[str, Any]] = []
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                self.all.append(json.loads(line))
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def add(self, stage: str, case: str, **facts: Any) -> None:
        row = {"stage": stage, "case": case, **{name: _short(value) for name, value in facts.items()}}
        self.all.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if "error" in row:
            print(f"{stage}: {case}: {row['error']}", file=sys.stderr, flush=True)

    def has(self, stage: str, case: str) -> bool:
        return any(row["stage"] == stage and row["case"] == case and "error" not in row for row in self.all)

    def of(self, stage: str) -> list[dict[str, Any]]:
        """The rows of a stage, the last of each case."""
        return list({row["case"]: row for row in self.all if row["stage"] == stage}.values())


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return [_short(v) for v in value]
    return value if isinstance(value, (int, str, bool, dict, type(None))) else str(value)


@dataclass
class Run:
    """One run of the check: its rows, its options, and when the present stage must end."""

    rows: Rows
    device: Any  # `Gpu`, or the tests' double of it
    quick: bool = False
    small: bool = False
    end: float = math.inf

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def each(self, stage: str, cases: Iterable[tuple[str, Callable[[], dict[str, Any]]]]) -> None:
        """A row for every case that has none, while there is time; an exception is a row too."""
        for name, measure in cases:
            if self.rows.has(stage, name):
                continue
            if self.left <= 0:
                self.rows.add(stage, "stopped", note=f"out of time before {name}")
                return
            try:
                self.rows.add(stage, name, **measure())
            except Exception as cause:
                self.rows.add(stage, name, error=words(cause), trace=traceback.format_exc()[-1500:])
            self.device.tidy()


def words(cause: BaseException) -> str:
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:400]}"


class Gpu:
    """What the stages ask of the device. Only memory copies: CuPy's own kernels would need the CUDA headers."""

    def __init__(self) -> None:
        self.cupy: Any = importlib.import_module("cupy")
        self.launch: Any = importlib.import_module("fastbn.kernels.cuda.launch")
        self.number = int(self.cupy.cuda.runtime.getDevice())

    def put(self, host: np.ndarray) -> Any:
        return self.cupy.asarray(host)

    def get(self, array: Any) -> np.ndarray:
        return np.asarray(self.cupy.asnumpy(array))

    @functools.cached_property
    def _noise(self) -> tuple[Any, Any, Any]:
        stream = self.cupy.cuda.Stream(non_blocking=True)
        return stream, *(self.cupy.empty(64 << 20, np.uint8) for _ in range(2))

    def disturb(self) -> None:
        """Other work on the device, so that blocks start in another order."""
        stream, source, target = self._noise
        with stream:
            for _ in range(8):
                self.cupy.copyto(target, source)

    def replay(self, call: Callable[[], None], times: int) -> None:
        """Captures the call in a graph, and launches that."""
        stream = self.cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            call()
            graph = stream.end_capture()
            for _ in range(times):
                graph.launch(stream)
            stream.synchronize()

    def tidy(self) -> None:
        """Frees what the last case held."""
        self.launch._captured.clear()
        self.cupy.get_default_memory_pool().free_all_blocks()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()


def plans(device: Any, x: Any, dy: Any, way: str | None = None) -> list[Any]:
    """The plans for y and dx laid out like x; None where the arrays must be copied first."""
    planner: Any = importlib.import_module("fastbn.kernels.cuda.plan")
    walk: Any = importlib.import_module("fastbn.kernels.cuda.walk")
    letter = {"float32": "f", "float64": "d", "float16": "e", "int16": "E"}[str(x.dtype)]
    found: list[Any] = []
    for backward in (False, True):
        arrays = (x, x, dy if backward else None)
        strides = [None if a is None else a.strides for a in arrays]
        bases = tuple(0 if a is None else a.data.ptr % 16 for a in arrays)
        view = walk.View(x.shape, *strides, x.itemsize, bases)
        try:
            found.append(planner.plan(view, letter, backward, device.launch.device(device.number), way=way))
        except walk.Unwalkable:
            found.append(None)
    return found
