"""Bugs planted in bn.cu, each of which the emulator must find: the test of its tests.

Each mutant (`mutants.py`) is built with the one layout and direction that its bug shows in, and tried on ten schedules.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import test_emulator_more as more
from emulator import Array, Truth, epsilon, error_in_eps, execute, library, planner, view_of
from mutants import BLOCK, CLUSTER, GRID, MUTANTS, SPLIT, Mutant

WEIGHTED = "normalize", "zero", "keep"

SHAPES = {  # channels' means lie far off, so that hi and lo count
    "RUNS": [(4, 6, 64), (3, 5, 1060)],
    "WINDOWS": [(4, 3, 70), (2, 5, 131)],
    "COLUMNS": [(300, 24, 1), (16, 8, 3), (64, 3, 1), (7, 8, 5)],
}


def hunt_more(mutant, lib):
    """The same for what goes beyond batch norm, as tests/test_emulator_more.py judges it."""
    rng = np.random.default_rng(7)
    sets, weighted = mutant.more == "sets", mutant.more in WEIGHTED
    for name in {"RUNS": ("runs", "long runs"), "COLUMNS": ("columns", "RGB"), "WINDOWS": ("odd slice",)}[
        mutant.layout
    ]:
        outer = more.CASES[name][0][0]
        kind = None
        if sets or weighted:
            kind = more.sets_of("listed" if mutant.layout == "COLUMNS" else "ragged", outer, rng)
        if weighted:
            how = {"weights": "positions", "masked": mutant.more}
            p = more.Problem(rng, name, "f", sets=kind, mean=300.0, **how)
        else:
            p = more.Problem(rng, name, "f", "" if sets else mutant.more, not sets, kind, mean=300.0)
        if p.r is not None and mutant.layout == "RUNS":  # with gaps that x doesn't have
            p.r = Array(p.r.values, "f", gaps=((0, 0), (0, 4), (0, 0)))
        for (way, K), policy in itertools.product(mutant.ways, range(4)):
            plan = p.build(mutant.backward, way, K, keep=1 if policy % 2 else None)
            if plan.walk.V != 4 or plan.walk.layout != mutant.layout:
                break
            run, check = (p.backward, more.check_backward) if mutant.backward else (p.forward, more.check_forward)
            found = run(lib, plan, policy=policy, resident=2)
            if found.error:
                return found.error
            try:
                check(p, found)
            except AssertionError:
                return f"wrong by {way} on {name}"
    return "survived"


def hunt(mutant, lib):
    """What the emulator finds, or "survived"."""
    if mutant.more:
        return hunt_more(mutant, lib)
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
    source = planner.source()
    assert source.count(mutant.old) == 1, f"{mutant.name}: bn.cu has {source.count(mutant.old)} of {mutant.old!r}"
    return source.replace(mutant.old, mutant.new)


def instances(mutant):
    """The fewest that the mutant is launched with: they are what building takes its time for."""
    parts = planner.HALVES.get(mutant.ways[0][0], (mutant.ways[0][0],))
    return " ".join(f"ONE(0, float, 4, {str(mutant.backward).lower()}, {mutant.layout}, {part})" for part in parts)


def options(mutant):
    """bn.cu's macros for it."""
    if mutant.more in WEIGHTED:
        return planner.More(sets=2, weights=mutant.more).options(())
    if mutant.more in ("", "sets"):
        return planner.More(sets=2 if mutant.more else 1).options(())
    return planner.More(mutant.more).options(("r", "dr") if mutant.backward else "r")


@pytest.fixture(scope="module")
def built():
    """All mutants, built two at a time, a second each."""
    library("")  # skips where there is no compiler
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda m: library(instances(m), source_of(m), options(m)), MUTANTS)
        return dict(zip(MUTANTS, made, strict=True))


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


@pytest.mark.parametrize("what", ["relu", "leaky_relu", "sets", *WEIGHTED])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_nothing_is_found_beyond_batch_norm_either(what, backward):
    for layout in ("RUNS", "COLUMNS"):
        own = Mutant("none", "", "", layout, backward, BLOCK, "", what)
        assert hunt(own, library(instances(own), options=options(own))) == "survived"
