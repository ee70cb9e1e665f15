"""Finds the chain of stages in a network."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from netwright.anatomy.calls import Call, in_turns, watch
from netwright.anatomy.turns import turns_of
from netwright.errors import CannotStage, UnknownName
from netwright.runtime.modes import evaluating, rehearsing
from netwright.stages._chains import (
    Candidate,
    candidates,
    groups_of,
    lists,
    member_stages,
    through,
    unique,
)
from netwright.stages._graph_networks import graph_stages, is_graph_network
from netwright.stages._sequential import sequential_stages
from netwright.stages._traced import NotTraceable, traced_stages
from netwright.stages._transformers import example_for, is_pretrained, options_for
from netwright.stages._verify import check_example, difference, parameters_reached
from netwright.stages.stage import Stages

__all__ = ["stages"]

_TRIES = 6


def stages(network: nn.Module | Stages, example: Any = None,
           cuts: Sequence[str] | None = None) -> Stages:
    """Read `network` as a chain of stages, which share its parameters.

    An `nn.Sequential` begins a new stage at each weighted layer; a Hugging Face model has a stage
    for each layer of its list of layers, a PyTorch Geometric `BasicGNN` for each convolution. Any
    other module is watched while it runs on `example`. Where that is given, the stages have been
    run beside the network and gave the same, bit for bit.

    Blocks that `reversible` or `parallelize_residual` put into a stack are a stage each still, and
    what passes between them, two streams, is one tensor with the features of both.

    Args:
        network: the module to read, or its stages, which are returned.
        example: an input as the network takes it: a tensor, a tuple of arguments or a mapping of
            keywords.
        cuts: names of the modules at which the stages begin; the first takes all before it.

    Raises:
        CannotStage: no chain was found, or `cuts` names none, or the network does not take
            `example`.
        UnknownName: `cuts` holds a name that no module has.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    >>> stages(network).names
    ['0', '3']
    """
    return read(network, example, cuts)


def read(network: nn.Module | Stages, example: Any = None, cuts: Sequence[str] | None = None, *,
         opened: bool = True) -> Stages:
    """Return the stages; modules that run others in turn are one stage unless they are `opened`."""
    if isinstance(network, Stages):
        return network if cuts is None else read(network.model, example, cuts, opened=opened)
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a module or its Stages, got {type(network).__name__}")
    if hasattr(network, "_orig_mod"):
        raise CannotStage("network was compiled by torch.compile, which hides its parts; give the "
                          "module that was compiled, and call its own compile() where the whole "
                          "network is to run compiled")
    names = _checked(network, cuts)
    if example is not None:
        check_example(network, example)
    net = None
    if type(network).forward is nn.Sequential.forward:
        net = sequential_stages(network, names, opened=opened)  # type: ignore[arg-type]
    elif is_graph_network(network):
        net = graph_stages(network, names)
    if net is not None:
        return _confirmed(net, example)
    if example is None and is_pretrained(network):
        example = example_for(network)
        check_example(network, example, "the example that was made for it")
    if example is None:
        raise CannotStage(f"the stages of {type(network).__name__} are found by watching it run; "
                          "give an input of it as example=")
    if opened:
        try:
            return _watched(network, example, names, opened=True)
        except CannotStage:
            if not any(map(turns_of, network.modules())):
                raise
    return _watched(network, example, names, opened=False)


def _checked(network: nn.Module, cuts: Sequence[str] | None) -> list[str] | None:
    if cuts is None:
        return None
    known = dict(network.named_modules(remove_duplicate=False))
    if isinstance(cuts, str) or not cuts:
        raise CannotStage(f"cuts must be a list of the names of modules, got {cuts!r}; try "
                          f"cuts={[name for name, _ in network.named_children()]!r}")
    for name in cuts:
        if name not in known or not name:
            raise UnknownName("module of the network", name, [k for k in known if k])
    if len(set(cuts)) < len(cuts):
        raise CannotStage(f"cuts={list(cuts)!r} names a module twice; name each once")
    return list(cuts)


def _confirmed(net: Stages, example: Any) -> Stages:
    wrong = None if example is None else difference(net, example)
    if wrong:
        raise CannotStage(f"{type(net.model).__name__} does not do what its stages "
                          f"{', '.join(net.names)} do: {wrong}; try cuts={net.names[:1]!r}, which "
                          "makes one stage of it")
    return net


def _watched(network: nn.Module, example: Any, cuts: list[str] | None, *,
             opened: bool) -> Stages:
    pretrained = is_pretrained(network)
    options = options_for(network, example) if pretrained else {}
    with evaluating(network), rehearsing(network):
        calls, _ = watch(network, example, **options)
    calls = in_turns(calls) if opened else calls
    seen: list[str] = []
    if cuts is not None:
        found = through(cuts, calls)
        if isinstance(found, str):
            seen.append(found)
        else:
            net = _built(network, example, calls, *found, cuts, options, seen)
            if net is not None:
                return net
        traced = None if pretrained else _traced(network, example, cuts, seen)
        if traced is not None:
            return traced
        try:
            names = _watched(network, example, None, opened=opened).names
        except CannotStage:
            names = None
        raise _refusal(network, calls, seen, names)

    traced = None if pretrained else _traced(network, example, None, seen)
    for candidate in islice(_tries(calls, _around_pretrained(network)), _TRIES):
        starts = groups_of(candidate.path)
        # a watched chain runs the network's own code, so it may lack a head of its own
        if traced is not None and len(traced) > len(starts) + 1:
            return traced
        names = unique([candidate.path[k].name for k in starts])
        net = _built(network, example, calls, candidate.path, starts, names, options, seen)
        if net is not None:
            return net
    if traced is not None:
        return traced
    raise _refusal(network, calls, seen)


def _around_pretrained(network: nn.Module) -> bool:
    """Return whether all weights are a Hugging Face model's, as where adapters were put in it."""
    held = set(network.parameters())
    return any(is_pretrained(part) and set(part.parameters()) == held
               for part in network.modules())


def _tries(calls: list[Call], pretrained: bool) -> Iterator[Candidate]:
    found = lists(calls) if pretrained else []
    yield from (some for some in found if len(groups_of(some.path)) > 2)
    if found:  # of a list of two, such as a convolutional network's resolutions, look into both
        listed = {call.module for some in found for call in some.path}
        inside = {part for module in listed for part in module.modules()} - listed
        yield from islice((c for c in candidates(calls) if len(groups_of(c.path)) > 2
                           and sum(call.module in inside for call in c.path) > 2), _TRIES // 2)
    yield from (some for some in found if len(groups_of(some.path)) <= 2)
    yield from candidates(calls)


def _traced(network: nn.Module, example: Any, cuts: list[str] | None,
            seen: list[str]) -> Stages | None:
    try:
        with evaluating(network), rehearsing(network):
            net = traced_stages(network, example, cuts)
    except NotTraceable as reason:
        seen.append(str(reason))
        return None
    wrong = difference(net, example)
    if wrong:
        seen.append(f"traced as the chain {', '.join(net.names)} {wrong}")
    return None if wrong else net


def _built(network: nn.Module, example: Any, calls: list[Call], path: list[Call],
           starts: list[int], names: list[str], options: dict[str, Any],
           seen: list[str]) -> Stages | None:
    net = member_stages(network, calls, path, starts, names, options)
    wrong = difference(net, example)
    if wrong:
        seen.append(f"as the chain {', '.join(names)} {wrong}")
        return None
    _share_out(net, example)
    return net


def _share_out(net: Stages, example: Any) -> None:
    """Give parameters that belong to no stage's modules to those stages that use them."""
    owned = {id(p) for stage in net for p in stage.parameters()}
    left = [p for p in net.model.parameters() if id(p) not in owned and p.is_floating_point()]
    if not left:
        return
    before = [(p, p.requires_grad) for p in left]
    try:
        for p in left:
            p.requires_grad_(True)
        with evaluating(net.model), rehearsing(net.model), torch.enable_grad():
            context, h = net.context(example, live=True), example
            for i, stage in enumerate(net):
                h = stage(h, context)
                reached = parameters_reached(
                    [h, getattr(context, "arguments", None)] if i == 0 else h)
                stage.loose = _among(left, reached)
                h = h.detach()
    finally:
        for p, required in before:
            p.requires_grad_(required)


def _among(parameters: list[Parameter], ids: set[int]) -> list[Parameter]:
    return [p for p in parameters if id(p) in ids]


def _refusal(network: nn.Module, calls: list[Call], seen: list[str],
             found: list[str] | None = None) -> CannotStage:
    """Return the error that says what was seen and what to try."""
    kind, layers = type(network).__name__, [c.name for c in calls[1:] if c.weights]
    seen = seen or ["nothing that one of them returned was what the next one took"]
    if not calls[0].weights:
        return CannotStage(f"{kind} holds no layer with weights, so it has no stages")
    if not layers:
        return CannotStage(f"{kind} called no layer of its own that could be a stage ({seen[0]}); "
                           "to have it as one stage, give nn.Sequential(network)")
    if found is not None:
        return CannotStage(f"{kind} does not read as stages that begin at those cuts: {seen[0]}; "
                           f"try cuts={found!r}")
    return CannotStage(
        f"{kind} does not read as a chain of stages, each of which takes what the one before it "
        f"returns: it called {_listed(layers)}, but {'; '.join(seen[:2])}. Wrap layers between "
        f"which more than one tensor passes in a module, or try cuts={layers[:1]!r}, which makes "
        "one stage of the network")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
