from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from netwright.blocks.quantized.grid import Grid
from netwright.blocks.quantized.stored import QuantizedWeight
from netwright.catalogue.facets import method

__all__ = ["QuantizedConv2d"]


@method(
    "block",
    place="convolution",
    takes=("in_channels", "out_channels"),
    saves=["file size", "inference memory"],
    needs=["images"],
    search={"grid": ["int8", "int4/32", "nf4/64"]},
    variants={"int8": {"in_channels": 8, "out_channels": 6, "kernel_size": 3},
              "int4": {"in_channels": 8, "out_channels": 6, "kernel_size": 3, "padding": "same",
                       "grid": "int4/8", "groups": 2, "padding_mode": "circular"}},
)
class QuantizedConv2d(nn.Module):
    """A convolution over a grid whose weight is held as packed codes of a grid of levels.

    y = x * W' + b, W' what the codes stand for; all that an output channel reads is one row, whose
    groups of inputs are neighbours in (channel, height, width).

    It computes in the dtype of its scales, which `.to` changes, with the weight in full, and
    answers in the dtype that it is asked in. The bias learns, the codes do not.

    Args:
        in_channels: how many channels it reads.
        out_channels: how many it makes.
        kernel_size: how far it sees.
        stride: how far apart it looks.
        padding: how much is put around x, or "same" or "valid".
        dilation: how far apart the places are that it sees.
        groups: into how many parts the channels are split, which do not mix.
        bias: whether b is there.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        grid: what weights are rounded to, a `Grid` or a short form as "int8".
        dtype: what is computed in, the default of PyTorch where it is None.

    Shapes: x (batch, in_channels, height, width), y (batch, out_channels, height', width').

    Raises:
        ValueError: the grid's groups do not divide what a channel reads, and it does not pad.

    >>> layer = QuantizedConv2d.of(nn.Conv2d(3, 8, 3, padding=1), "int8")
    >>> layer(torch.randn(2, 3, 5, 5)).shape, layer.stored.codes.shape
    (torch.Size([2, 8, 5, 5]), torch.Size([8, 27]))
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
                 stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] | str = 0,
                 dilation: int | tuple[int, int] = 1, groups: int = 1, bias: bool = True,
                 padding_mode: str = "zeros", *, grid: "Grid | str | int" = "int8",
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        made = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                         bias, padding_mode, dtype=dtype)  # type: ignore[arg-type]
        self._take(made, QuantizedWeight.of(made.weight, grid))

    @classmethod
    def of(cls, layer: nn.Conv2d, grid: "Grid | str | int" = "int8", *,
           dtype: torch.dtype | None = None) -> "QuantizedConv2d":
        """Return a convolution with its weight rounded to the nearest levels."""
        return cls.holding(QuantizedWeight.of(layer.weight, grid, dtype=dtype), layer)

    @classmethod
    def holding(cls, stored: QuantizedWeight, layer: nn.Conv2d) -> "QuantizedConv2d":
        """Return the convolution `layer` with a weight that is quantized already."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._take(layer, stored)
        return made

    def _take(self, layer: nn.Conv2d, stored: QuantizedWeight) -> None:
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups
        self.padding_mode = layer.padding_mode
        self.around = list(layer._reversed_padding_repeated_twice)
        self.stored = stored
        self.bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:
        """The weight in full, which is made anew at each look."""
        return self.stored()

    def forward(self, x: Tensor) -> Tensor:
        """Return x * W' + b."""
        if torch.is_autocast_enabled(x.device.type):
            return self._convolved(x, self.weight, self.bias)
        dtype = self.stored.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._convolved(x.to(dtype), self.weight, bias).to(x.dtype)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = pad(x, self.around, self.padding_mode), 0
        return conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Say what it maps."""
        return (f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
                f"stride={self.stride}, groups={self.groups}, bias={self.bias is not None}")
