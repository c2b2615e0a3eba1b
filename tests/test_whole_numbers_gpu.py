"""Whole numbers on a GPU: in Numba's simulator beside the reference, as PTX, and which kernels they go to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from cases import BFLOAT16
from device_doubles import Array, Kernels, numba_cuda_of
from test_numba_cuda import by_numba_cuda, compiled_by

import fastbn
from fastbn import dispatch


@by_numba_cuda
def test_in_the_simulator():
    folder = os.path.dirname(__file__)
    env = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": folder}
    env.pop("FASTBN_BACKEND", None)
    run = [sys.executable, os.path.join(folder, "whole_numbers_run.py")]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "all asserted", done.stderr


COMPILE = """
import pickle, sys, types
from numba import cuda, types as t
from numba.cuda import dispatcher
dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=(7, 5))
from fastbn.kernels.numba_cuda import kernels as k

place, cut, none = t.UniTuple(t.int64, 6), t.UniTuple(t.int64, 7), t.Tuple(())
table, part, run = t.float64[:, ::1], t.float64[:, :, ::1], k.kernels_of("float32")
found = {}
for element in (t.uint8, t.int16):
    x, y = element[::1], t.float32[::1]
    for kernel, signature in (
        (run.forward_map, (x, place, y, place, cut, table, t.boolean, none)),
        (run.backward_sums, (y, place, x, place, cut, table, part, none)),
    ):
        found[str(element), kernel.py_func.__name__], _ = cuda.compile_ptx(kernel.py_func, signature, cc=(8, 0))
pickle.dump(found, open(sys.argv[1], "wb"))
"""


@by_numba_cuda
def test_ptx(tmp_path):
    """float32's kernels compile for an x of whole numbers, which are converted by their value."""
    found = compiled_by(COMPILE, tmp_path)
    assert len(found) == 4
    for (element, name), text in found.items():
        assert re.search(r"ld\.global\.[a-z.]*u8" if element == "uint8" else r"ld\.global\.[a-z.]*[us]16", text), name
        assert re.search(r"cvt\.rn\.f32\.[us]\d", text), name
        assert not re.search(r"shl\.b32\s+%r\d+, %r\d+, 16;", text), name  # as bfloat16 is read


@pytest.fixture(params=["cupy", "torch"])
def there(request, state, doubles, monkeypatch):
    """Puts an array on a double's device; `there.used` has which kernels the calls went to."""
    cupy, torch = doubles
    kind = cupy.ndarray if request.param == "cupy" else torch.Tensor
    used = []

    monkeypatch.setitem(sys.modules, "numba.cuda", numba_cuda_of(state, cupy, []))
    monkeypatch.setattr(dispatch, "missing", lambda _: None)
    kernels = Kernels(state, cupy)
    monkeypatch.setattr(dispatch, "_load", lambda name: used.append(name) or kernels)

    def put(values):
        dispatch._load_for_device.cache_clear()
        new = kind.__new__(kind)
        Array.__init__(new, np.asarray(values), 1)
        return new

    put.used, put.kind = used, kind
    return put


@pytest.mark.parametrize("dtype", [np.uint8, np.int16], ids=lambda d: d.__name__)
def test_arrays_of_cupy_and_pytorch_go_by_numba_cuda(dtype, there, rng):
    """Forward and backward, whose dy is a float; results are the caller's own kind of float32."""
    q, dy = rng.integers(0, 255, (8, 3, 5)).astype(dtype), rng.normal(0, 1, (8, 3, 5)).astype(np.float32)
    gamma, beta = rng.normal(1, 0.5, 3).astype(np.float32), rng.normal(0, 1, 3).astype(np.float32)
    r, units = rng.normal(0, 1, q.shape).astype(np.float32), {"scale": 0.037, "zero_point": 11.0}
    x = 0.037 * (q.astype(float) - 11.0)
    mean, var = (rng.uniform(1, 4, (4, 3)).astype(np.float32) for _ in range(2))
    for stats, asked in (
        (None, {}),
        ((mean[0], var[0]), {}),
        (None, {"activation": "silu", "residual": r, "groups": 4}),
        ((mean, var), {"activation": "silu", "residual": r, "groups": 4}),
    ):
        exact, kept = fastbn.reference.forward(x, gamma, beta, frozen=stats, **asked)
        large = {k: there(v) if k == "residual" else v for k, v in asked.items()}
        frozen = stats and tuple(map(there, stats))
        y, saved = fastbn.forward(there(q), there(gamma), there(beta), frozen=frozen, **units, **large)
        got = y, *fastbn.backward(there(dy), saved, need=(False, True, True))[1:]
        size = 1 + np.abs(exact).max()
        for one, right in zip(got, (exact, *fastbn.reference.backward(dy, kept)[1:]), strict=True):
            assert type(one) is there.kind
            assert (one.on_device, one.on_host.dtype) == (1, np.float32)
            np.testing.assert_allclose(one.on_host, right, rtol=0, atol=2.0**-21 * size * (1 if one is y else 40))
    ranks = types.SimpleNamespace(allgather=lambda frame: (frame, frame))  # two, with the same data
    shared, saved = fastbn.forward(there(q), there(gamma), there(beta), comm=ranks, **units)
    exact, kept = fastbn.reference.forward(x, gamma, beta)
    np.testing.assert_allclose(shared.on_host, exact, rtol=0, atol=2.0**-21 * (1 + np.abs(exact).max()))
    dgamma = fastbn.backward(there(dy), saved, need=(False, True, True))[1]
    np.testing.assert_allclose(dgamma.on_host, fastbn.reference.backward(dy, kept)[1], rtol=0, atol=2.0**-21 * 40)
    np.testing.assert_allclose(fastbn.moments(there(q), **units).mean.on_host, x.mean((0, 2)), rtol=2.0**-22)
    assert f"{q.dtype} x of" in repr(saved)
    assert set(there.used) == {"numba_cuda"}


def test_bfloat16_is_no_whole_number(there, rng):
    """Kernels get its bits as int16, too."""
    x = rng.normal(3, 2, (8, 3)).astype(BFLOAT16)
    y, _ = fastbn.forward(there(x))
    assert y.on_host.dtype == BFLOAT16
    assert set(there.used) == {"cuda"}
    with pytest.raises(ValueError, match=r"scale or zero_point is given with x of .*bfloat16"):
        fastbn.forward(there(x), scale=2.0)
    with pytest.raises(ValueError, match=r"residual is a .*int16|residual is a bfloat16 .*; expected float32"):
        fastbn.forward(there(np.ones((8, 3), np.int16)), residual=there(x))


def test_what_is_refused(there):
    q, x = there(np.arange(12, dtype=np.uint8).reshape(4, 3)), there(np.eye(4, 3, dtype=np.float32))
    with (
        fastbn.set_backend("cupy"),
        pytest.raises(
            TypeError, match=r"forward: x is a uint8 .*the backend 'cupy' has no whole numbers; expected 'numba-cuda'"
        ),
    ):
        fastbn.forward(q)
    for name in ("out", "residual"):
        with pytest.raises(TypeError, match=rf"forward: {name} is a uint8 .*; expected float16, bfloat16, float32"):
            fastbn.forward(x, **{name: there(np.ones((4, 3), np.uint8))})
    _, saved = fastbn.forward(q)
    with pytest.raises(ValueError, match=r"dx of whole numbers .*uint8.* is asked for; .*need=\(False, True, True\)"):
        fastbn.backward(x, saved)


def test_without_numba_cuda(there, monkeypatch):
    """CuPy, which is there, has no kernels for them."""
    monkeypatch.setitem(sys.modules, "numba.cuda", None)
    monkeypatch.setattr(dispatch, "missing", lambda _: "numba.cuda can't be imported")
    with pytest.raises(RuntimeError, match=r"moments: x is a uint8 .*, which can't be used: numba.cuda can't be im"):
        fastbn.moments(there(np.eye(3, dtype=np.uint8)))
