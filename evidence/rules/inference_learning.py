import math
import statistics

import torch
from torch import Tensor, nn
from torch.func import functional_call

from netwright.data import Split, digits
from netwright.evidence import Curve, Outcome, Scale, Verdict, evidence
from netwright.objectives.losses import cross_entropy
from netwright.rules import Backprop, InferenceLearning, Rule
from netwright.stages import Stages, stages

PROXIMAL_RATES, SWEEP, BATCH, EVERY = (0.1, 1.0, 10.0), (0.1, 1.0, 10.0, 100.0), 4, 30
RULES = ("InferenceLearning", "backpropagation")


@evidence(paper="003-179", claim="Inference learning takes nearly the step of implicit SGD, "
          "nearer than backpropagation's, and so does not diverge at learning rates at which SGD "
          "does.")
def inference_learning(scale: Scale) -> Outcome:
    """Compare steps with the solved proximal one; train at rates from 0.1 to 100."""
    samples, steps, seeds = (2, 120, 3) if scale == "desk" else (50, 1000, 5)
    data = digits()
    figures: dict[str, list[float]] = {}
    curves: dict[str, Curve] = {}
    nearer: list[bool] = []
    for rate in PROXIMAL_RATES:
        pairs = [_cosines(data, rate, seed, samples) for seed in range(seeds)]
        found = {name: [pair[name] for pair in pairs] for name in RULES}
        for name, cosines in found.items():
            figures[f"cosine with the proximal step, rate {rate:g}, {name}"] = cosines
        nearer.append(all(a > b for a, b in zip(*(found[name] for name in RULES), strict=True)))
    held: list[bool] = []
    broke: list[bool] = []
    marks = list(range(EVERY, steps + 1, EVERY))
    for rate in SWEEP:
        for name in RULES:
            runs = [_train(name, data, rate, seed, steps) for seed in range(seeds)]
            stayed = [all(map(math.isfinite, losses)) and losses[-1] < 10 * losses[0]
                      for losses, _ in runs]
            (held if name == "InferenceLearning" else broke).append(
                all(stayed) if name == "InferenceLearning" else not all(stayed))
            figures[f"test accuracy, rate {rate:g}, {name} (%)"] = [rights[-1]
                                                                    for _, rights in runs]
            figures[f"runs that diverged of {seeds}, rate {rate:g}, {name}"] = [
                float(seeds - sum(stayed))]
            curves[f"{name}, rate {rate:g}"] = Curve(marks, [rights[1:] for _, rights in runs])
    claims = all(nearer), all(held) and any(broke)
    verdict: Verdict = "shown" if all(claims) else "partly shown" if any(claims) else "not shown"
    return Outcome(
        verdict=verdict,
        setting={"data": "scikit-learn's digits", "network": "64-32-32-10, tanh, in float64, cut "
                 "so that each stage begins with its activation",
                 "proximal step": f"solved by L-BFGS for one sample at a time; mean of {samples} "
                                  "samples at the weights at the start; 60 steps of the states",
                 "training": f"SGD, {steps} batches of {BATCH}, 25 steps of the states",
                 "diverged": "the test loss is not finite, or above ten times that at the start",
                 "seeds": seeds, "nearer at every rate and seed, by rate": nearer,
                 "no divergence, by rate": held, "SGD on backprop's gradient diverged, by rate":
                 broke},
        figures=figures,
        note="The paper compares more algorithms, on larger images. Here the states settle by "
             "gradient steps that are shortened where they would raise the energy, and a sample's "
             "n_i takes part in it; with that the energy is the proximal problem itself. For a "
             "batch the step is the mean of its samples' and no longer the batch's proximal one.",
        curves=curves, axes=("batch", "test accuracy (%)"))


def _network(seed: int) -> tuple[nn.Sequential, Stages]:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32),
                            nn.Tanh(), nn.Linear(32, 10)).double()
    return network, stages(network, cuts=["0", "2", "4"])


def _rule(name: str, chain: Stages, rate: float, steps: int) -> Rule:
    return InferenceLearning(chain, rate=rate, steps=steps) if name == "InferenceLearning" \
        else Backprop(chain)


def _cosines(data: Split, rate: float, seed: int, samples: int) -> dict[str, float]:
    """Return how well each rule's step points along the proximal one, the mean over samples."""
    network, chain = _network(seed)
    found: dict[str, list[float]] = {name: [] for name in RULES}
    for i in range(samples):
        x, y = data.x_train[i:i + 1].double(), data.y_train[i:i + 1]
        proximal = _proximal(network, x, y, rate)
        for name, cosines in found.items():
            network.zero_grad()
            _rule(name, chain, rate, 60)(x, y)
            step = torch.cat([-p.grad.flatten() for p in network.parameters()
                              if p.grad is not None])
            cosines.append(float(torch.cosine_similarity(step, proximal, dim=0)))
    return {name: statistics.fmean(cosines) for name, cosines in found.items()}


def _proximal(network: nn.Module, x: Tensor, y: Tensor, rate: float) -> Tensor:
    """Return argmin_d L(w + d) + |d|^2 / (2 rate)."""
    names = [name for name, _ in network.named_parameters()]
    start = [p.detach() for p in network.parameters()]
    shifts = [torch.zeros_like(p, requires_grad=True) for p in start]
    optimizer = torch.optim.LBFGS(shifts, max_iter=300, tolerance_grad=1e-9,
                                  tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def problem() -> Tensor:
        optimizer.zero_grad()
        moved = {name: p + d for name, p, d in zip(names, start, shifts, strict=True)}
        size = torch.stack([d.square().sum() for d in shifts]).sum()
        value = cross_entropy(functional_call(network, moved, x), y) + size / (2 * rate)
        value.backward()
        return value
    optimizer.step(problem)
    return torch.cat([d.detach().flatten() for d in shifts])


def _train(name: str, data: Split, rate: float, seed: int,
           steps: int) -> tuple[list[float], list[float]]:
    """Return the test loss and accuracy at the start and after each `EVERY` batches."""
    network, chain = _network(seed)
    rule = _rule(name, chain, rate, 25)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    losses, rights = [], []
    for step in range(steps + 1):
        if step % EVERY == 0:
            logits = rule.predict(data.x_test.double())
            losses.append(float(cross_entropy(logits, data.y_test)))
            rights.append(100 * float((logits.argmax(1) == data.y_test).double().mean()))
        if step < steps and math.isfinite(losses[-1]):
            chosen = torch.randint(len(data.y_train), (BATCH,))
            optimizer.zero_grad()
            rule(data.x_train[chosen].double(), data.y_train[chosen])
            optimizer.step()
    return losses, rights
