from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.anatomy.elementwise import Itself, Named, function_of
from netwright.anatomy.layers import common, is_linear, linear_sizes
from netwright.anatomy.products import Product, products
from netwright.anatomy.residual_blocks import example_of
from netwright.anatomy.run import Operation, Run, record
from netwright.errors import NothingToReshape
from netwright.runtime.random_state import same_random_state

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
        gate: name of the gate's linear layer, None where there is no gate; that of `up` where one
            linear layer gives both.
        activation: a module of the model, or a function put together from what was seen; None
            where a block of experts does not tell.
        dim: size of what it takes.
        hidden: how many hidden units it has, in a block of experts each expert.
        out: size of what it gives.
        whole: whether `name` holds nothing else, so that another module may stand in its place.
        dropout: how much of what the linear layers give `name` drops before it returns it.
        experts: how many experts the block has; None where it is no block of experts.
        packed: where one linear layer gives both the gate and what it gates, which half of its
            outputs is the gate: 0 or 1.
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
    packed: int | None = None

    def __str__(self) -> str:
        return repr(self.name) if self.name else "the model"


@checks.annotated
@torch.inference_mode(False)
def feedforwards(model: nn.Module, example: Any = None, *,
                 square: bool = True) -> list[FeedForwardLayer]:
    """Return the feed-forward layers of `model`, in the order in which they run.

    y = down(act(up(x)))  or  y = down(act(gate(x)) * up(x)).

    They are found by watching one run of a copy: a linear layer's output that goes only through
    elementwise functions (perhaps times another linear layer of the same input) into a linear
    layer. It does not matter what the parts are called, whether the activation is a module or a
    function, or whether one module holds the layer. Without `example` the parts are run one by
    one, the smallest first, on a random input of their width. Where a member of a list of layers
    takes more than a tensor or two, so that it could not be looked into, a Hugging Face model is
    run on tokens or an image, and any other needs an `example`.

    A module with a child called `experts` is one feed-forward layer, whatever its router: how
    many experts it has, and their sizes, can be read from it; which expert a token goes to, the
    weights of the mixture and auxiliary losses cannot.

    One linear layer may give both the gate and what it gates, as two halves. Not found: linear
    layers written as `F.linear` or convolutions, and three or more linear layers in a row.

    Args:
        model: any module; a shared layer is named once.
        example: what the model takes: a tensor, a tuple of positional or a mapping of keyword
            arguments.
        square: only those whose output has the size of their input, as a residual stream needs;
            False also gives others, such as a classifier of two layers.

    Raises:
        NothingToReshape: there is none.
        ValueError: `example` is needed.

    >>> from netwright.models import gpt
    >>> [layer.up for layer in feedforwards(gpt(96, context=16, depth=2))]
    ['1.mlp_in', '2.mlp_in']
    """
    if hasattr(model, "_orig_mod"):
        raise NothingToReshape("model was compiled by torch.compile, which hides its parts; give "
                               "the module that was compiled, and compile the result")
    if example is not None:
        return feedforwards_in(record(model, example), square=square)
    with same_random_state():
        missed: list[str] = []
        found = _in_parts(model, "", square, missed)
        run = _own_run(model, missed[0]) if found and missed else None
        return _found(model, found, square, example) if run is None else feedforwards_in(
            run, square=square)


def _own_run(model: nn.Module, missed: str) -> Run:
    """Return a run of a pretrained model on an input that is made for it."""
    try:
        return record(model, example_of(model))
    except Exception as error:  # whatever it raises on tokens alone
        raise ValueError(f"example must be an input of {type(model).__name__}, got None; its part "
                         f"{missed!r} takes more than a tensor, so that its feed-forward layers "
                         "are found by watching a run alone") from error


def feedforwards_in(run: Run, *, square: bool = True) -> list[FeedForwardLayer]:
    """Return the feed-forward layers that a run of a model showed; see `feedforwards`."""
    layers = _separable(run.network, feedforward_layers(run, products(run), square))
    return _found(run.network, layers, square, run)


def _found(model: nn.Module, found: list[FeedForwardLayer], square: bool,
           example: Any) -> list[FeedForwardLayer]:
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


def _in_parts(module: nn.Module, prefix: str, square: bool,
              missed: list[str]) -> list[FeedForwardLayer]:
    """Return the layers in `module`, running the smallest parts in which there are any.

    Members of lists that could not be run, nor anything be found inside, are added to `missed`.
    """
    linears = [m for m in module.modules() if is_linear(m)]
    if len(linears) < 2 and not _has_experts(module):
        return []
    found: list[FeedForwardLayer] = []
    if not _has_experts(module):
        done = set()
        for name, child in module.named_children():
            if child not in done:
                done.add(child)
                inside = _in_parts(child, f"{prefix}{name}.", square, missed)
                if isinstance(module, nn.ModuleList) and not inside and _unseen(child):
                    missed.append(f"{prefix}{name}")
                found += inside
    if found:
        return found
    for run in _tries(module, linears):
        found = _separable(module, feedforward_layers(run, products(run), square))
        return [_placed(layer, prefix) for layer in found]
    return [_placed(layer, prefix) for layer in _expert_blocks(module, None)]


def _unseen(module: nn.Module) -> bool:
    """Return whether `module` has linear layers enough, but runs on no tensor of their width."""
    linears = [m for m in module.modules() if is_linear(m)]
    return len(linears) > 1 and not any(True for _ in _tries(module, linears))


def _tries(module: nn.Module, linears: list[nn.Module]) -> Iterator[Run]:
    """Yield a run of `module` where it runs on one or two tensors of its width."""
    dim = _expert_sizes(module)[0] if _has_experts(module) else linear_sizes(linears[0])[0]
    parameter = next(module.parameters())
    x = torch.randn(1, 3, dim).to(parameter.device, parameter.dtype)
    for given in ((x,), (x, x)):
        try:
            yield record(module, given)
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


def _separable(model: nn.Module, layers: list[FeedForwardLayer]) -> list[FeedForwardLayer]:
    """Return the layers whose matrices are linear layers of their own."""
    modules = dict(model.named_modules())
    return [layer for layer in layers if layer.experts is not None or (
        all(name in modules and is_linear(modules[name])
            for name in (layer.up, layer.gate, layer.down) if name is not None))]


@dataclass(frozen=True)
class _Hidden:
    """A tensor that is a function of what a product gave, times what another one gave.

    `acted` is the value that the function gives. A product that gives both the gate and what it
    gates is named twice, with the half of its outputs that each is.
    """

    layer: str
    read: tuple[int, float]  # what the product read
    acted: int
    plain: bool = True  # whether the function is the identity
    half: int | None = None
    other: str | None = None


@dataclass
class _Flow:
    """What a run showed of hidden tensors."""

    run: Run
    hidden: dict[int, _Hidden] = field(default_factory=dict)
    made: dict[str, list[Product]] = field(default_factory=dict)
    seen: dict[str, list[tuple[_Hidden, Product]]] = field(default_factory=dict)
    escaped: set[str] = field(default_factory=set)

    def apply(self, product: Product) -> None:
        """Follow a product."""
        before = self.hidden.get(product.taken)
        if before is not None and before.plain and before.other is None:
            self.escape(before)  # a product of two matrices has no hidden units
        elif before is not None:
            self.seen.setdefault(product.name, []).append((before, product))
        self.made.setdefault(product.name, []).append(product)
        gave = product.operation.gave[0]
        self.hidden[gave] = _Hidden(product.name, rows(self.run, product.taken), gave)

    def follow(self, operation: Operation) -> None:
        """Follow any other operation."""
        read = [self.hidden[n] for n in operation.taken if n in self.hidden]
        if not read:
            return
        first, gave = read[0], operation.gave[0]
        others = [n for n in operation.taken if n not in self.hidden
                  and (n not in self.run.scalars or self.run.fed[n])]
        if len(read) == 1 and (operation.dropped or keeps_rows(self.run, operation)):
            self.hidden[gave] = replace(first, acted=gave if first.other is None else first.acted)
        elif len(read) == 1 and first.plain and first.half is None and (
                halves := _halves(self.run, operation)):
            for number, half in halves.items():
                self.hidden[number] = replace(first, acted=number, half=half)
        elif len(read) == 1 and first.plain and self._bias(first, operation, others):
            self.hidden[gave] = replace(first, acted=gave)
        elif operation.elementwise and not others and all(
                (h.layer, h.half, h.read) == (first.layer, first.half, first.read)
                and h.other is None for h in read):
            self.hidden[gave] = replace(first, acted=gave, plain=False)
        elif operation.name == "mul" and len(read) == 2 and _gated(*read):
            gate, up = read if read[1].plain else read[::-1]
            self.hidden[gave] = replace(gate, plain=False, other=up.layer)
        else:
            for hidden in read:
                self.escape(hidden)

    def escape(self, hidden: _Hidden) -> None:
        """Note that a hidden tensor is used for something else as well."""
        self.escaped |= {name for name in (hidden.layer, hidden.other) if name}

    def _bias(self, hidden: _Hidden, operation: Operation, others: list[int]) -> bool:
        width = self.made[hidden.layer][-1].outputs
        return operation.name == "add" and len(others) == 1 and self.run.learned(
            others[0]) and self.run.shapes[others[0]] == (width,)


def _gated(a: _Hidden, b: _Hidden) -> bool:
    """Return whether a * b is act(gate(x)) * up(x)."""
    return ((a.layer, a.half) != (b.layer, b.half) and a.read == b.read
            and (a.half is None) == (b.half is None) and a.other is b.other is None
            and (a.plain or b.plain))


def _halves(run: Run, operation: Operation) -> dict[int, int]:
    """Return the two halves into which `operation` cuts the last axis, none where it does not."""
    if not operation.layout:
        return {}
    *axes, width = run.shapes[operation.taken[0]]
    if any(run.shapes[n] != (*axes, width / 2) for n in operation.gave):
        return {}
    if operation.name == "slice":
        return {operation.gave[0]: int(operation.arguments[0][2] > 0)}
    return dict(zip(operation.gave, (0, 1), strict=True)) if len(operation.gave) == 2 else {}


def keeps_rows(run: Run, operation: Operation) -> bool:
    """Return whether a result holds the rows of the last axis as they were, all of them."""
    if not operation.layout:
        return False
    before, after = run.shapes[operation.taken[0]], run.shapes[operation.gave[0]]
    if prod(before) != prod(after) or before[-1:] != after[-1:]:
        return False
    if operation.name in ("t", "transpose", "permute", "movedim"):
        last = len(before) - 1
        dims = operation.arguments[0][1:]
        if operation.name == "permute":
            return dims[0][-1] % len(before) == last
        return operation.name == "transpose" and all(d % len(before) != last for d in dims)
    return True


def rows(run: Run, number: int) -> tuple[int, float]:
    """Return what tells rows from others: where they come from, and how much was dropped."""
    kept = 1.0
    while number in run.maker:
        operation = run.maker[number]
        if not operation.dropped and not keeps_rows(run, operation):
            break
        kept *= 1 - operation.dropped
        number = operation.taken[0]
    return number, 1 - kept


def feedforward_layers(run: Run, found: list[Product], square: bool) -> list[FeedForwardLayer]:
    """Return the feed-forward layers of a run, blocks of experts among them, in order."""
    flow = _Flow(run)
    applied = {id(product.operation): product for product in found}
    for operation in run.operations:
        if id(operation) in applied:
            flow.apply(applied[id(operation)])
        else:
            flow.follow(operation)
    for number in run.outputs:
        if number in flow.hidden:
            flow.escape(flow.hidden[number])
    experts = [layer for layer in _expert_blocks(run.network, run)
               if layer.out == layer.dim or not square]
    layers = []
    taken: set[str | None] = set()
    for down in flow.seen:
        layer = _layer(down, flow)
        inside = any(_within(down, block.name) for block in experts)
        if layer is None or inside or (square and layer.out != layer.dim) or taken & {
                layer.up, layer.down, layer.gate} - {None}:
            continue
        taken |= {layer.up, layer.down, layer.gate}
        layers.append(layer)
    ends = {layer: (run.operations.index(flow.seen[layer.down][0][1].operation)
                    if layer.down else run.end(run.called(layer.name)[0]))
            for layer in [*layers, *experts]}
    return sorted(ends, key=ends.__getitem__)


def _layer(down: str, flow: _Flow) -> FeedForwardLayer | None:
    """Return the layer that ends in `down`, None where its parts are also used otherwise."""
    times, run = flow.seen[down], flow.run
    first, out = times[0]
    gate, up = (first.layer, first.other) if first.other else (None, first.layer)
    parts = [name for name in dict.fromkeys((up, gate)) if name]
    if flow.escaped & set(parts) or any(
            (hidden.layer, hidden.other) != (first.layer, first.other) for hidden, _ in times) or (
            any(len(flow.made[name]) != len(times) for name in [*parts, down])):
        return None
    into = flow.made[parts[0]][0]
    hidden = into.outputs // (1 if first.half is None else 2)
    if hidden != out.inputs or into.convolution or out.convolution:
        return None
    name = common([down, *parts])
    calls = run.called(name)
    ends = [rows(run, call.gave[0]) if len(call.gave) == 1 else (-1, 0.0) for call in calls]
    whole = len(calls) == len(times) and all(
        len(call.taken) == 1 and rows(run, call.taken[0]) == hidden.read and end == product.gave
        for call, (end, _), (hidden, product) in zip(calls, ends, times, strict=True))
    plain = {number for number, hidden in flow.hidden.items() if hidden.plain and (
        hidden.layer, hidden.half) == (first.layer, first.half)}
    return FeedForwardLayer(name, parts[0], down, gate, function_of(run, first.acted, plain),
                            into.inputs, hidden, out.outputs, whole,
                            round(ends[0][1], 12) if whole else 0.0,
                            packed=first.half if up == gate else None)


def _within(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(outer + ".")


def _has_experts(module: nn.Module) -> bool:
    return _expert_sizes(module)[2] > 0


def _expert_blocks(model: nn.Module, run: Run | None) -> Iterator[FeedForwardLayer]:
    """Yield the blocks of experts of `model`, outermost only."""
    outer: list[str] = []
    for name, module in model.named_modules():
        dim, hidden, count = _expert_sizes(module)
        if not count or any(_within(name, other) for other in outer):
            continue
        calls = run.called(name) if run else []
        if run and not calls:
            continue
        outer.append(name)
        sizes: tuple[int, int] | None = (dim, dim)
        if run:
            call = calls[0]
            sizes = ((run.shapes[call.taken[0]][-1], run.shapes[call.gave[0]][-1])
                     if isinstance(call.output, Tensor) and call.taken else None)
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
