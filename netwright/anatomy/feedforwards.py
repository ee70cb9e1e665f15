from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from netwright.anatomy.elementwise import (
    Itself,
    Named,
    Seen,
    Watch,
    is_linear,
    linear_sizes,
    watch,
)
from netwright.errors import NothingToReshape
from netwright.runtime.modes import evaluating
from netwright.runtime.random_state import same_random_state
from netwright.signals import apply

__all__ = ["FeedForwardLayer", "feedforwards"]


@dataclass(frozen=True)
class FeedForwardLayer:
    """Where a feed-forward layer is, and what it computes.

    y = down(activation(up(x))), or with a gate y = down(activation(gate(x)) * up(x)), dropout
    apart.

    Attributes:
        name: the smallest module that holds it; "" is the model.
        up: name of the linear layer into the hidden units; None in a block of experts.
        down: name of the linear layer out of them; None in a block of experts.
        gate: name of the gate's linear layer, None where there is no gate.
        activation: a module of the model, or a function put together from what was seen; None
            where a block of experts does not tell.
        dim: size of what it takes.
        hidden: how many hidden units it has, in a block of experts each expert.
        out: size of what it gives.
        whole: whether `name` holds nothing else, so that another module may stand in its place.
        dropout: how much of what the linear layers give `name` drops before it returns it.
        experts: how many experts the block has; None where it is no block of experts.
    """

    name: str
    up: str | None
    down: str | None
    gate: str | None
    activation: Any = field(compare=False)
    dim: int
    hidden: int
    out: int
    whole: bool = True
    dropout: float = 0.0
    experts: int | None = None

    def __str__(self) -> str:
        return repr(self.name) if self.name else "the model"


@torch.inference_mode(False)
def feedforwards(model: nn.Module, example: Any = None, *,
                 square: bool = True) -> list[FeedForwardLayer]:
    """Return the feed-forward layers of `model`, in the order in which they run.

    y = down(act(up(x)))  or  y = down(act(gate(x)) * up(x)).

    They are found by watching one run of a copy: a linear layer's output that goes only through
    elementwise functions (perhaps times another linear layer of the same input) into a linear
    layer. It does not matter what the parts are called, whether the activation is a module or a
    function, or whether one module holds the layer. Without `example` the parts are run one by
    one, the smallest first, on a random input of their width; a part that takes more than a
    tensor (or two, as a decoder does) is then not seen.

    A module with a child called `experts` is one feed-forward layer, whatever its router: how
    many experts it has, and their sizes, can be read from it; which expert a token goes to, the
    weights of the mixture and auxiliary losses cannot.

    Not found: linear layers written as `F.linear` or convolutions, one linear layer that gives
    both the gate and what it gates, and three or more linear layers in a row.

    Args:
        model: any module; a shared layer is named once.
        example: what the model takes: a tensor, a tuple of positional or a mapping of keyword
            arguments.
        square: only those whose output has the size of their input, as a residual stream needs;
            False also gives others, such as a classifier of two layers.

    Raises:
        NothingToReshape: there is none.

    >>> from netwright.models import gpt
    >>> [layer.up for layer in feedforwards(gpt(96, context=16, depth=2))]
    ['1.mlp_in', '2.mlp_in']
    """
    if hasattr(model, "_orig_mod"):
        raise NothingToReshape("model was compiled by torch.compile, which hides its parts; give "
                               "the module that was compiled, and compile the result")
    found: list[FeedForwardLayer] = []
    with same_random_state():
        copy = deepcopy(model)
        with evaluating(copy):
            if example is None:
                found = _in_parts(copy, "", square)
            else:
                found = _layers(copy, watch(copy, lambda: apply(copy, example)), square)
    if not found:
        raise NothingToReshape(
            f"{type(model).__name__} has no feed-forward layer: no linear layer's output goes "
            "only through elementwise functions into another linear layer"
            + (" that gives the size the first one took; square=False also finds others"
               if square else "")
            + ("; pass example= so that a run of the whole model can be watched"
               if example is None else ""))
    owners = dict(model.named_modules())
    return [_owned(layer, owners) for layer in found]


def _owned(layer: FeedForwardLayer, modules: dict[str, nn.Module]) -> FeedForwardLayer:
    """Return `layer` with the model's own activation in the place of the copy's."""
    found = layer.activation
    return _with(layer, activation=modules[found.name] if isinstance(found, Named) else
                 nn.Identity() if isinstance(found, Itself) else found)


def _with(layer: FeedForwardLayer, **changes: Any) -> FeedForwardLayer:
    return FeedForwardLayer(**{**layer.__dict__, **changes})


def _in_parts(module: nn.Module, prefix: str, square: bool) -> list[FeedForwardLayer]:
    """Return the layers in `module`, running the smallest parts in which there are any."""
    linears = [m for m in module.modules() if is_linear(m)]
    if len(linears) < 2 and not _has_experts(module):
        return []
    found: list[FeedForwardLayer] = []
    if not _has_experts(module):
        done = set()
        for name, child in module.named_children():
            if child not in done:
                done.add(child)
                found += _in_parts(child, f"{prefix}{name}.", square)
    if found:
        return found
    for seen in _tries(module, linears):
        found = _layers(module, seen, square)
        return [_placed(layer, prefix) for layer in found]
    return [_placed(layer, prefix) for layer in _expert_blocks(module, None)]


def _tries(module: nn.Module, linears: list[nn.Module]) -> Iterator[Watch]:
    """Yield what was seen of `module` where it runs on one or two tensors of its width."""
    dim = _expert_sizes(module)[0] if _has_experts(module) else linear_sizes(linears[0])[0]
    parameter = next(module.parameters())
    x = torch.randn(1, 3, dim).to(parameter.device, parameter.dtype)
    for given in ((x,), (x, x)):
        try:
            yield watch(module, partial(module, *given))
            return
        except Exception:  # whatever a part raises that does not run on its own
            continue


def _placed(layer: FeedForwardLayer, prefix: str) -> FeedForwardLayer:
    def placed(name: str | None) -> str | None:
        return None if name is None else prefix + name
    activation = layer.activation
    if isinstance(activation, Named):
        activation = Named(prefix + activation.name, activation.module)
    return _with(layer, name=(prefix + layer.name).rstrip("."), up=placed(layer.up),
                 down=placed(layer.down), gate=placed(layer.gate), activation=activation)


def _layers(model: nn.Module, seen: Watch, square: bool) -> list[FeedForwardLayer]:
    modules = dict(model.named_modules())
    experts = [layer for layer in _expert_blocks(model, seen) if layer.out == layer.dim
               or not square]
    found = []
    taken: set[str | None] = set()
    for down, times in seen.seen.items():
        layer = _layer(down, times, seen, modules)
        inside = any(_within(down, block.name) for block in experts)
        if layer is None or inside or (square and layer.out != layer.dim) or taken & {
                layer.up, layer.down, layer.gate} - {None}:
            continue
        taken |= {layer.up, layer.down, layer.gate}
        found.append(layer)
    return sorted(found + experts, key=lambda layer: seen.order[layer.down or layer.name])


def _layer(down: str, times: list[Seen], seen: Watch,
           modules: dict[str, nn.Module]) -> FeedForwardLayer | None:
    """Return the layer that ends in `down`, None where its parts are also used otherwise."""
    first = times[0]
    gate, up = (first.hidden, first.other) if first.other else (None, first.hidden)
    parts = [name for name in (up, gate) if name]
    if any(other != first for other in times) or any(
            name in seen.escaped or seen.runs[name] != len(times) for name in parts) or (
            seen.runs[down] != len(times)):
        return None
    (dim, hidden), (reads, out) = linear_sizes(modules[parts[0]]), linear_sizes(modules[down])
    if hidden != reads:
        return None
    name = _common([down, *parts])
    calls = seen.calls.get(name, [])
    whole = len(calls) == len(times) and all(
        call.single and call.read == time.read and call.gave == time.gave
        for call, time in zip(calls, times, strict=True))
    return FeedForwardLayer(name, parts[0], down, gate, first.function, dim, hidden, out,
                            whole, round(calls[0].dropped, 12) if whole else 0.0)


def _common(names: list[str]) -> str:
    """Return the smallest module that holds all of `names`."""
    paths = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _within(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(outer + ".")


def _has_experts(module: nn.Module) -> bool:
    return _expert_sizes(module)[2] > 0


def _expert_blocks(model: nn.Module, seen: Watch | None) -> Iterator[FeedForwardLayer]:
    """Yield the blocks of experts of `model`, outermost only."""
    outer: list[str] = []
    for name, module in model.named_modules():
        dim, hidden, count = _expert_sizes(module)
        if not count or any(_within(name, other) for other in outer):
            continue
        calls = seen.calls.get(name, []) if seen else []
        if seen and not calls:
            continue
        sizes = calls[0].sizes if calls else (dim, dim)
        outer.append(name)
        activation = getattr(module.experts, "act_fn", None)
        if isinstance(activation, nn.Module):
            activation = Named(f"{name}.experts.act_fn".lstrip("."), activation)
        yield FeedForwardLayer(
            name, None, None, None, activation,
            sizes[0] if sizes else dim, hidden, sizes[1] if sizes else dim,
            whole=sizes is not None, experts=count)


def _expert_sizes(module: Any) -> tuple[int, int, int]:
    """Return dim, hidden and how many experts there are, by the shapes of their weights."""
    experts = getattr(module, "experts", None)
    if not isinstance(experts, nn.Module):
        return 0, 0, 0
    if isinstance(experts, nn.ModuleList):
        linears = [m for m in experts[0].modules() if is_linear(m)] if len(experts) else []
        return (*linear_sizes(linears[0]), len(experts)) if linears else (0, 0, 0)
    packed = {name: p for name, p in experts.named_parameters(recurse=False) if p.ndim == 3}
    down = next((p for name, p in packed.items() if "down" in name), None)
    if down is None:
        return 0, 0, 0
    count, given, taken = down.shape
    if getattr(experts, "is_transposed", False):
        given, taken = taken, given
    return given, taken, count
