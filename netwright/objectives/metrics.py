import math

import torch
from torch import Tensor

from netwright.catalogue.facets import method

__all__ = ["accuracy"]


@method("objective", needs=["classes"])
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
