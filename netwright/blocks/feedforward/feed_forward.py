from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method

__all__ = ["GLU", "FeedForward"]

Activation = Literal["relu", "gelu", "silu", "tanh", "sigmoid", "relu6", "identity"] | Callable[
    [], nn.Module]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
    "relu6": nn.ReLU6, "identity": nn.Identity}


def activation_module(activation: Activation) -> nn.Module:
    """Return a new activation by its name, or by calling what makes it.

    Raises:
        UnknownName: a name that is none of relu, gelu, silu, tanh, sigmoid, relu6, identity.
        ValueError: a module in place of what makes one.
    """
    if isinstance(activation, nn.Module):  # blocks would share it, and what it learns
        raise ValueError(f"activation must be a name or make a module, got the module {activation}"
                         f"; give its class, or lambda: {type(activation).__name__}(...)")
    if not isinstance(activation, str):
        return activation()
    checks.one_of(_ACTIVATIONS, activation=activation)
    return _ACTIVATIONS[activation]()


@method(
    "block",
    papers=["003-002"],
    place="feedforward",
    takes=("dim", "hidden"),
    search={"layers": [2, 3], "activation": ["gelu", "relu", "silu"]},
    variants={"plain": {}, "three layers": {"layers": 3}},
)
class FeedForward(nn.Sequential):
    """A feed-forward block of 1 to n linear layers with an activation between them.

    y = W_n s(... s(W_1 x + b_1) ...) + b_n,  with `hidden` units between the layers.

    Two layers are the transformer's usual block; three with fewer blocks gave its authors lower
    losses at fewer parameters. One layer is linear and has no hidden units.

    Args:
        dim: size of the last axis of x.
        hidden: units between the layers, 4 `dim` where none is given.
        layers: how many linear layers.
        activation: a name, or what makes a module.
        out: size of the last axis of y, `dim` where none is given.
        bias: whether the layers have one.
        dropout: how much of each hidden layer is dropped in training.

    Shapes: x (*, dim), y (*, out).

    Raises:
        ValueError: a size or `layers` is below 1; a module in place of what makes an activation.
        UnknownName: no activation is called that.

    Paper: Gerber, 2025, Attention Is Not All You Need: The Importance of Feedforward Networks in
    Transformer Models.

    >>> import torch
    >>> FeedForward(16, 64, layers=3)(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, hidden: int | None = None, *, layers: int = 2,
                 activation: Activation = "gelu", out: int | None = None, bias: bool = True,
                 dropout: float = 0.0) -> None:
        hidden = 4 * dim if hidden is None else hidden
        out = dim if out is None else out
        checks.count(1, dim=dim, hidden=hidden, layers=layers, out=out)
        sizes = [dim, *[hidden] * (layers - 1), out]
        parts: list[nn.Module] = []
        for before, after in pairwise(sizes):
            parts += [nn.Linear(before, after, bias=bias), activation_module(activation)]
            parts += [nn.Dropout(dropout)] if dropout else []
        super().__init__(*parts[:-2 if dropout else -1])

    def __getitem__(self, index: int | slice) -> Any:
        """Return a layer, or a chain of some of them."""
        if isinstance(index, slice):
            return nn.Sequential(*list(self)[index])
        return super().__getitem__(index)


@method(
    "block",
    papers=["003-047"],
    place="feedforward",
    takes=("dim", "hidden"),
    search={"activation": ["silu", "gelu", "relu", "sigmoid"]},
)
class GLU(nn.Module):
    """A gated feed-forward block: one linear branch is multiplied by an activation of another.

    y = W_2 (s(W x + b) * (V x + c)) + b_2;  s is the sigmoid (GLU), ReLU (ReGLU), GELU (GEGLU),
    SiLU (SwiGLU) or the identity (bilinear).

    Three matrices where a plain block has two: at equal parameters `hidden` is two thirds of a
    plain block's, which `hidden=None` takes (8/3 `dim`, rounded up to a multiple of 8).

    Args:
        dim: size of the last axis of x.
        hidden: size of each branch.
        activation: a name, or what makes a module.
        out: size of the last axis of y, `dim` where none is given.
        bias: whether the layers have one; the paper's have none.
        dropout: how much of the product is dropped in training.

    Shapes: x (*, dim), y (*, out).

    Raises:
        ValueError: a size is below 1; a module in place of what makes an activation.
        UnknownName: no activation is called that.

    Paper: Shazeer, 2020, GLU Variants Improve Transformer.

    >>> import torch
    >>> GLU(16)(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, hidden: int | None = None, *, activation: Activation = "silu",
                 out: int | None = None, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = 8 * -(-dim // 3) if hidden is None else hidden
        out = dim if out is None else out
        checks.count(1, dim=dim, hidden=hidden, out=out)
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.activation = activation_module(activation)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, out) of (*, dim)."""
        y: Tensor = self.down(self.dropout(self.activation(self.gate(x)) * self.up(x)))
        return y
