"""Activations and their slopes, as device functions in the type of their argument.

exp is taken of what is at most 0, so that nothing overflows on the way to a finite result.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from .target import cuda


@functools.cache
def inverse_of(name: str, real: Any) -> Any:
    """(y, parameter) -> z with f(z) = y, where there is one."""
    zero, limit = real(0), np.nextafter(real(-1), real(0))
    return cuda.jit(
        {
            "": lambda y, _: y,
            "leaky_relu": lambda y, p: y / p if y <= zero else y,
            # y that was rounded to its limit: z is low enough by this
            "elu": lambda y, p: real(math.log1p(max(y / p, limit))) if y <= zero else y,
        }[name],
        device=True,
    )


@functools.cache
def functions_of(name: str, real: Any) -> tuple[Any, Any]:
    """(z, parameter) -> f(z), and f'(z), at a kink that of the left side. `real` is the type of z; "": f(z) = z."""
    zero, half, one, three, four, six = (real(k) for k in (0, 0.5, 1, 3, 4, 6))
    third, sixth, root, density = (real(k) for k in (1 / 3, 1 / 6, math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)))

    @cuda.jit(device=True)
    def sigmoid(z):  # type: ignore[no-untyped-def]
        e = real(math.exp(-abs(z)))
        return (e if z < zero else one) / (one + e)

    @cuda.jit(device=True)
    def bell(z):  # type: ignore[no-untyped-def]
        """sigmoid's slope; s (1 - s), and 1 - y^2 for tanh, would lose their digits far from 0."""
        e = real(math.exp(-abs(z)))
        return e / ((one + e) * (one + e))

    @cuda.jit(device=True)
    def below(z):  # type: ignore[no-untyped-def]
        """(1 + erf(z / sqrt 2)) / 2, which would lose its digits below 0."""
        return half * real(math.erfc(-root * z))

    @cuda.jit(device=True)
    def clipped(z):  # type: ignore[no-untyped-def]
        return zero if z <= zero else six if z >= six else z  # NaN stays

    f, slope = {
        "": (lambda z, _: z, lambda _z, _: one),
        "relu": (lambda z, _: zero if z <= zero else z, lambda z, _: zero if z <= zero else one),
        "leaky_relu": (lambda z, p: p * z if z <= zero else z, lambda z, p: p if z <= zero else one),
        "relu6": (lambda z, _: clipped(z), lambda z, _: zero if z <= zero or z >= six else one),
        "elu": (
            lambda z, p: p * real(math.expm1(z)) if z <= zero else z,
            lambda z, p: p * real(math.exp(z)) if z <= zero else one,
        ),
        "silu": (lambda z, _: z * sigmoid(z), lambda z, _: sigmoid(z) * (one + z * sigmoid(-z))),
        "gelu": (lambda z, _: z * below(z), lambda z, _: below(z) + z * density * real(math.exp(-half * z * z))),
        "sigmoid": (lambda z, _: sigmoid(z), lambda z, _: bell(z)),
        "tanh": (lambda z, _: real(math.tanh(z)), lambda z, _: four * bell(z + z)),
        "hardswish": (
            lambda z, _: z * (clipped(z + three) * sixth),
            lambda z, _: zero if z <= -three else z * third + half if z < three else one,
        ),
    }[name]
    return cuda.jit(f, device=True), cuda.jit(slope, device=True)
