"""Weights, groups and y alone, of arrays of other libraries, on doubles of CuPy and PyTorch."""

import functools

import numpy as np
import pytest
from families import assert_near, data

import fastbn
from fastbn import arrays

WEIGHTS = {  # of (6, 3, 5): by position, by sample, of other types; in memory of any order
    "a mask": lambda rng: rng.random((6, 1, 5)) < 0.6,
    "one for each sample": lambda rng: rng.integers(0, 3, 6).astype(np.int32),
    "without the channels": lambda rng: rng.gamma(1.0, 1.0, (6, 5)) * (rng.random((6, 5)) < 0.8),
    "half precision, transposed": lambda rng: rng.integers(0, 5, (5, 1, 6)).astype(np.float16).T,
    "the same for all samples": lambda rng: rng.gamma(1.0, 1.0, (1, 1, 5)).astype(np.float32),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("masked", ["normalize", "zero", "keep"])
@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_weights(make, masked, frozen, library, rng):
    """Read where they are and converted there; nothing waits for the device before moments are asked for."""
    x, dy, gamma, beta, mean, var = data(rng, (6, 3, 5), (1,))
    w = make(rng)
    last = np.ascontiguousarray(x.transpose(0, 2, 1)).transpose(0, 2, 1)
    inner = np.ascontiguousarray(x.transpose(2, 0, 1)).transpose(1, 2, 0)  # copied for groups: samples aren't outermost
    for laid in (x, last, inner):
        put = functools.partial(library.put, device=1)
        stats = (put(mean), put(var)) if frozen else None
        library.state.transfers.clear()
        more = {"weights": put(w), "masked": masked, "groups": [1, 0, 5]}
        if frozen:
            del more["groups"]
        y, saved = fastbn.forward(put(laid), put(gamma), put(beta), frozen=stats, **more)
        given = w.reshape(6, 1, 1) if w.ndim == 1 else w.reshape(6, 1, 5) if w.ndim == 2 else w
        exact, kept = fastbn.reference.forward(
            x, gamma, beta, frozen=(mean, var) if frozen else None, **{**more, "weights": given}
        )
        got = fastbn.backward(put(dy), saved)
        assert library.state.transfers == []
        for one, right in zip((y, *got), (exact, *fastbn.reference.backward(dy, kept)), strict=True):
            assert (type(one), one.on_device) == (library.type, 1)
            assert_near(one.on_host, right, x.dtype, size=10)  # dgamma and dbeta are sums of 30
        if frozen:
            assert saved.moments is None
            continue
        for found, right in zip(saved.moments, kept.moments, strict=True):
            assert found.count == right.count
            assert type(found.mean) is library.type
            assert_near(found.mean.on_host, right.mean, x.dtype)
            assert_near(found.m2.on_host, right.m2, x.dtype)
        assert library.state.transfers == ["from"]  # the sums of weights
        found = fastbn.moments(put(laid), weights=put(w))
        used = np.broadcast_to(given.astype(np.float32), (6, 1, 5))
        assert found.count == float(used.sum(dtype=np.float64))


def test_weights_may_change_after_the_call(library, rng):
    """As in main memory, backward has those that forward had."""
    x, dy, *_ = data(rng, (6, 3, 5), (1,))
    w = library.put(np.ones((6, 1, 5), np.float32))
    _, saved = fastbn.forward(library.put(x), weights=w)
    w.on_host[...] = 0
    exact = fastbn.reference.backward(dy, fastbn.reference.forward(x)[1])
    for got, right in zip(fastbn.backward(library.put(dy), saved), exact, strict=True):
        assert_near(got.on_host, right, x.dtype, size=10)


def test_weights_of_an_empty_array(library):
    x = library.put(np.empty((0, 3, 5), np.float32))
    _, saved = fastbn.forward(x, weights=library.put(np.empty((0, 1, 5), np.float32)))
    assert saved.moments.count == 0


WRONG_WEIGHTS = {
    "in main memory": (lambda _: np.ones(6), TypeError, "weights is a float64 array .* in main memory; .*Pass "),
    "elsewhere": (lambda put: put(np.ones(6), 1), ValueError, "weights is a float64 .* on device 1; expected one on d"),
    "complex": (lambda put: put(np.ones(6, np.complex64)), TypeError, "weights is a complex64 .*expected bools, or"),
    "another shape": (lambda put: put(np.ones((6, 1, 4))), ValueError, r"weights has shape \(6, 1, 4\); .*\(6, 1, 5\)"),
    "by channel": (lambda put: put(np.ones((6, 3, 5))), ValueError, r"weights has shape \(6, 3, 5\)"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "match"), WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_weights_that_are_refused(make, error, match, library, rng):
    x, *_ = data(rng, (6, 3, 5), (1,))
    with pytest.raises(error, match=f"fastbn.forward: {match}"):
        fastbn.forward(library.put(x), weights=make(library.put))
    assert library.state.calls == library.state.transfers == []


GROUPS = {"equal": 4, "of sizes": [3, 0, 5], "by id": np.array([2, 0, 0, 3, 1, 1, 2, 0])}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_groups(groups, dtype, library, rng):
    """dgamma and dbeta are summed over groups in arrays that are made where x is."""
    x, dy, gamma, beta, _, _ = data(rng, (8, 3, 5), (1,), dtype)
    want, kept = fastbn.reference.forward(x, gamma, beta, groups=groups)
    y, saved = fastbn.forward(library.put(x, 1), library.put(gamma, 1), library.put(beta, 1), groups=groups)
    got = y, *fastbn.backward(library.put(dy, 1), saved)
    for one, right in zip(got, (want, *fastbn.reference.backward(dy, kept)), strict=True):
        assert (type(one), one.on_device, one.on_host.dtype) == (library.type, 1, dtype)
        np.testing.assert_allclose(one.on_host, right, rtol=40 * np.finfo(dtype).eps, atol=400 * np.finfo(dtype).eps)
    for found, right in zip(saved.moments, kept.moments, strict=True):
        assert (found.count, found.mean.on_host.dtype) == (right.count, dtype)
        np.testing.assert_allclose(found.mean.on_host, right.mean, rtol=2 * np.finfo(dtype).eps)


def test_x_is_had_back_from_y(library, rng, monkeypatch):
    """It waits for gamma and beta, in forward alone; channels with a small gamma are kept apart."""
    x, dy, gamma, beta, mean, var = data(rng, (8, 3, 5, 2), (1, 3))
    w = rng.random((8, 1, 5, 1)) < 0.7
    for activation, lost, frozen, more in (
        (None, [], False, {}),
        (("leaky_relu", 0.2), [1, 4], False, {"groups": GROUPS["by id"]}),
        (("elu", 0.7), [5], True, {}),
        ("elu", [0, 2, 3], False, {"weights": w, "masked": "zero", "groups": [3, 5]}),
        (None, range(6), False, {}),
    ):
        gamma.reshape(-1)[...] = rng.choice([-1, 1], 6) * rng.uniform(0.5, 2, 6)
        gamma.reshape(-1)[list(lost)] = 1e-4
        asked = {"axis": (1, 3), "activation": activation, **more}
        stats = (mean, var) if frozen else None
        want, kept = fastbn.reference.forward(x, gamma, beta, frozen=stats, **asked)
        there = {k: library.put(v, 1) if k == "weights" else v for k, v in asked.items()}
        place = library.put(x.copy(), 1)
        library.state.transfers.clear()
        given = tuple(library.put(a, 1) for a in stats) if frozen else None
        numbers = library.put(gamma, 1), library.put(beta, 1)
        y, saved = fastbn.forward(place, *numbers, frozen=given, **there, save="y", out=place)
        assert y is place
        assert library.state.transfers.count("from") == 2
        into = library.put(dy.copy(), 1)
        library.state.transfers.clear()
        got = y.on_host.copy(), *fastbn.backward(into, saved, out=into)
        assert got[1] is into
        assert "from" not in library.state.transfers
        for one, right in zip(got, (want, *fastbn.reference.backward(dy, kept)), strict=True):
            np.testing.assert_allclose(getattr(one, "on_host", one), right, rtol=1e-5, atol=2e-5)
    monkeypatch.setattr(arrays.CUPY, "host", None)  # as where a copy to main memory is not allowed
    monkeypatch.setattr(arrays.TORCH, "host", None)
    with pytest.raises(RuntimeError, match=r"save='y' reads gamma and beta in main memory.*pass save='x'"):
        fastbn.forward(library.put(x), library.put(gamma), axis=(1, 3), save="y")
