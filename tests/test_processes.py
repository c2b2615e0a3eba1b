"""The whole library under threads and forks: the right results with the same bits, and a clean end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = '''
import hashlib, multiprocessing, os, sys, threading, warnings
import numpy as np
import fastbn

# Python 3.12 warns of every fork in a process with threads; this test is about just that.
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

def digest(seed):
    """Forward and backward of arrays large enough for a parallel region, rows and columns."""
    rng = np.random.default_rng(seed)
    total = hashlib.sha256()
    for shape in ((8, 40, 130), (2, 2, 60_000), (1000, 70)):
        x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
        gamma, beta = rng.normal(size=(2, shape[1]))
        y, saved = fastbn.forward(x, gamma, beta)
        for array in (y, *fastbn.backward(dy, saved)):
            total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()

def in_threads(count, work):
    found, failed = [None] * count, []
    def call(k):
        try:
            found[k] = work(k)
        except BaseException as cause:
            failed.append(cause)
    threads = [threading.Thread(target=call, args=(k,)) for k in range(count)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not failed, failed
    return found

def in_fork(seed):
    """digest(seed), from a child made by os.fork."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, digest(seed).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        text = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return text

def in_pool(method):
    pool = multiprocessing.get_context(method).Pool(2)
    found = pool.map_async(digest, range(4)).get(200)
    pool.close()  # terminate() may kill a worker while it gives back the semaphore that Numba takes at import
    pool.join()
    return found

def main(first):
    want = in_threads(4, digest) if first == "threads" else [digest(seed) for seed in range(4)]
    assert len(set(want)) == 4
    for _ in range(3):
        assert in_threads(8, lambda k: digest(k % 4)) == 2 * want
    assert [in_fork(seed) for seed in range(4)] == want
    assert in_threads(1, in_fork) == want[:1]
    assert in_threads(4, lambda k: digest(k)) == want
    for method in ("fork", "spawn", "forkserver"):
        assert in_pool(method) == want, method
    assert in_threads(1, lambda k: in_pool("fork")) == [want]
    daemon = threading.Thread(target=lambda: [digest(k) for k in range(10_000)], daemon=True)
    daemon.start()  # the interpreter exits while it is inside a call
    print("fine")

if __name__ == "__main__":
    main(sys.argv[1])
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("first", ["threads", "main"])
@pytest.mark.parametrize("layer", ["omp", "workqueue", "tbb"])
def test_threads_and_forks(layer, first, tmp_path):
    libraries = Path(sys.prefix) / "lib"  # where pip puts libtbb, which Numba leaves to the loader to find
    if layer == "tbb" and not list(libraries.glob("libtbb.so*")):
        pytest.skip("no tbb in this environment: pip install tbb")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.run(
        [sys.executable, "-W", "error", str(script), first],
        env={**os.environ, "NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "4", "LD_LIBRARY_PATH": str(libraries)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    # Under tbb the C library under Numba says now and then, at a fork, that it could not join its threads.
    printed = [line for line in process.stdout.splitlines() if line and "Unable to join threads" not in line]
    assert printed == ["fine"], process.stderr
    assert process.returncode == 0
    # Numba says this of every fork from a thread under tbb, whatever the child does.
    said = [line for line in process.stderr.splitlines() if "Attempted to fork from a non-main thread" not in line]
    assert said == []
