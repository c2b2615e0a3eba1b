"""Batches spread over ranks, of arrays of other libraries, on doubles of CuPy and PyTorch."""

import threading
from concurrent.futures import ThreadPoolExecutor

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
    for got, exact in ((y, want), (found[0], wanted[0]), (found[3], wanted[3])):
        np.testing.assert_allclose(got.on_host, exact[:6], atol=near * max(1, np.nanmax(np.abs(exact))))
    sums = 40 * np.finfo(found[1].on_host.dtype).eps
    for got, sum_ in zip(found[1:3], wanted[1:3], strict=True):
        np.testing.assert_allclose(got.on_host, sum_, rtol=sums, atol=sums)
    alone = fastbn.backward(put(dy), saved, need=(False, False, False, True))
    assert alone[:3] == (None, None, None)
    np.testing.assert_array_equal(alone[3].on_host, found[3].on_host)


@pytest.mark.parametrize("size", [1e-5, 1e8], ids=str)
def test_weights_of_any_size_across_ranks(size, library, rng):
    """Their ratios count alone: what x gives dx was infinite in half precision, or had few digits."""
    x, dy, gamma, beta, _, _ = data(rng, (16, 3, 64), (1,), np.float16)
    w = (size * rng.uniform(0, 1, (16, 1, 64))).astype(np.float32)
    w[3] = 0
    both = [np.concatenate([a, a]) for a in (x, w, dy)]
    _, whole = fastbn.reference.forward(both[0], gamma, beta, weights=both[1])
    want = fastbn.reference.backward(both[2], whole)[0][:16]
    put = library.put
    _, saved = fastbn.forward(put(x), put(gamma), put(beta), weights=put(w), comm=Twice())
    found = fastbn.backward(put(dy), saved)[0].on_host
    np.testing.assert_allclose(found, want, atol=4 * np.finfo(np.float16).eps * np.abs(want).max())


class Meeting:
    """Two ranks, each in a thread of its own."""

    def __init__(self):
        self.frames, self.barrier = [None, None], threading.Barrier(2, timeout=60)

    def run(self, function):
        with ThreadPoolExecutor(2) as pool:
            return [done.result() for done in [pool.submit(function, i, Rank(self, i)) for i in (0, 1)]]


class Rank:
    def __init__(self, meeting, number):
        self.meeting, self.number = meeting, number

    def Get_rank(self):
        return self.number

    def allgather(self, frame):
        self.meeting.frames[self.number] = np.array(frame)
        self.meeting.barrier.wait()
        found = list(self.meeting.frames)
        self.meeting.barrier.wait()
        return found


@pytest.mark.parametrize("place", ["new", "dy", "x", "residual"])
@pytest.mark.parametrize("masked", [None, "normalize", "keep"])
@pytest.mark.parametrize("second", ["another", "without weight", "empty"])
def test_two_ranks_that_differ(second, masked, place, library, rng):
    """One may have no weight, or nothing at all; dx goes where it is told, over dy, x or the residual too."""
    x, dy = ([a, b[: 0 if second == "empty" else 4]] for a, b in (rng.normal(2, 2, (2, 2, 6, 3, 5)).astype(np.float32)))
    residual = [rng.normal(size=a.shape).astype(np.float32) for a in x]
    gamma, beta = rng.normal(1, 1, (2, 3)).astype(np.float32)
    w = [(rng.gamma(1, 1, (len(a), 1, 5)) * (rng.random((len(a), 1, 5)) < 0.6)).astype(np.float32) for a in x]
    if second == "without weight":
        w[1][...] = 0
    if masked == "keep":
        for a, b in zip(x, w, strict=True):
            a[np.broadcast_to(b == 0, a.shape)] = np.nan
    options = {"masked": masked or "normalize", "activation": "silu"}
    whole = {"weights": None if masked is None else np.concatenate(w), "residual": np.concatenate(residual)}
    y, kept = fastbn.reference.forward(np.concatenate(x), gamma, beta, **whole, **options)
    wanted = y, *fastbn.reference.backward(np.concatenate(dy), kept)

    def run(i, comm):
        given = {"x": x[i], "dy": dy[i], "residual": residual[i], "new": np.empty_like(x[i])}
        there = {name: library.put(a.copy()) for name, a in given.items()}
        weights = None if masked is None else library.put(w[i])
        y, saved = fastbn.forward(
            there["x"], library.put(gamma), library.put(beta), weights=weights, residual=there["residual"], comm=comm,
            **options
        )  # fmt: skip
        found = fastbn.backward(there["dy"], saved, out=(there[place], None, None, None), reduce_params=True)
        assert found[0] is there[place]
        return [a.on_host.copy() for a in (y, *found)]

    for one, other, want in zip(*Meeting().run(run), wanted, strict=True):
        got = np.concatenate([one, other]) if one.ndim == 3 else one
        np.testing.assert_allclose(got, want, rtol=4e-6, atol=4e-6)
        if one.ndim == 1:
            np.testing.assert_array_equal(one, other)


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
