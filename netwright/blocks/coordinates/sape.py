import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.blocks.coordinates.grids import check_coordinates, interpolate, neighbours
from netwright.catalogue.facets import method
from netwright.runtime.distributed import summed

__all__ = ["SAPE", "FourierFeatures"]

_POOLS: dict[int, Callable[..., Tensor]] = {
    1: nn.functional.avg_pool1d, 2: nn.functional.avg_pool2d, 3: nn.functional.avg_pool3d}


@method(
    "block",
    papers=["003-174"],
    place="embedding",
    takes=("dims",),
    needs=["coordinates"],
    search={"deviation": (0.5, 50.0)},
    batch=lambda: torch.rand(2, 5, 2) * 2 - 1,
)
class FourierFeatures(nn.Module):
    """Sines and cosines of a coordinate along random directions, from slow to fast.

    y = (sin 2 pi f_1.x, cos 2 pi f_1.x, sin 2 pi f_2.x, ...),  |f_1| <= |f_2| <= ...

    The directions are uniform and the lengths those of a normal variable of this deviation. They
    are not learnt.

    Args:
        dims: size of the last axis of x.
        frequencies: how many.
        deviation: of the frequencies, in periods per unit.
        generator: draws them; the global state without one.

    Shapes: x (*, dims), y (*, 2 frequencies).

    Raises:
        ValueError: a size is below 1, or x has another.

    Paper: Tancik, Srinivasan, Mildenhall, et al., 2020, Fourier Features Let Networks Learn High
    Frequency Functions in Low Dimensional Domains.

    >>> FourierFeatures(2, 32)(torch.zeros(5, 2)).shape
    torch.Size([5, 64])
    """

    frequencies: Tensor

    def __init__(self, dims: int, frequencies: int = 256, *, deviation: float = 5.0,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, dims=dims, frequencies=frequencies)
        self.dims = dims
        lengths = deviation * torch.randn(frequencies, generator=generator).abs()
        directions = torch.randn(dims, frequencies, generator=generator)
        self.register_buffer(
            "frequencies", directions / directions.norm(dim=0) * lengths.sort().values)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, 2 frequencies) of (*, dims)."""
        check_coordinates(x, self.dims)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # which would blur fast features
            angles = 2 * math.pi * (x.to(wide) @ self.frequencies.to(wide))
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).to(x.dtype)


@method(
    "block",
    papers=["003-174"],
    place="embedding",
    takes=("encoding", "dims"),
    needs=["coordinates"],
    network=lambda: SAPE(FourierFeatures(2, 4), dims=2, steps=10, grid=4),
    batch=lambda: torch.rand(2, 5, 2) * 2 - 1,
)
class SAPE(nn.Module):
    """Unmask an encoding's features from slow to fast, in each place as long as the error remains.

    y = (x, m(x) * encoding(x));  m_b(x) interpolates min(1, max(0, t_c - b)) between cells c

    Block b of the features is masked where t_c <= b and unmasked where t_c >= b + 1. All t start at
    0. After each step of training, t_c grows by `blocks / steps` in every cell whose error has not
    yet been below `tolerance`; a cell whose error has, stays where it is. The error of a cell is
    the mean over what was seen near it since the last block was completed. Masks are averaged over
    neighbouring cells.

        y = network(sape(x))
        errors = (y - target).square().mean(-1)
        errors.mean().backward()
        optimizer.step()
        sape.observe(x, errors)

    Args:
        encoding: a module of (*, dims) whose features go from slow to fast, such as
            `FourierFeatures`.
        dims: how many coordinates there are: 1, 2 or 3.
        steps: of training, until a place has all features: half of all that you train for.
        grid: cells along each axis; 1 treats all places alike.
        blocks: how many groups of features are unmasked one after another; one for each pair of
            features where none is given.
        tolerance: which error is small enough.

    Shapes: x (*, dims) from -1 to 1; y (*, dims + features).

    Raises:
        ValueError: `dims` is not 1, 2 or 3, a size is below 1, `blocks` is more than the features,
            or `errors` does not have one number for each coordinate.

    Paper: Hertz, Perel, Giryes, Sorkine-Hornung, Cohen-Or, 2021, SAPE: Spatially-Adaptive
    Progressive Encoding for Neural Optimization.

    >>> sape = SAPE(FourierFeatures(2, 32), dims=2, steps=100, grid=8)
    >>> x = torch.rand(50, 2) * 2 - 1
    >>> sape(x).shape, bool(sape(x)[:, 2:].any())
    (torch.Size([50, 66]), False)
    >>> sape.observe(x, errors=torch.ones(50))
    >>> bool(sape(x)[:, 2:].any())
    True
    """

    opened: Tensor
    active: Tensor
    errors: Tensor
    weights: Tensor
    seen: Tensor
    block_of: Tensor

    def __init__(self, encoding: nn.Module, dims: int, *, steps: int, grid: int = 32,
                 blocks: int | None = None, tolerance: float = 1e-3) -> None:
        super().__init__()
        if dims not in _POOLS:
            raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
        with torch.no_grad():
            example = next((t for t in [*encoding.parameters(), *encoding.buffers()]
                            if t.is_floating_point()), torch.zeros(()))
            self.features = encoding(example.new_zeros(1, dims)).shape[-1]
        blocks = max(1, self.features // 2) if blocks is None else blocks
        checks.count(1, steps=steps, grid=grid, blocks=blocks)
        if blocks > self.features:
            raise ValueError(f"blocks must be at most the {self.features} features of the "
                             f"encoding, got {blocks}")
        self.encoding, self.dims, self.steps, self.blocks = encoding, dims, steps, blocks
        self.tolerance, self.out_features = tolerance, dims + self.features
        self.sizes = (grid,) * dims
        cells = grid ** dims
        # A number of steps, since a fraction of a block would be lost in a narrow dtype.
        self.register_buffer("opened", torch.zeros(cells, dtype=torch.long))
        self.register_buffer("active", torch.ones(cells, dtype=torch.bool))
        self.register_buffer("errors", torch.zeros(cells))
        self.register_buffer("weights", torch.zeros(cells))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("block_of", torch.arange(self.features) * blocks // self.features,
                             persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, dims + features): the coordinates and what of their encoding is unmasked."""
        check_coordinates(x, self.dims)
        encoded = self.encoding(x)
        return torch.cat([x, encoded * self.mask(x).to(encoded.dtype)], -1)

    @property
    def progress(self) -> Tensor:
        """How many blocks are open in each cell; (grid^dims,)."""
        return (self.opened * (self.blocks / self.steps)).clamp(max=self.blocks)

    @torch.no_grad()
    def mask(self, x: Tensor) -> Tensor:
        """Return how far each feature is unmasked at `x`, from 0 to 1; (*, features)."""
        blocks = torch.arange(self.blocks, device=self.opened.device)
        cells = (self.progress - blocks[:, None]).clamp(0, 1).unflatten(1, self.sizes)
        return interpolate(self._smooth(cells), x, corners=False)[..., self.block_of]

    @torch.no_grad()
    def observe(self, x: Tensor, errors: Tensor) -> None:
        """Take note of the errors at `x` after a step of training, and unmask where they are large.

        With `torch.distributed` the errors of all processes count.

        Shapes: x (*, dims), errors (*), such as the squared error of each sample.
        """
        check_coordinates(x, self.dims)
        if errors.shape != x.shape[:-1]:
            raise ValueError(f"errors must be {tuple(x.shape[:-1])}, one for each coordinate, got "
                             f"{tuple(errors.shape)}; take the mean over the outputs")
        indices, shares = neighbours(self.sizes, x, corners=False)
        shares = shares.to(self.errors.dtype)
        parts = shares * errors[..., None].to(self.errors.dtype)
        for kept, more in ((self.errors, parts), (self.weights, shares)):
            new = torch.zeros_like(kept).index_add_(0, indices.flatten(), more.flatten())
            kept += summed(new)
        self.seen += 1
        self.opened += self.active
        # A block is completed when the number of blocks that time has brought is a new one.
        due = self.seen * self.blocks // self.steps > (self.seen - 1) * self.blocks // self.steps
        around, weight = (self._smooth(t.view(1, *self.sizes)).flatten()
                          for t in (self.errors, self.weights))
        # Where nothing was seen, nothing is known to be small: 0 <= 0 must not settle a cell.
        settled = (around <= self.tolerance * weight) & (weight > 0)
        self.active &= ~(due & settled)
        self.errors.masked_fill_(due, 0)
        self.weights.masked_fill_(due, 0)

    def _smooth(self, grid: Tensor) -> Tensor:
        """Return (channels, *sizes) averaged over the neighbours on each side."""
        padded = nn.functional.pad(grid[None], (1, 1) * self.dims, mode="replicate")
        return _POOLS[self.dims](padded, 3, stride=1)[0]
