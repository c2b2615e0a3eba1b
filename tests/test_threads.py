"""When a parallel region is entered, and that none is where it would end or hang the process.

Every test is a process of its own, since a threading layer once started stays. `Recorder` has the form of a
kernel and notes which twin was called; `double` and `spin` are real ones, for what only a real region breaks.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[1] / "kernels" / "cpu"

TOY = """
from numba import prange
from .compile import compiled

class Twins:
    def __init__(self, function):
        self.serial, self.parallel = compiled(function), compiled(function, parallel=True)

@Twins
def double(items, x, out):
    for k in prange(items):
        out[k] = x[k] + x[k]

@Twins
def spin(items, rounds, out):
    for k in prange(items):
        a = 0.5 + k
        for _ in range(rounds):
            a = a * 0.999999 + 1e-3 / a
        out[k] = a
"""

PRELUDE = """
import multiprocessing, os, signal, sys, threading, time, warnings
import numba
import numpy as np

def settings():
    config = {name: value for name, value in vars(numba.config).items() if name.isupper()}
    return config, dict(os.environ), multiprocessing.get_start_method(allow_none=True)

BEFORE = settings()
from toys import threads
from toys.toy import double, spin

X = np.arange(64.0)

def works():
    out = np.zeros(64)
    threads.run(double, 64, X, out, parallel=True)
    assert (out == 2 * X).all(), out

class Recorder:
    # A kernel whose parallel twin waits inside until it is let go.
    def __init__(self, held=False):
        self.calls, self.entered, self.leave = [], threading.Event(), threading.Event()
        if not held:
            self.leave.set()
    def serial(self, items):
        self.calls.append("serial")
    def parallel(self, items):
        self.calls.append("parallel")
        self.entered.set()
        assert self.leave.wait(30)

def called(parallel=True):
    recorder = Recorder()
    threads.run(recorder, 4, parallel=parallel)
    (call,) = recorder.calls
    return call

class Inside:
    # Another thread is in a parallel region for as long as the block lasts.
    def __enter__(self):
        self.recorder = Recorder(held=True)
        self.thread = threading.Thread(target=threads.run, args=(self.recorder, 4), kwargs={"parallel": True})
        self.thread.start()
        assert self.recorder.entered.wait(30)
    def __exit__(self, *_):
        self.recorder.leave.set()
        self.thread.join(30)

def in_child(function):
    # A region that hangs is ended by the alarm, and one that is fatal by itself.
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            function()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, status

def in_thread(function):
    failures = []
    def call():
        try:
            function()
        except BaseException as cause:
            failures.append(cause)
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(50)
    assert not thread.is_alive() and not failures, failures
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package `toys`, and its kernels compiled."""
    package = tmp_path_factory.mktemp("threads") / "toys"
    package.mkdir()
    for name in ("compile.py", "threads.py"):
        shutil.copy(SOURCES / name, package)
    (package / "__init__.py").write_text("")
    (package / "toy.py").write_text(TOY)
    passes(
        package.parent,
        "out = np.zeros(64)\n"
        "for twin in ('serial', 'parallel'):\n"
        "    getattr(double, twin)(64, X, out); getattr(spin, twin)(4, 10, out)",
    )
    return package.parent


def run(folder: Path, script: str, layer: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(PRELUDE + script)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    # Where pip puts libtbb, which Numba leaves to the loader to find.
    inherited["LD_LIBRARY_PATH"] = f"{sys.prefix}/lib:{inherited.get('LD_LIBRARY_PATH', '')}".rstrip(":")
    if layer:
        variables["NUMBA_THREADING_LAYER"] = layer
    return subprocess.run(
        # Python 3.12 and later warn of any fork beside threads, whatever the child does.
        [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "script.py"],
        cwd=folder,
        env=inherited | {"NUMBA_NUM_THREADS": "2"} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def passes(folder: Path, script: str, layer: str | None = None, **variables: str) -> None:
    done = run(folder, script, layer, **variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(scope="module", params=["omp", "workqueue", "tbb"])
def layer(request: pytest.FixtureRequest, folder: Path) -> str:
    """Each threading layer that there is."""
    name = str(request.param)
    started = run(folder, "numba.get_num_threads()", name)
    if started.returncode:
        pytest.skip(f"threading layer {name} is not there: {started.stderr.strip().splitlines()[-1]}")
    return name


# ---- which twin


def test_the_twin_that_is_wanted(folder: Path, layer: str) -> None:
    passes(
        folder,
        """
assert threads.threading_layer() is None
assert threads.threads() == 2
assert called(parallel=False) == "serial"
assert threads.threading_layer() is None  # neither question nor serial call has started one
assert called() == "parallel"
assert threads.threading_layer() == os.environ["NUMBA_THREADING_LAYER"]
numba.set_num_threads(1)
assert threads.threads() == 1
assert called() == "serial"
numba.set_num_threads(2)
assert threads.threads() == 2
assert called() == "parallel"
assert called(parallel=False) == "serial"
""",
        layer,
    )


def test_one_thread_from_the_start(folder: Path) -> None:
    passes(folder, "assert threads.threads() == 1; assert called() == 'serial'", NUMBA_NUM_THREADS="1")


def test_user_settings_stay(folder: Path) -> None:
    # Numba's start asks multiprocessing for its start method, which settles it: a program that sets its own
    # after its first batch norm would get a RuntimeError.
    passes(
        folder,
        """
def chosen_before():
    multiprocessing.set_start_method("spawn")
    works()
    assert multiprocessing.get_start_method() == "spawn"
in_child(chosen_before)
works()
assert called() == "parallel"
assert settings() == BEFORE
multiprocessing.set_start_method("spawn")
works()
assert multiprocessing.get_start_method() == "spawn"
""",
    )


# ---- several Python threads


def test_first_region_is_entered_by_one(folder: Path, layer: str) -> None:
    # Which layer it is, and so whether two may enter, is known after the first start only.
    passes(
        folder,
        """
with Inside():
    assert called() == ("serial" if os.environ["NUMBA_THREADING_LAYER"] == "workqueue" else "parallel")
assert called() == "parallel"
assert threads._inside == {}
""",
        layer,
    )


def test_others_stay_out_while_the_layer_starts(folder: Path) -> None:
    passes(
        folder,
        """
start, starting, go = numba.get_num_threads, threading.Event(), threading.Event()
def slow_start():
    starting.set()
    assert go.wait(30)
    return start()
numba.get_num_threads = slow_start
first = Recorder()
thread = threading.Thread(target=threads.run, args=(first, 4), kwargs={"parallel": True})
thread.start()
assert starting.wait(30)
assert called() == "serial"
go.set()
thread.join(30)
assert first.calls == ["parallel"] and called() == "parallel"
""",
    )


def test_many_threads_at_once(folder: Path, layer: str) -> None:
    # workqueue aborts the process as soon as two are inside.
    passes(
        folder,
        """
failures, ready = [], threading.Barrier(6)
def calls():
    try:
        ready.wait(30)
        for _ in range(200):
            works()
    except BaseException as cause:
        failures.append(cause)
group = [threading.Thread(target=calls) for _ in range(6)]
for thread in group: thread.start()
for thread in group: thread.join(50)
assert failures == [], failures
assert called() == "parallel"
""",
        layer,
    )


def test_layer_started_by_the_user(folder: Path, layer: str) -> None:
    passes(
        folder,
        """
double.parallel(64, X, np.zeros(64))  # as the user's own code would
assert threads.threading_layer() == os.environ["NUMBA_THREADING_LAYER"]
with Inside():
    assert called() == ("serial" if os.environ["NUMBA_THREADING_LAYER"] == "workqueue" else "parallel")
    works()
""",
        layer,
    )


# ---- forks


@pytest.mark.parametrize("by", ["us", "the user"])
def test_fork_after_use(folder: Path, layer: str, by: str) -> None:
    # omp: Numba ends a child that enters a region. tbb: it may hang; forks from other threads complain.
    done = run(
        folder,
        f"""
{"works()" if by == "us" else "double.parallel(64, X, np.zeros(64))"}
layer = threads.threading_layer()
def expect(twin):
    works()
    assert called() == twin and threads.threads() == {{"serial": 1, "parallel": 2}}[twin]
def child():
    twin = "parallel" if layer == "workqueue" else "serial"
    expect(twin)
    in_child(lambda: expect(twin))
in_child(child)
expect("parallel")
in_child(child)
in_thread(lambda: in_child(lambda: expect("parallel" if layer == "workqueue" else "serial")))
expect("parallel")
""",
        layer,
    )
    assert done.returncode == 0, done.stderr
    assert layer == "tbb" or done.stderr == ""


def test_fork_before_use(folder: Path) -> None:
    passes(
        folder,
        """
def child():
    assert called() == "parallel"
    works()
in_child(child)
works()
assert called() == "parallel"
""",
    )


def test_fork_while_another_thread_is_inside(folder: Path, layer: str) -> None:
    # tbb hung in 3 of 60 such children; and the lock, if held, is held by a thread the child doesn't have.
    done = run(
        folder,
        """
works()
serial = threads.threading_layer() in ("omp", "tbb")
def child():
    assert serial is False or called() == "serial"
    assert called() == called()
    works()
    assert threads._inside == {}
with Inside():
    in_child(child)
assert called() == "parallel"
""",
        layer,
    )
    assert done.returncode == 0, done.stderr


def test_fork_while_the_layer_starts(folder: Path) -> None:
    # Numba's own lock around the start is then taken for ever in the child.
    passes(
        folder,
        """
from numba.np.ufunc import parallel
launch, starting, go = parallel._launch_threads, threading.Event(), threading.Event()
def slow_launch():
    with parallel._backend_init_thread_lock:
        starting.set()
        assert go.wait(30)
    launch()
parallel._launch_threads = slow_launch
thread = threading.Thread(target=works)
thread.start()
assert starting.wait(30)
def child():
    assert called() == "serial" and threads.threads() == 1
    works()
in_child(child)
go.set()
thread.join(30)
""",
    )


def test_fork_while_another_thread_compiles(folder: Path) -> None:
    # A child would wait for ever for a thread that it doesn't have to finish compiling.
    passes(
        folder,
        """
from numba.core.compiler_lock import global_compiler_lock
taken = threading.Event()
def compile_something():
    with global_compiler_lock:
        taken.set()
        time.sleep(0.5)
thread = threading.Thread(target=compile_something)
thread.start()
assert taken.wait(30)
in_child(lambda: in_thread(works))  # and the fork leaves the lock free, in the child
thread.join(30)
in_thread(works)  # and in the parent
""",
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(folder: Path, method: str, layer: str) -> None:
    # With omp, a forked pool without the serial way out hangs: it replaces its killed workers without end.
    if method != "fork" and layer != "omp":
        pytest.skip("a new interpreter knows nothing of its parent's layer: one of them is enough")
    done = run(
        folder,
        f"""
def pool():
    with multiprocessing.get_context("{method}").Pool(1) as workers:
        assert workers.apply_async(works).get(40) is None
if __name__ == "__main__":
    works()
    pool()
    in_thread(pool)
    works()
""",
        layer,
    )
    assert done.returncode == 0, done.stderr
    assert "Terminating" not in done.stderr  # other noise is Python's own: its resource tracker's, at the end


# ---- ways out of a call


def test_interrupt_leaves_the_way_free(folder: Path) -> None:
    passes(
        folder,
        """
class InKernel(Recorder):
    def parallel(self, items):
        raise KeyboardInterrupt
class AsTheLockIsTaken(dict):
    # Where `if lock.acquire(blocking=False): try: ...` would leave it shut: taken, and not yet known to be.
    def setdefault(self, *args):
        super().setdefault(*args)
        raise KeyboardInterrupt
def while_starting():
    raise KeyboardInterrupt
def interrupted(kernel):
    try:
        threads.run(kernel, 4, parallel=True)
    except KeyboardInterrupt:
        assert not threads._inside
    else:
        assert False
    threads._inside, numba.get_num_threads = {}, get_num_threads
    assert called() == "parallel"
get_num_threads, numba.get_num_threads = numba.get_num_threads, while_starting
interrupted(Recorder())
interrupted(InKernel())
threads._inside = AsTheLockIsTaken()
interrupted(Recorder())
""",
        "workqueue",
    )


def test_ctrl_c(folder: Path, layer: str) -> None:
    passes(
        folder,
        """
works()
signal.setitimer(signal.ITIMER_REAL, 0.1)
signal.signal(signal.SIGALRM, signal.default_int_handler)
out = np.zeros(4)
try:
    for _ in range(1000):
        threads.run(spin, 4, 3_000_000, out, parallel=True)
except KeyboardInterrupt:
    pass
else:
    assert False
works()
assert called() == "parallel"
""",
        layer,
    )


@pytest.mark.parametrize("daemon", [False, True])
def test_exit_while_a_thread_is_inside(folder: Path, layer: str, daemon: bool) -> None:
    passes(
        folder,
        f"""
works()
begun = threading.Event()
def calls():
    out = np.zeros(4)
    begun.set()
    for _ in range(5):
        threads.run(spin, 4, 5_000_000, out, parallel=True)
threading.Thread(target=calls, daemon={daemon}).start()
assert begun.wait(30)
time.sleep(0.05)
""",
        layer,
    )


# ---- no threading layer


@pytest.mark.parametrize("name", ["nonsense", "unavailable"])
def test_no_layer_is_said_once(folder: Path, name: str) -> None:
    script = """
if os.environ["NUMBA_THREADING_LAYER"] == "default":
    for module in ("tbbpool", "omppool"):
        sys.modules["numba.np.ufunc." + module] = None
    numba.config.THREADING_LAYER = "threadsafe"  # which workqueue, the last one left, is not
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        works()
    assert called() == "serial"
assert [warning.category for warning in caught] == [RuntimeWarning], caught
assert "fastbn runs on one thread: " in str(caught[0].message)
assert caught[0].filename.endswith("script.py")
print(caught[0].message)
assert threads.threads() == 1 and threads.threading_layer() is None
in_child(works)
"""
    done = run(folder, script, "nonsense" if name == "nonsense" else "default")
    assert (done.returncode, done.stderr) == (0, "")
    assert ("'nonsense' is unknown" if name == "nonsense" else "No threading layer could be loaded") in done.stdout


def test_no_layer_with_warnings_as_errors(folder: Path) -> None:
    passes(
        folder,
        """
try:
    works()
except RuntimeWarning as warning:
    assert "fastbn runs on one thread" in str(warning)
else:
    assert False
works()
""",
        "nonsense",
    )


def test_the_danger_is_real(folder: Path) -> None:
    """Without the serial way out, what is guarded against does happen: if this fails, a guard can go."""
    aborted = run(
        folder,
        """
out = np.zeros(4)
double.parallel(4, X, out)
for _ in range(2):
    threading.Thread(target=spin.parallel, args=(4, 50_000_000, np.zeros(4))).start()
""",
        "workqueue",
    )
    assert aborted.returncode == -signal.SIGABRT, aborted.stderr
    assert "Concurrent access" in aborted.stderr
