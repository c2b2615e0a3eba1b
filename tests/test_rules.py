"""The rules of the house, read off the source: who imports whom, what is documented, what a test must have."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastbn

ROOT = Path(__file__).resolve().parents[1]
STANDARD = {*sys.stdlib_module_names, "__future__"}

# What a backend's files may import besides the standard library and the files of the same backend.
ARRAY_LIBRARIES = {
    "cpu": {"numpy", "numba", "llvmlite"},
    "reference": {"numpy"},
    "cuda": {"numpy", "cupy"},
    "numba_cuda": {"numpy", "numba"},
}


# fastbn/torch.py and fastbn/jax.py may import what they are named after: nobody imports them but those who ask.
FRAMEWORKS = {"torch", "jax"}


def sources(*folders):
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, folders
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in found]


def module_name(path):
    """`fastbn.kernels.cpu.rows`, or `fastbn.kernels.cpu` for its __init__.py, and whether it is a package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("kernels", "bench"):
        parts = ("fastbn", *parts)
    return (parts[:-1], True) if parts[-1] == "__init__" else (parts, False)


def imports(path, nodes):
    """The full names of what `nodes` import; a relative name is resolved."""
    name, is_package = module_name(path)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(name[: len(name) - node.level + is_package]) if node.level else []
            base += node.module.split(".") if node.module else []
            if node.level and not node.module:  # from . import rows
                yield from (".".join([*base, alias.name]) for alias in node.names)
            else:
                yield ".".join(base)


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def at_import(node):
    """All nodes that run when the module is imported: not those in functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from at_import(child)


@pytest.mark.parametrize("path", sources("kernels"))
def test_a_kernel_imports_its_array_library_and_its_siblings(path):
    backend = path.relative_to(ROOT / "kernels").parts[0].removesuffix(".py")
    found = set(imports(path, ast.walk(tree(path))))
    if backend == "__init__":
        assert found == set()  # the contract, in words
        return
    allowed = STANDARD | ARRAY_LIBRARIES[backend]
    for name in found:
        ours = f"{name}.".startswith(f"fastbn.kernels.{backend}.")
        assert ours or name.partition(".")[0] in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", [p for p in sources("fastbn") if "fastbn/demo/" not in p.id])
def test_the_library_imports_numpy_only(path):
    framework = {path.stem} & FRAMEWORKS if path.parent == ROOT / "fastbn" else set()
    for name in imports(path, at_import(tree(path))):
        assert name.partition(".")[0] in STANDARD | {"numpy", "fastbn"} | framework, f"{path.name} imports {name}"
        assert not f"{name}.".startswith("fastbn.kernels.cpu."), "kernels are imported on first use"


@pytest.mark.parametrize("path", sources("fastbn", "kernels"))
def test_no_other_file_imports_a_framework_of_ours(path):
    ours = {f"fastbn.{name}" for name in FRAMEWORKS}
    assert not ours & set(imports(path, ast.walk(tree(path)))), "import fastbn would import the framework"


@pytest.mark.parametrize("path", sources("fastbn", "kernels", "tests", "bench"))
def test_nobody_imports_kernels_or_bench(path):
    """They are installed as fastbn.kernels and fastbn.bench; `import bench` would work by chance, in the root only."""
    assert not {"kernels", "bench"} & {name.partition(".")[0] for name in imports(path, ast.walk(tree(path)))}


@pytest.mark.parametrize("path", sources("fastbn", "kernels"))
def test_only_the_command_line_imports_the_benchmark(path):
    if path.name != "__main__.py":
        assert not any(f"{name}.".startswith("fastbn.bench.") for name in imports(path, ast.walk(tree(path))))


PUBLIC = [name for name in fastbn.__all__ if inspect.isfunction(o := getattr(fastbn, name)) or inspect.isclass(o)]


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_is_documented_with_an_example(name):
    doc = inspect.getdoc(getattr(fastbn, name))
    assert doc
    assert ">>>" in doc


def test_all_is_complete():
    """Every name that `import fastbn` gives and that is neither a module nor private is in __all__, sorted."""
    public = {n for n, o in vars(fastbn).items() if not n.startswith("_") and not inspect.ismodule(o)}
    assert set(fastbn.__all__) == public | {"reference"}
    assert list(fastbn.__all__) == sorted(fastbn.__all__)


TESTS = sources("tests")


def calls(node):
    """(name, call) of every call under `node`; the name is the last part: `raises` of pytest.raises."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, (ast.Name, ast.Attribute)):
            yield (call.func.id if isinstance(call.func, ast.Name) else call.func.attr), call


@pytest.mark.parametrize("path", TESTS)
def test_every_expected_error_and_warning_has_its_words(path):
    for name, call in calls(tree(path)):
        if name in ("raises", "warns"):
            assert "match" in {k.arg for k in call.keywords}, f"{path.name}:{call.lineno} has no match="


def functions(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def checked(call):
    """subprocess.run(..., check=True) raises where the process fails."""
    return any(k.arg == "check" and getattr(k.value, "value", None) is True for k in call.keywords)


def asserting(definitions):
    """Names of those functions that assert something, by themselves or by one that they call."""
    names = {"raises", "warns"}
    while True:
        found = {
            f.name
            for f in definitions
            if any(isinstance(node, ast.Assert) for node in ast.walk(f))
            or any(name in names or name.startswith("assert_") or checked(call) for name, call in calls(f))
        }
        if found <= names:
            return names
        names |= found


HELPERS = asserting([f for path in TESTS for f in functions(path.values[0]) if not f.name.startswith("test")])


@pytest.mark.parametrize("path", TESTS)
def test_every_test_asserts_something(path):
    for test in functions(path):
        if test.name.startswith("test"):
            assert test.name in asserting([test]) or any(name in HELPERS for name, _ in calls(test)), (
                f"{path.name}: {test.name} asserts nothing"
            )


def text_files():
    """Tracked files, and those that are about to be: what a clone would hold."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a git repository")
    for name in listed.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file():
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # an image


MACHINE_PATH = re.compile(r"(?<![\w.)])/(?:work|root|home)/")


def test_no_file_names_a_place_on_one_machine():
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path, text in text_files()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_the_pattern_of_machine_paths_finds_one():
    assert MACHINE_PATH.search("cd " + "/".join(["", "home", "someone"]))
    assert not MACHINE_PATH.search("https://example.org" + "/".join(["", "home", "page"]))
