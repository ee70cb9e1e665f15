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
        "local losses, 5 blocks": LocalLosses}
    setting, found, working, curves = compared(rules, scale, seeds)
    means = [sum(accuracies) / seeds for accuracies in found.values()]
    falls = means[0] > means[1] > means[2]
    lean = working["local losses, 5 blocks"] < 0.9 * working["end to end"]
    fewer = working["local losses, 5 blocks"] <= working["local losses, 2 blocks"]
    return Outcome(
        verdict=("shown" if falls and lean and fewer
                 else "partly shown" if falls or lean else "not shown"),
        setting=setting,
        figures={**{f"test accuracy, {name} (%)": values for name, values in found.items()},
                 **{f"working bytes of a step, {name}": [value]
                    for name, value in working.items()}},
        note="Shown means mean accuracies in that order, at least a tenth less working memory in 5 "
             "blocks, and no more of it in 5 than in 2. No rule was tuned.",
        curves=curves, axes=("epoch", "test accuracy (%)"))


def compared(rules: Mapping[str, Callable[[nn.Module], Rule]], scale: Scale, seeds: int,
             ) -> tuple[dict[str, object], dict[str, list[float]], dict[str, float],
                        dict[str, Curve]]:
    """Train the same network by each rule; return setting, accuracies, memory and curves."""
    desk = scale == "desk"
    count, epochs = (5000, 6) if desk else (50000, 30)
    whole = cifar10()
    split = Split(whole.x_train[:count], whole.y_train[:count], whole.x_test[:2000],
                  whole.y_test[:2000]) if desk else whole
    mean = split.x_train.mean((0, 2, 3), keepdim=True)
    std = split.x_train.std((0, 2, 3), keepdim=True)
    split = Split((split.x_train - mean) / std, split.y_train, (split.x_test - mean) / std,
                  split.y_test)
    runs = {name: [_train(make, split, epochs, seed) for seed in range(seeds)]
            for name, make in rules.items()}
    batch = split.x_train[:BATCH], split.y_train[:BATCH]
    working = {name: float(cost(make(network()), batch, repeats=1, warmup=0).working_bytes)
               for name, make in rules.items()}
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
