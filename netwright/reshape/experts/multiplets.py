from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.reshape.experts._dense import dense_layers

__all__ = ["multiplets"]


@method(
    "companion",
    papers=["000-009"],
    place="feedforward",
    needs=["dense feed-forward layers", "training"],
    keeps_function=False,
)
@torch.inference_mode(False)
def multiplets(model: nn.Module, train: Callable[[nn.Module, list[nn.Module]], Any],
               example: Any = None, *, stages: int = 2, square: bool = True) -> list[nn.Module]:
    """Return a model and copies that differ from it, and from each other, in feed-forward layers.

    m_0 = model;  m_s = train(copy of m_0, [m_0, ..., m_(s-1)]),  s = 1, ..., stages.

    `train` changes the copy that it is given, of which only the feed-forward layers learn, to do
    better where those before it fail: for instance by a contrast among samples that they take for
    alike (`netwright.objectives.contrast_within`). Then `upcycle(multiplets(...))` makes one
    mixture of experts of all, of which the routers are trained.

    What the paper leaves open: each copy begins as the model.

    Args:
        model: a dense model.
        train: takes the copy and the list of those before it; what it returns is not used. Take
            the parameters that require a gradient for its optimizer.
        example: what the model takes, to find its layers by; see `feedforwards`.
        stages: how many copies.
        square: False for feed-forward layers whose output has another size than their input, too.

    Raises:
        NothingToReshape: the model has no dense feed-forward layer.
        ValueError: `stages` is below 1, or `train` changed a weight outside the feed-forward
            layers.

    Paper: Zhang, Qu, Zhu, Cheng, 2025, CLIP-MoE: Towards Building Mixture of Experts for CLIP with
    Diversified Multiplet Upcycling.

    >>> from netwright.models import gpt
    >>> from netwright.reshape import upcycle
    >>> x = torch.randint(96, (4, 16))
    >>> models = multiplets(gpt(96, context=16), lambda copy, before: None, x)
    >>> len(models), upcycle(models, x, n_experts=3)(x).shape
    (3, torch.Size([4, 16, 96]))
    """
    checks.count(1, stages=stages)
    layers = dense_layers(model, example, square)
    parts = [name for layer in layers for name in (layer.up, layer.gate, layer.down) if name]
    found = [deepcopy(model)]
    for stage in range(1, stages + 1):
        copy = deepcopy(model)
        learns = {name: p.requires_grad for name, p in copy.named_parameters()}
        inside = {name for name in learns if name.rpartition(".")[0] in parts}
        for name, parameter in copy.named_parameters():
            parameter.requires_grad_(name in inside)
        train(copy, list(found))
        ours = dict(model.named_parameters())
        for name, parameter in copy.named_parameters():
            if name not in inside and not torch.equal(parameter, ours[name]):
                raise ValueError(f"train must change feed-forward layers only, and changed {name} "
                                 f"in stage {stage}; give its optimizer the parameters that "
                                 "require a gradient")
            parameter.requires_grad_(learns[name])
            parameter.grad = None
        found.append(copy)
    return found
