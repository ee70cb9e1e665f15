from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from netwright.blocks.reversible import (
    MultiSplitReversible,
    ReversibleSearch,
    ReversibleSequential,
    ReversibleTransformerBlock,
    Zero,
    darts_reversible,
)
from netwright.evidence import (
    Curve,
    Outcome,
    Scale,
    evidence,
    figure,
    held_out_accuracy,
    least,
    most,
    train,
)
from netwright.measure import cost

SYMBOLS, LENGTH, WIDTH, SPLITS, DEPTH = 8, 24, 16, 2, 2
FAR, NEAR = 6, 1  # chains of the near operation reach SPLITS * DEPTH = 4 symbols back
OPERATIONS = 5
WEIGHT = "weight of the planted operation where it is {}"
CHOSEN = f"splits (of {SPLITS}) that choose it where it is {{}}"
FOUND = "accuracy of the found network, trained anew (%)"
OTHER = "accuracy on the same task of the one found for the other task (%)"
APART = "largest difference of gradients to autograd's, relative"
STORED = "bytes stored for the backward pass, {} cells, {}"


@evidence(paper="001-002", claim="Multi-split reversible cells let a differentiable architecture "
          "search run in memory that depth does not grow, and it finds the operation that the "
          "task needs.",
          shown=[(most(APART) <= 1e-5) & (figure(STORED.format(32, "reversible"))
                                          <= 1.05 * figure(STORED.format(2, "reversible"))),
                 (least(CHOSEN.format("useful")) >= 1)
                 & (least(WEIGHT.format("useful")) > 1 / OPERATIONS)
                 & (most(CHOSEN.format("useless")) <= 0)
                 & (most(WEIGHT.format("useless")) < 1 / OPERATIONS),
                 least(FOUND) > most(OTHER) + 20])
def reversible_search(scale: Scale) -> Outcome:
    """Plant a useful operation in a search space, and one task on which it is useless."""
    seeds, epochs = (3, 6) if scale == "desk" else (5, 40)
    figures: dict[str, Sequence[float]] = {}
    searches = {task: [_search(back, seed, epochs) for seed in range(seeds)]
                for task, back in (("useful", FAR), ("useless", NEAR))}
    far = list(_space()).index("six back")
    curves = {}
    for task, found in searches.items():
        lines = [search.weights[:, 0, :, far].mean(1).tolist() for search in found]
        curves[f"where it is {task}"] = Curve(list(range(1, epochs + 1)), lines)
        figures[WEIGHT.format(task)] = [y[-1] for y in lines]
        figures[CHOSEN.format(task)] = [
            float(search.chosen[0].count("six back")) for search in found]
    right = [_retrained(search.chosen, FAR, seed)
             for seed, search in enumerate(searches["useful"])]
    wrong = [_retrained(search.chosen, FAR, seed)
             for seed, search in enumerate(searches["useless"])]
    figures |= {FOUND: right, OTHER: wrong, APART: [_difference(seed) for seed in range(seeds)]}
    for depth in (2, 8, 32):
        for name, reversible in (("reversible", True), ("stored", False)):
            figures[STORED.format(depth, name)] = [_stored(depth, reversible)]
    return Outcome(
        setting={"task": f"{LENGTH} of {SYMBOLS} symbols at random; which stood {FAR} places back "
                 f"(the planted operation is useful), or {NEAR} (it is not)",
                 "operations": ", ".join(_space()), "cells": f"{DEPTH} of {SPLITS} splits of "
                 f"{WIDTH}, one architecture for all", "search": f"{epochs} epochs of 40 batches "
                 "of 32; Adam 0.003 for both weights and architecture",
                 "gradients": "float32, 8 cells, an architecture drawn at random",
                 "memory": "width 2 x 16, 32 rows of 24 symbols"},
        figures=figures,
        note="The paper's translation tasks and its comparison with the Evolved Transformer are "
             "out of reach here.",
        curves=curves, axes=("epoch", "weight of the planted operation"))


class _Back(nn.Module):
    """A linear map of the symbol some places before."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places, self.norm, self.linear = places, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        made = self.linear(self.norm(x))
        return torch.cat([torch.zeros_like(made[:, :self.places]), made[:, :-self.places]], 1)


def _space() -> dict[str, Callable[[], nn.Module]]:
    return {
        "six back": lambda: _Back(FAR),
        "one back": lambda: _Back(NEAR),
        "same symbol": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH),
                                             nn.GELU(), nn.Linear(WIDTH, WIDTH)),
        "attention": lambda: ReversibleTransformerBlock(WIDTH, 2, causal=True).attention,
        "nothing": Zero,
    }


def _batches(back: int, number: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    batches = []
    for _ in range(number):
        x = torch.randint(SYMBOLS, (32, LENGTH), generator=generator)
        y = torch.full_like(x, -100)  # what is not there counts for nothing
        y[:, back:] = x[:, :-back]
        batches.append((x, y))
    return batches


def _ends() -> tuple[nn.Module, nn.Module]:
    width = SPLITS * WIDTH
    return nn.Embedding(SYMBOLS, width), nn.Sequential(nn.LayerNorm(width),
                                                       nn.Linear(width, SYMBOLS))


def _search(back: int, seed: int, epochs: int) -> ReversibleSearch:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train, validation = _batches(back, 40, generator), _batches(back, 40, generator)
    entry, head = _ends()
    return darts_reversible(_space(), train, validation, entry=entry, head=head, splits=SPLITS,
                            depth=DEPTH, epochs=epochs,
                            optimizer=lambda p: torch.optim.Adam(p, 3e-3),
                            architecture_optimizer=lambda p: torch.optim.Adam(p, 3e-3))


def _retrained(chosen: list[list[str]], back: int, seed: int) -> float:
    """Return the accuracy of a network of the chosen operations, trained from new weights."""
    generator = torch.Generator().manual_seed(100 + seed)
    learn, test = _batches(back, 300, generator), _batches(back, 1, generator)
    runs = train({"found": partial(_network, chosen)}, (learn, test), {FOUND: held_out_accuracy},
                 seeds=[100 + seed], epochs=1,
                 optimizer=lambda rule: torch.optim.Adam(rule.parameters(), 3e-3))
    return runs.figures[FOUND][0]


def _network(chosen: list[list[str]]) -> nn.Module:
    entry, head = _ends()
    operations = torch.tensor([[list(_space()).index(name) for name in names] for names in chosen])
    architectures = nn.functional.one_hot(operations, OPERATIONS).float()
    cells = [MultiSplitReversible(_space(), SPLITS, architecture=nn.Parameter(a)).derived()
             for a in architectures]
    return nn.Sequential(entry, ReversibleSequential(*cells), head)


def _cells(depth: int) -> list[MultiSplitReversible]:
    architecture = nn.Parameter(torch.randn(SPLITS, len(_space())))
    return [MultiSplitReversible(_space(), SPLITS, architecture=architecture)
            for _ in range(depth)]


def _difference(seed: int) -> float:
    """Return the largest difference between a gradient and autograd's, over its largest number."""
    torch.manual_seed(seed)
    cells, x = _cells(8), torch.randn(32, LENGTH, SPLITS * WIDTH, requires_grad=True)
    found = []
    for network in (ReversibleSequential(*cells), nn.Sequential(*cells)):
        learning = [x, *network.parameters()]
        found.append(torch.autograd.grad(network(x).square().mean(), learning))
    return max(float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
               for mine, theirs in zip(*found, strict=True))


def _stored(depth: int, reversible: bool) -> float:
    torch.manual_seed(0)
    entry, head = _ends()
    chain = (ReversibleSequential if reversible else nn.Sequential)(*_cells(depth))
    (batch,) = _batches(NEAR, 1, torch.Generator().manual_seed(0))
    return float(cost(nn.Sequential(entry, chain, head), batch, repeats=1, warmup=0).saved_bytes)
