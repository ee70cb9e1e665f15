from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from netwright.losses import cross_entropy
from netwright.modes import evaluating
from netwright.stages import Stages, call


class Rule(nn.Module):
    """What replaces `loss.backward()`: one call fills `.grad` and returns the loss.

    A rule holds the network and whatever it adds to it (feedback matrices, auxiliary heads), so
    that `rule.parameters()` is what an optimizer steps and `rule.state_dict()` is all of it. It
    adds to `.grad` as `backward()` does. `network` is a module or its `Stages`. `generator` is
    where a rule draws what is random in it, PyTorch's global state where it is None.

    A rule that does not speak through `.grad` sets `updates_weights` and changes the weights
    itself when it is called.
    """

    updates_weights = False

    def __init__(self, network: nn.Module | Stages, *, generator: Generator | None = None) -> None:
        super().__init__()
        self.network: nn.Module = network.model if isinstance(network, Stages) else network
        self.generator = generator

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the batch's update to `.grad` of the parameters; return the detached loss."""
        raise TypeError(f"{type(self).__name__} must define forward(x, y)")

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return the network's output for `x`, in eval mode, without a graph."""
        with evaluating(self):
            return call(self.network, x)


def checked(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, y: Tensor) -> Tensor:
    """Return `loss(logits, y)`; where it fails, say what is wrong with the labels.

    They are looked at only then, since looking takes as long as a small layer.
    """
    try:
        return loss(logits, y)
    except (IndexError, RuntimeError):
        if loss is cross_entropy:
            check_labels(y, logits.shape[-1])
        raise


def check_labels(y: Tensor, classes: int) -> None:
    """Raise ValueError unless `y` holds int64 classes below `classes` (-100 is left out).

    Labels on an accelerator are not read, since that would make every step wait for it.
    """
    if y.dtype != torch.int64:
        raise ValueError(f"y must hold class numbers of dtype int64, got {y.dtype}; "
                         "use y.long(), or a loss of your own for other targets")
    if y.device.type != "cpu" or y.numel() == 0:
        return
    low, high = y.aminmax()
    if high >= classes or low < 0:
        bad = y[(y != -100) & ((y < 0) | (y >= classes))]
        if len(bad):
            raise ValueError(f"y must be between 0 and {classes - 1} for a network with {classes} "
                             f"outputs, got {int(bad[0])}; check the labels or the last layer")
