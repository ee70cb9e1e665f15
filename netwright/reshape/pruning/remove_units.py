from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from netwright.anatomy.axes import axes
from netwright.catalogue.facets import method
from netwright.reshape._calibration import few
from netwright.reshape.change import decided, reshape
from netwright.reshape.pruning._removing import removal, take_out

__all__ = ["remove_units"]


@method("companion")
@reshape
@torch.no_grad()
def remove_units(model: nn.Module, example: Any, ids: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a copy without some units of groups, by a choice of one's own that is kept on record.

    The groups and their units are those of `nw.axes(model, example)`, and the copy is what its
    `remove_all` gives. Here it is on record too: `nw.save` and `nw.load` build it again. Where all
    layers become equally smaller in a size that a Hugging Face configuration states, plain
    `from_pretrained` loads what was saved.

    Args:
        model: any module.
        example: what the model takes.
        ids: the units that go, by the names of their groups.

    Raises:
        UnknownName: there is no group of that name.
        ValueError: the ids are not units of the group, are all of them, or are not as many in each
            of its blocks.
        NothingToReshape: the result does not run.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    >>> remove_units(model, torch.zeros(1, 4), {"0: hidden": [0, 5]})[2]
    Linear(in_features=4, out_features=2, bias=True)
    """
    return decided(removal(model, axes(model, few(example)), ids), keeps_function=False)


remove_units.applies(take_out)
