import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from netwright.catalogue.facets import method

__all__ = ["accuracy", "mean_over_targets"]

Metric = TypeVar("Metric", bound=Callable[..., Any])


@method("companion")
def mean_over_targets(metric: Metric) -> Metric:
    """Say of a metric that it is a mean over targets, so that it is taken batch by batch.

    Without it `nw.fit` keeps all predictions of a validation set and gives them to the metric at
    once, which is right for any function but needs the memory. Targets of -100 do not count.

    Args:
        metric: a function of (predictions, y).

    >>> @mean_over_targets
    ... def absolute_error(scores, y):
    ...     return (scores - y).abs().mean()
    >>> is_mean_over_targets(absolute_error)
    True
    """
    metric.is_mean_over_targets = True  # type: ignore[attr-defined]
    return metric


def is_mean_over_targets(metric: Any) -> bool:
    """Return whether a metric has said so."""
    return bool(getattr(metric, "is_mean_over_targets", False))


@method("objective", needs=["classes"])
@mean_over_targets
@torch.no_grad()
def accuracy(scores: Tensor, y: Tensor) -> float:
    """Return the share of the targets whose class scores highest; targets of -100 do not count.

    NaN where none counts.

    accuracy = mean_n [argmax scores[n] = y[n]]

    Shapes: scores (*, classes); y (*) of int64.

    >>> accuracy(torch.eye(3), torch.tensor([0, 1, -100]))
    1.0
    """
    counted = y != -100
    right = (scores.argmax(-1) == y) & counted
    return int(right.sum()) / int(counted.sum()) if counted.any() else math.nan
