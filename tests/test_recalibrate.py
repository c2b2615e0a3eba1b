"""recalibrate: the statistics of everything, from any batches; beside NumPy on the whole."""

import io
import sys
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastbn
from fastbn import BatchNorm, RunningStats, recalibrate

MODULE = sys.modules["fastbn.recalibrate"]


def data(rng, shape=(61, 3, 4), dtype=np.float64):
    return rng.normal(rng.normal(4, 2, (shape[1], 1)), rng.uniform(0.5, 3, (shape[1], 1)), shape).astype(dtype)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 61), max_size=9), st.integers(0, 99), st.sampled_from([0, 1e4, -1e8]))
def test_any_batches(borders, seed, offset):
    x = offset + data(np.random.default_rng(seed))
    found, whole = recalibrate(np.split(x, sorted(borders)), 3), fastbn.moments(x)
    assert found.count == whole.count
    np.testing.assert_allclose(found.exact()[1], whole.exact()[1], rtol=1e-12)
    wide = x.astype(np.longdouble)
    np.testing.assert_allclose(found.exact()[1], wide.var((0, 2)).astype(float), rtol=1e-11)


@pytest.mark.usefixtures("backend")
def test_ordered_batches():
    """[PyTorch's update_bn] The mean of the batches' variances is 1.0, where the data's is 10.0."""
    batch = np.float32([[-1], [1], [-1], [1]])
    batches = [batch - 3, batch + 3]
    assert np.mean([b.var(dtype=float) for b in batches]) == 1.0
    bn = BatchNorm(1, ddof=0)
    assert recalibrate(batches, bn).var()[0] == 10.0
    assert bn.running.var[0] == 10.0


@pytest.mark.usefixtures("backend")
def test_an_offset(rng):
    """[fvcore's update_bn_stats] E[x^2] - E[x]^2 in float32: -16 for 1.01 at a mean of 1e4."""
    x = rng.normal(1e4, 1, (400, 2, 16)).astype(np.float32)
    square, mean = (x * x).mean((0, 2), dtype=np.float32), x.mean((0, 2), dtype=np.float32)
    assert (np.abs(square - mean * mean - 1) > 1).any()  # the test would see it
    np.testing.assert_allclose(recalibrate(np.array_split(x, 9), 2).var(), x.astype(float).var((0, 2)), rtol=1e-6)


SOURCES = {
    "a list": lambda x: np.array_split(x, 5),
    "an iterator": lambda x: iter(np.array_split(x, 5)),
    "a generator": lambda x: (part for part in np.array_split(x, 5)),
    "a generator function": lambda x: lambda: (part for part in np.array_split(x, 5)),
    "functions": lambda x: [lambda part=part: part for part in np.array_split(x, 5)],
    "moments": lambda x: [fastbn.moments(part) for part in np.array_split(x, 5)],
    "functions that give moments": lambda x: [lambda p=part: fastbn.moments(p) for part in np.array_split(x, 5)],
    "empty ones between": lambda x: [x[:0], x[:9], x[9:9], x[9:], x[:0]],
    "the array itself": lambda x: x,
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("progress", [True, False])
def test_sources(rng, make, progress):
    x = data(rng)
    found = recalibrate(make(x), 3, progress=progress)
    assert found.count == 61 * 4
    np.testing.assert_allclose(found.exact(), fastbn.moments(x).exact(), rtol=1e-13)


@pytest.mark.parametrize("chunk", [None, 1, 7, 61, 100])
@pytest.mark.parametrize(("shape", "axis"), [((61, 3, 4), 1), ((3, 61), 0), ((2, 61, 3), (0, 2)), ((9, 5, 3), -1)])
def test_one_array_by_chunks(rng, monkeypatch, shape, axis, chunk):
    monkeypatch.setattr(MODULE, "_PIECE", 200)
    x = rng.normal(3, 2, shape)
    whole = fastbn.moments(x, axis=axis)
    found = recalibrate(x, whole.shape, axis=axis, chunk=chunk)
    assert found.count == whole.count
    np.testing.assert_allclose(found.exact(), whole.exact(), rtol=1e-13)


def test_a_file_larger_than_what_is_held(rng, tmp_path):
    """32 MB in a memory map, by chunks: never more than a megabyte of new arrays."""
    path = tmp_path / "x.npy"
    x = np.lib.format.open_memmap(path, "w+", np.float32, (4096, 4, 512))
    x[:] = rng.normal(5, 2, (4096, 4, 512)).astype(np.float32)
    x.flush()
    mapped, bn = np.load(path, mmap_mode="r"), BatchNorm(4, ddof=0)
    recalibrate(mapped[:128], bn, chunk=64)  # compiles
    tracemalloc.start()
    found = recalibrate(mapped, bn, chunk=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert found.count == 4096 * 512
    np.testing.assert_allclose(found.var(), x.astype(np.float64).var((0, 2)), rtol=1e-6)
    np.testing.assert_array_equal(bn.running.var, found.var())


@pytest.mark.parametrize("ddof", [0, 1])
def test_targets(rng, ddof):
    x = data(rng, dtype=np.float32)
    wide, batches = x.astype(float), [x[:7], x[:0], x[7:30], x[30:]]
    bn, running = BatchNorm(3, ddof=ddof, momentum=None), RunningStats(3, ddof=ddof)
    for target in (bn, running):
        returned = recalibrate(iter(batches), target)
        kept = target if target is running else target.running
        np.testing.assert_allclose(kept.exact()[0], wide.mean((0, 2)), rtol=1e-7)  # x is float32, its moments float64
        np.testing.assert_allclose(kept.exact()[1], wide.var((0, 2), ddof=ddof), rtol=1e-6)
        assert kept.batches == 3  # that had values
        np.testing.assert_array_equal(returned.exact(ddof), kept.exact())
    y = bn.eval()(x)
    np.testing.assert_allclose(y.mean((0, 2)), np.zeros(3), atol=1e-6)


def test_the_layers_axis(rng):
    x = rng.normal(3, 2, (6, 5, 4))
    bn = BatchNorm(4, axis=-1, ddof=0)
    recalibrate([x[:2], x[2:]], bn)
    np.testing.assert_allclose(bn.running.exact()[1], x.var((0, 1)), rtol=1e-13)
    assert recalibrate([x], 5).shape == (5,)  # 1 without a layer


def test_the_same_batches_give_the_same_bits(rng):
    batches = np.array_split(data(rng), 11)
    a, b = recalibrate(batches, 3), recalibrate(iter(batches), 3)
    np.testing.assert_array_equal(a.exact(), b.exact())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def slowly(x):
    for part in np.array_split(x, 4):
        time.sleep(0.02)
        yield part


@pytest.mark.parametrize(
    ("patience", "progress", "terminal"), [(0, True, True), (9, True, True), (0, False, True), (0, True, False)]
)
def test_the_bar_shows_where_it_takes_long_and_somebody_looks(rng, monkeypatch, patience, progress, terminal):
    pytest.importorskip("rich")
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(MODULE, "_PATIENCE", patience)
    x = data(rng)
    assert recalibrate(slowly(x), 3, progress=progress).count == 61 * 4
    assert ("recalibrating" in stream.getvalue()) == (progress and terminal and not patience)


def test_the_bar_goes_when_a_batch_fails(rng, monkeypatch):
    pytest.importorskip("rich")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(MODULE, "_PATIENCE", 0)
    with pytest.raises(
        ValueError, match=r"batch 2 \(from 0\) has channels of shape \(2,\); expected \(3,\), like target"
    ):
        recalibrate([np.ones((4, 3)), np.ones((4, 3)), np.ones((4, 2))], 3)
    assert stream.getvalue().rstrip().endswith("\x1b[?25h\r\x1b[1A\x1b[2K") or "\x1b[?25h" in stream.getvalue()


def test_without_rich(rng, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    monkeypatch.setattr(MODULE, "_PATIENCE", 0)
    monkeypatch.setattr(MODULE, "find_spec", lambda _: None)
    assert recalibrate(slowly(data(rng)), 3).count == 61 * 4
    assert stream.getvalue() == ""


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
@pytest.mark.parametrize("source", ["a list", "functions", "the array itself"])
def test_whole_numbers(rng, monkeypatch, source, dtype):
    monkeypatch.setattr(MODULE, "_PIECE", 200)
    q, bn = rng.integers(0, 120, (61, 3, 4)).astype(dtype), BatchNorm(3, ddof=0)
    found = recalibrate(SOURCES[source](q), bn, scale=0.1, zero_point=3.5)
    real = 0.1 * (q - 3.5)
    np.testing.assert_allclose(found.exact(), (real.mean((0, 2)), real.var((0, 2))), rtol=1e-12)
    np.testing.assert_array_equal(bn.running.exact(), found.exact())


def test_moments_have_their_unit(rng):
    q = rng.integers(0, 120, (9, 3)).astype(np.uint8)
    found = recalibrate([q[:4], fastbn.moments(q[4:], scale=0.1)], 3, scale=0.1)
    np.testing.assert_allclose(found.exact()[0], 0.1 * q.mean(0), rtol=1e-12)


X = np.ones((4, 3))
WRONG = {
    "no batches": (lambda t: recalibrate([], t), ValueError, r"recalibrate: batches has no values, in 0 batches"),
    "only empty ones": (lambda t: recalibrate([X[:0]] * 3, t), ValueError, r"batches has no values, in 3 batches; exp"),
    "another number of channels": (
        lambda t: recalibrate([X, X.T], t),
        ValueError,
        r"batch 1 .* shape \(4,\); expected",
    ),
    "moments of others": (
        lambda t: recalibrate([fastbn.moments(X.T)], t),
        ValueError,
        r"batch 0 .* shape \(4,\); expec",
    ),
    "a scale with floats": (
        lambda t: recalibrate(X, t, scale=0.5),
        ValueError,
        r"moments: scale or zero_point is given with x of float64; expected them with whole numbers only",
    ),
    "a scale of 0": (
        lambda t: recalibrate(iter([X.astype(np.uint8)]), t, scale=0),
        ValueError,
        r"moments: scale is int 0 and zero_point .* expected finite numbers, and a scale above 0",
    ),
    "an integer": (lambda t: recalibrate(5, t), TypeError, r"batches is int 5; expected an iterable of arrays"),
    "text": (lambda t: recalibrate("abc", t), TypeError, r"batches is str 'abc'; expected an iterable"),
    "a batch with its labels": (
        lambda t: recalibrate([(X, X)], t),
        TypeError,
        r"moments: x is a builtins.tuple; expect",
    ),
    "chunk 0": (lambda t: recalibrate(X, t, chunk=0), ValueError, r"chunk is int 0; expected a number of rows"),
    "chunk of a list": (
        lambda t: recalibrate([X], t, chunk=2),
        ValueError,
        r"chunk is 2, but batches is list \[.*one a",
    ),
    "one value": (
        lambda t: recalibrate([X[:1]], t),
        ValueError,
        r"replace: moments has a count of 1; expected more th",
    ),
    "axis": (lambda t: recalibrate(X, t, axis=2), np.exceptions.AxisError, r"recalibrate: axis=2 is out of range"),
    "a late failure": (lambda t: recalibrate(iter([X, X, None]), t), TypeError, r"moments: x is a builtins.NoneType"),
}


@pytest.mark.parametrize(("call", "error", "match"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("make", [BatchNorm, RunningStats])
def test_errors_change_nothing(rng, make, call, error, match):
    target = make(3)
    running = target if make is RunningStats else target.running
    running.update(fastbn.moments(data(rng)))
    before = running.exact()
    with pytest.raises(error, match=match):
        call(target)
    np.testing.assert_array_equal(running.exact(), before)
    assert running.batches == 1


@pytest.mark.parametrize("target", [None, "bn", 2.0, -1])
def test_targets_that_are_none(target):
    with pytest.raises(ValueError, match=r"recalibrate: channels is .*; expected their number"):
        recalibrate([X], target)


def test_a_chunk_of_a_narrow_type(rng):
    """100 + 100 rows are more than an int8 holds: the last ones were left out."""
    x = rng.normal(5, 2, (127, 2))
    for chunk in (np.int8(100), np.uint8(100)):
        np.testing.assert_array_equal(
            fastbn.recalibrate(x, 2, chunk=chunk).mean, fastbn.recalibrate(x, 2, chunk=100).mean
        )
        assert fastbn.recalibrate(x, 2, chunk=chunk).count == 127


def test_channels_are_not_cut(rng):
    """With every axis among the channels' there is one sample."""
    x = rng.normal(0, 1, (6, 4))
    found = fastbn.recalibrate(x, (6, 4), axis=(0, 1), chunk=2)
    assert found.count == 1
    np.testing.assert_array_equal(found.mean, x)
