"""What sums make of a channel, and other kernels on C numbers alone."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from numba import float64

from .blocks import block_comoments, block_moments, merge_comoments, merge_moments, two_sum
from .elements import where_asked
from .target import cuda

# Bits of `given` and of `wanted`.
FROZEN, GAMMA, BETA = 1, 2, 4


@cuda.jit(device=True)
def of_set(s, channels):  # type: ignore[no-untyped-def]
    """The channel of a column of the table: the same one where there are no sets, without a division."""
    return s if s < channels else s % channels


def write_mass(mass, c, columns, n):  # type: ignore[no-untyped-def]
    channels = columns // mass.shape[0]
    if c % channels == 0:
        mass[c // channels] = n


class Finishes(NamedTuple):
    forward: Any
    backward: Any


@functools.cache
def finishes_of(weighted: bool) -> Finishes:
    """What sums make of a channel. `mass` (G,): the sum of the weights of a set; () without weights."""
    note = where_asked(weighted, write_mass, lambda _mass, _c, _columns, _n: None)
    amount_of = where_asked(
        weighted,
        lambda mass, c, columns, _n: mass[c // (columns // mass.shape[0])],
        lambda _mass, _c, _columns, n: n,
    )

    @cuda.jit
    def forward_finish(part, table, gamma, beta, mean, var, given, eps, lanes, mass):  # type: ignore[no-untyped-def]
        """part (4, pieces, G C), or mean and var (G C,), and gamma, beta (C,) -> table (6, G C), mass."""
        t = cuda.threadIdx.x
        row = t // lanes
        c = cuda.blockIdx.x * lanes + (t - row * lanes)
        n = hi = lo = m2 = 0.0
        if c < table.shape[1] and not given & FROZEN:
            for k in range(row, part.shape[1], cuda.blockDim.x // lanes):
                n, hi, lo, m2 = merge_moments(
                    n, hi, lo, m2, part[0, k, c], part[1, k, c], part[2, k, c], part[3, k, c]
                )  # fmt: skip
        n, hi, lo, m2 = block_moments(n, hi, lo, m2, lanes)
        if row == 0 and c < table.shape[1]:
            variance = invstd = 0.0  # of an empty set, or of one without weights
            if given & FROZEN:
                hi, lo, variance = float64(mean[c]), 0.0, float64(var[c])
            elif n > 0.0:
                hi, lo = two_sum(hi, lo)
                variance = m2 / n
            if given & FROZEN or n > 0.0:
                invstd = 1.0 / math.sqrt(variance + eps)
            table[0, c], table[1, c], table[2, c], table[3, c] = hi, lo, variance, invstd
            table[4, c] = float64(gamma[of_set(c, gamma.shape[0])]) if given & GAMMA else 1.0
            table[5, c] = float64(beta[of_set(c, beta.shape[0])]) if given & BETA else 0.0
            note(mass, c, table.shape[1], n)

    @cuda.jit
    def backward_finish(part, table, dgamma, dbeta, coefficients, wanted, lanes, mass):  # type: ignore[no-untyped-def]
        """part (5, pieces, G C) -> dgamma, dbeta (G C,), coefficients (4, G C): mean g as hi and lo, a, b.

        By weights, sum g / W in place of the mean, and `b` by W.
        """
        t = cuda.threadIdx.x
        row = t // lanes
        c = cuda.blockIdx.x * lanes + (t - row * lanes)
        n = hi = lo = mean_x = co = 0.0
        if c < table.shape[1]:
            for k in range(row, part.shape[1], cuda.blockDim.x // lanes):
                n, hi, lo, mean_x, co = merge_comoments(
                    n, hi, lo, mean_x, co, part[0, k, c], part[1, k, c], part[2, k, c], part[3, k, c], part[4, k, c]
                )
        n, hi, lo, mean_x, co = block_comoments(n, hi, lo, mean_x, co, lanes)
        if row == 0 and c < table.shape[1]:
            invstd = table[3, c]
            a = table[4, c] * invstd
            total, amount = n * hi + n * lo, amount_of(mass, c, table.shape[1], n)
            if weighted or wanted & FROZEN:  # the mean is not that of all x, each for one
                co += total * (mean_x - table[1, c])
            if weighted:
                share = n / amount if amount > 0.0 else 0.0
                hi, lo = share * hi, share * lo
            coefficients[0, c], coefficients[1, c] = hi, lo
            coefficients[2, c], coefficients[3, c] = a, -a * invstd * invstd * (co / amount if amount > 0.0 else 0.0)
            if wanted & BETA:
                dbeta[c] = total
            if wanted & GAMMA:
                dgamma[c] = co * invstd

    return Finishes(forward_finish, backward_finish)


@cuda.jit
def invert_table(table, made):  # type: ignore[no-untyped-def]
    """made (6, G C): that by which y stands for x, as `fastbn.kernels.reference.inverse_table` has it."""
    c = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if c < table.shape[1]:
        gamma, beta = table[4, c], table[5, c]
        scale = gamma * table[3, c]
        made[0, c], made[1, c], made[2, c] = beta, 0.0, scale * scale * table[2, c]
        made[3, c] = 1.0 / gamma if gamma != 0.0 else math.copysign(math.inf, gamma)
        made[4, c], made[5, c] = gamma * scale, beta
