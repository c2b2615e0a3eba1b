"""Real PyTorch tensors in main memory that say they are on a GPU, to kernels that are doubles."""

import sys
import types

import numpy as np
import pytest
from cases import BFLOAT16, eps
from families import Twice, assert_near, data

import fastbn


@pytest.fixture
def real_torch():
    """Asked for before the doubles, which stand in its place."""
    return pytest.importorskip("torch", reason="PyTorch isn't installed")


@pytest.fixture
def tensors(real_torch, doubles, monkeypatch):
    """Makes real tensors, in main memory, which say that they are on a GPU: the double may do what they don't."""
    names = {
        **vars(real_torch),
        "device": lambda *_: "cpu",
        "cuda": types.SimpleNamespace(current_stream=lambda _: types.SimpleNamespace(cuda_stream=7)),
    }
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(**names))
    monkeypatch.setattr(real_torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(real_torch.Tensor, "get_device", lambda _: 0)
    return real_torch.tensor


ASKED = {
    "nothing": lambda _: {},
    "equal groups": lambda _: {"groups": 4},
    "groups by id": lambda _: {"groups": np.array([2, 0, 0, 3, 1, 1, 2, 0])},
    "a residual": lambda rng: {"activation": "relu", "residual": rng.normal(size=(8, 3, 5))},
    "weights": lambda rng: {"weights": rng.gamma(1.0, 1.0, (8, 1, 5)).astype(np.float32), "masked": "zero"},
    "a mask in groups": lambda rng: {"weights": rng.random((8, 5)) < 0.7, "groups": [3, 5]},
    "y alone": lambda _: {"save": "y"},
}


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("make", ASKED.values(), ids=ASKED)
def test_real_tensors(make, kind, tensors, real_torch, state, rng):
    dtype, kind = BFLOAT16 if kind == "bfloat16" else np.dtype(kind), getattr(real_torch, kind)
    x, dy, gamma, beta, mean, var = data(rng, (8, 3, 5), (1,), dtype)
    asked, sizes, sums = make(rng), [10] * 5, np.dtype(np.float32)
    if "residual" in asked:
        asked["residual"] = asked["residual"].astype(dtype)
    given = {k: tensors(v.tolist(), dtype=kind) if k == "residual" else v for k, v in asked.items()}
    given |= {k: tensors(v) for k, v in asked.items() if k == "weights"}
    there_x, there_dy = (tensors(a.tolist(), dtype=kind) for a in (x, dy))
    if asked.pop("save", "x") == "y":
        gamma[1], beta[1] = 1e-4, 1  # its x can't be had back
        off = max(1, np.abs(beta / gamma)[::2].max())  # by which y's eps is more, for xhat
        sizes, sums = [10, 10 * off, 10 * off * 40**0.5, 10], dtype  # 40 values of a channel
    numbers = [tensors(a) for a in (gamma, beta, mean, var)]
    sets = {k: v for k, v in asked.items() if k != "groups"}, {k: v for k, v in given.items() if k != "groups"}
    for frozen in (False, True):  # given statistics of groups would be others
        on_host, there = (sets[0], sets[1]) if frozen else (asked, given)
        exact, kept = fastbn.reference.forward(x, gamma, beta, frozen=(mean, var) if frozen else None, **on_host)
        y, saved = fastbn.forward(there_x, *numbers[:2], frozen=numbers[2:] if frozen else None, **there)
        got = y, *fastbn.backward(there_dy, saved)
        small = real_torch.float64 if kind is real_torch.float64 else real_torch.float32
        assert [a.dtype for a in got] == [kind, kind, small, small, kind][: len(got)]
        rights = exact, *fastbn.reference.backward(dy, kept)
        for one, right, size in zip(got, rights, sizes[: len(got)], strict=True):
            assert_near(one.double().numpy(), right, dtype if one.dtype is kind else sums, size)
        assert repr(there_x.dtype) in repr(saved)
        if not frozen:
            found, right = saved.moments, kept.moments
            for a, b in zip(*((found, right) if "groups" in asked else ([found], [right])), strict=True):
                np.testing.assert_allclose(a.count, b.count, rtol=1e-6)
                assert a.mean.dtype is small
                np.testing.assert_allclose(a.mean.numpy(), b.mean, rtol=1e-6, atol=1e-6)
    assert {call.stream for call in state.calls} == {7}


def test_real_tensors_of_layers_and_ranks(tensors, real_torch, rng):
    """Running statistics, merged moments, state, gradients where they are told, and sums of ranks."""
    x, dy, gamma, beta, _, _ = data(rng, (8, 3, 5), (1,))
    like = tensors(x)
    options = {"on_nonfinite": "skip", "debias": True}
    layer, twin = fastbn.BatchNorm(3, like=like, **options), fastbn.BatchNorm(3, **options)
    results = []
    for bn, put in ((layer, tensors), (twin, np.array)):
        bn.gamma[...], bn.beta[...] = put(gamma), put(beta)
        found = [bn(put(x)), bn.backward(put(dy)), bn.eval()(put(x)), bn.dgamma, bn.dbeta]
        bn.load_state_dict(bn.state_dict())
        halves = [fastbn.moments(put(half)) for half in (x[:3], x[3:])]
        both = halves[0] + halves[1]
        y, saved = fastbn.forward(put(x), put(gamma), put(beta), comm=Twice())
        sums = put(np.zeros(6, np.float32))[::2]
        dx, dgamma, _ = fastbn.backward(put(dy), saved, out=(None, sums, None))
        assert dgamma is sums
        results.append([*found, bn.running.mean, bn.running.var, both.mean, (both - halves[1]).var(1), y, dx, sums])
    for got, right in zip(*results, strict=True):
        assert isinstance(got, real_torch.Tensor)
        np.testing.assert_allclose(got.numpy(), right, rtol=1e-5, atol=2e-5)
    assert repr(layer.running) == repr(twin.running)
    with pytest.raises(
        ValueError, match=r"out is a float64 .* of shape \(8, 3, 5\) .*; expected torch.float32 of shape"
    ):
        fastbn.forward(like, out=tensors(x.astype(float)))
    with pytest.raises(TypeError, match="weights is a complex64 PyTorch CUDA tensor"):
        fastbn.forward(like, weights=tensors(np.ones(8, np.complex64)))


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("masked", ["normalize", "zero", "keep"])
def test_real_tensors_of_ranks_with_weights(masked, kind, tensors, real_torch, rng):
    """By PyTorch's own arithmetic, whose types are its own: float32 weights of half types."""
    dtype = np.dtype(BFLOAT16 if kind == "bfloat16" else kind)
    x, dy, gamma, beta, _, _ = data(rng, (8, 3, 5), (1,), dtype)
    weights = (rng.random((8, 1, 5)) * (rng.random((8, 1, 5)) < 0.7)).astype(np.float32)
    residual = rng.normal(size=x.shape).astype(dtype)
    if masked != "normalize":
        x[np.broadcast_to(weights == 0, x.shape)] = np.nan
    put = lambda a: tensors(a.tolist(), dtype=getattr(real_torch, kind))  # noqa: E731
    options = {"masked": masked, "activation": "silu"}
    y, saved = fastbn.forward(
        put(x), tensors(gamma), tensors(beta), weights=tensors(weights), residual=put(residual), comm=Twice(), **options
    )
    found = y, *fastbn.backward(put(dy), saved, reduce_params=True)
    both = [np.concatenate([a, a]) for a in (x, weights, residual)]
    want, whole = fastbn.reference.forward(both[0], gamma, beta, weights=both[1], residual=both[2], **options)
    wanted = want, *fastbn.reference.backward(np.concatenate([dy, dy]), whole)
    for got, right in zip(found, wanted, strict=True):
        assert isinstance(got, real_torch.Tensor)
        right = right[:8] if right.ndim == 3 else right
        near = 16 * eps(dtype if right.ndim == 3 else np.dtype(np.float64 if kind == "float64" else np.float32))
        np.testing.assert_allclose(got.double().numpy(), right, rtol=near, atol=near)


def test_bfloat16_tensors_go_by_their_own_name(tensors, real_torch, rng):
    """In messages, and to other ranks, which may hold NumPy arrays: kernels read the bits as int16."""
    headers = []

    class Twice:
        def allgather(self, frame):
            headers.append(frame[:18].tolist())
            return frame, frame

    x = data(rng, (8, 3, 5), (1,), BFLOAT16)[0]
    there = tensors(x.tolist(), dtype=real_torch.bfloat16)
    for one in (x, there):
        fastbn.forward(one, comm=Twice())
    assert headers[0] == headers[1]
    with pytest.raises(ValueError, match=r"scale or zero_point is given with x of torch\.bfloat16; expected them with"):
        fastbn.forward(there, scale=2.0)
