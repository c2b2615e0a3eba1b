"""A wheel built from the sources, installed in an empty environment outside the checkout, works."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

USE = """
import numpy as np, fastbn, fastbn.kernels.cpu
x = np.random.default_rng(0).normal(1e4, 1, (8, 3, 500)).astype(np.float32)
y, saved = fastbn.forward(x)
dx = fastbn.backward(x, saved)[0]
assert np.abs(y - fastbn.reference.forward(x)[0]).max() < 1e-6 and np.isfinite(dx).all()
print(fastbn.__file__, fastbn.kernels.__file__)
"""


def sources():
    """The package's files as git would ship them; a copy, so that the build leaves nothing in the checkout."""
    for folder in ("fastbn", "kernels", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            notes = path.suffix in (".md", ".json", ".jsonl", ".png")  # what was measured stays in the checkout
            if path.is_file() and "__pycache__" not in path.parts and not notes:
                yield path.relative_to(ROOT)
    yield from map(Path, ("pyproject.toml", "README.md", "LICENSE"))


def run(*command, cwd):
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_wheel_in_an_empty_environment(tmp_path):
    checkout = tmp_path / "checkout"
    for path in sources():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, checkout / path)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(checkout), cwd=tmp_path)
    (wheel,) = tmp_path.glob("fastbn-*.whl")

    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path) if path.parts[0] == "fastbn" else "fastbn/" + str(path) for path in sources() if len(path.parts) > 1
    }
    assert {n for n in names if ".dist-info" not in n} == wanted
    data = "py.typed", "bench/bars.toml", "kernels/cuda/bn.cu", "kernels/cuda/sums.cuh"
    assert {f"fastbn/{name}" for name in data} <= names

    run(sys.executable, "-m", "venv", str(tmp_path / "empty"), cwd=tmp_path)
    python = next(path for path in (tmp_path / "empty").rglob("python*") if path.name in ("python", "python.exe"))
    run(str(python), "-m", "pip", "install", "-q", str(wheel), cwd=tmp_path)
    where = run(str(python), "-c", USE, cwd=tmp_path)
    assert str(ROOT) not in where
    assert "not installed" in run(str(python), "-m", "fastbn", "info", cwd=tmp_path)
    assert "--check" in run(str(python), "-m", "fastbn", "bench", "--help", cwd=tmp_path)
