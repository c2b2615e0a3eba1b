"""Seconds from the first line of a fresh process to its first results."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

IMAGE, POINTS = (8, 16, 12, 12), (64, 16)  # small: serial kernels
LARGE = (64, 64, 28, 28)  # the parallel ones too
FIRST = f"""
import time
start = time.perf_counter()
import numpy, fastbn
x = numpy.ones({IMAGE}, numpy.float32)
y, saved = fastbn.forward(x)
fastbn.backward(x, saved)
print(time.perf_counter() - start)
"""
ALL = f"""
import time
start = time.perf_counter()
import numpy, fastbn
for shape in {IMAGE}, {LARGE}:
    for x in numpy.ones(shape, numpy.float32), numpy.moveaxis(numpy.ones(shape, numpy.float32), -1, 1):
        y, saved = fastbn.forward(x)
        fastbn.backward(x, saved)
        fastbn.infer(x, numpy.zeros(x.shape[1]), numpy.ones(x.shape[1]))
        fastbn.moments(x)
print(time.perf_counter() - start)
"""


def seconds(code: str, **environment: str) -> float:
    """What a fresh process prints."""
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return float(process.stdout.split()[-1])


def warm(times: int = 5) -> float:
    """`import fastbn`, first forward, first backward, kernels in the disk cache: the median of some processes."""
    seconds(FIRST)
    return statistics.median(seconds(FIRST) for _ in range(times))


def cold() -> float:
    """All that float32 needs, in both layouts, serial and parallel, with an empty kernel cache."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds(ALL, NUMBA_CACHE_DIR=folder)
