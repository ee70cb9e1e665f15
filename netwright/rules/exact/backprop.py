from collections.abc import Callable
from typing import Any

from torch import Generator, Tensor, nn

from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.rule import Rule, checked, output_for
from netwright.stages import Stages

__all__ = ["Backprop"]


@method("rule", needs=["labels"], variants={"plain": {}})
class Backprop(Rule):
    """Train with the exact gradient of the loss, which every other rule is measured against.

    g = dL/dw by reverse accumulation through the whole network.

    Any network does: it need not be a chain of stages.

    Shapes: x as the network takes it; y as the loss takes it.

    Raises:
        ValueError: nothing in the network is trainable.

    Paper: Rumelhart, Hinton, Williams, 1986, Learning Representations by Back-Propagating Errors.

    >>> import torch
    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = Backprop(network)
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> network[0].weight.grad.shape
    torch.Size([8, 4])
    """

    runs_whole = True

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        self.loss = loss

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add dL/dw to `.grad`; return the detached loss."""
        loss = self.loss_with_graph(x, y)
        if not loss.requires_grad:
            raise ValueError("network has no trainable parameters; set requires_grad on some")
        loss.backward()
        return loss.detach()

    def loss_with_graph(self, x: Any, y: Tensor) -> Tensor:
        """Return the loss, for an optimizer that differentiates it itself."""
        return checked(self.loss, output_for(self.loss, self.network, x), y)
