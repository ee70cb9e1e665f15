from typing import Any

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.generative.flows.flow import Transform

__all__ = ["LinearTransform"]


@method("generative", papers=["002-139"], place="transform", takes=("dim",))
class LinearTransform(Transform):
    """Multiply a sample by an invertible matrix, and add a bias.

    z = W x + b;  log_det = positions log |det W|.

    Args:
        dim: The entries along dimension 1.
        weight: W at first; a random rotation by default.
        generator: Draws the rotation.

    Shapes: x and z (batch, dim, *); a sample has prod(*) positions, at each of which W acts.

    Raises:
        ValueError: `weight` is not (dim, dim).

    Paper: Kingma, Dhariwal, 2018, Glow: Generative Flow with Invertible 1x1 Convolutions.

    >>> z, log_det = LinearTransform(3)(torch.randn(5, 3))
    >>> bool(log_det.abs().max() < 1e-5)  # a rotation
    True
    """

    def __init__(self, dim: int, weight: Tensor | None = None, *,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, dim=dim)
        if weight is None:
            weight = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
        if weight.shape != (dim, dim):
            raise ValueError(f"weight must be ({dim}, {dim}), since dim={dim}, got "
                             f"{tuple(weight.shape)}")
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(weight.new_zeros(dim))

    def map(self, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        """Return z and log |det dz/dx|."""
        return self.apply_to(x), self.log_volume(x)

    def apply_to(self, x: Tensor) -> Tensor:
        """Return z, without the determinant, which costs the cube of `dim`."""
        with torch.autocast(x.device.type, enabled=False):  # or it could not be undone
            return (x.movedim(1, -1).to(self.weight.dtype) @ self.weight.T
                    + self.bias).movedim(-1, 1).to(x.dtype)

    def log_volume(self, x: Tensor) -> Tensor:
        """Return log |det dz/dx|, the same for each sample."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        one = torch.linalg.slogdet(self.weight.to(wide))[1] * x.shape[2:].numel()
        return one.to(x.dtype).expand(len(x))

    def inverse(self, z: Tensor, condition: Any = None) -> Tensor:
        """Return the x that the transform maps to `z`."""
        with torch.autocast(z.device.type, enabled=False):
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            shifted = z.to(wide).movedim(1, -1) - self.bias.to(wide)
            flat = shifted.reshape(-1, shifted.shape[-1])
            x = torch.linalg.solve(self.weight.to(wide), flat.T).T
            return x.reshape(shifted.shape).movedim(-1, 1).to(z.dtype)
