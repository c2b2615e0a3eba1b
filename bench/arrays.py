"""The arrays of one case, and how far results are from the float64 reference."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np

import fastbn

from .shapes import SECOND, Case

EPS = 1e-5
POOL = 1_000_003  # random numbers drawn once, then repeated: a prime, so that no layout meets them in step
FULL_CHECK = 1 << 21  # elements; of larger arrays, whole channels up to this many are checked, two at least


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype; bfloat16 is that of ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    found: np.dtype[Any] = np.dtype(name)
    return found


def dense(a: np.ndarray) -> np.ndarray | None:
    """All of an array's memory as (bytes,) of uint8, or None where it has gaps."""
    flat = a.transpose(np.argsort([-s for s in a.strides], kind="stable"))
    return flat.reshape(-1).view(np.uint8) if flat.flags.c_contiguous else None


class Arrays:
    """x, dy, parameters, given statistics, and memory for the results of one case."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        self.dtype = dtype_of(case.dtype)
        rng = np.random.default_rng(seed)
        channels = case.shape.dims[1]
        number = np.float64 if case.dtype == "float64" else np.float32
        self.gamma, self.beta = rng.normal(size=(2, channels)).astype(number)
        self.mean, self.var = rng.uniform(0.5, 1.5, (2, channels)).astype(number)
        noise = rng.standard_normal(min(POOL, case.size), number)
        self.x = case.shape.empty(case.layout, self.dtype)
        self._fill(self.x, noise, rng.uniform(0, 2, channels).astype(number))
        self._noise, self._rng = noise, rng
        self.dgamma, self.dbeta = np.empty((2, channels), number)
        self.exact = cache(self._exact)

    # Large ones are made on first use: a 4 GB forward pass must do with x and y.
    @cached_property
    def dy(self) -> np.ndarray:
        """Sums of dy and of dy (x - mean) are far from 0: dgamma and dbeta can be compared relative to themselves."""
        dy = np.empty_like(self.x)
        other = self._rng.standard_normal(len(self._noise), self._noise.dtype)
        offset = self._rng.uniform(0.5, 1, len(self.gamma)).astype(self.gamma.dtype)
        self._fill(dy, 0.5 * self._noise + other, offset)
        return dy

    @cached_property
    def y(self) -> np.ndarray:
        """For results of x's size, touched already."""
        return np.full_like(self.x, np.nan)

    @cached_property
    def dx(self) -> np.ndarray:
        """For results of x's size, touched already."""
        return np.full_like(self.x, np.nan)

    def apart(self) -> Arrays:
        """The same with an x of its own."""
        other = copy.copy(self)
        other.x = self.x.copy(order="K")
        return other

    def _fill(self, a: np.ndarray, noise: np.ndarray, offset: np.ndarray) -> None:
        """`noise` over and over along a's memory, plus each channel's offset; in parts, as a may be 4 GB."""
        order = np.argsort([-s for s in a.strides], kind="stable")
        wide = offset.reshape([-1 if axis == 1 else 1 for axis in range(a.ndim)]).transpose(order)
        flat = a.transpose(order)
        start, step = 0, max(1, (1 << 24) // max(1, flat[:1].size))
        for row in range(0, len(flat), step):
            part = flat[row : row + step]
            values = np.resize(np.roll(noise, -start), part.shape)
            part[...] = values + (wide if wide.shape[0] == 1 else wide[row : row + step])
            start = (start + part.size) % len(noise)

    def source(self) -> np.ndarray:
        """The bytes that a copy reads: x's, or as many of dy where x has gaps."""
        found = dense(self.x)
        found = dense(self.dy) if found is None else found
        assert found is not None
        return found

    def target(self) -> np.ndarray:
        """Where a copy writes: y's memory, as forward does."""
        found = dense(self.y)
        assert found is not None
        return found

    def _channels(self) -> np.ndarray:
        """Which channels are checked, from the first to the last."""
        channels = self.case.shape.dims[1]
        count = max(2, FULL_CHECK // (self.case.size // channels))
        return np.unique(np.linspace(0, channels - 1, min(count, channels)).astype(np.intp))

    @cached_property
    def weights(self) -> np.ndarray:
        """A mask of positions, six of ten."""
        wide = [1 if a == 1 else n for a, n in enumerate(self.x.shape)]
        return np.asarray(self._rng.random(wide) < 0.6)

    @cached_property
    def ids(self) -> np.ndarray:
        """Each sample's group, of four."""
        return self._rng.integers(0, 4, len(self.x))

    @cached_property
    def tangent(self) -> np.ndarray:
        """Of x, or of dx; those of parameters are beta and the given mean."""
        u = np.empty_like(self.x)
        self._fill(u, self._noise[::-1], self._rng.uniform(0.5, 1, len(self.gamma)).astype(self.gamma.dtype))
        return u

    def more(self, function: str) -> dict[str, Any]:
        """What a function with more asks for: `forward` of "forward+relu" an activation."""
        what = function.partition("+")[2]
        if what == "residual":
            return {"residual": self.dy, "activation": "relu"}
        if what == "y":
            return {"activation": "leaky_relu", "save": "y"}
        if what == "groups":
            return {"groups": min(4, len(self.x))}
        if what == "ids":
            return {"groups": self.ids}
        if what == "weights":
            return {"weights": self.weights}
        return {"activation": what} if what and function not in SECOND else {}

    def _exact(self, function: str) -> tuple[np.ndarray, ...]:
        """The reference's results on the checked channels."""
        picked = self._channels()
        if function in SECOND:
            return self._second_order(function, picked)
        x, gamma, beta = self.x[:, picked], self.gamma[picked], self.beta[picked]
        more = self.more(function)
        more.pop("save", None)
        if "residual" in more:
            more["residual"] = more["residual"][:, picked]
        function = function.partition("+")[0]
        if function == "infer":
            return (fastbn.reference.infer(x, self.mean[picked], self.var[picked], gamma, beta, eps=EPS, **more),)
        if function == "moments":
            found = fastbn.reference.moments(x)
            return found.mean, found.var()
        y, saved = fastbn.reference.forward(x, gamma, beta, eps=EPS, **more)
        return (y,) if function == "forward" else fastbn.reference.backward(self.dy[:, picked], saved)[:3]

    def _second_order(self, function: str, picked: np.ndarray) -> tuple[np.ndarray, ...]:
        wide = [a[:, picked].astype(np.float64) for a in (self.x, self.dy, self.tangent)]
        gamma, beta, p, q = (a[picked] for a in (self.gamma, self.beta, self.beta, self.mean))
        with fastbn.set_backend("reference"):
            _, saved = fastbn.forward(wide[0], gamma, beta, eps=EPS)
            if function == "backward+jvp":
                return (fastbn.jvp(wide[2], saved, p, q),)
            return fastbn.backward_backward(wide[2], p, q, wide[1], saved)

    def error(self, function: str, results: Sequence[np.ndarray]) -> float:
        """The largest error of results (N, C, ...) or (C,), relative to max(1, |exact|); NaN counts as infinite."""
        worst = 0.0
        picked = self._channels()
        for result, exact in zip(results, self.exact(function), strict=True):
            found = result[picked] if result.ndim == 1 else result[:, picked]
            if found.shape != exact.shape:
                return np.inf
            error = (np.abs(found.astype(np.float64) - exact) / np.maximum(1, np.abs(exact))).max()
            worst = max(worst, np.inf if np.isnan(error) else float(error))
        return worst
