"""Goodness that stages share: of one, of all of them, or of those before."""

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from netwright.rules.forward._activity import onward, squared

if TYPE_CHECKING:
    from netwright.rules.forward.forward_forward import ForwardForward

# Goodness, and the unit that it is measured in, of one stage or added up over several.
Sum = tuple[Tensor | float, Tensor | float]


def sums_of_all(rule: "ForwardForward", passes: list[Any], contexts: list[Any]) -> list[Sum]:
    """Return each pass's goodness of all hidden stages; draw as the pass that learns will."""
    hs, sums = list(passes), [cast(Sum, (0.0, 0.0))] * len(passes)
    for stage in list(rule.stages)[:rule.depth]:
        for k, (x, context) in enumerate(zip(passes, contexts, strict=True)):
            h = stage(hs[k], context)
            _, square, features = squared(h, x)
            sums[k] = added(sums[k], sized(rule.goodness, square, features))
            hs[k] = onward(h, square, features)
    return sums


def sized(goodness: str, square: Tensor, features: Tensor | float) -> Sum:
    """Return a stage's goodness and the unit that it is measured in."""
    return (square, features) if goodness == "sum" else (square / features, 1.0)


def added(a: Sum, b: Sum) -> Sum:
    """Return the goodness of both."""
    return a[0] + b[0], a[1] + b[1]
