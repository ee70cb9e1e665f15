"""Transforms and densities put into the flows of tasks that learn a density."""

from copy import deepcopy
from functools import partial

from torch import Tensor, nn

from netwright.catalogue.facets import facets
from netwright.compare.sites import first_that_fits, made_of
from netwright.compare.steps import Step
from netwright.errors import NothingToReshape
from netwright.generative.flows.flow import Flow
from netwright.runtime.modes import rehearsing
from netwright.tasks import Task
from netwright.tasks.densities import Density, Field, conditioner


def density(network: Density, step: Step, task: Task) -> nn.Module:
    """Return a density of the step's own in place of the task's flow."""
    size = task.first.shape[1:]
    channels, flow = size[0], deepcopy(network.flow)
    return Density(made_of(step, {
        "size": tuple(size), "transforms": list(flow.transforms) if isinstance(flow, Flow) else [],
        "net": Field(conditioner(channels, channels, len(size) - 1))}))


def transform(network: nn.Module, step: Step, task: Task) -> nn.Module:
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
            made.append(first_that_fits([partial(_transformed, step, x, number, times)
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
    made = made_of(step, {"net": net, "sizes": (changed, kept), "channels": channels,
                        "dim": channels, "order": list(reversed(range(channels))),
                        "flip": bool(number % 2)}, only=("flip",))
    _given(made, x)
    return made


def _given(transform: nn.Module, x: Tensor) -> Tensor:
    with rehearsing(transform):  # on a copy, since some begin by what they first see
        given: Tensor = deepcopy(transform)(x)[0]
    return given
