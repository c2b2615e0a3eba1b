"""The CuPy launcher up to the launch: a double of the driver takes the launches."""

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
from cupy_double import Double, Refused
from emulator import planner
from fastbn.kernels import reference
from fastbn.kernels.cuda import launch as cuda

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


def test_the_table_of_y(rng):
    """In place, as the reference has it; CuPy's rows take the same operators as NumPy's."""
    table = rng.normal(size=(6, 7))
    table[2:4] = rng.uniform(0.5, 2, (2, 7))
    want = reference.inverse_table(table)
    made = table.copy()
    assert cuda.invert(made) is made
    np.testing.assert_allclose(made, want, rtol=4 * np.finfo(float).eps)


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
    kept = {partials.data.ptr for partials, *_ in cuda._captured}
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


@pytest.mark.parametrize("captured", [False, True], ids=["at once", "captured"])
def test_the_table_that_goes_with_y_is_another_one(captured, gpu, rng, monkeypatch):
    """x's is needed again, and y's for as long as a graph may be replayed. Frozen, dx alone needs neither."""
    x, dx, table = arrays(gpu, rng)
    dgamma, dbeta = cupy.empty(6, np.float32), cupy.empty(6, np.float32)
    of_x = rng.uniform(0.5, 2, table.shape)
    gpu.host(table)[...] = of_x
    invert = cuda.invert
    monkeypatch.setattr(cuda, "invert", lambda made: (invert(gpu.host(made)), made)[1])  # CuPy's operators need a GPU
    gpu.capturing = {0} if captured else set()
    cuda.backward(x, x, dx, table, dgamma, dbeta, False, Extras(inverse=True))
    found = gpu.started[-1].pointers.table
    assert found != table.data.ptr
    np.testing.assert_array_equal(gpu.host(table), of_x)
    kept = [made for made, *_ in cuda._captured if made.shape == table.shape]
    assert [made.data.ptr for made in kept] == ([found] if captured else [])
    if captured:
        np.testing.assert_allclose(gpu.host(kept[0]), reference.inverse_table(of_x), rtol=1e-15)
    cuda.backward(x, x, dx, table, None, None, True, Extras(inverse=True))
    assert gpu.started[-1].pointers.table == table.data.ptr


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
