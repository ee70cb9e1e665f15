from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from netwright import checks
from netwright.blocks.feedforward.structured_linear import Premerged, StructuredLinear
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape._replacing import named_like, replaced
from netwright.reshape.change import decided, reshape

__all__ = ["premerge"]


@method(
    "reshape",
    papers=["003-004"],
    place="linear",
    saves=["inference time"],
    needs=["structured layers"],
    keeps_function=True,
    variants={"for any": {}, "for few rows": {"rows": 4}},
    network=lambda: nn.Sequential(StructuredLinear(8, 16), nn.ReLU(), StructuredLinear(16, 8)),
    batch=lambda: torch.randn(5, 8),
)
@reshape
def premerge(model: nn.Module, rows: int | None = None) -> nn.Module:
    """Return a copy for inference in which each structured layer's factors are multiplied out.

    W = U V, once;  y = W x + b where x has at most `rows` rows, else y = U (V x) + b.

    A few rows are where one product with many numbers can be quicker than several with fewer: on
    an accelerator that waits for launches more than it multiplies. With `rows` the copy holds
    both forms and its weights are frozen; without, each layer becomes an `nn.Linear`, however
    many rows it gets.

    Args:
        model: a network with `StructuredLinear` layers.
        rows: up to which the product is used; any number by default.

    Raises:
        NothingToReshape: `model` has no `StructuredLinear`.
        ValueError: `rows` is below 1.

    Paper: Wei, Moalla, Pascanu, Gulcehre, 2024, Building on Efficient Foundations: Effectively
    Training LLMs with Structured Feedforward Layers.

    >>> model = nn.Sequential(StructuredLinear(8, 16), nn.ReLU(), StructuredLinear(16, 8))
    >>> premerge(model)
    Sequential(
      (0): Linear(in_features=8, out_features=16, bias=True)
      (1): ReLU()
      (2): Linear(in_features=16, out_features=8, bias=True)
    )
    """
    checks.count(1, rows=rows, optional=True, advice="leave it out to merge for any")
    done = [f"{name}.layer".lstrip(".") for name, module in model.named_modules()
            if isinstance(module, Premerged)]
    layers = [name for name in named_like(model, StructuredLinear) if name not in done]
    if not layers:
        raise NothingToReshape("all structured layers of model are premerged already; give the "
                               "model as it was")
    return decided({"layers": layers, "rows": rows})


@premerge.applies
@torch.no_grad()
def _premerged(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    return replaced(model, decision["layers"], lambda layer: _merged(layer, decision["rows"]))


def _merged(layer: StructuredLinear, rows: int | None) -> nn.Module:
    if rows is not None:
        # The product would not follow weights that are trained.
        return Premerged(layer.requires_grad_(False), rows).train(layer.training)
    weight = layer.dense_weight()
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight, layer.first.requires_grad)
    plain.register_parameter("bias", layer.bias)
    return plain.train(layer.training)
