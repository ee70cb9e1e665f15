from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from netwright import checks
from netwright.anatomy.replacing import replace
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape._naming import Built, restored
from netwright.reshape.change import decided, reshape

__all__ = ["exchange_modules"]


@method("companion")
@reshape
def exchange_modules(model: nn.Module, blocks: Mapping[str, Callable[[], nn.Module]], *,
                     after: bool = False) -> nn.Module:
    """Return a copy in which each of the named modules is another one.

    Whatever places a module has in the model, the other one has too. What is made is recorded by
    its class and the arguments it was made with, so that the result can be saved and loaded.

    Args:
        model: any module.
        blocks: for the name of each module, a function that makes what stands there.
        after: whether the module stays, and what is made runs after it.

    Raises:
        NothingToReshape: `blocks` is empty.
        UnknownName: the model has no module that is called that.

    >>> from netwright.blocks import AGLU
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> exchange_modules(model, {"1": AGLU})[1].__class__.__name__
    'AGLU'
    """
    if not blocks:
        raise NothingToReshape("blocks must name at least one module, got none; try "
                               "{'1': a function that makes a module}")
    known = dict(model.named_modules())
    for name in blocks:
        checks.one_of(known, module=name)
    built = Built()
    made = {}
    for name, make in blocks.items():
        with built.watching():
            made[name] = make()
    said = {name: built.said(block) for name, block in made.items()}
    return decided({"modules": said, "after": after}, made=made)


@exchange_modules.applies
@torch.no_grad()
def _exchanged(model: nn.Module, decision: Mapping[str, Any],
               made: Mapping[str, nn.Module] | None = None) -> nn.Module:
    for name, said in decision["modules"].items():
        before: Any = model.get_submodule(name)
        block = restored(said) if made is None else made[name]
        tensor = next(before.parameters(), next(model.parameters(), None))
        if tensor is not None:
            block = block.to(tensor.device, tensor.dtype)
        whole = nn.Sequential(before, block) if decision["after"] else block
        model = replace(model, name, whole)
    return model
