from functools import lru_cache
from typing import cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from netwright.data import mnist
from netwright.evidence import Outcome, Scale, every, evidence, figure
from netwright.sparse import edge_popup, subset_sum_network

POOLS = (4, 8, 12)


@evidence(paper="002-157",
          claim="A network of random weights that stay has subnetworks that classify well, and "
                "any layer is a subnetwork of a random one, with an error that falls "
                "exponentially with its width.",
          shown=(every(figure("accuracy, chosen weights (%)") >= 85),
                 every(figure("accuracy, chosen weights (%)")
                       > figure("accuracy, random masks (%)") + 40),
                 figure("error, pool of 8") < figure("error, pool of 4") / 5,
                 figure("error, pool of 12") < figure("error, pool of 8") / 5,
                 figure("error, pool of 12")
                 < figure("error, pool of 12, best of 4096 random subsets for the layer") / 10),
          shortfall=("scale",
                     "Chosen weights classify 88.8 % right where random masks are at chance, and "
                     "the error falls from 0.50 by way of 0.18 to 0.004 as pools grow from 4 over "
                     "8 to 12. From 4 to 8 it is less than a factor of 5: an error of the largest "
                     "of 12 weights differs much between 3 draws, and one pool of 8 missed by far. "
                     "More draws and larger layers are needed."))
def strong_lottery_ticket(scale: Scale) -> Outcome:
    """Choose among random weights by learned scores, and by sums of subsets."""
    steps = 300 if scale == "desk" else 5000
    figures: dict[str, list[float]] = {}
    for seed in range(3):
        figures.setdefault("accuracy, chosen weights (%)", []).append(
            _accuracy(_trained((200, 200), seed, steps)))
        figures.setdefault("accuracy, random masks (%)", []).append(
            _accuracy(_trained((200, 200), seed, 0)))
        torch.manual_seed(seed)
        target = nn.Linear(4, 3)
        grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 5)] * 4)
        for pool in POOLS:
            found = subset_sum_network(target, pool)
            figures.setdefault(f"error, pool of {pool}", []).append(_error(found, target, grid))
        figures.setdefault("error, pool of 12, best of 4096 random subsets for the layer",
                           []).append(_random_subsets(found, target, grid))
    return Outcome(
        setting={"network": "784, 200, 200, 10 with ReLU, weights of one size and random signs, "
                 "half of each layer's count", "data": "10,000 images of MNIST, accuracy on 2,000",
                 "training": f"{steps} steps of SGD with momentum on scores, batch 128",
                 "sums of subsets": "a linear layer from 4 to 3, the largest error on a grid of "
                 "5 values in each of 4 inputs"},
        figures=figures,
        note="Random masks are those of the scores before training.")


@lru_cache
def _data() -> tuple[torch.Tensor, ...]:
    data = mnist()
    return (data.x_train[:10000].flatten(1), data.y_train[:10000], data.x_test[:2000].flatten(1),
            data.y_test[:2000])


def _trained(hidden: tuple[int, int], seed: int, steps: int) -> nn.Module:
    a, b = hidden
    torch.manual_seed(seed)
    model = edge_popup(nn.Sequential(nn.Linear(784, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(),
                                     nn.Linear(b, 10)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1,
                                momentum=0.9)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, steps))
    x, y, *_ = _data()
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        falling.step()
    return model


@torch.no_grad()
def _accuracy(model: nn.Module) -> float:
    *_, x, y = _data()
    return 100 * float((model(x).argmax(1) == y).float().mean())


@torch.no_grad()
def _error(found: nn.Module, target: nn.Module, grid: torch.Tensor) -> float:
    return float((found(grid) - target(grid)).abs().max())


@torch.no_grad()
def _random_subsets(found: nn.Sequential, target: nn.Module, grid: torch.Tensor) -> float:
    """Return the least error of as many random masks as a weight has subsets, of the same units."""
    h, out = found[:2](grid), cast(nn.Linear, found[2])
    weight = torch.rand_like(out.weight) * 2 - 1
    return min(float((h @ (weight * (torch.rand_like(weight) < 0.5)).T + out.bias
                      - target(grid)).abs().max()) for _ in range(4096))
