"""diagnose beside plain NumPy on the whole array, and what its table says."""

import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastbn
from fastbn import diagnose

MODULE = sys.modules["fastbn.recalibrate"]
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, 1.0, 60000.0, -3.5]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(MODULE, "_PIECE", 100)


def by_hand(x, axes):
    """Per channel, by loops over channels: a list of the finite values, and how many are NaN and infinite."""
    order = [*axes, *(a for a in range(x.ndim) if a not in axes)]
    channels = [x.shape[a] for a in axes]
    rows = x.astype(np.float64).transpose(order).reshape(*channels, -1)
    for channel in np.ndindex(*channels):
        row = rows[channel]
        yield channel, row[np.isfinite(row)], np.isnan(row).sum(), np.isinf(row).sum()


def assert_right(found, x, axes):
    for c, finite, nan, inf in by_hand(x, axes):
        assert (found.nan[c], found.inf[c]) == (nan, inf)
        same = finite.size > 0 and finite.min() == finite.max()
        assert found.constant[c] == found.dead[c] == (same and nan + inf == 0)
        assert found.zero[c] == (found.constant[c] and finite[0] == 0)
        if not finite.size:
            for values in (found.mean, found.std, found.minimum, found.maximum, found.offset, found.share):
                assert np.isnan(values[c])
            continue
        assert (found.minimum[c], found.maximum[c]) == (finite.min(), finite.max())
        np.testing.assert_allclose(found.mean[c], finite.mean(), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found.std[c], finite.std(), rtol=1e-7 if same else 1e-12, atol=1e-9 if same else 0)
        if not same:
            np.testing.assert_allclose(found.offset[c], abs(found.mean[c]) / found.std[c], rtol=1e-15)
        largest = np.abs(finite).max()
        np.testing.assert_allclose(found.share[c], largest / float(ml_dtypes.finfo(x.dtype).max), rtol=1e-15)
        np.testing.assert_allclose(found.share_of_float16[c], largest / 65504, rtol=1e-15)


CASES = {
    "(N, C)": ((9, 4), 1),
    "(N, C, H, W)": ((5, 4, 3, 2), 1),
    "channels last": ((5, 3, 2, 4), -1),
    "channels first": ((4, 9), 0),
    "two channel axes": ((5, 4, 3, 2), (0, 2)),
    "one row": ((1, 4, 7), 1),
}


@pytest.mark.usefixtures("small_pieces", "backend")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ">f4", ">f8"])
@pytest.mark.parametrize(("shape", "axis"), CASES.values(), ids=CASES)
def test_beside_numpy(rng, shape, axis, dtype):
    x = rng.normal(3, 2, shape)
    where = rng.uniform(size=shape) < 0.15
    x[where] = rng.choice(SPECIAL, where.sum())
    axes = tuple(sorted(a % x.ndim for a in ([axis] if isinstance(axis, int) else axis)))
    channel = [slice(None)] * x.ndim
    for c, value in ((0, 0.0), (1, 7.5)):  # dead ones
        channel[axes[-1]] = c
        x[tuple(channel)] = value
    x = x.astype(dtype)
    found = diagnose(x, axis)
    assert (found.shape, found.dtype, found.count) == (shape, x.dtype, x.size // found.nan.size)
    assert_right(found, x, axes)
    assert str(found)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_any_values(n, channels, draw):
    values = st.one_of(st.sampled_from(SPECIAL), st.floats(-1e3, 1e3, width=32))
    x = np.array(draw.draw(st.lists(values, min_size=n * channels, max_size=n * channels))).reshape(n, channels)
    assert_right(diagnose(x), x, (1,))


def test_a_memory_map_by_pieces(rng, tmp_path, small_pieces):
    path = tmp_path / "x.npy"
    x = rng.normal(3, 2, (50, 4, 6)).astype(np.float32)
    x[7, 2, 3] = np.nan
    np.save(path, x)
    assert_right(diagnose(np.load(path, mmap_mode="r")), x, (1,))


def test_one_value_beside_nans_is_no_offset(rng):
    x = np.full((5, 2), np.nan, np.float32)
    x[3, 0], x[:, 1] = rng.normal(3, 0.1), rng.normal(3, 1, 5)
    assert list(fastbn.diagnose(x).findings) == ["NaN", ""]


def test_moments_at_an_offset(rng):
    """The standard deviation of float32 data at 1e6 is that of fastbn.moments, not of squares."""
    x = rng.normal(1e6, 1, (200, 3)).astype(np.float32)
    found = diagnose(x)
    np.testing.assert_allclose(found.std, x.astype(float).std(0), rtol=1e-9)
    assert (found.findings == "offset, beyond float16").all()


def test_findings():
    """A channel each, and one without."""
    x = np.ones((4, 8), np.float16) * np.float16([1, 2, 3, 4])[:, None]
    x[0, 0], x[1, 1], x[:, 2], x[:, 3], x[2, 4] = np.nan, -np.inf, 0, 5, 40000
    x[:, 5] = [60000, 60032, 60000, 60000]
    x[0, 6], x[1, 6] = np.nan, np.inf
    expected = ["NaN", "Inf", "dead: all 0", "dead: constant", "near the end of float16",
                "offset, near the end of float16", "NaN, Inf", ""]  # fmt: skip
    assert diagnose(x).findings.tolist() == expected


def test_beyond_float16():
    found = diagnose(np.float32([[1, 1], [70000, 2]]))
    np.testing.assert_allclose(found.share_of_float16, [70000 / 65504, 2 / 65504])
    assert "1 with values beyond float16" in str(found)
    assert found.findings.tolist() == ["beyond float16", ""]


def test_the_table_stays_narrow_beyond_float16():
    """The share was printed as 457987299324889468547078015185584128.00%."""
    top = float(np.finfo(np.float16).max)
    x = np.float32([[3e38, 1, 1.5 * top, top, np.nan], [-3e38, 2, 0, 0, np.nan]])
    table = [line.split() for line in str(diagnose(x)).splitlines()[-5:]]
    shares = {row[0]: row[8] for row in table}
    assert shares == {"0": "4.58e+33x", "1": "0.00%", "2": "1.5x", "3": "100.00%", "4": "nan%"}
    assert str(diagnose(x)).isascii()  # or print fails where stdout is ASCII alone


def test_the_table_lists_findings_first_and_not_everything(rng):
    x = rng.normal(2, 1, (9, 300)).astype(np.float32)
    x[:, 250], x[3, 17] = 4, np.nan
    lines = str(diagnose(x)).splitlines()
    assert lines[0] == "float32 array of shape (9, 300), channel axis 1: 300 channels of 9 values"
    assert [line.split()[0] for line in lines[4:7]] == ["17", "250", "0"]
    assert lines[4].endswith("NaN")
    assert lines[5].endswith("dead: constant")
    assert lines[-1] == "... 288 more, none with findings"
    assert len(lines) == 1 + 2 + 1 + 12 + 1
    x[:] = 0
    assert str(diagnose(x)).endswith("... 288 more, 288 of them with findings")
    assert repr(diagnose(x)) == "Diagnosis(float32 array of shape (9, 300), 300 of 300 channels with findings)"
    assert "nothing found" in str(diagnose(rng.normal(2, 1, (9, 3))))


@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0), (0, 3, 0)])
def test_no_values(shape):
    found = diagnose(np.ones(shape, np.float32))
    assert found.count == 0
    assert not found.dead.any()
    assert np.isnan(found.mean).all()
    assert "3 channels of 0 values" in str(found)


def test_no_channels():
    assert str(diagnose(np.ones((4, 0)))).endswith("0 channels of 0 values")


def test_x_is_left_alone(rng):
    x = rng.normal(2, 1, (9, 3))
    x[0, 0] = np.nan
    before = x.copy()
    found = diagnose(x)
    found.mean[:] = 9
    np.testing.assert_array_equal(x, before)


WRONG = {
    "a list": (lambda: diagnose([[1.0]]), TypeError, "diagnose: x is a builtins.list; expected a NumPy array"),
    "integers": (lambda: diagnose(np.ones((3, 3), int)), TypeError, "diagnose: x is a int64 array"),
    "masked": (lambda: diagnose(np.ma.ones((3, 3))), TypeError, "diagnose: x is a masked array"),
    "one axis": (lambda: diagnose(np.ones(3)), ValueError, r"diagnose: x has shape \(3,\); expected at least two axes"),
    "axis": (lambda: diagnose(np.ones((3, 3)), 2), np.exceptions.AxisError, "diagnose: axis=2 is out of range"),
}


@pytest.mark.parametrize(("call", "error", "match"), WRONG.values(), ids=WRONG)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_it_is_public():
    assert type(diagnose(np.eye(3))) is fastbn.Diagnosis
