"""A reshape that no part of netwright knows of."""

import torch
from torch import nn

import netwright as nw
from netwright.reshape import decided, reshape


@nw.method("reshape", place="linear", saves=["file size", "parameters"], keeps_function=False,
           search={"keep": [0.75, 0.5]})
@reshape
def halve_hidden(model: nn.Module, keep: float = 0.5) -> nn.Module:
    """Return a copy whose first layer keeps a share of its units."""
    return decided({"width": int(model[0].out_features * keep)})


@halve_hidden.applies
def halved(model, decision):
    width = decision["width"]
    order = model[0].weight.norm(dim=1).argsort(descending=True)[:width]
    first, last = nn.Linear(model[0].in_features, width), nn.Linear(width, model[2].out_features)
    with torch.no_grad():
        first.weight.copy_(model[0].weight[order])
        first.bias.copy_(model[0].bias[order])
        last.weight.copy_(model[2].weight[:, order])
        last.bias.copy_(model[2].bias)
    model[0], model[2] = first, last
    return model
