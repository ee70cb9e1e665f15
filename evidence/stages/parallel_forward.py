import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from netwright.data import Batches, digits
from netwright.evidence import Curve, Outcome, Scale, Verdict, evidence
from netwright.models import gpt
from netwright.numerics.fixed_point import fixed_point
from netwright.rules import Backprop
from netwright.stages import stages
from netwright.stages.parallel_forward import (
    Method,
    parallel_forward,
    parallel_recurrence,
)
from netwright.training import fit

DEPTH, WIDTH, STEPS, LETTERS, TOLERANCE = 64, 16, 256, 64, 1e-3
WAYS: dict[str, tuple[Method, int]] = {
    "Jacobi": ("jacobi", 1), "Gauss-Seidel, 4 blocks": ("gauss_seidel", 4),
    "hybrid, 8 blocks": ("hybrid", 8)}


@evidence(paper="003-015", claim="Solving for all layers, time steps or samples at once gives the "
          "same outputs in far fewer steps than running them in turn, and so in less time.",
          shortfall=("scale",
                     "Outputs are the same in far fewer steps (18 instead of 66, 15 instead of "
                     "256, 7 instead of 64). That it takes less time needs a machine that does a "
                     "step's work side by side: on one core the time is 6.7 and 2.1 times that "
                     "of running in turn (residual network, GRU). The paper's times are of "
                     "accelerators."))
def parallel_forward_steps(scale: Scale) -> Outcome:
    """Count steps on a trained residual network, a GRU and sampling; time the first two."""
    desk = scale == "desk"
    seeds, repeats = range(3 if desk else 5), 15 if desk else 100
    figures: dict[str, list[float]] = {}
    curves: dict[str, list[list[float]]] = {}
    ratios: dict[str, list[float]] = {}
    limits = list(range(1, 25, 2))
    for seed in seeds:
        torch.manual_seed(seed)
        network, x = _trained(seed, 3 if desk else 15), digits().x_test
        cell, series = nn.GRUCell(8, 32), torch.randn(STEPS, 8, 8)
        start = torch.zeros(8, 32)
        with torch.no_grad():
            exact, state, states = network(x), start, []
            for step in series:
                state = cell(step, state)
                states.append(state)
        whole = torch.stack(states)
        for name, (method, blocks) in WAYS.items():
            y, steps = parallel_forward(network, x, method=method, blocks=blocks, residual=True,
                                        tolerance=TOLERANCE)
            _put(figures, f"residual network: steps, {name}", steps)
            _put(figures, f"residual network: largest error of a class score, {name}",
                 float((y - exact).abs().max()))
            found, steps = parallel_recurrence(cell, series, start, method=method, blocks=blocks,
                                               tolerance=TOLERANCE)
            _put(figures, f"GRU: steps, {name}", steps)
            _put(figures, f"GRU: largest error of a state, {name}",
                 float((found - whole).abs().max()))
        y, steps = parallel_forward(network, x, residual=True)
        _put(figures, "residual network: steps, Jacobi, no tolerance", steps)
        _put(figures, "residual network: largest error, Jacobi, no tolerance",
             float((y - exact).abs().max()))
        iterations, same = _sampled()
        _put(figures, f"sampling {LETTERS} letters: iterations, Jacobi", iterations)
        _put(figures, "sampling: letters as when drawn in turn (%)", same)
        curves.setdefault("residual network", []).append([float(
            (parallel_forward(network, x, residual=True, max_iterations=k)[0] - exact).abs().max())
            for k in limits])
        curves.setdefault("GRU", []).append([float(
            (parallel_recurrence(cell, series, start, max_iterations=k)[0] - whole).abs().max())
            for k in limits])
        one, chain = x[:1], stages(network)
        for name, ours, plain in (
                ("residual network, 1 image", lambda chain=chain, one=one: parallel_forward(
                    chain, one, residual=True, tolerance=TOLERANCE),
                 lambda network=network, one=one: network(one)),
                ("GRU, batch 8", lambda cell=cell, series=series, start=start: parallel_recurrence(
                    cell, series, start, tolerance=TOLERANCE),
                 lambda cell=cell, series=series, start=start: _in_turn(cell, series, start))):
            ratios.setdefault(name, []).append(_ratio(ours, plain, repeats))
    for name, values in ratios.items():
        figures[f"{name}: time over that of running in turn, Jacobi"] = values
    exact_enough = max(figures["residual network: largest error, Jacobi, no tolerance"]) < 1e-4 \
        and min(figures["sampling: letters as when drawn in turn (%)"]) == 100
    few = max(figures["residual network: steps, Jacobi"]) <= (DEPTH + 2) / 2 \
        and max(figures["GRU: steps, Jacobi"]) <= STEPS / 2
    faster = all(statistics.fmean(values) < 1 for values in ratios.values())
    verdict: Verdict = "not shown"
    if exact_enough and few:
        verdict = "shown" if faster else "partly shown"
    return Outcome(
        verdict=verdict,
        setting={"residual network": f"{DEPTH} blocks of width {WIDTH} between two linear layers, "
                 f"{DEPTH + 2} stages in turn, trained on digits for {3 if desk else 15} epochs",
                 "GRU": f"{STEPS} steps, 32 units, as initialised", "sampling": "a transformer of "
                 "2 blocks, width 32, as initialised, 8 sequences with given random numbers",
                 "tolerance": TOLERANCE, "times": f"one thread, the two in turn, medians of "
                 f"{repeats}; the stages were found beforehand, their weights are put together in "
                 "each call", "seeds": len(seeds)},
        figures=figures,
        note="Far fewer means at most half as many steps as in turn, with every error without a "
             "tolerance below 1e-4; the claim is shown where both networks also take less time, "
             "partly where they do not. A step is one that waits for the one before; how much "
             "work a machine does side by side in it is what decides the time. Here it is a "
             "processor's core, and the paper's are accelerators. DenseNets, MADE, PixelCNN++ and "
             "the backward pass of recurrent networks were not tried.",
        curves={name: Curve(limits, runs) for name, runs in curves.items()},
        axes=("iterations of Jacobi", "largest error"))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.linear(self.norm(h)).tanh() / DEPTH ** 0.5
        return out


def _trained(seed: int, epochs: int) -> nn.Sequential:
    data = digits()
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), *[_Block() for _ in range(DEPTH)],
                            nn.Linear(WIDTH, 10))
    fit(Backprop(network), Batches(data.x_train, data.y_train, 64, seed=seed), epochs=epochs,
        progress=False)
    return network.eval()


def _sampled() -> tuple[int, float]:
    """Return the iterations until letters settle, and how many are those drawn in turn."""
    model = gpt(32, LETTERS, width=32).eval()
    noise = -(-torch.rand(8, LETTERS, 32).clamp_min(1e-9).log()).log()

    @torch.no_grad()
    def drawn(letters: Tensor) -> Tensor:
        seen = torch.cat([torch.zeros(8, 1, dtype=torch.long), letters[:, :-1]], 1)
        return (model(seen) + noise).argmax(-1)

    start = torch.zeros(8, LETTERS, dtype=torch.long)
    letters, iterations = fixed_point(drawn, start, max_iterations=LETTERS)
    in_turn = start.clone()
    for i in range(LETTERS):
        in_turn[:, i] = drawn(in_turn)[:, i]
    return iterations, 100 * float((letters == in_turn).float().mean())


@torch.no_grad()
def _in_turn(cell: nn.GRUCell, series: Tensor, state: Tensor) -> Tensor:
    for step in series:
        state = cell(step, state)
    return state


@torch.no_grad()
def _ratio(ours: Callable[[], object], plain: Callable[[], object], repeats: int) -> float:
    """Return the time of `ours` over that of `plain`, in turn."""
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        row = []
        for work in (ours, plain):
            begin = time.perf_counter()
            work()
            row.append(time.perf_counter() - begin)
        times.append((row[0], row[1]))
    a, b = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return a / b


def _put(figures: dict[str, list[float]], name: str, value: float) -> None:
    figures.setdefault(name, []).append(value)
