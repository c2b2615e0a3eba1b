"""Arrays of other libraries in main memory: the bits of the NumPy call, as the caller's own kind, without copies."""

import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
from cases import BFLOAT16

import fastbn

SHAPE = (6, 5, 4, 3)


class Torch:
    dtypes = ("float32", "float64", "float16", "bfloat16")

    def __init__(self):
        self.torch = pytest.importorskip("torch")
        self.type = self.torch.Tensor

    def put(self, a):
        if a.dtype == BFLOAT16:
            return self.torch.from_numpy(a.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(a)

    def seen(self, a):
        return a.view(self.torch.int16).numpy().view(BFLOAT16) if a.dtype is self.torch.bfloat16 else a.numpy()

    def address(self, a):
        return a.data_ptr()


class Jax:
    dtypes = ("float32", "float16", "bfloat16")  # float64 only where JAX is told so

    def __init__(self):
        self.jax = pytest.importorskip("jax")
        self.type = self.jax.Array

    def put(self, a):
        return self.jax.numpy.asarray(a)

    def seen(self, a):
        return np.asarray(a)

    def address(self, a):
        return a.unsafe_buffer_pointer()


class Strict:
    dtypes = ("float32", "float64")

    def __init__(self):
        self.xp = pytest.importorskip("array_api_strict")
        self.type = type(self.xp.zeros(1))

    def put(self, a):
        return self.xp.from_dlpack(a)

    def seen(self, a):
        return np.from_dlpack(a)

    def address(self, a):
        return np.from_dlpack(a).ctypes.data


class OnlyDLPack:
    """An array that can do nothing but export itself; its module has from_dlpack, as TensorFlow's and MXNet's have."""

    dtypes = ("float32", "float64", "float16")

    class Array:
        def __init__(self, memory):
            self.memory, self.dtype, self.shape = memory, memory.dtype, memory.shape

        def __dlpack__(self, **how):
            return self.memory.__dlpack__(**how)

        def __dlpack_device__(self):
            return self.memory.__dlpack_device__()

    def __init__(self):
        self.type = self.Array

    def put(self, a):
        return self.Array(a)

    def seen(self, a):
        return a.memory

    def address(self, a):
        return a.memory.ctypes.data


def from_dlpack(a):  # of OnlyDLPack's module, which is this one
    return OnlyDLPack.Array(a)


@pytest.fixture(params=[Torch, Jax, Strict, OnlyDLPack], ids=lambda kind: kind.__name__)
def library(request, monkeypatch):
    monkeypatch.setitem(sys.modules, __name__.partition(".")[0], sys.modules[__name__])
    return request.param()


def data(rng, dtype=np.float32, shape=SHAPE):
    x, dy = (rng.normal(3, 2, shape).astype(dtype) for _ in range(2))
    gamma, beta, mean = (rng.normal(1, 2, shape[1]).astype(np.float32) for _ in range(3))
    return x, dy, gamma, beta, mean, rng.uniform(0.5, 2, shape[1]).astype(np.float32)


def same(library, got, wanted):
    assert isinstance(got, library.type)
    seen = library.seen(got)
    assert seen.dtype == wanted.dtype
    np.testing.assert_array_equal(seen, wanted)


@pytest.fixture(params=["float32", "float64", "float16", "bfloat16"])
def dtype(library, request):
    if request.param not in library.dtypes:
        pytest.skip("the library has no such type, or NumPy can't read it")
    return BFLOAT16 if request.param == "bfloat16" else np.dtype(request.param)


@pytest.mark.parametrize("own", [True, False], ids=["own parameters", "NumPy parameters"])
def test_the_bits_of_the_numpy_call_as_the_callers_kind(library, dtype, own, rng):
    x, dy, gamma, beta, mean, var = data(rng, dtype)
    put = library.put if own else lambda a: a
    for frozen in (None, (mean, var)):
        y, saved = fastbn.forward(x, gamma, beta, frozen=frozen)
        results = y, *fastbn.backward(dy, saved)
        given = None if frozen is None else tuple(put(a) for a in frozen)
        got_y, kept = fastbn.forward(library.put(x), put(gamma), put(beta), frozen=given)
        for got, wanted in zip((got_y, *fastbn.backward(library.put(dy), kept)), results, strict=True):
            same(library, got, wanted)
    same(library, fastbn.infer(library.put(x), put(mean), put(var), put(gamma), put(beta)), y)
    found, wanted = fastbn.moments(library.put(x)), fastbn.moments(x)
    assert type(found.mean) is type(kept._table) is np.ndarray  # moments of arrays in main memory are NumPy's
    np.testing.assert_array_equal(found.mean, wanted.mean)
    np.testing.assert_array_equal(found.m2, wanted.m2)


def test_nothing_of_xs_size_is_copied(library, rng, monkeypatch):
    """The kernel reads the caller's memory, and the caller gets the memory that it wrote."""
    from fastbn.kernels import cpu

    x, dy = (library.put(a) for a in data(rng)[:2])
    touched = []
    forward, backward = cpu.forward, cpu.backward

    def watch(x, y, *rest):
        touched.append([x.ctypes.data, y.ctypes.data])
        forward(x, y, *rest)

    def watch_back(dy, x, dx, *rest):
        touched.append([dy.ctypes.data, x.ctypes.data, dx.ctypes.data])
        backward(dy, x, dx, *rest)

    monkeypatch.setattr(cpu, "forward", watch)
    monkeypatch.setattr(cpu, "backward", watch_back)
    y, saved = fastbn.forward(x)
    dx, _, _ = fastbn.backward(dy, saved)
    assert touched == [[library.address(a) for a in arrays] for arrays in ((x, y), (dy, x, dx))]


@pytest.mark.parametrize("own", [True, False], ids=["own parameters", "NumPy parameters"])
def test_second_order_as_the_callers_kind(library, dtype, own, rng):
    x, dy, gamma, beta, mean, var = data(rng, dtype)
    u = rng.normal(1, 2, SHAPE).astype(dtype)
    put = library.put if own else lambda a: a
    for frozen in (None, (mean, var)):
        with fastbn.set_backend("reference"):
            _, saved = fastbn.forward(x, gamma, beta, frozen=frozen)
            _, kept = fastbn.forward(library.put(x), put(gamma), put(beta), frozen=frozen)
            wanted = fastbn.jvp(u, saved, gamma, beta), *fastbn.backward_backward(u, gamma, beta, dy, saved)
            second = fastbn.backward_backward(library.put(u), put(gamma), put(beta), library.put(dy), kept)
            results = fastbn.jvp(library.put(u), kept, put(gamma), put(beta)), *second
            for got, value in zip(results, wanted, strict=True):
                same(library, got, value)
            same(library, fastbn.jvp(None, kept, gamma), fastbn.jvp(None, saved, gamma))
    gx, ggamma, gdy = fastbn.backward_backward(
        library.put(u), None, None, library.put(dy), kept, need=(False, True, False)
    )
    assert gx is gdy is None
    assert isinstance(ggamma, library.type)


def test_second_order_copies_nothing_of_xs_size(library, rng, monkeypatch):
    from fastbn.kernels.cpu import second

    x, u, dy = (library.put(rng.normal(3, 2, SHAPE).astype(np.float32)) for _ in range(3))
    touched, whole = [], second.second

    def watch(u, g, x, r, z, *rest):
        touched.append([None if a is None else a.ctypes.data for a in (u, g, x, r, z)])
        return whole(u, g, x, r, z, *rest)

    monkeypatch.setattr(second, "second", watch)
    _, saved = fastbn.forward(x)
    y_t = fastbn.jvp(u, saved)
    gx, _, gdy = fastbn.backward_backward(u, None, None, dy, saved)
    expected = (u, None, x, y_t, None), (u, dy, x, gdy, gx)
    assert touched == [[None if a is None else library.address(a) for a in arrays] for arrays in expected]


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_parameters_of_any_library_with_numpys_x(library, name, rng):
    x, _, gamma, *_ = data(rng)
    y, _ = fastbn.forward(x, **{name: library.put(gamma)})
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, fastbn.forward(x, **{name: gamma})[0])


def test_results_go_where_out_says(library, rng):
    if isinstance(library, Jax):
        pytest.skip("immutable")
    x, dy, gamma, *_ = data(rng)
    places = [library.put(np.full(shape, 7, np.float32)) for shape in (SHAPE, SHAPE, 5, 5)]
    y, saved = fastbn.forward(library.put(x), gamma, out=places[0])
    results = y, *fastbn.backward(library.put(dy), saved, out=tuple(places[1:]))
    wanted_y, wanted = fastbn.forward(x, gamma)
    for got, place, value in zip(results, places, (wanted_y, *fastbn.backward(dy, wanted)), strict=True):
        assert got is place
        same(library, got, value)
    assert fastbn.infer(library.put(x), gamma, gamma**2, out=places[0]) is places[0]


def test_second_order_goes_where_out_says(library, rng):
    x, dy, gamma, *_ = data(rng)
    u = rng.normal(1, 2, SHAPE).astype(np.float32)
    places = [library.put(np.full(shape, 7, np.float32)) for shape in (SHAPE, SHAPE, 5, SHAPE)]
    _, saved = fastbn.forward(x, gamma)
    _, kept = fastbn.forward(library.put(x), gamma)
    given = library.put(u), gamma, None, library.put(dy), kept
    if isinstance(library, Jax):
        with pytest.raises(
            TypeError, match=r"fastbn\.jvp: out is given, but JAX arrays are never written to; expected"
        ):
            fastbn.jvp(given[0], kept, out=places[0])
        for k, name in enumerate(("gx", "ggamma", "gdy")):
            out = [p if k == i else None for i, p in enumerate(places[1:])]
            with pytest.raises(TypeError, match=rf"fastbn\.backward_backward: out \({name}\) is given, but JAX arrays"):
                fastbn.backward_backward(*given, out=out)
        return
    results = fastbn.jvp(given[0], kept, gamma, out=places[0]), *fastbn.backward_backward(*given, out=places[1:])
    wanted = fastbn.jvp(u, saved, gamma), *fastbn.backward_backward(u, gamma, None, dy, saved)
    for got, place, value in zip(results, places, wanted, strict=True):
        assert got is place
        same(library, got, value)
    gx, ggamma, gdy = fastbn.backward_backward(*given, out=(given[0], None, None))  # over its own argument
    assert gx is given[0]
    for got, value in zip((gx, ggamma, gdy), wanted[1:], strict=True):
        same(library, got, value)


def test_second_order_doesnt_mix_libraries(library, rng):
    x, dy, *_ = data(rng)
    _, saved = fastbn.forward(x)
    _, kept = fastbn.forward(library.put(x))
    for wrong, right, of, kind in ((dy, library.put(dy), kept, ".*"), (library.put(dy), dy, saved, "NumPy array")):
        says = rf"is a float32 .* of shape \(6, 5, 4, 3\); expected a {kind}, like x\. Convert it"
        with pytest.raises(TypeError, match=r"fastbn\.jvp: x_t " + says):
            fastbn.jvp(wrong, of)
        with pytest.raises(TypeError, match="backward_backward: ddx " + says):
            fastbn.backward_backward(wrong, None, None, right, of)
        with pytest.raises(TypeError, match="backward_backward: dy " + says):
            fastbn.backward_backward(right, None, None, wrong, of)
        with pytest.raises(TypeError, match=r"fastbn\.jvp: out (is given, but JAX|" + says + ")"):
            fastbn.jvp(right, of, out=wrong)


def test_what_a_call_may_ask_for_more(library, rng):
    """Weights, groups, a residual and its gradient, whole numbers."""
    x, dy, gamma, *_ = data(rng)
    weights, groups = rng.integers(0, 3, 6).astype(np.float32), np.int64([0, 1, 1, 0, 2, 2])
    put = library.put
    for more in ({"weights": weights}, {"groups": groups}, {"residual": dy}):
        with fastbn.set_backend("reference"):
            y, saved = fastbn.forward(x, gamma, activation="relu", **more)
            wanted = y, *fastbn.backward(dy, saved)
            y, saved = fastbn.forward(put(x), gamma, activation="relu", **{k: put(a) for k, a in more.items()})
            for got, value in zip((y, *fastbn.backward(put(dy), saved)), wanted, strict=True):
                same(library, got, value)
    counts = rng.integers(0, 255, SHAPE).astype(np.uint8)
    with fastbn.set_backend("reference"):
        same(library, fastbn.forward(put(counts), gamma)[0], fastbn.forward(counts, gamma)[0])


def test_what_is_not_needed_is_none(library, rng):
    x, dy, *_ = data(rng)
    _, saved = fastbn.forward(library.put(x))
    dx, dgamma, dbeta = fastbn.backward(library.put(dy), saved, need=(False, True, False))
    assert dx is dbeta is None
    assert isinstance(dgamma, library.type)


def test_libraries_are_not_mixed(library, rng):
    """x, dy and out are of one library: the results' kind is never a guess."""
    x, dy, *_ = data(rng)
    _, saved = fastbn.forward(library.put(x))
    with pytest.raises(TypeError, match=r"dy is a float32 array of shape \(6, 5, 4, 3\); expected a .*, like x"):
        fastbn.backward(dy, saved)
    _, saved = fastbn.forward(x)
    with pytest.raises(TypeError, match=r"dy is a float32 .* of shape \(6, 5, 4, 3\); expected a NumPy array"):
        fastbn.backward(library.put(dy), saved)
    out = np.empty(SHAPE, np.float32)
    with pytest.raises(TypeError, match=r"forward: out is a float32 .*; expected a NumPy array, like x"):
        fastbn.forward(x, out=library.put(out))
    with pytest.raises(TypeError, match=r"infer: out is (given, but JAX|a float32 array .*; expected a .*, like x)"):
        fastbn.infer(library.put(x), np.ones(5), np.ones(5), out=out)
    _, saved = fastbn.forward(library.put(x))
    with pytest.raises(TypeError, match=r"backward: out \(dgamma\) is (given, but JAX|a float32 array .*; expected a)"):
        fastbn.backward(library.put(dy), saved, out=(None, out[0, :, 0, 0].copy(), None))


def test_what_is_wrong_is_named_as_for_numpy(library, rng):
    x, dy, gamma, *_ = data(rng)
    with pytest.raises(ValueError, match=r"gamma has shape \(4,\); expected \(5,\)"):
        fastbn.forward(library.put(x), library.put(gamma[:4].copy()))
    _, saved = fastbn.forward(library.put(x))
    with pytest.raises(ValueError, match=r"dy is a float32 .* of shape \(3, 5, 4, 3\); expected float32 of sh"):
        fastbn.backward(library.put(dy[:3].copy()), saved)
    with pytest.raises(ValueError, match=r"x has shape \(5,\); expected at least two axes"):
        fastbn.moments(library.put(gamma))
    with pytest.raises(TypeError, match=r"x is a complex64 array of shape"):
        fastbn.moments(library.put(x.astype(np.complex64)))


def test_the_layer(library, rng):
    """Parameters and statistics are NumPy's; y and dx are of x's library."""
    x, dy, *_ = data(rng)
    ours, plain = fastbn.BatchNorm(5, accumulate=True), fastbn.BatchNorm(5, accumulate=True)
    for bn in (ours, plain):
        bn.gamma[...] = np.arange(1, 6)
    for _ in range(2):
        same(library, ours(library.put(x)), plain(x))
        same(library, ours.backward(library.put(dy)), plain.backward(dy))
        np.testing.assert_array_equal(ours.dgamma, plain.dgamma)
    assert type(ours.dgamma) is type(ours.running.mean) is np.ndarray
    ours.eval(), plain.eval()
    same(library, ours(library.put(x)), plain(x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_recalibrate_reads_one_array_piece_by_piece_where_it_lies(library, dtype, rng, monkeypatch):
    if dtype == "bfloat16" and dtype not in library.dtypes:
        pytest.skip("NumPy can't read the library's bfloat16")
    x = rng.uniform(0, 200, SHAPE).astype(BFLOAT16 if dtype == "bfloat16" else dtype)
    units = {"scale": 0.25, "zero_point": 7} if dtype == "uint8" else {}
    module, read = sys.modules["fastbn.recalibrate"], []

    def watch(piece, **how):
        read.append((type(piece), piece.shape[0], piece.ctypes.data))
        return fastbn.moments(piece, **how)

    monkeypatch.setattr(module, "moments", watch)
    given = library.put(x)
    found, start = fastbn.recalibrate(given, 5, chunk=4, **units), library.address(given)
    assert read == [(np.ndarray, 4, start), (np.ndarray, 2, start + 4 * x[0].nbytes)]
    np.testing.assert_allclose(found.exact(), fastbn.moments(x, **units).exact(), rtol=1e-13)


def test_recalibrate_of_batches(library, rng):
    x = data(rng)[0]
    found = fastbn.recalibrate([library.put(x[:4].copy()), library.put(x[4:].copy())], 5)
    np.testing.assert_allclose(found.exact(), fastbn.moments(x).exact(), rtol=1e-13)
    with pytest.raises(ValueError, match=r"recalibrate: x has shape \(6,\); expected at least two axes"):
        fastbn.recalibrate(library.put(x[:, 0, 0, 0].copy()), 5)


class Described:
    """`__array_interface__` and nothing else: there is no way to make another, so results are NumPy's."""

    def __init__(self, memory):
        self.__array_interface__ = memory.__array_interface__
        self.memory = memory


def test_an_array_interface_alone(rng):
    x, dy, *_ = data(rng)
    wanted_y, wanted = fastbn.forward(x)
    y, saved = fastbn.forward(Described(x))
    dx, *_ = fastbn.backward(Described(dy), saved)
    assert type(y) is type(dx) is np.ndarray
    np.testing.assert_array_equal(y, wanted_y)
    np.testing.assert_array_equal(dx, fastbn.backward(dy, wanted)[0])
    found = fastbn.recalibrate(Described(x), 5, chunk=4)
    np.testing.assert_allclose(found.exact(), wanted.moments.exact(), rtol=1e-13)


def test_ml_dtypes_are_numpys(rng):
    x = data(rng, BFLOAT16)[0]
    y, _ = fastbn.forward(x)
    assert type(y) is np.ndarray
    assert y.dtype == BFLOAT16


# PyTorch's memory formats: y and dx lie as x does.
FORMATS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=import_module("torch").channels_last),
    "transposed": lambda t: t.permute(3, 1, 2, 0),
    "every other": lambda t: t[:, :, ::2],
    "expanded": lambda t: t[:1].expand(6, 5, 4, 3),  # PyTorch makes results of it contiguous, NumPy in stride order
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_memory_formats(form, dtype, rng):
    torch = pytest.importorskip("torch")
    x, dy, gamma, *_ = data(rng, BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype))
    x, dy = form(Torch().put(x)), form(Torch().put(dy))
    y, saved = fastbn.forward(x, gamma)
    dx, *_ = fastbn.backward(dy, saved)
    wanted_y, wanted = fastbn.forward(Torch().seen(x), gamma)
    same(Torch(), y, wanted_y)
    same(Torch(), dx, fastbn.backward(Torch().seen(dy), wanted)[0])
    assert y.stride() == dx.stride() == tuple(s // x.element_size() for s in wanted_y.strides)
    assert y.stride() == torch.empty_like(x).stride() or x.stride()[0] == 0


def test_bfloat16_parameters(rng):
    x, _, gamma, *_ = data(rng)
    gamma = gamma.astype(BFLOAT16)
    y, _ = fastbn.forward(Torch().put(x), Torch().put(gamma))
    same(Torch(), y, fastbn.forward(x, gamma)[0])


def test_tensors_that_autograd_watches(rng):
    """As on CUDA: refused, as the gradient would be lost in silence; taken where autograd is off."""
    torch = pytest.importorskip("torch")
    x, dy, gamma, *_ = data(rng)
    watched = torch.tensor(x, requires_grad=True)
    says = r"is a float32 PyTorch tensor of shape \(.*\), and it requires a gradient.*pass {0}\.detach\(\), or call"
    with pytest.raises(TypeError, match="forward: x " + says.format("x")):
        fastbn.forward(watched)
    with pytest.raises(TypeError, match="gamma " + says.format("gamma")):
        fastbn.forward(torch.tensor(x), torch.nn.Parameter(torch.tensor(gamma)))
    with pytest.raises(TypeError, match="recalibrate: batches " + says.format("batches")):
        fastbn.recalibrate(watched, 5)
    _, saved = fastbn.forward(torch.tensor(x))
    with pytest.raises(TypeError, match="dy " + says.format("dy")):
        fastbn.backward(torch.tensor(dy, requires_grad=True), saved)
    with torch.no_grad():
        y, _ = fastbn.forward(watched)
    np.testing.assert_array_equal(y.numpy(), fastbn.forward(x)[0])


def test_tensors_that_have_no_plain_memory(rng):
    torch = pytest.importorskip("torch")
    x = torch.tensor(data(rng)[0])
    refused = {
        r"its layout is torch\.sparse_coo; pass x\.to_dense\(\)": x.to_sparse(),
        r"its device is meta, neither the CPU nor CUDA; pass x\.cpu\(\)": x.to("meta"),
        r"its sign is kept apart from its memory; pass x\.resolve_neg\(\)": torch._neg_view(x),
    }
    for match, wrong in refused.items():
        with pytest.raises(TypeError, match=match):
            fastbn.forward(wrong)
    seen = []

    def one(values):
        with pytest.raises(TypeError, match=r"which NumPy can't read in place: .* Pass a NumPy array"):
            fastbn.forward(values)
        seen.append(values)
        return values

    torch.vmap(one)(x)
    assert seen


def test_bfloat16_without_ml_dtypes(monkeypatch, rng):
    from fastbn import host

    x = Torch().put(data(rng, BFLOAT16)[0])
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    host._bfloat16.cache_clear()
    with pytest.raises(TypeError, match=r"x is a bfloat16 PyTorch tensor .* pip install ml_dtypes"):
        fastbn.forward(x)


def test_traced_values_and_out_of_jax(rng):
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray(data(rng)[0])
    with pytest.raises(TypeError, match=r"x is a float32 JAX array .*, and it is traced .* call fastbn\.jax\.batch"):
        jax.jit(lambda x: fastbn.forward(x)[0])(x)
    with pytest.raises(TypeError, match=r"forward: out is given, but JAX arrays are never written to"):
        fastbn.forward(x, out=x)


def test_looking_imports_nothing():
    code = """
import sys, numpy as np, fastbn
class Array:
    def __dlpack__(self, **how): return np.zeros((2, 3), np.float32).__dlpack__(**how)
    def __dlpack_device__(self): return (1, 0)
y, saved = fastbn.forward(Array())
assert type(y) is np.ndarray
for name in ("torch", "jax", "ml_dtypes", "cupy"):
    assert name not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_residual_of_pytorch_that_is_overwritten(rng):
    torch = pytest.importorskip("torch")
    x, r = torch.from_numpy(rng.normal(1, 2, (2, 6, 4)).astype(np.float32))
    _, saved = fastbn.forward(x, residual=r, activation="silu")
    fastbn.backward(x, saved, out=(torch.empty_like(x), None, None))
    fastbn.backward(x, saved, out=(None, None, None, r))
    with pytest.raises(ValueError, match="saved has no residual"):
        fastbn.backward(x, saved)
    _, saved = fastbn.forward(x, residual=r, activation="silu", out=r)
    with pytest.raises(ValueError, match="saved has no residual"):
        fastbn.backward(x, saved)
