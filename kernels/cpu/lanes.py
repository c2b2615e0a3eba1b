"""Sixteen numbers at a time: the type, the intrinsics and the element formats under the CPU kernels.

`Lanes` is sixteen float32 or sixteen float64 as one Numba value, an LLVM vector. Loops over it are vectors by
construction, and add in the order in which they are written: nothing depends on what LLVM makes of a loop, so the
process that compiles a kernel and the one that loads it give the same bits. And a store can go past the caches from
within the loop that computes its value.

Numba has no float16 and no bfloat16 on the CPU, so those arrays come in as views of their bits, and the integer type
tells the format: uint16 is float16, int16 is bfloat16. `load` and `save` convert (vcvtph2ps, vcvtps2ph; a shift for
bfloat16). On an x86 without F16C, LLVM would call a function that is not there and end the process; there integers do
the work.
"""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import lower_builtin, models, register_model

from .formulas import field, formula, in_all, intrinsic
from .parts import part

LANES = 16

_FLOAT, _DOUBLE, _HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()
_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)


class Lanes(types.Type):
    """Sixteen float32 or float64."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


SINGLE, DOUBLE = Lanes(types.float32), Lanes(types.float64)


def _vector(element: Any) -> Any:
    return ir.VectorType(element, LANES)


def _numbers(lanes: Lanes) -> Any:
    return _vector(_FLOAT if lanes.dtype == types.float32 else _DOUBLE)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, _numbers(lanes))


def _all(element: Any, value: Any) -> Any:
    """The constant vector of one value."""
    return ir.Constant(_vector(element), [value] * LANES)


# Arithmetic. No flag lets LLVM reorder or drop anything.


def _operator(symbol: Any, name: str) -> None:
    # Typed and lowered directly: by `overload` and its inlining, kernels took half as long again to compile.
    @infer_global(symbol)  # type: ignore[untyped-decorator]
    class _Typed(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, _keywords: Any) -> Any:
            return args[0](*args) if len(args) == 2 and isinstance(args[0], Lanes) and args[0] == args[1] else None

    @lower_builtin(symbol, Lanes, Lanes)  # type: ignore[untyped-decorator]
    def _lowered(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return getattr(builder, name)(*args)


for _symbol, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operator(_symbol, _name)


@intrinsic
def spread(_typing: Any, value: Any) -> Any:
    """A float32 or float64 in all lanes."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return in_all(builder, args[0], LANES)

    return (DOUBLE if value == types.float64 else SINGLE)(value), codegen


@intrinsic
def nothing(_typing: Any, like: Any) -> Any:
    """0 in all lanes; of a number 0."""
    return like(like), lambda _context, _builder, _signature, args: _zero(args[0].type)


def _zero(kind: Any) -> Any:
    return ir.Constant(kind, None if isinstance(kind, ir.VectorType) else 0.0)


@intrinsic
def wide(_typing: Any, lanes: Any) -> Any:
    """The same numbers as float64."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return args[0] if lanes == DOUBLE else builder.fpext(args[0], _numbers(DOUBLE))

    return DOUBLE(lanes), codegen


@intrinsic
def fma(_typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once where the processor can; of numbers too."""

    def codegen(_context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, name = (
            args[0].type,
            f"llvm.fmuladd.f{a.bitwidth}"
            if isinstance(a, types.Float)
            else (f"llvm.fmuladd.v{LANES}f{a.dtype.bitwidth}"),
        )
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
        return builder.call(function, args)

    return a(a, a, a), codegen


@intrinsic
def negative(_typing: Any, lanes: Any) -> Any:
    return lanes(lanes), lambda _context, builder, _signature, args: builder.fneg(args[0])


def _unary(name: str) -> Any:
    def intrinsic_of(_typing: Any, lanes: Any) -> Any:
        def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            kind, suffix = args[0].type, f"v{LANES}f{lanes.dtype.bitwidth}"
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(kind, [kind]), f"llvm.{name}.{suffix}"
            )
            return builder.call(function, args)

        return lanes(lanes), codegen

    intrinsic_of.__name__ = name
    return intrinsic(intrinsic_of)


magnitude, root = _unary("fabs"), _unary("sqrt")


@intrinsic
def rounded(_typing: Any, lanes: Any, array: Any) -> Any:
    """Lanes of float64 as an array of float32 or float64 would have them."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if array.dtype == types.float64:
            return args[0]
        return builder.fpext(builder.fptrunc(args[0], _numbers(SINGLE)), _numbers(DOUBLE))

    return DOUBLE(DOUBLE, array), codegen


@intrinsic
def total(_typing: Any, lanes: Any) -> Any:
    """The sum of all lanes as float64, in pairs."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        value = args[0] if lanes == DOUBLE else builder.fpext(args[0], _numbers(DOUBLE))
        n = LANES
        while n > 1:
            n //= 2
            halves = [ir.Constant(ir.VectorType(_I32, n), list(range(k, k + n))) for k in (0, n)]
            value = builder.fadd(*(builder.shuffle_vector(value, value, half) for half in halves))
        return builder.extract_element(value, ir.Constant(_I32, 0))

    return types.float64(lanes), codegen


@intrinsic
def first(_typing: Any, lanes: Any) -> Any:
    """The first lane."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.extract_element(args[0], ir.Constant(_I32, 0))

    return lanes.dtype(lanes), codegen


@intrinsic
def where_nonzero(_typing: Any, flags: Any, a: Any, b: Any) -> Any:
    """Lane by lane a where the flag is not 0, else b; of numbers too."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(_nonzero(builder, args[0]), args[1], args[2])

    return a(flags, a, a), codegen


def _nonzero(builder: Any, flags: Any) -> Any:
    return builder.fcmp_unordered("!=", flags, _zero(flags.type))


@intrinsic
def count_nonzero(_typing: Any, flags: Any, n: Any) -> Any:
    """How many of the first n lanes are not 0; of a number 0 or 1."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        found, word = _nonzero(builder, args[0]), ir.IntType(64)
        if not isinstance(flags, Lanes):
            return builder.zext(found, word)
        bits = builder.bitcast(builder.and_(found, _lanes_below(builder, args[1])), _I16)
        count = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I16, [_I16]), "llvm.ctpop.i16")
        return builder.zext(builder.call(count, [bits]), word)

    return types.int64(flags, types.intp), codegen


def _chosen(builder: Any, symbol: str, args: Any) -> Any:
    return builder.select(builder.fcmp_ordered(symbol, args[0], args[1]), args[2], args[3])


@intrinsic
def where_less(_typing: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """Lane by lane x where a < b, else y, for NaN too."""
    return x(a, b, x, y), lambda _context, builder, _signature, args: _chosen(builder, "<", args)


@intrinsic
def where_at_most(_typing: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """Lane by lane x where a <= b, else y, for NaN too."""
    return x(a, b, x, y), lambda _context, builder, _signature, args: _chosen(builder, "<=", args)


@intrinsic
def joined(_typing: Any, n: Any, a: Any, b: Any) -> Any:
    """The first n lanes of a, and those of b behind them."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(_lanes_below(builder, args[0]), args[1], args[2])

    return a(types.intp, a, a), codegen


# Element formats.


def _converts_halves(context: Any) -> bool:
    library = context.codegen()
    return "86" not in library._tm.triple.split("-")[0] or "+f16c" in library._tm_features


def _half_to_float(builder: Any, half: Any) -> Any:
    bits = builder.zext(half, _vector(_I32))
    magnitude = builder.shl(builder.and_(bits, _all(_I32, 0x7FFF)), _all(_I32, 13))
    # re-biased by a product, which is right for subnormals too
    number = builder.fmul(builder.bitcast(magnitude, _vector(_FLOAT)), _all(_FLOAT, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, _all(_I32, 0x7C00 << 13))  # Inf and NaN keep all exponent bits
    loud = builder.or_(magnitude, _all(_I32, 0x7F800000))
    value = builder.select(special, loud, builder.bitcast(number, _vector(_I32)))
    sign = builder.shl(builder.and_(bits, _all(_I32, 0x8000)), _all(_I32, 16))
    return builder.bitcast(builder.or_(value, sign), _vector(_FLOAT))


def _float_to_half(builder: Any, number: Any) -> Any:
    bits = builder.bitcast(number, _vector(_I32))
    magnitude = builder.and_(bits, _all(_I32, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, _all(_I32, 13)), _all(_I32, 1))
    rounding = builder.add(odd, _all(_I32, (0xFFF - (112 << 23)) & 0xFFFFFFFF))
    normal = builder.lshr(builder.add(magnitude, rounding), _all(_I32, 13))
    half = builder.fadd(builder.bitcast(magnitude, _vector(_FLOAT)), _all(_FLOAT, 0.5))  # has float16's subnormal ulp
    small = builder.sub(builder.bitcast(half, _vector(_I32)), _all(_I32, 0x3F000000))
    value = builder.select(builder.icmp_unsigned("<", magnitude, _all(_I32, 0x38800000)), small, normal)
    value = builder.select(builder.icmp_unsigned(">=", magnitude, _all(_I32, 0x477FF000)), _all(_I32, 0x7C00), value)
    value = builder.select(builder.icmp_unsigned(">", magnitude, _all(_I32, 0x7F800000)), _all(_I32, 0x7E00), value)
    sign = builder.and_(builder.lshr(bits, _all(_I32, 16)), _all(_I32, 0x8000))
    return builder.trunc(builder.or_(value, sign), _vector(_I16))


def _float_to_bfloat(builder: Any, number: Any) -> Any:
    bits = builder.bitcast(number, _vector(_I32))
    odd = builder.and_(builder.lshr(bits, _all(_I32, 16)), _all(_I32, 1))
    rounded = builder.add(bits, builder.add(odd, _all(_I32, 0x7FFF)))
    quiet = builder.or_(bits, _all(_I32, 0x400000))  # adding to a NaN could carry it into -0
    bits = builder.select(builder.fcmp_unordered("uno", number, number), quiet, rounded)
    return builder.trunc(builder.lshr(bits, _all(_I32, 16)), _vector(_I16))


def _decode(context: Any, builder: Any, bits: Any, element: Any, wanted: Lanes) -> Any:
    if element == types.float64:
        return bits
    number = bits
    if element in IMAGES:
        number = (builder.sitofp if element.signed else builder.uitofp)(bits, _vector(_FLOAT))
    elif element == types.int16:
        shifted = builder.shl(builder.zext(bits, _vector(_I32)), _all(_I32, 16))
        number = builder.bitcast(shifted, _vector(_FLOAT))
    elif element == types.uint16 and _converts_halves(context):
        number = builder.fpext(builder.bitcast(bits, _vector(_HALF)), _vector(_FLOAT))
    elif element == types.uint16:
        number = _half_to_float(builder, bits)
    return number if wanted == SINGLE else builder.fpext(number, _vector(_DOUBLE))


def _encode(context: Any, builder: Any, number: Any, given: Lanes, element: Any) -> Any:
    """To nearest even. float64 goes to the half types by way of float32, which costs 2^-13 of a half-type ulp."""
    if element == types.float64:
        return number if given == DOUBLE else builder.fpext(number, _vector(_DOUBLE))
    if given == DOUBLE:
        number = builder.fptrunc(number, _vector(_FLOAT))
    if element == types.float32:
        return number
    if element == types.int16:
        return _float_to_bfloat(builder, number)
    if _converts_halves(context):
        return builder.bitcast(builder.fptrunc(number, _vector(_HALF)), _vector(_I16))
    return _float_to_half(builder, number)


# Whole numbers of 16 bits, which the types of the half formats would stand for otherwise.
class _Image16(types.Integer):  # type: ignore[misc]
    def __str__(self) -> str:
        return "int16" if self.signed else "uint16"  # by which Numba finds the dtype


register_model(_Image16)(models.IntegerModel)
UNSIGNED16, SIGNED16 = _Image16("unsigned image", 16, signed=False), _Image16("signed image", 16, signed=True)
IMAGES = types.uint8, types.int8, UNSIGNED16, SIGNED16


# Memory. `pointer` is to elements, `i` counts them.


def _place(builder: Any, pointer: Any, i: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [i]), _vector(pointer.type.pointee).as_pointer())


def _lanes_below(builder: Any, n: Any) -> Any:
    """A mask of the first n lanes."""
    counts = ir.Constant(_vector(_I32), list(range(LANES)))
    return builder.icmp_signed("<", counts, in_all(builder, builder.trunc(n, _I32), LANES))


def _masked(builder: Any, name: str, kind: Any, kinds: list[Any], result: Any, values: list[Any]) -> Any:
    letter = {_FLOAT: "f32", _DOUBLE: "f64", _I8: "i8"}.get(kind.element, "i16")
    suffix = f"v{LANES}{letter}"
    if name != "expandload":  # names have pointer types, for the LLVM 14 of Numba 0.60; later ones read them as theirs
        suffix += f".p0{suffix}"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, kinds), f"llvm.masked.{name}.{suffix}"
    )
    return builder.call(function, values)


def _bytes(element: Any) -> int:
    return int(element.bitwidth) // 8


@intrinsic
def load(_typing: Any, pointer: Any, i: Any, like: Any) -> Any:
    """Sixteen elements from `pointer[i]` on, as lanes of the kind of `like`."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = builder.load(_place(builder, args[0], args[1]), align=_bytes(pointer.dtype))
        return _decode(context, builder, bits, pointer.dtype, like)

    return like(pointer, types.intp, like), codegen


@intrinsic
def load_own(_typing: Any, pointer: Any, i: Any) -> Any:
    """Sixteen float32 or float64 from `pointer[i]` on, as they are."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(_place(builder, *args), align=_bytes(pointer.dtype))

    return Lanes(pointer.dtype)(pointer, types.intp), codegen


@intrinsic
def spread_at(_typing: Any, pointer: Any, i: Any, like: Any) -> Any:
    """`pointer[i]` in all lanes, of the kind of `like`."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        value = builder.load(builder.gep(args[0], [args[1]]))
        if value.type != _numbers(like).element:
            value = builder.fpext(value, _DOUBLE)
        return in_all(builder, value, LANES)

    return like(pointer, types.intp, like), codegen


@intrinsic
def load_part(_typing: Any, pointer: Any, i: Any, n: Any, fill: Any) -> Any:
    """The first n <= 16 elements from `pointer[i]` on, and what `fill` has in the lanes behind them."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _load_part(context, builder, _place(builder, *args[:2]), pointer.dtype, args[2], fill, args[3])

    return fill(pointer, types.intp, types.intp, fill), codegen


def _load_part(context: Any, builder: Any, place: Any, element: Any, n: Any, wanted: Lanes, fill: Any) -> Any:
    mask, kind = _lanes_below(builder, n), place.type.pointee
    kinds = [place.type, _I32, mask.type, kind]
    values = [place, ir.Constant(_I32, _bytes(element)), mask, ir.Constant(kind, None)]
    bits = _masked(builder, "load", kind, kinds, kind, values)
    return builder.select(mask, _decode(context, builder, bits, element, wanted), fill)


@intrinsic
def load_apart(_typing: Any, pointer: Any, i: Any, n: Any, flags: Any, fill: Any) -> Any:
    """Elements from `pointer[i]` on, one behind the other, in those of the first n lanes whose flag is not 0, and what
    `fill` has in the others."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        mask = builder.and_(_nonzero(builder, args[3]), _lanes_below(builder, args[2]))
        place = builder.gep(args[0], [args[1]])
        kind = _vector(place.type.pointee)
        values = [place, mask, ir.Constant(kind, None)]
        bits = _masked(builder, "expandload", kind, [v.type for v in values], kind, values)
        return builder.select(mask, _decode(context, builder, bits, pointer.dtype, fill), args[4])

    return fill(pointer, types.intp, types.intp, flags, fill), codegen


@intrinsic
def move(_typing: Any, target: Any, source: Any) -> Any:
    """One element, as it is, from where one pointer is to where the other one is."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(builder.load(args[1]), args[0])
        return context.get_dummy_value()

    return types.void(target, source), codegen


@intrinsic
def save(_typing: Any, pointer: Any, i: Any, lanes: Any) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = _encode(context, builder, args[2], lanes, pointer.dtype)
        builder.store(bits, _place(builder, args[0], args[1]), align=_bytes(pointer.dtype))
        return context.get_dummy_value()

    return types.void(pointer, types.intp, lanes), codegen


@intrinsic
def save_part(_typing: Any, pointer: Any, i: Any, n: Any, lanes: Any) -> Any:
    """The first n <= 16 lanes."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _save_part(context, builder, _place(builder, *args[:2]), pointer.dtype, args[2], lanes, args[3])
        return context.get_dummy_value()

    return types.void(pointer, types.intp, types.intp, lanes), codegen


def _save_part(context: Any, builder: Any, place: Any, element: Any, n: Any, given: Lanes, lanes: Any) -> None:
    mask, bits = _lanes_below(builder, n), _encode(context, builder, lanes, given, element)
    kinds = [bits.type, place.type, _I32, mask.type]
    values = [bits, place, ir.Constant(_I32, _bytes(element)), mask]
    _masked(builder, "store", bits.type, kinds, ir.VoidType(), values)


@intrinsic
def stream(_typing: Any, pointer: Any, i: Any, lanes: Any) -> Any:
    """Store past the caches, to a place that `before_line` gave. A plain store first reads what it overwrites."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = _encode(context, builder, args[2], lanes, pointer.dtype)
        align = min(64, LANES * _bytes(pointer.dtype))
        store = builder.store(bits, _place(builder, args[0], args[1]), align=align)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
        return context.get_dummy_value()

    return types.void(pointer, types.intp, lanes), codegen


@intrinsic
def before_line(_typing: Any, pointer: Any) -> Any:
    """How many elements come before the first place that `stream` can store to."""
    size = _bytes(pointer.dtype)

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        gap = builder.neg(builder.ptrtoint(args[0], word))
        gap = builder.and_(gap, ir.Constant(word, LANES * size - 1))
        return builder.lshr(gap, ir.Constant(word, size.bit_length() - 1))

    return types.int64(pointer), codegen


def _ask(builder: Any, pointer: Any, i: Any, size: int, to_write: int, near: int) -> None:
    """Prefetch sixteen elements of `size` bytes; near: 3 into L1, 2 into L2."""
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    place, data = builder.bitcast(builder.gep(pointer, [i]), _I8.as_pointer()), 1
    for line in range(0, LANES * size, 64):
        there = builder.gep(place, [ir.Constant(_I32, line)])
        builder.call(function, [there, *(ir.Constant(_I32, k) for k in (to_write, near, data))])


@intrinsic
def fetch(_typing: Any, pointer: Any, i: Any) -> Any:
    """Ask for sixteen elements to be brought into L2: into L1 as well took 1.5 copies in all where L2 took 1.3."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _ask(builder, args[0], args[1], _bytes(pointer.dtype), 0, 2)
        return context.get_dummy_value()

    return types.void(pointer, types.intp), codegen


@intrinsic
def reserve(_typing: Any, pointer: Any, i: Any) -> Any:
    """Ask for sixteen elements that will be overwritten: a store that misses the caches waits for its line."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _ask(builder, args[0], args[1], _bytes(pointer.dtype), 1, 3)
        return context.get_dummy_value()

    return types.void(pointer, types.intp), codegen


@intrinsic
def pointer(_typing: Any, array: Any, offset: Any) -> Any:
    """To the element `offset` bytes into an array. Slices count references, which threads then contend for."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        data = field(context, builder, array, args[0], "data")
        return cgutils.pointer_add(builder, data, args[1])

    return types.CPointer(array.dtype)(array, types.intp), codegen


@intrinsic
def shifted(_typing: Any, pointer: Any, offset: Any) -> Any:
    """A pointer, `offset` bytes on."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return cgutils.pointer_add(builder, args[0], args[1])

    return pointer(pointer, types.intp), codegen


def _element_of(array: Any) -> Any:
    return _DOUBLE if array.dtype == types.float64 else _FLOAT


def _in_row(context: Any, builder: Any, kind: Any, array: Any, i: Any, c: Any) -> Any:
    """Where element c of row i of a matrix is, whose rows are contiguous, or of a row by itself."""
    data = field(context, builder, kind, array, "data")
    if kind.ndim > 1:
        step = builder.extract_value(field(context, builder, kind, array, "strides"), 0)
        data = cgutils.pointer_add(builder, data, builder.mul(i, step))
    return _place(builder, data, c)


@intrinsic
def take(_typing: Any, array: Any, i: Any, c: Any, n: Any, fill: Any) -> Any:
    """Numbers of channels: the n <= 16 from c on, of row i of an array (M, G) or of a row (G,), as `load_part`."""

    # An intrinsic, as Numba compiles a function again for each literal i.
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _in_row(context, builder, signature.args[0], *args[:3])
        return _load_part(context, builder, place, array.dtype, args[3], fill, args[4])

    return fill(array, types.intp, types.intp, types.intp, fill), codegen


@intrinsic
def spread_of(_typing: Any, array: Any, i: Any, c: Any) -> Any:
    """A number of a channel, c of row i, in all lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.bitcast(_in_row(context, builder, signature.args[0], *args), _element_of(array).as_pointer())
        return in_all(builder, builder.load(place), LANES)

    return (DOUBLE if array.dtype == types.float64 else SINGLE)(array, types.intp, types.intp), codegen


@intrinsic
def give(_typing: Any, array: Any, i: Any, c: Any, n: Any, lanes: Any) -> Any:
    """The opposite of `take`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _in_row(context, builder, signature.args[0], *args[:3])
        _save_part(context, builder, place, array.dtype, args[3], lanes, args[4])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, types.intp, lanes), codegen


@part()
def blank(array, rows):  # type: ignore[no-untyped-def]
    """The first rows of a matrix, or a row by itself, <- 0. By a slice it takes Numba five times as long to compile."""
    n = array.shape[array.ndim - 1]
    for i in range(rows):
        for c in range(0, n, LANES):
            give(array, i, c, min(LANES, n - c), spread(0.0))


@intrinsic
def narrowest(_typing: Any, array: Any) -> Any:
    """0 in the type that an array's elements can be computed in: float32 for the half types, else their own."""
    result = types.float64 if array.dtype == types.float64 else types.float32
    return result(array), lambda context, _builder, signature, _args: context.get_constant(signature.return_type, 0)


@intrinsic
def keep_whole(_typing: Any) -> Any:
    """Forbids LLVM to inline the calling function into its callers, each of which it would then optimize once more."""

    def codegen(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


def some_of(array, rows, c, n):  # type: ignore[no-untyped-def]
    """In a formula: as `take` in float64, of some rows."""
    return tuple(take(array, i, c, n, spread(0.0)) for i in rows)


@formula
def four_of(array, i, c, n):  # type: ignore[no-untyped-def]
    return some_of(array, [i + k for k in range(4)], c, n)


@formula
def give_rows(array, i, c, n, rows):  # type: ignore[no-untyped-def]
    """As `give`, from row i on."""
    for k, lanes in enumerate(rows):
        give(array, i + k, c, n, lanes)


@formula
def choose_rows(array, i, c, n, kept, rows):  # type: ignore[no-untyped-def]
    """The same, but what is there stays where `kept` is not 0."""
    for k, lanes in enumerate(rows):
        give(array, i + k, c, n, where_nonzero(kept, take(array, i + k, c, n, nothing(lanes)), lanes))
