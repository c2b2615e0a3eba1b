"""The CuPy launcher's machine code, and its cache."""

from __future__ import annotations

import pytest

pytest.importorskip("cupy", reason="CuPy isn't installed")

from cupy.cuda import nvrtc
from fastbn.kernels.cuda import compile as compiler

CHEAP = "fastbn::bn<float, 4, false, fastbn::RUNS, fastbn::BLOCK>", ()


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Counts compilations, which are doubled; the cache is in a folder of the test's own."""
    calls = []

    def compile_(expression, options):
        calls.append((expression, options))
        return b"code of " + expression.encode() + b"\0tail", "lowered_name"

    monkeypatch.setattr(compiler, "_compile", compile_)
    monkeypatch.setenv("FASTBN_CACHE_DIR", str(tmp_path / "cache"))
    return calls


WANTED = b"code of fastbn::bn<float, 4, false, fastbn::RUNS, fastbn::BLOCK>\0tail", "lowered_name"


def test_the_second_process_finds_the_code(compiled, tmp_path):
    assert compiler.machine_code(*CHEAP, (9, 0)) == WANTED
    assert compiler.machine_code(*CHEAP, (9, 0)) == WANTED
    assert len(compiled) == 1
    (file,) = (tmp_path / "cache").iterdir()
    assert file.suffix == ".cubin"


def test_each_device_source_and_option_has_its_code(compiled, monkeypatch):
    compiler.machine_code(*CHEAP, (9, 0))
    compiler.machine_code(*CHEAP, (8, 0))
    compiler.machine_code(CHEAP[0], ("-DFASTBN_CLUSTER=2",), (9, 0))
    monkeypatch.setattr(compiler, "source", lambda: "other")
    compiler.machine_code(*CHEAP, (9, 0))
    monkeypatch.setattr(nvrtc, "getVersion", lambda: (99, 1))
    compiler.machine_code(*CHEAP, (9, 0))
    assert len(compiled) == 5


@pytest.mark.parametrize("damage", ["empty", "cut short", "a flipped bit", "another's"])
def test_a_damaged_file_is_replaced(compiled, tmp_path, damage):
    compiler.machine_code(*CHEAP, (9, 0))
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    if damage == "another's":
        compiler.machine_code(*CHEAP, (8, 0))
        (other,) = set((tmp_path / "cache").iterdir()) - {file}
        content = other.read_bytes()
    broken = {"empty": b"", "cut short": content[:-3], "a flipped bit": content[:-1] + bytes([content[-1] ^ 1])}
    file.write_bytes(broken.get(damage, content))
    before = len(compiled)
    assert compiler.machine_code(*CHEAP, (9, 0)) == WANTED
    assert len(compiled) == before + 1
    assert compiler.machine_code(*CHEAP, (9, 0)) == WANTED
    assert len(compiled) == before + 1


def test_a_folder_that_cannot_be_made_only_costs_time(compiled, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTBN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        assert compiler.machine_code(*CHEAP, (9, 0)) == WANTED
    assert len(compiled) == 2


def test_a_read_only_folder_only_costs_time(compiled, tmp_path, monkeypatch):
    """Root may write anywhere, hence not by chmod."""

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(compiler.Path, "write_bytes", refused)
    for _ in range(2):
        assert compiler.machine_code(*CHEAP, (9, 0)) == WANTED
    assert len(compiled) == 2


def test_a_write_that_fails_leaves_nothing(compiled, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler.os, "replace", full)
    assert compiler.machine_code(*CHEAP, (9, 0)) == WANTED
    assert list((tmp_path / "cache").iterdir()) == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("FASTBN_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compiler.Path, "home", lambda: tmp_path)
    assert compiler.cache_folder() == tmp_path / ".cache" / "fastbn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compiler.cache_folder() == tmp_path / "xdg" / "fastbn"
    monkeypatch.setenv("FASTBN_CACHE_DIR", str(tmp_path / "own"))
    assert compiler.cache_folder() == tmp_path / "own"


@pytest.mark.parametrize(
    ("capability", "target"), [((9, 0), "sm_90"), ((7, 5), "sm_75"), ((8, 8), "compute_86"), ((13, 0), "compute_121")]
)
def test_a_device_newer_than_the_compiler_gets_ptx(monkeypatch, capability, target):
    monkeypatch.setattr(nvrtc, "getSupportedArchs", lambda: (75, 80, 86, 90, 100, 121))
    assert compiler._target(capability) == target


def test_a_device_older_than_the_compiler_is_an_error(monkeypatch):
    monkeypatch.setattr(nvrtc, "getSupportedArchs", lambda: (75, 80))
    with pytest.raises(RuntimeError, match=r"capability 7.5 or newer, this GPU has 7.0. Install an older cupy-cuda"):
        compiler._target((7, 0))


def test_the_compiler_itself(tmp_path, monkeypatch):
    """Machine code for Hopper, and PTX for a device to come, by the NVRTC that CuPy found."""
    monkeypatch.setenv("FASTBN_CACHE_DIR", str(tmp_path))
    try:
        nvrtc.getVersion()
    except Exception:
        pytest.skip("no NVRTC")
    code, name = compiler.machine_code(*CHEAP, (9, 0))
    assert code[:4] == b"\x7fELF"
    assert name.encode() in code
    code, name = compiler.machine_code(*CHEAP, (99, 0))
    assert f".entry {name}(".encode() in code
    assert b".ftz" not in code, "subnormals of float32 are numbers"


def test_code_that_does_not_compile_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTBN_CACHE_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"fastbn::nothing can't be compiled with .*sm_90:\n.*nothing"):
        compiler.machine_code("fastbn::nothing", (), (9, 0))
