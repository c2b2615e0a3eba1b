"""The element formats: bits as sixteen numbers, and back.

Numba has no float16 and no bfloat16 on the CPU, so those arrays come in as views of their bits, and the integer type
tells the format: uint16 is float16, int16 is bfloat16. On x86 vcvtph2ps and vcvtps2ph convert float16; where there is
no F16C, LLVM would call a function that is not there and end the process; there integers do the work.
"""

from typing import Any

from numba import types
from numba.extending import models, register_model

from .lanes import DOUBLE, FLOAT16, FLOAT32, FLOAT64, I16, I32, SINGLE, Lanes, constant, vector_of


def _converts_halves(context: Any) -> bool:
    library = context.codegen()
    return "86" not in library._tm.triple.split("-")[0] or "+f16c" in library._tm_features


def _half_to_float(builder: Any, half: Any) -> Any:
    bits = builder.zext(half, vector_of(I32))
    magnitude = builder.shl(builder.and_(bits, constant(I32, 0x7FFF)), constant(I32, 13))
    # re-biased by a product, which is right for subnormals too
    number = builder.fmul(builder.bitcast(magnitude, vector_of(FLOAT32)), constant(FLOAT32, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, constant(I32, 0x7C00 << 13))  # Inf and NaN keep all exponent bits
    loud = builder.or_(magnitude, constant(I32, 0x7F800000))
    value = builder.select(special, loud, builder.bitcast(number, vector_of(I32)))
    sign = builder.shl(builder.and_(bits, constant(I32, 0x8000)), constant(I32, 16))
    return builder.bitcast(builder.or_(value, sign), vector_of(FLOAT32))


def _float_to_half(builder: Any, number: Any) -> Any:
    bits = builder.bitcast(number, vector_of(I32))
    magnitude = builder.and_(bits, constant(I32, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, constant(I32, 13)), constant(I32, 1))
    rounding = builder.add(odd, constant(I32, (0xFFF - (112 << 23)) & 0xFFFFFFFF))
    normal = builder.lshr(builder.add(magnitude, rounding), constant(I32, 13))
    # 0.5 in float32 has the ulp of float16's subnormal numbers
    half = builder.fadd(builder.bitcast(magnitude, vector_of(FLOAT32)), constant(FLOAT32, 0.5))
    small = builder.sub(builder.bitcast(half, vector_of(I32)), constant(I32, 0x3F000000))
    infinite, quiet = constant(I32, 0x7C00), constant(I32, 0x7E00)
    value = normal
    for relation, edge, otherwise in (("<", 0x38800000, small), (">=", 0x477FF000, infinite), (">", 0x7F800000, quiet)):
        there = builder.icmp_unsigned(relation, magnitude, constant(I32, edge))
        value = builder.select(there, otherwise, value)
    sign = builder.and_(builder.lshr(bits, constant(I32, 16)), constant(I32, 0x8000))
    return builder.trunc(builder.or_(value, sign), vector_of(I16))


def _float_to_bfloat(builder: Any, number: Any) -> Any:
    bits = builder.bitcast(number, vector_of(I32))
    odd = builder.and_(builder.lshr(bits, constant(I32, 16)), constant(I32, 1))
    rounded = builder.add(bits, builder.add(odd, constant(I32, 0x7FFF)))
    quiet = builder.or_(bits, constant(I32, 0x400000))  # adding to a NaN could carry it into -0
    bits = builder.select(builder.fcmp_unordered("uno", number, number), quiet, rounded)
    return builder.trunc(builder.lshr(bits, constant(I32, 16)), vector_of(I16))


def decode(context: Any, builder: Any, bits: Any, element: Any, wanted: Lanes) -> Any:
    if element == types.float64:
        return bits
    number = bits
    if element in IMAGES:
        number = (builder.sitofp if element.signed else builder.uitofp)(bits, vector_of(FLOAT32))
    elif element == types.int16:
        shifted = builder.shl(builder.zext(bits, vector_of(I32)), constant(I32, 16))
        number = builder.bitcast(shifted, vector_of(FLOAT32))
    elif element == types.uint16 and _converts_halves(context):
        number = builder.fpext(builder.bitcast(bits, vector_of(FLOAT16)), vector_of(FLOAT32))
    elif element == types.uint16:
        number = _half_to_float(builder, bits)
    return number if wanted == SINGLE else builder.fpext(number, vector_of(FLOAT64))


def encode(context: Any, builder: Any, number: Any, given: Lanes, element: Any) -> Any:
    """To nearest even. float64 goes to the half types by way of float32, which costs 2^-13 of a half-type ulp."""
    if element == types.float64:
        return number if given == DOUBLE else builder.fpext(number, vector_of(FLOAT64))
    if given == DOUBLE:
        number = builder.fptrunc(number, vector_of(FLOAT32))
    if element == types.float32:
        return number
    if element == types.int16:
        return _float_to_bfloat(builder, number)
    if _converts_halves(context):
        return builder.bitcast(builder.fptrunc(number, vector_of(FLOAT16)), vector_of(I16))
    return _float_to_half(builder, number)


# Whole numbers of 16 bits, which the types of the half formats would stand for otherwise.
class _Image16(types.Integer):  # type: ignore[misc]
    def __str__(self) -> str:
        return "int16" if self.signed else "uint16"  # by which Numba finds the dtype


register_model(_Image16)(models.IntegerModel)
UNSIGNED16, SIGNED16 = _Image16("unsigned image", 16, signed=False), _Image16("signed image", 16, signed=True)
IMAGES = types.uint8, types.int8, UNSIGNED16, SIGNED16
