"""Blocks put where they go: each kind of place is found by watching one run of the network."""

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import conv, pooling

from netwright.anatomy.layers import is_linear, is_norm
from netwright.blocks.experts.mixture import MixtureOfExperts
from netwright.blocks.feedforward.feed_forward import FeedForward
from netwright.catalogue.facets import facets
from netwright.compare.recipe import Step
from netwright.compare.supplies import constant, parameters, sizes, supplied
from netwright.errors import NothingToReshape
from netwright.generative.flows.flow import Flow, Transform
from netwright.reshape.exchanging.exchange_modules import exchange_modules
from netwright.reshape.feedforward.swap_feedforward import swap_feedforward
from netwright.runtime.modes import evaluating, rehearsing
from netwright.stages import call
from netwright.tasks import Task
from netwright.tasks.densities import Density, Field, conditioner

__all__ = ["put"]

EXPERTS = 4


@dataclass(frozen=True)
class Site:
    """A module in whose place a block may stand: its name, and what it takes and gives."""

    name: str
    module: nn.Module
    taken: Tensor
    given: Tensor
    sizes: Mapping[str, Any] = field(default_factory=dict)


def put(network: nn.Module, step: Step, task: Task) -> nn.Module:
    """Return a copy of `network` with the block of `step` wherever blocks of its place go.

    Raises:
        NothingToReshape: the network has no such place.
        ValueError: the block does not fit there, or lets a position see those that come after it
            where the network did not.
    """
    said = facets(step.what)
    place = "" if said is None else said.place
    if place != "whole network" and isinstance(step.what, type) and issubclass(
            step.what, Transform):
        place = "transform"
    if not place:
        raise ValueError(f"{step.name} cannot run on task {task.name!r} because it does not say "
                         "where in a network it goes; give a function of the network that puts "
                         "it there")
    if place not in PLACES:
        raise ValueError(f"{step.name} cannot run on task {task.name!r} because nothing is known "
                         f"of how to put a block of the place {place!r} into a network; give a "
                         "function of the network that puts it there")
    try:
        changed = PLACES[place](network, step, task)
    except NothingToReshape as error:
        raise NothingToReshape(f"{step.name} cannot run on task {task.name!r} because {error}"
                               ) from error
    _check(network, changed, step, task)
    return changed


def check_whole(network: nn.Module, step: Step, task: Task) -> None:
    """Raise where a network that gives scores would stand for one that gives a density."""
    if any(isinstance(part, Flow) for part in network.modules()):
        raise ValueError(f"{step.name} cannot run on task {task.name!r} because that learns a "
                         "density, which it does not give")


def _whole_network(network: nn.Module, step: Step, task: Task) -> nn.Module:
    if isinstance(network, Density) and _kind(step) == "generative":
        return _density(network, step, task)
    check_whole(network, step, task)
    offered = {name: size() for name, size in sizes(task).items()}
    said = facets(step.what)
    if said is not None and "images" in said.needs:
        if "size" not in offered:
            raise NothingToReshape("its inputs are no images")
        offered["inputs"] = offered["channels"]  # what a convolution calls so
        usual = getattr(parameters(step.what).get("patch"), "default", 1)
        if any(axis % usual or axis == usual for axis in offered["size"]):
            offered["patch"] = max(1, min(offered["size"]) // 4)
    takes = () if said is None else said.takes
    return _made(step, {name: size for name, size in offered.items()
                        if name in (*takes, "patch")}, only=("patch",))


def _density(network: Density, step: Step, task: Task) -> nn.Module:
    size = task.first.shape[1:]
    channels, flow = size[0], deepcopy(network.flow)
    return Density(_made(step, {
        "size": tuple(size), "transforms": list(flow.transforms) if isinstance(flow, Flow) else [],
        "net": Field(conditioner(channels, channels, len(size) - 1))}))


def _kind(step: Step) -> str:
    said = facets(step.what)
    return "" if said is None else said.kind


def _feedforward(network: nn.Module, step: Step, task: Task) -> nn.Module:
    def make(dim: int, hidden: int) -> nn.Module:
        def expert() -> nn.Module:
            return FeedForward(dim, hidden)
        return _made(step, {"dim": dim, "hidden": hidden, "n_experts": EXPERTS,
                            "experts": [expert() for _ in range(EXPERTS)]})
    return swap_feedforward(network, make, task.first, progress=False)


def _router(network: nn.Module, step: Step, task: Task) -> nn.Module:
    def make(dim: int, hidden: int) -> nn.Module:
        router = _made(step, {"dim": dim, "n_experts": EXPERTS})
        return MixtureOfExperts(dim, lambda: FeedForward(dim, hidden), router, n_experts=EXPERTS)
    return swap_feedforward(network, make, task.first, progress=False)


def _experts(network: nn.Module, step: Step, task: Task) -> nn.Module:
    def make(dim: int, hidden: int) -> nn.Module:
        made = _made(step, {"dim": dim, "hidden": hidden, "n_experts": EXPERTS})
        if "n_experts" in parameters(step.what):
            return MixtureOfExperts(dim, made)
        return MixtureOfExperts(dim, [*(FeedForward(dim, hidden) for _ in range(EXPERTS)), made])
    return swap_feedforward(network, make, task.first, progress=False)


def _activation(network: nn.Module, step: Step, task: Task) -> nn.Module:
    try:
        sites = _sites(network, task, "activation", _elementwise)
    except NothingToReshape:  # a function in a feed-forward layer, where no module is
        def make(dim: int, hidden: int) -> nn.Module:
            return FeedForward(dim, hidden, activation=_making(step, {"dim": hidden}))
        return swap_feedforward(network, make, task.first, progress=False)
    return _replaced(network, step, [(site, {"dim": site.given.shape[-1]}) for site in sites])


def _elementwise(site: Site) -> bool:
    """Return whether a module without parts makes of each number another, whatever the others."""
    x, leaf = site.taken, not list(site.module.children())
    if not leaf or not x.is_floating_point() or x.shape != site.given.shape:
        return False
    other = x.clone()
    other.view(-1)[0] += 1
    with evaluating(site.module), rehearsing(site.module):
        before, after = site.module(x), site.module(other)
    alike = before == after
    return not torch.equal(before, x) and bool(alike.view(-1)[1:].all())


def _normalisation(network: nn.Module, step: Step, task: Task) -> nn.Module:
    sites = _sites(network, task, "normalisation", lambda site: is_norm(site.module))
    return _replaced(network, step, [(site, {"dim": site.given.shape[-1]}) for site in sites])


def _convolution(network: nn.Module, step: Step, task: Task) -> nn.Module:
    sites = _sites(network, task, "convolution",
                   lambda site: isinstance(site.module, conv._ConvNd))
    return _replaced(network, step, [(site, {
        "inputs": site.taken.shape[1], "outputs": site.given.shape[1],
        "channels": site.taken.shape[1], "dims": site.taken.ndim - 2}) for site in sites])


def _linear(network: nn.Module, step: Step, task: Task) -> nn.Module:
    *hidden, last = _linears(network, task)
    # Some count what they take or give once for each of several copies.
    return _first([partial(_replaced, network, step, [
        (site, _ends(site, *parts)) for site in hidden or [last]], only=("units",))
        for parts in ((1, 1), (1, 2), (1, 4), (2, 2), (4, 4))])


def _head(network: nn.Module, step: Step, task: Task) -> nn.Module:
    last = _linears(network, task)[-1]
    return _replaced(network, step, [(last, {**_ends(last), "dim": last.taken.shape[-1],
                                             "out": last.given.shape[-1]})])


def _embedding(network: nn.Module, step: Step, task: Task) -> nn.Module:
    first = _linears(network, task)[0]
    dim, out = first.taken.shape[-1], first.given.shape[-1]
    return _replaced(network, step, [(first, {"dim": dim, "dims": dim, "n_features": out,
                                              "frequencies": out // 2})],
                     only=("frequencies",))


def _attention(network: nn.Module, step: Step, task: Task) -> nn.Module:
    def make(dim: int, heads: int) -> nn.Module:
        return _made(step, {"dim": dim, "heads": heads, "causal": _predicts_next(task)},
                     only=("causal",))
    try:
        sites = _sites(network, task, "attention", lambda site: isinstance(
            site.module, nn.MultiheadAttention))
    except NothingToReshape:
        if "attention" not in parameters(task.network) or str(network) != str(task.network()):
            raise
        return task.network(attention=make)  # type: ignore[call-arg]
    return _replaced(network, step, [(site, {
        "dim": site.given.shape[-1], "causal": getattr(site.module, "causal", False),
        "heads": getattr(site.module, "num_heads", getattr(site.module, "heads", 1))})
        for site in sites], only=("causal",))


def _token_mixing(network: nn.Module, step: Step, task: Task) -> nn.Module:
    sites = _sites(network, task, "token mixing", lambda site: False)
    return _replaced(network, step, [(site, _grid(site)) for site in sites])


def _residual_block(network: nn.Module, step: Step, task: Task) -> nn.Module:
    try:
        sites = _blocks(network, task)
    except NothingToReshape:
        return _after_activations(network, step, task)
    if "depth" not in parameters(step.what):
        # A block of two streams counts the size of one.
        return _first([partial(_replaced, network, step, [
            (site, _grid(site, parts)) for site in sites]) for parts in (1, 2)])
    def whole() -> nn.Module:
        return _made(step, {**_grid(sites[0]), "depth": len(sites)})
    # One block is a stack of them: it stands for the first, and nothing for the others.
    return exchange_modules(network, {site.name: whole if site is sites[0] else nn.Identity
                                      for site in sites})


def _residual_stream(network: nn.Module, step: Step, task: Task) -> nn.Module:
    try:
        sites = _sites(network, task, "residual stream", lambda site: is_linear(
            site.module) and site.taken.ndim == 2 and site.taken.shape == site.given.shape)
    except NothingToReshape:
        return _after_activations(network, step, task)

    def half(dim: int, times: int) -> nn.Module:
        return FeedForward(dim // 2, dim // 2, out=times * (dim // 2))
    # A coupling asks its network for one number an entry, or for two.
    return _first([partial(_replaced, network, step, [(site, {
        "f": half(site.taken.shape[-1], times), "g": half(site.taken.shape[-1], times),
        "module": FeedForward(site.taken.shape[-1]), "dim": site.taken.shape[-1]})
        for site in sites]) for times in (1, 2)])


def _after_activations(network: nn.Module, step: Step, task: Task) -> nn.Module:
    """Put a block after each activation of a convolutional network, where it may keep the shape."""
    sites = [site for site in _sites(network, task, "residual stream", _elementwise)
             if site.given.ndim > 3]
    if not sites:
        raise NothingToReshape("its network has no stream that a block could go into; try another")
    return _replaced(network, step, [(site, {
        **dict.fromkeys(("channels", "inputs", "dim"), site.given.shape[1]),
        "dims": site.given.ndim - 2}) for site in sites], only=("dims",), after=True)


def _downsampling(network: nn.Module, step: Step, task: Task) -> nn.Module:
    sites = _sites(network, task, "downsampling", lambda site: type(
        site.module).__module__ == pooling.__name__ and site.taken.ndim == 4)

    def make(site: Site) -> nn.Module:
        block = _made(step, {"channels": site.taken.shape[1]})
        with rehearsing(block):
            channels = block(site.taken).shape[1]
        # A convolution of single places brings the channels back to what the next module takes.
        return nn.Sequential(block, nn.Conv2d(channels, site.given.shape[1], 1))
    return exchange_modules(network, {site.name: partial(make, site) for site in sites})


def _transform(network: nn.Module, step: Step, task: Task) -> nn.Module:
    """Put a transform in place of each coupling of a flow, or before it if it has no network."""
    network = deepcopy(network)
    flow = next((part for part in network.modules() if isinstance(part, Flow)), None)
    if flow is None:
        raise NothingToReshape("its network is no flow; try moons-flow or digits-flow")
    x, made = task.first, list[nn.Module]()
    said = facets(step.what)
    replaces = said is not None and "net" in said.takes
    for number, part in enumerate(flow.transforms):
        couples = isinstance(getattr(part, "net", None), nn.Module)
        if couples:
            made.append(_first([partial(_transformed, step, x, number, times)
                                for times in range(1, 64)] if replaces else
                               [partial(_transformed, step, x, number, 1)]))
            x = _given(made[-1], x)
        if not (couples and replaces):
            made.append(part)
            x = _given(part, x)
    flow.transforms = nn.ModuleList(made)
    return network


def _transformed(step: Step, x: Tensor, number: int, times: int) -> nn.Module:
    """Return a transform whose network gives `times` the numbers that it changes; try it on x."""
    channels, axes = x.shape[1], x.ndim - 2
    changed, kept = channels - channels // 2, channels // 2
    whole = said.takes == ("net",) if (said := facets(step.what)) else False
    net = (conditioner(channels, times * channels, axes) if whole else
           conditioner(kept, times * changed, axes) if number % 2 == 0 or changed == kept else
           conditioner(changed, times * kept, axes))
    made = _made(step, {"net": net, "sizes": (changed, kept), "channels": channels,
                        "dim": channels, "order": list(reversed(range(channels))),
                        "flip": bool(number % 2)}, only=("flip",))
    _given(made, x)
    return made


def _given(transform: nn.Module, x: Tensor) -> Tensor:
    with rehearsing(transform):  # on a copy, since some begin by what they first see
        given: Tensor = deepcopy(transform)(x)[0]
    return given


def _first(attempts: list[Callable[[], nn.Module]]) -> nn.Module:
    """Return what the first attempt gives that does not fail; else fail as the first did."""
    failure: Exception | None = None
    for attempt in attempts:
        try:
            return attempt()
        except (ValueError, RuntimeError) as error:
            failure = failure or error
    assert failure is not None
    raise failure


PLACES: Mapping[str, Callable[[nn.Module, Step, Task], nn.Module]] = {
    "activation": _activation, "attention": _attention, "convolution": _convolution,
    "downsampling": _downsampling, "embedding": _embedding, "experts": _experts,
    "feedforward": _feedforward, "head": _head, "linear": _linear,
    "normalisation": _normalisation, "residual block": _residual_block,
    "residual stream": _residual_stream, "router": _router, "token mixing": _token_mixing,
    "transform": _transform, "whole network": _whole_network}


def _ends(site: Site, taking: int = 1, giving: int = 1) -> dict[str, int]:
    taken, given = site.taken.shape[-1] // taking, site.given.shape[-1] // giving
    return {**dict.fromkeys(("inputs", "in_features", "dim_in"), taken),
            **dict.fromkeys(("outputs", "out_features", "dim_out", "units"), given)}


def _grid(site: Site, parts: int = 1) -> dict[str, int]:
    """Return the sizes of a signal (batch, tokens, dim), as a square of tokens where it is one."""
    tokens, dim = site.taken.shape[-2], site.taken.shape[-1] // parts
    side = math.isqrt(tokens)
    square = {"height": side, "width": side} if side * side == tokens else {}
    heads = getattr(site.module, "heads", None)
    return {"tokens": tokens, "dim": dim, "channels": dim, **square,
            **({} if heads is None else {"heads": heads})}


def _linears(network: nn.Module, task: Task) -> list[Site]:
    return _sites(network, task, "linear", lambda site: is_linear(site.module))


def _blocks(network: nn.Module, task: Task) -> list[Site]:
    """Return the outermost modules that give (batch, tokens, dim) what they take, with a norm."""
    found: list[Site] = []

    def fits(site: Site) -> bool:
        return (site.taken.ndim == 3 and site.taken.shape == site.given.shape
                and site.taken.is_floating_point()
                and len([p for p in site.module.parameters() if p.ndim > 1]) > 1
                and bool(site.name) and not isinstance(site.module, nn.Sequential))
    for site in sorted(_sites(network, task, "residual block", fits),
                       key=lambda site: site.name.count(".")):
        if not any(site.name.startswith(other.name + ".") for other in found):
            found.append(site)
    order = [name for name, _ in network.named_modules()]
    return sorted(found, key=lambda site: order.index(site.name))


def _sites(network: nn.Module, task: Task, place: str,
           fits: Callable[[Site], bool]) -> list[Site]:
    """Return the modules that `fits`, or that say that they go to `place`, as they run."""
    found = []
    for site in _watched(network, task.first):
        said = facets(type(site.module))
        if fits(site) or (said is not None and said.place == place):
            found.append(site)
    if not found:
        raise NothingToReshape(f"its network has no place of the kind {place!r}; try another")
    return found


def _watched(network: nn.Module, x: Any) -> Iterator[Site]:
    """Yield each module that takes a tensor and gives one, with those of its first run."""
    sites: dict[str, Site] = {}
    handles = []
    for name, module in network.named_modules():
        def after(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            first = args[0] if args else None
            given = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and isinstance(given, Tensor):
                sites.setdefault(name, Site(name, module, first, given))
        handles.append(module.register_forward_hook(after))
    try:
        with evaluating(network), rehearsing(network):
            call(network, x)
    finally:
        for handle in handles:
            handle.remove()
    yield from sites.values()


def _replaced(network: nn.Module, step: Step, sites: list[tuple[Site, Mapping[str, Any]]],
              only: tuple[str, ...] = (), *, after: bool = False) -> nn.Module:
    """Return a copy with a block, made of what is offered, at each site or after it."""
    return exchange_modules(network, {
        site.name: partial(_fitting, step, site, offered, only, site.given if after else site.taken)
        for site, offered in sites}, after=after)


def _fitting(step: Step, site: Site, offered: Mapping[str, Any], only: tuple[str, ...],
             taken: Tensor) -> nn.Module:
    """Return a block that gives of `taken` what the site gave."""
    block = _made(step, offered, only)
    with evaluating(block), rehearsing(block):
        given = deepcopy(block)(taken)  # a copy, since some begin by what they first see
    if not isinstance(given, Tensor) or given.shape != site.given.shape:
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"{step.name} must give {tuple(site.given.shape)} in the place of "
                         f"{site.name!r}, a {type(site.module).__name__}, got {shape}")
    return block


def _made(step: Step, offered: Mapping[str, Any], only: tuple[str, ...] = ()) -> nn.Module:
    """Build the block from what the place offers."""
    return _making(step, offered, only)()


def _making(step: Step, offered: Mapping[str, Any],
            only: tuple[str, ...] = ()) -> Callable[[], nn.Module]:
    """Return what builds the block from what it takes and cannot lack of what the place offers.

    A name in `only` is given where the block has such an argument.
    """
    said = facets(step.what)
    takes = (*said.takes, *only) if said is not None else only
    wanted = {name: value for name, value in offered.items() if name in takes or (
        name in parameters(step.what)
        and parameters(step.what)[name].default is Parameter.empty)}
    return partial(step.what, **supplied(step, constant(wanted), skip=0))


def _check(network: nn.Module, changed: nn.Module, step: Step, task: Task) -> None:
    """Raise unless `changed` gives what `network` gave, and looks no further ahead."""
    x = task.first
    before, after = _run(network, x), _run(changed, x)
    if before.shape != after.shape:
        raise ValueError(f"{step.name} must leave what the network gives as it is, "
                         f"{tuple(before.shape)}, got {tuple(after.shape)}")
    if _predicts_next(task) and before.shape[:2] == x.shape[:2]:
        other = x.clone()
        other[:, -1] += torch.where(other[:, -1] > 0, -1, 1)
        for model, first in ((network, before), (changed, after)):
            if not torch.allclose(first[:, :-1], _run(model, other)[:, :-1], atol=1e-5):
                if model is network:
                    return
                raise ValueError(f"{step.name} cannot run on task {task.name!r} because with it a "
                                 "position sees those that come after it, which are what the "
                                 "network is to predict")


def _predicts_next(task: Task) -> bool:
    """Whether the task's inputs are sequences of tokens, each of which predicts the next."""
    x = task.first
    return isinstance(x, Tensor) and x.ndim == 2 and not x.is_floating_point()


def _run(network: nn.Module, x: Any) -> Tensor:
    with evaluating(network), rehearsing(network):
        return call(network, x)
