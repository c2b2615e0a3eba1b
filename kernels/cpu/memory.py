"""Sixteen numbers from memory, and back: `pointer` is to elements, `i` counts them.

`load` and `save` convert elements (`formats`). A store can go past the caches from within the loop that computes its
value.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .formats import decode, encode
from .formulas import field, formula, in_all, intrinsic
from .lanes import (
    DOUBLE,
    FLOAT32,
    FLOAT64,
    I8,
    I32,
    LANES,
    SINGLE,
    Lanes,
    lanes_below,
    nonzero,
    nothing,
    numbers_of,
    spread,
    vector_of,
    where_nonzero,
)
from .parts import part


def _place(builder: Any, pointer: Any, i: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [i]), vector_of(pointer.type.pointee).as_pointer())


def _masked(builder: Any, name: str, kind: Any, kinds: list[Any], result: Any, values: list[Any]) -> Any:
    letter = {FLOAT32: "f32", FLOAT64: "f64", I8: "i8"}.get(kind.element, "i16")
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
        return decode(context, builder, bits, pointer.dtype, like)

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
        if value.type != numbers_of(like).element:
            value = builder.fpext(value, FLOAT64)
        return in_all(builder, value, LANES)

    return like(pointer, types.intp, like), codegen


@intrinsic
def load_part(_typing: Any, pointer: Any, i: Any, n: Any, fill: Any) -> Any:
    """The first n <= 16 elements from `pointer[i]` on, and what `fill` has in the lanes behind them."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _load_part(context, builder, _place(builder, *args[:2]), pointer.dtype, args[2], fill, args[3])

    return fill(pointer, types.intp, types.intp, fill), codegen


def _load_part(context: Any, builder: Any, place: Any, element: Any, n: Any, wanted: Lanes, fill: Any) -> Any:
    mask, kind = lanes_below(builder, n), place.type.pointee
    kinds = [place.type, I32, mask.type, kind]
    values = [place, ir.Constant(I32, _bytes(element)), mask, ir.Constant(kind, None)]
    bits = _masked(builder, "load", kind, kinds, kind, values)
    return builder.select(mask, decode(context, builder, bits, element, wanted), fill)


@intrinsic
def load_apart(_typing: Any, pointer: Any, i: Any, n: Any, flags: Any, fill: Any) -> Any:
    """Elements from `pointer[i]` on, one behind the other, in those of the first n lanes whose flag is not 0, and what
    `fill` has in the others."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        mask = builder.and_(nonzero(builder, args[3]), lanes_below(builder, args[2]))
        place = builder.gep(args[0], [args[1]])
        kind = vector_of(place.type.pointee)
        values = [place, mask, ir.Constant(kind, None)]
        bits = _masked(builder, "expandload", kind, [v.type for v in values], kind, values)
        return builder.select(mask, decode(context, builder, bits, pointer.dtype, fill), args[4])

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
        bits = encode(context, builder, args[2], lanes, pointer.dtype)
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
    mask, bits = lanes_below(builder, n), encode(context, builder, lanes, given, element)
    kinds = [bits.type, place.type, I32, mask.type]
    values = [bits, place, ir.Constant(I32, _bytes(element)), mask]
    _masked(builder, "store", bits.type, kinds, ir.VoidType(), values)


@intrinsic
def stream(_typing: Any, pointer: Any, i: Any, lanes: Any) -> Any:
    """Store past the caches, to a place that `before_line` gave. A plain store first reads what it overwrites."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = encode(context, builder, args[2], lanes, pointer.dtype)
        align = min(64, LANES * _bytes(pointer.dtype))
        store = builder.store(bits, _place(builder, args[0], args[1]), align=align)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
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
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    place, data = builder.bitcast(builder.gep(pointer, [i]), I8.as_pointer()), 1
    for line in range(0, LANES * size, 64):
        there = builder.gep(place, [ir.Constant(I32, line)])
        builder.call(function, [there, *(ir.Constant(I32, k) for k in (to_write, near, data))])


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
    return FLOAT64 if array.dtype == types.float64 else FLOAT32


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
