"""Every rule's step beside backpropagation's, and beside the least that it could take.

    python benchmarks/rules.py

One MLP, one batch, threads as PyTorch sets them. The floor of a rule is the time of its own matrix
products and convolutions: they are recorded in one step, and done again on tensors of the same
shapes with nothing around them. Steps, floors and backpropagation take turns, and a figure is the
median of its turns. Steps are without the optimizer's.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from netwright.catalogue.facets import methods
from netwright.contracts.checks import offered
from netwright.measure import cost
from netwright.models import mlp
from netwright.rules import Rule
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "rules.json"
WIDTH, HIDDEN, CLASSES, BATCH, LIMIT = 784, (1024, 1024), 10, 256, 1.3
ENOUGH = 12.0  # seconds, after which a slow rule is not timed again
# A fixed rank, so that the floor's products are those of every step.
OPTIONS: dict[str, dict[str, Any]] = {"DynamicalLowRank": {"rank": 32, "tolerance": None}}
# Why a rule takes more than `LIMIT` times its floor.
REASONS = {
    "BlockCoordinateDescent": "solves two linear systems for each layer",
    "CounterCurrent": "normalises every layer of both networks to compare them, at the limit",
    "DisinhibitoryHebb": "settles its inhibition in many steps that are elementwise",
    "DynamicalLowRank": "keeps its factors orthonormal by QR decompositions, which count apart",
    "EquilibriumPropagation": "settles in complex numbers, whose activations are no products",
    "ForwardGradient": "draws a normal number for every weight",
    "LikelihoodRatio": "draws a normal number for every activation",
    "PhysicalForwardForward": "compares every layer with a random direction, at the limit",
    "PipelinedBackprop": "keeps the weights of the batches that are still on their way",
    "QuantizedForwardGradient": "draws a normal number for every weight and direction, and rounds",
    "RandomFeatureBoosting": "solves a logistic regression to its end, in float64",
    "SoftHebb": "lets the units compete by a softmax, and takes the norms of the weights",
    "TargetProjection": "compares every layer with its target, elementwise, at the limit",
    "ZerothOrder": "draws a normal number for every weight three times over",
}


class Products(TorchDispatchMode):
    """Record the products of what runs inside, to do them again alone."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in flop_registry:
            again, words = tree_map(_like, (args, kwargs))
            self.calls.append(lambda: func(*again, **words))
        return func(*args, **kwargs)


def _like(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    needed = 1 + sum((n - 1) * step for n, step in zip(leaf.shape, leaf.stride(), strict=True))
    numbers = torch.randn(max(needed, 1)).to(leaf.dtype)
    return numbers.as_strided(leaf.shape, leaf.stride())


def products(step: Callable[[], Any]) -> Callable[[], None]:
    """Return what does the products of `step` alone."""
    with Products() as found:
        step()

    @torch.no_grad()
    def floor() -> None:
        for call in found.calls:
            call()
    return floor


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def contender(kind: Callable[..., Rule], x: Tensor) -> Rule | None:
    """Return a rule on the network, with a smooth activation for those that take no ReLU.

    None for what trains other networks: denoisers, circuits, graphs, recurrent networks.
    """
    options = {**offered(kind, num_classes=CLASSES), **OPTIONS.get(kind.__name__, {})}
    for activation in (nn.ReLU, nn.Tanh):
        torch.manual_seed(0)
        try:
            return kind(mlp(WIDTH, CLASSES, hidden=HIDDEN, activation=activation), x,
                        **options).train()
        except ValueError:
            continue
    return None


def measured() -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    x, y = torch.rand(BATCH, WIDTH), torch.randint(CLASSES, (BATCH,))
    made = {entry.value.__name__: contender(entry.value, x) for entry in methods().values()
            if entry.facets.kind == "rule"}
    contenders = {name: rule for name, rule in made.items() if rule is not None}

    def step(rule: Rule) -> Callable[[], None]:
        def learn() -> None:
            rule.zero_grad()
            rule(x, y)
        return learn
    steps = {name: step(rule) for name, rule in contenders.items()}
    floors = {}
    for name, learn in steps.items():
        learn()
        floors[name] = products(learn)
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(22):
        for name in contenders:
            spent = sum(map(sum, turns[name]))
            if len(turns[name]) < 3 or spent < ENOUGH:
                pair = seconds(steps[name]), seconds(floors[name])
                if turn > 1:
                    turns[name].append(pair)
    times = {name: [statistics.median(column) for column in zip(*pairs, strict=True)]
             for name, pairs in turns.items()}
    costs = {name: cost(rule, (x, y), repeats=1, warmup=0) for name, rule in contenders.items()}
    exact_time, exact_peak = times["Backprop"][0], costs["Backprop"].peak_bytes
    return {name: {"step_ms": 1000 * times[name][0], "step_over_backprop":
                   times[name][0] / exact_time, "step_over_floor": times[name][0] / times[name][1],
                   "peak_over_backprop": costs[name].peak_bytes / exact_peak}
            for name in contenders}


def main() -> None:
    found = measured()
    print(f"{WIDTH}-{'-'.join(map(str, HIDDEN))}-{CLASSES}, batch {BATCH}")
    print(f"{'':26}{'ms a step':>10}{'/ backprop':>12}{'/ floor':>9}{'peak / backprop':>17}")
    for name, row in found.items():
        print(f"{name:26}{row['step_ms']:10.2f}{row['step_over_backprop']:12.2f}"
              f"{row['step_over_floor']:9.2f}{row['peak_over_backprop']:17.2f}"
              f"{'' if row['step_over_floor'] <= LIMIT else '  ' + REASONS.get(name, '?')}")
    RESULTS.write_text(json.dumps({
        "network": [WIDTH, *HIDDEN, CLASSES], "batch": BATCH, "rules": found, "reasons": REASONS,
        "machine": machine()}, indent=1) + "\n", encoding="utf-8")
    missing = [name for name, row in found.items()
               if row["step_over_floor"] > LIMIT and name not in REASONS]
    if missing:
        raise SystemExit(f"more than {LIMIT} times the floor without a reason: "
                         f"{', '.join(missing)}")


if __name__ == "__main__":
    main()
