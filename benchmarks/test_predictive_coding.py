"""PredictiveCoding against the installed peers: same network, same batches, one run.

    python benchmarks/test_predictive_coding.py

Ten rounds of ten batches, the contenders taking turns; figures are seconds for 100 batches (ten
times a round's median) and ratios of medians. netwright's rules run at their defaults under
PyTorch's fused Adam at 1e-3. The peers bring their own training loops and run as their READMEs
say, torch-pc also with more steps, which trains it better; they are fed from a list, so that no
loader is timed. pcn-torch ends every batch with a free inference of 500 steps that measures
accuracy and changes no weight: `lean` cuts it down to one step, and the full one, which trains the
same, takes every fifth turn only. The peers' networks predict from the label to the image, and
need an inference to classify: accuracies are those of their own test functions.
"""

import contextlib
import io
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netwright.data import Split, digits, mnist
from netwright.rules import Backprop, PredictiveCoding, Rule
from netwright.runtime.machine import machine

BATCH, ROUNDS, PER_ROUND, TESTED = 128, 10, 10, 1000
FULL, LEAN = "pcn-torch 1.1.0", "pcn-torch 1.1.0, lean"
Batches = list[tuple[Tensor, Tensor]]


def data() -> tuple[str, Split]:
    if os.environ.get("NETWRIGHT_DATA"):
        return "MNIST", mnist()
    return "digits", digits()


def network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
                         nn.Linear(512, 10))


def share(scores: Tensor, y: Tensor) -> float:
    return (scores.argmax(1) == y).float().mean().item()


class Ours:
    def __init__(self, rule: Rule) -> None:
        self.rule, self.optimizer = rule, torch.optim.Adam(rule.parameters(), lr=1e-3,
                                                            fused=True)

    def train(self, batches: Batches) -> None:
        for x, y in batches:
            self.optimizer.zero_grad()
            self.rule(x, y)
            self.optimizer.step()

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        return share(self.rule.predict(x), y)


class TorchPC:
    """The settings of the README of torch-pc, but for the steps that are given."""

    def __init__(self, width: int, *, infer_steps: int = 10, learn_steps: int = 3) -> None:
        from torch_pc.module import PCNetwork
        torch.manual_seed(0)
        self.model = PCNetwork(dims=[width, 512, 512], output_dim=10)
        self.infer_steps, self.learn_steps = infer_steps, learn_steps

    def train(self, batches: Batches) -> None:
        from torch_pc.training import train_pcn
        train_pcn(model=self.model, data_loader=batches, num_epochs=1, eta_infer=0.1,
                  eta_learn=0.01, infer_steps=self.infer_steps, T_learn=self.learn_steps,
                  device="cpu")

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        from torch_pc.training import test_pcn_classify
        return test_pcn_classify(model=self.model, data_loader=[(x, y)], infer_steps=300,
                                 eta_infer=0.1, device="cpu")[0]


class PCNTorch:
    """The settings of the README of pcn-torch; its learning steps default to the batch size."""

    def __init__(self, width: int, *, lean: bool) -> None:
        from pcn_torch import PredictiveCodingNetwork, TrainCallback, TrainConfig
        torch.manual_seed(0)
        self.model = PredictiveCodingNetwork(dims=[width, 512, 512], activation="relu",
                                             output_dim=10, mode="classification")
        self.config, self.tested = (
            TrainConfig(task="classification", T_infer=50, T_infer_test=steps, lr_infer=0.05,
                        lr_learn=0.005, num_epochs=1, callback=TrainCallback())
            for steps in (1 if lean else None, None))

    def train(self, batches: Batches) -> None:
        from pcn_torch import train_pcn
        train_pcn(self.model, batches, self.config)

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        from pcn_torch import test_pcn
        return test_pcn(self.model, [(x, y)], self.tested)["accuracy"]


def measure() -> dict[str, Any]:
    name, split = data()
    x, y = split.x_train.flatten(1), split.y_train
    x_test, y_test = split.x_test.flatten(1), split.y_test
    width = x.shape[1]
    order = torch.arange(ROUNDS * PER_ROUND * BATCH) % len(x)
    batches = [(x[i], y[i]) for i in order.split(BATCH)]
    contenders: dict[str, Any] = {
        "netwright PredictiveCoding": Ours(PredictiveCoding(network(width))),
        "netwright PredictiveCoding, incremental":
            Ours(PredictiveCoding(network(width), incremental=True)),
        "netwright Backprop": Ours(Backprop(network(width))),
        "torch-pc 0.1.0": TorchPC(width),
        "torch-pc 0.1.0, 20 + 10 steps": TorchPC(width, infer_steps=20, learn_steps=10),
        FULL: PCNTorch(width, lean=False),
        LEAN: PCNTorch(width, lean=True),
    }
    times: dict[str, list[float]] = {key: [] for key in contenders}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # torch-pc asks for CUDA's autocast on any machine
        for i in range(ROUNDS):
            for key, contender in contenders.items():
                if key == FULL and i % 5:
                    continue
                start = time.perf_counter()
                contender.train(batches[i * PER_ROUND:(i + 1) * PER_ROUND])
                times[key].append(time.perf_counter() - start)
        scores = {key: contender.accuracy(x_test[:TESTED], y_test[:TESTED])
                  for key, contender in contenders.items() if key != FULL}
    median = {key: statistics.median(values) for key, values in times.items()}
    ours = median["netwright PredictiveCoding"]
    return {
        "data": name, "network": f"{width}-512-512-10", "batch": BATCH, "tested": TESTED,
        "contenders": {key: {"seconds for 100 batches": 100 / PER_ROUND * median[key],
                             "times PredictiveCoding": median[key] / ours,
                             "accuracy after 100 batches": scores.get(key, scores[LEAN])}
                       for key in contenders},
        "after one epoch": {
            key: [epoch(make, x, y, x_test, y_test, seed) for seed in range(3)]
            for key, make in RULES.items()},
        "machine": machine(),
    }


RULES: dict[str, Callable[[nn.Module], Rule]] = {
    "PredictiveCoding": PredictiveCoding,
    "PredictiveCoding, incremental": lambda net: PredictiveCoding(net, incremental=True),
    "Backprop": Backprop,
}


def epoch(make: Callable[[nn.Module], Rule], x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor,
          seed: int) -> float:
    trained = network(x.shape[1])
    torch.manual_seed(seed)
    for layer in trained[::2]:
        layer.reset_parameters()
    ours = Ours(make(trained))
    ours.train([(x[i], y[i]) for i in torch.randperm(len(x)).split(BATCH)])
    return ours.accuracy(x_test, y_test)


def write(found: dict[str, Any]) -> None:
    path = Path(__file__).parent / "results" / "predictive_coding.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{found['data']}, {found['network']}, batch {found['batch']}")
    print(f"{'':42}{'s / 100 batches':>16}{'ratio':>8}{'accuracy':>10}")
    for key, row in found["contenders"].items():
        print(f"{key:42}{row['seconds for 100 batches']:16.2f}"
              f"{row['times PredictiveCoding']:8.2f}{row['accuracy after 100 batches']:10.1%}")
    for key, scores in found["after one epoch"].items():
        print(f"after one epoch, {key}: {', '.join(f'{score:.2%}' for score in scores)}")


def test_predictive_coding_is_eight_times_as_fast_as_its_peers() -> None:
    found = measure()
    write(found)
    for peer in ("torch-pc 0.1.0", FULL, LEAN):
        assert found["contenders"][peer]["times PredictiveCoding"] >= 8, peer
    if found["data"] == "MNIST":
        assert min(found["after one epoch"]["PredictiveCoding"]) >= 0.95


if __name__ == "__main__":
    write(measure())
