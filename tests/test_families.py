"""Arrays of other libraries, on doubles of CuPy and PyTorch: results, places, layouts, errors."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from cases import BFLOAT16, CASES, eps
from device_doubles import Array
from families import Library, assert_near, data, sizes

import fastbn
from fastbn import arrays

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
