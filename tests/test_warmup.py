"""The notice of a process that compiles for long, and the command that compiles ahead; each with a cache of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FIRST = """
import numpy as np
import fastbn
{more}
y, saved = fastbn.forward(np.ones((4, 3), np.float32))
y, saved = fastbn.forward(np.ones((4, 3), np.float64))
"""


def process(cache, code, *arguments):
    return subprocess.run(
        [sys.executable, *(["-c", code] if code else []), *arguments],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def patience(seconds):
    return f"from fastbn.kernels.cpu import compile; compile.PATIENCE = {seconds}"


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache with what FIRST needs, and what a process said that was told to be impatient."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, process(folder, FIRST.format(more=patience(0.2)))


def test_compiling_for_long_is_said_once_in_a_line(filled):
    done = filled[1]
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("fastbn is compiling kernels")
    assert "once on this machine" in done.stderr
    assert "python -m fastbn warmup" in done.stderr


def test_loading_is_not_compiling(filled):
    done = process(filled[0], FIRST.format(more=patience(0.0)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "more",
    [
        "import sys; sys.stderr.close()",
        "import sys; sys.stderr = None",
        "import os; os.close(2)",
        "import threading\ndef fail(*_): raise RuntimeError('no threads')\nthreading.Timer.start = fail",
    ],
    ids=["closed", "none", "closed below", "no threads"],
)
def test_a_notice_that_cannot_be_given_breaks_nothing(tmp_path, more):
    wait = "import time\nwith compile.notice.watching(True): time.sleep(0.3)\nprint('done')"
    done = process(tmp_path, f"{patience(0.1)}\n{more}\n{wait}")
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["done"], "")


def test_short_compilations_add_up(monkeypatch, capsys):
    import time

    from fastbn.kernels.cpu import compile

    notice = compile._Notice()
    monkeypatch.setattr(compile, "PATIENCE", 0.5)
    for _ in range(2):
        with notice.watching(True):
            time.sleep(0.2)
        assert capsys.readouterr().err == ""
    with notice.watching(False):
        time.sleep(0.4)
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "in every process" in text
    assert "NUMBA_CACHE_DIR" in text
    with notice.watching(True):
        time.sleep(0.6)
    assert capsys.readouterr().err == ""


def warm_up(folder, hidden=""):
    done = process(
        folder, hidden + "from fastbn.__main__ import main; raise SystemExit(main())", "warmup", "--dtype", "float32"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    last = done.stdout.splitlines()[-1]
    assert "kept in " in last
    assert last.split("kept in ")[1].startswith(str(folder))
    return done.stdout.splitlines(), set(folder.rglob("*.kernel"))


def test_warmup_compiles_ahead(tmp_path):
    compiled = warm_up(tmp_path)[1]
    assert compiled
    from fastbn.bench import startup

    startup.seconds(startup.ALL, NUMBA_CACHE_DIR=str(tmp_path))
    assert set(tmp_path.rglob("*.kernel")) == compiled
    lines, again = warm_up(tmp_path, "import sys; sys.modules['rich'] = sys.modules['rich.progress'] = None\n")
    assert sorted(lines[:-1]) == ["backward, float32", "forward, float32"]
    assert again == compiled


def test_warmup_without_numba_or_bfloat16(monkeypatch, capsys):
    from fastbn.__main__ import main

    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert main(["warmup", "--dtype", "bfloat16"]) == 1
    assert "ml_dtypes" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["warmup", "--dtype", "int8"])


def test_a_process_that_fails_is_said(tmp_path, monkeypatch, capsys):
    import numba

    from fastbn.__main__ import main

    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho first >&2\necho 'no memory left' >&2\nexit 3\n")
    failing.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(failing))
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 2)
    assert main(["warmup"]) == 1
    text = capsys.readouterr().err
    assert text.startswith("fastbn warmup: ")
    assert text.endswith("ward, float32: no memory left\n")
    failing.write_text("#!/bin/sh\nexit 3\n")
    assert main(["warmup"]) == 1
    assert "its process ended with 3" in capsys.readouterr().err
