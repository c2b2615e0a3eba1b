"""The building blocks in a user's own @njit code, and the element conversions under them."""

from __future__ import annotations

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from fastbn.kernels.cpu import (
    block_comoments,
    block_gradient,
    block_moments,
    block_normalize,
    merge_comoments,
    merge_moments,
)
from numba import njit


@njit
def whole_training_step(x, dy, y, dx, gamma, beta, eps):
    """Batch norm of one channel given as ragged rows, forward and backward, from the blocks alone."""
    n = hi = lo = m2 = 0.0
    for r in range(len(x)):
        n, hi, lo, m2 = merge_moments(n, hi, lo, m2, float(x[r].size), *block_moments(x[r]))
    invstd = 1.0 / np.sqrt(m2 / n + eps)
    k = ghi = glo = t = m = 0.0
    for r in range(len(x)):
        g, gl, tb, mb = block_comoments(dy[r], x[r], hi)
        k, ghi, glo, t, m = merge_comoments(k, ghi, glo, t, m, float(x[r].size), g, gl, tb, mb)
        block_normalize(x[r], y[r], hi, lo, gamma * invstd, beta)
    b = -gamma * invstd**3 * m / n
    for r in range(len(x)):
        block_gradient(dy[r], x[r], dx[r], ghi, glo, hi, lo, gamma * invstd, b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_in_users_own_njit_code(dtype, rng):
    from fastbn import reference

    cuts = [1, 40, 41, 1000]
    x = (rng.normal(size=1100) + 1e4).astype(dtype)
    dy = rng.normal(size=1100).astype(dtype)
    gamma, beta = rng.normal(size=2)
    y, dx = np.empty_like(x), np.empty_like(x)
    whole_training_step(*(tuple(np.split(a, cuts)) for a in (x, dy, y, dx)), gamma, beta, 1e-5)
    exact, saved = reference.forward(x.reshape(1, -1), [gamma], [beta], axis=0)
    exact_dx = reference.backward(dy.reshape(1, -1), saved)[0]
    eps = (2 if dtype == np.float32 else 8) * np.finfo(dtype).eps
    np.testing.assert_array_less(np.abs(y - exact[0]), eps * np.maximum(1, np.abs(exact[0])))
    np.testing.assert_array_less(np.abs(dx - exact_dx[0]), eps * np.maximum(1, np.abs(exact_dx[0])))


CONVERSIONS = """
import ml_dtypes, numpy as np
from fastbn.kernels.cpu import block_normalize

def through(x, hi):
    view = np.uint16 if x.dtype == np.float16 else np.int16
    y = np.empty_like(x)
    block_normalize(x.view(view), y.view(view), hi, 0.0, 1.0, 0.0)
    return y

for dtype in (np.float16, ml_dtypes.bfloat16):
    every = np.arange(65536, dtype=np.uint16).view(dtype)
    number = ~np.isnan(every.astype(np.float32))
    same = through(every, 0.0)
    assert (same[number] == every[number]).all() and np.isnan(same[~number].astype(np.float32)).all()
    for hi in (0.3, -1e-3, 1e-7, 100.0, -65000.0):  # results that need rounding, overflow, or are subnormal
        with np.errstate(all="ignore"):
            wanted = (every.astype(np.float64) - hi).astype(np.float32).astype(dtype)
        got = through(every, hi)
        assert (got[number].view(np.uint16) == wanted[number].view(np.uint16)).all(), (dtype, hi)
print("ok")
"""


@pytest.mark.parametrize("processor", ["this one", "one without F16C"])
def test_every_half_type_number_converts(processor):
    """On an x86 without F16C, LLVM would call a function that does not exist and end the process."""
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""} if processor != "this one" else {}
    process = subprocess.run(
        [sys.executable, "-c", CONVERSIONS], env={**os.environ, **plain}, capture_output=True, text=True, timeout=300
    )
    assert process.stdout.strip() == "ok", process.stderr
    assert ml_dtypes.finfo(ml_dtypes.bfloat16).bits == 16


def test_vectors_in_the_machine_code():
    """The loops that carry the work are vectorised: 82 against 5 us for 1e5 floats, measured on the sum."""
    x = np.ones(64, np.float32)
    block_moments(x)
    block_normalize(x, x.copy(), 0.0, 0.0, 1.0, 0.0)
    from fastbn.kernels.cpu.sums import run_sums

    for function in (run_sums, block_normalize):
        assembly = "".join(function.inspect_asm().values())
        assert any(name in assembly for name in ("mulpd", "fmadd", "fmla"))


def test_samples_of_a_block_lie_in_it_here_and_there(rng):
    """As `rows_sums` walks them: the pivot is the mean of as many values as `rows_count` says."""
    from fastbn.kernels.cpu import cut, rows

    @njit
    def walk(shape, plan, few, seen):
        o0, o1, i0, _ = rows.block(0, shape, plan)
        samples, runs, n, step, further = rows._samples(0, shape, plan, few)
        o, i = o0, i0
        for _ in range(samples):
            seen[o : o + runs, i : i + n] += 1
            o, i = rows.following(o, i, o0, o1, runs, step, further)
        return rows.rows_count(0, shape, plan, few)

    for case in range(400):
        runs, n, few = (int(k) for k in rng.integers(1, [40, 300, 400]))
        plan = cut.Cut(0, 1, 1, 1, height=runs, segments=1, length=n, period=1, fold=1, flags=cut.GATHER * (case % 2))
        seen = np.zeros((runs, n), np.int64)
        count = walk((runs, 1, n), plan, few if case % 5 else 10**9, seen)
        assert seen.sum() == count  # nothing beside the block, which NumPy would cut off
        if few >= runs * n or case % 5 == 0:
            assert (seen == 1).all()
            continue
        assert few <= count < few + 2 * rows.SAMPLE
        if few >= 4 * rows.SAMPLE and n >= rows.SAMPLE:
            assert np.unique(seen.nonzero()[0]).size >= min(runs, 3)
            assert seen.nonzero()[1].max() >= n // 2


@pytest.mark.parametrize(("inner", "fold"), [(1, 1), (37, 1), (49, 7), (63, 9), (196, 14), (3136, 16)])
def test_folded_rows_end_with_a_sample_where_those_have_an_order(inner, fold):
    """What follows in memory is another group's."""
    from fastbn.kernels import cpu
    from fastbn.kernels.cpu.plan import ORDERED, plan_of

    def folded(special):
        strides = ((64 * inner * 4, 4, 64 * 4),) * 2
        return plan_of((32, 64, inner), strides, (4, 4, 0), 7, cpu.Sizes(folded=1024), 3, 12, special).cut.fold

    assert folded(ORDERED) == fold
    assert folded(0) == (2 if inner == 1 else 16)
