from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear

from netwright import checks
from netwright.blocks.feedforward.feed_forward import Activation, activation_module
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape

__all__ = ["QuadraticFeedForward", "QuadraticLinear", "relinear_groups"]


@method(
    "block",
    papers=["001-102"],
    place="linear",
    takes=("inputs", "outputs"),
    search={"start": ["linear", "random"]},
    variants={"plain": {}, "random start": {"start": "random"}},
)
class QuadraticLinear(nn.Module):
    """A layer of quadratic neurons: a product of two linear functions, and squares.

    y = (W_r x + b_r) * (W_g x + b_g) + W_b (x * x) + c.

    Quadratic networks collapse easily: in L layers an input of size a becomes one of size a^(2^L).
    ReLinear starts them as the ordinary network that they contain, W_g = 0, b_g = 1, W_b = 0 and
    c = 0 (`start="linear"`), and lets what is quadratic learn more slowly: give the optimizer
    `relinear_groups(model, lr, gamma)`.

    Args:
        inputs: the last axis of x.
        outputs: the last axis of y.
        start: "linear", or "random", where all three matrices begin like W_r.
        generator: draws the weights.

    Shapes: x (*, inputs); y (*, outputs); weight (outputs, inputs), as gate and square.

    Raises:
        ValueError: a size is below 1.
        UnknownName: `start` is neither.

    Paper: Fan, Li, Wang, Lai, Wang, 2023, On Expressivity and Trainability of Quadratic Networks.

    >>> layer, x = QuadraticLinear(4, 3), torch.randn(5, 4)
    >>> torch.equal(layer(x), linear(x, layer.weight, layer.bias))
    True
    """

    def __init__(self, inputs: int, outputs: int, *, start: Literal["linear", "random"] = "linear",
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, inputs=inputs, outputs=outputs)
        checks.one_of(["linear", "random"], start=start)
        self.inputs, self.outputs = inputs, outputs

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) / inputs ** 0.5)

        self.weight, self.bias = drawn(outputs, inputs), drawn(outputs)
        if start == "linear":
            self.gate = nn.Parameter(torch.zeros(outputs, inputs))
            self.square = nn.Parameter(torch.zeros(outputs, inputs))
            self.gate_bias = nn.Parameter(torch.ones(outputs))
        else:
            self.gate, self.square = drawn(outputs, inputs), drawn(outputs, inputs)
            self.gate_bias = drawn(outputs)
        self.shift = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, outputs) of (*, inputs)."""
        product = linear(x, self.weight, self.bias) * linear(x, self.gate, self.gate_bias)
        return product + linear(x * x, self.square, self.shift)

    def extra_repr(self) -> str:
        """Return what a print shows."""
        return f"{self.inputs}, {self.outputs}"


@method(
    "block",
    papers=["001-102"],
    place="feedforward",
    takes=("dim", "hidden"),
    search={"activation": ["gelu", "relu", "silu"]},
)
class QuadraticFeedForward(nn.Sequential):
    """A feed-forward block of two quadratic layers with an activation between them.

    y = Q_2(s(Q_1(x))).

    It has three times a plain block's parameters; `hidden=None` takes as many units as give that
    block's.

    Args:
        dim: size of the last axis of x.
        hidden: units between the layers, 4/3 `dim` where none is given.
        activation: a name, or what makes a module.
        out: size of the last axis of y, `dim` where none is given.

    Shapes: x (*, dim), y (*, out).

    Raises:
        ValueError: a size is below 1.

    Paper: Fan, Li, Wang, Lai, Wang, 2023, On Expressivity and Trainability of Quadratic Networks.

    >>> QuadraticFeedForward(18)(torch.zeros(2, 5, 18)).shape
    torch.Size([2, 5, 18])
    """

    def __init__(self, dim: int, hidden: int | None = None, *, activation: Activation = "relu",
                 out: int | None = None) -> None:
        hidden = max(1, 4 * dim // 3) if hidden is None else hidden
        out = dim if out is None else out
        checks.count(1, dim=dim, hidden=hidden, out=out)
        super().__init__(QuadraticLinear(dim, hidden), activation_module(activation),
                         QuadraticLinear(hidden, out))


@method("companion", papers=["001-102"])
def relinear_groups(model: nn.Module, lr: float,
                    gamma: float | tuple[float, float]) -> list[dict[str, Any]]:
    """Return an optimizer's groups, in which what is quadratic learns `gamma` times as fast.

    lr for all, gamma_g lr for W_g and b_g, gamma_b lr for W_b and c.

    With plain gradient descent that is the paper's shrunk gradients; with Adam, which takes the
    size out of gradients, it is what shrunk gradients were meant to do. gamma = 0 leaves an
    ordinary network, 1 is no scheme at all.

    Args:
        model: what holds `QuadraticLinear` layers.
        lr: the rate of everything else.
        gamma: for both, or (gamma_g, gamma_b).

    Raises:
        NothingToReshape: there is no quadratic layer in `model`.
        ValueError: `gamma` is not between 0 and 1.

    Paper: Fan, Li, Wang, Lai, Wang, 2023, On Expressivity and Trainability of Quadratic Networks.

    >>> model = nn.Sequential(QuadraticLinear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [round(group["lr"], 5) for group in relinear_groups(model, 0.01, gamma=(0.1, 0.2))]
    [0.01, 0.001, 0.002]
    """
    gate, square = gamma if isinstance(gamma, tuple) else (gamma, gamma)
    for share in (gate, square):
        checks.between(0, 1, gamma=share, advice="try 0.1")
    layers = [module for module in model.modules() if isinstance(module, QuadraticLinear)]
    if not layers:
        raise NothingToReshape("model must hold a QuadraticLinear layer, which is where gamma "
                               f"counts, got {type(model).__name__} without one")
    gates = {p: None for layer in layers for p in (layer.gate, layer.gate_bias)}
    squares = {p: None for layer in layers for p in (layer.square, layer.shift)}
    others = [p for p in model.parameters() if p not in gates and p not in squares]
    return [{"params": others, "lr": lr}, {"params": [*gates], "lr": gate * lr},
            {"params": [*squares], "lr": square * lr}]
