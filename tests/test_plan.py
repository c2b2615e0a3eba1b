"""The planner by its properties, on random arrays and devices: launches fit, cover everything once, agree."""

import itertools
import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from emulator import planner
from hypothesis import assume, given, settings
from hypothesis import strategies as st

SIZES = {"f": 4, "d": 8, "e": 2, "E": 2}
settings.register_profile("plan", deadline=None, derandomize=True)
THOROUGH = settings(settings.get_profile("plan"), max_examples=500)

letters = st.sampled_from("fdeE")
devices = st.builds(
    planner.Device,
    sms=st.integers(1, 200),
    smem_block=st.sampled_from([48, 64, 99, 163, 227]).map(lambda kib: kib << 10),
    smem_sm=st.sampled_from([64, 100, 164, 228]).map(lambda kib: kib << 10),
    cluster=st.sampled_from([1, 2, 4, 8]),
    cooperative=st.booleans(),
    l2=st.integers(1, 100).map(lambda mib: mib << 20),
).filter(lambda d: d.smem_block <= d.smem_sm)
outers = st.one_of(st.integers(1, 40), st.sampled_from([1 << 10, 65536, 100003, 1 << 24]))
channels = st.one_of(st.integers(1, 70), st.sampled_from([256, 1000, 2048, 100000]))
inners = st.one_of(st.integers(1, 70), st.sampled_from([1, 1, 49, 196, 729, 3025, 3136, 12544]))


@st.composite
def calls(draw):
    """(view, letter, backward): arrays on one of the walkable layouts, with gaps, any start, some left out."""
    O, C, I, letter = draw(outers), draw(channels), draw(inners), draw(letters)  # noqa: E741
    size, order = SIZES[letter], draw(st.sampled_from(["OCI", "COI", "OIC"] if I == 1 else ["OCI", "COI"]))
    backward = draw(st.booleans())

    def strides():
        step, found = size, {}
        for axis in reversed(order):
            found[axis] = step
            n = {"O": O, "C": C, "I": I}[axis]
            gap = draw(st.sampled_from([0, 0, 0, 1, 8])) if axis != order[0] else 0
            step *= n + gap
        return found["O"], found["C"], found["I"]

    own = strides()
    x, y = own, draw(st.sampled_from([own, None, strides()]))
    dy = draw(st.sampled_from([own, strides()])) if backward else None
    bases = tuple(draw(st.sampled_from([0, 0, size])) for _ in range(3))
    return planner.View((O, C, I), x, y, dy, size, bases), letter, backward


def planned(call, device=planner.HOPPER, **how):
    """The plan, or nothing to look at where the arrays must be copied first."""
    view, letter, backward = call
    try:
        return planner.plan(view, letter, backward, device, **how)
    except planner.Unwalkable:
        assume(False)


def contiguous(O, C, I, size, backward=False):  # noqa: E741
    strides = (C * I * size, I * size, size)
    return planner.View((O, C, I), strides, strides, strides if backward else None, size)


@THOROUGH
@given(calls(), devices)
def test_what_is_launched_fits(call, device):
    p = planned(call, device)
    for plan, launch in [(q, one) for q in (p, p.split()) for one in q.launches]:
        assert 32 <= launch.threads <= planner.resident(p.letter)
        assert launch.threads % 32 == 0
        assert launch.shared <= device.smem_block
        assert 1 <= launch.grid < 1 << 31
        assert launch.grid % launch.cluster == 0
        assert launch.cluster <= device.cluster
        assert launch.cooperative == (plan.way == "GRID")
        assert not launch.cooperative or (device.cooperative and launch.grid <= device.slots(p.letter, p.threads))
        if launch.cooperative:  # all of these are resident, by shared memory, too
            on_sm = device.slots(p.letter, p.threads) // device.sms
            assert (launch.shared + 1024) * on_sm <= device.smem_sm
            assert launch.threads * on_sm <= planner.resident(p.letter)
        assert launch.options == ((f"-DFASTBN_CLUSTER={plan.K}",) if plan.way == "CLUSTER" else ())
    assert len(p.split().launches) == 2
    assert p.split().way == "SPLIT"


@THOROUGH
@given(calls(), devices)
def test_ranks_and_threads_cover_everything_once(call, device):
    """Ranks are consecutive pieces that end where the work ends; so are tiles; a tile's threads don't overlap."""
    p = planned(call, device)
    w, (O, C, I) = p.walk, call[0].shape  # noqa: E741
    assert w.M * w.fold * w.S == O * I
    work = w.M if w.layout == "COLUMNS" else w.M * w.vectors
    assert p.K * p.per >= work
    assert p.way == "CLUSTER" or (p.K - 1) * p.per < work
    if w.layout == "COLUMNS":
        tile = p.tx * w.V
        assert p.tx * p.ty <= p.threads
        assert (p.items - 1) * tile < w.width <= p.items * tile
        assert tile // w.fold == p.G * w.S
        assert w.width % w.V == 0
        assert p.items == 1 or w.fold == 1
        assert (p.items - 1) * p.G < C <= p.items * p.G
    else:
        assert (p.items, p.G, p.tx) == (C, 1, 1)
        assert w.M * w.vectors < 1 << 32
        if w.layout == "RUNS":
            assert w.vectors * w.V == w.S
        else:  # a run that starts at lane h takes ceil((h + S) / V) windows
            assert w.vectors == max(-(-(h + w.S) // w.V) for h in range(w.V))
    groups = min(p.items, max(1, device.slots(p.letter, p.threads) // p.K))
    assert p.grid == p.K * (groups if p.way == "GRID" else p.items)


@settings(settings.get_profile("plan"), max_examples=200)
@given(calls(), st.randoms(use_true_random=False))
def test_walks_touch_the_arrays_elements(call, random):
    """The addresses of a walk's rows, channels and elements are those of the array's."""
    view, _, _ = call
    O, C, I = view.shape  # noqa: E741
    assume(O * C * I <= 100_000)
    try:
        w = planner.walk(view)
    except planner.Unwalkable:
        assume(False)
    for name, strides in (("x", view.x), ("y", view.y), ("dy", view.dy)):
        assert (strides is not None) == (name in w.strides)
        if strides is None:
            continue
        row, channel = w.strides[name]
        m, c, s = np.ogrid[: w.M, : w.C, : w.S * w.fold]
        if w.layout == "COLUMNS":  # a tile of columns: channels lie side by side, folded rows one after another
            walked = m * row + (s // w.S) * (w.C * w.S) + c * w.S + s % w.S
            assert w.fold == 1 or row == w.width
        else:
            walked = m * row + c * channel + s
        o, c, i = np.ogrid[:O, :C, :I]
        wanted = (o * strides[0] + c * strides[1] + i * strides[2]) // view.itemsize
        for k in random.sample(range(C), min(C, 5)):
            assert (np.sort(walked[:, k].reshape(-1)) == np.sort(wanted[:, k].reshape(-1))).all()


@THOROUGH
@given(calls())
def test_accesses_are_as_wide_as_they_can_be(call):
    """Every vector is aligned to its width; 16 bytes wherever shape, strides and start allow."""
    view = call[0]
    try:
        w = planner.walk(view)
    except planner.Unwalkable:
        assume(False)
    size = view.itemsize
    full = 16 // size
    starts = [base // size for base, strides in zip(view.bases, (view.x, view.y, view.dy), strict=True) if strides]
    for row, channel in w.strides.values():
        steps = ([row] if w.M > 1 else []) + ([channel] if w.C > 1 and w.layout != "COLUMNS" else [])
        if w.layout != "WINDOWS":
            assert all(s % w.V == 0 for s in (*steps, *starts))
        else:
            assert full == w.V
            assert len({s % full for s in starts}) == 1
    if (
        view.shape[2] * size >= 256
        and len({view.x, view.y or view.x, view.dy or view.x}) == 1
        and len(set(starts)) == 1
    ):
        assert full == w.V


@settings(settings.get_profile("plan"), max_examples=1000)
@given(st.integers(1, (1 << 32) - 1), st.integers(0, (1 << 32) - 1))
def test_division_by_multiplication(d, j):
    _, multiplier, shift = planner._divisor(d)
    for n in (j, j // d * d, max(0, j // d * d - 1)):
        assert (((n * multiplier) >> 32) + n) >> shift == n // d


def same_bits(p):
    return p.walk, p.K, p.threads, p.tx, p.per


@THOROUGH
@given(calls(), devices)
def test_stable_plans_sum_alike_everywhere(call, device):
    home, there = planned(call, stable=True), planned(call, device, stable=True)
    # empty ranks add nothing: a cluster has them, a grid leaves them out
    assert same_bits(replace(home, K=0)) == same_bits(replace(there, K=0))
    assert home.K == there.K or max(home.K, there.K) <= 8
    assert there.shared <= device.smem_block


@THOROUGH
@given(calls(), devices)
def test_the_split_path_sums_alike(call, device):
    p = planned(call, device)
    assert same_bits(p.split()) == same_bits(p)
    assert p.split().slots <= planner.ahead(p.letter, p.walk.V, p.backward)
    assert p.split().barriers == 0


@THOROUGH
@given(calls(), devices)
def test_the_model_counts_bytes(call, device):
    """The floor is every array once; what is read twice is what isn't kept."""
    p = planned(call, device)
    view = call[0]
    time, moved, floor = planner.model(p, device)
    elements = np.prod(view.shape, dtype=object) * view.itemsize
    arrays = sum(a is not None for a in (view.x, view.y, view.dy))
    assert floor >= arrays * elements
    assert moved >= floor
    assert (p.reread == 0) or (moved <= floor + 2 * p.reread * p.walk.V * view.itemsize)
    assert 0 < time < float("inf")
    if view.y is None:
        assert p.slots <= planner.ahead(p.letter, p.walk.V, p.backward)
        assert p.reread == 0
    tight = planner._workspace(p.letter, p.G, p.K, {"GRID": 2 * p.barriers, "SPLIT": p.items}.get(p.way, 0))
    assert p.workspace == tight


def test_ways_can_be_forced():
    view = contiguous(32, 64, 3136, 4)
    assert {way: planner.plan(view, "f", False, way=way).way for way in ("BLOCK", "CLUSTER", "GRID", "SPLIT")} == {
        way: way for way in ("BLOCK", "CLUSTER", "GRID", "SPLIT")
    }
    old = planner.Device(cluster=1, cooperative=False)
    for way in ("CLUSTER", "GRID"):
        with pytest.raises(ValueError, match=f"{way} isn't possible"):
            planner.plan(view, "f", False, old, way=way)
    assert planner.plan(view, "f", False, old).way in ("BLOCK", "SPLIT")


def test_known_arrays_are_planned_as_measured():
    """All rows of bench/results/gpu-h200.jsonl are of the plans that are chosen there now."""
    results = Path(__file__).parents[1] / "bench" / "results" / "gpu-h200.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    (facts,) = [row["planner"] for row in rows if row["case"] == "machine"]
    device = eval(facts, {"Device": planner.Device})
    timed = [row for row in rows if row["stage"] == "speed" and "plan_forward" in row]
    assert len(timed) == 46
    for row, backward in itertools.product(timed, (False, True)):
        dims, layout, dtype = row["case"].split()
        outer, C, *inner = map(int, dims.split("x"))
        shape = (outer, C, math.prod(inner)) if layout == "first" else (outer * math.prod(inner), C, 1)
        letter, size = {"float32": ("f", 4), "float16": ("e", 2)}[dtype]
        p = planner.plan(contiguous(*shape, size, backward), letter, backward, device)
        direction = "backward" if backward else "forward"
        assert f"{p.walk.layout} V{p.walk.V} {p.way} K{p.K}" == row[f"plan_{direction}"], (row["case"], direction)
        believed = [row[f"model_{direction}"], row[f"model_{direction}_bytes"], row[f"floor_{direction}_bytes"]]
        assert list(planner.model(p, device)) == pytest.approx(believed, rel=1e-3)


def test_groups_that_take_turns_begin_apart():
    """By a round in all, at the bandwidth of the model; not where there are hardly any rounds, nor on other ways."""
    walk = planner.walk(contiguous(256, 64, 3136, 4))
    many = planner.build(walk, "f", False, planner.HOPPER, "GRID", 33, threads=512)
    rounds = walk.C / (many.grid / many.K)
    assert rounds == 8
    assert many.reread == 0
    round_us = 2 * 256 * 64 * 3136 * 4 / rounds / (planner.HOPPER.bandwidth * planner.BANDWIDTH)
    assert many.delay == pytest.approx(round_us * planner.CLOCK, rel=1e-3)
    divisors = 4 * 12  # bytes, behind it
    assert planner.pack(many, planner.Pointers())[-divisors - 4 : -divisors] == struct.pack("<I", many.delay)
    assert many.split().delay == 0
    few = planner.build(walk, "f", False, planner.HOPPER, "GRID", 8, threads=512)
    assert 1 < walk.C / (few.grid / few.K) <= 2
    assert few.delay == 0
    assert planner.build(walk, "f", False, planner.HOPPER, "BLOCK", threads=256).delay == 0


def test_frozen_forward_is_one_pass():
    for shape in [(32, 64, 3136), (25088, 256, 1), (1, 1, 1)]:
        p = planner.plan(contiguous(*shape, 4), "f", False, frozen=True)
        assert (p.way, p.workspace, p.reread) == ("MAP", 0, 0)
        assert p.slots <= planner.ahead("f", p.walk.V, False)
        assert [launch.expression.split("::")[-1] for launch in p.launches] == ["APPLY>"]
        assert p.split() is p


@pytest.mark.parametrize(
    ("view", "match"),
    [
        (planner.View((4, 5, 40), (1600, 320, 8), None, None, 4), "runs of 40 elements with strides"),
        (planner.View((40, 5, 1), (40, 8, 4), None, None, 4), "neither rows nor channels lie side by side"),
        (planner.View((4, 5, 40), (802, 160, 4), None, None, 4), "isn't aligned to its elements of 4 bytes"),
        (planner.View((4, 5, 40), (800, 160, 4), None, None, 4, (2, 0, 0)), "x with strides .* isn't aligned"),
        (planner.View((1, 2, 1 << 33), (1 << 36, 1 << 35, 4), (4, 8, 8), None, 4), "runs of"),
    ],
    ids=["steps", "no unit stride", "odd strides", "odd start", "two layouts"],
)
def test_what_cannot_be_walked(view, match):
    with pytest.raises(planner.Unwalkable, match=match):
        planner.plan(view, "f", False)


def test_a_channel_beyond_32_bits_of_vectors():
    odd = planner.View((1, 2, (1 << 32) + 1), (0, 4 << 32, 4), (0, 4 * ((1 << 32) + 1), 4), None, 4)
    with pytest.raises(planner.Unwalkable, match="they are counted in 32 bits"):
        planner.plan(odd, "f", False)


def test_the_argument_byte_by_byte():
    """pack's bytes: eighteen addresses, eps, parameter, wide; strides, count; the plan's numbers."""
    view = planner.View((6, 5, 131), (4000, 600, 4), (2620, 524, 4), (4016, 600, 4), 4, (4, 4, 4))
    p = planner.build(planner.walk(view), "f", True, way="GRID", K=3, threads=96)
    pointers = planner.Pointers(*range(16, 16 * 19, 16))
    argument = planner.pack(p, pointers, 1e-3, True, 0.25)
    assert len(argument) == planner.PARAMS_SIZE == 448
    numbers = struct.unpack("<18Q2dQ17q2d4q8i16I", argument)
    assert numbers[:21] == (*range(16, 16 * 19, 16), 1e-3, 0.25, 1)
    numbers = numbers[2:]
    assert numbers[19:28] == (4000, 0, 600, 4016, 0, 600, 2620, 0, 524)  # 96 threads are less than a run of 131 vectors
    assert numbers[28:36] == (0,) * 6 + (524, 0)
    assert numbers[36:42] == (6 * 131, 1 / (6 * 131), 6, 131, p.per, 1)
    assert numbers[42:50] == (1, 5, 5, 5, p.slots, 1, 1, 1)
    assert numbers[50:54] == (5, 96, 0, 0)
    assert [numbers[i] for i in (54, 57, 60, 63)] == [3, 1, 96, p.walk.vectors]  # divisors, each with how to divide
    assert p.walk.vectors == 131
    assert p.walk.layout == "RUNS"  # y disagrees with x modulo 16
