"""A metric of all predictions of a validation set, whatever its batches were."""

from typing import Any

import torch
from torch import Tensor

from netwright.objectives.metrics import is_mean_over_targets
from netwright.runtime import distributed
from netwright.signals import mapped, tensors
from netwright.training.batches import described, targets


class Scores:
    """What a metric says of the batches that were added.

    A metric that says it is a mean over targets is taken of each batch, and averaged. An object
    with `update`, `compute` and `reset`, as those of torchmetrics, sees batch after batch. Any
    other function is given all predictions and targets at once, since F1 of the whole is no mean
    of the parts'.
    """

    def __init__(self, metric: Any) -> None:
        self.metric, self.batches, self.counted, self.total = metric, 0, 0, 0.0
        self.kept: list[tuple[Any, Any]] = []
        self.stateful = has_state(metric)
        if self.stateful:
            metric.reset()

    def add(self, scores: Any, y: Any) -> None:
        """Take in a batch's predictions and targets."""
        self.batches += 1
        if self.stateful:
            if callable(getattr(self.metric, "to", None)):  # its states have a device
                self.metric.to(tensors(scores)[0].device)
            self.metric.update(scores, y)
        elif is_mean_over_targets(self.metric):
            told = targets(y)
            self.total += float(self.metric(scores, y)) * told
            self.counted += told
        else:
            self.kept.append(mapped((scores, y), lambda t: t.detach().cpu()))

    def of_all(self, world: int, device: torch.device) -> float | None:
        """Return the metric of all batches, of all processes; None where there were none."""
        if self.stateful:  # which gathers what other processes saw itself
            return float(self.metric.compute()) if self.batches else None
        if is_mean_over_targets(self.metric):
            total, counted = self.total, float(self.counted)
            if world > 1:
                total, counted = distributed.total([total, counted], device)
            return total / counted if counted else None
        kept = self.kept
        if world > 1:
            kept = [batch for part in distributed.gather(kept) for batch in part]
        if not kept:
            return None
        scores, y = joined([batch[0] for batch in kept]), joined([batch[1] for batch in kept])
        return float(self.metric(*mapped((scores, y), lambda t: t.to(device))))


def has_state(metric: Any) -> bool:
    """Return whether a metric is an object that sees batch after batch."""
    return all(callable(getattr(metric, name, None)) for name in ("update", "compute", "reset"))


def joined(batches: list[Any]) -> Any:
    """Return batches as one, nested as they are; sequences of different lengths one after another.

    >>> joined([torch.zeros(2, 3), torch.ones(1, 3)]).shape
    torch.Size([3, 3])
    """
    columns = zip(*[tensors(batch) for batch in batches], strict=True)
    made = iter([_one(list(column)) for column in columns])
    return mapped(batches[0], lambda _: next(made))


def _one(parts: list[Tensor]) -> Tensor:
    if parts[0].ndim and len({t.shape[1:] for t in parts}) == 1:
        return torch.cat(parts)
    if parts[0].ndim > 1 and len({t.shape[2:] for t in parts}) == 1:
        return torch.cat([t.flatten(0, 1) for t in parts])
    raise ValueError("metric cannot be given the predictions of all batches at once, which are "
                     f"{', '.join(described(t) for t in parts[:3])}; pad them to one size, or "
                     "give an object with update(scores, y), compute() and reset()")
