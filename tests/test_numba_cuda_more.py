"""Activations, residuals and sets in the numba.cuda kernels: in Numba's simulator beside the reference, and as PTX."""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

import numpy as np
import pytest
from fastbn.kernels import reference
from numba_cuda_cases import FLOAT64, MORE_CASES, MoreCase, more_inputs, window
from numba_cuda_run import Z

from fastbn.extras import ACTIVATIONS, Extras

pytest.importorskip("numba.cuda")

from fastbn.kernels.numba_cuda.calls import lists_of
from fastbn.kernels.numba_cuda.plan import VALUES, Sizes, plan_of
from test_numba_cuda import by_numba_cuda, compare, compiled_by, loops, own, results, simulate, steps

cases = pytest.mark.parametrize("index", range(len(MORE_CASES)), ids=[case.name for case in MORE_CASES])


class Shape(NamedTuple):
    """Of f on the real line: where its slope jumps, its largest slope, and the largest change of it elsewhere."""

    kinks: tuple[float, ...] = ()
    steepest: float = 1.0
    curved: float = 0.0


def shape_of(name: str, p: float) -> Shape:
    return {
        "": Shape(),
        "relu": Shape((0,)),
        "leaky_relu": Shape((0,), max(1, p)),
        "relu6": Shape((0, 6)),
        "elu": Shape((0,), max(1, p), p),
        "silu": Shape((), 1.1, 0.5),
        "gelu": Shape((), 1.13, 0.8),
        "sigmoid": Shape((), 0.25, 0.1),
        "tanh": Shape((), 1, 0.77),
        "hardswish": Shape((-3, 3), 1.5, 1 / 3),
    }[name]


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    return simulate(tmp_path_factory, "more")


class Exact:
    """The reference's results for a case, and bounds of what the kernels may differ by."""

    def __init__(self, case: MoreCase) -> None:
        data = more_inputs(case)
        x, dy = (a.astype(np.float64) for a in (data.x, data.dy))
        r = np.zeros(case.shape) if data.residual is None else data.residual.astype(np.float64)
        sets, channels = max(1, len(case.sets)), case.shape[1]
        self.y, self.dx, self.dresidual = (np.zeros(case.shape) for _ in range(3))
        self.table = np.zeros((6, sets * channels))
        self.dgamma, self.dbeta = np.zeros((2, sets * channels))
        more = Extras(case.activation, case.parameter, r, self.dresidual, order=data.order, starts=data.starts)
        reference.forward(x, self.y, self.table, data.given, case.eps, more)
        reference.backward(dy, x, self.dx, self.table, self.dgamma, self.dbeta, case.frozen, more)
        names = ("y", "dx", "dresidual")
        self.bounds = {name: np.zeros(case.shape) for name in names}
        self.bounds |= {name: np.zeros(sets * channels) for name in ("mean", "var", "invstd", "dgamma", "dbeta")}
        order = np.arange(case.shape[0]) if data.order is None else data.order
        starts = [0, case.shape[0]] if data.starts is None else data.starts
        self.at_a_kink = False
        for k in range(sets):
            rows, part = order[starts[k] : starts[k + 1]], slice(k * channels, (k + 1) * channels)
            if len(rows):
                with np.errstate(all="ignore"):
                    found = self._bounds(case, x[rows], dy[rows], r[rows], self.table[:, None, part, None], rows, part)
                for name, bound in found.items():
                    self.bounds[name][rows if name in names else part] = bound

    def _bounds(self, case, x, dy, r, table, rows, part) -> dict[str, np.ndarray]:
        """Of one set."""
        result, inner, floor = steps(case)
        kinks, steepest, curved = shape_of(case.activation, case.parameter)
        axes = {"axis": (0, 2), "keepdims": True}
        hi, lo, var, invstd, gamma, beta = table
        xhat = ((x - hi) - lo) * invstd
        # As in test_numba_cuda: x - hi, - lo, scale, the sum with beta, the mean and the variance; the sum with r.
        linear = gamma * xhat + beta
        z = linear + r
        of_z = inner * (3 * np.abs(linear - beta) + np.abs(linear) / 2 + np.abs(gamma))
        of_z = of_z + inner / 2 * np.abs(z) * (case.residual is not None)
        if case.given != "kinks":
            self.at_a_kink |= any((np.isfinite(z) & (np.abs(z - kink) <= of_z)).any() for kink in kinks)
        else:  # z is exact where gamma is 0
            of_z = of_z * (gamma != 0)
        # An activation rounds four times at most, numbers no larger than z or y; a slope, five times, of 1.6 or less.
        y, g = self.y[rows], self.dresidual[rows]
        of_y = steepest * of_z + 2 * inner * np.maximum(np.abs(y), np.abs(z)) * (case.activation != "")
        of_g = np.abs(dy) * (curved * of_z + 4 * inner) * (case.activation != "")
        # dx as in test_numba_cuda, of g in the place of dy; and what g is off by, as dx is made of it.
        a, dx = np.abs(gamma * invstd), self.dx[rows]
        centred = g - g.mean(**axes)
        covariance = (centred * xhat).mean(**axes) * (not case.frozen)
        terms = a * (np.abs(g if case.frozen else centred) + np.abs(xhat * covariance))
        of_dx = inner * (3 * terms + np.abs(dx) / 2 + a * g.std(axis=(0, 2), keepdims=True) * (1 + np.abs(xhat)))
        of_dx = of_dx + a * of_g
        if not case.frozen:
            of_dx = of_dx + a * (of_g.mean(**axes) + np.abs(xhat) * (of_g * np.abs(xhat)).mean(**axes))
        products = (np.abs(g if case.frozen else centred) * np.abs(xhat)).sum((0, 2))
        std = np.sqrt(var)[0, :, 0]
        return {
            "y": of_y + result / 2 * np.abs(y) + floor,
            "dx": of_dx + result / 2 * np.abs(dx) + floor,
            "dresidual": of_g + result / 2 * np.abs(g) + floor,
            "mean": inner * std + 2.0**-52 * np.abs(hi[0, :, 0]) + 1e-300,
            "var": 2 * inner * std**2 + 1e-300,
            "invstd": inner * invstd[0, :, 0],
            "dgamma": inner * (products + np.abs(self.dgamma[part]))
            + (of_g * np.abs(xhat) + 2.0**-52 * np.abs(g * xhat)).sum((0, 2))
            + 1e-45,
            "dbeta": inner * (np.abs(centred).sum((0, 2)) + np.abs(self.dbeta[part])) + of_g.sum((0, 2)) + 1e-45,
        }


@pytest.fixture(scope="module")
def exact():
    """By the index of a case: computed once."""
    return functools.cache(lambda index: Exact(MORE_CASES[index]))


@cases
def test_y(simulated, exact, index):
    case, got = MORE_CASES[index], results(simulated, index)
    y = own(got["y"], case, case.x if case.in_place else case.y or case.x)
    if "y" in case.want.split():
        compare(y, exact(index).y, exact(index).bounds["y"])
    else:
        start = more_inputs(case).x if case.in_place else np.full(case.shape, np.nan, case.dtype)
        np.testing.assert_array_equal(y, start)


@cases
def test_table(simulated, exact, index):
    case, wanted, got = MORE_CASES[index], exact(index), results(simulated, index)["table"]
    hi, lo = wanted.table[:2]
    with np.errstate(all="ignore"):
        compare((got[0] - hi) + (got[1] - lo), 0 * hi, wanted.bounds["mean"] + 1e-300)
    compare(got[2], wanted.table[2], wanted.bounds["var"] + 1e-300)
    compare(got[3], wanted.table[3], wanted.bounds["invstd"] + 1e-300)
    np.testing.assert_array_equal(got[4:], wanted.table[4:])
    if not case.frozen:
        empty = np.repeat(np.array(case.sets or (1,)) == 0, case.shape[1])
        np.testing.assert_array_equal(got[:4, empty], np.zeros((4, empty.sum())))


@cases
def test_gradients(simulated, exact, index):
    case, wanted, got = MORE_CASES[index], exact(index), results(simulated, index)
    places = {
        "dx": {"x": case.x, "dy": case.dy or case.x}.get(case.in_place, case.y or case.x),
        "dresidual": case.dresidual or case.residual,
    }
    for name, layout in places.items():
        if layout is None:
            continue
        values = own(got[name], case, layout)
        if name in case.want.split():
            compare(values, getattr(wanted, name), wanted.bounds[name])
        elif name == "dresidual" or not case.in_place:
            assert np.isnan(values.astype(np.float64)).all()
    for name in ("dgamma", "dbeta"):
        assert got[name].dtype == (np.float64 if case.dtype == FLOAT64 else np.float32)
        if name in case.want.split():
            compare(got[name], getattr(wanted, name), wanted.bounds[name] + 1e-45)
            empty = np.repeat(np.array(case.sets or (1,)) == 0, case.shape[1])
            np.testing.assert_array_equal(got[name][empty], np.zeros(empty.sum()))
        else:
            assert np.isnan(got[name]).all()


@cases
def test_what_is_read_is_left_alone(simulated, index):
    case, got = MORE_CASES[index], results(simulated, index)
    data = more_inputs(case)
    for name, layout, values in (("x", case.x, data.x), ("dy", case.dy or case.x, data.dy)):
        if case.in_place != name:
            np.testing.assert_array_equal(window(got[f"{name} after"], layout, case.shape), values)


def test_backward_sees_the_signs_that_forward_saw(simulated):
    """Where z is a rounding or two, in another cut of the shape: the slope is 1 just where y is above 0."""
    y, dresidual = simulated["signs"]
    assert 0.05 < (y > 0).mean() < 0.95
    np.testing.assert_array_equal(dresidual, (y > 0).astype(np.float32))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_keep_their_digits(simulated, name):
    """Far from 0 as well, where 1 + erf, 1 - s and 1 - tanh^2 wouldn't."""
    f, slope = simulated["activations"][name].astype(np.float64)
    z = Z.astype(np.float64)
    parameter = float(np.float32(0.3))
    below = np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in z])
    exact, exact_slope = reference.activate(name, parameter, z), reference.slope(name, parameter, z)
    if name == "gelu":  # of which the reference loses them
        bell = z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        exact, exact_slope = z * below, below + bell
    # Where what is added cancels, its own size; erfc's argument is rounded, which z^2 magnifies, as an exponent is.
    size = below + np.abs(bell) if name == "gelu" else 1.1 if name == "silu" else np.abs(exact_slope)
    factor = np.where(np.abs(z) < 100, 4 + z**2, 4) * np.finfo(np.float32).eps
    compare(f.astype(np.float32), exact, factor * np.abs(exact) + 1e-30)
    compare(slope.astype(np.float32), exact_slope, factor * size + 1e-30)


def test_no_case_is_at_a_kink_by_chance(exact):
    """There a slope is one of two, by a rounding; cases of exact kinks are of their own."""
    near = [case.name for index, case in enumerate(MORE_CASES) if exact(index).at_a_kink]
    assert near == []


def test_cases_reach_both_sides_of_every_kink():
    """But relu6's 6 and hardswish's 3, which normal z seldom reach: these are in the cases of exact kinks."""
    for name in ACTIVATIONS:
        case = next(c for c in MORE_CASES if c.activation == name and c.residual)
        data = more_inputs(case)
        z, table, more = np.zeros(case.shape), np.zeros((6, case.shape[1])), Extras(residual=data.residual)
        reference.forward(data.x, z, table, data.given, case.eps, more)
        kinks = [kink for kink in shape_of(name, case.parameter).kinks if kink < 3]
        assert z.min() < min([-1, *kinks]), name
        assert z.max() > max([1, *kinks]), name


def test_plans_of_sets_cover_each_set_once(rng):
    """By the kernels' own rule: blocks set by set, for the tallest; by random shapes, sizes and heights."""
    for _ in range(200):
        heights = rng.integers(0, 6, int(rng.integers(2, 6)))
        heights[rng.integers(len(heights))] = rng.integers(1, 30)
        outer, channels, inner = int(heights.sum()), int(rng.integers(1, 20)), int(rng.integers(1, 40))
        x = np.empty((outer, channels, inner), np.float32)
        x = x if rng.integers(2) else np.empty((outer, inner, channels), np.float32).transpose(0, 2, 1)
        threads = 2 ** int(rng.integers(0, 8))
        sizes = Sizes(threads, 2 ** int(rng.integers(0, 6)), min(threads, 8), int(rng.integers(1, 50)), 64)
        plan = plan_of(x.shape, 4, (x.strides,), sizes, len(heights), int(heights.max()))
        channels, inner, turn, _, share, pieces, lanes, far, tiles = plan.tracked
        assert plan.grid == len(heights) * tiles * pieces
        rows = plan.threads // lanes
        assert (far * inner + turn, tiles) == (rows, -(-channels // lanes))
        block, t = np.divmod(np.arange(plan.grid * plan.threads), plan.threads)
        g, item = np.divmod(block, tiles * pieces)
        c, piece = item // pieces * lanes + t % lanes, item % pieces
        j, end = piece * share + t // lanes, np.minimum(heights[g] * inner, (piece + 1) * share)
        o, i, seen = j // inner, j % inner, []
        while (here := (j < end) & (c < channels)).any():
            seen.append(np.stack([g, c, o, i])[:, here])
            j, o, i = j + rows, o + far + (i + turn >= inner), (i + turn) % inner
        found = set(map(tuple, np.concatenate(seen, 1).T.tolist()))
        wanted = {
            (k, c, o, i) for k, n in enumerate(heights) for c in range(channels) for o in range(n) for i in range(inner)
        }
        assert found == wanted
        assert sum(s.shape[1] for s in seen) == len(wanted)


def test_the_list_of_sets_is_short_where_samples_are_many_rows():
    """In channels-last memory: an entry a sample, and not one a row of channels."""
    order = (np.array([2, 0, 3, 1])[:, None] * 12 + np.arange(12)).ravel()
    lists, height, rows = lists_of(np.array([0, 12, 12, 48]), order, (48, 3, 1))
    assert (lists.tolist(), height, rows) == ([4, 5, 5, 8, 2, 0, 3, 1], 3, 12)
    lists, height, rows = lists_of(np.array([0, 24, 48]), None, (48, 3, 1))
    assert (lists.tolist(), height, rows) == ([3, 4, 5, 0, 1], 1, 24)
    lists, height, rows = lists_of(np.array([0, 1, 3]), None, (3, 3, 5))
    assert (lists.tolist(), height, rows) == ([3, 4, 6, 0, 1, 2], 2, 1)


COMPILE = """
import pickle, sys, types
from numba import cuda, types as t
from numba.cuda import dispatcher
dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=(7, 5))
from fastbn.kernels.numba_cuda import kernels as k

place, cut, tracked, none = t.UniTuple(t.int64, 6), t.UniTuple(t.int64, 7), t.UniTuple(t.int64, 9), t.Tuple(())
table, part = t.float64[:, ::1], t.float64[:, :, ::1]
both = {"residual": True, "dresidual": True}
hows = [k.How(name) for name in %s]
hows += [k.How("relu", **both), k.How(sets=True), k.How("gelu", **both, sets=True)]
hows += [k.How("", dresidual=True, constant=True), k.How("silu", **both, sets=True, dx=False, constant=True)]
every = [("float32", t.float32, how) for how in hows]
every += [(name, e, hows[-3]) for name, e in (("float64", t.float64), ("float16", t.float16), ("int16", t.int16))]
found = {}
for name, element, how in every:
    x, run = element[::1], k.kernels_of(name, how)
    r, dr = ((x, place) if there else (none, none) for there in (how.residual, how.dresidual))
    more = t.NamedTuple([t.int64[::1] if how.sets else none, *r, *dr, none, none, t.float64], k.More)
    walk = tracked if how.tracked else cut
    for kernel, signature in (
        *([(run.forward_sums, (x, place, walk, part, more))] if how.sets else []),
        (run.forward_map, (x, place, x, place, walk, table, t.boolean, more)),
        (run.backward_sums, (x, place, x, place, walk, table, part, more)),
        (run.backward_map, (x, place, x, place, x, place, walk, table, table, more)),
    ):
        ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=(8, 0))
        found[name, tuple(how), kernel.py_func.__name__] = ptx
pickle.dump(found, open(sys.argv[1], "wb"))
"""


@by_numba_cuda
def test_ptx(tmp_path):
    """All compile for a real GPU, and keep to registers; float32's activations are computed in float32."""
    doubles: dict[str, set[int]] = {}
    found = compiled_by(COMPILE % repr(list(ACTIVATIONS)), tmp_path)
    assert len(found) == 3 * (len(ACTIVATIONS) + 8) + 6  # the sums of forward know of sets alone
    for (element, how, name), text in found.items():
        activation, residual, dresidual, sets, _, dx, constant, _ = how
        assert not re.search(r"\.local|\bcall\b|\batom\b|\bred\b|\bshfl\b", text), (element, how, name)
        bodies = [body for body in loops(text) if any("ld.global" in line for line in body)]
        assert not any(re.match(r"(div|rem)\.[su]\d", line) for body in bodies for line in body), (element, how, name)
        body = max(bodies, key=lambda body: sum("ld.global" in line for line in body))
        loads = sum("ld.global" in line for line in body)
        adds = name.startswith("forward") or not constant or activation != ""  # then x counts
        arrays = 1 + sets + (name.startswith("backward") and (name.endswith("sums") or adds))
        arrays += residual and activation != "" and name != "forward_sums"
        assert loads == VALUES * arrays, (element, how, name)
        if name == "backward_map":
            stores = sum("st.global" in line for line in body)
            assert stores >= VALUES * (dx + dresidual), (element, how, name)
        if element == "float32" and activation and not (residual or sets):
            doubles.setdefault(name, set()).add(sum(".f64" in line for line in body))
    assert set(map(len, doubles.values())) == {1}  # those of the sums, and of numbers that leave float32
