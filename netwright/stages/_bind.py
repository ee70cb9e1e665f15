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


def first_argument(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return what a call of `module` gave for the first argument of its forward.

    >>> first_argument(nn.Linear(2, 3), (), {"input": 7})
    7
    """
    if args:
        return args[0]
    name = next(iter(inspect.signature(module.forward).parameters))
    return kwargs[name] if name in kwargs else next(iter(kwargs.values()))


@lru_cache
def _names(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]
