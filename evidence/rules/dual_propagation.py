import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from netwright.data import Batches, Split, mnist
from netwright.evidence import Curve, Outcome, Scale, Verdict, evidence
from netwright.models import mlp
from netwright.rules import Backprop, DualPropagation, Rule
from netwright.training import fit

RATES = (3e-4, 1e-3, 3e-3)
BATCH, HELD_OUT = 100, 2000
RULES: dict[str, Callable[[nn.Module], Rule]] = {
    "backpropagation": Backprop,
    "dual propagation": DualPropagation,
    "dual propagation, weights learn at the dyads' means":
        lambda network: DualPropagation(network, means="dyads")}


@evidence(paper="001-164", claim="Dual propagation matches backpropagation in accuracy and in run "
          "time.")
def dual_propagation(scale: Scale) -> Outcome:
    """Tune and train dual propagation and backpropagation alike on MNIST; time their steps."""
    desk = scale == "desk"
    data, seeds = mnist(), range(3 if desk else 5)
    hidden, epochs = ((256, 256), 6) if desk else ((1000,) * 4, 50)
    if desk:
        data = Split(data.x_train[:10000], data.y_train[:10000], data.x_test, data.y_test)
    figures: dict[str, Sequence[float]] = {}
    curves: dict[str, Curve] = {}
    chosen, scores, aligned = {}, {}, {}
    for name in RULES:
        chosen[name] = _tuned(name, data, hidden, epochs)
        runs = [_train(name, data, hidden, epochs, seed, chosen[name]) for seed in seeds]
        curves[name] = Curve(list(range(1, epochs + 1)), [curve for curve, _ in runs])
        scores[name] = [curve[-1] for curve, _ in runs]
        aligned[name] = [cosine for _, cosine in runs]
        figures[f"{name}: test accuracy (%)"] = scores[name]
    for name in list(RULES)[1:]:
        figures[f"{name}: cosine with the exact gradient after training"] = aligned[name]
    slower = []
    for kind, network in {"MLP": mlp(784, 10, hidden=(1000,) * 4), "CNN": _convolutional()}.items():
        ratios = _times([make(network) for make in RULES.values()], data, len(seeds))
        for name, ratio in zip(list(RULES)[1:], ratios, strict=True):
            figures[f"{name}: step time of the {kind} over backpropagation's"] = ratio
        slower.append(statistics.fmean(ratios[0]))
    behind = statistics.fmean(scores["backpropagation"]) - statistics.fmean(
        scores["dual propagation"])
    as_right, as_fast = behind <= 0.5, max(slower) <= 1.5
    verdict: Verdict = ("shown" if as_right and as_fast
               else "partly shown" if as_right or as_fast else "not shown")
    return Outcome(
        verdict=verdict,
        setting={"data": f"MNIST, {len(data.x_train)} training images",
                 "network": f"784-{'-'.join(map(str, hidden))}-10, ReLU",
                 "epochs": epochs, "batch": BATCH, "optimizer": "Adam", "alpha": 0.5, "beta": 1.0,
                 "learning rates": chosen, "tuning": f"for each rule the best of {len(RATES)} "
                 f"learning rates on {HELD_OUT} held-out training images, one run each",
                 "networks that are timed": "MLP 784-1000-1000-1000-1000-10; CNN of three "
                 "convolutions to 32, 32 and 64 channels and a linear layer; ReLU"},
        figures=figures,
        note="Matching means a mean accuracy at most half a point below backpropagation's and a "
             "step that takes at most one and a half times as long. Step times are medians, in "
             "processor time, of steps that take turns. The paper also trains convolutional "
             "networks on CIFAR and ImageNet32x32, which were only timed here.",
        curves=curves, axes=("epoch", "test accuracy (%)"))


def _convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(576, 10))


def _tuned(name: str, split: Split, hidden: Sequence[int], epochs: int) -> float:
    inner = Split(split.x_train[:-HELD_OUT], split.y_train[:-HELD_OUT],
                  split.x_train[-HELD_OUT:], split.y_train[-HELD_OUT:])
    found = {rate: _train(name, inner, hidden, max(2, epochs // 3), 100, rate)[0][-1]
             for rate in RATES}
    return max(found, key=lambda rate: found[rate])


def _train(name: str, split: Split, hidden: Sequence[int], epochs: int, seed: int,
           rate: float) -> tuple[list[float], float]:
    """Return the accuracy after each epoch, and the update's cosine with the gradient last."""
    torch.manual_seed(seed)
    network = mlp(split.x_train[0].numel(), 10, hidden=hidden)
    rule = RULES[name](network)
    curve: list[float] = []
    fit(rule, Batches(split.x_train, split.y_train, BATCH, seed=seed), epochs=epochs, seed=seed,
        optimizer=lambda parameters: torch.optim.Adam(parameters, rate),
        on_epoch=lambda _: curve.append(_accuracy(rule, split)), progress=False)
    found = []
    for each in (rule, Backprop(network)):
        network.zero_grad()
        each(split.x_train[:1000], split.y_train[:1000])
        found.append(torch.cat([p.grad.flatten() for p in network.parameters()
                                if p.grad is not None]))
    return curve, float(cosine_similarity(found[0], found[1], dim=0))


def _accuracy(rule: Rule, split: Split) -> float:
    right = sum(int((rule.predict(x).argmax(1) == y).sum())
                for x, y in zip(split.x_test.split(1000), split.y_test.split(1000), strict=True))
    return 100 * right / len(split.y_test)


def _times(rules: Sequence[Rule], split: Split, repeats: int) -> list[list[float]]:
    """Return each rule's step time over the first one's, a value for each repeat."""
    x, y = split.x_train[:BATCH].view(-1, 1, 28, 28), split.y_train[:BATCH]
    ratios: list[list[float]] = [[] for _ in rules[1:]]
    for _ in range(repeats):
        seconds: list[list[float]] = [[] for _ in rules]
        for _ in range(12):
            for spent, rule in zip(seconds, rules, strict=True):
                start = time.process_time()
                rule(x, y)
                spent.append(time.process_time() - start)
        medians = [statistics.median(spent[2:]) for spent in seconds]
        for ratio, median in zip(ratios, medians[1:], strict=True):
            ratio.append(median / medians[0])
    return ratios
