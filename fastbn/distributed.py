"""Batch norm across processes: whose statistics are those of the whole batch, however it is spread.

A pass makes one message of each rank, and all of them into one: count, mean and M2 of C channels by Chan's formula
forward, two sums of C channels backward. The tree in which they merge depends on the number of ranks alone, so that
every rank gets the same bits, in every run and over every engine.

A message says what its sender is about (which pass, of how many channels, of what type), and messages that don't fit
merge into one that says so. It reaches all ranks as any other would: they all raise the same error, and none waits. Two
kinds of engines carry messages:

- over MPI they travel between pairs of ranks (recursive doubling), each with its own size, under a communicator of our
  own. Receivers ask for the size first. That takes as long as MPI_Allreduce with the same formula as its operation, and
  less than MPI_Allgather (bench/RANKS.md); but these two can hang where sizes differ, and they can't be given up.
- all others gather frames: arrays of one size that all ranks know, because they have all seen the same messages.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from importlib import import_module
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from .arguments import describe, finite, whole
from .arrays import family_of_values, place_of

Result = TypeVar("Result")
Steps = Generator["np.ndarray | None", None, None]  # of an engine: None till the merged message is there


class Alone:
    """The `comm` of a batch that is on one rank."""

    def allgather(self, data: np.ndarray) -> list[np.ndarray]:
        return [data]


ALONE = Alone()


class RanksError(RuntimeError):
    """Ranks that share a batch don't agree, or one of them doesn't answer. Every rank that waits raises it.

    After a disagreement all ranks may go on, as all know of it. After silence they can't: end the job, under MPI by
    `MPI.COMM_WORLD.Abort()`, which `python -m mpi4py script.py` does for any error that nobody catches.

    >>> import numpy as np, fastbn
    >>> class Mirror:  # the other rank is at a backward pass of 7 channels
    ...     def allgather(self, data):
    ...         other = data.copy()
    ...         other[4:7] = 2, 9, 7
    ...         return data, other
    >>> fastbn.forward(np.ones((4, 2), np.float32), comm=Mirror())
    Traceback (most recent call last):
    ...
    fastbn.distributed.RanksError: fastbn.forward: ranks don't agree: rank 0 is at forward pass 1 with 2 channels of \
float32, eps 1e-05; rank 1 at backward pass of forward 9 with 7 channels of float32, eps 1e-05. All must make the same \
calls in the same order
    """


class Gather(Protocol):
    """What any object needs to serve as `comm`: one method.

    `data` is a float64 array (n,), of one n on all ranks; the result is a sequence of these of all ranks, in an order
    that is the same everywhere. It should raise where a rank is gone: nobody else looks at the clock then. (mpi4py's
    `comm.allgather` is such a method; its communicators are taken as they are, and their ranks can't be waited for in
    vain.)
    """

    def allgather(self, data: np.ndarray, /) -> Any: ...


# A message: the header, and then rows of C numbers (or, from a rank that failed, text).
_STATE, _COUNT, _FIRST, _SECOND = 0, 1, 2, 10  # of the header; what two senders that don't fit are about
_RANK, _KIND, _PASS, _CHANNELS, _DTYPE, _EPS, _SCALE, _ZERO = range(8)  # of what one is about
HEADER = 18
_NOTHING = (0.0,) * (HEADER - _SECOND)
_FINE, _DIFFER, _FAILED, _SILENT = range(4)
MOMENTS, BACKWARD, FORWARD, CHECK, FAILURE = range(1, 6)
_ROWS = {FORWARD: 3, MOMENTS: 3, BACKWARD: 2, CHECK: 0}
_DTYPES = "float16", "bfloat16", "float32", "float64", "uint8", "int8", "uint16", "int16"
FRAME = 1024  # numbers of the first frame: 335 channels; 8 KB take hardly longer than 8 bytes
SPIN, YIELD = 20, 2000  # polls before the processor is offered to others, and before sleeping 50 us


class Ranks:
    """The processes that share a batch; this one's end of the line.

    Functions take the communicator itself as `comm`, and make one of these with its defaults, which they keep. Make it
    yourself to say how long to wait. All ranks must do so, and make all calls, in the same order; one thread at a time.

    Parameters
    ----------
    comm : mpi4py communicator, torch.distributed group, CuPy NCCL communicator, or `fastbn.distributed.Gather`
        mpi4py's is duplicated, so that its messages and ours don't meet. CuPy's are `cupyx.distributed.NCCLBackend` and
        `cupy.cuda.nccl.NcclCommunicator`.
    timeout : float
        Seconds to wait for other ranks, in each call, before RanksError is raised. For a `Gather` it is its own affair.

    Attributes
    ----------
    rank, size : int
        Of a `Gather`, known after the first call (-1 before).
    calls, messages, bytes_sent : int
        What was sent so far.

    Raises
    ------
    TypeError, ValueError
        For a `comm` of another kind; for a timeout that is no number above 0.

    >>> import fastbn
    >>> class Alone:
    ...     def allgather(self, data):
    ...         return [data]
    >>> fastbn.Ranks(Alone(), timeout=5)
    Ranks(Alone, timeout=5.0)
    """

    def __init__(self, comm: Any, *, timeout: float = 600.0) -> None:
        number = finite(timeout)
        if number is None or number <= 0:
            raise ValueError(f"fastbn.Ranks: timeout is {describe(timeout)}; expected seconds, more than 0")
        self.timeout = number
        self.calls = self.messages = self.bytes_sent = 0
        self.comm = comm
        self._broken = ""
        self._engine = _engine("fastbn.Ranks", comm, self)

    @property
    def rank(self) -> int:
        return int(self._engine.rank)

    @property
    def size(self) -> int:
        return int(self._engine.size)

    def __repr__(self) -> str:
        return f"Ranks({type(self.comm).__name__}, timeout={self.timeout})"

    def check(self) -> None:
        """Wait for all ranks to come here; RanksError if one is at another call. For the end of an epoch, say.

        A rank that made one call less than the others meets their last call here, with which this one doesn't fit.
        """
        self.start("fastbn.Ranks.check", CHECK, (), 0.0, 0, np.dtype(np.float32), 0.0).wait()

    def start(
        self, where: str, kind: int, rows: Any, count: float, channels: int, dtype: Any, eps: float,
        number: int | None = None, units: tuple[float, float] | None = None,
    ) -> Pending[np.ndarray]:  # fmt: skip
        """Send this rank's message; the result is the merged one. `number` is that of the pass that it belongs to."""
        self.calls += 1
        size = HEADER + _ROWS[kind] * channels
        message = np.empty(size)
        number = self.calls if number is None else number
        scale, zero = units or (1.0, 0.0)
        about = (self.rank, kind, number, channels, _code(dtype), eps, scale, zero)
        message[:HEADER] = (_FINE, count, *about, *_NOTHING)
        if channels:
            message[HEADER:].reshape(_ROWS[kind], channels)[...] = rows
        return self._send(where, message)

    def fail(self, where: str, error: BaseException) -> None:
        """Tell the others that this rank raises `error` in place of taking part in the call they are at."""
        if self._broken:
            return
        self.calls += 1
        text = f"{type(error).__name__}: {error}".encode()[:1000]
        message = np.zeros(HEADER + -(-len(text) // 8))
        message[_STATE] = _FAILED
        message[_FIRST : _FIRST + 2] = self.rank, FAILURE
        message[HEADER:] = np.frombuffer(text.ljust(8 * (message.size - HEADER), b"\0"))
        with contextlib.suppress(RanksError):  # that says what `error` says
            self._send(where, message).wait()

    @contextlib.contextmanager
    def joined(self, where: str) -> Iterator[None]:
        """For a call that fails before it has sent anything: the others are waiting for it."""
        before = self.calls
        try:
            yield
        except Exception as error:
            if self.calls == before:
                self.fail(where, error)
            raise

    def _send(self, where: str, message: np.ndarray) -> Pending[np.ndarray]:
        if self._broken:
            raise RanksError(f"{where}: {self._broken} before, and these ranks can't be used any more. End the job")
        return Pending(self, where, self._engine, message, self.calls)

    def lost(self, reason: str) -> None:
        self._broken = reason


class Pending(Generic[Result]):
    """A result that is on its way between ranks: `ready()` looks without waiting, and `wait()` returns it.

    Calls may be started one after the other and waited for later. Messages move when a rank looks or waits.
    """

    def __init__(self, ranks: Ranks, where: str, engine: Any, message: np.ndarray, number: int) -> None:
        self._ranks, self._where = ranks, where
        self.limit = math.inf  # when to give up; known once somebody waits
        self._result: Any = None
        self._then: Callable[[Any], Any] | None = None
        self._steps: Steps | None = engine.reduce(message, number, self)
        self._error: RanksError | None = None
        self.ready()

    def then(self, function: Callable[[Result], Any]) -> Pending[Any]:
        """The same, with what `function` makes of the result."""
        self._then = function
        return self

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        if self._steps is None:
            return True
        try:
            found = next(self._steps)
        except Exception as cause:  # of the engine: a connection that is gone, say
            found, self._error = np.empty(0), RanksError(f"{self._where}: other ranks can't be reached: {cause}")
            self._error.__cause__ = cause
            self._ranks.lost("other ranks were lost")
        except BaseException:  # Ctrl-C: the others get no answer from here
            self._ranks.lost("a call was interrupted")
            raise
        if found is None:
            return False
        self._steps = None
        if self._error is None and found[_STATE] != _FINE:
            self._error = RanksError(f"{self._where}: {_complaint(found)}")
            if found[_STATE] == _SILENT:
                self._ranks.lost("a rank gave no answer")
        self._result = found
        return True

    def wait(self) -> Result:
        """The result. RanksError: ranks don't agree, or one gave no answer within the timeout."""
        if self._steps is not None:
            self.limit = time.monotonic() + self._ranks.timeout
            try:
                self._poll()
            except BaseException:  # Ctrl-C: the others get no answer from here
                self._ranks.lost("a call was interrupted")
                raise
        if self._error is not None:
            raise self._error
        if self._then is not None:
            self._result, self._then = self._then(self._result), None
        result: Result = self._result
        return result

    def _poll(self) -> None:
        polls = 0
        while not self.ready():
            polls += 1
            if polls > YIELD:
                time.sleep(50e-6)
            elif polls > SPIN:
                _offer()


_offer: Callable[[], Any] = getattr(os, "sched_yield", lambda: time.sleep(0))


def ranks_of(where: str, comm: Any) -> Ranks:
    """Those of a communicator, made on first use."""
    if isinstance(comm, Ranks):
        return comm
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is not None and isinstance(comm, MPI.Comm):
        global _mpi_key  # an attribute belongs to the communicator, however many handles there are
        if _mpi_key is None:
            _mpi_key = MPI.Comm.Create_keyval()
        ranks = comm.Get_attr(_mpi_key)
        if ranks is None:
            ranks = Ranks(comm)
            comm.Set_attr(_mpi_key, ranks)
        return ranks  # type: ignore[no-any-return]
    if id(comm) not in _known:
        _engine_kind(where, comm)
        _known[id(comm)] = comm, Ranks(comm)
    return _known[id(comm)][1]


_mpi_key: Any = None
_known: dict[int, tuple[Any, Ranks]] = {}  # communicators are few, and some can't be referred to weakly


def _engine_kind(where: str, comm: Any) -> str:
    """Found by type, among libraries that are imported already."""
    for kind, module, names in (
        ("mpi", "mpi4py.MPI", ("Intracomm",)),
        ("torch", "torch.distributed", ("ProcessGroup",)),
        ("nccl", "cupyx.distributed", ("NCCLBackend",)),
        ("nccl", "cupy.cuda.nccl", ("NcclCommunicator",)),
    ):
        library = sys.modules.get(module)
        if library is not None and isinstance(comm, tuple(getattr(library, n) for n in names if hasattr(library, n))):
            return kind
    if callable(getattr(comm, "allgather", None)) and not hasattr(comm, "Allgather"):  # an intercommunicator has both
        return "gather"
    raise TypeError(
        f"{where}: comm is {describe(comm)}; expected an mpi4py intracommunicator, a torch.distributed group, a CuPy "
        "NCCL communicator, or an object with a method allgather(data). For the group of all, pass "
        "torch.distributed.group.WORLD or mpi4py.MPI.COMM_WORLD"
    )


def _engine(where: str, comm: Any, ranks: Ranks) -> Any:
    return {"mpi": _Pairs, "torch": _Torch, "nccl": _Nccl, "gather": _Frames}[_engine_kind(where, comm)](comm, ranks)


@functools.lru_cache(maxsize=64)
def _code(dtype: Any) -> int:
    name = str(dtype).rpartition(".")[2]  # torch.float32
    return _DTYPES.index(name) if name in _DTYPES else -1


# What two messages come to.


def merged(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One message of two, `a` of the lower ranks. What is wrong stays so."""
    if a[_STATE] != _FINE:
        return a
    if b[_STATE] != _FINE:
        return b
    na, nb = float(a[_COUNT]), float(b[_COUNT])
    kind = int(a[_FIRST + _KIND])
    if kind == MOMENTS == b[_FIRST + _KIND] and (na == 0) != (nb == 0):  # a rank without values knows no type of them
        a, b = a.copy(), b.copy()
        (a if na == 0 else b)[_FIRST + _DTYPE] = (b if na == 0 else a)[_FIRST + _DTYPE]
    if a[_FIRST + 1 : _SECOND].tobytes() != b[_FIRST + 1 : _SECOND].tobytes():
        wrong = np.zeros(HEADER)
        wrong[_STATE] = _DIFFER
        wrong[_FIRST:_SECOND], wrong[_SECOND:] = a[_FIRST:_SECOND], b[_FIRST:_SECOND]
        return wrong
    both = a.copy()
    both[_COUNT] = na + nb
    with np.errstate(all="ignore"):  # Inf - Inf is NaN, and meant to be
        if kind == BACKWARD:
            both[HEADER:] += b[HEADER:]
        elif na == 0:  # no values, and means that mean nothing
            both[HEADER:] = b[HEADER:]
        elif nb != 0 and kind != CHECK:
            _merge_moments(na, a[HEADER:].reshape(3, -1), nb, b[HEADER:].reshape(3, -1), both[HEADER:].reshape(3, -1))
    return both


def _merge_moments(na: float, a: np.ndarray, nb: float, b: np.ndarray, both: np.ndarray) -> None:
    """(3, C): mean as hi + lo, and M2 (Chan, Golub & LeVeque 1983). 10 us for 256 channels."""
    part = nb / (na + nb)
    delta = (b[0] - a[0]) + (b[1] - a[1])
    step = delta * part
    step += a[1]
    hi = a[0] + step  # and what it was rounded by, exactly (Knuth)
    back = hi - a[0]
    lo = (a[0] - (hi - back)) + (step - back)
    both[0], both[1] = hi, lo
    delta *= delta
    delta *= na * part
    delta += a[2]
    delta += b[2]
    both[2] = delta


def tree(messages: list[np.ndarray]) -> np.ndarray:
    """All messages as one, in the order of recursive doubling."""
    rest = len(messages) - _power_below(len(messages))
    level = [merged(messages[2 * i], messages[2 * i + 1]) for i in range(rest)] + messages[2 * rest :]
    while len(level) > 1:
        level = [merged(a, b) for a, b in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def _power_below(n: int) -> int:
    """The largest power of 2 that is no more than n."""
    return 1 << (n.bit_length() - 1)


def _complaint(message: np.ndarray) -> str:
    first, second = message[_FIRST:_SECOND], message[_SECOND:HEADER]
    who = int(first[_RANK])
    if message[_STATE] == _DIFFER:
        return (
            f"ranks don't agree: rank {who} is at {_about(first)}; rank {int(second[_RANK])} at {_about(second)}. "
            "All must make the same calls in the same order"
        )
    if message[_STATE] == _FAILED:
        text = message[HEADER:].tobytes().rstrip(b"\0").decode(errors="replace")
        return f"rank {who} failed, so that there are no statistics of the whole batch. It raises {text}"
    return (
        f"rank {who} waited {first[_PASS]:g} s for rank {int(first[_CHANNELS])}, which gave no answer. It has ended, "
        "hangs, or makes fewer calls. End the job; for ranks that need longer pass comm=fastbn.Ranks(comm, timeout=...)"
    )


def _about(what: np.ndarray) -> str:
    kind, number, channels, code = (int(what[i]) for i in (_KIND, _PASS, _CHANNELS, _DTYPE))
    dtype = _DTYPES[code] if 0 <= code < len(_DTYPES) else "another type"
    if kind == CHECK:
        return f"Ranks.check, call {number}"
    name = {FORWARD: "forward pass", BACKWARD: "backward pass of forward", MOMENTS: "Moments.allreduce, call"}[kind]
    text = f"{name} {number} with {channels} channel{'s' * (channels != 1)} of {dtype}"
    if kind != MOMENTS:
        text += f", eps {what[_EPS]:g}"
    if (what[_SCALE], what[_ZERO]) != (1, 0):
        text += f", scale {what[_SCALE]:g} and zero point {what[_ZERO]:g}"
    return text


# What batchnorm and moments ask for.


class Shared(NamedTuple):
    """Of a Saved: whose batch its statistics are of."""

    ranks: Ranks
    number: int  # of the forward pass
    values: float  # of a channel on all ranks: how many, or the sum of their weights
    eps: float


def statistics(
    where: str, ranks: Ranks, table: np.ndarray, count: float, dtype: Any, eps: float, units: tuple[float, float] | None
) -> tuple[Shared, np.ndarray]:
    """Rows mean hi, mean lo and variance (3, C) of all ranks' values, from those of this rank's."""
    rows = table[:3].copy()
    with np.errstate(all="ignore"):
        rows[2] *= count
    found = ranks.start(where, FORWARD, rows, count, rows.shape[1], dtype, eps, units=units).wait()
    total = float(found[_COUNT])
    rows = found[HEADER:].reshape(3, -1)
    with np.errstate(all="ignore"):
        rows[2] /= total or 1.0
    return Shared(ranks, ranks.calls, total, eps), rows


def sums(where: str, shared: Shared, local: np.ndarray, dtype: Any) -> np.ndarray:
    """(2, C) of all ranks, from those of this one."""
    found = shared.ranks.start(
        where, BACKWARD, local, 0.0, local.shape[1], dtype, shared.eps, shared.number
    ).wait()  # fmt: skip
    return found[HEADER:].reshape(local.shape)


def rows_of(moments: Any) -> np.ndarray:
    """Mean hi, mean lo and M2 (3, C)."""
    host = family_of_values(moments._hi).host
    hi, m2 = host(moments._hi).reshape(-1), host(moments._m2).reshape(-1)
    return np.stack([hi, np.zeros_like(hi) if moments._lo is None else host(moments._lo).reshape(-1), m2])


def allreduced(moments: Any, comm: Any) -> Pending[Any]:
    """Those of all ranks, for `Moments.allreduce`."""
    where = "fastbn.Moments.allreduce"
    ranks = ranks_of(where, comm)
    family, device = place_of(moments._hi)
    rows = rows_of(moments)

    def finish(found: np.ndarray) -> Any:
        count = float(found[_COUNT])
        hi, lo, m2 = found[HEADER:].reshape(3, *moments.shape)
        hi, lo, m2 = (family.put(a, device) for a in (hi, lo, m2))
        dtype = np.float64 if found[_FIRST + _DTYPE] == _DTYPES.index("float64") else np.float32
        return moments.found(whole(count), hi, m2, dtype, lo)  # weighted on another rank, it may be a fraction

    return ranks.start(where, MOMENTS, rows, moments.count, rows.shape[1], moments.dtype, 0.0).then(finish)


# Engines.


class _Pairs:
    """MPI: recursive doubling between pairs of ranks.

    With P ranks and p the largest power of 2 among them, the first 2 (P - p) ranks merge two by two, so that p are
    left; in step k each exchanges with the one 2^k away, and both make the same merged message of the two.
    """

    def __init__(self, comm: Any, ranks: Ranks) -> None:
        from mpi4py import MPI

        self._MPI, self._ranks = MPI, ranks
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._comm, self._duplicated = comm, None
        if self.size > 1:
            self._comm, self._duplicated = comm.Idup()
        self._grace = min(1.0, 0.1 * ranks.timeout)

    def reduce(self, message: np.ndarray, number: int, pending: Pending[Any]) -> Steps:
        sent: list[Any] = []
        tag, rank = number % 32768, self.rank
        if self._duplicated is not None:
            while not self._duplicated.Test():
                if time.monotonic() > pending.limit:
                    message = self._silence(-1)
                    yield message
                    return
                yield None
            self._duplicated = None
        rest = self.size - _power_below(self.size)
        paired = rank < 2 * rest
        step = 0
        if paired and rank % 2:
            sent.append(self._give(message, rank - 1, tag))
            message = yield from self._take(rank - 1, tag, pending, step + self.size.bit_length())
        else:
            if paired:
                message = merged(message, (yield from self._take(rank + 1, tag, pending, step)))
            place, distance = (rank // 2 if paired else rank - rest), 1
            while distance < self.size - rest:
                step += 1
                other = place ^ distance
                partner = 2 * other if other < rest else other + rest
                sent.append(self._give(message, partner, tag))
                found = yield from self._take(partner, tag, pending, step)
                message = merged(message, found) if place < other else merged(found, message)
                distance *= 2
            if paired:
                sent.append(self._give(message, rank + 1, tag))
        while message[_STATE] != _SILENT and not all(request.Test() for request, _ in sent):
            if time.monotonic() > pending.limit + self._grace * (step + 1):
                message = self._silence(sent[0][1])
                break
            yield None
        yield message

    def _give(self, message: np.ndarray, to: int, tag: int) -> tuple[Any, int]:
        self._ranks.messages += 1
        self._ranks.bytes_sent += message.nbytes
        return self._comm.Isend([message, self._MPI.DOUBLE], to, tag), to

    def _take(self, source: int, tag: int, pending: Pending[Any], step: int) -> Generator[None, None, np.ndarray]:
        """The message of one rank. One that doesn't come is replaced by one that says so, for all who come after.

        Those who wait for us in later steps are told: they wait longer by a grace, and hear whose fault it is.
        """
        status = self._MPI.Status()
        while (handle := self._comm.Improbe(source, tag, status)) is None:
            if time.monotonic() > pending.limit + self._grace * step:
                return self._silence(source)
            yield None
        message = np.empty(status.Get_count(self._MPI.DOUBLE))
        handle.Recv([message, self._MPI.DOUBLE])
        return message

    def _silence(self, whose: int) -> np.ndarray:
        message = np.zeros(HEADER)
        message[_STATE] = _SILENT
        message[_FIRST : _FIRST + 4] = self.rank, FAILURE, self._ranks.timeout, whose
        return message


class _Frames:
    """Any gather: arrays (n,) of one n, which grows when a message doesn't fit, on all ranks at once.

    They all see all messages' sizes. The first message of a larger size takes two gathers, all others one.
    """

    rank, size = -1, -1

    def __init__(self, comm: Any, ranks: Ranks) -> None:
        self._comm, self._ranks, self._room = comm, ranks, FRAME

    def gathered(self, frame: np.ndarray, pending: Pending[Any]) -> Iterator[Any]:  # noqa: ARG002
        """The frames of all ranks, and None before."""
        yield self._comm.allgather(frame)

    def reduce(self, message: np.ndarray, number: int, pending: Pending[Any]) -> Steps:  # noqa: ARG002
        while True:
            room = self._room
            frame = np.zeros(1 + room)
            frame[0] = message.size
            frame[1 : 1 + message.size] = message[:room]
            self._ranks.messages += 1
            self._ranks.bytes_sent += frame.nbytes
            frames: Any = None
            for found in self.gathered(frame, pending):
                if found is None:
                    yield None
                else:
                    frames = [np.asarray(f, np.float64) for f in found]
            if not frames or any(f.shape != frame.shape for f in frames):
                raise ValueError(
                    f"allgather returned {describe(frames)}; expected an array ({frame.size},) of each rank"
                )
            self.size = len(frames)
            if max(int(f[0]) for f in frames) <= room:
                break
            self._room = max(room, 1 << (max(int(f[0]) for f in frames) - 1).bit_length())
        messages = [f[1 : 1 + int(f[0])].copy() for f in frames]
        if self.rank < 0:  # a Gather's: which of them is ours isn't known, and needn't be
            for rank, each in enumerate(messages):
                each[_FIRST + _RANK] = rank
        yield tree(messages)


class _Torch(_Frames):
    """A torch.distributed group: gloo's messages are tensors in main memory, NCCL's are copied to the device."""

    def __init__(self, comm: Any, ranks: Ranks) -> None:
        super().__init__(comm, ranks)
        self.rank, self.size = comm.rank(), comm.size()

    def gathered(self, frame: np.ndarray, pending: Pending[Any]) -> Iterator[Any]:
        import torch
        import torch.distributed as dist

        tensor = torch.from_numpy(frame)
        if "nccl" in str(dist.get_backend(self._comm)):
            tensor = tensor.cuda()
        out = tensor.new_empty(self.size * frame.size)
        start: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name
        work = start(out, tensor, group=self._comm, async_op=True)
        while not work.is_completed():
            if time.monotonic() > pending.limit:
                raise TimeoutError(f"no answer within {self._ranks.timeout:g} s. End the job")
            yield None
        work.wait()  # raises what went wrong
        yield out.cpu().numpy().reshape(self.size, -1)


class _Nccl(_Frames):
    """CuPy's NCCL communicators, on a stream of their own, so that one that is stuck blocks no other."""

    def __init__(self, comm: Any, ranks: Ranks) -> None:
        super().__init__(comm, ranks)
        self._raw = hasattr(comm, "allGather")  # an NcclCommunicator, not an NCCLBackend
        self.rank = comm.rank_id() if self._raw else comm.rank
        self.size = comm.size() if self._raw else comm._n_devices
        self._stream: Any = None

    def gathered(self, frame: np.ndarray, pending: Pending[Any]) -> Iterator[Any]:
        cupy = import_module("cupy")

        if self._stream is None:
            self._stream = cupy.cuda.Stream(non_blocking=True)
        with self._stream:
            mine = cupy.asarray(frame)
            out = cupy.empty(self.size * frame.size, np.float64)
            if self._raw:
                kind = cupy.cuda.nccl.NCCL_FLOAT64
                self._comm.allGather(mine.data.ptr, out.data.ptr, frame.size, kind, self._stream.ptr)
            else:
                self._comm.all_gather(mine, out, frame.size, stream=self._stream)
        while not self._stream.done:
            if time.monotonic() > pending.limit:
                raise TimeoutError(
                    f"no answer within {self._ranks.timeout:g} s. Abort the communicator and end the job"
                )
            yield None
        yield out.get(stream=self._stream).reshape(self.size, -1)
