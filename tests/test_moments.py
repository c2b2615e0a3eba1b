"""Moments: parts merge into what the whole gives, in any number and order."""

import functools
import operator
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastbn
from fastbn import Moments

# Relative. One merge rounds a few times (1e-16 each), but at a mean of 1e4 a part's mean is itself rounded by up to
# 1e-12 of a standard deviation, which is what the variance then differs by; up to 60 parts.
TOLERANCE = 1e-12

PARTITIONS = {
    # rows in each part; the data have 61
    "halves": (30, 31),
    "one row and the rest": (1, 60),
    "the rest and one row": (60, 1),
    "an empty part first, between and last": (0, 20, 0, 0, 41, 0),
    "one row each": (1,) * 61,
    "ragged": (7, 2, 30, 1, 21),
    "one part": (61,),
}


def parts(x, sizes):
    return np.split(x, np.cumsum(sizes)[:-1])


def exact(x, axes):
    """Mean and variance in NumPy's widest type."""
    wide = x.astype(np.longdouble)
    mean = wide.mean(axes, keepdims=True)
    return mean.squeeze(axes), ((wide - mean) ** 2).mean(axes)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("sizes", PARTITIONS.values(), ids=PARTITIONS)
@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_parts_merge_into_the_whole(rng, dtype, offset, sizes):
    x = (offset + rng.normal(rng.normal(size=3), [1, 0.1, 30], (61, 3))).astype(dtype)
    whole = fastbn.moments(x)
    merged = functools.reduce(operator.add, (fastbn.moments(part) for part in parts(x, sizes)))
    assert merged.count == whole.count == 61
    for ddof in (0, 1):
        for got, expected in zip(merged.exact(ddof), whole.exact(ddof), strict=True):
            np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=offset * 1e-15)
    mean, var = exact(x, 0)
    np.testing.assert_allclose(merged.exact()[0], mean.astype(np.float64), rtol=TOLERANCE, atol=offset * 1e-15)
    # 0.1 of standard deviation at 1e4: the rounding of the mean is ten times as large beside it
    np.testing.assert_allclose(merged.exact()[1], var.astype(np.float64), rtol=10 * TOLERANCE)


def test_ordered_parts(rng):
    """Parts whose means differ: the variance between them counts (1.0 for 10.0 was seen elsewhere)."""
    x = np.sort(rng.normal(3, 2, (60, 2)), axis=0)
    merged = sum(fastbn.moments(part) for part in np.split(x, 6))
    np.testing.assert_allclose(merged.exact()[1], x.var(0), rtol=TOLERANCE)


def test_sum_and_plus_are_merge(rng):
    a, b, c = (fastbn.moments(rng.normal(4, 2, (n, 3)).astype(np.float32)) for n in (5, 9, 2))
    expected = a.merge(b).merge(c)
    for other in (a + b + c, sum([a, b, c]), sum([b, c], a)):
        assert other.count == 16
        np.testing.assert_array_equal(other.mean, expected.mean)
        np.testing.assert_array_equal(other.var(), expected.var())


def test_merging_changes_neither_side(rng):
    a, b = (fastbn.moments(rng.normal(4, 2, (n, 3))) for n in (5, 9))
    before = [(m.count, m.mean.tolist(), m.m2.tolist()) for m in (a, b)]
    merged = a.merge(b)
    for result in (merged.mean, merged.m2, *a.exact(), *(a + fastbn.moments(np.empty((0, 3)))).exact()):
        result[:] = -1  # what is handed out is the caller's
    assert [(m.count, m.mean.tolist(), m.m2.tolist()) for m in (a, b)] == before


@pytest.mark.parametrize("ddof", [0, 1, 2, 5])
def test_var(rng, ddof):
    x = rng.normal(2, 3, (9, 4))
    np.testing.assert_allclose(fastbn.moments(x).var(ddof), x.var(0, ddof=ddof), rtol=1e-14)
    np.testing.assert_allclose(fastbn.moments(x).m2, 9 * x.var(0), rtol=1e-14)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("count", "ddof"),
    [(0, 0), (0, 1), (1, 1), (2, 3)],  # no values; one, of which n - 1 leaves none; fewer than ddof
)
def test_var_of_too_few_values_is_nan_in_silence(count, ddof):
    m = fastbn.moments(np.full((count, 3), 5.0))
    for number in (ddof, np.uint8(ddof)):  # 0 - 1 of which is 255
        assert np.isnan(m.var(number)).all()
        assert np.isnan(m.exact(number)[1]).all()


def test_a_dtype_that_moments_cannot_have():
    for dtype in (int, np.float16):
        with pytest.raises(ValueError, match=r"dtype is .*; expected float32 or float64"):
            Moments(3, [1.5], [2.0], dtype=dtype)


def test_a_ddof_that_is_no_whole_number():
    with pytest.raises(TypeError, match=r"ddof is float 0.5; expected a whole number"):
        fastbn.moments(np.ones((4, 3))).var(0.5)


@pytest.mark.usefixtures("backend")
def test_one_value_has_variance_0(rng):
    x = rng.normal(7, 2, (1, 3)).astype(np.float32)
    m = fastbn.moments(x)
    np.testing.assert_array_equal(m.mean, x[0])
    np.testing.assert_array_equal(m.var(), 0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)])
def test_count_0(shape):
    m = fastbn.moments(np.empty(shape, np.float32))
    assert m.count == 0
    np.testing.assert_array_equal(m.mean, np.zeros(3))
    np.testing.assert_array_equal(m.m2, np.zeros(3))


def test_count_0_is_the_neutral_element(rng):
    """Of mean 5, so that a merge that weighs it in would show."""
    nothing = Moments(0, np.full(3, 5.0), np.zeros(3))
    m = fastbn.moments(rng.normal(2, 1, (4, 3)))
    for merged in (nothing + m, m + nothing, nothing + m + nothing):
        assert merged.count == 4
        np.testing.assert_array_equal(merged.exact(), m.exact())
    assert (nothing + nothing).count == 0


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (np.float16, np.float32),
        (ml_dtypes.bfloat16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
        (">f8", np.float64),  # float64 whatever the byte order
        (">f4", np.float32),
    ],
)
def test_dtype(rng, dtype, kept):
    x = rng.normal(2, 1, (8, 3)).astype(dtype)
    m = fastbn.moments(x)
    for result in (m.mean, m.m2, m.var(), m.var(ddof=1)):
        assert result.dtype == kept
    for result in m.exact():
        assert result.dtype == np.float64
    np.testing.assert_allclose(m.exact()[0], x.astype(np.float64).mean(0), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_float32_and_float64_parts_make_float64(rng, order):
    x = [rng.normal(size=(4, 3)).astype(dtype) for dtype in (np.float32, np.float64)]
    assert (fastbn.moments(x[order[0]]) + fastbn.moments(x[order[1]])).var().dtype == np.float64


def test_inside_is_float64():
    """At 1e5 a float32 mean is off by up to 0.004 of a standard deviation of 1."""
    x = np.float32(1e5) + np.arange(7, dtype=np.float32).reshape(7, 1) / 128
    assert fastbn.moments(x).exact()[0][0] == 1e5 + 3 / 128
    assert fastbn.moments(x).mean[0] == np.float32(1e5 + 3 / 128)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("axis", "kept"),
    [((0, 1), (0, 1)), ((1, 0), (0, 1)), ((-1, 1), (1, 3)), ((2,), (2,)), (-2, (2,)), ((0, 1, 2), (0, 1, 2))],
)
def test_axis(rng, axis, kept):
    x = rng.normal(5, 2, (3, 4, 5, 6))
    rest = tuple(a for a in range(4) if a not in kept)
    m = fastbn.moments(x, axis=axis)
    assert m.shape == tuple(x.shape[a] for a in kept)
    assert m.count == np.prod([x.shape[a] for a in rest])
    np.testing.assert_allclose(m.mean, x.mean(rest), rtol=1e-14)
    np.testing.assert_allclose(m.var(), x.var(rest), rtol=1e-13)
    halves = fastbn.moments(x[..., :2], axis=axis), fastbn.moments(x[..., 2:], axis=axis)
    if 3 in rest:
        np.testing.assert_allclose((halves[0] + halves[1]).exact(), m.exact(), rtol=TOLERANCE)
    else:
        with pytest.raises(ValueError, match=r"other has channels of shape .* Were both made with the same axis\?"):
            halves[0].merge(halves[1])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
@pytest.mark.usefixtures("backend")
def test_channel_axes_in_any_order_of_memory(rng, order):
    """Results are in the order of the axes, not in that in which the channels follow each other in memory."""
    x = np.ascontiguousarray(rng.normal(5, 2, (5, 3, 4)).transpose(order)).transpose(np.argsort(order))
    np.testing.assert_allclose(fastbn.moments(x, axis=(1, 2)).mean, x.mean(0), rtol=1e-14)


@st.composite
def cut_and_grouped(draw):
    """Values (n, 2), borders between parts, and an order in which neighbours of a shuffled list merge."""
    n = draw(st.integers(1, 60))
    seed, offset, scale = (
        draw(st.integers(0, 999)),
        draw(st.sampled_from([0.0, 1.0, 1e4, -1e8])),
        draw(st.floats(0.1, 9)),
    )
    x = offset + scale * np.random.default_rng(seed).normal(size=(n, 2))
    x[0] += 100 * draw(st.integers(0, 1)) * scale  # an outlier
    borders = sorted(draw(st.lists(st.integers(0, n), max_size=9)))
    parts = draw(st.permutations(np.split(x, borders)))
    return x, parts, draw(st.lists(st.integers(0, 99), min_size=len(parts), max_size=len(parts)))


@settings(max_examples=300, deadline=None)
@given(cut_and_grouped())
def test_any_partition_in_any_order_and_grouping(drawn):
    """1e-12 of the variance, and of a standard deviation for the mean, but for what float64 can't say of it: half an
    ulp. That at any offset: with the mean as one float64, 1e8 gave a variance off by 1e-8."""
    x, parts, picks = drawn
    merged = [fastbn.moments(part) for part in parts]
    for pick in picks[1:]:
        k = pick % (len(merged) - 1)
        merged[k : k + 2] = [merged[k] + merged[k + 1]]
    (total,), whole = merged, fastbn.moments(x)
    assert total.count == whole.count == len(x)
    (mean, var), (mean_whole, var_whole) = total.exact(), whole.exact()
    assert (np.abs(mean - mean_whole) <= 1e-12 * np.sqrt(var_whole) + np.spacing(np.abs(mean_whole))).all()
    np.testing.assert_allclose(var, var_whole, rtol=TOLERANCE)


def test_the_pair_matters():
    """Three values whose mean has no float64: with means rounded to one, M2 is off by more than 1e-10."""
    x = 1e8 + np.float64([[0.1], [0.2], [0.4]])
    wide = x[:, 0].astype(np.longdouble)
    exact = float(((wide - wide.mean()) ** 2).sum())
    for grouped in (
        (fastbn.moments(x[:2]) + fastbn.moments(x[2:])),
        sum(fastbn.moments(x[k : k + 1]) for k in range(3)),
    ):
        np.testing.assert_allclose(grouped.m2[0], exact, rtol=TOLERANCE)
    rounded = Moments(2, fastbn.moments(x[:2]).mean, fastbn.moments(x[:2]).m2, np.float64) + fastbn.moments(x[2:])
    assert abs(rounded.m2[0] / exact - 1) > 1e-10  # the test would see it


def weighted(x, w):
    """Moments of x (n, C) by weights (n,), in NumPy's widest type."""
    w = w.astype(np.longdouble)
    total = w.sum()
    mean = (w[:, None] * x).sum(0) / total if total else np.zeros(x.shape[1])
    return Moments(float(total), np.float64(mean), np.float64((w[:, None] * (x - mean) ** 2).sum(0)), np.float64)


def test_weights(rng):
    """Sums of weights as counts: parts merge, and a weight of 0 is no value."""
    x, w = rng.normal(rng.normal(size=3), 2, (40, 3)), rng.uniform(0, 2, 40)
    w[[0, 7, 30]] = 0
    whole, cuts = weighted(x, w), (slice(1), slice(1, 9), slice(9, 30), slice(30, None))
    merged = sum(weighted(x[cut], w[cut]) for cut in cuts)
    assert isinstance(merged.count, float)
    np.testing.assert_allclose(merged.count, w.sum(), rtol=1e-15)
    np.testing.assert_allclose(merged.exact(1), whole.exact(1), rtol=1e-13)
    np.testing.assert_allclose(merged.exact()[1], np.cov(x.T, aweights=w, ddof=0).diagonal(), rtol=1e-13)
    assert repr(Moments(2.5, [1], [1])) == "Moments(count=2.5, mean=[1], var=[0.4])"
    mixed = whole + fastbn.moments(x)
    np.testing.assert_allclose(mixed.count, w.sum() + 40)
    np.testing.assert_allclose(mixed.exact(), weighted(np.concatenate([x, x]), np.append(w, np.ones(40))).exact())


def test_var_of_fractional_weights():
    assert Moments(1.5, [0], [3]).var(1)[0] == 6
    assert np.isnan(Moments(0.75, [0], [3]).var(1)[0])  # no more than ddof


@pytest.mark.parametrize("offset", [0, 1e6])
@pytest.mark.parametrize("sizes", [(30, 31), (60, 1), (1, 60), (0, 61)])
def test_subtraction_takes_a_batch_back(rng, sizes, offset):
    x = offset + rng.normal(rng.normal(size=3), [1, 0.1, 30], (61, 3))
    a, b = (fastbn.moments(part) for part in parts(x, sizes))
    back = (a + b) - b
    assert back.count == a.count
    # What cancels is M2 of the whole, at most 61 times that of a value: a few eps of it stay as error.
    np.testing.assert_allclose(back.m2, a.m2, rtol=1e-12, atol=1e-14 * (a + b).m2.max())
    np.testing.assert_allclose(back.mean, a.mean, rtol=1e-15, atol=1e-12)
    assert (back + b).count == 61
    np.testing.assert_allclose((back + b).exact(), (a + b).exact(), rtol=1e-12)


def test_subtraction_leaves_nothing_or_all(rng):
    a, empty = fastbn.moments(rng.normal(4, 2, (9, 3))), fastbn.moments(np.empty((0, 3)))
    nothing = a - a
    assert (nothing.count, nothing.mean.tolist(), nothing.m2.tolist()) == (0, [0] * 3, [0] * 3)
    np.testing.assert_array_equal((a - empty).exact(), a.exact())
    by_weight = Moments(0.1 + 0.2, [1], [1]) - Moments(0.3, [1], [1])
    assert by_weight.count == 0  # 5.6e-17 by rounding alone
    assert (Moments(0.5, [1], [1]) - Moments(0.25, [1], [0.5])).count == 0.25


def test_an_m2_below_0_by_rounding_is_0():
    """A constant channel, of which rounding may leave anything."""
    a, b = Moments(3, [0.1], [1e-33], np.float64), Moments(2, [0.1], [1.1e-33], np.float64)
    assert (a - b).m2[0] == 0
    kept = Moments(9, [5.0], [np.nan]) - Moments(2, [5.0], [1.0])
    assert np.isnan(kept.m2[0])  # unknown stays unknown


def test_merge_all_is_one_tree_whatever_it_is_given(rng):
    """The same bits from a list, a generator and the tree by hand; right for any number of parts."""
    found = [fastbn.moments(rng.normal(k, 2, (k % 4, 3)).astype(np.float32)) for k in range(1, 8)]
    a, b, c, d, e, f, g = found
    by_hand = ((a + b) + (c + d)) + ((e + f) + g)
    for merged in (Moments.merge_all(found), Moments.merge_all(iter(found)), Moments.merge_all(m for m in found)):
        assert merged.count == by_hand.count
        np.testing.assert_array_equal(merged.exact(), by_hand.exact())
    for number in range(1, 8):
        merged = Moments.merge_all(found[:number])
        np.testing.assert_allclose(merged.exact(), sum(found[:number]).exact(), rtol=TOLERANCE)


def test_larger_and_smaller_parts_commute(rng):
    """Bit by bit, as the larger one is always the base."""
    a, b = (fastbn.moments(rng.normal(1e6, 2, (n, 300))) for n in (5, 9))
    one, other = (a + b).to_dict(), (b + a).to_dict()
    for name in ("mean", "mean_lo", "m2"):
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channels", [(3,), (2, 3)])
def test_state_goes_through_a_file(rng, tmp_path, dtype, channels):
    """np.savez and back, without pickle: the same bits, also in what it merges to later."""
    x = rng.normal(1e6, 1, (7, *channels)).astype(dtype)
    axis = tuple(range(1, x.ndim))
    whole = fastbn.moments(x[:5], axis=axis) + fastbn.moments(x[5:], axis=axis)
    for m in (whole, Moments(2.5, x[0], x[1] ** 2, dtype), fastbn.moments(x[:0], axis=axis)):
        np.savez(tmp_path / "m.npz", **m.to_dict())
        with np.load(tmp_path / "m.npz", allow_pickle=False) as state:
            loaded = Moments.from_dict(state)
        assert (loaded.count, type(loaded.count), loaded.dtype) == (m.count, type(m.count), m.dtype)
        assert loaded.shape == channels
        np.testing.assert_array_equal(loaded.exact(), m.exact(), strict=True)
        np.testing.assert_array_equal((loaded + whole).exact(), (m + whole).exact())
        again = loaded.to_dict()
        for name, value in m.to_dict().items():
            np.testing.assert_array_equal(again[name], value, strict=True)
    assert whole.to_dict()["mean"].dtype == np.float64
    assert (whole.to_dict()["mean_lo"] != 0).any()
    np.testing.assert_array_equal(whole.to_dict()["mean"], whole.exact()[0])


def test_to_dict_is_a_copy_and_loading_copies(rng):
    m = fastbn.moments(rng.normal(4, 2, (9, 3)))
    state, before = m.to_dict(), m.exact()
    loaded = Moments.from_dict(state)
    for name in ("mean", "mean_lo", "m2"):
        state[name][:] = 9
    for each in (m, loaded):
        np.testing.assert_array_equal(each.exact(), before)


def test_finite(rng):
    x = rng.normal(2, 1, (5, 4))
    x[2, 1], x[1, 2] = np.inf, np.nan
    np.testing.assert_array_equal(fastbn.moments(x).finite(), [True, False, False, True])


@pytest.mark.parametrize("scale", [1e20, 1e200])
def test_large_numbers_merge_in_silence(scale):
    """Squares leave float32, and at 1e200 float64 too: inf, and no warning (warnings are errors here)."""
    a, b = Moments(2, [scale], [scale]), Moments(3, [-scale], [scale])
    merged = a + b
    np.testing.assert_allclose(merged.exact()[0], -scale / 5, rtol=1e-15)
    assert merged.var()[0] == np.inf


def test_infinite_and_nan_channels_stay_among_themselves(rng):
    x, z = rng.normal(2, 1, (2, 5, 4))
    x[2, 1], z[1, 2], x[0, 3], z[0, 3] = np.inf, np.nan, np.inf, -np.inf
    mean, var = (fastbn.moments(x) + fastbn.moments(z)).exact()
    np.testing.assert_allclose(mean[0], np.concatenate([x, z])[:, 0].mean(), rtol=1e-14)
    np.testing.assert_allclose(var[0], np.concatenate([x, z])[:, 0].var(), rtol=1e-14)
    assert not np.isfinite(mean[1:]).any()
    assert not np.isfinite(var[1:]).any()


def test_repr():
    assert repr(Moments(3, [4, 20], [26, 600])) == "Moments(count=3, mean=[4, 20], var=[8.667, 200])"
    assert repr(Moments(0, [0.0], [0.0])) == "Moments(count=0, mean=[0], var=[nan])"
    assert repr(Moments(1, np.zeros(9), np.zeros(9))).count("...") == 2  # six channels, and that there are more


M = Moments(2, np.ones(3), np.ones(3))
STATE = M.to_dict()
WRONG = {
    "subtract more": (lambda: M - Moments(3, [1] * 3, [0] * 3), ValueError, r"subtract: other has a count of 3; .* 2,"),
    "subtract more weight": (lambda: M - Moments(2.1, [1] * 3, [0] * 3), ValueError, r"a count of 2\.1; expected at m"),
    "subtract other channels": (lambda: M - Moments(1, [1], [1]), ValueError, r"subtract: other has channels of shape"),
    "subtract a number": (lambda: M - 1, TypeError, "unsupported operand"),
    "subtract by name": (lambda: M.subtract(1), TypeError, r"Moments\.subtract: other is a int; expected Moments"),
    "subtract what is no part": (
        lambda: M - Moments(1, [1] * 3, [0, 5, 0]),
        ValueError,
        r"subtract: other has more M2 than a part of these can, in 1 of 3 channels",
    ),
    "merge all of none": (lambda: Moments.merge_all([]), ValueError, r"merge_all: parts is empty; expected at least"),
    "merge all of numbers": (lambda: Moments.merge_all([M, 1]), TypeError, r"merge_all: parts has a int; expected Mom"),
    "a state of nothing": (
        lambda: Moments.from_dict(None),
        ValueError,
        r"from_dict: state has NoneType None; expected",
    ),
    "a state without count": (
        lambda: Moments.from_dict({k: v for k, v in STATE.items() if k != "count"}),
        ValueError,
        r"from_dict: state has \['dtype', 'm2', 'mean', 'mean_lo'\]; expected \['count',",
    ),
    "a state of negative M2": (
        lambda: Moments.from_dict({**STATE, "m2": [-1, 1, 1]}),
        ValueError,
        r"from_dict: m2 has a negative value \(-1\)",
    ),
    "a state of two shapes": (lambda: Moments.from_dict({**STATE, "m2": [1]}), ValueError, r"m2 has shape \(1,\); exp"),
    "a state of a negative count": (
        lambda: Moments.from_dict({**STATE, "count": np.array(-1)}),
        ValueError,
        r"from_dict: count is int -1",
    ),
    "a state of a count per channel": (
        lambda: Moments.from_dict({**STATE, "count": np.ones(3)}),
        ValueError,
        r"from_dict: count is float64 array of shape \(3,\)",
    ),
    "a state of another dtype": (lambda: Moments.from_dict({**STATE, "dtype": "int8"}), ValueError, r"dtype is 'int8'"),
    "a place that can't be": (
        lambda: Moments.from_dict(STATE, like=[1]),
        TypeError,
        r"from_dict: like is a list \[1\]; expected a NumPy array, a CuPy",
    ),
    "another number of channels": (lambda: M.merge(Moments(2, [1], [1])), ValueError, r"shape \(1,\); expected \(3,\)"),
    "merge an array": (lambda: M.merge(np.ones(3)), TypeError, r"Moments\.merge: other is a ndarray; expected Moments"),
    "merge none": (lambda: M.merge(None), TypeError, r"other is a NoneType"),
    "add 1": (lambda: M + 1, TypeError, r"unsupported operand"),
    "add to 1": (lambda: 1 + M, TypeError, r"unsupported operand"),
    "negative count": (
        lambda: Moments(-1, [1], [1]),
        ValueError,
        r"Moments: count is .*-1; expected a number of values",
    ),
    "fractional count below 0": (lambda: Moments(-2.5, [1], [1]), ValueError, r"Moments: count is float -2\.5"),
    "infinite count": (lambda: Moments(np.inf, [1], [1]), ValueError, r"Moments: count is float inf"),
    "count of text": (lambda: Moments("2", [1], [1]), ValueError, r"Moments: count is str '2'"),
    "NaN count": (lambda: Moments(np.nan, [1], [1]), ValueError, r"Moments: count is float nan"),
    "negative M2": (lambda: Moments(2, [1], [-1]), ValueError, r"Moments: m2 has a negative value \(-1\)"),
    "M2 of other channels": (
        lambda: Moments(2, [1, 2], [1]),
        ValueError,
        r"Moments: m2 has shape \(1,\); expected \(2,\)",
    ),
    "complex mean": (lambda: Moments(2, [1j], [1]), TypeError, r"Moments: mean is a complex128 array"),
}


@pytest.mark.parametrize(("call", "error", "match"), WRONG.values(), ids=WRONG)
def test_errors(call, error, match):
    with pytest.raises(error, match=re.compile(match)):
        call()
