"""How other frameworks keep running statistics: their defaults, the sense of their momentum, and their names.

Facts, each checked on the framework itself by tests/test_frameworks.py:

PyTorch (torch.nn.BatchNorm2d): momentum 0.1 weighs the new batch; unbiased variance; eps 1e-5.
Keras 3 (layers.BatchNormalization): momentum 0.99 weighs the old value; biased variance; epsilon 1e-3.
Flax (linen.BatchNorm, nnx.BatchNorm): momentum 0.99 weighs the old value; biased variance; epsilon 1e-5.
ONNX (BatchNormalization-15, training_mode=1): momentum 0.9 weighs the old value; population variance; epsilon 1e-5.

No framework is imported: its objects are read by their attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .arguments import check_shape, describe, integer


class Found(NamedTuple):
    """What a preset is made from; mean and var are None where only channels are known."""

    channels: tuple[int, ...]
    momentum: float | None
    eps: float
    mean: Any = None
    var: Any = None
    batches: int = 0


class Preset(NamedTuple):
    """A framework's defaults and names."""

    where: str
    momentum: float
    decay: bool  # momentum is the weight of the old value
    eps: float
    ddof: int
    names: tuple[str, str]  # of mean and variance
    eps_name: str
    count_name: str | None
    source: str  # in words, for errors

    def read(self, source: Any) -> Found:
        """From channels, the framework's object, or a mapping with its names."""
        if integer(source) is not None or isinstance(source, (tuple, list)):
            return Found(check_shape(self.where, source), self.momentum, self.eps)
        if isinstance(source, Mapping):
            inner = source.get("batch_stats", source)
            get = inner.get if isinstance(inner, Mapping) else lambda *_: None
        else:

            def get(name: str, default: Any = None) -> Any:
                return getattr(source, name, default)

        mean, var = (get(name) for name in self.names)
        if mean is None or var is None:
            came = sorted(map(str, source)) if isinstance(source, Mapping) else describe(source)
            raise TypeError(
                f"{self.where}: source is {came}, which has no {' and '.join(self.names)}; expected the number of "
                f"channels, {self.source}"
            )
        mean, var = _host(mean), _host(var)
        count = get(self.count_name) if self.count_name else None
        momentum: Any = get("momentum", self.momentum)
        eps: Any = get(self.eps_name, self.eps)
        return Found(tuple(mean.shape), momentum, eps, mean, var, 0 if count is None else int(_host(count)))


def _host(value: Any) -> np.ndarray:
    """As a NumPy array: a tensor of PyTorch (on a GPU too), a Keras or Flax variable, a JAX array, a list."""
    if type(value).__module__.startswith("keras."):
        value = value.value  # NumPy warns of a Keras variable's own conversion, of a tensor's it doesn't
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.dtype.itemsize == 2 else value  # NumPy has no bfloat16
    return np.asarray(value)


_FROM = "fastbn.RunningStats.from_"
TORCH = Preset(
    where=_FROM + "torch",
    momentum=0.1,
    decay=False,
    eps=1e-5,
    ddof=1,
    names=("running_mean", "running_var"),
    eps_name="eps",
    count_name="num_batches_tracked",
    source="a BatchNorm module with track_running_stats=True, its state_dict(), or a mapping with these names",
)
KERAS = Preset(
    where=_FROM + "keras",
    momentum=0.99,
    decay=True,
    eps=1e-3,
    ddof=0,
    names=("moving_mean", "moving_variance"),
    eps_name="epsilon",
    count_name=None,
    source="a BatchNormalization layer that was built, or a mapping with these names",
)
FLAX = Preset(
    where=_FROM + "flax",
    momentum=0.99,
    decay=True,
    eps=1e-5,
    ddof=0,
    names=("mean", "var"),
    eps_name="epsilon",
    count_name=None,
    source="an nnx.BatchNorm, a layer's batch_stats, or a mapping with these names",
)
ONNX = Preset(
    where=_FROM + "onnx",
    momentum=0.9,
    decay=True,
    eps=1e-5,
    ddof=0,
    names=("input_mean", "input_var"),
    eps_name="epsilon",
    count_name=None,
    source="or a mapping with these names",
)
