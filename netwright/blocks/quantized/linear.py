from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from netwright.blocks.quantized.grid import Grid
from netwright.blocks.quantized.kernels import goes_packed, packed_product
from netwright.blocks.quantized.stored import QuantizedWeight
from netwright.catalogue.facets import method

__all__ = ["QuantizedLinear"]


@method(
    "block",
    place="linear",
    takes=("in_features", "out_features"),
    saves=["file size", "inference memory", "inference time"],
    search={"grid": ["int8", "int4/32", "nf4/64"]},
    variants={"int8": {}, "int4": {"grid": "int4/4"}, "nf4": {"grid": "nf4 asymmetric"}},
)
class QuantizedLinear(nn.Module):
    """A linear layer whose weight is held as packed codes of a grid.

    y = x W'^T + b, W' what the codes stand for.

    It computes in the dtype of its scales, which `dtype` says and `.to` changes, and answers in
    the dtype that it is asked in. Few rows, as in generating one token after another, go through
    PyTorch's kernels for packed weights, where there is one for the grid and the dtype (eight
    bits, and four in groups of 32, 64, 128 or 256, in bfloat16 and float16); more rows, and
    whatever needs a gradient, through the weight in full. How many are few is measured once on
    each machine; the kernel for four bits needs the codes in an order of its own, which it keeps
    beside them from its first use on. The bias learns, the codes do not.

    Args:
        in_features: how many inputs it has.
        out_features: how many outputs.
        bias: whether b is there.
        grid: what weights are rounded to, a `Grid` or a short form as "int4/32".
        dtype: what is computed in, the default of PyTorch where it is None.

    Shapes: x (*, in_features), y (*, out_features).

    Raises:
        ValueError: the grid's groups do not divide the inputs, and it does not pad.

    >>> layer = QuantizedLinear.of(nn.Linear(64, 8), "int4/32")
    >>> layer(torch.randn(2, 64)).shape, layer.stored.codes.nbytes, layer.weight.shape
    (torch.Size([2, 8]), 256, torch.Size([8, 64]))
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *,
                 grid: "Grid | str | int" = "int8", dtype: torch.dtype | None = None) -> None:
        super().__init__()
        made = nn.Linear(in_features, out_features, bias, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self.stored = QuantizedWeight.of(made.weight, grid)
        self.bias = made.bias

    @classmethod
    def of(cls, layer: Any, grid: "Grid | str | int" = "int8", *,
           dtype: torch.dtype | None = None) -> "QuantizedLinear":
        """Return a linear layer with its weight rounded to the nearest levels."""
        return cls.holding(QuantizedWeight.of(layer.weight, grid, dtype=dtype), layer.bias)

    @classmethod
    def holding(cls, stored: QuantizedWeight, bias: nn.Parameter | None) -> "QuantizedLinear":
        """Return the layer of a weight that is quantized already."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.out_features, made.in_features = stored.shape
        made.stored, made.bias = stored, bias
        return made

    @property
    def weight(self) -> Tensor:
        """The weight in full, which is made anew at each look."""
        return self.stored()

    def forward(self, x: Tensor) -> Tensor:
        """Return x W'^T + b."""
        if torch.is_autocast_enabled(x.device.type):
            return linear(x, self.weight, self.bias)
        held = self.stored
        given = x.to(held.dtype)
        bias = None if self.bias is None else self.bias.to(held.dtype)
        if goes_packed(given, held):
            y = packed_product(given.reshape(-1, self.in_features), held)
            y = (y if bias is None else y + bias).reshape(*x.shape[:-1], self.out_features)
        else:
            y = linear(given, held(), bias)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Say what it maps."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
