"""Whole numbers as Numba device arrays, through the public calls in Numba's simulator, beside the reference: run by
test_whole_numbers_gpu.py in a process of its own, with blocks so small that a few values cross their borders. Importing
it imports no Numba."""

from __future__ import annotations

import re
import sys
import types
import warnings
from typing import Any

import numpy as np
import pytest
from numba_cuda_cases import TINY

import fastbn

rng = np.random.default_rng(7)
EPS, UNITS = 2.0**-23, {"scale": 0.037, "zero_point": 11.0}


def put(a: np.ndarray) -> Any:
    from numba import cuda

    return cuda.to_device(a)


def near(what: str, got: Any, right: np.ndarray, size: Any) -> None:
    """Within 4 eps of `size`: of the terms that were added up."""
    host = got.copy_to_host() if hasattr(got, "copy_to_host") else np.asarray(got)
    assert host.shape == right.shape, what
    off = np.abs(host - right) / size
    assert off.max() <= 4 * EPS, (what, off.max() / EPS)


def check(name: str, q: np.ndarray, there: Any, axis: int = 1, units: Any = UNITS, frozen: bool = False, **asked: Any):
    scale, zero = units.get("scale", 1.0), units.get("zero_point", 0.0)
    x = scale * (q.astype(np.float64) - zero)
    channels = q.shape[axis]
    gamma, beta = rng.normal(1, 0.5, channels), rng.normal(0, 1, channels)
    gamma, beta = gamma.astype(np.float32), beta.astype(np.float32)
    if "save" in asked:
        gamma[1] = 1e-4  # whose x can't be had back from y: it is kept
    sets = (len(asked["groups"]),) if "groups" in asked else ()
    mean = rng.normal(x.mean(), x.std(), (*sets, channels)).astype(np.float32)
    var = (x.var() * rng.uniform(0.5, 2, (*sets, channels))).astype(np.float32)
    stats = (mean, var) if frozen else None
    large = {k: put(v) if k in ("residual", "weights") else v for k, v in asked.items()}
    y, saved = fastbn.forward(
        there, put(gamma), put(beta), axis=axis, frozen=stats and tuple(map(put, stats)), **units, **large
    )
    save = asked.pop("save", "x")
    exact, kept = fastbn.reference.forward(x, gamma, beta, axis=axis, frozen=stats, **asked)
    assert y.dtype == np.float32, name
    wide = tuple(channels if a == axis % q.ndim else 1 for a in range(q.ndim))
    shift = np.abs(beta).reshape(wide) + (np.abs(gamma).reshape(wide) * np.abs(mean).max() / var.min() ** 0.5) * frozen
    near(f"{name}: y", y, exact, 1 + np.abs(exact) + shift)
    dy = rng.normal(0, 1, q.shape).astype(np.float32)
    dx, *got = fastbn.backward(put(dy), saved, need=(False, True, True))
    assert dx is None, name
    rights = fastbn.reference.backward(dy, kept)[1:]
    assert len(got) == len(rights), name
    n = q.size / channels * (1 + np.abs(exact).max() + shift.max()) * (4 if save == "y" else 1)
    for what, one, right in zip(("dgamma", "dbeta", "dresidual")[: len(got)], got, rights, strict=True):
        near(f"{name}: {what}", one, right, 4 * (1 + shift) if what == "dresidual" else n)
    if not frozen:
        found, right = saved.moments, kept.moments
        for a, b in zip(*((found, right) if sets else ([found], [right])), strict=True):
            near(f"{name}: mean", a.mean, b.mean, np.abs(x).max())
            near(f"{name}: var", a.var(), b.var(), x.var() + x.std())
    elif save == "x":
        again = fastbn.infer(there, put(mean), put(var), put(gamma), put(beta), axis=axis, **units, **large)
        np.testing.assert_array_equal(again.copy_to_host(), y.copy_to_host())


def numbers(shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


def main() -> None:
    from fastbn.kernels import numba_cuda
    from simulator import without_threads

    without_threads()
    sys.modules["cupy"] = types.ModuleType("cupy")  # which can't see the simulator's arrays
    warnings.simplefilter("error")
    numba_cuda.SIZES = numba_cuda.Sizes(*TINY)
    for kind in (np.uint8, np.int8, np.uint16, np.int16):  # of 16 bits: those that are the bits of half types elsewhere
        q = numbers((6, 3, 13), kind)
        check(kind.__name__, q, put(q))
    q = numbers((33, 5), np.int16)
    check("channels last", q, put(q), frozen=True)
    q = numbers((4, 6, 7))
    check("a channel slice", q[:, 2:5], put(q)[:, 2:5])
    q = numbers((3, 2, 5, 6), np.int16)
    check("a crop, which is copied", q[:, :, 1:4, 2:5], put(q)[:, :, 1:4, 2:5])
    q, r = numbers((6, 3, 7)), rng.normal(3, 2, (6, 3, 7)).astype(np.float32)
    w = (rng.gamma(1.0, 1.0, (6, 1, 7)) * (rng.random((6, 1, 7)) < 0.7)).astype(np.float32)
    check("weights", q, put(q), weights=w)
    every = {"weights": w, "masked": "zero", "groups": [2, 4], "activation": "silu", "residual": r}
    check("all", q, put(q), **every)
    check("all, frozen", q, put(q), frozen=True, **every)
    check("kept", q, put(q), units={}, weights=w, masked="keep")
    check("from y", q, put(q), activation="leaky_relu", save="y")
    some, right = (
        fastbn.moments(put(q), weights=put(w), **UNITS),
        fastbn.reference.moments(0.037 * (q - 11.0), weights=w),
    )
    near("moments", some.mean, right.mean, np.abs(right.mean))
    near("their variance", some.var(), right.var(), right.var())
    empty = fastbn.moments(put(q)[:0], **UNITS)
    assert (empty.count, empty.mean.tolist()) == (0, [0, 0, 0])
    for call, text in (
        (lambda: fastbn.forward(put(q), masked="keep", weights=put(w), **UNITS), "masked='keep' with a scale"),
        (lambda: fastbn.forward(put(q), scale=0.0), "scale is float 0.0"),
        (lambda: fastbn.forward(put(r), scale=0.5), "scale or zero_point is given with x of float32"),
        (lambda: fastbn.forward(put(q), out=put(q)), "out is a uint8 Numba device array"),
        (lambda: fastbn.forward(put(q), residual=put(q)), "residual is a uint8 Numba device array"),
        (lambda: fastbn.forward(put(r), put(np.ones(3, np.int16))), "gamma is a int16 Numba device array"),
        (lambda: fastbn.forward(put(q.astype(np.int32))), "x is a int32 Numba device array"),
        (lambda: fastbn.backward(put(r), fastbn.forward(put(q))[1]), "dx of whole numbers (uint8) is asked for"),
        (lambda: fastbn.backward(put(q), fastbn.forward(put(q))[1]), "dy is a uint8 Numba device array"),
        (lambda: fastbn.backward(put(r[:3]), fastbn.forward(put(q))[1]), "expected float32 of shape (6, 3, 7)"),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(text)):
            call()
    print("all asserted")


if __name__ == "__main__":
    main()
