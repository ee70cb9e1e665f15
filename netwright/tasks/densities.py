"""Densities to learn: two moons and small images, and flows that begin as simple ones."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.data import Split, digits
from netwright.generative.flows.coupling import AffineCouplingTransform
from netwright.generative.flows.flow import Flow
from netwright.generative.flows.squeeze import Squeeze
from netwright.objectives.metrics import mean_over_targets


class Density(nn.Module):
    """A flow as a network: it returns log p(x), (batch, 1) of (batch, *size)."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        """Return how likely each sample is."""
        likely: Tensor = self.flow.log_prob(x)  # type: ignore[operator]
        return likely.unsqueeze(-1)


class Field(nn.Module):
    """A network as the right-hand side of an equation that is the same at all times."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        """Return dx/dt."""
        change: Tensor = self.net(x)
        return change


def conditioner(taken: int, given: int, axes: int) -> nn.Module:
    """Return a small network from `taken` to `given` channels of signals with `axes` axes."""
    if not axes:
        return nn.Sequential(nn.Linear(taken, 64), nn.ReLU(), nn.Linear(64, given))
    return nn.Sequential(nn.Conv2d(taken, 16, 3, padding=1), nn.ReLU(),
                         nn.Conv2d(16, given, 3, padding=1))


def points_flow() -> Density:
    """Return four affine couplings of points in the plane."""
    return Density(Flow([AffineCouplingTransform(conditioner(1, 2, 0), (1, 1), flip=bool(i % 2))
                         for i in range(4)], 2))


def images_flow() -> Density:
    """Return four affine couplings of images of 8 x 8, squeezed to four channels."""
    return Density(Flow([Squeeze(), *(
        AffineCouplingTransform(conditioner(2, 4, 2), (2, 2), flip=bool(i % 2))
        for i in range(4))], (1, 8, 8)))


@mean_over_targets
def negative_log_likelihood(scores: Tensor, y: Tensor) -> Tensor:
    """Return -mean log p of the samples, whatever their labels.

    >>> negative_log_likelihood(torch.tensor([[-1.0], [-3.0]]), torch.zeros(2))
    tensor(2.)
    """
    return -scores.mean()


def moons() -> Split:
    """Return points around two half circles, and which one each is of.

    Shapes: x (samples, 2); y (samples,) in 0..1.
    """
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(2000) % 2
    angle = torch.pi * torch.rand(2000, generator=generator)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    x = torch.where(functional.one_hot(y)[:, :1] == 1, upper, lower)
    x = x + 0.1 * torch.randn(2000, 2, generator=generator)
    return Split(x[:1600], y[:1600], x[1600:], y[1600:])


def smooth_digits() -> Split:
    """Return scikit-learn's digits with noise of one grey level, so that they have a density."""
    split = digits()
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Tensor) -> Tensor:
        return x + torch.rand(x.shape, generator=generator) / 16
    return Split(noisy(split.x_train), split.y_train, noisy(split.x_test), split.y_test)
