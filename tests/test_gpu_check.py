"""The GPU check without a GPU: its rows, its time, its tables, and its stages on a double of the device."""

from __future__ import annotations

import importlib
import json
import os
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from device_doubles import State, in_their_places
from fastbn.bench import gpu_check
from fastbn.bench.gpu import build, correct, functions, run, speed, tables, tools
from fastbn.bench.gpu.run import Rows, Run

import fastbn

ROOT = Path(__file__).resolve().parents[1]


# ---- rows


def test_rows_are_in_the_file_at_once(tmp_path):
    rows = Rows(tmp_path / "new" / "rows.jsonl")
    rows.add("speed", "a", us=1 / 3, text=Path("x"), lost=float("nan"), many=[0.123456, 2])
    line = json.loads((tmp_path / "new" / "rows.jsonl").read_text())
    assert line == {"stage": "speed", "case": "a", "us": 0.3333, "text": "x", "lost": "nan", "many": [0.1235, 2]}


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"stage": "speed", "case": "a"}\n{"stage": "spe')
    rows = Rows(file)
    assert rows.has("speed", "a")
    rows.add("speed", "b")
    assert [row["case"] for row in Rows(file).all] == ["a", "b"]


def test_errors_are_tried_again_and_the_last_row_counts(tmp_path, capsys):
    rows = Rows(tmp_path / "rows.jsonl")
    rows.add("build", "a", error="broken")
    assert not rows.has("build", "a")
    assert capsys.readouterr().err == "build: a: broken\n"
    rows.add("build", "a", ok=True)
    assert rows.has("build", "a")
    assert rows.of("build") == [{"stage": "build", "case": "a", "ok": True}]


def quiet():
    return SimpleNamespace(tidy=lambda: None)


def test_cases_go_on_after_one_that_fails(tmp_path):
    one = Run(Rows(tmp_path / "rows.jsonl"), quiet())
    one.each("speed", [("bad", lambda: 1 // 0), ("good", lambda: {"us": 1.0})])
    bad, good = one.rows.all
    assert bad["error"].startswith("ZeroDivisionError: ")
    assert "1 // 0" in bad["trace"]
    assert good["us"] == 1.0


def test_time_that_is_up_is_a_row_and_what_is_there_is_not_measured_again(tmp_path):
    one = Run(Rows(tmp_path / "rows.jsonl"), quiet(), end=time.monotonic() + 60)
    one.each("speed", [("a", dict)])
    one.end = 0.0
    one.each("speed", [("a", lambda: 1 // 0), ("b", dict), ("c", dict)])
    assert one.rows.all[1:] == [{"stage": "speed", "case": "stopped", "note": "out of time before b"}]


# ---- the command


def test_all_stages_take_less_than_eight_minutes():
    assert tuple(gpu_check.SECONDS) == gpu_check.STAGES
    assert sum(gpu_check.SECONDS.values()) < 480
    assert tuple(gpu_check.QUICK_SECONDS) == gpu_check.QUICK
    assert sum(gpu_check.QUICK_SECONDS.values()) < 120


def test_an_unknown_stage_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["sped", "--folder", str(tmp_path)])
    assert "'sped' is no stage; expected some of env, build, correct" in capsys.readouterr().err


def test_no_gpu_is_said(tmp_path, capsys, monkeypatch):
    def none():
        raise ImportError("No module named 'cupy'")

    monkeypatch.setattr(gpu_check, "Gpu", none)
    assert gpu_check.main(["--quick", "--folder", str(tmp_path)]) == 2
    assert "no GPU: ImportError: No module named 'cupy'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["-m", "fastbn.bench.gpu_check"], [str(ROOT / "bench" / "gpu_check.py")]])
def test_the_script_and_the_module(tmp_path, command):
    file = tmp_path / "rows.jsonl"
    Rows(file).add("correct", "one case", ok=True)
    shown = [sys.executable, *command, "--show", "--out", str(file)]
    done = subprocess.run(shown, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert "Correct: 1 of 1 cases" in done.stdout


STAGES = [(gpu_check.STAGES, []), (gpu_check.QUICK, ["--quick"]), (("correct", "speed"), ["speed", "correct"])]


@pytest.mark.parametrize(("stages", "options"), STAGES)
def test_stages_in_their_order_each_with_its_time(tmp_path, monkeypatch, stages, options):
    seen = []
    for name in gpu_check.STAGES:
        monkeypatch.setattr(gpu_check, name, lambda one, name=name: seen.append((name, one.left, one.quick)))
    assert gpu_check.main([*options, "--folder", str(tmp_path)], quiet()) == 0
    assert [name for name, _, _ in seen] == list(stages)
    seconds = gpu_check.QUICK_SECONDS if "--quick" in options else gpu_check.SECONDS
    for name, left, quick in seen:
        assert seconds[name] - 5 < left <= seconds[name]
        assert quick == ("--quick" in options)
    rows = Rows(tmp_path / "gpu_check.jsonl").all
    assert [(row["stage"], row["case"]) for row in rows] == [(stage, "took") for stage in stages]


def test_a_stage_that_fails_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "env", lambda _: 1 // 0)
    monkeypatch.setattr(gpu_check, "correct", lambda one: one.rows.add("correct", "a", ok=True))
    assert gpu_check.main(["env", "correct", "--folder", str(tmp_path)], quiet()) == 1
    cases = [(row["stage"], row["case"]) for row in Rows(tmp_path / "gpu_check.jsonl").all]
    assert cases == [("env", "failed"), ("env", "took"), ("correct", "a"), ("correct", "took")]


def test_what_is_wrong_is_the_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "correct", lambda one: one.rows.add("correct", "a", ok=False, wrong=["y"]))
    assert gpu_check.main(["correct", "--folder", str(tmp_path)], quiet()) == 1
    assert "['y'], same bits: None" in capsys.readouterr().out


def test_an_interrupt_leaves_its_rows_and_a_table(tmp_path, monkeypatch, capsys):
    def stopped(one):
        one.rows.add("correct", "a", ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "correct", stopped)
    assert gpu_check.main(["correct", "speed", "--folder", str(tmp_path)], quiet()) == 130
    assert [row["case"] for row in Rows(tmp_path / "gpu_check.jsonl").all] == ["a", "stopped"]
    assert "Correct: 1 of 1 cases" in capsys.readouterr().out


# ---- the tables of cases


def test_cases_have_names_of_their_own():
    for names in ([s.name for s in correct.SHAPES], [t.name for t in speed.TIMED], [b.name for b in tables.BARS]):
        assert len(set(names)) == len(names)
    assert set(speed.COMPILED) <= {timed.name for timed in speed.TIMED}


@pytest.mark.parametrize("shape", correct.SHAPES, ids=lambda shape: shape.name)
def test_shapes_are_views_and_have_a_reason(shape):
    full = np.empty(shape.full, np.float16)
    view = shape.view(full)
    assert view.ndim == 3
    assert np.shares_memory(view, full)
    assert shape.reason


def test_timed_cases_fit_and_agree_with_their_views():
    for timed in speed.TIMED:
        assert np.prod(timed.view) == np.prod(timed.dims) == np.prod(timed.memory)
        assert timed.view[1] == timed.dims[1]
        assert 3 * timed.bytes * speed.rotated(3 * timed.bytes) < 20e9
    assert [timed.layout for timed in speed.TIMED[:2]] == ["first", "last"]
    assert all(timed.bytes > 200e6 for timed in tools.PROFILED[:-1])


def test_bfloat16_is_rounded_to_nearest_even():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.random.default_rng(0).normal(size=1000) * np.logspace(-30, 30, 1000)
    bits = correct.elements(values, "bfloat16")
    wanted = values.astype(np.float32).astype(ml_dtypes.bfloat16)
    assert bits.tobytes() == wanted.tobytes()
    assert (correct.numbers(bits) == wanted.astype(np.float32)).all()


# ---- stages on the double


class Device:
    """A `Gpu` over the double of the driver."""

    number = 0

    def __init__(self, double, launch, cupy):
        self.double, self.launch, self.cupy = double, launch, cupy
        self.disturbed = 0

    def put(self, host):
        return self.double.array(np.ascontiguousarray(host))

    def get(self, array):
        return self.double.host(array).copy()

    def disturb(self):
        self.disturbed += 1

    def replay(self, call, times):
        self.double.capturing = {self.double.get_current_stream().ptr}
        for _ in range(times):
            call()
        self.double.capturing = set()

    def tidy(self):
        pass


@pytest.fixture
def device(monkeypatch):
    cupy = pytest.importorskip("cupy", reason="CuPy isn't installed")
    from cupy_double import emulation, small_devices
    from emulator import library

    launch = importlib.import_module("fastbn.kernels.cuda.launch")
    for double in small_devices(monkeypatch, emulation(library())):
        yield Device(double, launch, cupy)


def test_correct_finds_nothing_and_measures_nothing_twice(device, tmp_path):
    options = ["correct", "--small", "--out", str(tmp_path / "rows.jsonl")]
    assert gpu_check.main(options, device) == 0
    rows = [row for row in Rows(tmp_path / "rows.jsonl").of("correct") if row["case"] != "took"]
    assert len(rows) >= 2 * 3 * 4
    assert all(row["ok"] and row["same_bits"] and row["wrong"] == [] for row in rows)
    for way in ("CLUSTER K", "GRID K", "SPLIT K"):
        assert any(way in row["forward"] and way in row["backward"] for row in rows)
    started = len(device.double.started)
    assert gpu_check.main(options, device) == 0
    assert len(device.double.started) == started


def test_three_repeats_beside_other_work(device):
    truth = correct.Truth(correct.SMALL[0], "bfloat16")
    row = correct.check(device, truth, None, 3)
    assert row["ok"]
    assert device.disturbed == 3
    assert {"y", "dx", "y frozen", "dx frozen", "mean", "invstd"} < set(row["eps"])
    assert {"dgamma", "dbeta", "dgamma frozen", "dbeta frozen"} < set(row["eps"])


FAULTS = {
    # what goes wrong after a launch: the field of the argument whose array is changed, by what, and what must be named
    "y": ("y", np.float32, lambda a: a.__imul__(1.0001), "y"),
    "invstd": ("table", np.float64, lambda a: a[15:20].__imul__(1.0001), "invstd"),
    "dgamma": ("dgamma", np.float32, lambda a: a.__iadd__(1), "dgamma"),
    "dgamma, frozen": ("dgamma", np.float32, lambda a: a.__iadd__(1), "dgamma frozen"),
    "dbeta": ("dbeta", np.float32, lambda a: a.__iadd__(1), "dbeta"),
    "unwritten": ("y", np.float32, lambda a: a.__setitem__(7, np.nan), "y"),
}


@pytest.mark.parametrize(("field", "dtype", "spoil", "named"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(device, field, dtype, spoil, named):
    emulate = device.double.emulate

    def faulty(launch, arrays):
        emulate(launch, arrays)
        address = getattr(launch.pointers, field)
        start, size = next((m for m in arrays if m[0] <= address < m[0] + m[1]), (0, 0))
        if address and (field != "table" or launch.pointers.dy == 0):
            spoil(device.double.host(device.cupy.ndarray(size // np.dtype(dtype).itemsize, dtype, _at(device, start))))

    device.double.emulate = faulty
    row = correct.check(device, correct.Truth(correct.SMALL[0], "float32"), "BLOCK", 1)
    assert not row["ok"]
    assert named in row["wrong"]


def _at(device, address):
    memory = device.cupy.cuda.UnownedMemory(address, 1 << 30, None, 0)
    return device.cupy.cuda.MemoryPointer(memory, 0)


def test_a_write_outside_the_view_is_found(device):
    emulate = device.double.emulate

    def faulty(launch, arrays):
        emulate(launch, arrays)
        start = next(m[0] for m in arrays if m[0] <= launch.pointers.y < m[0] + m[1])
        device.double.host(device.cupy.ndarray(1, np.float32, _at(device, start)))[...] = 1

    device.double.emulate = faulty
    shape = next(shape for shape in correct.SHAPES if shape.name == "off by one")
    row = correct.check(device, correct.Truth(shape, "float32"), "BLOCK", 1)
    assert row["wrong"] == ["outside"]


def test_bits_that_change_are_found(device):
    emulate, count = device.double.emulate, []

    def faulty(launch, arrays):
        emulate(launch, arrays)
        count.append(launch)
        if len(count) == 5:  # of the second repeat
            y = device.double.host(device.cupy.ndarray(4, np.uint8, _at(device, launch.pointers.y)))
            y ^= 1

    device.double.emulate = faulty
    row = correct.check(device, correct.Truth(correct.SMALL[0], "float32"), "BLOCK", 2)
    assert (row["ok"], row["same_bits"], row["wrong"]) == (False, False, [])


@pytest.mark.parametrize("way", [None, "GRID"])
def test_graph_replay(device, way):
    assert correct.graph(device, way) == {"ok": True}


def test_in_place_and_stray_values(device):
    assert correct.in_place(device) == {"ok": True}
    assert correct.stray(device) == {"ok": True}


@pytest.mark.parametrize("kind", ["first", "last"])
@pytest.mark.parametrize("name", correct.BEYOND)
def test_beyond_batch_norm(device, monkeypatch, name, kind):
    monkeypatch.setattr(correct, "BEYOND_SHAPES", {"first": (12, 3, 256), "last": (150, 32, 1)})
    row = correct.beyond(device, name, kind, None)
    assert (row["wrong"], row["same_bits"]) == ([], True), row["eps"]
    assert set(row["eps"]) == {"y", "dx", "sums"} | ({"dr"} if correct.BEYOND[name][2] else set())


FAR = correct.SMALL[1]._replace(name="far", offset=1e4)  # six channels, 10^4 deviations from 0


@pytest.mark.parametrize("way", [None, "SPLIT"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_mean_far_from_0_is_right(device, dtype, way):
    """float64 keeps hi + lo to more digits than hi has."""
    row = correct.check(device, correct.Truth(FAR, dtype), way, 1)
    assert (row["wrong"], row["ok"]) == ([], True), row["eps"]


@pytest.mark.parametrize("part", [0, 1])
def test_a_mean_far_from_0_that_is_off_by_little_is_found(device, part):
    """By 10^-12 of a deviation, half an ulp of hi there, in lo; by an ulp, in hi."""
    emulate, truth = device.double.emulate, correct.Truth(FAR, "float64")

    def faulty(launch, arrays):
        emulate(launch, arrays)
        if launch.pointers.table and launch.pointers.dy == 0:
            table = device.double.host(device.cupy.ndarray((6, 6), np.float64, _at(device, launch.pointers.table)))
            table[part, 4] += 1e-12 * np.sqrt(truth.table[2, 4]) if part else np.spacing(table[0, 4])

    device.double.emulate = faulty
    row = correct.check(device, truth, "BLOCK", 1)
    assert row["wrong"] == ["mean"]


@pytest.fixture
def doubles(monkeypatch):
    """Of CuPy and PyTorch, whose arrays can be computed with; kernels are the reference's."""
    state = State()
    for cupy, _ in in_their_places(monkeypatch, state):
        yield SimpleNamespace(put=cupy.array, get=cupy.asnumpy, state=state)


@pytest.mark.parametrize("kind", ["CuPy", "PyTorch"])
def test_public_functions(doubles, kind):
    row = functions.public(doubles, kind)
    assert row["ok"], row
    # y, dx and two sums, twice; infer's, two statistics; of a layer y, dx, dgamma, y in evaluation
    assert len(row["errors"]) == 19
    assert {call.stream for call in doubles.state.calls} == {0 if kind == "CuPy" else 1000}


@pytest.mark.parametrize("kind", ["CuPy", "PyTorch"])
def test_public_functions_that_are_wrong(doubles, kind, monkeypatch):
    infer = fastbn.infer
    monkeypatch.setattr(fastbn, "infer", lambda x, *a: x if isinstance(x, np.ndarray) else infer(x, *a))
    row = functions.public(doubles, kind)
    assert not row["ok"]
    assert [error > 1e-4 for error in row["errors"]].index(True) == 12


SIMULATED = """
import json
from simulator import without_threads
without_threads()
from fastbn.bench.gpu import functions
functions.PUBLIC = 5, 3, 3, 2
rows = [functions.public(None, kind) for kind in ("Numba", "Numba by numba.cuda")]
print(json.dumps(rows + [functions.by_numba(None, name, "Numba") for name in functions.BY_NUMBA]))
"""


def test_public_functions_on_numba_arrays():
    """In the simulator, where both kinds go to numba.cuda."""
    pytest.importorskip("greenlet", reason="the simulator needs it")
    env = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": os.path.dirname(__file__)}
    env.pop("FASTBN_BACKEND", None)
    done = subprocess.run([sys.executable, "-c", SIMULATED], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["ok"], len(row["errors"])) for row in rows] == [(True, 15)] * 2 + [(True, 32), (True, 18)], rows


class Broken:
    """numba-cuda 0.30.4 beside NumPy 2.5."""

    def find_spec(self, name, *_):
        if name == "numba.cuda":
            raise AttributeError("module 'numpy' has no attribute 'row_stack'")


@pytest.mark.parametrize("kind", ["Numba", "Numba by numba.cuda", "PyTorch"])
def test_a_library_that_cannot_be_imported_is_a_note(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "numba.cuda", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.setitem(sys.modules, "torch", None)
    one = Run(Rows(tmp_path / "rows.jsonl"), quiet())
    one.each("correct", [(f"public {kind}", lambda: functions.public(None, kind))])
    (row,) = one.rows.all
    assert set(row) == {"stage", "case", "note"}
    assert row["note"].startswith("ModuleNotFoundError: " if kind == "PyTorch" else "AttributeError: module 'numpy'")
    assert tables.tables(one.rows) == []
    assert capsys.readouterr().err == ""


def test_every_kind_of_array_is_a_case(tmp_path, monkeypatch):
    monkeypatch.setattr(correct, "SHAPES", [])
    for name in ("graph", "in_place", "stray", "beyond", "giant"):
        monkeypatch.setattr(correct, name, lambda *_: {"ok": True})
    monkeypatch.setattr(correct, "public", lambda _, kind: {"ok": True, "kind": kind})
    one = Run(Rows(tmp_path / "rows.jsonl"), quiet())
    correct.correct(one)
    kinds = [row["kind"] for row in one.rows.all if "kind" in row]
    assert kinds == ["CuPy", "PyTorch", "Numba", "Numba by numba.cuda"]


def test_build(device, tmp_path, monkeypatch):
    compiler = importlib.import_module("fastbn.kernels.cuda.compile")
    monkeypatch.setattr(compiler, "machine_code", device.double.machine_code)
    monkeypatch.setattr(build, "SHAPES", correct.SMALL)
    one = Run(Rows(tmp_path / "rows.jsonl"), device, quick=True, end=time.monotonic() + 60)
    build.build(one)
    rows = one.rows.of("build")
    assert len(rows) > 10
    assert all(row["registers"] == 64 and row["spilled"] == 0 and row["blocks_on_sm"] for row in rows)
    assert any("GRID" in row["case"] and row["fits"] for row in rows)


def test_speed(device, tmp_path, monkeypatch):
    """On tiny tensors, with a clock that tells 10, 20, ... in the order of the contenders; PyTorch isn't there."""
    clock = iter(range(10, 1000, 10))

    def turn(cupy, call, sets):
        call(*sets[0])
        found = next(clock)
        return speed.Turn(lambda: float(found))

    monkeypatch.setattr(speed, "cupy_turn", turn)
    monkeypatch.setattr(speed, "rotated", lambda _: 1)
    monkeypatch.setattr(
        speed, "TIMED", [speed.Timed((2, 3, 8, 8), "first", "float32"), speed.Timed((64, 8), "last", "float16")]
    )
    monkeypatch.setattr(device.cupy, "asarray", device.put)
    monkeypatch.setattr(speed, "host", lambda _: {"launch": 5.0})
    monkeypatch.setitem(sys.modules, "torch", None)
    one = Run(Rows(tmp_path / "rows.jsonl"), device, end=time.monotonic() + 0.5)
    speed.speed(one)
    host, first, second, *blocks = one.rows.of("speed")
    assert [(row["block_forward"], row["block_backward"], row["copy_of_x"]) for row in blocks] == [
        (70, 80, 90),
        (100, 110, 120),
    ]
    assert host["launch"] == 5.0
    assert (first["ours_forward"], first["ours_backward"], first["copy"]) == (10, 20, 30)
    assert (second["ours_forward"], second["ours_backward"], second["copy"]) == (40, 50, 60)
    assert first["floor_forward_bytes"] == 2 * first["mbytes"] * 1e6
    assert first["floor_backward_bytes"] == 3 * first["mbytes"] * 1e6
    assert first["model_forward"] > 0
    assert "torch" in first["notes"]
    shown = {title: lines for title, _, lines in tables.tables(one.rows)}
    lines = shown["Speed: medians; x a peer: its time over ours"]
    assert [line[2] for line in lines] == ["10.0", "20.0", "40.0", "50.0"]
    assert lines[1][4] == "0.44"  # 20 over one and a half copies of 30


# ---- tools


def script(folder, name, text):
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_tools_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "tool_path", lambda _: None)
    one = Run(Rows(tmp_path / "rows.jsonl"), quiet(), end=time.monotonic() + 60)
    tools.sanitize(one)
    tools.profile(one)
    notes = [row["note"] for row in one.rows.all]
    assert notes == ["compute-sanitizer isn't installed"] * 3 + ["ncu isn't installed"]


@pytest.mark.parametrize(("ending", "ok"), [("", True), ("sys.exit(9)", False)])
def test_sanitize(tmp_path, monkeypatch, ending, ok):
    """A tool that runs nothing but writes what the child would."""
    text = f"""
    import json, sys
    out = sys.argv[sys.argv.index("--out") + 1]
    with open(out, "w") as file:
        file.write(json.dumps({{"stage": "correct", "case": "a", "ok": True}}) + chr(10))
        file.write(json.dumps({{"stage": "correct", "case": "took", "seconds": 1.0}}) + chr(10))
    print("ERROR SUMMARY")
    {ending}
    """
    path = script(tmp_path, "compute-sanitizer", text)
    monkeypatch.setattr(tools, "tool_path", lambda _: path)
    one = Run(Rows(tmp_path / "rows.jsonl"), quiet(), end=time.monotonic() + 60)
    tools.sanitize(one)
    assert [row["case"] for row in one.rows.all] == ["memcheck", "racecheck", "synccheck"]
    assert [row["ok"] for row in one.rows.all] == [ok] * 3
    assert all(row["cases"] == 1 and "ERROR SUMMARY" in row["tail"] for row in one.rows.all)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="-P is new in Python 3.11")
def test_a_folder_named_fastbn_is_not_the_package_where_the_command_is_told_so(tmp_path):
    """What a tool watches is the same command, in the same folder."""
    (tmp_path / "fastbn").mkdir()
    (tmp_path / "fastbn" / "__init__.py").write_text("raise ImportError('not this one')")
    code = "import subprocess, sys\nfrom fastbn.bench.gpu.tools import _self\n"
    code += "sys.exit(subprocess.call([*_self(), '-h']))"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "STAGE" in done.stdout


CSV = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","bn","dram__bytes_read.sum","byte","1,000"
"0","bn","dram__bytes_write.sum","byte","500"
"0","bn","gpu__time_duration.sum","nsecond","2,000"
"1","bn","dram__bytes_read.sum","byte","10"
"1","bn","dram__bytes_write.sum","byte","20"
"1","bn","gpu__time_duration.sum","nsecond","1,000"
"2","bn","dram__bytes_read.sum","byte","n/a"
"""


def test_the_metrics_of_every_launch():
    first, second = tools.read_ncu(CSV)
    assert list(first.values()) == [1000, 500, 2000]
    assert list(second.values()) == [10, 20, 1000]
    assert tools.read_ncu("no header") == []


def test_profile(tmp_path, monkeypatch):
    """Two launches of one case: their bytes add up."""
    text = f"""
    import json, sys
    after = lambda name: sys.argv[sys.argv.index(name) + 1]
    open(after("--log-file"), "w").write({CSV!r})
    row = {{"stage": "once", "case": "x forward", "launches": 2, "plan": "SPLIT", "model_bytes": 1200}}
    row["floor_bytes"] = 1000
    open(after("--out"), "w").write(json.dumps(row))
    """
    path = script(tmp_path, "ncu", text)
    monkeypatch.setattr(tools, "tool_path", lambda _: path)
    one = Run(Rows(tmp_path / "rows.jsonl"), quiet(), end=time.monotonic() + 60)
    tools.profile(one)
    found = one.rows.of("profile")[0]
    assert (found["case"], found["dram_bytes"], found["over_floor"], found["us"]) == ("x forward", 1530, 1.53, 3.0)
    assert found["over_model"] == 1.275


def test_once_says_what_ncu_will_see(device, tmp_path, monkeypatch):
    monkeypatch.setattr(device.cupy, "asarray", device.put)
    monkeypatch.setattr(tools, "PROFILED", [speed.Timed((2, 3, 8, 8), "first", "float32")])
    file = tmp_path / "rows.jsonl"
    assert gpu_check.main(["--once", "--out", str(file)], device) == 0
    forward, backward = Rows(file).of("once")
    assert forward["launches"] + backward["launches"] == len(device.double.started)
    assert backward["floor_bytes"] == 1.5 * forward["floor_bytes"]


# ---- bars


def timed(**changes):
    row = {
        "mbytes": 100.0, "layout": "first", "copy": 100.0, "ours_forward": 110.0, "ours_backward": 180.0,
        "native_forward": 165.0, "native_backward": 270.0, "cudnn_forward": 121.0, "compile_forward": 220.0,
        "model_forward": 100.0, "model_backward": 150.0, "model_forward_bytes": 2.0, "floor_forward_bytes": 2.0,
        "model_backward_bytes": 3.0, "floor_backward_bytes": 3.0, "plan_forward": "p", "plan_backward": "p",
    }  # fmt: skip
    return {**row, **changes}


def values(rows):
    return {bar.name: bar.values(rows) for bar in tables.BARS}


def test_what_the_bars_are_held_against(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    rows.add("speed", "a", **timed())
    rows.add("speed", "small", **timed(mbytes=49.0))
    rows.add("speed", "on chip", **timed(layout="last", ours_forward=130.0))
    rows.add("speed", "read twice", **timed(layout="last", model_forward_bytes=2.5, model_backward_bytes=3.5))
    rows.add("speed", "128x1024 last float32", **timed(mbytes=0.5, ours_forward=3.5))
    rows.add("speed", "host", **{"forward, out=": 8.0, "forward": "ImportError"})
    rows.add("profile", "a", model_bytes=10, floor_bytes=10, over_floor=1.01, dram_bytes=1, over_model=1, plan="p")
    rows.add("profile", "b", model_bytes=12, floor_bytes=10, over_floor=1.3, dram_bytes=1, over_model=1, plan="p")
    found = values(rows)
    assert found["forward, channels first / copy"] == [1.1]
    assert found["backward, channels first / 1.5 copies"] == [1.2]
    assert found["forward, channels last on chip / copy"] == [1.3]
    assert found["over PyTorch native, forward"] == [1.5, 165 / 130, 1.5]
    assert found["over the best of PyTorch, on 90 % of rows"][:3] == [1.1, 121 / 130, 1.1]
    assert found["DRAM bytes / floor, where the model says floor"] == [1.01]
    assert found["(128, 1024) by graph replay, microseconds"] == [3.5]
    assert found["host, forward with out=, microseconds"] == [8.0]


def test_no_rows_no_bars(tmp_path):
    assert set(map(tuple, values(Rows(tmp_path / "none")).values())) == {()}
    assert tables.tables(Rows(tmp_path / "none")) == []


def bar(most, judged):
    return tables.Bar("b", 1.0, 0.9, most, judged, lambda _: [])


def test_how_bars_are_judged():
    assert tables.verdict(bar(True, "worst"), [0.5, 1.1, 0.7]) == (1.1, False)
    assert tables.verdict(bar(False, "worst"), [1.5, 1.1, 1.7]) == (1.1, True)
    assert tables.verdict(bar(False, "median"), [0.5, 1.1, 1.7]) == (1.1, True)
    assert tables.verdict(bar(False, "share"), [0.5, *[1.2] * 9]) == (1.2, True)
    assert tables.verdict(bar(False, "share"), [0.5, 0.6, *[1.2] * 8]) == (0.6, False)


@pytest.mark.parametrize("rich", [True, False])
def test_the_tables_with_and_without_rich(tmp_path, monkeypatch, capsys, rich):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    rows = Rows(tmp_path / "rows.jsonl")
    rows.add("speed", "a [first]", **timed(ours_forward=130.0))
    rows.add("build", "k", registers=128, spilled=16, fits=True)
    rows.add("sanitize", "memcheck", ok=True, cases=7)
    tables.show(rows)
    shown = capsys.readouterr().out
    for text in (
        "a [first] forward",
        "Build: 1 kernels, 1 that spill",
        "memcheck",
        "<= 1.2",
        "1.3 (worst of 1)",
        "SHORT",
    ):
        assert text in shown


def test_plans_of_what_must_be_copied(device):
    x = device.put(np.zeros((2, 3, 20), np.float32))[:, :, ::2]
    assert run.plans(device, x, x) == [None, None]
