import time
from statistics import mean, median

import torch
from torch import nn

from evidence.small_models import Trained, parameters, text, train
from netwright.blocks.experts import MixtureOfExperts, TopKRouter, par_pattern, sublayers
from netwright.blocks.feedforward import FeedForward
from netwright.data import CHARACTERS
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.models.gpt import Embed
from netwright.objectives.losses import cross_entropy

WIDTH, CONTEXT, SLACK = 48, 64, 0.02  # nats
ALTERNATING = "sfsgsfsg"
ORDERS = ("gsfssgfs", "ssgfsgsf", "sgfssfgs", "ssssffgg")


@evidence(paper="003-014", claim="A third of the sublayers as attention, early, gives the loss of "
          "attention in every other one at less time a step.")
def pay_attention_when_required(scale: Scale) -> Outcome:
    """Train a character model whose attention is early and rare, and one that interleaves it."""
    seeds, steps, length = (3, 300, 12) if scale == "desk" else (5, 5000, 24)
    patterns = {"early and rare": par_pattern(length), "interleaved": "sf" * (length // 2)}
    runs = {way: [_trained(pattern, seed, steps, hidden=2 * WIDTH) for seed in range(seeds)]
            for way, pattern in patterns.items()}
    losses = {way: [run.losses[-1] for run in each] for way, each in runs.items()}
    ratios = _times(runs["early and rare"][0].network, runs["interleaved"][0].network)
    level = mean(losses["early and rare"]) <= mean(losses["interleaved"]) + SLACK
    faster = median(ratios) < 0.95
    return Outcome(
        verdict="shown" if level and faster else "partly shown" if level or faster else
        "not shown",
        setting={"data": f"tinyshakespeare, characters, context {CONTEXT}",
                 "patterns": ", ".join(f"{way}: {p}" for way, p in patterns.items()),
                 "model": f"width {WIDTH}, feed-forward hidden {2 * WIDTH}, so that each sublayer "
                 "has as many parameters", "training":
                 f"{steps} steps of 16 windows, Adam 3e-3 falling to 0",
                 "time": "the processor's, of a training step of 16 windows, in turns"},
        figures={**{f"held-out loss, {way} (nats)": losses[way] for way in patterns},
                 **{f"parameters, {way}": [parameters(each[0].network)]
                    for way, each in runs.items()},
                 "time of a step, early and rare over interleaved": ratios},
        curves={way: Curve(each[0].steps, [run.losses for run in each])
                for way, each in runs.items()}, axes=("step", "held-out loss (nats)"),
        note=f"Shown is a loss at most {SLACK} nats above the interleaved model's and less than "
             "0.95 of its time a step; partly shown, one of the two.")


@evidence(paper="003-045", claim="An order of attention, feed-forward and experts that does not "
          "alternate is at least as good as the one that does, at equal cost.")
def brainformer(scale: Scale) -> Outcome:
    """Choose an order of eight sublayers under one seed and compare it under others."""
    seeds, steps = (3, 150) if scale == "desk" else (5, 5000)
    searched = {order: _trained(order, 100, steps).losses[-1] for order in (ALTERNATING, *ORDERS)}
    best = min(ORDERS, key=lambda order: searched[order])
    runs = {order: [_trained(order, seed, steps) for seed in range(seeds)]
            for order in (best, ALTERNATING)}
    losses = {order: [run.losses[-1] for run in each] for order, each in runs.items()}
    gain = mean(losses[ALTERNATING]) - mean(losses[best])
    every = all(a < b for a, b in zip(losses[best], losses[ALTERNATING], strict=True))
    return Outcome(
        verdict="shown" if gain > 0 and every else "partly shown" if gain > -SLACK else
        "not shown",
        setting={"data": f"tinyshakespeare, characters, context {CONTEXT}",
                 "orders": f"{ALTERNATING} and {', '.join(ORDERS)}: four attentions, two "
                 "feed-forward layers, two mixtures of experts each", "search":
                 "the best of the latter under seed 100, compared under others",
                 "model": f"width {WIDTH}, hidden {WIDTH}, 4 experts of that size, 1 a token, so "
                 "that experts cost what feed-forward layers do", "training":
                 f"{steps} steps of 16 windows, Adam 3e-3 falling to 0"},
        figures={**{f"held-out loss, {'chosen' if order == best else 'alternating'} (nats)": found
                    for order, found in losses.items()},
                 **{f"loss in the search, {order} (nats)": [loss]
                    for order, loss in searched.items()}},
        curves={f"{'chosen' if order == best else 'alternating'}, {order}": Curve(
            each[0].steps, [run.losses for run in each]) for order, each in runs.items()},
        axes=("step", "held-out loss (nats)"),
        note="Shown is a lower loss of the chosen order under every seed; partly shown, one at "
             f"most {SLACK} nats above on average. The paper searches sizes, gates and norms too, "
             "among far more.")


def _trained(pattern: str, seed: int, steps: int, hidden: int = WIDTH) -> Trained:
    return train(lambda: nn.Sequential(
        Embed(len(CHARACTERS), CONTEXT, WIDTH),
        sublayers(pattern, WIDTH, {"g": _experts}, hidden=hidden),
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(CHARACTERS))), text(), seed, steps=steps)


def _experts(dim: int) -> nn.Module:
    return MixtureOfExperts(dim, lambda: FeedForward(dim, WIDTH), n_experts=4,
                            router=TopKRouter(dim, 4, 1, softmax="all"))


def _times(ours: nn.Module, theirs: nn.Module, turns: int = 15) -> list[float]:
    """Return the time of a training step of ours over that of theirs, turn by turn."""
    x, y = text().x_train[:16], text().y_train[:16]
    found = []
    for turn in range(turns + 1):
        times = []
        for network in (ours, theirs):
            start = time.process_time()
            loss = cross_entropy(network(x), y)
            torch.autograd.grad(loss, list(network.parameters()))
            times.append(time.process_time() - start)
        if turn:
            found.append(times[0] / times[1])
    return found
