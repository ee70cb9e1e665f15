import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.anatomy.replacing import plain_paths, replace
from netwright.anatomy.residual import Sublayer
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape._calibration import batches_of, few
from netwright.reshape.change import decided, reshape
from netwright.reshape.pruning._distances import Distance, Distances
from netwright.reshape.pruning._trials import Trials, sharing, stubs
from netwright.reshape.pruning.prune_sublayers import decision_of, found_in, taken_out
from netwright.runtime.modes import evaluating, same_buffers
from netwright.runtime.progress import Tries
from netwright.runtime.random_state import same_random_state

__all__ = ["prune_additive"]


@method(
    "reshape",
    papers=["002-036"],
    place="residual stream",
    saves=["parameters", "file size", "inference memory", "inference time"],
    needs=["calibration data"],
    keeps_function=False,
    search={"ratio": (0.05, 0.5)},
    variants={"a fifth": {"ratio": 0.2}, "by angle": {"ratio": 0.3, "distance": "angular"}},
)
@reshape
@torch.no_grad()
def prune_additive(model: nn.Module, calibration: Any, ratio: float = 0.25, *,
                   distance: Distance = "euclidean") -> nn.Module:
    """Return a copy without the sublayers whose single costs have the least sum at a given size.

    c_i = mean ‖f(x) − f_∖i(x)‖²,  S = argmin Σ_{i in S} c_i  with  Σ_{i in S} p_i >= ratio · p.

    Each sublayer of the residual stream is left out once, which takes one pass; p_i are its
    parameters and p those of the whole model. That costs nearly add up is what the choice rests
    on, so that it needs no second look; it is made exactly, as a 0/1 knapsack: of all sums of
    parameters the cheapest set is kept, and no set that another beats in both.

    The result is meant to be trained on the outputs and features of the whole model, for which
    there is `netwright.objectives.losses.normalized_distillation`.

    Args:
        model: a network with a residual stream.
        calibration: inputs that the outputs are compared on.
        ratio: the share of all parameters that goes, at least.
        distance: what c_i is: "euclidean" (squared, as above), "angular", "jensen-shannon" or a
            function of two outputs.

    Shapes: calibration is what the model takes (a tensor, a tuple of positional or a mapping of
    keyword arguments) or a list of such batches; outputs (batch, *).

    Raises:
        NothingToReshape: no module's output is added to a stream that it was computed from, or
            all sublayers together have fewer parameters than should go.
        UnknownName: `distance` is none of the three.
        ValueError: `ratio` is not between 0 and 1, or `calibration` is empty or gives outputs that
            are not finite.

    Paper: Zhang, Li, Chen, Xu, 2024, LAPTOP-Diff: Layer Pruning and Normalized Distillation for
    Compressing Diffusion Models.

    >>> from netwright.models import gpt
    >>> model = gpt(96, context=16, depth=3)
    >>> smaller = prune_additive(model, torch.randint(96, (4, 16)), ratio=0.25)
    >>> sum(p.numel() for p in smaller.parameters()) <= 0.75 * sum(
    ...     p.numel() for p in model.parameters())
    True
    """
    checks.between(0, 1, ends=(False, False), ratio=ratio)
    distances = Distances(_squared if distance == "euclidean" else distance)
    batches = batches_of(calibration)
    trial = sharing(model)
    found = found_in(trial, few(batches[0]))
    with same_random_state(), evaluating(trial), same_buffers(trial), plain_paths():
        costs = _costs(Trials(trial, found, batches, distances))
    sizes = [_parameters(trial, sublayer) for sublayer in costs]
    least = math.ceil(ratio * sum(p.numel() for p in model.parameters()))
    if sum(sizes) < least:
        raise NothingToReshape(f"ratio={ratio} asks for {least} parameters, and all sublayers that "
                               f"can go have {sum(sizes)}; take a smaller ratio")
    chosen = cheapest(list(costs.values()), sizes, least)
    removed = [sublayer for i, sublayer in enumerate(costs) if i in chosen]
    for sublayer in removed:
        for part, stub in stubs(trial, sublayer, found).items():
            replace(trial, part, stub)
    return decided(decision_of(trial, removed, found, few(batches[0])))


prune_additive.applies(taken_out)


def cheapest(costs: Sequence[float], sizes: Sequence[int], least: int) -> set[int]:
    """Return which entries have a sum of sizes of `least` or more, and least costs.

    >>> sorted(cheapest([3.0, 1.0, 2.5], [4, 2, 3], 5))
    [1, 2]
    """
    front: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for i, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
        for total, (sum_, chosen) in list(front.items()):
            reached = min(total + size, least)
            if reached not in front or sum_ + cost < front[reached][0]:
                front[reached] = sum_ + cost, (*chosen, i)
        front = _undominated(front)
    return set(front[least][1])


def _undominated(front: dict[int, tuple[float, tuple[int, ...]]]
                 ) -> dict[int, tuple[float, tuple[int, ...]]]:
    """Return the sets that no other one beats, largest first."""
    kept: dict[int, tuple[float, tuple[int, ...]]] = {}
    best = math.inf
    for total in sorted(front, reverse=True):
        if front[total][0] < best:
            kept[total], best = front[total], front[total][0]
    return kept


def _costs(trials: Trials) -> dict[Sublayer, float]:
    """Return what it costs to leave out each sublayer by itself."""
    costs = {}
    with Tries("prune_additive", len(trials.left)) as tries:
        for sublayer in list(trials.left):
            tried, cost = trials.distance(sublayer)
            if tried is not None:
                costs[tried] = cost
            if not math.isfinite(cost):
                raise ValueError("calibration must give finite outputs with any sublayer removed, "
                                 "got nan or infinity; check the inputs and the weights")
            tries.step()
    return costs


def _parameters(model: nn.Module, sublayer: Sublayer) -> int:
    parts = [model.get_submodule(name) for name in (sublayer.name, *sublayer.feeders)]
    return sum(p.numel() for p in {id(p): p for part in parts for p in part.parameters()}.values())


def _squared(old: Tensor, new: Tensor) -> Tensor:
    return (old - new).square().sum(-1)
