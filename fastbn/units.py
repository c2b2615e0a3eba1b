"""Whole numbers: what unit they are in, and statistics in that unit."""

from __future__ import annotations

from typing import Any

from .arguments import describe, dtype_of, finite
from .arrays import Span, family_of_values


def is_unitless(scale: Any, zero_point: Any) -> bool:
    """Whether x stands for itself. What is no number, such as an array, is for `units_of` to refuse."""
    return type(scale) in (float, int) and scale == 1.0 and type(zero_point) in (float, int) and zero_point == 0.0


def units_of(where: str, x: Any, scale: Any, zero_point: Any) -> tuple[float, float] | None:
    """Scale and zero point of whole numbers; None for numbers that stand for themselves."""
    if not (x.whole if isinstance(x, Span) else x.dtype.kind in "iu"):
        if finite(scale) != 1.0 or finite(zero_point) != 0.0:
            raise ValueError(
                f"{where}: scale or zero_point is given with x of {dtype_of(x)}; expected them with whole numbers only"
            )
        return None
    # Its square and that of its inverse are finite.
    if (step := finite(scale)) is None or not 1e-150 <= step <= 1e150 or (zero := finite(zero_point)) is None:
        raise ValueError(
            f"{where}: scale is {describe(scale)} and zero_point {describe(zero_point)}; expected finite numbers, and "
            "a scale above 0, 1e-150 to 1e150"
        )
    return step, zero


def in_whole_numbers(mean: Any, var: Any, eps: float, units: tuple[float, float]) -> tuple[Any, Any, float]:
    """Statistics and eps of x in the unit of its whole numbers: y is the same by both."""
    step, zero = units
    if mean is not None and units != (1.0, 0.0):
        family = family_of_values(mean)
        mean, var = family.in_units(mean, step, zero), family.in_units(var, step**2, 0.0)
    return mean, var, eps / step**2
