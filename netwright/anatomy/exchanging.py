"""Reading the weights of feed-forward layers, writing them, and putting blocks in their place."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from netwright import checks
from netwright.anatomy.feedforwards import FeedForwardLayer
from netwright.anatomy.replacing import (
    linear_weight,
    replace,
    without_fused_paths,
    write_linear,
)

__all__ = ["FeedForwardWeights", "feedforward_weights", "put_block", "with_blocks",
           "write_feedforward"]


class FeedForwardWeights(NamedTuple):
    """The weights of a feed-forward layer as matrices, one row of `up` and `gate` a hidden unit.

    Shapes: up and gate (hidden, dim), down (out, hidden), up_bias and gate_bias (hidden),
    down_bias (out).
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_bias: Tensor | None = None

    def __call__(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what the layer makes of x (*, dim): (*, out)."""
        return linear(self.hidden(x, activation), self.down, self.down_bias)

    def hidden(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what the hidden units make of x (*, dim): (*, hidden)."""
        hidden = linear(x, self.up, self.up_bias)
        return activation(hidden) if self.gate is None else activation(
            linear(x, self.gate, self.gate_bias)) * hidden

    def units(self, index: Tensor | Sequence[int]) -> "FeedForwardWeights":
        """Return the weights of the hidden units `index` alone, in that order."""
        index = torch.as_tensor(index, device=self.up.device)

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[index]
        return FeedForwardWeights(self.up[index], self.down[:, index], rows(self.gate),
                                  rows(self.up_bias), self.down_bias, rows(self.gate_bias))


@checks.annotated
def feedforward_weights(model: nn.Module, layer: FeedForwardLayer) -> FeedForwardWeights:
    """Return the weights of `layer` as plain matrices, whatever its linear layers' class is.

    They share the model's memory and its graph: `.detach().clone()` what is to be kept.

    Raises:
        ValueError: `layer` is a block of experts.

    >>> from netwright.models import gpt
    >>> from netwright.anatomy.feedforwards import feedforwards
    >>> model = gpt(96, context=16)
    >>> weights = feedforward_weights(model, feedforwards(model)[0])
    >>> weights.up.shape, weights.down.shape
    (torch.Size([256, 64]), torch.Size([64, 256]))
    """
    up, down, gate = _linears(model, layer)
    weights = FeedForwardWeights(linear_weight(up), linear_weight(down), None, up.bias, down.bias)
    if layer.packed is not None:
        matrices = weights.up.chunk(2)
        biases: Any = (None, None) if up.bias is None else up.bias.chunk(2)
        first, second = layer.packed, 1 - layer.packed
        return weights._replace(gate=matrices[first], gate_bias=biases[first],
                                up=matrices[second], up_bias=biases[second])
    if gate is None:
        return weights
    return weights._replace(gate=linear_weight(gate), gate_bias=gate.bias)


@checks.annotated
def write_feedforward(model: nn.Module, layer: FeedForwardLayer,
                      weights: FeedForwardWeights) -> None:
    """Give the linear layers of `layer` new weights, in place; call it on a copy.

    `weights` may have more or fewer hidden units than the layer had. Each weight learns where it
    did before. A bias that is None is taken away where there was one.

    Raises:
        ValueError: the shapes do not fit each other or the layer, a gate is given or lacking, or
            `layer` is a block of experts.
    """
    linears = _linears(model, layer)
    hidden = weights.up.shape[0]
    wanted = {"up": (hidden, layer.dim), "down": (layer.out, hidden), "up_bias": (hidden,),
              "down_bias": (layer.out,), "gate": (hidden, layer.dim), "gate_bias": (hidden,)}
    for name, shape in wanted.items():
        given = getattr(weights, name)
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"weights.{name} must be {shape} with {hidden} hidden units in "
                             f"{layer.name!r}, got {tuple(given.shape)}")
    if (weights.gate is None) != (layer.gate is None):
        raise ValueError(f"weights.gate must be given where the layer has a gate; {layer.name!r} "
                         f"has {'none' if layer.gate is None else 'one'}")
    if layer.packed is not None:
        linears, weights = (*linears[:2], None), _packed(weights, layer.packed)
    biases = (weights.up_bias, weights.down_bias, weights.gate_bias)
    matrices = (weights.up, weights.down, weights.gate)
    for part, matrix, bias in zip(linears, matrices, biases, strict=True):
        if part is not None and matrix is not None:
            write_linear(part, matrix, bias)


def _packed(weights: FeedForwardWeights, first: int) -> FeedForwardWeights:
    """Return weights whose `up` holds the gate too, as its first half where `first` is 0."""
    def both(gate: Tensor | None, up: Tensor | None) -> Tensor | None:
        if gate is None or up is None:
            given = up if gate is None else gate
            if given is None:
                return None
            gate, up = (torch.zeros_like(given) if t is None else t for t in (gate, up))
        return torch.cat((up, gate) if first else (gate, up))
    up: Any = both(weights.gate, weights.up)
    return weights._replace(up=up, gate=None, gate_bias=None,
                            up_bias=both(weights.gate_bias, weights.up_bias))


@checks.annotated
def put_block(model: nn.Module, layer: FeedForwardLayer, block: nn.Module) -> nn.Module:
    """Put `block` in the place of `layer`, in place; return the model. Call it on a copy.

    Where one module holds the layer and nothing else, `block` stands in its place, with the
    dropout that the module ended in. Else the first linear layer keeps what it is given and
    passes zeros of width 1 on, or 2 where it gave the gate as well, whatever lies between makes
    something of them, and where the last linear layer was, `block` is fed with what was kept.

    Raises:
        ValueError: the layer is a block of experts that does not return a single tensor.
    """
    if layer.whole:
        ends = nn.Sequential(block, nn.Dropout(layer.dropout)) if layer.dropout else block
        return replace(model, layer.name, ends)
    if layer.up is None or layer.down is None:
        raise ValueError(f"{layer.name!r} must return one tensor for a block to stand in its "
                         "place, but it returns more, such as router scores; leave it out by "
                         "layers=")
    keeper = Keeper()
    replace(model, layer.up, Entry(keeper, 1 if layer.packed is None else 2))
    if layer.gate not in (None, layer.up):
        replace(model, str(layer.gate), Placeholder())
    replace(model, layer.down, Exit(block, keeper))
    without_fused_paths(model)
    return model


@checks.annotated
def with_blocks(model: nn.Module, blocks: Mapping[FeedForwardLayer, nn.Module]) -> nn.Module:
    """Return a copy of `model` with each layer's block in its place; see `put_block`.

    >>> from netwright.models import gpt
    >>> from netwright.anatomy.feedforwards import feedforwards
    >>> model = gpt(96, context=16)
    >>> first, second = feedforwards(model)
    >>> linear = with_blocks(model, {first: nn.Linear(64, 64)})
    >>> linear(torch.zeros(1, 16, dtype=torch.long)).shape
    torch.Size([1, 16, 96])
    """
    copy = deepcopy(model)
    for layer, block in blocks.items():
        copy = put_block(copy, layer, block)
    return copy


class Keeper:
    """Holds what a feed-forward layer was given, from its entry to its exit."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None

    def take(self) -> Tensor:
        """Return what was kept and let it go."""
        if self.kept is None:
            raise RuntimeError("the exit of a feed-forward layer ran without its entry; run the "
                               "module that holds both")
        kept, self.kept = self.kept, None
        return kept


class Placeholder(nn.Module):
    """Stands where a linear layer into the hidden units stood: it gives zeros of width 1 or 2."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros (*, width) for x (*, dim)."""
        return x.new_zeros((*x.shape[:-1], self.width))


class Entry(Placeholder):
    """A placeholder that keeps what it is given for the exit."""

    def __init__(self, keeper: Keeper, width: int = 1) -> None:
        super().__init__(width)
        self.keeper = keeper

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros (*, width) for x (*, dim), and keep x."""
        self.keeper.kept = x
        return super().forward(x)


class Exit(nn.Module):
    """Stands where the linear layer out of the hidden units stood, and holds the block."""

    def __init__(self, block: nn.Module, keeper: Keeper) -> None:
        super().__init__()
        self.block, self.keeper = block, keeper

    def forward(self, placeholder: Tensor) -> Any:
        """Return what the block makes of what the entry kept."""
        return self.block(self.keeper.take())


def _linears(model: nn.Module, layer: FeedForwardLayer) -> tuple[Any, Any, Any]:
    if layer.up is None or layer.down is None:
        raise ValueError(f"{layer.name!r} is a block of {layer.experts} experts behind a router, "
                         "which has no single pair of matrices; read its experts' own weights")
    return (model.get_submodule(layer.up), model.get_submodule(layer.down),
            None if layer.gate is None else model.get_submodule(layer.gate))
