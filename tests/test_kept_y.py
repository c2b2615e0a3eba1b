"""What save="y" keeps: x had back from y, and channels of x picked and put back where y doesn't tell."""

from __future__ import annotations

import numpy as np
import pytest
from extras import SHAPES
from fastbn.kernels.cpu.plan import Sizes

import fastbn
from fastbn import kept

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


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("name", ["nchw", "instance"])
def test_lost_channels_where_they_lie(name, groups, rng, monkeypatch):
    """Those of long runs aren't copied; over dy itself they must be."""
    shape, axis = SHAPES[name]
    groups = groups if name == "nchw" else None
    x, dy = (rng.normal(1, s, shape).astype(np.float32) for s in (2, 1))
    channels = tuple(shape[a] for a in (axis if isinstance(axis, tuple) else (axis,)))
    gamma, beta = rng.normal(1, 0.1, channels), rng.normal(0, 1, channels)
    gamma.reshape(-1)[[1, 2]] = 0, 1e-6
    _, saved = fastbn.forward(x, gamma, beta, axis=axis, groups=groups, save="y")
    copied = fastbn.backward(dy, saved)
    seen = []
    monkeypatch.setattr("fastbn.runs.picked", lambda *args: seen.append(args) or kept.picked(*args))
    monkeypatch.setattr(kept, "LONG", 1)
    for a, b in zip(fastbn.backward(dy, saved), copied, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    assert not seen
    over = dy.copy()
    np.testing.assert_allclose(fastbn.backward(over, saved, out=over)[0], copied[0], rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


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
    np.testing.assert_array_equal(kept.picked(x, (1, 2), np.array([0, 2]))[:, 0], x[:, 0, [0, 2]])
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


@pytest.mark.parametrize("few", [1, 4, 11])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory", ["dense", "reversed", "gaps", "swapped", "repeated"])
@pytest.mark.parametrize(
    ("shape", "axes"), [((5, 3, 11, 12), (3,)), ((5, 12, 11), (1,)), ((7, 3, 4), (1, 2)), ((3, 7, 4, 2), (0, 2))]
)
def test_channels_picked_and_put_back(shape, axes, memory, threads, few, rng, monkeypatch):
    """Of any layout, by one thread and by two; what isn't picked is left alone."""
    monkeypatch.setattr("fastbn.kernels.cpu.channels.SIZES", Sizes(serial=1, asleep=1) if threads > 1 else Sizes())
    made = {
        "dense": lambda a: a,
        "reversed": lambda a: np.ascontiguousarray(a.T).T,
        "gaps": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
        "swapped": lambda a: a.astype(">f4"),
        "repeated": lambda a: np.broadcast_to(a[..., :1], a.shape),
    }[memory]
    x = made(rng.standard_normal(shape).astype(np.float32))
    x.flags.writeable = False
    at = np.sort(rng.choice(12, few, replace=False))

    def columns(a):
        return np.moveaxis(a, axes, range(-len(axes), 0)).reshape(-1, np.prod([a.shape[i] for i in axes]))

    found = kept.picked(x, axes, at)
    assert [n for a, n in enumerate(found.shape) if a not in axes] == [n for a, n in enumerate(shape) if a not in axes]
    np.testing.assert_array_equal(columns(found), columns(x)[:, at])
    target = rng.standard_normal(shape).astype(np.float32)
    if memory in ("reversed", "gaps", "swapped"):
        target = made(target)
    expected = columns(target).copy()
    expected[:, at] = -columns(found)
    kept.put_back(target, axes, at, -found)
    np.testing.assert_array_equal(columns(target), expected)
