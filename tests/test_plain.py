"""The short way of plain calls: the same bits as the long one, on whatever takes it, and no other call takes it."""

import ml_dtypes
import numpy as np
import pytest
from fastbn.kernels import cpu
from fastbn.kernels.cpu.plan import CURVED, plan_of

import fastbn
from fastbn import batchnorm, plain
from fastbn.plain import way_of

LAYOUTS = {
    "C": lambda x: x,
    "channels last": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1),
    "Fortran": np.asfortranarray,
    "backwards": lambda x: x[::-1],
    "every other": lambda x: np.repeat(x, 2, 0)[::2],
    "cropped": lambda x: np.concatenate([x, x], 3)[..., : x.shape[3]],
    "one sample, repeated": lambda x: np.broadcast_to(x[:1], x.shape),
}
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


def numbers(rng, dtype=np.float32, shape=(6, 5, 4, 3)):
    """x, dy, and gamma, beta, mean and var by channel."""
    x, dy = (rng.normal(rng.normal(), 2, shape).astype(dtype) for _ in range(2))
    kind = np.float64 if dtype is np.float64 else np.float32
    gamma, beta, mean = rng.normal(1, 1, (3, shape[1])).astype(kind)
    return x, dy, gamma, beta, mean, rng.uniform(0.5, 2, shape[1]).astype(kind)


def both(monkeypatch, call):
    """The results of `call` the short way and the long one, and whether there is a short way at all."""
    ways = []
    monkeypatch.setattr(batchnorm, "way_of", lambda *key: ways.append(way_of(*key)) or ways[-1])
    short = call()
    monkeypatch.setattr(batchnorm, "way_of", lambda *_: None)
    return short, call(), bool(ways) and ways[0] is not None


def same(a, b):
    assert (a.shape, a.strides, a.dtype) == (b.shape, b.strides, b.dtype)
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits(layout, dtype, frozen, backend, rng, monkeypatch):
    x, dy, gamma, beta, mean, var = numbers(rng, dtype)
    x = LAYOUTS[layout](x)
    given = (mean, var) if frozen else None

    def call():
        y, saved = fastbn.forward(x, gamma, beta, eps=1e-3, frozen=given)
        results = [y, saved.table]
        for gradient in (dy, dy.swapaxes(2, 3).copy().swapaxes(2, 3), LAYOUTS[layout](dy)):
            results += fastbn.backward(gradient, saved)
        assert repr(saved.moments) == repr(fastbn.moments(x) if given is None else None)
        return [*results, fastbn.infer(x, mean, var, gamma, beta), fastbn.forward(x)[0]]

    short, long, taken = both(monkeypatch, call)
    assert taken == (layout != "cropped")
    for a, b in zip(short, long, strict=True):
        same(a, b)


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("layout", ["C", "channels last", "cropped"])
def test_an_activation_alone(layout, dtype, frozen, backend, rng, monkeypatch):
    x, dy, gamma, beta, mean, var = numbers(rng, dtype)
    x, dy = LAYOUTS[layout](x), LAYOUTS[layout](dy)
    given, used = (mean, var) if frozen else None, []
    for name in ("forward_plainly", "backward_plainly", "infer_plainly"):
        way = getattr(plain, name)
        monkeypatch.setattr(batchnorm, name, lambda *a, n=name, way=way: used.append(n) or way(*a))

    def call():
        y, saved = fastbn.forward(x, gamma, beta, frozen=given, activation="relu")
        assert (np.asarray(y, np.float32) >= 0).all()
        strided = fastbn.backward(dy.swapaxes(2, 3).copy().swapaxes(2, 3), saved, need=(True, True, False))[:2]
        inferred = fastbn.infer(x, mean, var, gamma, beta, activation="relu")
        return [y, saved.table, *fastbn.backward(dy, saved), *strided, inferred]

    short, long, taken = both(monkeypatch, call)
    assert taken == (layout != "cropped")
    assert used[: 3 * taken] == (["forward_plainly", "infer_plainly", "backward_plainly"] if taken else [])
    assert used.count("backward_plainly") == taken
    for a, b in zip(short, long, strict=True):
        same(a, b)
    with pytest.raises(
        ValueError, match=r"fastbn.forward: activation is str 'swish'; expected one of relu, leaky_relu"
    ):
        fastbn.forward(x, activation="swish")
    with pytest.raises(ValueError, match=r"fastbn.infer: activation is tuple .*which takes no parameter"):
        fastbn.infer(x, mean, var, activation=("relu", 1))


@pytest.mark.parametrize("out", [None, "x", "another"])
@pytest.mark.parametrize("lost", [[], [1, 3], [0, 1, 2, 3, 4]], ids=["none lost", "two lost", "all lost"])
@pytest.mark.parametrize(  # not each with each: a kernel of either takes seconds to compile
    ("activation", "dtype"),
    [(None, np.float32), (("leaky_relu", 0.3), ml_dtypes.bfloat16), ("elu", np.float32)],
    ids=["none", "leaky_relu", "elu"],
)
@pytest.mark.parametrize("layout", ["C", "channels last", "backwards", "cropped"])
def test_y_saved(layout, activation, dtype, lost, out, backend, rng, monkeypatch):
    """With dy in other layouts, which goes the long way after a forward pass that went the short one."""
    data, slopes, *_ = numbers(rng, dtype)
    gamma, beta = rng.uniform(0.5, 1, (2, 5)).astype(np.float32)
    gamma[lost] = 0
    dy, used = LAYOUTS[layout](slopes), []
    for name in ("forward_plainly", "backward_plainly"):
        way = getattr(plain, name)
        monkeypatch.setattr(batchnorm, name, lambda *a, n=name, way=way: used.append(n) or way(*a))

    def call():
        x = LAYOUTS[layout](data.copy())
        y = {None: None, "x": x, "another": np.empty_like(x)}[out]
        y, saved = fastbn.forward(x, gamma, beta, activation=activation, save="y", out=y)
        turned = dy.swapaxes(2, 3).copy().swapaxes(2, 3)
        found = [y.copy(order="K"), saved.table, *fastbn.backward(dy, saved), *fastbn.backward(turned, saved)]
        over = fastbn.backward(dy, saved, out=y)
        assert over[0] is y
        with pytest.raises(ValueError, match=r"fastbn.backward: saved has no x"):
            fastbn.backward(dy, saved)
        return [*found, *over]

    if len(lost) == 5:  # x itself is kept, which dx over y leaves alone
        with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
            call()
        return
    short, long, taken = both(monkeypatch, call)
    backwards = layout == "backwards" and out == "x"  # what a new array would not be like
    assert taken == (layout != "cropped")
    assert used == (["forward_plainly", "backward_plainly"] if taken and not backwards else [])
    for a, b in zip(short, long, strict=True):
        same(a, b)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_every_axis(axis, rng, monkeypatch):
    x, dy, *_ = numbers(rng, shape=(7, 6, 5))
    gamma, beta = rng.normal(1, 1, (2, x.shape[axis])).astype(np.float32)

    def call():
        y, saved = fastbn.forward(x, gamma, beta, axis=axis)
        return y, *fastbn.backward(dy, saved)

    short, long, taken = both(monkeypatch, call)
    assert taken
    for a, b in zip(short, long, strict=True):
        same(a, b)


@pytest.mark.parametrize("places", ["dx", "all", "dbeta"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("layout", ["C", "channels last"])
def test_results_in_given_arrays(layout, dtype, places, backend, rng, monkeypatch):
    x, dy, gamma, beta, *_ = numbers(rng, dtype)
    x, dy = LAYOUTS[layout](x), LAYOUTS[layout](dy)

    def call():
        y, dx = np.full_like(x, np.nan), np.full_like(x, np.nan)
        dgamma, dbeta = np.full((2, 5), np.nan, gamma.dtype)
        out, saved = fastbn.forward(x, gamma, beta, out=y)
        assert out is y
        given = {"dx": (dx, None, None), "all": (dx, dgamma, dbeta), "dbeta": (None, None, dbeta)}[places]
        found = fastbn.backward(dy, saved, out=dx if places == "dx" else given)
        assert all(a is b for a, b in zip(found, given, strict=True) if b is not None)
        return y, *found

    used = []
    monkeypatch.setattr(batchnorm, "forward_plainly", lambda *a: used.append("y") or plain.forward_plainly(*a))
    monkeypatch.setattr(batchnorm, "backward_plainly", lambda *a: used.append("dx") or plain.backward_plainly(*a))
    short, long, taken = both(monkeypatch, call)
    assert taken
    assert used == ["y", "dx"]
    for a, b in zip(short, long, strict=True):
        same(a, b)


def test_given_arrays_that_overlap_go_the_long_way(rng):
    """In place results are right, and what would spoil another result or an input is refused as ever."""
    x, dy, gamma, beta, *_ = numbers(rng)
    y, saved = fastbn.forward(x, gamma, beta)
    dx, dgamma, dbeta = fastbn.backward(dy, saved)
    again = x.copy()
    same(fastbn.forward(again, gamma, beta, out=again)[0], y)
    given = dy.copy()
    found = fastbn.backward(given, saved, out=given)
    assert found[0] is given
    for a, b in zip(found, (dx, dgamma, dbeta), strict=True):
        same(a, b)
    memory = np.empty(x.size + 60, np.float32)
    memory[: x.size] = x.ravel()
    head, behind = memory[: x.size].reshape(x.shape), memory[60:].reshape(x.shape)
    with pytest.raises(ValueError, match=r"fastbn.forward: out overlaps x"):
        fastbn.forward(head, gamma, beta, out=behind)
    both = np.empty(6, np.float32)
    with pytest.raises(ValueError, match=r"fastbn.backward: out \(dbeta\) (overlaps|shares)"):
        fastbn.backward(dy, saved, out=(None, both[:5], both[1:]))
    with pytest.raises(ValueError, match=r"fastbn.backward: out \(dgamma\) (overlaps|shares)"):
        fastbn.backward(dy, saved, out=(None, dy.reshape(-1)[:5], None))
    frozen = np.empty_like(x)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"fastbn.forward: out is read-only"):
        fastbn.forward(x, out=frozen)
    with pytest.raises(ValueError, match=r"fastbn.forward: out is a float64 array"):
        fastbn.forward(x, out=np.empty(x.shape))
    turned = np.empty(x.shape[::-1], x.dtype).transpose()
    same(np.ascontiguousarray(fastbn.forward(x, gamma, beta, out=turned)[0]), y)


def test_what_is_not_plain_goes_the_long_way(rng, monkeypatch):
    """Each of these gives what it gave, or raises what it raised, before there was a short way."""
    x, dy, gamma, beta, *_ = numbers(rng)
    y, saved = fastbn.forward(x, gamma, beta)
    memory = np.empty(4 * x.size + 1, np.uint8)
    odd = memory[1:].view(np.float32).reshape(x.shape)
    odd[...] = x
    for other in (x.astype(x.dtype.newbyteorder()), odd):
        same(fastbn.forward(other, gamma, beta)[0].astype(np.float32), y)
    same(fastbn.forward(x, gamma, beta, axis=[1])[0], y)
    off = memory[1:].view(np.float32).reshape(x.shape)
    off[...] = dy
    for a, b in zip(fastbn.backward(off, saved), fastbn.backward(dy, saved), strict=True):
        same(a, b)
    assert fastbn.backward(dy, saved, need=[True, False, True])[1] is None
    with pytest.warns(fastbn.OneValueWarning, match=r"one value per channel"):
        fastbn.forward(x[:1, :, 0, 0])
    with pytest.raises(ValueError, match=r"fastbn.forward: eps is int 0; expected a finite number above 0"):
        fastbn.forward(x, eps=0)
    with pytest.raises(ValueError, match=r"fastbn.forward: gamma has shape \(4,\); expected \(5,\)"):
        fastbn.forward(x, gamma[:4])
    with pytest.raises(ValueError, match=r"fastbn.infer: var has a negative value"):
        fastbn.infer(x, beta, -np.abs(gamma))
    with pytest.raises(ValueError, match=r"scale or zero_point is given with x of float32"):
        fastbn.forward(x, scale=2.0)
    with pytest.raises(TypeError, match=r"fastbn.backward: need is int 3; expected three bools"):
        fastbn.backward(dy, saved, need=3)
    with pytest.raises(ValueError, match=r"fastbn.backward: dy is a float64 array of shape \(6, 5, 4, 3\)"):
        fastbn.backward(dy.astype(np.float64), saved)
    with pytest.raises(np.exceptions.AxisError, match=r"axis=4 is out of range"):
        fastbn.forward(x, axis=4)
    assert fastbn.forward(x[:0])[0].shape == (0, 5, 4, 3)


def test_a_saved_that_lost_x_says_so(rng):
    x, dy, *_ = numbers(rng)
    _, saved = fastbn.forward(x)
    fastbn.backward(dy, saved, out=x)
    with pytest.raises(ValueError, match=r"fastbn.backward: saved has no x"):
        fastbn.backward(dy, saved)


@pytest.mark.parametrize(
    ("sizes", "stages", "special", "step", "work"),
    [
        ((4, 4), cpu.MAP, 0, 1, 7200),
        ((2, 2), cpu.MAP, 0, 1, 3600),
        ((1, 4), cpu.MAP, 0, 1, 4500),
        ((4, 4), cpu.MAP, CURVED, 1, 9600),
        ((2, 2), cpu.MAP, CURVED, 1, 9600),
        ((4, 4), cpu.MAP, 0, 2, 9600),
        ((4, 4), cpu.SUM | cpu.FINISH | cpu.MAP, 0, 1, 9600),
        ((2, 2), cpu.SUM | cpu.FINISH, 0, 1, 9600),
    ],
    ids=["map", "of halves", "of uint8", "with exp", "of halves with exp", "strided", "sums and map", "sums of halves"],
)
def test_how_much_work_a_call_is(sizes, stages, special, step, work):
    """Three eighths of all bytes where memory is waited for; where elements take time, those of x as float32."""
    own, other = sizes
    strides = tuple((3 * 400 * step * n, 400 * step * n, step * n) for n in sizes)
    assert plan_of((2, 3, 400), strides, (own, other, 0), stages, cpu.SIZES, 2, 2, special).work == work
