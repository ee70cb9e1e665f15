import math
from itertools import pairwise

import numpy
import torch
from torch import Generator, Tensor
from torch.nn import Parameter

from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.optim import BlockProximalDescent, stationarity_gap

SHAPE, RANK, SWEEPS, WEIGHT, FROM = (10, 9, 8), 3, 200, 0.1, 10
SOLVES = {"exact": {"tolerance": 1e-9, "inner_steps": 500},
          "inexact": {"tolerance": 1.0, "inner_steps": 20}}


@evidence(paper="003-125", claim="Block coordinate descent with proximal regularisation reaches an "
          "epsilon-stationary point within about 1/epsilon sweeps, with exact or inexact solves.")
def block_proximal_descent(scale: Scale) -> Outcome:
    """Factorise a nonnegative tensor; follow the least stationarity gap over the sweeps."""
    seeds = range(3 if scale == "desk" else 10)
    figures: dict[str, list[float]] = {}
    curves: dict[str, Curve] = {}
    squared, plain, rises = [], [], []
    shown = [k for k in (1, 2, 5, 10, 20, 50, 100, 150, 200) if k <= SWEEPS]
    for name, options in SOLVES.items():
        runs = [_run(options, seed) for seed in seeds]
        curves[name] = Curve([math.log10(k) for k in shown], [
            [math.log10(gaps[k - 1]) for k in shown] for gaps, _ in runs])
        slopes = [_slope(gaps) for gaps, _ in runs]
        figures[f"{name}: slope of log(least gap) by log(k)"] = slopes
        # 1 where the bound of the first sweeps holds for all, above it where it is broken.
        worst = [[max((gaps[k - 1] ** power) * k for k in range(FROM, SWEEPS + 1)) /
                  max((gaps[k - 1] ** power) * k for k in range(1, FROM + 1)) for gaps, _ in runs]
                 for power in (2, 1)]
        figures[f"{name}: largest gap² k from sweep {FROM} on / before"] = worst[0]
        figures[f"{name}: largest gap k from sweep {FROM} on / before"] = worst[1]
        figures[f"{name}: last least gap"] = [gaps[-1] for gaps, _ in runs]
        figures[f"{name}: last relative error"] = [math.sqrt(2 * losses[-1]) for _, losses in runs]
        squared += [ratio <= 1 for ratio in worst[0]]
        plain += [ratio <= 1 for ratio in worst[1]]
        rises += [max((b - a) for a, b in pairwise(losses)) for _, losses in runs]
    figures["largest rise of the loss in a sweep"] = rises
    falls = max(rises) <= 1e-12
    return Outcome(
        verdict=("shown" if all(squared) and falls else
                 "partly shown" if any(squared) else "not shown"),
        setting={"tensor": f"{' x '.join(map(str, SHAPE))} of nonnegative rank {RANK}, with noise "
                 "of a tenth, its norm 1", "factors": f"rank {RANK}, nonnegative, drawn at random",
                 "prox_weight": WEIGHT, "sweeps": SWEEPS,
                 "solves": "exact: to 1e-9 / (sweep + 1); inexact: to 1 / (sweep + 1), at most 20 "
                 "inner steps"},
        figures=figures,
        note="A point is epsilon-stationary where its gap is at most the root of epsilon, so the "
             "claim is that gap² is at most C/k. Shown means that the C of the first "
             f"{FROM} sweeps holds for all {SWEEPS}, with every seed and both solves, and that no "
             "sweep raised the loss. Whether the gap itself stays below such a C/k, which is more "
             f"than is claimed, held in {sum(plain)} of {len(plain)} runs.",
        curves=curves, axes=("log10 of the sweep", "log10 of the least gap"))


def _run(options: dict[str, float], seed: int) -> tuple[list[float], list[float]]:
    """Return the least gap so far and the loss after each sweep."""
    generator = Generator().manual_seed(seed)
    true = [torch.rand(n, RANK, generator=generator).double() for n in SHAPE]
    tensor = torch.einsum("ir,jr,kr->ijk", *true)
    noise = torch.rand(SHAPE, generator=generator).double()
    tensor = tensor / tensor.norm() + 0.1 * noise / noise.norm()
    tensor = tensor / tensor.norm()
    parts = [Parameter(torch.rand(n, RANK, generator=generator).double()) for n in SHAPE]

    def loss() -> Tensor:
        return (tensor - torch.einsum("ir,jr,kr->ijk", *parts)).square().sum() / 2

    optimizer = BlockProximalDescent(parts, constraint="nonnegative", prox_weight=WEIGHT,
                                     tolerance=options["tolerance"],
                                     inner_steps=int(options["inner_steps"]))
    gaps: list[float] = []
    losses = []
    for _ in range(SWEEPS):
        optimizer.step(loss)
        losses.append(float(loss().detach()))
        gap = stationarity_gap(loss, parts, constraint="nonnegative")
        gaps.append(min([gap, *gaps[-1:]]))
    return gaps, losses


def _slope(gaps: list[float]) -> float:
    k = numpy.arange(FROM, len(gaps) + 1)
    return float(numpy.polyfit(numpy.log(k), numpy.log(gaps[FROM - 1:]), 1)[0])
