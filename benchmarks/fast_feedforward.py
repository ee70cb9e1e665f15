"""A fast feed-forward network beside the dense layer of its width, and the published package.

    python benchmarks/fast_feedforward.py

For each tree: a training step (forward and backward, x included) at batch 256, and the evaluation
at batch 256 and 1, of the dense layer, of `FastFeedforward`, of the same with balancing and a
master leaf of 8 units, and, where the package `fastfeedforward` 0.2.1 can be imported, of its `FFF`
with the same weights, in the setting of which a figure was agreed. They take turns on one thread; a
figure is the median processor time of a call over the turns, a turn at batch 1 being 20 calls. Each
contender is warmed up in its turn by one call that is not counted.
Inputs are standard normal and the weights fresh, so that the leaves' use is as spread as it gets;
what training makes uneven is faster. The package's evaluation leaves out the leaves' output bias,
so what is compared with it are the outputs in training.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netwright.blocks.feedforward import FastFeedforward, FeedForward
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "fast_feedforward.json"
DIM, AGREED = 768, (32, 7)
TREES = (AGREED, *((8, depth) for depth in (6, 7, 8, 9, 10)))
TURNS, ENOUGH = 7, 10.0  # after so many seconds a slow contender is not timed again
TRAINING, INFERENCE = 1.5, 4.0  # at most and at least, against the dense layer


def peer(tree: FastFeedforward) -> nn.Module | None:
    """Return the package's network with the weights of `tree`, None where it is not installed."""
    try:
        from fastfeedforward import FFF
    except ImportError:
        return None
    theirs = FFF(DIM, tree.leaf, DIM, tree.depth)
    state = {"node_weights": tree.nodes.weight, "node_biases": tree.nodes.bias[:, None],
             "w1s": tree.up.weight.unflatten(0, (tree.leaves, tree.leaf)).mT,
             "b1s": tree.up.bias.unflatten(0, (tree.leaves, tree.leaf)),
             "w2s": tree.down, "b2s": tree.bias}
    theirs.load_state_dict(state, strict=False)
    x = torch.randn(16, DIM)
    torch.testing.assert_close(tree.train()(x), theirs.train()(x), rtol=1e-4, atol=1e-4)
    return theirs


def timed(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the milliseconds of each call, the contenders taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            if sum(taken[name]) > 1000 * ENOUGH:
                continue
            call()
            start = time.process_time()
            for _ in range(repeats):
                call()
            taken[name].append(1000 * (time.process_time() - start) / repeats)
    return {name: statistics.median(values) for name, values in taken.items()}


def step(network: nn.Module, x: Tensor, signal: Tensor) -> None:
    for held in (x, *network.parameters()):
        held.grad = None
    network(x).backward(signal)


def measured(leaf: int, depth: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    tree = FastFeedforward(DIM, depth=depth, leaf=leaf)
    networks = {"dense": FeedForward(DIM, leaf * 2 ** depth, activation="relu"), "tree": tree,
                "tree, balanced, master leaf": FastFeedforward(DIM, depth=depth, leaf=leaf,
                                                               balance=1.0, master_leaf=8)}
    theirs = peer(tree) if (leaf, depth) == AGREED else None
    if theirs is not None:
        networks["fastfeedforward 0.2.1"] = theirs
    x, signal = torch.randn(256, DIM, requires_grad=True), torch.randn(256, DIM)
    found = {"training, 256": timed({name: partial(step, network.train(), x, signal)
                                     for name, network in networks.items()}, 1)}
    with torch.no_grad():
        for rows, repeats in ((256, 1), (1, 20)):
            found[f"inference, {rows}"] = timed({name: partial(network.eval(), x[:rows])
                                                 for name, network in networks.items()}, repeats)
    return found


def main() -> None:
    torch.set_num_threads(1)
    trees, short = {}, []
    for leaf, depth in TREES:
        found = measured(leaf, depth)
        trees[f"leaf {leaf}, depth {depth}"] = {
            what: {**{f"ms, {name}": ms for name, ms in row.items()},
                   **{f"{name} / dense" if what.startswith("training") else f"dense / {name}":
                      ms / row["dense"] if what.startswith("training") else row["dense"] / ms
                      for name, ms in row.items() if name != "dense"}}
            for what, row in found.items()}
        print(leaf, depth, {what: {name: round(value, 3) for name, value in row.items()}
                            for what, row in trees[f"leaf {leaf}, depth {depth}"].items()},
              flush=True)
    RESULTS.write_text(json.dumps({"dim": DIM, "threads": 1, "turns": TURNS, "trees": trees,
                                   "machine": machine()}, indent=1) + "\n", encoding="utf-8")
    agreed = trees[f"leaf {AGREED[0]}, depth {AGREED[1]}"]
    if agreed["training, 256"]["tree / dense"] > TRAINING:
        short.append(f"a training step takes more than {TRAINING} of the dense layer's time")
    short += [f"{what} is less than {INFERENCE} times faster than the dense layer's"
              for what in ("inference, 256", "inference, 1")
              if agreed[what]["dense / tree"] < INFERENCE]
    factors = [trees[f"leaf {leaf}, depth {depth}"]["inference, 256"]["dense / tree"]
               for leaf, depth in TREES[1:]]
    if factors != sorted(factors) or factors[-1] <= 1:
        short.append(f"the factor does not grow with depth: {factors}")
    if short:
        raise SystemExit("; ".join(short))


if __name__ == "__main__":
    main()
