"""Reads an `nn.Sequential` as a chain: a new stage starts at each weighted layer."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from netwright.anatomy.layers import weighted
from netwright.anatomy.turns import turns_of
from netwright.errors import CannotStage
from netwright.signals import apply, tensor_of
from netwright.stages.stage import Context, Stage, Stages


class SequentialStage(Stage):
    """Modules that run one after another."""

    first = last = False

    def __call__(self, h: Any, context: Context) -> Tensor:
        """Return what the next stage takes."""
        rest = self.modules
        if self.first:  # later on a tuple is one argument, as it is in the nn.Sequential
            h, rest = apply(rest[0], h), rest[1:]
        for module in rest:
            h = module(h)
        return tensor_of(h) if self.last else h


def sequential_stages(network: nn.Sequential, cuts: list[str] | None, *,
                      opened: bool = True) -> Stages | None:
    """Return the chain of `network`, or None where `cuts` name modules that are not its layers.

    Raises:
        CannotStage: no layer has weights, or `cuts` are not in the order of the layers.
    """
    parts = list(_opened(network, "", inside=cuts, turns=opened))
    if not any(weighted(module) for _, module in parts):
        kinds = ", ".join(type(module).__name__ for _, module in parts)
        what = f"holds no layer with weights, only {kinds}" if parts else "is empty"
        raise CannotStage(f"the nn.Sequential {what}; a chain needs at least one layer to learn")
    names = [name for name, _ in parts]
    if cuts is None:
        starts = [0]
        for k, (_, module) in enumerate(parts):
            if weighted(module) and any(weighted(m) for _, m in parts[starts[-1]:k]):
                starts.append(k)
        cuts = [names[k] for k in starts]
    elif not set(cuts) <= set(names):
        return None
    elif cuts != sorted(cuts, key=names.index):
        raise CannotStage(f"cuts={cuts!r} must name layers in the order in which they run; try "
                          f"cuts={sorted(cuts, key=names.index)!r}")
    starts = [0, *(names.index(cut) for cut in cuts[1:])]
    chain = [SequentialStage(name, [module for _, module in parts[a:b]])
             for name, a, b in zip(cuts, starts, [*starts[1:], len(parts)], strict=True)]
    chain[0].first = chain[-1].last = True
    return Stages(network, chain)


def _opened(network: nn.Sequential, prefix: str, inside: list[str] | None = None, *,
            turns: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of each layer; nested sequences are opened, to `inside` where given.

    So are modules that run others in `turns`.
    """
    for key, module in network._modules.items():  # named_children would leave out repeated modules
        name = f"{prefix}{key}"
        if module is None:
            continue
        wanted = inside is None or any(cut.startswith(f"{name}.") for cut in inside)
        if wanted and _plain(module) and len(module):  # type: ignore[arg-type]
            yield from _opened(module, f"{name}.", inside, turns=turns)  # type: ignore[arg-type]
        elif wanted and turns and (taken := turns_of(module)) and not _hooked(module):
            yield from ((f"{name}.{turn.name}", turn) for turn in taken)
        else:
            yield name, module


def _plain(module: nn.Module | None) -> bool:
    """Whether `module` does nothing but run its members in order, unseen by hooks."""
    return (isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
            and "forward" not in module.__dict__ and not _hooked(module))


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
