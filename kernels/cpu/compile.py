"""Kernels compiled on first use, with a cache on disk that can slow a call down but never fail one.

Numba's own `cache=True` can: no writable folder raises at import, an empty or truncated file raises in every
later call, a full disk raises in the call that compiled, and a flipped bit runs. Its index, one for all
specialisations of a function, is read, changed and written without a lock: two processes that compile two of
them at once can leave one's argument types pointing at the other's code, and every call is a TypeError.

Here Numba still finds the folder, makes the key and turns code into bytes; but each specialisation has a file
of its own that opens with a checksum, and whatever goes wrong around it means: compile again.

A process that compiles for more than two seconds in all says so on stderr, once.
"""

import contextlib
import functools
import gc
import hashlib
import logging
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np

_log = logging.getLogger(__name__)

# Numba's key has argument types, byte code, the CPU's name and features. The machine code depends on these as
# well; on SVML most of all: where it isn't installed, loading code that calls it ends the process.
_SETTINGS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "USING_SVML")


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """A dispatcher of its own in the cache, for Python and for other compiled functions to call.

    It releases the GIL, divides as NumPy does (1 / 0 is inf) and compiles on the first call with each set of argument
    types, 0.2 ms at import; `options` are those of `numba.njit`. With NUMBA_DISABLE_JIT=1 it is the function itself.

    Globals are frozen into the code, and the cache knows them by the sources only: a block size that a test
    has patched would be stored as the one in the file. Pass such a number as an argument.
    """
    dispatcher = _cached(function, {"nogil": True, "error_model": "numpy", **options})
    with contextlib.suppress(AttributeError):  # no JIT, or a Numba that has changed these names
        compiler = dispatcher._compiler
        compile_ = compiler.compile

        def watched(*args: Any, **keywords: Any) -> Any:
            with notice.watching(isinstance(getattr(dispatcher, "_cache", None), _Guard)), _uncollected():
                return compile_(*args, **keywords)

        compiler.compile = watched
    return dispatcher


def cache_folder() -> str | None:
    """The folder that compiled kernels are kept in, or None where every process compiles its own."""
    cache = getattr(compiled(_nothing), "_cache", None)
    return getattr(cache, "cache_path", None)


def _nothing() -> None: ...


PATIENCE = 2.0  # seconds of compiling, all in all, after which a person wants to know what takes so long


class _Notice:
    """Says once in a process, on stderr and while it goes on, that kernels are being compiled."""

    def __init__(self) -> None:
        self.said = False
        self._spent = 0.0
        self._running = False

    @contextlib.contextmanager
    def watching(self, cached: bool) -> Iterator[None]:
        """Around a compilation. Numba's lock lets one thread compile at a time."""
        if self.said or self._running:
            yield
            return
        start, self._running = time.perf_counter(), True
        timer = threading.Timer(max(0.0, PATIENCE - self._spent), self.say, (cached,))
        timer.daemon = True
        with contextlib.suppress(RuntimeError):  # no more threads to be had
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._spent += time.perf_counter() - start
            self._running = False

    def say(self, cached: bool) -> None:
        if self.said:
            return
        self.said = True
        when = "once on this machine; ahead of time: python -m fastbn warmup"
        if not cached:
            when = "in every process, as no folder can be written to for them; set NUMBA_CACHE_DIR to one"
        if sys.stderr is None:
            return
        with contextlib.suppress(Exception):  # it is closed
            print(f"fastbn is compiling kernels for this processor, which takes some seconds ({when})", file=sys.stderr)


notice = _Notice()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the collector of cycles, which takes an eighth of a compilation's time and finds little in it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cached(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    dispatcher = numba.njit(**options)(function)
    try:
        dispatcher.enable_caching()
        cache = dispatcher._cache
        cache._cache_file = _Files(cache, _stamp(Path(function.__code__.co_filename).parent), options)
        dispatcher._cache = _Guard(cache)
    except Exception as cause:  # no folder, no source, no JIT, or a Numba that has changed these names
        _log.debug("%s is compiled without a cache: %r", function.__qualname__, cause)
        dispatcher = numba.njit(**options)(function)
    return dispatcher


@functools.cache
def _stamp(folder: Path) -> bytes:
    """Hash of all sources in a kernel's folder and in this one: Numba's covers the kernel's own file alone.

    Taken when the first kernel is made, 0.2 ms, and not when it is first called: a file edited in between
    would give its new hash to the code of its old text.
    """
    own = sorted(folder.glob("*.py"))
    if not own:
        raise FileNotFoundError(f"no sources in {folder}")
    ours = sorted(Path(__file__).parent.rglob("*.py"))  # of which a kernel in another folder is made too
    sources = [(path.name, path.read_bytes()) for path in (*own, *ours)]
    return hashlib.sha256(repr(sources).encode()).digest()


class _Files:
    """Stands in for Numba's index and data files: one file for each specialisation, checksum first."""

    def __init__(self, cache: Any, stamp: bytes, options: dict[str, Any]) -> None:
        # Numba's key has no options: code for one thread would be found for many.
        self._options = [(k, sorted(v) if isinstance(v, set) else v) for k, v in sorted(options.items())]
        self._start = os.path.join(cache.cache_path, cache._impl.filename_base)
        self._to_bytes = cache._cache_file._dump
        self._stamp = stamp

    def _path(self, key: Any) -> str:
        settings = [getattr(numba.config, name, None) for name in _SETTINGS]
        name = hashlib.sha256(
            repr((key, self._options, settings, numba.__version__, np.__version__)).encode()
        ).hexdigest()
        return f"{self._start}.{name[:32]}.kernel"

    def _checksum(self, path: str, payload: bytes) -> bytes:
        return hashlib.sha256(self._stamp + os.path.basename(path).encode() + payload).digest()

    def load(self, key: Any) -> Any:
        path = self._path(key)
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            return None
        if content[:32] != self._checksum(path, content[32:]):
            _log.debug("%s is damaged or belongs to other sources", path)
            return None
        return pickle.loads(content[32:])

    def save(self, key: Any, data: Any) -> None:
        path, payload = self._path(key), self._to_bytes(data)
        part = f"{path}.{os.urandom(8).hex()}.tmp"  # so that others see the old file or all of the new one
        try:
            Path(part).write_bytes(self._checksum(path, payload) + payload)
            os.replace(part, path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise

    def flush(self) -> None:
        """Asked for by `dispatcher.recompile()`, which then saves over the file."""


class _Guard:
    """Numba's cache of one function, but a failure is a miss."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return self._cache.load_overload(sig, target_context)
        except Exception as cause:
            _log.debug("not loaded: %r", cause)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            self._cache.save_overload(sig, data)
        except Exception as cause:
            _log.debug("not saved: %r", cause)
