"""How a kernel's work items are run: one by the calling thread, or all of them by all threads; and what they share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils

from .compile import compiled
from .formulas import field, intrinsic


@intrinsic
def fence(_typing: Any) -> Any:
    """What was stored past the caches is seen by other threads after a fence only."""

    def codegen(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def claim(_typing: Any, counts: Any, i: Any) -> Any:
    """`counts[i]`, which goes up by one: no two threads get the same."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        data = field(context, builder, counts, args[0], "data")
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counts, types.intp), codegen


@intrinsic
def call(_typing: Any, address: Any, arguments: Any) -> Any:
    """Calls a compiled function that returns nothing, by address; the types of the arguments must be its own."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = context.call_conv.get_function_type(types.none, list(arguments.types))
        values = [builder.extract_value(args[1], i) for i in range(len(arguments.types))]
        _call(context, builder, builder.inttoptr(args[0], kind.as_pointer()), list(arguments.types), values)
        return context.get_dummy_value()

    return types.void(address, arguments), codegen


def _call(context: Any, builder: Any, function: Any, kinds: list[Any], values: list[Any]) -> None:
    status, _ = context.call_conv.call_function(builder, function, types.none, kinds, values)
    with cgutils.if_unlikely(builder, status.is_error):
        context.call_conv.return_status_propagate(builder, status)


@intrinsic
def by_all(_typing: Any, every: Any, items: Any, arguments: Any) -> Any:
    """In a function (k, items, *arguments): has `every`, an address, call it for all k from 0 on.

    `every` takes items, a function (k, items, address) and an address, where that finds the arguments: so one parallel
    loop, which takes 0.6 s to compile, serves all kernels and types. One that calls a kernel by name is optimized four
    times with all that it calls, 6 s.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        word, convention, whole = [types.int64] * 3, context.call_conv, builder.function
        kind = convention.get_function_type(types.none, word)
        inner = ir.Function(builder.module, kind, name=builder.module.get_unique_name(f"{whole.name}.one"))
        inner.linkage = "internal"
        place = cgutils.alloca_once_value(builder, args[2])

        one = ir.IRBuilder(inner.append_basic_block("entry"))
        k, n, address = convention.decode_arguments(one, word, inner)
        held = one.load(one.inttoptr(address, args[2].type.as_pointer()))
        values = [one.extract_value(held, i) for i in range(len(arguments.types))]
        _call(context, one, whole, [*word[:2], *arguments.types], [k, n, *values])
        convention.return_value(one, context.get_dummy_value())

        function, address = (builder.ptrtoint(p, ir.IntType(64)) for p in (inner, place))
        _call(context, builder, builder.inttoptr(args[0], kind.as_pointer()), word, [args[1], function, address])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, arguments), codegen


@functools.partial(compiled, parallel=True)
def _every(items, function, address):  # type: ignore[no-untyped-def]
    """`function` (k, items, address) for all k, by address: one parallel loop for all kernels and types."""
    for k in prange(items):
        call(function, (np.int64(k), items, address))


class Twins:
    """A kernel for one element type, for arrays of any strides, read-only ones too: one compilation serves all.

    `item` takes k, items, `arguments` and last the address of `_every`: with k = -1 it has that call it for all k
    (`by_all`).
    """

    def __init__(self, item: Any, arguments: tuple[Any, ...]) -> None:
        self._item, self._arguments = item, arguments

    def serial(self, _items: int, *args: Any) -> None:
        self._entry(0, 1, *args, 0)  # one item is all of the work

    def parallel(self, items: int, *args: Any) -> None:
        self._entry(-1, items, *args, _address())

    @functools.cached_property
    def _entry(self) -> Callable[..., None]:
        # The compiled entry converts its arguments to the signature by itself. The dispatcher would look at the
        # layout of each array first, and compile again for every combination of layouts.
        signature = (types.int64, types.int64, *self._arguments, types.int64)
        entry: Callable[..., None] = _overload(self._item, signature).entry_point
        return entry


def _overload(dispatcher: Any, signature: tuple[Any, ...]) -> Any:
    dispatcher.compile(signature)
    return dispatcher.overloads[signature]


@functools.cache
def _address() -> int:
    every = _overload(_every, (types.int64, types.int64, types.int64))
    return int(every.library.get_pointer_to_function(every.fndesc.llvm_func_name))
