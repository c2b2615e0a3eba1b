"""The same bits for any number of threads and from run to run, forward and backward, in every layout."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = """
import hashlib, json, sys
import numba
import numpy as np
import fastbn
from fastbn.kernels import cpu

def digest(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]

def results(x, axis, rng):
    channels = x.shape[axis]
    gamma, beta = rng.normal(size=(2, channels)).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(x.dtype)
    y, saved = fastbn.forward(x, gamma, beta, axis=axis)
    mean, var = saved.moments.exact()
    inferred = fastbn.infer(x, mean, var, gamma, beta, axis=axis)
    return digest(y, mean, var, *fastbn.backward(dy, saved), inferred)

out = {}
tiny = cpu.Sizes(
    block=50, piece=3, slab=400, line=64, far=(9, 1500, 8), columns=16, folded=16, height=4, serial=0, asleep=0,
    past=800, large=4000,
)
sizes = {"real": cpu.SIZES, "tiny": tiny}
for name, size in sizes.items():
    cpu.SIZES = size
    n = 20 if name == "real" else 1
    for threads in [int(t) for t in sys.argv[1].split(",")]:
        numba.set_num_threads(threads)
        for dtype in ("float32", "float64"):
            for case, (shape, axis, order) in enumerate([
                ((8, 6 * n, 131), 1, (0, 1, 2)),      # many channels, rows
                ((5, 2, 2000 * n), 1, (0, 1, 2)),     # two channels in pieces
                ((900 * n, 70), 1, (0, 1)),           # columns, folded when large
                ((701 * n, 3), 1, (0, 1)),            # three channels, columns folded
                ((90, 40 * n, 5), 1, (0, 2, 1)),      # channels-last strides
                ((200 * n, 33), 1, (1, 0)),           # transposed
                ((20 * n, 2, 260 * n), 1, (0, 1, 2)),  # far runs
                ((100 * n, 3 * n, 17), 1, (0, 1, 2)),  # deep runs, columns
            ]):
                rng = np.random.default_rng(case)
                x = (rng.normal(size=shape) + 3).astype(dtype)
                x = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
                out.setdefault(f"{name} {dtype} {case}", []).append(results(x, axis, rng))
print(json.dumps(out))
"""


def run(threads, limit, cache):
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, threads],
        env={**os.environ, "NUMBA_NUM_THREADS": limit, "NUMBA_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_same_bits_for_any_number_of_threads(tmp_path):
    many = run("1,2,3,4,8,1", "8", tmp_path)  # compiles its kernels
    different = {name: digests for name, digests in many.items() if len(set(digests)) != 1}
    assert not different
    assert len(many) == 32
    compiled = set(tmp_path.rglob("*.kernel"))
    again = run("2", "2", tmp_path)  # another process, whose kernels come from the cache
    assert compiled
    assert set(tmp_path.rglob("*.kernel")) == compiled
    assert {name: digests[0] for name, digests in many.items()} == {name: digests[0] for name, digests in again.items()}


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((8, 60, 31), (0, 1, 2)),
        ((5, 2, 700), (0, 1, 2)),
        ((40, 70, 33), (0, 1, 2)),
        ((300, 70), (0, 1)),
        ((301, 3), (1, 0)),
    ],
    ids=["tiles of rows", "pieces of rows", "far runs", "columns", "transposed"],
)
@pytest.mark.parametrize("order_of_items", [[0], [3], [2, 0, 1, 3], [3, 3, 0]], ids=str)
def test_items_do_what_others_leave(shape, order, order_of_items, rng, monkeypatch):
    """Threads that come late, or not at all: the others do their share, once, and the bits are the same."""
    from fastbn.kernels import cpu

    import fastbn

    def some_items(twins, items, *args):
        assert items == min(4, items)
        for k in order_of_items:
            twins._entry(k % items, items, *args, 0)

    x, dy = np.ascontiguousarray(rng.normal(3, 2, (2, *shape)).astype(np.float32).transpose(0, *(1 + i for i in order)))
    x, dy = x.transpose(np.argsort(order)), dy.transpose(np.argsort(order))
    gamma, beta = rng.normal(size=(2, shape[1])).astype(np.float32)
    results = []
    for late in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(cpu.threads, "threads", lambda: 4)
            if late:
                patch.setattr(cpu.threads, "run", lambda twins, items, *args, **_: some_items(twins, items, *args))
            y, saved = fastbn.forward(x, gamma, beta)
            results.append([y, *saved.moments.exact(), *fastbn.backward(dy, saved)])
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.usefixtures("tiny")
def test_other_inputs_give_other_bits(rng):
    """That the digest above can tell results apart."""
    import fastbn

    x = rng.normal(size=(4, 3, 5)).astype(np.float32)
    moved = x.copy()
    moved[0, 0, 0] = np.nextafter(moved[0, 0, 0], np.float32(9))
    digests = {hashlib.sha256(fastbn.forward(a)[0].tobytes()).hexdigest() for a in (x, moved)}
    assert len(digests) == 2
