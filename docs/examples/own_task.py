"""A task of one's own: run it with `netwright compare docs/examples/own_task.py`."""

import torch
from torch import nn

import netwright as nw


def network() -> nn.Module:
    """Build a fresh network, once for every run."""
    return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(),
                         nn.Linear(32, 2))


def data() -> tuple[torch.Tensor, ...]:
    """Return x_train, y_train, x_test, y_test: which of two spirals a point is on."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(1000) % 2
    angle = 6 * torch.rand(1000, generator=generator).sqrt()
    turn = angle + torch.pi * y
    x = angle[:, None] / 6 * torch.stack([turn.cos(), turn.sin()], dim=1)
    x = x + 0.03 * torch.randn(1000, 2, generator=generator)
    return x[:800], y[:800], x[800:], y[800:]


task = nw.Task("spirals", network=network, data=data, epochs=20, batch_size=32,
               learning_rate=1e-2)
