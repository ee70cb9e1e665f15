"""Training through the reversible solver beside its own stored form and torchdiffeq's adjoint.

    python benchmarks/ode.py

A step is a solve from 0 to 1, a loss and its gradients. The reversible solver takes it by
reconstruction and with all its evaluations stored; torchdiffeq's midpoint method, which has half
the steps and as many evaluations, by its adjoint and stored. The four take turns, and a ratio is
that of their medians, of the processor's time. The floor is what the evaluations alone take, once
without gradients and once with them, over the latter. Then the bytes that the reversible solver
keeps for the backward pass, by the number of steps.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from netwright.generative.flows import odeint
from netwright.measure import cost
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "ode.json"
LIMIT = 1.4
SIZES = {"MLP 2-64-64-2, batch 1024": (2, 64, 1024, 50),
         "MLP 16-128-128-16, batch 512": (16, 128, 512, 30),
         "MLP 64-512-512-64, batch 512": (64, 512, 512, 10)}
WAYS: dict[str, Callable[[int], dict[str, Any]]] = {
    "reversible, reconstructed": lambda n: {"steps": n},
    "reversible, stored": lambda n: {"steps": n, "backward": "store"},
    "torchdiffeq, adjoint": lambda n: {"steps": n // 2, "solver": "midpoint"},
    "torchdiffeq, stored": lambda n: {"steps": n // 2, "solver": "midpoint", "backward": "store"}}
TIMES = torch.tensor([0.0, 1.0])


class Field(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(size + 1, width), nn.Tanh(), nn.Linear(width, width),
                                 nn.Tanh(), nn.Linear(width, size))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat([y, t.expand(len(y), 1)], 1))


class Solve(nn.Module):
    def __init__(self, f: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.f, self.options = f, options

    def forward(self, y: Tensor) -> Tensor:
        return odeint(self.f, y, TIMES, **self.options)[-1]


def evaluated(f: nn.Module, y0: Tensor, steps: int) -> dict[str, float]:
    """Return the seconds of as many evaluations as the reversible solver makes, and no more."""
    t, y, signal = TIMES[0], y0.clone().requires_grad_(), torch.ones_like(y0)
    begin = time.process_time()
    with torch.no_grad():
        for _ in range(steps + 1):
            f(t, y)
    between = time.process_time()
    for _ in range(steps + 1):
        torch.autograd.grad(f(t, y), [y, *f.parameters()], signal)
    return {"evaluations": between - begin,
            "evaluations with gradients": time.process_time() - between}


def times(size: int, width: int, batch: int, steps: int, rounds: int = 16) -> dict[str, float]:
    torch.manual_seed(0)
    f, y0 = Field(size, width), torch.randn(batch, size)
    solves = {name: Solve(f, options(steps)) for name, options in WAYS.items()}
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(rounds + 2):
        order = list(solves) if turn % 2 else list(reversed(solves))
        for name in order:
            f.zero_grad()
            begin = time.process_time()
            solves[name](y0).square().mean().backward()
            if turn > 1:
                found[name].append(time.process_time() - begin)
        for name, taken in evaluated(f, y0, steps).items():
            if turn > 1:
                found.setdefault(name, []).append(taken)
    return {name: statistics.median(taken) for name, taken in found.items()}


def saved(steps: int, name: str) -> int:
    torch.manual_seed(0)
    y, target = torch.randn(2, 256, 2)
    solve = Solve(Field(2, 64), WAYS[name](steps))
    solve(y)  # the first call of a module looks closely
    return cost(solve, (y, target), loss=mse_loss, repeats=1, warmup=0).saved_bytes


def main() -> None:
    found: dict[str, Any] = {"limit": LIMIT, "seconds": {}, "ratios": {}, "saved_bytes": {}}
    for size, arguments in SIZES.items():
        taken = times(*arguments)
        found["seconds"][size] = taken
        ours = taken["reversible, reconstructed"] / taken["reversible, stored"]
        theirs = taken["torchdiffeq, adjoint"] / taken["torchdiffeq, stored"]
        beside = taken["reversible, reconstructed"] / taken["torchdiffeq, adjoint"]
        floor = 1 + taken["evaluations"] / taken["evaluations with gradients"]
        found["ratios"][size] = {"reconstructed to stored": ours, "its floor": floor,
                                 "torchdiffeq's adjoint to its stored": theirs,
                                 "reconstructed to adjoint": beside}
        print(f"{size:29} reconstructed/stored {ours:.2f} (floor {floor:.2f})   "
              f"adjoint/stored {theirs:.2f}   reconstructed/adjoint {beside:.2f}")
    for name in list(WAYS)[:2]:
        found["saved_bytes"][name] = {steps: saved(steps, name) for steps in (8, 32, 128)}
        print(f"{name:28}", found["saved_bytes"][name])
    RESULTS.write_text(json.dumps({**found, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
