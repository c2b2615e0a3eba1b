"""How elements become numbers, and how a strided array becomes a run: the few intrinsics under the CPU kernels.

Numba has no float16 and no bfloat16 on the CPU, so those arrays come in as views of their bits, and the
integer type tells the format: uint16 is float16, int16 is bfloat16. `widen` and `narrow` convert at the
element, where LLVM vectorises them with the loop (vcvtph2ps, vcvtps2ph; a shift for bfloat16). On an x86
without F16C, LLVM would call a function that is not there and end the process; there integers do the work.
"""

from typing import Any

from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_FLOAT, _DOUBLE, _HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()
_I16, _I32 = ir.IntType(16), ir.IntType(32)


def _i32(value: int) -> Any:
    return ir.Constant(_I32, value)


def _float(value: float) -> Any:
    return ir.Constant(_FLOAT, value)


def _converts_halves(context: Any) -> bool:
    library = context.codegen()
    return "86" not in library._tm.triple.split("-")[0] or "+f16c" in library._tm_features


def _half_to_float(builder: Any, half: Any) -> Any:
    bits = builder.zext(half, _I32)
    magnitude = builder.shl(builder.and_(bits, _i32(0x7FFF)), _i32(13))
    number = builder.fmul(builder.bitcast(magnitude, _FLOAT), _float(2.0**112))  # re-bias; right for subnormals
    special = builder.icmp_unsigned(">=", magnitude, _i32(0x7C00 << 13))  # Inf and NaN keep all exponent bits
    value = builder.select(special, builder.or_(magnitude, _i32(0x7F800000)), builder.bitcast(number, _I32))
    sign = builder.shl(builder.and_(bits, _i32(0x8000)), _i32(16))
    return builder.bitcast(builder.or_(value, sign), _FLOAT)


def _float_to_half(builder: Any, number: Any) -> Any:
    bits = builder.bitcast(number, _I32)
    magnitude = builder.and_(bits, _i32(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, _i32(13)), _i32(1))
    normal = builder.lshr(builder.add(magnitude, builder.add(odd, _i32(0xFFF - (112 << 23)))), _i32(13))
    half = builder.fadd(builder.bitcast(magnitude, _FLOAT), _float(0.5))  # 0.5 has the ulp of float16's subnormals
    small = builder.sub(builder.bitcast(half, _I32), _i32(0x3F000000))
    value = builder.select(builder.icmp_unsigned("<", magnitude, _i32(0x38800000)), small, normal)
    value = builder.select(builder.icmp_unsigned(">=", magnitude, _i32(0x477FF000)), _i32(0x7C00), value)
    value = builder.select(builder.icmp_unsigned(">", magnitude, _i32(0x7F800000)), _i32(0x7E00), value)
    sign = builder.and_(builder.lshr(bits, _i32(16)), _i32(0x8000))
    return builder.trunc(builder.or_(value, sign), _I16)


@intrinsic  # type: ignore[untyped-decorator]
def widen(_typing: Any, element: Any) -> Any:
    """The value of an element, in the type that sums are taken in: float64 for float64, float32 for the rest."""
    result = types.float64 if element == types.float64 else types.float32

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (value,) = args
        if signature.args[0] == types.uint16:
            if not _converts_halves(context):
                return _half_to_float(builder, value)
            return builder.fpext(builder.bitcast(value, _HALF), _FLOAT)
        if signature.args[0] == types.int16:
            return builder.bitcast(builder.shl(builder.zext(value, _I32), _i32(16)), _FLOAT)
        return value

    return result(element), codegen


@intrinsic  # type: ignore[untyped-decorator]
def narrow(_typing: Any, value: Any, like: Any) -> Any:
    """A float64 or float32 as an element of the type of `like`, rounded to nearest even.

    float64 goes to the half types by way of float32; the double rounding costs 2^-13 of a half-type ulp.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given, wanted = signature.args
        number = args[0]
        if wanted == types.float64:
            return builder.fpext(number, _DOUBLE) if given == types.float32 else number
        if given == types.float64:
            number = builder.fptrunc(number, _FLOAT)
        if wanted == types.float32:
            return number
        if wanted == types.uint16:
            if not _converts_halves(context):
                return _float_to_half(builder, number)
            return builder.bitcast(builder.fptrunc(number, _HALF), _I16)
        bits = builder.bitcast(number, _I32)
        odd = builder.and_(builder.lshr(bits, _i32(16)), _i32(1))
        rounded = builder.add(bits, builder.add(odd, _i32(0x7FFF)))
        quiet = builder.or_(bits, _i32(0x400000))  # adding to a NaN could carry it into -0
        bits = builder.select(builder.fcmp_unordered("uno", number, number), quiet, rounded)
        return builder.trunc(builder.lshr(bits, _i32(16)), _I16)

    return like(value, like), codegen


@intrinsic  # type: ignore[untyped-decorator]
def keep_whole(_typing: Any) -> Any:
    """Forbids LLVM to inline the calling function into its callers.

    Sums may be reassociated, so a block inlined into the serial and into the parallel driver could be
    vectorised in two ways and give two results; compiled once, it gives one.
    """

    def codegen(_context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return cgutils.get_null_value(ir.IntType(8).as_pointer())

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _element_pointer(_typing: Any, array: Any, _offset: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return cgutils.pointer_add(builder, data, args[1])

    return types.CPointer(array.dtype)(array, types.intp), codegen


@njit(error_model="numpy")
def run(a, o, c, i, n):  # type: ignore[no-untyped-def]
    """The n elements of a (O, C, I) from (o, c, i) on, as a contiguous array: for an axis known to have unit stride."""
    return carray(_element_pointer(a, o * a.strides[0] + c * a.strides[1] + i * a.strides[2]), n)
