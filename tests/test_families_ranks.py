"""Batches spread over ranks, of arrays of other libraries, on doubles of CuPy and PyTorch."""

import numpy as np
import pytest
from families import Twice, data

import fastbn


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_across_ranks(library, dtype):
    """Two ranks with the same data: statistics and dx are those of both together, twice each value."""
    rng = np.random.default_rng(4)
    x, dy, gamma, beta, _, _ = data(rng, (4, 5, 6), (1,), dtype)
    want, whole = fastbn.reference.forward(np.concatenate([x, x]), gamma, beta)
    dx, dgamma, dbeta = fastbn.reference.backward(np.concatenate([dy, dy]), whole)
    put = library.put
    y, saved = fastbn.forward(put(x), put(gamma), put(beta), comm=Twice())
    assert saved.moments.count == 48
    got = fastbn.backward(put(dy), saved, reduce_params=True)
    assert isinstance(got[0], library.type)
    near = 40 * np.finfo(dtype).eps
    np.testing.assert_allclose(y.on_host, want[:4], atol=near)
    np.testing.assert_allclose(got[0].on_host, dx[:4], atol=near)
    np.testing.assert_allclose(got[1].on_host, dgamma, atol=10 * near)
    np.testing.assert_allclose(got[2].on_host, dbeta, atol=10 * near)


def test_groups_across_ranks_are_refused(library):
    x = data(np.random.default_rng(4), (4, 5, 6), (1,), np.float32)[0]
    with pytest.raises(ValueError, match=r"fastbn\.forward: groups and comm are both given; expected one"):
        fastbn.forward(library.put(x), groups=2, comm=Twice())


@pytest.mark.parametrize("masked", [None, "normalize", "zero", "keep"])
@pytest.mark.parametrize("activation", [None, "gelu", "leaky_relu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_weights_activation_and_residual_across_ranks(dtype, activation, masked, library, rng):
    """As on one rank with both halves: NaN where what is masked doesn't count."""
    x, dy, gamma, beta, _, _ = data(rng, (6, 3, 5), (1,), dtype)
    residual = rng.normal(size=x.shape).astype(dtype)
    w = None
    if masked is not None:
        w = (rng.gamma(1.0, 1.0, (6, 1, 5)) * (rng.random((6, 1, 5)) < 0.7)).astype(np.float32)
        if masked != "normalize":
            x[np.broadcast_to(w == 0, x.shape)] = np.nan
    options = {"activation": activation, "masked": masked or "normalize"}
    both = [None if a is None else np.concatenate([a, a]) for a in (x, w, residual)]
    want, whole = fastbn.reference.forward(both[0], gamma, beta, weights=both[1], residual=both[2], **options)
    wanted = fastbn.reference.backward(np.concatenate([dy, dy]), whole)
    put = library.put
    there = None if w is None else put(w)
    y, saved = fastbn.forward(
        put(x), put(gamma), put(beta), weights=there, residual=put(residual), comm=Twice(), **options
    )
    assert saved.moments.count == pytest.approx(60 if w is None else 2 * w.sum(dtype=float), rel=1e-12)
    found = fastbn.backward(put(dy), saved, reduce_params=True)
    near = 16 * np.finfo(dtype).eps
    np.testing.assert_allclose(y.on_host, want[:6], atol=near)
    np.testing.assert_allclose(found[0].on_host, wanted[0][:6], atol=near)
    np.testing.assert_allclose(found[3].on_host, wanted[3][:6], atol=near)
    sums = 40 * np.finfo(found[1].on_host.dtype).eps
    for got, sum_ in zip(found[1:3], wanted[1:3], strict=True):
        np.testing.assert_allclose(got.on_host, sum_, rtol=sums, atol=sums)
    alone = fastbn.backward(put(dy), saved, need=(False, False, False, True))
    assert alone[:3] == (None, None, None)
    np.testing.assert_array_equal(alone[3].on_host, found[3].on_host)


def test_all_weights_0_across_ranks(library, rng):
    """No statistics: what is normalized is beta, and nothing depends on x."""
    x, dy, gamma, beta, _, _ = data(rng, (6, 3, 5), (1,))
    y, saved = fastbn.forward(
        library.put(x), library.put(gamma), library.put(beta), weights=library.put(np.zeros(6, np.float32)),
        comm=Twice(),
    )  # fmt: skip
    np.testing.assert_array_equal(y.on_host, np.broadcast_to(beta[:, None], x.shape))
    dx, dgamma, dbeta = fastbn.backward(library.put(dy), saved)
    _, kept = fastbn.forward(x, gamma, beta, weights=np.zeros(6, np.float32), comm=Twice())
    for got, want in zip((dx, dgamma, dbeta), fastbn.backward(dy, kept), strict=True):
        np.testing.assert_allclose(got.on_host, want, rtol=1e-5, atol=1e-5)
