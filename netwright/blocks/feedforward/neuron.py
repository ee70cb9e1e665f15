from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from netwright import checks
from netwright.blocks.feedforward.feed_forward import Activation, activation_module
from netwright.catalogue.facets import method

__all__ = ["Neuron", "Step"]


@method("block", place="activation")
class Step(nn.Module):
    """1 where z >= 0, else 0: what McCulloch's and Pitts' neuron does.

    >>> import torch
    >>> Step()(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0., 1., 1.])
    """

    def forward(self, z: Tensor) -> Tensor:
        """Return the step, which has no slope."""
        return (z >= 0).to(z.dtype)


@method("block", papers=["003-036"], place="linear", takes=("in_features",),
        variants={"plain": {}, "sigmoid": {"activation": "sigmoid"}})
class Neuron(nn.Sequential):
    """A neuron: a weighted sum of its inputs, a threshold and an activation.

    a = f(w . x + b).

    With a step it is McCulloch's and Pitts' neuron, which has no gradient; `nw.rules.DeltaRule`
    trains it. `units` puts several side by side.

    Args:
        in_features: how many inputs.
        activation: "step", another name of an activation, or what makes a module.
        units: how many neurons.

    Shapes: x (*, in_features), a (*, units).

    Raises:
        ValueError: a size is below 1.
        UnknownName: no activation is called that.

    Paper: Cuevas Tello, 2018, Apuntes de Redes Neuronales Artificiales.

    >>> import torch
    >>> Neuron(2)(torch.zeros(4, 2)).shape
    torch.Size([4, 1])
    """

    @property
    def differentiable(self) -> bool:
        """Whether a gradient reaches the weights; through a step none does."""
        return not isinstance(self[1], Step)

    def __init__(self, in_features: int,
                 activation: Literal["step"] | Activation | Callable[[], nn.Module] = "step", *,
                 units: int = 1) -> None:
        checks.count(1, in_features=in_features, units=units)
        super().__init__(nn.Linear(in_features, units),
                         Step() if activation == "step" else activation_module(activation))
