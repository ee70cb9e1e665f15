"""Small networks of handwritten digits, trained by backpropagation."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from netwright.data import Split, digits


def trained(make: Callable[[], nn.Module], seed: int, epochs: int, *, lr: float = 3e-3,
            split: Split | None = None) -> nn.Module:
    """Return `make()` under `seed`, trained with Adam at a rate that falls to zero."""
    data = split or digits()
    torch.manual_seed(seed)
    network = make().train()
    optimizer = torch.optim.Adam(network.parameters(), lr)
    steps = epochs * -(-len(data.x_train) // 64)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.x_train)).split(64):
            optimizer.zero_grad()
            cross_entropy(network(data.x_train[rows]), data.y_train[rows]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def right(network: nn.Module) -> float:
    """Return how many digits that were held out are told right (%)."""
    data = digits()
    return 100 * float((network(data.x_test).argmax(1) == data.y_test).float().mean())


@torch.no_grad()
def held_out_loss(network: nn.Module) -> float:
    """Return the cross-entropy (nats) on digits that were held out."""
    data = digits()
    return float(cross_entropy(network(data.x_test), data.y_test))
