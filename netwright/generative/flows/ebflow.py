import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import softplus

from netwright import checks
from netwright.catalogue.facets import method
from netwright.errors import CannotReverse
from netwright.generative.flows.flow import Flow, Transform
from netwright.generative.flows.linear import LinearTransform

__all__ = ["EBFlow", "SmoothLeakyReLU", "score_matching_loss"]

KINDS = ("exact", "sliced", "finite-difference", "denoising")


@method("generative", papers=["003-139"], place="activation")
class SmoothLeakyReLU(Transform):
    """Bend every entry: a leaky ReLU without a kink, so that it has a second derivative.

    z = slope x + (1 - slope) log(1 + exp(x));  log_det = sum log(slope + (1 - slope) sigmoid(x)).

    The inverse is by Newton's method, which a convex function always leads to the root.

    Args:
        slope: far below 0, between 0 and 1.

    Shapes: x and z (batch, *size); log_det (batch,).

    Raises:
        CannotReverse: z is not finite.
        ValueError: `slope` is not between 0 and 1.

    Paper: Chao, Sun, Hsu, Kira, Lee, 2023, Training Energy-Based Normalizing Flow with
    Score-Matching Objectives.

    >>> bend, x = SmoothLeakyReLU(), torch.randn(5, 3)
    >>> torch.allclose(bend.inverse(bend(x)[0]), x, atol=1e-5)
    True
    """

    def __init__(self, slope: float = 0.3) -> None:
        super().__init__()
        checks.between(0, 1, ends=(False, False), slope=slope)
        self.slope = slope

    def map(self, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        """Return z and log |det dz/dx|."""
        return (self.slope * x + (1 - self.slope) * _soft(x).to(x.dtype),
                self._slope(x).log().flatten(1).sum(1).to(x.dtype))

    @torch.no_grad()
    def inverse(self, z: Tensor, condition: Any = None) -> Tensor:
        """Return the x that the transform maps to `z`."""
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        x, rounding = wide, torch.finfo(wide.dtype).eps
        for _ in range(100):
            missed = self.slope * x + (1 - self.slope) * _soft(x) - wide
            x = x - missed / self._slope(x)
            if bool((missed.abs() <= 4 * rounding * wide.abs().clamp(min=1)).all()):
                return x.to(z.dtype)
        raise CannotReverse("SmoothLeakyReLU finds no x for a z that is not finite; look for what "
                            "made it so")

    def _slope(self, x: Tensor) -> Tensor:
        return self.slope + (1 - self.slope) * torch.sigmoid(x)


@method(
    "generative",
    papers=["003-139"],
    place="whole network",
    takes=("layers", "size"),
    saves=["training time"],
    network=lambda: EBFlow([LinearTransform(4), SmoothLeakyReLU()], size=4),
)
class EBFlow(Flow):
    """A flow seen as an energy, so that training needs no determinant of its linear layers.

    p(x) = exp(-E(x)) / Z;  E(x) = -log p_base(z) - sum over the other layers of log |det|;
    Z = product over the linear layers of 1 / |det W|.

    Z is a constant of x, and score matching looks at dE/dx only: `score_matching_loss(flow, x)`
    trains in a cost that grows with the square of the dimension, where the likelihood's grows with
    its cube. `log_prob`, `sample`, `inverse` and `log_det` are those of any flow, and exact.

    The energy is differentiated twice in training, so activations are kept there, unlike in
    `log_prob`. All layers must have two derivatives: SiLU, tanh or softplus, not ReLU.

    Args:
        layers: From data to base, each a `Transform`; every `LinearTransform` is a linear layer.
        size: The size of a sample.
        base: A distribution of samples of that size, the standard normal one by default.
        stored: Whether activations are kept in `log_prob` too.

    Shapes: x and z (batch, *size); energy (batch,).

    Paper: Chao, Sun, Hsu, Kira, Lee, 2023, Training Energy-Based Normalizing Flow with
    Score-Matching Objectives.

    >>> flow, x = EBFlow([LinearTransform(2), SmoothLeakyReLU()], size=2), torch.randn(5, 2)
    >>> torch.allclose(flow.log_prob(x), -flow.energy(x) - flow.log_normalizer(), atol=1e-5)
    True
    """

    def __init__(self, layers: Iterable[Transform], size: int | Sequence[int],
                 base: Distribution | None = None, *, stored: bool = False) -> None:
        super().__init__(layers, size, base, stored=stored)

    def energy(self, x: Tensor, condition: Any = None) -> Tensor:
        """Return E(x) under plain autograd, without the linear layers' determinants."""
        self._check(x)
        log_det = x.new_zeros(len(x))
        for part in self.transforms:
            if isinstance(part, LinearTransform):
                x = part.apply_to(x)
            else:
                x, change = part(x, condition)
                log_det = log_det + change
        return -self._base_log_prob(x) - log_det

    def log_normalizer(self) -> Tensor:
        """Return log Z."""
        like = next(self.parameters(), torch.zeros(()))
        one = torch.empty(1, *self.size, dtype=like.dtype, device=like.device)
        volumes = [part.log_volume(one)[0] for part in self.transforms
                   if isinstance(part, LinearTransform)]
        return -sum(volumes, like.new_zeros(()))


@method("companion", papers=["003-139"])
def score_matching_loss(flow: EBFlow | nn.Module, x: Tensor,
                        kind: Literal["exact", "sliced", "finite-difference", "denoising"]
                        = "sliced", *, noise: float = 0.1, generator: Generator | None = None,
                        condition: Any = None) -> Tensor:
    """Return how far the score of a flow's energy is from that of the data, up to a constant.

    s(x) = -dE/dx, the mean over samples of

    - "exact": |s|^2 / 2 + tr(ds/dx), by as many backward passes as a sample has numbers;
    - "sliced": |s|^2 / 2 + v' (ds/dx) v, v of random signs;
    - "finite-difference": the same from energies alone, with d = noise v:
      [E(x + d) - E(x - d)]^2 / (8 noise^2) - [E(x + d) + E(x - d) - 2 E(x)] / noise^2;
    - "denoising": |s(x + d) + d / noise^2|^2 / 2, d ~ N(0, noise^2): the score of noisy data.

    Args:
        flow: Has `energy(x)`.
        x: The samples.
        kind: Which of the four.
        noise: The deviation of what is added, for the last two.
        generator: Draws v and d.
        condition: What the flow takes besides x.

    Shapes: x (batch, *size); the loss is a number.

    Raises:
        ValueError: `kind` is none of the four, or `noise` is not above 0.

    Paper: Chao, Sun, Hsu, Kira, Lee, 2023, Training Energy-Based Normalizing Flow with
    Score-Matching Objectives.

    >>> flow = EBFlow([LinearTransform(2), SmoothLeakyReLU()], size=2)
    >>> score_matching_loss(flow, torch.randn(5, 2), "denoising").shape
    torch.Size([])
    """
    checks.one_of(KINDS, kind=kind)
    checks.above(0, noise=noise)

    def energy(at: Tensor) -> Tensor:
        return flow.energy(at) if condition is None else flow.energy(at, condition)  # type: ignore[operator]

    def score(at: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(energy(at).sum(), at, create_graph=True)
        return -slope

    def half_square(s: Tensor) -> Tensor:
        return 0.5 * s.square().flatten(1).sum(1)

    device = "cpu" if generator is None else generator.device
    with torch.enable_grad():
        if kind == "denoising":
            drift = noise * torch.randn(x.shape, generator=generator, dtype=x.dtype,
                                        device=device).to(x.device)
            s = score((x + drift).detach().requires_grad_())
            return half_square(s + drift / noise ** 2).mean()
        if kind == "exact":
            at = x.detach().requires_grad_()
            s, numbers = score(at), math.prod(x.shape[1:])
            rows = torch.eye(numbers, dtype=x.dtype, device=x.device)[:, None]
            rows = rows.expand(numbers, len(x), numbers).reshape(numbers, *x.shape)
            (hessian,) = torch.autograd.grad(s, at, rows, create_graph=True,
                                             is_grads_batched=True)
            return (half_square(s) + (hessian * rows).transpose(0, 1).flatten(1).sum(1)).mean()
        v = torch.randint(2, x.shape, generator=generator, device=device).to(x.device, x.dtype)
        v = 2 * v - 1
        if kind == "sliced":
            at = x.detach().requires_grad_()
            s = score(at)
            (turned,) = torch.autograd.grad((s * v).sum(), at, create_graph=True)
            return (half_square(s) + (turned * v).flatten(1).sum(1)).mean()
        ahead, behind, here = energy(x + noise * v), energy(x - noise * v), energy(x)
        return ((ahead - behind).square() / (8 * noise ** 2)
                - (ahead + behind - 2 * here) / noise ** 2).mean()


def _soft(x: Tensor) -> Tensor:
    return softplus(x, 1.0, 40.0)  # beyond the default of 20 its values and slopes disagree
