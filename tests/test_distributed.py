"""Batch norm across processes: real ranks, under mpiexec and in torch.distributed's gloo, and threads as ranks."""

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import ranks_run

import fastbn
from fastbn import distributed, reference

RUN = str(Path(ranks_run.__file__))
MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or MPIEXEC is None, reason="needs fastbn[mpi]: mpi4py and mpiexec"
)
NAMES = [scenario.__name__ for scenario in ranks_run.SCENARIOS]


def run(command, seconds=120, backend="reference"):
    """The process, ended if it takes too long: a hang is a failure."""
    env = {**os.environ, "FASTBN_BACKEND": backend, "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=env)


def under_mpi(ranks, *words, shell=False, **more):
    own = [sys.executable, RUN, "mpi", *words]
    if shell:
        own = ["sh", "-c", " ".join(own) + "; sleep 10"]
    return run([MPIEXEC, "-n", str(ranks), *own], **more)


_results = {}


def results(key, make):
    """What came of all scenarios, run once."""
    if key not in _results:
        done = make()
        found = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
        _results[key] = json.loads(found[1]) if found else {"": done.stdout + done.stderr}
    return _results[key]


# Reasons: 2 the fewest; 3 and 5 fold ranks before and after; 4 two steps. One with the CPU kernels; the others need not
# wait for them to be compiled.
@needs_mpi
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ranks", "backend"), [(2, "auto"), (3, "reference"), (4, "reference"), (5, "reference")])
def test_across_mpi_ranks(ranks, backend, name):
    found = results((ranks, backend), lambda: under_mpi(ranks, backend=backend, seconds=300))
    assert found.get(name, found) is None


LOST = [
    # how, whether under a shell, what is printed
    # mpiexec sees the shell, which lives on: the others must notice by themselves
    ("killed", True, "which gave no answer"),
    ("stopped", False, "which gave no answer"),  # alive, and elsewhere
    ("raises", False, "which gave no answer"),  # outside of fastbn: it waits in MPI_Finalize, and so would the others
    ("leaves", False, "which gave no answer"),
]


@needs_mpi
@pytest.mark.parametrize(("how", "shell", "words"), LOST, ids=[how for how, *_ in LOST])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_lost_mpi_rank_is_an_error_on_all_others(how, shell, words, ranks):
    done = under_mpi(ranks, how, "1", shell=shell, seconds=60)
    assert done.returncode != 0
    lost = re.findall(r"LOST rank (\d) after ([\d.]+) s: (.*?)End the job", done.stdout)
    assert sorted(int(rank) for rank, *_ in lost) == list(range(ranks - 1)), done.stdout + done.stderr
    for _, seconds, text in lost:
        assert 1 <= float(seconds) < 10
        assert words in text
        assert f"for rank {ranks - 1}" in text
    assert done.stdout.count("can't be used any more") == ranks - 1


@needs_mpi
def test_a_killed_rank_ends_the_job():
    """mpiexec's own answer, when it sees it."""
    start = time.monotonic()
    done = under_mpi(4, "killed", "30", seconds=25)
    assert done.returncode != 0
    assert time.monotonic() - start < 20


def with_gloo(place, ranks, *words):
    commands = [[sys.executable, RUN, "torch", str(r), str(ranks), str(place / "meet"), *words] for r in range(ranks)]
    done = [None] * ranks

    def start(rank):
        done[rank] = run(commands[rank])

    threads = [threading.Thread(target=start, args=(r,)) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch.distributed")


@needs_torch
@pytest.mark.parametrize("name", NAMES)
def test_across_gloo_ranks(name, tmp_path):
    found = results("gloo", lambda: with_gloo(tmp_path, 3)[0])
    assert found.get(name, found) is None


@needs_torch
@pytest.mark.parametrize("how", ["killed", "leaves"])
def test_a_lost_gloo_rank_is_an_error_on_all_others(how, tmp_path):
    for rank, done in enumerate(with_gloo(tmp_path, 3, how, "5")[:2]):
        assert f"LOST rank {rank}" in done.stdout, done.stdout + done.stderr
        assert "other ranks can't be reached" in done.stdout


# In this process: threads as ranks.


class Meeting:
    """A communicator of one thread among several."""

    def __init__(self, rank, places, barrier):
        self.rank, self.places, self.barrier, self.gathers = rank, places, barrier, 0

    def exchange(self, data):
        self.places[self.rank] = data
        self.barrier.wait(30)
        found = list(self.places)
        self.barrier.wait(30)
        return found

    def allgather(self, data):
        self.gathers += 1
        found = self.exchange(data.copy())
        assert len({a.shape for a in found}) == 1, "frames of different sizes: another engine would hang"
        return found


def in_threads(number, work):
    """work(rank, communicator) in as many threads; their results."""
    places, barrier, out = [None] * number, threading.Barrier(number), [None] * number

    def one(rank):
        try:
            out[rank] = work(rank, Meeting(rank, places, barrier))
        except BaseException as error:
            out[rank] = error

    threads = [threading.Thread(target=one, args=(r,)) for r in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in out:
        if isinstance(result, BaseException):
            raise result
    return out


def test_a_count_that_is_a_fraction_is_that_of_all_ranks(rng):
    """Weights on one rank alone: the others took 4.3 for 4, and their running statistics went another way."""
    x, w = rng.normal(rng.normal(0, 2, 3), 1, (6, 3)), rng.uniform(0.1, 1, 6)

    def work(rank, comm):
        mine, weights = (x, w) if rank == 0 else (x[:0], None)
        _, saved = fastbn.forward(mine, weights=weights, comm=comm)
        summed = fastbn.moments(mine, weights=weights).allreduce(comm)
        return saved.moments, summed

    (one, other), (same, again) = in_threads(2, work)
    assert one.count == same.count == other.count == again.count == pytest.approx(w.sum(), rel=1e-15)
    np.testing.assert_array_equal(one.var(), same.var())
    alone = fastbn.normalize(x, fastbn.moments(x, weights=w))[1].moments
    assert alone.count == fastbn.moments(x, weights=w).count


WARNING_STATE = ("one_value_on_each_rank", "one_value_in_all")  # is the process's, not a thread's


@pytest.mark.parametrize("number", [2, 3, 4])
def test_any_object_with_allgather(number):
    scenarios = [s for s in ranks_run.SCENARIOS if s.__name__ not in WARNING_STATE]

    def work(rank, comm):
        ranks = fastbn.Ranks(comm)
        ranks.check()  # its size is known from here on
        ranks._engine.rank = rank
        return ranks_run.run_all(ranks, comm, scenarios)

    with fastbn.set_backend("reference"):
        for failures in in_threads(number, work):
            assert {name: text for name, text in failures.items() if text} == {}


def test_frames_grow_on_all_ranks_at_once():
    def work(rank, comm):
        ranks = fastbn.Ranks(comm)
        seen = []
        for channels in (2, 335, 336, 5, 2000):
            before = comm.gathers
            fastbn.forward(np.random.default_rng(rank).normal(size=(3, channels)), comm=ranks)
            seen.append(comm.gathers - before)
        return seen

    # 18 + 3 * 335 = 1023 numbers fit into the first frame; the fourth call is small again
    with fastbn.set_backend("reference"):
        assert in_threads(3, work) == [[1, 1, 2, 1, 2]] * 3


def test_second_order_is_refused_where_others_have_a_part_of_the_batch():
    """Their sums would be missing."""
    rng = np.random.default_rng(3)
    x, dy, u = rng.normal(2, 3, (3, 40, 5))
    gamma = rng.normal(1, 0.5, 5)

    def work(rank, comm):
        _, saved = fastbn.forward(x[20 * rank : 20 * rank + 20], gamma, comm=comm)
        for call in (lambda: fastbn.jvp(u, saved), lambda: fastbn.backward_backward(u, None, None, dy, saved)):
            with pytest.raises(ValueError, match=r"fastbn\.\w+: forward had a comm of 2 ranks, .* without comm"):
                call()
        return "refused"

    assert in_threads(2, work) == ["refused", "refused"]
    (alone,) = in_threads(1, lambda _, comm: fastbn.jvp(u, fastbn.forward(x, gamma, comm=comm)[1]))
    np.testing.assert_allclose(alone, fastbn.jvp(u, fastbn.forward(x, gamma)[1]), rtol=1e-12, atol=1e-12)


def test_an_error_of_the_engine_is_said_and_remembered():
    class Torn:
        def allgather(self, _data):
            raise ConnectionError("the cable is cut")

    comm = Torn()
    x = np.ones((3, 2))
    with pytest.raises(fastbn.RanksError, match=r"fastbn.forward: other ranks can't be reached: the cable is cut"):
        fastbn.forward(x, comm=comm)
    with pytest.raises(fastbn.RanksError, match=r"other ranks were lost before, and these ranks can't be used"):
        fastbn.forward(x, comm=comm)


@pytest.mark.parametrize("answer", [None, [], [np.zeros(3)], np.zeros((2, 3))])
def test_a_gather_that_gives_nonsense(answer):
    class Odd:
        def allgather(self, _data):
            return answer

    with pytest.raises(fastbn.RanksError, match=r"other ranks can't be reached: "):
        fastbn.forward(np.ones((3, 2)), comm=Odd())


def test_an_interrupted_call_is_the_end():
    class Slow:
        def allgather(self, _data):
            raise KeyboardInterrupt("Ctrl-C")

    ranks = fastbn.Ranks(Slow())
    with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
        fastbn.forward(np.ones((3, 2)), comm=ranks)
    with pytest.raises(fastbn.RanksError, match="a call was interrupted before"):
        ranks.check()


@pytest.mark.parametrize("comm", [object(), 3, "world", [1]])
def test_what_is_no_communicator(comm):
    with pytest.raises(TypeError, match=r"fastbn.forward: comm is .*; expected an mpi4py intracommunicator"):
        fastbn.forward(np.ones((3, 2)), comm=comm)
    with pytest.raises(TypeError, match=r"fastbn.BatchNorm: comm is "):
        fastbn.BatchNorm(2, comm=comm)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "soon", None])
def test_a_timeout_is_a_number_above_0(timeout):
    with pytest.raises(ValueError, match=r"fastbn.Ranks: timeout is "):
        fastbn.Ranks(distributed.ALONE, timeout=timeout)


def test_groups_and_ranks_are_refused():
    with pytest.raises(ValueError, match=r"fastbn.forward: groups and comm are both given"):
        fastbn.forward(np.ones((4, 2)), groups=2, comm=distributed.ALONE)


def test_normalize_by_other_moments_is_refused():
    x = np.ones((4, 2))
    with pytest.raises(ValueError, match=r"fastbn.normalize: moments has channels of shape \(3,\); expected \(2,\)"):
        fastbn.normalize(x, fastbn.moments(np.ones((4, 3))))
    with pytest.raises(TypeError, match=r"fastbn.normalize: moments is tuple"):
        fastbn.normalize(x, (0, 1))


@pytest.mark.parametrize("mean", [4, 1e9])  # a mean of 1e9 has a lo that counts
def test_one_rank_is_no_different_from_none(mean):
    rng = np.random.default_rng(3)
    x, dy, gamma = rng.normal(mean, 2, (6, 3, 5)), rng.normal(size=(6, 3, 5)), rng.normal(1, 0.3, 3)
    want, whole = reference.forward(x, gamma)
    for y, saved in (
        fastbn.forward(x, gamma, comm=distributed.ALONE),
        fastbn.normalize(x, fastbn.moments(x), gamma),
        fastbn.normalize(x, fastbn.moments(x).allreduce(distributed.ALONE), gamma),
    ):
        np.testing.assert_allclose(y, want, atol=1e-14)
        for a, b in zip(fastbn.backward(dy, saved), reference.backward(dy, whole), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-13)


def messages_of(rng, number, channels=3):
    """Of ranks with random counts, one of them without values."""
    made = []
    for rank in range(number):
        message = np.zeros(distributed.HEADER + 3 * channels)
        message[distributed._COUNT] = 0 if rank == 1 else rng.integers(1, 9)
        message[distributed._FIRST : distributed._SECOND] = rank, distributed.FORWARD, 1, channels, 3, 1e-5, 1, 0
        message[distributed.HEADER :] = rng.normal(1e6, 1, 3 * channels)
        made.append(message)
    return made


@pytest.mark.parametrize("number", range(1, 18))
def test_the_tree_merges_all_and_merges_neighbours(number, monkeypatch):
    """Each rank once, lower ranks first: what MPI's pairs do, of any number of ranks."""
    order = []
    monkeypatch.setattr(distributed, "merged", lambda a, b: order.append((a, b)) or a + b)
    assert distributed.tree([[r] for r in range(number)]) == list(range(number))
    assert len(order) == number - 1


def test_what_is_wrong_stays_wrong():
    a, b, c, d = messages_of(np.random.default_rng(1), 4)
    c[distributed._FIRST + distributed._CHANNELS] = 7
    wrong = distributed.tree([a, b, c, d])
    assert wrong[distributed._STATE] == distributed._DIFFER
    assert wrong.size == distributed.HEADER
    text = distributed._complaint(wrong)
    assert "rank 2 is at forward pass 1 with 7 channels of float64, eps 1e-05; rank 3 at forward pass 1 with 3" in text


def test_what_an_empty_rank_holds_does_not_count():
    made = messages_of(np.random.default_rng(2), 4)
    made[1][distributed.HEADER :] = np.nan
    found = distributed.tree(made)
    assert np.isfinite(found).all()
    assert found[distributed._COUNT] == sum(m[distributed._COUNT] for m in made)


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_on_one_rank_is_so_in_all(rank, bad):
    made = messages_of(np.random.default_rng(2), 4, 2)
    made[rank][distributed._COUNT] = 3
    made[rank][distributed.HEADER :: 2] = bad, 0, np.nan  # of the first channel
    hi, lo, m2 = distributed.tree(made)[distributed.HEADER :].reshape(3, 2)
    assert list(np.isfinite(hi + lo)) == list(np.isfinite(m2)) == [False, True]


def test_merging_is_as_exact_as_the_pair():
    """Mean 1e9, deviation 1: the merged mean, hi + lo, is right to 1e-13 of a deviation."""
    from fractions import Fraction

    rng = np.random.default_rng(5)
    values = [rng.normal(1e9, 1, n) for n in (5, 1, 8)]
    made = messages_of(rng, 3, 1)
    for message, v in zip(made, values, strict=True):
        exact = sum(map(Fraction, v)) / len(v)
        hi = float(exact)
        message[distributed._COUNT] = len(v)
        message[distributed.HEADER :] = (
            hi,
            float(exact - Fraction(hi)),
            float(sum((Fraction(x) - exact) ** 2 for x in v)),
        )
    found = distributed.tree(made)
    every = [Fraction(x) for v in values for x in v]
    exact = sum(every) / len(every)
    hi, lo, m2 = map(Fraction, found[distributed.HEADER :])
    assert abs(float(hi + lo - exact)) < 1e-13
    assert float(m2) == pytest.approx(float(sum((x - exact) ** 2 for x in every)), rel=1e-14)


# NCCL, against a double of what CuPy documents.


class Stream:
    done, ptr = True, 99

    def __init__(self, non_blocking=False):
        assert non_blocking

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class DeviceArray(np.ndarray):
    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.ctypes.data)

    def get(self, stream):
        assert isinstance(stream, Stream)
        return np.array(self)


@pytest.fixture
def cupy(monkeypatch):
    """CuPy's documented calls (docs.cupy.dev: NCCLBackend.all_gather, NcclCommunicator.allGather); two equal ranks."""

    class NcclCommunicator:
        def rank_id(self):
            return 1

        def size(self):
            return 2

        def allGather(self, sendbuf, recvbuf, count, datatype, stream):
            assert (datatype, stream) == (8, Stream.ptr)
            import ctypes

            ctypes.memmove(recvbuf, sendbuf, 8 * count)
            ctypes.memmove(recvbuf + 8 * count, sendbuf, 8 * count)

    class NCCLBackend:
        rank, _n_devices = 1, 2

        def all_gather(self, in_array, out_array, count, stream=None):
            assert in_array.size == count
            assert isinstance(stream, Stream)
            out_array[:count] = out_array[count:] = in_array

    nccl = types.SimpleNamespace(NcclCommunicator=NcclCommunicator, NCCL_FLOAT64=8)
    double = types.ModuleType("cupy")
    double.cuda = types.SimpleNamespace(Stream=Stream, nccl=nccl)
    double.asarray = lambda a: np.array(a).view(DeviceArray)
    double.empty = lambda n, dtype: np.empty(n, dtype).view(DeviceArray)
    monkeypatch.setitem(sys.modules, "cupy", double)
    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", nccl)
    monkeypatch.setitem(sys.modules, "cupyx.distributed", types.SimpleNamespace(NCCLBackend=NCCLBackend))
    return types.SimpleNamespace(NcclCommunicator=NcclCommunicator, NCCLBackend=NCCLBackend)


@pytest.mark.parametrize("kind", ["NcclCommunicator", "NCCLBackend"])
def test_nccl_by_its_documented_interface(kind, cupy):
    moments = fastbn.Moments(3, [1.0, 2.0], [4.0, 6.0])
    ranks = fastbn.Ranks(getattr(cupy, kind)())
    assert (ranks.rank, ranks.size) == (1, 2)
    both = moments.allreduce(ranks)
    assert both.count == 6
    np.testing.assert_allclose(both.exact()[0], [1, 2])
    np.testing.assert_allclose(both.exact()[1], [4 / 3, 2])


@pytest.mark.parametrize("kind", ["NcclCommunicator", "NCCLBackend"])
def test_nccl_that_does_not_end(kind, cupy, monkeypatch):
    monkeypatch.setattr(Stream, "done", False)
    ranks = fastbn.Ranks(getattr(cupy, kind)(), timeout=0.05)
    with pytest.raises(fastbn.RanksError, match=r"no answer within 0.05 s. Abort the communicator"):
        fastbn.Moments(3, [1.0], [4.0]).allreduce(ranks)


def test_the_double_has_the_real_signature():
    library = pytest.importorskip("cupyx.distributed", exc_type=ImportError)
    found = list(inspect.signature(library.NCCLBackend.all_gather).parameters)
    assert found == ["self", "in_array", "out_array", "count", "stream"]


# The benchmark's model and page, and the demo.

FOUND = Path(__file__).parents[1] / "bench" / "results" / "ranks-2cores.json"
PAGE = Path(__file__).parents[1] / "bench" / "RANKS.md"


def test_the_page_shows_what_was_measured():
    """Its tables are those of the committed run."""
    from fastbn.bench import ranks as bench

    text = PAGE.read_text(encoding="utf-8")
    assert bench.with_tables(text, json.loads(FOUND.read_text(encoding="utf-8"))) == text


def test_the_model_of_messages():
    from fastbn.bench import ranks as bench

    line = bench.Line(10e-6, 1e-9, 5e-6, 1e-8)
    for channels in (64, 2048):
        assert bench.doubling(line, 2, channels) == pytest.approx(bench.gather(line, 2, channels))
        for ranks in (4, 64, 4096):
            assert bench.doubling(line, ranks, channels) < bench.tree(line, ranks, channels)
            assert bench.doubling(line, ranks, channels) < bench.gather(line, ranks, channels)
    assert [bench.steps(p) for p in (1, 2, 3, 4, 5, 8)] == [0, 1, 3, 2, 4, 3]


@needs_mpi
def test_steps_and_bytes_of_the_model_are_those_that_are_sent():
    """On rank 0 of 2, 3, 4: all messages of a layer's forward and backward."""
    from fastbn.bench import ranks as bench

    code = (
        "import numpy as np, fastbn; from mpi4py import MPI; r = fastbn.Ranks(MPI.COMM_WORLD); "
        "y, s = fastbn.forward(np.ones((2, 7)), comm=r); fastbn.backward(y, s); "
        "r.rank or print('SENT', r.messages, r.bytes_sent)"
    )
    for ranks, sent in ((2, 1), (3, 2), (4, 2)):  # of 3, rank 0 takes, exchanges, and sends back: two that it sends
        done = run([MPIEXEC, "-n", str(ranks), sys.executable, "-c", code])
        found = re.search(r"SENT (\d+) (\d+)", done.stdout)
        assert found, done.stdout + done.stderr
        assert int(found[1]) == 2 * sent
        assert int(found[2]) == sent * (bench.size(7) + bench.size(7, 2))


@needs_mpi
def test_the_demo_on_ranks(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "fastbn", "demo", "--ranks", "2", "--quick", "--out", str(tmp_path)]
    done = run([*command, "--backend", "reference"], seconds=240)
    assert done.returncode == 0, done.stderr
    assert "test accuracy that synchronized statistics win" in (tmp_path / "ranks.md").read_text(encoding="utf-8")
    assert (tmp_path / "ranks.png").stat().st_size > 10_000


def test_the_demo_without_mpi_says_what_to_install(tmp_path, monkeypatch, capsys):
    import fastbn.demo
    from fastbn.__main__ import main

    monkeypatch.setattr(fastbn.demo, "launcher", lambda: None)
    monkeypatch.setattr(fastbn.demo, "importable", lambda _: True)
    assert main(["demo", "--ranks", "2", "--out", str(tmp_path)]) == 1
    assert "pip install 'fastbn[demo,mpi]'" in capsys.readouterr().err
