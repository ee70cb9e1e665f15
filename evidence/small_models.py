"""The two small trainings that most experiments on feed-forward blocks share."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from netwright.data import CHARACTERS, Split, characters, cifar10, tinyshakespeare
from netwright.models import gpt, patch_transformer
from netwright.objectives.losses import cross_entropy

MakeFeedForward = Callable[[int, int], nn.Module]


class Trained(NamedTuple):
    """What a training gave."""

    network: nn.Module
    steps: list[int]  # when it was looked at
    losses: list[float]  # cross-entropy (nats) on what was held out
    errors: list[float]  # mistakes on what was held out (%)


def language_model(width: int = 48, depth: int = 3, *, context: int = 64,
                   feedforward: MakeFeedForward | None = None) -> nn.Sequential:
    """Return a character model of tinyshakespeare; `feedforward(dim, hidden)` makes its blocks."""
    return gpt(len(CHARACTERS), context=context, width=width, depth=depth, feedforward=feedforward)


def patch_classifier(width: int = 48, depth: int = 3, *,
                     feedforward: MakeFeedForward | None = None) -> nn.Sequential:
    """Return a classifier of CIFAR-10 by patches of 4 x 4; `feedforward` as in a language model."""
    return patch_transformer(3, (32, 32), 10, width=width, depth=depth, feedforward=feedforward)


@lru_cache
def text(context: int = 64, held_out: int = 512) -> Split:
    """Return tinyshakespeare in windows, `held_out` of them from its last tenth."""
    split = characters(tinyshakespeare(), context=context)
    return Split(split.x_train, split.y_train, split.x_test[:held_out], split.y_test[:held_out])


@lru_cache
def images(some: int = 10000, held_out: int = 2000) -> Split:
    """Return the first images of CIFAR-10, each channel with mean 0 and deviation 1."""
    split = cifar10()
    mean, deviation = (f(split.x_train[:some], (0, 2, 3), keepdim=True)
                       for f in (torch.mean, torch.std))
    return Split((split.x_train[:some] - mean) / deviation, split.y_train[:some],
                 (split.x_test[:held_out] - mean) / deviation, split.y_test[:held_out])


def train(make: Callable[[], nn.Module], data: Split, seed: int, *, steps: int = 300,
          batch: int = 16, lr: float = 3e-3, looks: int = 6,
          extra_loss: Callable[[nn.Module], Tensor] | None = None) -> Trained:
    """Train `make()` under `seed` with Adam, its rate falling linearly to 0; look `looks` times.

    `extra_loss(network)` is added to the cross-entropy of each step.
    """
    torch.manual_seed(seed)
    network = make()
    optimizer = torch.optim.Adam(network.parameters(), lr)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    draws = torch.Generator().manual_seed(seed)
    when = sorted({max(1, round(steps * (i + 1) / looks)) for i in range(looks)})
    losses, errors = [], []
    for step in range(1, steps + 1):
        rows = torch.randint(len(data.x_train), (batch,), generator=draws)
        optimizer.zero_grad()
        loss = cross_entropy(network(data.x_train[rows]), data.y_train[rows])
        if extra_loss is not None:
            loss = loss + extra_loss(network)
        loss.backward()
        optimizer.step()
        falling.step()
        if step in when:
            found = held_out(network, data.x_test, data.y_test)
            losses.append(found[0])
            errors.append(found[1])
    return Trained(network, when, losses, errors)


def held_out(network: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the cross-entropy (nats) and the share of mistakes (%) of `network` on (x, y)."""
    training = network.training
    network.eval()
    total, wrong = 0.0, 0
    with torch.no_grad():
        for some, truth in zip(x.split(256), y.split(256), strict=True):
            logits = network(some).flatten(0, -2)
            total += float(nn.functional.cross_entropy(logits, truth.flatten(), reduction="sum"))
            wrong += int((logits.argmax(-1) != truth.flatten()).sum())
    network.train(training)
    return total / y.numel(), 100 * wrong / y.numel()


def parameters(network: nn.Module) -> int:
    """Return how many numbers `network` learns."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def width_for(target: int, make: Callable[[int], nn.Module], widths: Sequence[int]) -> int:
    """Return the width of `widths` for which `make(width)` has nearest to `target` parameters."""
    return min(widths, key=lambda width: abs(parameters(make(width)) - target))

