from statistics import mean

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.generative.flows import LabelFlow, weak_constraint_loss

NOISE = (0.25, 0.3, 0.35)
EVERY = 40
WAYS = ("flow", "deterministic, the same constraints", "network on majority votes",
        "majority vote")


@evidence(paper="003-157", claim="A flow over labels, trained on what weak signals permit and "
          "without labels, predicts better than majority vote and than deterministic models.")
def label_flow(scale: Scale) -> Outcome:
    """Train on three noisy labelers of breast cancer; compare accuracies on training and test."""
    seeds, steps = (3, 240) if scale == "desk" else (20, 2000)
    figures: dict[str, list[float]] = {}
    curves: dict[str, Curve] = {}
    runs: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        for way, (train, test, curve) in _compared(seed, steps).items():
            figures.setdefault(f"test accuracy, {way} (%)", []).append(test)
            figures.setdefault(f"accuracy on the weakly labelled samples, {way} (%)",
                               []).append(train)
            if curve:
                runs.setdefault(way, []).append(curve)
    for way, of in runs.items():
        curves[way] = Curve(list(range(EVERY, steps + 1, EVERY)), of)
    means = {way: mean(figures[f"test accuracy, {way} (%)"]) for way in WAYS}
    votes = means["flow"] > means["majority vote"] + 1
    fixed = means["flow"] > means["deterministic, the same constraints"]
    return Outcome(
        verdict="shown" if votes and fixed else "partly shown" if votes or fixed else "not shown",
        setting={"data": "scikit-learn's breast cancer, 400 samples to train, 169 to test, "
                 "standardised", "labelers": f"the label, wrong with probabilities {NOISE}, each "
                 "by itself; bounds are those probabilities", "flow": "8 blocks, networks with 64 "
                 "hidden units, 10 labels drawn for a prediction", "deterministic":
                 "two hidden layers of 64 and a softmax, the same penalties without likelihood",
                 "training": f"{steps} steps on all samples, Adam 3e-3"},
        figures=figures,
        note="Shown is a mean test accuracy of the flow more than one point above that of the "
             "three labelers' majority vote on the same samples, and above that of a network "
             "trained with the same constraints. True labels serve only to make the labelers and "
             "to count. The network on majority votes is not in the verdict.",
        curves=curves, axes=("step", "test accuracy (%)"))


def _data(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the samples, their classes and the labelers' votes, shuffled and scaled."""
    draw = torch.Generator().manual_seed(seed)
    x, y = map(torch.from_numpy, load_breast_cancer(return_X_y=True))
    order = torch.randperm(len(x), generator=draw)
    x, y = x[order].float(), y[order].long()
    x = (x - x[:400].mean(0)) / x[:400].std(0)
    wrong = torch.rand(len(y), 3, generator=draw) < torch.tensor(NOISE)
    return x, y, torch.where(wrong, 1 - y[:, None], y[:, None])


def _compared(seed: int, steps: int) -> dict[str, tuple[float, float, list[float]]]:
    """Return the accuracies on training and test samples, and the latter's curve, by way."""
    x, y, votes = _data(seed)
    signals = one_hot(votes, 2).float()
    bounds = torch.tensor(NOISE)[:, None].expand(3, 2)
    majority = (votes.sum(1) > 1).long()

    def accuracy(guess: Tensor) -> tuple[float, float]:
        right = (guess == y).float()
        return 100 * float(right[:400].mean()), 100 * float(right[400:].mean())

    found: dict[str, tuple[float, float, list[float]]] = {
        "majority vote": (*accuracy(majority), [])}
    for way in WAYS[:3]:
        torch.manual_seed(seed)
        model: nn.Module = LabelFlow(2, x.shape[1]) if way == "flow" else nn.Sequential(
            nn.Linear(x.shape[1], 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        curve = []
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            if isinstance(model, LabelFlow):
                loss = weak_constraint_loss(model, x[:400], signals[:400], bounds)
            elif way == WAYS[1]:
                guess = model(x[:400]).softmax(1)[:, None]
                q = signals[:400]
                rates = ((1 - guess) * q + guess * (1 - q)).mean(0)
                loss = 10 * (rates - bounds).clamp(min=0).square().sum()
            else:
                loss = cross_entropy(model(x[:400]), majority[:400])
            loss.backward()
            optimizer.step()
            if step % EVERY == 0:
                with torch.no_grad():
                    scores = model.predict(x) if isinstance(model, LabelFlow) else model(x)
                both = accuracy(scores.argmax(1))
                curve.append(both[1])
        found[way] = (*both, curve)
    return found
