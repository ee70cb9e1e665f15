"""What a loader yields, and what in it decides the order."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves

Data = Iterable[tuple[Any, Tensor]]


def pairs(data: Data, labelled: bool = True) -> Iterator[tuple[Any, Tensor]]:
    """Begin a pass over `data` now, and return its batches."""
    return map(pair if labelled else unlabelled, iter(data))


def pair(batch: Any) -> tuple[Any, Tensor]:
    """Return a batch as (x, y); raise ValueError where it is none."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        raise ValueError("a batch must be a pair (x, y) whose y is a tensor, got "
                         f"{described(batch)}; several inputs go into x as a tuple or mapping")
    x, y = batch
    return x, y


def unlabelled(batch: Any) -> tuple[Any, Tensor]:
    """Return a batch of inputs alone as (x, y), with a y that counts the samples."""
    x = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 1 else batch
    tensors = [part for part in tree_leaves(x) if isinstance(part, Tensor)]
    if not tensors or not tensors[0].ndim:
        raise ValueError("a batch must hold a tensor of samples, or a tuple of what the model "
                         f"takes, got {described(batch)}; stack the samples")
    return x, torch.zeros(len(tensors[0]))


def parts(data: Any) -> list[Any]:
    """Return a loader and those of its parts that decide its order."""
    batch_sampler = getattr(data, "batch_sampler", None)
    parts = [data, getattr(data, "sampler", None), batch_sampler,
             getattr(batch_sampler, "sampler", None), getattr(data, "dataset", None)]
    return list({id(part): part for part in parts if part is not None}.values())


def generators(owners: Iterable[Any]) -> list[Generator]:
    """Return the generators that are attributes of `owners`, each once."""
    found = [value for owner in owners for value in getattr(owner, "__dict__", {}).values()
             if type(value) is Generator]  # isinstance takes many times as long here
    return list({id(generator): generator for generator in found}.values())


def targets(y: Tensor) -> int:
    """Return how many targets count in a mean over `y`."""
    return int((y != -100).sum()) if y.dtype == torch.int64 else len(y)


def described(value: Any) -> str:
    """Return the types and shapes in `value`, in words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {described(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(described, value)) + ")"
    return type(value).__name__
