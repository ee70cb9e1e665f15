from math import cos, pi

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from netwright import checks
from netwright.blocks.feedforward.structured_linear import StructuredLinear
from netwright.catalogue.facets import method

__all__ = ["SelfGuided"]


@method("companion", papers=["003-004"])
class SelfGuided(nn.Module):
    """Train a structured layer with a dense matrix beside it, which fades until it is gone.

    y = a_t W x + (1 - a_t) U V x + b;  W = U V at the start;
    a_t = (1 + cos(pi t / steps)) / 2 for t < steps, then 0.

    t counts the passes in training mode, so that any training loop will do; with several passes
    for one step of the optimizer, give as many times the steps. A pass that is run again in a
    backward pass, as by `torch.utils.checkpoint`, does not count. In eval mode y is the same blend
    at the last a_t: the network as it is being trained. From t = steps on the layer is the
    structured one, bit for bit, and W is neither read nor trained; `unguide` then leaves it out.
    The count is in the `state_dict`.

    Args:
        layer: the structured layer.
        steps: over how many passes W fades; the paper's are half of the training.

    Shapes: x (*, in_features), y (*, out_features).

    Raises:
        ValueError: `steps` is below 1.

    Paper: Wei, Moalla, Pascanu, Gulcehre, 2024, Building on Efficient Foundations: Effectively
    Training LLMs with Structured Feedforward Layers.

    >>> layer = SelfGuided(StructuredLinear(8, 16), steps=2)
    >>> for _ in range(3):
    ...     y = layer(torch.zeros(4, 8))
    ...     print(layer.ratio)
    1.0
    0.5
    0.0
    """

    def __init__(self, layer: StructuredLinear, steps: int) -> None:
        super().__init__()
        checks.count(1, steps=steps)
        self.layer, self.steps, self.passes = layer, steps, 0
        self.weight = nn.Parameter(layer.dense_weight().detach().clone())

    @property
    def ratio(self) -> float:
        """The dense matrix's share a_t in the last pass, 1 before the first."""
        last = max(self.passes - 1, 0)
        return 0.0 if last >= self.steps else 0.5 + 0.5 * cos(pi * last / self.steps)

    def forward(self, x: Tensor) -> Tensor:
        """Return the blend."""
        share = self._counted(x)
        y: Tensor = self.layer(x)
        if share is not None:
            y = torch.lerp(y, linear(x, self.weight, self.layer.bias), share.to(y.dtype))
        return y

    @torch.compiler.disable  # a compiler would make a program for each value of the count
    def _counted(self, x: Tensor) -> Tensor | None:
        """Count this pass and return a_t, None once it is 0."""
        # Inside a backward pass the layer is being recomputed, and a_t must stay what it was.
        if self.training and torch._C._current_graph_task_id() == -1:
            self.passes += 1
        ratio = self.ratio
        return x.new_tensor(ratio) if ratio else None

    def get_extra_state(self) -> Tensor:
        """Return what the `state_dict` holds of the count."""
        return torch.tensor(self.passes)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the count from a `state_dict`."""
        self.passes = int(state)

    def extra_repr(self) -> str:
        """Return how far it is."""
        return f"steps={self.steps}, passes={self.passes}"
