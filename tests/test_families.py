"""Arrays of other libraries, on doubles of CuPy and PyTorch: results, places, layouts, errors, moments, layers."""

import functools
import os
import subprocess
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from cases import BFLOAT16, CASES, TOLERANCE, eps
from device_doubles import Array, Kernels, numba_cuda_of

import fastbn
from fastbn import arrays, dispatch


class Library:
    """One of the doubles, with what tests need of it."""

    def __init__(self, name, state, cupy, torch):
        self.name, self.state = name, state
        self.kind = arrays.CUPY.kind if name == "cupy" else arrays.TORCH.kind
        self.type = cupy.ndarray if name == "cupy" else torch.Tensor
        self.libraries = {"cupy": cupy, "torch": torch}

    def put(self, values, device=0):
        """On a device, with the strides and neighbours that it has."""
        new = self.type.__new__(self.type)
        Array.__init__(new, values, device)
        return new


@pytest.fixture(params=["cupy", "torch"])
def library(request, state, doubles):
    return Library(request.param, state, *doubles)


def data(rng, shape, axes, dtype=np.float32):
    """x, dy and, by channel, gamma, beta, mean and var."""
    channels = tuple(shape[a] for a in axes)
    x, dy = (rng.normal(3, 2, shape).astype(dtype) for _ in range(2))
    gamma, beta, mean = (rng.normal(1, 2, channels).astype(np.float32) for _ in range(3))
    return x, dy, gamma, beta, mean, rng.uniform(0.5, 2, channels).astype(np.float32)


def assert_near(got, exact, dtype, size=1):
    """`got` within what its dtype costs, as on the CPU, relative to the result or to `size`, of what was added up."""
    exact = np.asarray(exact, np.float64)
    error = np.abs(np.asarray(got, np.float64) - exact) / np.maximum(size, np.abs(exact))
    assert error.max(initial=0) <= TOLERANCE[dtype.name] * eps(dtype)


def sizes(dy, kept):
    """The size of what dx, dgamma and dbeta are sums of: float64 results may be off by as many eps of that."""
    std = np.sqrt(kept.var + kept.eps)
    terms = np.abs(dy.astype(np.float64)) * np.maximum(1, np.abs(kept.d / std))
    sums = terms.sum(kept.axes, keepdims=True)
    count = terms.size / sums.size
    small = [n for a, n in enumerate(dy.shape) if a not in kept.axes]
    dx = np.abs(kept.gamma / std) * (terms + np.maximum(1, np.abs(kept.d / std)) * sums / count)
    return np.maximum(1, dx), np.maximum(1, sums.reshape(small)), np.maximum(1, sums.reshape(small))


# The case table has byte orders and read-only arrays, which a GPU has not.
ON_DEVICE = [c for c in CASES if c.name not in ("read-only", "byte-swapped", "byte-swapped nhwc")]


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16], ids=str)
@pytest.mark.parametrize("case", ON_DEVICE, ids=lambda c: c.name)
def test_every_layout_and_type(case, dtype, library, rng):
    """Results of the caller's type, on its device, in x's memory layout; and the reference's numbers."""
    axes = tuple(a % len(case.shape) for a in ([case.axis] if isinstance(case.axis, int) else case.axis))
    x, dy, gamma, beta, mean, var = data(rng, case.shape, sorted(axes), dtype)
    if case.name == "misaligned" and library.name == "torch":
        pytest.skip("PyTorch has no misaligned tensors")
    host_x, host_dy = case.make(x), case.make(dy)
    x, dy, gamma, beta = (library.put(a, 1) for a in (host_x, host_dy, gamma, beta))
    for frozen in (None, (library.put(mean, 1), library.put(var, 1))):
        y, saved = fastbn.forward(x, gamma, beta, axis=case.axis, frozen=frozen)
        dx, dgamma, dbeta = fastbn.backward(dy, saved)
        host = None if frozen is None else (mean, var)
        exact, kept = fastbn.reference.forward(host_x, gamma.on_host, beta.on_host, axis=case.axis, frozen=host)
        numbers = np.dtype(np.float64 if dtype == np.float64 else np.float32)
        for got, wanted, kind, size in zip(
            (y, dx, dgamma, dbeta),
            (exact, *fastbn.reference.backward(host_dy, kept)),
            (dtype, dtype, numbers, numbers),
            (1, *(sizes(host_dy, kept) if dtype == np.float64 else (1, 1, 1))),
            strict=True,
        ):
            assert type(got) is library.type
            assert got.on_device == 1
            assert got.on_host.dtype == kind
            assert got.on_host.shape == wanted.shape
            assert_near(got.on_host, wanted, kind, size)
        like = y if "broadcast" in case.name else library.put(np.empty_like(host_x))
        assert y.on_host.strides == dx.on_host.strides == like.on_host.strides
        if frozen is not None:
            inferred = fastbn.infer(x, *frozen, gamma, beta, axis=case.axis)
            np.testing.assert_array_equal(inferred.on_host, y.on_host)
    m = fastbn.moments(x, axis=case.axis)
    wanted = fastbn.reference.moments(host_x, axis=case.axis)
    assert m.count == wanted.count
    for got, value in ((m.mean, wanted.mean), (m.m2, wanted.m2), (m.var(1), wanted.var(1))):
        assert (type(got), got.on_device, got.on_host.dtype) == (library.type, 1, numbers)
        np.testing.assert_allclose(got.on_host, value, rtol=2 * eps(numbers))  # rounded once from float64
    assert library.state.transfers == []


def test_what_a_call_allocates(library, rng):
    """y and the table; dx, dgamma and dbeta; with `out` the table alone. No small arrays on the way."""
    x, dy, gamma, beta, *_ = (library.put(a, 1) for a in data(rng, (6, 3, 5), (1,)))
    _, saved = fastbn.forward(x, gamma, beta)
    assert library.state.allocated == [((6, 3, 5), 1), ((6, 3), 1)]
    library.state.allocated.clear()
    fastbn.backward(dy, saved)
    assert library.state.allocated == [((6, 3, 5), 1), ((3,), 1), ((3,), 1)]
    library.state.allocated.clear()
    fastbn.forward(x, gamma, beta, out=library.put(np.empty((6, 3, 5), np.float32), 1))
    assert library.state.allocated == [((6, 3), 1)]
    assert [call.name for call in library.state.calls] == ["forward", "backward", "forward"]


LAYOUTS = {
    "C": lambda x: x,
    "channels last": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1),
    "cropped": lambda x: np.concatenate([x, x], 2)[..., : x.shape[2]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_short_way_gives_what_the_long_one_does(layout, library, rng, monkeypatch):
    """The same calls of kernels, with the same bits; and what isn't plain takes the long way."""
    x, dy, gamma, beta, mean, var = data(rng, (6, 3, 5), (1,))
    x, dy, out, dx = (library.put(LAYOUTS[layout](a), 1) for a in (x, dy, np.zeros_like(x), np.zeros_like(x)))
    gamma, beta, mean, var = (library.put(a, 1) for a in (gamma, beta, mean, var))
    dgamma, dbeta = (library.put(np.empty(3, np.float32), 1) for _ in range(2))
    ways = []

    def calls():
        y, saved = fastbn.forward(x, gamma, beta)
        ways.append(saved._way)
        z, again = fastbn.forward(x, gamma, beta, out=out)
        assert z is out
        frozen, _ = fastbn.forward(x, gamma, beta, frozen=(mean, var))
        results = [y, z, saved.table, again.table, *fastbn.backward(dy, saved), *fastbn.backward(dy, again), frozen]
        for given in (dx, (dx, None, None), (None, dgamma, None), (dx, dgamma, dbeta)):
            found = fastbn.backward(dy, saved, out=given)
            assert all(a is None or a is b for a, b in zip(given if given is not dx else (dx,), found, strict=False))
            results += found
        return [(a.on_host.tobytes(), a.on_host.strides, a.on_device) for a in results]

    made = []
    real = fastbn.plain.backward_on_device
    monkeypatch.setattr("fastbn.batchnorm.backward_on_device", lambda *a: made.append(real(*a)) or made[-1])
    short = calls()
    dense = layout != "cropped"  # as `out` must be
    assert [one is not None for one in made] == ([True] * 6 if dense else [True, False, False, True, False])
    seen = list(library.state.calls)
    library.state.calls.clear()
    monkeypatch.setattr("fastbn.plain.way_of", lambda *_: None)
    assert calls() == short
    assert library.state.calls == seen
    assert len(seen) == 9
    assert [way is not None for way in ways] == [True, False]


def test_what_is_not_plain_on_a_gpu_goes_the_long_way(library, rng):
    x, dy, gamma, beta, *_ = (library.put(a, 1) for a in data(rng, (6, 3, 5), (1,)))
    y, saved = fastbn.forward(x, gamma, beta)
    own = library.put(x.on_host, 1)
    inside, lost = fastbn.forward(own, gamma, beta, out=own)
    assert inside.on_host.tobytes() == y.on_host.tobytes()
    with pytest.raises(ValueError, match="saved has no x"):
        fastbn.backward(dy, lost)
    with pytest.raises(ValueError, match=r"fastbn.forward: eps is str 'a'; expected a finite number above 0"):
        fastbn.forward(x, eps="a")
    with pytest.raises(ValueError, match=r"fastbn.forward: gamma has shape \(2,\); expected \(3,\)"):
        fastbn.forward(x, library.put(np.ones(2, np.float32), 1))
    with pytest.raises(ValueError, match=r"fastbn.forward: out is a float32 .* of shape \(6, 3, 4\)"):
        fastbn.forward(x, out=library.put(np.ones((6, 3, 4), np.float32), 1))
    with pytest.raises(ValueError, match=r"fastbn.backward: dy is a float32 .* of shape \(6, 3, 4\)"):
        fastbn.backward(library.put(np.ones((6, 3, 4), np.float32), 1), saved)
    sums = library.put(np.empty(3, np.float32), 1)
    with pytest.raises(ValueError, match=r"out \(dbeta\) .*dgamma"):
        fastbn.backward(dy, saved, out=(None, sums, sums))
    with pytest.raises(ValueError, match=r"out \(dx\) is a float32 .* of shape \(6, 3, 4\)"):
        fastbn.backward(dy, saved, out=library.put(np.ones((6, 3, 4), np.float32), 1))
    with pytest.raises(ValueError, match=r"out \(dgamma\) is a float64"):
        fastbn.backward(dy, saved, out=(None, library.put(np.empty(3), 1), None))
    over = library.put(dy.on_host.copy(), 1)
    inside = fastbn.backward(over, saved, out=over)
    assert inside[0] is over
    for a, b in zip(inside, fastbn.backward(dy, saved), strict=True):
        assert a.on_host.tobytes() == b.on_host.tobytes()
    turned = library.put(np.ascontiguousarray(dy.on_host.T).T, 1)  # in another order of memory
    for a, b in zip(fastbn.backward(turned, saved), fastbn.backward(dy, saved), strict=True):
        np.testing.assert_allclose(a.on_host, b.on_host, rtol=1e-5, atol=1e-6)


def test_the_stream_is_the_librarys_own(library, rng):
    x, dy, *_ = (library.put(a, 1) for a in data(rng, (6, 3, 5), (1,)))
    with library.state.current(stream=7):
        _, saved = fastbn.forward(x)
        fastbn.backward(dy, saved)
    assert {call.stream for call in library.state.calls} == {7 if library.name == "cupy" else 1001}
    assert (library.state.device, library.state.stream) == (0, 0)


MIXED = {
    "gamma in main memory": ("gamma", lambda _, a: a, TypeError, r"gamma is a float32 array of .* in main m"),
    "gamma a list": ("gamma", lambda _, a: a.tolist(), TypeError, r"gamma is a list \[.*expected a {kind} on"),
    "beta on another device": ("beta", lambda lib, a: lib.put(a, 1), ValueError, "beta is a .* device 1; expected one"),
    "mean in main memory": ("mean", lambda _, a: a, TypeError, "mean is a .*; expected a {kind} on device 0"),
    "var on another device": ("var", lambda lib, a: lib.put(a, 1), ValueError, "var is a .* device 1; expected one"),
    "out in main memory": ("out", lambda *_: np.empty((6, 3, 5), np.float32), TypeError, "out is a .* in main mem"),
    "out elsewhere": (
        "out", lambda lib, _: lib.put(np.empty((6, 3, 5), np.float32), 1), ValueError, "out is a .* on device 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "make", "error", "match"), MIXED.values(), ids=MIXED)
def test_arrays_of_two_places_are_refused(name, make, error, match, library, rng):
    """Nothing is copied from one to the other, and nothing is written."""
    x, _, gamma, beta, mean, var = data(rng, (6, 3, 5), (1,))
    given = {"gamma": gamma, "beta": beta, "mean": mean, "var": var}
    passed = {key: library.put(value) for key, value in given.items()}
    passed[name] = make(library, given.get(name))
    with pytest.raises(error, match="fastbn.infer: " + match.format(kind=library.kind)):
        fastbn.infer(library.put(x), **passed)
    assert library.state.transfers == library.state.calls == []


def test_dy_of_another_place_is_refused(library, rng):
    x, dy, *_ = data(rng, (6, 3, 5), (1,))
    _, saved = fastbn.forward(library.put(x))
    with pytest.raises(TypeError, match=f"backward: dy is a float32 array .* expected a {library.kind} on device 0"):
        fastbn.backward(dy, saved)
    with pytest.raises(ValueError, match=r"backward: dy is a .* on device 1; expected one on device 0"):
        fastbn.backward(library.put(dy, 1), saved)
    _, saved = fastbn.forward(x)
    with pytest.raises(
        TypeError, match=f"backward: dy is a float32 {library.kind} .*; expected an array in main memory"
    ):
        fastbn.backward(library.put(dy), saved)


@pytest.mark.parametrize("name", ["gamma", "beta", "frozen", "out"])
def test_numpy_x_refuses_arrays_of_a_gpu(name, library, rng):
    x, _, gamma, _, mean, var = data(rng, (6, 3, 5), (1,))
    given = {"gamma": gamma, "beta": gamma, "frozen": (mean, library.put(var)), "out": np.empty_like(x)}[name]
    passed = given if name == "frozen" else library.put(given)
    with pytest.raises(
        TypeError, match=f"is a float32 {library.kind} of shape .* on device 0; expected an array in main"
    ):
        fastbn.forward(x, **{name: passed})


def test_two_libraries_in_one_call_are_refused(library, rng):
    x, _, gamma, *_ = data(rng, (6, 3, 5), (1,))
    other = next(name for name in library.libraries if name != library.name)
    stranger = Library(other, library.state, **library.libraries).put(gamma)
    with pytest.raises(TypeError, match=f"gamma is a .*; expected a {library.kind} on device 0, like the rest"):
        fastbn.forward(library.put(x), stranger)


def test_numbers_that_are_not_normalized_are_refused(library):
    with pytest.raises(
        TypeError, match=r"moments: x is a int32 .* on device 0; expected float16, bfloat16, float32 or f"
    ):
        fastbn.moments(library.put(np.ones((4, 3), np.int32)))


def test_a_parameter_of_another_shape_is_refused(library, rng):
    x, _, gamma, *_ = data(rng, (6, 3, 5), (1,))
    with pytest.raises(
        ValueError, match=r"forward: beta has shape \(2,\); expected \(3,\), one value for each channel"
    ):
        fastbn.forward(library.put(x), library.put(gamma), library.put(gamma[:2]))


@pytest.mark.parametrize("make", [lambda a: a.astype(np.float16), lambda a: np.repeat(a, 2)[::2]], ids=["half", "gaps"])
def test_other_parameters_are_converted_where_they_are(make, library, rng):
    x, _, gamma, *_ = data(rng, (6, 3, 5), (1,))
    gamma = make(gamma)
    y, _ = fastbn.forward(library.put(x), library.put(gamma))
    assert_near(y.on_host, fastbn.reference.forward(x, gamma)[0], y.on_host.dtype)
    assert library.state.transfers == []


def test_torch_oddities_are_refused(library, rng):
    if library.name != "torch":
        pytest.skip("of PyTorch")
    x = library.put(data(rng, (6, 3, 5), (1,))[0])
    x.requires_grad = True
    with pytest.raises(TypeError, match=r"x is a .*, and it requires a gradient, .*; pass x.detach\(\)"):
        fastbn.forward(x)
    library.libraries["torch"].is_grad_enabled = lambda: False
    assert type(fastbn.forward(x)[0]) is library.type
    x.layout = "sparse_coo"
    with pytest.raises(TypeError, match=r"its layout is sparse_coo; pass x.to_dense\(\)"):
        fastbn.forward(x)
    x.layout, x.negative = "strided", True
    with pytest.raises(TypeError, match=r"pass x.resolve_neg\(\)"):
        fastbn.forward(x)


def test_subclasses_are_refused(library, rng):
    if library.name != "cupy":
        pytest.skip("of CuPy")

    class Distributed(library.type):
        pass

    x = Distributed.__new__(Distributed)
    Array.__init__(x, data(rng, (6, 3, 5), (1,))[0], 0)
    with pytest.raises(TypeError, match=r"a subclass of cupy.ndarray .*; pass x.view\(cupy.ndarray\)"):
        fastbn.moments(x)


def test_in_place(library, rng):
    """out may be x, and dx may be dy or x; a shifted window of either is refused."""
    x, dy, gamma, beta, *_ = data(rng, (6, 3, 5), (1,))
    exact, kept = fastbn.reference.forward(x, gamma, beta)
    wanted = fastbn.reference.backward(dy, kept)
    gamma, beta = library.put(gamma), library.put(beta)
    for target in ("dy", "x"):
        on = {"x": library.put(x.copy()), "dy": library.put(dy.copy())}
        _, saved = fastbn.forward(on["x"], gamma, beta)
        dx, dgamma, _ = fastbn.backward(on["dy"], saved, out=on[target])
        assert dx is on[target]
        assert_near(dx.on_host, wanted[0], x.dtype)
        assert_near(dgamma.on_host, wanted[1], x.dtype)
        if target == "x":
            with pytest.raises(ValueError, match="saved has no x, which `out` overwrote"):
                fastbn.backward(on["dy"], saved)
    big = library.put(np.zeros((7, 3, 5), np.float32))
    window, shifted = big[:6], big[1:]
    window.on_host[...] = x
    with pytest.raises(ValueError, match="forward: out overlaps x in memory without being x"):
        fastbn.forward(window, gamma, beta, out=shifted)
    same = big[:6]
    y, saved = fastbn.forward(window, gamma, beta, out=same)
    assert y is same
    assert_near(y.on_host, exact, x.dtype)
    with pytest.raises(ValueError, match="saved has no x"):
        fastbn.backward(library.put(dy), saved)


def test_out_beside_x_in_one_buffer(library, rng):
    """Interleaved channels: their bounds overlap, and no element does."""
    x, *_ = data(rng, (6, 3, 5), (1,))
    both = library.put(np.zeros((6, 6, 5), np.float32))
    both.on_host[:, :3] = x
    y, _ = fastbn.forward(both[:, :3], out=both[:, 3:])
    assert_near(y.on_host, fastbn.reference.forward(x)[0], x.dtype)
    np.testing.assert_array_equal(both.on_host[:, 3:], y.on_host)


def test_wrong_out_is_refused(library, rng):
    x = library.put(data(rng, (6, 3, 5), (1,))[0])
    with pytest.raises(
        ValueError, match=r"out is a float32 .* of shape \(6, 3\) on device 0; expected .*float32 of shape"
    ):
        fastbn.forward(x, out=library.put(np.zeros((6, 3), np.float32)))
    with pytest.raises(ValueError, match=r"out is a float64 .*; expected .*float32 of shape"):
        fastbn.forward(x, out=library.put(np.zeros((6, 3, 5))))
    same = np.lib.stride_tricks.as_strided(np.zeros(20, np.float32), (6, 3, 5), (0, 20, 4))
    with pytest.raises(ValueError, match=r"out of shape .* has strides .*, under which elements share memory"):
        fastbn.forward(x, out=library.put(same))


def test_gradients_go_where_they_are_told(library, rng):
    """Also into arrays with gaps, and of two channel axes."""
    x, dy, gamma, *_ = data(rng, (6, 3, 5), (0, 1))
    _, saved = fastbn.forward(library.put(x), library.put(gamma), axis=(0, 1))
    kept = fastbn.reference.forward(x, gamma, axis=(0, 1))[1]
    gaps = library.put(np.zeros((6, 6), np.float32))
    out = library.put(np.zeros_like(x)), gaps[:, ::2], library.put(np.zeros((6, 3), np.float32))
    results = fastbn.backward(library.put(dy), saved, out=out)
    for got, given, wanted in zip(results, out, fastbn.reference.backward(dy, kept), strict=True):
        assert got is given
        assert_near(got.on_host, wanted, x.dtype)
    np.testing.assert_array_equal(gaps.on_host[:, 1::2], 0)
    with pytest.raises(ValueError, match=r"out \(dbeta\) overlaps dgamma in memory"):
        fastbn.backward(library.put(dy), saved, out=(None, out[2], out[2]))
    dgamma = fastbn.backward(library.put(dy), saved, need=(False, True, False))[1]
    assert dgamma.on_host.shape == (6, 3)


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 0, 5), (4, 3, 0)])
def test_empty_arrays_reach_no_kernel(shape, library):
    x = library.put(np.ones(shape, np.float32))
    y, saved = fastbn.forward(x)
    dx, dgamma, dbeta = fastbn.backward(x, saved)
    assert (y.on_host.shape, dx.on_host.shape) == (shape, shape)
    np.testing.assert_array_equal(dgamma.on_host, np.zeros(shape[1]))
    np.testing.assert_array_equal(dbeta.on_host, np.zeros(shape[1]))
    assert saved.moments.count == 0 or shape[1] == 0
    np.testing.assert_array_equal(saved.moments.mean.on_host, np.zeros(shape[1]))
    assert library.state.calls == []


def test_a_negative_variance_is_nan_and_nothing_is_waited_for(library, rng):
    x, _, _, _, mean, var = data(rng, (6, 3, 5), (1,))
    var[1] = -1
    y = fastbn.infer(library.put(x), library.put(mean), library.put(var))
    np.testing.assert_array_equal(np.isnan(y.on_host).any((0, 2)), [False, True, False])
    assert library.state.transfers == []


def test_one_value_per_channel_warns(library):
    with pytest.warns(fastbn.OneValueWarning, match=r"one value per channel \(x of shape \(1, 3\)"):
        fastbn.forward(library.put(np.ones((1, 3), np.float32)))


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


def test_numpy_calls_import_no_array_library():
    code = (
        "import sys, numpy, fastbn\n"
        "y, saved = fastbn.forward(numpy.eye(3), [1, 2, 3], numpy.ones(3), out=numpy.empty((3, 3)))\n"
        "fastbn.backward(y, saved); bn = fastbn.BatchNorm(3); bn(y); bn.state_dict(); repr(saved.moments)\n"
        "print(sorted({'cupy', 'torch', 'numba', 'numba.cuda'} & set(sys.modules)))"
    )
    env = {**os.environ, "FASTBN_BACKEND": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "[]", done.stderr


def test_bfloat16_is_as_wide_as_it_seems():
    """Kernels get its bits as int16; the doubles rely on it."""
    assert np.dtype(ml_dtypes.bfloat16).itemsize == arrays.INT16.itemsize


class Twice:
    """Two ranks with the same data."""

    def allgather(self, frame):
        return frame, frame


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
    near = 40 * np.finfo(dtype).eps
    np.testing.assert_allclose(y.on_host, want[:6], atol=near)
    np.testing.assert_allclose(found[0].on_host, wanted[0][:6], atol=near)
    np.testing.assert_allclose(found[3].on_host, wanted[3][:6], atol=near)
    sums = 400 * np.finfo(found[1].on_host.dtype).eps
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
    host, kept = fastbn.forward(x, gamma, beta, weights=np.zeros(6, np.float32), comm=Twice())
    for got, want in zip((dx, dgamma, dbeta), fastbn.backward(dy, kept), strict=True):
        np.testing.assert_allclose(got.on_host, want, rtol=1e-5, atol=1e-5)


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
    "groups by id": lambda _: {"groups": GROUPS["by id"]},
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
