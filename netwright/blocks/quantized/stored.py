
import torch
from torch import Tensor, nn

from netwright.blocks.quantized.grid import Grid, Quantized, quantize, valued
from netwright.blocks.quantized.packing import packed, unpacked
from netwright.catalogue.facets import method

__all__ = ["QuantizedWeight"]


@method("companion")
class QuantizedWeight(nn.Module):
    """A weight held as packed codes of a grid, for the layers that use it.

    Calling it gives the weight in full; `rows` gives some rows without the others. Nothing of it
    learns. Layers that share it are tied. Codes of eight bits that stand for whole numbers around
    zero are held signed, as the kernels take them.

    Shapes: codes (outputs, bytes), scale (outputs or 1, groups).

    >>> held = QuantizedWeight.of(torch.randn(4, 64), "int4/32")
    >>> held.codes.shape, held().shape, torch.equal(held.rows(torch.tensor([2])), held()[[2]])
    (torch.Size([4, 32]), torch.Size([4, 64]), True)
    """

    codes: Tensor
    scale: Tensor
    second: Tensor | None

    def __init__(self, quantized: Quantized) -> None:
        super().__init__()
        self.grid, self.shape = quantized.grid, tuple(quantized.shape)
        self.columns = quantized.codes.shape[1]
        codes = quantized.codes
        if self.is_signed:
            codes = (codes ^ 128).view(torch.int8)
        self.register_buffer("codes", packed(codes, self.grid.bits).contiguous())
        self.register_buffer("scale", quantized.scale)
        self.register_buffer("second", quantized.second)

    @classmethod
    def of(cls, weight: Tensor, grid: "Grid | str | int" = "int8", *,
           dtype: torch.dtype | None = None) -> "QuantizedWeight":
        """Return `weight` rounded to the nearest levels, with scales in `dtype` or its own."""
        return cls(quantize(weight, grid, dtype=dtype))

    @property
    def is_signed(self) -> bool:
        """Whether codes are whole numbers from -128 to 127 that stand for themselves."""
        return self.grid.is_integer and self.grid.bits == 8 and self.grid.symmetric

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: the scales' dtype, which follows `.to`."""
        return self.scale.dtype

    def forward(self) -> Tensor:
        """Return the weight."""
        return self._valued(self.codes, self.scale, self.second).reshape(self.shape)

    def signs(self) -> Tensor:
        """Return +1 where a code of one bit is 1, else -1, as (outputs, inputs) in eight bits."""
        codes = unpacked(self.codes, 1, self.columns).view(torch.int8)
        return (2 * codes - 1).contiguous()

    def rows(self, indices: Tensor) -> Tensor:
        """Return rows of the weight, (*indices, *inputs)."""
        scale, second = self.scale, self.second
        flat = indices.flatten()
        if len(scale) > 1:
            scale, second = scale[flat], None if second is None else second[flat]
        values = self._valued(self.codes[flat], scale, second)
        return values.reshape(*indices.shape, *self.shape[1:])

    def _valued(self, codes: Tensor, scale: Tensor, second: Tensor | None) -> Tensor:
        whole = unpacked(codes, self.grid.bits, self.columns)
        values = valued(whole, scale, second, self.grid)
        count = torch.Size(self.shape[1:]).numel()
        return values if count == self.columns else values[:, :count]

    def extra_repr(self) -> str:
        """Say what is held."""
        return f"{self.shape}, {self.grid}"
