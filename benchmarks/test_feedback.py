"""FeedbackAlignment and DirectFeedbackAlignment against Backprop: one step of training, one run.

    python benchmarks/test_feedback.py

The contenders take turns of ten steps each, in an order that is drawn anew, so that none finds the
caches as another left them; figures are a step's median (the rule and the optimizer's step) and
ratios of medians. Inputs are random: their values do not change what a step costs.
"""

import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netwright.measure import cost
from netwright.models import cnn, mlp
from netwright.rules import Backprop, DirectFeedbackAlignment, FeedbackAlignment, Rule
from netwright.runtime.machine import machine

BATCH, STEPS = 128, 10
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "digits MLP, 64-256-256-10": (lambda: mlp(64, 10, hidden=(256, 256)), (64,), 100),
    "MNIST MLP, 784-500-500-10": (lambda: mlp(784, 10, hidden=(500, 500)), (784,), 40),
    "CNN, 3x32x32, 32 and 64 channels, norms": (
        lambda: cnn(3, (32, 32), 10, widths=(32, 64), norm=True), (3, 32, 32), 10),
}
RULES: dict[str, Callable[[nn.Module, Tensor], Rule]] = {
    "Backprop": Backprop,
    "FeedbackAlignment": FeedbackAlignment,
    "FeedbackAlignment, sign_symmetric":
        lambda network, x: FeedbackAlignment(network, x, feedback="sign_symmetric"),
    "FeedbackAlignment, kolen_pollack":
        lambda network, x: FeedbackAlignment(network, x, feedback="kolen_pollack"),
    "DirectFeedbackAlignment": DirectFeedbackAlignment,
    "DirectFeedbackAlignment, shared":
        lambda network, x: DirectFeedbackAlignment(network, x, share=True),
    "DirectFeedbackAlignment, kolen_pollack":
        lambda network, x: DirectFeedbackAlignment(network, x, feedback="kolen_pollack"),
}


def times(name: str) -> dict[str, dict[str, float]]:
    make, size, turns = NETWORKS[name]
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, *size), torch.randint(10, (BATCH,))
    contenders = {}
    for key, build in RULES.items():
        rule = build(make(), x)
        contenders[key] = rule, torch.optim.Adam(rule.parameters(), lr=1e-3)
    taken: dict[str, list[float]] = {key: [] for key in RULES}
    for turn in range(turns + 1):
        for key in random.Random(turn).sample(list(RULES), len(RULES)):
            rule, optimizer = contenders[key]
            for step in range(STEPS + 1):
                start = time.perf_counter()
                optimizer.zero_grad()
                rule(x, y)
                optimizer.step()
                if turn and step:  # the first turn and each turn's first step warm up
                    taken[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(values) for key, values in taken.items()}
    rows = {}
    for key, (rule, _) in contenders.items():
        found = cost(rule, (x, y))
        rows[key] = {"milliseconds a step": round(medians[key] * 1e3, 3),
                     "times Backprop": round(medians[key] / medians["Backprop"], 3),
                     "peak bytes": found.peak_bytes, "saved bytes": found.saved_bytes}
    return rows


def measure() -> dict[str, Any]:
    return {"batch": BATCH, "networks": {name: times(name) for name in NETWORKS},
            "machine": machine()}


def write(found: dict[str, Any]) -> None:
    path = Path(__file__).parent / "results" / "feedback.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, rows in found["networks"].items():
        print(f"{name}, batch {found['batch']}")
        print(f"{'':44}{'ms a step':>12}{'ratio':>8}{'peak MB':>10}{'saved MB':>10}")
        for key, row in rows.items():
            print(f"{key:44}{row['milliseconds a step']:12.3f}{row['times Backprop']:8.3f}"
                  f"{row['peak bytes'] / 1e6:10.2f}{row['saved bytes'] / 1e6:10.2f}")


def test_a_step_takes_at_most_a_tenth_longer_than_backprops() -> None:
    found = measure()
    write(found)
    for name, rows in found["networks"].items():
        for rule in ("FeedbackAlignment", "DirectFeedbackAlignment"):
            assert rows[rule]["times Backprop"] <= 1.1, (name, rule)


if __name__ == "__main__":
    write(measure())
