"""`python -m fastbn demo --ranks 4`: the digits net trained data-parallel, by local and by synchronized statistics.

Started under `mpiexec` as a module, each rank trains on its own 4 images a step, and all average their gradients; the
only difference between the two arms is `BatchNorm(comm=)`. Evaluation uses running statistics: rank 0's where they are
local, as data-parallel training commonly does. Rank 0 writes what was measured; the first process draws it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import fastbn

from . import plots
from .lab import Claim, Outcome, listed, paired
from .net import Net
from .training import Digits, Setting, batches, load_digits

IMAGES = 4  # a rank and step
LOCAL, SHARED = "local statistics", "synchronized"


@dataclass(frozen=True)
class Plan:
    """How much to run."""

    name: str
    seeds: int
    steps: int
    rates: tuple[float, ...]


FULL = Plan("full", 4, 400, (0.05, 0.1))
QUICK = Plan("quick", 2, 150, (0.05,))


def mpiexec() -> str | None:
    """The launcher: that of this environment, if it has one."""
    return shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")


def measure(ranks: int, plan: Plan, seed: int, backend: str) -> dict[str, Any]:
    """Run all trainings on so many ranks; RuntimeError with their words if they fail."""
    launcher = mpiexec()
    assert launcher is not None, "looked for before"
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        words = [plan.name, str(seed), backend, str(result)]
        command = [launcher, "-n", str(ranks), sys.executable, "-m", "mpi4py", "-m", "fastbn.demo.ranks", *words]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if not result.exists():
            raise RuntimeError(done.stderr.strip()[-2000:] or f"mpiexec ended with code {done.returncode}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def outcome(ranks: int, plan: Plan, found: dict[str, Any]) -> Outcome:
    """The claim, the table and the plot."""
    final = {(arm, rate): np.array([c[-1] for c in found["curves"][f"{arm} {rate:g}"]])
             for arm in (LOCAL, SHARED) for rate in plan.rates}  # fmt: skip
    best = {arm: max(plan.rates, key=lambda rate: float(final[arm, rate].mean())) for arm in (LOCAL, SHARED)}
    gain, error = paired(final[LOCAL, best[LOCAL]], final[SHARED, best[SHARED]])
    claim = Claim(
        f"{IMAGES} images a rank on {ranks} ranks: test accuracy that synchronized statistics win",
        "1 point, and more than 2 standard errors",
        f"{100 * gain:+.1f} ± {100 * error:.1f} points",
        gain >= 0.01 and gain > 2 * error,
    )
    rows = [
        [arm, f"{rate:g}", f"{100 * a.mean():.1f}%", f"{100 * a.std(ddof=1) / len(a) ** 0.5:.1f}"]
        for (arm, rate), a in final.items()
    ]
    curves = {arm: np.array(found["curves"][f"{arm} {best[arm]:g}"]) for arm in (LOCAL, SHARED)}
    return Outcome(
        "ranks",
        "Batch norm across processes",
        f"3 hidden layers of 50 ReLU units on {ranks} ranks with {IMAGES} images each, {plan.steps} steps, gradients "
        f"averaged over the ranks; {plan.seeds} seeds, each arm at its best learning rate of those tried: "
        f"{listed(plan.rates)}. With local statistics each rank normalizes by its own {IMAGES} images.",
        [claim],
        ["statistics", "rate", "test accuracy", "standard error, points"],
        rows,
        partial(
            plots.training_curves,
            np.array(found["steps"]),
            curves,
            f"{ranks} ranks of {IMAGES} images: synchronizing changes test accuracy by {100 * gain:+.1f} points",
        ),
        f"{found['calls']} collective calls on each rank, {found['bytes'] / 1e6:.1f} MB sent by rank 0.",
    )


def train(setting: Setting, digits: Digits, comm: Any, ranks: fastbn.Ranks | None, checks: list[int]) -> list[float]:
    """Test accuracies of one net at the steps in `checks`; the same on all ranks."""
    net = setting.net()
    for norm in net.norms():
        norm.comm = ranks
    rng = np.random.default_rng([*setting.seed, 1])
    size, rank = comm.Get_size(), comm.Get_rank()
    accuracies = []
    with np.errstate(all="ignore"):
        for t, rows in zip(range(1, setting.steps + 1), batches(rng, len(digits.x), size * IMAGES), strict=False):
            mine = rows[rank * IMAGES : (rank + 1) * IMAGES]
            net.loss(digits.x[mine], digits.labels[mine])
            average_gradients(net, comm)
            net.step(setting.rate)
            if t in checks:
                found = np.array([net.accuracy(digits.test_x, digits.test_labels) if rank == 0 else 0.0])
                wait(comm.Ibcast(found))
                accuracies.append(float(found[0]))
    return accuracies


def average_gradients(net: Net, comm: Any) -> None:
    """Over the ranks, in one collective; those of gamma and beta as all others (`reduce_params=False`)."""
    gradients = [g for layer in net.linears() for g in (layer.dweight, layer.dbias)]
    gradients += [g for norm in net.norms() for g in (norm.dgamma, norm.dbeta)]
    flat = np.concatenate([g.reshape(-1) for g in gradients])
    total = np.empty_like(flat)
    wait(comm.Iallreduce(flat, total))
    total /= comm.Get_size()
    start = 0
    for g in gradients:
        g[...] = total[start : start + g.size].reshape(g.shape)
        start += g.size


def wait(request: Any) -> None:
    """Offering the processor: with more ranks than cores, a rank that spins keeps away those it waits for."""
    while not request.Test():
        time.sleep(0)


def main(name: str, seed: str, backend: str, path: str) -> None:
    """What every rank runs."""
    from mpi4py import MPI
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    comm = MPI.COMM_WORLD
    ranks = fastbn.Ranks(comm, timeout=120)
    plan = QUICK if name == QUICK.name else FULL
    digits = load_digits(int(seed))
    checks = sorted({round(t) for t in np.linspace(plan.steps / 20, plan.steps, 20)})
    curves: dict[str, list[list[float]]] = {}
    with fastbn.set_backend(backend), threadpool_limits(1, user_api="blas"):
        for arm in (LOCAL, SHARED):
            for rate in plan.rates:
                setting = Setting((True,) * 3, "ReLU", rate=rate, steps=plan.steps, init="he", width=50)
                curves[f"{arm} {rate:g}"] = [
                    train(replace(setting, seed=(int(seed), s)), digits, comm, ranks if arm == SHARED else None, checks)
                    for s in range(plan.seeds)
                ]
    if comm.Get_rank() == 0:
        found = {"steps": checks, "curves": curves, "calls": ranks.calls, "bytes": ranks.bytes_sent}
        Path(path).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
