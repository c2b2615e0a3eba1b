"""`correct` of the public functions: on arrays of each library there, beside the same on NumPy arrays."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from .run import words

PUBLIC = (16, 32, 14, 14)


def public(device: Any, kind: str) -> dict[str, Any]:
    """The public functions on arrays of this kind, beside the same on NumPy arrays; a note if their library is missing.

    Numba's arrays go to the kernels in CUDA C, or "by numba.cuda" to its own. They can't be computed with: there is no
    layer for them, and running statistics are NumPy's.
    """
    fastbn: Any = importlib.import_module("fastbn")
    library, _, backend = kind.partition(" by ")
    try:
        put, get = library_of(device, library)
    except Exception as cause:  # numba-cuda 0.30 beside NumPy 2.5: AttributeError
        return {"note": words(cause)}
    rng = np.random.default_rng(7)
    channels = PUBLIC[1]
    host = [a.astype(np.float32) for a in (rng.normal(100, 2, PUBLIC), rng.normal(1, 2, PUBLIC))]
    host += [*rng.normal(size=(2, channels)).astype(np.float32), rng.uniform(0.5, 2, channels).astype(np.float32)]
    host[2][1] = 0.0  # y doesn't tell of this channel: save="y" keeps its x
    results: list[list[np.ndarray]] = []
    for there in (False, True):
        with fastbn.set_backend("numba-cuda" if there and backend else "auto"):
            x, dy, gamma, beta, var = map(put, host) if there else host
            like = x if there and library != "Numba" else None
            y, saved = fastbn.forward(x, gamma, beta)
            if type(y) is not type(x):
                return {"ok": False, "wrong": f"y is a {type(y)}"}
            grouped, kept = fastbn.forward(x, gamma, beta, groups=4, activation="gelu")
            alone, only = fastbn.forward(x, gamma, beta, activation=("leaky_relu", 0.2), save="y")
            running = fastbn.RunningStats(channels, like=like)
            running.update(saved.moments)
            found = [y, *fastbn.backward(dy, saved), grouped, *fastbn.backward(dy, kept)]
            found += [alone, *fastbn.backward(dy, only)]
            found += [fastbn.infer(x, beta, var, gamma), running.mean, running.var]
            if library != "Numba":
                layer = fastbn.BatchNorm(channels, like=like)
                found += [layer(x), layer.backward(dy), layer.dgamma, layer.eval()(x)]
            results.append([a if isinstance(a, np.ndarray) else get(a) for a in found])
    # Sums of 3136 values of 1 add up to about 3136; all else is about 1, but frozen: 100.
    errors = [float((np.abs(a - b) / np.maximum(1, np.abs(b))).max()) for a, b in zip(*results, strict=True)]
    return {"ok": max(errors) < 1e-4, "errors": errors}


def by_numba(device: Any, name: str, kind: str) -> dict[str, Any]:
    """What is there by numba.cuda's kernels alone, whatever the arrays' library; a note if that is missing."""
    try:
        put, get = library_of(device, kind)
        importlib.import_module("numba.cuda")
    except Exception as cause:
        return {"note": words(cause)}
    fastbn: Any = importlib.import_module("fastbn")
    with fastbn.set_backend("reference"):  # compiled for the CPU they would take a minute of a device's time
        expected = BY_NUMBA[name](np.asarray, np.asarray)
    return _beside(expected, BY_NUMBA[name](put, get))


def _second_order(put: Callable[[np.ndarray], Any], get: Callable[[Any], np.ndarray]) -> list[np.ndarray]:
    fastbn: Any = importlib.import_module("fastbn")
    rng, found = np.random.default_rng(9), []
    for dtype in (np.float32, np.float64):
        x, dy, u = (put(rng.normal(m, 2, PUBLIC).astype(dtype)) for m in (100, 1, -3))
        gamma, beta, p, q = (put(a.astype(dtype)) for a in rng.normal(size=(4, PUBLIC[1])))
        wide = PUBLIC[0], 1, *PUBLIC[2:]
        w = put((rng.gamma(1, 1, wide) * (rng.random(wide) < 0.8)).astype(dtype))
        frozen = put(rng.normal(100, 1, PUBLIC[1]).astype(dtype)), put(rng.uniform(1, 4, PUBLIC[1]).astype(dtype))
        for more in ({}, {"weights": w, "masked": "keep"}, {"groups": 3}, {"frozen": frozen}):
            _, saved = fastbn.forward(x, gamma, beta, **more)
            found += [fastbn.jvp(u, saved, p, q), *fastbn.backward_backward(u, p, q, dy, saved)]
    return [get(a) for a in found]


def _whole_numbers(put: Callable[[np.ndarray], Any], get: Callable[[Any], np.ndarray]) -> list[np.ndarray]:
    fastbn: Any = importlib.import_module("fastbn")
    rng, found = np.random.default_rng(10), []
    for dtype, low, high in ((np.uint8, 0, 256), (np.int16, -900, 3000)):
        x = put(rng.integers(low, high, PUBLIC).astype(dtype))
        dy, (gamma, beta) = put(rng.normal(1, 2, PUBLIC).astype(np.float32)), rng.normal(size=(2, PUBLIC[1]))
        numbers = [put(a.astype(np.float32)) for a in (gamma, beta)]
        for more in ({}, {"scale": 0.5, "zero_point": 7.0, "activation": "gelu"}, {"groups": 3}):
            y, saved = fastbn.forward(x, *numbers, **more)
            _, dgamma, dbeta = fastbn.backward(dy, saved, need=(False, True, True))
            found += [y, dgamma, dbeta]
    return [get(a) for a in found]


BY_NUMBA = {"second order": _second_order, "whole numbers": _whole_numbers}


def _beside(expected: list[np.ndarray], found: list[np.ndarray]) -> dict[str, Any]:
    """Relative to the largest of each result, or 1: the sums and second derivatives here are of hundreds."""
    errors = [float(np.abs(a - b).max() / max(1, np.abs(a).max())) for a, b in zip(expected, found, strict=True)]
    return {"ok": max(errors) < 1e-5, "errors": errors}


def library_of(device: Any, name: str) -> tuple[Callable[[np.ndarray], Any], Callable[[Any], np.ndarray]]:
    """How its arrays are made of NumPy's, and how they come back."""
    if name == "CuPy":
        return device.put, device.get
    if name == "PyTorch":
        torch: Any = importlib.import_module("torch")
        return lambda a: torch.from_dlpack(device.put(a)), lambda a: a.cpu().numpy()
    cuda: Any = importlib.import_module("numba.cuda")
    return cuda.to_device, lambda a: a.copy_to_host()
