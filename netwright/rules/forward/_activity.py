"""The activity of hidden stages: its size, and what of it goes on."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from netwright.rules.forward._samples import TINY
from netwright.rules.readout import padding_mask
from netwright.stages import Stages


def squared(h: Tensor, x: Any) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return the activity (batch, features), its sum of squares and how many features count."""
    activity, mask = h.detach(), padding_mask(x, h)
    count: Tensor | float = float(h[0].numel())
    if mask is not None:
        activity = activity * mask.to(h.dtype).unsqueeze(-1)
        count = mask.sum(1).clamp_min(1) * float(h.shape[2])
    activity = activity.reshape(len(h), -1)
    if activity.dtype in (torch.float16, torch.bfloat16):
        activity = activity.float()
    return activity, torch.linalg.vector_norm(activity, dim=1).square(), count


def onward(h: Tensor, square: Tensor, features: Tensor | float) -> Tensor:
    """Return the activity that goes on to the next stage, divided by its rms and cut off."""
    norm = (square / features).sqrt().clamp_min(TINY).to(h.dtype)
    return h.detach() / norm.view(-1, *[1] * (h.ndim - 1))


def hidden(net: Stages, depth: int, x: Any, context: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield number, sum of squares and normalised activity of each hidden stage."""
    h = x
    for i in range(depth):
        with torch.no_grad():
            h = net[i](h, context)
            _, square, features = squared(h, x)
            h = onward(h, square, features)
        yield i, square, h
