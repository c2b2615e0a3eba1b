"""The CuPy launcher up to the launch: a double of the driver takes the launches, and the emulator carries them out."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import threading
import warnings

import numpy as np
import pytest

pytest.importorskip("cupy", reason="CuPy isn't installed")

import cupy
from cupy.cuda import nvrtc
from cupy_double import MOST, Double, Refused, emulation, small_devices
from emulator import library, planner
from fastbn.kernels import reference
from fastbn.kernels.cuda import compile as compiler
from fastbn.kernels.cuda import launch as cuda

import fastbn
from fastbn.extras import Extras

NONE = (None, None, None, None)
EPS = 1e-3


@pytest.fixture
def gpu(monkeypatch):
    """Two devices, and launches that are recorded only."""
    double = Double(monkeypatch)
    yield double
    double.close()


def arrays(gpu, rng, shape=(4, 6, 100), dtype=np.float32):
    """x, y and table."""
    x = gpu.array(rng.normal(3, 2, shape).astype(dtype))
    return x, cupy.empty(shape, dtype), cupy.empty((6, shape[1]))


def per_channel(gpu, rng, C, dtype=np.float32):
    return gpu.array(rng.uniform(0.5, 1.5, C).astype(dtype))


# ---- what is launched


def test_the_argument_has_the_addresses_of_the_arrays(gpu, rng):
    x, y, table = arrays(gpu, rng)
    gamma, beta, mean, var = (per_channel(gpu, rng, 6) for _ in range(4))
    cuda.forward(x, y, table, (gamma, beta, mean, var), EPS)
    dy, dx = gpu.array(rng.normal(size=x.shape).astype(np.float32)), cupy.empty_like(x)
    dgamma, dbeta = cupy.empty(6, np.float32), cupy.empty(6, np.float32)
    cuda.backward(dy, x, dx, table, dgamma, dbeta, False)
    forward, backward = gpu.started
    address = {name: array.data.ptr for name, array in locals().items() if isinstance(array, cupy.ndarray)}
    names = ("x", "table", "gamma", "beta", "mean", "var")
    assert forward.pointers._asdict() == planner.Pointers(y=address["y"], **{n: address[n] for n in names})._asdict()
    names = ("x", "dy", "table", "dgamma", "dbeta")
    assert backward.pointers == planner.Pointers(y=address["dx"], **{n: address[n] for n in names})


def test_the_argument_is_what_the_planner_packs(gpu, rng):
    x, y, table = arrays(gpu, rng)
    cuda.forward(x, y, table, NONE, EPS)
    view = planner.View(x.shape, x.strides, y.strides, None, 4)
    plan = planner.plan(view, "f", False, cuda.device(0))
    (launch,) = plan.launches
    (started,) = gpu.started
    assert started.argument == planner.pack(plan, started.pointers, EPS)
    assert started[:7] == tuple(launch.__dict__.values())


@pytest.mark.parametrize(("dtype", "letter"), [("f", "float"), ("d", "double"), ("e", "f16"), ("h", "bf16")])
def test_each_element_type_has_its_kernel(gpu, rng, dtype, letter):
    x, y, table = arrays(gpu, rng, dtype=dtype)
    cuda.forward(x, y, table, NONE, EPS)
    assert f"bn<{'fastbn::' * letter.endswith('16')}{letter}, " in gpu.started[0].expression


@pytest.mark.parametrize(
    ("dtype", "seen"), [("f4", "f4"), ("f8", "f8"), ("f2", "f2"), ("bfloat16", "i2"), ("i4", None), ("u2", None)]
)
def test_the_elements_that_kernels_know(dtype, seen):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    given = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert cuda.element_view(given) == (None if seen is None else np.dtype(seen))


def test_the_package_is_the_launcher_and_imports_without_it():
    """The planner is used where CuPy isn't installed."""
    import fastbn.kernels.cuda as package

    assert package.forward is cuda.forward
    assert package.element_view is cuda.element_view
    with pytest.raises(AttributeError, match="no attribute 'backwards'"):
        package.backwards  # noqa: B018
    spec = importlib.util.find_spec("fastbn.kernels.cuda")
    modules = [spec, *(importlib.util.find_spec(f"{spec.name}.{name}") for name in ("walk", "launches", "plan"))]
    assert not any("import cupy" in m.loader.get_source(m.name) for m in modules)


def test_parameters_in_float64_are_read_as_such(gpu, rng):
    x, y, table = arrays(gpu, rng)
    for dtype, wide in ((np.float32, False), (np.float64, True)):
        gamma = per_channel(gpu, rng, 6, dtype)
        cuda.forward(x, y, table, (gamma, None, None, None), EPS)
        assert planner.HEAD.unpack_from(gpu.started[-1].argument)[-1] == wide


def test_parameters_of_both_types_become_float64(gpu, rng, monkeypatch):
    """They share a flag; the conversion is CuPy's, and doubled."""
    x, y, table = arrays(gpu, rng)
    gamma, beta = per_channel(gpu, rng, 6), per_channel(gpu, rng, 6, np.float64)
    monkeypatch.setattr(cuda, "_wide", lambda a: gpu.array(gpu.host(a).astype(np.float64)))
    cuda.forward(x, y, table, (gamma, beta, None, None), EPS)
    pointers = gpu.started[0].pointers
    assert pointers.gamma != gamma.data.ptr
    assert planner.HEAD.unpack_from(gpu.started[0].argument)[-1] == 1


def test_frozen_backward_without_sums_reads_only_dy(gpu, rng):
    dy, dx, table = arrays(gpu, rng)
    x = gpu.array(rng.normal(size=dy.shape).astype(np.float32))
    cuda.backward(dy, x, dx, table, None, None, True)
    assert gpu.started[0].pointers.x == 0
    assert gpu.started[0].way == "APPLY"
    dbeta = cupy.empty(6, np.float32)
    cuda.backward(dy, dy, dx, table, None, dbeta, True)  # x is dy where x doesn't count
    assert gpu.started[1].pointers.x == dy.data.ptr
    assert gpu.started[1].way != "APPLY"


def test_frozen_and_training_are_told_apart(gpu, rng):
    """On the same arrays."""
    dy, dx, table = arrays(gpu, rng)
    dbeta = cupy.empty(6, np.float32)
    for frozen in (False, True):
        cuda.backward(dy, dy, dx, table, None, dbeta, frozen)
    flags = [planner.TAIL.unpack(s.argument[planner.HEAD.size :])[-14] for s in gpu.started]  # before four divisors
    assert flags == [0, 1]


def test_forced_ways(gpu, rng):
    x, y, table = arrays(gpu, rng, (8, 6, 4096))
    found = {}
    for way in ("BLOCK", "CLUSTER", "GRID", "SPLIT"):
        gpu.started.clear()
        with cuda.planned(way=way):
            cuda.forward(x, y, table, NONE, EPS)
        found[way] = [(s.way, s.cooperative) for s in gpu.started]
    assert found == {
        "BLOCK": [("BLOCK", False)],
        "CLUSTER": [("CLUSTER", False)],
        "GRID": [("GRID", True)],
        "SPLIT": [("STATS", False), ("APPLY", False)],
    }
    assert cuda._choice.get() == ()


def test_stable_plans_are_those_of_the_default_device(gpu, rng):
    x, y, table = arrays(gpu, rng, (8, 6, 4096))
    gpu.devices[0] |= {"multiProcessorCount": 20, "major": 8}
    with cuda.planned(stable=True):
        cuda.forward(x, y, table, NONE, EPS)
    view = planner.View(x.shape, x.strides, y.strides, None, 4)
    wanted = planner.plan(view, "f", False, cuda.device(0), stable=True)
    assert gpu.started[0].argument == planner.pack(wanted, gpu.started[0].pointers, EPS)
    assert {s.way for s in gpu.started} != {"CLUSTER"}


# ---- falling back


def test_a_cooperative_grid_that_does_not_fit_is_split(gpu, rng, caplog):
    """CuPy's own launch would make it smaller, with a warning, and the kernel would wait for ever."""
    x, y, table = arrays(gpu, rng, (8, 6, 4096))
    gpu.resident = 0
    with cuda.planned(way="GRID"), warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda.forward(x, y, table, NONE, EPS)
    assert [s.way for s in gpu.started] == ["STATS", "APPLY"]
    assert caplog.text == "", "asked first, not refused"


def test_a_refused_cluster_is_split_from_then_on(gpu, rng, caplog):
    """A slice of a GPU may have too few multiprocessors for it, which no attribute tells."""
    x, y, table = arrays(gpu, rng, (8, 6, 4096))
    gpu.refuse_clusters = True
    with cuda.planned(way="CLUSTER"):
        cuda.forward(x, y, table, NONE, EPS)
        assert [s.way for s in gpu.started] == ["STATS", "APPLY"]
        assert "CUDA_ERROR_INVALID_CLUSTER_SIZE: CLUSTER is refused" in caplog.text
        caplog.clear()
        cuda.forward(x, y, table, NONE, EPS)
    assert [s.way for s in gpu.started] == ["STATS", "APPLY"] * 2
    assert caplog.text == ""


def test_another_refusal_is_an_error(gpu, rng, monkeypatch):
    x, y, table = arrays(gpu, rng)
    monkeypatch.setattr(gpu, "launchKernel", None)

    def refuse(*_):
        raise Refused("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(cuda.driver, "launchKernel", refuse)
    with cuda.planned(way="BLOCK"), pytest.raises(Refused, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        cuda.forward(x, y, table, NONE, EPS)


def test_no_clusters_before_hopper(gpu, rng):
    gpu.devices[0] |= {"major": 8}
    assert cuda.device(0).cluster == 1
    x, y, table = arrays(gpu, rng, (8, 6, 4096))
    cuda.forward(x, y, table, NONE, EPS)
    assert gpu.started[0].cluster == 1


def test_strides_that_no_kernel_walks_are_copied_once(gpu, rng):
    x = gpu.array(rng.normal(size=(3, 4, 20)).astype(np.float32))[:, :, ::2]
    y = cupy.empty((3, 4, 20), np.float32)[:, :, ::2]
    table = cupy.empty((6, 4))
    for _ in range(2):
        gpu.copied.clear()
        cuda.forward(x, y, table, NONE, EPS)
        assert gpu.copied == [x.shape, y.shape]
        assert gpu.started[-1].pointers.x not in (0, x.data.ptr)
    gpu.copied.clear()
    cuda.forward(x, None, table, NONE, EPS)
    assert gpu.copied == [x.shape]


# ---- devices, streams, threads


def test_the_arrays_device_is_used_and_then_left(gpu, rng):
    with cupy.cuda.Device(1):
        x, y, table = arrays(gpu, rng)
    gpu.stream = 5
    cuda.forward(x, y, table, NONE, EPS)
    assert (gpu.started[0].device, gpu.started[0].stream) == (1, 1005)
    assert gpu.current == 0


def test_each_device_has_its_kernels_and_facts(gpu, rng):
    gpu.devices[1] |= {"multiProcessorCount": 80, "major": 8, "minor": 6}
    for number in (0, 1, 0, 1):
        with cupy.cuda.Device(number):
            cuda.forward(*arrays(gpu, rng), NONE, EPS)
    assert [s.device for s in gpu.started] == [0, 1, 0, 1]
    assert [capability for _, _, capability in gpu.compiled] == [(9, 0), (8, 6)]
    assert (cuda.device(0).sms, cuda.device(1).sms) == (132, 80)


def test_arrays_on_two_devices_are_an_error(gpu, rng):
    x, _, table = arrays(gpu, rng)
    with cupy.cuda.Device(1):
        y = cupy.empty(x.shape, x.dtype)
    with pytest.raises(ValueError, match="arrays on devices 1 and 0 in one call"):
        cuda.forward(x, y, table, NONE, EPS)
    assert gpu.started == []


def test_the_current_stream_is_used(gpu, rng):
    call = arrays(gpu, rng)
    for stream in (0, 7, 9):
        gpu.stream = stream
        cuda.forward(*call, NONE, EPS)
    assert [s.stream for s in gpu.started] == [0, 7, 9]


def test_a_thread_gets_a_context_first(gpu, rng):
    """The driver's launch, other than the runtime's, fails in a thread that has none."""
    call = arrays(gpu, rng)
    cuda.forward(*call, NONE, EPS)
    failed = []

    def work():
        try:
            cuda.forward(*call, NONE, EPS)
        except Exception as cause:
            failed.append(cause)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failed == []
    assert len(gpu.started) == 2


def test_threads_have_arguments_of_their_own(gpu, rng):
    """Eight threads at once, each with arrays of its own: every launch has addresses of one call."""
    calls = [arrays(gpu, rng) for _ in range(8)]
    wanted = {(x.data.ptr, y.data.ptr, table.data.ptr) for x, y, table in calls}
    cuda.forward(*calls[0], NONE, EPS)
    gpu.started.clear()
    gate = threading.Barrier(8)

    def work(call):
        gate.wait()
        for _ in range(50):
            cuda.forward(*call, NONE, EPS)

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gpu.started) == 400
    assert {(p.x, p.y, p.table) for p in (s.pointers for s in gpu.started)} == wanted


# ---- workspaces and graphs


def grid_call(gpu, rng):
    return arrays(gpu, rng, (8, 6, 4096))


@pytest.fixture
def grid():
    with cuda.planned(way="GRID"):
        yield


@pytest.mark.usefixtures("grid")
def test_the_workspace_is_made_once(gpu, rng):
    call = grid_call(gpu, rng)
    cuda.forward(*call, NONE, EPS)
    made = len(gpu.allocated)
    for _ in range(3):
        cuda.forward(*call, NONE, EPS)
    assert len(gpu.allocated) == made
    assert len({s.pointers.workspace for s in gpu.started}) == len({s.pointers.barriers for s in gpu.started}) == 1
    assert gpu.cleared == [(4 * cuda._WORDS, 0)], "barriers are cleared when they are made, and never again"
    assert gpu.started[0].pointers.barriers != gpu.started[0].pointers.workspace != 0


@pytest.mark.usefixtures("grid")
def test_streams_and_threads_have_workspaces_of_their_own(gpu, rng):
    """Two streams may run at once; two threads may each be between the halves of a call on one stream."""
    call = grid_call(gpu, rng)
    cuda.forward(*call, NONE, EPS)
    gpu.stream = 3
    cuda.forward(*call, NONE, EPS)

    def work():
        with cuda.planned(way="GRID"):
            cuda.forward(*call, NONE, EPS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    gpu.stream = 0
    cuda.forward(*call, NONE, EPS)
    first, second, third, fourth = [s.pointers.workspace for s in gpu.started]
    assert first == fourth
    assert len({first, second, third}) == 3


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("grows", ["_SPACE", "_WORDS"])
def test_a_larger_workspace_replaces_a_small_one(gpu, rng, monkeypatch, grows):
    """Whether it is the partial sums or the barriers that need more; the other has room enough."""
    monkeypatch.setattr(cuda, grows, 1)
    small, large = arrays(gpu, rng, (8, 2, 4096)), arrays(gpu, rng, (8, 60, 4096))
    for call in (small, large, small):
        cuda.forward(*call, NONE, EPS)
    first, second, third = [s.pointers for s in gpu.started]
    assert first.workspace != second.workspace == third.workspace
    view = planner.View(large[0].shape, large[0].strides, large[1].strides, None, 4)
    plan = planner.plan(view, "f", False, cuda.device(0), way="GRID")
    assert {"_SPACE": plan.workspace, "_WORDS": 4 * plan.barriers}[grows] in [size for _, size in gpu.allocated]


@pytest.mark.usefixtures("grid")
def test_a_captured_call_has_a_workspace_of_its_own(gpu, rng):
    """Its graph may run beside other calls on the stream, and beside other graphs."""
    call = grid_call(gpu, rng)
    cuda.forward(*call, NONE, EPS)
    gpu.capturing = {0}
    cuda.forward(*call, NONE, EPS)
    cuda.forward(*call, NONE, EPS)
    gpu.capturing = set()
    cuda.forward(*call, NONE, EPS)
    before, first, second, after = [s.pointers.workspace for s in gpu.started]
    assert before == after
    assert len({before, first, second}) == 3
    kept = {partials.data.ptr for partials, _ in cuda._captured}
    assert kept == {first, second}, "kept for as long as the graph may be replayed"


@pytest.mark.parametrize("way", ["BLOCK", "CLUSTER"])
def test_plans_without_a_workspace_allocate_nothing(gpu, rng, way):
    call = grid_call(gpu, rng)
    made = len(gpu.allocated)
    gpu.capturing = {0}
    with cuda.planned(way=way):
        cuda.forward(*call, NONE, EPS)
    assert len(gpu.allocated) == made
    assert gpu.started[0].pointers.workspace == gpu.started[0].pointers.barriers == 0


def test_a_second_call_plans_and_compiles_nothing(gpu, rng, monkeypatch):
    call = arrays(gpu, rng)
    cuda.forward(*call, NONE, EPS)
    monkeypatch.setattr(cuda, "plan", None)
    monkeypatch.setattr(cuda, "machine_code", None)
    monkeypatch.setattr(cuda, "_check", None)
    cuda.forward(*call, NONE, EPS)
    assert gpu.started[0] == gpu.started[1]


def test_an_address_between_vectors_is_another_plan(gpu, rng):
    whole = gpu.array(rng.normal(size=(4, 6, 101)).astype(np.float32))
    y, table = cupy.empty((4, 6, 100), np.float32), cupy.empty((6, 6))
    for x in (whole[:, :, :100], whole[:, :, 1:]):
        cuda.forward(x, y, table, NONE, EPS)
    assert len(cuda._ready) == 2


def test_what_is_remembered_is_bounded(gpu, rng, monkeypatch):
    monkeypatch.setattr(cuda, "_MOST_READY", 3)
    for n in range(1, 8):
        cuda.forward(*arrays(gpu, rng, (2, 3, n)), NONE, EPS)
    assert len(cuda._ready) <= 3


# ---- beyond batch norm


def test_each_extra_is_other_code(gpu, rng):
    """By options, which the cache of machine code has in its key; without an activation backward reads no residual."""
    x, y, table = arrays(gpu, rng)
    for more in (Extras("relu"), Extras("gelu"), Extras(residual=y), Extras("relu", residual=y)):
        cuda.forward(x, y, table, NONE, EPS, more)
        dr = None if more.residual is None else cupy.empty_like(x)
        cuda.backward(x, x, y, table, None, None, False, more._replace(dresidual=dr))
    short = ["".join(option[8:] for option in launch.options if "CLUSTER" not in option) for launch in gpu.started]
    relu, gelu = "_ACTIVATION=RELU", "_ACTIVATION=GELU"
    assert short == [
        relu, relu, gelu, gelu, "_RESIDUAL=1", "_DRESIDUAL=1",
        relu + "_RESIDUAL=1", relu + "_RESIDUAL=1_DRESIDUAL=1",
    ]  # fmt: skip
    assert [launch.pointers.r for launch in gpu.started[4:]] == [y.data.ptr, 0, y.data.ptr, y.data.ptr]
    compiled = len(gpu.compiled)
    cuda.forward(x, y, table, NONE, EPS, Extras("leaky_relu", 0.1))
    cuda.forward(x, y, table, NONE, EPS, Extras("leaky_relu", 0.2))
    parameters = [planner.HEAD.unpack_from(launch.argument)[19] for launch in gpu.started[-2:]]
    assert parameters == [0.1, 0.2]
    assert len(gpu.compiled) == compiled + 1


def test_weights_and_their_sums_are_passed(gpu, rng):
    """Not where frozen statistics have no use for them; sums only where statistics are x's own."""
    x, y, table = arrays(gpu, rng)
    w, mass = gpu.array(np.ones((x.shape[0], 1, x.shape[2]), np.float32)), cupy.empty(1)
    ones = gpu.array(np.ones(x.shape[1], np.float32))
    for masked, frozen in itertools.product(("normalize", "zero"), (False, True)):
        gpu.started.clear()
        more = Extras(weights=w, mass=mass, masked=masked)
        cuda.forward(x, y, table, (None, None, ones, ones) if frozen else NONE, EPS, more)
        cuda.backward(x, x, y, table, None, None, frozen, more)
        wanted = frozen is False or masked == "zero"
        for launch in gpu.started:
            assert launch.pointers.w == (w.data.ptr if wanted else 0)
            assert launch.pointers.mass == (0 if frozen else mass.data.ptr)
            assert (f"-DFASTBN_WEIGHTS={masked.upper()}" in launch.options) == wanted


def test_weights_off_16_bytes_are_copied(gpu, rng):
    x, y, table = arrays(gpu, rng)
    n = x.shape[0] * x.shape[2]
    w = gpu.array(np.ones(n + 1, np.float32))[1:].reshape(x.shape[0], 1, x.shape[2])
    cuda.forward(x, y, table, NONE, EPS, Extras(weights=w, mass=cupy.empty(1)))
    assert gpu.copied == [w.shape]
    assert gpu.started[0].pointers.w % 16 == 0
    with pytest.raises(ValueError, match=r"a float64 array of shape .*expected .4, 1, 100., .<class 'numpy.float32'>"):
        cuda.forward(x, y, table, NONE, EPS, Extras(weights=cupy.empty(w.shape), mass=cupy.empty(1)))


def test_frozen_backward_with_an_activation_reads_x(gpu, rng):
    """Without sums in one launch that adds nothing up."""
    x, y, table = arrays(gpu, rng)
    cuda.backward(y, x, y, table, None, None, True, Extras("relu"))
    assert gpu.started[0].pointers.x == x.data.ptr
    assert gpu.started[0].way == "APPLY"


def grouped(gpu, rng, sets, shape=(6, 4, 100)):
    x, y = gpu.array(rng.normal(size=shape).astype(np.float32)), cupy.empty(shape, np.float32)
    return x, y, cupy.empty((6, shape[1] * sets))


def test_groups_of_one_size_upload_nothing(gpu, rng, monkeypatch):
    call = grouped(gpu, rng, 3)
    monkeypatch.setattr(cuda, "_uploaded", None)
    cuda.forward(*call, NONE, EPS, Extras(starts=np.array([0, 2, 4, 6])))
    assert (gpu.started[0].pointers.starts, gpu.started[0].pointers.order) == (0, 0)
    with pytest.raises(ValueError, match=r"shape \(6, 12\).*expected \(6, 8\)"):
        cuda.forward(*call, NONE, EPS, Extras(starts=np.array([0, 3, 6])))


def test_other_groups_are_uploaded_by_samples(gpu, rng):
    """Three samples of two rows each: the list has a number for a sample, not for a row."""
    call = grouped(gpu, rng, 2)
    order = np.array([4, 5, 0, 1, 2, 3])
    cuda.forward(*call, NONE, EPS, Extras(starts=np.array([0, 2, 6]), order=order))
    found = gpu.started[0].pointers
    assert found.order == found.starts + 8 * 3
    assert list(np.ctypeslib.as_array((ctypes.c_int64 * 6).from_address(found.starts))) == [0, 1, 3, 2, 0, 1]
    cuda.forward(*call, NONE, EPS, Extras(starts=np.array([0, 2, 6]), order=np.array([4, 1, 0, 5, 2, 3])))
    found = gpu.started[1].pointers
    values = list(np.ctypeslib.as_array((ctypes.c_int64 * 9).from_address(found.starts)))
    assert values == [0, 2, 6, 4, 1, 0, 5, 2, 3]


def test_a_captured_call_keeps_its_list(gpu, rng):
    """A graph copies from main memory each time it runs: from pinned memory that nobody frees or overwrites."""
    call, more = grouped(gpu, rng, 2), Extras(starts=np.array([0, 1, 6]))
    cuda.forward(*call, NONE, EPS, more)
    gpu.capturing = {0}
    cuda.forward(*call, NONE, EPS, more)
    ((target, source, size, stream),) = gpu.replayed
    assert (target, size, stream) == (gpu.started[1].pointers.starts, 24, 0)
    kept = [(made.data.ptr, pinned.ptr) for made, pinned in cuda._captured if hasattr(pinned, "ptr")]
    assert kept == [(target, source)]


# ---- what is checked first

WRONG = {
    "shape of y": ({"y": (4, 6, 99)}, "shape \\(4, 6, 99\\)"),
    "dtype of y": ({"y_dtype": np.float64}, "a float64 array of shape \\(4, 6, 100\\)"),
    "rows of table": ({"table": (5, 6)}, "shape \\(5, 6\\).*expected \\(6, 6\\)"),
    "dtype of table": ({"table_dtype": np.float32}, "a float32 array of shape \\(6, 6\\)"),
    "size of gamma": ({"gamma": (7,)}, "shape \\(7,\\).*expected \\(6,\\)"),
    "dtype of gamma": ({"gamma_dtype": np.float16}, "a float16 array of shape \\(6,\\)"),
    "strides of gamma": ({"gamma": (12,), "every": 2}, "strides \\(8,\\)"),
}


@pytest.mark.parametrize(("change", "match"), WRONG.values(), ids=WRONG)
def test_sizes_are_checked_before_the_launch(gpu, rng, change, match):
    x = gpu.array(rng.normal(size=(4, 6, 100)).astype(np.float32))
    y = cupy.empty(change.get("y", x.shape), change.get("y_dtype", x.dtype))
    table = cupy.empty(change.get("table", (6, 6)), change.get("table_dtype", np.float64))
    gamma = cupy.empty(change.get("gamma", (6,)), change.get("gamma_dtype", np.float32))[:: change.get("every", 1)]
    with pytest.raises(ValueError, match=match):
        cuda.forward(x, y, table, (gamma, None, None, None), EPS)
    assert gpu.started == []
    assert gpu.compiled == []


def test_elements_of_another_type_are_refused(gpu, rng):
    call = arrays(gpu, rng, dtype=np.int32)
    with pytest.raises(TypeError, match="int32 elements; expected float16, float32, float64"):
        cuda.forward(*call, NONE, EPS)


def test_gradients_have_the_number_type(gpu, rng):
    dy, dx, table = arrays(gpu, rng, dtype=np.float16)
    wrong, right = cupy.empty(6, np.float16), cupy.empty(6, np.float32)
    with pytest.raises(ValueError, match="a float16 array of shape"):
        cuda.backward(dy, dy, dx, table, wrong, None, False)
    cuda.backward(dy, dy, dx, table, right, None, False)
    assert gpu.started[0].pointers.dgamma == right.data.ptr


# ---- machine code and its cache

CHEAP = "fastbn::bn<float, 4, false, fastbn::RUNS, fastbn::BLOCK>", ()


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Counts compilations, which are doubled; the cache is in a folder of the test's own."""
    calls = []

    def compile_(expression, options):
        calls.append((expression, options))
        return b"code of " + expression.encode() + b"\0tail", "lowered_name"

    monkeypatch.setattr(compiler, "_compile", compile_)
    monkeypatch.setenv("FASTBN_CACHE_DIR", str(tmp_path / "cache"))
    return calls


WANTED = b"code of fastbn::bn<float, 4, false, fastbn::RUNS, fastbn::BLOCK>\0tail", "lowered_name"


def test_the_second_process_finds_the_code(compiled, tmp_path):
    assert compiler.machine_code(*CHEAP, (9, 0)) == WANTED
    assert compiler.machine_code(*CHEAP, (9, 0)) == WANTED
    assert len(compiled) == 1
    (file,) = (tmp_path / "cache").iterdir()
    assert file.suffix == ".cubin"


def test_each_device_source_and_option_has_its_code(compiled, monkeypatch):
    compiler.machine_code(*CHEAP, (9, 0))
    compiler.machine_code(*CHEAP, (8, 0))
    compiler.machine_code(CHEAP[0], ("-DFASTBN_CLUSTER=2",), (9, 0))
    monkeypatch.setattr(compiler, "source", lambda: "other")
    compiler.machine_code(*CHEAP, (9, 0))
    monkeypatch.setattr(nvrtc, "getVersion", lambda: (99, 1))
    compiler.machine_code(*CHEAP, (9, 0))
    assert len(compiled) == 5


@pytest.mark.parametrize("damage", ["empty", "cut short", "a flipped bit", "another's"])
def test_a_damaged_file_is_replaced(compiled, tmp_path, damage):
    compiler.machine_code(*CHEAP, (9, 0))
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    if damage == "another's":
        compiler.machine_code(*CHEAP, (8, 0))
        (other,) = set((tmp_path / "cache").iterdir()) - {file}
        content = other.read_bytes()
    broken = {"empty": b"", "cut short": content[:-3], "a flipped bit": content[:-1] + bytes([content[-1] ^ 1])}
    file.write_bytes(broken.get(damage, content))
    before = len(compiled)
    assert compiler.machine_code(*CHEAP, (9, 0)) == WANTED
    assert len(compiled) == before + 1
    assert compiler.machine_code(*CHEAP, (9, 0)) == WANTED
    assert len(compiled) == before + 1


def test_a_folder_that_cannot_be_made_only_costs_time(compiled, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTBN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        assert compiler.machine_code(*CHEAP, (9, 0)) == WANTED
    assert len(compiled) == 2


def test_a_read_only_folder_only_costs_time(compiled, tmp_path, monkeypatch):
    """Root may write anywhere, hence not by chmod."""

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(compiler.Path, "write_bytes", refused)
    for _ in range(2):
        assert compiler.machine_code(*CHEAP, (9, 0)) == WANTED
    assert len(compiled) == 2


def test_a_write_that_fails_leaves_nothing(compiled, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler.os, "replace", full)
    assert compiler.machine_code(*CHEAP, (9, 0)) == WANTED
    assert list((tmp_path / "cache").iterdir()) == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("FASTBN_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compiler.Path, "home", lambda: tmp_path)
    assert compiler.cache_folder() == tmp_path / ".cache" / "fastbn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compiler.cache_folder() == tmp_path / "xdg" / "fastbn"
    monkeypatch.setenv("FASTBN_CACHE_DIR", str(tmp_path / "own"))
    assert compiler.cache_folder() == tmp_path / "own"


@pytest.mark.parametrize(
    ("capability", "target"), [((9, 0), "sm_90"), ((7, 5), "sm_75"), ((8, 8), "compute_86"), ((13, 0), "compute_121")]
)
def test_a_device_newer_than_the_compiler_gets_ptx(monkeypatch, capability, target):
    monkeypatch.setattr(nvrtc, "getSupportedArchs", lambda: (75, 80, 86, 90, 100, 121))
    assert compiler._target(capability) == target


def test_a_device_older_than_the_compiler_is_an_error(monkeypatch):
    monkeypatch.setattr(nvrtc, "getSupportedArchs", lambda: (75, 80))
    with pytest.raises(RuntimeError, match=r"capability 7.5 or newer, this GPU has 7.0. Install an older cupy-cuda"):
        compiler._target((7, 0))


def test_the_compiler_itself(tmp_path, monkeypatch):
    """Machine code for Hopper, and PTX for a device to come, by the NVRTC that CuPy found."""
    monkeypatch.setenv("FASTBN_CACHE_DIR", str(tmp_path))
    try:
        nvrtc.getVersion()
    except Exception:
        pytest.skip("no NVRTC")
    code, name = compiler.machine_code(*CHEAP, (9, 0))
    assert code[:4] == b"\x7fELF"
    assert name.encode() in code
    code, name = compiler.machine_code(*CHEAP, (99, 0))
    assert f".entry {name}(".encode() in code
    assert b".ftz" not in code, "subnormals of float32 are numbers"


def test_code_that_does_not_compile_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTBN_CACHE_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"fastbn::nothing can't be compiled with .*sm_90:\n.*nothing"):
        compiler.machine_code("fastbn::nothing", (), (9, 0))


# ---- numbers: the launches are carried out by the emulator

# Layouts of a (O, C, I) view, with the reason for each; the rest of the memory is NaN.
LAYOUTS = {
    "channels first": ((3, 5, 64), lambda a: a, "runs of whole vectors"),
    "odd runs": ((3, 5, 81), lambda a: a, "windows, or element by element"),
    "short runs": ((6, 8, 9), lambda a: a, "3x3: as columns"),
    "channels last": ((60, 16), lambda a: a[:, :, None], "columns"),
    "rows of three": ((64, 3), lambda a: a[:, :, None], "folded rows"),
    "channel slice": ((4, 12, 64), lambda a: a[:, 3:8], "a gap between rows"),
    "between vectors": (
        (4, 6, 72),
        lambda a: a[:, :, 1:65],
        "whole vectors apart, none at its border",
    ),
    "transposed": ((5, 90), lambda a: a.T[:, :, None], "(C, N) in memory"),
    "every second": ((4, 5, 60), lambda a: a[:, :, ::2], "what no kernel walks: copied"),
    "one value": ((1, 8, 1), lambda a: a, "hardly anything"),
}
TYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": np.int16}
UNIT = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@pytest.fixture(scope="session")
def emulator():
    return emulation(library())


@pytest.fixture
def emulated(monkeypatch, emulator):
    yield from small_devices(monkeypatch, emulator)


def elements(values, dtype):
    """Rounded; bfloat16 as int16 bits."""
    if dtype != "bfloat16":
        return values.astype(TYPES[dtype])
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16)


def values(array):
    """What the elements mean."""
    if array.dtype == np.int16:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


class Arrays:
    """x, dy and outputs in one layout, and the reference's results."""

    def __init__(self, gpu, rng, layout, dtype, numbers=None):
        self.gpu, self.dtype, (self.full, self.view, _) = gpu, dtype, LAYOUTS[layout]
        self.x, self.dy, self.y, self.dx = (self.array() for _ in range(4))
        C = self.x.shape[1]
        for a, mean in ((self.x, 5.0), (self.dy, 0.5)):
            filled = rng.normal(size=a.shape) + mean * rng.normal(size=(1, C, 1))
            gpu.host(a)[...] = elements(filled, dtype)
        self.number = np.float64 if dtype == "float64" else np.float32
        made = [f(C).astype(numbers or self.number) for f in (rng.standard_normal, rng.standard_normal, rng.random)]
        self.gamma, self.beta, self.var = made
        self.mean = rng.normal(size=C).astype(numbers or self.number)
        self.table = gpu.array(np.full((6, C), np.nan))
        self.sums = [gpu.array(np.full(C, np.nan, self.number)) for _ in range(2)]

    def array(self):
        made = self.gpu.array(elements(np.full(self.full, np.nan), self.dtype))
        return self.view(made)

    def values(self, array):
        return values(self.gpu.host(array))

    def on_device(self, *parameters):
        return tuple(None if p is None else self.gpu.array(p) for p in parameters)

    def close(self, got, expected, what):
        error = np.abs(self.values(got) - expected) / np.maximum(1, np.abs(expected))
        assert np.isfinite(error).all(), what
        assert error.max() <= MOST[self.dtype] * UNIT[self.dtype], what

    def check_forward(self, given, y=True):
        x, C = self.values(self.x), self.x.shape[1]
        expected, table = np.empty(x.shape), np.empty((6, C))
        reference.forward(x, expected, table, given, EPS)
        cuda.forward(self.x, self.y if y else None, self.table, self.on_device(*given), EPS)
        got = self.gpu.host(self.table)
        # float32 sums of deviations from a pivot, merged in float64: 8 eps of the deviation, and of the variance
        unit = UNIT["float64" if self.dtype == "float64" else "float32"]
        scale = 8 * unit * (np.abs(table[0]) * 2.0**-20 + np.sqrt(table[2]) + EPS)
        assert (np.abs((got[0] - table[0]) + (got[1] - table[1])) <= scale).all()
        np.testing.assert_allclose(got[2:4], table[2:4], rtol=16 * unit, atol=1e-30)
        assert (got[4:] == table[4:]).all()
        if y:
            self.close(self.y, expected, "y")
        return table

    def check_backward(self, frozen, dx=True, dgamma=True, dbeta=True, table=None):
        x, dy, C = self.values(self.x), self.values(self.dy), self.x.shape[1]
        expected, sums = np.empty(x.shape), np.empty((2, C))
        reference.backward(dy, x, expected, table, *sums, frozen)
        self.gpu.host(self.table)[...] = table
        given = self.sums[0] if dgamma else None, self.sums[1] if dbeta else None
        cuda.backward(self.dy, self.x, self.dx if dx else None, self.table, *given, frozen)
        if dx:
            self.close(self.dx, expected, "dx")
        d = np.abs(dy) * np.abs((x - table[0, :, None] - table[1, :, None]) * table[3, :, None])
        sizes = d.sum((0, 2)), np.abs(dy).sum((0, 2))
        for wanted, got, right, size in zip((dgamma, dbeta), self.sums, sums, sizes, strict=True):
            if wanted:  # of the sum of magnitudes: float32 sums of deviations, merged in float64
                unit = UNIT["float64" if self.dtype == "float64" else "float32"]
                assert (np.abs(self.gpu.host(got) - right) <= 8 * unit * np.maximum(1, size)).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_backward(emulated, rng, layout, dtype):
    a = Arrays(emulated, rng, layout, dtype)
    table = a.check_forward((a.gamma, a.beta, None, None))
    a.check_backward(False, table=table)


@pytest.mark.parametrize("way", ["BLOCK", "CLUSTER", "GRID", "SPLIT"])
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_every_way(emulated, rng, layout, way):
    a = Arrays(emulated, rng, layout, "float32")
    with cuda.planned(way=way):
        table = a.check_forward((a.gamma, a.beta, None, None))
        a.check_backward(False, table=table)
    assert {s.way for s in emulated.started} == ({"STATS", "APPLY"} if way == "SPLIT" else {way})


def test_a_grid_that_is_split_gives_the_same_bits(emulated, rng):
    a = Arrays(emulated, rng, "channels first", "float32")
    found = []
    for resident in (32, 0):
        emulated.resident = resident
        cuda._ready.clear()
        with cuda.planned(way="GRID"):
            a.check_forward((a.gamma, a.beta, None, None))
        found.append((a.gpu.host(a.y).tobytes(), a.gpu.host(a.table).tobytes()))
    assert [s.way for s in emulated.started] == ["GRID", "STATS", "APPLY"]
    assert found[0] == found[1]


@pytest.mark.parametrize("numbers", [np.float32, np.float64])
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_frozen_statistics(emulated, rng, layout, numbers):
    a = Arrays(emulated, rng, layout, "float32", numbers)
    table = a.check_forward((a.gamma, a.beta, a.mean, a.var))
    assert [s.way for s in emulated.started] == ["APPLY"]
    a.check_backward(True, table=table)
    a.check_backward(True, dgamma=False, dbeta=False, table=table)
    a.check_backward(True, dx=False, table=table)
    a.check_backward(True, dgamma=False, table=table)


@pytest.mark.parametrize("absent", ["gamma", "beta", "both"])
def test_absent_parameters(emulated, rng, absent):
    """Absent gamma is 1, and absent beta is 0."""
    a = Arrays(emulated, rng, "channels first", "float32")
    given = None if absent in ("gamma", "both") else a.gamma, None if absent in ("beta", "both") else a.beta
    table = a.check_forward((*given, None, None))
    a.check_backward(False, table=table)


def test_moments_alone(emulated, rng):
    a = Arrays(emulated, rng, "odd runs", "float16")
    a.check_forward(NONE, y=False)
    assert np.isnan(a.values(a.y)).all()
    assert emulated.started[0].pointers.y == 0


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone(emulated, rng, wanted):
    a = Arrays(emulated, rng, "channels first", "float32")
    table = a.check_forward((a.gamma, a.beta, None, None))
    a.check_backward(False, *wanted, table=table)
    left = [not np.isfinite(emulated.host(array).astype(float)).any() for array in (a.dx, *a.sums)]
    assert left == [not w for w in wanted]


@pytest.mark.parametrize("layout", ["channels first", "channels last", "every second"])
@pytest.mark.parametrize("way", [None, "GRID"])
def test_in_place(emulated, rng, layout, way):
    a = Arrays(emulated, rng, layout, "float32")
    with cuda.planned(**({} if way is None or layout == "every second" else {"way": way})):
        given = a.on_device(a.gamma, a.beta, None, None)
        cuda.forward(a.x, a.y, a.table, given, EPS)
        cuda.backward(a.dy, a.x, a.dx, a.table, None, None, False)
        x = emulated.host(a.x).copy()
        cuda.backward(a.dy, a.x, a.dy, a.table, None, None, False)
        dx_over_dy = emulated.host(a.dy).tobytes()
        cuda.forward(a.x, a.x, a.table, given, EPS)
    assert emulated.host(a.x).tobytes() == emulated.host(a.y).tobytes() != x.tobytes()
    assert dx_over_dy == emulated.host(a.dx).tobytes()


def test_what_lies_between_is_left_alone(emulated, rng):
    """NaN before, and still there after: a slice's neighbours."""
    a = Arrays(emulated, rng, "channel slice", "float32")
    a.check_forward((a.gamma, a.beta, None, None))
    whole = a.view(np.zeros(a.full))
    base = emulated.host(a.y.base if a.y.base is not None else a.y)
    assert np.isnan(base).sum() == base.size - whole.size


def test_workspaces_serve_one_call_after_another(emulated, rng):
    """Barriers are left as they were found: no launch clears them."""
    a, b = Arrays(emulated, rng, "channels first", "float32"), Arrays(emulated, rng, "odd runs", "float32")
    with cuda.planned(way="GRID"):
        for one in (a, b, a, b):
            table = one.check_forward((one.gamma, one.beta, None, None))
            one.check_backward(False, table=table)
    assert len({s.pointers.barriers for s in emulated.started}) == 1
    assert len(emulated.cleared) == 1


def test_threads_on_two_devices(emulated, rng):
    made = []
    for number in (0, 1):
        with cupy.cuda.Device(number):
            made.append(Arrays(emulated, rng, "channels last", "float32"))
    for number, a in enumerate(made):
        with cupy.cuda.Device(number):
            table = a.check_forward((a.gamma, a.beta, None, None))
            a.check_backward(False, table=table)
    assert [number for number, _ in itertools.groupby(s.device for s in emulated.started)] == [0, 1]


# ---- the public functions

PUBLIC = {
    "channels first": lambda a: a,
    "channels last": lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "a channel slice": lambda a: np.concatenate([a, a, a], 1)[:, 3:7],
    "cropped": lambda a: np.pad(a, ((0, 0), (0, 0), (1, 2), (2, 1)))[:, :, 1:-2, 2:-1],
    "every second": lambda a: np.repeat(a, 2, 3)[:, :, :, ::2],
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", PUBLIC)
def test_public_functions_on_cupy_arrays(emulated, rng, layout, dtype):
    """As on NumPy arrays: y, dx, dgamma, dbeta, frozen y; types and memory layouts."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    number = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    x, dy = (PUBLIC[layout]((rng.normal(size=(3, 4, 4, 8)) + 3).astype(number)) for _ in range(2))
    gamma, beta, mean = rng.normal(size=(3, 4)).astype(np.float32)
    var = rng.uniform(0.5, 2, 4).astype(np.float32)
    with fastbn.set_backend("reference"):
        y, saved = fastbn.forward(x, gamma, beta)
        expected = [y, *fastbn.backward(dy, saved), fastbn.infer(x, mean, var, gamma, beta)]
    x, dy = emulated.array(x, x), emulated.array(dy, dy)
    gamma, beta, mean, var = (emulated.array(a) for a in (gamma, beta, mean, var))
    y, saved = fastbn.forward(x, gamma, beta)
    got = [y, *fastbn.backward(dy, saved), fastbn.infer(x, mean, var, gamma, beta)]
    eps = float(ml_dtypes.finfo(number).eps)
    for a, b in zip(got, expected, strict=True):
        assert type(a) is cupy.ndarray
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        # Two results of one rounding each, on either side of the truth; float32 and float64 round a few times more.
        # A gradient of gamma or beta is the sum of 96 values.
        scale = np.maximum(1, np.abs(b.astype(np.float64))) * (96 if b.ndim == 1 else 1)
        off = np.abs(emulated.host(a).astype(np.float64) - b.astype(np.float64)) / scale
        most = 1.01 * eps if b.dtype.itemsize == 2 else 16 * float(ml_dtypes.finfo(b.dtype).eps)
        assert off.max() <= most
    order = np.argsort([-s for s in x.strides], kind="stable").tolist()
    assert np.argsort([-s for s in y.strides], kind="stable").tolist() == order


def test_public_functions_write_where_they_are_told(emulated, rng):
    x = emulated.array(rng.normal(size=(4, 6, 50)).astype(np.float32))
    dy = emulated.array(rng.normal(size=x.shape).astype(np.float32))
    expected, saved = fastbn.forward(x)
    dx = fastbn.backward(dy, saved)[0]
    out = cupy.empty_like(x)
    y, saved = fastbn.forward(x, out=out)
    assert y is out
    assert emulated.host(out).tobytes() == emulated.host(expected).tobytes()
    assert fastbn.backward(dy, saved, out=dy)[0] is dy
    assert emulated.host(dy).tobytes() == emulated.host(dx).tobytes()
    assert fastbn.forward(x, out=x)[0] is x
    assert emulated.host(x).tobytes() == emulated.host(expected).tobytes()


def test_public_functions_run_on_the_arrays_device(emulated, rng):
    with cupy.cuda.Device(1):
        x = emulated.array(rng.normal(size=(4, 6, 50)).astype(np.float32))
    emulated.stream = 4
    y, saved = fastbn.forward(x)
    fastbn.backward(x, saved)
    assert y.data.device_id == 1
    assert {(s.device, s.stream) for s in emulated.started} == {(1, 1004)}
    assert emulated.current == 0
