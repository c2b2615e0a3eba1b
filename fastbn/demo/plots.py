"""The pictures: one function an experiment, one style for all.

matplotlib is imported on first use, so that `python -m fastbn` runs without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .training import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]

# Okabe & Ito's palette: told apart with any kind of colour blindness.
WITHOUT, WITH, OTHER = "#D55E00", "#0072B2", "#777777"
NAMES = {False: "without batch norm", True: "with batch norm"}
COLOURS = {False: WITHOUT, True: WITH}
MARKERS = {False: "o", True: "s"}
FLOOR = 1e-20  # smaller gradients are named in words
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.titlesize": 12.5,
    "figure.titleweight": "bold",
    "savefig.dpi": 110,
}


def gradients(sizes: Mapping[tuple[str, str, int, bool], Floats], title: str, path: Path) -> None:
    """Gradient size by layer, a panel per activation and initialization, a line per depth."""
    activations = list(dict.fromkeys(key[0] for key in sizes))
    inits = list(dict.fromkeys(key[1] for key in sizes))
    depths = list(dict.fromkeys(key[2] for key in sizes))
    with sheet(path, title, (11.5, 8.2), len(activations), len(inits), sharex=True, sharey=True) as (
        figure,
        axes,
    ):
        for (activation, init, depth, norm), profile in sizes.items():
            ax = axes[activations.index(activation)][inits.index(init)]
            # A zero has no place on a log axis: the line ends where float32 does.
            seen = np.where((profile > 0) & np.isfinite(profile), profile, np.nan)
            width = 0.8 + 0.8 * depths.index(depth)
            label = f"{NAMES[norm]}, {depth} layers"
            ax.plot(np.arange(1, depth + 1), seen, color=COLOURS[norm], linewidth=width, label=label)
            side = "below" if profile.max() < FLOOR else "above" if profile.min() > 1 / FLOOR else None
            if side:
                height = 0.04 + 0.08 * depths.index(depth)
                ax.text(
                    0.97,
                    height if side == "below" else 0.92 - height,
                    f"{depth} layers: {side} {FLOOR if side == 'below' else 1 / FLOOR:.0e}",
                    transform=ax.transAxes,
                    ha="right",
                    fontsize=8.5,
                    color=COLOURS[norm],
                )
        for row, activation in zip(axes, activations, strict=True):
            row[0].set_ylabel(f"{activation}\ngradient size (RMS)")
            for ax, init in zip(row, inits, strict=True):
                ax.set_yscale("log")
                ax.set_ylim(FLOOR, 1 / FLOOR)
                if row is axes[0]:
                    ax.set_title(init)
                if row is axes[-1]:
                    ax.set_xlabel("hidden layer")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(depths))


def speed(
    curves: Mapping[tuple[bool, str], Sequence[Curve]],
    to95: Mapping[tuple[bool, float], Sequence[float]],
    title: str,
    path: Path,
) -> None:
    """Accuracy along the runs, a thin line per seed; beside it the steps to 95% by learning rate."""
    with sheet(path, title, (11.5, 4.8), 1, 2) as (_, axes):
        left, right = axes[0]
        for (norm, name), runs in curves.items():
            style = "-" if name.startswith("best") else "--"
            for number, curve in enumerate(runs):
                label = f"{NAMES[norm]}, {name}" if number == 0 else None
                left.plot(
                    curve.steps,
                    100 * np.array(curve.accuracy),
                    style,
                    color=COLOURS[norm],
                    linewidth=0.9,
                    alpha=0.75,
                    label=label,
                )
        left.set_xscale("log")
        whole_numbers(left.xaxis)
        left.set_xlabel("steps of SGD")
        left.set_ylabel("test accuracy, %")
        left.set_ylim(0, 101)
        left.set_title("A line is a seed; without batch norm a run ends at 97%")
        legend_below(left)
        steps_by_rate(right, to95, "steps to 95%")


def rates(to90: Mapping[tuple[bool, float], Sequence[float]], title: str, path: Path) -> None:
    """Steps to 90% by learning rate."""
    with sheet(path, title, (8, 4.8), 1, 1) as (_, axes):
        steps_by_rate(axes[0][0], to90, "steps to 90%")


def steps_by_rate(ax: Axes, taken: Mapping[tuple[bool, float], Sequence[float]], label: str) -> None:
    """A dot per seed and a line through the medians; crosses on top where a seed never arrived."""
    reached = [t for found in taken.values() for t in found if np.isfinite(t)]
    top = 2.5 * max(reached, default=1000)
    for norm in (False, True):
        chosen = sorted(rate for n, rate in taken if n == norm)
        shift = 1.06 if norm else 1 / 1.06
        medians = [float(np.median(taken[norm, rate])) for rate in chosen]
        ax.plot(
            chosen,
            [m if np.isfinite(m) else np.nan for m in medians],
            color=COLOURS[norm],
            marker=MARKERS[norm],
            label=f"{NAMES[norm]}, median",
        )
        for rate in chosen:
            found = np.array(taken[norm, rate])
            here = found[np.isfinite(found)]
            ax.plot([rate] * len(here), here, ".", color=COLOURS[norm], markersize=4, alpha=0.6)
            lost = len(found) - len(here)
            if lost:
                ax.plot(rate * shift, top, "x", color=COLOURS[norm], markersize=7, markeredgewidth=1.8)
                ax.annotate(
                    f"{lost}/{len(found)}",
                    (rate * shift, top),
                    xytext=(0, 7 if norm else -15),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=COLOURS[norm],
                )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(min(reached, default=1) / 1.6, top * 2.2)
    ax.set_xlabel("learning rate")
    ax.set_ylabel(label)
    ax.set_title("Crosses: seeds that never arrived")
    ax.set_xticks(rates := sorted({rate for _, rate in taken}), [f"{rate:g}" for rate in rates])
    ax.minorticks_off()
    whole_numbers(ax.yaxis)
    legend_below(ax)


def heat_maps(
    grids: Mapping[tuple[str, bool], Floats],
    rates: Sequence[float],
    scales: Sequence[float],
    title: str,
    path: Path,
) -> None:
    """Accuracy over learning rate (rows) and initial scale (columns), without above, with below."""
    activations = list(dict.fromkeys(key[0] for key in grids))
    with sheet(path, title, (11.5, 7.6), 2, len(activations), sharex=True, sharey=True) as (figure, axes):
        for (activation, norm), grid in grids.items():
            ax = axes[int(norm)][activations.index(activation)]
            image = ax.imshow(100 * grid, origin="lower", cmap="cividis", vmin=10, vmax=100, aspect="auto")
            for (row, column), accuracy in np.ndenumerate(grid):
                ink = "black" if accuracy > 0.6 else "white"
                ax.text(column, row, f"{100 * accuracy:.0f}", ha="center", va="center", fontsize=8, color=ink)
            ax.set_title(f"{activation}, {NAMES[norm]}: {np.mean(grid >= 0.9):.0%} train")
            ax.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
            ax.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
            ax.grid(False)
            if norm:
                ax.set_xlabel("scale of the initial weights")
            if activation == activations[0]:
                ax.set_ylabel("learning rate")
        figure.colorbar(image, ax=[ax for row in axes for ax in row], label="test accuracy, %", shrink=0.7)


def arms(accuracy: Mapping[str, Floats], title: str, path: Path) -> None:
    """A dot per seed, a bar at the mean."""
    with sheet(path, title, (8, 4.4), 1, 1) as (_, axes):
        ax = axes[0][0]
        for place, (name, found) in enumerate(accuracy.items()):
            colour = {"without": WITHOUT, "batch norm": WITH}.get(name, OTHER)
            dots(ax, place, 100 * found, colour)
        ax.set_xticks(range(len(accuracy)), list(accuracy))
        ax.set_xlim(-0.5, len(accuracy) - 0.35)
        ax.set_ylabel("test accuracy, %")
        ax.set_title("A dot is a seed, a bar the mean")


def pairs(accuracy: Mapping[str, tuple[Floats, Floats]], title: str, path: Path) -> None:
    """Without and with side by side, a panel per case."""
    with sheet(path, title, (10.5, 4.4), 1, len(accuracy)) as (_, axes):
        for ax, (name, found) in zip(axes[0], accuracy.items(), strict=True):
            for norm in (False, True):
                dots(ax, int(norm), 100 * found[norm], COLOURS[norm])
            ax.set_xticks([0, 1], ["without", "with"])
            ax.set_xlim(-0.5, 1.65)
            if max(map(np.max, found)) < 0.8:  # a net that fails is seen against the whole scale
                ax.set_ylim(0, 100)
            ax.set_title(name)
        axes[0][0].set_ylabel("test accuracy, %")


def dots(ax: Axes, place: float, values: Floats, colour: str) -> None:
    """The values as dots, spread so that equal ones stay visible, and their mean as a bar."""
    shifts = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else np.zeros(1)
    ax.plot(place + shifts, values, "o", color=colour, markersize=4.5, alpha=0.7)
    mean = float(values.mean())
    ax.plot([place - 0.25, place + 0.25], [mean, mean], color=colour, linewidth=2.5)
    ax.annotate(f"{mean:.1f}", (place + 0.28, mean), va="center", fontsize=9, color=colour)


def places(taken: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Steps to 95% by the layers that have batch norm: a dot per seed, a bar at the median."""
    reached = [t for found in taken.values() for t in found if np.isfinite(t)]
    edge = max(reached, default=1000)
    with sheet(path, title, (9.5, 4.2), 1, 1) as (_, axes):
        ax = axes[0][0]
        for row, (name, found) in enumerate(taken.items()):
            colour = WITHOUT if name == "none" else WITH
            here = np.array([t for t in found if np.isfinite(t)])
            shifts = np.linspace(-0.12, 0.12, len(here)) if len(here) > 1 else np.zeros(len(here))
            ax.plot(here, row + shifts, "o", color=colour, markersize=4.5, alpha=0.7)
            median = float(np.median(found))
            if np.isfinite(median):
                ax.plot([median, median], [row - 0.28, row + 0.28], color=colour, linewidth=2.5)
            if len(here) < len(found):
                words = f"{len(found) - len(here)} of {len(found)} never arrive"
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                ax.annotate(words, (1.15 * edge, row), va="center", fontsize=9, color=colour, bbox=box)
        ax.set_xscale("log")
        ax.set_xlim(min(reached, default=1) / 1.5, edge * 3.5)
        ax.set_yticks(range(len(taken)), list(taken))
        ax.set_ylim(len(taken) - 0.5, -0.5)
        whole_numbers(ax.xaxis)
        ax.set_xlabel("steps to 95% test accuracy")
        ax.set_ylabel("hidden layers with batch norm")
        ax.set_title("A dot is a seed, a bar the median")


def training_curves(steps: Floats, accuracy: Mapping[str, Floats], title: str, path: Path) -> None:
    """Test accuracy along training, (seeds, steps) by arm: the mean as a line, the seeds as a band."""
    colours = dict(zip(accuracy, (WITHOUT, WITH), strict=True))
    with sheet(path, title, (8.5, 4.6), 1, 1) as (_, axes):
        ax = axes[0][0]
        for arm, curves in accuracy.items():
            mean = 100 * curves.mean(0)
            ax.fill_between(
                steps, 100 * curves.min(0), 100 * curves.max(0), color=colours[arm], alpha=0.18, linewidth=0
            )
            ax.plot(steps, mean, color=colours[arm], linewidth=2, label=f"{arm}: {mean[-1]:.1f}% at the end")
        ax.set_xlabel("step")
        ax.set_ylabel("test accuracy, % (mean; band: all seeds)")
        ax.legend(loc="lower right")


def legend_below(ax: Axes) -> None:
    """A legend under the axes, where it covers no data."""
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=9)


def whole_numbers(axis: Axis) -> None:
    """Ticks of a log axis at 1, 2, 5, 10, 20..., written in full."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


@contextmanager
def sheet(
    path: Path,
    title: str,
    size: tuple[float, float],
    rows: int,
    columns: int,
    sharex: bool = False,
    sharey: bool = False,
) -> Iterator[tuple[Figure, list[list[Axes]]]]:
    """A titled figure of rows x columns axes in the demo's style, saved to `path` at the end."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
        figure.suptitle(title)
        yield figure, [list(row) for row in axes]
        figure.savefig(path)
