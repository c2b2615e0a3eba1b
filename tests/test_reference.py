"""The oracle's oracle: the reference against mpmath with 60 digits, and its gradients against finite differences."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

from fastbn import reference

mpmath.mp.dps = 60


def exactly(x, gamma, beta, dy, eps):
    """y, dx, dgamma, dbeta of (n,) values of one channel, in 60 digits."""
    x, dy = [mpmath.mpf(float(v)) for v in x], [mpmath.mpf(float(v)) for v in dy]
    n, gamma, beta, eps = len(x), mpmath.mpf(gamma), mpmath.mpf(beta), mpmath.mpf(eps)
    mean = sum(x) / n
    std = mpmath.sqrt(sum((v - mean) ** 2 for v in x) / n + eps)
    xhat = [(v - mean) / std for v in x]
    dgamma, dbeta = sum(g * h for g, h in zip(dy, xhat, strict=True)), sum(dy)
    dx = [gamma / std * (g - dbeta / n - h * dgamma / n) for g, h in zip(dy, xhat, strict=True)]
    return [gamma * h + beta for h in xhat], dx, dgamma, dbeta


@pytest.mark.parametrize("ratio", [0, 1, 1e2, 1e4, 1e6])  # |mean| / std
@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_against_60_digits(n, ratio, rng):
    x, dy = rng.normal(size=(2, n))
    x += ratio * rng.choice([-1.0, 1.0])
    gamma, beta = rng.normal(size=2)
    y, dx, dgamma, dbeta = exactly(x, gamma, beta, dy, 1e-5)
    found, saved = reference.forward(x.reshape(1, n), [gamma], [beta], axis=0)
    found_dx, found_dgamma, found_dbeta = reference.backward(dy.reshape(1, n), saved)
    eps = 2.2e-16

    def error(result, exact, scale=1.0):
        exact = [mpmath.mpf(e) for e in exact]
        return max(
            float(abs(mpmath.mpf(float(r)) - e) / max(scale, abs(e))) for r, e in zip(result, exact, strict=True)
        )

    # y: variance, root, quotient, two products, a sum. A std far below 1 (n = 2 by chance) enlarges dx: relative to a.
    size = float(np.abs(gamma) / np.sqrt(x.var() + 1e-5))
    assert error(found[0], y) < 8 * eps
    assert error(found_dx[0], dx, max(1.0, size * np.abs(dy).max())) < 8 * eps
    assert error(found_dgamma, [dgamma], float(np.abs(dy).sum() * 8)) < 8 * eps
    assert error(found_dbeta, [dbeta], float(np.abs(dy).sum())) < 8 * eps


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((3, 4), 0), ((2, 3, 2, 2), 1), ((2, 2, 3), (0, 2))])
def test_gradients_against_finite_differences(shape, axis, frozen, rng):
    x, weight = rng.normal(size=(2, *shape)) * 2 + 1
    axes = axis if isinstance(axis, tuple) else (axis,)
    channels = tuple(shape[a] for a in axes)
    gamma, beta, mean = rng.normal(size=(3, *channels))
    statistics = (mean, rng.uniform(0.5, 2, channels)) if frozen else None

    def loss(x, gamma, beta):
        return (reference.forward(x, gamma, beta, axis=axis, frozen=statistics)[0] * weight).sum()

    saved = reference.forward(x, gamma, beta, axis=axis, frozen=statistics)[1]
    gradients = reference.backward(weight, saved)
    step = 1e-5  # central differences: step^2 of truncation and 1e-16 / step of rounding, times values of about 10
    for which, gradient in enumerate(gradients):
        for index in np.ndindex(gradient.shape):
            moved = [[x, gamma, beta], [x, gamma, beta]]
            for side, sign in ((0, 1), (1, -1)):
                moved[side][which] = moved[side][which].copy()
                moved[side][which][index] += sign * step
            difference = (loss(*moved[0]) - loss(*moved[1])) / (2 * step)
            assert abs(difference - gradient[index]) < 1e-7 * (1 + abs(gradient[index]))


def test_moments_are_those_of_numpy(rng):
    x = rng.normal(2, 3, (7, 4, 5))
    found = reference.moments(x)
    np.testing.assert_allclose(found.mean, x.mean((0, 2)), rtol=1e-15)
    np.testing.assert_allclose(found.var(1), x.var((0, 2), ddof=1), rtol=1e-14)
    assert found.count == 35
