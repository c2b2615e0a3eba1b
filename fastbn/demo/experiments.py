"""The six experiments, and a seventh on what batch norm does not help with.

Each takes a `Lab` (what to train on and how much of it) and returns an `Outcome`: claims whose figures are
computed from its own runs, a table, and its plot. Settings and bars were chosen after trial runs with seed 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from . import plots
from .lab import Claim, Fewer, Floats, Lab, Outcome, listed, median_steps, paired, steps, trained, with_or_without
from .training import Setting, gradient_sizes

TRAINED = 0.9  # test accuracy from which a setting counts as one that trains


def gradients(lab: Lab) -> Outcome:
    """1. Gradient size per layer at initialization, by activation, initialization and depth."""
    inits = {"N(0, 0.01²)": "small", "N(0, 1)": "normal", "Xavier": "xavier", "He": "he"}
    keys = [
        (activation, init, depth, norm)
        for activation in ("sigmoid", "tanh", "ReLU")
        for init in inits
        for depth in lab.budget.depths
        for norm in (False, True)
    ]
    sizes: dict[tuple[str, str, int, bool], Floats] = {}
    for done, (activation, init, depth, norm) in enumerate(keys):
        lab.progress(done, len(keys))
        setting = Setting((norm,) * depth, activation, init=inits[init], width=100)
        nets = [replace(setting, seed=(lab.seed, seed)) for seed in range(min(3, lab.budget.seeds))]
        # Overflowed gradients are infinite; a median over the nets stands for each layer.
        with np.errstate(all="ignore"):
            profile = np.median([gradient_sizes(net, lab.digits) for net in nets], axis=0)
        sizes[activation, init, depth, norm] = profile
    lab.progress(len(keys), len(keys))

    def ratio(*key: str | int, norm: bool) -> float:
        profile = sizes[(*key, norm)]  # type: ignore[index]
        return float(profile[0] / profile[-1]) if profile[-1] > 0 else np.nan

    def usable(norm: bool) -> float:
        profiles = [p for (*_, n), p in sizes.items() if n == norm]
        return float(np.mean([p.min() >= 1e-5 and p.max() <= 10 for p in profiles]))

    vanishing, tamed = ratio("sigmoid", "Xavier", 10, norm=False), ratio("sigmoid", "Xavier", 10, norm=True)
    exploding, calmed = ratio("tanh", "N(0, 1)", 20, norm=False), ratio("tanh", "N(0, 1)", 20, norm=True)
    claims = [
        Claim(
            "Sigmoid, Xavier, 10 layers: gradients vanish without, stay with batch norm (first / last layer)",
            "< 0.001 without, 0.1 to 10 with",
            f"{vanishing:.0e} without, {tamed:.2g} with",
            vanishing < 1e-3 and 0.1 <= tamed <= 10,
        ),
        Claim(
            "tanh, N(0, 1), 20 layers: gradients explode without, stay with batch norm (first / last layer)",
            "> 1000 without, < 30 with",
            f"{exploding:.0e} without, {calmed:.2g} with",
            exploding > 1000 and calmed < 30,
        ),
        Claim(
            "Share of the nets in which every layer's gradient size is within 1e-5 to 10",
            "at most 60% without, at least 95% with",
            f"{usable(False):.0%} without, {usable(True):.0%} with",
            usable(False) <= 0.6 and usable(True) >= 0.95,
        ),
    ]
    rows = [
        [
            activation,
            init,
            str(depth),
            *(f"{ratio(activation, init, depth, norm=n):.1e}" for n in (False, True)),
        ]
        for activation, init, depth, norm in keys
        if norm
    ]
    return Outcome(
        "gradients",
        "Vanishing and exploding gradients",
        f"Untrained nets of {listed(lab.budget.depths)} hidden layers of 100 units. The size of a layer's "
        "gradient is the root mean square of the loss's gradient by its weights, over a batch of 256 images; "
        f"the median over {min(3, lab.budget.seeds)} of them. The classical remedies are the choice of activation "
        "and of initialization.",
        claims,
        ["activation", "initialization", "layers", "first / last, without", "first / last, with"],
        rows,
        partial(
            plots.gradients,
            sizes,
            f"Gradients before training: within 1e-5 to 10 in every layer of {usable(False):.0%} of the nets "
            f"without, {usable(True):.0%} with batch norm",
        ),
        "nan: the last layer's gradient is itself zero in float32.",
    )


def speed(lab: Lab) -> Outcome:
    """2. Steps to a test accuracy: the net of the paper's section 4.1, at equal and at best rates."""
    budget = lab.budget
    runs = {
        (norm, rate): Setting(
            (norm,) * 3,
            "sigmoid",
            rate=rate,
            steps=budget.norm_steps if norm else budget.plain_steps,
            stop_at=1.0 if norm else 0.97,
        )
        for norm in (False, True)
        for rate in budget.rates
    }
    curves = lab.train(runs, lambda _: budget.seeds)
    to95 = {key: median_steps(found, 0.95) for key, found in curves.items()}
    best = {norm: min(budget.rates, key=lambda rate: to95[norm, rate]) for norm in (False, True)}
    at_best = [(norm, best[norm]) for norm in (False, True)]
    equal = 0.1
    fewer_best = Fewer(to95[at_best[0]], to95[at_best[1]], budget.plain_steps)
    fewer_equal = Fewer(to95[False, equal], to95[True, equal], budget.plain_steps)
    claims = [
        Claim(
            "Fewer steps to 95%, each at its best learning rate",
            "5 times fewer",
            f"{fewer_best}: {fewer_best.without} at rate {best[False]:g} without, "
            f"{steps(fewer_best.fast)} at rate {best[True]:g} with",
            fewer_best.times >= 5,
        ),
        Claim(
            "Fewer steps to 95%, both at rate 0.1",
            "20 times fewer",
            f"{fewer_equal}: {fewer_equal.without} without, {steps(fewer_equal.fast)} with",
            fewer_equal.times >= 20,
        ),
    ]
    rows = [
        [f"{rate:g}", with_or_without(norm), *(steps(median_steps(found, a)) for a in (0.9, 0.95, 0.97))]
        for (norm, rate), found in sorted(curves.items(), key=lambda item: (item[0][1], item[0][0]))
    ]
    shown = {(norm, "rate 0.1"): curves[norm, equal] for norm in (False, True)}
    shown |= {(norm, f"best rate, {rate:g}"): curves[norm, rate] for norm, rate in at_best}
    return Outcome(
        "speed",
        "Faster training",
        "3 hidden layers of 100 sigmoid units, batches of 60 (Ioffe & Szegedy 2015, section 4.1), Xavier "
        f"initialization, {budget.seeds} seeds; at most {budget.plain_steps} steps without, "
        f"{budget.norm_steps} with batch norm. The classical remedy is the best learning rate.",
        claims,
        ["learning rate", "batch norm", "steps to 90%", "95%", "97% (medians)"],
        rows,
        partial(
            plots.speed,
            shown,
            {key: [c.steps_to(0.95) for c in found] for key, found in curves.items()},
            f"{fewer_best} fewer steps to 95% with batch norm, each at its best rate",
        ),
        "A dash: not reached by half of the seeds.",
    )


def sensitivity(lab: Lab) -> Outcome:
    """3. Share of the learning rates and initial scales at which a net trains."""
    budget = lab.budget
    inits = {"sigmoid": "xavier", "tanh": "xavier", "ReLU": "he"}
    runs = {
        (activation, norm, rate, scale): Setting(
            (norm,) * 5,
            activation,
            rate=rate,
            steps=budget.grid_steps,
            init=init,
            scale=scale,
            width=50,
            stop_at=0.95,
        )
        for activation, init in inits.items()
        for norm in (False, True)
        for rate in budget.grid_rates
        for scale in budget.grid_scales
    }
    final = {key: found[0].final for key, found in lab.train(runs, lambda _: 1).items()}
    shape = len(budget.grid_rates), len(budget.grid_scales)
    grids = {
        (activation, norm): np.array([a for (f, n, *_), a in final.items() if (f, n) == (activation, norm)]).reshape(
            shape
        )
        for activation in inits
        for norm in (False, True)
    }
    share = {key: float(np.mean(grid >= TRAINED)) for key, grid in grids.items()}
    without, with_ = (float(np.mean([share[f, norm] for f in inits])) for norm in (False, True))
    claims = [
        Claim(
            "Share of learning rates and initial scales that train to 90%",
            "3 times the share without, and at least 40%",
            f"{with_:.0%} with, {without:.0%} without",
            with_ >= 3 * without and with_ >= 0.4,
        )
    ]
    rows = [
        [
            f,
            f"{share[f, False]:.0%}",
            f"{share[f, True]:.0%}",
            *(f"{grids[f, n].max():.1%}" for n in (False, True)),
        ]
        for f in inits
    ]
    return Outcome(
        "sensitivity",
        "Less sensitive to hyper-parameters",
        f"5 hidden layers of 50 units, {budget.grid_steps} steps (or until 95%), one seed; learning "
        f"rates {listed(budget.grid_rates)}, initial weights of scale {listed(budget.grid_scales)} times Xavier "
        "(ReLU: times He). The classical remedies are the right scale and the right rate: the best cells.",
        claims,
        ["activation", "trains, without", "trains, with", "best cell, without", "best cell, with"],
        rows,
        partial(
            plots.heat_maps,
            grids,
            budget.grid_rates,
            budget.grid_scales,
            f"Test accuracy after {budget.grid_steps} steps: {without:.0%} of the settings train without, "
            f"{with_:.0%} with batch norm",
        ),
    )


def regularization(lab: Lab) -> Outcome:
    """4. Test accuracy after long training on 150 images, of which 20% are labelled wrong."""
    budget = lab.budget
    rates = budget.memorizing_rates
    arms = {"without": (False, 0.0), "weight decay 0.01": (False, 1e-2), "batch norm": (True, 0.0)}
    runs = {
        (arm, rate): Setting(
            (norm,) * 3,
            "tanh",
            rate=rate,
            steps=budget.memorizing_steps,
            batch=50,
            images=150,
            wrong_labels=0.2,
            decay=decay,
        )
        for arm, (norm, decay) in arms.items()
        for rate in rates
    }
    curves = lab.train(runs, lambda _: budget.paired_seeds)
    final = {key: np.array([c.final for c in found]) for key, found in curves.items()}
    best = {arm: max(rates, key=lambda rate: final[arm, rate].mean()) for arm in arms}
    shown = {arm: final[arm, best[arm]] for arm in arms}
    gain, error = paired(shown["without"], shown["batch norm"])
    claims = [
        Claim(
            "tanh net trained long on 150 images with 20% wrong labels: test accuracy gained",
            "2 points, and more than 2 standard errors",
            f"{100 * gain:+.1f} ± {100 * error:.1f} points",
            gain >= 0.02 and gain > 2 * error,
        )
    ]
    rows = [
        [arm, f"{best[arm]:g}", f"{100 * a.mean():.1f}%", f"{100 * a.std(ddof=1) / len(a) ** 0.5:.1f}"]
        for arm, a in shown.items()
    ]
    return Outcome(
        "regularization",
        "Regularization",
        "3 hidden layers of 100 tanh units on 150 training images, 20% of them labelled wrong, "
        f"{budget.memorizing_steps} steps with batches of 50; {budget.paired_seeds} seeds, each arm at its "
        f"best learning rate of those tried: {listed(rates)}. The classical remedy is weight decay.",
        claims,
        ["arm", "rate", "test accuracy", "standard error, points"],
        rows,
        partial(
            plots.arms,
            shown,
            f"20% wrong labels: batch norm changes test accuracy by {100 * gain:+.1f} points",
        ),
    )


def placement(lab: Lab) -> Outcome:
    """5. Where to put it: the hidden layers that have batch norm."""
    budget = lab.budget
    places = {
        "none": (False,) * 5,
        "first only": (True, False, False, False, False),
        "last only": (False, False, False, False, True),
        "every other": (True, False, True, False, True),
        "every": (True,) * 5,
    }
    rates = budget.place_rates
    runs = {
        (place, rate): Setting(norm, "sigmoid", rate=rate, steps=budget.plain_steps // 4, width=50, stop_at=0.95)
        for place, norm in places.items()
        for rate in rates
    }
    curves = lab.train(runs, lambda _: budget.seeds)
    to95 = {key: [c.steps_to(0.95) for c in found] for key, found in curves.items()}
    best = {place: min(rates, key=lambda rate: np.median(to95[place, rate])) for place in places}
    shown = {place: to95[place, best[place]] for place in places}
    median = {place: float(np.median(found)) for place, found in shown.items()}
    single = min(median["first only"], median["last only"])
    fewer = Fewer(single, median["every"], budget.plain_steps // 4)
    claims = [
        Claim(
            "Every hidden layer is best: fewer steps to 95% than the better single layer",
            "2 times fewer, and no other place needs fewer",
            f"{fewer}: {fewer.without} single, {steps(median['every'])} every, "
            f"{steps(median['every other'])} every other",
            fewer.times >= 2 and median["every"] == min(median.values()),
        )
    ]
    rows = [
        [place, f"{best[place]:g}" if np.isfinite(median[place]) else "-"]
        + [steps(median_steps(curves[place, best[place]], a)) for a in (0.8, 0.9, 0.95)]
        for place in places
    ]
    return Outcome(
        "placement",
        "Where to put it",
        f"5 hidden layers of 50 sigmoid units, {budget.seeds} seeds, at most {budget.plain_steps // 4} steps, "
        f"each place at its best learning rate of those tried: {listed(rates)}.",
        claims,
        ["hidden layers with batch norm", "best rate", "steps to 80%", "90%", "95% (medians)"],
        rows,
        partial(
            plots.places,
            shown,
            f"Steps to 95%: {steps(median['every'])} with batch norm in every hidden layer, "
            f"{fewer.without} in the better single one",
        ),
        "A dash: not reached by half of the seeds.",
    )


def small_rate(lab: Lab) -> Outcome:
    """6. A small learning rate tames exploding gradients: what it costs in steps."""
    budget = lab.budget
    limit = {False: budget.plain_steps // 2, True: budget.norm_steps}
    runs = {
        (norm, rate): Setting(
            (norm,) * 5, "ReLU", rate=rate, steps=limit[norm], init="he", scale=2.0, width=50, stop_at=TRAINED
        )
        for norm in (False, True)
        for rate in budget.safe_rates
    }
    to90 = {key: [c.steps_to(TRAINED) for c in found] for key, found in lab.train(runs, lambda _: budget.seeds).items()}
    median = {key: float(np.median(found)) for key, found in to90.items()}
    largest = {
        norm: max((r for r in budget.safe_rates if np.isfinite(to90[norm, r]).all()), default=0.0)
        for norm in (False, True)
    }
    fastest = {norm: min(median[norm, r] for r in budget.safe_rates) for norm in (False, True)}
    fewer = Fewer(fastest[False], fastest[True], limit[False])
    # No rate at all that trains without counts as the smallest one tried.
    wider = largest[True] / (largest[False] or min(budget.safe_rates))
    claims = [
        Claim(
            "Largest learning rate at which every seed trains to 90%",
            "10 times larger",
            f"{wider:.0f} times: {largest[False]:g} without, {largest[True]:g} with",
            largest[True] > 0 and wider > 9.9,
        ),
        Claim(
            "What the small rate costs: steps to 90%, each at its best rate",
            "3 times fewer with batch norm",
            f"{fewer}: {fewer.without} without, {steps(fewer.fast)} with",
            fewer.times >= 3,
        ),
    ]
    rows = [
        [f"{rate:g}", *(f"{steps(median[n, rate])} ({trained(to90[n, rate])})" for n in (False, True))]
        for rate in budget.safe_rates
    ]
    return Outcome(
        "small-rate",
        "A small learning rate as the remedy",
        "5 hidden layers of 50 ReLU units, initial weights twice He's, so that gradients explode; "
        f"{budget.seeds} seeds, at most {limit[False]} steps without, {limit[True]} with batch norm.",
        claims,
        ["learning rate", "steps to 90%, without (seeds that train)", "with"],
        rows,
        partial(
            plots.rates,
            to90,
            f"Largest rate that trains every seed: {largest[False]:g} without, {largest[True]:g} with batch norm",
        ),
        "Medians; a dash: not reached by half of the seeds.",
    )


def limits(lab: Lab) -> Outcome:
    """What batch norm does not help with, measured too."""
    budget = lab.budget
    full_batch = Setting((), "ReLU", init="he", rate=0.1, batch=150, images=150, steps=budget.memorizing_steps // 2)
    wrong = Setting((), "tanh", rate=0.1, wrong_labels=0.2, steps=budget.memorizing_steps)
    deep = Setting((), "ReLU", init="he", width=50, steps=budget.deep_steps)
    deep_rates = budget.deep_rates
    runs = {
        (name, norm): replace(setting, norm=(norm,) * depth)
        for norm in (False, True)
        for name, setting, depth in [
            ("clean", full_batch, 3),
            ("wrong", wrong, 3),
            ("shallow", replace(deep, rate=0.1), 10),
            *((f"deep {rate:g}", replace(deep, rate=rate), 40) for rate in deep_rates),
        ]
    }
    found = lab.train(runs, lambda key: 2 if key[0].startswith(("deep", "shallow")) else max(2, budget.seeds))
    final = {key: np.array([c.final for c in curves]) for key, curves in found.items()}
    deepest = [max((final[f"deep {rate:g}", n] for rate in deep_rates), key=np.mean) for n in (False, True)]
    shown = {
        "ReLU, clean labels,\n150 images, full batch": (final["clean", False], final["clean", True]),
        f"tanh, 20% wrong labels,\nall images, {wrong.steps} steps": (
            final["wrong", False],
            final["wrong", True],
        ),
        f"ReLU, 40 layers, no skips,\n{deep.steps} steps, best rate": (deepest[0], deepest[1]),
    }
    change, error = paired(final["clean", False], final["clean", True])
    early, early_error = paired(final["wrong", False], final["wrong", True])
    failing, shallow = float(deepest[1].mean()), float(final["shallow", True].mean())
    claims = [
        Claim(
            "ReLU net, clean labels, full batch: test accuracy changed",
            "no help: at most 0",
            f"{100 * change:+.1f} ± {100 * error:.1f} points",
            change <= 0,
        ),
        Claim(
            "Wrong labels, but many images and few epochs: test accuracy changed",
            "no help: at most 0",
            f"{100 * early:+.1f} ± {100 * early_error:.1f} points",
            early <= 0,
        ),
        Claim(
            f"40 ReLU layers without skips fail within {deep.steps} steps (Yang et al. 2019): test accuracy",
            "no help: below 80% (10 layers: above)",
            f"{failing:.0%} with batch norm (10 layers: {shallow:.0%})",
            failing < 0.8 <= shallow,
        ),
    ]
    rows = [
        [name.replace("\n", " "), f"{100 * a.mean():.1f}%", f"{100 * b.mean():.1f}%"] for name, (a, b) in shown.items()
    ]
    return Outcome(
        "limits",
        "What it does not help with",
        "A shallow ReLU net on clean labels with the full batch: no noise from batches is left to regularize. "
        "Wrong labels among all 1,437 images: the faster net also learns the wrong ones sooner. 40 ReLU layers "
        "without skips: batch norm itself makes gradients grow with depth at initialization (best learning "
        f"rate of those tried: {listed(deep_rates)}; 2 seeds). {max(2, budget.seeds)} seeds for the others.",
        claims,
        ["net", "test accuracy, without", "with"],
        rows,
        partial(plots.pairs, shown, "Where batch norm does not help: test accuracy without and with it"),
    )


EXPERIMENTS: dict[str, Callable[[Lab], Outcome]] = {
    "gradients": gradients,
    "speed": speed,
    "sensitivity": sensitivity,
    "regularization": regularization,
    "placement": placement,
    "small rate": small_rate,
    "limits": limits,
}
