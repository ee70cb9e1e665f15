import torch
from torch.optim.lr_scheduler import LambdaLR

from netwright.data import Batches, Split, mnist
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.models import mlp
from netwright.rules import Backprop, ForwardForward, Rule
from netwright.training import fit

HIDDEN, BATCH, GOAL = (2000,) * 4, 256, 3.0  # percent of errors


@evidence(paper="003-024", claim="Four layers of 2000 units that learn by forward passes alone "
          "make 1.36 % errors on MNIST after 60 epochs.",
          shortfall=("scale",
                     "The paper's network with 5 of its 60 epochs and one seed: by softmax the "
                     "errors are 8.1, 5.1, 4.0, 3.2 and 2.7 % after each of them, still falling, "
                     "by goodness 3.9 % at the end; backpropagation has 1.6 %. All 60 epochs of "
                     "the four layers of 2000 units are needed for 1.36 %."))
def forward_forward_wide(scale: Scale) -> Outcome:
    """Train the paper's network for the epochs that can be afforded, beside backpropagation."""
    epochs, seeds = (5, 1) if scale == "desk" else (60, 3)
    split = mnist()
    curves: dict[str, list[list[float]]] = {"Forward-Forward, by softmax": [], "backprop": []}
    by_goodness = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        rule = ForwardForward(mlp(784, 10, hidden=HIDDEN), predict_by="softmax")
        curves["Forward-Forward, by softmax"].append(_errors(rule, split, epochs, 1e-3, seed))
        rule.predict_by = "goodness"
        by_goodness.append(_error(rule, split))
        torch.manual_seed(seed)
        exact = Backprop(mlp(784, 10, hidden=HIDDEN))
        curves["backprop"].append(_errors(exact, split, epochs, 1e-3, seed))
    last = {name: [run[-1] for run in runs] for name, runs in curves.items()}
    worst = max(by_goodness)
    return Outcome(
        verdict="shown" if epochs == 60 and worst < 1.5 else
        "partly shown" if worst < GOAL else "not shown",
        setting={"data": "MNIST, 60,000 images",
                 "network": "784-2000-2000-2000-2000-10, ReLU", "epochs": epochs, "batch": BATCH,
                 "optimizer": "Adam, the learning rate falling linearly over the second half of "
                              "training", "seeds": seeds,
                 "learning rate": "0.001; Forward-Forward's was chosen among 0.003, 0.001 and "
                                  "0.0003 by 3,000 training images after three epochs of 15,000 "
                                  "others: 64, 11 and 19 % errors by softmax",
                 "partly shown if": f"errors stay below {GOAL} % with fewer epochs than the "
                                    "paper's 60"},
        figures={"test error, Forward-Forward by goodness (%)": by_goodness,
                 **{f"test error, {name} (%)": values for name, values in last.items()}},
        note="The paper's network, with fewer of its epochs: 1.36 % after 60 cannot show here, "
             "only how far so many lead. At a learning rate of 0.003, which is right for layers of "
             "500 units, five epochs left 6.1 % errors by goodness and 5.8 % by softmax. "
             "Deviations as in the evidence called forward_forward.",
        curves={name: Curve(list(range(1, epochs + 1)), runs) for name, runs in curves.items()},
        axes=("epoch", "MNIST test error (%)"))


def _errors(rule: Rule, split: Split, epochs: int, learning_rate: float,
            seed: int) -> list[float]:
    found: list[float] = []
    fit(rule, Batches(split.x_train, split.y_train, BATCH, seed=seed), epochs=epochs, seed=seed,
        optimizer=lambda parameters: torch.optim.Adam(parameters, learning_rate, fused=True),
        scheduler=lambda optimizer: LambdaLR(optimizer,
                                             lambda epoch: min(1, 2 * (1 - epoch / epochs))),
        on_epoch=lambda _: found.append(_error(rule, split)), progress=False)
    return found


def _error(rule: Rule, split: Split) -> float:
    wrong = sum(int((rule.predict(x).argmax(1) != y).sum())
                for x, y in zip(split.x_test.split(1000), split.y_test.split(1000), strict=True))
    return 100 * wrong / len(split.y_test)
