"""Ordinary calls of every public name, to be spoilt or changed one argument at a time."""

import functools
import importlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

import netwright as nw
from netwright.catalogue.facets import Facets, facets
from netwright.contracts.checks import variants
from netwright.runtime.faces import declared, files

EMPTY = inspect.Parameter.empty


def public_names():
    """Yield every public function and class that a user calls, with its dotted name."""
    for module, path in files("netwright"):
        names = declared(path)
        loaded = importlib.import_module(module) if names else None
        for name in names:
            value = getattr(loaded, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                yield f"{module}.{name}", value


def calls(value):
    """Return ordinary calls of a method, arguments by name, one for each of its variants."""
    said = facets(value) or Facets("")
    found = []
    for arguments in variants(value).values():
        try:
            found.append(_recorded(value, said, dict(arguments)))
        except (nw.errors.MissingExtra, TypeError):  # not here, or not by its contract
            continue
    needed = {name for name, p in parameters(value).items() if p.default is EMPTY}
    return [each for each in found if each is not None and needed <= each.keys()]


def _recorded(value, said, arguments):
    try:
        case = importlib.import_module(f"netwright.contracts.check_{said.kind}").Case
    except ImportError:
        return _plain(value, said, arguments)
    seen = []
    signature = inspect.signature(value)

    def keep(*args, **kwargs):
        seen.append(signature.bind(*(list(each) if inspect.isgenerator(each) else each
                                     for each in args), **kwargs).arguments)
        return args, kwargs

    def watched(*args, **kwargs):
        args = tuple(list(each) if inspect.isgenerator(each) else each for each in args)
        keep(*args, **kwargs)
        return value(*args, **kwargs)
    watched.__signature__, watched.facets, watched.__name__ = signature, said, value.__name__
    network = said.network
    if said.kind in ("block", "generative") and network is not None:
        network = functools.partial(_watching, value, keep, network)
    with torch.random.fork_rng():
        made = case(watched, arguments, network, said.batch)
        for run in ("measure", "__call__"):
            if not seen and hasattr(case, run):
                getattr(made, run)()
    call = dict(seen[0]) if seen else None
    for name, parameter in inspect.signature(value).parameters.items():
        if call is not None and parameter.kind is parameter.VAR_KEYWORD:
            call.update(call.pop(name, {}))
        if call is not None and parameter.kind is parameter.VAR_POSITIONAL:
            return None if call.pop(name, ()) else call
    return call


def _watching(value, keep, network):
    """Build a network whose parts of the class `value` are called as `keep` then knows."""
    if not inspect.isclass(value):
        return network()
    before = value.__init__

    def init(self, *args, **kwargs):
        if type(self) is value:
            keep(*args, **kwargs)
        before(self, *args, **kwargs)
    value.__init__ = init
    try:
        return network()
    finally:
        value.__init__ = before


def _plain(value, said, arguments):
    """Return what a method without a contract is called with, by the names that it asks for."""
    network = (said.network or _network)()
    batch = said.batch() if said.batch else (torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    x = batch[0] if isinstance(batch, tuple) else batch
    known = {"network": network, "model": network, "example": x, "calibration": x, "x": x,
             "batch": batch, "folder": "kept", "module": network}
    free = {name: p for name, p in inspect.signature(value).parameters.items()
            if p.default is EMPTY and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return {**{name: known[name] for name in free if name in known}, **arguments}


def _network():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def parameters(value):
    """Return the named parameters of a function or of a class's constructor."""
    try:
        found = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY,
                                                   p.POSITIONAL_ONLY)}


def run(value, call):
    """Call `value` with arguments by name."""
    given = dict(call)
    first = [given.pop(name) for name, p in parameters(value).items()
             if p.kind is p.POSITIONAL_ONLY and name in given]
    return value(*first, **given)


def state_of(value: Any):
    """Return what a failed call must leave as it was: weights, buffers, modes and attributes."""
    if isinstance(value, nn.Module):
        return [(name, p.detach().clone(), p.requires_grad, p.grad is None)
                for name, p in value.named_parameters()] + [
            (name, b.clone()) for name, b in value.named_buffers()] + [
            (name, m.training, type(m), sorted(m.__dict__), len(m._forward_hooks))
            for name, m in value.named_modules()]
    if isinstance(value, Tensor):
        return [value.detach().clone(), value.requires_grad]
    return None


def same(a: Any, b: Any) -> bool:
    """Return whether two states are equal."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and \
            torch.equal(torch.nan_to_num(a.float()), torch.nan_to_num(b.float()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


