from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.anatomy.layers import is_transposed
from netwright.anatomy.replacing import replace, without_fused_paths
from netwright.blocks.sparse._applying import with_weight
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.masks import n_of_m
from netwright.models.gpt import gpt
from netwright.reshape.change import decided, reshape
from netwright.reshape.masking.edge_popup import plain_layers

__all__ = ["advance", "finish_n_of_m", "n_of_m_training"]

Decay = Literal["mask", "structure", "sr-ste"]
Schedule = Literal["linear", "exponential"]
REGROWTH = 2e-4  # SR-STE's pull of masked weights to zero


@method(
    "reshape",
    place="whole network",
    needs=["training"],
    keeps_function=True,
    search={"decay": ["mask", "structure", "sr-ste"]},
    variants={"mask": {}, "exponential": {"schedule": "exponential"},
              "structure": {"n": 1, "m": 4, "decay": "structure"}},
)
@reshape
def n_of_m_training(model: nn.Module, n: int = 2, m: int = 4, *, decay: Decay = "mask",
                    schedule: Schedule = "linear",
                    layers: Collection[str] | None = None) -> nn.Module:
    """Return a copy that while it trains becomes one with at most n of each m weights not zero.

    `"mask"`: W' = M ⊙ W + d (1 − M) ⊙ W, where M keeps the n largest of each m weights side by
    side and d falls from 1 to 0, linearly or as 2^(−10 t).  `"structure"`: M keeps k of each m,
    and k falls from m − 1 over m/2, m/4, ... to n.  `"sr-ste"`: M is there from the beginning, the
    gradient goes straight through, and to it is added 2e-4 (1 − M) ⊙ W.

    `netwright.sparse.advance(model, progress)` says how far the training is, from 0 to 1, before
    each step; masks are taken anew from the weights in each pass. `netwright.sparse.finish_n_of_m`
    returns the model with its own layers again, zeros in their weights. Groups run along the
    inputs, in a convolution along the channels.

    Args:
        model: any network.
        n: how many weights stay.
        m: of how many side by side.
        decay: how the others go.
        schedule: how d falls.
        layers: the names of the layers; by default all linear layers and convolutions whose
            inputs m divides, but no last one that reads out a vocabulary.

    Raises:
        NothingToReshape: there is no such layer.
        ValueError: n is not from 1 to m − 1, or m does not divide the inputs of a named layer.
        UnknownName: `decay`, `schedule` or one of `layers` is none that is known.

    Paper: Bambhaniya, Yazdanbakhsh, Subramanian, Kao, Agrawal, Evci, Krishna, 2024, Progressive
    Gradient Flow for Robust N:M Sparsity Training in Transformers.

    >>> model = n_of_m_training(nn.Sequential(nn.Linear(8, 4)), 2, 4)
    >>> finished = finish_n_of_m(advance(model, 1.0))
    >>> (finished[0].weight != 0).view(-1, 4).sum(1).tolist() == [2] * 8
    True
    """
    checks.count(2, m=m)
    checks.between(1, m - 1, whole=True, n=n)
    checks.one_of(("mask", "structure", "sr-ste"), decay=decay)
    checks.one_of(("linear", "exponential"), schedule=schedule)
    names = plain_layers(model, layers)
    odd = {name: size for name in names if (size := _inputs(model.get_submodule(name))) % m}
    if layers is not None and odd:
        name, size = next(iter(odd.items()))
        raise ValueError(f"m must divide the inputs of each layer, got {m} for the {size} of "
                         f"{name}; choose another m, or leave that layer out")
    kept = [name for name in names if name not in odd]
    if not kept:
        raise ValueError(f"m must divide the inputs of some layer, got {m} for inputs of "
                         f"{sorted(set(odd.values()))}; choose another m")
    return decided({"layers": kept, "n": n, "m": m, "decay": decay, "schedule": schedule},
                   keeps_function=decay == "mask")


@n_of_m_training.applies
def with_decay(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    """Put layers whose masked weights fade in the places of `model`'s own."""
    how = (decision["n"], decision["m"], decision["decay"], decision["schedule"])
    for name in decision["layers"]:
        model = replace(model, name, Fading(model.get_submodule(name), *how))
    without_fused_paths(model)
    return model


@method("companion")
def advance(model: nn.Module, progress: float) -> nn.Module:
    """Tell `n_of_m_training`'s layers how far the training is, from 0 to 1, in place.

    Raises:
        ValueError: `progress` is not between 0 and 1.
    """
    checks.between(0, 1, progress=progress)
    for layer in model.modules():
        if isinstance(layer, Fading):
            layer.progress.fill_(progress)
    return model


def _fading_network() -> nn.Module:
    """Return a small network that trains so, to try what ends it."""
    return n_of_m_training(gpt(16, context=8, width=16, depth=3, heads=2))


@method("reshape", place="whole network", keeps_function=False,
        saves=["file size"], network=_fading_network)
@reshape
def finish_n_of_m(model: nn.Module) -> nn.Module:
    """Return a copy of what `n_of_m_training` made, its own layers back, zeros in their weights.

    Args:
        model: what was trained.

    Raises:
        NothingToReshape: no layer of `model` is one of `n_of_m_training`.
    """
    fading = [name for name, layer in model.named_modules() if isinstance(layer, Fading)]
    if not fading:
        raise NothingToReshape(f"{type(model).__name__} has no layer whose weights fade; make it "
                               "by netwright.sparse.n_of_m_training first")
    return decided({"layers": fading})


@finish_n_of_m.applies
@torch.no_grad()
def with_zeros(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    """Put the layers themselves in the places of those that faded."""
    for name in decision["layers"]:
        layer: Any = model.get_submodule(name)
        layer.layer.weight.copy_(layer.layer.weight * layer.mask(layer.n))
        mode = layer.layer.training
        model = replace(model, name, layer.layer)
        layer.layer.train(mode)
    return model


class Fading(nn.Module):
    """A layer whose weights outside of groups' largest fade while it trains."""

    reads_weight = True
    progress: Tensor

    def __init__(self, layer: nn.Module, n: int, m: int, decay: str, schedule: str) -> None:
        super().__init__()
        self.layer, self.n, self.m, self.decay, self.schedule = layer, n, m, decay, schedule
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer makes of x with its faded weight."""
        return with_weight(self.layer, x, self.weight)

    @property
    def weight(self) -> Tensor:
        """The weight as it counts now, which some networks read themselves."""
        own: Any = self.layer
        return self.faded(own.weight)

    def faded(self, weight: Tensor) -> Tensor:
        """Return a weight as it counts now."""
        if self.decay == "sr-ste":
            mask = self.mask(self.n)
            straight = weight * mask + (weight - weight.detach()) * (1 - mask)
            return straight if not self.training else _Regrown.apply(straight, weight, mask)
        if self.decay == "structure":
            return weight * self.mask(self.stage(float(self.progress)))
        left = 1 - self.progress
        share = left if self.schedule == "linear" else 2 ** (10 * left - 10) * (left > 0)
        mask = self.mask(self.n)
        return weight * (mask + share.to(weight) * (1 - mask))

    def stage(self, progress: float) -> int:
        """Return how many of each m stay now."""
        counts = [self.m - 1]
        while counts[-1] > self.n:
            half = self.m // 2 if counts[-1] == self.m - 1 else counts[-1] // 2
            counts.append(max(half, self.n))
        return counts[min(int(progress * len(counts)), len(counts) - 1)]

    @torch.no_grad()
    def mask(self, n: int) -> Tensor:
        """Return 1 at the n largest of each m weights side by side, else 0."""
        own: Any = self.layer
        weight = own.weight.detach()
        if is_transposed(own):
            return n_of_m(weight.T, n, self.m).T.to(weight)
        if weight.ndim == 2:
            return n_of_m(weight, n, self.m).to(weight)
        along = weight.movedim(1, -1)
        return n_of_m(along.reshape(len(along), -1), n, self.m).view(along.shape).movedim(
            -1, 1).to(weight)


class _Regrown(torch.autograd.Function):
    """The weight as it is; its gradient pulls what is masked to zero."""

    @staticmethod
    def forward(ctx: Any, straight: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return straight.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, mask = ctx.saved_tensors
        return grad, REGROWTH * (1 - mask) * weight, None


def _inputs(layer: Any) -> int:
    return int(layer.weight.shape[0] if is_transposed(layer) else layer.weight.shape[1])
