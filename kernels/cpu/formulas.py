"""Formulas: what is without loops, written by plain Python that runs while Numba compiles what calls it.

A formula is called with `Value`s, which know their types, and writes LLVM's code for what is done to them. It decides
by type as Python decides (`if w is None`), its loops unroll, and a tuple is a tuple.

Numbers that meet lanes are in all of them. A formula may call formulas, what is made by `intrinsic` here, and by
`called` parts, which have loops.
"""

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, extending


class _Writer:
    """What a formula writes with. Without a builder, only types are sought."""

    def __init__(self, typing: Any, context: Any = None, builder: Any = None) -> None:
        self.typing, self.context, self.builder = typing, context, builder


_writers: list[_Writer] = []  # the last one writes; Numba's lock lets one thread compile


@contextlib.contextmanager
def _writing(writer: _Writer) -> Iterator[_Writer]:
    _writers.append(writer)
    try:
        yield writer
    finally:
        _writers.pop()


class Value:
    """Something of compiled code: its type, and LLVM's name for it. The type's attributes are its own."""

    __slots__ = ("code", "kind")

    def __init__(self, kind: Any, code: Any) -> None:
        self.kind, self.code = kind, code

    def __bool__(self) -> bool:
        raise TypeError("a formula decides by type; what only the running code knows is for `where_...` or `either`")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = lambda self, _other: bool(self)  # type: ignore[assignment]
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if isinstance(self.kind, types.Array) and name in ("shape", "strides", "itemsize"):
            return _of_array(self, name)
        return getattr(self.kind, name)

    def __add__(self, other: Any) -> Any:
        return _operation("fadd", operator.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return _operation("fadd", operator.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return _operation("fsub", operator.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return _operation("fsub", operator.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return _operation("fmul", operator.mul, self, other)

    def __rmul__(self, other: Any) -> Any:
        return _operation("fmul", operator.mul, other, self)

    def __truediv__(self, other: Any) -> Any:
        return _operation("fdiv", operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _operation("fdiv", operator.truediv, other, self)


def _of_array(array: Value, name: str) -> Any:
    writer, kind = _writers[-1], array.kind
    number = types.UniTuple(types.intp, kind.ndim) if name != "itemsize" else types.intp
    if writer.builder is None:
        return _taken(number, None)
    return _taken(number, field(writer.context, writer.builder, kind, array.code, name))


def field(context: Any, builder: Any, kind: Any, array: Any, name: str) -> Any:
    """Of an array, in one instruction; by Numba's own way it is stored first, and then loaded."""
    return builder.extract_value(array, context.data_model_manager[kind].get_field_position(name))


def _operation(name: str, symbol: Any, a: Any, b: Any) -> Value:
    a, b = _alike(a, b), _alike(b, a)
    writer = _writers[-1]
    if a.kind == b.kind and not isinstance(a.kind, types.Integer):  # lanes, and floating-point numbers
        return Value(a.kind, None if writer.builder is None else getattr(writer.builder, name)(a.code, b.code))
    signature = writer.typing.resolve_function_type(symbol, (a.kind, b.kind), {})
    if writer.builder is None:
        return Value(signature.return_type, None)
    codes = [_cast(writer, v, kind) for v, kind in zip((a, b), signature.args, strict=True)]
    function = writer.context.get_function(writer.typing.resolve_value_type(symbol), signature)
    return Value(signature.return_type, function(writer.builder, codes))


def _alike(value: Any, other: Any) -> Value:
    """A number that meets lanes becomes lanes, a Python number that meets another of floating point such a one."""
    value = value if isinstance(value, float | int) else _value(value)
    if not isinstance(other, Value) or isinstance(other.kind, types.Integer):
        return _value(value)
    return value if isinstance(value, Value) and not _is_lanes(other) else full(other, value)


def _is_lanes(value: Value) -> bool:
    return not isinstance(value.kind, types.Number)


def full(like: Value, number: Any) -> Value:
    """A number of the type of `like`, in all its lanes."""
    writer = _writers[-1]
    if isinstance(number, Value) and number.kind == like.kind:
        return number
    if writer.builder is None:
        return Value(like.kind, None)
    kind = writer.context.get_value_type(like.kind)
    lanes = kind.count if isinstance(kind, ir.VectorType) else 0
    if not isinstance(number, Value):
        return Value(like.kind, ir.Constant(kind, [float(number)] * lanes if lanes else float(number)))
    code = _cast(writer, number, like.kind.dtype if lanes else like.kind)
    return Value(like.kind, in_all(writer.builder, code, lanes) if lanes else code)


def in_all(builder: Any, number: Any, lanes: int) -> Any:
    """LLVM's code for a number in all lanes of a vector."""
    word = ir.IntType(32)
    blank = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    first = builder.insert_element(blank, number, ir.Constant(word, 0))
    return builder.shuffle_vector(first, blank, ir.Constant(ir.VectorType(word, lanes), [0] * lanes))


def _value(value: Any) -> Value:
    """Whatever a formula has in its hands, as a `Value`."""
    if isinstance(value, Value):
        return value
    writer = _writers[-1]
    if value is None:
        return Value(types.none, None if writer.builder is None else writer.context.get_dummy_value())
    if isinstance(value, tuple):
        values = [_value(v) for v in value]
        kind = types.BaseTuple.from_types([v.kind for v in values], type(value))
        if writer.builder is None:
            return Value(kind, None)
        return Value(kind, writer.context.make_tuple(writer.builder, kind, [v.code for v in values]))
    for known, kind in ((bool, types.boolean), (int, types.int64), (float, types.float64)):
        if isinstance(value, known):
            code = None if writer.builder is None else writer.context.get_constant(kind, value)
            return Value(kind, code)
    raise TypeError(f"a formula can't hand on {value!r}")


def _taken(kind: Any, code: Any) -> Any:
    """The opposite of `_value`."""
    if isinstance(kind, types.NoneType):
        return None
    if isinstance(kind, types.BaseTuple):
        codes = [None] * len(kind) if code is None else cgutils.unpack_tuple(_writers[-1].builder, code)
        values = [_taken(k, c) for k, c in zip(kind.types, codes, strict=True)]
        return kind.instance_class(*values) if isinstance(kind, types.BaseNamedTuple) else tuple(values)
    return Value(kind, code)


def _cast(writer: _Writer, value: Value, kind: Any) -> Any:
    if value.kind == kind:
        return value.code
    return writer.context.cast(writer.builder, value.code, value.kind, kind)


class Intrinsic(extending._Intrinsic):  # type: ignore[misc]
    """As Numba's, and formulas can call it."""

    def __call__(self, *args: Any) -> Any:
        if not _writers:
            raise NotImplementedError(f"{self!r} is for compiled code")
        writer, values = _writers[-1], [_value(a) for a in args]
        signature, generate = self._defn(writer.typing, *[v.kind for v in values])
        code = None
        if writer.builder is not None:
            codes = [_cast(writer, v, kind) for v, kind in zip(values, signature.args, strict=True)]
            code = generate(writer.context, writer.builder, signature, codes)
        return None if signature.return_type == types.void else _taken(signature.return_type, code)


def intrinsic(define: Callable[..., Any]) -> Any:
    """`numba.extending.intrinsic`, for formulas too."""
    made = Intrinsic(define.__name__, define)
    made._register()
    return made


class _Formula(Intrinsic):
    def __call__(self, *args: Any) -> Any:
        return self._function(*args) if _writers else super().__call__(*args)


def formula(function: Callable[..., Any]) -> Any:
    """`@formula`: for compiled code and other formulas to call."""

    def define(typing: Any, *kinds: Any) -> Any:
        with _writing(_Writer(typing)):
            result = _value(function(*[_taken(kind, None) for kind in kinds])).kind

        def generate(context: Any, builder: Any, _signature: Any, codes: Any) -> Any:
            with _writing(_Writer(typing, context, builder)):
                return _value(function(*[_taken(*pair) for pair in zip(kinds, codes, strict=True)])).code

        return result(*kinds), generate

    define.__name__, define.__doc__ = function.__name__, function.__doc__
    given = inspect.signature(function)
    first = inspect.Parameter("typing", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    define.__signature__ = given.replace(parameters=[first, *given.parameters.values()])  # type: ignore[attr-defined]
    made = _Formula(function.__name__, define)
    made._function = function
    made._register()
    return made


def called(function: Any, *args: Any) -> Any:
    """In a formula: what a part, or a choice by type, gives."""
    writer, values = _writers[-1], [_value(a) for a in args]
    kinds = tuple([types.unliteral(v.kind) for v in values])
    signature = writer.typing.resolve_function_type(writer.typing.resolve_value_type(function), kinds, {})
    code = None
    if writer.builder is not None:
        codes = [_cast(writer, *pair) for pair in zip(values, signature.args, strict=True)]
        code = writer.context.get_function(writer.typing.resolve_value_type(function), signature)(writer.builder, codes)
    return _taken(signature.return_type, code)


def either(flag: Value, then: Callable[[], Any], otherwise: Callable[[], Any]) -> None:
    """In a formula: does one or the other, neither of which gives anything."""
    builder = _writers[-1].builder
    if builder is None:
        then()
        otherwise()
        return
    with builder.if_else(_value(flag).code) as (yes, no):
        with yes:
            then()
        with no:
            otherwise()
