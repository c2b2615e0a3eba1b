"""The report folder: `report.md` and a plot per experiment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .lab import Outcome

ROOM = 4 << 20  # bytes; a full report takes about 1 MB


def prepare(folder: Path) -> None:
    """Make the folder and see that a report fits, before minutes go into the experiments.

    Raises OSError where it cannot be written or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".room"
    try:
        probe.write_bytes(b"\0" * ROOM)
    finally:
        probe.unlink(missing_ok=True)


def write(folder: Path, outcomes: Sequence[Outcome], about: Sequence[str]) -> Path:
    """Write the plots and `report.md`; `about` are the lines on how this run was made.

    Raises OSError where the disk is full or the folder is gone.
    """
    for number, outcome in enumerate(outcomes, 1):
        outcome.draw(folder / plot_name(number, outcome))
    path = folder / "report.md"
    path.write_text("\n".join(lines(outcomes, about)) + "\n", encoding="utf-8")
    return path


def write_ranks(folder: Path, outcome: Outcome, about: Sequence[str]) -> Path:
    """`ranks.md` and `ranks.png`: the experiment on several processes. Raises OSError as `write` does."""
    outcome.draw(folder / "ranks.png")
    text = ["# " + outcome.title, "", *(f"- {line}" for line in about), "", outcome.setup, "", "![](ranks.png)", ""]
    text += [*table(["", "claim", "bar", "measured", ""], summary([outcome])), ""]
    text += [*table(outcome.header, outcome.rows), "", outcome.note]
    path = folder / "ranks.md"
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def lines(outcomes: Sequence[Outcome], about: Sequence[str]) -> Iterator[str]:
    """The report, line by line."""
    yield "# What batch normalization does to deep nets on 1,797 real digits"
    yield ""
    yield (
        "Nets in plain NumPy on the 8×8 digits bundled with scikit-learn: 1,437 images to train on, 360 to "
        "test. Every normalization is `fastbn.BatchNorm`. Every figure below was measured in this run."
    )
    yield ""
    yield from (f"- {line}" for line in about)
    yield ""
    yield from table(["", "claim", "bar", "measured", ""], summary(outcomes))
    yield ""
    yield (
        "PASS: the figure clears the bar. short: it does not. The last part is about cases where batch norm is "
        "not expected to help; PASS there means that the net lost accuracy or stayed bad with it. Settings and "
        "bars were chosen after trial runs with seed 0, and best learning rates by the test images: another "
        "seed is the fairer test, and a regime chosen otherwise may tell another story (compare parts 4 and 7)."
    )
    for number, outcome in enumerate(outcomes, 1):
        yield ""
        yield f"## {number}. {outcome.title}"
        yield ""
        yield outcome.setup
        yield ""
        yield f"![{outcome.title}]({plot_name(number, outcome)})"
        yield ""
        yield from table(outcome.header, outcome.rows)
        if outcome.note:
            yield ""
            yield outcome.note
    yield ""
    yield "## Why"
    yield ""
    yield (
        "These figures show what batch norm does, not why. Ioffe & Szegedy (2015) explained it by less "
        "internal covariate shift; Santurkar et al. (2018) measured that shift, found that it is not the "
        "cause, and saw a smoother loss instead. Nothing here decides between explanations."
    )
    yield ""
    yield "## Sources"
    yield ""
    yield "- Glorot & Bengio 2010, Understanding the difficulty of training deep feedforward neural networks"
    yield "- He, Zhang, Ren & Sun 2015, Delving deep into rectifiers"
    yield "- Ioffe & Szegedy 2015, Batch normalization: accelerating deep network training"
    yield "- Santurkar, Tsipras, Ilyas & Madry 2018, How does batch normalization help optimization?"
    yield "- Yang et al. 2019, A mean field theory of batch normalization"


def summary(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """A row per claim: experiment, claim, bar, figure, verdict."""
    return [
        [str(number), claim.text, claim.bar, claim.figure, "PASS" if claim.passed else "short"]
        for number, outcome in enumerate(outcomes, 1)
        for claim in outcome.claims
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def plot_name(number: int, outcome: Outcome) -> str:
    """The file of an experiment's plot."""
    return f"{number}-{outcome.name}.png"
