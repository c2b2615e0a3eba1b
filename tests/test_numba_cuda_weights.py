"""Weights and masks in the numba.cuda kernels: in Numba's simulator beside the reference, and as PTX."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
from fastbn.kernels import reference
from numba_cuda_cases import FLOAT64, WEIGHTED_CASES, MoreCase, more_inputs

from fastbn.extras import Extras

pytest.importorskip("numba.cuda")

from fastbn.kernels.numba_cuda.plan import VALUES
from test_numba_cuda import by_numba_cuda, compare, compiled_by, loops, own, results, simulate, steps
from test_numba_cuda_more import shape_of

cases = pytest.mark.parametrize("index", range(len(WEIGHTED_CASES)), ids=[case.name for case in WEIGHTED_CASES])


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    return simulate(tmp_path_factory, "weights")


class Exact:
    """The reference's results for a case, and bounds of what the kernels may differ by."""

    def __init__(self, case: MoreCase) -> None:
        data = self.data = more_inputs(case)
        x, dy = (a.astype(np.float64) for a in (data.x, data.dy))
        r = np.zeros(case.shape) if data.residual is None else data.residual.astype(np.float64)
        sets, channels = max(1, len(case.sets)), case.shape[1]
        self.mass = data.mass()
        self.y, self.dx, self.dresidual = (np.zeros(case.shape) for _ in range(3))
        self.table = np.zeros((6, sets * channels))
        self.dgamma, self.dbeta = np.zeros((2, sets * channels))
        more = Extras(case.activation, case.parameter, r, self.dresidual, data.weights, case.masked, self.mass)
        more = more._replace(order=data.order, starts=data.starts)
        reference.forward(x, self.y, self.table, data.given, case.eps, more)
        reference.backward(dy, x, self.dx, self.table, self.dgamma, self.dbeta, case.frozen, more)
        names = ("y", "dx", "dresidual")
        self.bounds = {name: np.zeros(case.shape) for name in names}
        self.bounds |= {name: np.zeros(sets * channels) for name in ("mean", "var", "invstd", "dgamma", "dbeta")}
        order = np.arange(case.shape[0]) if data.order is None else data.order
        starts = [0, case.shape[0]] if data.starts is None else data.starts
        self.absent = np.broadcast_to(data.weights == 0, case.shape) & (case.masked != "normalize")
        self.at_a_kink = False
        for k in range(sets):
            rows, part = order[starts[k] : starts[k + 1]], slice(k * channels, (k + 1) * channels)
            if len(rows):
                parts = x[rows], dy[rows], r[rows], data.weights[rows].astype(np.float64), self.absent[rows]
                with np.errstate(all="ignore"):
                    found = self._bounds(case, *parts, self.table[:, None, part, None], rows, part)
                for name, bound in found.items():
                    self.bounds[name][rows if name in names else part] = bound

    def _bounds(self, case, x, dy, r, w, absent, table, rows, part) -> dict[str, np.ndarray]:
        """Of one set. As in test_numba_cuda_more, but for what is said here."""
        result, inner, floor = steps(case)
        kinks, steepest, curved = shape_of(case.activation, case.parameter)
        axes = {"axis": (0, 2), "keepdims": True}
        hi, lo, var, invstd, gamma, beta = table
        xhat = np.where(absent, 0, ((x - hi) - lo) * invstd)
        # A product by a weight is rounded, too: w d, by half an eps of the mean |d|, which no std is below, and w d^2.
        off_mean, off_var = 1.5, 2.5
        linear = gamma * xhat + beta
        z = linear + r
        of_z = inner * (3 * np.abs(linear - beta) + np.abs(linear) / 2 + off_mean * np.abs(gamma))
        of_z = of_z + inner / 2 * np.abs(z) * (case.residual is not None)
        near = [(np.isfinite(z) & ~absent & (np.abs(z - kink) <= of_z)).any() for kink in kinks]
        self.at_a_kink |= any(near)
        y, g = self.y[rows], self.dresidual[rows]
        of_y = steepest * of_z + 2 * inner * np.maximum(np.abs(y), np.abs(z)) * (case.activation != "")
        of_slope = np.where(np.isfinite(z), curved * of_z, 0) + 4 * inner  # of what isn't finite there is one slope
        of_g = np.where(absent, 0, np.abs(dy) * of_slope * (case.activation != ""))
        # dx = a (g - w S - w xhat P): the terms, w S, whose product is rounded before it is taken away, and the sums:
        # of g about its mean, of g xhat about both means, and what the mean of g xhat is made of beside these: the
        # mean of g by that of xhat, which isn't 0 here, and by what the mean of x is off by.
        a, dx = np.abs(gamma * invstd), self.dx[rows]
        mass, values = w.sum(), xhat[:, :1].size
        share = w * (values / mass if mass > 0 and not case.frozen else 0.0)  # of a value; frozen: none
        counts = np.broadcast_to(share != 0, xhat.shape)
        spread, mean_g, mean_xhat = g.std(**axes), np.abs(g.mean(**axes)), np.abs(xhat).mean(**axes)
        root = np.sqrt((xhat**2).mean(**axes))
        away = np.where(counts, np.abs(xhat), 0)

        def counted(term):
            return np.where(counts, share * term, 0)

        S, P = counted(g.mean(**axes)), counted((g * xhat).mean(**axes))
        of_sums = counted(spread * (1 + away * root) + mean_g * away * (mean_xhat + off_mean)) + off_mean * np.abs(P)
        of_dx = inner * (3 * a * (np.abs(g - S) + np.abs(P) * away) + a * (np.abs(S) / 2 + of_sums) + np.abs(dx) / 2)
        of_dx = of_dx + a * of_g
        of_dx = of_dx + a * counted(of_g.mean(**axes) + away * (of_g * np.abs(xhat)).mean(**axes))
        products = (np.abs(g) * np.abs(xhat)).sum((0, 2))
        off = (np.abs(g.sum(**axes)) * (mean_xhat + off_mean * (not case.frozen)))[0, :, 0]
        std = np.sqrt(var)[0, :, 0]
        return {
            "y": np.where(absent, 0, of_y + result / 2 * np.abs(y) + floor) + 1e-300,
            "dx": np.where(absent, 0, of_dx + result / 2 * np.abs(dx) + floor) + 1e-300,
            "dresidual": np.where(absent, 0, of_g + result / 2 * np.abs(g) + floor) + 1e-300,
            "mean": off_mean * inner * std + 2.0**-52 * np.abs(hi[0, :, 0]) + 1e-300,
            "var": off_var * inner * std**2 + 1e-300,
            "invstd": off_var / 2 * inner * invstd[0, :, 0],
            "dgamma": inner * (products + np.abs(self.dgamma[part]) + off)
            + (of_g * np.abs(xhat) + 2.0**-52 * np.abs(g * xhat)).sum((0, 2))
            + 1e-45,
            "dbeta": inner * (np.abs(g - g.mean(**axes)).sum((0, 2)) + np.abs(self.dbeta[part]))
            + of_g.sum((0, 2))
            + 1e-45,
        }


@pytest.fixture(scope="module")
def exact():
    """By the index of a case: computed once."""
    return functools.cache(lambda index: Exact(WEIGHTED_CASES[index]))


@cases
def test_forward(simulated, exact, index):
    case, wanted, got = WEIGHTED_CASES[index], exact(index), results(simulated, index)
    if "y" in case.want.split():
        y = own(got["y"], case, case.x if case.in_place else case.y or case.x)
        compare(y, wanted.y, wanted.bounds["y"])
        if case.spoil == "one value":
            np.testing.assert_array_equal(y[:, 1], np.full_like(y[:, 1], wanted.data.given[1][1]))
    table, (hi, lo) = got["table"], wanted.table[:2]
    with np.errstate(all="ignore"):
        compare((table[0] - hi) + (table[1] - lo), 0 * hi, wanted.bounds["mean"])
    compare(table[2], wanted.table[2], wanted.bounds["var"])
    compare(table[3], wanted.table[3], wanted.bounds["invstd"] + 1e-300)
    np.testing.assert_array_equal(table[4:], wanted.table[4:])
    if case.frozen:
        assert np.isnan(got["mass"]).all()
    else:  # in float64, whatever the type of the weights
        np.testing.assert_allclose(got["mass"], wanted.mass, rtol=2.0**-50, atol=0)
        none = np.repeat(wanted.mass == 0, case.shape[1])
        np.testing.assert_array_equal(table[:4, none], np.zeros((4, none.sum())))


@cases
def test_backward(simulated, exact, index):
    case, wanted, got = WEIGHTED_CASES[index], exact(index), results(simulated, index)
    places = {"dx": {"x": case.x, "dy": case.dy or case.x}.get(case.in_place, case.y or case.x)}
    if case.residual:
        places["dresidual"] = case.residual
    for name, layout in places.items():
        values = own(got[name], case, layout)
        if name in case.want.split():
            compare(values, getattr(wanted, name), wanted.bounds[name])
            if wanted.absent.any() and (name == "dresidual" or case.masked == "zero"):
                assert not values[wanted.absent].astype(np.float64).any()
        elif not case.in_place:
            assert np.isnan(values.astype(np.float64)).all()
    for name in ("dgamma", "dbeta"):
        assert got[name].dtype == (np.float64 if case.dtype == FLOAT64 else np.float32)
        if name in case.want.split():
            compare(got[name], getattr(wanted, name), wanted.bounds[name])
        else:
            assert np.isnan(got[name]).all()


def test_what_is_masked_is_kept_to_the_bit(simulated):
    """y is x, and dx is dy, in every type."""
    seen = set()
    for index, case in enumerate(WEIGHTED_CASES):
        if case.masked == "keep" and not case.in_place and {"y", "dx"} <= set(case.want.split()):
            data, got = more_inputs(case), results(simulated, index)
            here = np.broadcast_to(data.weights == 0, case.shape)
            for name, layout, values in (("y", case.y or case.x, data.x), ("dx", case.y or case.x, data.dy)):
                np.testing.assert_array_equal(own(got[name], case, layout)[here], values[here])
            seen.add(case.dtype.name)
    assert seen == {"float32", "float64", "float16", "bfloat16"}


def test_cases_have_what_they_are_about(exact):
    for index, case in enumerate(WEIGHTED_CASES):
        w = exact(index).data.weights
        assert not exact(index).at_a_kink, case.name
        if case.weights != "none":
            assert (w == 0).any() or min(case.shape[0] * case.shape[2], 9) < 9, case.name
            assert (w != 0).any(), case.name


COMPILE = """
import pickle, sys, types
from numba import cuda, types as t
from numba.cuda import dispatcher
dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=(7, 5))
from fastbn.kernels.numba_cuda import finish as m, kernels as k

place, tracked, none = t.UniTuple(t.int64, 6), t.UniTuple(t.int64, 9), t.Tuple(())
table, part = t.float64[:, ::1], t.float64[:, :, ::1]
c, i = t.float32[::1], t.int64
hows = [k.How(weights=masked) for masked in ("normalize", "zero", "keep")]
hows += [k.How("relu", True, True, True, masked) for masked in ("normalize", "keep")]
hows += [k.How("relu", weights="zero", constant=True)]
every = [("float32", t.float32, how) for how in hows]
every += [(name, e, hows[-2]) for name, e in (("float64", t.float64), ("float16", t.float16), ("int16", t.int16))]
found = {}
for name, element, how in every:
    x, w, run = element[::1], (t.float64 if name == "float64" else t.float32)[::1], k.kernels_of(name, how)
    r = (x, place) if how.residual else (none, none)
    more = t.NamedTuple([t.int64[::1] if how.sets else none, *r, *r, w, place, t.float64], k.More)
    for kernel, signature in (
        (run.forward_sums, (x, place, tracked, part, more)),
        (run.forward_map, (x, place, x, place, tracked, table, t.boolean, more)),
        (run.backward_sums, (x, place, x, place, tracked, table, part, more)),
        (run.backward_map, (x, place, x, place, x, place, tracked, table, table, more)),
    ):
        ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=(8, 0))
        found[name, tuple(how), kernel.py_func.__name__] = ptx
finish, mass = m.finishes_of(True), t.float64[::1]
for kernel, signature in (
    (finish.forward, (part, table, c, c, c, c, i, t.float64, i, mass)),
    (finish.backward, (part, table, c, c, table, i, i, mass)),
):
    found["float64", (), kernel.py_func.__name__] = cuda.compile_ptx(kernel.py_func, signature, cc=(8, 0))[0]
pickle.dump(found, open(sys.argv[1], "wb"))
"""


@by_numba_cuda
def test_ptx(tmp_path):
    """All compile for a real GPU, keep to registers, and read weights where they count, eight at a time."""
    found = compiled_by(COMPILE, tmp_path)
    assert len(found) == 9 * 4 + 2
    for (element, how, name), text in found.items():
        assert not re.search(r"\.local|\bcall\b|\batom\b|\bred\b|\bshfl\b", text), (element, how, name)
        if not how:
            continue
        _, residual, _, sets, weights, _, constant, _ = how
        bodies = [body for body in loops(text) if any("ld.global" in line for line in body)]
        assert not any(re.match(r"(div|rem)\.[su]\d", line) for body in bodies for line in body), (element, how, name)
        loads = max(sum("ld.global" in line for line in body) for body in bodies)
        read = {"forward_sums": 1, "forward_map": 1 + residual}.get(name, 2 + residual)  # x, dy, r
        read += sets + (name in ("forward_sums", "backward_map") * (not constant) or weights != "normalize")
        assert loads == VALUES * read, (element, how, name)
