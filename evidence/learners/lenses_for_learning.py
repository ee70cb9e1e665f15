from copy import deepcopy
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from evidence.learners._compare import difference, digits_lost
from netwright.data import Batches, digits
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.formal.learners import (
    ParaLens,
    boolean_rate,
    exclusive_or,
    learning_rate,
    model,
    mse,
    optimisers,
    softmax_cross_entropy,
    supervised,
)

OPTIMISERS: dict[str, tuple[Any, float, Any]] = {
    "gradient descent": (optimisers.ascent(), 0.1, lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (optimisers.momentum(), 0.05, lambda p: torch.optim.SGD(p, 0.05, 0.9)),
    "Nesterov": (optimisers.nesterov(), 0.05,
                 lambda p: torch.optim.SGD(p, 0.05, 0.9, nesterov=True)),
    "AdaGrad": (optimisers.adagrad(0.02), 1.0, lambda p: torch.optim.Adagrad(p, 0.02)),
    "Adam": (optimisers.adam(0.003), 1.0, lambda p: torch.optim.Adam(p, 0.003)),
}


@evidence(paper="003-145", claim="One framework of lenses covers Adam, AdaGrad, Nesterov momentum, "
          "mean squared error and softmax cross-entropy, and trains Boolean circuits too.")
def lenses_for_learning(scale: Scale) -> Outcome:
    """Compare lens-composed training with torch.optim's, and train circuits by the same code."""
    seeds, steps = (3, 100) if scale == "desk" else (5, 1000)
    figures: dict[str, list[float]] = {}
    curves: dict[str, Curve] = {}
    first, all_steps = [], []
    for (name, optimiser), loss in product(OPTIMISERS.items(), ("cross-entropy", "squared error")):
        runs = [_train(optimiser, loss, seed, steps, torch.float64) for seed in range(seeds)]
        single = [_train(optimiser, loss, seed, 10, torch.float32) for seed in range(seeds)]
        figures[f"largest difference of a weight, 10 steps in float32, {name}, {loss}"] = [
            max(line) for line, _ in single]
        figures[f"largest difference of a weight, {steps} steps in float64, {name}, {loss}"] = [
            max(line) for line, _ in runs]
        figures[f"test accuracy after {steps} steps, {name}, {loss} (%)"] = [
            accuracy for _, accuracy in runs]
        first += [max(line) for line, _ in single]
        all_steps += [max(line) for line, _ in runs]
        if loss == "cross-entropy":
            curves[name] = Curve(list(range(1, steps + 1)),
                                 [[digits_lost(value) for value in line] for line, _ in runs])
    tables = [_tables(bits) for bits in (1, 2, 3)]
    figures["Boolean functions of 1, 2, 3 bits learnt by a table circuit, share"] = tables
    circuits = max(first) < 1e-6 and max(all_steps) < 1e-9, min(tables) == 1
    return Outcome(
        verdict="shown" if all(circuits) else "partly shown" if any(circuits) else "not shown",
        setting={"network": "64-32-10, tanh", "data": "digits, batches of 64",
                 "other side": "torch.optim and torch's losses with the same options",
                 "circuits": "f(p, a) = the bit of p at a; all 4, 16 and 256 functions; "
                 "each input seen once; exclusive or as loss, the identity as learning rate, "
                 "exclusive or as step", "code": "learners.supervised for both"},
        figures=figures,
        note="Shown if no weight differs by 1e-6 in 10 steps of float32 and by 1e-9 in all steps "
             "of float64, and every circuit is learnt. Weights are compared where the gradient is "
             "taken, which for Nesterov's momentum is ahead of those that the lens keeps and is "
             "what torch keeps. The sign of the momentum is torch's.",
        curves=curves, axes=("step", "log10 of the largest difference of a weight"))


def _train(how: tuple[Any, float, Any], loss: str, seed: int, steps: int,
           dtype: torch.dtype) -> tuple[list[float], float]:
    """Return the largest difference after each step, and the accuracy in the end."""
    optimiser, rate, build = how
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).to(dtype)
    theirs = deepcopy(network)
    stepper = build(theirs.parameters())
    squares = loss == "squared error"
    net = supervised(*model(network), loss=mse if squares else softmax_cross_entropy,
                     rate=learning_rate(rate), optimiser=optimiser)
    split = digits()
    batches = Batches(split.x_train.flatten(1).to(dtype), split.y_train, 64, drop_last=True,
                      seed=seed)
    distances: list[float] = []
    while len(distances) < steps:
        for x, y in batches:
            wanted: Tensor = one_hot(y, 10).to(dtype) if squares else y
            net = net.step(x, wanted)
            stepper.zero_grad()
            (mse_loss if squares else cross_entropy)(theirs(x), wanted).backward()
            stepper.step()
            distances.append(difference(optimiser.lens.get(net.params), list(theirs.parameters())))
            if len(distances) == steps:
                break
    right = net(split.x_test.flatten(1).to(dtype)).argmax(1) == split.y_test
    return distances, 100 * right.double().mean().item()


def _tables(bits: int) -> float:
    """Return the share of all functions of some bits that a table learns in one pass."""
    inputs = torch.arange(2 ** bits)

    def put(p: Tensor, a: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(p).index_put((a,), change), torch.zeros_like(a)

    table = ParaLens(lambda p, a: p[a], put)
    learnt = 0
    for number in range(2 ** 2 ** bits):
        truth = (torch.tensor(number) >> inputs & 1).bool()
        net = supervised(torch.zeros(2 ** bits, dtype=torch.bool), table, loss=exclusive_or,
                         rate=boolean_rate, optimiser=optimisers.exclusive_or_ascent())
        for a in inputs.split(1):
            net = net.step(a, truth[a])
        learnt += torch.equal(net(inputs), truth)
    return learnt / 2 ** 2 ** bits
