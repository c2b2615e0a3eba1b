"""What a call may ask for beyond batch norm alone: weights, groups, a residual, an activation.

`Asked` is what the caller asked for, checked, in the shape of x; `Extras` is the same in the kernels' view. Both are
None in a plain call, which then pays nothing for them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .arguments import check_array, check_place, describe, finite, integer
from .arrays import FLOAT32, FLOAT64, NUMBA, Span
from .host import check_host
from .layout import Channels, Views

# Activations, and the parameter that those have that take one.
ACTIVATIONS: dict[str, float | None] = {
    "relu": None,
    "leaky_relu": 0.01,  # slope below 0
    "relu6": None,
    "elu": 1.0,  # scale below 0
    "silu": None,
    "gelu": None,  # by erf
    "sigmoid": None,
    "tanh": None,
    "hardswish": None,
}
INVERTIBLE = "", "leaky_relu", "elu"
MASKED = "normalize", "zero", "keep"


class Extras(NamedTuple):
    """As kernels take it: `fastbn.kernels` says what each is for."""

    activation: str = ""
    parameter: float = 0.0
    residual: Any = None  # (O, C, I) of y's type
    dresidual: Any = None  # the same, to be written by backward
    weights: Any = None  # (O, 1, I) contiguous, float32, or float64 for float64 x
    masked: str = "normalize"
    mass: Any = None  # (G,) float64: the sum of the weights of a group; given with weights, on a GPU by forward itself
    order: Any = None  # (O,) int64: the outer indices, group by group; None: as they come
    starts: Any = None  # (G + 1,) int64: where a group starts in `order`; None: one group
    inverse: bool = False  # in backward, x holds the y that forward gave
    lost: Any = None  # (n,) int64, ascending: channels that can't be had back from y. Of arrays in main memory alone
    kept: Any = None  # (O, n, I) of x's type: their x, which forward writes and backward reads

    def features(self) -> list[str]:
        """What it asks of a backend, by the names in `forward`'s signature."""
        asked = {
            "activation": self.activation != "",
            "residual": self.residual is not None or self.dresidual is not None,
            "groups": self.starts is not None,
            "weights": self.weights is not None,
            "save='y'": self.inverse or self.lost is not None,
        }
        return [name for name, there in asked.items() if there]


class Asked(NamedTuple):
    """What the caller asked for, in the shape of x."""

    activation: str = ""
    parameter: float = 0.0
    residual: Any = None  # of x's shape
    weights: Any = None  # of x's shape, with 1 on the channel axes: NumPy's, or a Span of their own
    masked: str = "normalize"
    samples: int = 0  # the axis of the samples
    groups: Groups | None = None
    save: str = "x"
    lost: np.ndarray | None = None  # with save="y": the channels that can't be had back from it, if there are any

    @property
    def sets(self) -> int:
        """How many sets of statistics there are."""
        return 1 if self.groups is None else self.groups.number

    def bare(self, inverse: bool = False, kept: Any = None) -> Extras:
        """For the kernels, of an activation and save="y" alone, which need no view but that of x of lost channels."""
        lost = None if kept is None else self.lost
        return Extras(self.activation, self.parameter, inverse=inverse, lost=lost, kept=kept)

    def plain(self) -> Asked:
        """With the weights alone: what statistics depend on."""
        return self._replace(activation="", residual=None, masked="normalize", groups=None, save="x")

    def masses(self, channels: Channels, shape: tuple[int, ...]) -> Any:
        """(G,) float64, with weights or groups: the sum of the weights of each set, or the number of its values.

        Sums of weights on a GPU are left for the kernels to write, so that nothing waits for them.
        """
        if isinstance(self.weights, Span):
            return self.weights.family.new((self.sets,), FLOAT64, self.weights.device)
        samples = shape[self.samples]
        if self.groups is None:
            return np.array([self.weights.sum(dtype=np.float64)])
        if self.weights is None:
            starts = self.groups.starts
            return (starts[1:] - starts[:-1]) * float(channels.values // max(1, samples))
        others = tuple(a for a in range(len(shape)) if a != self.samples)
        by_sample = self.weights.sum(axis=others, dtype=np.float64)
        ordered = by_sample if self.groups.order is None else by_sample[self.groups.order]
        first, last = self.groups.starts[:-1], self.groups.starts[1:]
        sums = np.zeros(self.groups.number)
        if samples:  # what lies between the starts of groups that aren't empty is the first one's
            some = first < last
            sums[some] = np.add.reduceat(ordered, first[some])
        return sums

    def seen(self, views: Views, masses: Any, residual: Any, dresidual: Any, inverse: bool, kept: Any = None) -> Extras:
        """For the kernels, in the view that they have of x; residuals and x of lost channels are seen so already."""
        outer = views.shape[0]
        weights = None if self.weights is None else views.positions(self.weights)
        order = starts = None
        if self.groups is not None:
            rows = outer // max(1, self.groups.samples)  # outer indices of a sample, one behind the other
            starts = self.groups.starts if rows == 1 else self.groups.starts * rows
            order = self.groups.order
            if order is not None and rows > 1:
                order = (order[:, None] * rows + np.arange(rows)).reshape(-1)
        return Extras(
            self.activation, self.parameter, residual, dresidual, weights, self.masked, masses, order, starts, inverse,
            None if kept is None else self.lost, kept,
        )  # fmt: skip


class Groups(NamedTuple):
    """Sets of samples with statistics of their own."""

    number: int
    samples: int
    order: np.ndarray | None  # (N,) int64: the samples, group by group; None: as they come
    starts: np.ndarray  # (G + 1,) int64


def ask(
    where: str,
    x: Any,
    axes: tuple[int, ...],
    result: Any,
    weights: Any = None,
    masked: str = "normalize",
    groups: Any = None,
    residual: Any = None,
    activation: Any = None,
    save: str = "x",
) -> Asked:
    """Check what a caller asked for. `result` is the dtype of y."""
    if masked not in MASKED:
        raise ValueError(f"{where}: masked is {describe(masked)}; expected one of {', '.join(MASKED)}")
    if masked != "normalize" and weights is None:
        raise ValueError(f"{where}: masked={masked!r} without weights; expected weights, whose zeros it is about")
    name, parameter = _check_saved(where, activation, save)
    if save == "y" and residual is not None:
        raise ValueError(f"{where}: save='y' can't be had with a residual, which would be needed too; use save='x'")
    samples = next((a for a in range(x.ndim) if a not in axes), 0)
    if residual is not None:
        check_place(where, "residual", residual, x)
        residual = check_array(where, "residual", residual)
        if residual.shape != x.shape or residual.dtype != result:
            raise ValueError(
                f"{where}: residual is a {describe(residual)}; expected {result} of shape {x.shape}, like y. Convert it"
            )
    checked = None if weights is None else _weights(where, weights, x, axes)
    if groups is not None and len(axes) == x.ndim:
        raise ValueError(f"{where}: groups, and every axis of x, {x.shape}, is the channels'; expected one of samples")
    parted = None if groups is None else _groups(where, groups, x.shape[samples])
    return Asked(name, parameter, residual, checked, masked, samples, parted, save)


def asked_alone(where: str, activation: Any, save: str = "x") -> Asked | None:
    """As `ask`, for an activation and what is kept, and nothing else; None for neither."""
    name, parameter = _check_saved(where, activation, save)
    return Asked(name, parameter, save=save) if name or save == "y" else None


def _check_saved(where: str, activation: Any, save: str) -> tuple[str, float]:
    """As `check_activation`, of one whose x can be had back from y if that is what is saved."""
    if save not in ("x", "y"):
        raise ValueError(f"{where}: save is {describe(save)}; expected 'x' or 'y'")
    name, parameter = check_activation(where, activation)
    if save == "y" and name not in INVERTIBLE:
        raise ValueError(
            f"{where}: save='y' needs an activation that can be inverted: none, leaky_relu or elu; {name} came. "
            "Leave save='x', which keeps x alone"
        )
    if save == "y" and name and parameter <= 0:
        raise ValueError(f"{where}: save='y' needs a {name} with a parameter above 0; {parameter} came")
    return name, parameter


_MOST = float(np.finfo(np.float32).max)


def check_activation(where: str, activation: Any) -> tuple[str, float]:
    """Its name and its parameter; no name for none."""
    name, given = activation, None
    if isinstance(activation, (tuple, list)) and len(activation) == 2:
        name, given = activation
    if name is None and given is None:
        return "", 0.0
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(
            f"{where}: activation is {describe(activation)}; expected one of {', '.join(ACTIVATIONS)}, or a pair of "
            "one and its parameter, such as ('leaky_relu', 0.1)"
        )
    usual = ACTIVATIONS[name]
    if given is None:
        return name, usual or 0.0
    number = finite(given)
    if usual is None or number is None or abs(number) > _MOST:
        what = "which takes no parameter" if usual is None else "expected a finite number as its parameter"
        raise ValueError(f"{where}: activation is {describe(activation)}, {what}")
    return name, number


def _weights(where: str, weights: Any, x: Any, axes: tuple[int, ...]) -> Any:
    found = check_place(where, "weights", weights, x)
    if isinstance(x, Span):
        return _weights_there(where, found, x, axes)
    if isinstance(weights, np.ma.MaskedArray):
        raise TypeError(f"{where}: weights is a masked array; expected a plain array. Pass ~weights.mask")
    try:
        array = np.asarray(check_host(where, "weights", weights))
    except ValueError:
        raise ValueError(f"{where}: weights is ragged; expected one real number for each sample or position") from None
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"{where}: weights is a {describe(array)}; expected bools, or real numbers of 0 or more")
    shape, full = _weights_shape(where, array.shape, x, axes)
    if array.dtype.kind != "b":
        _check_range(where, array)
    # In the type that x is computed in; where it has to be converted it is, to the size of x without its channels.
    return np.broadcast_to(array.reshape(shape).astype(_weights_type(x)), full)


def _check_range(where: str, weights: np.ndarray) -> None:
    if weights.dtype.itemsize > 8 or weights.dtype.name == "bfloat16":
        with np.errstate(over="ignore"):
            weights = weights.astype(np.float64)
    least, most = (float(f(weights, initial=0)) for f in (np.min, np.max))  # NaN where there is one
    if not (least >= 0 and most < np.inf):
        bad = weights[~(np.isfinite(weights) & (weights >= 0))][0]
        raise ValueError(f"{where}: weights has {bad:g}; expected finite numbers of 0 or more")
    if most > 0 and not 1e-30 <= most <= 1e30:  # beyond, float32 loses squares by weight, or them altogether
        raise ValueError(
            f"{where}: weights has {most:g} as its largest; expected 1e-30 to 1e30. Divide them by it, as "
            "only their ratios count"
        )


def _weights_type(x: Any) -> np.dtype[Any]:
    return FLOAT64 if x.dtype.itemsize == 8 and x.dtype.kind == "f" else FLOAT32


def _weights_shape(
    where: str, came: tuple[int, ...], x: Any, axes: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of weights with an axis for each of x's, and that which they are repeated to."""
    others = [a for a in range(x.ndim) if a not in axes]
    shape = came
    if len(came) == 1 and (x.ndim > 2 or len(others) == 1):  # one for each sample
        shape = tuple(came[0] if a == others[0] else 1 for a in range(x.ndim))
    elif len(came) == len(others):  # x's shape without the channels
        shape = tuple(1 if a in axes else came[others.index(a)] for a in range(x.ndim))
    full = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    if len(shape) != x.ndim or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise ValueError(
            f"{where}: weights has shape {came}; expected {full}, 1 where it is the same for all, or "
            f"({x.shape[others[0]] if others else 1},) for one a sample"
        )
    return shape, full


def _weights_there(where: str, weights: Span, x: Span, axes: tuple[int, ...]) -> Span:
    """As `_weights`, by x's library, in the memory order of x. Their values aren't looked at: that would wait."""
    family = x.family
    if (reason := family.refusal(weights.value, "weights")) is not None:
        raise TypeError(f"{where}: weights is a {weights}, and {reason}")
    if not family.real(weights.value):
        raise TypeError(f"{where}: weights is a {weights}; expected bools, or real numbers of 0 or more")
    shape, full = _weights_shape(where, weights.shape, x, axes)
    made = family.like(family.described(full, _weights_type(x), x.device), x.strides)
    if family is NUMBA and (shape != full or weights.dtype != made.dtype or not weights.dense):
        raise TypeError(
            f"{where}: weights is a {weights} with strides {weights.strides}; expected a contiguous array of "
            f"{made.dtype} and shape {full}, as Numba device arrays can't be converted where they are"
        )
    family.assign(made, family.locate(weights.value.reshape(shape)))
    return made


@functools.lru_cache(maxsize=256)
def _even_groups(number: int, samples: int) -> Groups:
    """The first ones have one sample more, if there is a remainder."""
    sizes = np.full(number, samples // number, np.int64)
    sizes[: samples % number] += 1
    return Groups(number, samples, None, np.concatenate([[0], np.cumsum(sizes)]))


def _groups(where: str, groups: Any, samples: int) -> Groups:
    if (number := integer(groups)) is not None:
        if not 1 <= number <= max(1, samples):
            raise ValueError(
                f"{where}: groups is {number}; expected a number of groups from 1 to {samples}, the number of samples"
            )
        return _even_groups(number, samples)
    groups = check_host(where, "groups", groups)
    if isinstance(groups, np.ndarray):
        if groups.shape != (samples,) or groups.dtype.kind not in "iu" or (groups.size and groups.min() < 0):
            raise ValueError(
                f"{where}: groups is a {describe(groups)}; expected one whole number of 0 or more for each of "
                f"{samples} samples. For sizes of groups, pass a list"
            )
        number = int(groups.max()) + 1 if samples else 1
        if number > max(1024, 4 * samples):
            raise ValueError(
                f"{where}: groups names group {number - 1} among {samples} samples; expected numbers from 0 on. "
                "Number them by np.unique(groups, return_inverse=True)[1]"
            )
        ids: np.ndarray = groups.astype(
            np.uint16 if number <= 1 << 16 else np.int64
        )  # 16 bits are sorted in a quarter of the time
        starts = np.concatenate([[0], np.cumsum(np.bincount(ids, minlength=number))])
        in_order = np.all(ids[1:] >= ids[:-1])  # differences of unsigned ids are never below 0
        return Groups(number, samples, None if in_order else np.argsort(ids, kind="stable"), starts)
    each = groups if isinstance(groups, Sequence) else ()
    listed = [number for n in each if (number := integer(n, 0)) is not None]
    if listed and len(listed) == len(groups):
        if sum(listed) != samples:
            raise ValueError(
                f"{where}: groups has sizes that add up to {sum(listed)}; expected {samples}, the number of samples. "
                "For an id of each sample, pass an array"
            )
        return Groups(len(groups), samples, None, np.concatenate([[0], np.cumsum(np.array(listed, np.int64))]))
    raise TypeError(
        f"{where}: groups is {describe(groups)}; expected a number of groups, a list of their sizes, or an array with "
        "the group of each sample"
    )
