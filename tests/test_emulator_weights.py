"""Weights and masks in the emulator: `fastbn.kernels.reference` says what is right."""

import numpy as np
import pytest
from emulated_more import (
    BLOCK,
    CASES,
    GRID,
    MAP,
    SETS,
    SPLIT,
    WAYS,
    WITH_RESIDUAL,
    Problem,
    built,
    check_backward,
    check_forward,
    fits,
    run_both,
    sets_of,
)
from emulator import Array, execute, library, number_epsilon, planner, view_of

ONE_OF_EACH = pytest.mark.parametrize(
    ("name", "way"), [("long runs", (BLOCK, 1)), ("odd slice", (SPLIT, 3)), ("columns", (GRID, 3))]
)


@pytest.mark.parametrize("masked", ["normalize", "zero", "keep"])
@pytest.mark.parametrize("name", ["long runs", "odd slice", "columns", "(C, N)"])
def test_weights_in_every_way(rng, name, masked):
    """A mask, one weight a sample, one a position; rows of columns share a weight."""
    libs = built("f", weights=masked, layouts=(CASES[name][4],))
    for kind in ("mask", "samples", "positions"):
        p = Problem(rng, name, "f", weights=kind, masked=masked)
        assert p.build(False, BLOCK, 1).walk.layout == CASES[name][4]
        assert run_both(libs, p) == 16


@pytest.mark.parametrize("masked", ["normalize", "zero", "keep"])
@pytest.mark.parametrize("letter", list("deE"))
def test_weights_of_every_type(rng, letter, masked):
    each = [("RUNS", "BLOCK"), ("WINDOWS", "STATS"), ("WINDOWS", "APPLY"), ("COLUMNS", "BLOCK")]
    libs = built(letter, weights=masked, each=each)
    for name, way in (
        ("runs", (BLOCK, 1)),
        ("long runs", (BLOCK, 1)),
        ("odd slice", (SPLIT, 3)),
        ("columns", (BLOCK, 1)),
    ):
        p = Problem(rng, name, letter, weights="positions", masked=masked)
        assert run_both(libs, p, (2,), [way]) == 2


@pytest.mark.parametrize("name", ["7x7", "RGB"])
def test_columns_that_differ_in_weight_are_walked_otherwise(rng, name):
    """Short runs as windows, and rows of three columns element by element."""
    p = Problem(rng, name, "f", weights="positions", masked="zero")
    walk = p.build(False, BLOCK, 1).walk
    assert (walk.layout, walk.V, walk.fold) == {"7x7": ("WINDOWS", 4, 1), "RGB": ("COLUMNS", 1, 1)}[name]
    kind = "NARROWER(0, float, 1)" if walk.V == 1 else "ONE(0, float, 4, {}, WINDOWS, BLOCK)"
    libs = {b: library(kind.format(str(b).lower()), options=walk.more.options(())) for b in (False, True)}
    check_forward(p, p.forward(libs[False], p.build(False, BLOCK, 1)))
    check_backward(p, p.backward(libs[True], p.build(True, BLOCK, 1)))


@pytest.mark.parametrize("masked", ["normalize", "zero", "keep"])
@pytest.mark.parametrize(("name", "kind"), SETS)
def test_weights_of_sets(rng, name, kind, masked):
    """One set is empty or without weight: it has no statistics."""
    libs = built("f", sets=True, weights=masked, layouts=("RUNS", "WINDOWS", "COLUMNS"), ways=("BLOCK", "GRID"))
    p = Problem(rng, name, "f", sets=sets_of(kind, CASES[name][0][0], rng), weights="positions", masked=masked)
    plan = p.build(False, BLOCK, 1)
    if not fits(p, plan):
        pytest.skip("no whole vectors")
    assert (p.more.mass == 0).any()
    assert run_both(libs, p, (0, 3), [(BLOCK, 1), (GRID, 3)]) == 8
    result = p.forward(libs[False], plan)
    assert (result.table.reshape(6, -1, p.shape[1])[:4, p.more.mass == 0] == 0).all()


@pytest.mark.parametrize("masked", ["normalize", "zero", "keep"])
@pytest.mark.parametrize("letter", list("fe"))
def test_weights_beside_all_else(rng, letter, masked):
    """Residual, activation and sets: kept in place (relu) and apart (gelu of half types), and re-read."""
    for activation in ("relu", "gelu"):
        libs = built(letter, activation, True, True, weights=masked, each=WITH_RESIDUAL)
        for name, way in (("runs", (BLOCK, 1)), ("columns", (SPLIT, 3))):
            sets = sets_of("listed", CASES[name][0][0], rng)
            p = Problem(rng, name, letter, activation, True, sets, weights="mask", masked=masked)
            assert run_both(libs, p, (2, 3), [way]) == 4


@pytest.mark.parametrize("masked", ["zero", "keep"])
def test_weights_with_frozen_statistics(rng, masked):
    """They mask, and no more; backward with sums and without."""
    for activation in ("", "relu"):
        libs = built("f", activation, weights=masked, layouts=("RUNS", "COLUMNS"), ways=("BLOCK", "STATS", "APPLY"))
        for name in ("long runs", "columns"):
            p = Problem(rng, name, "f", activation, given=True, weights="mask", masked=masked)
            check_forward(p, p.forward(libs[False], p.build(False, MAP, 2), policy=2))
            for way, K in ((BLOCK, 1), (SPLIT, 2)):
                check_backward(p, p.backward(libs[True], p.build(True, way, K)))
            if activation:
                check_backward(p, p.backward(libs[True], p.build(True, MAP, 2), grads=(False, False)))


@pytest.mark.parametrize("name", ["long runs", "odd slice", "columns"])
def test_no_weight_at_all(rng, name):
    """No statistics, y is beta, dx is 0."""
    libs = built("f", weights="normalize", layouts=(CASES[name][4],))
    p = Problem(rng, name, "f", weights="none")
    for way, K in WAYS:
        result = p.forward(libs[False], p.build(False, way, K))
        assert result.error == ""
        assert (result.table[:4] == 0).all()
        assert (result.mass == 0).all()
        assert (result.y == p.beta[:, None]).all()
        p.table = result.table.copy()
        result = p.backward(libs[True], p.build(True, way, K))
        assert result.error == ""
        assert not result.y.any()
        assert not result.dgamma.any()
        check_backward(p, result)


@ONE_OF_EACH
def test_what_has_no_weight_is_absent(rng, name, way):
    """The bits of the table don't depend on what x holds there, NaN or not."""
    libs = built("f", weights="normalize", layouts=(CASES[name][4],))
    p = Problem(rng, name, "f", weights="mask")
    first = p.forward(libs[False], p.build(False, *way))
    here = np.broadcast_to(p.more.weights == 0, p.shape)
    p.x.view[here] = np.resize([np.nan, np.inf, 1e30], here.sum())
    again = p.forward(libs[False], p.build(False, *way))
    assert first.error == again.error == ""
    assert first.table.tobytes() == again.table.tobytes()
    assert first.y[~here].tobytes() == again.y[~here].tobytes()


@pytest.mark.parametrize("letter", list("fd"))
@pytest.mark.parametrize("exponent", [0, 2, 4, 5])
@ONE_OF_EACH
def test_weighted_statistics_are_right_at_any_offset(rng, name, way, exponent, letter):
    libs = built(letter, weights="normalize", layouts=(CASES[name][4],))
    offset = 10.0 ** (exponent if letter == "f" else 2 * exponent)
    p = Problem(rng, name, letter, weights="positions", offset=offset)
    check_forward(p, p.forward(libs[False], p.build(False, *way), policy=2))
    check_backward(p, p.backward(libs[True], p.build(True, *way), policy=2))


@pytest.mark.parametrize("scale", [1e20, 1e-3])
@ONE_OF_EACH
def test_weighted_squares_beyond_float32(rng, name, way, scale):
    """In float64, element by element, where float32 has no such squares; weights of any size count alike."""
    libs = built("f", weights="normalize", layouts=(CASES[name][4],))
    p = Problem(rng, name, "f", weights="positions")
    p.more = p.more._replace(weights=p.more.weights * np.float32(7e4), mass=p.more.mass * np.float64(np.float32(7e4)))
    p.x.view[...] *= np.float32(scale)
    check_forward(p, p.forward(libs[False], p.build(False, *way), policy=2))


@pytest.mark.parametrize("letter", list("fde"))
@pytest.mark.parametrize("name", ["long runs", "odd slice", "columns"])
def test_weighted_constant_channels(rng, name, letter):
    """Exactly beta, whatever the weights, in each way."""
    libs = built(letter, weights="normalize", layouts=(CASES[name][4],))
    p = Problem(rng, name, letter, weights="positions")
    values = np.broadcast_to((1e4 if letter == "e" else 1e10) * rng.standard_normal((1, p.shape[1], 1)), p.shape)
    p.x = Array(values, *p.how)
    for way, K in WAYS:
        result = p.forward(libs[False], p.build(False, way, K), policy=2)
        assert result.error == ""
        assert (result.table[0] == p.x.values[0, :, 0]).all()
        assert (result.table[1:3] == 0).all()
        assert (result.y == p.beta[:, None].astype(p.x.view.dtype)).all()


def test_sums_of_weights_have_room(rng):
    """They are float64, of every warp: vectors that are kept behind them end where the shared memory does."""
    libs = built("f", weights="normalize", layouts=("RUNS",))
    p = Problem(rng, "long runs", "f", weights="positions")
    for threads in (128, 256):
        check_forward(p, p.forward(libs[False], p.build(False, BLOCK, 1, threads=threads, keep=1)))


@pytest.mark.parametrize(("light", "far"), [(1e-3, 30), (1e-6, 1e3), (1e-12, 1e6), (1e-30, 1e25)])
@pytest.mark.parametrize("letter", list("fd"))
@pytest.mark.parametrize(("shape", "order"), [((296, 8, 1), "OIC"), ((1, 4, 4736), "OCI"), ((3, 4, 769), "OCI")])
def test_light_weights_far_off(rng, shape, order, letter, light, far):
    """What hardly counts costs no digits of what does, though threads and ranks begin with it."""
    layout = {"OIC": "COLUMNS"}.get(order, "WINDOWS" if shape[2] % 2 else "RUNS")
    libs = built(letter, layouts=(layout,), ways=("BLOCK", "GRID"), weights="normalize")
    first = np.zeros((shape[0], 1, shape[2]), bool)
    first[: 1 + 40 * (shape[2] == 1), 0, : 600 if shape[2] > 1 else 1] = True
    w = np.where(first, light, rng.gamma(1, 1, first.shape)).astype(np.float64 if letter == "d" else np.float32)
    x = Array(np.where(first, far, 0) + rng.standard_normal(shape), letter, order)
    exact = x.values.astype(np.longdouble)
    mean = np.average(exact, (0, 2), np.broadcast_to(w, shape).astype(np.longdouble))[:, None]
    var = np.average((exact - mean) ** 2, (0, 2), np.broadcast_to(w, shape).astype(np.longdouble))
    ones = np.ones(shape[1], np.float32)
    for way, K in (("BLOCK", 1), ("GRID", 3)):
        y = Array(np.full(shape, -77.0), letter, order)
        walk = planner.walk(view_of(x, y, None), planner.More(weights="normalize"))
        plan = planner.build(walk, letter, False, planner.HOPPER, way, K, threads=64)
        found = execute(libs[False], plan, x, None, y, given=(ones, 0 * ones, None, None), w=w)
        assert found.error == ""
        eps = number_epsilon(letter)
        assert (abs(found.table[0] + found.table[1].astype(np.longdouble) - mean[:, 0]) <= 4 * eps * np.sqrt(var)).all()
        assert (abs(found.table[2] - var) <= 4 * eps * var).all()
