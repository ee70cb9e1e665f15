"""Training on inputs alone: what a generative model says of them is the loss."""

from typing import Any

import torch
from torch import Tensor, nn

from netwright.catalogue.facets import facets
from netwright.objectives.metrics import mean_over_targets
from netwright.rules.exact.backprop import Backprop
from netwright.runtime.modes import evaluating
from netwright.signals import apply


class Unlabelled(Backprop):
    """Train a generative model with the exact gradient of what it says of its inputs.

    L = -mean log p(x), or where the model has no `log_prob` its own `loss(x)`, the first where
    that returns several.

    Shapes: x a batch of samples, or the tuple of the arguments that the model's method takes.
    """

    needs_labels = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)

    def loss_with_graph(self, x: Any, y: Tensor | None = None) -> Tensor:
        """Return the loss of a batch; `y` is not looked at."""
        model: Any = self.network
        if hasattr(model, "log_prob"):
            return -apply(model.log_prob, x).mean()
        found = apply(model.loss, x)
        loss: Tensor = found if isinstance(found, Tensor) else found[0]
        return loss

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return log p(x) of each sample, or minus the loss of all where there is no density."""
        model: Any = self.network
        with evaluating(self):
            return (apply(model.log_prob, x) if hasattr(model, "log_prob")
                    else -self.loss_with_graph(x))


def generative(network: nn.Module) -> bool:
    """Return whether a network says itself how well it fits its inputs."""
    if callable(getattr(network, "log_prob", None)):
        return True
    said = facets(type(network))
    return said is not None and said.kind == "generative" and hasattr(network, "loss")


@mean_over_targets
def mean_score(scores: Tensor, y: Tensor) -> float:
    """Return the mean of what is predicted, as the measure of a density."""
    return float(scores.mean())
