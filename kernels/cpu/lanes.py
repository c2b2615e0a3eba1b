"""Sixteen numbers at a time: the type, and the arithmetic, under the CPU kernels.

`Lanes` is sixteen float32 or sixteen float64 as one Numba value, an LLVM vector. Loops over it are vectors by
construction, and add in the order in which they are written: nothing depends on what LLVM makes of a loop, so the
process that compiles a kernel and the one that loads it give the same bits.
"""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import lower_builtin, models, register_model

from .formulas import in_all, intrinsic

LANES = 16

FLOAT32, FLOAT64, FLOAT16 = ir.FloatType(), ir.DoubleType(), ir.HalfType()
I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)


class Lanes(types.Type):
    """Sixteen float32 or float64."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


SINGLE, DOUBLE = Lanes(types.float32), Lanes(types.float64)


def vector_of(element: Any) -> Any:
    return ir.VectorType(element, LANES)


def numbers_of(lanes: Lanes) -> Any:
    return vector_of(FLOAT32 if lanes.dtype == types.float32 else FLOAT64)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, numbers_of(lanes))


def constant(element: Any, value: Any) -> Any:
    """The constant vector of one value."""
    return ir.Constant(vector_of(element), [value] * LANES)


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
        return args[0] if lanes == DOUBLE else builder.fpext(args[0], numbers_of(DOUBLE))

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
        return builder.fpext(builder.fptrunc(args[0], numbers_of(SINGLE)), numbers_of(DOUBLE))

    return DOUBLE(DOUBLE, array), codegen


@intrinsic
def total(_typing: Any, lanes: Any) -> Any:
    """The sum of all lanes as float64, in pairs."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        value = args[0] if lanes == DOUBLE else builder.fpext(args[0], numbers_of(DOUBLE))
        n = LANES
        while n > 1:
            n //= 2
            halves = [ir.Constant(ir.VectorType(I32, n), list(range(k, k + n))) for k in (0, n)]
            value = builder.fadd(*(builder.shuffle_vector(value, value, half) for half in halves))
        return builder.extract_element(value, ir.Constant(I32, 0))

    return types.float64(lanes), codegen


@intrinsic
def first(_typing: Any, lanes: Any) -> Any:
    """The first lane."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.extract_element(args[0], ir.Constant(I32, 0))

    return lanes.dtype(lanes), codegen


@intrinsic
def where_nonzero(_typing: Any, flags: Any, a: Any, b: Any) -> Any:
    """Lane by lane a where the flag is not 0, else b; of numbers too."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(nonzero(builder, args[0]), args[1], args[2])

    return a(flags, a, a), codegen


def nonzero(builder: Any, flags: Any) -> Any:
    return builder.fcmp_unordered("!=", flags, _zero(flags.type))


def lanes_below(builder: Any, n: Any) -> Any:
    """A mask of the first n lanes."""
    counts = ir.Constant(vector_of(I32), list(range(LANES)))
    return builder.icmp_signed("<", counts, in_all(builder, builder.trunc(n, I32), LANES))


@intrinsic
def count_nonzero(_typing: Any, flags: Any, n: Any) -> Any:
    """How many of the first n lanes are not 0; of a number 0 or 1."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        found, word = nonzero(builder, args[0]), ir.IntType(64)
        if not isinstance(flags, Lanes):
            return builder.zext(found, word)
        bits = builder.bitcast(builder.and_(found, lanes_below(builder, args[1])), I16)
        count = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I16, [I16]), "llvm.ctpop.i16")
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
        return builder.select(lanes_below(builder, args[0]), args[1], args[2])

    return a(types.intp, a, a), codegen


@intrinsic
def keep_whole(_typing: Any) -> Any:
    """Forbids LLVM to inline the calling function into its callers, each of which it would then optimize once more."""

    def codegen(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen
