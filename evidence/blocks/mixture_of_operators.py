from itertools import pairwise
from statistics import mean

import torch
from torch import Tensor, nn

from netwright.blocks.experts import CentroidRouter, MixtureOfExperts, Routing
from netwright.blocks.feedforward import FeedForward
from netwright.evidence import Curve, Outcome, Scale, evidence

POINTS, MODES, HIDDEN, MANY = 32, 3, 8, (1, 4, 16)
LESS = 0.8


class WithoutGeometry(nn.Module):
    """A router that is as even, and sends neighbours anywhere."""

    def __init__(self, n_experts: int, draw: torch.Generator) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.register_buffer("direction", torch.randn(POINTS, generator=draw))

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        """Return an expert by the digits of a projection that come late."""
        place = (1000 * x.detach() @ self.get_buffer("direction")).remainder(1)
        experts = (place * self.n_experts).long().clamp(max=self.n_experts - 1)
        return Routing(experts[:, None], x.new_ones(len(x), 1))


@evidence(paper="002-138", claim="With experts of a fixed size, chosen by the nearest centroid, "
          "the error in learning an operator falls as experts are added, below that of one of that "
          "size.")
def mixture_of_operators(scale: Scale) -> Outcome:
    """Learn a Lipschitz operator on random Fourier functions with 1, 4 and 16 small experts."""
    seeds, steps = (3, 1500) if scale == "desk" else (10, 10000)
    ways = [f"{n} by centroids" for n in MANY] + [f"{MANY[-1]} without geometry"]
    found: dict[str, list[float]] = {way: [] for way in ways}
    traces: dict[str, list[list[float]]] = {way: [] for way in ways}
    looks = [steps * (i + 1) // 6 for i in range(6)]
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        x, test = _functions(4096, draw), _functions(1024, draw)
        for way in ways:
            n = int(way.split()[0])
            torch.manual_seed(seed)
            router: nn.Module = (CentroidRouter.of(x, n, generator=draw) if "centroids" in way
                                 else WithoutGeometry(n, draw))
            trace = _trained(MixtureOfExperts(
                POINTS, lambda: FeedForward(POINTS, HIDDEN), router, n_experts=n),
                x, test, steps, looks, seed)
            traces[way].append(trace)
            found[way].append(trace[-1])
    falls = all(found[a][i] > found[b][i] for a, b in pairwise(ways[:3])
                for i in range(seeds))
    less = mean(found[ways[2]]) < LESS * mean(found[ways[0]])
    control = mean(found[ways[2]]) < LESS * mean(found[ways[3]])
    return Outcome(
        verdict="shown" if falls and less and control else "partly shown" if falls else
        "not shown",
        setting={"operator": "G(u)(t) = |u(t) - u(t - 1/4)| + sin(2 u(t))", "functions":
                 f"{MODES} Fourier modes with coefficients N(0, 1/k^2), at {POINTS} points; 4096 "
                 "to train, 1024 held out", "experts": f"two layers, hidden {HIDDEN}", "training":
                 f"{steps} steps of 512 functions, Adam 1e-2 falling to 0", "routers":
                 "k-means of the training functions; the control sends neighbours anywhere"},
        figures={f"held-out relative error, {way}": found[way] for way in ways},
        curves={way: Curve(looks, traces[way]) for way in ways},
        axes=("step", "held-out relative error"),
        note="Shown is an error that falls from 1 to 4 and from 4 to 16 experts under every seed, "
             f"and with 16 is below {LESS} of one expert's and of that of 16 whose router knows no "
             "geometry; partly shown, the first. The paper's bounds on size as a function of "
             "accuracy are not measured.")


def _functions(n: int, draw: torch.Generator) -> Tensor:
    """Return n random functions (n, points)."""
    t = torch.arange(POINTS) / POINTS
    k = torch.arange(1, MODES + 1)
    angles = 2 * torch.pi * k[:, None] * t
    a, b = (torch.randn(n, MODES, generator=draw) / k for _ in range(2))
    return a @ angles.cos() + b @ angles.sin()


def _operator(u: Tensor) -> Tensor:
    return (u - u.roll(POINTS // 4, 1)).abs() + (2 * u).sin()


def _trained(network: nn.Module, x: Tensor, test: Tensor, steps: int, looks: list[int],
             seed: int) -> list[float]:
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    draw, found = torch.Generator().manual_seed(seed), []
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (512,), generator=draw)
        optimizer.zero_grad()
        (network(x[rows]) - _operator(x[rows])).square().mean().backward()
        optimizer.step()
        falling.step()
        if step in looks:
            with torch.no_grad():
                error = (network(test) - _operator(test)).norm() / _operator(test).norm()
            found.append(float(error))
    return found
