"""How a kernel's work items are run: one by the calling thread, or all of them by all threads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import prange, types

from .compile import Kernel
from .lanes import call


@Kernel
def _every(items, function, address):  # type: ignore[no-untyped-def]
    """`function` (k, items, address) for all k, by address: one parallel loop for all kernels and types."""
    for k in prange(items):
        call(function, (np.int64(k), items, address))


class Twins:
    """A kernel for one element type, for arrays of any strides, read-only ones too: one compilation serves all.

    `item` takes k, items, `arguments` and last the address of `_every`: with k = -1 it has that call it for all k
    (`lanes.by_all`).
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
        entry: Callable[..., None] = _compiled(self._item, signature).entry_point
        return entry


def _compiled(dispatcher: Any, signature: tuple[Any, ...]) -> Any:
    dispatcher.compile(signature)
    return dispatcher.overloads[signature]


@functools.cache
def _address() -> int:
    every = _compiled(_every.parallel, (types.int64, types.int64, types.int64))
    return int(every.library.get_pointer_to_function(every.fndesc.llvm_func_name))
