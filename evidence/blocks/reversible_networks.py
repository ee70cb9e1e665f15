import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as mean_cross_entropy

from netwright.data import CHARACTERS, Split, characters, cifar10, tinyshakespeare
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.measure import memory
from netwright.models import gpt
from netwright.objectives.losses import cross_entropy
from netwright.reshape import reversible

DEPTHS = (4, 16, 64, 256)
WAYS = ("ordinary", "coupled")
NEAR = 1.03  # how many times the ordinary network's loss still counts as the same
FLAT, GROWS = 1.05, 20.0


@evidence(paper="001-010", claim="Residual networks that can be undone reach the loss of ordinary "
          "ones of the same size in as many steps, and store for the backward pass what the "
          "shallowest of them store, at any depth.")
def reversible_networks(scale: Scale) -> Outcome:
    """Train a residual network and a small GPT, reversible and not; measure both by depth."""
    desk = scale == "desk"
    seeds, steps = (3, 150) if desk else (5, 4000)
    split = cifar10()
    some = 8000 if desk else 50000
    mean, deviation = (f(split.x_train[:some], (0, 2, 3), keepdim=True)
                       for f in (torch.mean, torch.std))
    images = Split((split.x_train[:some] - mean) / deviation, split.y_train[:some],
                   (split.x_test[:2000] - mean) / deviation, split.y_test[:2000])
    text = characters(tinyshakespeare(), context=32)
    text = Split(text.x_train, text.y_train, text.x_test[:512], text.y_test[:512])
    tasks: dict[str, tuple[Callable[[int], nn.Module], Split, int]] = {
        "residual network, CIFAR-10": (residual, images, 8 if desk else 18),
        "GPT, tinyshakespeare": (partial(_gpt, width=48 if desk else 192), text, 4 if desk else 6)}
    figures: dict[str, list[float]] = {}
    curves: dict[str, Curve] = {}
    same, flat = [], []
    for task, (make, data, depth) in tasks.items():
        for way in WAYS:
            figures[f"held-out loss, {task}, {way}"] = [
                _trained(make, depth, way, data, seed, steps) for seed in range(seeds)]
        ordinary, coupled = (statistics.fmean(figures[f"held-out loss, {task}, {way}"])
                             for way in ("ordinary", "coupled"))
        same.append(coupled <= NEAR * ordinary)
        batch = data.x_train[:8], data.y_train[:8]
        found = memory(make, DEPTHS, batch, rules={
            way: partial(_made, way=way, x=batch[0][:1]) for way in WAYS}, loss=cross_entropy)
        for way, saved in found.saved.items():
            curves[f"{task}, {way}"] = Curve(list(DEPTHS), [[count / 2 ** 20 for count in saved]])
            for stages, count in zip(DEPTHS, saved, strict=True):
                figures[f"stored bytes, {task}, {stages} stages, {way}"] = [float(count)]
        growth = found.growth()
        flat.append(growth["coupled"] <= FLAT and growth["ordinary"] >= GROWS)
    return Outcome(
        verdict=("shown" if all(same) and all(flat) else
                 "partly shown" if all(same) or all(flat) else "not shown"),
        setting={
            "residual network": "a convolution of stride 4 to 16 channels, "
            f"{8 if desk else 18} blocks (batch norm, ReLU, 3x3 convolution, twice), batch norm, "
            f"mean, linear; {some} images of CIFAR-10",
            "GPT": f"{4 if desk else 6} blocks of width {48 if desk else 192}, context 32",
            "coupled": "nw.reshape.reversible of the same network under the same seed",
            "training": f"{steps} steps of 32 images or 16 windows, Adam, learning rate "
            "0.003 falling linearly to 0; nothing tuned",
            "held-out loss": "cross-entropy after the last step, on 2000 images and 512 windows",
            "stored bytes": "most that waited for the backward pass of a step on 8 samples"},
        figures=figures,
        note="The same loss means a mean at most 3 % above the ordinary network's, in both tasks, "
             "for the coupled network; flat means at 256 stages at most 1.05 times the bytes at 4, "
             "where the ordinary network has at least 20 times. The networks have one size and "
             "one seed's start, reversible or not; trainings are short. The catalogue has no paper "
             "of just this claim; i-RevNet's is the nearest.",
        curves=curves, axes=("stages", "stored for the backward pass (MiB)"))


class Branch(nn.Module):
    """A residual block that normalises and activates before its two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[part for _ in range(2) for part in (
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False))])

    def forward(self, h: Tensor) -> Tensor:
        """Return `h` with what the convolutions add."""
        added: Tensor = self.layers(h)
        return h + added


def residual(depth: int, width: int = 16) -> nn.Sequential:
    """Return a residual network for images of 32 x 32 with blocks on 8 x 8."""
    return nn.Sequential(nn.Conv2d(3, width, 4, stride=4), *[Branch(width) for _ in range(depth)],
                         nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(width, 10))


def _gpt(depth: int, width: int) -> nn.Module:
    return gpt(len(CHARACTERS), context=32, width=width, depth=depth)


def _made(network: nn.Module, way: str, x: Tensor) -> nn.Module:
    return reversible(network, x) if way == "coupled" else network


def _trained(make: Callable[[int], nn.Module], depth: int, way: str, data: Split, seed: int,
             steps: int) -> float:
    """Return the loss on what was held out, after training."""
    torch.manual_seed(seed)
    network = _made(make(depth), way, data.x_train[:1])
    size = 32 if data.y_train.ndim == 1 else 16
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(data.x_train), (size,), generator=draws)
        optimizer.zero_grad()
        cross_entropy(network(data.x_train[batch]), data.y_train[batch]).backward()
        optimizer.step()
        falling.step()
    network.eval()
    with torch.no_grad():
        losses = [mean_cross_entropy(network(x).flatten(0, -2), y.flatten(), reduction="sum")
                  for x, y in zip(data.x_test.split(256), data.y_test.split(256), strict=True)]
    return float(sum(losses)) / data.y_test.numel()
