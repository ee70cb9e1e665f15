from collections.abc import Mapping
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from netwright.blocks.feedforward.repa_feed_forward import RePaFeedForward
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape._replacing import replaced
from netwright.reshape.change import decided, reshape

__all__ = ["reparameterize"]


@method(
    "reshape",
    papers=["004-039"],
    place="linear",
    saves=["inference time", "parameters", "file size", "inference memory"],
    needs=["linear layers in a row"],
    keeps_function=True,
    variants={"block and pair": {}},
    network=lambda: nn.Sequential(RePaFeedForward(8, 32), nn.Linear(8, 64), nn.Linear(64, 4)),
    batch=lambda: torch.randn(3, 8),
)
@reshape
@torch.no_grad()
def reparameterize(model: nn.Module) -> nn.Module:
    """Return a copy in which what is linear is multiplied out, where that makes it smaller.

    Each `RePaFeedForward` loses its idle units and its norms; two `nn.Linear` that follow one
    another in an `nn.Sequential`, nothing but identities between them, become one where W_2 W_1 has
    no more numbers than W_1 and W_2, the second's place taken by an identity:

    W = W_2 W_1;  b = W_2 b_1 + b_2.

    The copy computes what `model` does in eval mode, to rounding; the products are made in float64.
    Low-rank pairs stay, since their product is larger, and so do layers with hooks.

    Args:
        model: a network with `RePaFeedForward`s, or with linear layers that follow one another.

    Raises:
        NothingToReshape: `model` has neither, or none that would be smaller.

    Paper: Xu, Li, Chen, Liu, Wang, 2025, RePaViT: Scalable Vision Transformer Acceleration
    via Structural Reparameterization on Feedforward Network Layers.

    >>> model = nn.Sequential(RePaFeedForward(8, 32), nn.Linear(8, 64), nn.Linear(64, 4)).eval()
    >>> smaller, x = reparameterize(model), torch.randn(3, 8)
    >>> torch.allclose(smaller(x), model(x), atol=1e-5)
    True
    >>> [sum(p.numel() for p in m.parameters()) for m in (model, smaller)]
    [1468, 244]
    """
    trial = deepcopy(model)
    blocks = [name for name, module in trial.named_modules() if isinstance(module, RePaFeedForward)]
    trial = replaced(trial, blocks, RePaFeedForward.merged)
    pairs: list[list[str]] = []
    for name, chain in trial.named_modules():
        if type(chain).forward is nn.Sequential.forward:
            while pair := _pair(chain):
                _merge_pair(chain, *pair)
                pairs.append([name, *pair])
    if not blocks and not pairs:
        raise NothingToReshape(f"{type(model).__name__} must have a RePaFeedForward, or two "
                               "nn.Linear in a row in an nn.Sequential whose product is no larger "
                               "than they are, got none; build it with RePaFeedForward")
    return decided({"blocks": blocks, "pairs": pairs})


@reparameterize.applies
@torch.no_grad()
def _multiplied_out(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    merged = replaced(model, decision["blocks"], RePaFeedForward.merged)
    for name, first, second in decision["pairs"]:
        _merge_pair(merged.get_submodule(name), first, second)
    return merged


def _pair(chain: nn.Module) -> tuple[str, str] | None:
    """Return the names of the first two layers of `chain` whose product is no larger than both."""
    names = [name for name, part in chain._modules.items() if not isinstance(part, nn.Identity)]
    for first, second in pairwise(names):
        one, two = chain._modules[first], chain._modules[second]
        if (type(one) is nn.Linear and type(two) is nn.Linear
                and not any(_watched(part) for part in (one, two))
                and one.in_features * two.out_features
                <= one.weight.numel() + two.weight.numel()):
            return first, second
    return None


def _merge_pair(chain: nn.Module, first: str, second: str) -> None:
    one: Any = chain._modules[first]
    two: Any = chain._modules[second]
    setattr(chain, first, _product(one, two))
    setattr(chain, second, nn.Identity())


def _watched(layer: nn.Linear) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
                or layer._backward_pre_hooks)


def _product(one: nn.Linear, two: nn.Linear) -> nn.Linear:
    layer = nn.Linear(one.in_features, two.out_features, bias=False, device="meta")
    weight = two.weight.double()
    trainable = one.weight.requires_grad or two.weight.requires_grad
    layer.weight = nn.Parameter((weight @ one.weight.double()).to(one.weight.dtype), trainable)
    if one.bias is not None or two.bias is not None:
        bias = weight.new_zeros(two.out_features)
        bias = bias if one.bias is None else bias + weight @ one.bias.double()
        bias = bias if two.bias is None else bias + two.bias
        layer.register_parameter("bias", nn.Parameter(bias.to(one.weight.dtype), trainable))
    return layer.train(one.training)
