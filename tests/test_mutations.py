"""Bugs planted in bn.cu, each of which the emulator must find: the test of its tests.

Each mutant is built with the one layout and direction that its bug shows in, and tried on ten schedules. What finds it
is written beside it: a wrong value, bits that differ between schedules, or what the emulator itself complains of.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
from emulator import Array, Truth, epsilon, error_in_eps, execute, library, planner, view_of


class Mutant(NamedTuple):
    name: str
    old: str
    new: str
    layout: str
    backward: bool
    ways: tuple[tuple[str, int], ...]
    finds: str  # part of what is found


BLOCK, CLUSTER, GRID, SPLIT = (
    ((planner.BLOCK, 1),),
    ((planner.CLUSTER, 4),),
    ((planner.GRID, 3),),
    ((planner.SPLIT, 3),),
)
MUTANTS = [
    Mutant(
        "no barrier before rows are read",
        "      __syncthreads();\n      if (LAYOUT != COLUMNS) {",
        "      if (LAYOUT != COLUMNS) {",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "no barrier between columns and channels",
        "        __syncthreads();\n        const int S = (int)p.S",
        "        const int S = (int)p.S",
        "COLUMNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "no barrier behind the block's sums",
        "      __syncthreads();\n    }\n\n    // ---- all ranks",
        "    }\n\n    // ---- all ranks",
        "COLUMNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "no barrier behind the coefficients",
        "    __syncthreads();\n    if (WAY == CLUSTER) cluster_arrive();",
        "    if (WAY == CLUSTER) cluster_arrive();",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "a block leaves its cluster early",
        "    if (WAY == CLUSTER) cluster_wait();",
        "",
        "RUNS", False, CLUSTER, "wrong",
    ),
    Mutant(
        "a cluster that doesn't meet",
        "if (WAY == CLUSTER) { cluster_arrive(); cluster_wait(); }",
        "if (WAY == CLUSTER) __syncthreads();",
        "RUNS", False, CLUSTER, "wrong",
    ),
    Mutant(
        "a grid that doesn't wait",
        "while (((old ^ poll(word)) & 0x80000000u) == 0) {}",
        "poll(word);",
        "RUNS", False, GRID, "wrong",
    ),
    Mutant(
        "one set of partial sums for all rounds",
        "item / groups % 2 * groups + group",
        "group",
        "RUNS", False, GRID, "wrong",
    ),
    Mutant(
        "a barrier word that doesn't flip",
        "0x80000000u - (u32)(K - 1)",
        "0x80000000u - (u32)K",
        "RUNS", False, GRID, "spins for ever",
    ),
    Mutant(
        "a barrier in one warp alone",
        "        if (warp == 0) {\n",
        "        if (warp == 0) {\n          __syncthreads();\n",
        "RUNS", False, BLOCK, "meets line",
    ),
    Mutant(
        "a shuffle in half a warp",
        "        merge_lanes(s, n, 1);\n",
        "        if (lane < 16) merge_lanes(s, n, 1);\n",
        "RUNS", False, SPLIT, "deadlock",
    ),
    Mutant(
        "one vector too many",
        "(int)((left - t + threads - 1) / threads)",
        "(int)((left - t + threads) / threads)",
        "RUNS", False, BLOCK, "outside every array",
    ),
    Mutant(
        "one row too many",
        "(int)((left + p.ty - 1) / p.ty)",
        "(int)((left + p.ty) / p.ty)",
        "COLUMNS", False, BLOCK, "outside every array",
    ),
    Mutant(
        "a misaligned vector",
        "load(a.raw, x + q.row * p.x_row + q.inner);",
        "load(a.raw, x + q.row * p.x_row + q.inner + 1);",
        "RUNS", False, BLOCK, "isn't aligned",
    ),
    Mutant(
        "a neighbour's kept vector",
        "store_shared(kept_x + i * threads + t, a.raw)",
        "store_shared(kept_x + i * threads + (t ^ 1), a.raw)",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "dy kept over x",
        "BACKWARD ? kept_dy + (i64)p.keep * threads : kept_dy",
        "kept_dy",
        "RUNS", True, BLOCK, "wrong",
    ),
    Mutant(
        "a neighbour's column",
        "row_part[i / S * width + g * S + i % S]",
        "row_part[i / S * width + g * S + (i ^ 1) % S]",
        "COLUMNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "folded rows on the wrong channels",
        "if (p.fold > 1) c %= p.C * (int)p.S;",
        "",
        "COLUMNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "lanes before the run count",
        "lane >= q.begin && lane < q.end",
        "lane < q.end",
        "WINDOWS", False, BLOCK, "wrong",
    ),
    Mutant(
        "lanes behind the run are written",
        "if (q.begin == 0 && q.end == V) return store(to, r.raw);",
        "if (q.begin == 0) return store(to, r.raw);",
        "WINDOWS", False, BLOCK, "wrong",
    ),
    Mutant(
        "windows past the run are read",
        "return LAYOUT != WINDOWS || q.begin < q.end;",
        "return true;",
        "WINDOWS", False, BLOCK, "outside every array",
    ),
    Mutant(
        "the second pass begins one late",
        "for (int i = share.n; i > keep; i -= AGAIN)",
        "for (int i = share.n - 1; i > keep; i -= AGAIN)",
        "RUNS", False, SPLIT, "wrong",
    ),
    Mutant(
        "batches merged as if equal",
        "const A f = b / (have + b), w = have * f;",
        "const A f = have > 0 ? (A)0.5 : (A)1, w = have * f;",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "the means of batches count nothing",
        "product[j] += multiply_add(step * second_step, w, around[j]);",
        "product[j] += around[j];",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "ranks merged as if equal",
        "const A f = k > 0 ? k / (n + k) : (A)0, w = n * f;",
        "const A f = n > 0 ? (A)0.5 : (A)1, w = n * f;",
        "RUNS", False, SPLIT, "wrong",
    ),
    Mutant(
        "no lo in forward",
        "multiply_add(k.a, (up(x) - k.hi) - k.lo, k.beta)",
        "multiply_add(k.a, up(x) - k.hi, k.beta)",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "no lo of dy",
        "A g = (up(dy) - k.ghi) - k.glo;",
        "A g = up(dy) - k.ghi;",
        "RUNS", True, BLOCK, "wrong",
    ),
    Mutant(
        "no covariance",
        "if (wants_x) g = multiply_add",
        "if (false) g = multiply_add",
        "RUNS", True, BLOCK, "wrong",
    ),
    Mutant(
        "lo left in the mean of x - hi",
        "if (share.n) sums[j].e -= ",
        "if (false) sums[j].e -= ",
        "RUNS", True, BLOCK, "wrong dgamma",
    ),
    Mutant(
        "gamma forgotten",
        "k.a = (A)(gamma * invstd), k.beta",
        "k.a = (A)invstd, k.beta",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "rows of y by x's stride",
        "T *to = y + q.row * p.y_row + q.inner;",
        "T *to = y + q.row * p.x_row + q.inner;",
        "RUNS", False, BLOCK, "outside every array",
    ),
]  # fmt: skip

SHAPES = {  # channels' means lie far off, so that hi and lo count
    "RUNS": [(4, 6, 64), (3, 5, 1060)],
    "WINDOWS": [(4, 3, 70), (2, 5, 131)],
    "COLUMNS": [(300, 24, 1), (16, 8, 3), (64, 3, 1), (7, 8, 5)],
}


def hunt(mutant, lib):
    """What the emulator finds, or "survived"."""
    rng = np.random.default_rng(7)
    for shape, (way, K) in itertools.product(SHAPES[mutant.layout], mutant.ways):
        C = shape[1]
        values = rng.standard_normal(shape) + 3000 * rng.standard_normal((1, C, 1))
        # y is dense, x and dy have gaps between rows
        gaps = ((0, 0), (0, 0), (0, 0)) if mutant.layout == "COLUMNS" else ((0, 0), (0, 4), (0, 0))
        x = Array(values, "f", gaps=gaps)
        dy = Array(rng.standard_normal(shape) + 1000 * rng.standard_normal((1, C, 1)), "f", gaps=gaps)
        gamma, beta = rng.uniform(0.5, 1.5, C).astype(np.float32), rng.standard_normal(C).astype(np.float32)
        truth = Truth(x.values, 1e-5, gamma, beta)
        device = planner.Device(sms=3) if way == planner.GRID else planner.HOPPER
        bits = set()
        for policy in range(10):
            y = Array(np.full(shape, -77.0), "f")
            walk = planner.walk(view_of(x, y, dy if mutant.backward else None))
            if walk.layout != mutant.layout or walk.V != 4:
                break
            keep = 1 if policy % 2 else None
            plan = planner.build(walk, "f", mutant.backward, device, way, K, threads=64, keep=keep)
            if mutant.backward:
                found = execute(lib, plan, x, dy, y, table=truth.saved("f"), policy=policy, resident=2)
                (right, dgamma, _), (scale, dgamma_scale, _) = truth.gradients(dy.values)
                scale = scale + abs(truth.a)
                if not found.error and error_in_eps(found.dgamma, dgamma, dgamma_scale, epsilon("f")) > 4:
                    return f"wrong dgamma by {way} on {shape}"
            else:
                given = (gamma, beta, None, None)
                found = execute(lib, plan, x, None, y, given=given, policy=policy, resident=2)
                right, scale = truth.y(), 1 + abs(truth.a * truth.e) + abs(truth.beta)
            if found.error:
                return found.error
            if error_in_eps(found.y, right, scale, epsilon("f")) > 6:
                return f"wrong by {way} on {shape}, schedule {policy}"
            bits.add(found.bits)
        if len(bits) > 1:
            return f"wrong: bits differ by {way} on {shape}"
    return "survived"


def source_of(mutant):
    source = planner.SOURCE.read_text()
    assert source.count(mutant.old) == 1, f"{mutant.name}: bn.cu has {source.count(mutant.old)} of {mutant.old!r}"
    return source.replace(mutant.old, mutant.new)


def instances(mutant):
    """The fewest that the mutant is launched with: they are what building takes its time for."""
    parts = planner.HALVES.get(mutant.ways[0][0], (mutant.ways[0][0],))
    return " ".join(f"ONE(0, float, 4, {str(mutant.backward).lower()}, {mutant.layout}, {part})" for part in parts)


@pytest.fixture(scope="module")
def built():
    """All mutants, built two at a time, a second each."""
    library("")  # skips where there is no compiler
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MUTANTS, pool.map(lambda m: library(instances(m), source_of(m)), MUTANTS), strict=True))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_emulator_finds(built, mutant):
    found = hunt(mutant, built[mutant])
    assert found != "survived"
    assert mutant.finds in found


@pytest.mark.parametrize("layout", ["RUNS", "WINDOWS", "COLUMNS"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_nothing_is_found_in_the_source_itself(layout, backward):
    """Else the mutants would prove nothing."""
    own = Mutant("none", "", "", layout, backward, BLOCK + CLUSTER + GRID + SPLIT, "")
    assert hunt(own, library()) == "survived"
