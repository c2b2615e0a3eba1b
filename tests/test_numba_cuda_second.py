"""Second order by the numba.cuda kernels: in Numba's simulator beside the reference, and as PTX."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
from fastbn.kernels import reference
from numba_cuda_cases import FLOAT64, filled
from numba_cuda_second import SECOND_CASES, SecondCase, layouts, second_inputs

from fastbn.extras import Extras

pytest.importorskip("numba.cuda")

from fastbn.kernels.numba_cuda.plan import VALUES
from test_numba_cuda import HERE, by_numba_cuda, child, compare, compiled_by, loops, own, results, steps

cases = pytest.mark.parametrize("index", range(len(SECOND_CASES)), ids=[case.name for case in SECOND_CASES])


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    path = tmp_path_factory.mktemp("numba_cuda") / "results"
    process = child(str(HERE / "numba_cuda_second.py"), str(path), NUMBA_ENABLE_CUDASIM="1")
    assert process.returncode == 0, process.stderr
    return pickle.loads(path.read_bytes())


def exact_of(case: SecondCase):
    """The reference's results for a case, and bounds: of float64 roundings of the terms, and of a result's own."""
    data = second_inputs(case)
    u, g, x = (data.arrays[n].astype(FLOAT64) if n in data.arrays else None for n in ("u", "g", "x"))
    p, q = (data.numbers.get(n, np.zeros(case.shape[1])).astype(FLOAT64) for n in ("p", "q"))
    r, z = np.zeros((2, *case.shape))
    more = Extras(weights=data.weights, masked=case.masked, order=data.order, starts=data.starts)
    ggamma = reference.second(u, g, x, r, z, data.table, np.stack([p, q]), case.frozen, True, more).ravel()

    def size(a):
        """Of what is added up: values, or, where all means drop out, deviations of a channel and set."""
        a = np.zeros(case.shape) if a is None else np.where(np.isfinite(a), a, 0)
        if not (case.weights or case.frozen or case.sets):
            a = a - a.mean((0, 2), keepdims=True)
        return max(1.0, float(np.abs(a).max()))

    hi, lo, _, s, gamma, _ = np.nan_to_num(data.table, posinf=0, neginf=0)
    widest = max(float(s.max()), 1e-300)
    d = np.zeros(case.shape) if x is None else np.nan_to_num(x, nan=0, posinf=0, neginf=0)
    around = [np.abs(d - (hi + lo).reshape(-1, case.shape[1], 1)[k]).max() for k in range(max(1, len(case.sets)))]
    xhat = max(1.0, widest * float(max(around)))
    scale, p, q = (max(1.0, float(np.abs(a).max())) for a in (gamma, p, q))
    values = case.shape[0] * case.shape[2]
    u, g, weighing = size(u), size(g), 1 if data.weights is None else 4
    of_r = scale * widest * u * (1 + xhat**2) + p * xhat + q
    of_z = scale * widest**2 * g * u * xhat**3 + p * widest * g * (1 + xhat**2)
    terms = {"r": of_r, "z": of_z, "ggamma": widest * values * g * u * xhat**2}
    result, _, floor = steps(case)
    numbers = 2.0**-52 if case.dtype == FLOAT64 else 2.0**-23
    found = {}
    for name, value in (("r", r), ("z", z), ("ggamma", ggamma)):
        unit = numbers if name == "ggamma" else result
        unit = 0.5 * unit + (2.0**-24 if case.dtype.itemsize == 2 else 0)  # halves are rounded to float32 first
        with np.errstate(all="ignore"):
            found[name] = value, unit * np.abs(value) + 16 * weighing * 2.0**-53 * terms[name] + floor
    return found


@cases
def test_against_the_reference(simulated, index):
    case, got = SECOND_CASES[index], results(simulated, index)
    exact, places, want = exact_of(case), layouts(case), case.want.split()
    over = dict(case.over)
    for name in ("r", "z"):
        values = own(got[name], case, places[over.get(name, name)])
        if name in want:
            compare(values, *exact[name])
        else:
            assert np.isnan(values.astype(FLOAT64)).all()
    if "ggamma" in want:
        compare(got["ggamma"], *exact["ggamma"])
    else:
        assert np.isnan(got["ggamma"]).all()
    data = second_inputs(case)
    for name in {*data.arrays} - {*over.values()}:
        before = filled(places[name], case.shape, case.dtype, data.arrays[name])
        assert got[name].tobytes() == before.tobytes(), name


def test_the_same_bits_again(simulated):
    """Threads of the simulator come in another order each time."""
    for index, again in zip(range(0, 20, 4), simulated["again"], strict=True):
        for name, array in results(simulated, index).items():
            assert array.tobytes() == again[name].tobytes()


def test_cases_have_what_they_are_about():
    for case in SECOND_CASES:
        data = second_inputs(case)
        if case.weights not in ("", "none"):
            assert (data.weights != 0).any(), case.name
            assert (data.weights == 0).any() or data.weights.size < 10, case.name
        if not case.spoil and "r" in case.want:
            assert np.ptp(exact_of(case)["r"][0]) > 0.1 or case.weights == "none" or case.shape[2] < 3, case.name


COMPILE = """
import pickle, sys, types
from numba import cuda, types as t
from numba.cuda import dispatcher
dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=(7, 5))
from fastbn.kernels.numba_cuda import kernels as k, second as m

place, none, i = t.UniTuple(t.int64, 6), t.Tuple(()), t.int64
table, part, c = t.float64[:, ::1], t.float64[:, :, ::1], t.float32[::1]
both, one = m.There(True, True, True, True, True), m.There(True, False, True, True, False)
found = {}
for name, e, how, there, frozen in (
    ("float32", t.float32, k.PLAIN, both, False),
    ("float16", t.float16, k.How(sets=True, weights="keep"), both, False),
    ("float64", t.float64, k.How(sets=True), one, True),
):
    x, by_weights = e[::1], how.weights != "" and not frozen
    cut, more = t.UniTuple(i, 9 if how.tracked else 7), none
    if how != k.PLAIN:
        weights = (c, place) if how.weights else (none, none)
        more = t.NamedTuple([i[::1] if how.sets else none, *(none,) * 4, *weights, t.float64], k.More)
    reads = sum(there[:3]) + how.sets + (how.weights != "")
    for kernel, arrays, last in (
        (m.sums_of(name, how, by_weights, there._replace(r=False, z=False)), 3, part),
        (m.map_of(name, how, frozen, there), 5, table),
    )[frozen:]:
        ptx, _ = cuda.compile_ptx(kernel.py_func, ((x, place) * arrays + (cut, table, last, more)), cc=(8, 0))
        found[name, kernel.py_func.__name__] = ptx, reads
finish = m.finish_of(True).py_func
found["", "finish"] = cuda.compile_ptx(finish, (part, table, c, c, c, table, i, i), cc=(8, 0))[0], 0
pickle.dump(found, open(sys.argv[1], "wb"))
"""


@by_numba_cuda
def test_ptx(tmp_path):
    """All compile for a real GPU, keep to registers, divide nothing in loops over data, and read eight at a time."""
    found = compiled_by(COMPILE, tmp_path)
    assert len(found) == 2 + 2 + 1 + 1
    for (element, name), (text, reads) in found.items():
        assert not re.search(r"\.local|\bcall\b|\batom\b|\bred\b|\bshfl\b", text), (element, name)
        bodies = [body for body in loops(text) if any("ld.global" in line for line in body)]
        assert bodies, (element, name)
        if reads:
            assert not any(re.match(r"(div|rem)\.", line) for body in bodies for line in body), (element, name)
            most = max(sum("ld.global" in line for line in body) for body in bodies)
            assert most == VALUES * reads, (element, name)
