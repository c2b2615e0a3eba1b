"""RunningStats: the mean and variance that evaluation uses, updated when the caller says so."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import frameworks
from .arguments import check_channels, check_eps, check_shape, check_variances, describe, finite, integer
from .arrays import NUMPY, Family, place_of
from .moments import Moments, check_like

_GUARDS = "propagate", "skip", "raise"


class RunningStats:
    """Running mean and variance of every channel.

    ``mean = (1 - momentum) mean + momentum batch_mean``, and the same for the variance, M2 / (count - ddof).

    Parameters
    ----------
    channels : int or tuple of int
        Number of channels, or their shape.
    momentum : float or None
        The weight of the *new* batch, in [0, 1] (PyTorch's sense). None gives every batch the same weight
        (cumulative average).
    ddof : int
        1 (default) for the unbiased variance that PyTorch keeps, 0 for the biased one of Keras and Flax.
    decay : float, optional
        The weight of the *old* value, which Keras, Flax and ONNX call momentum; sets momentum to 1 - decay.
    dtype : optional
        In which `mean` and `var` are read: float32, or float64 once float64 data have come. Inside they are
        float64, so that evaluation is as right at any offset as training is.
    like : array, optional
        The statistics live where it lives: NumPy, or a GPU's CuPy arrays or PyTorch tensors. Not given, they are made
        where the first batch is, and are NumPy's till then. (Moments of Numba device arrays are NumPy's.)
    on_nonfinite : "propagate", "skip" or "raise"
        What a batch with NaN or Inf in its moments does to a channel that has them. "propagate" (default) takes them
        in, as all frameworks do: they stay. "skip" leaves that channel as it was and counts it in `skipped`; the other
        channels take the batch in. "raise" is a ValueError before anything changes; on a GPU it waits for the device.
    debias : bool
        Weigh the new batch, the k-th of its channel, by ``momentum / (1 - (1 - momentum)^k)``: then the initial 0 and 1
        count for nothing, as in Adam (Kingma & Ba 2015, section 3), and the first batch replaces them.

    Attributes
    ----------
    mean, var : arrays, copies; assign to change them
    batches : int
        Batches taken in. Of these, channel c skipped `skipped[c]`.
    variances : int
        Of the batches, those large enough to have a variance.
    skipped : int64 NumPy array of the channels' shape
    eps : float
        What the presets' framework adds to the variance: to be passed on to `forward`, `infer` or `fold`.

    The presets `from_torch`, `from_keras`, `from_flax` and `from_onnx` take the number of channels, or a framework's
    own object or arrays.

    An empty batch changes nothing, and a batch of no more than `ddof` values leaves the variance as it was:
    neither knows one.

    Raises
    ------
    ValueError
        For a momentum or decay outside [0, 1], or both given; in `update`, for other channels, for a list of groups
        without any, and for NaN or Inf if on_nonfinite="raise".
    TypeError
        In `update`, for moments that live elsewhere; for Numba device arrays as `like`.

    >>> import numpy as np, fastbn
    >>> running = fastbn.RunningStats(2, momentum=0.5)
    >>> running.update(fastbn.moments(np.float32([[1, 10], [3, 10]])))
    >>> running.mean, running.var
    (array([1., 5.], dtype=float32), array([1.5, 0.5], dtype=float32))

    >>> running = fastbn.RunningStats(2, momentum=0.5, on_nonfinite="skip")
    >>> running.update(fastbn.moments(np.float32([[1, np.nan], [3, 10]])))
    >>> running.mean, running
    (array([1., 0.], dtype=float32),
     RunningStats(channels=2, momentum=0.5, ddof=1, batches=1, skipped=1 in 1 channel))
    """

    def __init__(
        self,
        channels: int | tuple[int, ...],
        momentum: float | None = 0.1,
        ddof: int = 1,
        *,
        decay: float | None = None,
        dtype: Any = np.float32,
        like: Any = None,
        on_nonfinite: str = "propagate",
        debias: bool = False,
    ) -> None:
        if decay is not None:
            if momentum != 0.1:
                raise ValueError("fastbn.RunningStats: momentum and decay are both given; pass one of them")
            momentum = 1 - _weight("decay", decay)
        if (number := integer(ddof, 0)) is None:
            raise ValueError(f"fastbn.RunningStats: ddof is {describe(ddof)}; expected 0 or 1 (or more)")
        self.momentum = None if momentum is None else _weight("momentum", momentum)
        if on_nonfinite not in _GUARDS:
            raise ValueError(
                f"fastbn.RunningStats: on_nonfinite is {describe(on_nonfinite)}; "
                "expected 'propagate', 'skip' or 'raise'"
            )
        self.ddof = number
        self.on_nonfinite = on_nonfinite
        self.debias = bool(debias)
        self.eps = 1e-5
        self.batches = 0
        self.variances = 0
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.shape = check_shape("fastbn.RunningStats", channels)
        self._fixed = like is not None  # to where it lives
        self._start(*check_like("fastbn.RunningStats", like))

    def _start(self, family: Family, device: int) -> None:
        self._family, self._device = family, device
        self._mean, self._var = family.put(np.zeros(self.shape), device), family.put(np.ones(self.shape), device)
        self._skips: tuple[Any, Any] | None = None  # per channel, batches and variances skipped, in float64; None is 0

    @property
    def mean(self) -> Any:
        """Running mean: a copy; assign to change it."""
        return self._read(self._mean)

    @mean.setter
    def mean(self, value: Any) -> None:
        self._mean = check_channels("fastbn.RunningStats", "mean", value, self.shape, self._mean).reshape(self.shape)
        self._fixed = True

    @property
    def var(self) -> Any:
        """Running variance: a copy; assign to change it."""
        return self._read(self._var)

    @var.setter
    def var(self, value: Any) -> None:
        found = check_variances("fastbn.RunningStats", value, self.shape, beside=self._var)
        self._var = found.reshape(self.shape)
        self._fixed = True

    def exact(self, copy: bool = True) -> tuple[Any, Any]:
        """Mean and variance in float64, as they are kept; without `copy` not to be written to."""
        kept = self._mean, self._var
        return (self._family.copy(kept[0]), self._family.copy(kept[1])) if copy else kept

    @property
    def skipped(self) -> np.ndarray:
        """Per channel, how many batches were not taken in because of NaN or Inf. On a GPU this waits for the device."""
        return self._skip_counts()[0]

    def _skip_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Of batches and of variances, as int64 NumPy arrays."""
        if self._skips is None:
            return np.zeros(self.shape, np.int64), np.zeros(self.shape, np.int64)
        batches, variances = (self._family.host(a).astype(np.int64) for a in self._skips)
        return batches, variances

    def _set_skip_counts(self, batches: np.ndarray, variances: np.ndarray) -> None:
        self._skips = None
        if batches.any():
            family, device = self._family, self._device
            self._skips = family.put(batches.astype(float), device), family.put(variances.astype(float), device)

    def update(self, moments: Moments | list[Moments] | tuple[Moments, ...]) -> None:
        """Take in one batch: `saved.moments` of a forward pass, or `fastbn.moments(x)`.

        With groups, `saved.moments` is a list (or a tuple is given) of those of each group. They are one batch: they
        are merged first, to those of all its values, and empty groups count for nothing. What on_nonfinite says is for
        the merged ones, in which NaN or Inf of any group is.

        >>> import numpy as np, fastbn
        >>> running = fastbn.RunningStats(1, momentum=1)
        >>> y, saved = fastbn.forward(np.float32([[1], [3], [10], [50]]), groups=2)
        >>> saved.moments
        [Moments(count=2, mean=[2], var=[1]), Moments(count=2, mean=[30], var=[400])]
        >>> running.update(saved.moments)
        >>> running.mean.tolist(), running.batches
        ([16.0], 1)
        """
        if isinstance(moments, (list, tuple)):
            moments = self._together(moments)
        self._check("update", moments)
        if moments.count == 0:
            return
        mean, var = moments.exact(self.ddof, copy=False)
        self._meet(mean)
        taken = moments.finite() if self.on_nonfinite == "skip" else None
        varied = moments.count > self.ddof
        self.dtype = np.promote_types(self.dtype, moments.dtype)
        self.batches += 1
        self.variances += varied
        with np.errstate(all="ignore"):
            if taken is not None:
                self._skip(taken, varied)
            skips = self._skips or (None, None)
            self._mean = self._mixed(self._mean, mean, self.batches, skips[0], taken)
            if varied:
                self._var = self._mixed(self._var, var, self.variances, skips[1], taken)

    def replace(self, moments: Moments, batches: int = 1) -> None:
        """Put these moments, of `batches` batches, in place of all that is kept, as `fastbn.recalibrate` does.

        Where they are NaN or Inf, on_nonfinite="skip" leaves a channel as it was, with all the batches as skipped.

        Raises
        ------
        ValueError
            For a count of no more than `ddof`, which has no variance; and as `update`.

        >>> import numpy as np, fastbn
        >>> running = fastbn.RunningStats(1)
        >>> running.replace(fastbn.moments(np.float32([[1], [3]])))
        >>> running.mean, running.var
        (array([2.], dtype=float32), array([2.], dtype=float32))
        """
        self._check("replace", moments)
        if (number := integer(batches, 1)) is None:
            raise ValueError(f"fastbn.RunningStats.replace: batches is {describe(batches)}; expected 1 or more")
        if moments.count <= self.ddof:
            raise ValueError(
                f"fastbn.RunningStats.replace: moments has a count of {moments.count}; expected more than "
                f"ddof={self.ddof}, as fewer have no variance"
            )
        mean, var = moments.exact(self.ddof)
        self._meet(mean)
        self.dtype = np.promote_types(self.dtype, moments.dtype)
        self.batches = self.variances = number
        self._skips = None
        if self.on_nonfinite == "skip":
            taken, where = moments.finite(), self._family.xp.where
            mean, var = where(taken, mean, self._mean), where(taken, var, self._var)
            skipped = where(taken, self._mean * 0, self._mean * 0 + number)
            self._skips = skipped, skipped
        self._mean, self._var = mean, var

    def _together(self, groups: list[Moments] | tuple[Moments, ...]) -> Moments:
        """The moments of a batch, from those of its groups."""
        where = "fastbn.RunningStats.update"
        if not groups:
            raise ValueError(f"{where}: moments is an empty {type(groups).__name__}; expected those of each group")
        for group in groups:
            self._check_kind(where, group)
        return Moments.merge_all(groups)

    def _check(self, method: str, moments: Any) -> None:
        where = f"fastbn.RunningStats.{method}"
        self._check_kind(where, moments)
        if self.on_nonfinite == "raise":
            wrong = np.flatnonzero(~place_of(moments._hi)[0].host(moments.finite()).astype(bool))
            if wrong.size:
                few = ", ".join([str(c) for c in wrong[:6]] + ["..."] * (wrong.size > 6))
                raise ValueError(
                    f"{where}: moments is NaN or Inf in {wrong.size} of {math.prod(self.shape)} channels ({few}); "
                    'expected finite ones. Look for NaN or Inf in the batch, or pass on_nonfinite="skip"'
                )

    def _check_kind(self, where: str, moments: Any) -> None:
        if not isinstance(moments, Moments):
            raise TypeError(
                f"{where}: moments is a {type(moments).__name__}; expected Moments, "
                "as in saved.moments (None after a frozen forward pass) or fastbn.moments(x)"
            )
        if moments.shape != self.shape:
            raise ValueError(f"{where}: moments has channels of shape {moments.shape}; expected {self.shape}")

    def _skip(self, taken: Any, varied: bool) -> None:
        """Count the channels that don't take a batch in, without waiting for a device."""
        if self._skips is None:
            zeros = np.zeros(self.shape)
            self._skips = self._family.put(zeros, self._device), self._family.put(zeros, self._device)
        batches, variances = self._skips
        one = self._family.xp.where(taken, batches * 0, batches * 0 + 1)
        self._skips = batches + one, variances + one if varied else variances

    def _meet(self, mean: Any) -> None:
        """Move to where the first batch lives, if nothing is kept yet."""
        family, device = place_of(mean)
        if family is not self._family or device != self._device:
            if self._fixed:
                raise TypeError(
                    f"fastbn.RunningStats.update: moments has a {describe(mean)}; expected what these statistics are: "
                    f"{describe(self._mean)}. Make them with like=x"
                )
            self._start(family, device)
        self._fixed = True

    def _mixed(self, old: Any, new: Any, batches: int, skips: Any, taken: Any) -> Any:
        """Old and new by their weights; in channels that skipped batches by their own, and old where it isn't taken."""
        if skips is None or (self.momentum is not None and not self.debias):
            mixed = _by_weight(old, new, self._weight_of(batches))
        else:
            where, seen = self._family.xp.where, batches - skips
            mixed = where(seen > 1, _by_weight(old, new, self._weight_of(seen)), new)
            if self.momentum == 0:
                mixed = old
        return mixed if taken is None else self._family.xp.where(taken, mixed, old)

    def _weight_of(self, batches: Any) -> Any:
        """Of the k-th batch, for k as a number, or per channel."""
        if self.momentum is None:
            return 1 / batches
        if not self.debias or self.momentum in (0, 1):
            return self.momentum
        if isinstance(batches, int):
            return 1.0 if batches == 1 else self.momentum / -math.expm1(batches * math.log1p(-self.momentum))
        return self.momentum / (-1.0 * self._family.xp.expm1(batches * math.log1p(-self.momentum)))

    def _read(self, values: Any) -> Any:
        copy = self._family.rounded(values, self.dtype)
        if self._family is NUMPY:
            copy.flags.writeable = False  # writing into a copy is an error, not lost
        return copy

    def __repr__(self) -> str:
        return (
            f"RunningStats(channels={self.shape[0] if len(self.shape) == 1 else self.shape}, "
            f"momentum={self.momentum}, ddof={self.ddof}, batches={self.batches}{self._skip_report()})"
        )

    def _skip_report(self) -> str:
        skipped = self.skipped
        channels = np.count_nonzero(skipped)
        if not channels:
            return ""
        return f", skipped={skipped.sum()} in {channels} {'channel' if channels == 1 else 'channels'}"

    @classmethod
    def from_torch(cls, source: Any, **options: Any) -> RunningStats:
        """As `torch.nn.BatchNorm1d/2d/3d` keep them: momentum 0.1 of the new batch, unbiased variance, eps 1e-5.

        Parameters
        ----------
        source : int or tuple of int, module, or mapping
            Channels; or a module, whose momentum, eps, running_mean, running_var and num_batches_tracked are taken
            over; or its `state_dict()`, or any mapping with arrays running_mean and running_var.
        **options
            Of RunningStats, in place of the preset's, and `eps`; `momentum` in PyTorch's own sense, which is ours.

        >>> import fastbn
        >>> fastbn.RunningStats.from_torch(64)
        RunningStats(channels=64, momentum=0.1, ddof=1, batches=0)
        """
        return cls._preset(frameworks.TORCH, source, options)

    @classmethod
    def from_keras(cls, source: Any, **options: Any) -> RunningStats:
        """As `keras.layers.BatchNormalization` keeps them: momentum 0.99 of the old value, biased variance, eps 1e-3.

        Parameters
        ----------
        source : int or tuple of int, layer, or mapping
            Channels; or a layer, whose momentum, epsilon, moving_mean and moving_variance are taken over; or a mapping
            with arrays of the last two names.
        **options
            Of RunningStats, in place of the preset's, and `eps`; `momentum` in Keras' sense, the weight of the old
            value. (TensorFlow 2's fused kernel, in Keras 2, kept the unbiased variance: ddof=1.)

        >>> import fastbn
        >>> running = fastbn.RunningStats.from_keras(64, momentum=0.75)
        >>> running, running.eps
        (RunningStats(channels=64, momentum=0.25, ddof=0, batches=0), 0.001)
        """
        return cls._preset(frameworks.KERAS, source, options)

    @classmethod
    def from_flax(cls, source: Any, **options: Any) -> RunningStats:
        """As `flax.linen.BatchNorm` and `nnx.BatchNorm` keep them: momentum 0.99 of the old, biased variance, eps 1e-5.

        Parameters
        ----------
        source : int or tuple of int, nnx module, or mapping
            Channels; or an nnx module, whose momentum, epsilon, mean and var are taken over; or a mapping with arrays
            mean and var, such as the layer's `batch_stats`, or variables that have one.
        **options
            Of RunningStats, in place of the preset's, and `eps`; `momentum` in Flax' sense, the weight of the old
            value.

        >>> import fastbn
        >>> fastbn.RunningStats.from_flax({"mean": [1.0, 2.0], "var": [3.0, 4.0]}, momentum=0.5).var
        array([3., 4.], dtype=float32)
        """
        return cls._preset(frameworks.FLAX, source, options)

    @classmethod
    def from_onnx(cls, source: Any, **options: Any) -> RunningStats:
        """As ONNX' BatchNormalization in training mode: momentum 0.9 of the old value, biased variance, eps 1e-5.

        Parameters
        ----------
        source : int or tuple of int, or mapping
            Channels; or a mapping with arrays input_mean and input_var, and momentum and epsilon where they are not
            the operator's own.
        **options
            Of RunningStats, in place of the preset's, and `eps`; `momentum` in ONNX' sense, the weight of the old
            value.

        >>> import fastbn
        >>> fastbn.RunningStats.from_onnx(3, momentum=0.5)
        RunningStats(channels=3, momentum=0.5, ddof=0, batches=0)
        """
        return cls._preset(frameworks.ONNX, source, options)

    @classmethod
    def _preset(cls, preset: frameworks.Preset, source: Any, options: dict[str, Any]) -> RunningStats:
        found = preset.read(source)
        options = {"momentum": found.momentum, "ddof": preset.ddof, **options}
        eps = check_eps(preset.where, options.pop("eps", found.eps))
        if preset.decay and "decay" not in options:
            momentum = options.pop("momentum")
            options.update({"momentum": None} if momentum is None else {"decay": momentum})
        elif "decay" in options:
            del options["momentum"]
        new = cls(found.channels, **options)
        new.eps = eps
        if found.mean is not None:
            mean, var = check_channels(preset.where, "mean", found.mean, new.shape), found.var
            var = check_variances(preset.where, var, new.shape)
            new.mean, new.var = (new._family.put(a.reshape(new.shape), new._device) for a in (mean, var))
            new._fixed = options.get("like") is not None
        new.batches = new.variances = found.batches
        return new


def _by_weight(old: Any, new: Any, weight: Any) -> Any:
    if isinstance(weight, (int, float)) and weight in (0, 1):  # nothing of the other value counts, not even its NaN
        return new if weight else old
    return (1 - weight) * old + weight * new


def _weight(name: str, value: Any) -> float:
    if (number := finite(value)) is not None and 0 <= number <= 1:
        return number
    raise ValueError(f"fastbn.RunningStats: {name} is {describe(value)}; expected a number in [0, 1]")
