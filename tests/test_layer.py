"""BatchNorm: the functions with parameters, gradients and running statistics around them."""

import warnings

import numpy as np
import pytest

import fastbn
from fastbn import BatchNorm


def layer(rng, channels=3, **arguments):
    """With random parameters: one that is ignored shows."""
    bn = BatchNorm(channels, **arguments)
    bn.gamma[...] = rng.normal(1, 0.5, bn.gamma.shape)
    bn.beta[...] = rng.normal(size=bn.beta.shape)
    return bn


def batch(rng, shape=(6, 3, 4), dtype=np.float32):
    """x and dy."""
    return rng.normal(rng.normal(3, 1), 2, shape).astype(dtype), rng.normal(1, 2, shape).astype(dtype)


CASES = {
    # arguments of the layer, shape of x, its dtype
    "(N, C, L)": ({"channels": 3}, (6, 3, 4), np.float32),
    "(N, C)": ({"channels": 3}, (6, 3), np.float32),
    "channels last": ({"channels": 4, "axis": -1}, (5, 3, 4), np.float32),
    "two channel axes (instance norm)": ({"channels": (2, 3), "axis": (0, 1)}, (2, 3, 7), np.float32),
    "eps": ({"channels": 3, "eps": 0.5}, (6, 3, 4), np.float32),
    "float16, with float32 parameters": ({"channels": 3}, (6, 3, 4), np.float16),
    "float64": ({"channels": 3, "dtype": np.float64}, (6, 3, 4), np.float64),
    "float64 data, float32 parameters": ({"channels": 3}, (6, 3, 4), np.float64),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("arguments", "shape", "dtype"), CASES.values(), ids=CASES)
def test_is_the_functions(rng, arguments, shape, dtype):
    """Bit by bit, in training and in evaluation, over two steps."""
    bn = layer(rng, **arguments)
    running = fastbn.RunningStats(arguments["channels"])
    options = {"axis": bn.axis, "eps": bn.eps}
    for training in (True, True, False):
        x, dy = batch(rng, shape, dtype)
        bn.train(training)
        y, dx = bn(x), bn.backward(dy)
        expected, saved = fastbn.forward(x, bn.gamma, bn.beta, **options, frozen=None if training else running)
        if training:
            running.update(saved.moments)
        dx_expected, dgamma, dbeta = fastbn.backward(dy, saved)
        np.testing.assert_array_equal(y, expected, strict=True)
        np.testing.assert_array_equal(dx, dx_expected, strict=True)
        np.testing.assert_array_equal(bn.dgamma, dgamma.astype(bn.dtype), strict=True)
        np.testing.assert_array_equal(bn.dbeta, dbeta.astype(bn.dtype), strict=True)
        np.testing.assert_array_equal(bn.running.exact(), running.exact())
    assert bn.running.batches == 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_parameters_have_the_layers_dtype(dtype):
    bn = BatchNorm(3, dtype=dtype)
    for values in (bn.gamma, bn.beta, bn.dgamma, bn.dbeta, bn.running.mean, bn.running.var):
        assert values.dtype == dtype
    np.testing.assert_array_equal(bn.gamma, np.ones(3))
    np.testing.assert_array_equal([bn.beta, bn.dgamma, bn.dbeta], np.zeros((3, 3)))


@pytest.mark.parametrize(
    ("arguments", "attributes"),
    [
        ({"momentum": 0.3}, {"momentum": 0.3, "ddof": 1}),
        ({"momentum": None, "ddof": 0}, {"momentum": None, "ddof": 0}),
        ({"decay": 0.75}, {"momentum": 0.25, "ddof": 1}),
        ({"on_nonfinite": "skip", "debias": True}, {"on_nonfinite": "skip", "debias": True}),
        ({}, {"on_nonfinite": "propagate", "debias": False}),
    ],
)
def test_arguments_reach_the_running_statistics(arguments, attributes):
    running = BatchNorm(3, **arguments).running
    assert {name: getattr(running, name) for name in attributes} == attributes


def test_train_and_eval(rng):
    bn = BatchNorm(3)
    assert bn.training
    assert bn.eval() is bn
    assert not bn.training
    assert bn.train() is bn
    assert bn.training
    assert not bn.train(False).training
    before = bn.running.exact()
    bn(batch(rng)[0])  # in evaluation nothing is learned
    np.testing.assert_array_equal(bn.running.exact(), before)


def test_backward_replaces(rng):
    bn = layer(rng)
    x, dy = batch(rng)
    dgamma, dbeta = bn.dgamma, bn.dbeta
    bn(x)
    bn.backward(dy)
    once = dgamma.copy(), dbeta.copy()
    bn.backward(dy)  # again on the same forward pass
    assert bn.dgamma is dgamma  # an optimizer may hold on to the arrays
    assert bn.dbeta is dbeta
    np.testing.assert_array_equal((dgamma, dbeta), once)
    assert np.abs(once).min() > 0


def test_backward_accumulates_where_asked(rng):
    bn = layer(rng, accumulate=True)
    expected = np.zeros((2, 3), np.float32)
    for _ in range(3):
        x, dy = batch(rng)
        bn(x)
        bn.backward(dy)
        expected += fastbn.backward(dy, fastbn.forward(x, bn.gamma, bn.beta)[1], need=(False, True, True))[1:]
    np.testing.assert_array_equal((bn.dgamma, bn.dbeta), expected)
    bn.zero_grad()
    np.testing.assert_array_equal((bn.dgamma, bn.dbeta), np.zeros((2, 3)))


@pytest.mark.usefixtures("backend")
def test_parameters_updated_in_place_are_used(rng):
    bn = layer(rng)
    x, _ = batch(rng)
    bn(x)
    bn.gamma *= -2
    bn.beta += 5
    np.testing.assert_array_equal(bn(x), fastbn.forward(x, bn.gamma, bn.beta)[0])


def test_a_step_of_the_optimizer_before_backward_changes_no_gradient(rng):
    """backward is that of the forward pass as it was."""
    bn = layer(rng)
    x, dy = batch(rng)
    bn(x)
    expected = bn.backward(dy)
    bn.gamma += 1
    np.testing.assert_array_equal(bn.backward(dy), expected)


@pytest.mark.usefixtures("backend")
def test_out(rng):
    bn = layer(rng)
    x, dy = batch(rng)
    kept = x.copy()
    y, dx = np.empty_like(x), np.empty_like(x)
    assert bn(x, out=y) is y
    assert bn.backward(dy, out=dx) is dx
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(y, fastbn.forward(x, bn.gamma, bn.beta)[0])
    np.testing.assert_array_equal(dx, bn.backward(dy))
    assert bn.backward(dy, out=dy) is dy
    np.testing.assert_array_equal(dy, dx)


def test_groups_are_one_batch_in_training_and_nothing_in_evaluation(rng):
    bn, (x, dy) = layer(rng, momentum=1.0), batch(rng, (7, 3, 4))
    ids = np.array([2, 0, 0, 1, 2, 2, 0])
    y, saved = fastbn.forward(x, bn.gamma, bn.beta, groups=ids)
    np.testing.assert_array_equal(bn(x, groups=ids), y)
    dx, dgamma, dbeta = fastbn.backward(dy, saved)
    for got, right in zip((bn.backward(dy), bn.dgamma, bn.dbeta), (dx, dgamma, dbeta), strict=True):
        np.testing.assert_array_equal(got, right)
    whole = fastbn.moments(x)
    np.testing.assert_allclose(bn.running.mean, whole.mean, rtol=1e-6)
    np.testing.assert_allclose(bn.running.var, whole.var(ddof=1), rtol=1e-6)
    np.testing.assert_array_equal(bn.eval()(x, groups=ids), fastbn.infer(x, *bn.running.exact(), bn.gamma, bn.beta))


def test_y_alone_and_whole_numbers_as_in_forward(rng):
    bn, (x, dy) = layer(rng, activation="leaky_relu"), batch(rng)
    wanted, given = fastbn.forward(x, bn.gamma, bn.beta, activation="leaky_relu")[1], x.copy()
    y = bn(given, out=given, save="y")
    assert y is given
    # x is had back from y: off by some eps of float32, times 4 of the activation's slope
    np.testing.assert_allclose(bn.backward(dy), fastbn.backward(dy, wanted)[0], atol=1e-5)
    bn, counts = layer(rng), rng.integers(0, 255, (6, 3, 4)).astype(np.uint8)
    y = bn(counts, scale=0.5, zero_point=7.0)
    np.testing.assert_array_equal(y, fastbn.forward(counts, bn.gamma, bn.beta, scale=0.5, zero_point=7.0)[0])
    wanted = 0.1 * 0.5 * (counts.mean((0, 2)) - 7)  # momentum is 0.1
    np.testing.assert_allclose(bn.running.mean, wanted, rtol=1e-5)


def test_results_are_new_each_time(rng):
    bn = layer(rng)
    x, dy = batch(rng)
    first, first_dx = bn(x), bn.backward(dy)
    kept, kept_dx = first.copy(), first_dx.copy()
    bn(x + 1)
    bn.backward(dy + 1)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(first_dx, kept_dx)


@pytest.mark.parametrize(
    ("channels", "axis", "dtype"), [(3, 1, np.float32), (3, 1, np.float64), ((6, 3), (0, 1), np.float32)]
)
def test_state_goes_through_a_file(rng, tmp_path, channels, axis, dtype):
    """np.savez and back: the same bits in every array and in every later result."""
    arguments = {"axis": axis, "dtype": dtype, "momentum": None}
    bn, x = layer(rng, channels, **arguments), batch(rng, dtype=dtype)[0]
    for _ in range(3):
        bn(batch(rng, dtype=dtype)[0])
    np.savez(tmp_path / "bn.npz", **bn.state_dict())
    other = BatchNorm(channels, **arguments)
    with np.load(tmp_path / "bn.npz") as state:
        other.load_state_dict(state)
    for name, value in bn.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], value, strict=True)
    for each in (bn.eval(), other.eval()):
        each.y = each(x)
    np.testing.assert_array_equal(other.y, bn.y, strict=True)
    for each in (bn.train(), other.train()):  # the average goes on with the same count
        each(x)
    np.testing.assert_array_equal(other.running.exact(), bn.running.exact())


def test_the_guard_goes_through_a_state(rng):
    """Counts of what was skipped come along, so that an average goes on per channel as it would have."""
    arguments = {"momentum": None, "on_nonfinite": "skip"}
    bn, other = layer(rng, **arguments), BatchNorm(3, **arguments)
    for k in range(4):
        x = batch(rng)[0]
        if k:
            x[0, k - 1, 0] = np.nan
        bn(x)
    assert bn.running.skipped.tolist() == [1, 1, 1]
    other.load_state_dict(bn.state_dict())
    x = batch(rng)[0]
    for each in (bn, other):
        each(x)
    np.testing.assert_array_equal(other.running.exact(), bn.running.exact())
    assert np.isfinite(bn.running.exact()).all()
    assert repr(other.running) == repr(bn.running)


def test_a_state_from_before_the_guard_loads(rng):
    bn, other = layer(rng), layer(rng, on_nonfinite="skip")
    x = batch(rng)[0]
    bn(x)
    spoilt = x.copy()
    spoilt[0, 1, 0] = np.inf
    other(spoilt)
    state = bn.state_dict()
    del state["skipped"], state["skipped_variances"]
    other.load_state_dict(state)
    np.testing.assert_array_equal(other.running.exact(), bn.running.exact())
    assert other.running.skipped.tolist() == [0, 0, 0]


def test_the_guard_raises_and_leaves_the_layer(rng):
    bn = layer(rng, on_nonfinite="raise")
    x, dy = batch(rng)
    bn(x)
    before, dx = bn.running.exact(), bn.backward(dy)
    spoilt = x.copy()
    spoilt[0, 1, 0] = np.nan
    with pytest.raises(ValueError, match=r"RunningStats.update: moments is NaN or Inf in 1 of 3 channels \(1\)"):
        bn(spoilt)
    np.testing.assert_array_equal(bn.running.exact(), before)
    np.testing.assert_array_equal(bn.backward(dy), dx)  # of the last pass that was right


def test_state_dict_is_a_copy_and_loading_copies(rng):
    bn, other = layer(rng), BatchNorm(3)
    gamma = other.gamma
    state = bn.state_dict()
    expected = {name: value.copy() for name, value in state.items()}
    other.load_state_dict(state)
    for value in state.values():
        value[...] = 9
    for each in (bn, other):
        for name, value in each.state_dict().items():
            np.testing.assert_array_equal(value, expected[name])
    assert other.gamma is gamma  # an optimizer may hold on to it


WRONG_STATES = {
    "a name missing": (lambda s: s.pop("beta"), ValueError, r"load_state_dict: state has .*; expected \["),
    "a name too many": (lambda s: s.update(bias=np.zeros(3)), ValueError, r"state has .*bias.*; expected"),
    "a name that is no text": (lambda s: s.update({1: np.zeros(3)}), ValueError, r"state has .*; expected"),
    "another number of channels": (
        lambda s: s.update(beta=np.zeros(4)),
        ValueError,
        r"beta has shape \(4,\); expected",
    ),
    "one number for all": (lambda s: s.update(running_var=1.0), ValueError, r"running_var has shape \(\)"),
    "complex": (
        lambda s: s.update(running_mean=np.zeros(3, complex)),
        TypeError,
        r"running_mean is a complex128 array",
    ),
    "masked": (lambda s: s.update(gamma=np.ma.ones(3)), TypeError, r"gamma is a masked array"),
    "negative variance": (lambda s: s.update(running_var=[1, -1, 1]), ValueError, r"running_var has a negative value"),
    "batches negative": (lambda s: s.update(batches=-3), ValueError, r"batches is int -3"),
    "batches fractional": (lambda s: s.update(batches=1.5), ValueError, r"batches is float 1\.5"),
    "batches nan": (lambda s: s.update(batches=np.nan), ValueError, r"batches is float nan"),
    "skips of another shape": (lambda s: s.update(skipped=np.zeros(4, int)), ValueError, r"skipped is int64 array .*4"),
    "skips negative": (lambda s: s.update(skipped=np.int64([0, -1, 0])), ValueError, r"skipped is int64 array"),
    "skips without their variances": (lambda s: s.pop("skipped_variances"), ValueError, r"state has .*; expected"),
    "batches per channel": (
        lambda s: s.update(batches=np.zeros(3, int)),
        ValueError,
        r"batches is int64 array of shape",
    ),
}


@pytest.mark.parametrize(("spoil", "error", "match"), WRONG_STATES.values(), ids=WRONG_STATES)
def test_a_wrong_state_changes_nothing(rng, spoil, error, match):
    bn, donor = layer(rng), layer(rng)
    for each in (bn, donor):
        each(batch(rng)[0])
    before, state = bn.state_dict(), donor.state_dict()
    spoil(state)
    with pytest.raises(error, match=match):
        bn.load_state_dict(state)
    for name, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, before[name], strict=True)


@pytest.mark.parametrize("state", [None, [1, "a"], "gamma"])
def test_a_state_that_is_no_mapping(state):
    with pytest.raises(ValueError, match=r"load_state_dict: state has .*; expected \['batches', 'beta', 'gamma'"):
        BatchNorm(3).load_state_dict(state)


def test_refused_calls_change_nothing(rng):
    """A wrong x is not counted as a batch, and a wrong dy leaves the gradients."""
    bn = layer(rng)
    x, dy = batch(rng)
    bn(x)
    bn.backward(dy)
    before = [*bn.running.exact(), bn.dgamma.copy(), bn.dbeta.copy()]
    with pytest.raises(ValueError, match=r"gamma has shape \(3,\); expected \(2,\)"):
        bn(x[:, :2])
    with pytest.raises(ValueError, match=r"dy is a float32 array of shape \(6, 2, 4\)"):
        bn.backward(dy[:, :2])
    for value, old in zip([*bn.running.exact(), bn.dgamma, bn.dbeta], before, strict=True):
        np.testing.assert_array_equal(value, old)
    assert bn.running.batches == 1
    bn.backward(dy)  # still that of the last pass that was right
    np.testing.assert_array_equal(bn.dgamma, before[2])


WRONG = {
    "dtype float16": (lambda: BatchNorm(3, dtype=np.float16), TypeError, r"dtype is float16; expected float32"),
    "dtype int": (lambda: BatchNorm(3, dtype=int), TypeError, r"BatchNorm: dtype is int64"),
    "eps 0": (lambda: BatchNorm(3, eps=0), ValueError, r"BatchNorm: eps is int 0"),
    "momentum 2": (lambda: BatchNorm(3, momentum=2), ValueError, r"momentum is int 2"),
    "momentum and decay": (lambda: BatchNorm(3, momentum=0.5, decay=0.5), ValueError, r"momentum and decay are both"),
    "channels -1": (lambda: BatchNorm(-1), ValueError, r"channels is int -1"),
    "backward first": (lambda: BatchNorm(3).backward(np.ones((2, 3))), RuntimeError, r"no forward pass came before"),
}


@pytest.mark.parametrize(("call", "error", "match"), WRONG.values(), ids=WRONG)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_layer_in_place_cannot_be_differentiated(rng):
    bn = layer(rng)
    x, dy = batch(rng)
    bn(x, out=x)
    with pytest.raises(ValueError, match="saved has no x"):
        bn.backward(dy)


def test_the_warning_of_one_value_points_here(rng):
    x = batch(rng, (1, 3, 1))[0]
    with pytest.warns(fastbn.OneValueWarning, match="one value per channel") as caught:
        y = BatchNorm(3)(x)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(y, np.zeros((1, 3, 1)))


def test_repr():
    bn = BatchNorm(3)
    assert repr(bn) == "BatchNorm(3, axis=1, eps=1e-05, momentum=0.1, training, 0 batches seen)"
    bn(np.eye(3, dtype=np.float32))
    assert repr(bn.eval()) == "BatchNorm(3, axis=1, eps=1e-05, momentum=0.1, evaluating, 1 batch seen)"
    assert repr(BatchNorm((2, 3), (1, 2), 0.5, None)).startswith("BatchNorm((2, 3), axis=(1, 2), eps=0.5, moment")


@pytest.mark.usefixtures("backend")
def test_an_empty_batch():
    bn = BatchNorm(3)
    x = np.empty((0, 3, 4), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bn(x).shape == bn.backward(x).shape == x.shape
    np.testing.assert_array_equal([bn.dgamma, bn.dbeta], np.zeros((2, 3)))
    assert bn.running.batches == 0


@pytest.mark.usefixtures("backend")
def test_training_a_small_net(rng):
    """Linear, BatchNorm, ReLU, linear, by gradient descent on two rings: no line divides them, the net does."""
    angle, radius = rng.uniform(0, 2 * np.pi, 300), np.repeat([1, 2], 150) + rng.normal(0, 0.15, 300)
    x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32) * 30 + 500
    target = np.repeat(np.float32([0, 1]), 150)
    bn = layer(rng, 16)
    w1, w2, b2 = rng.normal(size=(2, 16)).astype(np.float32), rng.normal(size=16).astype(np.float32) / 4, 0.0

    def predict(x):
        hidden = np.maximum(bn(x @ w1), 0)
        return hidden, 1 / (1 + np.exp(-(hidden @ w2 + b2)))

    losses = []
    for _ in range(200):
        hidden, p = predict(x)
        losses.append(-np.mean(np.log(np.where(target == 1, p, 1 - p))))
        slope = ((p - target) / len(x)).astype(np.float32)
        dx = bn.backward(slope[:, None] * w2 * (hidden > 0))
        for values, gradient in ((w1, x.T @ dx), (w2, hidden.T @ slope), (bn.gamma, bn.dgamma), (bn.beta, bn.dbeta)):
            values -= 0.5 * gradient
        b2 -= 0.5 * slope.sum()
    assert losses[-1] < 0.2 * losses[0]
    _, p = predict(x)
    assert np.mean((p > 0.5) == target) > 0.95
    bn.eval()  # the running statistics have arrived where the batch's are
    _, p = predict(x)
    assert np.mean((p > 0.5) == target) > 0.95
