"""Reads functional code between layers as a chain, by tracing it with torch.fx.

A stage may end after each operation on whose result alone everything later depends.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from netwright.anatomy.layers import reversible, weighted
from netwright.errors import CannotStage
from netwright.signals import tensor_of
from netwright.stages._bind import bound
from netwright.stages._chains import unique
from netwright.stages.stage import Context, Stage, Stages

_LEAVES = ("torch.nn", "torch.ao.nn", "torch_geometric.nn", "transformers.")


@dataclass(frozen=True)
class _Value:
    """Stands for the result of an earlier operation, or for an argument of the model."""

    name: str


@dataclass(frozen=True)
class _Attribute:
    """Stands for a parameter or a buffer of the model."""

    name: str


@dataclass(frozen=True)
class _Step:
    """One operation; `done` names the results that nothing later in its stage uses."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    done: tuple[str, ...]


@dataclass
class _Segment:
    """Operations between two places where the signal is all that passes."""

    nodes: list[fx.Node]
    signal: fx.Node | None
    weights: list[str]


@dataclass
class _Plan:
    """The steps of each stage, the names of the signals between them, and its weights."""

    steps: list[list[_Step]]
    signals: list[str]
    weights: list[list[str]]
    names: list[str]
    targets: list[tuple[list[str], list[str]]]


class NotTraceable(Exception):
    """The model's forward cannot be traced; its text says why."""


class TracedStage(Stage):
    """The operations between two signals of a traced forward."""

    def __init__(self, name: str, modules: list[nn.Module], loose: list[nn.Parameter],
                 trace: "Trace", i: int) -> None:
        super().__init__(name, modules, loose)
        self.trace, self.i = trace, i

    def __call__(self, h: Any, context: Context) -> Tensor:
        """Return what the next stage takes."""
        return self.trace.run(self.i, h, context.x)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = reversible(m) or (type(m).__module__.startswith(_LEAVES)
                                 and not isinstance(m, nn.Sequential))
        if not leaf:
            self.opened.append(m)
        return leaf


class Trace:
    """The traces of one model, one for each way in which its opened modules train."""

    def __init__(self, model: nn.Module, example: Any, cuts: list[str] | None,
                 uncut: set[str]) -> None:
        self.model, self.cuts, self.uncut = model, cuts, uncut
        self.given = set(bound(model, example))
        self.opened: list[nn.Module] = [model]
        self.plans: dict[tuple[bool, ...], _Plan] = {}
        self.weights: list[list[str]] | None = None
        self.plan()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the plans, which hold functions that cannot be pickled and are made again."""
        return {**self.__dict__, "plans": {}}

    def plan(self) -> _Plan:
        """Return the plan for the modes that the opened modules are in."""
        modes = tuple(module.training for module in self.opened)
        if modes not in self.plans:
            plan, opened = self._trace()
            if self.weights is None:
                self.weights, self.opened = plan.weights, opened
                modes = tuple(module.training for module in opened)
            elif plan.weights != self.weights or opened != self.opened:
                raise CannotStage(f"{type(self.model).__name__} uses other layers in train mode "
                                  "than in eval mode; wrap what differs in a module")
            self.plans[modes] = plan
        return self.plans[modes]

    def run(self, i: int, h: Any, x: Any) -> Tensor:
        """Run stage `i` on `h`; `x` is what the model was given."""
        plan = self.plan()
        values = bound(self.model, h if i == 0 else x)
        if set(values) != self.given:
            raise CannotStage(f"{type(self.model).__name__} was read as stages with the arguments "
                              f"{sorted(self.given)}, and was now given {sorted(values)}; give "
                              "stages() an example with those arguments")
        if i:
            values[plan.signals[i - 1]] = h

        def value(item: Any) -> Any:
            if isinstance(item, _Value):
                return values[item.name]
            return _attribute(self.model, item.name) if isinstance(item, _Attribute) else item

        result: Any = None
        for step in plan.steps[i]:
            args, kwargs = map_aggregate(step.args, value), map_aggregate(step.kwargs, value)
            if step.op == "call_module":
                result = _attribute(self.model, step.target)(*args, **kwargs)
            elif step.op == "call_method":
                result = getattr(args[0], step.target)(*args[1:], **kwargs)
            elif step.op == "output":
                return tensor_of(args[0])
            else:
                result = step.target(*args, **kwargs)
            values[step.name] = result
            del args, kwargs
            for name in step.done:
                del values[name]
        return values[plan.signals[i]]

    def _trace(self) -> tuple[_Plan, list[nn.Module]]:
        before = set(self.model.__dict__)
        tracer = _Tracer()
        parameters = inspect.signature(type(self.model).forward).parameters
        constants = {name: p.default for name, p in list(parameters.items())[1:]
                     if name not in self.given and p.default is not p.empty}
        try:
            graph = tracer.trace(self.model, constants or None)
        except Exception as error:  # the model's own code runs here on stand-ins for tensors
            raise NotTraceable(f"torch.fx cannot trace it ({error})") from error
        finally:
            # the tracer leaves tensors that the forward makes by itself on the model
            made = {name: self.model.__dict__.pop(name)
                    for name in set(self.model.__dict__) - before
                    if name.startswith("_tensor_constant")}
        if any(t.requires_grad for t in made.values()):
            raise NotTraceable("it computes with its parameters alone")
        segments = _segments(self.model, graph, self.given, self.uncut)
        starts = _starts(segments) if self.cuts is None else _cut(segments, self.cuts)
        groups = [segments[a:b] for a, b in zip(starts, [*starts[1:], len(segments)], strict=True)]
        return _plan(groups, made, self.cuts, self.model), [self.model, *tracer.opened]


def traced_stages(model: nn.Module, example: Any, cuts: list[str] | None) -> Stages:
    """Return the chain of `model` as it is traced.

    Raises:
        NotTraceable: the forward cannot be traced, or has no place to cut.
    """
    uncut: set[str] = set()
    while True:
        trace, stages = Trace(model, example, cuts, uncut), []
        plan = trace.plan()
        for i, (name, (modules, loose)) in enumerate(zip(plan.names, plan.targets, strict=True)):
            stages.append(TracedStage(
                name, [_attribute(model, m) for m in dict.fromkeys(modules)],
                [p for n in loose if isinstance(p := _attribute(model, n), nn.Parameter)],
                trace, i))
        net = Stages(model, stages)
        pieces = {plan.signals[i] for i, h in enumerate(_signals(net, example))
                  if not isinstance(h, Tensor)}
        if not pieces:
            return net
        uncut = uncut | pieces


def _signals(net: Stages, example: Any) -> Iterator[Any]:
    context, h = net.context(example), example
    for stage in net:
        h = stage(h, context)
        yield h


def _attribute(model: nn.Module, name: str) -> Any:
    value: Any = model
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _segments(model: nn.Module, graph: fx.Graph, given: set[str],
              uncut: set[str]) -> list[_Segment]:
    """Cut `graph` wherever one value is all that later operations use of what was computed.

    Arguments of the model but the first, parameters and buffers are at hand in every stage. The
    values named `uncut` are not tensors.
    """
    # what the tracer adds to see that arguments left out stay at their defaults
    idle: set[fx.Node] = set()
    for node in graph.nodes:
        if ((node.op == "placeholder" and str(node.target) not in given)
                or not idle.isdisjoint(node.all_input_nodes)):
            idle.add(node)
    nodes = [node for node in graph.nodes if node not in idle]
    order = {node: i for i, node in enumerate(nodes)}
    main = next((n for n in nodes if n.op == "placeholder"), None)
    last_use = {n: max((order[u] for u in n.users if u in order), default=-1) for n in nodes}
    segments: list[_Segment] = []
    here: list[fx.Node] = []
    live: set[fx.Node] = set()
    for i, node in enumerate(nodes):
        if node.op == "get_attr" or (node.op == "placeholder" and node is not main):
            continue
        here.append(node)
        live = {n for n in (*live, node) if last_use[n] > i}
        alone = len(live) == 1 and next(iter(live)).name not in uncut
        if node.op != "placeholder" and (alone or node.op == "output"):
            weights = list(dict.fromkeys(w for n in here for w in _weights(model, n)))
            segments.append(_Segment(here, next(iter(live), None), weights))
            here = []
    return segments


def _weights(model: nn.Module, node: fx.Node) -> list[str]:
    """Return the names of the weighted layers, or of the matrices, that `node` applies."""
    found = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"
             and isinstance(p := _get(model, str(n.target)), nn.Parameter) and p.ndim > 1]
    if node.op == "call_module" and weighted(_attribute(model, str(node.target))):
        found.append(str(node.target))
    return found


def _get(model: nn.Module, name: str) -> Any:
    try:
        return _attribute(model, name)
    except AttributeError:  # a constant that the tracer had left there
        return None


def _starts(segments: list[_Segment]) -> list[int]:
    starts = [0]
    for i, segment in enumerate(segments):
        if segment.weights and any(s.weights for s in segments[starts[-1]:i]):
            starts.append(i)
    if len(starts) < 2:
        raise NotTraceable("nowhere between its layers does one tensor hold all that passes")
    return starts


def _cut(segments: list[_Segment], cuts: list[str]) -> list[int]:
    places: list[tuple[int, int]] = []
    for cut in cuts:
        place = next(((i, k) for i, s in enumerate(segments) for k, n in enumerate(s.nodes)
                      if cut in _owners(n)), None)
        if place is None:
            raise NotTraceable(f"{cut} was not called where it could be seen")
        i, k = place
        if places and any(n.op == "call_module" for n in segments[i].nodes[:k]):
            raise NotTraceable(f"more than one tensor passes to {cut}")
        places.append(place)
    if places != sorted(places):
        raise NotTraceable(f"{', '.join(cuts)} is not the order in which they are called")
    starts = [0, *(i for i, _ in places[1:])]
    if len(set(starts)) < len(starts):
        raise NotTraceable("more than one tensor passes between two of them")
    return starts


def _owners(node: fx.Node) -> set[str]:
    stack = node.meta.get("nn_module_stack", {})
    names = {str(entry[0] if isinstance(entry, tuple) else entry) for entry in stack.values()}
    return {*map(str, stack), *names, *([str(node.target)] if node.op == "call_module" else [])}


def _plan(groups: list[list[_Segment]], made: dict[str, Any], cuts: list[str] | None,
          model: nn.Module) -> _Plan:
    def symbol(item: Any) -> Any:
        if not isinstance(item, fx.Node):
            return item
        if item.op == "get_attr":
            name = str(item.target)
            return made[name] if name in made else _Attribute(name)
        return _Value(str(item.target) if item.op == "placeholder" else item.name)

    steps, signals, weights, targets = [], [], [], []
    names: list[str] = []
    for group in groups:
        nodes = [n for segment in group for n in segment.nodes if n.op != "placeholder"]
        signal, position = group[-1].signal, {n: i for i, n in enumerate(nodes)}
        done: dict[int, list[str]] = {}
        for node in nodes:
            if node is not signal and node.op != "output":
                last = max((position.get(u, -1) for u in node.users), default=-1)
                done.setdefault(max(last, position[node]), []).append(node.name)
        steps.append([_Step(n.op, n.name, n.target, map_aggregate(n.args, symbol),
                            map_aggregate(n.kwargs, symbol), tuple(done.get(i, ())))
                      for i, n in enumerate(nodes)])
        signals.append("" if signal is None else signal.name)
        weights.append([w for segment in group for w in segment.weights])
        names.append(_name(weights[-1], names))
        targets.append(([str(n.target) for n in nodes if n.op == "call_module"],
                        [str(a.target) for n in nodes for a in n.all_input_nodes
                         if a.op == "get_attr" and str(a.target) not in made]))
    return _Plan(steps, signals, weights, cuts or unique(names), targets)


def _name(weights: list[str], taken: list[str]) -> str:
    """Return the module that holds all of `weights`, or the first of them."""
    parts = [w.split(".") for w in weights]
    common = parts[0] if parts else []
    for other in parts[1:]:
        while common != other[:len(common)]:
            common = common[:-1]
    name = ".".join(common)
    return name if name and name not in taken else weights[0] if weights else str(len(taken))
