"""When a parallel region may be entered, and the serial twin where it would be fatal.

Numba's threading layers, each tried: `omp` takes several Python threads at once, but ends a forked child that
enters a region after its parent had started it. `workqueue` survives forks and aborts the process when two
threads enter at once. `tbb` takes several threads, and 3 of 60 children hung that were forked while another one was
inside; of some other forks it says itself, now and then, that threads in the child may be broken. So children of `omp`
and `tbb` stay serial. The twins give the same bits: nothing but time is lost.

Numba's settings are the user's and stay untouched. Under `workqueue`, regions that the user's own code enters
from another thread can't be seen from here.
"""

import contextlib
import multiprocessing
import os
import threading
import warnings
from typing import Any, Protocol

import numba
from numba.np.ufunc import parallel

_compiling: Any = threading.RLock()
with contextlib.suppress(ImportError):  # Numba's own name for it may change
    from numba.core.compiler_lock import global_compiler_lock as _compiling

# OpenMP read it when it started. Waking a thread takes 100 us, and then it is often on the processor of the one
# that woke it, until the system moves it some milliseconds later.
SLEEPY = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"

# Numba's number of threads. Its own function takes two locks first, in case no layer has been started: 10 us behind a
# large array, whose elements are in the caches then. Without them once one has (`_started`).
_count = numba.get_num_threads

_serial_only = False  # for good, in this process and its forked children
_one_at_a_time = True  # until the layer is known to take several threads

# A lock: whose token is in it is inside. `setdefault` is atomic, and the owner can be asked for at any time,
# so a Ctrl-C between taking the lock and noting that it was taken can't leave it shut. Nobody waits for it.
_inside: dict[str, object] = {}


class Kernel(Protocol):
    """What is done for all work items, to the same bits by one thread and by all."""

    def serial(self, items: int, *args: Any) -> None: ...

    def parallel(self, items: int, *args: Any) -> None: ...


def run(kernel: Kernel, items: int, *args: Any, parallel: bool) -> None:
    """Call `kernel` over `items` work items: by all threads if `parallel` is wanted and safe here and now.

    Costs 0.2 µs over the kernel itself when serial, 1.1 µs when parallel.
    """
    if not parallel or _serial_only:
        kernel.serial(items, *args)
    elif _one_at_a_time:
        _run_alone(kernel, items, args)
    elif _count() > 1:
        kernel.parallel(items, *args)
    else:
        kernel.serial(items, *args)


def threads() -> int:
    """Number of threads that a parallel region would use now: 1 where none may be entered."""
    if _serial_only:
        return 1
    if _one_at_a_time and threading_layer() is None:  # get_num_threads() would start one, and nobody has limited it yet
        return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    return max(1, int(_count()))


def least(sizes: Any) -> int:
    """The work from which more threads than one are worth it, by a kernel's `plan.Sizes`."""
    return int(sizes.asleep if SLEEPY else sizes.serial)


def threads_for(work: int, sizes: Any) -> int:
    """Number of threads for so much work (`plan.Plan.work`)."""
    return threads() if work >= least(sizes) else 1


def threading_layer() -> str | None:
    """`omp`, `tbb` or `workqueue`; None while none has been started."""
    try:
        return str(numba.threading_layer())  # type: ignore[attr-defined]
    except ValueError:
        return None


def _run_alone(kernel: Kernel, items: int, args: tuple[Any, ...]) -> None:
    token = object()
    try:
        if _inside.setdefault("", token) is token and _started() > 1:
            kernel.parallel(items, *args)
            return
    finally:
        if _inside.get("") is token:
            del _inside[""]
    kernel.serial(items, *args)


def _started() -> int:
    """Number of threads, after starting Numba's threading layer if nobody has."""
    global _count, _one_at_a_time, _serial_only
    try:
        if threading_layer() is None:
            _start()
        _one_at_a_time = threading_layer() not in ("omp", "tbb")
        count = int(numba.get_num_threads())
        _count = getattr(parallel, "_get_num_threads", numba.get_num_threads)
        return count
    except Exception as cause:
        _serial_only = True
        reason = str(cause).partition("\n")[0]
        warnings.warn(f"fastbn runs on one thread: {reason}", RuntimeWarning, stacklevel=4)
        return 1


def _start() -> None:
    # Numba asks for multiprocessing's start method on the way, which settles it: set_start_method("spawn") after
    # the first batch norm would be a RuntimeError.
    method = multiprocessing.get_start_method(allow_none=True)
    try:
        numba.get_num_threads()
    finally:
        if method is None:
            multiprocessing.set_start_method(None, force=True)


def _before_fork() -> None:
    # A child forked while another thread compiles would wait for ever to compile, so the fork waits instead.
    _compiling.acquire()


def _after_fork_in_child() -> None:
    global _serial_only
    _serial_only |= threading_layer() in ("omp", "tbb") or bool(_inside)
    _inside.clear()
    _compiling.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_compiling.release, after_in_child=_after_fork_in_child)
