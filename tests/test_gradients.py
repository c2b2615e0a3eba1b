"""The gradients of `backward` are those of `forward`: central differences along a random direction, in float64.

The loss is sum(dy y) by `fastbn.reference.forward`; the gradients are those of `fastbn.reference` and of `fastbn` with
the kernels in NumPy, which is what the others are held against.
"""

from __future__ import annotations

import numpy as np
import pytest

import fastbn
from fastbn.extras import ACTIVATIONS

KINKS = {"relu": (0,), "leaky_relu": (0,), "elu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}
SHAPE, CHANNELS, STEP = (7, 3, 5), 3, 1e-5
IDS = np.array([2, 0, 1, 1, 0, 2, 4])  # out of order, and group 3 is empty
MASK = np.array([1, 1, 0, 1, 1, 1, 0], bool)


@pytest.fixture(params=["fastbn.reference", "fastbn"])
def library(request):
    with fastbn.set_backend("reference"):
        yield fastbn.reference if request.param == "fastbn.reference" else fastbn


def away_from_kinks(activation, z):
    """A step moves z by up to 1e-4: a direction of 3, over a deviation of 0.3, and so on."""
    name = activation[0] if isinstance(activation, tuple) else activation
    return all(np.abs(z - kink).min() > 1e-3 for kink in KINKS.get(name, ()))


def check(library, rng, residual=False, activation=None, sets=(), frozen=False, whole=False, save=None, **more):
    more["frozen"] = (rng.normal(2, 1, (*sets, CHANNELS)), rng.uniform(0.5, 3, (*sets, CHANNELS))) if frozen else None
    dy = rng.normal(0.3, 1, SHAPE)

    def y(activation, x, gamma, beta, residual=None):
        return fastbn.reference.forward(x, gamma, beta, residual=residual, activation=activation, **more)[0]

    bare = {**more, "masked": "normalize"}  # else y of what is masked is 0, a kink
    for _ in range(100):
        values = [rng.normal(2, 1.5, SHAPE), *rng.normal(0, 1, (2, CHANNELS))]
        if whole:
            values[0] = rng.integers(0, 255, SHAPE, np.uint8)
        if save == "y":
            values[1][0], values[2][0] = 0.01, 1  # 1 / 64 of beta is too small a gamma: its x is kept
        values += [rng.normal(0, 1, SHAPE).astype(np.float32 if whole else np.float64)] * residual
        x, gamma, beta, *rest = values
        asked = {"residual": rest[0] if rest else None, "activation": activation, **more}
        if away_from_kinks(
            activation, fastbn.reference.forward(x, gamma, beta, **{**asked, **bare, "activation": None})[0]
        ):
            break
    else:
        pytest.fail("no data away from the kinks")
    if save:
        asked["save"] = save
    _, saved = library.forward(x, gamma, beta, **asked)
    if save == "y":
        assert saved._lost is not None
    if whole and library is fastbn:
        gradients = fastbn.backward(dy.astype("f"), saved, need=(False, True, True))
    else:
        gradients = library.backward(dy, saved)
    assert len(gradients) == len(values)
    # Differences: step^2 of truncation and 1e-16 / step of rounding, times sums of some 100. Whole numbers are computed
    # in float32, dy is rounded to it, and sums of 35 are some eps of their terms off.
    limit = 1e-6 if whole and library is fastbn else 1e-7
    for which in range(int(whole), len(values)):
        direction = rng.normal(0, 1, values[which].shape)
        losses = []
        for sign in (1, -1):
            moved = list(values)
            moved[which] = values[which] + sign * STEP * direction
            losses.append((dy * y(activation, *moved)).sum())
        along = gradients[which] * direction
        difference = (losses[0] - losses[1]) / (2 * STEP)
        assert abs(difference - along.sum()) < limit * (1 + np.abs(along).sum()), which


@pytest.mark.parametrize("activation", [*ACTIVATIONS, ("leaky_relu", 0.3), ("elu", 1.7)], ids=str)
def test_activations_alone(activation, library, rng):
    check(library, rng, activation=activation)


COMPOSITIONS = {
    "a residual": {"residual": True},
    "a residual and a kink": {"residual": True, "activation": "relu6"},
    "frozen": {"frozen": True, "residual": True, "activation": "gelu"},
    "sizes": {"groups": [2, 0, 5], "activation": "silu"},
    "ids": {"groups": IDS, "residual": True, "activation": "tanh"},
    "a number of groups, frozen": {"groups": 3, "sets": (3,), "frozen": True, "activation": "elu"},
    "weights": {"weights": "positions", "activation": "sigmoid"},
    "weights, frozen": {"weights": "positions", "frozen": True, "activation": "hardswish"},
    "a mask that normalizes": {"weights": MASK, "masked": "normalize", "activation": "gelu"},
    "a mask that zeroes": {"weights": MASK, "masked": "zero", "residual": True, "activation": "silu"},
    "a mask that keeps": {"weights": MASK, "masked": "keep", "residual": True, "activation": "relu"},
    "a mask that keeps, frozen": {"weights": MASK, "masked": "keep", "frozen": True},
    "all": {"weights": "positions", "masked": "zero", "groups": IDS, "residual": True, "activation": "leaky_relu"},
    "all, sizes": {"weights": MASK, "masked": "keep", "groups": [4, 3], "residual": True, "activation": "gelu"},
}


def with_weights(rng, more):
    if isinstance(more.get("weights"), str):
        more = {**more, "weights": rng.gamma(1, 1, (7, 1, 5)) * (rng.random((7, 1, 5)) < 0.8)}
    return more


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions(name, library, rng):
    check(library, rng, **with_weights(rng, COMPOSITIONS[name]))


Y_ALONE = {
    "alone": {},
    "frozen": {"frozen": True},
    "sizes and weights": {"groups": [4, 3], "weights": "positions"},
    "ids and a mask that keeps": {"groups": IDS, "weights": MASK, "masked": "keep"},
    "a mask that zeroes, frozen": {"weights": MASK, "masked": "zero", "frozen": True},
}


@pytest.mark.parametrize("activation", [None, ("leaky_relu", 0.2), "elu"], ids=str)
@pytest.mark.parametrize("name", Y_ALONE)
def test_where_y_alone_is_kept(name, activation, rng):
    """And x of a channel that y doesn't tell of."""
    with fastbn.set_backend("reference"):
        check(fastbn, rng, activation=activation, save="y", **with_weights(rng, Y_ALONE[name]))


WHOLE = {
    "alone": {},
    "a residual": {"activation": "silu", "residual": True},
    "groups and weights": {"activation": "gelu", "groups": IDS, "weights": "positions", "masked": "zero"},
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(name, library, rng):
    """They have no dx."""
    more = {"scale": 0.037, "zero_point": 11.0, **with_weights(rng, WHOLE[name])}
    check(library, rng, whole=True, **more)
