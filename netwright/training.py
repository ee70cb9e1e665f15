import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from netwright.errors import Diverged
from netwright.history import Epoch, History
from netwright.metrics import accuracy
from netwright.modes import training
from netwright.rules.exact.backprop import Backprop
from netwright.rules.rule import Rule


def fit(rule: Rule | nn.Module, train: Iterable[tuple[Any, Tensor]], *, epochs: int,
        optimizer: Optimizer | Callable[[list[Parameter]], Optimizer] | None = None,
        validation: Iterable[tuple[Any, Tensor]] | None = None,
        metric: Callable[[Tensor, Tensor], float | Tensor] = accuracy,
        higher_is_better: bool = True,
        on_epoch: Callable[[Epoch], object] | None = None,
        progress: bool = True) -> History:
    """Train with `rule` on the batches of `train` and return what each epoch gave."""
    rule = rule if isinstance(rule, Rule) else Backprop(rule)
    parameters = [p for p in rule.parameters() if p.requires_grad]
    if optimizer is None:
        optimizer = torch.optim.Adam(parameters)
    elif not isinstance(optimizer, Optimizer):
        optimizer = optimizer(parameters)
    history = History(metric=getattr(metric, "__name__", "metric"),
                      higher_is_better=higher_is_better)
    seconds, step = 0.0, 0
    for epoch in range(epochs):
        if hasattr(train, "set_epoch"):
            train.set_epoch(epoch)
        start, total, samples = time.perf_counter(), 0.0, 0
        with training(rule):
            for x, y in train:
                optimizer.zero_grad()
                loss = float(rule(x, y))
                step += 1
                if not math.isfinite(loss):
                    raise Diverged(f"loss is {loss} at epoch {epoch + 1}, step {step}")
                if not rule.updates_weights:
                    optimizer.step()
                total, samples = total + loss * len(y), samples + len(y)
        if not samples:
            raise ValueError("train yielded no batches; check the data set")
        seconds += time.perf_counter() - start
        score = math.nan
        if validation is not None:
            scored = [(float(metric(rule.predict(x), y)), len(y)) for x, y in validation]
            score = sum(s * n for s, n in scored) / sum(n for _, n in scored)
        record = Epoch(epoch + 1, seconds, total / samples, score, optimizer.param_groups[0]["lr"])
        history.epochs.append(record)
        if on_epoch is not None:
            on_epoch(record)
    history.steps, history.stopped = step, "epochs"
    return history
