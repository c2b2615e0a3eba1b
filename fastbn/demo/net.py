"""A deep net in plain NumPy: linear layers, activations, SGD; every normalization is `fastbn.BatchNorm`.

A layer is called on a batch and gives its output; `backward` takes the loss's gradient by that output and
gives the one by its input, keeping those of its own parameters. A net is a list of such layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import fastbn

Array = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.intp]

PIXELS, CLASSES = 64, 10
AT_ONCE = 180  # images named in one pass


class Layer(Protocol):
    """What a net is made of."""

    def __call__(self, x: Array) -> Array: ...
    def backward(self, dy: Array) -> Array: ...


class Linear:
    """y = x @ weight + bias, for x (N, inputs), weight (inputs, outputs)."""

    def __init__(self, weight: Array) -> None:
        self.weight = weight
        self.bias = np.zeros(weight.shape[1], weight.dtype)

    def __call__(self, x: Array) -> Array:
        self.x = x
        y: Array = x @ self.weight + self.bias
        return y

    def backward(self, dy: Array) -> Array:
        self.dweight = self.x.T @ dy
        self.dbias = dy.sum(0)
        dx: Array = dy @ self.weight.T
        return dx


class Sigmoid:
    """y = 1 / (1 + exp(-x)), written by tanh, which cannot overflow."""

    def __call__(self, x: Array) -> Array:
        y: Array = 0.5 * np.tanh(0.5 * x) + 0.5
        self.y = y
        return y

    def backward(self, dy: Array) -> Array:
        dx: Array = dy * (self.y * (1 - self.y))
        return dx


class Tanh:
    """y = tanh(x)."""

    def __call__(self, x: Array) -> Array:
        self.y = np.tanh(x)
        return self.y

    def backward(self, dy: Array) -> Array:
        dx: Array = dy * (1 - self.y * self.y)
        return dx


class ReLU:
    """y = max(x, 0)."""

    def __call__(self, x: Array) -> Array:
        self.y = np.maximum(x, 0)
        return self.y

    def backward(self, dy: Array) -> Array:
        dx: Array = dy * (self.y > 0)
        return dx


ACTIVATIONS: dict[str, type[Sigmoid | Tanh | ReLU]] = {"sigmoid": Sigmoid, "tanh": Tanh, "ReLU": ReLU}


class Net:
    """`len(norm)` hidden layers of `width` units, then ten logits; batch norm where `norm` says so.

    Batch norm stands before the activation, as in Ioffe & Szegedy 2015, section 3.2.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        norm: Sequence[bool],
        width: int,
        activation: str,
        init: str = "xavier",
        scale: float = 1.0,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self.layers: list[Layer] = []
        inputs = PIXELS
        for normalized in norm:
            self.layers.append(Linear(weights(rng, inputs, width, init, scale, dtype)))
            if normalized:
                self.layers.append(fastbn.BatchNorm(width, dtype=dtype))
            self.layers.append(ACTIVATIONS[activation]())
            inputs = width
        self.layers.append(Linear(weights(rng, inputs, CLASSES, init, scale, dtype)))

    def forward(self, x: Array) -> Array:
        """Logits (N, 10) of images x (N, 64)."""
        for layer in self.layers:
            x = layer(x)
        return x

    def loss(self, x: Array, labels: Labels) -> float:
        """Mean cross-entropy of a batch; every layer then holds its gradients."""
        logits = self.forward(x)
        logits = logits - logits.max(1, keepdims=True)
        p = np.exp(logits)
        p /= p.sum(1, keepdims=True)
        rows = np.arange(len(x))
        loss = -np.log(p[rows, labels] + np.finfo(p.dtype).tiny).mean()
        p[rows, labels] -= 1
        dy = p / len(x)
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return float(loss)

    def accuracy(self, x: Array, labels: Labels) -> float:
        """Share of images named right, with the running statistics in place of the batch's."""
        for layer in self.norms():
            layer.eval()
        # Not all 360 images at once: that is where fastbn's threads wake, and their spinning between calls
        # took 1.6 times the processor time of the whole training.
        parts = [x[start : start + AT_ONCE] for start in range(0, len(x), AT_ONCE)]
        found = np.concatenate([self.forward(part).argmax(1) for part in parts])
        for layer in self.norms():
            layer.train()
        return float(np.mean(found == labels))

    def step(self, rate: float, decay: float = 0.0) -> None:
        """One step of SGD, in place; `decay` is the L2 penalty on the linear weights."""
        for layer in self.linears():
            layer.weight -= rate * (layer.dweight + decay * layer.weight) if decay else rate * layer.dweight
            layer.bias -= rate * layer.dbias
        for norm in self.norms():
            norm.gamma -= rate * norm.dgamma
            norm.beta -= rate * norm.dbeta

    def linears(self) -> Iterator[Linear]:
        """The linear layers, first to last."""
        return (layer for layer in self.layers if isinstance(layer, Linear))

    def norms(self) -> Iterator[fastbn.BatchNorm]:
        """The batch norms, first to last."""
        return (layer for layer in self.layers if isinstance(layer, fastbn.BatchNorm))


def weights(
    rng: np.random.Generator, inputs: int, outputs: int, init: str, scale: float, dtype: npt.DTypeLike
) -> Array:
    """A Gaussian weight (inputs, outputs) of the initialization's standard deviation times `scale`."""
    std = {
        "small": 0.01,
        "normal": 1.0,
        "xavier": (2 / (inputs + outputs)) ** 0.5,  # Glorot & Bengio 2010
        "he": (2 / inputs) ** 0.5,  # He et al. 2015
    }[init]
    weight: Array = (scale * std * rng.standard_normal((inputs, outputs))).astype(dtype)
    return weight
