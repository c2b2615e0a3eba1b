"""numba.cuda; under Numba's simulator (NUMBA_ENABLE_CUDASIM=1), something that stands for it.

The simulator puts the running kernel's own threadIdx, shared memory and barriers in the place of the name `cuda` in a
function's module, and takes them away when the first of several threads leaves the function. A device function that is
called from another module would lose them at a barrier. So here the name looks them up each time.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
from numba import config, cuda

SIMULATED = bool(config.ENABLE_CUDASIM)


class _Simulated:
    def __getattr__(self, name: str) -> Any:
        from numba.cuda.simulator.kernel import _get_kernel_context

        return getattr(_get_kernel_context() or _numba_cuda, name)

    @property
    def shared(self) -> Any:
        from numba.cuda.simulator.kernel import _get_kernel_context

        return vars(_get_kernel_context()).setdefault("fastbn_shared", _Shared())


class _Shared:
    """One array for each line that asks for one. Of the simulator's own, two threads at once may get two."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[Any, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def array(self, shape: int, dtype: Any) -> np.ndarray:
        caller = sys._getframe(1)
        with self._lock:
            key = caller.f_code, caller.f_lineno
            if key not in self._arrays:
                self._arrays[key] = np.full(shape, np.nan, np.dtype(str(dtype)))
            return self._arrays[key]


if SIMULATED:
    _numba_cuda, cuda = cuda, _Simulated()
