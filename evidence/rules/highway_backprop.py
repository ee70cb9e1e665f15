import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from netwright.data import CHARACTERS, characters, mnist, tinyshakespeare
from netwright.evidence import Curve, Outcome, Scale, Verdict, evidence
from netwright.models import gpt
from netwright.rules import Backprop, HighwayBackprop, Rule
from netwright.stages import stages

ITERATIONS = (0, 1, 2, 4)
RATES = (1e-3, 3e-3)
HELD_OUT = 5000
NEAR = 1.0  # percentage points


@evidence(paper="001-125", claim="Highway backpropagation trains residual networks in far less "
          "time than backpropagation, with minimal loss of accuracy.",
          shortfall=("scale",
                     "Accuracy stays within a point of backpropagation's from one iteration on "
                     "(92.3 against 92.5 %), and 3 steps wait for one another instead of 18. The "
                     "time itself needs a device for each block: on one core a step takes 1.7 to "
                     "2.7 times backpropagation's. The cosine with the gradient is 0.91 after "
                     "one iteration and 0.98 after two in a trained MLP of 16 blocks, 0.82 and "
                     "0.98 in a transformer of 8."))
def highway_backprop(scale: Scale) -> Outcome:
    """Compare gradients, accuracy and steps one after another by the number of iterations."""
    desk = scale == "desk"
    blocks, steps, seeds = (16, 250, range(1, 4)) if desk else (32, 5000, range(1, 6))
    data = mnist()
    x, y = data.x_train.flatten(1), data.y_train
    inner, held_out = (x[:-HELD_OUT], y[:-HELD_OUT]), (x[-HELD_OUT:], y[-HELD_OUT:])
    test = data.x_test.flatten(1), data.y_test
    makers: dict[str, Callable[[nn.Module], Rule]] = {
        "backpropagation": Backprop, "frozen blocks": _frozen,
        **{f"{k} iterations": _highway(k) for k in ITERATIONS}}
    figures: dict[str, list[float]] = {}
    rates: dict[str, float] = {}
    for name, make in makers.items():
        tried = {rate: _accuracy(_train(make, inner, blocks, steps, rate, 0), held_out)
                 for rate in RATES}
        rates[name] = max(tried, key=tried.__getitem__)
        figures[f"MNIST test accuracy, {name} (%)"] = [
            _accuracy(_train(make, (x, y), blocks, steps, rates[name], seed), test)
            for seed in seeds]

    curves: dict[str, Curve] = {}
    for when, trained in (("before training", 0), ("after training", steps)):
        runs = []
        for seed in seeds:
            rule = _train(Backprop, (x, y), blocks, trained, rates["backpropagation"], seed)
            runs.append(_cosines(rule.network, (x[:256], y[:256]), range(blocks + 1)))
        curves[f"MLP of {blocks} blocks, {when}"] = Curve(list(range(blocks + 1)), runs)
    curves["transformer of 8 blocks, before training"] = _transformer(0)
    curves["transformer of 8 blocks, after training"] = _transformer(150 if desk else 2000)
    for name, curve in curves.items():
        for k in ITERATIONS:
            figures[f"cosine to the gradient, {name}, {k} iterations"] = [run[k]
                                                                          for run in curve.y]

    network = _network(blocks, 0)
    for k in (*ITERATIONS, blocks):
        rule = HighwayBackprop(network, iterations=k)
        rule(x[:64], y[:64])
        figures[f"steps one after another, {k} iterations"] = [rule.sequential_steps]
    figures["steps one after another, backpropagation"] = [len(stages(network))]
    for k in ITERATIONS[1:]:
        figures[f"processor time of a step over backpropagation's, {k} iterations"] = [
            _slowdown(network, (x[:64], y[:64]), k)]

    exact = statistics.fmean(figures["MNIST test accuracy, backpropagation (%)"])
    gain = exact - statistics.fmean(figures["MNIST test accuracy, frozen blocks (%)"])
    behind = {k: exact - statistics.fmean(figures[f"MNIST test accuracy, {k} iterations (%)"])
              for k in ITERATIONS}
    enough = [k for k in ITERATIONS if behind[k] <= min(NEAR, gain / 2)]
    converges = all(run[-1] > 1 - 1e-5 and run[4] > run[0] for c in curves.values() for run in c.y)
    verdict: Verdict = "partly shown" if enough and converges else "not shown"
    return Outcome(
        verdict=verdict,
        setting={"MLP": f"784-32, {blocks} blocks h + linear(relu(linear(norm(h)))), 32-10; "
                        f"{steps} steps of 64 images", "seeds": len(seeds),
                 "transformer": "8 blocks, width 32, context 32, 16 rows of Shakespeare",
                 "optimizer": "Adam", "learning rates tried": list(RATES),
                 "learning rates chosen on held-out images": rates,
                 "near": f"a mean at most {NEAR} points below backpropagation's, and at most half "
                         "as far below as that of frozen blocks",
                 "iterations that were near": enough},
        figures=figures,
        note="Accuracy and the number of steps that wait for one another are measured; the "
             "shorter time is not, since it needs a device for each block: on one core the blocks "
             "run in turn, and a step takes longer than backpropagation's, as the figures say. "
             "That is why the claim is partly shown at most. A step one after another is one "
             "stage's backward pass. The cosine is that of all weights' gradients together. The "
             "networks are small and the training is short; the paper's recurrent networks, its "
             "ResNets and its larger transformers were not run.",
        curves=curves, axes=("iterations", "cosine to the exact gradient"))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(),
                                   nn.Linear(width, width))

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.inner(h)
        return out


def _network(blocks: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(784, 32), *[_Block(32) for _ in range(blocks)],
                         nn.Linear(32, 10))


def _highway(iterations: int) -> Callable[[nn.Module], Rule]:
    return lambda network: HighwayBackprop(network, iterations=iterations)


def _frozen(network: nn.Module) -> Rule:
    for child in list(network.children())[1:-1]:
        child.requires_grad_(False)
    return Backprop(network)


def _train(make: Callable[[nn.Module], Rule], data: tuple[Tensor, Tensor], blocks: int, steps: int,
           rate: float, seed: int) -> Rule:
    rule, (x, y) = make(_network(blocks, seed)), data
    _steps(rule, lambda draw: (x[draw], y[draw]), len(y), 64, steps, rate, seed)
    return rule


def _steps(rule: Rule, batch: Callable[[Tensor], tuple[Any, Tensor]], rows: int, size: int,
           steps: int, rate: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        optimizer.zero_grad()
        rule(*batch(torch.randint(rows, (size,), generator=generator)))
        optimizer.step()


def _accuracy(rule: Rule, data: tuple[Tensor, Tensor]) -> float:
    return 100 * float((rule.predict(data[0]).argmax(1) == data[1]).float().mean())


def _transformer(steps: int) -> Curve:
    data = characters(tinyshakespeare(), context=32)
    x, y, runs = data.x_train, data.y_train, []
    for seed in range(1, 4):
        torch.manual_seed(seed)
        network = gpt(len(CHARACTERS), 32, width=32, depth=8)
        _steps(Backprop(network), lambda draw: (x[draw], y[draw]), len(y), 16, steps, 1e-3, seed)
        runs.append(_cosines(network, (x[:16], y[:16]), range(9)))
    return Curve(list(range(9)), runs)


def _cosines(network: nn.Module, batch: tuple[Tensor, Tensor],
             iterations: range) -> list[float]:
    exact = _gradient(Backprop(network), batch)
    return [float(torch.cosine_similarity(
        _gradient(HighwayBackprop(network, iterations=k), batch), exact, dim=0))
        for k in iterations]


def _gradient(rule: Rule, batch: tuple[Tensor, Tensor]) -> Tensor:
    rule.zero_grad()
    rule(*batch)
    found = torch.cat([p.grad.flatten().double() for p in rule.parameters() if p.grad is not None])
    rule.zero_grad()
    return found


def _slowdown(network: nn.Module, batch: tuple[Tensor, Tensor], iterations: int) -> float:
    """Return the ratio of the medians of steps taken in turn."""
    rules = [HighwayBackprop(network, iterations=iterations), Backprop(network)]
    seconds: list[list[float]] = [[], []]
    for _ in range(30):
        for rule, times in zip(rules, seconds, strict=True):
            rule.zero_grad()
            before = time.process_time()
            rule(*batch)
            times.append(time.process_time() - before)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])
