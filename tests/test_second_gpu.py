"""jvp and backward_backward of arrays on a GPU, on doubles of CuPy, PyTorch and numba.cuda: results, places, errors."""

from __future__ import annotations

import sys
import types

import ml_dtypes
import numpy as np
import pytest
from cases import BFLOAT16
from device_doubles import Call, State, in_their_places, numba_cuda_of
from families import Library, assert_near, data
from fastbn.kernels import reference

import fastbn
from fastbn import dispatch


def second_of(state, cupy):
    """`fastbn.kernels.numba_cuda.second`: it holds its callers to the contract, and runs the reference."""

    def second(u, g, x, r, z, table, tangents, frozen, ggamma, more=None):
        large, small = (u, g, x, r, z), (table, *tangents, ggamma)
        like = next(a for a in large if a is not None)
        arrays = [a for a in (*large, *small) if a is not None]
        if more is not None and more.weights is not None:
            arrays.append(more.weights)
            more = more._replace(weights=more.weights.on_host, mass=None)
        assert all(type(a) is cupy.ndarray and a.on_device == state.device for a in arrays)
        assert all(a is None or (a.shape == like.shape and a.dtype == like.dtype) for a in large)
        assert len(like.shape) == 3
        assert min(like.shape) > 0
        columns, channels = table.shape[1], like.shape[1]
        assert all(t is None or (t.shape == (channels,) and t.dtype.char in "fd") for t in tangents)
        numbers = np.float64 if like.dtype == np.float64 else np.float32
        assert ggamma is None or (ggamma.shape == (columns,) and ggamma.dtype == numbers)
        bits = np.dtype(ml_dtypes.bfloat16) if like.dtype == np.int16 else like.dtype
        hosts = [None if a is None else a.on_host.view(bits) for a in large]
        p, q = (np.zeros(channels) if t is None else t.on_host for t in tangents)
        found = reference.second(*hosts, table.on_host, np.stack([p, q]), frozen, ggamma is not None, more)
        if ggamma is not None:
            ggamma.on_host[...] = found.ravel()
        state.calls.append(Call("second", state.device, state.stream, like.shape))

    return second


@pytest.fixture
def doubles(monkeypatch):
    state = State()
    for found in in_their_places(monkeypatch, state):
        yield state, *found


@pytest.fixture(params=["cupy", "torch"])
def library(request, doubles, monkeypatch):
    state, cupy, torch = doubles
    found, load = Library(request.param, state, cupy, torch), dispatch._load
    found.seen = []
    double = numba_cuda_of(state, cupy, found.seen)
    second = types.SimpleNamespace(second=second_of(state, cupy))
    kernels = types.SimpleNamespace(FEATURES={"groups", "weights"})
    monkeypatch.setitem(sys.modules, "numba.cuda", double)
    monkeypatch.setitem(sys.modules, "fastbn.kernels.numba_cuda.second", second)
    monkeypatch.setattr(dispatch, "_load", lambda name: kernels if name == "numba_cuda" else load(name))
    return found


FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
W = np.float32([[1, 0, 2, 0.5, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [2, 0, 1, 0, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
ASKED = {
    "plain": {},
    "frozen": {"frozen": True},
    "groups": {"groups": [2, 4]},
    "all": {"groups": np.array([2, 0, 0, 2, 3, 0]), "weights": W, "masked": "keep"},
}


def arguments(asked, library, rng, dtype=FLOAT32):
    """saved and the reference's; x_t, gamma_t, beta_t and dy, as the library's and NumPy's."""
    x, dy, gamma, p, q, var = data(rng, (6, 3, 5), (1,), dtype)
    u = rng.normal(size=x.shape).astype(dtype)
    here, there = dict(asked), dict(asked)
    if "frozen" in asked:
        here["frozen"], there["frozen"] = (q, var), (library.put(q, 1), library.put(var, 1))
    if "weights" in asked:
        there["weights"] = library.put(W, 1)
    saved = fastbn.forward(library.put(x, 1), library.put(gamma, 1), **there)[1]
    host = u, p, q, dy
    library.state.transfers.clear()
    library.state.allocated.clear()
    library.state.calls.clear()
    library.seen.clear()
    return saved, fastbn.reference.forward(x, gamma, **here)[1], [library.put(a, 1) for a in host], host


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64, BFLOAT16], ids=str)
def test_results(dtype, asked, library, rng):
    """Of the caller's kind, beside x, with the reference's numbers; on the library's own stream; nothing is copied."""
    saved, kept, (u, p, q, dy), (host_u, host_p, host_q, host_dy) = arguments(asked, library, rng, dtype)
    with library.state.current(stream=7):
        y_t = fastbn.jvp(u, saved, p, q)
        found = fastbn.backward_backward(u, p, q, dy, saved)
    exact = fastbn.reference.backward_backward(host_u, host_p, host_q, host_dy, kept)
    numbers = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    size = 100  # of what these are sums of
    wanted = fastbn.reference.jvp(host_u, kept, host_p, host_q)
    for got, value, kind in zip((y_t, *found), (wanted, *exact), (dtype, dtype, numbers, dtype), strict=True):
        assert (type(got), got.on_device, got.on_host.dtype) == (library.type, 1, kind)
        assert_near(got.on_host, value, kind, size)
    assert [call[:2] for call in library.state.calls] == [("second", 1)] * 2
    streams = {(stream, sync) for _, stream, sync in library.seen}
    assert streams == {(7 if library.name == "cupy" else 1001, False)}
    assert library.state.transfers == []
    sets = {"groups": [((6,), 1)], "all": [((12,), 1)]}.get(next(k for k, v in ASKED.items() if v is asked), [])
    assert library.state.allocated == [((6, 3, 5), 1)] * 3 + [((3,), 1)] + sets


def test_results_go_where_they_are_told(library, rng):
    saved, _, (u, p, q, dy), _ = arguments({"groups": 3}, library, rng)
    wanted = fastbn.backward_backward(u, p, q, dy, saved)
    place = library.put(np.zeros(3, np.float32), 1)
    library.state.allocated.clear()
    found = fastbn.backward_backward(u, p, q, dy, saved, out=(u, place, dy))
    assert library.state.allocated == [((9,), 1)]
    for got, into, value in zip(found, (u, place, dy), wanted, strict=True):
        assert got is into
        assert got.on_host.tobytes() == value.on_host.tobytes()
    assert fastbn.backward_backward(u, None, None, dy, saved, need=(False, False, False)) == (None, None, None)
    out = library.put(np.zeros((6, 3, 5), np.float32), 1)
    assert fastbn.jvp(None, saved, None, q, out=out) is out
    np.testing.assert_allclose(out.on_host, np.broadcast_to(q.on_host[:, None], (6, 3, 5)))


def test_a_result_that_no_view_fits(library, rng):
    """It is written by way of another array."""
    x, u, gamma, p, *_ = (library.put(a, 1) for a in data(rng, (2, 3, 4, 5), (1,)))
    saved = fastbn.forward(x, gamma)[1]
    cropped = library.put(np.zeros((2, 3, 6, 7), np.float32)[:, :, 1:-1, 1:-1], 1)
    assert fastbn.jvp(u, saved, p, out=cropped) is cropped
    np.testing.assert_array_equal(cropped.on_host, fastbn.jvp(u, saved, p).on_host)


def test_frozen_without_x(library, rng):
    """Which `out` overwrote: the tangent of y is that of x, scaled."""
    x, u, gamma, _, mean, var = (library.put(a, 1) for a in data(rng, (6, 3, 5), (1,)))
    wanted = fastbn.jvp(u, fastbn.forward(x, gamma, frozen=(mean, var))[1])
    saved = fastbn.forward(x, gamma, frozen=(mean, var), out=x)[1]
    assert fastbn.jvp(u, saved).on_host.tobytes() == wanted.on_host.tobytes()


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 5)])
def test_empty_arrays_reach_no_kernel(shape, library):
    x = library.put(np.empty(shape, np.float32), 1)
    saved = fastbn.forward(x)[1]
    gx, ggamma, gdy = fastbn.backward_backward(x, None, None, x, saved)
    assert fastbn.jvp(x, saved).shape == gx.shape == gdy.shape == shape
    assert (type(ggamma), ggamma.on_host.tolist()) == (library.type, [0.0] * shape[1])
    assert library.state.calls == []


WRONG = {
    "x_t in main memory": (
        lambda a: fastbn.jvp(a.u.on_host, a.saved),
        TypeError, "jvp: x_t is a float32 array .* in main memory; expected a {kind} on device 1, like",
    ),
    "x_t on another device": (
        lambda a: fastbn.jvp(a.put(a.u.on_host, 0), a.saved),
        ValueError, "jvp: x_t is a .* on device 0; expected one on device 1",
    ),
    "dy of another type": (
        lambda a: fastbn.backward_backward(None, None, None, a.put(np.zeros((6, 3, 5)), 1), a.saved),
        ValueError, r"backward_backward: dy is a float64 {kind} .*; expected .*float32 of shape .*Convert it",
    ),
    "gamma_t in main memory": (
        lambda a: fastbn.jvp(None, a.saved, a.p.on_host),
        TypeError, "jvp: gamma_t is a float32 array .* in main memory; expected a {kind} on device 1",
    ),
    "ddbeta a list": (
        lambda a: fastbn.backward_backward(None, None, [1, 2, 3], a.dy, a.saved),
        TypeError, "backward_backward: ddbeta is a list .* expected a {kind} on device 1",
    ),
    "gamma_t of another shape": (
        lambda a: fastbn.jvp(None, a.saved, a.put(np.ones(2, np.float32), 1)),
        ValueError, r"jvp: gamma_t has shape \(2,\); expected \(3,\)",
    ),
    "out in main memory": (
        lambda a: fastbn.jvp(a.u, a.saved, out=a.u.on_host),
        TypeError, "jvp: out is a float32 array .* in main memory",
    ),
    "out over x": (
        lambda a: fastbn.jvp(a.u, a.saved, out=a.saved._x.value),
        ValueError, "jvp: out overlaps x in memory",
    ),
    "gx over x": (
        lambda a: fastbn.backward_backward(a.u, None, None, a.dy, a.saved, out=(a.saved._x.value, None, None)),
        ValueError, r"backward_backward: out \(gx\) overlaps x in memory",
    ),
    "a result over another": (
        lambda a: fastbn.backward_backward(a.u, None, None, a.dy, a.saved, out=(a.u, None, a.u)),
        ValueError, r"backward_backward: out \(gdy\) overlaps gx in memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), WRONG.values(), ids=WRONG)
def test_what_is_refused(call, error, match, library, rng):
    saved, _, (u, p, q, dy), _ = arguments({}, library, rng)
    with pytest.raises(error, match=r"fastbn\." + match.format(kind=library.kind)):
        call(types.SimpleNamespace(saved=saved, u=u, p=p, q=q, dy=dy, put=library.put))
    assert library.state.calls == library.state.transfers == []


def test_backends_without_it_are_named(library, rng, monkeypatch):
    saved, _, (u, _, _, dy), _ = arguments({}, library, rng)
    monkeypatch.setattr(dispatch, "_backend", "cupy")
    text = rf"fastbn.jvp: x is a float32 {library.kind} .*the backend 'cupy' has no second order; expected 'numba-cuda'"
    with pytest.raises(TypeError, match=text):
        fastbn.jvp(u, saved)
    monkeypatch.setattr(dispatch, "_backend", "cpu")
    with pytest.raises(TypeError, match=r"fastbn.jvp: x is a .*the backend 'cpu' is for NumPy arrays"):
        fastbn.jvp(u, saved)
    monkeypatch.setattr(dispatch, "_backend", "auto")
    monkeypatch.setitem(sys.modules, "numba.cuda", None)
    text = (
        rf"fastbn.backward_backward: x is a float32 {library.kind} .*second order on a GPU is for numba-cuda's "
        r"kernels, which can't be used: numba.cuda can't be imported .*pip install 'fastbn\[cuda13\]'"
    )
    with pytest.raises(RuntimeError, match=text):
        fastbn.backward_backward(u, None, None, dy, saved)


def test_an_array_of_a_gpu_beside_one_of_main_memory(library, rng):
    x, u, *_ = data(rng, (6, 3, 5), (1,))
    with fastbn.set_backend("reference"):
        saved = fastbn.forward(x)[1]
        with pytest.raises(TypeError, match=r"jvp: x_t is a .*; expected an array in main memory, like the rest"):
            fastbn.jvp(library.put(u), saved)


def test_an_activation_is_refused_there_too(library, rng):
    x = library.put(data(rng, (6, 3, 5), (1,))[0], 1)
    saved = fastbn.forward(x, activation="relu")[1]
    with pytest.raises(ValueError, match="forward had activation='relu', whose derivatives are not there yet"):
        fastbn.jvp(x, saved)
