import math
import statistics
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn.functional import cosine_similarity
from torch.optim import SGD

from netwright.data import Batches, Split, mnist
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.measure import alignment
from netwright.models import mlp
from netwright.rules import AdaptiveFeedbackAlignment, Pepita, Rule

RATE, LEAST_COSINE, APART, TURNED = 0.1, 0.9, 1.0, 10.0
MAKE: dict[str, Callable[..., Rule]] = {"AdaptiveFeedbackAlignment": AdaptiveFeedbackAlignment,
                                        "Pepita": Pepita}
OURS, PEPITA = MAKE


@evidence(paper="003-020", claim="PEPITA's updates and learning curves are those of adaptive "
          "feedback alignment, whose angle with the gradient falls while it learns.")
def adaptive_feedback_alignment(scale: Scale) -> Outcome:
    """Train the same networks on MNIST by both rules; compare curves, updates and angles."""
    desk = scale == "desk"
    seeds, epochs, width, count = (3, 5, 256, 8000) if desk else (5, 50, 1024, 60_000)
    full = mnist()
    split = Split(full.x_train[:count].flatten(1), full.y_train[:count],
                  full.x_test.flatten(1), full.y_test)
    figures: dict[str, list[float]] = {}
    curves: dict[str, Curve] = {}
    overlap, alike, falls = {}, {}, {}
    for name, hidden in (("one hidden layer", (width,)), ("two hidden layers", (width, width))):
        runs = {rule: [_train(rule, split, hidden, epochs, seed) for seed in range(seeds)]
                for rule in MAKE}
        for rule, found in runs.items():
            curves[f"{name}: {rule}"] = Curve(list(range(1, epochs + 1)),
                                              [run["accuracy"] for run in found])
            figures[f"{name}: test accuracy, {rule} (%)"] = [run["accuracy"][-1] for run in found]
        means = {rule: [statistics.fmean(epoch) for epoch in
                        zip(*(run["accuracy"] for run in found), strict=True)]
                 for rule, found in runs.items()}
        gaps = [abs(a - b) for a, b in zip(means[OURS], means[PEPITA], strict=True)]
        figures[f"{name}: largest gap of the mean curves (points)"] = [max(gaps)]
        overlap[name] = max(gaps) < APART
        layers = [key for key in runs[PEPITA][0] if key.startswith("cosine")]
        for key in layers:
            figures[f"{name}: PEPITA's and the adaptive update, least {key}"] = [
                min(run[key]) for run in runs[PEPITA]]
        alike[name] = all(min(run[key]) > LEAST_COSINE for run in runs[PEPITA] for key in layers)
        angles = [key for key in runs[OURS][0] if key.startswith("angle")]
        for key in angles:
            figures[f"{name}: {key} before training (degrees)"] = [r[key][0] for r in runs[OURS]]
            figures[f"{name}: {key} after training (degrees)"] = [r[key][-1] for r in runs[OURS]]
        falls[name] = all(run[key][-1] < run[key][0] - TURNED for run in runs[OURS]
                          for key in angles)
    held = [*overlap.values(), *alike.values(), *falls.values()]
    return Outcome(
        verdict="shown" if all(held) else "partly shown" if any(held) else "not shown",
        setting={"data": f"MNIST, {count} training images",
                 "networks": f"784-{width}-10 and 784-{width}-{width}-10, ReLU",
                 "epochs": epochs, "batch": 64, "optimizer": f"SGD, {RATE}, momentum 0.9",
                 "the same for both rules": "initial weights, F, order of the batches",
                 "curves overlap": overlap, "updates agree": alike, "angles fall": falls},
        figures=figures,
        note=f"Curves overlap if the mean accuracies are less than {APART:g} point apart after "
             f"every epoch. Updates agree if PEPITA's and the adaptive update of every hidden "
             f"layer, at PEPITA's weights, have a cosine above {LEAST_COSINE:g} before training "
             "and after every epoch. Angles fall if that of every hidden layer's update with the "
             f"exact gradient ends at least {TURNED:g} degrees below where it began, on every "
             "seed; both on 1000 training images. Weight mirroring is measured under pepita. The "
             "paper trains wider networks, for 100 epochs.",
        curves=curves, axes=("epoch", "test accuracy (%)"))


def _train(name: str, split: Split, hidden: tuple[int, ...], epochs: int,
           seed: int) -> dict[str, list[float]]:
    """Return the accuracy after each epoch, cosines and angles before the first and after each."""
    torch.manual_seed(seed)
    rule = _rule(name, mlp(784, 10, hidden=hidden), split, seed)
    optimizer = SGD(rule.parameters(), RATE, momentum=0.9)
    batch = split.x_train[:1000], split.y_train[:1000]
    found: dict[str, list[float]] = {"accuracy": []}
    for epoch in range(epochs + 1):
        for i, cosine in enumerate(list(alignment(rule, batch).values())[:-1]):
            found.setdefault(f"angle with the gradient in layer {i + 1}", []).append(
                math.degrees(math.acos(cosine)))
        if name == PEPITA:
            other = _rule(OURS, rule.network, split, seed)
            for i, cosine in enumerate(_cosines(rule, other, batch)):
                found.setdefault(f"cosine in layer {i + 1}", []).append(cosine)
        if epoch == epochs:
            break
        for x, y in Batches(split.x_train, split.y_train, 64, seed=1000 * seed + epoch):
            optimizer.zero_grad()
            rule(x, y)
            optimizer.step()
        hits = rule.predict(split.x_test).argmax(1) == split.y_test
        found["accuracy"].append(100 * float(hits.float().mean()))
    return found


def _rule(name: str, network: torch.nn.Module, split: Split, seed: int) -> Rule:
    return MAKE[name](network, split.x_train[:2], generator=Generator().manual_seed(seed))


def _cosines(rule: Rule, other: Rule, batch: tuple[Tensor, Tensor]) -> list[float]:
    """Return the cosine of the two rules' updates of each hidden layer's weight."""
    weights = [p for p in rule.network.parameters() if p.ndim > 1][:-1]
    updates = []
    for each in (rule, other):
        rule.zero_grad()
        each(*batch)
        updates.append([p.grad.flatten() for p in weights if p.grad is not None])
    rule.zero_grad()
    return [float(cosine_similarity(a, b, dim=0)) for a, b in zip(*updates, strict=True)]
