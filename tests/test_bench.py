"""The benchmark harness: its table of shapes on our kernels, and what it would do with good, bad and missing results.

Nothing here asserts a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numba
import numpy as np
import pytest
from cases import TOLERANCE, eps
from fastbn.bench import arrays, bars, command, floor, measure, peers, report, shapes, startup
from fastbn.bench.measure import Budget, Row
from fastbn.bench.shapes import BY_NAME, SHAPES, Case, Selection

import fastbn
from fastbn import bench
from fastbn.__main__ import main

for dependency in ("rich", "matplotlib"):
    pytest.importorskip(dependency)

BRIEF = Budget(0.0, 1, 1)
SMALL = [shape.small() for shape in SHAPES if shape.group not in shapes.ONLY_BY_NAME]
# Shapes of one size and layout are one test: ResNet-50's layers shrink to few.
TABLE = {
    (s.dims, layout, dtype, s.order, s.slack): Case(s, layout, dtype)
    for s in SMALL
    for layout in s.layouts
    for dtype in shapes.DTYPES
}


@pytest.fixture(autouse=True)
def _passive(monkeypatch):
    """The command would start itself again, in place of the tests."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


@pytest.fixture
def small(monkeypatch):
    """The command's own run, on shrunk shapes, one round each; the process keeps its cores and its threads."""
    threads = numba.get_num_threads()
    if hasattr(command.os, "sched_setaffinity"):
        monkeypatch.setattr(command.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(shapes, "SHAPES", [shape.small() for shape in SHAPES])
    for name in ("FULL", "QUICK", "CHECK"):
        monkeypatch.setattr(measure, name, BRIEF)
    monkeypatch.setattr(measure, "SAMPLE", 0.0)
    monkeypatch.setattr(startup, "warm", lambda: 0.5)
    monkeypatch.setattr(startup, "cold", lambda: 30.0)
    yield
    numba.set_num_threads(threads)


@pytest.mark.parametrize("case", TABLE.values(), ids=lambda case: case.name)
@pytest.mark.parametrize("out", [True, False], ids=["out", "fresh"])
@pytest.mark.usefixtures("tiny")
def test_every_named_shape_is_right(case, out):
    found = arrays.Arrays(case)
    for function, given in Selection(out=(out,)).calls():
        call = measure.prepare(ours(), found, function, given)
        assert isinstance(call, peers.Call), call
        results = call.read(call.run())
        # dgamma and dbeta are sums, of up to 14 roundings in float64 (test_functions.py); half types have float32 sums.
        allowed = 14 if function == "backward" and found.dtype.itemsize > 2 else TOLERANCE[case.dtype]
        assert found.error(function, results) <= allowed * eps(found.dtype)
        if function in ("forward", "infer"):
            assert (results[0] is found.y) == given
        if function == "backward":
            assert (results[0] is found.dx) == given


class Ours(peers.Fastbn):
    def __init__(self):
        self.version = "0"


def ours():
    return Ours()


def plain(name="odd-7x13x5x3", layout="first", dtype="float32"):
    return Case(BY_NAME[name], layout, dtype)


def test_the_table_has_what_was_asked_for():
    assert len(BY_NAME) == len(SHAPES)
    assert all(math.prod(s.small().dims) < 200_000 and s.reason for s in SHAPES)
    assert all((s.layouts == ("nc",)) == (len(s.dims) == 2) for s in SHAPES)
    assert {s.dims for s in SHAPES} >= {(32, 64, 112, 112), (32, 64), (1_000_000, 32), (32, 1_000_000), (7, 13, 5, 3)}
    for case in Selection().cases():
        twin = case.twin()
        assert twin is None or twin.dtype == ("float64" if case.dtype == "float64" else "float32")
    x = BY_NAME["sliced-last"].empty("last", np.dtype("float32"))
    assert x.strides == (56 * 56 * 80 * 4, 4, 56 * 80 * 4, 80 * 4)
    assert BY_NAME["transposed-100352x64"].empty("nc", np.dtype("float32")).flags.f_contiguous
    assert BY_NAME["permuted-cnhw"].empty("first", np.dtype("float32")).transpose(1, 0, 2, 3).flags.c_contiguous


def test_selection():
    chosen = Selection(shape=("mlp", "odd-3x101"), dtype=("float64",))
    assert [c.name for c in chosen.cases()] == [
        "mlp-32x64 float64", "mlp-256x1024 float64", "mlp-8192x1024 float64", "odd-3x101 float64",
    ]  # fmt: skip
    assert [c.shape.name for c in dataclasses.replace(chosen, at_least_mb=25).cases()] == ["mlp-8192x1024"]
    assert Selection(function=("moments", "infer"), out=(True,)).calls() == [("moments", False), ("infer", True)]
    assert not any(c.shape.group == "growth" for c in Selection().cases())
    assert len(Selection(shape=("growth",), dtype=("float32",)).cases()) == 5
    assert {c.layout for c in Selection(layout=("last",)).cases()} == {"last"}
    with pytest.raises(ValueError, match=r"no shape 'resnet'; expected one of .*resnet50"):
        Selection(shape=("resnet",))
    with pytest.raises(ValueError, match="no dtype 'float8'"):
        Selection(dtype=("float8",))


def test_a_large_case_is_checked_on_whole_channels_and_filled_to_the_end(monkeypatch):
    monkeypatch.setattr(arrays, "FULL_CHECK", 50)
    for layout in ("first", "last"):
        a = arrays.Arrays(plain(layout=layout))
        assert a.exact("forward")[0].shape == (7, 2, 5, 3)
        assert len(np.unique(a.x)) > 0.99 * a.x.size
        y = np.asarray(fastbn.reference.forward(a.x, a.gamma, a.beta)[0])
        assert a.error("forward", [y]) == 0
        y[3, 12, 4, 2] += 0.25  # the last channel is among those that are checked
        assert a.error("forward", [y]) > 0.1
        y[3, 12, 4, 2] = np.nan
        assert a.error("forward", [y]) == np.inf


class Wrong(peers.NumPy):
    """Ignores gamma, or fails."""

    name = "PyTorch"

    def call(self, arrays, function, out):
        if function == "infer":
            raise RuntimeError("no memory")
        if function == "moments":
            return None
        arrays = type("Other", (), {**vars(arrays), "gamma": arrays.gamma * 0 + 1, "y": arrays.y, "dy": arrays.dy,
                                    "dx": arrays.dx})()  # fmt: skip
        return super().call(arrays, function, out)


def test_a_peer_with_a_wrong_result_is_refused():
    rows = list(measure.measure(plain(), Selection().calls(), [ours(), Wrong(1)], BRIEF))
    notes = {row.key[1:]: row.note for row in rows if row.library == "PyTorch"}
    for out in (True, False):
        assert notes["forward", out].startswith("wrong: off by ")
        assert notes["backward", out].startswith("wrong: off by ")
        assert notes["infer", out] == "failed: RuntimeError: no memory"
    assert notes["moments", False] == measure.NOT_OFFERED
    assert all(row.ms is None for row in rows if row.library == "PyTorch")
    assert all(row.ms is not None and row.copies > 0 for row in rows if row.library == "fastbn")


@pytest.mark.parametrize(
    ("dtype", "right", "wrong"), [("bfloat16", 0.03, 0.1), ("float16", 0.008, 0.03), ("float32", 0.008, 0.03)]
)
def test_a_few_roundings_of_a_peer_are_not_wrong(dtype, right, wrong):
    """Of bfloat16 0.03 is 4 eps."""

    class Off(peers.NumPy):
        def __init__(self, by):
            self.by = by

        def call(self, arrays, function, out):  # noqa: ARG002
            y = np.asarray(fastbn.reference.forward(arrays.x.astype(np.float64), arrays.gamma, arrays.beta)[0])
            return peers.Call(lambda: None, lambda _: [y + self.by * np.maximum(1, np.abs(y))])

    a = arrays.Arrays(plain(dtype=dtype))
    assert isinstance(measure.prepare(Off(right), a, "forward", False), peers.Call)
    assert measure.prepare(Off(wrong), a, "forward", False).startswith("wrong: off by ")


def test_a_result_left_from_another_library_is_not_taken_for_its_own():
    class Idle(peers.NumPy):
        def call(self, arrays, function, out):  # noqa: ARG002
            return peers.Call(lambda: None, lambda _: (arrays.y,))

    a = arrays.Arrays(plain())
    assert isinstance(measure.prepare(ours(), a, "forward", True), peers.Call)
    assert measure.prepare(Idle(1), a, "forward", True) == "wrong: off by inf"


def test_libraries_that_are_not_installed_are_skipped_by_name(monkeypatch):
    for name in ("torch", "jax", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    found, skipped = peers.load(peers.PEERS, 1)
    assert [library.name for library in found] == ["fastbn", "NumPy"]
    assert list(skipped) == ["PyTorch", "JAX", "ONNX Runtime"]
    assert all("import of" in reason for reason in skipped.values())


def test_every_library_here_is_right_or_says_that_it_has_no_such_function():
    found, _ = peers.load(peers.PEERS, 1)
    for case in Selection(shape=("odd-7x13x5x3", "odd-3x101")).cases():
        a = arrays.Arrays(case)
        for library in found:
            for function, out in Selection().calls():
                call = measure.prepare(library, a, function, out)
                assert isinstance(call, peers.Call) or call == measure.NOT_OFFERED, (library.name, case.name, call)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 4096, 5000])  # around 64-byte pieces, and pieces of nothing
def test_copies(size, rng):
    source = rng.integers(0, 255, size, dtype=np.uint8)
    torch = pytest.importorskip("torch") if "torch" in sys.modules else None
    for name, copy in floor.copies(source, target := np.zeros_like(source), torch).items():
        target.fill(0)
        copy()
        np.testing.assert_array_equal(target, source, err_msg=name)


def test_the_floor_is_the_fastest_copy(monkeypatch):
    def sleep(seconds):
        return lambda: time.sleep(seconds)

    monkeypatch.setattr(measure, "copies", lambda *_: {"slow": sleep(0.02), "quick": sleep(0.001), "late": sleep(0.01)})
    (row,) = measure.measure(plain(), [("infer", True)], [ours()], BRIEF)
    assert row.copy_by == "quick"
    assert 1 <= row.copy_ms < 10


def test_everything_takes_turns_and_slow_ones_fewer(monkeypatch):
    seen = []
    calls = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b"),
             "slow": lambda: (time.sleep(0.11), seen.append("slow"))}  # fmt: skip
    monkeypatch.setattr(measure, "SAMPLE", 0.0)
    times = measure.take_turns(calls, Budget(0.0, 6, 6))
    assert [len(times[name][0]) for name in calls] == [6, 6, 3]
    turns = [name for name in seen[6:] if name != "slow"]
    assert all(sorted(pair) == ["a", "b"] for pair in zip(turns[::2], turns[1::2], strict=True))
    assert "aa" in "".join(turns)
    assert "ab" in "".join(turns)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
def test_each_call_follows_each_other_one_equally_often(count):
    names = list("abcdefg")[:count]
    found = measure.orders(names)
    rows = [next(found) for _ in range(2 * count)]
    assert all(sorted(row) == names for row in rows)
    neighbours = Counter(pair for row in rows for pair in itertools.pairwise(row))
    assert set(neighbours) == set(itertools.permutations(names, 2))
    assert len(set(neighbours.values())) <= 1
    assert count < 3 or len({tuple(row) for row in rows}) > count


def test_more_is_measured_beside_the_plain_call_alone(monkeypatch):
    """Also where the plain function wasn't asked for; y has a plain call with an x that nothing else reads."""
    turns = []

    def take_turns(runs, budget):
        turns.append([name if isinstance(name, str) else name[0] for name in runs])
        return {name: ([2.0 if name == "more" else 1.0] * budget.rounds, 1) for name in runs}

    monkeypatch.setattr(measure, "take_turns", take_turns)
    monkeypatch.setattr(measure, "copies", lambda *_: {"quick": lambda: None})
    calls = [("forward+relu", True), ("backward", False), ("backward+y", False)]
    rows = list(measure.measure(plain(), calls, [ours(), peers.NumPy(1)], BRIEF))
    library = [row.library for row in rows]
    assert [(row.function, row.out, row.plain) for row in rows] == [
        ("forward+relu", True, 2.0), ("backward", False, None), ("backward", False, None), ("backward+y", False, 2.0)
    ]  # fmt: skip
    assert library == ["fastbn", "fastbn", "NumPy", "fastbn"]
    assert [row.rounds for row in rows] == [2 * BRIEF.rounds, BRIEF.rounds, BRIEF.rounds, 2 * BRIEF.rounds]
    assert turns[0] == turns[2] == ["more", "plain", "copy"]
    assert turns[1][-1] == "copy"
    assert len(turns[1]) == 3


def test_short_calls_are_repeated_within_a_sample():
    (seconds, repeats), = measure.take_turns({"call": lambda: None}, Budget(0.0, 2, 2)).values()  # fmt: skip
    assert repeats > 100
    assert len(seconds) == 2


def test_all_are_repeated_as_often_within_a_sample():
    """A call that alone is repeated finds its own data in the caches, and the others each other's."""
    calls = {"short": lambda: None, "longer": lambda: sum(range(2_000)), "slow": lambda: time.sleep(0.11)}
    repeats = {name: often for name, (_, often) in measure.take_turns(calls, Budget(0.0, 2, 2)).items()}
    assert repeats["short"] == repeats["longer"] > 100
    assert repeats["slow"] == 1


def row(case, function="forward", out=True, library="fastbn", ms=1.0, copy=1.0, **more):
    about = (case.name, case.shape.name, case.shape.dims, case.shape.group, case.layout, case.dtype)
    return Row(*about, function, out, library, ms, ms or 0, ms or 0, 7, 1, case.bytes / 1e6, copy, "numpy", **more)


RESNET = Selection(("resnet50",), ("first",), ("float32",), ("forward",), (True,), 25)


def made_up(ms, library="fastbn", **more):
    cases = RESNET.cases()
    return [row(c, library=library, ms=t, **more) for c, t in zip(cases, ms, strict=True)]


def test_a_bar_over_each():
    bar = bars.Bar("each", "copies", RESNET, most=1.3)
    assert len(RESNET.cases()) == 5
    good = bars.judge(bar, made_up([1.0, 1.1, 1.2, 1.3, 1.0]), {})
    assert (good.passed, good.value) == (True, 1.3)
    short = bars.judge(bar, made_up([1.0, 1.4, 1.2, 2.6, 1.0]), {})
    assert not short.passed
    assert short.value == 2.6
    assert [name for name, _ in short.short] == [
        "resnet50-512x28 first float32 forward out=".replace("512x28", n) for n in ("512x28", "64x56")
    ]
    assert report.shortfall(short) == "short: 2"


def test_a_bar_over_the_geometric_mean():
    bar = bars.Bar("mean", "copies", RESNET, "geometric mean", most=1.2)
    assert bars.judge(bar, made_up([0.5, 2.0, 1.0, 1.0, 1.0]), {}).value == pytest.approx(1.0)
    assert bars.judge(bar, made_up([0.5, 2.0, 1.0, 1.0, 1.0]), {}).passed
    assert not bars.judge(bar, made_up([1.3, 1.3, 1.3, 1.3, 1.3]), {}).passed
    both = dataclasses.replace(bar, select=dataclasses.replace(RESNET, dtype=("float32", "float64")))
    rows = [row(case, ms={"float32": 0.5, "float64": 1.3}[case.dtype]) for case, _ in both.wanted()]
    assert [name for name, _ in bars.judge(both, rows, {}).short] == ["mean of float64"]


def test_a_bar_against_pytorch():
    bar = bars.Bar("never slower", "PyTorch", RESNET, least=1.0)
    mine = made_up([1.0, 1.0, 1.0, 1.0, 1.0])
    assert bars.judge(bar, mine + made_up([4.0, 1.0, 2.0, 3.0, 5.0], "PyTorch"), {}).passed
    short = bars.judge(bar, mine + made_up([4.0, 0.9, 2.0, 3.0, 5.0], "PyTorch"), {})
    assert (short.passed, short.value) == (False, 0.9)
    assert len(bars.judge(bar, mine, {}).missing) == 5  # not installed is not passed
    absent = made_up([None] * 5, "PyTorch", note=measure.NOT_OFFERED)
    assert bars.judge(bar, mine + made_up([4.0, 1.0, 2.0, 3.0, 5.0], "PyTorch")[:4] + absent[4:], {}).passed
    wrong = made_up([None] * 5, "PyTorch", note="wrong: off by 3")
    assert len(bars.judge(bar, mine + wrong, {}).missing) == 5
    assert not bars.judge(bar, mine + absent, {}).passed  # compared with nothing at all


@pytest.mark.parametrize("name", ["copies", "twin"])
def test_what_was_not_measured_falls_short(name):
    bar = bars.Bar("each", name, Selection(("awkward",), out=(True,), function=("infer",)), most=1.5)
    rows = [row(case, "infer", twin=1.2) for case, _ in bar.wanted()]
    assert bars.judge(bar, rows, {}).passed
    assert bars.judge(bar, rows[1:], {}).missing == (bars.label(rows[0].key),)
    assert not bars.judge(bar, rows[1:], {}).passed
    assert not bars.judge(bar, [], {}).passed
    assert not bars.judge(bar, [dataclasses.replace(rows[0], ms=None, note="wrong"), *rows[1:]], {}).passed


def test_microseconds_add_up_with_out_and_without():
    bar = bars.Bar(
        "small", "us", Selection(("mlp-32x64",), dtype=("float32",), function=("forward", "backward")), most=35
    )
    case = plain("mlp-32x64", "nc")
    rows = [row(case, f, out, ms=0.017 + 0.002 * out) for f in ("forward", "backward") for out in (True, False)]
    verdict = bars.judge(bar, rows, {})
    assert [name for name, _ in verdict.short] == ["out="]
    assert verdict.value == pytest.approx(38)
    assert not bars.judge(bar, rows[1:], {}).passed


def test_growth_is_against_the_smallest_size():
    bar = bars.Bar("growth", "growth", Selection(("growth",), None, ("float32",), ("forward",), (True,)), most=1.2)
    rows = [row(case, ms=ms) for (case, _), ms in zip(bar.wanted(), [2.0, 2.2, 1.9, 2.3, 2.5], strict=True)]
    assert bars.judge(bar, rows, {}).short[0][1] == pytest.approx(1.25)
    assert bars.judge(bar, rows[:4], {}).missing
    assert bars.judge(dataclasses.replace(bar, most=1.3), rows, {}).passed


def test_seconds_of_processes():
    bar = bars.Bar("start", "seconds", most=1.0, process="warm")
    assert bars.judge(bar, [], {"warm": 0.9}).passed
    assert not bars.judge(bar, [], {"warm": 1.1}).passed
    assert bars.judge(bar, [], {"cold": 0.1}).missing == ("warm process",)


def test_only_near_misses_are_measured_again():
    bar = bars.Bar("each", "copies", RESNET, most=1.0)
    near = bars.judge(bar, made_up([1.0, 1.05, 1.0, 1.09, 1.0]), {}, near=0.1)
    assert [case.shape.name for case, _ in near.again] == ["resnet50-512x28", "resnet50-64x56"]
    assert not bars.judge(bar, made_up([1.0, 1.05, 1.0, 1.2, 1.0]), {}, near=0.1).again
    assert not bars.judge(bar, made_up([1.0, 1.05, 1.0, 1.09, 1.0])[1:], {}, near=0.1).again
    old, new = made_up([1.0, 1.05, 1.0, 1.09, 1.0]), made_up([0.9, 0.9, 0.9, 0.9, 0.9])[1:2]
    assert [r.ms for r in bars.replaced(old, new)] == [1.0, 0.9, 1.0, 1.09, 1.0]


def test_the_bars_of_the_file():
    found = bars.load(bench.BARS)
    table = {(bar.name, bar.measure, bar.over): bar.limit for bar in found.bars}
    assert table["forward, channels first, each", "copies", "each"] == "≤ 1.3"
    assert table["backward, channels last and (N, C)", "PyTorch", "geometric mean"] == "≥ 3.5"
    assert table["infer", "copies", "geometric mean"] == "≤ 1.05"
    needed = bars.needs(found.bars)
    everything = {(c, call) for c in Selection().cases() for call in Selection().calls()}
    assert everything <= {(c, call) for c, (calls, _) in needed.items() for call in calls}  # the whole sweep
    assert all(twin == (c.twin() is not None) for c, (_, twin) in needed.items() if c.shape.group == "awkward")
    for name in (bar for bar in found.bars if bar.over == "geometric mean"):
        assert all(case.bytes >= 25e6 for case, _ in name.wanted())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("near = 0.1\nagain = 2\nbar = []", "each bar needs"),
        ("again = 2\n[[bar]]\nname = 'a'\nmeasure = 'copies'\nmost = 1", "near"),
        ("near = 0.1\nagain = 2\n[[bar]]\nname = 'a'\nmeasure = 'copies'", "one of most and least"),
        ("near = 0.1\nagain = 2\n[[bar]]\nname = 'a'\nmeasure = 'speed'\nmost = 1", "known measure"),
        ("near = 0.1\nagain = 2\n[[bar]]\nname = 'a'\nmeasure = 'copies'\nmust = 1", "must"),
        (
            "near = 0.1\nagain = 2\n[[bar]]\nname = 'a'\nmeasure = 'copies'\nmost = 1\nselect = {shape = ['b']}",
            "no shape",
        ),
        ("near = ", "nvalid"),
    ],
)
def test_a_file_of_bars_that_makes_no_sense(tmp_path, capsys, text, words):
    path = tmp_path / "bars.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        bars.load(path)
    assert main(["bench", "--check", str(path)]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_the_command_writes_what_it_measured(tmp_path, capsys):
    path = tmp_path / "run.json"
    options = ["--shape", "odd,mlp-32x64", "--dtype", "float32", "--peer", "numpy", "--threads", "1"]
    assert main(["bench", *options, "--json", str(path), "--plot", str(tmp_path / "plots")]) == 0
    text = capsys.readouterr().out
    assert "OMP_WAIT_POLICY=passive" in text
    assert "odd-7x13x5x3 last float32 c" in text
    facts = json.loads(path.read_text())
    assert facts["threads"] == 1
    assert facts["OMP_WAIT_POLICY"] == "passive"
    assert facts["skipped"] == {}
    assert set(facts["versions"]) == {"python", "numpy", "numba", "fastbn"}
    assert len(facts["rows"]) == 6 * 7 * 2  # 2 + 2 + 1 + 1 layouts of four shapes, calls, libraries
    assert {row["library"] for row in facts["rows"]} == {"fastbn", "NumPy"}
    assert all(row["ms"] > 0 and row["low"] <= row["ms"] <= row["high"] for row in facts["rows"])
    _, rows = report.read(path)
    assert [r.dims for r in rows[:2]] == [(9, 6), (9, 6)]
    drawn = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert drawn == [*(f"peers-{f}-float32.png" for f in sorted(shapes.FUNCTIONS)), "roofline-float32.png"]


BARS = """
near = 0.0
again = 2
[[bar]]
name = "loose"
measure = "copies"
most = 1e9
select = { shape = ["mlp-32x64"], dtype = ["float32"], function = ["forward"], out = [true] }
[[bar]]
name = "half"
measure = "twin"
most = 1e9
select = { shape = ["mlp-32x64"], dtype = ["bfloat16"], function = ["infer"] }
[[bar]]
name = "warm"
measure = "seconds"
process = "warm"
most = 1.0
"""


@pytest.mark.usefixtures("small")
def test_the_check_passes_or_falls_short(tmp_path, capsys):
    path, run = tmp_path / "bars.toml", tmp_path / "run.json"
    path.write_text(BARS)
    assert main(["bench", "--check", str(path), "--peer", "none", "--json", str(run)]) == 0
    assert "short" not in capsys.readouterr().out
    assert json.loads(run.read_text())["processes"] == {"warm": 0.5}
    path.write_text(BARS.replace("1e9", "1e-9", 1))
    assert main(["bench", "--check", str(path), "--peer", "none"]) == 1
    text = capsys.readouterr().out
    assert "short: 1" in text
    assert "loose: mlp-32x64 float32 forward out=" in text
    path.write_text(BARS.replace('"twin"', '"PyTorch"'))
    assert main(["bench", "--check", str(path), "--peer", "none"]) == 1
    assert "not measured: mlp-32x64 bfloat16 infer" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_a_run_that_is_interrupted_keeps_what_it_measured(tmp_path, capsys, monkeypatch):
    path, run = tmp_path / "bars.toml", tmp_path / "run.json"
    path.write_text(BARS)
    measured = []

    def measure_one(case, *_):
        if measured:
            raise KeyboardInterrupt
        measured.append(row(case, ms=1.25))
        yield measured[0]

    monkeypatch.setattr(command.measure, "measure", measure_one)
    monkeypatch.setattr(command, "OFTEN", -1.0)
    assert main(["bench", "--check", str(path), "--peer", "none", "--json", str(run)]) == command.INTERRUPTED
    facts, rows = report.read(run)
    assert [(r.case, r.ms) for r in rows] == [(measured[0].case, 1.25)]
    assert facts["processes"] == {"warm": 0.5}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" of ")[0] for line in lines if " s: " in line] == ["1", "1", "2"]
    assert any(line.endswith(f" s: {measured[0].case}") for line in lines)


def test_some_bars_alone_start_no_process_that_they_do_not_need(monkeypatch):
    every = bars.load(bench.BARS)
    assert every.named(None) is every
    some = every.named(["infer", "weights"])
    assert 0 < len(some.bars) < len(every.bars)
    assert all("infer" in bar.name or "weights" in bar.name for bar in some.bars)
    monkeypatch.setattr(startup, "cold", lambda: pytest.fail("compiles everything"))
    assert command.processes(some.bars) == {}
    with pytest.raises(ValueError, match="no bar 'sidewards'"):
        every.named(["sidewards"])


@pytest.mark.usefixtures("small")
def test_a_near_miss_is_measured_again_and_may_pass(monkeypatch):
    found = iter([1.05, 1.02, 0.99])
    budgets, kept = [], []

    def measured(case, calls, libraries, budget, twin):
        budgets.append(budget.rounds)
        return [row(case, *call, ms=next(found)) for call in calls]

    monkeypatch.setattr(measure, "measure", measured)
    bar = bars.Bar("each", "copies", Selection(("mlp-32x64",), None, ("float32",), ("forward",), (True,)), most=1.0)
    rows, (verdict,) = command.check(bars.Bars((bar,), 0.1, 2), [ours()], lambda *found: kept.append(found))
    assert verdict.passed
    assert budgets == [1, 2, 4]
    assert [r.ms for r in rows] == [0.99]
    # What an interrupted check leaves.
    assert [[r.ms for r in found] for found, _ in kept] == [[1.05], [1.02], [0.99]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shape", "none"], "no shape 'none'"),
        (["--peer", "Keras"], "no peer 'Keras'; expected some of NumPy, PyTorch, JAX, ONNX Runtime, or none"),
        (["--threads", "0"], "expected 1 to"),
        (["--threads", "100000"], "expected 1 to"),
        (["--shape", "mlp", "--layout", "last"], "no case in"),
        (["--check", "nowhere.toml"], "nowhere.toml"),
        (["--check", "--bar", "sidewards"], "no bar 'sidewards'; expected part of a name, such as"),
    ],
)
def test_wrong_options(options, words, capsys, monkeypatch):
    monkeypatch.setattr(command, "sweep", lambda *_: pytest.fail("measures"))
    options = ["--threads", "1", *options] if "--threads" not in options else options
    assert main(["bench", *options]) == 1
    assert words in capsys.readouterr().err


def test_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["bench"]) == 1
    assert "rich not found; pip install 'fastbn[bench]'" in capsys.readouterr().err


def test_the_table_of_shapes(capsys):
    assert main(["bench", "--list"]) == 0
    assert "points-1000000x32" in capsys.readouterr().out


def test_the_command_starts_itself_again_with_passive_waits(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    asked = []

    def execve(program, words, environment):
        asked.append((words[1:], environment["OMP_WAIT_POLICY"]))
        raise KeyboardInterrupt  # nothing comes after it

    monkeypatch.setattr(command.os, "execve", execve)
    assert main(["bench", "--quick", "--peer", "none"]) == command.INTERRUPTED
    assert asked == [(["-m", "fastbn", "bench", "--quick", "--peer", "none"], "passive")]


def test_the_readme_table():
    rows = [
        *(row(c, f, ms=1.25) for c in RESNET.cases()[:2] for f in ("forward", "backward", "infer")),
        *(row(c, "forward", library="PyTorch", ms=5.0) for c in RESNET.cases()[:2]),
        row(plain()),
        row(RESNET.cases()[0], out=False, ms=9.0),
    ]
    facts = {"cpu": "a CPU", "threads": 2, "versions": {"numpy": "2"}}
    assert report.readme_table(facts, rows).splitlines() == [
        "| x | MB | forward, × copy | forward, × PyTorch | backward, × copy | backward, × PyTorch | infer, × copy "
        "| infer, × PyTorch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 32×64×112×112, channels first | 103 | 1.25 | 4.0 | 1.25 |  | 1.25 |  |",
        "| 32×64×56×56, channels first | 26 | 1.25 | 4.0 | 1.25 |  | 1.25 |  |",
        "",
        "(a CPU, 2 threads; numpy 2.)",
    ]


MEMORY = """
import json, sys
import numpy as np, fastbn
from collections import Counter
from pathlib import Path

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))

def peak(call):
    call()  # compiles, and starts the threads
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, at what is resident now
    before = status("VmRSS")
    kept = call()
    return status("VmHWM") - before

dtype, last, activation = np.dtype(sys.argv[1]), sys.argv[2] == "last", json.loads(sys.argv[3])
whole = dtype.kind == "u"
result = np.dtype(np.float32) if whole else dtype
shape = (96, 64, 128 * 4 // result.itemsize, 64)  # y has 201 MB: what grows with it, or x, shows beside 1 MB
def array(dtype=result):
    a = np.empty([shape[i] for i in (0, 2, 3, 1)], dtype).transpose(0, 3, 1, 2) if last else np.empty(shape, dtype)
    a.fill(1 if dtype.kind == "u" else 0.5)
    return a
x, y, dy, dx = array(dtype), array(), array(), None if whole else array()
dgamma, dbeta, mean, var = np.ones((4, 64), np.float32)
more = {"activation": activation}
alone = {"save": "y", "out": x} if activation == "leaky_relu" else {"out": y}
print(peak(lambda: fastbn.forward(x, **more)), y.nbytes)
saved = fastbn.forward(x, **more, **alone)[1]
for call in (
    lambda: fastbn.forward(x, **more, **alone),
    lambda: fastbn.backward(dy, saved, need=(not whole, True, True), out=(dx, dgamma, dbeta)),
    lambda: fastbn.infer(x, mean, var, **more, out=y),
    lambda: fastbn.moments(x),
):
    print(peak(call), 0)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize(
    ("dtype", "layout", "activation"),
    [
        ("float32", "first", None),
        ("float32", "last", None),
        ("float16", "first", None),
        ("float16", "last", None),
        ("float32", "first", "relu"),
        ("float32", "last", "leaky_relu"),
        ("uint8", "first", None),
    ],
)
def test_no_hidden_memory(dtype, layout, activation):
    """Peak of resident memory beyond inputs and outputs: at most 1 MB and 64 numbers a channel and thread.

    With ReLU x alone is kept; with leaky ReLU y, written over x; whole numbers have no float copy.
    malloc is told to map each block of 64 KB or more by itself, else it hands out memory that is resident already.
    """
    environment = {**command.os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    process = subprocess.run(
        [sys.executable, "-c", MEMORY, dtype, layout, json.dumps(activation)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    (fresh, size), *calls = [tuple(map(int, line.split())) for line in process.stdout.splitlines()]
    assert fresh > 0.95 * size  # a result of its own is seen
    threads = command.os.cpu_count() or 1
    assert len(calls) == 4
    for extra, _ in calls:
        assert extra <= (1 << 20) + 64 * 8 * 64 * threads
