import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.blocks.experts.routing import Routing
from netwright.catalogue.facets import method

__all__ = ["CentroidRouter"]


@method("block", papers=["002-138"], place="router",
        network=lambda: CentroidRouter(torch.randn(4, 8)))
class CentroidRouter(nn.Module):
    """Send each input to the expert whose centroid is nearest.

    expert = argmin_e |x - c_e|;  weight = 1

    With experts that are neural operators, which take a function as its values at some points, the
    mixture is a mixture of operators: each has to be right in its own part of the space of inputs
    alone, so that small ones reach an accuracy for which a single one would have to be large.

    `CentroidRouter.of(x, n_experts)` finds centroids by k-means. They are fixed: nothing of them is
    learnt.

    Args:
        centroids: one for each expert.

    Shapes: centroids (n_experts, dim); x (tokens, dim); experts and weights (tokens, 1).

    Raises:
        ValueError: `centroids` is not a matrix with a row for each expert, or not finite.

    Paper: Kratsios, Furuya, Lara, Lassas, de Hoop, 2024, Mixture of Experts Soften the Curse of
    Dimensionality in Operator Learning.

    >>> router = CentroidRouter(torch.tensor([[0.0, 0.0], [10.0, 0.0]]))
    >>> router(torch.tensor([[1.0, 1.0], [8.0, 3.0]])).experts.flatten()
    tensor([0, 1])
    """

    centroids: Tensor

    def __init__(self, centroids: Tensor) -> None:
        super().__init__()
        if centroids.ndim != 2 or not len(centroids):
            raise ValueError("centroids must be (n_experts, dim), one row for each expert, got "
                             f"{tuple(centroids.shape)}")
        checks.finite(centroids=centroids)
        self.n_experts = len(centroids)
        self.register_buffer("centroids", centroids.detach().clone())

    @classmethod
    @torch.no_grad()
    def of(cls, x: Tensor, n_experts: int, *, iterations: int = 25,
           generator: Generator | None = None) -> "CentroidRouter":
        """Return a router whose centroids are the k-means of x (samples, dim).

        The first is a sample drawn at random, the next ones are drawn with a probability that grows
        with the square of the distance to those there are (k-means++); then means are moved to the
        middle of what is nearest to them, `iterations` times.

        Raises:
            ValueError: `n_experts` is below 1 or above the number of samples.
        """
        if x.ndim != 2 or not 1 <= n_experts <= len(x):
            raise ValueError(f"n_experts must be between 1 and the number of samples of x "
                             f"(samples, dim), got {n_experts} for {tuple(x.shape)}")
        middle = x.mean(0)
        x = x - middle  # so that sums and squares have digits left for what differs
        device = "cpu" if generator is None else generator.device
        first = torch.randint(len(x), (1,), generator=generator, device=device)
        centroids = x[first.to(x.device)]
        for _ in range(n_experts - 1):
            distance = _distances(x, centroids).amin(1).square()
            odds = distance + distance.mean() * 1e-6 + torch.finfo(distance.dtype).tiny
            drawn = odds.to(device).multinomial(1, generator=generator)
            centroids = torch.cat([centroids, x[drawn.to(x.device)]])
        for _ in range(iterations):
            nearest = _distances(x, centroids).argmin(1)
            sums = torch.zeros_like(centroids).index_add_(0, nearest, x)
            counts = x.new_zeros(n_experts).index_add_(0, nearest, x.new_ones(len(x)))[:, None]
            centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
        return cls(centroids + middle)

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        """Return the routing of x (tokens, dim)."""
        if x.shape[-1] != self.centroids.shape[1]:
            raise ValueError(f"x must be (tokens, {self.centroids.shape[1]}) as the centroids are, "
                             f"got {tuple(x.shape)}")
        distances = _distances(x.detach(), self.centroids)
        # The distances are also what must be finite.
        return Routing(distances.argmin(1, keepdim=True), x.new_ones(len(x), 1), -distances)


def _distances(x: Tensor, centroids: Tensor) -> Tensor:
    """Return the distances (tokens, n_experts), each by the difference.

    Faster ways subtract |x|^2, which rounds away what is small beside an offset that x and all
    centroids have.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, centroids.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return torch.cdist(x.to(wide), centroids.to(wide),
                           compute_mode="donot_use_mm_for_euclid_dist")
