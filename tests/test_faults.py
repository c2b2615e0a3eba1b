"""Faults that were found in respected batch norms, each as a test for this one.

In brackets: where it was seen. Expected values are NumPy's, in float64 or wider, written out here.
"""

import concurrent.futures

import numpy as np
import pytest

import fastbn

F32, F64 = np.finfo(np.float32).eps, np.finfo(np.float64).eps


def parameters(rng, channels):
    return rng.normal(1, 0.5, channels), rng.normal(size=channels)


def expected_forward(x, gamma, beta, eps=1e-5):
    """(N, C, ...): y, xhat and the deviation with eps, per channel, in NumPy's widest type."""
    rest = (0, *range(2, x.ndim))
    wide = x.astype(np.longdouble)
    d = wide - wide.mean(rest, keepdims=True)
    std = np.sqrt((d * d).mean(rest, keepdims=True) + eps)
    shape = [-1 if a == 1 else 1 for a in range(x.ndim)]
    return gamma.reshape(shape) * (d / std) + beta.reshape(shape), d / std, std


def assert_close(got, expected, factor=2):
    """Within `factor` eps of max(1, |expected|): rounding the result once costs half of one."""
    worst = np.abs(got - expected) / np.maximum(1, np.abs(expected))
    assert worst.max() <= factor * np.finfo(got.dtype).eps


def assert_gradients(dy, x, gamma, beta, saved, factor=2):
    rest = (0, *range(2, x.ndim))
    _, xhat, std = expected_forward(x, gamma, beta)
    g = dy.astype(np.longdouble)
    slope = gamma.reshape([-1 if a == 1 else 1 for a in range(x.ndim)]) / std
    terms = slope * (g - g.mean(rest, keepdims=True)), slope * xhat * (g * xhat).mean(rest, keepdims=True)
    expected = terms[0] - terms[1]
    dx, dgamma, dbeta = fastbn.backward(dy, saved)
    # dx is a difference, which is taken in float64: 8 of its eps of the two terms, besides rounding the result.
    allowed = factor * np.finfo(dx.dtype).eps * np.maximum(1, np.abs(expected)) + 8 * F64 * np.abs(terms).sum(0)
    assert (np.abs(dx - expected) <= allowed).all()
    # Sums: 4 eps of their terms' absolute sum, which bounds what rounding each of them can do.
    for got, terms in ((dgamma, g * xhat), (dbeta, g)):
        assert (np.abs(got - terms.sum(rest)) <= 4 * np.finfo(got.dtype).eps * np.abs(terms).sum(rest)).all()


@pytest.mark.usefixtures("backend")
def test_short_last_blocks_do_not_count_their_padding(rng):
    """[FlagGems] Welford lanes beyond the end count: N=8192 of inner size 9 gives a mean of 4.03 for 5.01."""
    x = rng.normal(5.01, 1, (8192, 2, 9)).astype(np.float32)
    m = fastbn.moments(x)
    wide = x.astype(np.float64)
    # A value too many in each of 8192 runs would move the mean by a tenth. Float32 deviations, of 1, round at 2^-24.
    np.testing.assert_allclose(m.exact()[0], wide.mean((0, 2)), rtol=2.0**-24)
    np.testing.assert_allclose(m.exact()[1], wide.var((0, 2)), rtol=2.0**-23)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("std", [0.01, 30])
def test_invstd_is_applied_once_in_backward(rng, std):
    """[FlagGems] rsqrt twice. Far from a deviation of 1, once and twice differ by much."""
    x = rng.normal(3, std, (16, 3, 5))
    gamma, beta = parameters(rng, 3)
    dy = rng.normal(size=x.shape)
    y, saved = fastbn.forward(x, gamma, beta)
    assert_close(y, expected_forward(x, gamma, beta)[0], 8)
    assert_gradients(dy, x, gamma, beta, saved, 8)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("need", [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)])
@pytest.mark.parametrize("frozen", [False, True])
def test_any_choice_of_gradients(rng, need, frozen):
    """[FlagGems] A crash when not all gradients are wanted. Here each is the same in any company."""
    x, dy = rng.normal(3, 2, (2, 7, 3, 5)).astype(np.float32)
    gamma, beta = parameters(rng, 3)
    _, saved = fastbn.forward(x, gamma, beta, frozen=(rng.normal(3, 1, 3), rng.uniform(1, 2, 3)) if frozen else None)
    some, all_three = fastbn.backward(dy, saved, need=need), fastbn.backward(dy, saved)
    for wanted, got, expected in zip(need, some, all_three, strict=True):
        if wanted:
            np.testing.assert_array_equal(got, expected, strict=True)
        else:
            assert got is None


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("frozen", [False, True])
def test_inputs_are_not_written_to(rng, frozen):
    """[FlagGems] x overwritten when running statistics are absent."""
    x, dy = rng.normal(3, 2, (2, 7, 3, 5)).astype(np.float32)
    given = [x, dy, *parameters(rng, 3), rng.normal(3, 1, 3), rng.uniform(1, 2, 3)]
    before = [a.copy() for a in given]
    for array in given:
        array.flags.writeable = False
    x, dy, gamma, beta, mean, var = given
    y, saved = fastbn.forward(x, gamma, beta, frozen=(mean, var) if frozen else None)
    fastbn.backward(dy, saved)
    fastbn.infer(x, mean, var, gamma, beta)
    fastbn.moments(x)
    assert not np.may_share_memory(x, y)
    for array, old in zip(given, before, strict=True):
        np.testing.assert_array_equal(array, old)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5)])
def test_nan_stays_in_its_channel(rng, shape):
    """[PyTorch, Keras] What is promised today: one NaN spoils its own channel, y and running statistics, no other."""
    x, dy = rng.normal(3, 2, (2, *shape)).astype(np.float32)
    gamma, beta = parameters(rng, 3)
    clean, _ = fastbn.forward(x, gamma, beta)
    x[2, 1] = np.nan
    bn = fastbn.BatchNorm(3)
    bn.gamma[...], bn.beta[...] = gamma, beta
    y, dx = bn(x), bn.backward(dy)
    for values in (y, dx):
        assert np.isnan(values[:, 1]).all()
    others = [0, 2]
    assert_close(y[:, others], clean[:, others])
    assert np.isfinite(dx[:, others]).all()
    for values in (*bn.running.exact(), bn.dgamma):
        assert np.isnan(values[1])
        assert np.isfinite(values[others]).all()
    assert np.isfinite(bn.dbeta).all()  # the sum of dy knows nothing of x


@pytest.mark.usefixtures("backend")
def test_inf_stays_in_its_channel(rng):
    x = rng.normal(3, 2, (6, 4, 5)).astype(np.float32)
    x[1, 0, 2], x[1, 2, 2], x[2, 2, 2] = np.inf, -np.inf, np.inf
    y, saved = fastbn.forward(x)
    assert np.isnan(y[:, [0, 2]]).all()
    assert np.isfinite(y[:, [1, 3]]).all()
    assert np.isfinite(saved.moments.exact()).all(0).tolist() == [False, True, False, True]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)])
def test_empty_batch(rng, shape):
    """[PyTorch, Keras] Running statistics NaN for ever. Here: empty results, gradients 0, nothing learned."""
    bn = fastbn.BatchNorm(3)
    bn(rng.normal(4, 2, (8, 3, 4)).astype(np.float32))
    before = bn.running.exact()
    x = np.empty(shape, np.float32)
    for mode in (True, False):
        bn.train(mode)
        assert bn(x).shape == bn.backward(x).shape == shape
        np.testing.assert_array_equal([bn.dgamma, bn.dbeta], np.zeros((2, 3)))
        np.testing.assert_array_equal(bn.running.exact(), before)
    assert bn.running.batches == 1


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_one_value_per_channel(rng, shape):
    """[PyTorch's native op, tinygrad] running_var NaN or inf. Here a warning, y = beta, dx = 0, a variance kept."""
    x, dy = rng.normal(4, 2, (2, *shape)).astype(np.float32)
    bn = fastbn.BatchNorm(3, momentum=0.5)
    bn.gamma[...], bn.beta[...] = parameters(rng, 3)
    bn.running.var = [2, 3, 4]
    with pytest.warns(fastbn.OneValueWarning, match="one value per channel"):
        y = bn(x)
    np.testing.assert_array_equal(y.reshape(-1), bn.beta)
    np.testing.assert_array_equal(bn.backward(dy), np.zeros(shape))
    np.testing.assert_array_equal(bn.dgamma, np.zeros(3))
    np.testing.assert_array_equal(bn.dbeta, dy.reshape(-1))
    np.testing.assert_array_equal(bn.running.mean, x.reshape(-1) / 2)
    np.testing.assert_array_equal(bn.running.var, [2, 3, 4])


@pytest.mark.usefixtures("backend")
def test_ordered_batches():
    """[PyTorch's update_bn: 1.0 for 10.0; fvcore: -16 for 1.01] The mean moves from batch to batch."""
    # Batches of means -3 and 3 and of variance 1 within: 10 in all.
    batches = [np.float32([[m - 1], [m + 1]]) for m in (-3, -3, 3, 3)]
    merged = sum(fastbn.moments(x) for x in batches)
    assert (merged.count, merged.mean[0], merged.var()[0]) == (8, 0, 10)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("scale", [1e20, 5e37, 1e-30])
def test_squares_beyond_float32(rng, scale, layout):
    """[PyTorch] 1e20 silently gives zeros, as its square is inf. eps is as small beside the variance as it can be."""
    shape = (9, 3, 11) if layout == "rows" else (99, 3)
    x = (rng.normal(rng.normal(), 1, shape) * scale).astype(np.float32)
    gamma, beta = parameters(rng, 3)
    eps = min(1e-5, scale * scale * 1e-5)
    y, saved = fastbn.forward(x, gamma, beta, eps=eps)
    expected, xhat, std = expected_forward(x, gamma, beta, eps)
    assert_close(y, expected)
    dy = rng.normal(size=shape).astype(np.float32)
    dx, dgamma, _ = fastbn.backward(dy, saved)
    rest = (0, *range(2, x.ndim))
    terms = dy * xhat
    assert (np.abs(dgamma - terms.sum(rest)) <= 4 * F32 * np.abs(terms).sum(rest)).all()
    slope = gamma.reshape([-1 if a == 1 else 1 for a in range(x.ndim)]) / std
    expected = slope * (dy - dy.mean(rest, np.longdouble, keepdims=True) - xhat * terms.mean(rest, keepdims=True))
    # 1e20 makes dx 1e-20, and 5e37 makes it subnormal: relative to the largest, and the least step there is
    assert (np.abs(dx - expected) <= 2 * F32 * np.abs(expected).max() + np.finfo(np.float32).smallest_subnormal).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("value", [1e10, -3e38, 1 / 3, 16777217.0])
@pytest.mark.parametrize("shape", [(33, 3), (5, 3, 77)])
def test_a_constant_channel_gives_beta(rng, value, shape):
    """[PyTorch] A channel of 1e10 gives 0.9996. Its mean is the value and its variance 0, exactly."""
    x = np.full(shape, value, np.float32)
    gamma, beta = parameters(rng, 3)
    y, saved = fastbn.forward(x, gamma, beta)
    wanted = np.broadcast_to(beta.reshape([-1 if a == 1 else 1 for a in range(x.ndim)]), shape)
    np.testing.assert_array_less(np.abs(y - wanted), F32 * np.maximum(1, np.abs(wanted)))
    np.testing.assert_array_equal(saved.moments.m2, np.zeros(3))
    np.testing.assert_array_equal(saved.moments.mean, np.full(3, value, np.float32))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_offsets(rng, layout):
    """[PyTorch channels last: 4.9 off at 1e5; E[x^2]-E[x]^2] The mean is far larger than the deviation."""
    shape = (20, 5, 50) if layout == "rows" else (1000, 5)
    means = np.array([1e2, 1e3, -1e4, 1e5, 1e6])
    x = (rng.normal(size=shape) + means.reshape([-1 if a == 1 else 1 for a in range(len(shape))])).astype(np.float32)
    gamma, beta = parameters(rng, 5)
    y, saved = fastbn.forward(x, gamma, beta)
    assert_close(y, expected_forward(x, gamma, beta)[0])
    assert_gradients(rng.normal(size=shape).astype(np.float32), x, gamma, beta, saved)


@pytest.mark.usefixtures("backend")
def test_python_threads_at_once(rng):
    """Calls from eight threads share no state: each gets what it gets alone."""
    inputs = [rng.normal(i, 1 + i, (40, 3, 50)).astype(np.float32) for i in range(8)]
    gamma, beta = parameters(rng, 3)

    def both(x):
        y, saved = fastbn.forward(x, gamma, beta)
        return y, *fastbn.backward(x, saved)

    alone = [both(x) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(both, inputs * 3))
    for got, expected in zip(together, alone * 3, strict=True):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(5000, 3), (4, 3, 12000), (70, 300, 4)])
def test_the_number_of_threads_changes_no_bit(rng, shape):
    """[several] Statistics that change with the number of threads. Large enough that more than one is used."""
    numba = pytest.importorskip("numba")
    x, dy = rng.normal(50, 2, (2, *shape)).astype(np.float32)
    gamma, beta = parameters(rng, shape[1])

    def results():
        y, saved = fastbn.forward(x, gamma, beta)
        return y, *saved.moments.exact(), *fastbn.backward(dy, saved)

    before = numba.get_num_threads()
    try:
        by_threads = []
        for count in {1, before, max(1, before // 2)}:
            numba.set_num_threads(count)
            by_threads.append(results())
    finally:
        numba.set_num_threads(before)
    for other in by_threads[1:]:
        for a, b in zip(by_threads[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(500, 3), (25, 3, 20)])
def test_float16_variance_over_65504(rng, shape):
    """[several] Its square is inf in float16, while statistics are float32 here. y rounds once: half of an eps."""
    x = rng.normal(100, 9000, shape).astype(np.float16)
    gamma, beta = parameters(rng, 3)
    y, saved = fastbn.forward(x, gamma, beta)
    assert y.dtype == np.float16
    assert (saved.moments.var() > 65504).all()
    assert_close(y, expected_forward(x, gamma, beta)[0], 0.51)
    assert_gradients(rng.normal(size=shape).astype(np.float16), x, gamma, beta, saved, 0.51)


@pytest.mark.parametrize("shape", [(65_537, 2), (65_537, 1, 2), (2, 65_537), (1, 65_537, 2)])
def test_more_than_65535_rows_or_channels(backend, rng, shape):
    """[cuDNN] A grid's limit. One more than 65,536, so that a count modulo 2^16 is 1."""
    x = rng.normal(3, 2, shape)
    gamma, beta = parameters(rng, shape[1])
    y, saved = fastbn.forward(x, gamma, beta)
    np.testing.assert_allclose(saved.moments.exact()[0], x.mean((0, *range(2, x.ndim))), rtol=1e-12, atol=1e-12)
    assert saved.moments.count == x.size // shape[1]
    # NumPy adds the rows of (N, C) one after another: the reference's variance is off by some sqrt(N) eps
    assert_close(y, expected_forward(x, gamma, beta)[0], {"cpu": 12, "reference": 256}[backend])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("small", "shape"),
    [
        ((1, 3, 5), (4, 3, 5)),  # the batch is one image
        ((4, 1, 5), (4, 3, 5)),  # all channels are one
        ((4, 3, 1), (4, 3, 5)),  # an image of one colour
        ((1, 3), (6, 3)),
        ((1, 1, 1), (4, 3, 5)),
    ],
)
def test_stride_0(rng, small, shape):
    """[several] Broadcast inputs; results are arrays of their own."""
    x, dy = (np.broadcast_to(rng.normal(2, 1, small).astype(np.float32), shape) for _ in range(2))
    gamma, beta = parameters(rng, 3)
    y, saved = fastbn.forward(x, gamma, beta)
    got = fastbn.backward(dy, saved)
    assert_close(y, expected_forward(x, gamma, beta)[0])
    assert y.flags.writeable
    y[...] = 7  # and each of their elements has a place
    assert y.sum() == 7 * y.size
    for a, b in zip(got, fastbn.backward(dy.copy(), fastbn.forward(x.copy(), gamma, beta)[1]), strict=True):
        # the two may sum in another order; dx passes 100 where a channel is constant, by 1 / sqrt(eps)
        np.testing.assert_allclose(a, b, rtol=8 * F32, atol=300 * F32)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(700, 5), (5, 700), (4, 3, 50)])
def test_transposed(rng, shape):
    """[several] (N, C) on memory of (C, N): the values decide, and the results lie like x."""
    x, dy = (rng.normal(3, 2, shape[::-1]).astype(np.float32).T for _ in range(2))
    gamma, beta = parameters(rng, shape[1])
    y, saved = fastbn.forward(x, gamma, beta)
    assert y.strides == x.strides
    assert_close(y, expected_forward(x, gamma, beta)[0])
    assert_gradients(dy, x, gamma, beta, saved)
    # and when dy lies otherwise
    assert_gradients(np.ascontiguousarray(dy), x, gamma, beta, saved)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("channels", [1, 2])
def test_few_channels(rng, channels):
    """[Keras] Special cases of one channel; and a batch as large as the channels are many, so that axes mix up."""
    x, dy = rng.normal(3, 2, (2, channels, channels, 9))
    gamma, beta = parameters(rng, channels)
    y, saved = fastbn.forward(x, gamma, beta)
    assert_close(y, expected_forward(x, gamma, beta)[0], 8)
    assert_gradients(dy, x, gamma, beta, saved, 8)
