"""bn.cu for real targets, without a GPU: NVRTC compiles it, PTX has whole vectors, ptxas as many registers as planned.

Needs the wheels cuda-bindings, nvidia-cuda-nvrtc and nvidia-cuda-nvcc. sm_70 is tried where NVRTC still knows it (12).
"""

import itertools
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

import pytest
from emulator import planner

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs the wheel cuda-bindings")

TYPES = {"f": ("float", 4), "e": ("fastbn::f16", 8), "E": ("fastbn::bf16", 8), "d": ("double", 2)}
LAYOUTS = ("RUNS", "WINDOWS", "COLUMNS")
WAYS = ("BLOCK", "CLUSTER", "GRID", "STATS", "APPLY")


class Build(NamedTuple):
    capability: int
    letter: str
    layouts: tuple[str, ...] = LAYOUTS
    ways: tuple[str, ...] = WAYS
    directions: tuple[str, ...] = ("false", "true")
    options: tuple[str, ...] = ()

    def names(self):
        kind, widest = TYPES[self.letter]
        ways = [way for way in self.ways if way != "CLUSTER" or self.capability >= 90]
        for backward, layout, way in itertools.product(self.directions, self.layouts, ways):
            V = min(widest, planner.WIDEST if layout == "COLUMNS" else widest)
            yield f"fastbn::bn<{kind}, {V}, {backward}, fastbn::{layout}, fastbn::{way}>"


# All types, layouts and ways on Hopper; a part of them elsewhere, for 0.3 s an instance.
BUILDS = [
    Build(90, "f"),
    Build(90, "e"),
    Build(90, "d"),
    Build(80, "E", ("RUNS", "COLUMNS")),
    Build(75, "f", ("RUNS", "COLUMNS"), ("BLOCK", "STATS", "APPLY")),
    Build(100, "f", ("WINDOWS", "COLUMNS"), ("CLUSTER", "GRID")),
    Build(70, "f", ("RUNS",), ("BLOCK", "GRID")),
    # Beyond batch norm: forward and backward are other code.
    Build(90, "f", LAYOUTS, WAYS, ("false",), planner.More("relu").options("r")),
    Build(90, "f", LAYOUTS, WAYS, ("true",), planner.More("relu").options(("r", "dr"))),
    Build(90, "e", ("RUNS", "COLUMNS"), ("BLOCK", "STATS", "APPLY"), ("true",), planner.More("relu").options("r")),
    Build(80, "f", ("RUNS", "COLUMNS"), ("BLOCK", "STATS", "APPLY"), ("true",), planner.More("gelu").options(())),
    Build(90, "f", LAYOUTS, ("BLOCK", "CLUSTER", "STATS", "APPLY"), options=planner.More(sets=2).options(())),
    Build(90, "f", options=planner.More(weights="normalize").options(())),
    Build(90, "e", ("RUNS", "COLUMNS"), ("BLOCK", "GRID", "STATS"), options=planner.More(weights="zero").options(())),
    Build(80, "d", ("RUNS", "WINDOWS"), ("BLOCK", "STATS"), options=planner.More(weights="keep").options(())),
    Build(90, "f", LAYOUTS, WAYS, ("true",), planner.More("relu", weights="keep").options(("r", "dr"))),
    Build(90, "e", ("COLUMNS",), ("BLOCK", "STATS"), ("true",), planner.More("relu", weights="keep").options("r")),
]

# Bytes of a thread's registers that are put away, at most: about the first stretch, and where four channels' sums, an
# activation or weights need more than the 64 registers. 1024 threads a multiprocessor with that are faster than 512
# without (an H100's sums: 80 us for 113).
SPILLS = {"RUNS": 0, "WINDOWS": 24, "COLUMNS": 80}
SPILLS_BEYOND = {"RUNS": 16, "WINDOWS": 40, "COLUMNS": 300}  # with options
SPILLS_OLD = 80  # before sm_80, which has no copies past the registers
SPILLS_APPLY = 80  # a map alone, whatever it is of


class Compiled(NamedTuple):
    ptx: dict[str, str]  # by name expression
    spills: dict[str, int]
    registers: dict[str, int]


def checked(result):
    error, *values = result
    assert int(error) == 0, nvrtc.nvrtcGetErrorString(error)[1]
    return values[0] if values else None


def ptxas():
    """From the wheel nvidia-cuda-nvcc, wherever this version puts it."""
    spec = PathFinder.find_spec("nvidia")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = [path for folder in folders for path in folder.rglob("bin/ptxas")]
    return str(found[0]) if found else None


def compile_(build, folder):
    names = list(build.names())
    program = checked(nvrtc.nvrtcCreateProgram(planner.source().encode(), b"bn.cu", 0, [], []))
    for name in names:
        checked(nvrtc.nvrtcAddNameExpression(program, name.encode()))
    options = [*planner.COMPILE_OPTIONS, f"-arch=compute_{build.capability}"]
    options += build.options
    options += ["-DFASTBN_CLUSTER=4"] if any("CLUSTER" in name for name in names) else []
    error = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
    log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
    nvrtc.nvrtcGetProgramLog(program, log)
    assert int(error) == 0, log.decode()
    text = b" " * checked(nvrtc.nvrtcGetPTXSize(program))
    checked(nvrtc.nvrtcGetPTX(program, text))
    lowered = {checked(nvrtc.nvrtcGetLoweredName(program, name.encode())).decode(): name for name in names}
    path = folder / f"{build.capability}{build.letter}{BUILDS.index(build)}.ptx"
    path.write_bytes(text.rstrip(b"\0"))
    command = [ptxas(), f"-arch=sm_{build.capability}", "-v", str(path), "-o", str(path.with_suffix(".cubin"))]
    report = subprocess.run(command, capture_output=True, text=True)
    assert report.returncode == 0, report.stderr

    parts = re.split(r"\.entry (\w+)\(", path.read_text())[1:]
    ptx = {lowered[name]: body for name, body in zip(parts[::2], parts[1::2], strict=True)}
    spills, registers = {}, {}
    for part in report.stderr.split("Compiling entry function '")[1:]:
        name = lowered[part.split("'")[0]]
        spills[name] = int(re.search(r"(\d+) bytes spill stores", part)[1])
        registers[name] = int(re.search(r"Used (\d+) registers", part)[1])
    assert set(ptx) == set(spills) == set(registers) == set(names)
    return Compiled(ptx, spills, registers)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """All builds, two at a time; a build that NVRTC has no target for is None."""
    try:
        known = nvrtc.nvrtcGetSupportedArchs()[-1]
    except Exception as cause:
        pytest.skip(f"needs the wheel nvidia-cuda-nvrtc: {cause}")
    if ptxas() is None:
        pytest.skip("needs the wheel nvidia-cuda-nvcc, for ptxas")
    folder = tmp_path_factory.mktemp("ptx")
    builds = [build for build in BUILDS if build.capability in known]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(builds, pool.map(lambda build: compile_(build, folder), builds), strict=True))


def result(compiled, build):
    if build not in compiled:
        pytest.skip(f"this NVRTC doesn't compile for sm_{build.capability}")
    return compiled[build]


each_build = pytest.mark.parametrize("build", BUILDS, ids=lambda b: "-".join((f"sm_{b.capability}", *b[1:2], *b[5])))


@each_build
def test_registers_are_as_many_as_planned(compiled, build):
    """1024 threads a multiprocessor, of float64 512; walks of plain runs put none away."""
    found = result(compiled, build)
    for name, size in found.spills.items():
        layout = next(layout for layout in LAYOUTS if layout in name)
        limit = (SPILLS_BEYOND if build.options else SPILLS)[layout]
        if build.letter == "d":
            limit = 0
        elif build.capability < 80 and not (layout == "RUNS" and ("STATS" in name or "APPLY" in name)):
            limit = SPILLS_OLD
        if "APPLY" in name:
            limit = min(limit, SPILLS_APPLY)
        assert size <= limit, name
        assert found.registers[name] <= (64 << 10) // planner.resident(build.letter)


@each_build
def test_elements_move_in_whole_vectors(compiled, build):
    """x, dy and y: 16 bytes an access, columns of half types 8.

    Only what is left of windows at the ends of runs is stored by elements.
    """
    for name, text in result(compiled, build).ptx.items():
        loads = re.findall(r"\bld\.global\S*", text)
        stores = re.findall(r"\bst\.global\S*", text)
        # Single elements move as u32 or u16 (bn.cu's `load`), a compiler that took vectors apart would move b16 or u8;
        # gamma, sums and the like are f32, f64 or b32.
        narrow = [op for op in loads + stores if re.search(r"\.(u32|[ubs]16|[ubs]8)$", op) and ".v" not in op]
        half = "COLUMNS" in name and build.letter in "eE"
        access = "v2.u32" if half else "v4.u32"
        if build.capability < 80:
            assert f"ld.global.L1::no_allocate.{access}" in loads, name
        else:
            flying = set(re.findall(r"cp\.async\.c.\.shared\.global \[\S+\], \[\S+\], \d+", text))
            early = set() if "STATS" in name else {"8"} if "true" in name else {"4", "8"}  # numbers of the channel
            assert {op.split(", ")[-1] for op in flying} == early | {"8" if half else "16"}, name
        assert "STATS" in name or f"st.global.cs.{access}" in stores, name
        if "WINDOWS" not in name or "STATS" in name:
            old = (
                build.capability < 80 and "false" in name and "STATS" not in name
            )  # gamma and beta, by registers there
            assert narrow == ["ld.global.u32"] * 2 * old, name
        else:
            assert {op for op in narrow if op.startswith("ld")} == set(), name
        assert half or "ld.shared.v4.u32" in text, name


@each_build
def test_nothing_lies_in_local_memory(compiled, build):
    """An array that is indexed by a variable would."""
    for name, text in result(compiled, build).ptx.items():
        assert ".local" not in text, name


def test_clusters_are_of_the_size_they_are_compiled_for(compiled):
    for name, text in result(compiled, BUILDS[0]).ptx.items():
        assert (".reqnctapercluster 4" in text) or "CLUSTER" not in name
        assert ("ld.shared::cluster" in text) == ("CLUSTER" in name), name
