"""The README's example runs as it stands, and its commands are what `.ci/run` and a newcomer will call."""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs(capsys):
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len([line for line in example.splitlines() if line]) <= 11
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    evaluated, variance = map(float, capsys.readouterr().out.split())
    assert 0.9e5 < evaluated < 1e5  # one update of momentum 0.1 has brought the mean to a tenth of the way
    assert 0.9 < variance < 1.1


EXAMPLES = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if block.startswith(">>>")]


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_print_what_they_say(example, capsys):
    for framework in ("torch", "jax"):
        if f"import {framework}," in example:
            pytest.importorskip(framework)
    found = doctest.DocTestParser().get_doctest(example, {}, "README.md", "README.md", 0)
    assert found.examples
    outcome = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(found)
    assert outcome.failed == 0, capsys.readouterr().out


def test_figures_are_those_of_the_committed_run():
    spec = importlib.util.spec_from_file_location("accuracy", ROOT / "bench" / "accuracy.py")
    accuracy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(accuracy)
    result = json.loads((ROOT / "bench" / "results" / "accuracy-avx2-2cores.json").read_text())
    assert accuracy.table(result) in README


def test_speeds_are_those_of_the_committed_runs():
    from fastbn.bench import report

    runs = sorted((ROOT / "bench" / "results").glob("speed-*.json"))
    if not runs:
        pytest.skip("no run is committed yet")
    assert all(report.readme_table(*report.read(run)) in README for run in runs)


def test_commands():
    commands = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)
    ends = "-m fastbn demo", "-m pytest -n 2 --dist loadfile", "-m fastbn bench --quick"
    assert all(c.endswith(end) for c, end in zip(commands, ends, strict=True))
    assert all(c.startswith("python3 -m venv ") for c in commands)


def test_links_lead_somewhere():
    for path in re.findall(r"`((?:bench|kernels|fastbn)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
