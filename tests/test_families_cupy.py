"""The public functions on real CuPy arrays: a double of the driver takes the launches, and the emulator runs them."""

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("cupy", reason="CuPy isn't installed")

import cupy
from cupy_double import MOST, emulation, small_devices
from emulator import library

import fastbn


@pytest.fixture(scope="module")
def emulator():
    return emulation(library())


@pytest.fixture
def gpu(monkeypatch, emulator):
    yield from small_devices(monkeypatch, emulator)


# Eight channels and more: the emulator has the half types in words of eight.
LAYOUTS = {
    "nchw": ((5, 8, 7, 9), lambda a: a),
    "channels-last memory": (
        (5, 8, 7, 9),
        lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    ),
    "(N, C)": ((33, 16), lambda a: a),
    "channel slice": ((5, 8, 48), lambda a: np.concatenate([a, a], 1)[:, 8:]),
    "cropped, hence copied": ((3, 4, 6, 7), lambda a: np.pad(a, ((0, 0), (0, 0), (1, 1), (1, 1)))[:, :, 1:-1, 1:-1]),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(("shape", "laid"), LAYOUTS.values(), ids=LAYOUTS)
def test_forward_and_backward(shape, laid, dtype, gpu, rng):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    host_x, host_dy = (laid(rng.normal(3, 2, shape).astype(kind)) for _ in range(2))
    gamma, beta = rng.normal(1, 2, (2, shape[1])).astype(np.float32)
    x, dy = gpu.array(host_x, host_x), gpu.array(host_dy, host_dy)
    y, saved = fastbn.forward(x, gpu.array(gamma), gpu.array(beta))
    dx, dgamma, dbeta = fastbn.backward(dy, saved)
    exact, kept = fastbn.reference.forward(host_x, gamma, beta)
    wanted = fastbn.reference.backward(host_dy, kept)
    assert {type(a) for a in (y, dx, dgamma, dbeta)} == {cupy.ndarray}
    assert (y.dtype, dx.dtype) == (kind, kind)
    assert dgamma.dtype == dbeta.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert y.strides == dx.strides == np.empty_like(host_x).strides
    terms = np.abs(host_dy.astype(np.float64)) * np.maximum(1, np.abs(kept.d) / np.sqrt(kept.var + kept.eps))
    scale = np.maximum(1, terms.sum(kept.axes))  # of what dgamma and dbeta are sums of
    unit = float(ml_dtypes.finfo(kind).eps)
    for got, right, size in (
        (y, exact, np.maximum(1, np.abs(exact))),
        (dx, wanted[0], np.maximum(1, np.abs(wanted[0]))),
    ):
        assert (np.abs(gpu.host(got).astype(np.float64) - right) <= MOST[dtype] * unit * size).all()
    for got, right in ((dgamma, wanted[1]), (dbeta, wanted[2])):
        assert (np.abs(gpu.host(got) - right) <= 8 * float(np.finfo(gpu.host(got).dtype).eps) * scale).all()


def test_in_place_on_the_second_device(gpu, rng):
    host = rng.normal(3, 2, (6, 4, 20)).astype(np.float32)
    with cupy.cuda.Device(1):
        x, mean, var = gpu.array(host), gpu.array(np.float32([1, 2, 3, 4])), gpu.array(np.float32([4, 3, 2, 1]))
        other = gpu.array(np.zeros((6, 4, 20), np.float32))
    before = len(gpu.allocated)
    assert fastbn.infer(x, mean, var, out=other) is other
    assert fastbn.infer(x, mean, var, out=x) is x
    assert gpu.allocated[before:] == [(1, 6 * 4 * 8)] * 2  # the tables
    assert {launch.device for launch in gpu.started} == {1}
    assert gpu.current == 0
    exact = fastbn.reference.infer(host, [1, 2, 3, 4], [4, 3, 2, 1])
    np.testing.assert_allclose(gpu.host(x), exact, rtol=1e-6, atol=1e-6)  # 8 eps
    np.testing.assert_array_equal(gpu.host(other), gpu.host(x))


def test_arrays_on_two_devices_are_refused(gpu):
    x = gpu.array(np.ones((6, 4), np.float32))
    with cupy.cuda.Device(1):
        gamma = gpu.array(np.ones(4, np.float32))
    with pytest.raises(
        ValueError, match=r"gamma is a float32 CuPy array of shape \(4,\) on device 1; expected one on dev"
    ):
        fastbn.forward(x, gamma)
    with pytest.raises(TypeError, match=r"beta is a float64 array .* in main memory; .* Pass cupy.asarray\(beta\)"):
        fastbn.forward(x, beta=np.ones(4))
    assert gpu.started == []
