"""What the experiments repeat: the digits, one training run, one look at the gradients.

A `Setting` says everything about a run, so the same setting gives the same figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .net import CLASSES, Array, Labels, Net

TRAINING_IMAGES = 1437  # of 1,797; the other 360 are the test set
GRADIENT_BATCH = 256


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 8x8 digits, shuffled and split; pixels in 0..1 less the training mean."""

    x: Array  # (1437, 64)
    labels: Labels  # (1437,)
    test_x: Array  # (360, 64)
    test_labels: Labels  # (360,)


@dataclass(frozen=True)
class Setting:
    """One net and how it is trained; `norm` says for each hidden layer whether it has batch norm."""

    norm: tuple[bool, ...]
    activation: str
    seed: tuple[int, ...] = (0,)
    rate: float = 0.1
    steps: int = 0
    init: str = "xavier"
    scale: float = 1.0
    width: int = 100
    batch: int = 60
    images: int = TRAINING_IMAGES  # how many of the training images, drawn by the seed
    decay: float = 0.0
    wrong_labels: float = 0.0
    stop_at: float = 1.0  # test accuracy that ends the run

    def net(self) -> Net:
        """The net at initialization: the same weights with and without batch norm."""
        rng = np.random.default_rng([*self.seed, 0])
        return Net(rng, self.norm, self.width, self.activation, self.init, self.scale)


@dataclass(frozen=True)
class Curve:
    """Test accuracy along a run, measured every 5 steps, later every twentieth part of the steps so far."""

    setting: Setting
    steps: tuple[int, ...]
    accuracy: tuple[float, ...]

    def steps_to(self, accuracy: float) -> float:
        """Steps until this test accuracy was first measured; infinite where it never was."""
        return next((t for t, a in zip(self.steps, self.accuracy, strict=True) if a >= accuracy), np.inf)

    @property
    def final(self) -> float:
        """Test accuracy at the last step."""
        return self.accuracy[-1]


def load_digits(seed: int) -> Digits:
    """The 1,797 images bundled with scikit-learn, split by `seed`; nothing is downloaded."""
    from sklearn.datasets import load_digits as bundled

    pixels, labels = bundled(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(pixels))
    x = (pixels[order] / 16).astype(np.float32)
    y = labels[order].astype(np.intp)
    x -= x[:TRAINING_IMAGES].mean(0)
    return Digits(x[:TRAINING_IMAGES], y[:TRAINING_IMAGES], x[TRAINING_IMAGES:], y[TRAINING_IMAGES:])


def train(setting: Setting, digits: Digits) -> Curve:
    """Train one net by SGD and follow its test accuracy; a loss that overflows ends the run."""
    net = setting.net()
    rng = np.random.default_rng([*setting.seed, 1])
    images = rng.permutation(len(digits.x))[: setting.images]
    x, labels = digits.x[images], with_wrong_labels(digits.labels[images], setting.wrong_labels, rng)
    steps, accuracy, check = [], [], 5
    with np.errstate(all="ignore"):  # exploding nets are part of the experiment
        for t, rows in zip(range(1, setting.steps + 1), batches(rng, len(x), setting.batch), strict=False):
            loss = net.loss(x[rows], labels[rows])
            net.step(setting.rate, setting.decay)
            lost = not np.isfinite(loss)
            if t >= check or t == setting.steps or lost:
                steps.append(t)
                accuracy.append(net.accuracy(digits.test_x, digits.test_labels))
                check = t + max(5, t // 20)
                if lost or accuracy[-1] >= setting.stop_at:
                    break
    return Curve(setting, tuple(steps), tuple(accuracy))


def gradient_sizes(setting: Setting, digits: Digits) -> npt.NDArray[np.float64]:
    """Root mean square of the loss's gradient by each hidden layer's weight, first to last, untrained."""
    net = setting.net()
    with np.errstate(all="ignore"):
        net.loss(digits.x[:GRADIENT_BATCH], digits.labels[:GRADIENT_BATCH])
        # Float64: the square of a gradient of 1e-25 is zero in float32.
        sizes = [np.sqrt(np.mean(np.square(layer.dweight, dtype=np.float64))) for layer in net.linears()]
    return np.array(sizes[:-1])


def batches(rng: np.random.Generator, images: int, batch: int) -> Iterator[npt.NDArray[np.intp]]:
    """Rows of full batches for ever, every image at most once an epoch."""
    while True:
        order = rng.permutation(images)
        for start in range(0, images - batch + 1, batch):
            yield order[start : start + batch]


def with_wrong_labels(labels: Labels, share: float, rng: np.random.Generator) -> Labels:
    """A copy in which this share of the labels is one of the nine wrong ones."""
    wrong = rng.permutation(len(labels))[: round(share * len(labels))]
    labels = labels.copy()
    labels[wrong] = (labels[wrong] + rng.integers(1, CLASSES, len(wrong))) % CLASSES
    return labels
