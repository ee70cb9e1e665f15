"""Step time and stored bytes of forward gradients and NoProp over backpropagation's.

Run `python benchmarks/test_forward_gradient.py`; `pytest benchmarks` runs it smaller.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from netwright.measure import cost
from netwright.models import cnn, mlp
from netwright.rules import Backprop, ForwardGradient, NoProp, Rule
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "forward_gradient.json"
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "784-10": (lambda: mlp(784, 10, hidden=()), (64, 1, 28, 28)),
    "784-1024-1024-10": (lambda: mlp(784, 10, hidden=(1024, 1024)), (64, 1, 28, 28)),
    "CNN 28x28": (lambda: cnn(1, (28, 28), 10), (64, 1, 28, 28)),
}
RULES: dict[str, Callable[[nn.Module, torch.Tensor], Rule]] = {
    "backprop": lambda network, x: Backprop(network),
    "weights, 1": lambda network, x: ForwardGradient(network),
    "weights, 16 vectorised": lambda network, x: ForwardGradient(network, directions=16),
    "weights, 16 in a loop": lambda network, x: ForwardGradient(network, directions=16, chunk=1),
    "activities, 1": lambda network, x: ForwardGradient(network, perturb="activities"),
    "noprop, 10 blocks": lambda network, x: NoProp(network, x),
}


def measure(rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, (build, shape) in NETWORKS.items():
        x, y = torch.randn(shape), torch.randint(10, shape[:1])
        rules = {rule: make(build(), x) for rule, make in RULES.items()}
        times: dict[str, list[float]] = {rule: [] for rule in rules}
        for round in range(rounds + 2):
            for key, rule in rules.items():  # in turns, so that a busy machine slows all alike
                rule.zero_grad()
                start = time.perf_counter()
                rule(x, y)
                if round >= 2:
                    times[key].append(time.perf_counter() - start)
        base = statistics.median(times["backprop"])
        saved = {key: cost(rule, (x, y), repeats=1, warmup=0).saved_bytes
                 for key, rule in rules.items()}
        found[name] = {key: {"step time over backprop's": statistics.median(taken) / base,
                             "bytes stored over backprop's": saved[key] / saved["backprop"]}
                       for key, taken in times.items()}
    return found


def test_forward_gradients_store_nothing() -> None:
    for rules in measure(rounds=1).values():
        for rule in rules:
            if rule.startswith("weights"):
                assert rules[rule]["bytes stored over backprop's"] == 0


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    results = measure(rounds=30)
    for network, rules in results.items():
        print(network)
        for rule, ratios in rules.items():
            print(f"  {rule:24}", "  ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"ratios": results, "machine": machine()}, indent=1) + "\n")
