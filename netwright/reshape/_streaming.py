"""What layers take, stage by stage where a model has stages, in one pass where it has none."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from netwright.anatomy.replacing import plain_paths
from netwright.calibration import InputStatistics, stream, watched
from netwright.errors import CannotStage
from netwright.runtime.modes import evaluating, rehearsing
from netwright.runtime.padding import real_positions
from netwright.signals import apply

Visit = Callable[[Mapping[str, InputStatistics]], None]


@torch.no_grad()
def show_statistics(model: nn.Module, batches: Sequence[Any], visit: Visit,
                    statistics: Collection[str]) -> None:
    """Call `visit` with what linear layers and convolutions take, by name, as `stream` does.

    In a model that is no chain of stages all layers are shown at once, and none sees what `visit`
    made of another.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> show_statistics(model, [torch.randn(5, 4)], lambda taken: print(*taken), {"gram"})
    0
    2
    """
    with plain_paths():
        try:
            stream(model, batches, lambda _, taken: visit(taken), statistics=statistics)
        except CannotStage:
            visit(_all_at_once(model, batches, statistics))


def _all_at_once(model: nn.Module, batches: Sequence[Any],
                 statistics: Collection[str]) -> Mapping[str, InputStatistics]:
    with (evaluating(model), rehearsing(model),
          watched(model, [model], statistics) as (taken, padding)):
        for batch in batches:
            padding[:] = [real_positions(batch) if isinstance(batch, Mapping) else None]
            apply(model, batch)
    return taken
