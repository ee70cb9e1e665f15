from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from netwright.data import Batches, Split, cifar10
from netwright.evidence import Curve, Outcome, evidence
from netwright.evidence.evidence import Scale
from netwright.measure import cost
from netwright.models import cnn
from netwright.rules import Backprop, LocalLosses, Rule
from netwright.training import fit

RATE = 4e-3
BATCH = 64


@evidence(paper="003-055", claim="Blocks trained by local losses take less memory than end-to-end "
          "training and are less accurate, the more so the more blocks there are.")
def local_losses(scale: Scale) -> Outcome:
    """Train one convolutional network end to end, in two blocks and in one for each stage."""
    seeds = 3 if scale == "desk" else 5
    rules: dict[str, Callable[[nn.Module], Rule]] = {
        "end to end": Backprop,
        "local losses, 2 blocks": lambda network: LocalLosses(network, blocks=2),
        "local losses, 5 blocks": lambda network: LocalLosses(network, blocks=5)}
    setting, found, working, curves = compared(rules, scale, seeds)
    means = [sum(accuracies) / seeds for accuracies in found.values()]
    falls = means[0] > means[1] > means[2]
    level = {name: working_bytes(make, one_size()) for name, make in rules.items()}
    lean = [list(sizes.values()) == sorted(set(sizes.values()), reverse=True)
            for sizes in (working, level)]
    return Outcome(
        verdict=("shown" if falls and all(lean) else "partly shown" if falls or any(lean)
                 else "not shown"),
        setting={**setting, "network at one size": "13 convolutions of 16 channels, ReLU, one "
                 "max-pooling to 4 x 4 cells, one linear layer; measured, not trained"},
        figures={**{f"test accuracy, {name} (%)": values for name, values in found.items()},
                 **{f"working bytes of a step, {name}": [value]
                    for name, value in working.items()},
                 **{f"working bytes of a step, network at one size, {name}": [value]
                    for name, value in level.items()}},
        note="Shown means mean accuracies that fall in the order end to end, 2 blocks, 5 blocks, "
             "and working memory that falls in the same order, both in the network that was "
             "trained, whose maps shrink so fast that the first convolution's are most of it, and "
             "in one whose maps keep their size. No rule was tuned.",
        curves=curves, axes=("epoch", "test accuracy (%)"))


def compared(rules: Mapping[str, Callable[[nn.Module], Rule]], scale: Scale, seeds: int,
             ) -> tuple[dict[str, object], dict[str, list[float]], dict[str, float],
                        dict[str, Curve]]:
    """Train the same network by each rule; return setting, accuracies, memory and curves."""
    desk = scale == "desk"
    count, epochs = (4000, 4) if desk else (50000, 30)
    whole = cifar10()
    split = Split(whole.x_train[:count], whole.y_train[:count], whole.x_test[:2000],
                  whole.y_test[:2000]) if desk else whole
    mean = split.x_train.mean((0, 2, 3), keepdim=True)
    std = split.x_train.std((0, 2, 3), keepdim=True)
    split = Split((split.x_train - mean) / std, split.y_train, (split.x_test - mean) / std,
                  split.y_test)
    runs = {name: [_train(make, split, epochs, seed) for seed in range(seeds)]
            for name, make in rules.items()}
    working = {name: working_bytes(make, network()) for name, make in rules.items()}
    setting: dict[str, object] = {
        "data": f"CIFAR-10, the first {len(split.x_train)} training and {len(split.x_test)} test "
                "images, each channel standardised, no augmentation",
        "network": "convolutions of 16, 32, 64, 64 channels, each with batch normalisation, ReLU "
                   "and max-pooling, then one linear layer",
        "optimizer": f"Adam, one cycle of learning rates up to {RATE}, the same for all rules",
        "epochs": epochs, "batch": BATCH}
    return (setting, {name: [curve[-1] for curve in found] for name, found in runs.items()},
            working, {name: Curve(list(range(1, epochs + 1)), found)
                      for name, found in runs.items()})


def network() -> nn.Sequential:
    """Return the network that every rule trains."""
    return cnn(3, (32, 32), 10, widths=(16, 32, 64, 64), norm=True)


def working_bytes(make: Callable[[nn.Module], Rule], model: nn.Module) -> float:
    """Return the most that a step of 64 images holds besides gradients and what was there."""
    batch = torch.rand(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    return float(cost(make(model), batch, repeats=1, warmup=0).working_bytes)


def one_size() -> nn.Sequential:
    """Return a network whose maps keep their size."""
    layers: list[nn.Module] = []
    for channels in [3, *[16] * 12]:
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(8), nn.Flatten(), nn.Linear(256, 10))


def _train(make: Callable[[nn.Module], Rule], split: Split, epochs: int, seed: int) -> list[float]:
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
