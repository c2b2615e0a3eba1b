"""The parts that a compiled kernel is made of: functions for other compiled code alone, and choices by type.

Numba makes machine code of every function it compiles, callees first, and optimizes at each level what was inlined
there: of the 27 s that float32's two kernels took, 6 went to a hundred functions which nobody calls but the kernel
that all of them are linked into. Parts are linked as they are, and become machine code with their kernel. They don't
count references either: the arrays they are given are `lanes.borrowed`.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numba
from numba.extending import overload


def _linked() -> Any:
    """A compiler of code that is linked into its callers' and optimized there, by Numba's inner names."""
    from numba import _dynfunc  # type: ignore[attr-defined]
    from numba.core.codegen import JITCodeLibrary
    from numba.core.compiler import CompilerBase, DefaultPassBuilder
    from numba.core.compiler_machinery import register_pass
    from numba.core.typed_passes import NativeLowering, NopythonRewrites
    from numba.core.untyped_passes import InlineClosureLikes

    class Library(JITCodeLibrary):
        def _optimize_final_module(self) -> None: ...

        def _finalize_final_module(self) -> None:
            self._finalize_dynamic_globals()
            self._finalized = True

    @register_pass(mutates_CFG=True, analysis_only=False)
    class Lowering(NativeLowering):
        _name = "fastbn_linked_lowering"

        def run_pass(self, state: Any) -> bool:
            library = state.library = Library(state.targetctx.codegen(), state.func_id.func_qualname)
            state.flags.no_compile = True
            super().run_pass(state)
            made = state.cr
            names = made.fndesc.lookup_module(), made.fndesc.qualname, "for compiled code alone"
            entry = _dynfunc.make_function(*names, 0, made.env, (library,))  # without an address
            state.targetctx.insert_user_function(entry, made.fndesc, [library])
            state.reload_init.extend(library._reload_init)
            state.cr = made._replace(cfunc=entry)
            return True

    class Compiler(CompilerBase):
        def define_pipelines(self) -> list[Any]:
            passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
            passes._finalized = False
            # A twentieth of the time goes to closures and expressions of arrays, which no part has.
            kept = [(p, name) for p, name in passes.passes if p not in (InlineClosureLikes, NopythonRewrites)]
            passes.passes = [(Lowering if p is NativeLowering else p, name) for p, name in kept]
            passes.finalize()
            return [passes]

    return Compiler


_OPTIONS: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}
with contextlib.suppress(ImportError, AttributeError):  # a Numba that has changed these names: compiling takes longer
    _OPTIONS["pipeline_class"] = _linked()


def part(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`@part()`: njit for what compiled code alone calls. One that makes or returns arrays needs `_nrt=True`."""
    return numba.njit(**{**_OPTIONS, **options})


def by_type(choose: Callable[..., Any]) -> Callable[..., Any]:
    """For compiled code alone: a call of `choose` runs the function that `choose` returns for the arguments' types."""

    def stub(*args: Any) -> Any:
        raise NotImplementedError("compiled code calls it")

    overload(stub, strict=False, jit_options=_OPTIONS)(choose)
    return stub


def nothing_of(*args):  # type: ignore[no-untyped-def]
    """For `unless_none`."""


def unless_none(argument: int = 0, otherwise: Callable[..., Any] = nothing_of) -> Callable[[Callable[..., Any]], Any]:
    """A `part` for compiled code whose argument of this number may be None, where `otherwise` (*args) is run.

    By type: Numba 0.68 compiles both branches of `if a is None` unless a is None, and would give an optional array.
    """

    def wrap(function: Callable[..., Any]) -> Any:
        @by_type
        def either(*args: Any) -> Any:
            return otherwise if isinstance(args[argument], numba.types.NoneType) else function

        return either

    return wrap
