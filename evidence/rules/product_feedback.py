from collections.abc import Callable
from math import isfinite
from statistics import fmean

import torch
from torch import nn
from torch.optim import SGD

from netwright.data import Batches, Split, digits
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.measure import alignment
from netwright.models import mlp
from netwright.rules import Backprop, FeedbackAlignment, ProductFeedback, Rule

RATE, DECAY = 0.03, 2e-3
RULES: tuple[type[Rule], ...] = (Backprop, FeedbackAlignment, ProductFeedback)


@evidence(paper="003-043", claim="Product feedback alignment closely approximates backpropagation "
          "and performs comparably in deep convolutional networks, unlike feedback alignment.")
def product_feedback(scale: Scale) -> Outcome:
    """Train an MLP and a CNN of five layers by three rules; compare accuracy and direction."""
    seeds, plans = (3, {"MLP": (_mlp, 20), "CNN": (_cnn, 6)}) if scale == "desk" else (
        5, {"MLP": (_mlp, 100), "CNN": (_cnn, 50)})
    split = digits()
    figures: dict[str, list[float]] = {}
    curves: dict[str, Curve] = {}
    near, aligned = [], []
    for kind, (make, epochs) in plans.items():
        accuracy, cosine = {}, {}
        for rule in RULES:
            name = f"{kind}, {rule.__name__}"
            runs = [_train(rule, make, split, epochs, seed) for seed in range(seeds)]
            figures[f"test accuracy, {name} (%)"] = [hits for hits, _ in runs]
            figures[f"hidden layers' update and the exact gradient, mean cosine after training, "
                    f"{name}"] = [cosines[-1] for _, cosines in runs]
            accuracy[rule] = fmean(hits for hits, _ in runs)
            cosine[rule] = fmean(cosines[-1] for _, cosines in runs)
            if rule is not Backprop:
                curves[name] = Curve(list(range(epochs + 1)), [cosines for _, cosines in runs])
        near.append(accuracy[ProductFeedback] > accuracy[Backprop] - 1)
        aligned.append(cosine[ProductFeedback] > max(0.8, cosine[FeedbackAlignment] + 0.2))
    return Outcome(
        verdict="shown" if all(near + aligned) else
        "partly shown" if any(near + aligned) else "not shown",
        setting={"data": "scikit-learn's digits", "MLP": "64-64-64-64-64-10, ReLU",
                 "CNN": "four 3x3 convolutions of 16, 16, 32 and 32 channels with batch "
                 "normalisation, ReLU, one max-pooling, then a linear layer",
                 "epochs": {kind: epochs for kind, (_, epochs) in plans.items()}, "batch": 32,
                 "optimizer": f"SGD, learning rate {RATE}, momentum 0.9, weight decay {DECAY}",
                 "tuning": "none: the same for all rules"},
        figures=figures,
        note=f"Near backpropagation (mean accuracy less than a point below it), MLP and CNN: "
             f"{near}. Aligned (mean cosine above 0.8, and 0.2 above feedback alignment's): "
             f"{aligned}. The paper trains two hidden layers on MNIST and residual networks on "
             "CIFAR-10 and ImageNet, with a large weight decay in the first epoch and a small one "
             "after it; here it is the same throughout and for all rules.",
        curves=curves, axes=("epoch", "cosine with the exact gradient"))


def _mlp() -> nn.Sequential:
    return mlp(64, 10, hidden=(64,) * 4)


def _cnn() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if inputs == outputs == 16 else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 10))


def _train(kind: type[Rule], make: Callable[[], nn.Sequential], split: Split, epochs: int,
           seed: int) -> tuple[float, list[float]]:
    """Return the accuracy, and before training and after each epoch the hidden layers' cosine."""
    torch.manual_seed(seed)
    rule = kind(make())
    optimizer = SGD(rule.parameters(), RATE, momentum=0.9, weight_decay=DECAY)
    batch = split.x_train[:500], split.y_train[:500]
    cosines: list[float] = []
    for epoch in range(epochs + 1):
        *hidden, _ = alignment(rule, batch).values()
        cosines.append(fmean(cosine if isfinite(cosine) else 0.0 for cosine in hidden))
        if epoch < epochs:
            for x, y in Batches(split.x_train, split.y_train, 32, seed=1000 * seed + epoch):
                optimizer.zero_grad()
                rule(x, y)
                optimizer.step()
    hits = rule.predict(split.x_test).argmax(1) == split.y_test
    return 100 * float(hits.float().mean()), cosines
