"""What save="y" keeps: x had back from y, and x of the channels that y doesn't tell of."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from extras import SHAPES

import fastbn

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("activation", [None, ("leaky_relu", 0.2)], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rare", ["two", "most", "all"])
@pytest.mark.parametrize("name", ["nchw", "nhwc", "nc", "instance"])
def test_x_had_back_from_y(name, rare, frozen, activation, rng):
    """In place: y is all that is kept. Gradients are those of x kept, to 1e-5; signs of gamma, and channels without."""
    shape, axis = SHAPES[name]
    x = rng.normal(3, 1.5, shape).astype(np.float32)
    axes = sorted(a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,)))
    channels = tuple(shape[a] for a in axes)
    gamma, beta = rng.normal(0, 1, channels).astype(np.float32), rng.normal(0, 1, channels).astype(np.float32)
    gamma.reshape(-1)[{"two": slice(1, 3), "most": slice(1, None), "all": slice(None)}[rare]] = 0
    gamma.reshape(-1)[2] = 1e-6
    stats = (rng.normal(3, 1, channels), rng.gamma(2, 1, channels)) if frozen else None
    more = {"axis": axis, "frozen": stats, "activation": activation}
    y, saved = fastbn.forward(x, gamma, beta, **more)
    place = x.copy()
    got, kept = fastbn.forward(place, gamma, beta, **more, save="y", out=place)
    assert got is place
    np.testing.assert_array_equal(got, y)
    dy = rng.normal(0.1, 1, shape).astype(np.float32)
    for part, a, b in zip(
        ("dx", "dgamma", "dbeta"), fastbn.backward(dy, kept), fastbn.backward(dy, saved), strict=True
    ):
        n = x.size / a.size
        assert np.abs(a - b).max() <= 1e-5 * max(1, np.abs(b).max()) * n**0.5, part


@pytest.mark.parametrize("seed", range(4))
def test_x_had_back_from_elu(seed, backend):
    """dx is that of x kept to 1e-5 of its largest. Of 200,000 values one is near five deviations below the mean, where
    y tells least of x; a dy that grows with x brings that into dx."""
    rng = np.random.default_rng(seed)
    gamma, beta = rng.uniform(0.5, 3, 8), rng.uniform(-2, 2, 8)
    # Two just within what is had back, and one that was off by 1.3e-5 when it was.
    gamma[:3], beta[:3] = (1.27, 1.6, 1.8), (0, 1.4, 0)
    x = rng.normal(0, 1, (200_000, 8)).astype(np.float32)
    dy = 3 * x + rng.normal(1, 1, x.shape).astype(np.float32)
    saved = [fastbn.forward(x, gamma, beta, activation="elu", save=save)[1] for save in "xy"]
    want, found = (fastbn.backward(dy, s)[0] for s in saved)
    assert (np.abs(found - want).max(0) <= 1e-5 * np.abs(want).max(0)).all()
    assert 0 < saved[1]._lost.seen.size < 6 * len(x)  # gamma 1.8, and not the first two


@pytest.mark.parametrize("given", ["gamma", "beta", "neither"])
def test_without_gamma_or_beta_by_two_axes(given, rng):
    x, dy = rng.normal(2, 1.5, (2, 9, 3, 4)).astype(np.float32)
    numbers = rng.normal(1, 0.2, (3, 4)).astype(np.float32)
    numbers[1, 2] = 0 if given == "gamma" else 100  # 1 / 64 of beta is too small a gamma
    more = {given: numbers, "axis": (-2, -1)} if given != "neither" else {"axis": (1, 2)}
    (y, saved), (want, exact) = (fastbn.forward(x, **more, save=save) for save in "yx")
    assert (saved._lost is not None) == (given != "neither")
    np.testing.assert_array_equal(y, want)
    for a, b in zip(fastbn.backward(dy, saved), fastbn.backward(dy, exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def _transposed(a, *order):
    return np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))


LAYOUTS = {  # of x and of dy, beside a shape, whose channels are on axis 1
    "runs": ((5, 12, 70), lambda a: a),
    "runs of more than a line": ((6, 40, 7, 9), lambda a: a),
    "far runs": ((40, 12, 33), lambda a: a),
    "columns of five": ((70, 12, 5), lambda a: a),
    "columns of twenty": ((90, 12, 20), lambda a: a),
    "channels last": ((11, 40, 5, 6), lambda a: _transposed(a, 0, 2, 3, 1)),
    "(N, C)": ((391, 70), lambda a: a),
    "folded rows": ((401, 5), lambda a: a),
    "folded rows of three": ((101, 5, 3), lambda a: _transposed(a, 0, 2, 1)),
    "transposed": ((390, 20), lambda a: _transposed(a, 1, 0)),
    "every second": ((6, 9, 60), lambda a: np.repeat(a, 2, axis=2)[:, :, ::2]),
    "a slice of channels": ((330, 37), lambda a: np.pad(a, ((0, 0), (3, 5)))[:, 3:40]),
    "backwards": ((9, 9, 35), lambda a: np.ascontiguousarray(a[:, ::-1])[:, ::-1]),
    "cropped": ((6, 9, 7, 8), lambda a: np.pad(a, ((0, 0), (0, 0), (1, 1), (1, 1)))[:, :, 1:-1, 1:-1]),
    "of the other byte order": ((5, 12, 70), lambda a: a.astype(a.dtype.newbyteorder())),
}


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", LAYOUTS)
def test_channels_that_y_does_not_tell_of(name, dtype, rng):
    """One, neighbours, those of both ends, all but one; many tiles and blocks, by all threads; dy as x or not, and dx
    over it, and far from 0. Theirs are the gradients of x kept, to a few eps: other channels' rounding has no share in
    them."""
    shape, laid = LAYOUTS[name]
    channels, eps = shape[1], float(np.finfo(dtype).eps)
    data, slopes = rng.normal(2, 1.5, shape).astype(dtype), rng.normal(100, 1, shape).astype(dtype)
    values = data.size / channels
    for number, lost in enumerate(([channels // 2], [1, 2], [0, channels - 1], np.r_[1:channels])):
        x, dy = laid(data), (laid if number % 2 else np.ascontiguousarray)(slopes)
        gamma, beta = rng.choice([-1, 1], (2, channels)) * rng.uniform(0.5, 1.2, (2, channels))
        gamma[lost] = rng.choice([0, 1e-9, -1e-6], len(lost))
        more = {"activation": ("leaky_relu", 0.9)}
        exact = fastbn.backward(dy, fastbn.forward(x, gamma, beta, **more)[1])
        place = laid(data.copy())
        _, saved = fastbn.forward(place, gamma, beta, **more, save="y", out=place)
        assert sorted(saved._lost.seen.reshape(-1)) == sorted(data[:, lost].reshape(-1))
        found = fastbn.backward(dy, saved)
        over = dy.astype(x.dtype)
        other = fastbn.backward(over, saved, out=(over, None, None))
        for one, same, right, axis in zip(found, other, exact, (1, 0, 0), strict=True):
            # y's rounding moves xhat by eps |beta / gamma| / 2 and more for dy's sake; sums of it grow by sqrt n. In
            # another order, where dy lies otherwise.
            size = np.abs(right).max() * (values**0.5 if axis == 0 else 1)
            np.testing.assert_allclose(one, right, rtol=0, atol=64 * eps * size)
            np.testing.assert_allclose(same, one, rtol=0, atol=64 * eps * size)
            ours, theirs = np.take(one, lost, axis), np.take(right, lost, axis)
            np.testing.assert_allclose(ours, theirs, rtol=4 * eps, atol=8 * eps * np.abs(theirs).max())


def test_channels_that_y_does_not_tell_of_among_millions(backend, rng):
    """Where they stand among those kept is a number that float32 hasn't."""
    if backend == "reference":
        pytest.skip("it takes NumPy a minute")
    channels = 1_200_000
    x, dy = (rng.standard_normal((2, channels, 15), np.float32) for _ in range(2))
    gamma, beta = np.zeros(channels, np.float32), np.full(channels, 0.7, np.float32)
    gamma[[0, -1]] = 1
    more = {"activation": ("leaky_relu", 0.2)}
    found = [fastbn.backward(dy, fastbn.forward(x, gamma, beta, **more, save=save)[1])[1] for save in "yx"]
    np.testing.assert_allclose(found[0][1:-1], found[1][1:-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["runs", "channels last", "folded rows"])
def test_channels_that_y_does_not_tell_of_in_few_bits(name, dtype, rng):
    shape, laid = LAYOUTS[name]
    kind, channels = np.dtype(getattr(ml_dtypes, dtype, dtype)), shape[1]
    x, dy = (laid(rng.normal(m, 1, shape)).astype(kind) for m in (2, 0.1))
    gamma, beta = rng.choice([-1, 1], (2, channels)) * rng.uniform(0.5, 1.2, (2, channels))
    lost = [0, 2, 3]
    gamma[lost] = 0, 1e-6, -1e-3
    found = [
        fastbn.backward(dy, fastbn.forward(x, gamma, beta, activation="elu", save=save)[1])[0].astype(np.float64)
        for save in "yx"
    ]
    unit, size = float(ml_dtypes.finfo(kind).eps), np.abs(found[1]).max(axis=(0, *range(2, len(shape))), keepdims=True)
    # Half an ulp of dx, or a whole one where the two round apart; float32's own arithmetic 2 eps.
    assert (np.abs(found[0] - found[1])[:, lost] <= 2 * unit * np.abs(found[1])[:, lost] + 1e-6 * size[:, lost]).all()
    assert (np.abs(found[0] - found[1]) <= 64 * unit * size).all()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("activation", "masked"),  # each kernel takes five seconds: each activation, each mask, and both
    [
        (None, "no weights"),
        (None, "normalize"),
        (None, "keep"),
        (("leaky_relu", 0.2), "keep"),
        (("elu", 0.7), "no weights"),
    ],
    ids=str,
)
def test_x_had_back_from_y_of_groups(activation, masked, frozen, rng):
    """Each has a table of its own, gamma's column too, as what z's deviation comes to is each group's."""
    x, dy = (rng.normal(1, s, (9, 5, 6)) * np.repeat([1.0, 3.0, 0.25], 3)[:, None, None] for s in (1, 2))
    gamma, beta = rng.choice([-1, 1], 5) * rng.uniform(0.5, 1.2, 5), rng.normal(0, 0.5, 5)
    gamma[2] = 1e-5
    stats = (rng.normal(1, 1, (3, 5)), rng.gamma(2, 1, (3, 5))) if frozen else None
    for groups in (3, np.array([2, 0, 1, 1, 0, 2, 2, 0, 1])):
        more = {"frozen": stats, "activation": activation, "groups": groups}
        if masked != "no weights":
            more |= {"weights": rng.gamma(1, 1, (9, 1, 6)) * (rng.random((9, 1, 6)) < 0.8), "masked": masked}
        found = [fastbn.backward(dy, fastbn.forward(x, gamma, beta, **more, save=save)[1]) for save in "xy"]
        for a, b in zip(*found, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "gamma", "activation", "bound"),
    [
        (np.float16, 1e-8, None, 1e-2),  # y underflows
        (np.float16, 3.0, "elu", 3e-2),  # y is near its limit
        (np.float32, 8.0, "elu", 1e-5),
        (np.float32, 1e-20, "elu", 1e-5),  # 1 + y is 1
        (np.float32, 1.0, ("leaky_relu", 1e-40), 1e-5),  # 1 / 1e-40 is infinite
        (np.float64, 1e-9, "elu", 1e-12),
    ],
)
def test_what_y_does_not_tell(dtype, gamma, activation, bound, rng):
    x, dy = (rng.normal(0, 1, (256, 2, 8)).astype(dtype) for _ in range(2))
    found = [
        fastbn.backward(dy, fastbn.forward(x, [gamma, 1.0], [0.0, 0.0], activation=activation, save=save)[1])
        for save in "xy"
    ]
    for a, b in zip(*found, strict=True):
        size = np.abs(a.astype(np.float64)).max(axis=(0, 2) if a.ndim == 3 else None, keepdims=True)
        assert np.all(np.abs(a.astype(np.float64) - b) <= bound * size)


def test_channels_kept_apart_behind_an_axis_of_one(rng):
    """Several channel axes, the first of which has one channel."""
    x, dy = (rng.normal(0, 1, (4, 1, 6)) for _ in range(2))
    gamma = np.array([[0, 0, 1.0, 0, 2, -1]])
    found = [fastbn.backward(dy, fastbn.forward(x, gamma, axis=(1, 2), save=save)[1]) for save in "xy"]
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_elu_at_its_limit_spoils_no_channel(backend, rng):
    """What one value's y doesn't tell is that value's alone."""
    x, dy = rng.normal(0, 1, (2000, 2)).astype(np.float32), rng.normal(0, 1, (2000, 2)).astype(np.float32)
    x[0, 0] = -1000
    with fastbn.set_backend(backend):
        a, b = (fastbn.backward(dy, fastbn.forward(x, activation="elu", save=save)[1]) for save in "xy")
    for one, other in zip(a[0][1:], b[0][1:], strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-3)
    assert np.isfinite(b[0]).all()
    assert np.isfinite(b[1]).all()
