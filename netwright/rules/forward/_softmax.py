"""The softmax that is trained beside the layers, on the activity of all of them."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from netwright.objectives.losses import cross_entropy
from netwright.rules.forward._activity import hidden
from netwright.rules.readout import Readout, mean_of_tokens
from netwright.runtime.modes import rehearsing, same_buffers
from netwright.runtime.random_state import random_state, set_random_state

if TYPE_CHECKING:
    from netwright.rules.forward.forward_forward import ForwardForward

# The most readouts whose inputs are kept until the scores that they add up to are known; the
# inputs of more are computed a second time, so that memory does not grow with depth.
KEPT = 4


def trained_softmax(rule: "ForwardForward", x: Any, y: Tensor) -> Tensor:
    """Train the softmax on `x`; return its scores."""
    keep = len(rule.readouts) <= KEPT
    before = None if keep else random_state()
    h, context = x, rule.stages.context(x)
    parts: list[Tensor] = []
    scores: Tensor | float = 0.0
    with ExitStack() as kept:  # running statistics are those of the samples that stages learn from
        for module in [m for stage in list(rule.stages)[:rule.depth] for m in stage.modules]:
            kept.enter_context(same_buffers(module))
        for i, _, h in hidden(rule.stages, rule.depth, x, context):
            if readout := _readout(rule, i):
                part_scores = readout(h, y, x)
                scores = scores + part_scores.detach()
                parts += [part_scores] if keep else []
    # What autocast cast without a graph must not be taken for the pass that learns.
    torch.clear_autocast_cache()
    if rule.classifier:
        parts.append(rule.stages[-1](h, context))
        scores = scores + parts[-1].detach()
    assert isinstance(scores, Tensor)
    scores.requires_grad_()
    (error,) = torch.autograd.grad(cross_entropy(scores, y), scores)
    for part in parts:
        if part.requires_grad:
            part.backward(error)
    if before is not None:
        with rehearsing(rule.network):
            set_random_state(before)
            for i, _, h in hidden(rule.stages, rule.depth, x, context):
                if readout := _readout(rule, i):
                    with torch.enable_grad():
                        readout(h, y, x).backward(error)
    return scores.detach()


def softmax(rule: "ForwardForward", x: Any) -> Tensor:
    """Return the softmax's scores for `x`."""
    h, context, parts = x, rule.stages.context(x), []
    for i, _, h in hidden(rule.stages, rule.depth, x, context):
        if readout := _readout(rule, i):
            parts.append(readout(h))
    if rule.classifier:
        parts.append(rule.stages[-1](h, context))
    axes = parts[-1].ndim
    return torch.stack([mean_of_tokens(p, x) if p.ndim > axes else p for p in parts]).sum(0)


def _readout(rule: "ForwardForward", i: int) -> Readout | None:
    return cast(Readout, rule.readouts[str(i)]) if str(i) in rule.readouts else None
