"""Time of each call as a multiple of a copy of x, on two threads, `out=` given: `python bench/speed.py`.

Interleaved in one process, medians of rounds; each result is held against the reference before it is timed. The copy
is the faster of NumPy's and of a parallel one. A first look; the harness with peers and bars is still to come.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

import fastbn

SHAPES = [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]  # channels, side of ResNet-50's layers at batch 32


@numba.njit(parallel=True, cache=True)
def parallel_copy(x: np.ndarray, y: np.ndarray) -> None:
    for k in numba.prange(64):
        start, stop = x.size * k // 64, x.size * (k + 1) // 64
        y[start:stop] = x[start:stop]


def median_times(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(t)) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the rows there")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    rng = np.random.default_rng(0)
    for channels, side in SHAPES:
        for layout in ("channels first", "channels last"):
            x = (rng.normal(size=(32, channels, side, side)) + 3).astype(np.float32)
            if layout == "channels last":
                x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
            gamma, beta = rng.normal(size=(2, channels)).astype(np.float32)
            dy, y, dx = x.copy(order="K"), np.empty_like(x), np.empty_like(x)
            dgamma, dbeta = np.empty((2, channels), np.float32)
            saved = fastbn.forward(x, gamma, beta, out=y)[1]
            exact, exact_saved = fastbn.reference.forward(x, gamma, beta)
            assert np.abs(y - exact).max() < 1e-5
            fastbn.backward(dy, saved, out=(dx, dgamma, dbeta))
            assert np.abs(dx - fastbn.reference.backward(dy, exact_saved)[0]).max() < 1e-5
            flat_x, flat_y = (a.transpose(np.argsort([-s for s in a.strides])).reshape(-1) for a in (x, y))
            mean, var = saved.moments.exact()  # type: ignore[union-attr]
            calls: dict[str, Callable[[], Any]] = {
                "numpy copy": lambda a=flat_x, b=flat_y: np.copyto(b, a),  # type: ignore[misc]
                "parallel copy": lambda a=flat_x, b=flat_y: parallel_copy(a, b),  # type: ignore[misc]
                "forward": lambda: fastbn.forward(x, gamma, beta, out=y),  # noqa: B023 - called in this round
                "backward": lambda: fastbn.backward(dy, saved, out=(dx, dgamma, dbeta)),  # noqa: B023
                "infer": lambda: fastbn.infer(x, mean, var, gamma, beta, out=y),  # noqa: B023
                "moments": lambda: fastbn.moments(x),  # noqa: B023
            }
            times = median_times(calls, args.rounds)
            copy = min(times["numpy copy"], times["parallel copy"])
            row = {name: round(times[name] / copy, 2) for name in ("forward", "backward", "infer", "moments")}
            rows.append({"shape": [32, channels, side, side], "layout": layout, "copy_ms": round(copy * 1e3, 3), **row})
            print(rows[-1])
    small = rng.normal(size=(32, 64)).astype(np.float32)
    gamma, beta = rng.normal(size=(2, 64)).astype(np.float32)
    saved = fastbn.forward(small, gamma, beta)[1]
    calls = {
        "forward": lambda: [fastbn.forward(small, gamma, beta) for _ in range(100)],
        "backward": lambda: [fastbn.backward(small, saved) for _ in range(100)],
    }
    rows.append({"shape": [32, 64], **{f"{k}_us": round(t * 1e4, 1) for k, t in median_times(calls, 25).items()}})
    print(rows[-1])
    if args.json:
        about = {"dtype": "float32", "threads": numba.get_num_threads(), "numba": numba.__version__}
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
