"""What runs the cases of numba_cuda_cases: `python numba_cuda_run.py RESULTS [more | weights]`.

Numba decides at import whether it simulates (NUMBA_ENABLE_CUDASIM=1), so tests run this in a process of its own; on a
machine with a GPU it may run without the variable.
"""

from __future__ import annotations

import pickle
import sys
import warnings
from typing import Any

import numpy as np
from numba_cuda_cases import (
    CASES,
    FLOAT64,
    MORE_CASES,
    WEIGHTED_CASES,
    Case,
    Layout,
    MoreCase,
    MoreInputs,
    filled,
    inputs,
    more_inputs,
)


def run(case: Case) -> dict[str, Any]:
    """What the kernels make of a case: memory of y, dx and dresidual, table, dgamma, dbeta."""
    from fastbn.kernels import numba_cuda

    numba_cuda.SIZES = numba_cuda.Sizes(*case.sizes)
    data, shape = more_inputs(case) if isinstance(case, MoreCase) else inputs(case), case.shape
    element = numba_cuda.element_view(case.dtype)
    assert element is not None
    x_layout, y_layout, dy_layout = case.x, case.y or case.x, case.dy or case.x

    def put(layout: Layout, values: np.ndarray | None) -> tuple[Any, Any]:
        memory = numba_cuda.put(filled(layout, shape, case.dtype, values).view(element))
        _, strides, offset = layout.place(shape, case.dtype.itemsize)
        return memory, numba_cuda.view(memory, shape, strides, offset)

    def read(memory: Any) -> np.ndarray:
        return numba_cuda.host(memory).view(case.dtype)

    want = case.want.split()
    given = tuple(None if a is None else numba_cuda.put(a) for a in data.given)
    also: tuple[Any, ...] = ()
    columns, dr = shape[1], None
    if isinstance(case, MoreCase):
        from fastbn.extras import Extras

        assert isinstance(data, MoreInputs)
        r = None if data.residual is None or case.residual is None else put(case.residual, data.residual)[1]
        also = (Extras(case.activation, case.parameter, r, order=data.order, starts=data.starts),)
        columns *= max(1, len(case.sets))
        if data.weights is not None:
            mass = numba_cuda.put(np.full(max(1, len(case.sets)), np.nan))
            also = (also[0]._replace(weights=numba_cuda.put(data.weights), masked=case.masked, mass=mass),)
    table = numba_cuda.put(np.full((6, columns), np.nan))
    x = put(x_layout, data.x)
    y = x if case.in_place else put(y_layout, None)
    numba_cuda.forward(x[1], y[1] if "y" in want else None, table, given, case.eps, *also)
    results = {"y": read(y[0]), "table": numba_cuda.host(table)}
    x, dy = put(x_layout, data.x), put(dy_layout, data.dy)
    dx = {"x": x, "dy": dy}.get(case.in_place) or put(y_layout, None)
    if isinstance(case, MoreCase) and case.residual:
        dr = put(case.dresidual or case.residual, None)
        also = (also[0]._replace(dresidual=dr[1] if "dresidual" in want else None),)
    numbers = np.float64 if case.dtype == FLOAT64 else np.float32
    sums = {name: numba_cuda.put(np.full(columns, np.nan, numbers)) for name in ("dgamma", "dbeta")}
    dgamma, dbeta = (sums[name] if name in want else None for name in sums)
    numba_cuda.backward(dy[1], x[1], dx[1] if "dx" in want else None, table, dgamma, dbeta, case.frozen, *also)
    results |= {"dx": read(dx[0]), **{name: numba_cuda.host(a) for name, a in sums.items()}}
    results |= {"x after": read(x[0]), "dy after": read(dy[0])}
    if also and also[0].weights is not None:
        results["mass"] = numba_cuda.host(also[0].mass)
    return results if dr is None else {**results, "dresidual": read(dr[0])}


def users_kernel() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The example of the package's docstring, by its text, and a backward pass of the same kind."""
    import fastbn.kernels.numba_cuda as numba_cuda

    lines = numba_cuda.__doc__.partition("    @cuda.jit\n")
    scope: dict[str, Any] = {}
    exec(  # the text, as a user would paste it
        "import math\nfrom numba import cuda, float64\n"
        "from fastbn.kernels.numba_cuda import block_comoments, block_moments, gradient, merge_comoments\n"
        "from fastbn.kernels.numba_cuda import merge_moments, normalize\n"
        "@cuda.jit\n" + "\n".join(line[4:] for line in lines[2].splitlines()) + BACKWARD,
        scope,
    )
    rng = np.random.default_rng(5)
    x = (rng.normal(size=(3, 45)) + 1e4).astype(np.float32)
    dy = (rng.normal(size=(3, 45)) + 1e3).astype(np.float32)
    gamma, beta = rng.normal(size=(2, 3))
    y, dx, g, b = (numba_cuda.put(a) for a in (np.zeros_like(x), np.zeros_like(x), gamma, beta))
    scope["normalize_rows"][3, 8](numba_cuda.put(x), y, g, b, 1e-5)
    scope["rows_gradient"][3, 8](numba_cuda.put(dy), numba_cuda.put(x), dx, g, 1e-5)
    return x, dy, [gamma, beta, numba_cuda.host(y), numba_cuda.host(dx)]


BACKWARD = """

@cuda.jit
def rows_gradient(dy, x, dx, gamma, eps):
    row = cuda.blockIdx.x
    n = hi = lo = m2 = 0.0
    for i in range(cuda.threadIdx.x, x.shape[1], cuda.blockDim.x):
        n, hi, lo, m2 = merge_moments(n, hi, lo, m2, 1.0, float64(x[row, i]), 0.0, 0.0)
    n, hi, lo, m2 = block_moments(n, hi, lo, m2, 1)
    k = ghi = glo = t = co = 0.0
    for i in range(cuda.threadIdx.x, x.shape[1], cuda.blockDim.x):
        d = (float64(x[row, i]) - hi) - lo
        k, ghi, glo, t, co = merge_comoments(k, ghi, glo, t, co, 1.0, float64(dy[row, i]), 0.0, d, 0.0)
    k, ghi, glo, t, co = block_comoments(k, ghi, glo, t, co, 1)
    invstd = 1.0 / math.sqrt(m2 / n + eps)
    a = gamma[row] * invstd
    b = -a * invstd * invstd * co / n
    for i in range(cuda.threadIdx.x, x.shape[1], cuda.blockDim.x):
        dx[row, i] = gradient(float64(dy[row, i]), float64(x[row, i]), ghi, glo, hi, lo, a, b)
"""


def conversions() -> dict[str, np.ndarray]:
    """float32 numbers, as bfloat16 and back: ties to both sides, carries, overflow, subnormals, every kind of NaN."""
    from fastbn.kernels import numba_cuda
    from fastbn.kernels.numba_cuda.elements import load_bfloat, save_bfloat
    from fastbn.kernels.numba_cuda.target import cuda

    @cuda.jit
    def there_and_back(x, y, z):
        save_bfloat(y, cuda.grid(1), x[cuda.grid(1)])
        z[cuda.grid(1)] = load_bfloat(y, cuda.grid(1))

    upper = np.r_[0, 1, 0x3F80, 0x3F81, 0x3FFF, 0x7F7F, 0x7F80, 0x7FC0, 0x7FFF, 0x0080, 0x4242, 0x4243].astype(
        np.uint32
    )
    lower = np.r_[0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF].astype(np.uint32)
    sign = np.uint32([0, 0x8000])
    bits = ((sign[:, None, None] | upper[:, None]) << np.uint32(16) | lower).ravel()
    found = {"x": bits.view(np.float32), "y": np.zeros(bits.size, np.int16), "z": np.zeros(bits.size, np.float32)}
    arrays = [numba_cuda.put(a) for a in found.values()]
    there_and_back[bits.size // 8, 8](*arrays)
    return {name: numba_cuda.host(a) for name, a in zip(found, arrays, strict=True)}


def trees() -> np.ndarray:
    """Means by one tree after another in the same shared memory: (round, first or second tree, thread)."""
    from fastbn.kernels import numba_cuda
    from fastbn.kernels.numba_cuda import block_comoments, block_moments
    from fastbn.kernels.numba_cuda.target import cuda

    @cuda.jit
    def rounds(out):
        t = cuda.threadIdx.x
        for k in range(out.shape[0]):
            out[k, 0, t] = block_moments(1.0, float(t + 10 * k), 0.0, 0.0, 1 << k % 4)[1]
        for k in range(out.shape[0]):
            out[k, 1, t] = block_comoments(1.0, float(t - 10 * k), 0.0, 0.0, 0.0, 1 << k % 4)[1]

    out = numba_cuda.put(np.zeros((12, 2, 8)))
    rounds[1, 8](out)
    return numba_cuda.host(out)


def copies() -> list[tuple[np.ndarray, np.ndarray]]:
    """Copies between strided arrays: what was wanted, and what came."""
    from fastbn.kernels import numba_cuda

    found = []
    for shape, order in (((5,), (0,)), ((3, 4), (1, 0)), ((2, 3, 4, 5), (2, 0, 3, 1)), ((129, 3), (1, 0))):
        values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        turned = np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))
        source = numba_cuda.put(np.ascontiguousarray(turned.transpose(order)))
        source = numba_cuda.view(source, shape, turned.strides)
        back = [-s for s in values.strides]
        memory = numba_cuda.empty(shape, values.strides, values.dtype)
        target = numba_cuda.view(
            memory, shape, back, sum((n - 1) * s for n, s in zip(shape, values.strides, strict=True))
        )
        numba_cuda.copy(source, target)
        found += [(np.flip(values), numba_cuda.host(memory)), (values, numba_cuda.host(target))]
    return found


def refusals() -> list[str]:
    """The errors of arrays that the kernels can't read: 2 bytes off; with a stride of 6 bytes."""
    from fastbn.kernels import numba_cuda

    memory = numba_cuda.put(np.zeros(64, np.float32))
    table = numba_cuda.put(np.zeros((6, 2)))
    found = []
    for strides, offset in (((8, 4, 4), 2), ((12, 6, 4), 0)):
        try:
            x = numba_cuda.view(memory, (3, 2, 1), strides, offset)
            numba_cuda.forward(x, None, table, (None,) * 4, 1e-5)
        except ValueError as error:
            found.append(str(error))
    return found


class Stream:
    """As cuda.core's: it has an address by protocol alone."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 4711


def streams() -> list[int]:
    """The addresses of Numba's default stream, one of its own, and one of another library."""
    from fastbn.kernels.numba_cuda.arrays import stream_number

    return [stream_number(0), stream_number(np.int64(42)), stream_number(Stream())]


def signs() -> tuple[np.ndarray, np.ndarray]:
    """y and dresidual of a relu whose argument is what roundings leave; backward cuts the shape in another way."""
    from fastbn.kernels import numba_cuda

    from fastbn import reference
    from fastbn.extras import Extras

    rng = np.random.default_rng(8)
    host, dy = rng.normal(2, 3, (2, 4, 3, 31)).astype(np.float32)
    gamma, beta = rng.normal(size=(2, 3)).astype(np.float32)
    x, r, dr, y = (
        numba_cuda.put(a) for a in (host, -reference.forward(host, gamma, beta)[0].astype(host.dtype), dy, dy)
    )
    table = numba_cuda.put(np.empty((6, 3)))
    more = Extras("relu", residual=r, dresidual=dr)
    numba_cuda.SIZES = numba_cuda.Sizes(4, 2, 2, 4, 16)
    numba_cuda.forward(x, y, table, (numba_cuda.put(gamma), numba_cuda.put(beta), None, None), 1e-5, more)
    numba_cuda.SIZES = numba_cuda.Sizes(8, 2, 2, 1, 10**6)
    numba_cuda.backward(numba_cuda.put(np.ones_like(dy)), x, None, table, None, None, False, more)
    return numba_cuda.host(y), numba_cuda.host(dr)


Z = np.float32([*np.linspace(-8, 8, 65), 1e4, -1e4, np.nan])


def activations() -> dict[str, np.ndarray]:
    """f and f' of Z, with the parameter 0.3."""
    from fastbn.kernels import numba_cuda
    from fastbn.kernels.numba_cuda.activations import functions_of
    from fastbn.kernels.numba_cuda.target import cuda

    from fastbn.extras import ACTIVATIONS

    def kernel(f: Any, slope: Any) -> Any:
        @cuda.jit
        def both(z, out):
            i = cuda.grid(1)
            out[0, i], out[1, i] = f(z[i], np.float32(0.3)), slope(z[i], np.float32(0.3))

        return both

    found = {}
    for name in ACTIVATIONS:
        out = numba_cuda.put(np.zeros((2, Z.size), np.float32))
        kernel(*functions_of(name, np.float32))[Z.size // 4, 4](numba_cuda.put(Z), out)
        found[name] = numba_cuda.host(out)
    return found


def all_of(cases: list[Any]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for index, case in enumerate(cases):
        try:
            results[str(index)] = run(case)
        except Exception as error:  # told by the test of this case
            results[str(index)] = error
    return results


def main(path: str, kind: str) -> None:
    from numba import config

    if config.ENABLE_CUDASIM:
        from simulator import without_threads

        without_threads()
    warnings.simplefilter("ignore")  # NumPy's, of NaN and overflow in a simulated kernel
    results = all_of({"": CASES, "more": MORE_CASES, "weights": WEIGHTED_CASES}[kind])
    if kind == "more":
        results["signs"], results["activations"] = signs(), activations()
    elif not kind:
        results["again"] = [run(case) for case in CASES[:12:4]]
        results["user"] = users_kernel()
        results["copies"] = copies()
        results["refusals"] = refusals()
        results["conversions"] = conversions()
        results["trees"] = trees()
        results["streams"] = streams()
    with open(path, "wb") as file:
        pickle.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
