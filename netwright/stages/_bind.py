"""A model's arguments by name."""

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from torch import nn


def bound(model: nn.Module, x: Any) -> dict[str, Any]:
    """Return the arguments of `model`'s forward by name, for a tensor, a tuple or a mapping."""
    if isinstance(x, Mapping):
        return dict(x)
    arguments = x if isinstance(x, (tuple, list)) else (x,)
    return dict(zip(_names(type(model).forward), arguments, strict=False))


@lru_cache
def _names(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]
