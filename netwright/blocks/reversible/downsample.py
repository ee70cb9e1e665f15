from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.errors import CannotReverse
from netwright.reversing.engine import Regroup, Step

__all__ = ["InjectivePad", "InvertibleDownsample"]


@method(
    "block",
    papers=["001-010"],
    place="downsampling",
    saves=["training memory"],
    needs=["images"],
)
class InvertibleDownsample(nn.Module):
    """Make every patch of an image one position with more channels: nothing is lost, only moved.

    y[(o, c), p] = x[c, factor p + o],  o a position in the patch;  the inverse puts it back.

    The channels of one position in the patch stand together, so that either half of them is a
    coarser image with all channels of `x`. Its volume is kept: log |det dy/dx| = 0. It needs no
    arithmetic, and among reversible blocks stores nothing and is not run twice.

    Args:
        factor: How many times smaller each axis becomes, one number for all or one for each.

    Shapes: x (batch, c, *size) with one, two or three axes, or more; y (batch, c prod(factor),
    *(size / factor)). More arguments are not looked at.

    Raises:
        ValueError: a factor is below 1.
        CannotReverse: an axis is no multiple of its factor.

    Paper: Jacobsen, Smeulders, Oyallon, 2018, i-RevNet: Deep Invertible Networks.

    >>> down = InvertibleDownsample()
    >>> x = torch.arange(16.).view(1, 1, 4, 4)
    >>> down(x).shape
    torch.Size([1, 4, 2, 2])
    >>> torch.equal(down.inverse(down(x)), x)
    True
    """

    def __init__(self, factor: int | Sequence[int] = 2) -> None:
        super().__init__()
        self.factor = factor if isinstance(factor, int) else tuple(factor)
        for size in [factor] if isinstance(factor, int) else factor:
            checks.count(1, factor=size)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return `x` with patches as channels."""
        factors = self._factors(x)
        if any(n % f for n, f in zip(x.shape[2:], factors, strict=True)):
            raise CannotReverse(f"the axes of an image must be multiples of factor={self.factor}, "
                                f"got {tuple(x.shape)}; pad the image, or choose another factor")
        axes, count = range(len(factors)), len(factors)
        split = [n for s, f in zip(x.shape[2:], factors, strict=True) for n in (s // f, f)]
        x = x.reshape(*x.shape[:2], *split)
        x = x.permute(0, *[3 + 2 * i for i in axes], 1, *[2 + 2 * i for i in axes])
        return x.flatten(1, 1 + count)

    def inverse(self, y: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return the image of which `forward` makes `y`."""
        factors = self._factors(y)
        axes, count, patch = range(len(factors)), len(factors), 1
        for f in factors:
            patch *= f
        if y.shape[1] % patch:
            raise CannotReverse(f"the channels must be a multiple of the {patch} positions in a "
                                f"patch of factor={self.factor}, got {tuple(y.shape)}")
        sizes = [n * f for n, f in zip(y.shape[2:], factors, strict=True)]
        y = y.reshape(y.shape[0], *factors, y.shape[1] // patch, *y.shape[2:])
        order = [axis for i in axes for axis in (2 + count + i, 1 + i)]
        y = y.permute(0, 1 + count, *order)
        return y.reshape(*y.shape[:2], *sizes)

    def steps(self, *args: Any, **options: Any) -> list[Step]:
        """Return the one step, which moves numbers."""
        return [Regroup("the downsampling", lambda x: [self(x[0])],
                        lambda y: [self.inverse(y[0])])]

    def extra_repr(self) -> str:
        """Return the factor."""
        return f"factor={self.factor}"

    def _factors(self, x: Tensor) -> tuple[int, ...]:
        axes = x.ndim - 2
        factors = (self.factor,) * axes if isinstance(self.factor, int) else self.factor
        if axes < 1 or len(factors) != axes:
            raise CannotReverse(f"an image must be (batch, channels, *size) with as many axes as "
                                f"factor={self.factor} has, got {tuple(x.shape)}")
        return factors


@method("companion")
class InjectivePad(nn.Module):
    """Append channels of zeros, so that a reversible network may be wider than its input.

    y = (x, 0), or (x_1, 0, x_2, 0) in two parts;  the inverse drops them.

    One-to-one, but not onto: of an arbitrary `y` the inverse drops what is in those channels.

    Args:
        channels: How many are appended in all, 0 or more.
        dim: The dimension that is padded.
        parts: How many equal parts of `x` get an equal share of the zeros: 2 before a coupling,
            each half of which is then part of the image.

    Shapes: (*, c, *) with c at `dim` -> (*, c + channels, *). More arguments are not looked at.

    Raises:
        ValueError: `channels` is below 0, or no multiple of `parts`.
        CannotReverse: `x` is no multiple of `parts` along `dim`; what is inverted has not as many
            channels as were appended.

    Paper: Jacobsen, Smeulders, Oyallon, 2018, i-RevNet: Deep Invertible Networks.

    >>> InjectivePad(2)(torch.ones(1, 1))
    tensor([[1., 0., 0.]])
    """

    def __init__(self, channels: int, dim: int = 1, *, parts: int = 1) -> None:
        super().__init__()
        checks.count(0, channels=channels, advice="dropping some would lose what is in them")
        if parts < 1 or channels % parts:
            raise ValueError(f"parts must be at least 1 and divide channels={channels}, got "
                             f"{parts}")
        self.channels, self.dim, self.parts = channels, dim, parts

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return `x` and the zeros."""
        if x.shape[self.dim] % self.parts:
            raise CannotReverse(f"an input must have a multiple of parts={self.parts} channels "
                                f"along dim={self.dim}, got {tuple(x.shape)}")
        shape = list(x.shape)
        shape[self.dim] = self.channels // self.parts
        zeros = x.new_zeros(shape)
        return torch.cat([piece for part in x.chunk(self.parts, self.dim)
                          for piece in (part, zeros)], self.dim)

    def inverse(self, y: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return `y` without the channels of zeros."""
        kept = y.shape[self.dim] - self.channels
        if kept < 0 or kept % self.parts:
            raise CannotReverse(f"there must be the {self.channels} padded channels and a multiple "
                                f"of parts={self.parts} others along dim={self.dim}, got "
                                f"{tuple(y.shape)}")
        return torch.cat([part.narrow(self.dim, 0, kept // self.parts)
                          for part in y.chunk(self.parts, self.dim)], self.dim)

    def steps(self, *args: Any, **options: Any) -> list[Step]:
        """Return the one step, which moves numbers."""
        return [Regroup("the padding", lambda x: [self(x[0])], lambda y: [self.inverse(y[0])])]

    def extra_repr(self) -> str:
        """Return the channels."""
        return f"channels={self.channels}, dim={self.dim}, parts={self.parts}"
