import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.anatomy.replacing import replace, without_fused_paths
from netwright.blocks.sparse._applying import with_weight
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape.change import decided, reshape
from netwright.reshape.pruning._weights import weight_layers

__all__ = ["edge_popup", "recycle"]


@method(
    "reshape",
    papers=["002-157"],
    place="whole network",
    saves=["file size"],
    needs=["training"],
    keeps_function=False,
    search={"keep": [0.3, 0.5, 0.7]},
    variants={"half": {}, "recycled": {"keep": 0.3, "recycle": 0.2, "every": 2}},
)
@reshape
def edge_popup(model: nn.Module, keep: float = 0.5, *, recycle: float = 0.0, every: int = 10,
               layers: Collection[str] | None = None,
               generator: Generator | None = None) -> nn.Module:
    """Return a copy with random weights that stay as they are, and scores that learn which count.

    W = ±c at random, c = √(2 / (keep · fan_in));  W' = W ⊙ top(|s|);  dL/d|s| := dL/dW' ⊙ W.

    top keeps in each layer the share `keep` of weights whose scores are largest in size. Scores
    are the only parameters that learn; biases are zero, and norms and embeddings stay as they
    are. What was trained in `model` is not used in the layers that are replaced.

    With `recycle` the weights of the share of each layer with the least scores become those of
    the share with the largest, at every `every`-th call of `netwright.sparse.recycle`, which
    stands at the end of each epoch; scores stay.

    Args:
        model: any network.
        keep: the share of weights that count.
        recycle: the share whose weights are replaced, see above.
        every: after how many epochs.
        layers: the names of the layers that are replaced; linear layers and convolutions by
            default, but no last one that reads out a vocabulary.
        generator: draws signs and scores.

    Raises:
        NothingToReshape: there is no such layer.
        ValueError: `keep` is not above 0 and at most 1, `recycle` is not from 0 to 0.5, or
            `every` is below 1.
        UnknownName: one of `layers` is not there.

    Paper: Malach, Yehudai, Shalev-Schwartz, Shamir, 2020, Proving the Lottery Ticket Hypothesis:
    Pruning is All You Need. Ramanujan, Wortsman, Kembhavi, Farhadi, Rastegari, 2020, What's Hidden
    in a Randomly Weighted Neural Network? Recycling of weights is from the paper on it in the
    catalogue, 002-044.

    >>> model = edge_popup(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), keep=0.25)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.scores', '2.scores']
    """
    checks.between(0, 1, ends=(False, True), keep=keep)
    checks.between(0, 0.5, recycle=recycle)
    checks.count(1, every=every)
    names = plain_layers(model, layers)
    return decided({"layers": names, "keep": keep, "recycle": recycle, "every": every},
                   generator=generator)


@edge_popup.applies
def with_scores(model: nn.Module, decision: Mapping[str, Any],
                generator: Generator | None = None) -> nn.Module:
    """Put layers with scores in the places of `model`'s own, and freeze all else."""
    model.requires_grad_(False)
    for name in decision["layers"]:
        layer = Popup(model.get_submodule(name), decision["keep"], decision["recycle"],
                      decision["every"], generator)
        model = replace(model, name, layer)
    without_fused_paths(model)
    return model


@method("companion")
@torch.no_grad()
def recycle(model: nn.Module) -> nn.Module:
    """Count an epoch in `edge_popup`'s layers, and replace weights where it is time; in place.

    >>> model = edge_popup(nn.Sequential(nn.Linear(8, 8)), recycle=0.25, every=1)
    >>> recycle(model) is model
    True
    """
    for layer in model.modules():
        if isinstance(layer, Popup):
            layer.end_epoch()
    return model


class Popup(nn.Module):
    """A layer whose weights are random and stay, and whose scores say which of them count."""

    reads_weight = True  # of its layer, which does not run
    epochs: Tensor

    def __init__(self, layer: nn.Module, keep: float, recycled: float, every: int,
                 generator: Generator | None) -> None:
        super().__init__()
        own: Any = layer
        weight: Tensor = own.weight
        self.layer, self.keep, self.recycled, self.every = own, keep, recycled, every
        fan_in = weight.numel() / (own.nf if hasattr(own, "nf") else len(weight))
        signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
        with torch.no_grad():
            own.weight.copy_(signs * math.sqrt(2 / (keep * fan_in)))
            if own.bias is not None:
                own.bias.zero_()
        drawn = torch.rand(weight.shape, generator=generator) * 2 - 1
        self.scores = nn.Parameter((drawn / math.sqrt(fan_in)).to(weight))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer makes of x with the weights alone that count."""
        return with_weight(self.layer, x, self.weight)

    @property
    def weight(self) -> Tensor:
        """The weight as it counts, which some networks read themselves."""
        own: Tensor = self.layer.weight
        sizes = self.scores.abs()
        straight = sizes - sizes.detach()  # the gradient goes through the choice
        return own * (top(self.scores, self.keep) + straight)

    def end_epoch(self) -> None:
        """Count an epoch, and replace the weights of the least scores where it is time."""
        self.epochs += 1
        count = int(self.recycled * self.scores.numel())
        if not count or int(self.epochs) % self.every:
            return
        order = self.scores.abs().flatten().argsort()
        weight = self.layer.weight.flatten()
        weight[order[:count]] = weight[order[-count:]]
        self.layer.weight.copy_(weight.view_as(self.layer.weight))


def top(scores: Tensor, keep: float) -> Tensor:
    """Return 1 where a score is among the share `keep` that are largest in size, else 0.

    >>> top(torch.tensor([0.1, -3.0, 2.0, 0.5]), 0.5)
    tensor([0., 1., 1., 0.])
    """
    sizes = scores.detach().abs().flatten()
    count = max(1, round(keep * len(sizes)))
    return torch.zeros_like(sizes).index_fill(0, sizes.topk(count).indices, 1).view_as(scores)


def plain_layers(model: nn.Module, layers: Collection[str] | None) -> list[str]:
    """Return the layers whose own forward multiplies by their weight."""
    inside = {f"{name}.out_proj" for name, module in model.named_modules()
              if isinstance(module, nn.MultiheadAttention)}
    inside |= {f"{name}.layer".lstrip(".") for name, module in model.named_modules()
               if getattr(module, "reads_weight", False)}
    names = [name for name in weight_layers(model, layers).layers if name not in inside]
    if not names:
        raise NothingToReshape(f"{type(model).__name__} has no linear layer or convolution that "
                               "runs by itself; name others by layers=")
    return names
