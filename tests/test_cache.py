"""The cache of compiled kernels: what is stored is found again, and nothing that happens to it fails a call.

On a toy kernel in a folder of its own, beside copies of the modules under test. "The next process" is mostly
a second dispatcher of the same function: it has nothing in memory and looks on disk. Where the process itself
matters (killed, limited, without JIT, several at once), it is a real one.
"""

import errno
import importlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest

SOURCES = Path(__file__).resolve().parents[1] / "kernels" / "cpu"

TOY = """
from numba import prange
from .compile import compiled
from .helper import scaled

class Twins:
    def __init__(self, function):
        self.serial, self.parallel = compiled(function), compiled(function, parallel=True)

@Twins
def scale(items, x, out):
    for k in prange(items):
        out[k] = scaled(x[k])
"""
HELPER = """
from numba import njit

@njit
def scaled(value):
    return 3 * value
"""
X = np.array([1.0, 2.0, 5.0])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `toys`, which can be imported."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "toys"
    package.mkdir()
    for name in ("compile.py", "threads.py"):
        shutil.copy(SOURCES / name, package)
    for name, text in {"__init__": "", "toy": TOY, "helper": HELPER}.items():
        (package / f"{name}.py").write_text(text)
    yield package
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "toys"]:
        del sys.modules[name]


def imported() -> ModuleType:
    """The toy module as a new process would see it."""
    forget()
    importlib.invalidate_caches()
    return importlib.import_module("toys.toy")


def module() -> Any:
    return sys.modules["toys.compile"]


def next_process(toy: ModuleType) -> Any:
    return toy.Twins(toy.scale.serial.py_func)


def check(dispatcher: Any, hits: int, *, factor: float = 3.0, dtype: type = np.float64) -> None:
    """One call: right, and `hits` times from the disk."""
    out = np.zeros(3, dtype)
    dispatcher(3, X.astype(dtype), out)
    np.testing.assert_array_equal(out, factor * X)
    if hits >= 0:
        assert sum(dispatcher.stats.cache_hits.values()) == hits


def files(folder: Path) -> list[Path]:
    return sorted((folder / "__pycache__").glob("*.kernel"))


def leftovers(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.tmp*"))


def child(folder: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `script` in a new process, next to the package, with warnings as errors."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", PRELUDE + script],
        cwd=folder.parent,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


PRELUDE = """
import os, signal, sys
import numpy as np
from toys import compile, toy
compile.PATIENCE = 1e9  # on a busy machine, what a toy takes is no news
x = np.array([1.0, 2.0, 5.0])

def check(dispatcher, hits=None, dtype=np.float64):
    out = np.zeros(3, dtype)
    dispatcher(3, x.astype(dtype), out)
    assert (out == 3 * x).all(), out
    assert hits is None or sum(dispatcher.stats.cache_hits.values()) == hits, dispatcher.stats
"""


def succeeded(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- what is stored is found again, and only where it is right


def test_import_compiles_nothing(folder: Path) -> None:
    toy = imported()
    assert toy.scale.serial.signatures == toy.scale.parallel.signatures == []
    assert files(folder) == []


def test_next_process_compiles_nothing_and_next_machine_all(folder: Path) -> None:
    succeeded(child(folder, "check(toy.scale.serial, 0); check(toy.scale.parallel, 0)"))
    succeeded(child(folder, "check(toy.scale.serial, 1); check(toy.scale.parallel, 1)"))
    # Machines of a cluster share a home folder, and the older can't run the newer one's code.
    succeeded(child(folder, "check(toy.scale.serial, 0)", NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=""))
    assert len(files(folder)) == 3


def test_serial_and_parallel_are_kept_apart(folder: Path) -> None:
    # By Numba's key the parallel dispatcher finds the serial code, and is as slow ever after.
    toy = imported()
    check(toy.scale.serial, 0)
    check(toy.scale.parallel, 0)
    assert len(files(folder)) == 2
    fresh = next_process(toy)
    check(fresh.serial, 1)
    check(fresh.parallel, 1)
    # What was loaded has Numba's threads to start before it runs, or not.
    assert [bool(code.reload_init) for code in fresh.serial.overloads.values()] == [False]
    assert [bool(code.reload_init) for code in fresh.parallel.overloads.values()] == [True]


def test_options(folder: Path) -> None:
    function = imported().scale.serial.py_func
    for given in ({}, {"fastmath": {"nsz"}}, {"parallel": True}):
        options = module().compiled(function, **given).targetoptions
        assert options == options | {"nogil": True, "error_model": "numpy"} | given
    assert files(folder) == []


def test_other_options_are_other_code(folder: Path) -> None:
    function = imported().scale.serial.py_func
    for hits in (0, 1):
        check(module().compiled(function), hits)
        check(module().compiled(function, fastmath=True), hits)
        check(module().compiled(function, error_model="python"), hits)
    assert len(files(folder)) == 3


@pytest.mark.parametrize(
    ("name", "before", "after", "factor"),
    [
        # Numba looks at the kernel's own file only: with an edited helper it would go on with the old code,
        ("helper", HELPER, HELPER.replace("3 *", "7.0 *"), 7.0),
        # and its key has the byte code, which is the same for another constant.
        ("toy", TOY.replace("scaled(x[k])", "3.0 * x[k]"), TOY.replace("scaled(x[k])", "7.00 * x[k]"), 7.0),
        # A file that no kernel imports: one may import it tomorrow.
        ("another", "A = 1\n", "A = 2.0\n", 3.0),
    ],
    ids=["helper", "kernel", "another"],
)
def test_edited_sources_are_compiled_again(folder: Path, name: str, before: str, after: str, factor: float) -> None:
    (folder / f"{name}.py").write_text(before)
    check(imported().scale.serial, 0)
    (folder / f"{name}.py").write_text(after)
    check(imported().scale.serial, 0, factor=factor)
    check(imported().scale.serial, 1, factor=factor)


def test_a_kernel_in_a_folder_below_has_helpers_in_the_one_above(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (inner / "__init__.py").write_text("")
    (inner / "toy.py").write_text(TOY.replace("from .", "from .."))

    def process(hits: int, factor: float) -> None:
        forget()
        importlib.invalidate_caches()
        check(importlib.import_module("toys.inner.toy").scale.serial, hits, factor=factor)

    process(0, 3.0)
    process(1, 3.0)
    (folder / "helper.py").write_text(HELPER.replace("3 *", "7.0 *"))
    process(0, 7.0)
    process(1, 7.0)


def test_edit_between_import_and_first_call(folder: Path) -> None:
    # The old text runs, and must not be stored as the code of the new one.
    toy = imported()
    (folder / "helper.py").write_text(HELPER.replace("3 *", "7.0 *"))
    check(toy.scale.serial, 0)
    check(imported().scale.serial, 0, factor=7.0)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("setting", ["OPT", "BOUNDSCHECK", "USING_SVML"])
def test_settings_that_change_the_code(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    toy = imported()
    check(toy.scale.serial, 0)
    with monkeypatch.context() as changed:
        changed.setattr(numba.config, setting, not getattr(numba.config, setting))
        check(next_process(toy).serial, 0)
    check(next_process(toy).serial, 1)


def test_other_numba_and_other_numpy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = imported()
    for package in (numba, np):
        check(next_process(toy).serial, 0 if package is numba else 1)
        with monkeypatch.context() as changed:
            changed.setattr(package, "__version__", "0.0")
            check(next_process(toy).serial, 0)
    assert len(files(folder)) == 3


def test_numba_cache_dir(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = tmp_path / "chosen"
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(chosen))
    toy = imported()
    check(toy.scale.serial, 0)
    assert str(module().cache_folder()).startswith(str(chosen))
    assert len(list(chosen.rglob("*.kernel"))) == 1
    assert files(folder) == []


@pytest.mark.usefixtures("folder")
def test_recompile() -> None:
    toy = imported()
    check(toy.scale.serial, 0)
    toy.scale.serial.recompile()
    check(toy.scale.serial, -1)
    check(next_process(toy).serial, 1)


# ---- files that are not what was written


def flipped(position: float) -> Any:
    def flip(content: bytes) -> bytes:
        at = min(int(len(content) * position), len(content) - 1)
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return flip


DAMAGE = {
    "empty": lambda content: content[:0],
    "shorter than a checksum": lambda content: content[:10],
    "checksum alone": lambda content: content[:32],
    "half": lambda content: content[: len(content) // 2],
    "all but a byte": lambda content: content[:-1],
    "a byte more": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"<html>quota exceeded</html>"[: len(content)],
    "a pickle": lambda content: pickle.dumps({"length": len(content)}),
    "bit flip in the checksum": flipped(0),
    "bit flip at the start": flipped(0.01),
    "bit flip in the machine code": flipped(0.5),
    "bit flip in the last byte": flipped(1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_replaced(folder: Path, damage: str) -> None:
    toy = imported()
    check(toy.scale.serial, 0)
    (path,) = files(folder)
    good = path.read_bytes()
    path.write_bytes(DAMAGE[damage](good))
    check(next_process(toy).serial, 0)
    check(next_process(toy).serial, 1)
    assert files(folder) == [path]
    assert leftovers(folder) == []


# Checksums are right here, so it is what Python or Numba make of the content that fails.
CONTENT = {
    "not a pickle": b"no pickle",
    "an empty pickle": b"",
    "a pickle of a missing module": b"cmissing_module\nname\n.",
    "a pickle that calls and raises": b"cbuiltins\nint\n(Vx\ntR.",
    "a pickle of something else": pickle.dumps([1, 2, 3]),
}


@pytest.mark.parametrize("content", CONTENT)
def test_content_that_cannot_be_loaded_is_replaced(folder: Path, content: str) -> None:
    toy = imported()
    check(toy.scale.serial, 0)
    (path,) = files(folder)
    store = toy.scale.serial._cache._cache._cache_file
    path.write_bytes(store._checksum(str(path), CONTENT[content]) + CONTENT[content])
    check(next_process(toy).serial, 0)
    check(next_process(toy).serial, 1)


def test_one_file_under_the_name_of_another(folder: Path) -> None:
    # float64 code run on float32 arrays: Numba's index, when two processes write it at once, leads to this.
    toy = imported()
    check(toy.scale.serial, 0)
    (double,) = files(folder)
    check(toy.scale.serial, 0, dtype=np.float32)
    (single,) = set(files(folder)) - {double}
    shutil.copy(double, single)
    check(next_process(toy).serial, 0, dtype=np.float32)
    check(next_process(toy).serial, 1, dtype=np.float32)


def test_folder_in_place_of_the_file(folder: Path) -> None:
    toy = imported()
    check(toy.scale.serial, 0)
    (path,) = files(folder)
    path.unlink()
    path.mkdir()
    check(next_process(toy).serial, 0)
    assert leftovers(folder) == []


def test_folder_removed_while_running(folder: Path) -> None:
    toy = imported()
    shutil.rmtree(folder / "__pycache__")
    check(toy.scale.serial, 0)
    check(next_process(toy).serial, 1)


# ---- places that cannot be written


def test_no_writable_place(folder: Path) -> None:
    # Files where folders should be, as permissions don't stop a superuser.
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    (folder / "__pycache__").write_text("")
    nowhere = {"HOME": os.devnull, "XDG_CACHE_HOME": os.devnull, "LOCALAPPDATA": os.devnull}
    script = "check(toy.scale.serial, 0); check(toy.scale.parallel, 0); assert compile.cache_folder() is None"
    succeeded(child(folder, script, **nowhere))


def test_filled_cache_turned_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An image built by one user and run by another: Numba tries to write a file before it takes a folder.
    toy = imported()
    check(toy.scale.serial, 0)
    assert module().cache_folder() == str(folder / "__pycache__")

    def refused(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    check(next_process(toy).serial, 0)
    assert module().cache_folder() is None


def test_disk_full(folder: Path) -> None:
    # A limit on the size of files: write() itself fails, after the first 1000 bytes.
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); check(toy.scale.serial, 0)"
    succeeded(child(folder, limited, PYTHONDONTWRITEBYTECODE="1"))
    assert files(folder) == leftovers(folder) == []
    toy = imported()
    check(toy.scale.serial, 0)
    check(next_process(toy).serial, 1)


@pytest.mark.parametrize(
    ("place", "failure"),
    [
        ("write", OSError(errno.ENOSPC, "no space")),
        ("write", OSError(errno.EDQUOT, "quota")),
        ("write", PermissionError(errno.EACCES, "permission")),
        ("replace", PermissionError(errno.EACCES, "open elsewhere, on Windows")),
        ("dump", pickle.PicklingError("not picklable")),
        ("dump", RecursionError("too deep")),
        ("dump", MemoryError()),
    ],
)
def test_save_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, capfd: Any, place: str, failure: Exception
) -> None:
    toy = imported()
    store = toy.scale.serial._cache._cache._cache_file

    def fail(*_args: Any) -> None:
        raise failure

    with monkeypatch.context() as failing, caplog.at_level(logging.DEBUG, "toys.compile"):
        if place == "write":
            failing.setattr(Path, "write_bytes", fail)
        elif place == "replace":
            failing.setattr(os, "replace", fail)
        else:
            failing.setattr(store, "_to_bytes", fail)
        check(toy.scale.serial, 0)
    assert "not saved" in caplog.text
    assert capfd.readouterr() == ("", "")
    assert files(folder) == leftovers(folder) == []
    check(next_process(toy).serial, 0)
    check(next_process(toy).serial, 1)


@pytest.mark.usefixtures("folder")
def test_read_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = imported()
    check(toy.scale.serial, 0)

    def refused(_path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "another user's")

    with monkeypatch.context() as failing:
        failing.setattr(Path, "read_bytes", refused)
        check(next_process(toy).serial, 0)
    check(next_process(toy).serial, 1)


def test_interrupted_save_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ctrl-C is the user's and passes through; the call after it is whole.
    toy = imported()

    def interrupt(*_args: Any) -> None:
        raise KeyboardInterrupt("by the user")

    with monkeypatch.context() as failing:
        failing.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt, match="by the user"):
            check(toy.scale.serial, 0)
    assert files(folder) == leftovers(folder) == []
    check(toy.scale.serial, 0)  # compiled before it was interrupted
    check(next_process(toy).serial, 0)
    check(next_process(toy).serial, 1)


@pytest.mark.parametrize("moment", ["half written", "not yet renamed"])
def test_killed_while_saving(folder: Path, moment: str) -> None:
    script = {
        "half written": """
from pathlib import Path
def half(path, content):
    with open(path, "wb") as file:
        file.write(content[:len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
Path.write_bytes = half
""",
        "not yet renamed": "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n",
    }[moment]
    killed = child(folder, script + "check(toy.scale.serial)", PYTHONDONTWRITEBYTECODE="1")
    assert killed.returncode < 0
    assert len(leftovers(folder)) == 1
    assert files(folder) == []
    toy = imported()
    check(toy.scale.serial, 0)
    check(next_process(toy).serial, 1)


# ---- several at once


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["another type", "the same type"])
def test_two_processes_save_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    # Just before one renames its float64 file, the other does all of its work.
    toy = imported()
    first, other = next_process(toy).serial, next_process(toy).serial
    replace = os.replace

    def late(part: str, path: str) -> None:
        monkeypatch.setattr(os, "replace", replace)
        check(other, 0, dtype=dtype)
        replace(part, path)

    monkeypatch.setattr(os, "replace", late)
    check(first, 0)
    assert leftovers(folder) == []
    fresh = next_process(toy).serial
    check(fresh, 1)
    check(fresh, len(files(folder)), dtype=dtype)
    assert len(files(folder)) == (2 if dtype is np.float32 else 1)


def test_processes_fill_one_cold_cache(folder: Path) -> None:
    script = PRELUDE + "for dtype in sys.argv[1:]: check(toy.scale.serial, dtype=np.dtype(dtype).type)"
    orders = [["float64", "float32"], ["float32", "float64"], ["int64", "float32"]]
    started = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", script, *order], cwd=folder.parent) for order in orders
    ]
    try:
        assert [process.wait(timeout=60) for process in started] == [0] * 3
    finally:
        for process in started:
            process.kill()
    fresh = imported().scale.serial
    for hits, dtype in enumerate((np.float64, np.float32, np.int64), start=1):
        check(fresh, hits, dtype=dtype)
    assert len(files(folder)) == 3
    assert leftovers(folder) == []


def test_threads_make_the_first_call_at_once(folder: Path) -> None:
    toy = imported()
    ready, failures = threading.Barrier(8), []

    def first_call() -> None:
        ready.wait(timeout=60)
        try:
            check(toy.scale.serial, -1)
        except BaseException as cause:
            failures.append(cause)

    calls = [threading.Thread(target=first_call) for _ in range(8)]
    for call in calls:
        call.start()
    for call in calls:
        call.join(timeout=60)
    assert failures == []
    assert sum(toy.scale.serial.stats.cache_misses.values()) == 1
    assert len(files(folder)) == 1


# ---- a Numba, or a source, that offers no cache


def test_jit_disabled(folder: Path) -> None:
    script = """
import types
from toys import threads
assert isinstance(toy.scale.serial, types.FunctionType)
for parallel in (False, True):
    out = np.zeros(3)
    threads.run(toy.scale, 3, x, out, parallel=parallel)
    assert (out == 3 * x).all()
assert compile.cache_folder() is None
"""
    succeeded(child(folder, script, NUMBA_DISABLE_JIT="1"))
    assert files(folder) == []


@pytest.mark.parametrize("change", ["no enable_caching", "no _cache", "no _cache_file", "no _impl", "no _dump"])
def test_a_numba_with_other_names(folder: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    # None of these names is public: without them there is no cache, and nothing else is missing.
    toy = imported()
    kind = next(c for c in type(toy.scale.serial).__mro__ if "enable_caching" in vars(c))
    enable = kind.enable_caching

    def changed(dispatcher: Any) -> None:
        enable(dispatcher)
        cache = dispatcher._cache
        if change == "no _cache":
            del dispatcher._cache
        elif change == "no _dump":
            cache._cache_file = object()
        else:
            delattr(cache, change.removeprefix("no "))

    if change == "no enable_caching":
        monkeypatch.delattr(kind, "enable_caching")
    else:
        monkeypatch.setattr(kind, "enable_caching", changed)
    check(next_process(toy).serial, 0)
    assert module().cache_folder() is None
    assert files(folder) == []


def test_no_source(folder: Path) -> None:
    # Typed at a prompt, or shipped as byte code in a folder without sources: edits could not be seen.
    toy = imported()
    space: dict[str, Any] = {"__name__": "toys.toy"}
    exec("def scale(items, x, out):\n    for k in range(items):\n        out[k] = 3 * x[k]\n", space)
    check(module().compiled(space["scale"]), 0)
    with pytest.raises(FileNotFoundError, match="no sources in"):
        module()._stamp(folder / "empty")
    assert toy.scale.serial.signatures == []
    assert files(folder) == []
