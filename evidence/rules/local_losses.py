from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from netwright.data import Batches, Split, cifar10, digits
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.measure import cost
from netwright.models import cnn
from netwright.rules import Backprop, LocalLosses, Rule
from netwright.training import fit

RATE = 4e-3
BATCH = 32


@evidence(paper="003-055", claim="Blocks trained by local losses take less memory than end-to-end "
          "training and are less accurate, the more so the more blocks there are.")
def local_losses(scale: Scale) -> Outcome:
    """Train one convolutional network end to end, in two blocks and in one for each stage."""
    seeds = 3 if scale == "desk" else 5
    rules: dict[str, Callable[[nn.Module], Rule]] = {
        "end to end": Backprop,
        "local losses, 2 blocks": lambda network: LocalLosses(network, blocks=2),
        "local losses, a block for each stage": LocalLosses}
    setting, found, working, curves = compared(rules, scale, seeds)
    means = [sum(accuracies) / seeds for accuracies in found.values()]
    falls = means[0] > means[1] > means[2]
    level = {name: working_bytes(make, one_size(), (3, 16, 16)) for name, make in rules.items()}
    lean = [list(sizes.values()) == sorted(set(sizes.values()), reverse=True)
            for sizes in (working, level)]
    return Outcome(
        verdict=("shown" if falls and all(lean) else "partly shown" if falls or any(lean)
                 else "not shown"),
        setting={**setting, "network at one size": "13 convolutions of 16 channels, ReLU, one "
                 "max-pooling to 4 x 4 cells, one linear layer, images of 16 x 16; measured, not "
                 "trained"},
        figures={**{f"test accuracy, {name} (%)": values for name, values in found.items()},
                 **{f"working bytes of a step, {name}": [value]
                    for name, value in working.items()},
                 **{f"working bytes of a step, network at one size, {name}": [value]
                    for name, value in level.items()}},
        note="Shown means mean accuracies that fall in the order end to end, 2 blocks, a block "
             "for each stage, and working memory that falls in the same order, both in the network "
             "that was trained, which at desk scale is so small that the heads' hidden layers "
             "count for more than its maps, and in one whose maps keep their size. No rule was "
             "tuned.",
        curves=curves, axes=("epoch", "test accuracy (%)"))


def compared(rules: Mapping[str, Callable[[nn.Module], Rule]], scale: Scale, seeds: int,
             ) -> tuple[dict[str, object], dict[str, list[float]], dict[str, float],
                        dict[str, Curve]]:
    """Train the same network by each rule; return setting, accuracies, memory and curves."""
    desk = scale == "desk"
    epochs = 5 if desk else 30
    split = digits(test=0.5) if desk else cifar10()
    mean = split.x_train.mean((0, 2, 3), keepdim=True)
    std = split.x_train.std((0, 2, 3), keepdim=True) + 1e-6
    split = Split((split.x_train - mean) / std, split.y_train, (split.x_test - mean) / std,
                  split.y_test)

    def network() -> nn.Sequential:
        if desk:
            return cnn(1, (8, 8), 10, widths=(16, 16, 16), norm=True)
        return cnn(3, (32, 32), 10, widths=(16, 32, 64, 64), norm=True)

    runs = {name: [_train(make, network, split, epochs, seed) for seed in range(seeds)]
            for name, make in rules.items()}
    size = split.x_train.shape[1:]
    working = {name: working_bytes(make, network(), size) for name, make in rules.items()}
    widths = "16, 16, 16" if desk else "16, 32, 64, 64"
    setting: dict[str, object] = {
        "data": f"{'scikit-learn digits' if desk else 'CIFAR-10'}, {len(split.x_train)} training "
                f"and {len(split.x_test)} test images, each channel standardised, no augmentation",
        "network": f"convolutions of {widths} channels, each with batch normalisation, ReLU and "
                   "max-pooling, then one linear layer",
        "optimizer": f"Adam, one cycle of learning rates up to {RATE}, the same for all rules",
        "epochs": epochs, "batch": BATCH}
    return (setting, {name: [curve[-1] for curve in found] for name, found in runs.items()},
            working, {name: Curve(list(range(1, epochs + 1)), found)
                      for name, found in runs.items()})


def working_bytes(make: Callable[[nn.Module], Rule], model: nn.Module,
                  size: Sequence[int]) -> float:
    """Return the most that a step holds at any one time besides gradients and what was there."""
    batch = torch.rand(BATCH, *size), torch.randint(10, (BATCH,))
    return float(cost(make(model), batch, repeats=1, warmup=0).working_bytes)


def one_size() -> nn.Sequential:
    """Return a network whose maps keep their size."""
    layers: list[nn.Module] = []
    for channels in [3, *[16] * 12]:
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(256, 10))


def _train(make: Callable[[nn.Module], Rule], network: Callable[[], nn.Module], split: Split,
           epochs: int, seed: int) -> list[float]:
    """Return the test accuracy in per cent after each epoch."""
    torch.manual_seed(seed)
    rule = make(network())
    steps = epochs * -(-len(split.x_train) // BATCH)
    curve: list[float] = []
    fit(rule, Batches(split.x_train, split.y_train, BATCH, seed=seed), epochs=epochs, seed=seed,
        optimizer=lambda parameters: torch.optim.Adam(parameters),
        scheduler=lambda optimizer: OneCycleLR(optimizer, RATE, total_steps=steps),
        scheduler_unit="step", on_epoch=lambda _: curve.append(_accuracy(rule, split)),
        progress=False)
    return curve


def _accuracy(rule: Rule, split: Split) -> float:
    right = sum(int((rule.predict(x).argmax(1) == y).sum())
                for x, y in zip(split.x_test.split(500), split.y_test.split(500), strict=True))
    return 100 * right / len(split.y_test)
