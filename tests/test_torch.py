"""fastbn.torch: the operators, the function and the modules beside PyTorch's own."""

import copy
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fastbn.bench.torch_training import compare  # noqa: E402

import fastbn  # noqa: E402
from fastbn.extras import check_activation  # noqa: E402

ours = pytest.importorskip("fastbn.torch")

nn, F = torch.nn, torch.nn.functional
SHAPES = {1: (6, 5, 7), 2: (6, 5, 4, 3), 3: (4, 5, 2, 3, 4)}
THEIRS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
OURS = {1: ours.BatchNorm1d, 2: ours.BatchNorm2d, 3: ours.BatchNorm3d}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


def tensors(shape=SHAPES[2], dtype=torch.float64):
    """x, and by channel weight, bias, mean and var."""
    channels = shape[1]
    x = (2 * torch.randn(shape, dtype=torch.float64) + 3).to(dtype)
    small = [torch.randn(channels, dtype=torch.float64) + 1 for _ in range(3)]
    return x, *small, torch.rand(channels, dtype=torch.float64) + 0.5


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # PyTorch's check, of a view
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["training", "evaluation"])
def test_opcheck(frozen, dtype, form):
    """PyTorch's own checks of a custom operator: schema, autograd, fake tensors' shapes and strides, AOT dispatch."""
    x, weight, bias, mean, var = tensors(dtype=dtype)
    x = x.contiguous(memory_format=form).requires_grad_()
    weight, bias = (a.float().requires_grad_() for a in (weight, bias))
    statistics = (mean, var) if frozen else (None, None)
    args = (x, weight, bias, *statistics, 1e-3)
    found = torch.library.opcheck(torch.ops.fastbn.forward.default, args, test_utils=OPCHECKS)
    assert set(found.values()) == {"SUCCESS"}
    y, table = (a.detach() for a in torch.ops.fastbn.forward(*args))
    back = torch.ops.fastbn.backward.default
    for need in ([True] * 3, [False, True, False], [True, False, False]):
        args = (torch.randn_like(y), x.detach(), table, weight.detach(), frozen, need)
        found = torch.library.opcheck(back, args, test_utils=OPCHECKS)
        assert set(found.values()) == {"SUCCESS"}
        ddx, small = torch.randn_like(y), torch.randn(2, len(weight), dtype=y.dtype if y.itemsize == 8 else None)
        args = (ddx if need[0] else None, *small, torch.randn_like(y), x.detach(), table, frozen, need)
        found = torch.library.opcheck(torch.ops.fastbn.backward_backward.default, args, test_utils=OPCHECKS)
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training):
    x, weight, bias, mean, var = tensors((4, 3, 2, 3))
    for a in (x, weight, bias):
        a.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w, b: ours.batch_norm(x, mean.clone(), var.clone(), w, b, training, 0.1, 1e-3), (x, weight, bias)
    )


@pytest.mark.parametrize("training", [True, False])
def test_gradgradcheck(training):
    x, weight, bias, mean, var = tensors((4, 3, 2, 3))
    for a in (x, weight, bias):
        a.requires_grad_()

    def normalize(x, w, b):
        return ours.batch_norm(x, mean.clone(), var.clone(), w, b, training, 0.1, 1e-3)

    assert torch.autograd.gradgradcheck(normalize, (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda x: ours.batch_norm(x, mean, var, None, None, training), (x,))
    assert torch.autograd.gradgradcheck(lambda w: normalize(x.detach(), w, bias.detach()), (weight,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_gradient_penalty_trains_as_with_pytorch(form, dtype):
    """The parameters' gradients of |dL/dx|^2, beside PyTorch's float64."""
    x, weight, bias, _, _ = tensors(dtype=dtype)
    x, dy = x.contiguous(memory_format=form), torch.randn_like(x)
    weight, bias = weight.to(dtype), bias.to(dtype)
    results = []
    for ours_ in (True, False):
        given = [a.detach().to(a.dtype if ours_ else torch.float64).requires_grad_() for a in (x, weight, bias)]
        run = ours.batch_norm if ours_ else nn.functional.batch_norm
        y = run(given[0], None, None, *given[1:], training=True, eps=1e-3)
        (dx,) = torch.autograd.grad(y, given[0], dy.to(y.dtype), create_graph=True)
        (dx * dx).sum().backward()
        assert given[0].grad.stride() == given[0].stride()
        results.append([a.grad for a in given[:2]])
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == dtype
        # dx itself, rounded to its dtype, goes into the second pass
        error = (got.double() - wanted).abs().max() / wanted.abs().max()
        assert error <= 4 * torch.finfo(dtype).eps


def test_third_derivatives_and_those_of_activations_are_refused():
    x = tensors()[0].requires_grad_()
    y = ours.batch_norm(x, None, None, training=True)
    (dx,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (dxx,) = torch.autograd.grad((dx**2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"a third derivative of batch norm is asked for"):
        dxx.sum().backward()
    y = ours.batch_norm(x, None, None, training=True, activation="silu")
    (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"of batch norm with activation='silu' is asked for"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_eager_calls_give_the_operators_bits(training, form, dtype, monkeypatch):
    """Plain tensors go around PyTorch's dispatcher; modes and subclasses meet the operator."""
    x, weight, bias, mean, var = tensors(dtype=dtype)
    x = x.contiguous(memory_format=form)
    dy = torch.randn_like(x)
    results = []
    for plain in (True, False):
        if not plain:
            monkeypatch.setattr(ours, "_is_plain", lambda *_: False)
        given = [a.clone().requires_grad_() for a in (x, weight, bias)]
        running = mean.float(), var.float()
        y = ours.batch_norm(given[0], *running, *given[1:], training, 0.3, 1e-3)
        assert ("_Eager" in y.grad_fn.name()) is plain
        y.backward(dy)
        results.append((y.detach(), *running, *[a.grad for a in given]))
    for k, (got, wanted) in enumerate(zip(*results, strict=True)):
        assert got.dtype == wanted.dtype
        assert got.stride() == wanted.stride()
        if k in (1, 2):  # running statistics, mixed by other functions in float64 and rounded to float32
            near(got, wanted, torch.float32)
        else:
            assert torch.equal(got, wanted)


def test_a_trace_has_the_operator():
    x, weight, bias, *_ = tensors()

    def loss(x):
        return (ours.batch_norm(x, None, None, weight, bias, training=True) ** 3).sum()

    graph = torch.fx.experimental.proxy_tensor.make_fx(loss)(x)
    assert "fastbn.forward" in graph.code
    near(graph(x + 1), loss(x + 1), torch.float64)


# Relative to max(1, |value|), against PyTorch's float64 on the same numbers: half types round once, by half an eps of
# 2^-7 and 2^-10; float32 has sums of some hundred terms.
NEAR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def near(got, wanted, dtype):
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).abs() / wanted.double().abs().clamp(min=1)
    assert error.max() <= NEAR[dtype], error.max()


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_modules_are_pytorchs(dims, momentum, affine, track):
    """Three batches in training and one in evaluation: y, gradients, and every entry of state_dict."""
    options = {
        "eps": 1e-3,
        "momentum": momentum,
        "affine": affine,
        "track_running_stats": track,
        "dtype": torch.float64,
    }
    theirs, mine = THEIRS[dims](5, **options), OURS[dims](5, **options)
    if affine:
        nn.init.normal_(theirs.weight), nn.init.normal_(theirs.bias)
    mine.load_state_dict(theirs.state_dict())
    assert isinstance(mine, THEIRS[dims])
    assert repr(mine) == repr(theirs)
    for training in (True, True, True, False):
        x = tensors(SHAPES[dims])[0]
        xs = x.clone().requires_grad_(), x.clone().requires_grad_()
        dy = torch.randn_like(x)
        for module, given in zip((theirs.train(training), mine.train(training)), xs, strict=True):
            module.zero_grad()
            module(given).backward(dy)
        near(mine(x), theirs(x), torch.float64)
        near(xs[1].grad, xs[0].grad, torch.float64)
        for got, wanted in zip(mine.parameters(), theirs.parameters(), strict=True):
            near(got.grad, wanted.grad, torch.float64)
        assert list(mine.state_dict()) == list(theirs.state_dict())
        for name, value in theirs.state_dict().items():
            if value.is_floating_point():
                near(mine.state_dict()[name], value, torch.float64)
            else:
                assert mine.state_dict()[name] == value


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32 parameters", "bfloat16 parameters"])
def test_types(dtype, kind):
    """Gradients of parameters come in the parameters' type, whatever x is."""
    if kind is torch.bfloat16 and dtype is not kind:
        pytest.skip("a pair that PyTorch's own does not take")
    x, *small = tensors(dtype=dtype)
    kind = torch.float64 if dtype is torch.float64 else kind
    weight, bias, mean, var = (a.to(kind) for a in small)
    results = []
    for function, as_given in ((F.batch_norm, lambda a: a.detach().double().clone()), (ours.batch_norm, torch.clone)):
        given = [as_given(a).requires_grad_() for a in (x, weight, bias)]
        running = as_given(mean).clone(), as_given(var).clone()
        y = function(given[0], *running, *given[1:], True, 0.3, 1e-3)
        y.backward(as_given(x))
        results.append((y, *running, *[a.grad for a in given]))
    for got, wanted, to in zip(results[1], results[0], (dtype, kind, kind, dtype, kind, kind), strict=True):
        near(got, wanted, to)


def test_memory_format_is_kept():
    x = tensors(dtype=torch.float32)[0].contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ours.BatchNorm2d(5)(x)
    (dx,) = torch.autograd.grad(y.sum(), x)  # dy is one number, expanded
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_compile_keeps_the_operators(training, momentum, backend):
    """In one graph, with the running statistics and the count of batches; PyTorch's own breaks it at momentum=None."""
    torch._dynamo.reset()
    graphs = []

    def watch(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    module = ours.BatchNorm2d(5, momentum=momentum).train(training)
    nn.init.normal_(module.weight)
    other = copy.deepcopy(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's own
        compiled = torch.compile(module, fullgraph=True, backend=watch)
        for _ in range(2):
            x = tensors(dtype=torch.float32)[0]
            xs = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, wanted = compiled(xs[0]), other(xs[1])
            y.backward(x), wanted.backward(x)
            assert torch.equal(y, wanted)
            assert torch.equal(xs[0].grad, xs[1].grad)
    assert torch.equal(module.weight.grad, other.weight.grad)
    for name, value in other.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    assert len(graphs) == 1
    assert "fastbn.forward" in graphs[0].code


def test_a_sign_that_is_kept_apart_from_memory():
    """As the imaginary part of a conjugate has it: its memory holds the opposite."""
    torch.manual_seed(3)
    values = torch.complex(torch.randn(6, 3, 5), 2 + torch.randn(6, 3, 5))
    module, results = fastbn.torch.BatchNorm1d(3), []
    with torch.no_grad():
        module.weight.normal_(1, 0.5)
        module.bias.normal_()
    for conjugate in (values.conj(), values.conj().resolve_conj()):
        x = conjugate.imag.detach().requires_grad_()
        y = module(x)
        dy = torch.complex(torch.ones_like(y), x.detach() ** 2).conj()
        y.backward(dy.imag if conjugate.is_conj() else dy.imag.resolve_neg())
        results.append((y.detach(), x.grad))
        module.reset_running_stats()
    assert values.conj().imag.is_neg()
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_shapes_without_values():
    module = fastbn.torch.BatchNorm2d(3).to("meta")
    y = module(torch.empty(2, 3, 4, 5, device="meta"))
    assert (y.shape, y.device.type) == ((2, 3, 4, 5), "meta")


def test_wrong_arguments():
    x, *_ = tensors()
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        ours.BatchNorm2d(5)(x[0])
    with pytest.raises(ValueError, match=r"batch_norm: one value per channel in training \(input of shape \(1, 5\)\)"):
        ours.BatchNorm1d(5)(torch.ones(1, 5))
    with pytest.raises(ValueError, match=r"running_mean or running_var is None, and training is False"):
        ours.batch_norm(x, None, None)
    with pytest.raises(
        ValueError, match=r"input is a float64 PyTorch tensor of shape \(3,\); expected at least two axes"
    ):
        ours.batch_norm(x[0, 0, 0], None, None, training=True)
    with pytest.raises(ValueError, match=r"gamma has shape \(4,\); expected \(5,\)"):
        ours.batch_norm(x, None, None, torch.ones(4), training=True)
    with pytest.raises(TypeError, match=r"x is a int64 array"):
        ours.batch_norm(x.long(), None, None, training=True)


def test_an_empty_batch_changes_nothing():
    module = ours.BatchNorm2d(5)
    before = copy.deepcopy(module.state_dict())
    x = torch.empty(0, 5, 4, 3, requires_grad=True)
    module(x).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(module.running_mean, before["running_mean"])
    assert torch.equal(module.running_var, before["running_var"])


def test_autograd_sees_running_statistics_change():
    """They are written by NumPy, which has no part in how autograd counts what is written."""
    module, weight = ours.BatchNorm2d(5), torch.ones(5, requires_grad=True)
    x, *_ = tensors(dtype=torch.float32)
    for running in (module.running_mean, module.running_var):
        before, products = running.clone(), (running * weight).sum()
        module(x)
        assert not torch.equal(running, before)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
            products.backward()


def test_convert_and_revert():
    """The same module objects, with their parameters, hooks, modes and whatever else they have."""

    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Sequential(nn.BatchNorm2d(5, momentum=0.3)), Own(5))
    model[2].eval()
    inner, calls = model[2][0], []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    modules, parameters = list(model.modules()), list(model.parameters())
    state = copy.deepcopy(model.state_dict())
    assert ours.convert(model) is model
    assert [type(m) for m in (model[1], inner, model[3])] == [ours.BatchNorm2d, ours.BatchNorm2d, Own]
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [inner.training, model[1].training, inner.momentum] == [False, True, 0.3]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    model(torch.randn(2, 3, 6, 6))
    assert calls == [1]
    assert int(model[1].num_batches_tracked) == 1
    copied = copy.deepcopy(model)
    ours.revert(model)
    assert [type(m) for m in (model[1], inner, model[3])] == [nn.BatchNorm2d, nn.BatchNorm2d, Own]
    assert type(copied[1]) is ours.BatchNorm2d
    assert type(ours.convert(nn.BatchNorm3d(2))) is ours.BatchNorm3d


ACTIVATIONS = {
    "relu": nn.ReLU(inplace=True),
    "leaky_relu": nn.LeakyReLU(0.2),
    "relu6": nn.ReLU6(),
    "elu": nn.ELU(0.7),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "hardswish": nn.Hardswish(),
}


@pytest.mark.parametrize("mode", ["eager", "operator", "compiled"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fused_activations(name, training, mode, monkeypatch):
    """As the two modules one behind the other, in both layouts; gradients too. Kernels are compiled for two of them."""
    kernels = "auto" if name in ("relu", "leaky_relu") else "reference"
    theirs = nn.Sequential(nn.BatchNorm2d(5, dtype=torch.float64), copy.deepcopy(ACTIVATIONS[name]))
    nn.init.normal_(theirs[0].weight), nn.init.normal_(theirs[0].bias)
    mine = ours.convert(copy.deepcopy(theirs), fuse=True)
    assert repr(mine[1]) == f"Fused({type(theirs[1]).__name__})"
    assert f"activation={mine[0].activation!r}" in repr(mine[0])
    assert name in str(mine[0].activation)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    if mode == "operator":
        monkeypatch.setattr(ours, "_is_plain", lambda *_: False)
    torch._dynamo.reset()
    run = torch.compile(mine, fullgraph=True, backend="aot_eager") if mode == "compiled" else mine
    with fastbn.set_backend(kernels), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's own
        for form in (torch.contiguous_format, torch.channels_last):
            x = tensors()[0].contiguous(memory_format=form)
            dy = torch.randn_like(x)
            xs = x.clone().requires_grad_(), x.clone().requires_grad_()
            results = []
            for module, given in zip((theirs.train(training), run.train(training)), xs, strict=True):
                module.zero_grad()
                y = module(given)
                y.backward(dy)
                results.append(y.detach())
            near(results[1], results[0], torch.float64)
            near(xs[1].grad, xs[0].grad, torch.float64)
            for got, wanted in zip(mine.parameters(), theirs.parameters(), strict=True):
                near(got.grad, wanted.grad, torch.float64)
            near(mine[0].running_var, theirs[0].running_var, torch.float64)
    back = ours.revert(mine)
    assert [type(m) for m in back] == [type(m) for m in theirs]
    assert repr(back) == repr(theirs)
    near(back.eval()(x), theirs.eval()(x), torch.float64)
    assert ours.convert(back)[0].activation is None


def test_gradients_of_some_with_an_activation():
    """Of weight and bias alone, and for a dy in another layout than x."""
    x, weight, bias, *_ = tensors()
    dy = torch.randn(x.shape, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    for wanted in ((x, weight, bias), (weight, bias), (x,)):
        results = []
        for fused in (True, False):
            given = [a.clone().requires_grad_(any(a is b for b in wanted)) for a in (x, weight, bias)]
            y = ours.batch_norm(given[0], None, None, *given[1:], True, activation="silu" if fused else None)
            (y if fused else F.silu(y)).backward(dy)
            results.append([a.grad for a in given])
        for got, expected in zip(*results, strict=True):
            assert (got is None) == (expected is None)
            if got is not None:
                near(got, expected, torch.float64)


def test_fused_keeps_x_alone():
    """What autograd keeps of activations' size: x and y apart, x alone fused."""
    kept = []
    for fuse in (False, True):
        model = ours.convert(nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()), fuse=fuse)
        x, sizes = torch.randn(8, 5, 6, 6, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda a, to=sizes: to.append(a.numel()) or a, lambda a: a):
            model(x)
        kept.append(sum(size == x.numel() for size in sizes))
    assert kept == [2, 1]


def test_what_is_not_fused():
    shared = nn.ReLU()
    model = nn.Sequential(
        *(nn.BatchNorm2d(5), shared, nn.BatchNorm2d(5), shared),
        *(nn.BatchNorm2d(5), nn.GELU("tanh"), nn.BatchNorm2d(5), nn.Dropout(0.0), nn.ReLU()),
        *(nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 5, 1), nn.ReLU()),
        nn.ModuleList([nn.BatchNorm2d(5), nn.ReLU()]),
    )
    model[9].register_forward_hook(lambda *_: None)
    kinds = [type(m) for m in model.modules()]
    ours.convert(model, fuse=True)
    assert all(m.activation is None for m in model.modules() if isinstance(m, ours.BatchNorm2d))
    swapped = {nn.BatchNorm2d: ours.BatchNorm2d}
    assert [type(m) for m in model.modules()] == [swapped.get(kind, kind) for kind in kinds]
    again = ours.convert(ours.convert(nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), nn.Tanh()), fuse=True), fuse=True)
    assert [type(m) for m in again] == [ours.BatchNorm2d, ours.Fused, nn.Tanh]  # a second time changes nothing
    assert again[0].activation == "relu"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # PyTorch's check, of a view
@pytest.mark.parametrize("activation", ["relu", ("elu", 0.7)], ids=str)
def test_opcheck_with_an_activation(activation):
    x, weight, bias, *_ = tensors()
    args = (x.requires_grad_(), weight, bias, None, None, 1e-3, *check_activation("test", activation))
    assert set(torch.library.opcheck(torch.ops.fastbn.forward.default, args, test_utils=OPCHECKS).values()) == {
        "SUCCESS"
    }
    with pytest.raises(ValueError, match=r"batch_norm: activation is str 'rely'; expected one of relu, "):
        ours.batch_norm(x, None, None, training=True, activation="rely")


@pytest.mark.parametrize(("dtype", "steps", "most"), [("float64", 20, 1e-12), ("float32", 8, 1e-4)])
def test_a_small_resnet_learns_the_same(dtype, steps, most):
    """The same losses. Where an activation is within rounding of 0, the two may take different sides of a ReLU, and go
    apart from there: rare in float64; in float32 it depends on the processor, by which PyTorch's convolutions round
    (with AVX2 5e-5 in step 13, 5e-3 in step 19), so that is for the first steps alone."""
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(getattr(torch, dtype))
        runs = compare(steps, width=8, batch=16, size=16)
    finally:
        torch.set_default_dtype(usual)
    losses = [np.array(run.losses) for run in runs.values()]
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=0, atol=most)
    assert losses[0][-1] < losses[0][0] - (0.2 if steps == 20 else 0.02)  # it learns


def test_the_modules_of_the_comparison_are_fastbns():
    runs = compare(1, width=8, batch=4, size=8)
    kinds = {name: {type(m) for m in run.model.modules()} for name, run in runs.items()}
    assert ours.BatchNorm2d in kinds["fastbn"] - kinds["PyTorch"]
    assert ours.Fused in kinds["fused"] - kinds["fastbn"]
    assert nn.BatchNorm2d in kinds["PyTorch"] - kinds["fastbn"]


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(4, dtype=torch.int64), torch.zeros(3, 4)], ids=str)
def test_running_statistics_that_do_not_fit(wrong):
    """None of them is written to."""
    x, right = torch.randn(6, 4), torch.full((4,), 2.0)
    for mean, var in ((right, wrong), (wrong, right)):
        with pytest.raises(ValueError, match=r"running_(mean|var) is a .*; expected floats of shape \(4,\)"):
            ours.batch_norm(x, mean, var, None, None, True, 0.1, 1e-5)
    assert (right == 2).all()
