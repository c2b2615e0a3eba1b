"""What fastbn is compared with: a class for each library, all with the same few methods.

A library is imported when its object is made, which raises ImportError where it isn't installed. Each is used the
best way that it offers to someone whose data are NumPy arrays: converted and compiled beforehand, on `threads`
threads, in the layout that it likes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import fastbn

from .arrays import EPS, Arrays
from .shapes import SECOND, base

Results = tuple[np.ndarray, ...]


class Call(NamedTuple):
    """A function ready to be timed, and how to read what it returned: y; dx, dgamma, dbeta; or mean, variance."""

    run: Callable[[], Any]
    read: Callable[[Any], Results]


class Library:
    """A library to be timed."""

    name = ""
    error = 1e-2  # the largest that is not called wrong; how accurate they are is in bench/accuracy.py

    def __init__(self, threads: int) -> None:
        """Import the library and set its threads. Raises ImportError."""
        self.version = ""

    def call(self, arrays: Arrays, function: str, out: bool) -> Call | None:
        """The function on these arrays, into given memory or not; None where the library has no such thing."""
        raise NotImplementedError


class Fastbn(Library):
    """This library."""

    name = "fastbn"

    def __init__(self, threads: int) -> None:
        import numba

        self.version = fastbn.__version__
        numba.set_num_threads(threads)

    def call(self, arrays: Arrays, function: str, out: bool) -> Call | None:
        """Everything, on every array."""
        a, more = arrays, arrays.more(function)
        if function in SECOND:
            return _second_order(arrays, function, out)
        function = base(function)
        if function == "moments":
            return Call(partial(fastbn.moments, a.x, **more), lambda m: (m.mean, m.var()))
        if function == "backward":
            saved = fastbn.forward(a.x, a.gamma, a.beta, eps=EPS, **more)[1]
            given: dict[str, Any] = {"out": (a.dx, a.dgamma, a.dbeta)} if out else {}
            return Call(partial(fastbn.backward, a.dy, saved, **given), lambda r: r[:3])
        more |= {"out": a.y} if out else {}
        if function == "infer":
            run = partial(fastbn.infer, a.x, a.mean, a.var, a.gamma, a.beta, eps=EPS, **more)
            return Call(run, lambda r: (r,))
        return Call(partial(fastbn.forward, a.x, a.gamma, a.beta, eps=EPS, **more), lambda r: (r[0],))


def _second_order(a: Arrays, function: str, out: bool) -> Call:
    saved = fastbn.forward(a.x, a.gamma, a.beta, eps=EPS)[1]
    if function == "backward+jvp":
        run = partial(fastbn.jvp, a.tangent, saved, a.beta, a.mean, out=a.dx if out else None)
        return Call(run, lambda r: (r,))
    given = (a.dx, a.dgamma, a.y) if out else None
    return Call(partial(fastbn.backward_backward, a.tangent, a.beta, a.mean, a.dy, saved, out=given), lambda r: r)


class NumPy(Library):
    """Plain NumPy, as one would write it; not in half types, whose sums lose too much."""

    name = "NumPy"

    def __init__(self, threads: int) -> None:
        self.version = np.__version__

    def call(self, arrays: Arrays, function: str, out: bool) -> Call | None:
        """Everything in float32 and float64."""
        a, x = arrays, arrays.x
        if x.dtype.itemsize < 4:
            return None
        axes = tuple(i for i in range(x.ndim) if i != 1)
        wide = [-1 if i == 1 else 1 for i in range(x.ndim)]
        gamma, beta = a.gamma.reshape(wide), a.beta.reshape(wide)
        eps = gamma.dtype.type(EPS)
        count = x.size // len(a.gamma)
        y, dx = (a.y, a.dx) if out else (None, None)

        def normalize(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
            d: np.ndarray = np.subtract(x, mean, out=y)
            d *= gamma / np.sqrt(var + eps)
            d += beta
            return d

        def backward(mean: np.ndarray, invstd: np.ndarray) -> Results:
            xhat = np.subtract(x, mean, out=dx)
            xhat *= invstd
            dbeta = a.dy.sum(axes, keepdims=True)
            dgamma = (a.dy * xhat).sum(axes, keepdims=True)
            xhat *= -dgamma / count
            xhat += a.dy
            xhat -= dbeta / count
            xhat *= gamma * invstd
            return xhat, dgamma.reshape(-1), dbeta.reshape(-1)

        if function == "moments":
            return Call(lambda: (x.mean(axes), x.var(axes)), lambda r: r)
        if function == "infer":
            return Call(partial(normalize, a.mean.reshape(wide), a.var.reshape(wide)), lambda r: (r,))
        if function == "forward":
            return Call(lambda: normalize(x.mean(axes, keepdims=True), x.var(axes, keepdims=True)), lambda r: (r,))
        mean, invstd = x.mean(axes, keepdims=True), 1 / np.sqrt(x.var(axes, keepdims=True) + eps)
        return Call(partial(backward, mean, invstd), lambda r: r)


class PyTorch(Library):
    """PyTorch's own kernels, without autograd; what lies channels last is in its channels-last memory formats."""

    name = "PyTorch"

    def __init__(self, threads: int) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.version = self.torch.__version__
        self.torch.set_num_threads(threads)

    def tensor(self, a: np.ndarray) -> Any:
        """The same memory as a tensor; (N, C, L) on channels-last strides as (N L, C), for which there is no format."""
        if a.ndim == 3 and a.strides[1] == a.itemsize:
            a = a.transpose(0, 2, 1).reshape(-1, a.shape[1])
        if a.dtype.name == "bfloat16":
            return self.torch.from_numpy(a.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(a)

    def array(self, tensor: Any, like: np.ndarray) -> np.ndarray:
        """A result of `like`'s size as an array of its shape."""
        wide = tensor if tensor.dtype == self.torch.float64 else tensor.to(self.torch.float32)
        found: np.ndarray = wide.numpy()
        if found.ndim == 2 and like.ndim == 3:
            found = found.reshape(like.shape[0], like.shape[2], -1).transpose(0, 2, 1)
        return found

    def call(self, arrays: Arrays, function: str, out: bool) -> Call | None:
        """Everything, on every array. The `out` variant of backward is PyTorch's: it computes, then copies."""
        torch, a = self.torch, arrays
        x, gamma, beta, mean, var = map(self.tensor, (a.x, a.gamma, a.beta, a.mean, a.var))

        def read(result: Any) -> Results:
            first = result[0] if isinstance(result, tuple) else result
            return (self.array(first, a.x),)

        if function == "moments":
            axes = [i for i in range(x.ndim) if i != 1]
            run = partial(torch.var_mean, x, dim=axes, correction=0)
            return Call(run, lambda r: (r[1].double().numpy(), r[0].double().numpy()))
        if function == "backward":
            _, mean, invstd = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)
            given = (self.tensor(a.dy), x, gamma, None, None, mean, invstd, True, EPS, [True, True, True])
            op = torch.ops.aten.native_batch_norm_backward
            run = partial(op.default, *given)
            if out:
                dx, dgamma, dbeta = map(self.tensor, (a.dx, a.dgamma, a.dbeta))
                run = partial(op.out, *given, out0=dx, out1=dgamma, out2=dbeta)
            return Call(run, lambda r: (self.array(r[0], a.x), r[1].numpy(), r[2].numpy()))
        training = function == "forward"
        formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
        if training and out and not any(x.is_contiguous(memory_format=f) for f in formats):
            return None  # wrong in 2.13: off by 2.4, and save_mean by 3.7, for a (11, 9, 6) transposed from (6, 9, 11)
        running = (None, None) if training else (mean, var)
        if out:
            kept = [torch.empty(len(a.gamma) if training else 0, dtype=gamma.dtype) for _ in range(2)]
            to = (self.tensor(a.y), *kept)
            return Call(partial(torch.native_batch_norm, x, gamma, beta, *running, training, 0.1, EPS, out=to), read)
        norm = torch.nn.functional.batch_norm
        return Call(partial(norm, x, *running, gamma, beta, training, 0.1, EPS), read)


class Jax(Library):
    """JAX on the CPU, compiled; in its default precision, so without float64; it has no `out` and no strides."""

    name = "JAX"

    def __init__(self, threads: int) -> None:
        jax: Any = importlib.import_module("jax")  # as many threads as this process may use cores
        jax.config.update("jax_platforms", "cpu")
        self.jax, self.jnp, self.version = jax, jax.numpy, jax.__version__

    def call(self, arrays: Arrays, function: str, out: bool) -> Call | None:
        """Fresh results of float32 and half types, of arrays without gaps."""
        a, jnp = arrays, self.jnp
        shape = a.case.shape
        if out or a.case.dtype == "float64" or shape.order or shape.slack:
            return None
        last = a.case.layout == "last"
        channel = a.x.ndim - 1 if last else 1
        axes = tuple(i for i in range(a.x.ndim) if i != channel)
        wide = [-1 if i == channel else 1 for i in range(a.x.ndim)]
        x, dy = (jnp.asarray(np.moveaxis(v, 1, -1) if last else v) for v in (a.x, a.dy))
        gamma, beta, mean, var = (jnp.asarray(v.reshape(wide)) for v in (a.gamma, a.beta, a.mean, a.var))

        def moments(x: Any) -> Any:
            x = x.astype(jnp.float32)
            return x.mean(axes, keepdims=True), x.var(axes, keepdims=True)

        def infer(x: Any, mean: Any, var: Any) -> Any:
            return ((x.astype(jnp.float32) - mean) * (gamma * self.jax.lax.rsqrt(var + EPS)) + beta).astype(x.dtype)

        def backward(dy: Any, x: Any, mean: Any, var: Any) -> Any:
            dy, invstd = dy.astype(jnp.float32), self.jax.lax.rsqrt(var + EPS)
            xhat = (x.astype(jnp.float32) - mean) * invstd
            dgamma, dbeta = (dy * xhat).sum(axes, keepdims=True), dy.sum(axes, keepdims=True)
            count = x.size // gamma.size
            dx = gamma * invstd * (dy - dbeta / count - xhat * (dgamma / count))
            return dx.astype(x.dtype), dgamma, dbeta

        functions: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "moments": (moments, (x,)),
            "infer": (lambda *given: (infer(*given),), (x, mean, var)),
            "forward": (lambda x: (infer(x, *moments(x)),), (x,)),
            "backward": (backward, (dy, x, *moments(x))),
        }
        function_of, given = functions[function]
        compiled = self.jax.jit(function_of)

        def read(results: Any) -> Results:
            full = [np.asarray(r) for r in results]
            if last:
                full = [np.moveaxis(r, -1, 1) for r in full]
            return tuple(r if r.size == a.x.size and r.shape == a.x.shape else r.reshape(-1) for r in full)

        return Call(lambda: self.jax.block_until_ready(compiled(*given)), read)


class OnnxRuntime(Library):
    """ONNX Runtime: inference, channels first, in float32 and float64."""

    name = "ONNX Runtime"

    def __init__(self, threads: int) -> None:
        self.runtime: Any = importlib.import_module("onnxruntime")
        self.onnx: Any = importlib.import_module("onnx")
        self.version, self.threads = self.runtime.__version__, threads

    def call(self, arrays: Arrays, function: str, out: bool) -> Call | None:
        """Inference on contiguous arrays; `out` by binding y's memory."""
        a = arrays
        if function != "infer" or a.x.dtype.itemsize < 4 or not a.x.flags.c_contiguous:
            return None
        helper = self.onnx.helper
        element = helper.np_dtype_to_tensor_dtype(a.x.dtype)
        values = [helper.make_tensor_value_info(name, element, a.x.shape) for name in "xy"]
        names = ["gamma", "beta", "mean", "var"]
        constants = [self.onnx.numpy_helper.from_array(getattr(a, name), name) for name in names]
        node = helper.make_node("BatchNormalization", ["x", *names], ["y"], epsilon=EPS)
        graph = helper.make_graph([node], "infer", values[:1], values[1:], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = self.runtime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        if not out:
            return Call(partial(session.run, None, {"x": a.x}), lambda r: (r[0],))
        binding = session.io_binding()
        for bind, name, array in ((binding.bind_input, "x", a.x), (binding.bind_output, "y", a.y)):
            bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return Call(partial(session.run_with_iobinding, binding), lambda _: (a.y,))


LIBRARIES = (Fastbn, NumPy, PyTorch, Jax, OnnxRuntime)
PEERS = tuple(library.name for library in LIBRARIES[1:])


def load(names: tuple[str, ...], threads: int) -> tuple[list[Library], dict[str, str]]:
    """fastbn and the named peers, and by name the reasons why others are skipped."""
    found: list[Library] = []
    skipped: dict[str, str] = {}
    for library in LIBRARIES:
        if library is Fastbn or library.name in names:
            try:
                found.append(library(threads))
            except ImportError as error:
                skipped[library.name] = str(error) or "not installed"
    return found, skipped
