"""What a task gives to a step of a recipe: arguments, by their names."""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from inspect import Parameter
from typing import Any

from torch import Tensor

from netwright.catalogue.facets import facets
from netwright.compare.steps import Step
from netwright.objectives.losses import cross_entropy
from netwright.tasks import Task

Offers = Mapping[str, Callable[[], Any]]


def offers(task: Task) -> dict[str, Callable[[], Any]]:
    """Return what `task` has for a step that changes or trains its network, by name."""
    found: dict[str, Callable[[], Any]] = {
        "example": lambda: task.first, "task": lambda: task, "batch": lambda: task.batch,
        "calibration": lambda: task.batch[0], "num_classes": lambda: task.classes,
        "classes": lambda: task.classes, "loss": lambda: task.loss}
    if task.loss is cross_entropy:
        del found["loss"]  # a rule's own default may be a loss that the method asks for
    return found


def sizes(task: Task) -> dict[str, Callable[[], Any]]:
    """Return what a network for `task` is built from, by name.

    >>> from netwright.tasks import task
    >>> {name: size() for name, size in sizes(task("digits-cnn")).items()}
    {'classes': 10, 'inputs': 64, 'channels': 1, 'size': (8, 8)}
    """
    first = task.first
    x = first[0] if isinstance(first, tuple) else first
    known: dict[str, Any] = {}
    if isinstance(first, tuple):
        known = {"features": x.shape[-1], "dim": 16}
    elif isinstance(x, Tensor) and not x.is_floating_point():
        known = {"context": x.shape[1], "characters": task.classes}
    elif isinstance(x, Tensor):
        known = {"inputs": math.prod(x.shape[1:])}
        if x.ndim == 2 and task.batch[1].is_floating_point():
            known |= {"lookback": x.shape[1], "horizon": task.classes}
        if x.ndim > 2:
            known |= {"channels": x.shape[1], "size": tuple(x.shape[2:])}
    return {"classes": lambda: task.classes, **constant(known)}


def constant(values: Mapping[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return what offers each of `values` as it is."""
    return {name: partial(_same, value) for name, value in values.items()}


def _same(value: Any) -> Any:
    return value


def supplied(step: Step, offered: Offers, *, skip: int = 1) -> dict[str, Any]:
    """Return the arguments of `step`: those that are set, and those that are offered by name.

    The first `skip` parameters are what the step is called with, the network as a rule. What a
    method without one needs and nobody offers is as in its own first variant, where that says it.

    Raises:
        ValueError: the step needs an argument that is neither set nor offered.
    """
    free = {name: p for name, p in [*parameters(step.what).items()][skip:]
            if name not in step.arguments}
    said = facets(step.what)
    variant = next(iter(said.variants.values()), {}) if said is not None and not skip else {}
    offered = {**constant({name: value for name, value in variant.items()
                           if name in free and free[name].default is Parameter.empty}), **offered}
    missing = [name for name, p in free.items() if p.default is p.empty and name not in offered]
    if missing:
        shown = ", ".join(f"{name}=..." for name in missing)
        raise ValueError(f"{step.name} needs {', '.join(missing)}, which a comparison does not "
                         f"know; write {step.name}({shown})")
    return {**{name: offered[name]() for name in free if name in offered}, **step.values()}


def parameters(what: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters that can be given by name."""
    try:
        found = inspect.signature(what).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
