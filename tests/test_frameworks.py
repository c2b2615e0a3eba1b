"""Presets of RunningStats: ten steps beside each framework itself, and what is taken over from its objects."""

import os

import numpy as np
import pytest

import fastbn
from fastbn import RunningStats

# They compute in float32, some by E[x^2] - E[x]^2: at a mean of 2 deviations that costs some 10 eps of the variance.
TOLERANCE = 2e-6


@pytest.fixture
def batches(rng):
    """(N, 4, 5) of sizes that differ."""
    return [
        rng.normal(rng.uniform(-4, 4, (4, 1)), rng.uniform(1, 3, (4, 1)), (int(rng.integers(2, 9)), 4, 5)).astype("f")
        for _ in range(10)
    ]


def follow(running, batches, step):
    """`step(x)` gives the framework's mean and variance after x."""
    for x in batches:
        running.update(fastbn.moments(x))
        mean, var = (np.asarray(a, np.float64) for a in step(x))
        np.testing.assert_allclose(running.mean, mean, rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(running.var, var, rtol=TOLERANCE)


def assert_taken_over(taken, running, momentum, eps, batches=0):
    np.testing.assert_allclose(taken.mean, running.mean, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(taken.var, running.var, rtol=TOLERANCE)
    np.testing.assert_allclose(taken.momentum, momentum, rtol=1e-6)
    np.testing.assert_allclose(taken.eps, eps, rtol=1e-6)
    assert (taken.batches, taken.ddof) == (batches, running.ddof)


@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.3}, {"momentum": None}], ids=str)
def test_pytorch(batches, arguments):
    torch = pytest.importorskip("torch")
    module = torch.nn.BatchNorm1d(4, **arguments)

    def step(x):
        module(torch.from_numpy(x))
        return module.running_mean, module.running_var

    running = RunningStats.from_torch(4, **arguments)
    assert running.eps == module.eps
    follow(running, batches, step)
    if arguments:
        taken = RunningStats.from_torch(module)
        assert taken.momentum == module.momentum
        follow(taken, batches, step)  # it goes on as the module does, with its count
        return
    assert_taken_over(RunningStats.from_torch(module), running, 0.1, 1e-5, 10)
    assert_taken_over(RunningStats.from_torch(module.state_dict()), running, 0.1, 1e-5, 10)
    other = RunningStats.from_torch(torch.nn.BatchNorm2d(4, eps=0.25, momentum=0.5), debias=True)
    assert (other.eps, other.momentum, other.debias) == (0.25, 0.5, True)
    with pytest.raises(
        TypeError, match=r"from_torch: source is BatchNorm1d .*which has no running_mean and running_va"
    ):
        RunningStats.from_torch(torch.nn.BatchNorm1d(4, track_running_stats=False))


@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.7}], ids=str)
def test_keras(batches, arguments, monkeypatch):
    if "KERAS_BACKEND" not in os.environ:
        pytest.importorskip("torch")
        monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    layer = keras.layers.BatchNormalization(axis=1, **arguments)

    def step(x):
        layer(x, training=True)
        found = layer.moving_mean.value, layer.moving_variance.value
        return [a.detach().numpy() if hasattr(a, "detach") else a for a in found]

    running = RunningStats.from_keras(4, **arguments)
    assert running.eps == layer.epsilon
    follow(running, batches, step)
    assert_taken_over(RunningStats.from_keras(layer), running, 1 - layer.momentum, 1e-3)
    follow(RunningStats.from_keras(layer), batches, step)


@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.7}], ids=str)
def test_flax_nnx(batches, arguments):
    nnx = pytest.importorskip("flax.nnx")
    layer = nnx.BatchNorm(4, axis=1, rngs=nnx.Rngs(0), **arguments)

    def step(x):
        layer(x, use_running_average=False)
        return np.asarray(layer.mean), np.asarray(layer.var)

    running = RunningStats.from_flax(4, **arguments)
    assert running.eps == layer.epsilon
    follow(running, batches, step)
    assert_taken_over(RunningStats.from_flax(layer), running, 1 - layer.momentum, 1e-5)


def test_flax_linen(batches):
    linen, jax = pytest.importorskip("flax.linen"), pytest.importorskip("jax")
    layer = linen.BatchNorm(use_running_average=False, axis=1)
    variables = layer.init(jax.random.key(0), batches[0])

    def step(x):
        variables.update(layer.apply(variables, x, mutable=["batch_stats"])[1])
        return variables["batch_stats"]["mean"], variables["batch_stats"]["var"]

    running = RunningStats.from_flax(4)
    assert running.eps == layer.epsilon
    follow(running, batches, step)
    for source in (variables, variables["batch_stats"]):
        assert_taken_over(RunningStats.from_flax(source), running, 1 - layer.momentum, 1e-5)


def onnx_model(onnx, channels, **attributes):
    def tensor(name, *shape):
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    node = onnx.helper.make_node(
        "BatchNormalization", ["x", "scale", "b", "mean", "var"], ["y", "m", "v"], training_mode=1, **attributes
    )
    x, small = tensor("x", "n", channels, 5), [tensor(name, channels) for name in ("scale", "b", "mean", "var")]
    results = [tensor("y", "n", channels, 5), tensor("m", channels), tensor("v", channels)]
    graph = onnx.helper.make_graph([node], "bn", [x, *small], results)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)], ir_version=8)


@pytest.mark.parametrize("runner", ["onnx's reference", "onnxruntime"])
@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.7}], ids=str)
def test_onnx(batches, arguments, runner):
    onnx = pytest.importorskip("onnx")
    model = onnx_model(onnx, 4, **arguments)
    if runner == "onnxruntime":
        runtime = pytest.importorskip("onnxruntime")
        run = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run
    else:
        run = pytest.importorskip("onnx.reference").ReferenceEvaluator(model).run
    kept = {"mean": np.zeros(4, "f"), "var": np.ones(4, "f")}

    def step(x):
        _, kept["mean"], kept["var"] = run(None, {"x": x, "scale": np.ones(4, "f"), "b": np.zeros(4, "f"), **kept})
        return kept["mean"], kept["var"]

    running = RunningStats.from_onnx(4, **arguments)
    follow(running, batches, step)
    values = {"input_mean": kept["mean"], "input_var": kept["var"]}
    assert_taken_over(RunningStats.from_onnx({**values, **arguments}), running, running.momentum, 1e-5)
    defaults = onnx.defs.get_schema("BatchNormalization", 15).attributes
    assert running.eps == pytest.approx(defaults["epsilon"].default_value.f)
    assert defaults["momentum"].default_value.f == pytest.approx(0.9)


def test_options_take_precedence():
    running = RunningStats.from_keras((2, 3), momentum=0.75, ddof=1, eps=0.5, on_nonfinite="skip", dtype=np.float64)
    assert (running.shape, running.momentum, running.ddof, running.eps) == ((2, 3), 0.25, 1, 0.5)
    assert (running.on_nonfinite, running.dtype) == ("skip", np.float64)
    assert RunningStats.from_keras(3, decay=0.75).momentum == 0.25
    assert RunningStats.from_flax(3, momentum=None).momentum is None
    assert RunningStats.from_torch(3, decay=0.75).momentum == 0.25


WRONG = {
    "nothing": (
        lambda: RunningStats.from_torch(None),
        TypeError,
        r"from_torch: source is NoneType None, which has no run",
    ),
    "a whole model's state": (
        lambda: RunningStats.from_torch({"bn1.running_mean": [1]}),
        TypeError,
        r"from_torch: source is \['bn1.running_mean'\], which has no running_mean and running_var; expected the number",
    ),
    "another framework's": (
        lambda: RunningStats.from_onnx({"running_mean": [1], "running_var": [1]}),
        TypeError,
        r"from_onnx: source is .*, which has no input_mean and input_var",
    ),
    "batch_stats of a model": (lambda: RunningStats.from_flax({"batch_stats": [1]}), TypeError, "from_flax: source is"),
    "two shapes": (
        lambda: RunningStats.from_keras({"moving_mean": [1, 2], "moving_variance": [1]}),
        ValueError,
        r"from_keras: var has shape \(1,\); expected \(2,\)",
    ),
    "negative variance": (
        lambda: RunningStats.from_flax({"mean": [1], "var": [-1]}),
        ValueError,
        r"from_flax: var has a negative value",
    ),
    "eps 0": (lambda: RunningStats.from_torch(3, eps=0), ValueError, r"from_torch: eps is int 0"),
    "channels": (lambda: RunningStats.from_torch(-3), ValueError, r"from_torch: channels is int -3"),
    "momentum": (lambda: RunningStats.from_keras(3, momentum=99), ValueError, r"decay is int 99; expected a number in"),
}


@pytest.mark.parametrize(("call", "error", "match"), WRONG.values(), ids=WRONG)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
