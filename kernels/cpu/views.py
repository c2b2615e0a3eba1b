"""Arrays as a work item has them: without their counts of references, and of one type."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic  # type: ignore[untyped-decorator]
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
        view = context.make_array(signature.return_type)(context, builder, value=args[0])
        view.meminfo = cgutils.get_null_value(view.meminfo.type)
        view.parent = cgutils.get_null_value(view.parent.type)
        return view._getvalue()

    return types.Array(array.dtype, array.ndim, "A")(array), codegen


@intrinsic  # type: ignore[untyped-decorator]
def in_step(_typing: Any, array: Any, i: Any) -> Any:
    """A borrowed array, up to 63 bytes on, so that its element i lies at the start of a line: there must be room."""
    size = int(array.dtype.bitwidth) // 8

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        view, word = context.make_array(signature.return_type)(context, builder, value=args[0]), ir.IntType(64)
        place = builder.add(builder.ptrtoint(view.data, word), builder.mul(args[1], ir.Constant(word, size)))
        view.data = cgutils.pointer_add(builder, view.data, builder.and_(builder.neg(place), ir.Constant(word, 63)))
        return view._getvalue()

    return array(array, types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def outer(_typing: Any, array: Any, start: Any, count: Any) -> Any:
    """`array[start : start + count]` of a borrowed array, as a borrowed one; None of None."""

    if isinstance(array, types.NoneType):
        return array(array, types.intp, types.intp), lambda context, _builder, _sig, _args: context.get_dummy_value()

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        view = context.make_array(signature.return_type)(context, builder, value=args[0])
        strides, shape = cgutils.unpack_tuple(builder, view.strides), cgutils.unpack_tuple(builder, view.shape)
        view.data = cgutils.pointer_add(builder, view.data, builder.mul(args[1], strides[0]))
        view.shape = cgutils.pack_array(builder, [args[2], *shape[1:]])
        return view._getvalue()

    return array(array, types.intp, types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def place(_typing: Any, array: Any, i: Any) -> Any:
    """`array[i]` of a borrowed array, as a borrowed one."""
    one = types.Array(array.dtype, array.ndim - 1, "A")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = context.make_array(array)(context, builder, value=args[0])
        view = context.make_array(one)(context, builder)
        strides, shape = cgutils.unpack_tuple(builder, whole.strides), cgutils.unpack_tuple(builder, whole.shape)
        count = shape[1]
        for n in shape[2:]:
            count = builder.mul(count, n)
        view.data = cgutils.pointer_add(builder, whole.data, builder.mul(args[1], strides[0]))
        view.shape, view.strides = cgutils.pack_array(builder, shape[1:]), cgutils.pack_array(builder, strides[1:])
        view.nitems, view.itemsize = count, whole.itemsize
        view.meminfo, view.parent = whole.meminfo, whole.parent
        return view._getvalue()

    return one(array, types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def hold(_typing: Any, array: Any) -> Any:
    """Keeps a local array alive up to here."""
    return types.void(array), lambda context, _builder, _signature, _args: context.get_dummy_value()
