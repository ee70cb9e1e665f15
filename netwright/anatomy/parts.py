"""The parts of a network that an anatomy names, and how each is found in a run."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from netwright.anatomy.calls import Call
from netwright.anatomy.layers import is_norm
from netwright.anatomy.products import Product, named
from netwright.anatomy.run import Operation, Run

__all__ = ["Convolution", "Embedding", "Experts", "Linear", "Normalisation", "Recurrent",
           "Repeated", "Tie"]


@dataclass(frozen=True)
class Linear:
    """A linear map: the module, or the parameter where it is no module's only matrix."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Convolution:
    """A convolution, its kernel's size one number for each axis."""

    name: str
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    transposed: bool


@dataclass(frozen=True)
class Normalisation:
    """A norm; `kind` is "batch", "layer", "group", "rms" or the name of its class."""

    name: str
    kind: str
    width: int


@dataclass(frozen=True)
class Embedding:
    """A table of vectors that are looked up."""

    name: str
    rows: int
    width: int


@dataclass(frozen=True)
class Recurrent:
    """A recurrent layer, or a cell that is given what it returned before."""

    name: str
    kind: str
    inputs: int
    hidden: int
    layers: int = 1
    directions: int = 1


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: `name` holds the router and the experts.

    `packed` is whether all experts' weights are in one parameter; `chosen` how many experts each
    token goes to, None where that was not seen.
    """

    name: str
    experts: str
    router: str | None
    count: int
    chosen: int | None
    dim: int
    hidden: int
    packed: bool


@dataclass(frozen=True)
class Tie:
    """One parameter under several names."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Repeated:
    """A module with weights that runs several times."""

    name: str
    times: int


def linears(found: list[Product]) -> list[Linear]:
    """Return the linear maps, once each."""
    return list(dict.fromkeys(Linear(p.name, p.inputs, p.outputs) for p in found
                              if not p.convolution))


def convolutions(run: Run, found: list[Product]) -> list[Convolution]:
    """Return the convolutions, once each."""
    made = []
    for product in found:
        if product.convolution:
            _, weight, _, stride, _, _, transposed, _, groups = product.operation.arguments[0]
            made.append(Convolution(product.name, product.inputs, product.outputs,
                                    run.shapes[weight.number][2:], tuple(stride), groups,
                                    transposed))
    return list(dict.fromkeys(made))


def norms(run: Run) -> list[tuple[Normalisation, Call]]:
    """Return the norms, each with the calls in which it ran."""
    inside: dict[Call, list[Operation]] = {}
    for operation in run.operations:
        if operation.call is not None:
            inside.setdefault(operation.call, []).append(operation)
    found = []
    for call in run.calls:
        kind = _norm_kind(call, inside.get(call, []))
        if kind is not None and call.taken and call.gave:
            shape = run.shapes[call.taken[0]]
            width = max((p.numel() for p in call.module.parameters(recurse=False)),
                        default=shape[1] if kind == "batch" else shape[-1])
            found.append((Normalisation(call.name, kind, width), call))
    return found


def _norm_kind(call: Call, operations: list[Operation]) -> str | None:
    """Return how a module without others normalises, None where it does not."""
    if call.children or not call.name:
        return None
    names = {operation.name for operation in operations}
    for kind in ("batch", "layer", "group", "rms"):
        if any(f"{kind}_norm" in name for name in names):
            return kind
    if {"mean", "rsqrt"} <= names:
        return "rms" if "pow" in names and "sub" not in names else "layer"
    return type(call.module).__name__ if is_norm(call.module) else None


def embeddings(run: Run) -> list[Embedding]:
    """Return the tables that were looked up in."""
    found = []
    for operation in run.operations:
        if operation.name in ("embedding", "embedding_bag", "_embedding_bag"):
            number = run.source(operation.taken[0])
            if number in run.parameters:
                rows, width = run.shapes[number]
                found.append(Embedding(named(run, operation, number)[0], rows, width))
    return list(dict.fromkeys(found))


def head(run: Run, found: list[Product]) -> str | None:
    """Return the layer whose output is the network's, elementwise functions apart."""
    made = {number: p for p in found for number in (p.gave, p.operation.gave[0])}
    number = run.output
    while number not in made:
        operation = run.maker.get(number)
        if operation is None or not (operation.layout or operation.elementwise
                                     or operation.name in ("_softmax", "_log_softmax")):
            return None
        fed = [n for n in operation.taken if run.fed[n] and run.taught[n]]
        if len(fed) != 1:
            return None
        number = fed[0]
    return made[number].name


def recurrents(run: Run) -> list[Recurrent]:
    """Return the recurrent layers and cells."""
    found: list[Recurrent] = []
    for name, calls in _by_module(run).items():
        module: Any = calls[0].module
        kind = type(module).__name__
        if isinstance(module, nn.RNNBase):
            found.append(Recurrent(name, kind, module.input_size, module.hidden_size,
                                   module.num_layers, 1 + module.bidirectional))
        elif isinstance(module, nn.RNNCellBase):
            found.append(Recurrent(name, kind, module.input_size, module.hidden_size))
        elif len(calls) > 1 and all(_feeds_itself(run, *pair)
                                    for pair in pairwise(calls)):
            found.append(Recurrent(name, kind, run.shapes[calls[0].taken[0]][-1],
                                   run.shapes[calls[0].gave[0]][-1]))
    return found


def _feeds_itself(run: Run, before: Call, after: Call) -> bool:
    """Return whether a call takes what the one before gave, and something new beside it."""
    new = set(after.taken) - set(before.taken)
    back = {n for n in new if run.source(n) in {run.source(g) for g in before.gave}}
    return bool(back) and any(run.fed[n] and not any(run.reaches(n, g) for g in before.gave)
                              for n in new - back)


def experts(run: Run, found: list[Product]) -> list[Experts]:
    """Return the mixtures of experts, by their routers or by what they are called."""
    made = []
    modules = dict(run.network.named_modules())
    called = {call.name for call in run.calls}
    for name, module in modules.items():
        sizes = _packed(module) if name in called else None
        packed = sizes is not None
        if isinstance(module, nn.ModuleList):
            sizes = _listed(run, name, module, called)
        if sizes is None:
            continue
        count, dim, hidden = sizes
        block = name.rpartition(".")[0]
        router, chosen = _router(run, found, block, name, count)
        if router is not None or name.rpartition(".")[2] == "experts":
            made.append(Experts(block, name, router, count, chosen, dim, hidden, packed))
    return made


def _listed(run: Run, name: str, members: nn.ModuleList,
            called: set[str]) -> tuple[int, int, int] | None:
    """Return count, width and hidden size of modules that are alike and stand side by side."""
    shapes = [[p.shape for p in member.parameters()] for member in members]
    ran = [call for i in range(len(members)) for call in run.called(f"{name}.{i}")]
    matrices = [shape for shape in shapes[0] if len(shape) == 2] if shapes else []
    if len(members) < 2 or not matrices or any(s != shapes[0] for s in shapes) or not ran:
        return None
    gave = [n for call in ran for n in call.gave]
    if any(n in gave or any(run.reaches(n, g) for g in gave if g < n)
           for call in ran for n in call.taken if run.fed[n]):
        return None
    dim = run.shapes[ran[0].taken[0]][-1]
    return len(members), dim, next((n for n in matrices[0] if n != dim), dim)


def _packed(module: nn.Module) -> tuple[int, int, int] | None:
    """Return count, width and hidden size of experts whose weights are in one parameter each."""
    packed = [(name, p) for name, p in module.named_parameters(recurse=False) if p.ndim == 3]
    if len(packed) < 2 or len({len(p) for _, p in packed}) > 1 or len(packed[0][1]) < 2:
        return None
    if isinstance(module, nn.modules.conv._ConvNd):
        return None
    (count, a, b), (_, c, d) = packed[0][1].shape, packed[-1][1].shape
    shared = {a, b} & {c, d}
    halved = {n for n in (a, b) if n / 2 in (c, d)}
    if len(shared) == 1 and halved:  # gate and up in one
        (dim,) = shared
        return count, dim, next(iter(halved)) // 2
    if len(shared) == 2:
        dim = c if getattr(module, "is_transposed", False) else b
        return count, dim, a + b - dim
    return None


def _router(run: Run, found: list[Product], block: str, inside: str,
            count: int) -> tuple[str | None, int | None]:
    """Return the layer in `block` that scores the experts, and how many a token goes to."""
    for product in found:
        if (product.outputs == count and _within(product.name, block)
                and not _within(product.name, inside)):
            return product.name, _chosen(run, product.gave)
    return None, None


def _chosen(run: Run, number: int) -> int | None:
    """Return how many of the largest entries are taken of what `number` leads to."""
    seen: set[int] = set()
    waiting = [number]
    while waiting:
        number = waiting.pop(0)
        for operation in run.readers[number]:
            if operation.name == "topk":
                return int(operation.arguments[0][1])
            if operation.gave[0] not in seen and (
                    operation.layout or operation.elementwise or "softmax" in operation.name):
                seen.add(operation.gave[0])
                waiting.append(operation.gave[0])
    return None


def ties(network: nn.Module) -> list[Tie]:
    """Return the parameters that have several names."""
    names: dict[int, list[str]] = {}
    for name, p in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return [Tie(tuple(shared)) for shared in names.values() if len(shared) > 1]


def repeated(run: Run) -> list[Repeated]:
    """Return the modules with weights that ran several times, the outermost ones."""
    times = Counter(call.name for call in run.calls if call.name and any(
        True for _ in call.module.parameters()))
    several = {name for name, count in times.items() if count > 1}
    return [Repeated(name, times[name]) for name in times if name in several and not any(
        around.name in several for call in run.called(name) for around in call.around()[1:])]


def unused(run: Run, apart: list[Experts]) -> list[str]:
    """Return the modules whose weights nothing read, outermost ones, unchosen experts apart."""
    read = {id(p) for p, number in run.learning() if run.readers[number]}
    dead: dict[str, bool] = {}
    for name, module in run.network.named_modules():
        own = list(module.parameters())
        dead[name] = bool(own) and not any(id(p) in read for p in own)
    inside = {block.experts for block in apart}
    return [name for name, is_dead in dead.items()
            if is_dead and not dead.get(name.rpartition(".")[0], False)
            and not any(_within(name, other) for other in inside)]


def _by_module(run: Run) -> dict[str, list[Call]]:
    found: dict[str, list[Call]] = {}
    for call in run.calls:
        if call.taken and call.gave and call.weights:
            found.setdefault(call.name, []).append(call)
    return found


def _within(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(outer + ".")
