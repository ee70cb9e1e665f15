from itertools import count
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from netwright.data import Batches, Split, mnist
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.models import mlp
from netwright.rules import ForwardForward
from netwright.training import fit

RATES = (3e-3, 1e-2)
WAYS: dict[str, Any] = {"independent": False, "collaborate=True": True,
                        "collaborate='earlier'": "earlier"}


@evidence(paper="001-031", claim="Forward-Forward makes fewer errors where each layer's "
          "probability counts the frozen goodness of the other layers too (the paper: 2.1 % "
          "instead of 3.3 % on MNIST; 2.2 % with the earlier layers' alone).",
          shortfall=("scale",
                     "With 3000 images, 200 units and 10 epochs the errors are still 12 %, where "
                     "the paper compares 3.3 with 2.1 %. Collaboration learns more slowly at "
                     "first and catches up: it is 32 points behind after 2 epochs, 7, 5, 2.7, "
                     "and 2.5 after 10; counting the earlier layers alone it ends at 12.0 "
                     "against 11.9 %, the same within the deviation of 0.5. All of MNIST and the "
                     "full scale's 60 epochs of layers of 2000 units are needed."))
def layer_collaboration(scale: Scale) -> Outcome:
    """Train by Forward-Forward with layers that are independent and layers that collaborate."""
    samples, images, hidden, epochs, seeds = ((3000, 2000, (200,) * 3, 10, 5) if scale == "desk"
                                              else (60000, 10000, (2000,) * 3, 60, 5))
    data = mnist()
    split = Split(data.x_train[:samples], data.y_train[:samples],
                  data.x_test[:images], data.y_test[:images])
    held_out = Split(split.x_train, split.y_train, data.x_train[-images:], data.y_train[-images:])
    curves: dict[str, Curve] = {}
    final: dict[str, list[float]] = {}
    deepest: dict[str, list[float]] = {}
    rates: dict[str, float] = {}
    for name, collaborate in WAYS.items():
        tried = {rate: _train(held_out, hidden, epochs, 100, collaborate, rate)[0][-1]
                 for rate in RATES}
        rates[name] = min(tried, key=lambda rate: tried[rate])
        runs = [_train(split, hidden, epochs, seed, collaborate, rates[name])
                for seed in range(seeds)]
        curves[name] = Curve(list(range(2, epochs + 1, 2)), [curve for curve, _ in runs])
        final[name] = [curve[-1] for curve, _ in runs]
        deepest[name] = [third for _, third in runs]
    lower = [sum(a < b for a, b in zip(final[name], final["independent"], strict=True)) == seeds
             for name in WAYS if name != "independent"]
    return Outcome(
        verdict="shown" if all(lower) else "partly shown" if any(lower) else "not shown",
        setting={"data": f"MNIST, the first {samples} training images and the first {images} test "
                 "images", "network": f"784-{'-'.join(map(str, hidden))}-10, ReLU",
                 "epochs": epochs, "batch": 64, "optimizer": "Adam, its learning rate falling "
                 "linearly over the second half of training",
                 "learning rate": f"{rates}, each the best of {RATES} by one run on {images} other "
                 "training images", "negatives": "any wrong label, all as likely",
                 "prediction": "the label with the largest goodness of all hidden layers"},
        figures={**{f"test error, {name} (%)": values for name, values in final.items()},
                 **{f"test error by the third layer alone, {name} (%)": values
                    for name, values in deepest.items()}},
        note="Shown means a lower error for each of the seeds, in both ways to collaborate. The "
             "threshold is the number of units whose squares are added up, the temperature a "
             "tenth of the layer's own: the rule's own settings.",
        curves=curves,
        axes=("epoch", "MNIST test error (%)"))


def _train(split: Split, hidden: tuple[int, ...], epochs: int, seed: int, collaborate: Any,
           rate: float) -> tuple[list[float], float]:
    """Return the error after each second epoch, and at last that by the third layer alone."""
    torch.manual_seed(seed)
    rule = ForwardForward(mlp(784, 10, hidden=hidden), collaborate=collaborate,
                          hard_negatives=False, skip=0)
    curve: list[float] = []
    done = count(1)

    def measure(_: object) -> None:
        if next(done) % 2 == 0:
            curve.append(_error(rule, split))

    fit(rule, Batches(split.x_train, split.y_train, 64, seed=seed), epochs=epochs, seed=seed,
        optimizer=lambda parameters: torch.optim.Adam(parameters, rate),
        scheduler=lambda optimizer: LambdaLR(optimizer,
                                             lambda epoch: min(1, 2 * (1 - epoch / epochs))),
        on_epoch=measure, progress=False)
    rule.first_read = rule.depth - 1
    return curve, _error(rule, split)


def _error(rule: ForwardForward, split: Split) -> float:
    scores = torch.cat([rule.predict(part) for part in split.x_test.split(2000)])
    return 100 * float((scores.argmax(1) != split.y_test).float().mean())
