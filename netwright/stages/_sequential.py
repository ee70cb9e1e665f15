"""Reads an `nn.Sequential` as a chain: a new stage starts at each weighted layer."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from netwright.errors import CannotStage
from netwright.stages._weights import weighted
from netwright.stages.stage import Context, Stage, Stages, apply


class SequentialStage(Stage):
    """Modules that run one after another."""

    def __call__(self, h: Any, context: Context) -> Tensor:
        """Return what the next stage takes."""
        h = apply(self.modules[0], h)
        for module in self.modules[1:]:
            h = module(h)
        return h


def sequential_units(network: nn.Sequential) -> list[Stage]:
    """Return the finest chain of `network`: a stage for each weighted layer."""
    groups: list[list[tuple[str, nn.Module]]] = []
    for name, module in _opened(network, ""):
        if not groups or (weighted(module) and any(weighted(m) for _, m in groups[-1])):
            groups.append([])
        groups[-1].append((name, module))
    if not any(weighted(module) for group in groups for _, module in group):
        what = "is empty" if not groups else f"holds no layer with weights: {network}"
        raise CannotStage(f"the nn.Sequential {what}; a chain needs at least one layer to learn")
    return [_stage(group) for group in groups]


def sequential_stages(network: nn.Sequential, cuts: list[str] | None) -> Stages | None:
    """Return the chain of `network`, or None where `cuts` name modules that it does not hold."""
    if cuts is None:
        return Stages(network, sequential_units(network))
    parts = list(_opened(network, "", inside=cuts))
    names = [name for name, _ in parts]
    if not set(cuts) <= set(names):
        return None
    starts = [0, *(names.index(cut) for cut in cuts[1:])]
    groups = [parts[a:b] for a, b in zip(starts, [*starts[1:], len(parts)], strict=True)]
    if not all(groups):
        return None
    return Stages(network, [_stage(group, name) for group, name in zip(groups, cuts, strict=True)])


def _stage(group: list[tuple[str, nn.Module]], name: str = "") -> SequentialStage:
    return SequentialStage(name or group[0][0], [module for _, module in group])


def _opened(network: nn.Sequential, prefix: str,
            inside: list[str] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of each layer; nested sequences are opened, to `inside` where given."""
    for key, module in network._modules.items():  # named_children would leave out repeated modules
        name = f"{prefix}{key}"
        if _plain(module) and len(module) and (  # type: ignore[arg-type]
                inside is None or any(cut.startswith(f"{name}.") for cut in inside)):
            yield from _opened(module, f"{name}.", inside)  # type: ignore[arg-type]
        elif module is not None:
            yield name, module


def _plain(module: nn.Module | None) -> bool:
    """Whether `module` does nothing but run its members in order, unseen by hooks."""
    return (isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
            and "forward" not in module.__dict__
            and not module._forward_hooks and not module._forward_pre_hooks)
