"""Goodness by class: what a stage has for each is read off it, and the classes compete."""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from netwright.objectives.losses import cross_entropy
from netwright.rules.forward._activity import onward, squared
from netwright.rules.forward._softmax import trained_softmax
from netwright.rules.readout import Readout, mean_of_tokens
from netwright.rules.rule import check_labels
from netwright.stages import Stages

if TYPE_CHECKING:
    from netwright.rules.forward.forward_forward import ForwardForward


def class_goodness(kernel: Readout, h: Tensor, x: Any = None) -> Tensor:
    """Return the mean over places of the squared class channels that `kernel` reads off `h`.

    g_c = mean_p (sum_k M_ck h_kp)²

    A place is a pixel, or a token that `x` does not call padding.

    Shapes: h (batch, channels, *places), (batch, tokens, channels) or (batch, channels);
    M (classes, channels); g (batch, classes).
    """
    if h.ndim == 2:
        return kernel.scores(h).square()
    if h.ndim == 3 and not kernel.channels_first:
        return mean_of_tokens(kernel.scores(h).square(), x)
    return kernel.scores(h.flatten(2).transpose(1, 2)).square().mean(1)


def channels(net: Stages, example: Any, channels_first: list[bool]) -> list[int | None]:
    """Return how many channels each stage's output has, None where no example tells."""
    if example is None:
        return [None] * len(net)
    shapes = [row["shape"] for row in net.table(example)]
    return [shape[1] if len(shape) > 3 or first else shape[-1]
            for shape, first in zip(shapes, channels_first, strict=True)]


def compete(rule: "ForwardForward", x: Any, y: Tensor | None) -> Tensor:
    """Train the hidden stages to have the largest goodness for the sample's own class."""
    if y is None:
        raise ValueError("y must hold the classes that goodness='by_class' tells apart, got "
                         "None; give negatives= to learn without labels")
    check_labels(y, rule.num_classes)
    if y.ndim != 1:
        raise ValueError("y must have one class a sample where goodness='by_class', got "
                         f"{tuple(y.shape)}; make each token a sample")
    if rule.softmax_is_read:
        trained_softmax(rule, x, y)
    h, context, losses = x, rule.stages.context(x), []
    for i in range(rule.depth):
        h = rule.stages[i](h, context)
        goodness = class_goodness(_kernel(rule, i), h, x)
        loss = cross_entropy(goodness / (rule.temperature or 1.0), y)
        if loss.requires_grad:
            loss.backward()
        losses.append(loss.detach())
        _, square, features = squared(h, x)
        h = onward(h, square, features)
    return torch.stack(losses).mean()


def votes(rule: "ForwardForward", x: Any) -> Tensor:
    """Return the mean of the stages' goodness of each class."""
    h, context, found = x, rule.stages.context(x), []
    for i in range(rule.depth):
        h = rule.stages[i](h, context)
        if i >= rule.first_read:
            found.append(class_goodness(_kernel(rule, i), h, x))
        _, square, features = squared(h, x)
        h = onward(h, square, features)
    return torch.stack(found).mean(0)


def _kernel(rule: "ForwardForward", i: int) -> Readout:
    assert rule.kernels is not None
    return cast(Readout, rule.kernels[i])
