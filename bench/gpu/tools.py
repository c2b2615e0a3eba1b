"""`sanitize` and `profile`: the check again, in a process of its own that a tool watches."""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .build import tool_path
from .correct import NONE
from .run import EPS, Rows, Run, plans
from .speed import TIMED, Timed, data


def sanitize(run: Run) -> None:
    """The small shapes again, under each tool. Only our kernels are watched."""
    path = tool_path("compute-sanitizer")

    def one(tool: str) -> dict[str, Any]:
        if path is None:
            return {"note": "compute-sanitizer isn't installed"}
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.jsonl"
            child = [*_self(), "correct", "--small", "--out", str(out)]
            filters = ["--kernel-name", "kernel_substring=fastbn"]
            for options in (filters, []):
                command = [path, "--tool", tool, "--error-exitcode", "9", *options, *child]
                done = _child(command, run.left)
                if "kernel-name" not in done["tail"] or done["rc"] in (0, 9):  # an older tool has no such option
                    break
            rows = [row for row in Rows(out).of("correct") if "ok" in row or "error" in row]
        ok = done["rc"] == 0 and bool(rows) and all(row.get("ok", False) for row in rows)
        return {"ok": ok, "cases": len(rows), **done}

    run.each("sanitize", [(tool, functools.partial(one, tool)) for tool in ("memcheck", "racecheck", "synccheck")])


PROFILED = [*[timed for timed in TIMED if timed.bytes > 200e6][:6], Timed((32, 64, 56, 56), "last", "float32")]
METRICS = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"


def profile(run: Run) -> None:
    """One ncu run over one launch of each case; bytes of device memory beside the model's."""
    path = tool_path("ncu")

    def measure() -> dict[str, Any]:
        if path is None:
            return {"note": "ncu isn't installed"}
        with tempfile.TemporaryDirectory() as folder:
            log, out = Path(folder) / "log.csv", Path(folder) / "rows.jsonl"
            options = ["--csv", "--log-file", str(log), "--print-units", "base", "--kernel-name", "regex:bn"]
            options += ["--metrics", ",".join(METRICS), "--cache-control", "none", "--clock-control", "none"]
            done = _child([path, *options, *_self(), "--once", "--out", str(out)], run.left)
            expected = Rows(out).of("once")
            kernels = read_ncu(log.read_text(encoding="utf-8") if log.exists() else "")
        for row in expected:
            parts, kernels = kernels[: row["launches"]], kernels[row["launches"] :]
            if len(parts) == row["launches"]:
                read, written, passed = (sum(part[metric] for part in parts) for metric in METRICS)
                row = {name: value for name, value in row.items() if name not in ("stage", "case")} | {
                    "dram_bytes": read + written,
                    "over_model": (read + written) / row["model_bytes"],
                    "over_floor": (read + written) / row["floor_bytes"],
                    "us": passed / 1e3,
                    "of": row["case"],
                }
                run.rows.add("profile", str(row.pop("of")), **row)
        return {"kernels": len(kernels), **done}

    run.each("profile", [("ncu", measure)])


def read_ncu(text: str) -> list[dict[str, float]]:
    """The metrics of each kernel launch, in order, from ncu's CSV."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(lines[start:]):
        with contextlib.suppress(KeyError, ValueError, AttributeError):
            found.setdefault(row["ID"], {})[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return [metrics for metrics in found.values() if set(METRICS) <= set(metrics)]


def once(run: Run) -> None:
    """What ncu watches: each profiled case once, forward and backward."""
    planner: Any = importlib.import_module("fastbn.kernels.cuda.plan")
    cupy, launch = run.device.cupy, run.device.launch
    for timed in PROFILED:
        x, dy = data(cupy, timed, 0), data(cupy, timed, 1)
        out, table = cupy.empty(timed.view, timed.dtype), cupy.empty((6, timed.view[1]))
        calls = (
            functools.partial(launch.forward, x, out, table, NONE, EPS),
            functools.partial(launch.backward, dy, x, out, table, None, None, False),
        )
        for name, plan, call in zip(("forward", "backward"), plans(run.device, x, dy), calls, strict=True):
            modelled, moved, floor = planner.model(plan, launch.device(run.device.number))
            call()
            facts = {"launches": len(plan.launches), "model_bytes": moved, "floor_bytes": floor, "model_us": modelled}
            run.rows.add("once", f"{timed.name} {name}", plan=f"{plan.way} K{plan.K}", **facts)
        run.device.tidy()


def _self() -> list[str]:
    """This command; with -P, if it was given, or a folder `fastbn` where it runs would be taken for the package."""
    return [sys.executable, *(["-P"] if getattr(sys.flags, "safe_path", False) else []), "-m", "fastbn.bench.gpu_check"]


def _child(command: list[str], seconds: float) -> dict[str, Any]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(1.0, min(seconds, 600.0)), check=False
        )
    except subprocess.TimeoutExpired:
        return {"rc": "timeout", "tail": ""}
    return {"rc": done.returncode, "tail": (done.stdout + done.stderr)[-1500:]}
