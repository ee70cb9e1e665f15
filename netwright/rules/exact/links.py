from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from netwright.rules.rule import checked
from netwright.stages import Stages


class Link(NamedTuple):
    """What a stage took, cut off from the stage before, and what it returned."""

    start: Any
    end: Tensor


def run_linked(net: Stages, loss: Callable[[Tensor, Tensor], Tensor], x: Any,
               y: Tensor) -> list[Link]:
    """Run each stage on an input cut off from the one before; the last one ends in the loss.

    A `start` requires grad where something below it learns. It is no leaf, since PyTorch's flop
    counter hooks a module's inputs, and cannot hook a leaf that `autograd.grad` is asked for.

    Raises:
        ValueError: nothing in the network is trainable.

    >>> import torch
    >>> from torch import nn
    >>> from netwright.objectives.losses import cross_entropy
    >>> from netwright.stages import stages
    >>> net = stages(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)))
    >>> links = run_linked(net, cross_entropy, torch.randn(2, 4), torch.tensor([0, 2]))
    >>> [(link.start.requires_grad, link.end.shape) for link in links]
    [(False, torch.Size([2, 8])), (True, torch.Size([]))]
    """
    context, h, links = net.context(x, live=True), x, []
    for i, stage in enumerate(net):
        start = h if i == 0 else h.detach()
        if i and h.requires_grad:
            start = start.requires_grad_().view_as(start)
        h = stage(start, context)
        links.append(Link(start, h))
    found = checked(loss, h, y)
    if not found.requires_grad:
        raise ValueError("network has no trainable parameters; set requires_grad on some")
    links[-1] = Link(links[-1].start, found)
    return links
