from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.blocks.reversible.block import ReversibleBlock
from netwright.catalogue.facets import method
from netwright.errors import CannotReverse
from netwright.reversing.engine import Add, Update

__all__ = ["DropVelocity", "MomentumBlock", "StartVelocity"]


@method(
    "block",
    place="residual stream",
    takes=("f",),
    saves=["training memory"],
    search={"gamma": [0.5, 0.9]},
    network=lambda: MomentumBlock(nn.Linear(3, 3)),
    batch=lambda: torch.randn(5, 6),
)
class MomentumBlock(ReversibleBlock):
    """Let a residual function push a velocity, and the velocity move the features.

    v' = gamma v + weight f(x);  x' = x + v';  weight = 1 - gamma.
    Inverse: x = x' - v';  v = (v' - weight f(x)) / gamma.

    A residual block x + f(x) becomes reversible with its `f`, and its parameters, as they are: no
    half of the channels is given up. The velocity is carried beside x: `StartVelocity` puts it
    there, `DropVelocity` takes it off, and between them x and v are one tensor, x first.

    Rounding: each block divides the velocity by gamma on the way back, so that its error grows by
    1 / gamma a block, to gamma^-n through n of them. `ReversibleSequential(..., exact=True)` keeps
    what is rounded off, and reconstructs bit for bit at any gamma.

    Args:
        f: The residual function; it keeps the shape of x.
        gamma: How much of the velocity stays, above 0 and at most 1. Near 0 the block is the
            residual block x + f(x), near 1 one of a second-order equation.
        dim: The dimension along which x and v are joined.
        weight: What f counts; 1 - gamma where None, which leaves nothing of f at gamma = 1.

    Shapes: (*, 2 c, *) with 2 c at `dim`, x first and v second; f takes and returns c there. More
    arguments go to f.

    Raises:
        ValueError: gamma is not in (0, 1], or f would count nothing.
        CannotReverse: `dim` is odd, or what f returns has not the shape of x.

    Paper: Sander, Ablin, Blondel, Peyré, 2021, Momentum Residual Neural Networks.

    >>> from netwright.blocks.reversible import ReversibleSequential
    >>> deep = ReversibleSequential(StartVelocity(), *[
    ...     MomentumBlock(nn.Sequential(nn.Linear(4, 4), nn.Tanh())) for _ in range(50)])
    >>> network = nn.Sequential(deep, DropVelocity(), nn.Linear(4, 3))
    >>> network(torch.randn(16, 4)).shape
    torch.Size([16, 3])
    """

    def __init__(self, f: nn.Module, gamma: float = 0.9, dim: int = 1, *,
                 weight: float | None = None) -> None:
        super().__init__()
        checks.between(0, 1, ends=(False, True), gamma=gamma, advice="at 0 nothing is left of the "
                       "velocity, so that it cannot be reconstructed")
        self.f, self.gamma, self.dim = f, gamma, dim
        self.weight = 1 - gamma if weight is None else weight
        if self.weight == 0:
            raise ValueError(f"f would count nothing with gamma={gamma} and weight={weight}; set "
                             "weight=, for instance 1.0, or a gamma below 1")

    def updates(self, *args: Any, **options: Any) -> list[Update]:
        """Return the change of the velocity and that of the features."""
        return [_Push("f", self.f, self.gamma, self.weight, args, options),
                Add("the velocity", nn.Identity(), (1,), 0)]

    def extra_repr(self) -> str:
        """Return what is printed beside f."""
        return f"gamma={self.gamma}, dim={self.dim}, weight={self.weight:g}"


@method("companion")
class StartVelocity(nn.Module):
    """Join a velocity to the features: nothing, or what a module makes of them.

    y = (x, v);  v = 0, or module(x).  Inverse: x.

    Args:
        module: What makes the velocity, and keeps the shape; None for 0.
        dim: The dimension along which they are joined.

    Shapes: x (*, c, *) with c at `dim`; y (*, 2 c, *).

    Paper: Sander, Ablin, Blondel, Peyré, 2021, Momentum Residual Neural Networks.

    >>> StartVelocity()(torch.ones(1, 2))
    tensor([[1., 1., 0., 0.]])
    """

    def __init__(self, module: nn.Module | None = None, dim: int = 1) -> None:
        super().__init__()
        self.module, self.dim = module, dim

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return x and its velocity in one tensor."""
        v = torch.zeros_like(x) if self.module is None else self.module(x, *args, **options)
        if v.shape != x.shape:
            raise ValueError(f"module must keep the shape {tuple(x.shape)}, since what it makes is "
                             f"a velocity, got {tuple(v.shape)}")
        return torch.cat([x, v.to(x.dtype)], self.dim)

    def inverse(self, y: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return x."""
        return y.narrow(self.dim, 0, y.shape[self.dim] // 2).contiguous()


@method("companion")
class DropVelocity(nn.Module):
    """Return the features without their velocity: an ordinary layer, which cannot be undone.

    Shapes: (*, 2 c, *) with 2 c at `dim` -> (*, c, *).

    Paper: Sander, Ablin, Blondel, Peyré, 2021, Momentum Residual Neural Networks.

    >>> DropVelocity()(torch.tensor([[1., 2., 0., 0.]]))
    tensor([[1., 2.]])
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, y: Tensor) -> Tensor:
        """Return the first half."""
        return y.narrow(self.dim, 0, y.shape[self.dim] // 2)


class _Push(Update):
    """v' = gamma v + weight f(x)."""

    def __init__(self, name: str, f: nn.Module, gamma: float, weight: float, args: Sequence[Any],
                 options: dict[str, Any]) -> None:
        super().__init__(name, f, (0,), (1,), args, options)
        self.gamma, self.weight = gamma, weight

    def change(self, x: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        """Return gamma v + weight f(x)."""
        if made.shape != x[0].shape:
            raise CannotReverse(f"f must keep the shape {tuple(x[0].shape)} of the features, got "
                                f"{tuple(made.shape)}")
        return [(self.gamma * x[0] + self.weight * made).to(x[0].dtype)]

    def restore(self, y: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        """Return (v' - weight f(x)) / gamma."""
        return [((y[0] - self.weight * made) / self.gamma).to(y[0].dtype)]
