"""jvp and backward_backward: against the reference, which is held against finite differences and PyTorch's gradgrad."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from cases import CASES, DTYPES, TOLERANCE, eps
from extras import GROUPS, NARROW, SHAPES, WEIGHTS, groups_for, weights_for
from test_functions import draw, memory_order

import fastbn
from fastbn import reference


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks so small that a small array has many of each, and runs on all threads."""
    from fastbn.kernels.cpu import second

    sizes = second.Sizes(
        block=48, slab=4000, line=64, columns=32, folded=32, height=16, few=8, serial=0, asleep=0, past=4000
    )
    monkeypatch.setattr(second, "SIZES", sizes)
    monkeypatch.setattr(second, "FEW", 7)


def channels_of(shape, axis):
    axes = {a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))}
    return tuple(shape[a] for a in sorted(axes)), tuple(a for a in range(len(shape)) if a not in axes)


def sizes_of(kept, x_t, dy, p, q):
    """What the terms of the results are of size: r, z and ggamma are sums in which much may cancel."""
    parts = [part for _, part in kept.groups] or [kept]
    s = max(float((1 / np.sqrt(part.var + part.eps)).max(initial=0)) for part in parts)
    xhat = max(
        1.0, *(float(np.abs(np.nan_to_num(part.d / np.sqrt(part.var + part.eps))).max(initial=0)) for part in parts)
    )
    gamma = max(1.0, float(np.abs(kept.gamma).max(initial=0)))
    u, g = (max(1.0, float(np.nanmax(np.abs(a.astype(np.float64)), initial=0))) for a in (x_t, dy))
    p, q = (max(1.0, float(np.abs(a).max(initial=0))) for a in (p, q))
    r = gamma * s * u * (1 + xhat**2) + p * xhat + q
    n = max(1, x_t.size // max(1, kept.gamma.size))
    z = gamma * s * s * g * u * xhat**3 + p * s * g * (1 + xhat**2)
    return r, z, s * n * g * u * xhat**2


def compare(name, got, exact, dtype, size):
    """Rounded once to the dtype; before that, in float64, a handful of roundings of terms of `size`."""
    unit = 0.0 if dtype == np.float64 else TOLERANCE[dtype.name] * eps(dtype)
    limit = unit * np.abs(exact) + 64 * 2.2e-16 * size + (1e-7 if dtype == np.float16 else 0)  # its subnormals
    if dtype != np.float64:  # the mean and the variance that forward found in float32 sums
        limit = limit + 2.0**-23 * size
    error = np.abs(np.asarray(got, np.float64) - exact)
    assert got.shape == exact.shape
    assert np.all((error <= limit) | (np.isnan(got) & np.isnan(exact))), f"{name}: {np.nanmax(error / limit)}"


def check(x, gamma, axis, rng, *, dy=None, ddx=None, **more):
    dtype = x.dtype.newbyteorder("=")
    channels, _ = channels_of(x.shape, axis)
    beta, p, q = rng.normal(size=(3, *channels))
    u = rng.normal(0.5, 1, x.shape).astype(dtype) if ddx is None else ddx
    g = rng.normal(-0.5, 1, x.shape).astype(dtype) if dy is None else dy
    with np.errstate(all="ignore"):
        _, saved = fastbn.forward(x, gamma, beta, axis=axis, **more)
        _, kept = reference.forward(x, gamma, beta, axis=axis, **more)
    of_r, of_z, of_gamma = sizes_of(kept, u, g, p, q)
    y_t = fastbn.jvp(u, saved, p, q)
    assert y_t.dtype == dtype
    assert memory_order(y_t) == memory_order(np.empty_like(x))
    compare("y_t", y_t, reference.jvp(u, kept, p, q), dtype, of_r)
    got = fastbn.backward_backward(u, p, q, g, saved)
    exact = reference.backward_backward(u, p, q, g, kept)
    numbers = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    assert got[1].dtype == numbers
    compare("gx", got[0], exact[0], dtype, of_z)
    compare("ggamma", got[1], exact[1], numbers, of_gamma)
    compare("gdy", got[2], exact[2], dtype, of_r)
    np.testing.assert_array_equal(got[2], y_t)  # one and the same operator


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_case(case, dtype, backend, rng):
    x, gamma, *_ = draw(case, dtype, rng)
    channels, _ = channels_of(x.shape, case.axis)
    check(x, gamma, case.axis, rng)
    check(x, gamma, case.axis, rng, frozen=(rng.normal(size=channels), rng.uniform(0.3, 4, channels)))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: d.name)
@pytest.mark.parametrize("name", SHAPES | NARROW)
def test_weights_and_groups(name, dtype, backend, rng):
    shape, axis = (SHAPES | NARROW)[name]
    channels, _ = channels_of(shape, axis)
    for weights, groups in itertools.product(WEIGHTS, GROUPS if name in SHAPES else ("none", "ids")):
        w, ids = weights_for(weights, rng, shape, axis), groups_for(groups, rng, shape, axis)
        if w is None and ids is None:
            continue
        for masked in ("normalize", "zero", "keep") if w is not None else ("normalize",):
            x = rng.normal(3, 2, shape).astype(dtype)
            if masked != "normalize":  # what is absent may hold anything
                x[np.broadcast_to(as_wide(w, shape, axis) == 0, shape)] = np.nan
            gamma = rng.normal(1, 0.5, channels)
            check(x, gamma, axis, rng, weights=w, masked=masked, groups=ids)
            sets = () if ids is None else (int(ids.max()) + 1,) if isinstance(ids, np.ndarray) else None
            sets = sets if sets is not None else (ids,) if isinstance(ids, int) else (len(ids),)
            frozen = rng.normal(3, 1, (*sets, *channels)), rng.uniform(0.5, 2, (*sets, *channels))
            check(x, gamma, axis, rng, weights=w, masked=masked, groups=ids, frozen=frozen)


def as_wide(w, shape, axis):
    """Weights for each sample or position, of x's number of axes."""
    _, others = channels_of(shape, axis)
    return w.reshape([-1 if a == others[0] else 1 for a in range(len(shape))]) if w.ndim == 1 else w


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("masked", ["zero", "keep"])
def test_what_is_absent_may_hold_anything(masked, frozen, backend, rng):
    """x, dy and ddx too."""
    x, u, dy = rng.normal(rng.normal(0, 3, (6, 1)), 2, (3, 20, 6, 5))
    gamma, p, q, mean = rng.normal(size=(4, 6))
    weights = rng.random((20, 1, 5)) < 0.7
    given = (mean, rng.uniform(0.5, 2, 6)) if frozen else None
    results = []
    for filler in (np.nan, 0.0):
        a, b, c = (np.where(weights, v, filler) for v in (x, u, dy))
        _, saved = fastbn.forward(a, gamma, weights=weights, masked=masked, frozen=given)
        gx, ggamma, gdy = fastbn.backward_backward(b, p, q, c, saved)
        results.append((gx, ggamma, np.where(weights, gdy, 0.0)))
        assert np.isfinite(gx).all()
        assert np.isfinite(ggamma).all()
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("offset", [0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("last", [False, True])
def test_at_any_offset(last, dtype, offset, backend, rng):
    """Of x, dy and ddx: their means drop out of nearly all terms."""
    shape, axis = ((8, 6, 50), 1) if not last else ((50, 8, 6), -1)
    x, u, g = rng.normal(0, 1, (3, *shape))
    gamma = rng.normal(size=6)
    saved = fastbn.forward((x + offset).astype(dtype), gamma, axis=axis)[1]
    u, g = (u + offset).astype(dtype), (g + offset).astype(dtype)
    _, kept = reference.forward((x + offset).astype(dtype), gamma, axis=axis)
    got = fastbn.backward_backward(u, None, None, g, saved)
    exact = reference.backward_backward(u, None, None, g, kept)
    limit = 4 * np.finfo(dtype).eps if dtype == np.float32 else 1e-14 * max(1.0, offset / 100)
    for name, a, b in zip(("gx", "ggamma", "gdy"), got, exact, strict=True):
        assert np.abs(a - b).max() <= limit * max(1.0, np.abs(b).max()), name


@pytest.mark.parametrize("first", ["absent", "present", "some"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("shape", [(3000, 5), (900, 20, 5), (40, 3, 150)], ids=str)
def test_a_mask_at_an_offset(shape, dtype, first, backend, rng):
    """Pivots are means of what counts, wherever that begins; and x less its mean adds up to 0 better than float32's."""
    x, u, g = rng.normal(0, 1, (3, *shape))
    x, u, g = ((a + b).astype(dtype) for a, b in ((x, rng.normal()), (u, 1e3), (g, 1e3)))
    keep, gamma = rng.random(shape[0]) < 0.7, rng.normal(1, 0.5, shape[1])
    if first != "some":
        keep[: shape[0] // 4] = first == "present"
    got = fastbn.backward_backward(u, None, None, g, fastbn.forward(x, gamma, weights=keep, masked="zero")[1])
    exact = reference.backward_backward(u[keep], None, None, g[keep], reference.forward(x[keep], gamma)[1])
    # By weights the means' rounding in float64 counts, 1e3 times eps; float32 has digits to spare for that.
    limit = np.finfo(dtype).eps * (4 if dtype == np.float32 else 16e3)
    for name, a, b in zip(("gx", "ggamma", "gdy"), got, exact, strict=True):
        a = a[keep] if a.ndim > 1 else a
        assert np.abs(a - b).max() <= limit * max(1.0, np.abs(b).max()), name


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("masked", ["normalize", "zero", "keep"])
@pytest.mark.parametrize("groups", [None, [2, 3]])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_finite_differences(weighted, groups, masked, frozen, rng):
    """Of the reference's own forward and backward, which know nothing of the closed form."""
    if masked != "normalize" and not weighted:
        return
    shape, axis, channels = (5, 2, 3), 1, 2
    x, u, g = rng.normal(1, 1, (3, *shape))
    gamma, beta, p, q = rng.normal(size=(4, channels))
    more = {"groups": groups, "masked": masked}
    if weighted:
        more["weights"] = rng.uniform(0.5, 2, (5, 1, 3)) * (rng.random((5, 1, 3)) < 0.8)
    if frozen:
        sets = () if groups is None else (2,)
        more["frozen"] = rng.normal(size=(*sets, channels)), rng.uniform(0.5, 2, (*sets, channels))

    def y(x, gamma, beta):
        return reference.forward(x, gamma, beta, axis=axis, **more)[0]

    def loss(x, gamma, g):
        dx, dgamma, dbeta = reference.backward(g, reference.forward(x, gamma, beta, axis=axis, **more)[1])
        return (dx * u).sum() + dgamma @ p + dbeta @ q

    kept = reference.forward(x, gamma, beta, axis=axis, **more)[1]
    step = 1e-5  # truncation step^2, rounding 1e-16 / step, of values of about 10
    difference = (
        y(x + step * u, gamma + step * p, beta + step * q) - y(x - step * u, gamma - step * p, beta - step * q)
    ) / (2 * step)
    np.testing.assert_allclose(reference.jvp(u, kept, p, q), difference, rtol=1e-7, atol=1e-7)
    for which, gradient in enumerate(reference.backward_backward(u, p, q, g, kept)):
        for index in np.ndindex(gradient.shape):
            moved = [[x, gamma, g], [x, gamma, g]]
            for side, sign in ((0, 1), (1, -1)):
                moved[side][which] = moved[side][which].copy()
                moved[side][which][index] += sign * step
            difference = (loss(*moved[0]) - loss(*moved[1])) / (2 * step)
            assert abs(difference - gradient[index]) < 1e-7 * (1 + abs(gradient[index])) * 10


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("shape", "last"), [((6, 5, 7, 9), False), ((6, 20, 3, 3), True)])
def test_against_the_gradgrad_of_pytorch(shape, last, frozen, rng):
    torch = pytest.importorskip("torch")
    channels = shape[1]
    x, u, g = rng.normal(2, 1, (3, *shape))
    if last:
        x, u, g = (np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for a in (x, u, g))
    gamma, beta, p, q, mean = rng.normal(size=(5, channels))
    var = rng.uniform(0.5, 2, channels)
    tx, tg, tgamma, tbeta = (torch.tensor(a, requires_grad=True) for a in (x, g, gamma, beta))
    given = (torch.tensor(mean), torch.tensor(var)) if frozen else (None, None)
    y = torch.nn.functional.batch_norm(tx, *given, tgamma, tbeta, training=not frozen, eps=1e-5)
    first = torch.autograd.grad(y, (tx, tgamma, tbeta), tg, create_graph=True)
    of_first = [torch.tensor(a) for a in (u, p, q)]
    want = torch.autograd.grad(first, (tx, tgamma, tg), of_first, allow_unused=True)
    _, saved = fastbn.forward(x, gamma, beta, frozen=(mean, var) if frozen else None)
    got = fastbn.backward_backward(u, p, q, g, saved)
    for name, a, b in zip(("gx", "ggamma", "gdy"), got, want, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-9, atol=1e-9, err_msg=name)
    # A gradient is linear in dy, so its gradient with respect to dy is the tangent of y.
    np.testing.assert_allclose(fastbn.jvp(u, saved, p, q), want[2].numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_none_is_zero_and_need_is_heeded(last, frozen, backend, rng):
    shape, axis = ((4, 5, 40), 1) if not last else ((40, 4, 5), -1)
    x, u, g = rng.normal(1, 2, (3, *shape)).astype(np.float32)
    gamma, p, q = rng.normal(size=(3, 5))
    statistics = (rng.normal(size=5), rng.uniform(0.5, 2, 5)) if frozen else None
    _, saved = fastbn.forward(x, gamma, axis=axis, frozen=statistics)
    for which in itertools.product((False, True), repeat=3):
        given = [a if w else None for a, w in zip((u, p, q), which, strict=True)]
        zeros = [a if w else np.zeros_like(a) for a, w in zip((u, p, q), which, strict=True)]
        full = fastbn.backward_backward(*zeros, g, saved)
        size = max(float(np.abs(a).max()) for a in full)
        for a, b in zip(fastbn.backward_backward(*given, g, saved), full, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * size)
        np.testing.assert_allclose(fastbn.jvp(given[0], saved, *given[1:]), full[2], rtol=1e-6, atol=1e-6 * size)
        for need in itertools.product((False, True), repeat=3):
            some = fastbn.backward_backward(*given, g, saved, need=need)
            for a, b, n in zip(some, full, need, strict=True):
                if n:
                    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * size)
                else:
                    assert a is None


def test_frozen_x_that_is_infinite_spoils_its_own_place_alone(backend, rng):
    """And not even that where x doesn't count."""
    x, u, g = rng.normal(size=(3, 8, 40, 5)).astype(np.float32)
    x[2, 3, 1], u[4, 5, 2] = np.inf, np.nan
    _, saved = fastbn.forward(x, axis=-1, frozen=(rng.normal(size=5), rng.uniform(0.5, 2, 5)))
    gx, _, gdy = fastbn.backward_backward(u, rng.normal(size=5), None, g, saved)
    assert np.isfinite(gx).all()
    assert np.argwhere(~np.isfinite(gdy)).tolist() == [[2, 3, 1], [4, 5, 2]]
    assert np.argwhere(~np.isfinite(fastbn.jvp(u, saved))).tolist() == [[4, 5, 2]]


@pytest.mark.parametrize("last", [False, True])
def test_results_may_go_where_the_arguments_are(last, backend, rng):
    shape, axis = ((4, 5, 40), 1) if not last else ((40, 4, 5), -1)
    x, u, g = rng.normal(1, 2, (3, *shape)).astype(np.float32)
    gamma, p, q = rng.normal(size=(3, 5))
    _, saved = fastbn.forward(x, gamma, axis=axis)
    gx, ggamma, gdy = fastbn.backward_backward(u, p, q, g, saved)
    place = np.empty(5, np.float32)
    for swapped in (False, True):
        one, two = u.copy(), g.copy()
        out = (two, place, one) if swapped else (one, place, two)
        found = fastbn.backward_backward(one, p, q, two, saved, out=out)
        for a, b, c in zip(found, (gx, ggamma, gdy), out, strict=True):
            assert a is c
            np.testing.assert_array_equal(a, b)
    own = u.copy()
    assert fastbn.jvp(own, saved, p, q, out=own) is own
    np.testing.assert_array_equal(own, gdy)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 5), (3, 2, 0)])
def test_empty(shape, backend):
    x = np.empty(shape, np.float32)
    _, saved = fastbn.forward(x)
    assert fastbn.jvp(x, saved).shape == shape
    gx, ggamma, gdy = fastbn.backward_backward(x, None, None, x, saved)
    assert gx.shape == gdy.shape == shape
    assert ggamma.tolist() == [0.0] * shape[1]


@pytest.mark.parametrize("last", [False, True])
def test_no_buffer_of_the_size_of_x(last, rng, monkeypatch):
    from fastbn.kernels.cpu import second

    monkeypatch.setattr(second, "SIZES", second.Sizes())
    shape, axis = ((64, 32, 40, 40), 1) if not last else ((64, 40, 40, 32), -1)
    x, u, g, r, z = (rng.standard_normal(shape, dtype=np.float32) for _ in range(5))
    sums = np.empty(32, np.float32)
    _, saved = fastbn.forward(x, axis=axis)
    fastbn.backward_backward(u, None, None, g, saved, out=(z, sums, r))  # compiles
    tracemalloc.start()
    fastbn.backward_backward(u, None, None, g, saved, out=(z, sums, r))
    fastbn.jvp(u, saved, out=r)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 < x.nbytes / 10


BITS = """
import hashlib, sys
import numba, numpy as np
import fastbn
from fastbn.kernels.cpu import second
second.SIZES = second.Sizes(block=512, slab=4000, line=64, columns=64, few=8, serial=0, asleep=0, past=4000)
second.FEW = 7
for shape, axis, order in (
    ((8, 60, 31), 1, (0, 1, 2)), ((5, 2, 2000), 1, (0, 1, 2)), ((900, 70), 1, (0, 1)), ((701, 3), 1, (0, 1)),
    ((90, 40, 5), 1, (0, 2, 1)), ((200, 33), 1, (1, 0)),
):
    for groups in (None, 3):
        digests = set()
        for threads in 1, 2, 3, 8:
            numba.set_num_threads(threads)
            rng = np.random.default_rng(len(shape))
            x, u, g = (np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))
                       for a in rng.normal(3, 1, (3, *shape)).astype(np.float32))
            p, q, gamma = rng.normal(size=(3, shape[axis]))
            with fastbn.set_backend("reference"):
                _, saved = fastbn.forward(x, gamma, axis=axis, groups=groups)
            found = fastbn.backward_backward(u, p, q, g, saved)
            digests.add(hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in found)).hexdigest())
        assert len(digests) == 1, (shape, groups)
print("same")
"""


def test_same_bits_for_any_number_of_threads():
    process = subprocess.run(
        [sys.executable, "-c", BITS], env={**os.environ, "NUMBA_NUM_THREADS": "8"}, capture_output=True, text=True,
        timeout=500, check=False,
    )  # fmt: skip
    assert process.stdout.split() == ["same"], process.stderr


def test_errors(rng):
    x = rng.normal(size=(4, 3, 5)).astype(np.float32)
    y, saved = fastbn.forward(x)
    with pytest.raises(TypeError, match=r"fastbn\.jvp: saved is .*expected the second result of fastbn\.forward"):
        fastbn.jvp(x, y)
    with pytest.raises(ValueError, match=r"fastbn\.jvp: x_t is a float32 array of shape \(4, 3\); expected float32 of"):
        fastbn.jvp(x[..., 0], saved)
    with pytest.raises(ValueError, match=r"ddx is a float64 array .*Convert it: ddx\.astype"):
        fastbn.backward_backward(x.astype(np.float64), None, None, x, saved)
    with pytest.raises(TypeError, match=r"fastbn\.backward_backward: dy is None"):
        fastbn.backward_backward(x, None, None, None, saved)
    with pytest.raises(ValueError, match=r"gamma_t has shape \(2,\); expected \(3,\)"):
        fastbn.jvp(x, saved, [1, 2])
    with pytest.raises(TypeError, match="need is bool True; expected three bools, for gx, ggamma and gdy"):
        fastbn.backward_backward(x, None, None, x, saved, need=True)
    with pytest.raises(ValueError, match="expected three: gx, ggamma and gdy"):
        fastbn.backward_backward(x, None, None, x, saved, out=(x,))
    place = np.empty_like(x)
    with pytest.raises(ValueError, match=r"out \(gdy\) overlaps gx in memory"):
        fastbn.backward_backward(x, None, None, x, saved, out=(place, None, place))
    with pytest.raises(ValueError, match="out overlaps x in memory"):
        fastbn.jvp(y, saved, out=x)
    own = x.copy()
    _, overwritten = fastbn.forward(own, out=own)
    with pytest.raises(ValueError, match="saved has no x, which `out` overwrote"):
        fastbn.jvp(x, overwritten)
    own = x.copy()
    _, overwritten = fastbn.forward(own, out=own, frozen=(np.zeros(3), np.ones(3)))
    assert np.isfinite(fastbn.jvp(x, overwritten)).all()
    with fastbn.set_backend("reference"):
        _, active = fastbn.forward(x, activation="relu")
        _, added = fastbn.forward(x, residual=x)
        _, inverted = fastbn.forward(x, np.ones(3), save="y")
    with pytest.raises(ValueError, match="forward had activation='relu', whose derivatives are not there yet"):
        fastbn.jvp(x, active)
    with pytest.raises(ValueError, match="forward had residual, whose derivatives"):
        fastbn.jvp(x, added)
    with pytest.raises(ValueError, match="forward had save='y', which keeps no x"):
        fastbn.jvp(x, inverted)
