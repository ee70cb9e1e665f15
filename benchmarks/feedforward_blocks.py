"""Every feed-forward block in the same two networks, at equal parameters and at equal arithmetic.

    python -m benchmarks.feedforward_blocks               # all of them
    python -m benchmarks.feedforward_blocks GEGLU Star    # these anew, the others as they were

The character model of tinyshakespeare and the patch classifier of CIFAR-10 from
`evidence.small_models`, whose feed-forward blocks are made by a line of `BLOCKS`. Each
block's `hidden` is chosen twice: for as many parameters as the network has with the plain block,
and for as many floating-point operations. The learning rate and the steps are the same for all. The
time of a step and of a plain network's step are taken in turns; a ratio is the median over the
turns of the processor's time. Stored bytes are those that wait for the backward pass.

The page of the ranking is made from what this writes.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evidence.small_models import (
    images,
    language_model,
    parameters,
    patch_classifier,
    text,
    train,
)
from netwright.blocks.experts import MixtureOfExperts
from netwright.blocks.feedforward import (
    AGLU,
    GLU,
    ConvGLU,
    FastFeedforward,
    FeedForward,
    LowRankFeedForward,
    QuadraticFeedForward,
    RePaFeedForward,
    Star,
    StructuredFeedForward,
)
from netwright.blocks.kan import AFKANFeedForward, KANFeedForward, RationalFeedForward
from netwright.data import Split
from netwright.measure import cost
from netwright.objectives.losses import cross_entropy
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "feedforward_blocks.json"
STEPS, SEEDS, TURNS, BATCH, PLAIN = 300, 3, 15, 16, "plain, GELU"
Make = Callable[[int, int], nn.Module]


def eights(hidden: int) -> int:
    """Return the next multiple of 8, which blocks of groups and stripes need."""
    return 8 * -(-hidden // 8)


# A block is a line: what makes it of its dimension and its hidden size.
BLOCKS: dict[str, Make] = {
    PLAIN: FeedForward,
    "plain, ReLU": partial(FeedForward, activation="relu"),
    "plain, SiLU": partial(FeedForward, activation="silu"),
    "plain, AGLU": partial(FeedForward, activation=AGLU),
    "3 layers": partial(FeedForward, layers=3),
    "GLU": partial(GLU, activation="sigmoid"),
    "bilinear": partial(GLU, activation="identity"),
    "ReGLU": partial(GLU, activation="relu"),
    "GEGLU": partial(GLU, activation="gelu"),
    "SwiGLU": GLU,
    "Star": Star,
    "low rank": LowRankFeedForward,
    "block-dense": lambda dim, hidden: StructuredFeedForward(
        dim, eights(hidden), kind="blockdense"),
    "block-shuffle": lambda dim, hidden: StructuredFeedForward(
        dim, eights(hidden), kind="blockshuffle"),
    "RePa": RePaFeedForward,
    "fast, 8 leaves": lambda dim, hidden: FastFeedforward(dim, depth=3, leaf=-(-hidden // 8)),
    "quadratic": QuadraticFeedForward,
    "rational": lambda dim, hidden: RationalFeedForward(dim, eights(hidden)),
    "splines (KAN)": KANFeedForward,
    "activation-based KAN": AFKANFeedForward,
    "2 of 4 SwiGLU experts": lambda dim, hidden: MixtureOfExperts(
        dim, partial(GLU, dim, hidden), n_experts=4),
}
# Those that must know how the tokens lie: a line for each task.
PLACED: dict[str, dict[str, Make]] = {
    "characters": {"ConvGLU": partial(ConvGLU, axes=1, causal=True)},
    "patches": {"ConvGLU": partial(ConvGLU, size=(8, 8))},
}
NETWORKS: dict[str, tuple[Callable[..., nn.Module], Callable[[], Split]]] = {
    "characters": (language_model, text), "patches": (patch_classifier, images)}


def hidden_for(value: Callable[[int], int], target: int) -> int:
    """Return the hidden size at which a growing `value` comes nearest to `target`."""
    low, high = 16, 32
    while value(high) < target:
        low, high = high, 2 * high
        if high > 2 ** 20:
            raise ValueError(f"no hidden size reaches {target}, which is at {value(high)}; the "
                             "block must grow with it")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if value(middle) < target else (low, middle)
    return min((low, high), key=lambda hidden: abs(value(hidden) - target))


def ranked(task: str, make: Make, hidden: int, split: Split) -> dict[str, Any]:
    """Train with three seeds, and time a step beside a plain network's."""
    build = NETWORKS[task][0]
    whole = partial(build, feedforward=lambda dim, _: make(dim, hidden))
    runs = [train(whole, split, seed, steps=STEPS, batch=BATCH, looks=1) for seed in range(SEEDS)]
    x, y = split.x_train[:BATCH], split.y_train[:BATCH]
    networks = (whole(), build(feedforward=BLOCKS[PLAIN]))
    ratios = []
    for turn in range(TURNS + 2):
        seconds = []
        for network in networks:
            network.zero_grad()
            begin = time.process_time()
            cross_entropy(network(x), y).backward()
            seconds.append(time.process_time() - begin)
        if turn > 1:
            ratios.append(seconds[0] / seconds[1])
    mine, plain = (cost(network, (x, y), loss=cross_entropy, repeats=1, warmup=0)
                   for network in networks)
    return {"hidden": hidden, "parameters": mine.parameters, "flops": mine.flops,
            "loss": [run.losses[-1] for run in runs], "error": [run.errors[-1] for run in runs],
            "time over plain": statistics.median(ratios),
            "stored over plain": mine.saved_bytes / plain.saved_bytes}


def main() -> None:
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"tasks": {}}
    wanted = set(sys.argv[1:])
    unknown = wanted - set(BLOCKS) - set(PLACED["characters"])
    if unknown:
        sys.exit(f"no block is called {', '.join(sorted(unknown))}")
    for task, (build, data) in NETWORKS.items():
        split = data()
        x, y = split.x_train[:BATCH], split.y_train[:BATCH]

        def arithmetic(network: nn.Module, x: torch.Tensor = x, y: torch.Tensor = y) -> int:
            return cost(network, (x, y), loss=cross_entropy, repeats=1, warmup=0).flops

        rows = found["tasks"].setdefault(task, {})
        plain = build(feedforward=BLOCKS[PLAIN])
        for name, make in (BLOCKS | PLACED[task]).items():
            if wanted and name not in wanted:
                continue

            def network(hidden: int, make: Make = make,
                        build: Callable[..., nn.Module] = build) -> nn.Module:
                return build(feedforward=lambda dim, _: make(dim, hidden))

            sizes = {"parameters": hidden_for(lambda h, of=network: parameters(of(h)),  # type: ignore[misc]
                                              parameters(plain)),
                     "flops": hidden_for(lambda h, of=network: arithmetic(of(h)),  # type: ignore[misc]
                                         arithmetic(plain))}
            row = rows[name] = {"parameters": ranked(task, make, sizes["parameters"], split)}
            same = sizes["flops"] == sizes["parameters"]
            row["flops"] = row["parameters"] if same else ranked(task, make, sizes["flops"], split)
            print(task, name, {kind: (each["hidden"], round(statistics.fmean(each["loss"]), 4),
                                      round(each["time over plain"], 3))
                               for kind, each in row.items()}, flush=True)
            found |= {"plain": PLAIN, "steps": STEPS, "seeds": SEEDS, "turns": TURNS,
                      "batch": BATCH, "threads": 1, "machine": machine()}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
