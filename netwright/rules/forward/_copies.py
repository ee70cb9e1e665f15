"""Copies of a batch that differ in their labels alone, and what is the same for all of them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


class SharedProducts(TorchFunctionMode):
    """Multiply once what all copies of a batch have in common, where a linear layer takes them.

    `rows` (copies times samples, features) are the samples again and again, alike but for their
    first `marked` features; W x = W [0, x_rest] + W_marked x_marked, of which the first is the same
    for all copies. A layer that takes anything else does what it does.

    >>> import torch
    >>> layer, x = torch.nn.Linear(5, 3), torch.randn(2, 5)
    >>> rows = torch.cat([x, x])
    >>> rows[2:, :1] = 1.0
    >>> with SharedProducts(rows, samples=2, marked=1):
    ...     y = layer(rows)
    >>> torch.allclose(y, layer(rows))
    True
    """

    def __init__(self, rows: Tensor, samples: int, marked: int) -> None:
        super().__init__()
        self.rows, self.samples, self.marked = rows, samples, marked

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        if function is linear and len(args) > 1 and self._is_rows(args[0]):
            return self._product(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _is_rows(self, x: Any) -> bool:
        return (isinstance(x, Tensor) and x.ndim == 2 and len(x) == len(self.rows)
                and x.numel() == self.rows.numel() and x.is_contiguous()
                and x.data_ptr() == self.rows.data_ptr())

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        common = x[:self.samples].clone()
        common[:, :self.marked] = 0
        product = linear(common, weight, bias).repeat(len(x) // self.samples, 1)
        own: Tensor = linear(x[:, :self.marked], weight[:, :self.marked])
        return product.add_(own)
