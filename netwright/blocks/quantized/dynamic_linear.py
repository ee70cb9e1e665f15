import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from netwright.blocks.quantized.stored import QuantizedWeight
from netwright.catalogue.facets import method

__all__ = ["DynamicLinear"]

MOST = 127.0


@method(
    "block",
    place="linear",
    takes=("in_features", "out_features"),
    saves=["file size", "inference memory", "inference time"],
)
class DynamicLinear(nn.Module):
    """A linear layer in whole numbers of eight bits: weights per output, activations per row.

    y = s_x s_w (q_x q_w^T) + b,  s_x = max|x| / 127 of each row,  q_x = round(x / s_x).

    The product of codes is exact, so that a row's answer does not turn on the others. Where a
    gradient is needed it is that of the product with x itself, as if x had not been rounded. The
    bias learns, the codes do not.

    Args:
        in_features: how many inputs it has.
        out_features: how many outputs.
        bias: whether b is there.
        dtype: what the scales and the bias are held in.

    Shapes: x (*, in_features), y (*, out_features).

    >>> layer = DynamicLinear.of(nn.Linear(64, 8))
    >>> x = torch.randn(2, 64)
    >>> layer(x).shape, torch.equal(layer(x)[:1], layer(x[:1]))
    (torch.Size([2, 8]), True)
    """

    bias: nn.Parameter | None
    surrogate_gradient = True

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        made = nn.Linear(in_features, out_features, bias, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self.stored, self.bias = QuantizedWeight.of(made.weight, "int8"), made.bias

    @classmethod
    def of(cls, layer: nn.Linear, *, dtype: torch.dtype | None = None) -> "DynamicLinear":
        """Return a linear layer with its weight rounded to the nearest levels."""
        return cls.holding(QuantizedWeight.of(layer.weight, "int8", dtype=dtype), layer.bias)

    @classmethod
    def holding(cls, stored: QuantizedWeight, bias: nn.Parameter | None) -> "DynamicLinear":
        """Return the layer of a weight in signed codes of eight bits."""
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
        """Return s_x s_w (q_x q_w^T) + b."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(-1, self.in_features)
        if not rows.numel():
            return linear(x, self.weight.to(x.dtype), None if self.bias is None
                          else self.bias.to(x.dtype))
        if x.requires_grad and torch.is_grad_enabled():
            product = _Rounded.apply(rows, self.stored.codes, self.stored.scale[:, 0])
        else:
            product = _product(rows, self.stored.codes, self.stored.scale[:, 0])
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return product.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        """Say what it maps."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def _product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    most = torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True)
    # Rows of zeros give any code here, and zero when they are multiplied by their largest.
    rounded = (x * (MOST / most)).round_().to(torch.int8)
    return torch._int_mm(rounded, codes.T) * most * (scale.to(x.dtype) / MOST)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:  # type: ignore
        ctx.save_for_backward(codes, scale)
        return _product(x, codes, scale)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore
        codes, scale = ctx.saved_tensors
        return gradient @ (codes.to(gradient.dtype) * scale.to(gradient.dtype)[:, None]), None, None
