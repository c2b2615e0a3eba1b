"""Runs `bn.cu` in the emulator: builds it with g++, lays arrays out between canaries, launches plans, judges."""

from __future__ import annotations

import ctypes
import getpass
import hashlib
import os
import shutil
import subprocess
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fastbn.kernels.cuda import launches, plan, walk

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "cuda"


# All that is planned, by whatever module: none of them needs CuPy.
planner: Any = types.SimpleNamespace(**{**vars(launches), **vars(walk), **vars(plan)})
TYPES = {"f": np.float32, "d": np.float64, "e": np.float16, "E": ml_dtypes.bfloat16}
CODES = {"f": 0, "e": 1, "E": 2, "d": 3}  # of instances.cpp
LAYOUTS = [planner.RUNS, planner.WINDOWS, planner.COLUMNS]
WAYS = ["BLOCK", "CLUSTER", "GRID", "STATS", "APPLY"]
ALL = """
WIDEST(0, float, 4) NARROWER(0, float, 2) NARROWER(0, float, 1)
WIDEST(1, f16, 8) NARROWER(1, f16, 4) NARROWER(1, f16, 1)
WIDEST(2, bf16, 8) NARROWER(2, bf16, 4) WIDEST(3, double, 2) NARROWER(3, double, 1)
"""
WALL = 0xA5  # fills what nobody may write


def library(instances: str = ALL, source: str | None = None, options: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The emulated kernels, built once for each source: 15 s of one core for all of them. options: bn.cu's macros."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulator needs g++, and there is none")
    text = planner.source() if source is None else source
    parts = [text, instances, *options, (HERE / "emulator.h").read_text(), (HERE / "instances.cpp").read_text()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    folder = Path(tempfile.gettempdir()) / f"fastbn-emulator-{getpass.getuser()}"
    folder.mkdir(exist_ok=True, mode=0o700)
    built = folder / f"{key}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            (Path(work) / "bn.cu").write_text(text)
            flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w"]  # -w: g++ doesn't know `#pragma unroll`
            flags += ["-U_FORTIFY_SOURCE", "-ffp-contract=off", "-DFASTBN_EMULATOR"]  # it forbids jumps between stacks
            defines = [*options, f'-DFASTBN_SOURCE="{work}/bn.cu"', f"-DFASTBN_INSTANCES={' '.join(instances.split())}"]
            output = f"{work}/emulated.so"
            command = [compiler, *flags, f"-I{HERE}", *defines, str(HERE / "instances.cpp"), "-o", output]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode and "_Float16" in done.stderr:
                pytest.skip("the emulator needs a g++ that knows _Float16 (12 or newer)")
            assert done.returncode == 0, done.stderr[:4000]
            os.replace(output, built)
    loaded = ctypes.CDLL(str(built))
    loaded.fastbn_launch.restype = ctypes.c_char_p
    assert loaded.fastbn_params_size() == planner.PARAMS_SIZE
    return loaded


def alone(size: int) -> np.ndarray:
    """`size` canaries, with no other array within 64 KB: a wrong address is then in none, wherever memory lies."""
    moat = 1 << 16
    raw = np.empty(size + 2 * moat, np.uint8)[moat : moat + size]
    raw[...] = WALL
    return raw


class Array:
    """(O, C, I) elements with any layout inside a buffer of canaries; `order` names the axes from the slowest.

    gaps: further elements (before, after) on each axis of `order`; offset: elements between a 16-byte border and the
    first one.
    """

    def __init__(self, values, letter, order="OCI", gaps=((0, 0), (0, 0), (0, 0)), offset=0):
        dtype = np.dtype(TYPES[letter])
        axes = ["OCI".index(a) for a in order]
        shape = [values.shape[a] for a in axes]
        wide = [n + sum(gap) for n, gap in zip(shape, gaps, strict=True)]
        need = int(np.prod(wide)) * dtype.itemsize
        self.raw = alone(need + 96 + offset * dtype.itemsize)
        start = (-self.raw.ctypes.data) % 16 + 32 + offset * dtype.itemsize
        whole = self.raw[start : start + need].view(dtype).reshape(wide)
        window = whole[tuple(slice(gap[0], gap[0] + n) for n, gap in zip(shape, gaps, strict=True))]
        self.view = window.transpose(np.argsort(axes))
        with np.errstate(all="ignore"):
            self.view[...] = values
        inside = np.zeros(self.raw.size, bool)
        marks = inside[start : start + need].reshape(*wide, dtype.itemsize)
        marks[tuple(slice(gap[0], gap[0] + n) for n, gap in zip(shape, gaps, strict=True))] = True
        self.outside = ~inside

    @property
    def span(self) -> tuple[int, int]:
        """The addresses that the elements span."""
        last = sum((n - 1) * s for n, s in zip(self.view.shape, self.view.strides, strict=True))
        return self.view.ctypes.data, self.view.ctypes.data + last + self.view.itemsize

    @property
    def values(self) -> np.ndarray:
        return self.view.astype(np.float64)

    def untouched_outside(self) -> bool:
        return bool((self.raw[self.outside] == WALL).all())


def view_of(x: Array | None, y: Array | None, dy: Array | None, r: Array | None = None, dr: Array | None = None) -> Any:
    some = next(a for a in (x, dy) if a is not None).view
    strides = [None if a is None else a.view.strides for a in (x, y, dy, r, dr)]
    bases = tuple(0 if a is None else a.view.ctypes.data % 16 for a in (x, y, dy, r, dr))
    return planner.View(some.shape, *strides[:3], some.dtype.itemsize, bases, *strides[3:])


def walled(count: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """`count` numbers of NaN, 16-byte aligned, and the buffer of canaries around them."""
    size = count * np.dtype(dtype).itemsize
    raw = alone(size + 96)
    start = (-raw.ctypes.data) % 16 + 32
    inner = raw[start : start + size].view(dtype)
    inner[...] = np.nan
    return inner, raw


@dataclass
class Result:
    error: str
    y: np.ndarray | None
    table: np.ndarray
    dgamma: np.ndarray | None
    dbeta: np.ndarray | None
    dr: np.ndarray | None = None
    mass: np.ndarray | None = None

    @property
    def bits(self) -> bytes:
        arrays = (self.y, self.dr, self.table, self.dgamma, self.dbeta, self.mass)
        return b"".join(a.tobytes() for a in arrays if a is not None)


def execute(
    lib: ctypes.CDLL,
    plan: Any,
    x: Array | None,
    dy: Array | None,
    y: Array | None,
    table: np.ndarray | None = None,
    given: tuple[np.ndarray | None, ...] = (None,) * 4,
    eps: float = 1e-5,
    grads: tuple[bool, bool] = (True, True),
    policy: int = 0,
    resident: int | None = None,
    barriers: np.ndarray | None = None,
    rounds: int = 1,
    r: Array | None = None,
    dr: Array | None = None,
    parameter: float = 0.0,
    starts: np.ndarray | None = None,
    order: np.ndarray | None = None,
    w: np.ndarray | None = None,
    mass: np.ndarray | None = None,
) -> Result:
    """All launches of a plan, by the bytes that a launcher would pass. given: gamma, beta, mean, var.

    w: weights, without a gap; mass: their sums by set, for backward. Forward finds them.
    """
    C = plan.walk.C * plan.walk.more.sets
    number = np.float64 if plan.letter == "d" else np.float32
    outputs = {}
    flat, outputs["table"] = walled(6 * C, np.float64)
    if table is not None:
        flat[...] = table.reshape(-1)
    before = flat.copy()
    dgamma, outputs["dgamma"] = walled(C, number)
    dbeta, outputs["dbeta"] = walled(C, number)
    workspace, outputs["workspace"] = walled(plan.workspace // 8, np.float64)
    sums, outputs["mass"] = walled(plan.walk.more.sets, np.float64)
    if mass is not None:
        sums[...] = mass
    found_mass = w is not None and not plan.frozen
    weights, outputs["w"] = walled(0 if w is None else w.size, np.float64 if plan.letter == "d" else np.float32)
    weights[...] = 0 if w is None else w.reshape(-1)
    words = np.zeros(max(1, plan.barriers), np.uint32) if barriers is None else barriers
    inner = {"table": flat, "dgamma": dgamma, "dbeta": dbeta, "workspace": workspace, "mass": sums, "w": weights}

    def address(a):
        return 0 if a is None else a.ctypes.data

    pointers = planner.Pointers(
        x=0 if x is None else x.view.ctypes.data,
        dy=0 if dy is None else dy.view.ctypes.data,
        y=0 if y is None else y.view.ctypes.data,
        r=0 if r is None else r.view.ctypes.data,
        dr=0 if dr is None else dr.view.ctypes.data,
        table=flat.ctypes.data,
        gamma=address(given[0]),
        beta=address(given[1]),
        mean=address(given[2]),
        var=address(given[3]),
        dgamma=dgamma.ctypes.data if plan.backward and grads[0] else 0,
        dbeta=dbeta.ctypes.data if plan.backward and grads[1] else 0,
        workspace=workspace.ctypes.data if plan.workspace else 0,
        barriers=words.ctypes.data,
        starts=address(starts),
        order=address(order),
        w=0 if w is None else weights.ctypes.data,
        mass=sums.ctypes.data if found_mass else 0,
    )
    wide = any(a is not None and a.dtype == np.float64 for a in given)
    bytes_ = planner.pack(plan, pointers, eps, wide, parameter)
    readable = []
    for a in (x, dy, r):
        if a is not None:  # windows are read whole, within their 16 bytes
            low, high = a.span
            edge = 16 if plan.walk.layout == planner.WINDOWS else 1
            low, high = low // edge * edge, -(-high // edge) * edge
            readable += [low, high - low]
    for a in (workspace, weights, *given[:2], flat if plan.backward else None):
        if a is not None and a.size:
            readable += [a.ctypes.data, a.nbytes]
    writable = [n for a in (y, dr) if a is not None for n in (a.span[0], a.span[1] - a.span[0])]

    def pairs(numbers):
        return (ctypes.c_uint64 * max(1, len(numbers)))(*numbers), len(numbers) // 2

    error = ""
    for launch in plan.launches * rounds:
        part = launch.expression.split("::")[-1].strip(">")
        instance = (ctypes.c_int * 5)(
            CODES[plan.letter], plan.walk.V, plan.backward, LAYOUTS.index(plan.walk.layout), WAYS.index(part)
        )
        at_once = 0 if launch.cooperative else launch.cluster * (resident or 1)
        found = lib.fastbn_launch(
            instance, bytes_, launch.grid, launch.threads, launch.shared, launch.cluster, at_once, policy,
            *pairs(readable), *pairs(writable),
        )  # fmt: skip
        error = error or found.decode()
    for name, raw in outputs.items():
        a = inner[name]
        start = a.ctypes.data - raw.ctypes.data
        walls = np.concatenate([raw[:start], raw[start + a.nbytes :]])
        if not error and not (walls == WALL).all():
            error = f"wrote outside {name}"
    if not error and plan.backward and before.tobytes() != flat.tobytes():
        error = "backward wrote the table"
    for a in (x, dy, y, r, dr):
        if not error and a is not None and not a.untouched_outside():
            error = "wrote between or outside the elements"
    return Result(
        error=error,
        y=None if y is None else y.view.copy(),
        dr=None if dr is None else dr.view.copy(),
        table=flat.reshape(6, C),
        dgamma=dgamma if plan.backward and grads[0] else None,
        dbeta=dbeta if plan.backward and grads[1] else None,
        mass=sums if found_mass and not plan.backward else None,
    )


# ------------------------------------------------------------------------------------------------------- what is right


def average(x: np.ndarray) -> np.ndarray:
    return x.mean((0, 2), keepdims=True)


@dataclass
class Truth:
    """Batch normalization in extended precision: the formulas of `kernels/__init__.py`, the mean as a pair."""

    x: np.ndarray
    eps: float
    gamma: np.ndarray
    beta: np.ndarray
    given: tuple[np.ndarray, np.ndarray] | None = None

    def __post_init__(self):
        x = self.x.astype(np.longdouble)
        self.gamma, self.beta = (a.astype(np.longdouble)[None, :, None] for a in (self.gamma, self.beta))
        if self.given is None:
            self.hi = average(x).astype(np.float64).astype(np.longdouble)
            self.lo = average(x - self.hi)
            self.var = average((x - self.hi - self.lo) ** 2)
        else:
            self.hi, self.var = (np.asarray(a).astype(np.longdouble)[None, :, None] for a in self.given)
            self.lo = np.zeros_like(self.hi)
        self.e = x - self.hi - self.lo
        self.invstd = 1 / np.sqrt(self.var + np.longdouble(self.eps))
        self.a = self.gamma * self.invstd

    def y(self):
        return self.a * self.e + self.beta

    def saved(self, letter):
        """The table that backward gets, hi a number of the type."""
        number = np.float64 if letter == "d" or self.given is not None else np.float32
        hi = (self.hi + self.lo).astype(number).astype(np.longdouble)
        rows = [hi, (self.hi - hi) + self.lo, self.var, self.invstd, self.gamma, self.beta]
        return np.stack(rows)[:, 0, :, 0].astype(np.float64)

    def mean_error(self, table):
        """hi + lo of a table, less the mean."""
        return (table[0] - self.hi[0, :, 0]) + (table[1] - self.lo[0, :, 0])

    def gradients(self, dy):
        """dx, dgamma, dbeta; and the scale of what is added up in each."""
        dy = dy.astype(np.longdouble)
        n = dy.shape[0] * dy.shape[2]
        g = dy - average(dy)
        g = g - average(g)
        dgamma, dbeta = self.invstd * average(dy * self.e) * n, average(dy) * n
        slope = average(g * self.e) * self.invstd**2
        dx = self.a * (dy if self.given is not None else g - self.e * slope)
        scale = abs(self.a) * (abs(dy if self.given is not None else g) + abs(self.e * slope))
        root = np.sqrt(average(dy**2) * average(self.e**2)) * self.invstd * n
        parts = (dx, dgamma[0, :, 0], dbeta[0, :, 0])
        return parts, (scale, root[0, :, 0], average(abs(dy))[0, :, 0] * n)


def epsilon(letter: str) -> float:
    return float(ml_dtypes.finfo(TYPES[letter]).eps)


def number_epsilon(letter: str) -> float:
    return float(np.finfo(np.float64 if letter == "d" else np.float32).eps)


def error_in_eps(got: np.ndarray, want: np.ndarray, scale: np.ndarray, eps: float) -> float:
    """The largest |got - want| in eps of the scale; infinite where got isn't finite."""
    got = got.astype(np.longdouble)
    if not np.isfinite(got).all():
        return float("inf")
    off = abs(got - want)
    return float(np.divide(off, eps * scale, out=np.where(off == 0, off, np.inf), where=scale > 0).max(initial=0))
