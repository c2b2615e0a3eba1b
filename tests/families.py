"""What tests of other libraries' arrays share: the doubles as libraries, random data, and how near results must be."""

import numpy as np
from cases import TOLERANCE, eps
from device_doubles import Array

from fastbn import arrays


class Library:
    """One of the doubles, with what tests need of it."""

    def __init__(self, name, state, cupy, torch):
        self.name, self.state = name, state
        self.kind = arrays.CUPY.kind if name == "cupy" else arrays.TORCH.kind
        self.type = cupy.ndarray if name == "cupy" else torch.Tensor
        self.libraries = {"cupy": cupy, "torch": torch}

    def put(self, values, device=0):
        """On a device, with the strides and neighbours that it has."""
        new = self.type.__new__(self.type)
        Array.__init__(new, values, device)
        return new


def data(rng, shape, axes, dtype=np.float32):
    """x, dy and, by channel, gamma, beta, mean and var."""
    channels = tuple(shape[a] for a in axes)
    x, dy = (rng.normal(3, 2, shape).astype(dtype) for _ in range(2))
    gamma, beta, mean = (rng.normal(1, 2, channels).astype(np.float32) for _ in range(3))
    return x, dy, gamma, beta, mean, rng.uniform(0.5, 2, channels).astype(np.float32)


def assert_near(got, exact, dtype, size=1):
    """`got` within what its dtype costs, as on the CPU, relative to the result or to `size`, of what was added up."""
    exact = np.asarray(exact, np.float64)
    error = np.abs(np.asarray(got, np.float64) - exact) / np.maximum(size, np.abs(exact))
    assert error.max(initial=0) <= TOLERANCE[dtype.name] * eps(dtype)


def sizes(dy, kept):
    """The size of what dx, dgamma and dbeta are sums of: float64 results may be off by as many eps of that."""
    std = np.sqrt(kept.var + kept.eps)
    terms = np.abs(dy.astype(np.float64)) * np.maximum(1, np.abs(kept.d / std))
    sums = terms.sum(kept.axes, keepdims=True)
    count = terms.size / sums.size
    small = [n for a, n in enumerate(dy.shape) if a not in kept.axes]
    dx = np.abs(kept.gamma / std) * (terms + np.maximum(1, np.abs(kept.d / std)) * sums / count)
    return np.maximum(1, dx), np.maximum(1, sums.reshape(small)), np.maximum(1, sums.reshape(small))


class Twice:
    """Two ranks with the same data."""

    def allgather(self, frame):
        return frame, frame
