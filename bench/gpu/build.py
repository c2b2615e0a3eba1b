"""`env` and `build`: the machine, and what the compiler makes of every kernel."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .correct import DTYPES, SHAPES, elements
from .run import WAYS, Run, plans, words


def env(run: Run) -> None:
    def facts() -> dict[str, Any]:
        cupy = run.device.cupy
        properties = cupy.cuda.runtime.getDeviceProperties(run.device.number)
        name = properties["name"]
        torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
        return {
            "gpu": name.decode() if isinstance(name, bytes) else name,
            "driver": cupy.cuda.runtime.driverGetVersion(),
            "nvrtc": list(cupy.cuda.nvrtc.getVersion()),
            "cupy": cupy.__version__,
            "torch": torch and torch.__version__,
            "cudnn": torch and torch.backends.cudnn.version(),
            "python": platform.python_version(),
            "planner": str(run.device.launch.device(run.device.number)),
            "clocks": output(
                "nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit", "--format=csv"
            ),
            "tools": {tool: tool_path(tool) for tool in ("ncu", "compute-sanitizer")},
            "commit": output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        }

    run.each("env", [("machine", facts)])


def build(run: Run) -> None:
    """The kernels of the correctness cases, in float32 and float16 (quick) or in all dtypes."""
    compiler: Any = importlib.import_module("fastbn.kernels.cuda.compile")
    driver = run.device.cupy.cuda.driver
    seen: set[tuple[str, tuple[str, ...]]] = set()
    number, device = run.device.number, run.device.launch.device(run.device.number)
    capability = run.device.cupy.cuda.runtime.getDeviceProperties(number)

    def one(start: Any) -> dict[str, Any]:
        begin = time.monotonic()
        target = (capability["major"], capability["minor"])
        code, _ = compiler.machine_code(start.expression, start.options, target)
        seconds = time.monotonic() - begin
        kernel = run.device.launch._kernel(start.expression, start.options, number).ptr
        on_sm = driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel, start.threads, start.shared)
        return {
            "seconds": seconds,  # 0.01 and less: it was in the cache
            "bytes": len(code),
            "registers": driver.funcGetAttribute(4, kernel),
            "spilled": driver.funcGetAttribute(3, kernel),  # bytes of local memory a thread
            "threads": start.threads,
            "shared": start.shared,
            "blocks_on_sm": on_sm,
            "fits": not start.cooperative or on_sm * device.sms >= start.grid,
        }

    def cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        for dtype in ("float32", "float16") if run.quick else DTYPES:
            for shape in SHAPES[:7]:
                itemsize = elements(np.zeros(1), dtype).dtype
                x = shape.view(run.device.cupy.empty(shape.full, itemsize))
                for way in WAYS:
                    with contextlib.suppress(ValueError):
                        for plan in plans(run.device, x, x, way):
                            for start in plan.launches if plan is not None else ():
                                if (start.expression, start.options) not in seen:
                                    seen.add((start.expression, start.options))
                                    yield " ".join((start.expression, *start.options)), functools.partial(one, start)

    run.each("build", cases())


def output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as cause:
        return words(cause)


def tool_path(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
