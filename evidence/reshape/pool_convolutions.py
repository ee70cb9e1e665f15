import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from netwright.data import Split, cifar10
from netwright.evidence import Outcome, Scale, evidence, figure, held_out_accuracy, train
from netwright.measure import cost
from netwright.reshape import pool_convolutions

ACCURACY, FORWARD = "accuracy, {} (%)", "forward pass, {} (ms)"
PARAMETERS, FLOPS = "parameters, {}", "FLOPs of a training step, {}"
DEPTHWISE, MAX, NONE = "depthwise", "max", "none"


@evidence(paper="001-082", claim="Max-pooling in place of the depthwise convolutions of a network "
          "costs little accuracy, and saves parameters, arithmetic and time.",
          shown=[(figure(ACCURACY.format(MAX)) > figure(ACCURACY.format(DEPTHWISE)) - 2)
                 & (figure(ACCURACY.format(MAX)) > figure(ACCURACY.format(NONE)) + 2),
                 (figure(PARAMETERS.format(MAX)) < figure(PARAMETERS.format(DEPTHWISE)))
                 & (figure(FLOPS.format(MAX)) < figure(FLOPS.format(DEPTHWISE))),
                 figure(FORWARD.format(MAX)) < figure(FORWARD.format(DEPTHWISE))],
          shortfall=("scale",
                     "Max-pooling is 4.8 points above nothing in the convolutions' place and 6.2 "
                     "below them (41.9 and 48.1 %, from 4000 images in 6 epochs, with deviations "
                     "of 1 to 6); operations fall to 0.27. A pooling's forward pass takes 12.4 "
                     "ms against 9.7 here: on a processor the convolution is the faster kernel. "
                     "The authors train networks of the size of ResNet-50 on ImageNet and take "
                     "times on a GPU."))
def parameter_free_layers(scale: Scale) -> Outcome:
    """Train a small network of inverted bottlenecks on colour images, with and without weights."""
    seeds, images, epochs = (range(3), 4_000, 6) if scale == "desk" else (range(5), 50_000, 60)
    split = _part(images)
    ways: dict[str, Callable[[], nn.Module]] = {
        DEPTHWISE: _network, MAX: lambda: pool_convolutions(_network()),
        NONE: partial(_network, spatial=False)}
    runs = train(ways, split, {ACCURACY: held_out_accuracy}, seeds=seeds, epochs=epochs,
                 batch_size=64, optimizer=lambda rule: torch.optim.Adam(rule.parameters(), 2e-3))
    batch = split.x_train[:64], split.y_train[:64]
    figures = dict(runs.figures)
    for way in ways:
        costs = cost(runs.rules[way][0], batch)
        figures[PARAMETERS.format(way)] = [float(costs.parameters)]
        figures[FLOPS.format(way)] = [float(costs.flops)]
    for way, milliseconds in _forward_times({way: build() for way, build in ways.items()},
                                            batch[0]).items():
        figures[FORWARD.format(way)] = [milliseconds]
    return Outcome(
        setting={"network": "a convolution of stride 2 to 24 channels, two inverted bottlenecks of "
                 "expansion 2 with a 3 x 3 depthwise convolution, stride 2 to 48 channels, two "
                 "more, mean over the image, a linear layer",
                 "data": f"CIFAR-10, {images} images to train on and 2000 held out",
                 "training": f"{epochs} epochs of 64 images, Adam 2e-3, for all",
                 "none": "the control: nothing stands in the convolutions' place",
                 "forward pass": "64 images, processor time on one thread, the least of 30 in "
                 "turns"},
        figures=figures,
        note="The authors train networks for ImageNet of the size of ResNet-50 and measure time on "
             "a GPU.",
        curves=runs.curves(ACCURACY), axes=("epochs", "accuracy (%)"))


def _network(*, spatial: bool = True) -> nn.Module:
    def norm(channels: int) -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())

    def bottleneck(channels: int) -> nn.Module:
        wide = 2 * channels
        middle = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        return _Residual(nn.Conv2d(channels, wide, 1, bias=False), norm(wide),
                         middle if spatial else nn.Identity(), norm(wide),
                         nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1, bias=False), norm(24), bottleneck(24), bottleneck(24),
        nn.Conv2d(24, 48, 2, 2, bias=False), norm(48), bottleneck(48), bottleneck(48),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + super().forward(x)
        return added


def _part(images: int) -> Split:
    whole = cifar10()
    draw = torch.Generator().manual_seed(0)
    some = torch.randperm(len(whole.x_train), generator=draw)[:images]
    held = torch.randperm(len(whole.x_test), generator=draw)[:2_000]
    return Split(whole.x_train[some], whole.y_train[some], whole.x_test[held], whole.y_test[held])


@torch.no_grad()
def _forward_times(networks: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Return the least processor time of a forward pass (ms), the networks taken in turns."""
    least = dict.fromkeys(networks, float("inf"))
    for _ in range(30):
        for way, network in networks.items():
            network.eval()
            start = time.process_time()
            network(x)
            least[way] = min(least[way], 1000 * (time.process_time() - start))
    return least
