"""Feed-forward layers as blocks that a mixture of experts can hold."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from netwright.anatomy.layers import beyond_weights
from netwright.blocks.feedforward import GLU, FeedForward
from netwright.errors import NothingToReshape
from netwright.reshape._calibration import layers_in
from netwright.reshape.feedforward import (
    FeedForwardLayer,
    FeedForwardWeights,
    put_block,
)

_KNOWN = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Identity, nn.ReLU6)


class Elementwise(nn.Module):
    """An elementwise function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Return the function of x."""
        return self.function(x)

    def extra_repr(self) -> str:
        """Return the function."""
        return str(self.function)


def dense_layers(model: nn.Module, example: Any, square: bool = True) -> list[FeedForwardLayer]:
    """Return the feed-forward layers that are not experts yet.

    Raises:
        NothingToReshape: there is none.
        ValueError: one has hooks or parametrized weights, which its experts would not have.
    """
    return dense(model, layers_in(model, example, square=square))


def dense(model: nn.Module, layers: list[FeedForwardLayer], *,
          needed: bool = True) -> list[FeedForwardLayer]:
    """Return those of `layers` that are not experts yet; raise as `dense_layers` does."""
    found = [layer for layer in layers if layer.experts is None]
    if not found and needed:
        raise NothingToReshape(f"all feed-forward layers of {type(model).__name__} are experts "
                               "already; give a dense model")
    for name in (name for layer in found for name in (layer.up, layer.gate, layer.down) if name):
        _check_plain(model.get_submodule(name), name)
    return found


def _check_plain(linear: nn.Module, name: str) -> None:
    """Raise where a linear layer has more than the weights that go on in its experts."""
    hooks = [hook for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
                               "_backward_pre_hooks") for hook in getattr(linear, kind).values()]
    if any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks):
        raise ValueError(f"model has hooks at {name!r}, whose weights its experts take over "
                         "without them; remove the hooks first")
    beyond = "" if hooks else beyond_weights(linear)
    if beyond:
        raise ValueError(f"model has a layer {name!r} with {beyond}, whose weights its experts "
                         "take over without it; load the model plainly, without offloading or "
                         "quantisation, and remove wrappers first")
    if is_parametrized(linear):
        raise ValueError(f"model has a parametrized layer {name!r}, whose weights its experts take "
                         "over as they are; take that off by "
                         "torch.nn.utils.parametrize.remove_parametrizations first")


def activation_of(layer: FeedForwardLayer, like: Tensor) -> nn.Module:
    """Return the activation of `layer` as a module of its own, a known class where it is one."""
    probe = torch.linspace(-4, 9, 256).to(like)
    with torch.no_grad():
        values = layer.activation(probe)
        for known in _KNOWN:
            if torch.equal(known()(probe), values):
                return known()
    own = deepcopy(layer.activation)
    return own if isinstance(own, nn.Module) else Elementwise(own)


def as_block(weights: FeedForwardWeights, activation: nn.Module) -> FeedForward | GLU:
    """Return a block with copies of `weights`; each learns where the weight did before."""
    hidden, dim = weights.up.shape
    shape: dict[str, Any] = {"activation": lambda: activation, "out": len(weights.down)}
    block: FeedForward | GLU
    with torch.device("meta"):  # no draws, since all weights are replaced
        if weights.gate is None:
            block = FeedForward(dim, hidden, **shape)
            parts: dict[str, Any] = {"up": block[0], "down": block[2]}
        else:
            block = GLU(dim, hidden, **shape)
            parts = {"up": block.up, "down": block.down, "gate": block.gate}
    for name, linear in parts.items():
        weight, bias = getattr(weights, name), getattr(weights, f"{name}_bias")
        linear.weight = _copy(weight)
        linear.bias = None if bias is None else _copy(bias)
    return block


def put_blocks(model: nn.Module, blocks: Mapping[FeedForwardLayer, nn.Module]) -> nn.Module:
    """Put each layer's block in its place, in place; return the model."""
    for layer, block in blocks.items():
        model = put_block(model, layer, block)
    return model


def _copy(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format),
                        weight.requires_grad)
