"""A layer's own product with another weight in the place of its own."""

from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from netwright.anatomy.layers import is_linear, is_transposed


def with_weight(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Return what a linear layer or convolution makes of x with `weight` of its weight's shape.

    >>> import torch
    >>> from torch import nn
    >>> layer = nn.Linear(2, 2, bias=False)
    >>> with_weight(layer, torch.ones(1, 2), torch.eye(2))
    tensor([[1., 1.]])
    """
    if is_linear(layer):
        return linear(x, weight.T if is_transposed(layer) else weight, layer.bias)
    found: Tensor = layer._conv_forward(x, weight, layer.bias)
    return found
