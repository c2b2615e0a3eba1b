"""Arrays as a work item has them: without their counts of references, and of one type."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

from .formulas import field, formula, intrinsic


class View(types.Array):  # type: ignore[misc]
    """A borrowed array, of any strides; slices of it too."""

    def __init__(self, dtype: Any, ndim: int) -> None:
        super().__init__(dtype, ndim, "A", name=f"View({dtype}, {ndim})")

    def copy(self, dtype: Any = None, ndim: Any = None, **_same: Any) -> Any:
        return View(dtype or self.dtype, self.ndim if ndim is None else ndim)


@register_model(View)
class _ViewModel(models.ArrayModel):  # type: ignore[misc]
    """Handed on as three values: Numba hands on each of an array's numbers, by a quarter of all code."""

    _handed = "data", "shape", "strides"

    def get_argument_type(self) -> Any:
        return tuple([self.get_model(self.get_field_position(name)).get_value_type() for name in self._handed])

    def as_argument(self, builder: Any, value: Any) -> Any:
        return tuple([self.get(builder, value, name) for name in self._handed])

    def from_argument(self, builder: Any, value: Any) -> Any:
        view, count = ir.Constant(self.get_value_type(), None), None
        for name, number in zip(self._handed, value, strict=True):
            view = self.set(builder, view, number, name)
        for n in cgutils.unpack_tuple(builder, value[1]):
            count = n if count is None else builder.mul(count, n)
        size = ir.Constant(ir.IntType(64), int(self._fe_type.dtype.bitwidth) // 8)
        return self.set(builder, self.set(builder, view, count, "nitems"), size, "itemsize")


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

    return View(array.dtype, array.ndim)(array), codegen


@intrinsic
def hold(_typing: Any, array: Any) -> Any:
    """Keeps a local array alive up to here."""
    return types.void(array), lambda context, _builder, _signature, _args: context.get_dummy_value()


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


@intrinsic
def moved(_typing: Any, array: Any, offset: Any) -> Any:
    """A borrowed array of the same shape, so many bytes on."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        data = cgutils.pointer_add(builder, field(context, builder, array, args[0], "data"), args[1])
        return _with(context, builder, array, args[0], data=data)

    return array(array, types.intp), codegen


def _at(context: Any, builder: Any, kind: Any, array: Any, i: Any) -> tuple[Any, Any]:
    """Where `array[i]` is, and the array's shape."""
    data, shape, strides = (field(context, builder, kind, array, name) for name in ("data", "shape", "strides"))
    step = builder.mul(i, builder.extract_value(strides, 0))
    return cgutils.pointer_add(builder, data, step), cgutils.unpack_tuple(builder, shape)


def _lower(context: Any, builder: Any, kind: Any, array: Any, data: Any, shape: list[Any]) -> Any:
    """Of an array, one of an axis less, from `data` on."""
    one, count = View(kind.dtype, kind.ndim - 1), shape[0]
    for n in shape[1:]:
        count = builder.mul(count, n)
    same = {n: field(context, builder, kind, array, n) for n in ("meminfo", "parent", "itemsize")}
    strides = cgutils.unpack_tuple(builder, field(context, builder, kind, array, "strides"))[1:]
    sizes, steps = cgutils.pack_array(builder, shape), cgutils.pack_array(builder, strides)
    return _with(context, builder, one, None, data=data, nitems=count, shape=sizes, strides=steps, **same)


@intrinsic
def outer(_typing: Any, array: Any, start: Any, count: Any) -> Any:
    """`array[start : start + count]` of a borrowed array, as a borrowed one without a size; None of None."""

    if isinstance(array, types.NoneType):
        return array(array, types.intp, types.intp), lambda context, _builder, _sig, _args: context.get_dummy_value()

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        data, shape = _at(context, builder, array, *args[:2])
        shape = cgutils.pack_array(builder, [args[2], *shape[1:]])
        return _with(context, builder, array, args[0], data=data, shape=shape)

    return array(array, types.intp, types.intp), codegen


@intrinsic
def place(_typing: Any, array: Any, i: Any) -> Any:
    """`array[i]` of a borrowed array, as a borrowed one."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        data, shape = _at(context, builder, array, *args)
        return _lower(context, builder, array, args[0], data, shape[1:])

    return View(array.dtype, array.ndim - 1)(array, types.intp), codegen


@intrinsic
def corner(_typing: Any, array: Any, i: Any, rows: Any, columns: Any) -> Any:
    """`array[i : i + rows, :columns]` of a borrowed matrix that is large enough, as a borrowed one."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        data, _ = _at(context, builder, array, *args[:2])
        count, shape = builder.mul(*args[2:]), cgutils.pack_array(builder, args[2:])
        return _with(context, builder, array, args[0], data=data, nitems=count, shape=shape)

    return array(array, types.intp, types.intp, types.intp), codegen


@intrinsic
def row(_typing: Any, array: Any, i: Any, columns: Any) -> Any:
    """`array[i, :columns]` of such a one."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        data, _ = _at(context, builder, array, *args[:2])
        return _lower(context, builder, array, args[0], data, args[2:])

    return View(array.dtype, 1)(array, types.intp, types.intp), codegen


@intrinsic
def columns_from(_typing: Any, array: Any, c: Any, columns: Any) -> Any:
    """`array[:, c : c + columns]` of a borrowed matrix, as `outer`."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        data, shape, strides = (field(context, builder, array, args[0], name) for name in ("data", "shape", "strides"))
        data = cgutils.pointer_add(builder, data, builder.mul(args[1], builder.extract_value(strides, 1)))
        shape = cgutils.pack_array(builder, [builder.extract_value(shape, 0), args[2]])
        return _with(context, builder, array, args[0], data=data, shape=shape)

    return array(array, types.intp, types.intp), codegen


@intrinsic
def carved(_typing: Any, memory: Any, offset: Any, rows: Any, columns: Any, like: Any) -> Any:
    """So many bytes into `memory`, a matrix of numbers as `like` is, or has; and where the next one may start, at a
    line."""
    view = View(getattr(like, "dtype", like), 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, most, line = (context.get_constant(types.intp, n) for n in (int(view.dtype.bitwidth) // 8, 63, -64))
        data = cgutils.pointer_add(builder, field(context, builder, memory, args[0], "data"), args[1])
        data = builder.bitcast(data, context.get_data_type(view.dtype).as_pointer())
        step, count = builder.mul(args[3], size), builder.mul(*args[2:4])
        shape, strides = cgutils.pack_array(builder, args[2:4]), cgutils.pack_array(builder, [step, size])
        blank = ir.Constant(context.get_value_type(view), None)
        matrix = _with(
            context, builder, view, blank, data=data, nitems=count, itemsize=size, shape=shape, strides=strides
        )
        then = builder.and_(builder.add(builder.add(args[1], builder.mul(count, size)), most), line)
        return context.make_tuple(builder, signature.return_type, [matrix, then])

    return types.Tuple([view, types.intp])(memory, types.intp, types.intp, types.intp, like), codegen


@formula
def rest(array, i):  # type: ignore[no-untyped-def]
    """`array[i:]`, as `outer`."""
    return outer(array, i, array.shape[0] - i)
