"""Where the hidden units of a network are: which layer makes them, and which one reads them."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from netwright import checks
from netwright.anatomy.axes import unit_groups
from netwright.anatomy.following import follow
from netwright.anatomy.layers import is_linear, is_transposed
from netwright.anatomy.products import products
from netwright.anatomy.replacing import linear_weight
from netwright.anatomy.run import record
from netwright.anatomy.unit_groups import UnitGroup

__all__ = ["Units", "hidden_units"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Units:
    """Hidden units: what one layer makes, or several together, and one other layer alone reads."""

    name: str
    makers: tuple[nn.Module, ...]  # two in a gated feed-forward layer
    reader: nn.Module
    count: int

    @property
    def layers(self) -> tuple[Any, ...]:
        """The makers and the reader."""
        return (*self.makers, self.reader)

    def incoming(self, maker: nn.Module, like: Tensor | None = None) -> Tensor:
        """Return a maker's weights, or a tensor of that shape, as a view: (count, *rest)."""
        weight: Tensor = _weight(maker) if like is None else like
        return weight.t() if is_transposed(maker) else weight

    def outgoing(self, like: Tensor | None = None) -> Tensor:
        """Return the reader's weights, or a tensor of that shape, as (outputs, count, *places)."""
        weight: Tensor = _weight(self.reader) if like is None else like
        weight = weight.t() if is_transposed(self.reader) else weight
        if isinstance(self.makers[0], _CONVOLUTIONS):
            return weight.unflatten(1, (self.count, -1))
        return weight.unflatten(1, (-1, self.count)).transpose(1, 2)

    def values(self, h: Tensor) -> Tensor:
        """Return the reader's input as (rows, count, places), a row for each sample or token."""
        if isinstance(self.reader, _CONVOLUTIONS):
            return h.reshape(-1, *h.shape[1 - self.reader.weight.ndim:]).flatten(2)
        places = _inputs(self.reader) // self.count
        if isinstance(self.makers[0], _CONVOLUTIONS):
            return h.reshape(-1, self.count, places)
        return h.reshape(-1, self.count, 1)


@checks.annotated
def hidden_units(model: nn.Module, example: Any) -> list[Units]:
    """Return the hidden units of `model`, found by watching it run on `example`.

    Looked for are linear layers and convolutions whose output reaches one other of them, and
    nothing else, through what treats each unit by itself: activations, batch norms, pooling,
    dropout, flattening, a product or a sum with the same unit of another layer. A layer that runs
    several times, or shares its weight, is passed over.

    >>> import torch
    >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8),
    ...                         nn.Tanh(), nn.Linear(8, 3))
    >>> [(units.name, units.count) for units in hidden_units(network, torch.randn(2, 1, 4, 4))]
    [('0', 4), ('3', 8)]
    """
    run = record(model, example)
    layers = {name: module for name, module in model.named_modules() if _is_layer(module)}
    applied = [product.name for product in products(run) if product.name in layers]
    shared = _shared(model)
    once = {name for name, times in Counter(applied).items()
            if times == 1 and id(layers[name].weight) not in shared}
    found = []
    for group in unit_groups(follow(run)):
        names = _layers(group, layers)
        if names is None or not once.issuperset(names):
            continue
        *makers, reader = names
        parts = tuple(layers[name] for name in layers if name in makers)
        made = Units(next(name for name in layers if name in makers), parts, layers[reader],
                     group.count)
        found.append((applied.index(reader), made))
    return [units for _, units in sorted(found, key=lambda pair: pair[0])]


def _layers(group: UnitGroup, layers: dict[str, nn.Module]) -> list[str] | None:
    """Return the layers that make a group's units and the one that reads them, None for others.

    The units must stand in both in the order in which `Units` looks at the weights.
    """
    if group.pooled or group.blocks > 1 or group.kind not in ("hidden", "stream"):
        return None
    ordered = [m for role in ("makes", "reads") for m in group.members if m.role == role]
    places = [(m.tensor.rpartition(".")[0], m.tensor.rpartition(".")[2], m.role) for m in ordered]
    names = [name for name, _, _ in places]
    if len(set(names)) < len(names) or any(own != "weight" or name not in layers
                                           for name, own, _ in places) or (
            [role for _, _, role in places].count("reads") != 1 or len(places) < 2):
        return None
    convolved = {isinstance(layers[name], _CONVOLUTIONS) for name in names[:-1]}
    each = ordered[-1].indices.shape[1]
    after = np.arange(group.count * each)
    laid = (after.reshape(group.count, each) if True in convolved else
            after.reshape(each, group.count).T)
    straight = all(np.array_equal(m.indices, np.arange(group.count)[:, None])
                   for m in ordered[:-1])
    return names if straight and len(convolved) == 1 and np.array_equal(
        ordered[-1].indices, laid) else None


def _is_layer(module: Any) -> bool:
    known = isinstance(module, _CONVOLUTIONS) or is_linear(module)
    return known and not is_lazy(module.weight) and getattr(module, "groups", 1) == 1


def _inputs(layer: Any) -> int:
    return linear_weight(layer).shape[1]


def _shared(model: nn.Module) -> set[int]:
    names = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    return {p for p in names if names.count(p) > 1}


def _weight(layer: Any) -> Tensor:
    return layer.weight.detach()
