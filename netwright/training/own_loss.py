"""Training with the loss that a model computes itself, as those of Hugging Face do."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from netwright.rules.exact.backprop import Backprop
from netwright.rules.rule import checked
from netwright.signals import apply, tensor_of


class OwnLoss(Backprop):
    """Train a model with the exact gradient of the loss that it returns for a batch of keywords.

    Where it returns none, since the batch holds no labels, the loss is the cross-entropy of its
    logits and y.

    Shapes: x a mapping of what the model takes, "labels" among it; y as the loss takes it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)

    def loss_with_graph(self, x: Any, y: Any) -> Tensor:
        """Return the model's own loss, with its graph."""
        if not isinstance(x, Mapping):
            return super().loss_with_graph(x, y)
        output = apply(self.network, x)
        own = _own(output)
        return checked(self.loss, tensor_of(output), y) if own is None else own


def has_own_loss(network: nn.Module) -> bool:
    """Return whether a network takes labels, of which it makes a loss.

    >>> has_own_loss(nn.Linear(2, 2))
    False
    """
    return bool({"labels", "start_positions"} & set(inspect.signature(network.forward).parameters))


def _own(output: Any) -> Tensor | None:
    if isinstance(output, (tuple, list)):
        first = output[0]
        return first if isinstance(first, Tensor) and not first.ndim else None
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return found if isinstance(found, Tensor) else None
