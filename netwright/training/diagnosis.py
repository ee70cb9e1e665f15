"""Why a loss is not finite."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from netwright.errors import CannotStage
from netwright.rules.rule import Rule
from netwright.runtime.modes import same_buffers
from netwright.runtime.random_state import same_random_state
from netwright.signals import placed, tensors
from netwright.stages import Stages, call, stages


def bad_batch(x: Any, y: Any) -> str | None:
    """Return what is wrong with the data of a batch whose loss is not finite, None if nothing."""
    told = tensors(y)
    if not sum(t.numel() for t in told):
        return "the batch holds no targets; leave empty batches out"
    for name, tensor in [*_named(x, "x"), *_named(y, "y")]:
        if not tensor.is_floating_point():
            continue
        bad = tensor.isnan()
        kind = "NaN"
        if isinstance(x, Tensor) and not bad.any():  # a mask among several inputs may hold -inf
            bad, kind = tensor.isinf(), "infinity"
        if bad.any():
            where = f" in sample {int(bad.flatten(1).any(1).nonzero()[0])}" if bad.ndim > 1 else ""
            return f"{name} holds {kind}{where} of the batch; fill it in or leave the sample out"
    if all(t.dtype == torch.int64 and bool((t == -100).all()) for t in told):
        return "every target in y is -100, so none counts; leave such batches out"
    return None


class Finite:
    """What of a rule has to stay finite: all but what is not so by itself.

    A mask of minus infinity in a buffer stays as it is, whether it was there at the start or is
    made by the first pass; so does what was NaN at the start.
    """

    def __init__(self, rule: nn.Module) -> None:
        self.rule = rule
        self.names = {name for name, _ in [*rule.named_parameters(), *rule.named_buffers()]}
        self.infinite = {name for name, t in self._tensors() if bool(t.isinf().any())}
        self.unknown = {name for name, t in self._tensors() if bool(t.isnan().any())}

    def broken(self) -> str | None:
        """Return the name of the first parameter or buffer that ceased to be finite."""
        for name, tensor in self._tensors():
            if tensor.isfinite().all():
                continue
            infinity = name in self.infinite or name not in self.names
            if (not infinity and bool(tensor.isinf().any())) or (
                    name not in self.unknown and bool(tensor.isnan().any())):
                return name
        return None

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in [*self.rule.named_parameters(), *self.rule.named_buffers()]:
            if not is_lazy(tensor) and tensor.is_floating_point():
                yield name, tensor


@torch.no_grad()
def where_not_finite(rule: Rule, x: Any, finite: Finite) -> str:
    """Return in words where in the network, fed with `x`, the first value is not finite."""
    chain = _chain(rule, x)
    name = finite.broken()
    if name is not None:
        return _of_stage(chain, rule, name) + f"the weight {name} is no longer finite"
    with same_random_state(), same_buffers(rule):
        for name, output in _outputs(chain, rule.network, x):
            if isinstance(output, Tensor) and output.is_floating_point() \
                    and not output.isfinite().all():
                return f"stage {name!r} is the first whose output is not finite"
    return ("the output of every stage is finite, and so is every weight; the loss that "
            f"{type(rule).__name__} computes from them is not")


def _chain(rule: Rule, x: Any) -> Stages | None:
    found = getattr(rule, "stages", None)
    try:
        return found if isinstance(found, Stages) else stages(rule.network, example=x)
    except CannotStage:
        return None


def _outputs(chain: Stages | None, network: nn.Module, x: Any) -> Iterator[tuple[str, Any]]:
    """Yield each stage's name and output; each innermost module's where there are no stages."""
    if chain is not None:
        context, h = chain.context(x), x
        for stage in chain:
            h = stage(h, context)
            yield stage.name, h
        return
    seen: list[tuple[str, Any]] = []
    hooks = [module.register_forward_hook(lambda m, i, output, name=name: seen.append(
        (name, output))) for name, module in network.named_modules() if not list(module.children())]
    try:
        call(network, x)
    finally:
        for hook in hooks:
            hook.remove()
    yield from seen


def _of_stage(chain: Stages | None, rule: Rule, name: str) -> str:
    weight = dict(rule.named_parameters()).get(name)
    for stage in chain or ():
        if any(weight is p for p in stage.parameters()):
            return f"in stage {stage.name!r} "
    return ""


def _named(value: Any, name: str) -> list[tuple[str, Tensor]]:
    return [(name + "".join(f"[{key!r}]" for key in path), t) for path, t in placed(value)]
