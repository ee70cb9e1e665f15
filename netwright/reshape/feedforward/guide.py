from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from netwright import checks
from netwright.blocks.feedforward.self_guided import SelfGuided
from netwright.blocks.feedforward.structured_linear import StructuredLinear
from netwright.catalogue.facets import method
from netwright.reshape._replacing import named_like, replaced
from netwright.reshape.change import decided, reshape

__all__ = ["guide", "unguide"]


def _faded() -> nn.Module:
    """Return a guided network whose dense matrices take part no more."""
    network = nn.Sequential(SelfGuided(StructuredLinear(8, 16), steps=1), nn.ReLU(),
                            SelfGuided(StructuredLinear(16, 8), steps=1))
    for _ in range(2):
        network(torch.zeros(1, 8))
    return network


@method(
    "reshape",
    papers=["003-004"],
    place="linear",
    needs=["structured layers", "training"],
    keeps_function=True,
    variants={"three passes": {"steps": 3}},
    network=lambda: nn.Sequential(StructuredLinear(8, 16), nn.ReLU(), StructuredLinear(16, 8)),
    batch=lambda: torch.randn(5, 8),
)
@reshape
def guide(model: nn.Module, steps: int) -> nn.Module:
    """Return a copy in which each structured layer is trained with a dense matrix that fades.

    Args:
        model: a network with `StructuredLinear` layers.
        steps: passes in training until the dense matrices have faded.

    Raises:
        NothingToReshape: `model` has no `StructuredLinear`.
        ValueError: `steps` is below 1, or `model` is guided already.

    Paper: Wei, Moalla, Pascanu, Gulcehre, 2024, Building on Efficient Foundations: Effectively
    Training LLMs with Structured Feedforward Layers.

    >>> from netwright.blocks.feedforward import StructuredFeedForward
    >>> type(guide(StructuredFeedForward(8), steps=100)[0]).__name__
    'SelfGuided'
    """
    checks.count(1, steps=steps)
    if any(isinstance(module, SelfGuided) for module in model.modules()):
        raise ValueError("model must not be guided already, got SelfGuided layers in it; "
                         "use unguide first")
    return decided({"layers": named_like(model, StructuredLinear), "steps": steps})


@guide.applies
def _guided(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    return replaced(model, decision["layers"], lambda layer: SelfGuided(
        layer, decision["steps"]).train(layer.training))


@method(
    "reshape",
    papers=["003-004"],
    place="linear",
    saves=["parameters", "inference memory"],
    needs=["guided layers"],
    keeps_function=True,
    network=_faded,
    batch=lambda: torch.randn(5, 8),
)
@reshape
def unguide(model: nn.Module) -> nn.Module:
    """Return a copy with the structured layers alone, which computes the same.

    Args:
        model: what `guide` returned, trained until its dense matrices have faded.

    Raises:
        NothingToReshape: `model` has no `SelfGuided` layer.
        ValueError: a dense matrix still takes part.

    Paper: Wei, Moalla, Pascanu, Gulcehre, 2024, Building on Efficient Foundations: Effectively
    Training LLMs with Structured Feedforward Layers.

    >>> model = nn.Sequential(SelfGuided(StructuredLinear(8, 16), steps=1))
    >>> for _ in range(2):
    ...     y = model(torch.zeros(4, 8))
    >>> type(unguide(model)[0]).__name__
    'StructuredLinear'
    """
    for name, module in model.named_modules():
        if isinstance(module, SelfGuided) and module.ratio:
            raise ValueError(f"model must have run steps={module.steps} passes in training, and "
                             f"one without the dense matrix, got {module.passes} in "
                             f"{name or 'the layer'}; train on, or load the state that has")
    return decided({"layers": named_like(model, SelfGuided)})


@unguide.applies
def _alone(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    return replaced(model, decision["layers"], lambda guided: guided.layer)
