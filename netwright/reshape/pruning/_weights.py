"""The layers whose single weights can be pruned, and their weights as matrices."""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from netwright import checks
from netwright.anatomy.layers import is_linear
from netwright.anatomy.replacing import linear_weight
from netwright.errors import NothingToReshape

Layers = dict[str, nn.Module]


class Found(NamedTuple):
    """Layers by name whose weights can be pruned, and why others are left as they are."""

    layers: Layers
    left: dict[str, str]


def weight_layers(model: nn.Module, names: Collection[str] | None) -> Found:
    """Return the linear layers and convolutions of `model`, or those that are named.

    What is tied to an embedding stays, and so does a last layer that reads out a vocabulary,
    unless it is named.
    """
    known = {name: module for name, module in model.named_modules()
             if is_linear(module) or _is_convolution(module)}
    if names is not None:
        for name in names:
            checks.one_of(known, layer=name)
    left = _left(model, known)
    if names is None:
        left |= dict.fromkeys(_vocabulary(model, known), "it reads out the vocabulary")
    else:
        _check_named(names, left)
    chosen = [name for name in (known if names is None else names) if name not in left]
    layers = {name: known[name] for name in dict.fromkeys(chosen)}
    if not layers:
        raise NothingToReshape(
            f"{type(model).__name__} has no linear layer or convolution whose weights can be "
            f"pruned{_because(left)}; name some by layers= where they are there")
    for name, layer in layers.items():
        checks.finite(**{f"{name}.weight".replace(".", "_"): layer.weight})
    return Found(layers, left)


def matrix(layer: Any) -> Tensor:
    """Return a copy of a layer's weight as (outputs, inputs), channels last in a convolution.

    >>> matrix(nn.Conv2d(3, 4, 2)).shape
    torch.Size([4, 12])
    """
    weight = linear_weight(layer) if is_linear(layer) else layer.weight.movedim(1, -1).flatten(1)
    precise = torch.promote_types(weight.dtype, torch.float32)  # halves lack operations
    return weight.detach().to(precise, copy=True)


@torch.no_grad()
def write(layer: Any, values: Tensor) -> None:
    """Set a layer's weight to a matrix as `matrix` returns it, in place."""
    weight = layer.weight
    if is_linear(layer):
        linear_weight(layer).copy_(values)
    else:
        outputs, channels, *kernel = weight.shape
        weight.copy_(values.view(outputs, *kernel, channels).movedim(-1, 1))


def by_channel(layer: Any, statistic: Tensor) -> Tensor:
    """Return a statistic of a layer's inputs in the order of the columns of its `matrix`."""
    if is_linear(layer):
        return statistic
    channels = layer.weight.shape[1]
    order = torch.arange(len(statistic)).view(channels, -1).T.flatten().to(statistic.device)
    return statistic[order] if statistic.ndim == 1 else statistic[order][:, order]


def channels_in(layer: Any) -> int:
    """Return along how many inputs, side by side, groups of weights can be made."""
    return int(linear_weight(layer).shape[1] if is_linear(layer) else layer.weight.shape[1])


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _left(model: nn.Module, known: Layers) -> dict[str, str]:
    """Return the layers that cannot be pruned, with the reason."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    seen: set[int] = set()
    left = {}
    for name, layer in known.items():
        if is_parametrized(layer):
            left[name] = "it is parametrized"
            continue
        weight: Any = layer.weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            left[name] = "its weight is no parameter of floating-point numbers"
        elif id(weight) in tables:
            left[name] = "its weight is an embedding's too"
        elif id(weight) in seen:
            left[name] = "its weight is another layer's too"
        seen.add(id(weight))
    return left


def _vocabulary(model: nn.Module, known: Layers) -> Iterable[str]:
    """Return the last layer, where it has an output for each row of an embedding."""
    counts = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    last = next(reversed(known), None)
    return [last] if last is not None and is_linear(known[last]) and (
        linear_weight(known[last]).shape[0] in counts) else []


def _check_named(names: Collection[str], left: dict[str, str]) -> None:
    for name in names:
        if name in left:
            raise ValueError(f"layers must name layers with weights of their own, got {name!r}: "
                             f"{left[name]}; leave it out")


def _because(left: dict[str, str]) -> str:
    return "".join(f", {name}: {why}" for name, why in list(left.items())[:3])
