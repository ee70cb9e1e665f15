from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.generative.flows.coupling import AffineCouplingTransform
from netwright.generative.flows.flow import Transform
from netwright.reversing.engine import Step

__all__ = ["KernelCoupling"]

KERNELS: dict[str, Callable[[Tensor], Tensor]] = {  # of r^2 = sum_i ((x_i - u_i) / l_i)^2
    "rbf": lambda r2: (-r2 / 2).exp(),
    "matern12": lambda r2: (-_root(r2)).exp(),
    "matern32": lambda r2: (1 + 3 ** 0.5 * _root(r2)) * (-(3 ** 0.5) * _root(r2)).exp(),
    "matern52": lambda r2: ((1 + 5 ** 0.5 * _root(r2) + 5 / 3 * r2)
                            * (-(5 ** 0.5) * _root(r2)).exp()),
}


@method(
    "generative",
    papers=["002-108"],
    place="transform",
    takes=("dim",),
    saves=["parameters"],
    search={"n_inducing": [8, 16, 32]},
    variants={"few points": {"n_inducing": 5}},
)
class KernelCoupling(Transform):
    """Scale and shift one half of a sample by a sum of kernels on the other half.

    z_1 = x_1 exp(c(s)) + t;  z_2 = x_2;  (s, t) = sum_m k(x_2, u_m) a_m;
    k(x, u) = k(|(x - u) / l|);  c(s) = clamp tanh(s / clamp);  log_det = sum c(s).

    The points u_m, the length l of each dimension and the weights a_m are learnt. Scale and shift
    share points and lengths. The weights are 0 at first, so that the transform is the identity;
    the points are drawn from N(0, 1), so that data should be scaled to that.

    Args:
        dim: The entries of a sample.
        n_inducing: The number of points u_m.
        kernel: "rbf", "matern12", "matern32" or "matern52".
        flip: Whether the first half stays and the second is changed.
        clamp: What the logarithm of a scale stays below.
        generator: Draws the points.

    Shapes: x and z (batch, dim); the changed half has dim // 2 entries, the other the rest, unless
    `flip` is set: then it is the other way about.

    Raises:
        ValueError: `dim` is below 2, `n_inducing` below 1, `kernel` unknown, or a condition given.

    Paper: English, Kirchler, Lippert, 2024, Kernelised Normalising Flows.

    >>> z, log_det = KernelCoupling(4, n_inducing=10)(torch.randn(5, 4))
    >>> z.shape, log_det.shape
    (torch.Size([5, 4]), torch.Size([5]))
    """

    def __init__(self, dim: int, n_inducing: int, kernel: str = "rbf", *, flip: bool = False,
                 clamp: float = 2.0, generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(2, dim=dim, advice="there are two halves")
        checks.count(1, n_inducing=n_inducing)
        checks.one_of(KERNELS, kernel=kernel)
        small, large = dim // 2, dim - dim // 2
        kept, changed = (small, large) if flip else (large, small)
        sizes = (kept, changed) if flip else (changed, kept)
        net = _Expansion(kept, 2 * changed, n_inducing, kernel, generator)
        self.coupling = AffineCouplingTransform(net, sizes, clamp=clamp, flip=flip)

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the split, the affine map and the join."""
        if condition is not None:
            raise ValueError("condition must be None, since the kernels know no condition, got "
                             f"{type(condition).__name__}; use AffineCouplingTransform")
        return self.coupling.steps()


class _Expansion(nn.Module):
    """The sum of kernels around learnt points."""

    def __init__(self, size: int, made: int, n: int, kernel: str,
                 generator: Generator | None) -> None:
        super().__init__()
        self.kernel = kernel
        self.points = nn.Parameter(torch.randn(n, size, generator=generator))
        # A distance between such points is about the root of twice their entries.
        self.log_lengths = nn.Parameter(torch.full((size,), 0.5).log() + 0.5 * torch.tensor(
            2.0 * size).log())
        self.weights = nn.Parameter(torch.zeros(n, made))

    def forward(self, x: Tensor) -> Tensor:
        scaled, points = x / self.log_lengths.exp(), self.points / self.log_lengths.exp()
        square = (scaled.square().sum(1)[:, None] + points.square().sum(1)
                  - 2 * scaled @ points.T)
        return KERNELS[self.kernel](square.clamp(min=0)) @ self.weights


def _root(square: Tensor) -> Tensor:
    return (square + 1e-12).sqrt()  # its slope is finite where a sample is a point
