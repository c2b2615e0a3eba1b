"""RunningStats against the recursion written by hand in float64."""

import copy
import pickle
import re

import numpy as np
import pytest

import fastbn
from fastbn import Moments, RunningStats

WEIGHTS = {
    # arguments, and the weight of the new batch when it is the k-th (from 1)
    "momentum 0.1, the default": ({}, lambda _: 0.1),
    "momentum 0.37": ({"momentum": 0.37}, lambda _: 0.37),
    "decay 0.9": ({"decay": 0.9}, lambda _: 0.1),
    "decay 0": ({"decay": 0}, lambda _: 1.0),
    "momentum 1: the last batch": ({"momentum": 1}, lambda _: 1.0),
    "momentum 0: nothing": ({"momentum": 0.0}, lambda _: 0.0),
    "momentum None: the average": ({"momentum": None}, lambda k: 1 / k),
}


def ten_batches(rng, dtype=np.float64):
    """Of sizes that differ, and of means and deviations that move."""
    for k in range(10):
        yield rng.normal([3 * k, -40.0, 1e3], [1, 0.2 + k, 5], (int(rng.integers(2, 20)), 3)).astype(dtype)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize(("arguments", "weight"), WEIGHTS.values(), ids=WEIGHTS)
def test_ten_steps(rng, arguments, weight, ddof):
    running = RunningStats(3, ddof=ddof, **arguments)
    mean, var = np.zeros(3), np.ones(3)
    for k, x in enumerate(ten_batches(rng), 1):
        running.update(fastbn.moments(x))
        mean = (1 - weight(k)) * mean + weight(k) * x.mean(0)
        var = (1 - weight(k)) * var + weight(k) * x.var(0, ddof=ddof)
        # Both round a few times a step; 1e-14 of the largest, 1e3.
        np.testing.assert_allclose(running.mean, mean, rtol=1e-13, atol=1e-11)
        np.testing.assert_allclose(running.var, var, rtol=1e-13)
        assert running.batches == k


@pytest.mark.parametrize("ddof", [0, 1])
def test_cumulative_is_the_mean_of_the_batches(rng, ddof):
    running, batches = RunningStats(3, momentum=None, ddof=ddof), list(ten_batches(rng))
    for x in batches:
        running.update(fastbn.moments(x))
    np.testing.assert_allclose(running.mean, np.mean([x.mean(0) for x in batches], 0), rtol=1e-14)
    np.testing.assert_allclose(running.var, np.mean([x.var(0, ddof=ddof) for x in batches], 0), rtol=1e-14)


@pytest.mark.parametrize("momentum", [None, 1, 1.0])
@pytest.mark.parametrize("var", [1e-9, 1e-17, 1e-300])
def test_the_first_value_replaces_the_initial_one_exactly(momentum, var):
    """1 + (var - 1) would be 0 for 1e-17."""
    running = RunningStats(2, momentum, ddof=0)
    running.update(Moments(4, [var, 3], [4 * var, 8], np.float64))
    np.testing.assert_array_equal(running.exact(), [[var, 3], [var, 2]])


def test_momentum_1_forgets_a_nan():
    running = RunningStats(1, momentum=1, ddof=0)
    running.update(Moments(2, [np.nan], [np.nan]))
    running.update(Moments(2, [3], [8]))
    assert (running.mean[0], running.var[0]) == (3, 4)


def test_nothing_is_updated_but_by_update(rng):
    x = rng.normal(5, 2, (6, 3)).astype(np.float32)
    running = RunningStats(3)
    running.update(fastbn.moments(x))
    before = running.exact()
    _, saved = fastbn.forward(x, frozen=running)
    fastbn.backward(x, saved)
    fastbn.forward(x)
    fastbn.infer(x, running.mean, running.var)
    np.testing.assert_array_equal(running.exact(), before)
    assert running.batches == 1


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_an_empty_batch_changes_nothing(rng, momentum):
    running = RunningStats(3, momentum)
    for x in (rng.normal(5, 2, (6, 3)), np.empty((0, 3)), rng.normal(3, 1, (6, 3))):
        before, batches = running.exact(), running.batches
        running.update(fastbn.moments(x))
        if not x.size:
            np.testing.assert_array_equal(running.exact(), before)
            assert running.batches == batches
    assert running.batches == 2


@pytest.mark.parametrize("momentum", [0.25, None])
def test_a_batch_of_one_value_has_a_mean_but_no_unbiased_variance(rng, momentum):
    """N=1 gives NaN or inf elsewhere. Here var stays, and in the average only batches that have one count."""
    first, one, last = rng.normal(5, 2, (6, 3)), rng.normal(5, 2, (1, 3)), rng.normal(3, 1, (4, 3))
    for order in ((first, one, last), (one, first, last)):
        with_one, without = RunningStats(3, momentum), RunningStats(3, momentum)
        mean = np.zeros(3)
        for k, x in enumerate(order, 1):
            with_one.update(fastbn.moments(x))
            if x is not one:
                without.update(fastbn.moments(x))
            weight = 1 / k if momentum is None else momentum
            mean = (1 - weight) * mean + weight * x.mean(0)
        np.testing.assert_allclose(with_one.exact()[0], mean, rtol=1e-14)
        np.testing.assert_array_equal(with_one.exact()[1], without.exact()[1])
        assert (with_one.batches, without.batches) == (3, 2)


def test_one_value_has_a_biased_variance_of_0():
    running = RunningStats(1, momentum=0.25, ddof=0)
    running.update(Moments(1, [8], [0]))
    assert (running.mean[0], running.var[0]) == (2, 0.75)


def test_starts_as_mean_0_and_var_1():
    running = RunningStats((2, 3))
    np.testing.assert_array_equal(running.exact(), [np.zeros((2, 3)), np.ones((2, 3))])
    assert running.batches == 0


def test_setters_take_copies(rng):
    mean, var = rng.normal(size=3), rng.uniform(1, 2, 3)
    running = RunningStats(3, momentum=0.5, dtype=np.float64)
    running.mean, running.var = mean, var
    expected = mean.copy(), var.copy()
    mean[:] = var[:] = 9  # the caller's arrays stay the caller's
    np.testing.assert_array_equal((running.mean, running.var), expected)
    running.update(Moments(3, [1, 2, 3], [2, 4, 6]))
    np.testing.assert_allclose(running.mean, (expected[0] + [1, 2, 3]) / 2, rtol=1e-15)
    np.testing.assert_allclose(running.var, (expected[1] + [1, 2, 3]) / 2, rtol=1e-15)


def test_writing_into_what_was_read_is_an_error():
    """mean and var are copies: a write would be lost in silence, so it raises."""
    running = RunningStats(3)
    for read in (running.mean, running.var):
        with pytest.raises(ValueError, match="read-only"):
            read[0] = 5
    with pytest.raises(ValueError, match="read-only"):
        running.mean += 1
    np.testing.assert_array_equal((running.mean, running.var), ([0, 0, 0], [1, 1, 1]))


def test_exact_is_the_callers_own():
    running = RunningStats(2)
    for values in running.exact():
        values[:] = 9
    np.testing.assert_array_equal((running.mean, running.var), ([0, 0], [1, 1]))


def test_float64_data_make_it_float64(rng):
    """What is read is float32 until float64 data come, and stays float64 then."""
    running = RunningStats(3)
    for dtype, expected in ((np.float32, np.float32), (np.float64, np.float64), (np.float16, np.float64)):
        running.update(fastbn.moments(rng.normal(2, 1, (8, 3)).astype(dtype)))
        assert running.mean.dtype == running.var.dtype == expected
    assert RunningStats(3, dtype=np.float64).mean.dtype == np.float64


@pytest.mark.usefixtures("backend")
def test_evaluation_is_right_at_an_offset(rng):
    """At 1e5 a mean kept as float32 moves y by up to 0.004 (measured below); running statistics must not."""
    x = rng.normal(1e5 + rng.uniform(size=3), rng.uniform(0.5, 2, 3), (50, 3)).astype(np.float32)
    gamma, beta = rng.normal(1, 0.3, 3), rng.normal(size=3)
    running = RunningStats(3, momentum=1, ddof=0)
    running.update(fastbn.moments(x))
    y, _ = fastbn.forward(x, gamma, beta, frozen=running)
    expected, _ = fastbn.reference.forward(x, gamma, beta)  # with x's own statistics, which are the same
    worst = np.abs(y - expected) / np.maximum(1, np.abs(expected))
    assert worst.max() <= 2 * np.finfo(np.float32).eps
    by_float32 = fastbn.infer(x, running.mean, running.var, gamma, beta)
    assert np.abs(by_float32 - expected).max() > 1e-4  # the test would see it


def test_large_float32_data_are_read_in_silence():
    """The variance of 1e20 is inf in float32, and kept as 1e40."""
    running = RunningStats(1, momentum=1, ddof=0)
    running.update(fastbn.moments(np.float32([[1e20], [-1e20]])))
    assert running.var[0] == np.inf
    np.testing.assert_allclose(running.exact()[1], 1e40, rtol=1e-6)  # float32(1e20) itself is off by 2e-8


def test_repr():
    assert repr(RunningStats(3)) == "RunningStats(channels=3, momentum=0.1, ddof=1, batches=0)"
    assert repr(RunningStats((3, 2), None, 0)) == "RunningStats(channels=(3, 2), momentum=None, ddof=0, batches=0)"


def spoilt(rng, spoilt_channels):
    """Ten batches, of which some have NaN or Inf in some of the three channels."""
    for k, x in enumerate(ten_batches(rng)):
        for c in spoilt_channels.get(k, ()):
            x[0, c] = (np.nan, np.inf, -np.inf)[k % 3]
        yield x


SPOILT = {0: (0,), 1: (0, 2), 4: (1,), 5: (0, 1, 2), 9: (2,)}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize(("arguments", "weight"), WEIGHTS.values(), ids=WEIGHTS)
def test_skip_is_a_channel_that_never_saw_the_batch(rng, arguments, weight, debias):
    """Each channel as statistics of its own, fed with its finite batches only."""
    batches = list(spoilt(rng, SPOILT))
    running = RunningStats(3, on_nonfinite="skip", debias=debias, **arguments)
    alone = [RunningStats(1, debias=debias, **arguments) for _ in range(3)]
    for k, x in enumerate(batches):
        running.update(fastbn.moments(x))
        for c in range(3):
            if c not in SPOILT.get(k, ()):
                alone[c].update(fastbn.moments(x[:, c : c + 1]))
        for c in range(3):
            np.testing.assert_allclose(running.mean[c], alone[c].mean[0], rtol=1e-13)
            np.testing.assert_allclose(running.var[c], alone[c].var[0], rtol=1e-13)
            assert running.batches - running.skipped[c] == alone[c].batches
    assert running.skipped.tolist() == [3, 2, 3]
    assert running.skipped.dtype == np.int64
    assert repr(running).endswith("batches=10, skipped=8 in 3 channels)")


def test_skip_without_cause_changes_nothing(rng):
    """The same bits as without a guard."""
    for arguments in ({}, {"momentum": None}, {"debias": True}):
        guarded, plain = RunningStats(3, on_nonfinite="skip", **arguments), RunningStats(3, **arguments)
        for x in ten_batches(rng):
            guarded.update(fastbn.moments(x))
            plain.update(fastbn.moments(x))
        np.testing.assert_allclose(guarded.exact(), plain.exact(), rtol=1e-14)
        assert not guarded.skipped.any()
        assert "skipped" not in repr(guarded)


def test_a_batch_without_variance_can_be_skipped(rng):
    """One value per channel, NaN in one: counts of mean and variance go their own ways."""
    running = RunningStats(2, momentum=None, on_nonfinite="skip")
    running.update(Moments(1, [np.nan, 5], [np.nan, 0]))
    running.update(Moments(2, [3, np.inf], [8, np.nan]))
    running.update(Moments(2, [5, 7], [4, 2]))
    np.testing.assert_array_equal(running.exact(), [[4, 6], [6, 2]])
    assert running.skipped.tolist() == [1, 1]


def test_propagate_is_the_default_and_keeps_a_nan(rng):
    running = RunningStats(3)
    for x in spoilt(rng, {3: (1,)}):
        running.update(fastbn.moments(x))
    np.testing.assert_array_equal(np.isnan(running.mean), [False, True, False])
    assert not running.skipped.any()


def test_a_guard_may_be_set_later(rng):
    running = RunningStats(1, momentum=None)
    running.update(Moments(2, [3], [8]))
    running.on_nonfinite = "skip"
    running.update(Moments(2, [np.nan], [8]))
    running.on_nonfinite = "propagate"
    running.update(Moments(2, [5], [4]))
    np.testing.assert_array_equal(running.exact(), [[4], [6]])  # the average over the two that counted


@pytest.mark.parametrize("method", ["update", "replace"])
def test_raise_changes_nothing(rng, method):
    running = RunningStats(9, on_nonfinite="raise")
    running.update(fastbn.moments(rng.normal(5, 2, (6, 9))))
    before = running.exact()
    x = rng.normal(5, 2, (6, 9))
    x[0, [2, 5]] = np.nan, np.inf
    with pytest.raises(ValueError, match=rf'{method}: moments is NaN or Inf in 2 of 9 channels \(2, 5\); .*="skip"'):
        getattr(running, method)(fastbn.moments(x))
    x[1, 1:] = np.nan
    with pytest.raises(ValueError, match=r"in 8 of 9 channels \(1, 2, 3, 4, 5, 6, \.\.\.\)"):
        getattr(running, method)(fastbn.moments(x))
    np.testing.assert_array_equal(running.exact(), before)
    assert running.batches == 1


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1e-9, 0.9])
def test_debias_is_adams(rng, momentum):
    """The moving average that starts from 0, divided by 1 - (1 - momentum)^k, with ^ in NumPy's widest type."""
    running = RunningStats(3, momentum, debias=True)
    m = np.longdouble(momentum)
    mean, var = np.zeros(3, np.longdouble), np.zeros(3, np.longdouble)
    for k, x in enumerate(ten_batches(rng), 1):
        running.update(fastbn.moments(x))
        mean = (1 - m) * mean + m * x.mean(0)
        var = (1 - m) * var + m * x.var(0, ddof=1)
        mass = 1 - (1 - m) ** k
        np.testing.assert_allclose(running.exact()[0], np.float64(mean / mass), rtol=2e-9 if momentum < 1e-6 else 1e-12)
        np.testing.assert_allclose(running.exact()[1], np.float64(var / mass), rtol=2e-9 if momentum < 1e-6 else 1e-12)


@pytest.mark.parametrize("on_nonfinite", ["propagate", "skip"])
def test_debias_starts_from_the_first_batch(on_nonfinite):
    """Exactly: nothing of the initial values, whatever they are."""
    running = RunningStats(2, 0.1, debias=True, on_nonfinite=on_nonfinite)
    running.mean, running.var = [1e9, np.nan], [1e9, np.nan]
    running.update(Moments(4, [1e-9, 3], [3e-9, 6], np.float64))
    np.testing.assert_array_equal(running.exact(), [[1e-9, 3], [1e-9, 2]])


@pytest.mark.parametrize("momentum", [0, 1])
@pytest.mark.parametrize("on_nonfinite", ["propagate", "skip"])
def test_debias_of_momentum_0_and_1(momentum, on_nonfinite):
    running = RunningStats(1, momentum, debias=True, on_nonfinite=on_nonfinite, ddof=0)
    for k in (1, 2):
        running.update(Moments(2, [k], [4 * k]))
    np.testing.assert_array_equal(running.exact(), [[2 * momentum], [4 if momentum else 1]])


@pytest.mark.parametrize("ddof", [0, 1])
def test_replace(rng, ddof):
    running = RunningStats(3, momentum=None, ddof=ddof)
    for x in ten_batches(rng):
        running.update(fastbn.moments(x))
    x, z = rng.normal(5, 2, (8, 3)), rng.normal(5, 2, (4, 3))
    running.replace(fastbn.moments(x), batches=3)
    np.testing.assert_allclose(running.exact(), [x.mean(0), x.var(0, ddof=ddof)], rtol=1e-14)
    assert running.batches == running.variances == 3
    running.update(fastbn.moments(z))
    np.testing.assert_allclose(running.mean, (3 * x.mean(0) + z.mean(0)) / 4, rtol=1e-14)


def test_replace_under_the_guard():
    running = RunningStats(2, momentum=None, on_nonfinite="skip")
    running.update(Moments(2, [7, 7], [2, 2]))
    running.replace(Moments(2, [5, np.nan], [4, 4]), batches=4)
    np.testing.assert_array_equal(running.exact(), [[5, 7], [4, 2]])
    assert running.skipped.tolist() == [0, 4]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("kind", [list, tuple])
def test_groups_are_one_batch(rng, kind, ddof):
    """[ghost batch norm] Their means differ: the average of their variances isn't that of the batch."""
    groups, mean, var = np.int64([0, 2, 2, 0, 4, 4, 4, 2]), np.zeros(3), np.ones(3)  # 1 and 3 are empty
    running = RunningStats(3, momentum=0.25, ddof=ddof)
    for _ in range(3):
        x = rng.normal(0, 1, (8, 3, 5)) + 10 * groups[:, None, None]
        found = fastbn.forward(x, rng.normal(size=3), groups=groups)[1].moments
        assert [m.count for m in found] == [10, 0, 15, 0, 15]
        running.update(kind(found))
        mean = 0.75 * mean + 0.25 * x.mean((0, 2))
        var = 0.75 * var + 0.25 * x.var((0, 2), ddof=ddof)
    np.testing.assert_allclose(running.exact(), [mean, var], rtol=1e-12)
    assert (running.batches, running.variances) == (3, 3)


def test_groups_of_one_value_each_have_a_variance_together(rng):
    x, running = rng.normal(5, 2, (6, 3)), RunningStats(3, momentum=1)
    running.update([fastbn.moments(row[None]) for row in x])
    np.testing.assert_allclose(running.exact(), [x.mean(0), x.var(0, ddof=1)], rtol=1e-12)


def test_groups_without_values_change_nothing():
    running = RunningStats(2, on_nonfinite="raise")
    running.update([Moments(0, [0, 0], [0, 0])] * 2)
    assert (running.batches, running.mean.tolist(), running.var.tolist()) == (0, [0, 0], [1, 1])


def test_a_nan_of_one_group_is_the_batchs(rng):
    x = rng.normal(5, 2, (6, 3))
    x[1, 2] = np.nan
    found = fastbn.forward(x, groups=3)[1].moments
    running = RunningStats(3, momentum=1, on_nonfinite="skip")
    running.update(found)
    assert running.skipped.tolist() == [0, 0, 1]
    np.testing.assert_allclose(running.exact()[0], [*x.mean(0)[:2], 0], rtol=1e-12)
    running = RunningStats(3, on_nonfinite="raise")
    with pytest.raises(ValueError, match=r"update: moments is NaN or Inf in 1 of 3 channels \(2\)"):
        running.update(found)


R = "fastbn.RunningStats: "
WRONG = {
    "guard unknown": (
        lambda: RunningStats(3, on_nonfinite="ignore"),
        ValueError,
        R + "on_nonfinite is str 'ignore'; .*",
    ),
    "guard none": (lambda: RunningStats(3, on_nonfinite=None), ValueError, R + "on_nonfinite is NoneType None"),
    "momentum above 1": (lambda: RunningStats(3, 1.1), ValueError, R + r"momentum is float 1\.1; .* in \[0, 1\]"),
    "momentum below 0": (lambda: RunningStats(3, -0.1), ValueError, R + r"momentum is float -0\.1"),
    "momentum nan": (lambda: RunningStats(3, np.nan), ValueError, R + "momentum is float nan"),
    "momentum inf": (lambda: RunningStats(3, np.inf), ValueError, R + "momentum is float inf"),
    "momentum text": (lambda: RunningStats(3, "0.1"), ValueError, R + r"momentum is str '0\.1'"),
    "momentum beyond floats": (lambda: RunningStats(3, 10**400), ValueError, R + "momentum is int 1000"),
    "decay above 1": (lambda: RunningStats(3, decay=90), ValueError, R + "decay is int 90"),
    "decay nan": (lambda: RunningStats(3, decay=np.nan), ValueError, R + "decay is float nan"),
    "decay text": (lambda: RunningStats(3, decay="0.9"), ValueError, R + r"decay is str '0\.9'"),
    "both": (lambda: RunningStats(3, 0.5, decay=0.9), ValueError, R + "momentum and decay are both given"),
    "both, momentum None": (lambda: RunningStats(3, None, decay=0.9), ValueError, R + "momentum and decay are both"),
    "ddof text": (lambda: RunningStats(3, ddof="1"), ValueError, R + "ddof is str '1'"),
    "ddof below 0": (lambda: RunningStats(3, ddof=-1), ValueError, R + "ddof is int -1"),
    "channels below 0": (lambda: RunningStats(-1), ValueError, R + "channels is int -1"),
    "channels text": (lambda: RunningStats("3"), ValueError, R + "channels is str '3'"),
    "channels a float": (lambda: RunningStats(3.0), ValueError, R + r"channels is float 3\.0"),
    "channels none": (lambda: RunningStats(()), ValueError, R + r"channels is tuple \(\)"),
}


@pytest.mark.parametrize(("make", "error", "match"), WRONG.values(), ids=WRONG)
def test_errors_of_making(make, error, match):
    with pytest.raises(error, match=match):
        make()


WRONG_USE = {
    "update none": (lambda r: r.update(None), TypeError, r"update: moments is a NoneType; .*frozen forward pass"),
    "update an array": (lambda r: r.update(np.ones(3)), TypeError, r"update: moments is a ndarray; expected Moments"),
    "other channels": (
        lambda r: r.update(Moments(2, [1, 2], [1, 2])),
        ValueError,
        r"update: moments has channels of shape \(2,\); expected \(3,\)",
    ),
    "other channels, of no values": (lambda r: r.update(Moments(0, [1], [1])), ValueError, r"channels of shape \(1,\)"),
    "no groups": (lambda r: r.update([]), ValueError, r"update: moments is an empty list; expected those"),
    "a group that has none": (
        lambda r: r.update([Moments(2, [1, 2, 3], [1, 2, 3]), None]),
        TypeError,
        r"update: moments is a NoneType; expected Moments",
    ),
    "a group of other channels": (
        lambda r: r.update((Moments(2, [1, 2, 3], [1, 2, 3]), Moments(0, [1], [1]))),
        ValueError,
        r"update: moments has channels of shape \(1,\); expected \(3,\)",
    ),
    "replace by groups": (lambda r: r.replace([]), TypeError, r"replace: moments is a list; expected Moments"),
    "replace by none": (lambda r: r.replace(None), TypeError, r"replace: moments is a NoneType"),
    "replace by other channels": (
        lambda r: r.replace(Moments(2, [1], [1])),
        ValueError,
        r"replace: moments has channe",
    ),
    "replace by one value": (
        lambda r: r.replace(Moments(1, [1, 2, 3], [0, 0, 0])),
        ValueError,
        r"replace: moments has a count of 1; expected more than ddof=1",
    ),
    "mean of other channels": (lambda r: setattr(r, "mean", [1, 2]), ValueError, r"mean has shape \(2,\); expected"),
    "mean of one number": (lambda r: setattr(r, "mean", 0), ValueError, r"mean has shape \(\); expected \(3,\)"),
    "var complex": (lambda r: setattr(r, "var", [1j, 1, 1]), TypeError, r"var is a complex128 array"),
    "var negative": (lambda r: setattr(r, "var", [1, -2, 1]), ValueError, r"var has a negative value \(-2\)"),
    "var negative beside NaN": (lambda r: setattr(r, "var", [np.nan, -2, 1]), ValueError, r"negative value \(-2\)"),
}


@pytest.mark.parametrize(("use", "error", "match"), WRONG_USE.values(), ids=WRONG_USE)
def test_errors_of_using_change_nothing(rng, use, error, match):
    running = RunningStats(3)
    running.update(fastbn.moments(rng.normal(5, 2, (6, 3)).astype(np.float32)))
    before = (running.exact(), running.batches, running.dtype)
    with pytest.raises(error, match=re.compile(match)):
        use(running)
    np.testing.assert_array_equal(running.exact(), before[0])
    assert (running.batches, running.dtype) == before[1:]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["copied", "pickled"])
def test_copies_go_on(way, rng):
    """What tells an array's library is one object, which a copy had another one of: it took nothing in."""
    layer = fastbn.BatchNorm(4)
    x, more = rng.normal(rng.normal(0, 3, 4), 2, (2, 30, 4)).astype(np.float32)
    layer(x)
    other = way(layer)
    for each in (layer, other):
        each(more)
    np.testing.assert_array_equal(other.running.mean, layer.running.mean)
    np.testing.assert_array_equal(other.running.var, layer.running.var)
    with pytest.raises(ValueError, match="read-only"):
        other.running.mean[:] = 0


@pytest.mark.parametrize("batches", [0, -3, 2.5])
def test_batches_that_are_no_number_of_them(batches):
    running = RunningStats(2)
    with pytest.raises(ValueError, match=r"batches is .*; expected 1 or more"):
        running.replace(fastbn.moments(np.float32([[1, 2], [3, 5]])), batches=batches)
    running.replace(fastbn.moments(np.float32([[1, 2], [3, 5]])), batches=np.uint8(255))
    running.update(fastbn.moments(np.float32([[2, 2], [3, 4]])))
    assert running.batches == 256


def test_from_a_module_of_bfloat16():
    torch = pytest.importorskip("torch")
    module = torch.nn.BatchNorm1d(3).bfloat16()
    running = RunningStats.from_torch(module)
    np.testing.assert_array_equal(running.mean, 0)
    np.testing.assert_array_equal(running.var, 1)
