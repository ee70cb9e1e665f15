import statistics
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn

from netwright.evidence import Curve, Outcome, Scale, Verdict, evidence
from netwright.rules import Backprop, ContinualBackprop, Rule

BATCH, RATE, WIDTH, LAYERS = 16, 3e-3, 64, 3
LOST, KEPT = 3.0, 1.0  # percentage points


@evidence(paper="001-136", claim="Networks trained by backpropagation on one task after another "
          "lose their ability to learn; continual backpropagation keeps it.")
def continual_backprop(scale: Scale) -> Outcome:
    """Learn the digits anew under one permutation of the pixels after another, each once."""
    tasks, seeds = (100, range(3)) if scale == "desk" else (1000, range(10))
    makers: dict[str, Callable[[nn.Module, Tensor], Rule]] = {
        "backpropagation": lambda network, _: Backprop(network),
        "continual backpropagation": lambda network, x: ContinualBackprop(
            network, x, replacement_rate=1e-3)}
    figures: dict[str, list[float]] = {}
    curves: dict[str, Curve] = {}
    gains: dict[str, list[float]] = {}
    tenth = tasks // 10
    for name, make in makers.items():
        runs = [_learn(make, tasks, seed) for seed in seeds]
        first, last = ([statistics.fmean(accuracies[part]) for accuracies, *_ in runs]
                       for part in (slice(0, tenth), slice(-tenth, None)))
        gains[name] = [b - a for a, b in zip(first, last, strict=True)]
        figures[f"accuracy while learning, first {tenth} tasks, {name} (%)"] = first
        figures[f"accuracy while learning, last {tenth} tasks, {name} (%)"] = last
        figures[f"dead units at the end, {name} (%)"] = [dead for _, dead, _ in runs]
        figures[f"effective rank of the last hidden layer, {name}"] = [rank for *_, rank in runs]
        every = max(tenth // 2, 1)
        curves[name] = Curve(
            list(range(every, tasks + 1, every)),
            [[statistics.fmean(accuracies[i:i + every]) for i in range(0, tasks, every)]
             for accuracies, *_ in runs])
    plain, renewed = gains["backpropagation"], gains["continual backpropagation"]
    loses, keeps = max(plain) < -LOST, min(renewed) > -KEPT
    verdict: Verdict = "shown" if loses and keeps else \
        "partly shown" if all(b > a for a, b in zip(plain, renewed, strict=True)) else "not shown"
    return Outcome(
        verdict=verdict,
        setting={"task": f"{tasks} permutations of the digits' pixels, 1,797 images each, seen "
                         f"once in batches of {BATCH}; each batch is predicted before it is "
                         "learned",
                 "network": f"64-{'-'.join([str(WIDTH)] * LAYERS)}-10, ReLU",
                 "optimizer": f"Adam, rate {RATE}", "seeds": len(seeds),
                 "replacement rate": "1e-3 (the paper's 1e-4 and less are for tasks of 500 times "
                                     "as many steps)",
                 "shown if": f"in every run backpropagation ends more than {LOST} points lower "
                             f"than it began, and the other less than {KEPT}"},
        figures=figures, curves=curves, axes=("tasks", "accuracy while learning (%)"),
        note="The paper's tasks are ImageNet's classes in pairs and permutations of MNIST.")


def _learn(make: Callable[[nn.Module, Tensor], Rule], tasks: int,
           seed: int) -> tuple[list[float], float, float]:
    """Return the accuracy of each task, the share of dead units, the effective rank."""
    digits, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(digits / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(seed)
    draw = Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for width in [64] + [WIDTH] * (LAYERS - 1):
        layers += [nn.Linear(width, WIDTH), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    rule: Any = make(network, x[:BATCH])
    rule.optimizer = torch.optim.Adam(rule.parameters(), lr=RATE)
    accuracies = []
    for _ in range(tasks):
        pixels, order = torch.randperm(64, generator=draw), torch.randperm(len(x), generator=draw)
        right = 0
        for batch in order.split(BATCH):
            images, targets = x[batch][:, pixels], y[batch]
            right += int((rule.predict(images).argmax(1) == targets).sum())
            rule.optimizer.zero_grad()
            rule(images, targets)
            rule.optimizer.step()
        accuracies.append(100 * right / len(x))
    h, dead = x[:, pixels], []
    with torch.no_grad():
        for layer in layers:
            h = layer(h)
            if isinstance(layer, nn.ReLU):
                dead.append((h == 0).all(0))
    share = 100 * float(torch.cat(dead).float().mean())
    values = torch.linalg.svdvals(h)
    spectrum = values / values.sum()
    rank = float(torch.special.entr(spectrum).sum().exp())
    return accuracies, share, rank
