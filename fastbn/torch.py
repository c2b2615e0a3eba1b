"""Batch normalization for PyTorch: operators that autograd and torch.compile know, modules, and `convert(model)`.

>>> import torch, fastbn.torch
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
>>> fastbn.torch.convert(model)[1]
BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
>>> model(torch.ones(2, 3, 8, 8)).sum().backward()  # trains as before, and saves and loads PyTorch's own state_dict

Tensors on the CPU and on CUDA take the same way. Gradients of gradients are there, but with an activation in the same
pass; third ones are not, nor are torch.func's transforms: an error says so when asked.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .arguments import describe
from .batchnorm import backward, forward
from .extras import ACTIVATIONS, Asked, check_activation
from .host import TENSORS
from .plain import backward_plainly, forward_plainly, way_of
from .saved import Saved
from .second import backward_backward

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Fused", "batch_norm", "convert", "revert"]

# table (6, C) float64 is what `forward` found; mean and var, both or none, are statistics to be taken as they are.
_FORWARD, _BACKWARD, _SECOND = "fastbn::forward", "fastbn::backward", "fastbn::backward_backward"
torch.library.define(
    _FORWARD,
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, str activation='', "
    "float parameter=0.0) -> (Tensor y, Tensor table)",
)
torch.library.define(
    _BACKWARD,
    "(Tensor dy, Tensor x, Tensor table, Tensor? weight, bool frozen, bool[3] need, str activation='', "
    "float parameter=0.0) -> (Tensor dx, Tensor dgamma, Tensor dbeta)",
)  # the weight for autograd alone, which has a gradient for it; its values are in the table
torch.library.define(
    _SECOND,
    "(Tensor? ddx, Tensor? ddgamma, Tensor? ddbeta, Tensor dy, Tensor x, Tensor table, bool frozen, bool[3] need) -> "
    "(Tensor gx, Tensor ggamma, Tensor gdy)",
)


def _seen(a: Any) -> Any:
    """What the functions take: NumPy's view, which costs less than a tensor there; on a GPU the tensor."""
    return a if a is None else a.detach() if a.is_cuda else TENSORS.view(a)


def _pair(activation: str, parameter: float) -> Any:
    """An activation as `fastbn.forward` takes it."""
    return None if not activation else activation if ACTIVATIONS[activation] is None else (activation, parameter)


def _forward(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, eps: float, activation: str = "", parameter: float = 0.0
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    read, written, gamma, beta = _seen(x), _seen(y), _seen(weight), _seen(bias)
    frozen = None if mean is None else (_seen(mean), _seen(var))
    way = None if x.is_cuda else way_of(read.shape, read.strides, read.dtype, 1)
    if way is not None and written.strides == way.strides:  # nearly every call
        more = Asked(activation, parameter) if activation else None
        made = forward_plainly(_FORWARD, way, read, written, gamma, beta, eps, frozen, more)
        assert made is not None, "x is saved, not y"
        return y, torch.from_numpy(made[0])
    asked = _pair(activation, parameter)
    _, saved = forward(read, gamma, beta, eps=eps, frozen=frozen, out=written, activation=asked)
    return y, torch.as_tensor(saved.table)


def _backward(
    dy: Tensor, x: Tensor, table: Tensor, _weight: Any, frozen: bool, need: list[bool], activation: str = "",
    parameter: float = 0.0,
) -> tuple[Tensor, ...]:  # fmt: skip
    dx = torch.empty_like(x) if need[0] else None
    given, read, numbers, written = _seen(dy), _seen(x), _seen(table), _seen(dx)
    way = None if x.is_cuda or not all(need) else way_of(read.shape, read.strides, read.dtype, 1)
    if way is not None and given.strides == read.strides == written.strides == way.strides:  # nearly every call
        sums = way.new_sums()
        more = Asked(activation, parameter) if activation else None
        backward_plainly(_BACKWARD, way, given, read, (written, *sums), numbers, frozen, more)
        return dx, *map(torch.from_numpy, sums)
    saved = Saved.of(read, numbers, frozen, activation=_pair(activation, parameter))
    _, dgamma, dbeta = backward(given, saved, need=need, out=(written, None, None))
    return tuple([table.new_empty(0) if a is None else torch.as_tensor(a) for a in (dx, dgamma, dbeta)])


def _backward_backward(
    ddx: Any, ddgamma: Any, ddbeta: Any, dy: Tensor, x: Tensor, table: Tensor, frozen: bool, need: list[bool]
) -> tuple[Tensor, ...]:
    saved = Saved.of(_seen(x), _seen(table), frozen)
    gx, gdy = (torch.empty_like(x) if n else None for n in (need[0], need[2]))
    out, tangents = (_seen(gx), None, _seen(gdy)), (_seen(ddx), _seen(ddgamma), _seen(ddbeta))
    _, ggamma, _ = backward_backward(*tangents, _seen(dy), saved, need=(need[0], need[1], need[2]), out=out)
    return tuple([table.new_empty(0) if a is None else torch.as_tensor(a) for a in (gx, ggamma, gdy)])


torch.library.impl(_FORWARD, ("cpu", "cuda"), _forward)
torch.library.impl(_BACKWARD, ("cpu", "cuda"), _backward)
torch.library.impl(_SECOND, ("cpu", "cuda"), _backward_backward)


@torch.library.register_fake(_FORWARD)
def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((6, x.shape[1]), dtype=torch.float64)


@torch.library.register_fake(_BACKWARD)
def _fake_backward(
    _dy: Tensor, x: Tensor, table: Tensor, _weight: Any, _frozen: bool, need: list[bool], *_: Any
) -> tuple[Tensor, ...]:
    return tuple([_blank(x, table, n, k == 0) for k, n in enumerate(need)])


@torch.library.register_fake(_SECOND)
def _fake_second(
    _ddx: Any, _ddgamma: Any, _ddbeta: Any, _dy: Tensor, x: Tensor, table: Tensor, _frozen: bool, need: list[bool]
) -> tuple[Tensor, ...]:
    return tuple([_blank(x, table, n, k != 1) for k, n in enumerate(need)])


def _blank(x: Tensor, table: Tensor, needed: bool, like_x: bool) -> Tensor:
    if not needed:
        return table.new_empty(0)
    kind = torch.float64 if x.dtype is torch.float64 else torch.float32
    return torch.empty_like(x) if like_x else table.new_empty(x.shape[1], dtype=kind)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, mean, _, _, *ctx.activation = inputs
    ctx.save_for_backward(x, output[1], weight)
    ctx.mark_non_differentiable(output[1])
    ctx.frozen = mean is not None
    ctx.kinds = [a if a is None else a.dtype for a in (x, weight, bias)]


def _gradients(ctx: Any, dy: Tensor, _: Any, run: Any = torch.ops.fastbn.backward) -> tuple[Any, ...]:
    need = list(ctx.needs_input_grad[:3])
    found = run(dy, *ctx.saved_tensors, ctx.frozen, need, *ctx.activation)
    kept = [a.to(kind) if n else None for a, n, kind in zip(found, need, ctx.kinds, strict=True)]
    return *kept, None, None, None, None, None


def _keep_again(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    dy, x, table, weight, ctx.frozen, ctx.had, ctx.activation, _ = inputs
    ctx.save_for_backward(dy, x, table)
    ctx.kind = None if weight is None else weight.dtype


def _second(ctx: Any, *given: Tensor) -> tuple[Any, ...]:
    if ctx.activation:
        raise NotImplementedError(
            f"fastbn.torch: a gradient of a gradient of batch norm with activation={ctx.activation!r} is asked for, "
            "which there is of batch norm alone. Convert the model without fuse, or let the activation follow apart"
        )
    need_dy, need_x, _, need_weight = ctx.needs_input_grad[:4]
    tangents = [a if had else None for a, had in zip(given, ctx.had, strict=True)]
    need = [need_x, need_weight, need_dy]
    gx, ggamma, gdy = torch.ops.fastbn.backward_backward(*tangents, *ctx.saved_tensors, ctx.frozen, need)
    ggamma = ggamma.to(ctx.kind) if need_weight else None
    return gdy if need_dy else None, gx if need_x else None, None, ggamma, None, None, None, None


def _third(*_: Any) -> Any:
    raise NotImplementedError(
        "fastbn.torch: a third derivative of batch norm is asked for, which these operators have none of. "
        "fastbn.torch.revert(model) gives PyTorch's own"
    )


torch.library.register_autograd(_FORWARD, _gradients, setup_context=_keep)
torch.library.register_autograd(_BACKWARD, _second, setup_context=_keep_again)
torch.library.register_autograd(_SECOND, _third)


class _Eager(torch.autograd.Function):
    """The operator without PyTorch's dispatcher, whose way through Python takes longer than small layers do."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor, unused: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled() or not _is_plain(dy):  # a gradient of this gradient may be asked for
            return _gradients(ctx, dy, unused)
        return _gradients(ctx, dy, unused, _backward)


def _is_plain(*tensors: Tensor | None) -> bool:
    """Nobody watches: no compiler, no mode, no subclass; and the first one's memory holds its values."""
    if torch.compiler.is_compiling() or not all(type(a) in _PLAIN for a in tensors):
        return False
    if (first := tensors[0]) is None or first.is_meta or first.is_neg():
        return False
    return not (torch.jit.is_tracing() or is_in_torch_dispatch_mode())


_PLAIN = Tensor, nn.Parameter, type(None)


def _normalize(*inputs: Any) -> tuple[Tensor, Tensor]:
    run: Any = _Eager.apply if _is_plain(*inputs[:5]) else torch.ops.fastbn.forward
    return run(*inputs)  # type: ignore[no-any-return]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    activation: Any = None,
) -> Tensor:
    """As `torch.nn.functional.batch_norm`: ``(input - mean) / sqrt(var + eps) * weight + bias``, channels on axis 1.

    Parameters
    ----------
    input : tensor (N, C, ...) of float16, bfloat16, float32 or float64, in any memory format; so is the result
    running_mean, running_var : tensor (C,), or None
        In evaluation the statistics. In training they take in the batch's mean and its variance, M2 / (count - 1); an
        empty batch changes nothing.
    weight, bias : tensor (C,), or None
    training : bool
        Normalize by the batch's own statistics.
    momentum : float, or tensor of one value
        The weight of the new batch.
    activation : str, or (str, float), optional
        What follows in the same pass, as in `fastbn.forward`. Autograd keeps input alone, not what the activation takes
        too.

    Raises
    ------
    ValueError
        For training on one value per channel, as PyTorch does; and else, with TypeError, as `fastbn.forward`.

    >>> import torch, fastbn.torch
    >>> x = torch.tensor([[1.0, 1e6], [3.0, 1e6 + 4]])
    >>> fastbn.torch.batch_norm(x, None, None, training=True)
    tensor([[-1.0000, -1.0000],
            [ 1.0000,  1.0000]])
    """
    where = "fastbn.torch.batch_norm"
    if not training and (running_mean is None or running_var is None):
        raise ValueError(
            f"{where}: running_mean or running_var is None, and training is False; expected a tensor for each channel"
        )
    if input.dim() < 2:
        raise ValueError(f"{where}: input is a {describe(input)}; expected at least two axes, (N, C, ...)")
    name, parameter = check_activation(where, activation)
    if not training:
        return _normalize(input, weight, bias, running_mean, running_var, eps, name, parameter)[0]
    count = input.numel() // (input.shape[1] or 1)
    if count == 1:
        raise ValueError(f"{where}: one value per channel in training (input of shape {tuple(input.shape)}); pass more")
    for what, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is not None and (running.shape != input.shape[1:2] or not running.is_floating_point()):
            raise ValueError(
                f"{where}: {what} is a {describe(running)}; expected floats of shape {tuple(input.shape[1:2])}, for "
                "each channel one"
            )
    y, table = _normalize(input, weight, bias, None, None, eps, name, parameter)
    if count:
        _mix(running_mean, running_var, table, count / (count - 1), momentum)
    return y


def _mix(mean: Tensor | None, var: Tensor | None, table: Tensor, unbiased: float, momentum: float | Tensor) -> None:
    """In float64, and rounded once: PyTorch's lerp in bfloat16 rounds three times."""
    some = [a for a in (mean, var) if a is not None]
    plain = _is_plain(*some, table) and not table.is_cuda
    found: Any = TENSORS.view(table) if plain else table  # NumPy does it in a third of the time
    for running in some:
        new = found[0] + found[1] if running is mean else found[2] * unbiased
        if not plain:
            running.copy_(torch.lerp(running.double(), new, momentum))
            continue
        held = TENSORS.view(running)
        new -= held
        new *= float(momentum)
        new += held
        held[...] = new
        increment_version(running)


class _Fast(nn.modules.batchnorm._BatchNorm):
    """PyTorch's modules with another forward pass: parameters, buffers, state_dict and repr are its own."""

    activation: Any = None  # what follows in the same pass: `convert`

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        momentum: Any = self.momentum
        tracked = self.num_batches_tracked if self.training and self.track_running_stats else None
        if tracked is not None:
            tracked.add_(1)
            momentum = 1 / tracked.double() if momentum is None else momentum
        if momentum is None:
            momentum = 0.0  # there is nothing to update
        mean, var = self.running_mean, self.running_var
        training = self.training or (mean is None and var is None)
        if self.training and not self.track_running_stats:
            mean = var = None
        return batch_norm(input, mean, var, self.weight, self.bias, training, momentum, self.eps, self.activation)

    def extra_repr(self) -> str:
        fused = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{super().extra_repr()}{fused}"


class BatchNorm1d(_Fast, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d, for (N, C) and (N, C, L): arguments, attributes, errors and `state_dict` are PyTorch's.

    >>> import torch, fastbn.torch
    >>> fastbn.torch.BatchNorm1d(2)(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).tolist()[1]
    [0.9999949932098389, 0.0]
    """


class BatchNorm2d(_Fast, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, for (N, C, H, W): arguments, attributes, errors and `state_dict` are PyTorch's.

    >>> import torch, fastbn.torch
    >>> bn = fastbn.torch.BatchNorm2d(3, momentum=None)
    >>> bn.load_state_dict(torch.nn.BatchNorm2d(3).state_dict())
    <All keys matched successfully>
    """


class BatchNorm3d(_Fast, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d, for (N, C, D, H, W): arguments, attributes, errors and `state_dict` are PyTorch's.

    >>> import torch, fastbn.torch
    >>> fastbn.torch.BatchNorm3d(4).eval()(torch.zeros(1, 4, 2, 2, 2)).shape
    torch.Size([1, 4, 2, 2, 2])
    """


_OURS: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


_FUSED: dict[type, Any] = {
    nn.ReLU: lambda _: "relu",
    nn.LeakyReLU: lambda a: ("leaky_relu", a.negative_slope),
    nn.ReLU6: lambda _: "relu6",
    nn.ELU: lambda a: ("elu", a.alpha),
    nn.SiLU: lambda _: "silu",
    nn.GELU: lambda a: "gelu" if a.approximate == "none" else None,
    nn.Sigmoid: lambda _: "sigmoid",
    nn.Tanh: lambda _: "tanh",
    nn.Hardswish: lambda _: "hardswish",
}


class Fused(nn.Module):
    """An activation that the batch norm before it takes care of; `revert` makes it what it was.

    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    >>> fastbn.torch.convert(model, fuse=True)[1]
    Fused(ReLU)
    """

    was: type

    def forward(self, input: Tensor) -> Tensor:
        """`input` itself."""
        return input

    def extra_repr(self) -> str:
        return self.was.__name__


def convert(model: nn.Module, fuse: bool = False) -> nn.Module:
    """Make every torch.nn.BatchNorm1d, 2d and 3d of a model compute by fastbn, in place; returns the model.

    The modules stay the same objects, of another class: parameters, buffers, hooks, modes and optimizers that know
    them are as they were. Subclasses of PyTorch's (SyncBatchNorm, lazy modules, your own) are left alone.

    With `fuse`, an activation that follows one in a torch.nn.Sequential is computed in the same pass (ReLU, LeakyReLU,
    ReLU6, ELU, SiLU, GELU, Sigmoid, Tanh, Hardswish), and its module does nothing any more: what lies between the two
    is neither written nor kept for the backward pass. Not where either has hooks, or stands in more than one place.
    What puts another module in the place of one of them (convert_sync_batchnorm) loses the activation: `revert` first.

    >>> import torch, fastbn.torch
    >>> fastbn.torch.convert(torch.nn.BatchNorm1d(4)).__class__
    <class 'fastbn.torch.BatchNorm1d'>
    """
    _become(model, _OURS)
    if fuse:
        _fuse(model)
    return model


def _fuse(model: nn.Module) -> None:
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for module in list(model.modules()):
        if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
            continue
        for norm, after in pairwise(module):
            asked = _FUSED[type(after)](after) if type(norm) in _THEIRS and type(after) in _FUSED else None
            alone = places[id(norm)] == places[id(after)] == 1
            if asked is not None and norm.activation is None and alone and not (_hooked(norm) or _hooked(after)):
                norm.activation = asked
                after.was, after.__class__ = type(after), Fused


def _hooked(module: nn.Module) -> bool:
    return any(value for name, value in vars(module).items() if name.endswith("_hooks") and "state" not in name)


def revert(model: nn.Module) -> nn.Module:
    """The other way round: modules become PyTorch's own, in place; returns the model.

    >>> import torch, fastbn.torch
    >>> fastbn.torch.revert(fastbn.torch.BatchNorm1d(4)).__class__
    <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    for module in model.modules():
        if type(module) is Fused:
            module.__class__ = module.__dict__.pop("was")
        elif type(module) in _THEIRS:
            module.__dict__.pop("activation", None)
    return _become(model, _THEIRS)


def _become(model: nn.Module, classes: dict[type, type]) -> nn.Module:
    for module in model.modules():
        if (other := classes.get(type(module))) is not None:
            module.__class__ = other
    return model
