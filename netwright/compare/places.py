"""Blocks put where they go: for each kind of place, what stands there and what it tells a block."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import conv, pooling

from netwright.anatomy.layers import is_linear, is_norm
from netwright.blocks.experts.mixture import MixtureOfExperts
from netwright.blocks.feedforward.feed_forward import FeedForward
from netwright.catalogue.facets import facets
from netwright.compare.flow_places import density, transform
from netwright.compare.sites import (
    Site,
    elementwise,
    ends,
    first_that_fits,
    grid,
    linears,
    made_of,
    making,
    replaced,
    residual_blocks,
    sites_of,
)
from netwright.compare.steps import Step
from netwright.compare.supplies import parameters, sizes
from netwright.errors import NothingToReshape
from netwright.generative.flows.flow import Flow, Transform
from netwright.reshape.exchanging.exchange_modules import exchange_modules
from netwright.reshape.feedforward.swap_feedforward import swap_feedforward
from netwright.runtime.modes import evaluating, rehearsing
from netwright.stages import call
from netwright.tasks import Task
from netwright.tasks.densities import Density

__all__ = ["put"]


EXPERTS = 4


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
        return density(network, step, task)
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
    return made_of(step, {name: size for name, size in offered.items()
                        if name in (*takes, "patch")}, only=("patch",))


def _kind(step: Step) -> str:
    said = facets(step.what)
    return "" if said is None else said.kind


def _feedforward(network: nn.Module, step: Step, task: Task) -> nn.Module:
    def make(dim: int, hidden: int) -> nn.Module:
        def expert() -> nn.Module:
            return FeedForward(dim, hidden)
        return made_of(step, {"dim": dim, "hidden": hidden, "n_experts": EXPERTS,
                            "experts": [expert() for _ in range(EXPERTS)]})
    return swap_feedforward(network, make, task.first, progress=False)


def _router(network: nn.Module, step: Step, task: Task) -> nn.Module:
    def make(dim: int, hidden: int) -> nn.Module:
        router = made_of(step, {"dim": dim, "n_experts": EXPERTS})
        return MixtureOfExperts(dim, lambda: FeedForward(dim, hidden), router, n_experts=EXPERTS)
    return swap_feedforward(network, make, task.first, progress=False)


def _experts(network: nn.Module, step: Step, task: Task) -> nn.Module:
    def make(dim: int, hidden: int) -> nn.Module:
        made = made_of(step, {"dim": dim, "hidden": hidden, "n_experts": EXPERTS})
        if "n_experts" in parameters(step.what):
            return MixtureOfExperts(dim, made)
        return MixtureOfExperts(dim, [*(FeedForward(dim, hidden) for _ in range(EXPERTS)), made])
    return swap_feedforward(network, make, task.first, progress=False)


def _activation(network: nn.Module, step: Step, task: Task) -> nn.Module:
    try:
        sites = sites_of(network, task, "activation", elementwise)
    except NothingToReshape:  # a function in a feed-forward layer, where no module is
        def make(dim: int, hidden: int) -> nn.Module:
            return FeedForward(dim, hidden, activation=making(step, {"dim": hidden}))
        return swap_feedforward(network, make, task.first, progress=False)
    return replaced(network, step, [(site, {"dim": site.given.shape[-1]}) for site in sites])


def _normalisation(network: nn.Module, step: Step, task: Task) -> nn.Module:
    sites = sites_of(network, task, "normalisation", lambda site: is_norm(site.module))
    return replaced(network, step, [(site, {"dim": site.given.shape[-1]}) for site in sites])


def _convolution(network: nn.Module, step: Step, task: Task) -> nn.Module:
    sites = sites_of(network, task, "convolution",
                   lambda site: isinstance(site.module, conv._ConvNd))
    return replaced(network, step, [(site, {
        "inputs": site.taken.shape[1], "outputs": site.given.shape[1],
        "channels": site.taken.shape[1], "dims": site.taken.ndim - 2}) for site in sites])


def _linear(network: nn.Module, step: Step, task: Task) -> nn.Module:
    *hidden, last = linears(network, task)
    # Some count what they take or give once for each of several copies.
    return first_that_fits([partial(replaced, network, step, [
        (site, ends(site, *parts)) for site in hidden or [last]], only=("units",))
        for parts in ((1, 1), (1, 2), (1, 4), (2, 2), (4, 4))])


def _head(network: nn.Module, step: Step, task: Task) -> nn.Module:
    last = linears(network, task)[-1]
    return replaced(network, step, [(last, {**ends(last), "dim": last.taken.shape[-1],
                                             "out": last.given.shape[-1]})])


def _embedding(network: nn.Module, step: Step, task: Task) -> nn.Module:
    first = linears(network, task)[0]
    dim, out = first.taken.shape[-1], first.given.shape[-1]
    return replaced(network, step, [(first, {"dim": dim, "dims": dim, "n_features": out,
                                              "frequencies": out // 2})],
                     only=("frequencies",))


def _attention(network: nn.Module, step: Step, task: Task) -> nn.Module:
    def make(dim: int, heads: int) -> nn.Module:
        return made_of(step, {"dim": dim, "heads": heads, "causal": _predicts_next(task)},
                     only=("causal",))
    try:
        sites = sites_of(network, task, "attention", lambda site: isinstance(
            site.module, nn.MultiheadAttention))
    except NothingToReshape:
        if "attention" not in parameters(task.network) or str(network) != str(task.network()):
            raise
        return task.network(attention=make)  # type: ignore[call-arg]
    return replaced(network, step, [(site, {
        "dim": site.given.shape[-1], "causal": getattr(site.module, "causal", False),
        "heads": getattr(site.module, "num_heads", getattr(site.module, "heads", 1))})
        for site in sites], only=("causal",))


def _token_mixing(network: nn.Module, step: Step, task: Task) -> nn.Module:
    sites = sites_of(network, task, "token mixing", lambda site: False)
    return replaced(network, step, [(site, grid(site)) for site in sites])


def _residual_block(network: nn.Module, step: Step, task: Task) -> nn.Module:
    try:
        sites = residual_blocks(network, task)
    except NothingToReshape:
        return _after_activations(network, step, task)
    if "depth" not in parameters(step.what):
        # A block of two streams counts the size of one.
        return first_that_fits([partial(replaced, network, step, [
            (site, grid(site, parts)) for site in sites]) for parts in (1, 2)])
    def whole() -> nn.Module:
        return made_of(step, {**grid(sites[0]), "depth": len(sites)})
    # One block is a stack of them: it stands for the first, and nothing for the others.
    return exchange_modules(network, {site.name: whole if site is sites[0] else nn.Identity
                                      for site in sites})


def _residual_stream(network: nn.Module, step: Step, task: Task) -> nn.Module:
    try:
        sites = sites_of(network, task, "residual stream", lambda site: is_linear(
            site.module) and site.taken.ndim == 2 and site.taken.shape == site.given.shape)
    except NothingToReshape:
        return _after_activations(network, step, task)

    def half(dim: int, times: int) -> nn.Module:
        return FeedForward(dim // 2, dim // 2, out=times * (dim // 2))
    # A coupling asks its network for one number an entry, or for two.
    return first_that_fits([partial(replaced, network, step, [(site, {
        "f": half(site.taken.shape[-1], times), "g": half(site.taken.shape[-1], times),
        "module": FeedForward(site.taken.shape[-1]), "dim": site.taken.shape[-1]})
        for site in sites]) for times in (1, 2)])


def _after_activations(network: nn.Module, step: Step, task: Task) -> nn.Module:
    """Put a block after each activation of a convolutional network, where it may keep the shape."""
    sites = [site for site in sites_of(network, task, "residual stream", elementwise)
             if site.given.ndim > 3]
    if not sites:
        raise NothingToReshape("its network has no stream that a block could go into; try another")
    return replaced(network, step, [(site, {
        **dict.fromkeys(("channels", "inputs", "dim"), site.given.shape[1]),
        "dims": site.given.ndim - 2}) for site in sites], only=("dims",), after=True)


def _downsampling(network: nn.Module, step: Step, task: Task) -> nn.Module:
    sites = sites_of(network, task, "downsampling", lambda site: type(
        site.module).__module__ == pooling.__name__ and site.taken.ndim == 4)

    def make(site: Site) -> nn.Module:
        block = made_of(step, {"channels": site.taken.shape[1]})
        with rehearsing(block):
            channels = block(site.taken).shape[1]
        # A convolution of single places brings the channels back to what the next module takes.
        return nn.Sequential(block, nn.Conv2d(channels, site.given.shape[1], 1))
    return exchange_modules(network, {site.name: partial(make, site) for site in sites})


PLACES: Mapping[str, Callable[[nn.Module, Step, Task], nn.Module]] = {
    "activation": _activation, "attention": _attention, "convolution": _convolution,
    "downsampling": _downsampling, "embedding": _embedding, "experts": _experts,
    "feedforward": _feedforward, "head": _head, "linear": _linear,
    "normalisation": _normalisation, "residual block": _residual_block,
    "residual stream": _residual_stream, "router": _router, "token mixing": _token_mixing,
    "transform": transform, "whole network": _whole_network}


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
