"""Tensors inside nested arguments and outputs: finding them and putting others in their place."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

Path = tuple[Any, ...]


def replace(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return `value` with `leaf` applied to whatever its tuples, lists and mappings hold."""
    if isinstance(value, (tuple, list)):
        items = [replace(item, leaf) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        entries = {key: replace(item, leaf) for key, item in value.items()}
        return entries if type(value) is dict else type(value)(**entries)
    return leaf(value)


def found(value: Any, wanted: Callable[[Any], bool]) -> list[Any]:
    """Return what inside `value` is `wanted`."""
    hits: list[Any] = []
    replace(value, lambda v: hits.append(v) if wanted(v) else None)
    return hits


def tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield each tensor inside `value` with the path that leads to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from tensors(item, (*path, i))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, (*path, key))


def at(value: Any, path: Path) -> Any:
    """Return what `path` leads to inside `value`."""
    for key in path:
        value = value[key]
    return value
