"""Refuses a GradScaler for gradients that no scaled loss has made."""

import sys
from functools import cache
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_FRAMES = 12  # from an optimizer's hook up to the scaler's step, with what may wrap either
_called: "WeakSet[nn.Module]" = WeakSet()  # rules that have been called since the last step


def note_call(rule: nn.Module) -> None:
    """Note that the gradients of the rule's parameters are its own, until the next step."""
    _watch_optimizers()
    _called.add(rule)


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Raise ValueError where a scaler has divided the gradients of a rule before this step."""
    if not _called:
        return
    taught = {id(p): type(rule).__name__ for rule in _called for p in rule.parameters()} \
        if _scaled() else {}
    _called.clear()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) in taught:
                raise ValueError(
                    f"optimizer must not be stepped by a GradScaler after {taught[id(p)]}, got one "
                    "that has divided the gradients by its scale: a rule fills .grad with unscaled "
                    "ones; write optimizer.step(), and autocast to bfloat16, which needs no scaler")


def _scaled() -> bool:
    """Whether the step that is about to be made is an enabled scaler's."""
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None:
            return False
        if frame.f_code is GradScaler.step.__code__:
            return bool(frame.f_locals["self"].is_enabled())
        frame = frame.f_back  # type: ignore[assignment]
    return False
