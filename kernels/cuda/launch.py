"""Launching the kernels on CuPy arrays: `forward` and `backward` of the contract in `fastbn.kernels`.

A call runs on its arrays' device, on CuPy's current stream there, and waits for nothing. Nothing is allocated but a
workspace for plans whose blocks meet in global memory, once for each device, stream and thread; in each call the list
of sets that aren't of one height, which is copied to the device; and in backward with `inverse` the table that goes
with y, which CuPy's own kernels make of x's. Weights are added up by the kernels: forward
writes `mass`, backward reads it. Arrays that the kernels can't walk (`walk`: neither runs nor channels lie side by
side) are copied once, and results are copied back.

In a CUDA graph: call each shape once before the capture, since loading a kernel may not be captured. Plans with a
workspace, and tables of y, allocate while they are captured, which CuPy's own `stream.begin_capture()` allows and
cudaStreamCaptureModeGlobal does not: with torch.cuda.graph pass capture_error_mode="relaxed".
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import cupy
import numpy as np
from cupy.cuda import driver, runtime
from cupy.cuda.function import Module

from .compile import machine_code
from .launches import CLUSTER, GRID, HOPPER, PARAMS_SIZE, Device, Plan, Pointers, pack
from .plan import plan
from .walk import PLAIN, VECTOR, More, Unwalkable, View

_log = logging.getLogger(__name__)

_LETTERS = {"f": "f", "d": "d", "e": "e", "h": "E"}  # by dtype.char: bfloat16 comes as int16 bits
_STATIC_SHARED, _MAX_DYNAMIC_SHARED = 1, 8  # CUfunction_attribute
_SPACE, _WORDS = 1 << 20, 4096  # bytes and barriers that a workspace has at least, so that few are made
_MOST_READY = 4096  # calls of different shapes, strides and addresses modulo 16 that are remembered


def element_view(dtype: Any) -> Any:
    """The dtype under which elements of `dtype` come to the kernels, or None if they can't."""
    if dtype.char in "fde":
        return dtype
    return np.dtype(np.int16) if dtype.name == "bfloat16" else None


FEATURES = frozenset({"activation", "residual", "groups", "weights", "save='y'"})  # of `more`


def forward(x: Any, y: Any, table: Any, given: tuple[Any, Any, Any, Any], eps: float, more: Any = None) -> None:
    residual = None if more is None else more.residual
    _run((x, y, None, residual, None), table, given, (None, None), eps, False, given[2] is not None, more)


def backward(dy: Any, x: Any, dx: Any, table: Any, dgamma: Any, dbeta: Any, frozen: bool, more: Any = None) -> None:
    r = dr = None
    if more is not None:  # without an activation the residual doesn't count
        r, dr = more.residual if more.activation else None, more.dresidual
    if frozen and dgamma is None and dbeta is None and not (more is not None and more.activation):
        x = None  # dx = a dy: one array less to read
    elif more is not None and more.inverse:
        table = _inverted(table)
    _run((x, dx, dy, r, dr), table, (None, None, None, None), (dgamma, dbeta), 0.0, True, frozen, more)


def invert(table: Any) -> Any:
    """table <- that by which gamma xhat + beta may stand for x: its mean is beta, its 1 / std 1 / gamma, with sign.

    Without temporaries, as a CUDA graph would write to where they were, which is others' by then.
    """
    hi, lo, var, invstd, gamma, beta = table
    hi[...] = beta
    lo[...] = gamma
    invstd *= gamma
    gamma *= invstd
    var *= invstd
    var *= invstd
    invstd[...] = 1.0
    invstd /= lo
    lo[...] = 0.0
    return table


def _inverted(table: Any) -> Any:
    """Another table, that of y."""
    with cupy.cuda.Device(table.data.device_id):
        made = invert(_copy(table))
        if runtime.streamIsCapturing(cupy.cuda.get_current_stream().ptr):
            _captured.append((made,))
    return made


_choice: contextvars.ContextVar[tuple[tuple[str, Any], ...]] = contextvars.ContextVar("choice", default=())


@contextlib.contextmanager
def planned(**choice: Any) -> Iterator[None]:
    """Within the block, this thread's calls are planned by `plan(..., **choice)`.

    way="SPLIT" (BLOCK, CLUSTER, GRID) forces a path; stable=True gives the same bits on every device.
    """
    token = _choice.set(tuple(sorted(choice.items())))
    try:
        yield
    finally:
        _choice.reset(token)


@functools.cache
def device(number: int) -> Device:
    """What the planner needs to know of a device."""
    facts = runtime.getDeviceProperties(number)
    return Device(
        sms=facts["multiProcessorCount"],
        smem_block=facts["sharedMemPerBlockOptin"],
        smem_sm=facts["sharedMemPerMultiprocessor"],
        cluster=8 if 9 <= facts["major"] < 12 else 1,
        cooperative=bool(facts["cooperativeLaunch"]),
        l2=facts["l2CacheSize"],
        bandwidth=facts.get("memoryClockRate", 0) * facts.get("memoryBusWidth", 0) / 4e3  # kHz, bits, two a cycle
        or HOPPER.bandwidth,
    )


class _Ready(NamedTuple):
    """A plan and its kernels; None: the arrays must be copied first."""

    plan: Plan | None
    starts: tuple[tuple[Any, ...], ...] = ()  # launch function, kernel, grid, threads, shared, the rest
    wide: bool = False  # gamma, beta, mean and var are float64


class _Local(threading.local):
    """A thread's own: the argument of a launch, which is given by address; workspaces; devices with a context."""

    def __init__(self) -> None:
        argument = np.empty(PARAMS_SIZE // 8, np.uint64)
        address = np.array([argument.ctypes.data], np.uint64)
        self.argument = memoryview(argument).cast("B")
        self.addresses, self._kept = address.ctypes.data, address
        self.workspaces: dict[tuple[int, int], tuple[Any, Any]] = {}
        self.contexts: set[int] = set()


_local = _Local()
_ready: dict[Any, _Ready] = {}
# Workspaces, lists and tables of graphs, which may be replayed at any time: nobody tells when one is gone.
_captured: list[Any] = []


def _run(
    arrays: tuple[Any, Any, Any, Any, Any],
    table: Any,
    given: tuple[Any, Any, Any, Any],
    sums: tuple[Any, Any],
    eps: float,
    backward: bool,
    frozen: bool,
    more: Any,
) -> None:
    """arrays: x, y, dy, r and dr; forward without dy, backward with dx as y."""
    number = table.data.device_id
    if number != runtime.getDevice():
        with cupy.cuda.Device(number):
            return _run(arrays, table, given, sums, eps, backward, frozen, more)
    also, lists, parameter, weights = PLAIN, None, 0.0, (None, None)
    if more is not None:
        also, lists = _sets(more)
        if more.inverse and more.activation:
            also = also._replace(inverse=True)
        parameter = more.parameter
        if more.weights is not None and (not frozen or more.masked != "normalize"):  # frozen, they can but mask
            also = also._replace(weights=more.masked)
            w = more.weights if more.weights.data.ptr % VECTOR == 0 else _copy(more.weights)
            weights = w, None if frozen else more.mass
    key = (
        (number, backward, frozen, _choice.get(), also),
        *[None if a is None else (*_facts(a), a.data.ptr % 16) for a in arrays],
        *[None if a is None else _facts(a) for a in (table, *given, *sums, *weights)],
    )
    ready = _ready.get(key)
    if ready is None:
        _check(arrays, table, given, sums, weights, also.sets)
        if len({a.dtype for a in given if a is not None}) == 2:
            gamma, beta, mean, var = (a if a is None else _wide(a) for a in given)
            return _run(arrays, table, (gamma, beta, mean, var), sums, eps, backward, frozen, more)
        if len(_ready) >= _MOST_READY:
            _ready.clear()
        ready = _ready[key] = _prepare(arrays, given, sums, number, backward, frozen, also)
    if ready.plan is None:
        fresh = [None if a is None else cupy.empty(a.shape, a.dtype) for a in (arrays[1], arrays[4])]
        x, dy, r = map(_copy, (arrays[0], arrays[2], arrays[3]))
        _run((x, fresh[0], dy, r, fresh[1]), table, given, sums, eps, backward, frozen, more)
        for a, made in zip((arrays[1], arrays[4]), fresh, strict=True):
            if a is not None:
                cupy.copyto(a, made)
        return None
    call = [*arrays, table, *given, *sums], weights, lists, eps, parameter
    try:
        _launch(ready, number, *call)
    except driver.CUDADriverError as refused:
        if ready.plan.way not in (CLUSTER, GRID):
            raise
        # Not a part of the launches has run. A cluster may be too large for a slice of a GPU, for instance.
        _log.warning("%s: %s is refused, in two launches instead", refused, ready.plan.way)
        _ready[key] = _load(ready.plan.split(), ready.wide, number)
        _launch(_ready[key], number, *call)
    return None


def _sets(more: Any) -> tuple[More, np.ndarray | None]:
    """For the planner; and `starts` and `order` as kernels take them, None for sets of one height that follow on."""
    starts, order = more.starts, more.order
    if starts is None or len(starts) == 2:
        return More(more.activation), None
    heights = np.diff(starts)
    height = int(heights.max())
    if order is None and heights.min() == height:
        return More(more.activation, len(heights), height), None
    rows = 1
    if order is not None:  # in channels-last memory a sample is many rows, which follow one another
        breaks = np.flatnonzero(np.diff(order) != 1) + 1
        rows = int(np.gcd.reduce([*starts, *breaks, order[0], *order[breaks]]))
    lists = starts // rows if order is None else np.concatenate([starts, order[::rows]]) // rows
    return More(more.activation, len(heights), height, True, rows), lists


def _facts(a: Any) -> tuple[Any, ...]:
    return a.data.device_id, a.dtype.char, a.shape, a.strides


def _copy(a: Any) -> Any:
    if a is None:
        return None
    new = cupy.empty(a.shape, a.dtype)
    cupy.copyto(new, a)
    return new


def _wide(a: Any) -> Any:
    return a.astype(np.float64)


def _check(
    arrays: tuple[Any, ...],
    table: Any,
    given: tuple[Any, ...],
    sums: tuple[Any, ...],
    weights: tuple[Any, Any],
    sets: int,
) -> None:
    """Of what the kernels rely on; a wrong size or address would show late on a device, if at all."""
    first = next(a for a in (arrays[2], arrays[0]) if a is not None)
    C, number = first.shape[1], np.float64 if first.dtype.char == "d" else np.float32
    wanted = [(a, first.shape, {first.dtype}, False) for a in arrays]
    wanted += [(table, (6, sets * C), {np.float64}, True)]
    wanted += [(a, (C,), {np.float32, np.float64}, True) for a in given[:2]]
    wanted += [(a, (sets * C,), {np.float32, np.float64}, True) for a in given[2:]]
    wanted += [(a, (sets * C,), {number}, True) for a in sums]
    w, mass = weights
    wanted += [(w, (first.shape[0], 1, first.shape[2]), {number}, True), (mass, (sets,), {np.float64}, True)]
    for a, shape, dtypes, dense in wanted:
        if a is None:
            continue
        if a.shape != shape or a.dtype not in map(np.dtype, dtypes) or (dense and not a.flags.c_contiguous):
            raise ValueError(f"a {a.dtype} array of shape {a.shape}, strides {a.strides}; expected {shape}, {dtypes}")
        if a.data.device_id != table.data.device_id:
            raise ValueError(f"arrays on devices {a.data.device_id} and {table.data.device_id} in one call")
    if first.dtype.char not in _LETTERS:
        raise TypeError(f"{first.dtype} elements; expected float16, float32, float64, or int16 for bfloat16")


def _prepare(
    arrays: tuple[Any, ...],
    given: tuple[Any, ...],
    sums: tuple[Any, ...],
    number: int,
    backward: bool,
    frozen: bool,
    also: More,
) -> _Ready:
    first = next(a for a in (arrays[2], arrays[0]) if a is not None)
    strides = [None if a is None else a.strides for a in arrays]
    bases = tuple(0 if a is None else a.data.ptr % 16 for a in arrays)
    view = View(first.shape, *strides[:3], first.itemsize, bases, *strides[3:])
    letter, choice = _LETTERS[first.dtype.char], dict(_choice.get())
    some = any(a is not None for a in sums)
    try:
        chosen = plan(view, letter, backward, device(number), frozen=frozen, more=also, sums=some, **choice)
    except Unwalkable:
        if all(a is None or a.flags.c_contiguous for a in arrays):
            raise
        return _Ready(None)
    return _load(chosen, any(a is not None and a.dtype == np.float64 for a in given), number)


def _load(chosen: Plan, wide: bool, number: int) -> _Ready:
    starts = []
    for launch in chosen.launches:
        kernel = _kernel(launch.expression, launch.options, number).ptr
        start: tuple[Any, ...] = (driver.launchKernel, kernel, launch.grid, launch.threads, launch.shared, (0,))
        if launch.cooperative:
            # A grid that isn't resident as a whole would wait for itself; CuPy's own launch makes it smaller instead.
            on_sm = driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel, launch.threads, launch.shared)
            if on_sm * device(number).sms < launch.grid:
                return _load(chosen.split(), wide, number)
            start = (driver.launchCooperativeKernel, *start[1:5], ())
        starts.append(start)
    return _Ready(chosen, tuple(starts), wide)


@functools.cache
def _kernel(expression: str, options: tuple[str, ...], number: int) -> Any:
    """A kernel, loaded on the current device, which is `number`."""
    facts = runtime.getDeviceProperties(number)
    code, name = machine_code(expression, options, (facts["major"], facts["minor"]))
    module = Module()
    module.load(code)
    kernel = module.get_function(name)
    room = facts["sharedMemPerBlockOptin"] - driver.funcGetAttribute(_STATIC_SHARED, kernel.ptr)
    driver.funcSetAttribute(kernel.ptr, _MAX_DYNAMIC_SHARED, room)
    return kernel


def _launch(
    ready: _Ready,
    number: int,
    arrays: list[Any],
    weights: tuple[Any, Any],
    lists: np.ndarray | None,
    eps: float,
    parameter: float,
) -> None:
    local, stream = _local, cupy.cuda.get_current_stream().ptr
    if number not in local.contexts:  # the driver's functions don't make a thread's context, as the runtime's do
        runtime.free(0)
        local.contexts.add(number)
    x, y, dy, *rest = [0 if a is None else a.data.ptr for a in arrays]  # as in `Pointers` from r on
    chosen = ready.plan
    assert chosen is not None
    workspace, barriers = _workspace(chosen, number, stream) if chosen.workspace else (0, 0)
    w, mass = (0 if a is None else a.data.ptr for a in weights)
    pointers = Pointers(x, dy, y, *rest, workspace, barriers, w=w, mass=mass)
    if lists is not None:  # the memory goes back to the stream's own when all that reads it is on the stream
        uploaded = _uploaded(lists, stream)
        order = uploaded.data.ptr + 8 * (chosen.walk.more.sets + 1)
        pointers = pointers._replace(starts=uploaded.data.ptr, order=order * (lists.size > chosen.walk.more.sets + 1))
    local.argument[:] = pack(chosen, pointers, eps, ready.wide, parameter)
    for start, kernel, grid, threads, shared, rest in ready.starts:
        start(kernel, grid, 1, 1, threads, 1, 1, shared, stream, local.addresses, *rest)


def _uploaded(values: np.ndarray, stream: int) -> Any:
    """A copy on the device, made on the stream. A graph copies each time it runs, and keeps what it copies from."""
    if not runtime.streamIsCapturing(stream):
        return cupy.array(values)  # by pinned memory, which CuPy keeps until the copy is done; it waits for nothing
    pinned, made = cupy.cuda.alloc_pinned_memory(values.nbytes), cupy.empty(values.shape, values.dtype)
    np.frombuffer(pinned, values.dtype, values.size)[...] = values
    runtime.memcpyAsync(made.data.ptr, pinned.ptr, values.nbytes, runtime.memcpyHostToDevice, stream)
    _captured.append((made, pinned))
    return made


def _workspace(chosen: Plan, number: int, stream: int) -> tuple[int, int]:
    """Addresses of partial sums and of barriers: this thread's on this stream, or a graph's own."""
    if runtime.streamIsCapturing(stream):
        made = _made(chosen.workspace, chosen.barriers, stream)
        _captured.append(made)
    else:
        made = _local.workspaces.get((number, stream), (None, None))
        if made[0] is None or made[0].nbytes < chosen.workspace or made[1].nbytes < 4 * chosen.barriers:
            made = _made(max(chosen.workspace, _SPACE), max(chosen.barriers, _WORDS), stream)
            _local.workspaces[number, stream] = made
    return made[0].data.ptr, made[1].data.ptr


def _made(space: int, words: int, stream: int) -> tuple[Any, Any]:
    partials, barriers = cupy.empty(space, np.uint8), cupy.empty(max(1, words), np.uint32)
    runtime.memsetAsync(barriers.data.ptr, 0, barriers.nbytes, stream)
    return partials, barriers
