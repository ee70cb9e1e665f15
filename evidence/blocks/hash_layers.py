import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from statistics import mean

import torch
from torch import Tensor, nn

from evidence.small_models import train
from netwright.blocks.experts import HashRouter, MixtureOfExperts, TopKRouter, feed_token_ids
from netwright.blocks.feedforward import FeedForward
from netwright.data import Split, tinyshakespeare
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.models import gpt

HIDDEN, N, WORDS, CONTEXT = 96, 8, 2000, 32
SLACK = 0.02  # nats
WAYS = ("dense", "learnt", "hash, random", "hash, balanced")


@evidence(paper="003-147", claim="Experts chosen by a hash of the token give a lower loss than a "
          "dense layer at equal cost, and one as low as a learnt router's; a balanced table evens "
          "the load.")
def hash_layers(scale: Scale) -> Outcome:
    """Train a word model with dense layers, a learnt router and two hash tables."""
    seeds, steps, depth = (3, 200, 2) if scale == "desk" else (5, 5000, 4)
    data, frequencies = _words()

    def make(way: str, seed: int) -> Callable[[], nn.Module]:
        draw = torch.Generator().manual_seed(seed)

        def feedforward(dim: int, hidden: int) -> nn.Module:
            if way == "dense":
                return FeedForward(dim, HIDDEN)
            router = (TopKRouter(dim, N, 1, softmax="all") if way == "learnt" else
                      HashRouter(N, WORDS, frequencies if way == "hash, balanced" else None,
                                 generator=draw))
            return MixtureOfExperts(dim, lambda: FeedForward(dim, HIDDEN), router, n_experts=N)

        def network() -> nn.Module:
            net = gpt(WORDS, CONTEXT, width=48, depth=depth, feedforward=feedforward)
            if way.startswith("hash"):
                feed_token_ids(net)
            return net
        return network
    losses, loads, curves = {}, {}, {}
    for way in WAYS:
        runs = [train(make(way, seed), data, seed, steps=steps) for seed in range(seeds)]
        losses[way] = [run.losses[-1] for run in runs]
        curves[way] = Curve(runs[0].steps, [run.losses for run in runs])
        if way != "dense":
            loads[way] = [_uneven(run.network, data.x_test) for run in runs]
    learnt, random, balanced = (mean(losses[way]) for way in WAYS[1:])
    below = [all(a < b for a, b in zip(losses[way], losses["dense"], strict=True))
             for way in WAYS[2:]]
    near = min(random, balanced) <= learnt + SLACK
    even = mean(loads["hash, balanced"]) < mean(loads["hash, random"])
    return Outcome(
        verdict="shown" if all(below) and near and even else
        "partly shown" if any(below) or near else "not shown",
        setting={"data": f"tinyshakespeare, the {WORDS - 1} most frequent words and signs and one "
                 f"mark for the rest, context {CONTEXT}",
                 "model": f"width 48, {depth} blocks; dense hidden {HIDDEN}, or {N} experts of "
                 f"that size and one of them for each word", "training":
                 f"{steps} steps of 16 windows, Adam 3e-3 falling to 0",
                 "learnt": "top-1, softmax over all, balance loss 0.01"},
        figures={**{f"held-out loss, {way} (nats)": losses[way] for way in WAYS},
                 **{f"largest load over the mean, held out, {way}": loads[way] for way in loads}},
        curves=curves, axes=("step", "held-out loss (nats)"),
        note=f"Shown is a loss of both tables below the dense layer's under every seed, the better "
             f"of them at most {SLACK} nats above the learnt router's, and a more even load of the "
             "balanced table. The paper puts experts in one layer of many and trains for far "
             "longer; here they are in every block.")


@lru_cache
def _words() -> tuple[Split, Tensor]:
    """Return windows of word ids, and how often each id occurs in those to train on."""
    found = re.findall(r"[A-Za-z']+|[^\sA-Za-z']|\n", tinyshakespeare())
    cut = 9 * len(found) // 10
    known = {word: i + 1 for i, (word, _) in
             enumerate(Counter(found[:cut]).most_common(WORDS - 1))}
    ids = torch.tensor([known.get(word, 0) for word in found])
    train_x, train_y = _windows(ids[:cut])
    test_x, test_y = _windows(ids[cut:])
    return Split(train_x, train_y, test_x[:512], test_y[:512]), ids[:cut].bincount(minlength=WORDS)


def _windows(ids: Tensor) -> tuple[Tensor, Tensor]:
    many = (len(ids) - 1) // CONTEXT
    return (ids[:many * CONTEXT].view(many, CONTEXT),
            ids[1:many * CONTEXT + 1].view(many, CONTEXT))


@torch.no_grad()
def _uneven(network: nn.Module, x: Tensor) -> float:
    """Return the largest load over the mean load, the mean over layers."""
    network.eval()
    network(x)
    found = [m.usage.load.float() for m in network.modules() if isinstance(m, MixtureOfExperts)]
    return mean(float(load.max() / load.mean()) for load in found)
