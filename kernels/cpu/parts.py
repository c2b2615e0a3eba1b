"""The parts that a compiled kernel is made of: functions for other compiled code alone, and choices by type.

Numba makes machine code of every function it compiles, callees first, and optimizes at each level what was inlined
there: of the 27 s that float32's two kernels took, 6 went to a hundred functions which nobody calls but the kernel
that all of them are linked into. Parts are linked as they are, and become machine code with their kernel. They don't
count references either: the arrays they are given are `views.borrowed`.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numba
from numba.extending import overload


def _linked() -> Any:
    """A compiler of code that is linked into its callers' and optimized there, by Numba's inner names."""
    import llvmlite.binding as llvm
    from llvmlite import ir
    from numba import _dynfunc  # type: ignore[attr-defined]
    from numba.core.codegen import JITCodeLibrary
    from numba.core.compiler import CompilerBase, DefaultPassBuilder
    from numba.core.compiler_machinery import register_pass
    from numba.core.lowering import Lower
    from numba.core.typed_passes import InlineOverloads, NativeLowering, NopythonRewrites
    from numba.core.untyped_passes import InlineClosureLikes, InlineInlinables

    class Library(JITCodeLibrary):
        def _optimize_functions(self, module: Any) -> None:
            """The cheap half of what is done to them: all of it is done again where they are linked to."""
            try:
                builder, passes = self._codegen._pass_builder(), llvm.create_new_function_pass_manager()
                passes.add_sroa_pass()
                passes.add_instruction_combine_pass()
                passes.add_simplify_cfg_pass()
            except AttributeError:  # before Numba 0.62
                super()._optimize_functions(module)
                return
            module.data_layout = self._codegen._data_layout
            for function in module.functions:
                if not function.is_declaration:
                    passes.run(function, builder)

        def _optimize_final_module(self) -> None: ...

        def _finalize_final_module(self) -> None:
            self._finalize_dynamic_globals()
            self._finalized = True

    class Plain(Lower):
        def lower_function_body(self) -> Any:
            """Vectors that registers have no room for lie on the stack: at multiples of 64 bytes, not of 16.

            Else it depended on where a process has its stack whether they lie across lines and pages: with AVX2,
            backward with ReLU took 1.7 to 2.3 times as long in one process of six, on one thread up to 10 times.
            """
            self.function.attributes.alignstack = 64
            self.function.attributes.add("nounwind")  # llvmlite writes none if this set is empty
            return super().lower_function_body()

        def delvar(self, name: str) -> None:
            """A variable is done: nothing is counted, so nothing is to do. Numba would store zeros over it."""

        def lower_static_raise(self, inst: Any) -> None:
            raise NotImplementedError(f"a part can't raise, as nobody asks how it went: {inst}")

        lower_dynamic_raise = lower_static_raise

    def never_fails(made: Any, library: Any) -> Any:
        """How a part is called: none raises, so nobody asks how it went, which is a tenth of the code."""

        def call(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            function, convention = context.declare_function(builder.module, made.fndesc), context.call_conv
            result, problem = function.function_type.args[:2]
            with builder.goto_entry_block():
                place = builder.alloca(result.pointee)
            given = convention._get_arg_packer(made.fndesc.argtypes).as_arguments(builder, args)
            builder.call(function, [place, ir.Constant(problem, ir.Undefined), *given])
            return context.get_returned_value(builder, made.fndesc.restype, builder.load(place))

        call.signature, call.libs = made.fndesc.argtypes, (library,)
        return call

    @register_pass(mutates_CFG=True, analysis_only=False)
    class Lowering(NativeLowering):
        _name = "fastbn_linked_lowering"

        @property
        def lowering_class(self) -> Any:
            return Plain if self._plain else Lower

        def run_pass(self, state: Any) -> bool:
            self._plain = not (state.flags.nrt or state.flags.boundscheck)
            library = state.library = Library(state.targetctx.codegen(), state.func_id.func_qualname)
            state.flags.no_compile = True
            super().run_pass(state)
            made = state.cr
            names = made.fndesc.lookup_module(), made.fndesc.qualname, "for compiled code alone"
            entry = _dynfunc.make_function(*names, 0, made.env, (library,))  # without an address
            if self._plain:
                call = never_fails(made, library)
                state.targetctx._defns[entry].append(call, call.signature)
            else:
                state.targetctx.insert_user_function(entry, made.fndesc, [library])
            state.reload_init.extend(getattr(library, "_reload_init", ()))  # Numba 0.60 has none
            state.cr = made._replace(cfunc=entry)
            return True

    class Compiler(CompilerBase):
        def define_pipelines(self) -> list[Any]:
            passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
            passes._finalized = False
            # Closures and expressions of arrays, which no part has, and what is to be inlined: nothing is, by Numba.
            kept = [
                (p, name)
                for p, name in passes.passes
                if p not in (InlineClosureLikes, NopythonRewrites, InlineInlinables, InlineOverloads)
            ]
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
