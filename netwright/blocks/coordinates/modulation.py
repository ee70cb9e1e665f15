from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from netwright.blocks.coordinates.grids import check_coordinates, interpolate
from netwright.catalogue.facets import method

__all__ = ["CoordinateAwareModulation"]


@method(
    "block",
    papers=["003-196"],
    place="normalisation",
    takes=("grid_shape", "dim"),
    needs=["coordinates"],
    variants={"grid": {"grid_shape": (4, 4)}},
    batch=lambda: (torch.randn(6, 8), torch.rand(6, 2) * 2 - 1),
)
class CoordinateAwareModulation(nn.Module):
    """Scale and shift hidden features by values that grids hold at each coordinate.

    y = gamma(x) * norm(h) + beta(x),  gamma and beta linearly interpolated from grids of numbers

    What changes fast from place to place is then read from the grids, and the network need not
    learn it. The grids start at 1 and 0. A norm, which a network of coordinates does badly with
    elsewhere, does well here: what it takes away of a place's scale, the grid gives back.

    Args:
        grid_shape: entries of a grid along each axis; the first and last are at -1 and 1.
        dim: size of the last axis of h.
        channels: how many numbers an entry holds: 1, which all features share, or `dim`.
        norm: `norm(dim)` makes the normalisation; a layer norm without weights where none is given,
            which is the same for each coordinate whatever the batch. `nn.Identity` leaves it out;
            `lambda dim: nn.BatchNorm1d(dim, affine=False)` counts over a batch (batch, dim).

    Shapes: h (*, dim), x (*, len(grid_shape)) from -1 to 1; y (*, dim).

    Raises:
        ValueError: a size is below 1, `channels` is neither 1 nor `dim`, or h and x do not fit.

    Paper: Lee, Rho, Nam, Ko, Park, 2024, Coordinate-Aware Modulation for Neural Fields.

    >>> modulation = CoordinateAwareModulation((32, 32), 64)
    >>> modulation(torch.randn(100, 64), torch.rand(100, 2) * 2 - 1).shape
    torch.Size([100, 64])
    """

    def __init__(self, grid_shape: Sequence[int], dim: int, *, channels: int = 1,
                 norm: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        self.grid_shape = tuple(grid_shape)
        if not self.grid_shape or min(self.grid_shape) < 1 or dim < 1:
            raise ValueError("grid_shape must hold at least one size of at least 1, and dim be at "
                             f"least 1, got {self.grid_shape} and {dim}")
        if channels not in (1, dim):
            raise ValueError(f"channels must be 1 or dim={dim}, got {channels}")
        self.dim = dim
        self.norm = norm(dim) if norm else nn.LayerNorm(dim, elementwise_affine=False)
        self.gamma = nn.Parameter(torch.ones(channels, *self.grid_shape))
        self.beta = nn.Parameter(torch.zeros(channels, *self.grid_shape))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """Return (*, dim) of the features (*, dim) at the coordinates `x`."""
        check_coordinates(x, len(self.grid_shape))
        if h.shape != (*x.shape[:-1], self.dim):
            raise ValueError(f"h must be {(*x.shape[:-1], self.dim)}, features of dim={self.dim} "
                             f"for each coordinate, got {tuple(h.shape)}")
        normed = self.norm(h)
        both = interpolate(torch.cat([self.gamma, self.beta]), x, corners=True)
        gamma, beta = both.to(normed.dtype).chunk(2, -1)
        return torch.addcmul(beta, gamma, normed)
