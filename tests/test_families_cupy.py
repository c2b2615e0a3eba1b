"""The public functions on real CuPy arrays: a double of the driver takes the launches, and the emulator runs them."""

from importlib import import_module

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("cupy", reason="CuPy isn't installed")

import cupy
from cupy_double import MOST
from fastbn.kernels.cuda.launch import invert

import fastbn
from fastbn import kept as kept_apart
from fastbn.arrays import CUPY


@pytest.fixture
def gpu(emulated):
    return emulated


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


MORE = {
    "relu of a sum": ({"activation": "relu", "residual": True}, "nchw"),
    "gelu": ({"activation": "gelu"}, "(N, C)"),
    "leaky_relu, channels last": ({"activation": ("leaky_relu", 0.2), "residual": True}, "channels-last memory"),
    "a residual alone": ({"residual": True}, "channel slice"),
    "equal groups": ({"groups": 5}, "nchw"),
    "groups of sizes": ({"groups": [2, 0, 3]}, "nchw"),
    "groups by id": ({"groups": np.array([1, 0, 3, 1, 0])}, "channels-last memory"),
    "all": ({"groups": np.array([1, 0, 3, 1, 0]), "activation": "relu", "residual": True}, "nchw"),
    "all, copied": ({"groups": [1, 2], "activation": "relu", "residual": True}, "cropped, hence copied"),
    "a mask": ({"weights": "mask", "masked": "zero"}, "nchw"),
    "weights of samples": ({"weights": "samples"}, "channels-last memory"),
    "weights of positions": ({"weights": "positions", "masked": "keep"}, "channel slice"),
    "a mask, copied": ({"weights": "mask"}, "cropped, hence copied"),
    "y alone": ({"save": "y"}, "nchw"),
    "y alone, elu": ({"save": "y", "activation": ("elu", 1.0), "groups": 5}, "channels-last memory"),
    "y alone, a mask": (
        {"save": "y", "activation": "leaky_relu", "weights": "mask", "masked": "zero"},
        "channel slice",
    ),
    "all by weights": (
        {"groups": [2, 0, 3], "activation": "relu", "residual": True, "weights": "positions", "masked": "zero"},
        "nchw",
    ),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("more", "layout"), MORE.values(), ids=MORE)
def test_what_goes_beyond_batch_norm(more, layout, frozen, gpu, rng, monkeypatch):
    """As fastbn.reference has it; sums over groups are CuPy's own, and doubled."""
    shape, laid = LAYOUTS[layout]
    x, dy, residual = (laid(rng.normal(1, 2, shape).astype(np.float32)) for _ in range(3))
    gamma, beta = rng.normal(1, 2, (2, shape[1])).astype(np.float32)
    more = dict(more)
    groups, save = more.get("groups"), more.pop("save", "x")
    if save == "y":
        beta /= 4
        gamma[0], gamma[1:] = 1e-4, np.sign(gamma[1:]) * rng.uniform(0.5, 1, shape[1] - 1)  # the first one is kept
        # On the host these tell what y tells of x; CuPy's own arithmetic on C numbers isn't here.
        monkeypatch.setattr("fastbn.kernels.cuda.launch.invert", lambda t: (invert(gpu.host(t)), t)[1])
        monkeypatch.setattr("fastbn.runs.of_channels", lambda t, *a: gpu.array(kept_apart.of_channels(gpu.host(t), *a)))
        monkeypatch.setattr("fastbn.runs.assign_at", lambda v, at, found: gpu.host(v).__setitem__(at, gpu.host(found)))
        monkeypatch.setattr(CUPY, "host", lambda values: gpu.host(values).copy())
    if frozen:
        sets = (
            () if groups is None else (groups if isinstance(groups, int) else 4 if len(groups) == 5 else len(groups),)
        )
        wide = (*sets, shape[1])
        more["frozen"] = rng.normal(1, 1, wide).astype(np.float32), rng.uniform(0.5, 2, wide).astype(np.float32)

    def total(parts, target):
        host = gpu.host(parts)
        gpu.host(target)[...] = host.reshape(-1, target.size).sum(0, dtype=np.float64)

    monkeypatch.setattr(CUPY, "total", total)
    if "weights" in more:
        full = (shape[0], 1, *shape[2:])
        more["weights"] = {
            "mask": lambda: rng.random(full) < 0.6,
            "samples": lambda: rng.integers(0, 3, shape[0]),
            "positions": lambda: rng.gamma(1.0, 1.0, full) * (rng.random(full) < 0.8),
        }[more["weights"]]()

    def there(a):
        return gpu.array(a, a) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a

    results = []
    for place, arrays in ((fastbn.reference, (x, dy, residual)), (fastbn, (there(x), there(dy), there(residual)))):
        given = {k: v for k, v in more.items() if k != "residual"}
        if "residual" in more:
            given["residual"] = arrays[2]
        if "weights" in more and place is fastbn:
            given["weights"] = gpu.array(more["weights"])
        g, b = (gamma, beta) if place is not fastbn else (there(gamma), there(beta))
        if frozen and place is fastbn:
            given["frozen"] = tuple(there(a) for a in more["frozen"])
        y, saved = place.forward(arrays[0], g, b, **given, **({"save": save} if place is fastbn else {}))
        if place is not fastbn:
            kept = saved
        results.append((y, *place.backward(arrays[1], saved)))
    names = ("y", "dx", "dgamma", "dbeta", "dresidual")
    values = x.size / shape[1]
    for name, right, got in zip(names, results[0], results[1], strict=False):
        assert type(got) is cupy.ndarray, name
        size = np.maximum(values**0.5 * 8 if right.ndim == 1 else 8, np.abs(right))
        # xhat from y is off by y's eps over gamma, and by what the slope of elu and leaky_relu takes of that
        limit = 4 * 2.0**-23 * (16 if save == "y" else 1)
        assert (np.abs(gpu.host(got) - right) <= limit * size).all(), name
    assert len(results[0]) == len(results[1])
    options = {option for launch in gpu.started for option in launch.options}
    assert ("-DFASTBN_SETS=1" in options) == (groups is not None)
    assert ("-DFASTBN_INVERSE=1" in options) == (save == "y" and "activation" in more)
    assert ("-DFASTBN_RESIDUAL=1" in options) == ("residual" in more)
    mode = more.get("masked", "normalize").upper()
    used = "weights" in more and not (frozen and mode == "NORMALIZE")
    assert (f"-DFASTBN_WEIGHTS={mode}" in options) == used
    if "weights" in more and not frozen:
        masses = [m.count for m in ([kept.moments] if groups is None else kept.moments)]
        np.testing.assert_allclose(gpu.host(saved._masses), masses, rtol=8 * 2.0**-23)  # moments are CuPy's own


def test_what_is_not_there_is_refused(gpu):
    x = gpu.array(np.ones((6, 4), np.float32))
    with pytest.raises(TypeError, match=r"weights is a float32 array .* in main memory; .* Pass cupy.asarray"):
        fastbn.forward(x, weights=np.ones(6, np.float32))
    with pytest.raises(TypeError, match=r"residual is a float32 array .* in main memory; .* Pass cupy.asarray"):
        fastbn.forward(x, residual=np.ones((6, 4), np.float32))
    assert gpu.started == []


def test_a_backend_without_a_feature_says_so(gpu, rng, monkeypatch):
    """Each by name, before anything is written: here CuPy's kernels with fewer features than they have."""
    x, out = gpu.array(rng.normal(size=(6, 4)).astype(np.float32)), gpu.array(np.full((6, 4), 7, np.float32))
    monkeypatch.setattr("fastbn.kernels.cuda.FEATURES", frozenset({"groups"}))
    with pytest.raises(TypeError, match=r"activation and residual can't be had from .* 'cupy', which has groups; x is"):
        fastbn.forward(x, activation="relu", residual=x, groups=2, out=out)
    assert gpu.started == []
    assert (gpu.host(out) == 7).all()


def test_what_the_kernels_of_a_gpu_take():
    for name in ("cuda", "numba_cuda"):
        features = import_module(f"fastbn.kernels.{name}").FEATURES
        assert features == {"activation", "residual", "groups", "weights", "save='y'"}
