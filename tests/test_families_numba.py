"""Which kernels arrays of other libraries go to, and Numba device arrays, in the simulator."""

import os
import subprocess
import sys
import types

import numpy as np
import pytest
from device_doubles import Kernels, numba_cuda_of
from families import assert_near, data

import fastbn
from fastbn import arrays, dispatch


def test_backends_for_main_memory_refuse_arrays_of_a_gpu(library):
    x = library.put(np.eye(3, dtype=np.float32))
    for name in ("cpu", "reference"):
        with (
            fastbn.set_backend(name),
            pytest.raises(
                TypeError, match=rf"moments: x is a float32 {library.kind} .*, and the backend '{name}' is for N"
            ),
        ):
            fastbn.moments(x)


def test_without_cupy_tensors_go_to_numba(library, monkeypatch):
    """And where that is missing as well, the error says so."""
    if library.name != "torch":
        pytest.skip("CuPy arrays come with CuPy")
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "numba.cuda", None)
    with pytest.raises(
        RuntimeError, match=r"moments: the backend 'numba-cuda' can't be used: numba.cuda can't be imported"
    ):
        fastbn.moments(library.put(np.eye(3, dtype=np.float32)))


def test_numba_kernels_take_views_of_other_arrays(library, state, monkeypatch, rng):
    """By __cuda_array_interface__, with the stream, on the device; on a double of numba.cuda."""
    seen = []
    monkeypatch.setitem(sys.modules, "numba.cuda", numba_cuda_of(state, library.libraries["cupy"], seen))
    monkeypatch.setattr(dispatch, "missing", lambda _: None)
    kernels = Kernels(state, library.libraries["cupy"])
    monkeypatch.setattr(dispatch, "_load", lambda name: {"numba_cuda": kernels}[name])
    x, _, gamma, *_ = data(rng, (6, 3, 5), (1,))
    with fastbn.set_backend("numba-cuda"):
        y, _ = fastbn.forward(library.put(x, 1), library.put(gamma, 1))
    assert type(y) is library.type
    assert_near(y.on_host, fastbn.reference.forward(x, gamma)[0], x.dtype)
    stream = 1 if library.name == "cupy" else 1001  # 1 is CUDA's default stream in this interface
    assert seen == [(1, stream, False)] * 4  # x, y, table, gamma
    assert state.device == 0


SIMULATED = """
import sys, types, warnings
from simulator import without_threads
without_threads()
import numpy as np, fastbn
sys.modules["cupy"] = types.ModuleType("cupy")  # which can't see the simulator's arrays
from numba import cuda
rng = np.random.default_rng(5)
x, dy = rng.normal(3, 2, (2, 6, 3, 7)).astype(np.float32)
gamma, beta = rng.normal(1, 2, (2, 3)).astype(np.float32)
put = cuda.to_device
y, saved = fastbn.forward(put(x), put(gamma), put(beta))
results = (y, *fastbn.backward(put(dy), saved))
assert {type(a) for a in results} == {type(put(x))}
exact, kept = fastbn.reference.forward(x, gamma, beta)
for got, wanted in zip(results, (exact, *fastbn.reference.backward(dy, kept)), strict=True):
    np.testing.assert_allclose(got.copy_to_host(), wanted, rtol=3e-6, atol=3e-6)
moments = saved.moments
assert type(moments.mean) is np.ndarray
np.testing.assert_allclose(moments.mean, x.mean((0, 2)), rtol=1e-6)
running = fastbn.RunningStats(3, momentum=1.0)
running.update(moments)
z = fastbn.infer(put(x), put(running.mean), put(running.var))
np.testing.assert_allclose(z.copy_to_host(), fastbn.reference.infer(x, running.mean, running.var), rtol=3e-6, atol=3e-6)
fastbn.forward(put(x), out=y)
r = rng.normal(3, 2, x.shape).astype(np.float32)
groups = np.array([2, 0, 0, 2, 3, 0])  # nobody is in group 1
w = (rng.gamma(1.0, 1.0, (6, 7)) * (rng.random((6, 7)) < 0.7)).astype(np.float32)
w[4] = 0  # all of group 3
for asked in (
    {"activation": "silu"},
    {"activation": ("leaky_relu", 0.2), "residual": r},
    {"groups": 4},
    {"groups": groups, "activation": "gelu", "residual": r},
    {"weights": w},
    {"weights": w.reshape(6, 1, 7), "masked": "zero", "groups": groups, "activation": "silu", "residual": r},
    {"weights": w, "masked": "keep", "groups": [2, 4]},
    {"save": "y"},
    {"save": "y", "activation": ("elu", 0.7), "groups": 4},
    {"save": "y", "activation": "leaky_relu", "weights": w, "masked": "keep", "groups": [2, 4]},
):
    there = {k: put(v) if k in ("residual", "weights") else v for k, v in asked.items()}
    if asked.pop("save", "x") == "y":
        gamma, beta = np.float32([1.5, 1e-4, -0.75]), np.float32([0.5, 1, -1])  # the second can't be had back
    z, kept = fastbn.reference.forward(x, gamma, beta, **asked)
    y, saved = fastbn.forward(put(x), put(gamma), put(beta), **there)
    wanted, got = [z, *fastbn.reference.backward(dy, kept)], [y, *fastbn.backward(put(dy), saved)]
    found, right = saved.moments, kept.moments
    for a, b in zip(*((found, right) if "groups" in asked else ([found], [right])), strict=True):
        np.testing.assert_allclose(a.count, b.count, rtol=1e-6)
        np.testing.assert_allclose(a.mean, b.mean, rtol=1e-6)
    sets = () if "groups" not in asked else (2,) if isinstance(asked["groups"], list) else (4,)
    mean, var = rng.normal(3, 1, (2, *sets, 3)).astype(np.float32) ** 2
    wanted.append(fastbn.reference.infer(x, mean, var, gamma, beta, **asked))
    there.pop("save", None)
    got.append(fastbn.infer(put(x), put(mean), put(var), put(gamma), put(beta), **there))
    assert len(got) == len(wanted) == 5 + ("residual" in asked)
    for a, b in zip(got, wanted, strict=True):
        assert type(a) is type(y)
        np.testing.assert_allclose(a.copy_to_host(), b, rtol=1e-5, atol=2e-5)  # sums of 42 values of about 10
for asked in ({}, {"groups": groups}, {"weights": w, "masked": "keep", "groups": [2, 4]}):
    there = {k: put(v) if k == "weights" else v for k, v in asked.items()}
    kept, saved = fastbn.reference.forward(x, gamma, beta, **asked)[1], fastbn.forward(put(x), put(gamma), **there)[1]
    wanted = [fastbn.reference.jvp(r, kept, beta), *fastbn.reference.backward_backward(r, beta, gamma, dy, kept)]
    got = fastbn.jvp(put(r), saved, put(beta)), *fastbn.backward_backward(put(r), put(beta), put(gamma), put(dy), saved)
    for a, b in zip(got, wanted, strict=True):
        assert type(a) is type(y)
        np.testing.assert_allclose(a.copy_to_host(), b, rtol=1e-5, atol=3e-6 * abs(b).max())
ones, small = np.ones((4, 3), np.float32), np.float32([[1, 1e-5, 1]] * 4)  # of axes that are all channels
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    y = fastbn.forward(put(ones), put(small), put(ones), axis=(0, 1), save="y")[0]
np.testing.assert_array_equal(y.copy_to_host(), ones)
some, right = fastbn.moments(put(x), weights=put(w)), fastbn.reference.moments(x, weights=w)
np.testing.assert_allclose([some.count], [right.count], rtol=1e-6)
np.testing.assert_allclose([some.mean, some.var()], [right.mean, right.var()], rtol=1e-6)
empty = fastbn.moments(put(np.ones((0, 3), np.float32)))
assert empty.count == 0
np.testing.assert_array_equal(empty.mean, np.zeros(3))
for call, error, text in (
    (lambda: fastbn.forward(put(x), gamma), TypeError, "gamma is a float32 array of shape (3,) in main memory"),
    (lambda: fastbn.forward(x, put(gamma)), TypeError, "gamma is a float32 Numba device array"),
    (lambda: fastbn.forward(put(x), put(gamma.astype(np.float16))), TypeError, "can't be converted where they are"),
    (lambda: fastbn.forward(put(x), weights=put(np.float32([1] * 6))), TypeError, "can't be converted where they are"),
    (lambda: fastbn.forward(put(x), weights=put(w > 0)), TypeError, "can't be converted where they are"),
    (lambda: fastbn.forward(put(x), weights=put(w[:, :6].copy())), ValueError, "weights has shape (6, 6)"),
    (lambda: fastbn.forward(put(x), weights=put(np.tile(w, 2))[:, ::2]), TypeError, "converted where they are"),
    (lambda: fastbn.BatchNorm(3, like=put(x)), TypeError, "like is a float32 Numba device array"),
    (lambda: fastbn.Moments(3, put(gamma), put(gamma)), TypeError, "which can't be computed with"),
    (lambda: fastbn.jvp(put(x), saved, gamma), TypeError, "gamma_t is a float32 array of shape (3,) in main memory"),
    (lambda: fastbn.forward(put(x), weights=np.ones(6)), TypeError, "weights is a float64 array of shape (6,) in main"),
):
    try:
        call()
    except error as cause:
        assert text in str(cause), cause
    else:
        raise AssertionError(text)
print("all asserted")
"""


def test_numba_device_arrays_in_the_simulator():
    env = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": os.path.dirname(__file__)}
    env.pop("FASTBN_BACKEND", None)
    done = subprocess.run([sys.executable, "-c", SIMULATED], env=env, capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "all asserted", done.stderr


@pytest.mark.parametrize("handle", [types.SimpleNamespace(value=7), types.SimpleNamespace(), 7], ids=str)
def test_the_stream_of_a_numba_array(handle):
    """Its handle is ctypes' in Numba, the CUDA bindings' in numba-cuda; both streams are numbers."""

    class Stream:
        def __init__(self):
            self.handle = handle

        def __int__(self):
            return 7

    values = [types.SimpleNamespace(stream=stream) for stream in (0, Stream(), 9)]
    spans = [types.SimpleNamespace(value=value) for value in values]
    assert arrays.NUMBA.stream(spans) == 7
    assert arrays.NUMBA.stream(spans[:1]) == 0
    assert arrays.NUMBA.stream(spans[2:]) == 9
