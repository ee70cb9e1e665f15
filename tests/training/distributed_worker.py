"""Trainings in one process and in two, run by test_distributed.py alone and under torchrun."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, distributed, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import netwright as nw
from netwright.catalogue.facets import methods
from netwright.contracts.check_rule import ordinary_network
from netwright.contracts.checks import cast, variants
from netwright.data import Batches
from netwright.rules import Rule

X = torch.randn(44, 6, generator=Generator().manual_seed(1))
WIDE = torch.randn(44, 20, generator=Generator().manual_seed(2), dtype=torch.float64)
Y = (X[:, :3].argmax(1) + (X[:, 3] > 1)) % 3
RULES = {entry.value.__name__: entry for entry in methods().values() if entry.facets.kind == "rule"}


def network(*norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(distributed.get_rank() if distributed.is_initialized() else 0)
    return nn.Sequential(nn.Linear(6, 12), *norm, nn.ReLU(), nn.Linear(12, 8), nn.Tanh(),
                         nn.Linear(8, 3))


def build(rule: str, arguments: dict[str, Any]) -> Rule:
    """Make a rule on the network that it says it is tried on, in float64, for rounding to be less
    than what is looked for.
    """
    entry, rank = RULES[rule], distributed.get_rank() if distributed.is_initialized() else 0
    torch.manual_seed(rank)
    made = (entry.facets.network or ordinary_network)().double()
    return entry.value(made, example=batches(rule)[0][0], **arguments,
                       generator=Generator().manual_seed(7 + rank))


def batches(rule: str) -> list[Any]:
    """Return the batch that a rule says it is tried on, which is not shared out, or the usual."""
    batch = RULES[rule].facets.batch
    return [(WIDE, Y)] if batch is None else [cast(batch(), torch.float64)]


def ways() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return every variant of every rule."""
    return {f"{rule}, {label}" if label else rule: (rule, dict(arguments))
            for rule, entry in RULES.items()
            for label, arguments in variants(entry.value).items()}


WAYS = {name: how for name, how in ways().items() if not build(*how).updates_weights}
# What changes the weights itself leaves nothing to average, and is refused.
ALONE = [rule for rule in RULES if build(*next(how for how in ways().values() if how[0] == rule)
                                         ).updates_weights]


def by_rule(rule: str, options: dict) -> dict[str, torch.Tensor]:
    made = build(rule, options)
    train, validation = Batches(WIDE, Y, 9, seed=2), Batches(WIDE, Y, 20, shuffle=False)
    if RULES[rule].facets.batch is not None:  # what is not shared out, as graphs
        train = validation = batches(rule)
    history = nw.fit(made, train, epochs=2, validation=validation,
                     optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
    return dict(made.state_dict()) | {"loss": torch.tensor([e.loss for e in history.epochs])} | {
        "metric": torch.tensor([e.metric for e in history.epochs])}


def fitted(*norm: nn.Module, train: object = None, **options: object) -> dict[str, torch.Tensor]:
    made = network(*norm)
    chosen = {"epochs": 2, "optimizer": lambda p: torch.optim.SGD(p, 0.2, momentum=0.5), **options}
    nw.fit(made, train or Batches(X, Y, 9, seed=2), **chosen)
    return dict(made.state_dict())


def accumulated() -> dict[str, torch.Tensor]:
    return fitted(accumulate=3, clip=0.5)


def unlabelled() -> dict[str, torch.Tensor]:
    y = Y.clone()
    y[::3] = -100
    return fitted(train=Batches(X, y, 9, shuffle=False))


def lbfgs() -> dict[str, torch.Tensor]:
    return fitted(train=Batches(X[:43], Y[:43], 43),
                  optimizer=lambda p: torch.optim.LBFGS(p, max_iter=3,
                                                        line_search_fn="strong_wolfe"))


def one_sample() -> dict[str, torch.Tensor]:
    return fitted(train=Batches(X[:5], Y[:5], 2, shuffle=False))  # the last batch has one sample


def by_loss(loss: Any, **options: Any) -> dict[str, torch.Tensor]:
    made = network()
    history = nw.fit(nw.rules.Backprop(made, loss=loss), Batches(X, Y, 9, seed=2), epochs=2,
                     **{"optimizer": lambda p: torch.optim.SGD(p, 0.02), **options})
    return dict(made.state_dict()) | {"loss": torch.tensor([e.loss for e in history.epochs])}


def summed() -> dict[str, torch.Tensor]:
    return by_loss(nn.CrossEntropyLoss(reduction="sum"), accumulate=2)


def weighed() -> dict[str, torch.Tensor]:
    return by_loss(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 6.0, 0.3])))


def weighed_lbfgs() -> dict[str, torch.Tensor]:
    return by_loss(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 6.0, 0.3])),
                   optimizer=lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2))


def sparse() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Embedding(9, 5, sparse=True), nn.Flatten(), nn.Linear(10, 3))
    tokens = (X[:, :2].abs() * 3).long().clamp(max=8)
    nw.fit(made, Batches(tokens, Y, 9, seed=2), epochs=2, clip=0.5,
           optimizer=lambda p: torch.optim.SGD(p, 0.2))
    return dict(made.state_dict())


def scored() -> dict[str, torch.Tensor]:
    """A metric that is no mean over samples."""
    history = nw.fit(network(), Batches(X, Y, 9, seed=2), epochs=2, metric=spread,
                     validation=Batches(X, Y, 20, shuffle=False))
    return {"metric": torch.tensor([e.metric for e in history.epochs])}


def spread(scores: torch.Tensor, y: torch.Tensor) -> float:
    return float(scores.std())


def early() -> dict[str, torch.Tensor]:
    return fitted(epochs=6, patience=1, validation=Batches(X, 2 - Y, 9), train=None)


def normed() -> dict[str, torch.Tensor]:
    return fitted(nn.BatchNorm1d(12))


def sampled() -> dict[str, torch.Tensor]:
    data = TensorDataset(X, Y)
    sampler = DistributedSampler(data) if distributed.is_initialized() else None
    return fitted(train=DataLoader(data, 4, sampler=sampler))


def resumed(folder: Path) -> dict[str, torch.Tensor]:
    options = {"checkpoint": folder, "optimizer": torch.optim.Adam}
    fitted(nn.BatchNorm1d(12), nn.Dropout(0.2), epochs=1, **options)
    return fitted(nn.BatchNorm1d(12), nn.Dropout(0.2), epochs=3, **options)


def uninterrupted(folder: Path) -> dict[str, torch.Tensor]:
    return fitted(nn.BatchNorm1d(12), nn.Dropout(0.2), epochs=3, checkpoint=folder,
                  optimizer=torch.optim.Adam)


SAME: list[Callable[[], dict[str, torch.Tensor]]] = [accumulated, unlabelled, lbfgs, one_sample,
                                                     early, summed, weighed, weighed_lbfgs,
                                                     sparse, scored]


def outcomes() -> dict[str, dict[str, torch.Tensor]]:
    """Return what every training ends with."""
    found = {name: by_rule(*how) for name, how in WAYS.items()}
    return found | {case.__name__: case() for case in SAME}


def errors() -> dict[str, str]:
    """Return what is said where the processes cannot train together."""
    rank, said = distributed.get_rank(), {}
    cases = {"uneven": lambda: fitted(train=[(X, Y)] * (rank + 1))}
    cases |= {rule: lambda rule=rule: nw.fit(build(rule, next(iter(variants(
        RULES[rule].value).values()))), batches(rule), epochs=1) for rule in ALONE}
    cases |= {f"{rule}, no share": lambda rule=rule: nw.fit(  # 19 are 9, 9 and 1
        build(rule, {}), Batches(WIDE[:19], Y[:19], 9, seed=2), epochs=1)
        for rule, entry in RULES.items() if entry.value.together}
    for name, case in cases.items():
        try:
            case()
        except ValueError as error:
            said[name] = str(error)
    x = X.clone() if rank else X
    if rank:
        x[3] = float("inf")
    try:
        fitted(train=[(x, Y)])
    except (ArithmeticError, ValueError) as error:
        said["diverged"] = f"{type(error).__name__}: {error}"
    return said


def main() -> None:
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    fitted(epochs=1)  # joins the processes
    found = outcomes() | {"normed": normed(), "sampled": sampled(),
                          "resumed": resumed(work / "resumed"),
                          "uninterrupted": uninterrupted(work / "uninterrupted")}
    rank = distributed.get_rank()
    torch.save({"outcomes": found, "errors": errors()}, work / f"{rank}.pt")


if __name__ == "__main__":
    main()
