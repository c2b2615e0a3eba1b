"""Weights, groups, residuals, activations, what is kept, and whole numbers: against the reference, and each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cases import DTYPES, TOLERANCE, eps
from fastbn.kernels.cpu.plan import Sizes

import fastbn
from fastbn import kept
from fastbn.extras import ACTIVATIONS

SHAPES = {
    "nchw": ((6, 5, 7, 9), 1),
    "nchw long": ((3, 2, 40, 50), 1),
    "nhwc": ((6, 7, 9, 20), -1),
    "nhwc narrow": ((6, 37, 3), -1),
    "nc": ((37, 20), 1),
    "cn": ((5, 200), 0),
    "short runs": ((40, 6, 7), 1),
    "across channels": ((8, 40, 7, 7), 1),
    "instance": ((6, 5, 30), (0, 1)),
}
WEIGHTS = "none", "mask", "samples", "positions"
GROUPS = "none", "int", "sizes", "ids"


@pytest.fixture(autouse=True, params=["cpu", "reference"])
def backend(request):
    with fastbn.set_backend(request.param):
        yield request.param


def weights_for(kind, rng, shape, axis):
    axes = {a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))}
    full = [1 if a in axes else n for a, n in enumerate(shape)]
    samples = next(a for a in range(len(shape)) if a not in axes)
    if kind == "none":
        return None
    if kind == "mask":
        return rng.random(full) < 0.6
    if kind == "samples":
        return rng.integers(0, 3, shape[samples]).astype(np.float64)
    w = rng.gamma(1.0, 1.0, full)
    w[rng.random(full) < 0.2] = 0
    return w.astype(np.float32)


def groups_for(kind, rng, shape, axis):
    axes = {a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))}
    n = shape[next(a for a in range(len(shape)) if a not in axes)]
    if kind == "none":
        return None
    if kind == "int":
        return 4 if n > 4 else 2
    if kind == "sizes":
        return [1, 0, n - 2, 1]
    ids = rng.integers(0, 3, n)
    ids[0] = 4  # and group 3 is empty
    return ids


def compare(name, got, exact, dtype, times=1.0, terms=0.0):
    unit = TOLERANCE[dtype.name] * eps(dtype) * times
    error = np.abs(got.astype(np.float64) - exact) / np.maximum(np.maximum(1, terms), np.abs(exact))
    assert got.shape == exact.shape
    assert error.max(initial=0) <= unit, f"{name}: {error.max() / unit:.2f} of what is allowed, at {error.argmax()}"


def run_both(rng, shape, axis, dtype, *, frozen=False, residual=False, offset=3.0, **more):
    x = (rng.normal(offset, 1.5, shape) + rng.normal(0, 2, shape[-1])).astype(dtype)
    axes = tuple(sorted(a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))))
    channels = tuple(shape[a] for a in axes)
    gamma, beta = rng.normal(1, 0.5, channels).astype(np.float32), rng.normal(0, 1, channels).astype(np.float32)
    more = {k: v for k, v in more.items() if v is not None}
    if residual:
        given = rng.normal(0, 1, shape if residual is True else residual).astype(dtype)
        more["residual"] = np.broadcast_to(given, shape)
    if frozen:
        groups = more.get("groups")
        sets = (
            ()
            if groups is None
            else (
                groups
                if isinstance(groups, int)
                else len(groups)
                if isinstance(groups, list)
                else int(groups.max()) + 1,
            )
        )
        more["frozen"] = rng.normal(offset, 1, (*sets, *channels)), rng.gamma(2, 1, (*sets, *channels))
    exact, kept = fastbn.reference.forward(x, gamma, beta, axis=axis, **more)
    y, saved = fastbn.forward(x, gamma, beta, axis=axis, **more)
    dy = rng.normal(0.1, 1, shape).astype(dtype)
    return x, y, saved, exact, kept, dy


def as_frozen(kept):
    return kept._replace(moments=None, groups=tuple((rows, as_frozen(part)) for rows, part in kept.groups))


def check(rng, shape, axis, dtype, **more):
    x, y, saved, exact, kept, dy = run_both(rng, shape, axis, dtype, **more)
    assert y.dtype == dtype
    times = 2.0 if more.get("activation") in ("silu", "gelu", "hardswish", "tanh", "elu") else 1.0
    compare("y", y, exact, dtype, times)
    got, want = fastbn.backward(dy, saved), fastbn.reference.backward(dy, kept)
    # dx is the difference of a dy and two sums. A set of one or two values has an a of 300 and a dx of 0.
    scaled = np.abs(fastbn.reference.backward(dy, as_frozen(kept))[0])
    assert len(got) == len(want)
    for name, a, b in zip(("dx", "dgamma", "dbeta", "dresidual"), got, want, strict=False):
        n = x.size // a.size
        numbers = np.dtype(np.float32) if dtype.itemsize < 8 else dtype
        if n > 1:  # sums: relative to what is added up
            assert np.abs(a - b).max() <= 8 * eps(numbers) * max(1.0, np.abs(b).max()) * n**0.5, name
        else:
            compare(name, a, b, dtype, 2 * times, scaled)


@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[1], DTYPES[2]], ids=str)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", SHAPES)
def test_weights_and_groups(name, weights, groups, dtype, rng):
    shape, axis = SHAPES[name]
    w, g = weights_for(weights, rng, shape, axis), groups_for(groups, rng, shape, axis)
    if w is g is None:
        return
    for masked, frozen in itertools.product(
        ("normalize", "zero", "keep") if w is not None else ("normalize",), (False, True)
    ):
        check(rng, shape, axis, dtype, weights=w, groups=g, masked=masked, frozen=frozen)


# Each activation and dtype compiles kernels of its own for 15 s; `test_activation_functions` has the rest.
@pytest.mark.parametrize(
    ("activation", "dtype"), [("relu", DTYPES[0]), ("gelu", DTYPES[0]), ("relu", DTYPES[3])], ids=str
)
def test_activations(activation, dtype, rng):
    for shape, axis in SHAPES.values():
        for residual, frozen in itertools.product((False, activation == "relu"), (False, True)):
            check(rng, shape, axis, dtype, activation=activation, residual=residual, frozen=frozen)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(8, 5, 7, 33), (200, 33), (4, 9, 9, 3)], ids=str)
def test_a_residual_that_is_repeated(shape, frozen, rng):
    """Channels last, where its rows lie on each other: a step of 0 was taken for no residual, and others were read."""
    one = (1,) * (len(shape) - 2)
    for rows in ((1, *one), (shape[0], *one), (1, *shape[1:-1])):
        check(rng, shape, -1, DTYPES[0], activation="relu", residual=(*rows, shape[-1]), frozen=frozen)


def test_a_residual_that_is_overwritten(rng):
    """The slopes of an activation need it: backward says that it is gone; without an activation it isn't needed."""
    many = rng.normal(0, 1, (41, 6)).astype(np.float32)
    x, dy = rng.normal(rng.normal(0, 2, 6), 1, (2, 40, 6)).astype(np.float32)
    gamma, beta = rng.normal(1, 0.5, 6), rng.normal(0, 1, 6)
    for activation in ("relu", None):
        r = many[:-1].copy()
        want, saved = fastbn.forward(x, gamma, beta, residual=r, activation=activation)
        right = fastbn.backward(dy, saved)
        y, saved = fastbn.forward(x, gamma, beta, residual=r, activation=activation, out=r)
        assert y is r
        np.testing.assert_array_equal(y, want)
        if activation is None:
            np.testing.assert_allclose(fastbn.backward(dy, saved)[0], right[0], atol=1e-6)
            continue
        with pytest.raises(ValueError, match=r"saved has no residual, which `out` overwrote"):
            fastbn.backward(dy, saved)
        _, saved = fastbn.forward(x, gamma, beta, residual=many[:-1], activation=activation)
        with pytest.raises(ValueError, match=r"out \(dx\) overlaps residual in memory"):
            fastbn.backward(dy, saved, out=(many[1:], None, None))
        with pytest.raises(ValueError, match=r"out \(dresidual\) overlaps residual in memory"):
            fastbn.backward(dy, saved, out=(None, None, None, many[1:]))
        found = fastbn.backward(dy, saved, out=(many[:-1], None, None))
        np.testing.assert_array_equal(found[0], right[0])
        with pytest.raises(ValueError, match=r"saved has no residual, which `out` overwrote"):
            fastbn.backward(dy, saved)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_the_references(activation, rng, backend):
    if backend == "cpu":
        pytest.skip("compiled for three of them above")
    for shape, axis in SHAPES.values():
        check(rng, shape, axis, DTYPES[1], activation=activation, residual=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_functions(activation, dtype, rng, backend):
    """f, f' and f^-1 of sixteen numbers at a time: within 8 eps, relative to 1 where they are small; NaN and Inf."""
    if backend == "reference":
        pytest.skip("it is what they are held against")
    import numba
    from fastbn.kernels.cpu import activations as a
    from fastbn.kernels.cpu.lanes import load, pointer, save, spread
    from fastbn.kernels.reference import activate, deactivate, slope

    invertible = activation in ("leaky_relu", "elu")
    straighten = a.straighten if invertible else a.slope

    def run(how, z, out):
        like = spread(z[0])
        for i in range(0, z.size, 16):
            v = load(pointer(z, 0), i, like)
            f = a_bend(how, v)
            save(pointer(out, 0), i, f)
            save(pointer(out, out.strides[0]), i, a_slope(how, v))
            save(pointer(out, 2 * out.strides[0]), i, a_straighten(how, f))

    a_bend, a_slope, a_straighten = a.bend, a.slope, straighten
    real = numba.from_dtype(np.dtype(dtype))
    signature = (a.How(activation, False, False), numba.types.Array(real, 1, "C"), numba.types.Array(real, 2, "C"))
    dispatcher = numba.njit(error_model="numpy")(run)
    dispatcher.compile(signature)
    parameter = ACTIVATIONS[activation] or 0.0
    small = np.array([0.0, -0.0, 1e-30, -1e-30, 3.0, -3.0, 6.0, 2.9999, -2.9999, 5.9999, 1e-3, -1e-3, 20, -20, 80, -80])
    z = np.concatenate([small, rng.normal(0, 3, 4000), np.linspace(-40, 40, 2000), rng.normal(0, 1e-3, 976)]).astype(
        dtype
    )
    out = np.empty((3, z.size), dtype)
    entry = dispatcher.overloads[signature].entry_point
    entry((parameter, 1.0, 0.0, 0.0), z, out)
    wide = z.astype(np.float64)
    exact = activate(activation, parameter, wide), slope(activation, parameter, wide)
    limit = 8 * np.finfo(dtype).eps  # exp by way of a power of 2, and three or four more roundings
    for got, want in zip(out[:2], exact, strict=True):
        assert (np.abs(got - want) <= limit * np.maximum(1, np.abs(want))).all()
    if invertible:
        back = deactivate(activation, parameter, out[0].astype(np.float64))
        kept = out[0] > -0.999  # nearer to elu's limit, -1, y says ever less of z
        assert (np.abs(out[2] - back)[kept] <= 8 * np.finfo(dtype).eps * np.maximum(1, np.abs(back[kept]))).all()
    edge = np.resize(np.array([np.nan, np.inf, -np.inf, 1e30], dtype), 16)
    out = np.empty((3, 16), dtype)
    entry((parameter, 1.0, 0.0, 0.0), edge, out)
    assert np.isnan(out[0, 0])
    want = activate(activation, parameter, edge[1:2].astype(np.float64))[0]
    assert out[0, 1] == want or abs(out[0, 1] - want) < 1e-6


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


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("activation", "masked"),  # each kernel takes five seconds: each activation, each mask, and both
    [
        (None, "no weights"),
        (None, "normalize"),
        (None, "keep"),
        (("leaky_relu", 0.2), "normalize"),
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


@pytest.mark.parametrize("kind", ["u1", "u8", "i1"])
def test_ids_and_sizes_of_any_whole_numbers(kind, rng):
    """Differences of unsigned ids are never below 0, and narrow sizes add up to less than they are."""
    x = rng.normal(rng.normal(0, 3), 1, (6, 3, 4)).astype(np.float32)
    gamma, beta = rng.normal(1, 0.5, 3), rng.normal(0, 1, 3)
    ids = np.array([1, 0, 1, 0, 2, 1])
    want = fastbn.forward(x, gamma, beta, groups=ids)[0]
    np.testing.assert_array_equal(fastbn.forward(x, gamma, beta, groups=ids.astype(kind))[0], want)
    many, sizes = rng.normal(0, 1, (300, 2)), [120, 120, 60]
    narrow = list(np.array(sizes, kind))
    np.testing.assert_array_equal(fastbn.forward(many, groups=narrow)[0], fastbn.forward(many, groups=sizes)[0])
    if kind == "u1":
        with pytest.raises(ValueError, match=r"add up to 262; expected 6,"):
            fastbn.forward(x, groups=[np.uint8(200), np.uint8(62)])


@pytest.mark.parametrize("groups", [[3, 3, 0], [0, 2, 0, 0, 4, 0, 0]])
def test_empty_groups_at_the_end(groups, rng):
    """They take nothing from those before them: counts, and gradients by weights."""
    x, dy, w = rng.normal(3, 2, (6, 2)), rng.normal(3, 2, (6, 2)), rng.gamma(1, 1, 6)
    assert [m.count for m in fastbn.forward(x, groups=groups)[1].moments] == groups
    found = [lib.forward(x, groups=groups, weights=w)[1] for lib in (fastbn, fastbn.reference)]
    for a, b in zip(found[0].moments, found[1].moments, strict=True):
        np.testing.assert_allclose(a.count, b.count, rtol=1e-14)
    both = zip(fastbn.backward(dy, found[0]), fastbn.reference.backward(dy, found[1]), strict=True)
    for a, b in both:
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


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


def test_units_that_would_turn_or_keep_whole_numbers_are_refused(rng):
    q = rng.integers(0, 9, (8, 3), np.uint8)
    for scale in (-1.0, 0.0, np.inf):
        with pytest.raises(ValueError, match=r"scale is .*; expected finite numbers, and a scale above 0"):
            fastbn.forward(q, scale=scale)
    mask = rng.random(8) < 0.7
    for units in ({"scale": 0.5}, {"zero_point": 3}):
        with pytest.raises(ValueError, match=r"masked='keep' with a scale or a zero_point; expected 'normalize' or"):
            fastbn.forward(q, weights=mask, masked="keep", **units)
    y, _ = fastbn.forward(q, weights=mask, masked="keep")
    np.testing.assert_array_equal(y[~mask], q[~mask])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", ["nchw", "nhwc narrow", "short runs"])
def test_whole_numbers(name, dtype, rng):
    """They are read as they are: y is that of scale (q - zero point), in float32, and so are moments."""
    shape, axis = SHAPES[name]
    info, scale, zero = np.iinfo(dtype), 0.037, 11.0
    q = rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    gamma, beta = rng.normal(1, 0.5, shape[axis]), rng.normal(0, 1, shape[axis])
    more = {"axis": axis, "scale": scale, "zero_point": zero}
    y, saved = fastbn.forward(q, gamma, beta, **more)
    x = scale * (q.astype(np.float64) - zero)
    exact, kept = fastbn.reference.forward(x, gamma, beta, axis=axis)
    assert y.dtype == np.float32
    compare("y", y, exact, y.dtype)
    for found in (saved.moments, fastbn.moments(q, **more)):
        np.testing.assert_allclose(found.mean, kept.moments.mean, rtol=2e-7, atol=2e-7 * scale * info.max)
        np.testing.assert_allclose(found.var(), kept.moments.var(), rtol=1e-6)
    again = fastbn.infer(q, *kept.moments.exact(), gamma, beta, **more)
    compare("infer", again, exact, y.dtype)
    dy = rng.normal(0, 1, shape).astype(np.float32)
    dx, dgamma, dbeta = fastbn.backward(dy, saved, need=(False, True, True))
    _, want_gamma, want_beta = fastbn.reference.backward(dy, kept)
    assert dx is None
    n = q.size / len(dgamma)
    assert np.abs(dgamma - want_gamma).max() <= 1e-6 * n
    assert np.abs(dbeta - want_beta).max() <= 1e-6 * n
    with pytest.raises(ValueError, match=r"dx of whole numbers .* no gradient.*need=\(False, True, True\)"):
        fastbn.backward(dy, saved)


@pytest.mark.parametrize("scale", [1e200, 1e-170, 0.0, np.inf])
def test_units_whose_squares_overflow(scale, rng):
    q = rng.integers(0, 255, (6, 5)).astype(np.uint8)
    for call in (fastbn.forward, fastbn.moments, lambda q, scale: fastbn.infer(q, [5.0] * 5, [1.0] * 5, scale=scale)):
        with pytest.raises(ValueError, match=r"scale is .* a scale above 0, 1e-150 to 1e150"):
            call(q, scale=scale)


def test_moments_of_no_whole_numbers(rng):
    """Their mean is 0, not that of units: -scale zero_point."""
    q, units = rng.integers(0, 255, (6, 5)).astype(np.uint8), {"scale": 1 / 255, "zero_point": 113}
    _, saved = fastbn.forward(q, groups=np.array([2, 2, 2, 3, 3, 3]), **units)
    for nothing in (saved.moments[0], fastbn.moments(q[:0], **units)):
        assert nothing.count == 0
        np.testing.assert_array_equal(nothing.mean, 0)
    assert (np.abs(saved.moments[3].mean) > 0).all()


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("scale", [1e-29, 1e-20, 1e-10, 1e10, 1e29])
def test_weights_of_any_size(scale, axis, rng):
    """Only their ratios count; by squares of small numbers float32 lost all of them."""
    x = (rng.normal(0, 1e-8, (64, 3, 40)) + rng.normal(0, 1e-8, (1, 3, 1))).astype(np.float32)
    w = rng.random((64, 1, 40))
    w[:, :, 30:] = 0
    if axis == -1:
        x, w = np.ascontiguousarray(x.transpose(0, 2, 1)), w.transpose(0, 2, 1)
    gamma, beta = rng.normal(1, 0.5, 3), rng.normal(0, 1, 3)
    w = (w * scale).astype(np.float32)
    y, saved = fastbn.forward(x, gamma, beta, weights=w, axis=axis, eps=1e-20)
    exact, kept = fastbn.reference.forward(x.astype(np.float64), gamma, beta, weights=w, axis=axis, eps=1e-20)
    compare("y", y, exact, y.dtype)
    np.testing.assert_allclose(saved.moments.var(), kept.moments.var(), rtol=2e-7)


def test_weights_all_alike_leave_the_variance_alone(rng):
    """Their sum in float32 is off by the same in all lanes: the variance was by 2.5e-7, y by 3.7 eps at most."""
    x = rng.normal(rng.normal(0, 1, (1, 2, 1)), 1, (8, 2, 16384)).astype(np.float32)
    for one in (0.9350724, 0.7, 1.1):
        _, saved = fastbn.forward(x, weights=np.full(8, one))
        exact = x.astype(np.float64).var(axis=(0, 2))
        np.testing.assert_allclose(saved.moments.var(), exact, rtol=1e-7)


@pytest.mark.parametrize("more", [{"groups": 4}, {"activation": ("leaky_relu", 1.0)}], ids=["groups", "activation"])
def test_dgamma_where_dy_is_nearly_one_number(more, rng):
    """x less its mean adds up to 0; by what rounding left of that, times the sum of dy, dgamma was off by 3e-3."""
    x = rng.normal(rng.normal(0, 2, (1, 4, 1)), 1, (32, 4, 784)).astype(np.float32)
    dy = rng.normal(1, 1e-3, x.shape).astype(np.float32)
    gamma, beta = rng.normal(1, 0.5, 4), rng.normal(0, 1, 4)
    found = fastbn.backward(dy, fastbn.forward(x, gamma, beta, **more)[1])[1]
    exact = fastbn.reference.backward(dy, fastbn.reference.forward(x, gamma, beta, **more)[1])[1]
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6 * np.abs(exact).max())


def test_no_channels(rng):
    x = rng.normal(0, 1, (4, 0, 3)).astype(np.float32)
    for more in ({"groups": 2}, {"weights": np.ones(4)}, {"activation": "relu"}):
        for run in (fastbn, fastbn.reference):
            y, saved = run.forward(x, **more)
            assert [a.shape for a in run.backward(y, saved)] == [(4, 0, 3), (0,), (0,)]


def test_a_mask_is_the_compacted_array(rng):
    """Equal to dense batch norm on the rows that count, whatever the others hold."""
    x = rng.normal(1e5, 1, (200, 7)).astype(np.float32)
    mask = rng.random(200) < 0.5
    gamma, beta = rng.normal(1, 0.5, 7), rng.normal(0, 1, 7)
    dense, saved = fastbn.forward(x[mask], gamma, beta)
    dy = rng.normal(0, 1, x.shape).astype(np.float32)
    dx, dgamma, dbeta = fastbn.backward(dy[mask], saved)
    x[~mask] = np.resize([np.nan, np.inf, 1e30], (np.sum(~mask), 7))
    y, kept = fastbn.forward(x, gamma, beta, weights=mask, masked="zero")
    np.testing.assert_allclose(y[mask], dense, rtol=5e-7, atol=5e-7)
    assert not y[~mask].any()
    assert kept.moments.count == mask.sum()
    got = fastbn.backward(dy, kept)
    np.testing.assert_allclose(got[0][mask], dx, rtol=1e-6, atol=1e-6)
    assert not got[0][~mask].any()
    np.testing.assert_allclose(got[1], dgamma, rtol=1e-5)
    np.testing.assert_allclose(got[2], dbeta, rtol=1e-5)


def test_no_weight_at_all(rng):
    """What is normalized is beta, and nothing is known of the batch."""
    x = rng.normal(3, 1, (20, 6)).astype(np.float32)
    beta = rng.normal(0, 1, 6).astype(np.float32)
    y, saved = fastbn.forward(x, beta=beta, weights=np.zeros(20))
    np.testing.assert_array_equal(y, np.broadcast_to(beta, y.shape))
    assert saved.moments.count == 0
    running = fastbn.RunningStats(6)
    before = running.exact()
    running.update(saved.moments)
    np.testing.assert_array_equal(running.exact(), before)
    dx, dgamma, _ = fastbn.backward(x, saved)
    assert not dx.any()
    assert not dgamma.any()


def test_groups_are_calls_of_their_own(rng):
    """And one group a sample is instance norm."""
    x = rng.normal(3, 2, (11, 5, 8, 9)).astype(np.float32)
    gamma, beta = rng.normal(1, 0.5, 5), rng.normal(0, 1, 5)
    y, saved = fastbn.forward(x, gamma, beta, groups=3)
    parts = [fastbn.forward(part, gamma, beta) for part in np.split(x, [4, 8])]
    np.testing.assert_allclose(y, np.concatenate([part for part, _ in parts]), rtol=5e-7, atol=5e-7)
    for found, (_, own) in zip(saved.moments, parts, strict=True):
        assert found.count == own.moments.count
        np.testing.assert_allclose(found.mean, own.moments.mean, rtol=1e-6)
    alone, _ = fastbn.forward(x, gamma, beta, groups=11)
    wide = np.broadcast_to(gamma, (11, 5)), np.broadcast_to(beta, (11, 5))
    np.testing.assert_allclose(alone, fastbn.forward(x, *wide, axis=(0, 1))[0], rtol=5e-7, atol=5e-7)


@pytest.mark.usefixtures("tiny")
def test_the_same_bits_for_any_number_of_threads(rng, backend):
    """Sets, weights and activations too; blocks are tiny, so that threads share each set's."""
    if backend == "reference":
        pytest.skip("NumPy")
    numba = pytest.importorskip("numba")
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one thread only")
    for shape, axis in SHAPES.values():
        x = rng.normal(3, 2, shape).astype(np.float32)
        dy = rng.normal(0, 1, shape).astype(np.float32)
        ids = groups_for("ids", rng, shape, axis)
        for more in ({"groups": 2}, {"groups": ids}, {"weights": weights_for("positions", rng, shape, axis)}):
            found = []
            for threads in (1, 2):
                numba.set_num_threads(threads)
                try:
                    y, saved = fastbn.forward(x, axis=axis, **more)
                    found.append((y, *fastbn.backward(dy, saved)))
                finally:
                    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
            for one, two in zip(*found, strict=True):
                np.testing.assert_array_equal(one.view(np.uint32), two.view(np.uint32))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_is_read_that_was_not_written(threads, rng, backend, monkeypatch):
    """New arrays full of NaN change no bit; empty groups and groups without weight, which nothing writes, included."""
    if backend == "reference":
        pytest.skip("its arrays are results")
    from fastbn.kernels import cpu

    real = np.empty

    def poisoned(*args, **kwargs):
        made = real(*args, **kwargs)
        if made.dtype.kind == "f":
            made.fill(np.nan)
        return made

    monkeypatch.setattr(cpu.threads, "threads", lambda: threads)
    for shape, axis in SHAPES.values():
        x, dy = rng.normal(3, 2, (2, *shape)).astype(np.float32)
        ids, w = groups_for("ids", rng, shape, axis), weights_for("samples", rng, shape, axis)
        w[ids == 1] = 0
        for more in ({}, {"groups": ids}, {"weights": w}, {"groups": ids, "weights": w, "masked": "zero"}):
            found = []
            for empty in (real, poisoned):
                with monkeypatch.context() as patch:
                    patch.setattr(np, "empty", empty)
                    y, saved = fastbn.forward(x, axis=axis, **more)
                    moments = saved.moments if isinstance(saved.moments, list) else [saved.moments]
                    rows = [a for m in moments for a in m.exact()]
                    found.append([a.tobytes() for a in (y, *fastbn.backward(dy, saved), *rows)])
            assert found[0] == found[1], (shape, axis, list(more))


WRONG = {
    "weights below 0": (
        {"weights": [1, -1, 1, 1]},
        ValueError,
        r"weights has -1; expected finite numbers of 0 or more",
    ),
    "weights too small for squares": (
        {"weights": [1e-31] * 4},
        ValueError,
        r"weights has 1e-31 as its largest.*Divide",
    ),
    "weights of NaN": ({"weights": [1, np.nan, 1, 1]}, ValueError, r"weights has nan"),
    "weights of another shape": (
        {"weights": np.ones((3, 1, 1))},
        ValueError,
        r"weights has shape \(3, 1, 1\); .*\(4, 1, 5\)",
    ),
    "weights by channel": ({"weights": np.ones((4, 3, 5))}, ValueError, r"weights has shape \(4, 3, 5\)"),
    "weights of text": ({"weights": ["a"] * 4}, TypeError, r"weights is a .*expected bools, or real numbers"),
    "masked without weights": ({"masked": "zero"}, ValueError, r"masked='zero' without weights"),
    "masked unknown": ({"masked": "drop", "weights": np.ones(4)}, ValueError, r"masked is str 'drop'; expected one of"),
    "no groups": ({"groups": 0}, ValueError, r"groups is 0; expected a number of groups from 1 to 4"),
    "too many groups": ({"groups": 5}, ValueError, r"groups is 5"),
    "sizes that don't add up": ({"groups": [1, 2]}, ValueError, r"sizes that add up to 3; expected 4"),
    "ids of another length": ({"groups": np.zeros(3, int)}, ValueError, r"one whole number .* for each of 4 samples"),
    "ids far apart": ({"groups": np.array([0, 1, 2, 10**6])}, ValueError, r"np\.unique"),
    "groups of text": ({"groups": "two"}, TypeError, r"groups is str 'two'"),
    "an unknown activation": ({"activation": "swish"}, ValueError, r"activation is str 'swish'; expected one of relu,"),
    "a parameter that isn't taken": ({"activation": ("relu", 1.0)}, ValueError, r"which takes no parameter"),
    "groups of no samples": ({"groups": 2, "axis": (0, 1, 2)}, ValueError, r"every axis of x, \(4, 3, 5\)"),
    "a parameter past float32": (
        {"activation": ("elu", 1e39)},
        ValueError,
        r"expected a finite number as its parameter",
    ),
    "a parameter of NaN": ({"activation": ("elu", np.nan)}, ValueError, r"expected a finite number as its parameter"),
    "y kept of relu": (
        {"activation": "relu", "save": "y"},
        ValueError,
        r"save='y' needs an activation that can be inv",
    ),
    "y kept of a residual": (
        {"save": "y", "residual": np.ones((4, 3, 5), np.float32)},
        ValueError,
        r"can't be had with",
    ),
    "save unknown": ({"save": "z"}, ValueError, r"save is str 'z'; expected 'x' or 'y'"),
    "a residual of another type": ({"residual": np.ones((4, 3, 5))}, ValueError, r"residual is a float64 .*float32"),
    "units of floats": ({"scale": 0.1}, ValueError, r"scale or zero_point is given with x of float32"),
}


@pytest.mark.parametrize(("more", "error", "match"), WRONG.values(), ids=WRONG)
def test_errors(more, error, match, rng):
    x = rng.normal(0, 1, (4, 3, 5)).astype(np.float32)
    out = np.full_like(x, 7)
    with pytest.raises(error, match=match):
        fastbn.forward(x, out=out, **more)
    assert (out == 7).all()


def test_a_layer_of_whole_numbers(rng):
    """They have no gradient; its parameters have."""
    q, dy = rng.integers(0, 255, (40, 3)).astype(np.uint8), rng.normal(0, 1, (40, 3)).astype(np.float32)
    layer = fastbn.BatchNorm(3)
    layer.gamma[:], layer.beta[:] = rng.normal(1, 0.5, 3), rng.normal(0, 1, 3)
    layer(q)
    assert layer.backward(dy) is None
    _, saved = fastbn.forward(q, layer.gamma, layer.beta)
    _, dgamma, dbeta = fastbn.backward(dy, saved, need=(False, True, True))
    np.testing.assert_array_equal(layer.dgamma, dgamma)
    np.testing.assert_array_equal(layer.dbeta, dbeta)


def test_a_layer_with_an_activation(rng, backend):
    """The same as a layer without one and an activation behind it, forward and backward."""
    x, r, dy = (rng.normal(1, 2, (6, 5, 4, 4)).astype(np.float32) for _ in range(3))
    plain, fused = fastbn.BatchNorm(5), fastbn.BatchNorm(5, activation="relu")
    for bn in (plain, fused):
        bn.gamma[...], bn.beta[...] = np.linspace(-1, 2, 5), np.linspace(-1, 1, 5)
    z = plain(x) + r
    np.testing.assert_allclose(fused(x, residual=r), np.maximum(z, 0), rtol=1e-6, atol=1e-6)
    dx, g = plain.backward(dy * (z > 0)), dy * (z > 0)
    np.testing.assert_allclose(fused.backward(dy), dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(fused.dresidual, g)
    np.testing.assert_allclose(fused.dgamma, plain.dgamma, rtol=1e-5, atol=1e-5)
    assert fastbn.BatchNorm(5)(x, weights=np.zeros(6), masked="keep") is not x
    with pytest.raises(ValueError, match=r"fastbn\.BatchNorm: activation is str 'swish'"):
        fastbn.BatchNorm(5, activation="swish")


@pytest.mark.parametrize(
    ("dtype", "short"),
    [(np.float32, False), (np.float32, True), (np.float64, False)],
    ids=["float32", "half", "float64"],
)
def test_the_edge_of_two_lines_is_where_z_changes_its_sign(dtype, short, rng, backend):
    """Backward compares x with a threshold where forward computes z: for every x they must agree."""
    if backend == "reference":
        pytest.skip("has no such threshold")
    import numba
    from fastbn.kernels.cpu import activations
    from fastbn.kernels.cpu import coefficients as parts

    how = activations.always(activations.How("relu", False, False, short))

    @numba.njit
    def coefficients(h, a, b, exactly, slot, numbers, singles):
        """As of a mean of h, gamma a, beta b and a deviation of 1."""
        stats, affine = np.array([[h], [0.0], [1.0], [1.0]]), np.array([[a], [b]])
        parts.forward_coefficients(how(), 0, stats, affine, numbers, singles, exactly, slot.itemsize == 8)
        return exactly or singles[5, 0] != 0

    @numba.njit
    def edge(numbers, singles, exactly, slot):
        return parts.edge(how(), (numbers[0, 0], numbers[1, 0], numbers[2, 0]), singles, 0, exactly, slot)

    @numba.njit
    def below(x, numbers, singles, exactly, slot):
        lens = numbers[0, 0], numbers[1, 0], numbers[2, 0]
        return parts.below(how(), x, 1.0, lens, singles, 0, exactly, slot)

    numbers, singles, fast = np.zeros((3, 1)), np.zeros((6, 1), dtype), 0
    slot = np.zeros(1, dtype)
    for i in range(3000):
        h, a, b = rng.normal(size=3) * 10.0 ** rng.integers(-6, 7, 3)
        a, b, h = 0.0 if i % 50 == 1 else a, 0.0 if i % 50 == 2 else b, 0.0 if i % 50 == 3 else h
        exactly = coefficients(h, a, b, dtype is np.float64 or i % 3 == 0, slot, numbers, singles)
        fast += not exactly
        s, t = edge(numbers, singles, exactly, slot)
        x0 = dtype(s * t)
        others = np.concatenate(
            [rng.normal(size=4) * 10.0 ** rng.integers(-9, 9, 4), [0.0, h, np.inf, -np.inf, np.nan]]
        )
        with np.errstate(all="ignore"):
            xs = [x0, np.nextafter(x0, dtype(np.inf)), np.nextafter(x0, dtype(-np.inf)), *others.astype(dtype)]
            for x in map(float, xs):
                assert below(x, numbers, singles, exactly, slot) == (s * x <= t), (h, a, b, x, exactly)
    assert fast > 1500 or dtype is np.float64
    for h, a, b in itertools.product((0.0, 3.0, np.inf, np.nan), (1.0, -2.0, np.inf, np.nan), (0.5, -np.inf, np.nan)):
        exactly = coefficients(h, a, b, dtype is np.float64, slot, numbers, singles)
        s, t = edge(numbers, singles, exactly, slot)
        for x in (-1.0, 2.0, 1e30):
            assert below(x, numbers, singles, exactly, slot) == (s * x <= t), (h, a, b, x, exactly)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("values", [90, 900], ids=["few", "many"])
def test_backward_takes_the_line_that_forward_took(activation, dtype, values, rng, backend):
    """For x within ulps of the kink, in both layouts; gamma so small that float32 won't do is among them."""
    C, top = 9, 1e38
    mean, var = rng.normal(size=C) * 10.0 ** rng.integers(-3, 4, C), rng.uniform(0.2, 3, C)
    gamma, beta = rng.normal(size=C), rng.normal(size=C)
    gamma[0], beta[4:], mean[4:] = 1e-33, 0.0, [2.5, 3.0, -7.0, 0.1875, 100.0]  # x is the mean there, and z is 0
    root = np.clip(mean - beta / gamma * np.sqrt(var + 1e-5), -top, top)
    x = np.repeat(root.astype(dtype)[:, None], values, 1)
    x += np.spacing(np.abs(0.9 * x)) * rng.integers(-6, 7, (C, values)).astype(dtype)
    for axis, given in ((0, x), (1, np.ascontiguousarray(x.T))):
        y, saved = fastbn.forward(given, gamma, beta, axis=axis, frozen=(mean, var), activation=activation)
        dx, _, _ = fastbn.backward(np.ones_like(given), saved)
        slope = dx.astype(np.float64) / np.expand_dims(gamma / np.sqrt(var + 1e-5), 1 - axis)
        assert 0 < (slope < 0.5).sum() < x.size
        np.testing.assert_array_equal(slope < 0.5, y <= 0)
