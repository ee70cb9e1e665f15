"""Where the hidden units of a network are: which layer makes them, and which one reads them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from netwright.runtime.modes import evaluating
from netwright.signals import call

__all__ = ["Units", "hidden_units"]

# What treats each unit by itself, by the names of its nodes in a graph without their ending.
UNITWISE = frozenset((
    "Abs", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D",
    "Add", "Alias", "AvgPool2D", "AvgPool3D", "Celu", "Clamp", "ClampMin", "Clone",
    "CudnnBatchNorm", "Div", "Elu", "Erf", "Exp", "Gelu", "Hardsigmoid", "Hardswish", "Hardtanh",
    "LeakyRelu", "LogSigmoid", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "Maximum", "Mean",
    "Minimum", "Mish", "MiopenBatchNorm", "MkldnnMaxPool2D", "Mul", "NativeBatchNorm",
    "NativeDropout", "Neg", "Pow", "Prelu", "PreluKernel", "Relu", "ReshapeAlias", "Selu",
    "Sigmoid", "Silu", "Softplus", "Softshrink", "Sqrt", "Squeeze", "Sub", "Tanh", "Threshold",
    "ToCopy", "UnsafeView", "Unsqueeze", "View", "Where"))
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
        weight = _weight(maker) if like is None else like
        return weight.t() if _is_transposed(maker) else weight

    def outgoing(self, like: Tensor | None = None) -> Tensor:
        """Return the reader's weights, or a tensor of that shape, as (outputs, count, *places)."""
        weight = _weight(self.reader) if like is None else like
        weight = weight.t() if _is_transposed(self.reader) else weight
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


def hidden_units(model: nn.Module, example: Any) -> list[Units]:
    """Return the hidden units of `model`, found by watching it run on `example`.

    Looked for are linear layers and convolutions whose output reaches one other of them, and
    nothing else, through what treats each unit by itself: activations, batch norms, pooling,
    dropout, flattening, a product or a sum with the same unit of another layer. A layer that runs
    several times, or shares its weight, is passed over.

    >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8),
    ...                         nn.Tanh(), nn.Linear(8, 3))
    >>> [(units.name, units.count) for units in hidden_units(network, torch.randn(2, 1, 4, 4))]
    [('0', 4), ('3', 8)]
    """
    layers = {module: name for name, module in model.named_modules() if _is_layer(module)}
    made: dict[Any, nn.Module] = {}  # the graph's leaf that stands for a layer's output
    read: list[tuple[Any, Tensor]] = []

    def before(layer: nn.Module, inputs: tuple) -> None:
        read.append((layer, inputs[0]))

    def after(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        start = output.detach().requires_grad_().clone()  # no leaf, since it may change in place
        made[start.grad_fn] = layer
        return start

    hooks = [hook for layer in layers for hook in (layer.register_forward_pre_hook(before),
                                                   layer.register_forward_hook(after))]
    try:
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            read += [(None, output) for output in _tensors(call(model, example))]
    finally:
        for hook in hooks:
            hook.remove()

    runs = [layer for layer, _ in read]
    shared = _shared(model)
    reached = [(reader, *_sources(h, made)) for reader, h in read]
    times = Counter(maker for _, makers, _ in reached for maker in makers)
    units = []
    for reader, makers, unitwise in reached:
        involved = [*makers, reader]
        if reader is None or not makers or not unitwise or any(
                runs.count(layer) != 1 or id(layer.weight) in shared for layer in involved) or any(
                times[maker] != 1 for maker in makers):
            continue
        in_order = tuple(layer for layer in layers if layer in makers)
        if _fit(in_order, reader):
            units.append(Units(layers[in_order[0]], in_order, reader, _outputs(in_order[0])))
    return units


def _sources(h: Tensor, made: dict[Any, nn.Module]) -> tuple[set[nn.Module], bool]:
    """Return the layers that `h` was made of, and whether unit by unit."""
    nodes, seen = [h.grad_fn], set()
    found: set[nn.Module] = set()
    unitwise = True
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in made:
            found.add(made[node])
            continue
        name = node.name().removeprefix("torch::autograd::").rstrip("0123456789")
        if name != "AccumulateGrad":  # a parameter on the way, such as a norm's
            unitwise &= name.removesuffix("Backward") in UNITWISE
        nodes += [parent for parent, _ in node.next_functions]
    return found, unitwise


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
    known = isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or _is_transposed(module)
    return known and not is_lazy(module.weight) and getattr(module, "groups", 1) == 1


def _is_transposed(module: nn.Module) -> bool:
    """Return whether it is the linear layer of GPT-2, whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _weight(layer: Any) -> Tensor:
    return layer.weight.detach()


def _inputs(layer: Any) -> int:
    return layer.weight.shape[0 if _is_transposed(layer) else 1]


def _outputs(layer: Any) -> int:
    return layer.weight.shape[1 if _is_transposed(layer) else 0]


def _shared(model: nn.Module) -> set[int]:
    names = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    return {p for p in names if names.count(p) > 1}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
    elif hasattr(value, "values"):
        yield from _tensors(list(value.values()))
