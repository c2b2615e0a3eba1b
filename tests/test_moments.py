"""Moments: parts merge into what the whole gives, in any number and order."""

import functools
import operator
import re

import ml_dtypes
import numpy as np
import pytest

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
    assert np.isnan(m.var(ddof)).all()
    assert np.isnan(m.exact(ddof)[1]).all()


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
WRONG = {
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
