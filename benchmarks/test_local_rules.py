"""ForwardForward against fflib, MonoForward against backprop, and both against depth.

    python benchmarks/test_local_rules.py

Contenders take turns every few batches of one run; times are those of a turn's median. fflib is
driven by its own suite, data processor and probe, with the settings of its MNIST example (threshold
20, Adam at 0.02, random negative labels), and fed from a list, so that no loader is timed.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from netwright.data import Split, digits, mnist
from netwright.measure import cost
from netwright.models import cnn, mlp
from netwright.rules import Backprop, ForwardForward, MonoForward, Rule
from netwright.runtime.machine import machine

BATCH, EPOCHS, PER_TURN, HIDDEN = 128, 5, 20, (500, 500)


def data() -> tuple[str, Split]:
    if os.environ.get("NETWRIGHT_DATA"):
        return "MNIST", mnist()
    return "digits", digits()


class Ours:
    """Adam at 0.003, falling over the second half of training; no classifier, as in fflib."""

    def __init__(self, width: int, *, fused: bool, hard_negatives: bool) -> None:
        torch.manual_seed(0)
        network = mlp(width, 10, hidden=HIDDEN)[:-1]  # no layer of class scores, as fflib has none
        self.rule = ForwardForward(network, classifier=False, num_classes=10, skip=0,
                                   hard_negatives=hard_negatives)
        self.optimizer = Adam(self.rule.parameters(), lr=3e-3, fused=fused)

    def epoch(self, number: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, 2 * (1 - number / EPOCHS))

    def train(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.rule(x, y)
        self.optimizer.step()

    def predict(self, x: Tensor) -> Tensor:
        return self.rule.predict(x).argmax(1)


class FFLib:
    def __init__(self, width: int) -> None:
        # fflib imports torchvision for its own download of MNIST, which is not used here.
        for name, members in {"torchvision": (), "torchvision.datasets": ("MNIST",),
                              "torchvision.transforms": ("Compose", "ToTensor", "Lambda")}.items():
            module = sys.modules.setdefault(name, ModuleType(name))
            for member in members:
                setattr(module, member, lambda *args, **options: None)
        from fflib.nn.ff_linear import FFLinear
        from fflib.nn.ff_net import FFNet
        from fflib.probes.one_hot import TryAllClasses
        from fflib.utils.data.mnist import FFMNIST, NegativeGenerator
        from fflib.utils.ff_suite import FFSuite

        class InMemory(FFMNIST):
            def __init__(self) -> None:
                self.negative_generator = NegativeGenerator.RANDOM

        torch.manual_seed(0)
        sizes = (width + 10, *HIDDEN)
        net = FFNet([FFLinear(a, b, loss_threshold=20, lr=0.02)
                     for a, b in zip(sizes, HIDDEN, strict=False)], None)
        probe = TryAllClasses(lambda x, y: net(torch.cat((x, y), 1)), output_classes=10)
        self.suite = FFSuite(net, probe, InMemory())

    def epoch(self, number: int) -> None:
        """fflib's example keeps its learning rate."""

    def train(self, x: Tensor, y: Tensor) -> None:
        self.suite._train(x, y)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        return self.suite._test(x)


def against_fflib() -> dict[str, Any]:
    name, split = data()
    x, y, x_test = split.x_train.flatten(1), split.y_train, split.x_test.flatten(1)
    contenders: dict[str, Any] = {
        "fflib 0.3.0": FFLib(x.shape[1]),
        "ForwardForward": Ours(x.shape[1], fused=False, hard_negatives=False),
        "ForwardForward, fused Adam": Ours(x.shape[1], fused=True, hard_negatives=False),
        "ForwardForward, fused Adam, hard negatives":
            Ours(x.shape[1], fused=True, hard_negatives=True),
    }
    turns: dict[str, list[float]] = {key: [] for key in contenders}
    generator = torch.Generator().manual_seed(0)
    for number in range(EPOCHS):
        batches = torch.randperm(len(x), generator=generator).split(BATCH)
        for contender in contenders.values():
            contender.epoch(number)
        for start in range(0, len(batches), PER_TURN):
            turn = [(x[i], y[i]) for i in batches[start:start + PER_TURN]]
            for key, contender in contenders.items():
                begin = time.perf_counter()
                for batch in turn:
                    contender.train(*batch)
                turns[key].append((time.perf_counter() - begin) / len(turn))
    rows = {}
    for key, contender in contenders.items():
        found = torch.cat([contender.predict(part) for part in x_test.split(1000)])
        rows[key] = {"seconds an epoch": statistics.median(turns[key]) * len(x) / BATCH,
                     "times as fast as fflib": statistics.median(turns["fflib 0.3.0"])
                     / statistics.median(turns[key]),
                     "test error (%)": 100 * (found != split.y_test).float().mean().item()}
    return {"data": name, "network": f"{x.shape[1]}-500-500", "epochs": EPOCHS, "contenders": rows}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "digits MLP, 64-256-256-10": (lambda: mlp(64, 10), (64, 1, 8, 8)),
    "digits CNN": (lambda: cnn(1, (8, 8), 10), (64, 1, 8, 8)),
    "784-500-500-10": (lambda: mlp(784, 10, hidden=HIDDEN), (128, 1, 28, 28)),
    "256-wide MLP of 8 stages": (lambda: mlp(256, 10, hidden=(256,) * 7), (128, 256)),
    "256-wide MLP of 32 stages": (lambda: mlp(256, 10, hidden=(256,) * 31), (128, 256)),
}


def step(rule: Rule, x: Tensor, y: Tensor) -> Callable[[], float]:
    optimizer = Adam(rule.parameters())

    def timed() -> float:
        begin = time.perf_counter()
        optimizer.zero_grad()
        rule(x, y)
        optimizer.step()
        return time.perf_counter() - begin
    return timed


def against_backprop() -> dict[str, float]:
    ratios = {}
    for name, (build, size) in NETWORKS.items():
        x, y = torch.rand(size), torch.randint(10, size[:1])
        local, exact = step(MonoForward(build(), x), x, y), step(Backprop(build()), x, y)
        pairs = [(local(), exact()) for _ in range(120)][20:]
        ratios[name] = statistics.median(a for a, _ in pairs) / statistics.median(
            b for _, b in pairs)
    return ratios


def against_depth() -> dict[str, dict[str, float]]:
    batch = torch.rand(128, 256), torch.randint(10, (128,))
    found = {}
    for make in (MonoForward, ForwardForward, Backprop):
        shallow, deep = (cost(make(mlp(256, 10, hidden=(256,) * (depth - 1))), batch, repeats=1,
                              warmup=0).working_bytes for depth in (8, 32))
        found[make.__name__] = {"8 stages": shallow, "32 stages": deep, "ratio": deep / shallow}
    return found


def write(**parts: Any) -> None:
    path = Path(__file__).parent / "results" / "local_rules.json"
    path.parent.mkdir(exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**known, **parts, "machine": machine()}, indent=1) + "\n",
                    encoding="utf-8")


def test_forward_forward_is_half_as_fast_again_as_fflib_at_no_worse_error() -> None:
    found = against_fflib()
    write(against_fflib=found)
    print(f"\n{found['data']}, {found['network']}, batch {BATCH}, after {EPOCHS} epochs")
    print(f"{'':44}{'s/epoch':>9}{'ratio':>8}{'error':>9}")
    for key, row in found["contenders"].items():
        print(f"{key:44}{row['seconds an epoch']:9.2f}{row['times as fast as fflib']:8.2f}"
              f"{row['test error (%)']:8.2f}%")
    peer, ours = (found["contenders"][key] for key in ("fflib 0.3.0", "ForwardForward"))
    assert ours["times as fast as fflib"] >= 1.5
    assert ours["test error (%)"] <= peer["test error (%)"]


def test_a_mono_forward_step_takes_little_longer_than_backprop() -> None:
    found = against_backprop()
    write(mono_forward_step_in_backprop_steps=found)
    for key, ratio in found.items():
        print(f"MonoForward step / Backprop step, {key:30}{ratio:6.2f}")
    # The smallest networks are reported, but there PyTorch's own time for each call decides.
    assert max(ratio for name, ratio in found.items() if "digits" not in name) <= 1.15


def test_working_memory_does_not_grow_with_depth() -> None:
    found = against_depth()
    write(working_bytes=found)
    for key, row in found.items():
        print(f"working bytes of a step, {key:16}" + ", ".join(
            f"{name} {value:.3g}" for name, value in row.items()))
    assert found["MonoForward"]["ratio"] <= 1.15
    assert found["ForwardForward"]["ratio"] <= 1.15


if __name__ == "__main__":
    test_working_memory_does_not_grow_with_depth()
    test_a_mono_forward_step_takes_little_longer_than_backprop()
    test_forward_forward_is_half_as_fast_again_as_fflib_at_no_worse_error()
