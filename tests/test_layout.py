"""The 3-D view: which arrays have one, that it is one (no copy), and what a call allocates."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastbn
from fastbn import reference
from fastbn.layout import Samples, Views

# Three levels of other axes; not native; channel axes apart, or in another order in memory than in the shape.
COPIED = {"batch slice", "cropped image", "one channel cropped"}
COPIED |= {"misaligned", "byte-swapped", "byte-swapped nhwc", "split channels", "per pixel, fortran"}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_no_copy_where_the_strides_collapse(case, rng):
    x = case.make(rng.normal(size=case.shape).astype(np.float32))
    axes = case.axis if isinstance(case.axis, tuple) else (case.axis,)
    views = Views(tuple(sorted(a % x.ndim for a in axes)), [x], [])
    copied = not np.shares_memory(views.inputs[0], x)
    assert copied == (case.name in COPIED)
    assert np.shares_memory(views.views[0], views.inputs[0])
    np.testing.assert_array_equal(np.sort(views.views[0].ravel()), np.sort(x.astype(np.float32).ravel()))


@st.composite
def strided(draw):
    """An array of random shape, dtype, memory order, steps, flips and broadcasts, and one or more channel axes."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=5, min_side=1, max_side=5))
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.tuples(*[st.sampled_from([1, 1, 1, 2, -1, -2]) for _ in shape]))
    gaps = draw(st.tuples(*[st.integers(0, 2) for _ in shape]))
    seed = draw(st.integers(0, 2**32 - 1))
    dtype = draw(st.sampled_from([np.float32, np.float64, np.float16]))
    big = [abs(s) * n + g for s, n, g in zip(steps, shape, gaps, strict=True)]
    values = (
        np.random.default_rng(seed).normal(1, 2, [big[i] for i in order]).astype(dtype).transpose(np.argsort(order))
    )
    x = values[tuple(slice(0, abs(s) * n, abs(s)) for s, n in zip(steps, shape, strict=True))]
    x = x[tuple(slice(None, None, 1 if s > 0 else -1) for s in steps)]
    if draw(st.booleans()):
        axis = draw(st.integers(0, len(shape) - 1))
        x = np.broadcast_to(x.take([0], axis), shape) if draw(st.booleans()) else x
    count = draw(st.integers(1, len(shape) - 1))
    return x, tuple(draw(st.permutations(range(-len(shape), 0)))[:count]), seed


@settings(max_examples=300, deadline=None)
@given(strided(), strided())
def test_any_strides_any_axes(first, second):
    from fastbn.kernels import cpu

    x, axis, seed = first
    rng = np.random.default_rng(seed)
    channels = tuple(x.shape[a] for a in sorted(a % x.ndim for a in axis))
    if x.size == np.prod(channels):  # one value per channel has tests of its own
        return
    gamma, beta = rng.normal(size=(2, *channels))
    dy = rng.normal(size=x.shape).astype(x.dtype)
    if second[0].shape == x.shape:
        dy = second[0].astype(x.dtype, order="K")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cpu, "SIZES", cpu.Sizes(block=6, piece=2, slab=40, line=12, columns=3, folded=3, height=3, serial=30)
        )
        y, saved = fastbn.forward(x, gamma, beta, axis=axis, eps=1e-2)
        dx, dgamma, dbeta = fastbn.backward(dy, saved)
    exact, exact_saved = reference.forward(x, gamma, beta, axis=axis, eps=1e-2)
    eps = float(np.finfo(x.dtype).eps)
    exact_dx, exact_dgamma, exact_dbeta = reference.backward(dy, exact_saved)
    # Few values may lie close together: dx is then a difference of terms of this size.
    terms = np.abs(gamma).max() / 0.1 * np.abs(dy).astype(np.float64).max()
    for result, wanted, size in ((y, exact, 1.0), (dx, exact_dx, terms)):
        allowed = (8 if x.dtype == np.float64 else 2) * eps * np.maximum(size, np.abs(wanted))
        assert (np.abs(result.astype(np.float64) - wanted) <= allowed).all()
    sums = np.abs(dy).astype(np.float64).sum() * 20  # |xhat| is at most sqrt(n), n <= 625
    for result, wanted in ((dgamma, exact_dgamma), (dbeta, exact_dbeta)):
        assert (np.abs(result - wanted) <= 8 * float(np.finfo(result.dtype).eps) * sums).all()


def test_views_agree_for_operands_of_different_layouts(rng):
    x = rng.normal(size=(4, 3, 5, 6)).astype(np.float32)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for a, b in ((x, last), (last, x), (x[:, :, :, ::-1], x), (x, x[:, :, ::-1])):
        views = Views((1,), [a, b], [])
        for view, array in zip(views.views, (a, b), strict=True):
            np.testing.assert_allclose(view.sum((0, 2)), array.sum((0, 2, 3)), rtol=0, atol=1e-4)


def test_samples_alone_where_they_have_an_order(rng):
    """Rows of a sample are folded then; of the rows of all samples each had its place in the order, and none was."""
    x = rng.normal(size=(6, 7, 9, 5))  # channels last
    crossed = rng.normal(size=(7, 6, 9, 5)).transpose(1, 0, 2, 3)  # samples don't come first in memory
    for array, shape, copied in ((x, (6, 5, 63), 0), (x[:, :1], (6, 5, 9), 0), (crossed, (6, 5, 63), 1)):
        views = Views((3,), [array], [], Samples(0, alone=True))
        assert views.shape == shape
        assert (views.inputs[0] is not array) == copied
        np.testing.assert_array_equal(views.views[0][-1, -1], array[-1, :, :, -1].ravel())
    assert Views((3,), [x], [], Samples(0, alone=False)).shape == (6 * 63, 5, 1)
    assert Views((1,), [x], [], Samples(0, alone=True)).shape == (6, 7, 45)  # channels first: so it is anyhow


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "narrow", "transposed"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_out_leaves_nothing_to_allocate(layout, dtype, rng):
    """NumPy tells tracemalloc of its memory; what Numba takes inside a kernel is a few blocks by design."""
    x = {
        "nchw": lambda: rng.normal(size=(32, 32, 50, 50)),
        "nhwc": lambda: rng.normal(size=(32, 50, 50, 32)).transpose(0, 3, 1, 2),
        "narrow": lambda: rng.normal(size=(800_000, 3)),
        "transposed": lambda: rng.normal(size=(32, 80_000)).T,
    }[layout]().astype(dtype, order="K")  # 4.8 MB at least: what a call takes for itself, 0.3 MB, is little beside it
    dy, out = x.copy(order="K"), np.empty_like(x)
    channels = x.shape[1]
    results = np.empty_like(dy), np.empty(channels, np.float32), np.empty(channels, np.float32)
    mean, var = rng.normal(size=channels), rng.uniform(1, 2, channels)

    def once():
        saved = fastbn.forward(x, out=out)[1]
        fastbn.backward(dy, saved, out=results)
        fastbn.backward(dy, fastbn.forward(x, frozen=(mean, var), out=out)[1], out=results)
        fastbn.infer(x, mean, var, out=out)
        fastbn.moments(x)

    once()
    tracemalloc.start()
    once()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes / 10, peak
