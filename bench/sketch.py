"""Forward, channels first, float32, at the speed of a copy: a sketch for the next kernels.

Run it by `python -m fastbn.bench.sketch`; medians as multiples of the best copy.

Three things that `kernels/cpu` does not do yet, each to be seen by its own column.

- Explicit lanes: sixteen numbers as one Numba type. Loops are vectors by construction and in a fixed order, so nothing
  depends on how LLVM vectorises, and a store may go past the caches from within the loop that computes it.
- Float32 deviations for the sums (0.036 ns an element in L1, float64 0.11), float64 for the map (0.13; while stores go
  past the caches at 0.15, that costs nothing).
- Reading ahead: while a channel is written, the next one is fetched into L2, so that memory reads and writes at once.
"""
# mypy: ignore-errors
# ruff: noqa: ARG001 - arguments of an intrinsic are its types

from __future__ import annotations

import operator
import time

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from .floor import copies

LANES = 16


class Lanes(types.Type):
    """Sixteen numbers of a type."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        super().__init__(manager, lanes, _vector(lanes))


SINGLE, DOUBLE = Lanes(types.float32), Lanes(types.float64)


def _vector(lanes):
    return ir.VectorType(ir.FloatType() if lanes.dtype == types.float32 else ir.DoubleType(), LANES)


def _operator(symbol, name):
    @intrinsic
    def apply(_typing, a, b):
        return a(a, a), lambda _context, builder, _signature, args: getattr(builder, name)(*args, flags=("nsz",))

    @overload(symbol, inline="always")
    def _typed(a, b):
        return (lambda a, b: apply(a, b)) if isinstance(a, Lanes) and a == b else None


for _symbol, _name in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _operator(_symbol, _name)


@intrinsic
def spread(_typing, value):
    def codegen(_context, builder, _signature, args):
        blank = ir.Constant(ir.VectorType(args[0].type, LANES), ir.Undefined)
        first = builder.insert_element(blank, args[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, blank, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))

    return (DOUBLE if value == types.float64 else SINGLE)(value), codegen


@intrinsic
def wide(_typing, lanes):
    return DOUBLE(lanes), lambda _context, builder, _signature, args: builder.fpext(args[0], _vector(DOUBLE))


@intrinsic
def thin(_typing, lanes):
    return SINGLE(lanes), lambda _context, builder, _signature, args: builder.fptrunc(args[0], _vector(SINGLE))


@intrinsic
def fma(_typing, a, b, c):
    def codegen(_context, builder, signature, args):
        kind = _vector(signature.return_type)
        name = f"llvm.fmuladd.v{LANES}f{signature.return_type.dtype.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
        return builder.call(function, args)

    return a(a, a, a), codegen


@intrinsic
def total(_typing, lanes):
    """The sum of all lanes, in pairs."""

    def codegen(_context, builder, _signature, args):
        value, n = args[0], LANES
        while n > 1:
            n //= 2
            halves = [list(range(k, k + n)) for k in (0, n)]
            parts = [
                builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(ir.IntType(32), n), h)) for h in halves
            ]
            value = builder.fadd(*parts)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return lanes.dtype(lanes), codegen


def _place(builder, pointer, index):
    return builder.bitcast(builder.gep(pointer, [index]), _vector(SINGLE).as_pointer())


@intrinsic
def load(_typing, pointer, index):
    def codegen(_context, builder, _signature, args):
        return builder.load(_place(builder, *args), align=4)

    return SINGLE(pointer, types.intp), codegen


@intrinsic
def stream(_typing, pointer, index, lanes):
    """Store past the caches, to an address that is a multiple of 64."""

    def codegen(context, builder, _signature, args):
        store = builder.store(args[2], _place(builder, args[0], args[1]), align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(pointer, types.intp, lanes), codegen


@intrinsic
def fetch(_typing, pointer, index):
    """Prefetch into L2: into L1 as well took 1.5 copies in all where L2 took 1.3."""

    def codegen(context, builder, _signature, args):
        byte, integer = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, integer, integer, integer])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, into_l2, data = (ir.Constant(integer, k) for k in (0, 2, 1))
        builder.call(function, [builder.bitcast(builder.gep(*args[:1], [args[1]]), byte), read, into_l2, data])
        return context.get_dummy_value()

    return types.void(pointer, types.intp), codegen


@intrinsic
def at(_typing, array, offset):
    def codegen(context, builder, signature, args):
        return builder.gep(context.make_array(signature.args[0])(context, builder, args[0]).data, [args[1]])

    return types.CPointer(array.dtype)(array, types.intp), codegen


@njit(error_model="numpy")
def _deviations(x, n, pivot):
    s = t = q = r = spread(np.float32(0))
    near = spread(pivot)
    for i in range(0, n, 2 * LANES):
        d, e = load(x, i) - near, load(x, i + LANES) - near
        s, t, q, r = s + d, t + e, fma(d, d, q), fma(e, e, r)
    return float(total(s + t)), float(total(q + r))


@njit(error_model="numpy")
def _normalize(x, y, n, scale, shift, ahead):
    a, b = spread(scale), spread(shift)
    for i in range(0, n, LANES):
        fetch(ahead, i)
        stream(y, i, thin(fma(wide(load(x, i)), a, b)))


@njit(parallel=True, error_model="numpy")
def forward(x, y, gamma, beta, reading_ahead):
    """x, y (O, C, I) contiguous, I a multiple of 32, y at a multiple of 64."""
    outer, channels, inner = x.shape
    spans = 4
    for k in prange(spans):
        last = channels * (k + 1) // spans - 1
        for c in range(channels * k // spans, last + 1):
            s = q = 0.0
            pivot = x[0, c, 0]  # a kernel takes a block's mean, and looks twice where this was far off
            for o in range(outer):
                sb, qb = _deviations(at(x, (o * channels + c) * inner), inner, pivot)
                s, q = s + sb, q + qb
            n = outer * inner
            mean = pivot + s / n
            scale = gamma[c] / np.sqrt((q - s * s / n) / n + 1e-5)
            for o in range(outer - 1, -1, -1):  # what was read last is in cache
                here = (o * channels + c) * inner
                there = ((outer - 1 - o) * channels + min(c + 1, last)) * inner if reading_ahead else here
                _normalize(at(x, here), at(y, here), inner, scale, beta[c] - mean * scale, at(x, there))


def main() -> None:
    """Medians of 25 rounds, taken in turns, as multiples of the best copy."""
    rng = np.random.default_rng(0)
    for channels, side in ((64, 112), (256, 56), (1024, 16)):
        x = rng.normal(3, 1, (32, channels, side * side)).astype(np.float32)
        memory = np.empty(x.size + LANES, np.float32)
        start = -memory.ctypes.data % 64 // 4
        y = memory[start : start + x.size].reshape(x.shape)
        gamma, beta = rng.normal(size=(2, channels))
        calls = copies(x.reshape(-1).view(np.uint8), y.reshape(-1).view(np.uint8), None)
        calls["plain"] = lambda x=x, y=y, g=gamma, b=beta: forward(x, y, g, b, False)
        calls["reading ahead"] = lambda x=x, y=y, g=gamma, b=beta: forward(x, y, g, b, True)
        calls["reading ahead"]()
        xhat = (x.astype(np.float64) - x.mean((0, 2), np.float64)[:, None]) / np.sqrt(x.var((0, 2), np.float64) + 1e-5)[
            :, None
        ]
        assert np.abs(y - (gamma[:, None] * xhat + beta[:, None])).max() < 1e-5
        times = {name: [] for name in calls}
        for _ in range(26):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
        medians = {name: np.median(t[1:]) for name, t in times.items()}
        floor = min(medians[name] for name in ("numpy", "streaming", "parallel"))
        print((32, channels, side, side), {name: round(float(t / floor), 2) for name, t in medians.items()})


if __name__ == "__main__":
    main()
