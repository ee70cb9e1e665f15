from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy with the classes on the last axis; targets of -100 do not count.

    loss = -mean_n log softmax(logits)[n, y[n]]

    Shapes: logits (*, classes); y (*) of int64.

    >>> import torch
    >>> cross_entropy(torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long)).shape
    torch.Size([])
    """
    if logits.ndim == 2 and y.ndim == 1:
        return functional.cross_entropy(logits, y)
    return functional.cross_entropy(logits.flatten(0, -2), y.flatten())
