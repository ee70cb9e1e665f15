from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.blocks.reversible.block import ReversibleBlock
from netwright.catalogue.facets import method
from netwright.errors import CannotReverse
from netwright.reversing.engine import Add, Update

__all__ = ["AdditiveCoupling", "AffineCoupling"]


@method("block", place="residual stream", takes=("f", "g"), saves=["training memory"],
        network=lambda: AdditiveCoupling(nn.Linear(3, 3), nn.Linear(3, 3)),
        batch=lambda: torch.randn(5, 6))
class AdditiveCoupling(ReversibleBlock):
    """Add to each half of the input what a module makes of the other half.

    y_1 = x_1 + f(x_2);  y_2 = x_2 + g(y_1).
    Inverse: x_2 = y_2 - g(y_1);  x_1 = y_1 - f(x_2).

    `f` and `g` are any modules that keep the shape of a half: dense, convolutions in 1, 2 or 3
    dimensions, attention. The volume is kept: log |det dy/dx| = 0.

    Args:
        f: What is added to the first half.
        g: What is added to the second half.
        dim: The dimension that is split: 1 for channels, -1 for features.
        sizes: The two sizes, where they are not equal.

    Shapes: x and y (*, 2 c, *) with 2 c at `dim`; f and g take and return c there. More arguments
    go to both.

    Raises:
        CannotReverse: `dim` is odd, or what a module returns has not the other half's shape.

    Paper: Gomez, Ren, Urtasun, Grosse, 2017, The Reversible Residual Network: Backpropagation
    Without Storing Activations.

    >>> block = AdditiveCoupling(nn.Linear(3, 3), nn.Linear(3, 3))
    >>> x = torch.randn(5, 6)
    >>> torch.allclose(block.inverse(block(x)), x, atol=1e-6)
    True
    """

    def __init__(self, f: nn.Module, g: nn.Module, dim: int = 1, *,
                 sizes: Sequence[int] | None = None) -> None:
        super().__init__()
        self.f, self.g, self.dim, self.sizes = f, g, dim, sizes

    def updates(self, *args: Any, **options: Any) -> list[Update]:
        """Return the two additions."""
        return [Add("f", self.f, (1,), 0, args, options), Add("g", self.g, (0,), 1, args, options)]


@method("block", place="residual stream", takes=("f", "g"), saves=["training memory"],
        network=lambda: AffineCoupling(nn.Linear(3, 6), nn.Linear(3, 6)),
        batch=lambda: torch.randn(5, 6))
class AffineCoupling(ReversibleBlock):
    """Scale and shift each half of the input by what a module makes of the other half.

    (s, t) = the halves of f(x_2):  y_1 = x_1 exp(c(s)) + t;
    (s, t) = the halves of g(y_1):  y_2 = x_2 exp(c(s)) + t;  c(s) = clamp tanh(s / clamp).

    Without `g` the second half stays as it is.

    Args:
        f: What makes scale and shift of the first half.
        g: What makes those of the second half, None to leave that as it is.
        dim: The dimension that is split, of the input and of what f and g return.
        clamp: What the logarithm of a scale stays below; None leaves it free.
        sizes: The two sizes, where they are not equal.

    Shapes: x and y (*, 2 c, *) with 2 c at `dim`; f and g take c and return 2 c there.

    Raises:
        CannotReverse: `dim` is odd, or what a module returns is not twice a half.

    Paper: Dinh, Sohl-Dickstein, Bengio, 2017, Density Estimation Using Real NVP.

    >>> block = AffineCoupling(nn.Linear(3, 6), nn.Linear(3, 6))
    >>> x = torch.randn(5, 6)
    >>> torch.allclose(block.inverse(block(x)), x, atol=1e-5)
    True
    """

    def __init__(self, f: nn.Module, g: nn.Module | None = None, dim: int = 1, *,
                 clamp: float | None = 2.0, sizes: Sequence[int] | None = None) -> None:
        super().__init__()
        checks.above(0, clamp=clamp, optional=True, advice="None leaves the scale free")
        self.f, self.g, self.dim, self.clamp, self.sizes = f, g, dim, clamp, sizes

    def updates(self, *args: Any, **options: Any) -> list[Update]:
        """Return the one or two affine maps."""
        steps: list[Update] = [
            _Affine("f", self.f, 1, 0, args, options, dim=self.dim, clamp=self.clamp)]
        if self.g is not None:
            steps.append(
                _Affine("g", self.g, 0, 1, args, options, dim=self.dim, clamp=self.clamp))
        return steps


class _Affine(Update):

    def __init__(self, name: str, module: nn.Module, read: int, write: int, args: Sequence[Any],
                 options: dict[str, Any], *, dim: int, clamp: float | None) -> None:
        super().__init__(name, module, (read,), (write,), args, options)
        self.dim, self.clamp = dim, clamp

    def change(self, x: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        """Return x exp(s) + t."""
        s, t = self._parts(x[0], made)
        return [(x[0] * s.exp() + t).to(x[0].dtype)]

    def restore(self, y: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        """Return (y - t) exp(-s)."""
        s, t = self._parts(y[0], made)
        return [((y[0] - t) * (-s).exp()).to(y[0].dtype)]

    def _parts(self, x: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        size, wanted = x.shape[self.dim], list(x.shape)
        wanted[self.dim] *= 2
        if not isinstance(made, Tensor) or list(made.shape) != wanted:
            got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise CannotReverse(f"{self} must return scale and shift, {tuple(wanted)} for a half "
                                f"of shape {tuple(x.shape)}, got {got}")
        # In the narrower dtype that autocast computes in, exp(s) exp(-s) would not be 1.
        s, t = made.to(x.dtype).split(size, self.dim)
        return (s if self.clamp is None else self.clamp * torch.tanh(s / self.clamp)), t
