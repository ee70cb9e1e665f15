from typing import Any

from torch import Tensor


def check_batch(batch: Any) -> None:
    """Raise ValueError unless `batch` is a pair of inputs and targets."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return
    got = (f"a tensor of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else
           f"a {type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else
           type(batch).__name__)
    raise ValueError(f"batch must be the pair (x, y), got {got}; put the inputs and the targets "
                     "in a tuple, with None for y where a model has no targets")
