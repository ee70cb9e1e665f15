from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd import Function
from torch.nn import Parameter, functional

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.feedback.feedback_alignment import (
    carrier,
    find_layers,
    forward_of,
    outputs_axis,
    send_back,
    size_for,
)
from netwright.rules.feedback.matrices import (
    Matrices,
    accumulate,
    draw,
    handed_on,
)
from netwright.rules.rule import Rule
from netwright.stages import Stages

__all__ = ["ProductFeedback"]


@method("rule", papers=["003-043"], saves=["backpropagation"], needs=["labels"])
class ProductFeedback(Rule):
    """Train with the product of two matrices, one fixed and one learned, carrying the error back.

    y = W x + b;  r = C^T dL/dy;  dL/dx := R^T r;  dL/dW = dL/dy x^T;  dL/dR := r x^T = C^T dL/dW.
    C ~ N(0, 1/m), fixed;  R ~ N(0, min(mean(W^2), 1/outputs));  m = expansion * outputs.

    The error goes through m units of its own, so that no weight has one that mirrors it: R takes
    the update C^T dL/dW, and C R takes C C^T dL/dW, which is nearly dL/dW since C C^T is nearly 1
    for many units. dL/dW is all that the call adds to `W.grad`: that of every layer that shares W,
    and of a tied embedding. R - C^T W shrinks by the optimizer's weight decay and by nothing else,
    so give the optimizer one that is decoupled (SGD's, AdamW's); then C R comes to be C C^T W. That
    is exact with SGD: other optimizers scale R's update and W's differently. C R begins with the
    size of `FeedbackAlignment`'s B, a choice of this rule; the paper's R ~ N(0, 2/(m + inputs)).

    Holds for the layers that `FeedbackAlignment` serves, whose `exact` this rule has too. A
    kernel is R's with C across its outputs. Layers that share a weight share its C and R.

    Args:
        expansion: units of the detour, for each output of a layer.

    Shapes: x as the network takes it; y as the loss takes it; C (outputs, m); R as W, with m
    outputs.

    Raises:
        ValueError: `expansion` is below 1; the network has no layer that feedback can serve, or
            one without weights yet.

    Paper: Li, Benna, 2024, Deep Learning without Weight Symmetry.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = ProductFeedback(network)
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).shape
    torch.Size([])
    >>> rule.feedback.fixed["2"].shape, rule.feedback.learned["2"].shape
    (torch.Size([3, 30]), torch.Size([30, 8]))
    >>> rule.feedback["2"].shape
    torch.Size([3, 8])
    """

    def __init__(self, network: nn.Module | Stages, example: Any = None, *, expansion: int = 10,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.count(1, expansion=expansion, advice="the paper's is 10")
        self.loss, self.feedback = loss, Products()
        layers, self.exact = find_layers(self.network)
        self._layers: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        self._followed: dict[str, Any] = {}
        for module, name in layers:
            if self.network.get_submodule(name) is module:  # else its weight has its C and R
                self.feedback.add(name, module, expansion, generator)
                if isinstance(module.weight, Parameter):
                    self._followed[name] = module
            forward: Any = _linear if module.weight.ndim == 2 else forward_of(module)
            self._layers.append((module, partial(forward, module, self.feedback, name, False)))

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the update of product feedback alignment to `.grad`; return the detached loss."""
        with handed_on(self._followed, self.feedback.used, self.feedback.learn):
            return send_back(self.network, self._layers, self.loss, x, y)


class Products(nn.Module):
    """The C, the R and the product C R of each weight, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed, self.learned = Matrices(learned=False), Matrices(learned=True)
        self.axes: dict[str, int] = {}
        self.used: set[str] = set()

    def add(self, name: str, module: Any, expansion: int, generator: Generator | None) -> None:
        """Draw C and R for the weight of `module`."""
        weight, axis = module.weight, outputs_axis(module)
        size, outputs = list(weight.shape), weight.shape[axis]
        self.axes[name], size[axis] = axis, expansion * outputs
        self.fixed.add(name, draw((outputs, size[axis]), size[axis] ** -0.5, weight, generator))
        self.learned.add(name, draw(size, size_for(module), weight, generator))

    @torch.no_grad()
    def learn(self, name: str, update: Tensor) -> None:
        """Add C^T times a weight's update to `.grad` of its R."""
        axis, fixed = self.axes[name], self.fixed[name]
        dense = (update.to_dense() if update.is_sparse else update).to(fixed.dtype)
        accumulate(self.learned[name],
                   torch.tensordot(fixed, dense, dims=([0], [axis])).movedim(0, axis))

    def __getitem__(self, name: str) -> Tensor:
        """Return C R, of the weight's shape."""
        axis = self.axes[name]
        return torch.tensordot(self.fixed[name], self.learned[name],
                               dims=([1], [axis])).movedim(0, axis)


class _Linear(Function):
    """x W^T + b, whose input receives dL/dy C R."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, C: Tensor,
                R: Tensor) -> Tensor:
        ctx.save_for_backward(x, C, R)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # one after the other, which takes less than C R where there are fewer rows than outputs
        x, C, R = (saved.to(gradient.dtype) for saved in ctx.saved_tensors)
        of_x, of_weight, of_bias, _, of_R = ctx.needs_input_grad
        r = gradient @ C
        dx = r @ R if of_x else None
        gradient, r, x = (t.reshape(-1, t.shape[-1]) for t in (gradient, r, x))
        return (dx, gradient.T @ x if of_weight else None, gradient.sum(0) if of_bias else None,
                None, r.T @ x if of_R and of_weight else None)


def _linear(module: Any, feedback: Products, name: str, signed: bool, x: Tensor) -> Tensor:
    if not x.requires_grad:  # the first layer sends nothing back
        return type(module).forward(module, x)
    weight, C, R = module.weight, feedback.fixed[name], carrier(module, feedback.learned, name)
    feedback.used.add(name)
    if feedback.axes[name]:
        weight, R = weight.T, R.T
    return _Linear.apply(x, weight, module.bias, C, R)
