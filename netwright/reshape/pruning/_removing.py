"""Taking units out of a network by a decision in plain data, without an example and a trial."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import nn

from netwright.anatomy.axes import Axes
from netwright.anatomy.resizing import give_orders, kept
from netwright.anatomy.unit_groups import Ids, places_of


def removal(model: nn.Module, found: Axes, ids: Mapping[str, Ids]) -> dict[str, Any]:
    """Return what is removed and what becomes smaller, in plain data, having tried it.

    "removed" names the units of each group, "places" the indices that go of each axis of a tensor,
    "settings" what modules keep of their sizes, "config" what a configuration does.
    """
    leaving = found.leaving(ids)
    smaller = beside(model)
    found.take_out(smaller, leaving)
    groups = {name: found.group(name) for name in leaving}
    axes_of: dict[tuple[int, ...], list[list[Any]]] = {}
    for where, indices in places_of(groups, leaving).items():
        axes_of.setdefault(tuple(indices), []).append(list(where))
    return {
        "removed": {name: {"kind": groups[name].kind, "of": groups[name].count,
                           "ids": these.tolist()} for name, these in leaving.items()},
        "places": [{"indices": list(indices), "axes": axes} for indices, axes in axes_of.items()],
        "settings": _settings(model, smaller), "config": _config(model, smaller)}


@torch.no_grad()
def take_out(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    """Carry out what `removal` says, in place; return the model."""
    changed: Any = model
    gone = {(name, axis, groups): place["indices"] for place in decision["places"]
            for name, axis, groups in place["axes"]}
    give_orders(changed, {where: np.asarray(order) for where, order in kept(changed, gone).items()})
    for name, sizes in decision["settings"].items():
        module = changed.get_submodule(name)
        for attribute, size in sizes.items():
            setattr(module, attribute, type(getattr(module, attribute))(size))
    for field, value in decision["config"].items():
        setattr(changed.config, field, value)
    return model


def beside(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose tensors are others in the same memory.

    To give them other data leaves the model as it is; to write to them does not.
    """
    held = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return deepcopy(model, {**held, **{id(b): b.detach() for b in model.buffers()}})


def _settings(before: nn.Module, after: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the whole numbers, and rows of such, that modules keep otherwise than before."""
    said = {}
    for name, module in after.named_modules():
        old = vars(before.get_submodule(name))
        new = {attribute: list(value) if isinstance(value, tuple) else value
               for attribute, value in vars(module).items()
               if _is_size(value) and attribute in old and old[attribute] != value}
        if new:
            said[name] = new
    return said


def _is_size(value: Any) -> bool:
    return type(value) is int or (isinstance(value, tuple)
                                  and all(type(entry) is int for entry in value))


def _config(before: Any, after: Any) -> dict[str, Any]:
    """Return the fields of a configuration that are otherwise than before."""
    config = getattr(after, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    old = vars(before.config)
    return {field: value for field, value in vars(config).items()
            if type(value) is int and field in old and old[field] != value}
