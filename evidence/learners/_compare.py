"""How far two nestings of tensors are from each other."""

import math
from typing import Any

from torch.utils._pytree import tree_leaves


def difference(ours: Any, theirs: Any) -> float:
    """Return the largest difference between the numbers of two nestings, leaf by leaf."""
    pairs = zip(tree_leaves(ours), tree_leaves(theirs), strict=True)
    return max((float((a - b).detach().abs().max()) for a, b in pairs if a.numel()), default=0.0)


def digits_lost(distance: float) -> float:
    """Return the decimal logarithm of a difference, -17 where there is none."""
    return math.log10(max(distance, 1e-17))
