"""Arrays as a work item has them: without their counts of references, and of one type."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .formulas import field, formula, intrinsic


def _with(context: Any, builder: Any, kind: Any, array: Any, **fields: Any) -> Any:
    """The array, or a blank one (None), with other fields."""
    model = context.data_model_manager[kind]
    array = ir.Constant(model.get_value_type(), ir.Undefined) if array is None else array
    for name, value in fields.items():
        array = builder.insert_value(array, value, model.get_field_position(name))
    return array


@intrinsic
def borrowed(_typing: Any, array: Any) -> Any:
    """The array without its count of references; None of None. `hold` the array itself for as long.

    Numba counts in every call. That is an atomic operation, for which threads contend, and which waits until all stores
    past the caches have arrived: 1.5 copies in place of 1.1.

    Of one type whatever the layout is, and whether it may be written: all that takes an array is compiled again for
    each type.
    """

    if isinstance(array, types.NoneType):
        return array(array), lambda context, _builder, _signature, _args: context.get_dummy_value()

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        nobody = context.get_constant_null(types.voidptr)
        return _with(context, builder, signature.return_type, args[0], meminfo=nobody, parent=nobody)

    return types.Array(array.dtype, array.ndim, "A")(array), codegen


@intrinsic
def in_step(_typing: Any, array: Any, i: Any) -> Any:
    """A borrowed array, up to 63 bytes on, so that its element i lies at the start of a line: there must be room."""
    size = int(array.dtype.bitwidth) // 8

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        data, word = field(context, builder, array, args[0], "data"), ir.IntType(64)
        place = builder.add(builder.ptrtoint(data, word), builder.mul(args[1], ir.Constant(word, size)))
        data = cgutils.pointer_add(builder, data, builder.and_(builder.neg(place), ir.Constant(word, 63)))
        return _with(context, builder, array, args[0], data=data)

    return array(array, types.intp), codegen


def _at(context: Any, builder: Any, kind: Any, array: Any, i: Any) -> tuple[Any, Any, Any]:
    """Where `array[i]` is; the shape and the strides."""
    shape, strides = (
        cgutils.unpack_tuple(builder, field(context, builder, kind, array, name)) for name in ("shape", "strides")
    )
    data = field(context, builder, kind, array, "data")
    return cgutils.pointer_add(builder, data, builder.mul(i, strides[0])), shape, strides


@intrinsic
def outer(_typing: Any, array: Any, start: Any, count: Any) -> Any:
    """`array[start : start + count]` of a borrowed array, as a borrowed one without a size; None of None."""

    if isinstance(array, types.NoneType):
        return array(array, types.intp, types.intp), lambda context, _builder, _sig, _args: context.get_dummy_value()

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        data, shape, _ = _at(context, builder, array, *args[:2])
        shape = cgutils.pack_array(builder, [args[2], *shape[1:]])
        return _with(context, builder, array, args[0], data=data, shape=shape)

    return array(array, types.intp, types.intp), codegen


@intrinsic
def place(_typing: Any, array: Any, i: Any) -> Any:
    """`array[i]` of a borrowed array, as a borrowed one."""
    one = types.Array(array.dtype, array.ndim - 1, "A")

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        data, shape, strides = _at(context, builder, array, *args)
        count = shape[1]
        for n in shape[2:]:
            count = builder.mul(count, n)
        same = {n: field(context, builder, array, args[0], n) for n in ("meminfo", "parent", "itemsize")}
        shape, strides = cgutils.pack_array(builder, shape[1:]), cgutils.pack_array(builder, strides[1:])
        return _with(context, builder, one, None, data=data, nitems=count, shape=shape, strides=strides, **same)

    return one(array, types.intp), codegen


@intrinsic
def corner(_typing: Any, array: Any, i: Any, rows: Any, columns: Any) -> Any:
    """`array[i : i + rows, :columns]` of a borrowed matrix that is large enough, as a borrowed one."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        data, _, _ = _at(context, builder, array, *args[:2])
        count, shape = builder.mul(*args[2:]), cgutils.pack_array(builder, args[2:])
        return _with(context, builder, array, args[0], data=data, nitems=count, shape=shape)

    return array(array, types.intp, types.intp, types.intp), codegen


@intrinsic
def hold(_typing: Any, array: Any) -> Any:
    """Keeps a local array alive up to here."""
    return types.void(array), lambda context, _builder, _signature, _args: context.get_dummy_value()


@intrinsic
def row(_typing: Any, array: Any, i: Any, columns: Any) -> Any:
    """`array[i, :columns]` of such a one."""
    one = types.Array(array.dtype, 1, "A")

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        data, _, strides = _at(context, builder, array, *args[:2])
        same = {n: field(context, builder, array, args[0], n) for n in ("meminfo", "parent", "itemsize")}
        shape, strides = cgutils.pack_array(builder, args[2:]), cgutils.pack_array(builder, strides[1:])
        return _with(context, builder, one, None, data=data, nitems=args[2], shape=shape, strides=strides, **same)

    return one(array, types.intp, types.intp), codegen


@formula
def rest(array, i):  # type: ignore[no-untyped-def]
    """`array[i:]`, as `outer`."""
    return outer(array, i, array.shape[0] - i)
