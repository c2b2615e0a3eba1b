"""numba.cuda; under Numba's simulator (NUMBA_ENABLE_CUDASIM=1), something that stands for it.

The simulator puts the running kernel's own threadIdx, shared memory and barriers in the place of the name `cuda` in a
function's module, and takes them away when the first of several threads leaves the function. A device function that is
called from another module would lose them at a barrier. So here the name looks them up each time.
"""

from __future__ import annotations

from typing import Any

from numba import config, cuda

SIMULATED = bool(config.ENABLE_CUDASIM)


class _Simulated:
    def __getattr__(self, name: str) -> Any:
        from numba.cuda.simulator.kernel import _get_kernel_context

        return getattr(_get_kernel_context() or _numba_cuda, name)


if SIMULATED:
    _numba_cuda, cuda = cuda, _Simulated()
