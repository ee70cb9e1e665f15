from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.optim import SGD

from netwright.data import Batches, Split, mnist
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.measure import alignment
from netwright.models import mlp
from netwright.rules import (
    Backprop,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    Pepita,
    Rule,
)

RATES = (0.03, 0.1, 0.3)
HELD_OUT = 2000
PEPITA, ADAPTIVE = "Pepita", "adaptive feedback alignment"
MAKE: dict[str, Callable[..., Rule]] = {
    "Backprop": Backprop,
    "FeedbackAlignment": FeedbackAlignment,
    ADAPTIVE: DirectFeedbackAlignment,  # with -F W_0^T written into its matrix at each step
    PEPITA: Pepita,
    "Pepita, presynaptic='own'": lambda *args: Pepita(*args, presynaptic="own"),
    "Pepita, feedback='mirror'": lambda *args: Pepita(*args, feedback="mirror"),
}


@evidence(paper="003-020", claim="PEPITA is well approximated by an adaptive feedback alignment, "
          "comes to agree with backpropagation, and comes closer to it by weight mirroring.")
def pepita(scale: Scale) -> Outcome:
    """Train an MLP on MNIST by PEPITA and its relatives; compare accuracy and updates."""
    desk = scale == "desk"
    seeds, epochs, hidden, count = (3, 5, 256, 10_000) if desk else (5, 50, 1024, 60_000)
    full = mnist()
    split = Split(full.x_train[:count].flatten(1), full.y_train[:count],
                  full.x_test.flatten(1), full.y_test)
    figures: dict[str, list[float]] = {}
    curves: dict[str, Curve] = {}
    setting: dict[str, object] = {}
    agreement: dict[str, list[list[float]]] = {}
    for name in MAKE:
        rate = _tuned(name, split, hidden, epochs)
        setting[name] = f"learning rate {rate}"
        runs = [_train(name, split, hidden, epochs, seed, rate) for seed in range(seeds)]
        curves[name] = Curve(list(range(1, epochs + 1)), [run["accuracy"] for run in runs])
        figures[f"test accuracy, {name} (%)"] = [run["accuracy"][-1] for run in runs]
        agreement[name] = [run["exact"] for run in runs]
        figures[f"hidden layer's update and the exact gradient, cosine before training, {name}"] = [
            run["exact"][0] for run in runs]
        figures[f"hidden layer's update and the exact gradient, cosine after training, {name}"] = [
            run["exact"][-1] for run in runs]
        if name == PEPITA:
            likeness = [run["adaptive"] for run in runs]
            figures["PEPITA's and the adaptive update of the hidden layer, least cosine"] = [
                min(found) for found in likeness]
    accuracy = {name: sum(figures[f"test accuracy, {name} (%)"]) / seeds for name in MAKE}
    alike = (min(min(found) for found in likeness) > 0.9
             and abs(accuracy[PEPITA] - accuracy[ADAPTIVE]) < 1)
    agrees = all(run[-1] > max(run[0], 0) + 0.1 for run in agreement[PEPITA])
    closer = accuracy["Pepita, feedback='mirror'"] > accuracy[PEPITA] + 0.2
    return Outcome(
        verdict="shown" if alike and agrees and closer else
        "partly shown" if alike or agrees or closer else "not shown",
        setting={"data": f"MNIST, {count} training images", "network": f"784-{hidden}-10, ReLU",
                 "epochs": epochs, "batch": 64, "optimizer": "SGD, momentum 0.9; the mirrors' "
                 "matrices at 0.01 without momentum", **setting,
                 "tuning": f"for each rule the best of {RATES} on {HELD_OUT} held-out training "
                 "images, one run each"},
        figures=figures,
        note=f"Approximated: {alike} (cosine of the two updates above 0.9 at the same weights "
             f"after every epoch, mean accuracies less than a point apart). Comes to agree: "
             f"{agrees} (in every run the cosine with the exact gradient ends positive and at "
             f"least 0.1 above where it began). Mirroring comes closer: {closer} (mean accuracy "
             "more than 0.2 points above that of fixed feedback). The paper trains wider networks "
             "on all images for 100 epochs, with dropout, and mirrors before training too.",
        curves=curves, axes=("epoch", "test accuracy (%)"))


def _tuned(name: str, split: Split, hidden: int, epochs: int) -> float:
    inner = Split(split.x_train[:-HELD_OUT], split.y_train[:-HELD_OUT],
                  split.x_train[-HELD_OUT:], split.y_train[-HELD_OUT:])
    found = {rate: _train(name, inner, hidden, max(2, epochs // 2), 100, rate)["accuracy"][-1]
             for rate in RATES}
    return max(found, key=lambda rate: found[rate])


def _train(name: str, split: Split, hidden: int, epochs: int, seed: int,
           rate: float) -> dict[str, list[float]]:
    """Return the accuracy after each epoch, and the cosines before the first and after each."""
    torch.manual_seed(seed)
    rule = MAKE[name](mlp(784, 10, hidden=(hidden,)), split.x_train[:2])
    weight = rule.network.get_parameter("1.weight")
    fixed = Pepita(rule.network, split.x_train[:2]).feedback["F"]  # drawn for the adaptive rule
    mirrors = [p for key, p in rule.named_parameters() if key.startswith("feedback.")]
    optimizer = SGD([{"params": list(rule.network.parameters()), "lr": rate, "momentum": 0.9},
                     {"params": mirrors, "lr": 0.01}])
    batch = split.x_train[:1000], split.y_train[:1000]
    found: dict[str, list[float]] = {"accuracy": [], "exact": [], "adaptive": []}
    for epoch in range(epochs + 1):
        if name == ADAPTIVE:
            _adapt(rule, fixed, weight)
        found["exact"].append(alignment(rule, batch)["0"])
        if name == PEPITA:
            found["adaptive"].append(_likeness(rule, batch, weight))
        if epoch == epochs:
            break
        for x, y in Batches(split.x_train, split.y_train, 64, seed=1000 * seed + epoch):
            if name == ADAPTIVE:
                _adapt(rule, fixed, weight)
            optimizer.zero_grad()
            rule(x, y)
            optimizer.step()
        hits = rule.predict(split.x_test).argmax(1) == split.y_test
        found["accuracy"].append(100 * float(hits.float().mean()))
    return found


@torch.no_grad()
def _adapt(rule: torch.nn.Module, fixed: Tensor, weight: Tensor) -> None:
    """Send the error through -F W_0^T, as the difference of PEPITA's two passes does at first."""
    rule.get_buffer("feedback./0").copy_(-fixed @ weight.T)


def _likeness(rule: Rule, batch: tuple[Tensor, Tensor], weight: Tensor) -> float:
    other = DirectFeedbackAlignment(rule.network, batch[0][:2])
    _adapt(other, rule.get_buffer("feedback./F"), weight)
    updates = []
    for each in (rule, other):
        rule.zero_grad()
        each(*batch)
        assert weight.grad is not None
        updates.append(weight.grad.flatten())
    rule.zero_grad()
    return float(cosine_similarity(updates[0], updates[1], dim=0))
