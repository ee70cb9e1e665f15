import time
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from evidence.small_models import held_out, language_model, text, train
from netwright.data import Split
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.reshape import fuse_feedforward
from netwright.reshape.feedforward import feedforward_runs
from netwright.reshape.feedforward.fuse_feedforward import Residual
from netwright.reshape.pruning import without_sublayers

SHARE = 1 / 3  # of what taking the layers out loses


@evidence(paper="003-177",
          claim="Feed-forward layers that follow one another can be fused into one wide layer at "
                "little loss where they depend little on each other, and the network runs faster.",
          shortfall=("scale",
                     "All else holds: fusing all four costs 0.010 nats where taking three out "
                     "costs 0.116, at 0.30 of the time. Fusing any pair costs 0.0003 to 0.0005 "
                     "nats, less than the seeds' deviation of 0.001, so that there is nothing by "
                     "which to rank pairs. The cost grows with what is fused (0.0003, 0.003, "
                     "0.010 for 2, 3 and 4 layers): a deeper run, as that of the paper's Llama, "
                     "trained for more than 250 steps, is needed for pairs that differ."))
def fused_feedforward(scale: Scale) -> Outcome:
    """Fuse more and more of a run of six feed-forward layers in small language models."""
    width, steps, layers = (48, 250, 4) if scale == "desk" else (192, 6000, 10)
    data = text(held_out=256)
    calibration = data.x_train[:16]
    figures: dict[str, list[float]] = {}
    ways = ("fused", "taken out")
    curves: dict[str, list[list[float]]] = {way: [] for way in ways}
    counts = list(range(2, layers + 1))
    for seed in range(3):
        def make() -> nn.Module:
            *front, norm, out = language_model(width, depth=2)
            return nn.Sequential(*front, *(Residual(width) for _ in range(layers)), norm, out)

        model: Any = train(make, data, seed, steps=steps).network
        (run,) = [r for r in feedforward_runs(model, calibration) if len(r.layers) >= layers]
        names = list(run.layers[-layers:])
        first = len(run.layers) - layers
        before = _loss(model, data)
        pairs = [float(run.dependence[first + i, first + i + 1]) for i in range(layers - 1)]
        rises = [_loss(fuse_feedforward(model, calibration, names[i:i + 2]), data) - before
                 for i in range(layers - 1)]
        least, most = (rises[pairs.index(f(pairs))] for f in (min, max))
        lost: dict[str, list[float]] = {way: [] for way in ways}
        for count in counts:
            some = names[-count:]
            fused = fuse_feedforward(model, calibration, some)
            lost["fused"].append(_loss(fused, data) - before)
            lost["taken out"].append(
                _loss(without_sublayers(model, calibration, some[1:]), data) - before)
        for way in ways:
            curves[way].append(lost[way])
        for name, value in {
                "loss before (nats a character)": before,
                "rise, the pair that depends least (nats)": least,
                "rise, the pair that depends most (nats)": most,
                "rank correlation of a pair's dependence and rise": _ranks(pairs, rises),
                f"rise, all {layers} fused (nats)": lost["fused"][-1],
                f"rise, {layers - 1} of {layers} taken out (nats)": lost["taken out"][-1],
                f"error of all {layers} fused against the parallel sum": _error(
                    model, calibration, names),
                f"time, all {layers} fused / in a row": _time(
                    nn.Sequential(*model[-layers - 2:-2]), width)}.items():
            figures.setdefault(name, []).append(value)
    all_fused, without = (figures[f"rise, {what} (nats)"] for what in (
        f"all {layers} fused", f"{layers - 1} of {layers} taken out"))
    exact = max(figures[f"error of all {layers} fused against the parallel sum"]) < 1e-4
    little = all(a < SHARE * b for a, b in zip(all_fused, without, strict=True))
    told = all(a < b for a, b in zip(figures["rise, the pair that depends least (nats)"],
                                     figures["rise, the pair that depends most (nats)"],
                                     strict=True))
    faster = fmean(figures[f"time, all {layers} fused / in a row"]) < 0.9
    held = [exact, little, told, faster]
    return Outcome(
        verdict="shown" if all(held) else "partly shown" if any(held) else "not shown",
        setting={"model": f"language model of width {width}: 2 blocks with attention, then "
                          f"{layers} feed-forward layers, norm first",
                 "text": "tinyshakespeare, by character, windows of 64",
                 "training": f"{steps} steps of Adam, batch 16, none after fusing",
                 "calibration": "16 windows of the training text",
                 "measured on": "256 held-out windows",
                 "time": "the fused layers alone on 1 vector, medians of runs that take turns"},
        figures=figures,
        note="Stated before: the fused layer equals the parallel sum to 1e-4; fusing all loses "
             "less than a third of what taking all but one out loses, in every seed; the pair "
             "that depends least loses less than the one that depends most, in every seed; less "
             f"than 0.9 of the time. Held: equal {exact}, little lost {little}, dependence tells "
             f"{told}, faster {faster}. The paper fuses layers of a Llama of 405 billion weights "
             "from which attention was taken out; here the run was trained as one.",
        curves={f"{way}": Curve(counts, y) for way, y in curves.items()},
        axes=("layers made one", "rise of the held-out loss (nats a character)"))


def _loss(model: nn.Module, data: Split) -> float:
    return held_out(model, data.x_test, data.y_test)[0]


def _ranks(a: list[float], b: list[float]) -> float:
    ranks = torch.tensor([[sorted(values).index(v) for v in values] for values in (a, b)])
    return float(torch.corrcoef(ranks.double())[0, 1])


@torch.no_grad()
def _error(model: Any, x: Tensor, names: list[str]) -> float:
    fused: Any = fuse_feedforward(model, x, names)
    first, last = (int(names[i].split(".")[0]) for i in (0, -1))
    h = model[:first](x)
    parallel = h + sum(branch.mlp(branch.norm(h)) for branch in model[first:last + 1])
    return float((fused[:last + 1](x) - parallel).norm() / parallel.norm())


@torch.no_grad()
def _time(layers: nn.Sequential, width: int) -> float:
    h = torch.randn(1, width)
    own = [f"{i}.mlp" for i in range(len(layers))]
    fused: Any = fuse_feedforward(layers, torch.randn(8, width), own)
    one = fused[0]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(200):
        for model, taken in zip((one, layers), times, strict=True):
            begun = time.perf_counter()
            for _ in range(5):
                model(h)
            taken.append(time.perf_counter() - begun)
    return median(times[0]) / median(times[1])
