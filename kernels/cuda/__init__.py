"""The CUDA backend: CuPy arrays, by the kernels in bn.cu. The contract is in `fastbn.kernels`.

bn.cu     the kernel: one template, for NVRTC; in it
          memory.cuh  options, the argument, number types, access to memory
          sums.cuh    sums of deviations, and how they merge
          maps.cuh    coefficients of a channel, and maps by them
          share.cuh   what a thread has of an item
walk      how arrays are walked: like the next two, pure arithmetic on shapes and strides
launches  what is launched for a walk, on each of the ways for blocks to agree
plan      which of them is the fastest, by a model
compile   one instance of the template as machine code, cached on disk
launch    forward and backward

Only `launch` and `compile` need CuPy, and are imported when they are asked for.
"""

from __future__ import annotations

from typing import Any

_LAUNCHER = ("FEATURES", "backward", "device", "element_view", "forward", "planned")


def __getattr__(name: str) -> Any:
    if name not in _LAUNCHER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import launch

    for each in _LAUNCHER:  # found without this function from now on
        globals()[each] = getattr(launch, each)
    return globals()[name]
