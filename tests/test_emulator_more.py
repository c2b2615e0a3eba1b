"""What a call may ask for beyond batch norm, in the emulator: `fastbn.kernels.reference` says what is right.

Every instance is other code: residual, activation, sets and weights are options of the compiler.
"""

import itertools

import numpy as np
import pytest
from emulator import Array, epsilon, error_in_eps, execute, library, number_epsilon, planner, view_of
from fastbn.kernels import reference

from fastbn.extras import Extras
from fastbn.kept import inverse_table

BLOCK, CLUSTER, GRID, SPLIT, MAP = planner.BLOCK, planner.CLUSTER, planner.GRID, planner.SPLIT, planner.MAP
WAYS = [(BLOCK, 1), (CLUSTER, 4), (GRID, 3), (SPLIT, 3)]
PARAMETERS = {"leaky_relu": 0.1, "elu": 1.5}
KINKS = {"relu": (0,), "leaky_relu": (0,), "elu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}

NO_GAPS = ((0, 0), (0, 0), (0, 0))
CASES = {  # shape, order of axes in memory, gaps, offset; float32's layout
    "runs": ((4, 6, 64), "OCI", NO_GAPS, 0, "RUNS"),
    "long runs": ((3, 3, 1096), "OCI", NO_GAPS, 0, "RUNS"),
    "odd slice": ((6, 4, 75), "OCI", ((0, 1), (1, 3), (0, 0)), 3, "WINDOWS"),
    "columns": ((150, 40, 1), "OIC", NO_GAPS, 0, "COLUMNS"),
    "7x7": ((18, 8, 49), "OCI", NO_GAPS, 0, "COLUMNS"),
    "RGB": ((64, 3, 1), "OIC", NO_GAPS, 0, "COLUMNS"),
    "(C, N)": ((600, 5, 1), "CIO", NO_GAPS, 0, "RUNS"),
    "channels first of all": ((6, 5, 96), "COI", NO_GAPS, 0, "RUNS"),
}
LAYOUTS = ("RUNS", "WINDOWS", "COLUMNS")
TYPES = {"f": ("0, float", 4), "d": ("3, double", 2), "e": ("1, f16", 8), "E": ("2, bf16", 8)}


def width(letter, layout):
    """Elements of a vector of whole 16 bytes; of columns at most four."""
    return min(TYPES[letter][1], planner.WIDEST if layout == "COLUMNS" else 8)


# As in test_emulator.py. A transcendental function and its slope cost two ulps more than the float32 result.
Y_TOLERANCE = {"f": 4, "d": 4, "e": 0.51, "E": 0.51}
DX_TOLERANCE = {"f": 8, "d": 8, "e": 0.52, "E": 0.52}


class Problem:
    """Random arrays whose z keeps away from the kinks, by more than float32 may be off."""

    def __init__(
        self, rng, name, letter, activation="", residual=False, sets=None, given=False, mean=2.0, weights=None,
        masked="normalize", offset=0.0,
    ):  # fmt: skip
        shape, order, gaps, start, _ = CASES[name]
        C = shape[1]
        self.how, self.letter, self.shape, self.eps = (letter, order, gaps, start), letter, shape, 1e-5
        self.gamma = (rng.uniform(0.5, 1.5, C) * rng.choice([-1, 1], C)).astype(np.float32)
        self.beta = rng.standard_normal(C).astype(np.float32)
        self.more = Extras(activation, PARAMETERS.get(activation, 0.0), **({} if sets is None else sets))
        self.sets = 1 if sets is None else len(sets["starts"]) - 1
        spread, middle = rng.uniform(0.5, 2, (1, C, 1)), mean * rng.standard_normal((1, C, 1))
        scale = 3.0 if activation in ("relu6", "hardswish") else 1.0
        self.gamma *= np.float32(scale)
        values = offset + middle + spread * rng.standard_normal(shape)
        if weights is not None:
            self.weigh(rng, weights, masked)
            if masked != "normalize":  # what is absent may hold anything
                values = np.where(self.more.weights == 0, np.resize([np.nan, np.inf, 1e30], shape), values)
        self.x = Array(values, *self.how)
        self.dy = Array(rng.standard_normal(shape) + rng.standard_normal((1, C, 1)), *self.how)
        self.r = Array(rng.standard_normal(shape), *self.how) if residual else None
        self.given = (self.gamma, self.beta, None, None)
        if given:
            wide = self.sets * C
            mean, var = rng.normal(0, 2, wide).astype(np.float32), rng.uniform(0.5, 2, wide).astype(np.float32)
            self.given = (self.gamma, self.beta, mean, var)
        self.table = np.zeros((6, C * self.sets))
        for _ in range(100):
            z = np.empty(shape)
            more = self.more._replace(activation="", residual=self.r and self.r.values, masked="normalize")
            reference.forward(self.x.values, z, self.table, self.given, self.eps, more)
            near = np.zeros(shape, bool)
            for kink in KINKS.get(activation, ()):
                near |= abs(z - kink) < 1e-4
            if not near.any():
                break
            self.x.view[near] = (self.x.values[near] + 0.125).astype(self.x.view.dtype)
        assert not near.any()
        self.z = z

    def weigh(self, rng, kind, masked):
        """Weights (O, 1, I) of the number type, a fifth of them 0; of the last set of several, all of them."""
        O, _, I = self.shape  # noqa: E741
        w = {
            "mask": lambda: (rng.random((O, 1, I)) < 0.6).astype(float),
            "samples": lambda: np.broadcast_to(rng.integers(0, 4, (O, 1, 1)), (O, 1, I)).astype(float),
            "positions": lambda: rng.gamma(1.0, 1.0, (O, 1, I)) * (rng.random((O, 1, I)) > 0.2),
            "none": lambda: np.zeros((O, 1, I)),
        }[kind]()
        rows = reference._sets(O, self.more)
        if len(rows) > 1:
            w[rows[-1]] = 0
        w = np.ascontiguousarray(w, np.float64 if self.letter == "d" else np.float32)
        mass = np.array([w[row].sum(dtype=np.float64) for row in rows])
        self.more = self.more._replace(weights=w, masked=masked, mass=mass)

    def weighed(self):
        """The mode in which the kernel reads weights: frozen statistics have no use for them but to mask."""
        there = self.more.weights is not None and (self.given[2] is None or self.more.masked != "normalize")
        return self.more.masked if there else ""

    def asked(self):
        return self.more._replace(residual=self.r and self.r.values)

    def empty(self):
        return Array(np.full(self.shape, -77.0), *self.how)

    def walk(self, backward, dx=True, dr=True, x=True):
        read = self.r if not backward or self.more.activation else None
        arrays = (
            self.x if x else None,
            self.x if dx else None,
            self.dy if backward else None,
            read,
            self.x if backward and dr and self.r else None,
        )
        inverse = self.more.inverse and self.more.activation != ""
        beyond = planner.More(self.more.activation, weights=self.weighed(), inverse=inverse)
        if self.more.starts is not None:
            sizes = np.diff(self.more.starts)
            listed = self.more.order is not None or len(set(sizes)) > 1
            beyond = beyond._replace(sets=self.sets, height=int(sizes.max()), listed=listed)
        return planner.walk(view_of(*arrays), beyond)

    def build(self, backward, way, K, **how):
        which = {k: how.pop(k) for k in ("dx", "dr", "x") if k in how}
        how.setdefault("threads", 64)
        how.setdefault("frozen", self.given[2] is not None)
        return planner.build(self.walk(backward, **which), self.letter, backward, planner.HOPPER, way, K, **how)

    def lists(self, plan):
        lists = {"starts": self.more.starts, "order": self.more.order} if plan.walk.more.listed else {}
        return lists | ({"w": self.more.weights} if plan.walk.more.weights else {})

    def forward(self, lib, plan, **how):
        how |= self.lists(plan) | {"parameter": self.more.parameter, "r": self.r}
        return execute(lib, plan, self.x, None, how.pop("y", self.empty()), given=self.given, eps=self.eps, **how)

    def backward(self, lib, plan, **how):
        read = self.r if self.more.activation else None
        dr = how.pop("dr", self.empty()) if self.r else None
        how |= self.lists(plan) | {"parameter": self.more.parameter, "r": read, "dr": dr, "mass": self.more.mass}
        return execute(lib, plan, how.pop("x", self.x), self.dy, how.pop("dx", self.empty()), table=self.table, **how)


def check_forward(p, result):
    assert result.error == ""
    y, table = np.empty(p.shape), np.empty(p.table.shape)
    reference.forward(p.x.values, y, table, p.given, p.eps, p.asked())
    eps, known = number_epsilon(p.letter), np.isfinite(y)
    assert (np.isfinite(result.y.astype(np.float64)) == known).all()
    scale = np.maximum(1, abs(y[known]) + abs(np.where(np.isfinite(p.z), p.z, 0)[known]))
    twice = 2 if p.letter == "d" and p.more.weights is not None else 1  # the reference is float64 too, and rounds w x
    assert error_in_eps(result.y[known], y[known], scale, epsilon(p.letter)) <= twice * Y_TOLERANCE[p.letter]
    spread = np.sqrt(table[2]) + 1e-30
    off = (result.table[0] - table[0]) + (result.table[1] - table[1])
    assert error_in_eps(off, np.zeros_like(off), spread, eps) <= 4
    assert error_in_eps(result.table[2:4], table[2:4], table[2:4], eps) <= 4
    assert (result.table[4:] == table[4:]).all()
    if result.mass is not None:
        assert error_in_eps(result.mass, p.more.mass, p.more.mass, eps) <= 4


def check_backward(p, result, dx=True):
    assert result.error == ""
    want_dx, dr = np.empty(p.shape), np.empty(p.shape)
    dgamma, dbeta = np.empty((2, p.table.shape[1]))
    frozen = p.given[2] is not None
    more = p.asked()._replace(dresidual=dr)
    reference.backward(p.dy.values, p.x.values, want_dx, p.table, dgamma, dbeta, frozen, more)
    eps, C = number_epsilon(p.letter), p.shape[1]
    # g is dy f'(z), and z is off by an eps or two of its terms: so much changes f' where f bends. Elsewhere g rounds.
    sizes, scale, roots = np.empty(p.shape), np.ones(p.shape), np.zeros((2, len(dgamma)))
    above, below = (reference.slope(p.more.activation, p.more.parameter, p.z + h) for h in (5e-5, -5e-5))
    bend = abs(above - below) / 1e-4
    for s, rows in enumerate(reference._sets(p.shape[0], more)):
        t = p.table[:, s * C : (s + 1) * C, None]
        with np.errstate(invalid="ignore"):  # of what is absent
            values = p.x.values[rows]
            if p.more.inverse:
                values = reference.deactivate(p.more.activation, p.more.parameter, values)
            xhat = abs(((values - t[0]) - t[1]) * t[3])
        counts = np.ones(xhat.shape, bool)
        if p.more.masked != "normalize":
            counts &= p.more.weights[rows] != 0
            xhat = np.where(counts, xhat, 0)
        terms = abs(t[4]) * xhat + abs(t[5]) + (0 if p.r is None else abs(p.r.values[rows]))
        sizes[rows] = abs(dr[rows]) + abs(p.dy.values[rows]) * np.where(counts, bend[rows], 0) * terms
        if len(rows):  # dx is of g, its mean, and xhat times a mean; sums are of deviations from means
            n, root = len(rows) * p.shape[2], np.sqrt((sizes[rows] ** 2).mean((0, 2), keepdims=True))
            spread, share = np.sqrt((xhat**2).mean((0, 2), keepdims=True)), 1.0
            if p.more.weights is not None and not frozen:
                share = p.more.weights[rows] * (n / (p.more.mass[s] or 1))
            beside = root * share * (1 + xhat * (1 if p.more.weights is None else spread))
            scale[rows] = np.maximum(1, abs(t[4] * t[3]) * (sizes[rows] + beside))
            roots[:, s * C : (s + 1) * C] = n * root[0, :, 0] * [spread[0, :, 0], np.ones(C)]
    if dx:
        scale = np.maximum(scale, abs(want_dx))
        assert error_in_eps(result.y, want_dx, scale, epsilon(p.letter)) <= DX_TOLERANCE[p.letter]
    if result.dr is not None:
        assert error_in_eps(result.dr, dr, np.maximum(1, sizes), epsilon(p.letter)) <= Y_TOLERANCE[p.letter]
    for got, right, root in zip((result.dgamma, result.dbeta), (dgamma, dbeta), roots, strict=True):
        if got is not None:
            assert error_in_eps(got, right, np.maximum(1, root), eps) <= 4


def built(
    letter,
    activation="",
    residual=False,
    sets=False,
    layouts=LAYOUTS,
    ways=("BLOCK", "CLUSTER", "GRID", "STATS", "APPLY"),
    weights="",
    each=None,
    inverse=False,
):
    """Libraries for forward and for backward, one if their options are the same, with no instance more than the test
    wants: these layouts in these ways, or each (layout, way). An instance takes a third of a second to compile."""
    more = planner.More(activation, sets=2 if sets else 1, weights=weights, inverse=inverse)
    options, instances = {}, {}
    for backward in (False, True):
        arrays = (["r"] if not backward or activation else []) + ["dr"] * backward if residual else []
        options[backward] = more.options(arrays)
        instances[backward] = " ".join(
            f"ONE({TYPES[letter][0]}, {width(letter, layout)}, {str(backward).lower()}, {layout}, {way})"
            for layout, way in each or itertools.product(layouts, ways)
        )
    if options[False] == options[True]:
        return dict.fromkeys((False, True), library(" ".join(instances.values()), options=options[True]))
    return {backward: library(instances[backward], options=options[backward]) for backward in (False, True)}


def fits(p, plan):
    """Whether the widest vectors are used: all that is built."""
    return width(p.letter, plan.walk.layout) == plan.walk.V


ACTIVATIONS = ["relu", "leaky_relu", "relu6", "elu", "silu", "gelu", "sigmoid", "tanh", "hardswish"]


def run_both(libs, p, schedules=(0, 3), ways=WAYS):
    ran = 0
    for (way, K), backward in itertools.product(ways, (False, True)):
        run, check = (p.backward, check_backward) if backward else (p.forward, check_forward)
        bits = set()
        for policy in schedules:
            keep = None if policy % 2 or way == SPLIT else 1
            plan = p.build(backward, way, K, keep=keep)
            if not fits(p, plan):
                continue
            result = run(libs[backward], plan, policy=policy, resident=policy + 1)
            check(p, result)
            bits.add(result.bits)
            ran += 1
        assert len(bits) <= 1, (way, backward)
    return ran


@pytest.mark.parametrize("name", ["long runs", "odd slice", "columns", "7x7", "RGB"])
def test_relu_of_a_sum_in_every_way(rng, name):
    """The residual block: both in one pass, on every way and schedule."""
    p = Problem(rng, name, "f", "relu", residual=True)
    assert p.build(False, BLOCK, 1).walk.layout == CASES[name][4]
    assert run_both(built("f", "relu", True), p, (0, 1, 2, 3)) == 32


WITH_RESIDUAL = [("RUNS", "BLOCK"), ("COLUMNS", "STATS"), ("COLUMNS", "APPLY")]


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
        p.table, p.more = inverse_table(p.table), p.more._replace(inverse=True)
        if not (masked or given):  # that of the rounded ones, as kernels take x - mean to add up to 0
            p.table[0] = p.z.mean((0, 2))
        check_backward(p, p.backward(libs[True], p.build(True, way, K)))


def sets_of(kind, outer, rng):
    """Sets of outer indices, as kernels get them."""
    if kind == "equal":
        return {"starts": np.arange(4, dtype=np.int64) * (outer // 3), "order": None}
    if kind == "ragged":  # one is empty
        return {"starts": np.array([0, 1, 1, outer - 1, outer], np.int64), "order": None}
    order = rng.permutation(outer).astype(np.int64)
    return {"starts": np.array([0, outer // 3, outer // 2, outer // 2, outer], np.int64), "order": order}


SETS = [
    ("odd slice", "equal"), ("odd slice", "ragged"), ("odd slice", "listed"), ("columns", "equal"),
    ("columns", "ragged"), ("columns", "listed"), ("7x7", "equal"), ("7x7", "listed"), ("(C, N)", "equal"),
    ("channels first of all", "equal"), ("channels first of all", "ragged"),
]  # fmt: skip


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


# ------------------------------------------------------------------------------------------------------------- weights

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
