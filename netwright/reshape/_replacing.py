"""Putting modules in the place of those that are known by name."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from netwright.anatomy.replacing import replace_all
from netwright.errors import NothingToReshape


def named_like(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Return the names of the modules of type `kind`.

    Raises:
        NothingToReshape: there is none.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, kind)]
    if not found:
        raise NothingToReshape(f"model must have a {kind.__name__}, got a {type(model).__name__} "
                               "that has none; build it with one")
    return found


def replaced(model: nn.Module, names: Sequence[str],
             make: Callable[[Any], nn.Module]) -> nn.Module:
    """Put `make(module)` wherever a module of `names` stands, in place; return the model."""
    return replace_all(model, {module: make(module)
                               for module in map(model.get_submodule, names)})
