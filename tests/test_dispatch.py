"""Which kernels are used: set_backend, FASTBN_BACKEND, and what importing fastbn imports."""

import os
import subprocess
import sys
import types

import numpy as np
import pytest

import fastbn
from fastbn import dispatch


@pytest.fixture(autouse=True)
def _as_before():
    with fastbn.set_backend(fastbn.get_backend()):
        yield


def python(code, backend=None):
    """A process of its own, with FASTBN_BACKEND set or absent."""
    env = {name: value for name, value in os.environ.items() if name != "FASTBN_BACKEND"}
    if backend is not None:
        env["FASTBN_BACKEND"] = backend
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_a_call_holds_from_then_on():
    fastbn.set_backend("reference")
    assert fastbn.get_backend() == "reference"
    fastbn.set_backend("cpu")
    assert fastbn.get_backend() == "cpu"


def test_a_block_ends():
    before = fastbn.get_backend()
    with fastbn.set_backend("reference"):
        assert fastbn.get_backend() == "reference"
    assert fastbn.get_backend() == before


def test_blocks_nest():
    with fastbn.set_backend("cpu"):
        with fastbn.set_backend("reference"):
            with fastbn.set_backend("auto"):
                assert fastbn.get_backend() == "auto"
            assert fastbn.get_backend() == "reference"
        assert fastbn.get_backend() == "cpu"


def test_a_block_ends_after_an_exception():
    with fastbn.set_backend("cpu"):
        with pytest.raises(ZeroDivisionError, match="division"), fastbn.set_backend("reference"):
            1 / 0  # noqa: B018
        assert fastbn.get_backend() == "cpu"


def test_a_call_inside_a_block_ends_with_it():
    with fastbn.set_backend("cpu"):
        with fastbn.set_backend("cpu"):
            fastbn.set_backend("reference")
        assert fastbn.get_backend() == "cpu"


@pytest.mark.parametrize(
    ("name", "module"),
    [("auto", "fastbn.kernels.cpu"), ("cpu", "fastbn.kernels.cpu"), ("reference", "fastbn.kernels.reference")],
)
def test_each_name_means_its_kernels(name, module):
    with fastbn.set_backend(name):
        assert dispatch.kernels("a test", np.ones((2, 3))).__name__ == module


def test_the_chosen_kernels_are_called(monkeypatch, rng):
    """And by every function, not only by the first."""
    from fastbn.kernels import cpu, reference

    calls = []
    for module in (cpu, reference):
        for name in ("forward", "backward"):
            real = getattr(module, name)

            def spy(*args, real=real, module=module, name=name):
                calls.append((module.__name__.rpartition(".")[2], name))
                return real(*args)

            monkeypatch.setattr(module, name, spy)
    x = rng.normal(2, 1, (6, 3)).astype(np.float32)
    for name in ("reference", "cpu"):
        with fastbn.set_backend(name):
            _, saved = fastbn.forward(x)
            fastbn.backward(x, saved)
            fastbn.infer(x, np.zeros(3), np.ones(3))
            fastbn.moments(x)
        assert calls == [(name, "forward"), (name, "backward"), (name, "forward"), (name, "forward")]
        calls.clear()


def test_backends_agree_but_are_not_the_same_code(rng):
    x = rng.normal(1e3, 1, (50, 3, 7)).astype(np.float32)
    results = {}
    for name in ("cpu", "reference"):
        with fastbn.set_backend(name):
            results[name] = fastbn.forward(x, [2, 3, 4], [1, 0, -1])[0]
    np.testing.assert_allclose(results["cpu"], results["reference"], rtol=0, atol=3e-6)  # 2 eps of |y| up to 12


def test_what_one_backend_saved_another_can_use(rng):
    x, dy = rng.normal(3, 2, (2, 6, 3, 5)).astype(np.float32)
    with fastbn.set_backend("cpu"):
        _, saved = fastbn.forward(x)
        expected = fastbn.backward(dy, saved)
    with fastbn.set_backend("reference"):
        got = fastbn.backward(dy, saved)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


WRONG = {
    "unknown": ("gpu", ValueError, "set_backend: 'gpu' is no backend; expected one of auto, cpu, cupy, numba-cuda"),
    "another case": ("CPU", ValueError, "'CPU' is no backend"),
    "empty": ("", ValueError, "'' is no backend"),
    "none": (None, ValueError, "None is no backend"),
    "a list": (["cpu"], ValueError, r"\['cpu'\] is no backend"),
}


@pytest.mark.parametrize(("name", "error", "match"), WRONG.values(), ids=WRONG)
def test_a_wrong_name_changes_nothing(name, error, match):
    with fastbn.set_backend("reference"):
        with pytest.raises(error, match=match):
            fastbn.set_backend(name)
        assert fastbn.get_backend() == "reference"


@pytest.mark.parametrize("name", ["cupy", "numba-cuda"])
def test_a_missing_library_is_named_with_the_way_to_get_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "numba.cuda", None)
    with fastbn.set_backend("reference"):
        with pytest.raises(
            RuntimeError, match=rf"set_backend: '{name}' can't be used: .*pip install 'fastbn\[cuda13\]'"
        ):
            fastbn.set_backend(name)
        assert fastbn.get_backend() == "reference"


class Runtime(types.SimpleNamespace):
    """Of CuPy, on a machine with `count` devices, or without a driver."""

    def getDeviceCount(self):
        if self.count is None:
            raise OSError("driver version is insufficient")
        return self.count


@pytest.mark.parametrize(
    ("count", "reason"),
    [(None, "no CUDA driver can be used .driver version is insufficient."), (0, "there is no CUDA device here")],
)
def test_a_missing_driver_or_device_is_named(count, reason, monkeypatch):
    cuda = types.SimpleNamespace(runtime=Runtime(count=count))
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    with pytest.raises(RuntimeError, match=f"'cupy' can't be used: {reason}"):
        fastbn.set_backend("cupy")
    error = "driver version is\ninsufficient" if count is None else None
    numba_cuda = types.SimpleNamespace(gpus=[], is_available=lambda: False, cuda_error=lambda: error)
    monkeypatch.setitem(sys.modules, "numba.cuda", numba_cuda)
    with pytest.raises(RuntimeError, match=f"'numba-cuda' can't be used: {reason}"):
        fastbn.set_backend("numba-cuda")
    cuda.runtime.count = 1
    with fastbn.set_backend("cupy"):
        assert fastbn.get_backend() == "cupy"


def test_a_library_that_is_broken_is_named_and_not_passed_over(monkeypatch, tmp_path):
    """Import may raise anything: numba-cuda 0.30.4 beside NumPy 2.5 raises AttributeError."""
    (tmp_path / "cupy.py").write_text("raise AttributeError('no attribute row_stack')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert dispatch._installed.__wrapped__("cupy")
    message = r"^fastbn.infer: the backend 'cupy' can't be used: cupy can't be imported \(no attribute row_stack\)"
    with pytest.raises(RuntimeError, match=message):
        dispatch._load_for_device.__wrapped__("cupy", "fastbn.infer")
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert not dispatch._installed.__wrapped__("cupy")


@pytest.mark.parametrize("name", ["cupy", "numba-cuda"])
def test_a_backend_for_gpus_refuses_numpy_arrays(name, monkeypatch):
    monkeypatch.setattr(dispatch, "_backend", name)
    with pytest.raises(
        TypeError, match=f"fastbn.infer: x is a float64 array .* in main memory, and the backend '{name}'"
    ):
        fastbn.infer(np.ones((2, 3)), np.zeros(3), np.ones(3))


@pytest.mark.parametrize(("value", "name"), [(None, "auto"), ("", "auto"), ("reference", "reference"), ("cpu", "cpu")])
def test_the_environment_variable(value, name):
    done = python("import fastbn; print(fastbn.get_backend())", backend=value)
    assert done.stdout.split() == [name], done.stderr


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gpu", "ValueError: the environment variable FASTBN_BACKEND: 'gpu' is no backend; expected one of auto"),
        (
            "cupy",
            "TypeError: fastbn.moments: x is a float64 array of shape (3, 3) in main memory, and the backend 'cupy'",
        ),
    ],
)
def test_a_wrong_environment_variable_is_named(value, message):
    """At import a wrong name; what a backend can't do, at the first call."""
    done = python("import numpy, fastbn; fastbn.moments(numpy.eye(3))", backend=value)
    assert done.returncode != 0
    assert message in done.stderr


HEAVY = "numba", "llvmlite", "cupy", "torch", "sklearn", "matplotlib", "rich", "ml_dtypes"


def test_importing_imports_no_array_library_but_numpy():
    code = f"import sys, fastbn; print(sorted(set({HEAVY!r}) & set(sys.modules)), 'numpy' in sys.modules)"
    done = python(code)
    assert done.stdout.strip() == "[] True", done.stderr


def test_the_reference_needs_no_numba():
    code = (
        "import sys, numpy, fastbn\n"
        "y, saved = fastbn.forward(numpy.eye(3))\n"
        "fastbn.backward(y, saved)\n"
        "print('numba' in sys.modules)"
    )
    done = python(code, backend="reference")
    assert done.stdout.strip() == "False", done.stderr
