from functools import partial

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from netwright.evidence import Loader, Outcome, Scale, evidence, figure, train
from netwright.generative.flows import LabelFlow, weak_constraint_loss
from netwright.rules import Backprop, Rule

NOISE = (0.25, 0.3, 0.35)
BOUNDS = torch.tensor(NOISE)[:, None].expand(3, 2)
TEST = "test accuracy, {} (%)"
KNOWN = "accuracy on the weakly labelled samples, {} (%)"


@evidence(paper="003-157", claim="A flow over labels, trained on what weak signals permit and "
          "without labels, predicts better than majority vote and than deterministic models.",
          shown=[figure(TEST.format("flow")) > figure(TEST.format("majority vote")) + 1,
                 figure(TEST.format("flow"))
                 > figure(TEST.format("deterministic, the same constraints"))])
def label_flow(scale: Scale) -> Outcome:
    """Train on three noisy labelers of breast cancer; compare accuracies on training and test."""
    seeds, steps = (range(3), 240) if scale == "desk" else (range(20), 2000)
    ways = {"flow": lambda: _Flow(LabelFlow(2, 30)),
            "deterministic, the same constraints": lambda: Backprop(_network(), loss=_constraints),
            "network on majority votes": lambda: Backprop(_network(), loss=_majority_loss)}
    runs = train(ways, _data, {TEST: partial(_right, part=1), KNOWN: partial(_right, part=0)},
                 seeds=seeds, steps=steps,
                 optimizer=lambda rule: torch.optim.Adam(rule.parameters(), 3e-3))
    votes = [_votes(seed) for seed in seeds]
    return Outcome(
        setting={"data": "scikit-learn's breast cancer, 400 samples to train, 169 to test, "
                 "standardised", "labelers": f"the label, wrong with probabilities {NOISE}, each "
                 "by itself; bounds are those probabilities", "flow": "8 blocks, networks with 64 "
                 "hidden units, 10 labels drawn for a prediction", "deterministic":
                 "two hidden layers of 64 and a softmax, the same penalties without likelihood",
                 "training": f"{steps} steps on all samples, Adam 3e-3"},
        figures={**runs.figures, TEST.format("majority vote"): [test for _, test in votes],
                 KNOWN.format("majority vote"): [known for known, _ in votes]},
        note="True labels serve only to make the labelers and to count. The network on majority "
             "votes is not in the verdict.",
        curves=runs.curves(TEST), axes=("step", "test accuracy (%)"))


class _Flow(Rule):
    """A flow over labels, taught by what the votes permit."""

    network: LabelFlow

    def forward(self, x: Tensor, votes: Tensor) -> Tensor:
        loss = weak_constraint_loss(self.network, x, one_hot(votes, 2).float(), BOUNDS)
        loss.backward()
        return loss.detach()

    def predict(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network.predict(x)


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(30, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(),
                         nn.Linear(64, 2))


def _constraints(logits: Tensor, votes: Tensor) -> Tensor:
    """Return the flow's penalties, without its likelihood, of a network's classes."""
    guess, q = logits.softmax(1)[:, None], one_hot(votes, 2).float()
    rates = ((1 - guess) * q + guess * (1 - q)).mean(0)
    return 10 * (rates - BOUNDS).clamp(min=0).square().sum()


def _majority_loss(logits: Tensor, votes: Tensor) -> Tensor:
    return cross_entropy(logits, _majority(votes))


def _majority(votes: Tensor) -> Tensor:
    return (votes.sum(1) > 1).long()


def _right(rule: Rule, test: Loader, part: int) -> float:
    x, y = list(test)[part]
    return 100 * float((rule.predict(x).argmax(1) == y).float().mean())


def _votes(seed: int) -> tuple[float, float]:
    """Return how often the majority of labelers is right, on known samples and on others."""
    _, y, votes = _samples(seed)
    right = (_majority(votes) == y).float()
    return 100 * float(right[:400].mean()), 100 * float(right[400:].mean())


def _data(seed: int) -> tuple[Loader, Loader]:
    """Return the first 400 samples with their votes, then these and the others with classes."""
    x, y, votes = _samples(seed)
    return [(x[:400], votes[:400])], [(x[:400], y[:400]), (x[400:], y[400:])]


def _samples(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the samples, their classes and the labelers' votes, shuffled and scaled."""
    draw = torch.Generator().manual_seed(seed)
    x, y = map(torch.from_numpy, load_breast_cancer(return_X_y=True))
    order = torch.randperm(len(x), generator=draw)
    x, y = x[order].float(), y[order].long()
    x = (x - x[:400].mean(0)) / x[:400].std(0)
    wrong = torch.rand(len(y), 3, generator=draw) < torch.tensor(NOISE)
    return x, y, torch.where(wrong, 1 - y[:, None], y[:, None])
