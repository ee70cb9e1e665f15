"""Series to go on with: sums of waves, and a recurrent network that begins to."""

import math

import torch
from torch import Tensor, nn

from netwright.data import Split

LOOKBACK, HORIZON = 24, 6


class Forecaster(nn.Module):
    """A GRU over a series and a linear layer: (batch, HORIZON) of (batch, LOOKBACK)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.recurrent = nn.GRU(1, width, batch_first=True)
        self.out = nn.Linear(width, HORIZON)

    def forward(self, x: Tensor) -> Tensor:
        """Return what comes after the series."""
        states, _ = self.recurrent(x.unsqueeze(-1))
        y: Tensor = self.out(states[:, -1])
        return y


def waves() -> Split:
    """Return noisy sums of two waves, and how each goes on.

    Shapes: x (samples, LOOKBACK); y (samples, HORIZON).
    """
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(LOOKBACK + HORIZON)
    period = torch.tensor([6.0, 12.0]) + torch.rand(1000, 2, generator=generator)
    phase = 2 * math.pi * torch.rand(1000, 2, generator=generator)
    wave = (2 * math.pi * time / period[..., None] + phase[..., None]).sin().sum(1)
    series = wave + 0.1 * torch.randn(wave.shape, generator=generator)
    x, y = series.split([LOOKBACK, HORIZON], dim=1)
    return Split(x[:800].clone(), y[:800].clone(), x[800:].clone(), y[800:].clone())
