"""What `python -m fastbn info` tells: versions, backends, threads, and where compiled kernels lie."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
from typing import Any

from . import __version__, dispatch


def collect() -> dict[str, Any]:
    """The facts, as plain data."""
    facts: dict[str, Any] = {
        "fastbn": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {
            **{name: _version(name) for name in ("numpy", "numba", "llvmlite", "numba-cuda", "torch", "ml_dtypes")},
            "cupy": _version("cupy") or _version("cupy-cuda12x") or _version("cupy-cuda13x"),
        },
        "backend": dispatch.get_backend(),
        "backends": {
            "cpu": "available",
            "reference": "available",
            "cupy": _gpu_backend("cupy"),
            "numba-cuda": _gpu_backend("numba-cuda"),
        },
        "gpu": _gpus() or "none that can be used",
    }
    try:
        facts["cpu"] = _cpu()
    except Exception as cause:  # Numba missing or broken: say so, and go on
        facts["backends"]["cpu"] = f"missing: {cause}"
    return facts


def _gpu_backend(name: str) -> str:
    reason = dispatch.missing(name)
    return "available" if reason is None else f"missing: {reason}"


def _gpus() -> str | None:
    """Their names, by whichever library can tell."""
    try:
        if dispatch.missing("cupy") is None:
            runtime = importlib.import_module("cupy").cuda.runtime
            names = [runtime.getDeviceProperties(i)["name"] for i in range(runtime.getDeviceCount())]
        elif dispatch.missing("numba-cuda") is None:
            names = [gpu.name for gpu in importlib.import_module("numba.cuda").gpus]
        else:
            return None
        return ", ".join(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    except Exception as cause:  # a driver that breaks when it is asked: say so, and go on
        return f"unknown: {cause}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import llvmlite.binding as llvm
    import numba

    from .kernels.cpu import compile, threads

    config: Any = numba.config
    features = llvm.get_host_cpu_features()
    vector = next(
        (bits for flag, bits in (("avx512f", 512), ("avx2", 256), ("sse2", 128), ("neon", 128)) if features.get(flag)),
        None,
    )
    return {
        "name": llvm.get_host_cpu_name(),
        "simd_bits": vector,
        "float16_in_hardware": bool(
            features.get("f16c") or features.get("fullfp16") or platform.machine() == "aarch64"
        ),
        "threads": threads.threads(),
        "threads_at_most": config.NUMBA_NUM_THREADS,
        "threading_layer": threads.threading_layer() or f"not started ({config.THREADING_LAYER})",
        "kernel_cache": compile.cache_folder() or "none: kernels are compiled in every process",
    }


def show(as_json: bool) -> int:
    """Print the facts; 0."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0

    def lines(items: dict[str, Any], indent: str) -> None:
        for name, value in items.items():
            if isinstance(value, dict):
                print(f"{indent}{name}")
                lines(value, indent + "  ")
            else:
                print(f"{indent}{name:<{24 - len(indent)}}{'not installed' if value is None else value}")

    lines(facts, "")
    return 0
