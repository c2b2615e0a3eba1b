"""What a call may ask for beyond batch norm, all of it: errors, the same bits, memory not written, layers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from extras import SHAPES, groups_for, weights_for

import fastbn

pytestmark = pytest.mark.usefixtures("backend")


def test_no_channels(rng):
    x = rng.normal(0, 1, (4, 0, 3)).astype(np.float32)
    for more in ({"groups": 2}, {"weights": np.ones(4)}, {"activation": "relu"}):
        for run in (fastbn, fastbn.reference):
            y, saved = run.forward(x, **more)
            assert [a.shape for a in run.backward(y, saved)] == [(4, 0, 3), (0,), (0,)]


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
    "weights of NaN in bfloat16": (
        {"weights": np.array([1, np.nan, 1, 1], ml_dtypes.bfloat16)},
        ValueError,
        r"weights has nan",
    ),
    "weights past float64": ({"weights": np.full(4, np.longdouble("1e400"))}, ValueError, r"weights has inf"),
    "ragged weights": ({"weights": [[1], [1, 2]]}, ValueError, r"forward: weights is ragged; expected"),
    "eps without axes": ({"eps": np.array(-1.0)}, ValueError, r"eps is float64 array of shape \(\), -1\.0; expected"),
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
