from collections.abc import Callable
from functools import partial

import torch
from torch.optim import Adam

from netwright.data import cora
from netwright.evidence import (
    Claim,
    Loader,
    Outcome,
    Scale,
    evidence,
    figure,
    held_out_accuracy,
    train,
)
from netwright.models import gcn
from netwright.rules import Backprop, ForwardForward, Rule

WIDTH, DEPTH, CLASSES = 64, 3, 7
# What the claim takes, in points: behind backprop, and ahead of frozen hidden layers.
BEHIND, AHEAD = 5.0, 5.0
ACCURACY = "test accuracy, {} (%)"


def _learns(name: str) -> Claim:
    ours, exact, frozen = (figure(ACCURACY.format(way)) for way in (
        name, "Backprop", "label in the features, hidden layers frozen"))
    return (ours >= exact - BEHIND) & (ours >= frozen + AHEAD)


@evidence(paper="000-016", claim="Forward-forward learns graphs, with labels in the nodes' "
          "features or as edges to virtual nodes, within a few points of backpropagation.",
          shown=[_learns("label in the features"), _learns("virtual nodes")],
          shortfall=("scale",
                     "Both ways learn (70 and 63 %, where frozen layers have 11), but "
                     "backpropagation has 77 %. With labels tried on a sixteenth of the nodes "
                     "at a time, as in training, features went from 49 to 70 %. Accuracy rises "
                     "with the epochs of 100; the paper trains each layer by itself, for up to "
                     "1000."))
def graph_forward_forward(scale: Scale) -> Outcome:
    """Train a GCN on Cora by forward-forward with both kinds of labels, and by backprop."""
    desk = scale == "desk"
    seeds, epochs = (3, 100) if desk else (10, 500)
    ways: dict[str, Callable[[], Rule]] = {
        "Backprop": _rule, "label in the features": partial(_rule, "label_overlay"),
        "virtual nodes": partial(_rule, "virtual_nodes"),
        "label in the features, hidden layers frozen": partial(_rule, "label_overlay",
                                                               frozen=True)}
    runs = train(ways, _graph(), {ACCURACY: held_out_accuracy}, seeds=range(seeds), steps=epochs,
                 looks=4, optimizer=lambda rule: Adam(
                     (p for p in rule.parameters() if p.requires_grad), 1e-2, weight_decay=5e-4))
    return Outcome(
        setting={"data": "Cora, the public split, with 7 empty features in front of the words",
                 "network": f"GCN, {DEPTH} layers of width {WIDTH}, ReLU, dropout 0.5",
                 "training": f"{epochs} epochs of the whole graph, Adam, learning rate 0.01 and "
                             "weight decay 0.0005 for all, not tuned",
                 "forward-forward": "the rule's defaults, both hidden layers vote (skip=0)"},
        figures=runs.figures,
        note="In a prediction a sixteenth of the nodes carries the label that is tried and the "
             "others are neutral, as most are in training; in the paper those that were learned "
             "from keep their own label. With the label on all nodes at once, tried before, the "
             "same rule came to 49 % by features. Accuracy by virtual nodes still rises when the "
             "epochs are over; the paper trains each layer by itself, for up to 1000.",
        curves=runs.curves(ACCURACY), axes=("epoch", "test accuracy (%)"))


def _graph() -> tuple[Loader, Loader]:
    """Return the whole graph twice, with the classes to learn from and with those to test on."""
    graph = cora()
    features = torch.cat([torch.zeros(len(graph.y), CLASSES), graph.features], dim=1)
    x = features, graph.edge_index
    return [(x, graph.y.where(graph.train, -100))], [(x, graph.y.where(graph.test, -100))]


def _rule(negatives: str = "", *, frozen: bool = False) -> Rule:
    network = gcn(CLASSES + cora().features.shape[1], CLASSES, width=WIDTH, depth=DEPTH)
    if frozen:
        network.get_submodule("convs")[:-1].requires_grad_(False)  # type: ignore[index]
    if not negatives:
        return Backprop(network)
    return ForwardForward(network, num_classes=CLASSES, skip=0, max_rows=10_000,
                          negatives=negatives)  # type: ignore[arg-type]
