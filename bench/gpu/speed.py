"""`speed`: ours, the copy of the same bytes and PyTorch, in turns, by graph replay; and what a call costs the host."""

from __future__ import annotations

import functools
import importlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .run import EPS, Run, plans, words


class Timed(NamedTuple):
    """A tensor (N, C) or (N, C, H, W), whatever its memory, that is timed."""

    dims: tuple[int, ...]
    layout: str  # "first", "last"
    dtype: str

    @property
    def name(self) -> str:
        return f"{'x'.join(map(str, self.dims))} {self.layout} {self.dtype}"

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * np.dtype(self.dtype).itemsize

    @property
    def memory(self) -> tuple[int, ...]:
        """The shape in the order of memory."""
        if self.layout == "first":
            return self.dims
        return (self.dims[0], *self.dims[2:], self.dims[1])

    @property
    def view(self) -> tuple[int, int, int]:
        """(O, C, I), of the array in the order of memory."""
        channels = self.dims[1]
        if self.layout == "first":
            return self.dims[0], channels, math.prod(self.dims[2:])
        return math.prod(self.dims) // channels, channels, 1


def _timed() -> list[Timed]:
    """The most telling first."""
    layers = [(64, 56), (512, 28), (256, 56), (64, 112), (1024, 14), (2048, 7)]
    first = [Timed((256, c, s, s), layout, "float32") for c, s in layers[:4] for layout in ("first", "last")]
    first += [Timed((128, 1024), "last", "float32"), Timed((65536, 256), "last", "float32")]
    first += [Timed((256, c, s, s), layout, "float16") for c, s in layers[:3] for layout in ("first", "last")]
    first += [Timed((32, c, s, s), layout, "float32") for c, s in layers for layout in ("first", "last")]
    first += [Timed((4096, 1024), "last", "float32"), Timed((1000000, 64), "last", "float32")]
    first += [Timed((256, c, s, s), "first", "float32") for c, s in [(128, 27), (64, 55), *layers[4:]]]
    return first + [Timed((32, c, s, s), layout, "float16") for c, s in layers for layout in ("first", "last")]


TIMED = _timed()
COMPILED = ("256x512x28x28 first float32", "32x64x56x56 last float32", "65536x256 last float32")


def rotated(nbytes: int) -> int:
    """How many sets of arrays keep the L2 cache (50 MB) from serving a read: 400 MB in all."""
    return max(1, min(16, int(400e6 / nbytes) + 1))


class Turn:
    """Something to time: replays of one graph, microseconds a call."""

    def __init__(self, once: Callable[[], float]) -> None:
        self.once = once
        self.times: list[float] = []

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def cupy_turn(cupy: Any, call: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> Turn:
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        call(*sets[0])
        stream.synchronize()
        stream.begin_capture()
        for arrays in sets:
            call(*arrays)
        captured = stream.end_capture()
        captured.launch(stream)
        stream.synchronize()
    first, last = cupy.cuda.Event(), cupy.cuda.Event()

    def once() -> float:
        first.record(stream)
        captured.launch(stream)
        last.record(stream)
        last.synchronize()
        return float(cupy.cuda.get_elapsed_time(first, last)) * 1e3 / len(sets)

    return Turn(once)


def torch_turn(torch: Any, call: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> Turn:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(*sets[0])
        call(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        kept = [call(*arrays) for arrays in sets]
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> float:
        first.record()
        captured.replay()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) * 1e3 / len(kept)

    return Turn(once)


def speed(run: Run) -> None:
    cases = [(timed.name, functools.partial(time_one, run, timed)) for timed in TIMED]
    beyond = [(f"{timed.name} relu of a sum", functools.partial(time_block, run, timed)) for timed in TIMED[:2]]
    run.each("speed", [("host", functools.partial(host, run.device)), *cases[:8], *beyond, *cases[8:]])


def data(cupy: Any, timed: Timed, seed: int) -> Any:
    """Random numbers by copies of one block, as fast as memory; only `cupy.copyto` is used."""
    block = np.random.default_rng(seed).normal(1, 2, 1 << 20).astype(timed.dtype)
    array = cupy.empty(math.prod(timed.dims), timed.dtype)
    source = cupy.asarray(block)
    for first in range(0, array.size, block.size):
        part = array[first : first + block.size]
        cupy.copyto(part, source[: part.size])
    return array.reshape(timed.view)


def time_one(run: Run, timed: Timed) -> dict[str, Any]:
    """Every contender on one tensor, in turns."""
    cupy, launch = run.device.cupy, run.device.launch
    xs = [data(cupy, timed, seed) for seed in range(rotated(3 * timed.bytes))]
    dys = [data(cupy, timed, 100 + seed) for seed in range(len(xs))]
    outs = [cupy.empty(timed.view, timed.dtype) for _ in xs]
    C = timed.view[1]
    gamma, beta = cupy.asarray(np.ones(C, np.float32)), cupy.asarray(np.zeros(C, np.float32))
    table, sums = cupy.empty((6, C)), [cupy.empty(C, np.float32) for _ in range(2)]
    launch.forward(xs[0], outs[0], table, (gamma, beta, None, None), EPS)

    def ours_forward(x: Any, out: Any) -> None:
        launch.forward(x, out, table, (gamma, beta, None, None), EPS)

    def ours_backward(x: Any, dy: Any, out: Any) -> None:
        launch.backward(dy, x, out, table, sums[0], sums[1], False)

    notes: dict[str, Any] = {}
    turns = {
        "ours_forward": cupy_turn(cupy, ours_forward, list(zip(xs, outs, strict=True))),
        "ours_backward": cupy_turn(cupy, ours_backward, list(zip(xs, dys, outs, strict=True))),
        "copy": cupy_turn(cupy, lambda x, out: cupy.copyto(out, x), list(zip(xs, outs, strict=True))),
    }
    try:
        turns |= _torch_turns(timed, xs, dys, gamma, beta, notes, run.left > 60)
    except Exception as cause:
        notes["torch"] = words(cause)
    end = min(time.monotonic() + 1.5, run.end)
    rounds = 0
    while rounds < 5 or (time.monotonic() < end and rounds < 25):
        for turn in turns.values():
            turn.times.append(turn.once())
        rounds += 1
    found: dict[str, Any] = {name: turn.median for name, turn in turns.items()}
    found |= {"mbytes": timed.bytes / 1e6, "layout": timed.layout, "rounds": rounds, "notes": notes}
    planner: Any = importlib.import_module("fastbn.kernels.cuda.plan")
    device = launch.device(run.device.number)
    for name, plan in zip(("forward", "backward"), plans(run.device, xs[0], dys[0]), strict=True):
        modelled, moved, floor = planner.model(plan, device)
        found[f"plan_{name}"] = f"{plan.walk.layout} V{plan.walk.V} {plan.way} K{plan.K}"
        found |= {f"model_{name}": modelled, f"model_{name}_bytes": moved, f"floor_{name}_bytes": floor}
    return found


def time_block(run: Run, timed: Timed) -> dict[str, Any]:
    """relu(batch norm + residual) in one pass, beside a copy of x: three arrays forward, five backward."""
    extras: Any = importlib.import_module("fastbn.extras")
    cupy, launch = run.device.cupy, run.device.launch
    x, dy, r = (data(cupy, timed, seed) for seed in range(3))
    y, dx, dr = (cupy.empty(timed.view, timed.dtype) for _ in range(3))
    C = timed.view[1]
    table, none = cupy.empty((6, C)), (None, None, None, None)
    sums = [cupy.empty(C, np.float32) for _ in range(2)]
    forward, backward = extras.Extras("relu", 0.0, r), extras.Extras("relu", 0.0, r, dr)
    launch.forward(x, y, table, none, EPS, forward)
    turns = {
        "block_forward": cupy_turn(cupy, lambda x: launch.forward(x, y, table, none, EPS, forward), [(x,)]),
        "block_backward": cupy_turn(cupy, lambda x: launch.backward(dy, x, dx, table, *sums, False, backward), [(x,)]),
        "copy_of_x": cupy_turn(cupy, lambda x: cupy.copyto(y, x), [(x,)]),
    }
    for _ in range(10):
        for turn in turns.values():
            turn.times.append(turn.once())
    return {name: turn.median for name, turn in turns.items()}


def _torch_turns(
    timed: Timed, xs: list[Any], dys: list[Any], gamma: Any, beta: Any, notes: dict[str, Any], compiling: bool
) -> dict[str, Turn]:
    torch: Any = importlib.import_module("torch")
    aten = torch.ops.aten

    def tensor(array: Any) -> Any:
        shaped = torch.from_dlpack(array.reshape(timed.memory))
        return shaped if timed.layout == "first" or shaped.ndim == 2 else shaped.permute(0, 3, 1, 2)

    tensors, grads = [tensor(x) for x in xs], [tensor(dy) for dy in dys]
    w, b = torch.from_dlpack(gamma), torch.from_dlpack(beta)
    mean, var = torch.zeros_like(w), torch.ones_like(w)
    turns: dict[str, Turn] = {}

    def native(x: Any) -> Any:
        return aten.native_batch_norm(x, w, b, mean, var, True, 0.1, EPS)

    def native_backward(x: Any, dy: Any, saved: Any) -> Any:
        return aten.native_batch_norm_backward(dy, x, w, mean, var, *saved[1:3], True, EPS, [True, True, True])

    def cudnn(x: Any) -> Any:
        return aten.cudnn_batch_norm(x, w, b, mean, var, True, 0.1, EPS)

    def cudnn_backward(x: Any, dy: Any, saved: Any) -> Any:
        return aten.cudnn_batch_norm_backward(x, dy, w, mean, var, saved[1], saved[2], EPS, saved[3])

    contenders = [("native", native, native_backward)]
    if len(timed.dims) == 4:
        contenders.append(("cudnn", cudnn, cudnn_backward))
    for name, forward, backward in contenders:
        try:
            turns[f"{name}_forward"] = torch_turn(torch, forward, [(x,) for x in tensors])
            saved = forward(tensors[0])
            arguments = [(x, dy, saved) for x, dy in zip(tensors, grads, strict=True)]
            turns[f"{name}_backward"] = torch_turn(torch, backward, arguments)
        except Exception as cause:
            notes[name] = words(cause)
    if compiling and timed.name in COMPILED:
        try:
            leaves = [x.detach().requires_grad_(True) for x in tensors]
            w, b = w.clone().requires_grad_(True), b.clone().requires_grad_(True)
            torch._dynamo.reset()
            compiled = torch.compile(lambda x: torch.nn.functional.batch_norm(x, mean, var, w, b, True, 0.1, EPS))
            turns["compile_forward"] = torch_turn(torch, lambda x: compiled(x).detach(), [(x,) for x in leaves])
            both = list(zip(leaves, grads, strict=True))
            turns["compile_both"] = torch_turn(
                torch, lambda x, dy: torch.autograd.grad(compiled(x), (x, w, b), dy), both
            )
        except Exception as cause:
            notes["compile"] = words(cause)
    return turns


def host(device: Any) -> dict[str, Any]:
    """Microseconds of a call for the host, on arrays too small to keep the device busy."""
    fastbn: Any = importlib.import_module("fastbn")
    cupy, launch = device.cupy, device.launch
    x = cupy.asarray(np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32))
    y, gamma, beta = (cupy.empty_like(x), cupy.asarray(np.ones(64, np.float32)), cupy.asarray(np.zeros(64, np.float32)))
    table, view = cupy.empty((6, 64)), (32, 64, 1)
    x3, y3, given = x.reshape(view), y.reshape(view), (gamma, beta, None, None)

    def per_call(call: Callable[[], Any], count: int = 2000) -> float:
        for _ in range(50):
            call()
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        passed = time.perf_counter() - start
        cupy.cuda.Device().synchronize()
        return passed / count * 1e6

    calls: dict[str, Callable[[], Any]] = {
        "launch": lambda: launch.forward(x3, y3, table, given, EPS),
        "forward, out=": lambda: fastbn.forward(x, gamma, beta, out=y),
        "forward": lambda: fastbn.forward(x, gamma, beta),
        "cupy.empty_like": lambda: cupy.empty_like(x),
    }
    try:
        torch: Any = importlib.import_module("torch")
        t, w, b = (torch.from_dlpack(a) for a in (x, gamma, beta))
        calls["torch batch_norm"] = lambda: torch.nn.functional.batch_norm(t, None, None, w, b, True)
    except Exception:
        pass
    found: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            found[name] = per_call(call)
        except Exception as cause:
            found[name] = words(cause)
    return found
