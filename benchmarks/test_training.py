"""What `fit` with `Backprop` costs beside a bare PyTorch loop.

    python benchmarks/test_training.py

Both train the same network from the same weights on the same tensors in the same order, with
Adam. They take turns, in an order that changes, and the ratio is that of their median times.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import netwright as nw
from netwright.data import Batches, digits
from netwright.models import cnn
from netwright.rules import Backprop
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "training.json"
LIMITS = {"MLP 64-256-256-10": 1.03, "CNN": 1.01}
Data = list[tuple[Tensor, Tensor]]


def networks() -> dict[str, Callable[[], nn.Module]]:
    return {"MLP 64-256-256-10": lambda: nn.Sequential(
                nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
                nn.Linear(256, 10)),
            "CNN": lambda: cnn(1, (8, 8), 10)}


def bare(network: nn.Module, data: Data, epochs: int) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    network.train()
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            loss = cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()


def fitted(network: nn.Module, data: Data, epochs: int) -> None:
    nw.fit(Backprop(network), data, epochs=epochs,
           optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))


def compare(make: Callable[[], nn.Module], data: Data, *, epochs: int, rounds: int) -> dict:
    times: dict[str, list[float]] = {"bare": [], "fit": []}
    contenders = [("bare", bare), ("fit", fitted)]
    for round_ in range(rounds + 1):
        for name, train in contenders if round_ % 2 else reversed(contenders):
            torch.manual_seed(0)
            network = make()
            start = time.perf_counter()
            train(network, data, epochs)
            if round_:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    steps = epochs * len(data)
    pairs = [b / a for a, b in zip(times["bare"], times["fit"], strict=True)]
    return {"steps": steps, "rounds": rounds,
            "bare_us_per_step": statistics.median(times["bare"]) / steps * 1e6,
            "fit_us_per_step": statistics.median(times["fit"]) / steps * 1e6,
            "ratio_of_medians": statistics.median(times["fit"]) / statistics.median(times["bare"]),
            "ratio_of_minima": min(times["fit"]) / min(times["bare"]),
            "median_of_ratios": statistics.median(pairs)}


def main() -> None:
    split = digits()
    data = list(Batches(split.x_train, split.y_train, 128))
    found = {}
    for name, make in networks().items():
        rounds, epochs = (61, 20) if name.startswith("MLP") else (61, 10)
        found[name] = compare(make, data, epochs=epochs, rounds=rounds) | {"limit": LIMITS[name]}
        print(f"{name:20} bare {found[name]['bare_us_per_step']:8.0f} us/step  "
              f"fit {found[name]['fit_us_per_step']:8.0f} us/step  "
              f"ratio {found[name]['ratio_of_medians']:.3f} (at most {LIMITS[name]})")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine(), "results": found}, indent=1) + "\n",
                       encoding="utf-8")


def test_fit_takes_little_more_than_a_bare_loop(benchmark: Callable) -> None:
    split = digits()
    data = list(Batches(split.x_train, split.y_train, 128))
    benchmark.pedantic(fitted, setup=lambda: ((networks()["MLP 64-256-256-10"](), data, 2), {}),
                       rounds=5)


if __name__ == "__main__":
    main()
