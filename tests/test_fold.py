"""fold and affine beside the layers that they replace: by PyTorch, and by loops."""

import itertools

import ml_dtypes
import numpy as np
import pytest

import fastbn


def statistics(rng, channels):
    """mean, var, gamma and beta; one gamma below 0 and one of 0."""
    mean, var = rng.normal(1, 3, channels), rng.uniform(0.2, 4, channels)
    gamma, beta = rng.normal(0.5, 1, channels), rng.normal(-1, 2, channels)
    gamma[0] = -0.7
    gamma[-1] = 0
    return mean, var, gamma, beta


SHAPES = {
    # kind, weight, groups; in PyTorch's layouts
    "linear": ("linear", (6, 4), 1),
    "conv 1-D": ("conv", (6, 4, 3), 1),
    "conv 2-D": ("conv", (6, 4, 3, 2), 1),
    "conv 3-D": ("conv", (6, 4, 3, 2, 2), 1),
    "conv 1-D, 2 groups": ("conv", (6, 4, 3), 2),
    "conv 2-D, 3 groups": ("conv", (6, 4, 3, 3), 3),
    "conv 3-D, 2 groups": ("conv", (4, 3, 2, 3, 2), 2),
    "depthwise": ("conv", (8, 1, 3, 3), 8),
    "depthwise, 2 outputs each": ("conv", (8, 1, 3, 3), 4),
    "pointwise": ("conv", (6, 4, 1, 1), 1),
    "transposed 1-D": ("conv_transpose", (4, 6, 3), 1),
    "transposed 2-D": ("conv_transpose", (4, 6, 3, 2), 1),
    "transposed 3-D": ("conv_transpose", (4, 6, 3, 2, 2), 1),
    "transposed 2-D, 2 groups": ("conv_transpose", (4, 3, 3, 3), 2),
    "transposed depthwise": ("conv_transpose", (4, 1, 3, 3), 4),
}
CASES = [
    pytest.param(*case, order, bias, id=f"{name}, {order}, {'with' if bias else 'no'} bias")
    for (name, case), order, bias in itertools.product(SHAPES.items(), ("after", "before"), (True, False))
    if not (case[0] == "conv_transpose" and order == "before")
]


@pytest.mark.parametrize(("kind", "shape", "groups", "order", "bias"), CASES)
def test_beside_pytorch(rng, kind, shape, groups, order, bias):
    """One layer for two; with stride, dilation and (after the layer) padding, which folding doesn't see."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    outputs, inputs = (shape[0], shape[1] * groups) if kind != "conv_transpose" else (shape[1] * groups, shape[0])
    weight, b = rng.normal(size=shape), rng.normal(size=outputs) if bias else None
    numbers = statistics(rng, outputs if order == "after" else inputs)
    dimensions = len(shape) - 2
    x = torch.from_numpy(rng.normal(2, 3, (3, inputs, *(7, 6, 5)[:dimensions])))

    def layer(x, weight, bias):
        weight, bias = torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias)
        if kind == "linear":
            return F.linear(x, weight, bias)
        name = f"conv{'_transpose' * (kind == 'conv_transpose')}{dimensions}d"
        options = {"stride": 2, "dilation": 2 if kind == "conv" else 1, "padding": 1 if order == "after" else 0}
        return getattr(F, name)(x, weight, bias, groups=groups, **options)

    def norm(x):
        mean, var, gamma, beta = map(torch.from_numpy, numbers)
        return F.batch_norm(x, mean, var, gamma, beta, training=False, eps=1e-3)

    expected = norm(layer(x, weight, b)) if order == "after" else layer(norm(x), weight, b)
    padding = {"padding": 0} if order == "before" and kind != "linear" else {}
    folded = fastbn.fold(weight, b, *numbers, 1e-3, kind=kind, groups=groups, order=order, **padding)
    assert folded[0].shape == shape
    # Sums of up to 80 products of about 10, in another order: a few eps of 1e3.
    np.testing.assert_allclose(layer(x, *folded).numpy(), expected.numpy(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("order", ["after", "before"])
def test_linear_by_hand(rng, order):
    weight, bias, x = rng.normal(size=(5, 3)), rng.normal(size=5), rng.normal(2, 3, (7, 3))
    numbers = statistics(rng, 5 if order == "after" else 3)
    w, b = fastbn.fold(weight, bias, *numbers, 1e-5, order=order)
    norm = fastbn.reference.infer
    expected = norm(x @ weight.T + bias, *numbers) if order == "after" else norm(x, *numbers) @ weight.T + bias
    np.testing.assert_allclose(x @ w.T + b, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ">f4"])
def test_rounded_once_in_the_weights_dtype(rng, dtype):
    weight, bias = rng.normal(size=(6, 4, 3)).astype(dtype), rng.normal(size=6).astype(dtype)
    before = weight.copy(), bias.copy()
    numbers = statistics(rng, 6)
    w, b = fastbn.fold(weight, bias, *numbers, 1e-5, kind="conv")
    exact = fastbn.fold(weight.astype(float), bias.astype(float), *numbers, 1e-5, kind="conv")
    assert w.dtype == b.dtype == weight.dtype
    np.testing.assert_array_equal(w, exact[0].astype(dtype))
    np.testing.assert_array_equal(b, exact[1].astype(dtype))
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(bias, before[1])


def test_strided_weights_and_lists(rng):
    """Any strides; statistics of any type; gamma and beta None as 1 and 0; a mean at an offset loses nothing."""
    weight = np.asfortranarray(rng.normal(size=(6, 4, 3)))[::-1]
    mean, var = (1e8 + rng.normal(size=6)).tolist(), rng.uniform(1, 2, 6).tolist()
    bias = [m + 0.25 for m in mean]  # exactly so
    w, b = fastbn.fold(weight, bias, mean, var, None, None, 1e-5, kind="conv")
    np.testing.assert_allclose(w, weight / np.sqrt(np.array(var) + 1e-5)[:, None, None], rtol=1e-15)
    np.testing.assert_allclose(b, 0.25 / np.sqrt(np.array(var) + 1e-5), rtol=1e-15)  # bias - mean first, then the scale


def test_padding_in_words(rng):
    weight, numbers = rng.normal(size=(6, 4, 1, 1)), statistics(rng, 4)
    plain = fastbn.fold(weight, None, *numbers, 1e-5, kind="conv", order="before", padding=0)
    for padding in ("valid", "same", (0, 0), [0]):
        same = fastbn.fold(weight, None, *numbers, 1e-5, kind="conv", order="before", padding=padding)
        np.testing.assert_array_equal(same[1], plain[1])


@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_affine(rng, shape):
    numbers = statistics(rng, shape)
    scale, shift = fastbn.affine(*numbers, eps=1e-3)
    x = rng.normal(2, 3, (5, *shape))
    axis = tuple(range(1, x.ndim))
    np.testing.assert_allclose(scale * x + shift, fastbn.reference.infer(x, *numbers, axis=axis, eps=1e-3), rtol=1e-12)
    plain = fastbn.affine(numbers[0], numbers[1])
    np.testing.assert_allclose(plain[0], 1 / np.sqrt(numbers[1] + 1e-5), rtol=1e-15)
    np.testing.assert_allclose(plain[1], -numbers[0] * plain[0], rtol=1e-15)


def test_affine_is_as_wide_as_what_is_given(rng):
    mean, var, gamma, beta = statistics(rng, 4)
    half = [a.astype(np.float16) for a in (mean, var)]
    assert {a.dtype for a in fastbn.affine(*half)} == {np.dtype(np.float32)}
    assert {a.dtype for a in fastbn.affine(*half, gamma.astype("f"), beta.astype("f"))} == {np.dtype(np.float32)}
    assert {a.dtype for a in fastbn.affine(*half, gamma, beta.astype("f"))} == {np.dtype(np.float64)}
    assert {a.dtype for a in fastbn.affine([1, 2], [3, 4])} == {np.dtype(np.float64)}


def test_affine_takes_tensors_of_bfloat16(rng):
    torch = pytest.importorskip("torch")
    mean, var, gamma, beta = (torch.tensor(a).bfloat16() for a in statistics(rng, 4))
    found = fastbn.affine(mean, var, gamma, beta)
    want = fastbn.affine(*(a.float().numpy() for a in (mean, var, gamma, beta)))
    for a, b in zip(found, want, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)


W, S = np.ones((6, 4, 3)), (np.zeros(6), np.ones(6), np.ones(6), np.zeros(6), 1e-5)
BEFORE = {"kind": "conv", "order": "before"}
S4 = (*(a[:4] for a in S[:4]), 1e-5)
WRONG = {
    "kind": (
        lambda: fastbn.fold(W, None, *S, kind="dense"),
        ValueError,
        r"fold: kind is str 'dense'; .* 'conv_transpo",
    ),
    "order": (
        lambda: fastbn.fold(W, None, *S, kind="conv", order="behind"),
        ValueError,
        r"order is str 'behind'; expec",
    ),
    "linear of 3 axes": (
        lambda: fastbn.fold(W, None, *S),
        ValueError,
        r"weight has shape \(6, 4, 3\); expected \(out, in\)",
    ),
    "conv of 2 axes": (
        lambda: fastbn.fold(W[..., 0], None, *S, kind="conv"),
        ValueError,
        r"weight has shape \(6, 4\); expected \(out, in / groups, \*window\) for kind='conv'",
    ),
    "groups 0": (lambda: fastbn.fold(W, None, *S, kind="conv", groups=0), ValueError, "groups is int 0; expected 1 or"),
    "groups of linear": (lambda: fastbn.fold(W[..., 0], None, *S, groups=2), ValueError, "groups is int 2; .*linear"),
    "groups that don't divide": (
        lambda: fastbn.fold(W, None, *S, kind="conv", groups=4),
        ValueError,
        r"weight has shape \(6, 4, 3\), whose first axis 4 groups don't divide",
    ),
    "weight of ints": (lambda: fastbn.fold(W.astype(int), None, *S, kind="conv"), TypeError, "weight is a int64 array"),
    "weight a list": (lambda: fastbn.fold([[1.0]], None, *S), TypeError, "fold: weight is a builtins.list"),
    "bias of another length": (lambda: fastbn.fold(W, [1], *S, kind="conv"), ValueError, r"bias has shape \(1,\); exp"),
    "statistics of the inputs": (
        lambda: fastbn.fold(W, None, *S4, kind="conv"),
        ValueError,
        r"mean has shape \(4,\); expected \(6,\)",
    ),
    "statistics of the outputs": (
        lambda: fastbn.fold(W, None, *S, **BEFORE, padding=0),
        ValueError,
        r"mean has shape \(6,\); expected \(4,\)",
    ),
    "negative variance": (
        lambda: fastbn.fold(W, None, S[0], -S[1], None, None, 1e-5, kind="conv"),
        ValueError,
        "fold: var has a negative value",
    ),
    "eps 0": (lambda: fastbn.fold(W, None, *S[:4], 0, kind="conv"), ValueError, "fold: eps is int 0"),
    "no word of padding": (
        lambda: fastbn.fold(W, None, *S4, **BEFORE),
        ValueError,
        "padding is missing; .*padding=0 if",
    ),
    "padding": (
        lambda: fastbn.fold(W, None, *S4, **BEFORE, padding=1),
        ValueError,
        "padding is int 1, which can't be folded .* wrong at the border",
    ),
    "padding on one side": (
        lambda: fastbn.fold(W, None, *S4, **BEFORE, padding=(0, 1)),
        ValueError,
        r"\(0, 1\), which",
    ),
    "padding same": (lambda: fastbn.fold(W, None, *S4, **BEFORE, padding="same"), ValueError, "'same', which can't be"),
    "padding unknown": (
        lambda: fastbn.fold(W, None, *S4, **BEFORE, padding="full"),
        ValueError,
        "padding is 'full'; ex",
    ),
    "padding below 0": (
        lambda: fastbn.fold(W, None, *S4, **BEFORE, padding=-1),
        ValueError,
        "padding is int -1; expect",
    ),
    "before a transposed one": (
        lambda: fastbn.fold(W, None, *S, kind="conv_transpose", order="before", padding=0),
        ValueError,
        "conv_transpose' with order='before' can't be folded: how many",
    ),
    "affine of two shapes": (lambda: fastbn.affine([1, 2], [1]), ValueError, r"affine: var has shape \(1,\); expected"),
    "affine of text": (lambda: fastbn.affine(["1"], [1]), TypeError, "affine: mean is a <U1 array"),
    "affine of eps -1": (lambda: fastbn.affine([1], [1], eps=-1), ValueError, "affine: eps is int -1"),
}


@pytest.mark.parametrize(("call", "error", "match"), WRONG.values(), ids=WRONG)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_groups_of_a_narrow_type(rng):
    """300 outputs and a uint8 of 2 overflowed."""
    weight, bias, numbers = rng.normal(size=(300, 2, 3)), rng.normal(size=300), statistics(rng, 300)
    found, want = (fastbn.fold(weight, bias, *numbers, 1e-5, kind="conv", groups=n) for n in (np.uint8(2), 2))
    for a, b in zip(found, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_why_padding_is_refused(rng):
    """Folded with a padding all the same, the border is wrong, by as much as anything, and the middle right."""
    torch = pytest.importorskip("torch")
    weight, numbers, x = rng.normal(size=(6, 4, 3)), statistics(rng, 4), torch.from_numpy(rng.normal(size=(2, 4, 9)))
    mean, var, gamma, beta = map(torch.from_numpy, numbers)
    normed = torch.nn.functional.batch_norm(x, mean, var, gamma, beta, eps=1e-5)
    expected = torch.nn.functional.conv1d(normed, torch.from_numpy(weight), padding=1)
    w, b = map(torch.from_numpy, fastbn.fold(weight, None, *numbers, 1e-5, **BEFORE, padding=0))
    error = (torch.nn.functional.conv1d(x, w, b, padding=1) - expected).abs().numpy()
    assert error[..., 1:-1].max() < 1e-12
    assert error[..., [0, -1]].min() > 1e-3
