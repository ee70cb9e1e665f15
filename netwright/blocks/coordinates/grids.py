"""Reading and writing grids over the cube of coordinates from -1 to 1, by linear interpolation."""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor


def check_coordinates(x: Tensor, dims: int) -> None:
    """Raise ValueError where `x` is not (*, dims) of floating-point numbers."""
    if not x.ndim or x.shape[-1] != dims or not x.is_floating_point():
        raise ValueError(f"x must be (*, {dims}) of floating-point numbers from -1 to 1, got "
                         f"{tuple(x.shape)} of {x.dtype}")


def neighbours(sizes: Sequence[int], x: Tensor, *, corners: bool) -> tuple[Tensor, Tensor]:
    """Return which entries of a grid lie around each coordinate, and how much each of them counts.

    With `corners` the first and the last entry of an axis are at -1 and 1, else half a cell inside.
    Beyond the outermost entries the nearest ones count.

    Shapes: sizes (dims,), x (*, dims); indices into the flat grid and weights, both (*, 2^dims).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    below, shares = [], []
    for axis, n in enumerate(sizes):
        place = (wide[..., axis] + 1) / 2 * (n - 1 if corners else n) - (0 if corners else 0.5)
        place = place.clamp(0, n - 1)
        lower = place.detach().floor().clamp(0, max(n - 2, 0))
        below.append(lower.long())
        shares.append(place - lower)
    indices, weights = [], []
    for ends in product((0, 1), repeat=len(sizes)):
        index, weight = torch.zeros_like(below[0]), torch.ones_like(shares[0])
        for n, lower, share, end in zip(sizes, below, shares, ends, strict=True):
            index = index * n + (lower + end).clamp(max=n - 1)
            weight = weight * (share if end else 1 - share)
        indices.append(index)
        weights.append(weight)
    return torch.stack(indices, -1), torch.stack(weights, -1)


def interpolate(grid: Tensor, x: Tensor, *, corners: bool) -> Tensor:
    """Return the values of `grid` at `x`, linearly interpolated.

    Shapes: grid (channels, *sizes), x (*, dims); out (*, channels).
    """
    indices, weights = neighbours(grid.shape[1:], x, corners=corners)
    found = grid.flatten(1).t()[indices]
    return (found * weights[..., None].to(found.dtype)).sum(-2)
