"""Fixtures shared by the numeric tests."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn

pytest.register_assert_rewrite(
    "emulated_more", "extras", "families"
)  # their asserts show their values, as a test's own do


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A module of tests that can't be imported is an error. Where a library isn't installed, modules without tests are
    passed over (--doctest-ignore-import-errors), and one with tests would be too: half of it stays imported."""
    report = yield
    unable = report.outcome == "skipped" and "unable to import module" in str(report.longrepr)
    if unable and collector.path.name.startswith("test_"):
        report.outcome, report.longrepr = "failed", f"{collector.path.name} can't be imported"
    return report


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with fastbn.set_backend(request.param):
        yield request.param


@pytest.fixture
def tiny(monkeypatch):
    """Blocks, pieces and tiles so small that a small array has many of each, and always runs on all threads."""
    from fastbn.kernels import cpu

    sizes = cpu.Sizes(
        block=20, piece=3, slab=400, line=64, far=(9, 1500, 8), columns=16, folded=16, height=4, serial=0, asleep=0,
        past=800, large=4000,
    )  # fmt: skip
    monkeypatch.setattr(cpu, "SIZES", sizes)


@pytest.fixture
def rng(request):
    """Random numbers of the test's own, the same in every run."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


@pytest.fixture
def state():
    """Of the doubles below: current device and stream, and calls."""
    from device_doubles import State

    return State()


@pytest.fixture
def doubles(state, monkeypatch):
    """CuPy and PyTorch over main memory, in their places."""
    from device_doubles import in_their_places

    yield from in_their_places(monkeypatch, state)


@pytest.fixture(scope="session")
def emulator():
    from cupy_double import emulation
    from emulator import library

    return emulation(library())


@pytest.fixture
def emulated(monkeypatch, emulator):
    """A double of CUDA's driver, whose launches the emulator carries out."""
    from cupy_double import small_devices

    yield from small_devices(monkeypatch, emulator)


@pytest.fixture(params=["cupy", "torch"])
def library(request, state, doubles):
    """One of them."""
    from families import Library

    return Library(request.param, state, *doubles)
