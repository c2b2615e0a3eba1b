"""What synchronizing costs: measured under mpiexec on this machine, and modelled past it. Written up in RANKS.md.

`python -m fastbn.bench.ranks --json FILE` measures (2 minutes) and prints the tables of RANKS.md; `--read FILE` takes
what was measured before, and `--page RANKS.md` puts the tables there. Needs fastbn[mpi].
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastbn
from fastbn import distributed

CHANNELS = 16, 64, 256, 1024, 4096, 16384
RANKS = 1, 2, 3, 4, 8
LAYERS = {"(32, 64, 56, 56)": (32, 64, 56, 56), "(32, 256, 14, 14)": (32, 256, 14, 14), "(64, 512)": (64, 512)}
LAYER_RANKS = 1, 2, 4
BYTES = 8  # of a number
FITTED = 16, 4096  # channels; above, MPI sends in another way (rendezvous), and messages leave the caches

# Measuring.


def seconds_of(call: Callable[[], Any], comm: Any, budget: float = 0.15, rounds: int = 40) -> float:
    """Seconds a call: the fastest round, by rank 0's clock; all ranks make as many calls."""
    once = np.array([math.inf])
    for _ in range(5):
        start = time.perf_counter()
        call()
        once[0] = min(once[0], time.perf_counter() - start)
    comm.Bcast(once)
    number = max(1, min(2000, int(budget / rounds / max(1e-6, once[0]))))
    best = math.inf
    for _ in range(rounds):
        comm.Barrier()
        start = time.perf_counter()
        for _ in range(number):
            call()
        best = min(best, (time.perf_counter() - start) / number)
    return best


def engines(comm: Any, ranks: fastbn.Ranks, channels: int) -> dict[str, Callable[[], np.ndarray]]:
    """Three ways to merge one message (count, mean hi, lo, M2 of so many channels) of every rank."""
    from mpi4py import MPI

    rows = np.random.default_rng(comm.rank).random((3, channels))
    message = np.zeros(distributed.HEADER + rows.size)
    message[distributed._COUNT] = 100 + comm.rank
    message[distributed._FIRST + 1 : distributed._FIRST + 4] = distributed.FORWARD, 1, channels
    message[distributed.HEADER :] = rows.reshape(-1)
    gathered = np.empty((comm.size, message.size))
    result = np.empty_like(message)
    whole = MPI.DOUBLE.Create_contiguous(message.size).Commit()  # one element, so that MPI can't split it

    def merge(low: Any, high: Any, _type: Any) -> None:
        both = np.frombuffer(high)
        both[:] = distributed.merged(np.frombuffer(low), both)

    operation = MPI.Op.Create(merge, commute=False)

    def pairs() -> np.ndarray:
        return ranks.start(
            "bench", distributed.FORWARD, rows, 100 + comm.rank, channels, np.dtype("f4"), 1e-5
        ).wait()  # fmt: skip

    def gather() -> np.ndarray:
        comm.Allgather([message, MPI.DOUBLE], [gathered, MPI.DOUBLE])
        return distributed.tree(list(gathered))

    def reduce() -> np.ndarray:
        comm.Allreduce([message, 1, whole], [result, 1, whole], operation)
        return result

    return {"pairs": pairs, "gather": gather, "MPI reduction": reduce}


def on_a_rank(path: str) -> None:
    """What every rank measures; rank 0 writes it down."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    ranks = fastbn.Ranks(comm, timeout=60)
    out: dict[str, Any] = {"messages": {}, "layers": {}}
    for channels in CHANNELS:
        found = {}
        want = None
        for name, call in engines(comm, ranks, channels).items():
            merged = call()[distributed.HEADER :].copy()
            want = merged if want is None else want
            np.testing.assert_allclose(merged, want, rtol=1e-12, atol=1e-12)
            found[name] = seconds_of(call, comm)
        out["messages"][str(channels)] = found
    if comm.size in LAYER_RANKS:
        for name, shape in LAYERS.items():
            out["layers"][name] = layer(comm, ranks, shape)
    if comm.size == 1:
        out["merge"] = {str(c): merge_seconds(c) for c in CHANNELS}
    if comm.rank == 0:
        Path(path).write_text(json.dumps(out), encoding="utf-8")


def layer(comm: Any, ranks: fastbn.Ranks, shape: tuple[int, ...]) -> dict[str, Any]:
    """Forward and backward of one layer, of this shape on every rank: local, and by the statistics of all."""
    rng = np.random.default_rng(comm.rank)
    x, dy = (rng.normal(2, 1, shape).astype(np.float32) for _ in range(2))
    gamma = rng.normal(1, 0.2, shape[1])

    def step(comm: Any) -> tuple[Any, ...]:
        y, saved = fastbn.forward(x, gamma, comm=comm)
        return y, saved, *fastbn.backward(dy, saved)

    both = step(ranks)[1].moments
    assert both.count == comm.size * x.size // shape[1], "of all ranks"
    before = ranks.bytes_sent, ranks.messages
    step(ranks)
    sent = ranks.bytes_sent - before[0], ranks.messages - before[1]
    local = seconds_of(lambda: step(None), comm, 1.5, 15)
    shared = seconds_of(lambda: step(ranks), comm, 1.5, 15)
    return {"local": local, "synchronized": shared, "bytes": sent[0], "messages": sent[1]}


def merge_seconds(channels: int) -> float:
    """One merging of two messages in one process."""
    message = np.ones(distributed.HEADER + 3 * channels)
    message[distributed._STATE] = distributed._FINE
    message[distributed._FIRST + 1] = distributed.FORWARD
    times = []
    for _ in range(200):
        start = time.perf_counter()
        for _ in range(10):
            distributed.merged(message, message)
        times.append((time.perf_counter() - start) / 10)
    return min(times)


def measure() -> dict[str, Any]:
    """On 1 to 8 ranks, each with one thread."""
    launcher = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    assert launcher is not None, "mpiexec not found; pip install 'fastbn[mpi]'"
    out: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count(), "numpy": np.__version__, "ranks": {}}
    env = {**os.environ, "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "found.json"
            command = [
                launcher,
                "-n",
                str(ranks),
                sys.executable,
                "-m",
                "mpi4py",
                "-m",
                "fastbn.bench.ranks",
                str(path),
            ]
            subprocess.run(command, check=True, env=env, timeout=300)
            out["ranks"][str(ranks)] = json.loads(path.read_text(encoding="utf-8"))
    return out


# The model.


class Line(NamedTuple):
    """Seconds of one message between two ranks, and of one merging: start + slope * channels."""

    alpha: float  # a message: both ends' work and the way
    beta: float  # a byte of it
    merge: float  # a merging
    gamma: float  # a channel of it


def size(channels: int, rows: int = 3) -> int:
    """Bytes of a message."""
    return BYTES * (distributed.HEADER + rows * channels)


def steps(ranks: int) -> int:
    """Messages that follow each other in recursive doubling; two more where ranks are no power of 2."""
    below = ranks.bit_length() - 1
    return below + 2 * (ranks != 1 << below)


def doubling(line: Line, ranks: int, channels: int) -> float:
    """Exchange and merge, log2 P times."""
    return steps(ranks) * (line.alpha + line.beta * size(channels) + line.merge + line.gamma * channels)


def tree(line: Line, ranks: int, channels: int) -> float:
    """Merge to one rank, and send the result back down."""
    up_and_down = math.ceil(math.log2(ranks)) if ranks > 1 else 0
    one = line.alpha + line.beta * size(channels)
    return up_and_down * (2 * one + line.merge + line.gamma * channels)


def gather(line: Line, ranks: int, channels: int) -> float:
    """All messages to all in log2 P steps that double in size; then every rank merges all P - 1 times."""
    merging = (ranks - 1) * (line.merge + line.gamma * channels + line.beta * size(channels))
    return (math.ceil(math.log2(ranks)) if ranks > 1 else 0) * line.alpha + merging


def ring(line: Line, ranks: int, channels: int) -> float:
    """Reduce-scatter and all-gather around a ring: 2 (P - 1) messages of 1 / P of the channels."""
    part = BYTES * (distributed.HEADER + 3 * channels / ranks)
    merging = line.merge + line.gamma * channels / ranks
    return (ranks - 1) * (2 * (line.alpha + line.beta * part) + merging)


WAYS = {"doubling": doubling, "tree": tree, "gather": gather, "ring": ring}


def fitted(found: dict[str, Any]) -> tuple[Line, float]:
    """The line of two ranks on a core each, and what a wait for one's turn takes where ranks share cores.

    alpha and beta from two messages between two ranks, merging from one process, and the wait from the smallest message
    between four. All other points are predictions.
    """
    small, large = FITTED
    merge = {int(c): s for c, s in found["ranks"]["1"]["merge"].items()}
    gamma = (merge[large] - merge[small]) / (large - small)
    pair = {int(c): m["pairs"] for c, m in found["ranks"]["2"]["messages"].items()}
    wire = {c: pair[c] - merge[c] for c in (small, large)}
    beta = (wire[large] - wire[small]) / (size(large) - size(small))
    line = Line(wire[small] - beta * size(small), beta, merge[small] - gamma * small, gamma)
    four = found["ranks"]["4"]["messages"][str(small)]["pairs"]
    shared = 4 / found["cores"]
    return line, four / steps(4) - shared * doubling(line, 2, small)


def predicted(line: Line, wait: float, cores: int, ranks: int, channels: int) -> float:
    """On this machine: work is done one after the other where ranks share a core, and a step waits for its turn."""
    share = max(1.0, ranks / cores)
    waits = steps(ranks) * wait * (share - 1)
    return share * doubling(line, ranks, channels) + waits


# Networks to look at: published latencies and bandwidths, plus the measured work of a message in Python.
NETWORKS = {"InfiniBand, 100 Gb/s": (2e-6, 12.5e9), "Ethernet, 10 Gb/s": (30e-6, 1.25e9)}
FAR = 8, 16, 64, 256, 1024, 4096


def on_network(line: Line, latency: float, bandwidth: float) -> Line:
    return Line(line.alpha + latency, 1 / bandwidth, line.merge, line.gamma)


def us(seconds: float) -> str:
    """Three digits, in microseconds."""
    value = 1e6 * seconds
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def row(*cells: object) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def head(*cells: object) -> Iterator[str]:
    yield row(*cells)
    yield "|" + "---|" * len(cells)


def page(found: dict[str, Any]) -> Iterator[str]:
    """The tables of RANKS.md."""
    line, wait = fitted(found)
    cores = found["cores"]
    yield "**Forward and backward of one layer**, float32, this shape on every rank, ms (bytes that one rank sends):"
    yield ""
    yield from head("shape on each rank", "ranks", "local", "synchronized", "difference", "messages", "bytes")
    for name in LAYERS:
        for ranks in LAYER_RANKS:
            m = found["ranks"][str(ranks)]["layers"][name]
            a, b = 1e3 * m["local"], 1e3 * m["synchronized"]
            yield row(name, ranks, f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}", m["messages"], f"{m['bytes']:,}")
    yield ""
    yield f"**One merged message**, us a call, on {cores} cores (measured; in brackets what the model says):"
    yield ""
    yield from head("ranks", "channels", "pairs", "gather", "MPI reduction")
    for ranks in RANKS[1:]:
        for channels in CHANNELS:
            m = found["ranks"][str(ranks)]["messages"][str(channels)]
            told = us(predicted(line, wait, cores, ranks, channels))
            yield row(ranks, channels, f"{us(m['pairs'])} ({told})", us(m["gather"]), us(m["MPI reduction"]))
    yield ""
    yield (
        f"Fitted: alpha {us(line.alpha)} us, beta {1e9 * line.beta:.3f} ns a byte, merging {us(line.merge)} us and "
        f"{1e9 * line.gamma:.1f} ns a channel, {us(wait)} us for a turn where two ranks share a core. Of the points "
        f"up to {FITTED[1]} channels that it was not fitted to, the model misses half by less than "
        f"{100 * misses(found)[0]:.0f} %, and the worst by {100 * misses(found)[1]:.0f} %."
    )
    for name, (latency, bandwidth) in NETWORKS.items():
        far = on_network(line, latency, bandwidth)
        yield ""
        yield f"**{name}** ({1e6 * latency:g} us), a rank a core: us a collective, by the model."
        yield ""
        yield from head("channels", "way", *(f"{p:,} ranks" for p in FAR))
        for channels in (64, 512, 2048):
            for way, cost in WAYS.items():
                yield row(channels, way, *(us(cost(far, p, channels)) for p in FAR))
        yield ""
        pays = {c: gather_pays_to(far, c) for c in (64, 512, 2048)}
        yield (
            "; ".join(f"with {c} channels gather takes twice the time from {p} ranks on" for c, p in pays.items()) + "."
        )


def smaller(a: Any, b: Any) -> Any:
    """Of two runs, time by time: on a machine with other work, what that adds."""
    if isinstance(a, dict):
        return {key: smaller(a[key], b[key]) for key in a}
    return min(a, b) if isinstance(a, float) else a


BEGIN, END = "<!-- tables: python -m fastbn.bench.ranks --read ... --page ... -->\n", "<!-- end of tables -->\n"


def with_tables(text: str, found: dict[str, Any]) -> str:
    """The page with its tables made anew."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + "\n".join(page(found)) + "\n\n" + END + rest.split(END)[1]


def gather_pays_to(line: Line, channels: int) -> int:
    """The first power of 2 at which gather takes twice as long as doubling."""
    numbers: list[int] = [2**k for k in range(1, 20)]
    return next(p for p in numbers if gather(line, p, channels) > 2 * doubling(line, p, channels))


def misses(found: dict[str, Any]) -> tuple[float, float]:
    """Median and largest error of the model, relative, over the points up to FITTED that it wasn't fitted to."""
    line, wait = fitted(found)
    used = {(2, FITTED[0]), (2, FITTED[1]), (4, FITTED[0])}
    errors = [
        abs(predicted(line, wait, found["cores"], p, c) / found["ranks"][str(p)]["messages"][str(c)]["pairs"] - 1)
        for p in RANKS[1:]
        for c in CHANNELS
        if c <= FITTED[1] and (p, c) not in used
    ]
    return float(np.median(errors)), max(errors)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fastbn.bench.ranks", description="What synchronizing costs.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    parser.add_argument("--read", type=Path, metavar="FILE", help="show what was measured before")
    parser.add_argument("--best", type=Path, metavar="FILE", help="keep the smaller times of this run and of that one")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the tables into this page, between its marks")
    args = parser.parse_args(words)
    found: dict[str, Any] = measure() if args.read is None else json.loads(args.read.read_text(encoding="utf-8"))
    if args.best is not None:
        found = smaller(found, json.loads(args.best.read_text(encoding="utf-8")))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.page is not None:
        text = args.page.read_text(encoding="utf-8")
        args.page.write_text(with_tables(text, found), encoding="utf-8")
    else:
        print("\n".join(page(found)))


if __name__ == "__main__":
    if len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        on_a_rank(sys.argv[1])
    else:
        main()
