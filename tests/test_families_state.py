"""Moments, running statistics and layers where arrays of other libraries are, on doubles of CuPy and PyTorch."""

import numpy as np
import pytest
from cases import eps
from families import assert_near, data

import fastbn


def test_moments_merge_where_they_are(library, rng):
    x = rng.normal(1e4, 1, (40, 3)).astype(np.float32)
    halves = [fastbn.moments(library.put(part, 1)) for part in (x[:25], x[25:])]
    both, exact = sum(halves), fastbn.reference.moments(x)
    assert type(both.mean) is library.type
    assert both.mean.on_device == 1
    np.testing.assert_allclose(both.mean.on_host, exact.mean, rtol=eps(np.dtype(np.float32)))  # one rounding
    np.testing.assert_allclose(both.var(1).on_host, exact.var(1), rtol=eps(np.dtype(np.float32)))
    assert library.state.transfers == []
    assert repr(both) == repr(fastbn.moments(x[:25]) + fastbn.moments(x[25:]))
    assert np.isnan(fastbn.moments(library.put(x[:1])).var(1).on_host).all()
    with pytest.raises(
        TypeError, match=f"other holds NumPy arrays, and self {library.kind}s on device 1; expected both"
    ):
        halves[0] + fastbn.moments(x)
    with pytest.raises(
        TypeError, match=f"other holds {library.kind}s on device 0, and self {library.kind}s on device 1"
    ):
        halves[0] + fastbn.moments(library.put(x))
    with pytest.raises(TypeError, match=f"other holds NumPy arrays, and self {library.kind}s on device 0"):
        fastbn.moments(library.put(x)) + fastbn.moments(x)
    made = fastbn.Moments(40, *(library.put(a) for a in (exact.mean, exact.m2)))
    np.testing.assert_allclose(made.mean.on_host, both.mean.on_host, rtol=eps(np.dtype(np.float32)))
    with pytest.raises(TypeError, match=r"Moments: m2 is a float64 array .* in main memory; expected a"):
        fastbn.Moments(40, library.put(exact.mean), exact.m2)


def test_running_stats_live_with_the_first_batch(library, rng):
    batches = [rng.normal(3, 2, (8, 3, 5)).astype(np.float32) for _ in range(3)]
    for like in (None, library.put(batches[0], 1)):
        running, wanted = fastbn.RunningStats(3, like=like), fastbn.RunningStats(3)
        for x in batches:
            running.update(fastbn.moments(library.put(x, 1)))
            wanted.update(fastbn.moments(x))
        for got, expected in ((running.mean, wanted.mean), (running.var, wanted.var)):
            assert (type(got), got.on_device, got.on_host.dtype) == (library.type, 1, np.float32)
            np.testing.assert_allclose(got.on_host, expected, rtol=3e-7)  # 2 eps: other moments, one rounding
        y = fastbn.forward(library.put(batches[0], 1), frozen=running)[0]
        assert_near(y.on_host, fastbn.reference.forward(batches[0], frozen=wanted)[0], y.on_host.dtype)
        with pytest.raises(
            TypeError, match=rf"update: moments has a float64 array of shape \(3,\); expected .*{library.kind}"
        ):
            running.update(fastbn.moments(batches[0]))
        with pytest.raises(TypeError, match=r"RunningStats: mean is a float64 array .* in main memory; expected a"):
            running.mean = np.zeros(3)
    assert library.state.transfers.count("from") == 0


def test_running_stats_of_groups_where_they_are(library, rng):
    x = rng.normal(3, 2, (8, 3, 5)).astype(np.float32)
    running, wanted = fastbn.RunningStats(3), fastbn.RunningStats(3)
    running.update([fastbn.moments(library.put(part, 1)) for part in (x[:2], x[2:5], x[5:])])
    wanted.update(fastbn.moments(x))
    for got, expected in ((running.mean, wanted.mean), (running.var, wanted.var)):
        assert (type(got), got.on_device) == (library.type, 1)
        np.testing.assert_allclose(got.on_host, expected, rtol=3e-7)  # as above
    assert library.state.transfers.count("from") == 0


def test_moments_subtract_merge_and_load_where_they_are(library, rng):
    x = rng.normal(1e4, 1, (40, 3)).astype(np.float32)
    parts = [x[:25], x[25:]]
    whole = fastbn.Moments.merge_all(fastbn.moments(library.put(part, 1)) for part in parts)
    back = whole - fastbn.moments(library.put(parts[1], 1))
    assert type(back.mean) is library.type
    assert library.state.transfers == []
    np.testing.assert_allclose(back.exact()[1].on_host, fastbn.moments(parts[0]).exact()[1], rtol=1e-12)
    assert not (whole - whole).m2.on_host.any()
    more = fastbn.Moments(1, *(library.put(np.array(a), 1) for a in ([1e4] * 3, [0, 1e9, 0])))
    assert (whole - more).m2.on_host[1] == 0  # nothing is waited for
    state = whole.to_dict()
    assert {type(value) for value in state.values()} == {np.ndarray}
    loaded = fastbn.Moments.from_dict(state, like=library.put(x, 1))
    assert type(loaded.mean) is library.type
    for got, kept in zip(loaded.exact(), whole.exact(), strict=True):
        assert got.on_device == 1
        np.testing.assert_array_equal(got.on_host, kept.on_host)


@pytest.mark.parametrize(
    "arguments", [{}, {"momentum": None}, {"debias": True}, {"momentum": 0.0, "debias": True}], ids=str
)
def test_the_guard_skips_without_waiting(arguments, library, rng):
    running = fastbn.RunningStats(3, on_nonfinite="skip", **arguments)
    twin = fastbn.RunningStats(3, on_nonfinite="skip", **arguments)
    for k in range(5):
        x = rng.normal(3, 2, (8, 3, 5)).astype(np.float32)
        if k in (0, 2):
            x[0, k, 0] = (np.nan, np.inf)[k == 2]
        running.update(fastbn.moments(library.put(x, 1)))
        twin.update(fastbn.moments(x))
    assert "from" not in library.state.transfers
    assert type(running.mean) is library.type
    np.testing.assert_allclose(running.mean.on_host, twin.mean, rtol=3e-7)
    np.testing.assert_allclose(running.var.on_host, twin.var, rtol=3e-7)
    assert running.skipped.tolist() == [1, 0, 1]
    assert repr(running) == repr(twin)
    strict = fastbn.RunningStats(3, on_nonfinite="raise")
    with pytest.raises(ValueError, match=r"update: moments is NaN or Inf in 3 of 3 channels"):
        strict.update(fastbn.moments(library.put(np.full((4, 3), np.nan, np.float32), 1)))
    running.replace(fastbn.moments(library.put(x, 1)))
    np.testing.assert_allclose(running.mean.on_host, x.mean((0, 2)), rtol=1e-6)


def test_running_stats_stay_where_something_was_set(library, rng):
    moments = fastbn.moments(library.put(rng.normal(3, 2, (8, 3)).astype(np.float32)))
    started, assigned, asked = (fastbn.RunningStats(3) for _ in range(3))
    started.update(fastbn.moments(np.ones((4, 3))))
    assigned.var = [1, 2, 3]
    asked = fastbn.RunningStats(3, like=np.zeros(3))
    for running in (started, assigned, asked):
        before = running.mean.copy(), running.var.copy(), running.batches
        with pytest.raises(TypeError, match=rf"update: moments has a float64 {library.kind} .*with like=x"):
            running.update(moments)
        np.testing.assert_array_equal((running.mean, running.var), before[:2])
        assert running.batches == before[2]


def test_a_layer_on_a_gpu(library, rng):
    """As one in main memory: y, dx, gradients, running statistics, evaluation, state."""
    x, dy, gamma, beta, *_ = data(rng, (8, 3, 5), (1,))
    layer, twin = fastbn.BatchNorm(3, like=library.put(x, 1), accumulate=True), fastbn.BatchNorm(3, accumulate=True)
    layer.gamma[...], layer.beta[...] = library.put(gamma, 1), library.put(beta, 1)
    twin.gamma[...], twin.beta[...] = gamma, beta
    library.state.transfers.clear()
    for _ in range(2):
        y, dx = layer(library.put(x, 1)), layer.backward(library.put(dy, 1))
        wanted = twin(x), twin.backward(dy)
    layer.eval()
    z = layer(library.put(x, 1))
    assert library.state.transfers == []
    results = (y, dx, z, layer.dgamma, layer.dbeta)
    for got, expected in zip(results, (*wanted, twin.eval()(x), twin.dgamma, twin.dbeta), strict=True):
        assert (type(got), got.on_device) == (library.type, 1)
        np.testing.assert_allclose(got.on_host, expected, rtol=1e-6, atol=2e-5)  # sums of 40 values of about 10
    state = layer.state_dict()
    assert {type(value) for value in state.values()} == {np.ndarray}
    new = fastbn.BatchNorm(3, like=library.put(x, 1))
    new.load_state_dict(state)
    for name, value in new.state_dict().items():
        np.testing.assert_array_equal(value, state[name])
    assert type(new.gamma) is type(new.running.mean) is library.type
    layer.zero_grad()
    np.testing.assert_array_equal(layer.dgamma.on_host, np.zeros(3))
    with pytest.raises(
        TypeError, match=r"forward: gamma is a float32 array .* in main memory; .* BatchNorm with like=x"
    ):
        fastbn.BatchNorm(3)(library.put(x))
    with pytest.raises(
        TypeError, match=r"BatchNorm: like is a list .*; expected a NumPy array, a CuPy array or a PyTorch"
    ):
        fastbn.BatchNorm(3, like=[1, 2])
