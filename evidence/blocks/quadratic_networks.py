import math
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from netwright.blocks.feedforward import QuadraticLinear, relinear_groups
from netwright.evidence import Curve, Outcome, Scale, evidence

DEPTH, WIDTH, LR, GAMMA, LOOKS = 6, 16, 3e-3, 0.1, 6
WAYS = ("random start", "ReLinear", "linear start, one rate", "MLP")


@evidence(paper="001-102", claim="One quadratic neuron separates what no ordinary one does, and "
          "ReLinear lets deep quadratic networks train that collapse from a random start.")
def quadratic_networks(scale: Scale) -> Outcome:
    """Separate rings by one neuron, and two spirals by deep networks."""
    seeds, steps = (3, 600) if scale == "desk" else (10, 6000)
    figures: dict[str, list[float]] = {}
    curves: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        torch.manual_seed(seed)
        rings = _rings(1000)
        for way, neuron in (("quadratic", QuadraticLinear(2, 1)), ("ordinary", nn.Linear(2, 1))):
            found = _trained(neuron, torch.optim.Adam(neuron.parameters(), 0.1), rings, rings, 100)
            figures.setdefault(f"mistakes of one {way} neuron on rings (%)", []).append(found[-1])
        train, test = _spirals(400, seed), _spirals(2000, seed + 1000)
        for way in WAYS:
            torch.manual_seed(seed)
            network = _deep(way)
            optimizer = torch.optim.Adam(relinear_groups(network, LR, GAMMA) if way == "ReLinear"
                                         else network.parameters(), LR)
            found = _trained(network, optimizer, train, test, steps)
            curves[way].append(found)
            figures.setdefault(f"mistakes on spirals, {way} (%)", []).append(found[-1])
            figures[f"parameters, {way}"] = [sum(p.numel() for p in network.parameters())]

    def mistakes(way: str) -> float:
        return mean(figures[f"mistakes on spirals, {way} (%)"])

    separates = (max(figures["mistakes of one quadratic neuron on rings (%)"]) < 1
                 < 20 < min(figures["mistakes of one ordinary neuron on rings (%)"]))
    trains = mistakes("ReLinear") < 10
    collapses = mistakes("random start") > mistakes("ReLinear") + 10
    return Outcome(
        verdict="shown" if separates and trains and collapses else
        "partly shown" if separates else "not shown",
        setting={"rings": "1000 points at radii 1 and 2, Adam 0.1, 100 steps", "spirals":
                 "two, of one and a half turns, noise 0.02; 400 points to train, 2000 to test",
                 "networks": f"{DEPTH} layers of {WIDTH} ReLU units; the MLP as wide as gives the "
                 "same number of parameters", "training": f"Adam {LR}, all points, {steps} steps; "
                 f"ReLinear: gamma = {GAMMA}"},
        figures=figures,
        note="Shown is one quadratic neuron with less than 1 % of mistakes on the rings where an "
             "ordinary one makes more than 20 %, ReLinear with less than 10 % on the spirals, and "
             "a random start with 10 points more. A network whose outputs are no longer finite "
             "counts as 50 %.",
        curves={way: Curve([steps * (i + 1) / LOOKS for i in range(LOOKS)], runs)
                for way, runs in curves.items()},
        axes=("step", "mistakes on held-out spirals (%)"))


def _deep(way: str) -> nn.Sequential:
    parts: list[nn.Module] = []
    width = 29 if way == "MLP" else WIDTH
    start = "random" if way == "random start" else "linear"
    for before, after in zip([2, *[width] * (DEPTH - 1)], [*[width] * (DEPTH - 1), 1], strict=True):
        parts += [nn.Linear(before, after) if way == "MLP" else
                  QuadraticLinear(before, after, start=start),  # type: ignore[arg-type]
                  nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def _rings(n: int) -> tuple[Tensor, Tensor]:
    angle, outer = 2 * math.pi * torch.rand(n), torch.arange(n) % 2
    x = torch.stack([angle.cos(), angle.sin()], 1) * (1 + outer)[:, None]
    return x + 0.05 * torch.randn(n, 2), outer.float()


def _spirals(n: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    along, which = torch.rand(n, generator=draw).sqrt(), torch.arange(n) % 2
    angle = 3 * math.pi * along + math.pi * which
    x = along[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return x + 0.02 * torch.randn(n, 2, generator=draw), which.float()


def _trained(network: nn.Module, optimizer: torch.optim.Optimizer, train: tuple[Tensor, Tensor],
             test: tuple[Tensor, Tensor], steps: int) -> list[float]:
    found = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(network(train[0])[:, 0], train[1]).backward()
        optimizer.step()
        if step * LOOKS % steps < LOOKS:
            with torch.no_grad():
                logits = network(test[0])[:, 0]
            wrong = float(((logits > 0) != (test[1] > 0)).float().mean())
            found.append(100 * wrong if bool(logits.isfinite().all()) else 50.0)
    return found
