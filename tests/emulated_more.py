"""What the emulator's tests of residuals, activations, sets and weights share: problems, and checks by the reference.

Every instance is other code: what is asked for beyond batch norm is options of the compiler.
"""

import itertools

import numpy as np
from emulator import Array, epsilon, error_in_eps, execute, library, number_epsilon, planner, view_of
from fastbn.kernels import reference

from fastbn.extras import Extras

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

    def table_of_backward(self):
        """As launches of `bn.cu` are given it."""
        return reference.inverse_table(self.table) if self.more.inverse else self.table

    def backward(self, lib, plan, **how):
        read = self.r if self.more.activation else None
        dr = how.pop("dr", self.empty()) if self.r else None
        how |= self.lists(plan) | {"parameter": self.more.parameter, "r": read, "dr": dr, "mass": self.more.mass}
        x, dx = how.pop("x", self.x), how.pop("dx", self.empty())
        return execute(lib, plan, x, self.dy, dx, table=self.table_of_backward(), **how)


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
        t = p.table_of_backward()[:, s * C : (s + 1) * C, None]
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


WITH_RESIDUAL = [("RUNS", "BLOCK"), ("COLUMNS", "STATS"), ("COLUMNS", "APPLY")]


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
