"""Where the hidden units of a network are: which layer makes them, and which one reads them."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from netwright import checks
from netwright.anatomy.layers import is_linear, is_transposed
from netwright.anatomy.products import products
from netwright.anatomy.replacing import linear_weight
from netwright.anatomy.run import Operation, Run, record

__all__ = ["Units", "hidden_units"]

# What treats each channel by itself besides elementwise functions.
_CHANNELWISE = ("batch_norm", "avg_pool", "max_pool", "mean")
# What changes the order of the axes; any other layout keeps each unit's numbers together.
_REORDERING = ("t", "transpose", "permute")
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
    applied = [product for product in products(run) if product.name in layers]
    made = {product.gave: product.name for product in applied}
    read = [(product.name, product.taken) for product in applied]
    reached = [(reader, *_sources(run, number, made)) for reader, number in
               [*read, *((None, number) for number in run.outputs)]]
    runs = Counter(product.name for product in applied)
    times = Counter(maker for _, makers, _ in reached for maker in makers)
    shared = _shared(model)
    units = []
    for reader, makers, unitwise in reached:
        if reader is None or not makers or not unitwise or any(
                runs[name] != 1 or id(layers[name].weight) in shared
                for name in (*makers, reader)) or any(times[maker] != 1 for maker in makers):
            continue
        in_order = tuple(name for name in layers if name in makers)
        parts = tuple(layers[name] for name in in_order)
        if _fit(parts, layers[reader]):
            units.append(Units(in_order[0], parts, layers[reader], _outputs(parts[0])))
    return units


def _sources(run: Run, number: int, made: dict[int, str]) -> tuple[set[str], bool]:
    """Return the layers that a tensor was made of, and whether unit by unit."""
    waiting, seen = [number], set[int]()
    found: set[str] = set()
    unitwise = True
    while waiting:
        number = waiting.pop()
        if number in seen:
            continue
        seen.add(number)
        if number in made:
            found.add(made[number])
        elif number in run.maker and run.fed[number]:
            operation = run.maker[number]
            unitwise &= _is_unitwise(operation)
            waiting += operation.taken
    return found, unitwise


def _is_unitwise(operation: Operation) -> bool:
    if operation.layout:
        return operation.name not in _REORDERING
    return operation.elementwise or any(name in operation.name for name in _CHANNELWISE)


def _fit(makers: tuple[nn.Module, ...], reader: nn.Module) -> bool:
    """Return whether the reader's inputs are the makers' units, each in as many places."""
    count = _outputs(makers[0])
    convolved = isinstance(makers[0], _CONVOLUTIONS)
    if any(_outputs(maker) != count or isinstance(maker, _CONVOLUTIONS) != convolved
           for maker in makers):
        return False
    if isinstance(reader, _CONVOLUTIONS):
        return convolved and reader.in_channels == count
    return _inputs(reader) % count == 0


def _is_layer(module: Any) -> bool:
    known = isinstance(module, _CONVOLUTIONS) or is_linear(module)
    return known and not is_lazy(module.weight) and getattr(module, "groups", 1) == 1


def _inputs(layer: Any) -> int:
    return linear_weight(layer).shape[1]


def _outputs(layer: Any) -> int:
    return linear_weight(layer).shape[0]


def _shared(model: nn.Module) -> set[int]:
    names = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    return {p for p in names if names.count(p) > 1}


def _weight(layer: Any) -> Tensor:
    return layer.weight.detach()
