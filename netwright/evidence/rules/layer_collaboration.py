from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from netwright.data import Batches, Split, mnist
from netwright.evidence import Curve, Outcome, evidence
from netwright.evidence.evidence import Scale
from netwright.models import mlp
from netwright.rules import ForwardForward
from netwright.training import fit

WAYS: dict[str, Any] = {"independent": False, "collaborate=True": True,
                        "collaborate='earlier'": "earlier"}


@evidence(paper="001-031", claim="Forward-Forward makes fewer errors where each layer's "
          "probability counts the frozen goodness of the other layers too (the paper: 2.1 % "
          "instead of 3.3 % on MNIST; 2.2 % with the earlier layers' alone).")
def layer_collaboration(scale: Scale) -> Outcome:
    """Train by Forward-Forward with layers that are independent and layers that collaborate."""
    desk = scale == "desk"
    samples, hidden, epochs, seeds = ((5000, (200,) * 3, 12, 5) if desk
                                      else (60000, (2000,) * 3, 60, 5))
    split = mnist()
    split = Split(split.x_train[:samples], split.y_train[:samples], split.x_test, split.y_test)
    errors: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    final: dict[str, list[float]] = {name: [] for name in WAYS}
    deepest: dict[str, list[float]] = {name: [] for name in WAYS}
    for seed in range(seeds):
        for name, collaborate in WAYS.items():
            curve, last, third = _train(split, hidden, epochs, seed, collaborate)
            errors[name].append(curve)
            final[name].append(last)
            deepest[name].append(third)
    lower = {name: sum(a < b for a, b in zip(values, final["independent"], strict=True))
             for name, values in final.items() if name != "independent"}
    shown = sum(count == seeds for count in lower.values())
    return Outcome(
        verdict="shown" if shown == 2 else "partly shown" if shown else "not shown",
        setting={"data": f"MNIST, the first {samples} training images; curves on the first "
                 "2,000 test images, figures on all of them",
                 "network": f"784-{'-'.join(map(str, hidden))}-10, ReLU", "epochs": epochs,
                 "batch": 64, "optimizer": "Adam, learning rate 0.003, falling linearly over the "
                 "second half of training", "negatives": "any wrong label, all as likely",
                 "prediction": "the label with the largest goodness of all three hidden layers"},
        figures={**{f"test error, {name} (%)": values for name, values in final.items()},
                 **{f"test error by the third layer alone, {name} (%)": values
                    for name, values in deepest.items()}},
        note="Shown means a lower error for each of the seeds, in both ways to collaborate. "
             "Thresholds and temperatures are the rule's own: the number of units whose squares "
             "are added up, and a tenth of it.",
        curves={name: Curve(list(range(1, epochs + 1)), values) for name, values in errors.items()},
        axes=("epoch", "MNIST test error (%)"))


def _train(split: Split, hidden: tuple[int, ...], epochs: int, seed: int,
           collaborate: Any) -> tuple[list[float], float, float]:
    """Return the error after each epoch, the last one, and that by the third layer alone."""
    torch.manual_seed(seed)
    rule = ForwardForward(mlp(784, 10, hidden=hidden), collaborate=collaborate,
                          hard_negatives=False, skip=0)
    curve: list[float] = []
    fit(rule, Batches(split.x_train, split.y_train, 64, seed=seed), epochs=epochs, seed=seed,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 3e-3),
        scheduler=lambda optimizer: LambdaLR(optimizer,
                                             lambda epoch: min(1, 2 * (1 - epoch / epochs))),
        on_epoch=lambda _: curve.append(_error(rule, split, 2000)), progress=False)
    error = _error(rule, split, 10000)
    rule.first_read = rule.depth - 1
    return curve, error, _error(rule, split, 10000)


def _error(rule: ForwardForward, split: Split, images: int) -> float:
    """Return the error on the first `images` test images."""
    x, y = split.x_test[:images], split.y_test[:images]
    scores = torch.cat([rule.predict(part) for part in x.split(2000)])
    return 100 * float((scores.argmax(1) != y).float().mean())
