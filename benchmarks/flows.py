"""Couplings of a flow beside zuko's: stored bytes and step time, in one run.

    python benchmarks/flows.py        (zuko 1.6.0 must be installed)

Additive, affine and spline couplings of the same size on the same batch: a step is the negative
log-likelihood and its gradient. Contenders take turns; a time is the median of its turns.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import zuko
from torch import Tensor, nn

from netwright.generative.flows import (
    AdditiveCouplingTransform,
    AffineCouplingTransform,
    Flow,
    SplineCouplingTransform,
)
from netwright.measure import cost
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "flows.json"
SIZE, HALF, HIDDEN, BATCH, TURNS = 16, 8, 64, 1024, 15


class LogProb(nn.Module):
    """The log-likelihoods of a batch as a module's output."""

    def __init__(self, density: Callable[[Tensor], Tensor], owner: nn.Module) -> None:
        super().__init__()
        self.density, self.owner = density, owner

    def forward(self, x: Tensor) -> Tensor:
        """Return log p(x)."""
        return self.density(x)


def net(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(HALF, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
                         nn.Linear(HIDDEN, outputs))


def ours(kind: str, transforms: int, *, stored: bool) -> nn.Module:
    make, numbers = {"additive": (AdditiveCouplingTransform, 1),
                     "affine": (AffineCouplingTransform, 2),
                     "spline": (SplineCouplingTransform, 23)}[kind]
    flow = Flow([make(net(numbers * HALF), (HALF, HALF), flip=bool(i % 2))
                 for i in range(transforms)], SIZE, stored=stored)
    return LogProb(flow.log_prob, flow)


def theirs(kind: str, transforms: int) -> nn.Module:
    univariate, shapes = {
        "additive": (zuko.transforms.AdditiveTransform, [()]),
        "affine": (zuko.transforms.MonotonicAffineTransform, [(), ()]),
        "spline": (zuko.transforms.MonotonicRQSTransform, [(8,), (8,), (7,)])}[kind]
    mask = torch.arange(SIZE) < HALF
    flow = zuko.flows.Flow(
        [zuko.flows.GeneralCouplingTransform(SIZE, mask=mask if i % 2 else ~mask,
                                             hidden_features=[HIDDEN, HIDDEN],
                                             univariate=univariate, shapes=shapes)
         for i in range(transforms)],
        zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(SIZE),
                                            torch.ones(SIZE), buffer=True))
    return LogProb(lambda x: flow().log_prob(x), flow)


def loss(log_prob: Tensor, _: Tensor) -> Tensor:
    return -log_prob.mean()


def seconds(model: nn.Module, x: Tensor) -> float:
    for p in model.parameters():
        p.grad = None
    begin = time.perf_counter()
    loss(model(x), x).backward()
    return time.perf_counter() - begin


def measured(kind: str, transforms: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, SIZE)
    models = {"netwright": ours(kind, transforms, stored=False),
              "netwright, stored": ours(kind, transforms, stored=True),
              "zuko": theirs(kind, transforms)}
    turns: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(TURNS + 2):
        for name, model in models.items():
            taken = seconds(model, x)
            if turn > 1:
                turns[name].append(taken)
    times = {name: statistics.median(taken) for name, taken in turns.items()}
    costs = {name: cost(model, (x, x), loss=loss, repeats=1, warmup=0)
             for name, model in models.items()}
    return {name: {"step_ms": 1000 * times[name], "step_over_zuko": times[name] / times["zuko"],
                   "saved_mib": costs[name].saved_bytes / 2**20,
                   "working_mib": costs[name].working_bytes / 2**20,
                   "parameters": costs[name].parameters} for name in models}


def main() -> None:
    found: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'':34}{'ms a step':>10}{'/ zuko':>8}{'stored MiB':>12}{'working MiB':>13}")
    for kind in ("additive", "affine", "spline"):
        for transforms in (8, 32):
            name = f"{transforms} {kind} couplings"
            found[name] = measured(kind, transforms)
            for contender, row in found[name].items():
                print(f"{name:20} {contender:18}{row['step_ms']:6.1f}"
                      f"{row['step_over_zuko']:8.2f}{row['saved_mib']:12.2f}"
                      f"{row['working_mib']:13.2f}")
    RESULTS.write_text(json.dumps({"size": SIZE, "hidden": [HIDDEN, HIDDEN], "batch": BATCH,
                                   "turns": TURNS, "flows": found, "machine": machine()},
                                  indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
