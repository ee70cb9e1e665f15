"""How many weights each layer loses, so that what all of them do to the outputs is least."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright.reshape.pruning._weights import Layers, matrix, write
from netwright.runtime.modes import evaluating, same_buffers
from netwright.runtime.progress import Tries
from netwright.runtime.random_state import same_random_state
from netwright.signals import call

LEVELS = tuple(i / 20 for i in range(20))  # shares that are tried for each layer
BUCKETS = 2000  # parts that all weights are counted in


def least_distortion(model: nn.Module, layers: Layers, batches: Sequence[Any], share: float,
                     prune: Callable[[str, Tensor, float], Tensor]) -> dict[str, float]:
    """Return the share of each layer for which the sum of single distortions is least.

    `prune(name, matrix, share)` gives a layer's pruned matrix; `model` is as it was afterwards.
    """
    curves = distortions(model, layers, batches, prune)
    sizes = {name: matrix(layer).numel() for name, layer in layers.items()}
    bucket = max(1, -(-sum(sizes.values()) // BUCKETS))
    most = {name: size // bucket for name, size in sizes.items()}
    costs = {name: {int(level * most[name]): value
                    for level, value in zip(LEVELS, curve, strict=True)}
             for name, curve in curves.items()}
    taken = cheapest(list(costs.values()), round(share * sum(sizes.values()) / bucket))
    counts = _filled({name: count * bucket for name, count in zip(costs, taken, strict=True)},
                     sizes, round(share * sum(sizes.values())))
    return {name: counts[name] / sizes[name] for name in layers}


@torch.no_grad()
def distortions(model: nn.Module, layers: Layers, batches: Sequence[Any],
                prune: Callable[[str, Tensor, float], Tensor]) -> dict[str, list[float]]:
    """Return E‖f(x) − f_l,p(x)‖² for each layer l and level p, made to rise with p.

    f_l,p is the model with layer l alone pruned to the share p.
    """
    curves = {}
    with (evaluating(model), same_buffers(model), same_random_state(),
          Tries("prune_weights", len(layers) * len(LEVELS)) as tries):
        outputs = [call(model, x) for x in batches]
        for name, layer in layers.items():
            before, curve = matrix(layer), [0.0]
            for level in LEVELS[1:]:
                write(layer, prune(name, before, level))
                curve.append(max(curve[-1], _moved(model, batches, outputs)))
                tries.step()
            write(layer, before)
            curves[name] = curve
    return curves


def cheapest(costs: Sequence[Mapping[int, float]], total: int) -> list[int]:
    """Return one key of each mapping, their sum at most `total` and next to it, their cost least.

    cost(t) = min_k cost_l(k) + cost_before(t − k), layer by layer.

    >>> cheapest([{0: 0.0, 1: 1.0, 2: 9.0}, {0: 0.0, 1: 2.0, 2: 3.0}], 3)
    [1, 2]
    """
    best = torch.full((total + 1,), float("inf"), dtype=torch.float64)
    best[0] = 0
    choices = []
    for options in costs:
        keys = [key for key in options if key <= total]
        tried = torch.full((len(keys), total + 1), float("inf"), dtype=torch.float64)
        for i, key in enumerate(keys):
            tried[i, key:] = best[:total + 1 - key] + options[key]
        best, chosen = tried.min(0)
        choices.append((keys, chosen))
    place = max(t for t in range(total + 1) if best[t] < float("inf"))
    found = []
    for keys, chosen in reversed(choices):
        found.append(keys[int(chosen[place])])
        place -= found[-1]
    return found[::-1]


def _filled(counts: dict[str, int], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Let layers lose what is left to the total, in proportion to what they still have."""
    left = total - sum(counts.values())
    room = {name: sizes[name] - count - 1 for name, count in counts.items()}
    for name, free in room.items():
        some = min(free, round(left * free / max(1, sum(room.values()))))
        counts = counts | {name: counts[name] + some}
    return counts


def _moved(model: nn.Module, batches: Sequence[Any], outputs: Sequence[Tensor]) -> float:
    found = [(call(model, x).double() - y.double()).square().flatten(1).sum(1)
             for x, y in zip(batches, outputs, strict=True)]
    return float(torch.cat(found).mean())
