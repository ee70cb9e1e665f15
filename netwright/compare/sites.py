"""Where blocks may stand in a network, found by watching one run, and putting them there."""

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

from netwright.anatomy.layers import is_linear
from netwright.catalogue.facets import facets
from netwright.compare.steps import Step
from netwright.compare.supplies import constant, parameters, supplied
from netwright.errors import NothingToReshape
from netwright.reshape.exchanging.exchange_modules import exchange_modules
from netwright.runtime.modes import evaluating, rehearsing
from netwright.stages import call
from netwright.tasks import Task


@dataclass(frozen=True)
class Site:
    """A module in whose place a block may stand: its name, and what it takes and gives."""

    name: str
    module: nn.Module
    taken: Tensor
    given: Tensor


def sites_of(network: nn.Module, task: Task, place: str,
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


def elementwise(site: Site) -> bool:
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


def linears(network: nn.Module, task: Task) -> list[Site]:
    """Return the linear layers in the order in which they first end."""
    return sites_of(network, task, "linear", lambda site: is_linear(site.module))


def residual_blocks(network: nn.Module, task: Task) -> list[Site]:
    """Return the outermost modules that give (batch, tokens, dim) what they take, with a norm."""
    found: list[Site] = []

    def fits(site: Site) -> bool:
        return (site.taken.ndim == 3 and site.taken.shape == site.given.shape
                and site.taken.is_floating_point()
                and len([p for p in site.module.parameters() if p.ndim > 1]) > 1
                and bool(site.name) and not isinstance(site.module, nn.Sequential))
    for site in sorted(sites_of(network, task, "residual block", fits),
                       key=lambda site: site.name.count(".")):
        if not any(site.name.startswith(other.name + ".") for other in found):
            found.append(site)
    order = [name for name, _ in network.named_modules()]
    return sorted(found, key=lambda site: order.index(site.name))


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


def replaced(network: nn.Module, step: Step, sites: list[tuple[Site, Mapping[str, Any]]],
             only: tuple[str, ...] = (), *, after: bool = False) -> nn.Module:
    """Return a copy with a block, made of what is offered, at each site or after it."""
    return exchange_modules(network, {
        site.name: partial(_fitting, step, site, offered, only, site.given if after else site.taken)
        for site, offered in sites}, after=after)


def _fitting(step: Step, site: Site, offered: Mapping[str, Any], only: tuple[str, ...],
             taken: Tensor) -> nn.Module:
    """Return a block that gives of `taken` what the site gave."""
    block = made_of(step, offered, only)
    with evaluating(block), rehearsing(block):
        given = deepcopy(block)(taken)  # a copy, since some begin by what they first see
    if not isinstance(given, Tensor) or given.shape != site.given.shape:
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"{step.name} must give {tuple(site.given.shape)} in the place of "
                         f"{site.name!r}, a {type(site.module).__name__}, got {shape}")
    return block


def made_of(step: Step, offered: Mapping[str, Any], only: tuple[str, ...] = ()) -> nn.Module:
    """Build the block from what the place offers."""
    return making(step, offered, only)()


def making(step: Step, offered: Mapping[str, Any],
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


def first_that_fits(attempts: list[Callable[[], nn.Module]]) -> nn.Module:
    """Return what the first attempt gives that does not fail; else fail as the first did."""
    failure: Exception | None = None
    for attempt in attempts:
        try:
            return attempt()
        except (ValueError, RuntimeError) as error:
            failure = failure or error
    assert failure is not None
    raise failure


def ends(site: Site, taking: int = 1, giving: int = 1) -> dict[str, int]:
    """Return what a layer takes and gives, as parts of it, by the names that blocks have for it."""
    taken, given = site.taken.shape[-1] // taking, site.given.shape[-1] // giving
    return {**dict.fromkeys(("inputs", "in_features", "dim_in"), taken),
            **dict.fromkeys(("outputs", "out_features", "dim_out", "units"), given)}


def grid(site: Site, parts: int = 1) -> dict[str, int]:
    """Return the sizes of a signal (batch, tokens, dim), as a square of tokens where it is one."""
    tokens, dim = site.taken.shape[-2], site.taken.shape[-1] // parts
    side = math.isqrt(tokens)
    square = {"height": side, "width": side} if side * side == tokens else {}
    heads = getattr(site.module, "heads", None)
    return {"tokens": tokens, "dim": dim, "channels": dim, **square,
            **({} if heads is None else {"heads": heads})}
