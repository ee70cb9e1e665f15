import math
from statistics import mean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.generative.flows import Flow, LipSwish, ResidualTransform

BEST, SQUARE = math.log(32), math.log(64)  # the entropies of the board and of its square
EVERY = 60


@evidence(paper="001-072", claim="Residual flows with a Russian-roulette log-determinant are "
          "trained without bias, and fit densities; a truncated series is biased.",
          shortfall=("scale",
                     "Roulette is unbiased and two terms are biased, as claimed, and the inverse "
                     "is exact. The density is not learnt in 300 steps of 8 blocks: 4.49, 4.33, "
                     "4.22, 4.19 and 4.17 nats, where the uniform square has 4.16 and the board "
                     "3.47, and the rate falls to 0 by then. The paper trains 100 blocks for "
                     "50,000 steps on such data."))
def residual_flow(scale: Scale) -> Outcome:
    """Train on a checkerboard by roulette and by a short series; compare with the determinant."""
    seeds, steps, draws = (3, 300, 60) if scale == "desk" else (5, 20_000, 10_000)
    figures: dict[str, list[float]] = {}
    curves: dict[str, Curve] = {}
    held: list[list[float]] = []
    for way in ("roulette", "series"):
        losses = []
        for seed in range(seeds):
            flow, curve = _trained(way, seed, steps)
            losses.append(curve)
            for name, value in _looked_at(flow, seed, draws, way).items():
                figures.setdefault(f"{name}, trained by {way}", []).append(value)
        held.append([curve[-1] for curve in losses])
        curves[f"trained by {way}"] = Curve(list(range(EVERY, steps + 1, EVERY)), losses)
        figures[f"exact negative log-likelihood on held-out points, trained by {way} (nats)"] = [
            curve[-1] for curve in losses]
    off = "mean of {} less the determinant, standard errors, trained by {}"
    unbiased = max(map(abs, figures[off.format("roulette", "roulette")]))
    biased = min(map(abs, figures[off.format("the 2-term series", "series")]))
    inverse = max(figures["largest error of the inverse in float32, trained by roulette"])
    parts = [unbiased <= 4 and biased >= 8, inverse < 1e-5,
             mean(held[0]) <= (BEST + SQUARE) / 2]
    return Outcome(
        verdict="shown" if all(parts) else "partly shown" if any(parts) else "not shown",
        setting={"network": "8 residual transforms, each 2-48-48-2 with LipSwish, layers bounded "
                 "by 0.98", "training": f"{steps} steps of 256 new points, Adam 1e-2, the rate "
                 "falling to 0 over the last half, gradients clipped to norm 1",
                 "series": "2 terms, in training and when compared", "draws":
                 f"{draws} of the whole flow's log-determinant at 256 points, in float64"},
        figures=figures,
        note="Shown is: roulette's mean over points and draws within 4 of its standard errors of "
             "the dense determinant's for every seed, while a flow trained by a series of 2 terms "
             "has that series off by 8 or more; the fixed-point "
             "inverse off by less than 1e-5; a held-out negative log-likelihood at least half of "
             f"the way from the square's {SQUARE:.3f} to the board's {BEST:.3f} nats. Every "
             "likelihood is by the dense determinant, whatever it was trained by. The paper "
             "trains 100 blocks for 50,000 steps on such data.",
        curves=curves, axes=("step", "exact negative log-likelihood (nats)"))


def _board(n: int, draw: torch.Generator) -> Tensor:
    """Return points of a 4 x 4 checkerboard on [-4, 4]^2, 2 by 2 each square."""
    column = torch.randint(4, (n,), generator=draw)
    row = 2 * torch.randint(2, (n,), generator=draw) + column % 2
    corner = 2 * torch.stack([column, row], 1) - 4
    return corner + 2 * torch.rand(n, 2, generator=draw)


def _trained(way: Literal["roulette", "series"], seed: int,
             steps: int) -> tuple[Flow, list[float]]:
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    flow = Flow([ResidualTransform(_net(), way, terms=2) for _ in range(8)], size=2, stored=True)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, 2 * (1 - k / steps)))
    test, curve = _board(1000, torch.Generator().manual_seed(1000 + seed)), []
    for step in range(1, steps + 1):
        loss = -flow.log_prob(_board(256, draw)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % EVERY == 0:
            curve.append(_exact(flow, test))
    return flow, curve


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 48), LipSwish(), nn.Linear(48, 48), LipSwish(),
                         nn.Linear(48, 2))


def _set(flow: Flow, way: Any) -> Flow:
    for part in flow.transforms:
        part.log_det_by = way
    return flow


@torch.no_grad()
def _exact(flow: Flow, x: Tensor) -> float:
    way = flow.transforms[0].log_det_by
    found = -float(_set(flow, "exact").log_prob(x).mean())
    _set(flow, way)
    return found


@torch.no_grad()
def _looked_at(flow: Flow, seed: int, draws: int, way: str) -> dict[str, float]:
    x = _board(256, torch.Generator().manual_seed(2000 + seed))
    found = {"largest error of the inverse in float32":
             float((flow.inverse(flow(x)[0]) - x).abs().max())}
    x = x.double()
    exact = float(_set(flow.double(), "exact").log_det(x).mean())
    found["the determinant"] = exact
    for name, by in (("roulette", "roulette"), ("the 2-term series", "series")):
        _set(flow, by)
        drawn = torch.stack([flow.log_det(x).mean() for _ in range(draws)])
        missed = float(drawn.mean()) - exact
        found[f"mean of {name} less the determinant"] = missed
        found[f"mean of {name} less the determinant, standard errors"] = (
            missed / (float(drawn.std()) / draws ** 0.5))
    _set(flow.float(), way)
    return found
