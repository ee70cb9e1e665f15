from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import one_hot

from netwright.catalogue.facets import method
from netwright.rules.rule import Rule, check_labels
from netwright.stages import Stages

__all__ = ["DeltaRule"]


@method("rule", papers=["003-036"], saves=["backpropagation"], needs=["labels", "linear layers"],
        network=lambda: nn.Sequential(nn.Linear(20, 3), nn.Sigmoid()))
class DeltaRule(Rule):
    """Train neurons by their error times their input: the delta rule.

    a = f(W x + b);  e = t - a;  step of W = mean e x^T;  step of b = mean e.

    `.grad` gets the negative step, and the optimizer's rate is the rule's. The slope of f takes no
    part, so that f may be a step, where this is the perceptron's rule; where f is the identity it
    is the gradient of the squared error, and where f is a sigmoid that of the cross-entropy.
    Batches of one sample are the rule as it is taught; larger ones take the mean.

    t is y, or where there are several units and y holds class numbers, 1 for the class and 0 for
    the others; labels of -100 do not count. The returned loss is the mean over the samples of
    |e|^2 / 2. It is for one layer: nothing tells a layer below what its error is.

    Args:
        network: `Neuron`, or any module whose only parameters are those of one `nn.Linear` that is
            given what the network is given, flattened or not.
        example: Not needed.

    Shapes: x (batch, *inputs); y (batch,), or as the output (batch, units).

    Raises:
        ValueError: the network has other parameters than one linear layer's, targets do not fit, or
            x is not a tensor.

    Paper: Cuevas Tello, 2018, Apuntes de Redes Neuronales Artificiales.

    >>> from netwright.blocks.feedforward import Neuron
    >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> rule, both = DeltaRule(Neuron(2)), torch.tensor([0.0, 0.0, 0.0, 1.0])
    >>> optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     loss = rule(x, both)
    ...     optimizer.step()
    >>> rule.predict(x).flatten()
    tensor([0., 0., 0., 1.])
    """

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        layers = [m for m in self.network.modules() if isinstance(m, nn.Linear)]
        others = {id(p) for p in self.network.parameters()} - {
            id(p) for layer in layers for p in layer.parameters()}
        if len(layers) != 1 or others:
            raise ValueError("network must have one linear layer and no other parameters, got "
                             f"{len(layers)} linear layers and {len(others)} others; the delta "
                             "rule is for a single layer, use Backprop for more")
        self.layer = [layers[0]]  # in a list, so that it is not in the state twice

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the negative step to `.grad`; return the detached loss."""
        if not isinstance(x, Tensor):
            raise ValueError(f"x must be a tensor, what the linear layer reads, got "
                             f"{type(x).__name__}; give the tensor alone")
        a, layer = self.network(x), self.layer[0]
        if a.ndim != 2:
            raise ValueError(f"network must return (batch, units), got {tuple(a.shape)}")
        counted = y != -100 if y.dtype == torch.int64 and y.ndim == 1 else None
        e = self._targets(y, a) - a
        if counted is not None:
            e = torch.where(counted[:, None], e, 0)
        n = len(a) if counted is None else counted.sum().clamp(min=1)
        steps = {layer.weight: e.T @ x.flatten(1).to(e.dtype), layer.bias: e.sum(0)}
        for parameter, step in steps.items():
            if parameter is not None and parameter.requires_grad:
                down = (-step / n).to(parameter.dtype)
                parameter.grad = down if parameter.grad is None else parameter.grad + down
        return e.square().sum() / (2 * n)

    def _targets(self, y: Tensor, a: Tensor) -> Tensor:
        if y.shape == a.shape:
            return y.to(a.dtype)
        if y.shape != a.shape[:1]:
            raise ValueError(f"y must be {tuple(a.shape[:1])} or {tuple(a.shape)}, "
                             f"got {tuple(y.shape)}")
        if a.shape[1] == 1:
            return y[:, None].to(a.dtype)
        check_labels(y, a.shape[1])
        return one_hot(y.clamp(min=0), a.shape[1]).to(a.dtype)
