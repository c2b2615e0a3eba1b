"""The command line, and what importing costs."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest

from fastbn.__main__ import main


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["cpu"] == "available"
    assert facts["backends"]["cupy"].startswith(("missing: ", "available"))
    assert facts["cpu"]["threads"] >= 1
    assert facts["packages"]["numpy"]


def test_info_for_people(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name in ("numpy", "simd_bits", "threading_layer", "kernel_cache", "reference"):
        assert name in text


def test_info_without_numba(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "fastbn.kernels.cpu", raising=False)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["cpu"].startswith("missing: ")


def test_info_without_gpu_libraries(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "numba.cuda", None)
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["gpu"] == "none that can be used"
    for name in ("cupy", "numba-cuda"):
        assert facts["backends"][name].startswith("missing: ")
        assert "pip install 'fastbn[cuda13]'" in facts["backends"][name]


def test_info_names_the_gpus_or_says_why_not(capsys, monkeypatch):
    def broken(number):
        raise OSError("fell off the bus")

    runtime = types.SimpleNamespace(getDeviceCount=lambda: 2, getDeviceProperties=lambda i: {"name": b"GPU %d" % i})
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime)))
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["gpu"], facts["backends"]["cupy"]) == ("GPU 0, GPU 1", "available")
    runtime.getDeviceProperties = broken
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpu"] == "unknown: fell off the bus"


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["info", "--nonsense"]])
def test_wrong_words_are_an_error(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert "usage: fastbn" in capsys.readouterr().err


def test_as_a_module():
    process = subprocess.run(
        [sys.executable, "-m", "fastbn", "--version"], capture_output=True, text=True, timeout=100, check=True
    )
    assert process.stdout.startswith("fastbn ")


@pytest.mark.parametrize("module", ["fastbn", "fastbn.__main__"])
def test_import_loads_no_compiler_and_no_array_library_but_numpy(module):
    heavy = {"numba", "cupy", "sklearn", "matplotlib", "rich", "torch"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert process.stdout.strip() == "[]"
