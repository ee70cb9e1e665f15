from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from netwright import checks
from netwright.objectives.losses import cross_entropy
from netwright.runtime.modes import evaluating
from netwright.signals import mapped
from netwright.stages import Stages, call

__all__ = ["Rule"]


@checks.annotated
class Rule(nn.Module):
    """What replaces `loss.backward()`: one call fills `.grad` and returns the loss.

    A rule holds the network and whatever it adds to it (feedback matrices, auxiliary heads), so
    that `rule.parameters()` is what an optimizer steps and `rule.state_dict()` is all of it. It
    adds to `.grad` as `backward()` does.

    A rule that does not speak through `.grad` sets `updates_weights` and changes the weights
    itself when it is called. One that talks to the other processes in its calls sets `together`:
    then every process must have a share of every batch. `remembers` says that a call leaves more
    behind in the state than `.grad`: what the next update will need. `resized` has the names in
    the state of weights whose shapes change as it trains. `needs_labels` is False where a batch
    is x alone, and `same_in_shares` where processes that share a batch out do not train as one
    with all of it would, whatever is averaged.

    Args:
        network: what is trained: a module or its `Stages`.
        example: an input as the network takes it, where its stages or their sizes cannot be known
            without a run; most rules that take one do without it in an `nn.Sequential`.
        loss: what the network's output and the target make a number of, a mean over targets.
        generator: where the rule draws what is random in it; PyTorch's global state without one.
    """

    updates_weights = False
    together = False
    remembers = False
    needs_labels = True
    same_in_shares = True
    resized: Collection[str] = ()

    def __init__(self, network: nn.Module | Stages, *, generator: Generator | None = None) -> None:
        super().__init__()
        self.network: nn.Module = network.model if isinstance(network, Stages) else network
        self.generator = generator

    def __call__(self, x: Any, *rest: Any, **options: Any) -> Any:
        """Return `forward`'s loss, with gradients on and `x` cut off from whatever made it."""
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.enable_grad():
                return self(x, *rest, **options)
        if options:
            options = {name: _cut_off(value) for name, value in options.items()}
        return super().__call__(_cut_off(x), *[_cut_off(value) for value in rest], **options)

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the batch's update to `.grad` of the parameters; return the detached loss."""
        raise TypeError(f"{type(self).__name__} must define forward(x, y)")

    def stepped_by(self, optimizer: Optimizer) -> None:
        """Be told which optimizer will step, as `nw.fit` does; most rules need not know."""

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return the network's output for `x`, in eval mode, without a graph."""
        with evaluating(self):
            return call(self.network, x)


def _cut_off(value: Any) -> Any:
    """Return `value` with its tensors outside the graph that made them, and as it is if they are.

    What was made in inference mode is copied, since no graph may keep it.
    """
    return mapped(value, _detached)


def _detached(t: Tensor) -> Tensor:
    t = t.detach() if t.requires_grad else t
    return t.clone() if t.is_inference() else t


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


def targets(logits: Tensor, y: Tensor) -> Tensor:
    """Return how many targets a mean loss has: the labels but -100, or else rows of `logits`."""
    if y.is_floating_point() or y.is_complex():
        return torch.tensor(logits[..., 0].numel(), device=logits.device)
    return (y != -100).sum().clamp(min=1)
