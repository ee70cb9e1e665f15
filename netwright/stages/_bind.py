"""A model's arguments by name."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def bound(model: nn.Module, x: Any) -> dict[str, Any]:
    """Return the arguments of `model`'s forward by name, for a tensor, a tuple or a mapping."""
    if isinstance(x, Mapping):
        return dict(x)
    names = inspect.signature(type(model).forward).parameters
    arguments = x if isinstance(x, (tuple, list)) else (x,)
    return dict(zip(list(names)[1:], arguments, strict=False))
