"""The demo: its net against finite differences, every experiment in miniature, and its ways to end."""

from __future__ import annotations

import argparse
import errno
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import fastbn
from fastbn import demo
from fastbn.demo import experiments, lab, report, training
from fastbn.demo.lab import Claim, Fewer, Lab, Outcome
from fastbn.demo.net import ACTIVATIONS, Linear, Net
from fastbn.demo.training import Curve, Setting

for dependency in demo.NEEDED:
    pytest.importorskip(dependency)

# Depths 10 and 20 and rate 0.1 are named in claims; all else is as small as the arithmetic allows.
TINY = replace(
    lab.QUICK,
    name="tiny",
    seeds=1,
    paired_seeds=2,
    depths=(10, 20),
    rates=(0.1, 1.0),
    grid_rates=(0.1, 1.0),
    grid_scales=(1.0, 3.0, 10.0),
    grid_steps=3,
    safe_rates=(0.1, 1.0),
    norm_steps=30,
    plain_steps=40,
    memorizing_steps=20,
    deep_steps=2,
)


@pytest.fixture(autouse=True)
def one_blas_thread() -> Iterator[None]:
    """As in a run: on busy cores a second thread made these small products 30 times slower."""
    with threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--quick` made smaller still."""
    monkeypatch.setattr(lab, "QUICK", TINY)


def arguments(out: Path, *more: str) -> argparse.Namespace:
    """What the command line gives to `run`."""
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(["--quick", "--out", str(out), *more])


def small_batch(rng: np.random.Generator, images: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Random images and labels in float64."""
    return rng.standard_normal((images, 64)), rng.integers(0, 10, images)


def random_net(rng: np.random.Generator, activation: str, norm: tuple[bool, ...]) -> Net:
    """A float64 net with random gamma, beta and bias: a backward pass that ignores one must fail."""
    net = Net(rng, norm, 7, activation, dtype=np.float64)
    for layer in net.norms():
        layer.gamma[...] = rng.uniform(0.5, 1.5, 7)
        layer.beta[...] = rng.uniform(-1, 1, 7)
    for linear in net.linears():
        linear.bias[...] = rng.uniform(-0.1, 0.1, linear.bias.shape)
    return net


@pytest.mark.parametrize("norm", [(False, False), (True, True), (True, False)], ids=str)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gradients_against_finite_differences(activation: str, norm: tuple[bool, ...]) -> None:
    rng = np.random.default_rng(7)
    x, labels = small_batch(rng)
    net = random_net(rng, activation, norm)
    net.loss(x, labels)
    pairs = [(layer.weight, layer.dweight.copy()) for layer in net.linears()]
    pairs += [(layer.bias, layer.dbias.copy()) for layer in net.linears()]
    pairs += [(layer.gamma, layer.dgamma.copy()) for layer in net.norms()]
    pairs += [(layer.beta, layer.dbeta.copy()) for layer in net.norms()]
    step = 1e-5
    for values, gradient in pairs:
        for index in zip(*(rng.integers(0, n, 5) for n in values.shape), strict=True):
            kept = values[index]
            values[index] = kept + step
            above = net.loss(x, labels)
            values[index] = kept - step
            below = net.loss(x, labels)
            values[index] = kept
            # Central differences err by step² = 1e-10 and by rounding over step = 1e-11.
            assert gradient[index] == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-8)


def test_a_step_goes_down_the_gradient_of_every_parameter() -> None:
    rng = np.random.default_rng(8)
    x, labels = small_batch(rng)
    net = random_net(rng, "tanh", (True, False))
    net.loss(x, labels)
    linear, norm = next(net.linears()), next(net.norms())
    expected = [
        linear.weight - 0.1 * (linear.dweight + 0.01 * linear.weight),
        linear.bias - 0.1 * linear.dbias,
        norm.gamma - 0.1 * norm.dgamma,
        norm.beta - 0.1 * norm.dbeta,
    ]
    net.step(0.1, decay=0.01)
    for value, wanted in zip([linear.weight, linear.bias, norm.gamma, norm.beta], expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-6)


def test_accuracy_uses_running_statistics_and_goes_back_to_training() -> None:
    rng = np.random.default_rng(9)
    x, labels = small_batch(rng, 50)
    net = random_net(rng, "ReLU", (True, True))
    for _ in range(20):
        net.loss(x, labels)
    whole = net.accuracy(x, labels)
    one_by_one = np.mean([net.accuracy(x[i : i + 1], labels[i : i + 1]) for i in range(len(x))])
    assert whole == pytest.approx(one_by_one)
    # In training mode one shift of all images leaves the logits: the batch's mean takes it out.
    np.testing.assert_allclose(net.forward(x + 5), net.forward(x), atol=1e-4)


def test_the_same_weights_with_and_without_batch_norm() -> None:
    with_, without = (Setting((norm,) * 3, "tanh", seed=(3, 1)).net() for norm in (True, False))
    assert len(list(with_.norms())) == 3
    assert not list(without.norms())
    for a, b in zip(with_.linears(), without.linears(), strict=True):
        np.testing.assert_array_equal(a.weight, b.weight)


@pytest.mark.parametrize(
    ("init", "scale", "std"),
    [("small", 1, 0.01), ("normal", 2, 2), ("xavier", 1, (2 / 164) ** 0.5), ("he", 3, 3 * (2 / 64) ** 0.5)],
)
def test_initial_weights(init: str, scale: float, std: float) -> None:
    first: Linear = next(Net(np.random.default_rng(0), (False,), 100, "ReLU", init, scale).linears())
    assert first.weight.dtype == np.float32
    # 6,400 draws: the standard deviation is known to 0.9 %.
    assert first.weight.std() == pytest.approx(std, rel=0.04)


def test_wrong_labels_are_wrong_and_as_many_as_said() -> None:
    labels = np.random.default_rng(1).integers(0, 10, 500)
    kept = labels.copy()
    changed = training.with_wrong_labels(labels, 0.2, np.random.default_rng(2))
    assert np.sum(changed != labels) == 100
    assert set(changed) <= set(range(10))
    np.testing.assert_array_equal(labels, kept)


def test_batches_show_every_image_at_most_once_an_epoch() -> None:
    batches = training.batches(np.random.default_rng(0), 100, 30)
    epoch = np.concatenate([next(batches) for _ in range(3)])
    assert len(set(epoch)) == 90
    assert len(set(np.concatenate([next(batches) for _ in range(3)]))) == 90


def test_steps_to_an_accuracy() -> None:
    curve = Curve(Setting((), "ReLU"), (5, 10, 15), (0.2, 0.96, 0.94))
    assert curve.steps_to(0.95) == 10
    assert curve.steps_to(0.97) == np.inf
    assert curve.final == 0.94


def test_fewer_is_a_lower_bound_where_the_slow_one_never_arrives() -> None:
    assert str(Fewer(600, 50, 1000)) == "12 times"
    assert str(Fewer(np.inf, 50, 1000)) == "more than 20 times"
    assert Fewer(np.inf, 50, 1000).without == "over 1000"
    assert Fewer(600, np.inf, 1000).times == 0
    assert str(Fewer(600, np.inf, 1000)) == "not reached with batch norm"


def test_exploding_nets_end_without_a_warning() -> None:
    setting = Setting((False,) * 10, "ReLU", init="normal", rate=10.0, steps=50)
    curve = training.train(setting, training.load_digits(0))
    assert curve.steps[-1] < 50
    assert curve.final < 0.3


@pytest.mark.usefixtures("tiny")
def test_every_experiment_in_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = fastbn.get_backend()
    assert demo.run(arguments(tmp_path / "new" / "folder", "--seed", "5", "--backend", "reference")) == 0
    text = (tmp_path / "new" / "folder" / "report.md").read_text(encoding="utf-8")
    pictures = sorted((tmp_path / "new" / "folder").glob("*.png"))
    assert len(pictures) == len(experiments.EXPERIMENTS) == 7
    for picture in pictures:
        assert picture.read_bytes()[:4] == b"\x89PNG"
        assert f"({picture.name})" in text
    assert "tiny run, seed 5, backend reference" in text
    verdicts = [line for line in text.splitlines() if line.endswith(("| PASS |", "| short |"))]
    assert len(verdicts) >= 7
    for number in range(1, 8):
        assert any(line.startswith(f"| {number} |") for line in verdicts)
    for line in verdicts:
        measured = line.split("|")[4]
        assert any(letter.isdigit() for letter in measured) or "not reached" in measured, line
    passed = sum("PASS" in line for line in verdicts)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"{passed} of {len(verdicts)} claims passed")
    assert not list((tmp_path / "new" / "folder").glob(".*"))
    assert fastbn.get_backend() == before


def test_the_same_seed_gives_the_same_figures() -> None:
    digits = training.load_digits(3)

    def figures(seed: int) -> list[object]:
        lab = Lab(digits, TINY, seed, lambda _done, _total: None)
        chosen = (experiments.gradients, experiments.regularization)
        return [(found.claims, found.rows) for found in (experiment(lab) for experiment in chosen)]

    first = figures(3)
    assert figures(3) == first
    assert all(a != b for a, b in zip(figures(4), first, strict=True))
    np.testing.assert_array_equal(training.load_digits(3).x, digits.x)
    assert not np.array_equal(training.load_digits(4).x, digits.x)


def test_progress_ends_at_its_total() -> None:
    heard: list[tuple[int, int]] = []
    lab = Lab(training.load_digits(0), TINY, 0, lambda done, total: heard.append((done, total)))
    experiments.placement(lab)
    assert [done for done, _ in heard] == list(range(heard[-1][1] + 1))


def finished(name: str, passed: bool, draw: Callable[[Path], None]) -> Outcome:
    """An experiment's result without the experiment."""
    claim = Claim("A claim", "2 times", "3 times" if passed else "1 times", passed)
    return Outcome(name, name, "A net.", [claim], ["a"], [["1"]], draw)


def no_picture(path: Path) -> None:
    """Stands for a plot."""
    path.write_bytes(b"")


def test_a_claim_that_falls_short_says_so_and_still_ends_with_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = {
        "good": lambda _: finished("good", True, no_picture),
        "bad": lambda _: finished("bad", False, no_picture),
    }
    monkeypatch.setattr(experiments, "EXPERIMENTS", results)
    assert demo.run(arguments(tmp_path)) == 0
    assert "1 of 2 claims passed" in capsys.readouterr().out
    assert "| 2 | A claim | 2 times | 1 times | short |" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_an_interrupt_leaves_the_finished_part_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Lab) -> Outcome:
        raise KeyboardInterrupt

    results = {"good": lambda _: finished("good", True, no_picture), "cut": interrupted}
    monkeypatch.setattr(experiments, "EXPERIMENTS", results)
    assert demo.run(arguments(tmp_path)) == 130
    assert capsys.readouterr().err == "fastbn demo: interrupted, 1 of 2 parts finished\n"
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "interrupted: 1 of 2 parts" in text
    assert "## 1. good" in text


def test_an_interrupt_before_anything_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "EXPERIMENTS", {"cut": interrupted})
    assert demo.run(arguments(tmp_path)) == 130
    assert capsys.readouterr().err == "fastbn demo: interrupted, 0 of 1 parts finished; no report\n"
    monkeypatch.setattr(report, "prepare", interrupted)
    assert demo.run(arguments(tmp_path)) == 130
    assert capsys.readouterr().err == "fastbn demo: interrupted\n"


def no_experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that starts an experiment fails the test."""
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"never": lambda _: pytest.fail("an experiment was started")})


def test_a_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_experiments(monkeypatch)
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "report"
    assert demo.run(arguments(out)) == 1
    assert capsys.readouterr().err == f"fastbn demo: cannot write to {out}: Not a directory\n"


def test_a_full_disk_is_seen_before_the_experiments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    no_experiments(monkeypatch)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert demo.run(arguments(tmp_path)) == 1
    assert capsys.readouterr().err == f"fastbn demo: cannot write to {tmp_path}: No space left on device\n"


def test_a_disk_that_fills_up_later_keeps_the_summary_on_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(experiments, "EXPERIMENTS", {"good": lambda _: finished("good", True, full)})
    assert demo.run(arguments(tmp_path)) == 1
    printed = capsys.readouterr()
    assert printed.err == f"fastbn demo: cannot write to {tmp_path}: No space left on device\n"
    assert "A claim" in printed.out


@pytest.mark.parametrize("name", demo.NEEDED)
def test_a_missing_dependency(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_experiments(monkeypatch)
    monkeypatch.setitem(sys.modules, name, None)
    assert demo.run(arguments(tmp_path)) == 1
    assert capsys.readouterr().err == f"fastbn demo: {name} not found; pip install 'fastbn[demo]'\n"


def test_importing_the_demo_needs_none_of_its_dependencies() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({demo.NEEDED!r})); import fastbn.demo"
    code += "; import fastbn.demo.experiments, fastbn.demo.report"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("text", ["-1", "-20"])
def test_a_negative_seed(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"zero or more; got {text}"):
        demo.seed(text)
