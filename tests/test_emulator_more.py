"""What a call may ask for beyond batch norm, in the emulator: `fastbn.kernels.reference` says what is right."""

import numpy as np
import pytest
from emulated_more import (
    ACTIVATIONS,
    BLOCK,
    CASES,
    CLUSTER,
    MAP,
    PARAMETERS,
    SETS,
    SPLIT,
    WITH_RESIDUAL,
    Problem,
    built,
    check_backward,
    check_forward,
    run_both,
    sets_of,
)
from emulator import library
from fastbn.kernels import reference


@pytest.mark.parametrize("name", ["long runs", "odd slice", "columns", "7x7", "RGB"])
def test_relu_of_a_sum_in_every_way(rng, name):
    """The residual block: both in one pass, on every way and schedule."""
    p = Problem(rng, name, "f", "relu", residual=True)
    assert p.build(False, BLOCK, 1).walk.layout == CASES[name][4]
    assert run_both(built("f", "relu", True), p, (0, 1, 2, 3)) == 32


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("letter", list("fdeE"))
def test_every_activation(rng, activation, letter):
    """On one way for each layout: what an activation is doesn't depend on either."""
    residual = letter in "fe"
    libs = built(
        letter, activation, residual, each=WITH_RESIDUAL if residual else [("RUNS", "BLOCK"), ("RUNS", "APPLY")]
    )
    problem = [rng, "long runs", letter, activation, residual]
    assert run_both(libs, Problem(*problem), (2,), [(BLOCK, 1)]) == 2
    p = Problem(*problem, given=True)
    check_backward(p, p.backward(libs[True], p.build(True, BLOCK, 1)))
    if residual:
        problem[1] = "columns"
        assert run_both(libs, Problem(*problem), (2,), [(SPLIT, 3)]) == 2
        p = Problem(*problem, given=True)
        check_backward(p, p.backward(libs[True], p.build(True, SPLIT, 2)))
    check_forward(p, p.forward(libs[False], p.build(False, MAP, 2)))
    check_backward(p, p.backward(libs[True], p.build(True, MAP, 2), grads=(False, False)))


@pytest.mark.parametrize("activation", ["", "leaky_relu", "elu"])
@pytest.mark.parametrize("letter", list("fde"))
def test_y_in_place_of_x(rng, activation, letter, monkeypatch):
    """z is had back from y, and the slope from z: in place of dy (leaky_relu) and beside it (half types); by a mask."""
    monkeypatch.setitem(PARAMETERS, "elu", 1.0)  # else y / parameter is rounded, which counts near the limit
    each, masked = [("RUNS", "BLOCK"), ("COLUMNS", "STATS"), ("COLUMNS", "APPLY")], letter == "f"
    more = {"weights": "mask", "masked": "zero"} if masked else {}
    libs = built(letter, activation, each=each, weights="zero" if masked else "", inverse=activation != "")
    for name, way, K, given in (
        ("long runs", BLOCK, 1, False),
        ("columns", SPLIT, 3, False),
        ("columns", SPLIT, 2, True),
    ):
        p = Problem(rng, name, letter, activation, given=given, **more)
        y = np.empty(p.shape)
        reference.forward(p.x.values, y, p.table, p.given, p.eps, p.asked())
        if activation == "elu" and letter == "e":  # y that is rounded to the limit tells nothing of z
            y = np.maximum(y, -0.99)
        p.x.view[...] = y.astype(p.x.view.dtype)
        p.z = reference.deactivate(activation, p.more.parameter, p.x.values)
        p.more = p.more._replace(inverse=True)
        if not (masked or given):  # beta is the mean of the rounded ones, as kernels take x - mean to add up to 0
            p.table[5] = p.z.mean((0, 2))
        check_backward(p, p.backward(libs[True], p.build(True, way, K)))


@pytest.mark.parametrize(("name", "kind"), SETS)
def test_sets_of_rows(rng, name, kind):
    """Each with its own statistics, on every way; an empty one has none."""
    sets = sets_of(kind, CASES[name][0][0], rng)
    libs = built("f", sets=True)
    p = Problem(rng, name, "f", sets=sets)
    assert run_both(libs, p, (0, 3)) == 16
    p = Problem(rng, name, "f", sets=sets, given=True)
    check_forward(p, p.forward(libs[False], p.build(False, MAP, 2), policy=2))
    check_backward(p, p.backward(libs[True], p.build(True, SPLIT, 2), policy=2))


def test_folded_rows_of_sets(rng):
    """Three channels: four rows are one where sets hold whole fours, and a row is element by element where not."""
    libs = built("f", sets=True, layouts=("COLUMNS",), ways=("BLOCK",))
    p = Problem(rng, "RGB", "f", sets={"starts": np.array([0, 32, 64]), "order": None})
    assert p.build(False, BLOCK, 1).walk.fold == 4
    assert run_both(libs, p, (0,), [(BLOCK, 1)]) == 2
    p = Problem(rng, "RGB", "f", sets={"starts": np.array([0, 24, 64]), "order": None})
    walk = p.build(False, BLOCK, 1).walk
    assert (walk.fold, walk.V) == (1, 1)
    narrow = library("NARROWER(0, float, 1)", options=walk.more.options(()))
    check_forward(p, p.forward(narrow, p.build(False, BLOCK, 1)))
    check_backward(p, p.backward(narrow, p.build(True, BLOCK, 1)))


@pytest.mark.parametrize("letter", list("de"))
def test_all_at_once(rng, letter):
    libs = built(letter, "gelu", True, True, ("RUNS", "COLUMNS"), ("BLOCK", "STATS", "APPLY"))
    for name in ("runs", "columns"):
        sets = sets_of("listed", CASES[name][0][0], rng)
        p = Problem(rng, name, letter, "gelu", True, sets)
        assert run_both(libs, p, (2,), [(BLOCK, 1), (SPLIT, 3)]) == 4


def test_a_residual_without_an_activation(rng):
    """Backward is the plain one, and dr is dy to the bit."""
    libs = built("f", "", True, layouts=("RUNS",), ways=("BLOCK", "STATS", "APPLY"))
    p = Problem(rng, "runs", "f", residual=True)
    assert run_both(libs, p, (0, 3), [(BLOCK, 1), (SPLIT, 3)]) == 8
    result = p.backward(libs[True], p.build(True, BLOCK, 1))
    assert result.dr.tobytes() == p.dy.view.tobytes()


def test_results_that_nobody_wants(rng):
    """dx or dr alone, and in place: y over x or over the residual, dx over x, dr over dy."""
    libs = built("f", "relu", True, layouts=("WINDOWS",), ways=("BLOCK", "STATS", "APPLY"))
    for way, K in ((BLOCK, 1), (SPLIT, 3)):
        p = Problem(rng, "odd slice", "f", "relu", residual=True)
        both = p.backward(libs[True], p.build(True, way, K))
        only = p.backward(libs[True], p.build(True, way, K, dr=False), dr=None)
        assert (only.error, only.dr) == ("", None)
        assert only.y.tobytes() == both.y.tobytes()
        only = p.backward(libs[True], p.build(True, way, K, dx=False), dx=None, grads=(False, True))
        assert (only.error, only.y, only.dgamma) == ("", None, None)
        assert only.dr.tobytes() == both.dr.tobytes()
        y = p.forward(libs[False], p.build(False, way, K)).y.tobytes()
        again = p.backward(libs[True], p.build(True, way, K), dx=p.x, dr=p.dy)
        assert again.bits == both.bits
        for over in ("x", "r"):
            p = Problem(np.random.default_rng(5), "odd slice", "f", "relu", residual=True)
            y = p.forward(libs[False], p.build(False, way, K)).y.tobytes()
            assert p.forward(libs[False], p.build(False, way, K), y=getattr(p, over)).y.tobytes() == y


@pytest.mark.parametrize(("letter", "name"), [("f", "long runs"), ("f", "7x7"), ("e", "long runs"), ("d", "columns")])
def test_backward_sees_the_sign_that_forward_saw(rng, letter, name):
    """z of a few ulps about 0: where forward gave 0, and only there, the gradient is 0."""
    layouts = (CASES[name][4],)
    libs = built(letter, "relu", True, False, layouts, ("BLOCK", "CLUSTER", "STATS", "APPLY"))
    p = Problem(rng, name, letter, residual=True)
    z = np.empty(p.shape)
    reference.forward(p.x.values, z, p.table, p.given, p.eps)
    p.r.view[...] = -z.astype(np.float32).astype(p.r.view.dtype)
    p.dy.view[...] = np.where(p.dy.values == 0, 1, p.dy.values)
    p.more = p.more._replace(activation="relu")
    clear = np.abs(z + p.r.values) > 1e-6 if letter == "e" else np.full(z.shape, True)
    assert clear.mean() > 0.98
    for way, K in ((BLOCK, 1), (CLUSTER, 4), (SPLIT, 3)):
        for keep in (None, 1):
            forward = p.forward(libs[False], p.build(False, way, K, keep=keep))
            p.table = forward.table.copy()
            result = p.backward(libs[True], p.build(True, way, K, keep=keep))
            assert forward.error == result.error == ""
            zero = forward.y == 0
            assert 0.2 < zero.mean() < 0.9
            # float16 has 0 for what lies below 2^-25 and isn't 0 in float32: none is tried here
            assert ((result.dr == 0) == zero)[clear].all()


def test_numbers_that_are_not_finite(rng):
    """As the reference has it: NaN stays NaN, and the far ends are reached."""
    for activation in ACTIVATIONS:
        libs = built("f", activation, True, each=WITH_RESIDUAL)  # compiled for the test of every activation
        p = Problem(rng, "columns", "f", activation, residual=True, given=True)
        p.r.view[...] = 0
        p.x.view[:6, 0, 0] = np.nan, 1e30, -1e30, 200, -200, -90
        y = np.empty(p.shape)
        reference.forward(p.x.values, y, p.table.copy(), p.given, p.eps, p.more)
        got = p.forward(libs[False], p.build(False, MAP, 1)).y[:6, 0, 0]
        np.testing.assert_allclose(got, y[:6, 0, 0], rtol=1e-6, atol=1e-6)
