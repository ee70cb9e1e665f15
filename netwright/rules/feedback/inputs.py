"""Where in an input the output error goes, and how stages pass a change of theirs on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from netwright.rules.feedback.matrices import size_of
from netwright.rules.readout import without_padding
from netwright.stages import Stage

INSIDE = "the first stage's output"
# activations that mix the units they read, or have weights of their own
MIXING = (nn.GLU, nn.MultiheadAttention, nn.PReLU, nn.Softmax, nn.Softmax2d, nn.Softmin,
          nn.LogSoftmax)


def shared_axes(h: Tensor, logits: Tensor) -> int:
    """Return how many leading axes `h` and `logits` share: all but the classes', or the batch's.

    Raises:
        ValueError: the logits have no class axis.
    """
    if logits.ndim < 2:
        raise ValueError("network must return (batch, classes) or (batch, *, classes), got "
                         f"{tuple(logits.shape)}; keep the batch axis and a class axis")
    return logits.ndim - 1 if h.shape[:logits.ndim - 1] == logits.shape[:-1] else 1


def check_axes(name: str, h: Tensor, logits: Tensor, lead: int, advice: str = "") -> None:
    """Raise ValueError unless `h` and `logits` share `lead` axes, and `h` has another one."""
    if h.ndim <= lead or h.shape[:lead] != logits.shape[:lead]:
        raise ValueError(f"{name} must keep the axes {tuple(logits.shape[:lead])} of the logits, "
                         f"got {tuple(h.shape)}; use DirectFeedbackAlignment{advice}")


def projected(error: Tensor, F: Tensor, h: Tensor, lead: int, *, whole: bool = False) -> Tensor:
    """Return F e in the shape of `h`, whose axes may be shorter than F's unless it is `whole`.

    Shapes: error (*lead, *); F (prod(*), *size); h (*lead, *size).

    Raises:
        ValueError: `h` or `error` has another shape.
    """
    size, drawn = h.shape[lead:], F.shape[1:]
    if h.shape[:lead] != error.shape[:lead] or (size != drawn and (
            whole or len(size) != len(drawn)
            or any(new > old for new, old in zip(size, drawn, strict=True)))):
        raise ValueError(
            f"x must give {('batch',) * lead} and at most {tuple(drawn)} to shift, "
            f"as the example did, got {tuple(h.shape)} beside logits of {tuple(error.shape)}; "
            "build the rule with an example like it")
    F = F[(slice(None), *(slice(n) for n in size))].flatten(1)
    e = error.flatten(0, lead - 1).flatten(1)
    return (e @ F.to(e.dtype)).view(h.shape).to(h.dtype)


def ends_of(stage: Stage) -> list[nn.Module]:
    """Return the activations of `stage` that stand after its last weighted module."""
    ends: list[nn.Module] = []
    for module in stage.modules:
        if any(True for _ in module.parameters()):
            ends = []
        elif type(module).__module__ == "torch.nn.modules.activation" and not isinstance(
                module, MIXING):
            ends.append(module)
    return ends


class _Pass(Function):
    """`function` of h, whose gradient is passed on as it is."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(h)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


@contextmanager
def passing(modules: list[nn.Module]) -> Iterator[None]:
    """Let `modules` pass gradients on as they are."""
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.__dict__["forward"] = partial(_pass, module, module.forward)
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def _pass(module: nn.Module, function: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    return _Pass.apply(h.clone() if getattr(module, "inplace", False) else h, function)


def send(out: Tensor, signal: Tensor, x: Any = None) -> None:
    """Let `signal` be the gradient of `out`, without the tokens that `x` calls padding."""
    if out.requires_grad:  # a frozen stage has nothing to learn
        out.backward(without_padding(x, signal.to(out.dtype)))


def shift_size(start: Tensor, place: Any, lead: int, scale: float) -> float:
    """Return the deviation of an F that shifts `start`, at `place` of the input, by some `scale`.

    An input is taken to be of size 1; what the first stage makes of token ids is as large as its
    weights are, and so is its shift.
    """
    size = size_of(start, 1.0) if place is INSIDE else 1.0
    return scale * size * (2 / start.shape[lead:].numel()) ** 0.5


def labels_in(logits: Tensor, y: Tensor) -> Tensor | int:
    """Return how many labels count."""
    if y.dtype == torch.int64 and y.shape == logits.shape[:-1]:
        return (y != -100).sum().clamp_min(1)
    return logits.shape[:-1].numel()


def place_of(x: Any) -> Any:
    """Return the key of what F shifts in `x`: None for all of it, INSIDE for nothing of it."""
    if isinstance(x, Tensor):
        return None if x.is_floating_point() else INSIDE
    parts = x.items() if isinstance(x, Mapping) else [(0, x[0])]
    return next((key for key, part in parts if isinstance(part, Tensor)
                 and part.is_floating_point() and "mask" not in str(key)), INSIDE)


def part_of(x: Any, place: Any, inside: Tensor) -> Tensor:
    """Return what stands at `place` of `x`, or `inside`."""
    if place is INSIDE:
        return inside
    return x if place is None else x[place]


def with_part(x: Any, place: Any, h: Tensor) -> Any:
    """Return `x` with `h` at `place`."""
    if place is INSIDE:
        return x
    if place is None:
        return h
    return {**x, place: h} if isinstance(x, Mapping) else (h, *x[1:])
