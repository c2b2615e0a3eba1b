"""Largest error of y by the mean of the data, fastbn beside PyTorch: `python bench/accuracy.py [--json FILE]`.

float32, standard deviation 1, random gamma and beta, errors relative to max(1, |y|), in multiples of eps (1.2e-7).
PyTorch is left out by name where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fastbn

OFFSETS = [0, 1e2, 1e3, 1e4, 1e5, 1e6, 1e8]
SHAPE = (32, 64, 56, 56)

Call = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def contenders() -> dict[str, Call]:
    def ours(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
        return fastbn.forward(x, gamma, beta)[0]

    found: dict[str, Call] = {"fastbn": ours}
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: left out")
        return found

    def theirs(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
        scale, shift = torch.from_numpy(gamma), torch.from_numpy(beta)
        result: np.ndarray = torch.nn.functional.batch_norm(
            torch.from_numpy(x), None, None, scale, shift, training=True
        ).numpy()
        return result

    found["PyTorch"] = theirs
    return found


def table(result: dict[str, Any]) -> str:
    """The rows of a results file as the README shows them."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    head = ["", *(f"{float(offset):g}" for offset in result["rows"][0]["eps"])]
    lines = [head, ["---"] * len(head)]
    lines += [[f"{r['library']}, {r['layout']}", *(f"{e:.2g}" for e in r["eps"].values())] for r in result["rows"]]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\n({result['machine']}; {versions}; shape {tuple(result['shape'])}.)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows there")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    noise = rng.normal(size=SHAPE)
    gamma, beta = rng.normal(size=(2, SHAPE[1])).astype(np.float32)
    rows: list[dict[str, Any]] = []
    for name, call in contenders().items():
        for layout in ("channels first", "channels last"):
            errors = []
            for offset in OFFSETS:
                x = (noise + offset).astype(np.float32)
                exact = fastbn.reference.forward(x, gamma, beta)[0]
                if layout == "channels last":
                    x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
                error = np.abs(call(x, gamma, beta).astype(np.float64) - exact) / np.maximum(1, np.abs(exact))
                errors.append(float(error.max() / np.finfo(np.float32).eps))
            rows.append({"library": name, "layout": layout, "eps": dict(zip(map(str, OFFSETS), errors, strict=True))})
            print(f"{name:8} {layout:15}", "  ".join(f"{o:.0e}: {e:.3g}" for o, e in zip(OFFSETS, errors, strict=True)))
    if args.json:
        versions = {"python": platform.python_version(), "numpy": np.__version__, "fastbn": fastbn.__version__}
        if len(rows) > 2:
            import torch

            versions["torch"] = torch.__version__
        about = {"shape": SHAPE, "dtype": "float32", "machine": platform.machine(), "versions": versions}
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
