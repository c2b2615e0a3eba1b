"""The numba.cuda kernels: in Numba's simulator, in a process of its own (numba_cuda_run), and as PTX for real GPUs."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numba_cuda_cases import CASES, FLOAT64, Case, filled, inputs, window

from fastbn import reference

pytest.importorskip("numba.cuda")

from fastbn.kernels import numba_cuda
from fastbn.kernels.numba_cuda.plan import VALUES, Sizes, plan_of

HERE = Path(__file__).parent
cases = pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])

# Numba's own CUDA target compiles the plain kernels for as many GPUs; these take a minute and a half.
by_numba_cuda = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="kernels with extras are compiled by numba-cuda alone"
)


def child(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def compiled_by(code, folder):
    """What the code pickles at the path that it is given, in a process of its own; without NVVM the test is skipped."""
    path = folder / "ptx"
    process = child("-c", code, str(path))
    if process.returncode and re.search(r"NvvmSupportError|libNVVM|libnvvm|nvrtc|CUDA_HOME", process.stderr):
        pytest.skip("no NVVM: " + process.stderr.strip().splitlines()[-1])
    assert process.returncode == 0, process.stderr
    return pickle.loads(path.read_bytes())


def simulate(factory, *which):
    """What the kernels make of every case; Numba decides at import whether it simulates."""
    path = factory.mktemp("numba_cuda") / "results"
    process = child(str(HERE / "numba_cuda_run.py"), str(path), *which, NUMBA_ENABLE_CUDASIM="1")
    assert process.returncode == 0, process.stderr
    return pickle.loads(path.read_bytes())


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    return simulate(tmp_path_factory)


def results(simulated, index):
    found = simulated[str(index)]
    if isinstance(found, Exception):
        raise found
    return found


class Exact:
    """The reference's results for a case, and what they are made of."""

    def __init__(self, case: Case) -> None:
        data = inputs(case)
        self.x, self.dy = (a.astype(np.float64) for a in (data.x, data.dy))
        gamma, beta, mean, var = data.given
        frozen = None if mean is None else (mean, var)
        with np.errstate(all="ignore"):
            self.y, saved = reference.forward(self.x, gamma, beta, eps=case.eps, frozen=frozen)
            self.dx, self.dgamma, self.dbeta = reference.backward(self.dy, saved)
            ones = np.ones((1, case.shape[1], 1))
            self.gamma = ones if gamma is None else gamma.reshape(ones.shape).astype(np.float64)
            self.beta = 0 * ones if beta is None else beta.reshape(ones.shape).astype(np.float64)
            self.mean = self.x.mean((0, 2), keepdims=True)
            self.mean += (self.x - self.mean).mean((0, 2), keepdims=True)
            self.var = ((self.x - self.mean) ** 2).mean((0, 2), keepdims=True)
            if mean is not None:
                self.mean, self.var = (a.reshape(ones.shape).astype(np.float64) for a in (mean, var))
            self.invstd = 1 / np.sqrt(self.var + case.eps)
            self.xhat = (self.x - self.mean) * self.invstd
            self.g = self.dy if case.frozen else self.dy - self.dy.mean((0, 2), keepdims=True)
            self.covariance = np.zeros_like(ones) if case.frozen else (self.g * self.xhat).mean((0, 2), keepdims=True)
            self.values = case.shape[0] * case.shape[2]


def steps(case: Case) -> tuple[float, float, float]:
    """eps of the result, eps of the arithmetic, and half of the result's smallest step."""
    info = ml_dtypes.finfo(case.dtype)
    inner = np.finfo(np.float64 if case.dtype == FLOAT64 else np.float32)
    # The reference itself is in float64, with roundings of its own.
    return float(info.eps), float(inner.eps) * (4 if case.dtype == FLOAT64 else 1), float(info.smallest_subnormal) / 2


def compare(got, exact, bound):
    """Within the bound; finite where the reference is, rounded to the type of `got`, and nowhere else."""
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.asarray(exact).astype(got.dtype))
    got = got.astype(np.float64)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    with np.errstate(all="ignore"):
        excess = (np.abs(got - exact) / np.broadcast_to(bound, exact.shape))[finite]
    assert excess.size == 0 or np.nanmax(excess) <= 1, f"{np.nanmax(excess):.2f} times the bound"


def own(memory, case, layout):
    """The written view, after a look at the memory around it, which must hold NaN still."""
    seen = window(memory, layout, case.shape)
    around = memory.copy()
    window(around, layout, case.shape)[...] = np.nan
    assert np.isnan(around.astype(np.float64)).all(), "written outside of the view"
    return seen


@cases
def test_forward(simulated, index):
    case, exact, got = CASES[index], Exact(CASES[index]), results(simulated, index)
    result, inner, floor = steps(case)
    layout = case.x if case.in_place else case.y or case.x
    y = own(got["y"], case, layout)
    if "y" in case.want.split():
        # Rounded: x - hi, - lo, scale, each half an eps of y - beta; the sum; the variance's sums, an eps of y - beta;
        # the mean's, an eps of a deviation; then y to its own type.
        with np.errstate(all="ignore"):
            bound = inner * (3 * np.abs(exact.y - exact.beta) + np.abs(exact.y) / 2 + np.abs(exact.gamma))
            bound = bound + result / 2 * np.abs(exact.y) + floor
        compare(y, exact.y, bound)
    else:
        start = inputs(case).x if case.in_place else np.full(case.shape, np.nan, case.dtype)
        np.testing.assert_array_equal(y, start)
    if case.spoil == "one value" and not case.frozen:
        beta = inputs(case).given[1]
        np.testing.assert_array_equal(y[:, 1], np.full_like(y[:, 1], beta[1]))


@cases
def test_table(simulated, index):
    case, exact, got = CASES[index], Exact(CASES[index]), results(simulated, index)
    inner = steps(case)[1]
    hi, lo, var, invstd, gamma, beta = got["table"][:, None, :, None]
    with np.errstate(all="ignore"):
        std = np.sqrt(exact.var)
        mean_error = (hi - exact.mean) + lo
        # Sums of eight deviations are rounded to `inner`, and squares of them; float64 holds the reference's mean.
        compare(mean_error, 0 * exact.mean, inner * std + 2.0**-52 * np.abs(exact.mean) + 1e-300)
        compare(var, exact.var, 2 * inner * exact.var + 1e-300)
        compare(invstd, exact.invstd, inner * exact.invstd)
    compare(gamma, exact.gamma, 1e-300)
    compare(beta, exact.beta, 1e-300)


@cases
def test_backward(simulated, index):
    case, exact, got = CASES[index], Exact(CASES[index]), results(simulated, index)
    result, inner, floor = steps(case)
    layout = {"x": case.x, "dy": case.dy or case.x}.get(case.in_place, case.y or case.x)
    dx = own(got["dx"], case, layout)
    if "dx" in case.want.split():
        with np.errstate(all="ignore"):
            a = np.abs(exact.gamma * exact.invstd)
            spread = exact.dy.std((0, 2), keepdims=True)
            terms = a * (np.abs(exact.g) + np.abs(exact.xhat * exact.covariance))
            # As in y, for each of the two terms; the sums of dy and of the products, an eps of their spread.
            bound = inner * (3 * terms + np.abs(exact.dx) / 2 + a * spread * (1 + np.abs(exact.xhat)))
            bound = bound + result / 2 * np.abs(exact.dx) + floor
        compare(dx, exact.dx, bound)
    elif not case.in_place:
        assert np.isnan(dx.astype(np.float64)).all()
    if case.spoil == "one value of dy":
        np.testing.assert_array_equal(dx[:, 1], np.zeros_like(dx[:, 1]))


@cases
def test_gradients_of_parameters(simulated, index):
    case, exact, got = CASES[index], Exact(CASES[index]), results(simulated, index)
    inner = steps(case)[1]
    numbers = np.float64 if case.dtype == FLOAT64 else np.float32
    with np.errstate(all="ignore"):
        # Products, and sums of eight of them, are rounded; then the result is. The reference doesn't centre dy.
        centred = exact.dy - exact.dy.mean((0, 2), keepdims=True)
        bounds = {
            "dgamma": inner * (np.abs(exact.g * exact.xhat).sum((0, 2)) + np.abs(exact.dgamma))
            + 2.0**-52 * np.abs(exact.dy * exact.xhat).sum((0, 2)),
            "dbeta": inner * (np.abs(centred).sum((0, 2)) + np.abs(exact.dbeta)),
        }
    for name, bound in bounds.items():
        assert got[name].dtype == numbers
        if name in case.want.split():
            compare(got[name], getattr(exact, name), bound + 1e-45)
        else:
            assert np.isnan(got[name]).all()


def test_the_same_bits_again(simulated):
    """Threads of the simulator come in another order each time."""
    assert len(simulated["again"]) == 3
    for index, again in zip(range(0, 12, 4), simulated["again"], strict=True):
        for name, array in results(simulated, index).items():
            assert array.tobytes() == again[name].tobytes()


def test_the_documented_kernel(simulated):
    """Building blocks in a user's own kernels; the first is the docstring's, by its text."""
    x, dy, (gamma, beta, y, dx) = simulated["user"]
    exact, saved = reference.forward(x, gamma, beta, axis=0)
    exact_dx = reference.backward(dy, saved)[0]
    eps = np.finfo(np.float32).eps  # float64 throughout, rounded once
    compare(y, exact, eps * np.maximum(1, np.abs(exact)) * 0.51)
    compare(dx, exact_dx, eps * np.maximum(1, np.abs(exact_dx)) * 0.51)


def test_bfloat16(simulated):
    x, y, z = simulated["conversions"].values()
    with np.errstate(invalid="ignore"):  # NaN that signals
        wanted = x.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.isnan(z), np.isnan(x))
    np.testing.assert_array_equal(y.view(np.uint16)[~np.isnan(x)], wanted.view(np.uint16)[~np.isnan(x)])
    np.testing.assert_array_equal(z, wanted.astype(np.float32))


def test_one_tree_after_another(simulated):
    """A thread that is ahead doesn't overwrite what another one has still to read."""
    for k, found in enumerate(simulated["trees"]):
        lanes = 1 << k % 4
        means = np.resize(np.arange(8.0).reshape(-1, lanes).mean(0), 8)
        np.testing.assert_array_equal(found, [means + 10 * k, means - 10 * k])


def test_copies(simulated):
    assert len(simulated["copies"]) == 8
    for wanted, got in simulated["copies"]:
        np.testing.assert_array_equal(got, wanted)


def test_streams_have_numbers(simulated):
    """Workspaces are kept by stream; those of cuda.core can't be made an int."""
    assert simulated["streams"] == [0, 42, 4711]


def test_every_case_has_memory_of_its_own_around_it():
    """The windows of the cases do leave NaN to look at."""
    for case in CASES:
        if case.x.margin:
            memory = filled(case.x, case.shape, case.dtype, inputs(case).x)
            assert np.isnan(memory.astype(np.float64)).sum() > np.isnan(inputs(case).x.astype(np.float64)).sum()


def test_element_views():
    names = {dtype: numba_cuda.element_view(np.dtype(dtype)) for dtype in ("f2", "f4", "f8", "i2", "c8")}
    assert names == {"f2": np.float16, "f4": np.float32, "f8": np.float64, "i2": None, "c8": None}
    assert numba_cuda.element_view(np.dtype(ml_dtypes.bfloat16)) == np.int16


def test_arrays_that_cannot_be_read(simulated):
    """On a GPU, reading off the grid of elements would spoil the process's CUDA context."""
    misaligned, stride = simulated["refusals"]
    assert re.fullmatch("an array of float32 at address 0x[0-9a-f]*[26ae]: expected a multiple of 4", misaligned)
    assert stride == "strides of (12, 6, 4) bytes: expected multiples of the 4 bytes of an element"


def test_plans_cover_every_value_once(rng):
    """By the kernels' own rule of who takes what, for random shapes and sizes; addresses are those of the view."""
    for _ in range(300):
        shape = tuple(int(n) for n in rng.integers(1, [7, 40, 60]))
        order = rng.permutation(3)
        memory = np.arange(np.prod(shape)).reshape([shape[a] for a in order]).transpose(np.argsort(order))
        memory = memory[tuple(slice(None, None, int(s)) for s in rng.choice([-2, -1, 1, 2], 3))]
        threads = 2 ** int(rng.integers(0, 8))
        sizes = Sizes(threads, 2 ** int(rng.integers(0, 6)), min(threads, 8), int(rng.integers(1, 50)), 64)
        plan = plan_of(memory.shape, 8, (memory.strides,), sizes)
        channels, inner, turn, values, share, pieces, lanes = plan.cut
        origin, outer_stride, channel_stride, inner_stride, step, over = plan.places[0]
        assert plan.threads <= threads
        assert plan.threads & (plan.threads - 1) == 0
        block, t = np.divmod(np.arange(plan.grid * plan.threads), plan.threads)
        c, piece = block // pieces * lanes + t % lanes, block % pieces
        j, end = piece * share + t // lanes, np.minimum(values, (piece + 1) * share)
        i, at = j % inner, origin + j // inner * outer_stride + c * channel_stride + j % inner * inner_stride
        flat = np.arange(memory.min(), memory.max() + 1)  # what lies between the lowest address and the highest
        seen = []
        while (here := (j < end) & (c < channels)).any():
            seen.append(np.stack([c[here], flat[at[here]]]))
            j, i = j + plan.threads // lanes, i + turn
            at = at + np.where(i >= inner, over, step)
            i = np.where(i >= inner, i - inner, i)
        c, found = np.concatenate(seen, 1)
        assert sorted(found) == sorted(memory.flat)
        assert np.isin(found[c == 0], memory[:, 0]).all()


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [((1, 100_000, 1), 1), ((8, 100_000, 64), 1), ((2**21, 1, 2**11), 4096), ((70_000, 3, 1), 100), ((3, 1, 1), 1)],
    ids=str,
)
def test_plans_of_large_shapes(shape, blocks):
    """More than 65,535 channels, pieces or rows, and more than 2^31 values; no thread adds more than it should."""
    strides = (shape[1] * shape[2] * 4, shape[2] * 4, 4)
    plan = plan_of(shape, 4, (strides,), Sizes())
    assert blocks <= plan.grid < 2**31
    assert max(plan.places[0]) < 2**63
    rows = plan.threads // plan.cut[6]
    assert plan.cut[4] <= rows * max(VALUES, 512)
    assert (plan.pieces - 1) * plan.cut[4] < plan.cut[3] <= plan.pieces * plan.cut[4]
    assert plan.finish[0] * plan.finish[2] >= shape[1]


CAPABILITIES = [(7, 5), (8, 0), (9, 0)]
COMPILE = """
import pickle, sys, types
from numba import cuda, types as t
from numba.cuda import dispatcher
# Device functions ask for the capability of the current device, of which there may be none.
dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=(7, 5))
from fastbn.kernels.numba_cuda import arrays, finish as m, kernels as k

place, cut, table, part = t.UniTuple(t.int64, 6), t.UniTuple(t.int64, 7), t.float64[:, ::1], t.float64[:, :, ::1]
c, i, f, none = t.float32[::1], t.int64, t.float64, t.Tuple(())
finish = m.finishes_of(False)
wanted = [
    (finish.forward, (part, table, c, c, c, c, i, f, i, none)),
    (finish.backward, (part, table, c, c, table, i, i, none)),
    (m.invert_table, (table, table)),
    (arrays.copy_all, (c, t.UniTuple(i, 4), c, t.UniTuple(i, 4), t.UniTuple(i, 3), i)),
]
for name, element in (("float32", t.float32), ("float64", t.float64), ("float16", t.float16), ("int16", t.int16)):
    x, run = element[::1], k.kernels_of(name)
    wanted += [
        (run.forward_sums, (x, place, cut, part, none)),
        (run.forward_map, (x, place, x, place, cut, table, t.boolean, none)),
        (run.backward_sums, (x, place, x, place, cut, table, part, none)),
        (run.backward_map, (x, place, x, place, x, place, cut, table, table, none)),
    ]
found = {}
for kernel, signature in wanted:
    for cc in %s:
        ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=cc)
        found[cc, kernel.py_func.__name__, str(signature[0].dtype)] = ptx
pickle.dump(found, open(sys.argv[1], "wb"))
"""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """PTX by capability, kernel and type of its first array."""
    return compiled_by(COMPILE % CAPABILITIES, tmp_path_factory.mktemp("numba_cuda"))


def loops(ptx):
    """The instructions from each label to the branches back to it."""
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {line[:-1]: number for number, line in enumerate(lines) if line.endswith(":")}
    for number, line in enumerate(lines):
        target = re.search(r"\bbra(?:\.uni)?\s+(\S+);", line)
        if target and labels.get(target[1], number) < number:
            yield lines[labels[target[1]] : number]


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_ptx(compiled, capability):
    """Every kernel compiles for real GPUs; loops over data divide nothing, and keep their eight values in registers."""
    kernels = {key[1:]: text for key, text in compiled.items() if key[0] == capability}
    assert len(kernels) == 4 + 4 * 4
    for (name, element), text in kernels.items():
        assert ".target sm_{}{}".format(*capability) in text
        assert not re.search(r"\.local|\bcall\b|\batom\b|\bred\b|\bshfl\b", text), name
        if name == "invert_table":  # one channel a thread
            continue
        bodies = [body for body in loops(text) if any("ld.global" in line for line in body)]
        assert bodies, name
        if name != "copy_all":  # which finds its place by division
            divisions = [line for body in bodies for line in body if re.match(r"(div|rem)\.[su]\d", line)]
            assert divisions == [], name
        if "sums" in name or "map" in name:
            assert not any(line.startswith("div") for body in bodies for line in body), name
            most = max(sum("ld.global" in line for line in body) for body in bodies)
            assert most == VALUES * (1 + ("backward" in name)), f"{name} of {element}: not eight loads at a time"


def test_the_import_needs_no_driver_and_the_cpu_no_import():
    """`fastbn` alone doesn't import numba.cuda; the backend imports where there is no GPU."""
    if importlib.util.find_spec("numba.cuda") is None:
        pytest.skip("this Numba has no CUDA target")
    code = "import fastbn, sys; assert 'numba.cuda' not in sys.modules; import fastbn.kernels.numba_cuda; print('ok')"
    process = child("-c", code)
    assert process.stdout.strip() == "ok", process.stderr


def test_small_grids_are_no_cause_for_warnings(monkeypatch):
    """Nothing is filtered, so that other threads' warnings stay what they are; users' own launches warn as ever."""
    dispatcher = pytest.importorskip("numba.cuda.dispatcher", reason="a real target has it, not the simulator")
    from fastbn.kernels.numba_cuda import arrays

    warned, grids = [], []
    monkeypatch.setattr(dispatcher, "warn", lambda warning, *_: warned.append(str(warning)))
    monkeypatch.setattr(
        dispatcher.CUDADispatcher,
        "call",  # the configuration, or in older ones its parts
        lambda _self, args, config, *_: grids.append((getattr(config, "griddim", config), args)),
    )
    kernel, users = (arrays.cuda.jit(lambda: None) for _ in range(2))
    filters = warnings.filters[:]
    for grid in (1, 64, 127, 128, 1000):
        arrays.launch(kernel, grid, 32, 0, (grid,))
    assert warned == []
    assert grids == [((grid, 1, 1), (grid,)) for grid in (1, 64, 127, 128, 1000)]
    assert warnings.filters == filters
    users[64, 32]()
    assert len(warned) == 1
    assert "Grid size 64 " in warned[0]
