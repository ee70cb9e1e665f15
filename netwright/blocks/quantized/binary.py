from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, linear, pad, unfold

from netwright.blocks.quantized.grid import Grid, Quantized
from netwright.blocks.quantized.stored import QuantizedWeight
from netwright.catalogue.facets import method

__all__ = ["BinaryConv2d", "BinaryLinear", "PackedBinary"]

_SAVES = ["file size", "inference memory"]


@method(
    "block",
    papers=["002-137"],
    place="linear",
    takes=("in_features", "out_features"),
    saves=_SAVES,
    needs=["training"],
    variants={"both": {}, "weights alone": {"binarize_input": False}},
)
class BinaryLinear(nn.Module):
    """A linear layer of signs: its weights, and with `binarize_input` its inputs, are +1 or -1.

    y = (sign(x) sign(W)^T) K a + b,  a = mean|W| of each output,  K = mean|x| of each row.

    a sign(W) is the nearest to W of all that two opposite numbers for each output can make.
    Gradients: g_W = g_aB (1/n + a [|W| <= 1]), n the inputs; g_x = g [|x| <= 1]; K is a constant.
    A norm before the layer keeps its inputs around zero.

    Args:
        in_features: how many inputs it has.
        out_features: how many outputs.
        bias: whether b is there.
        binarize_input: whether inputs are signs as well.
        scaled: whether a and K are there, 1 in their places otherwise.

    Shapes: x (*, in_features), y (*, out_features).

    Paper: Rastegari, Ordonez, Redmon, Farhadi, 2016, XNOR-Net: ImageNet Classification Using Binary
    Convolutional Neural Networks.

    >>> layer = BinaryLinear(64, 8)
    >>> x = torch.randn(2, 64)
    >>> torch.equal(layer.pack()(x), layer(x)), layer.pack().stored.codes.nbytes
    (True, 64)
    """

    surrogate_gradient = True

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *,
                 binarize_input: bool = True, scaled: bool = True) -> None:
        super().__init__()
        made = nn.Linear(in_features, out_features, bias)
        self.weight, self.bias = made.weight, made.bias
        self.binarize_input, self.scaled = binarize_input, scaled

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of signs, scaled."""
        signs, scale = _signs_of_weight(self.weight, scaled=self.scaled)
        if self.binarize_input and self.scaled:
            size = x.detach().abs().mean(-1, keepdim=True)
            y = linear(_signs(x), signs) * scale * size
        else:
            y = linear(_signs(x) if self.binarize_input else x, signs) * scale
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def pack(self) -> "PackedBinary":
        """Return the layer for inference, a bit for each weight."""
        return PackedBinary(self, None)


@method(
    "block",
    papers=["002-137"],
    place="convolution",
    takes=("in_channels", "out_channels"),
    saves=_SAVES,
    needs=["images", "training"],
    variants={"both": {"in_channels": 8, "out_channels": 6, "kernel_size": 3, "padding": 1},
              "weights alone": {"in_channels": 8, "out_channels": 6, "kernel_size": 3,
                                "binarize_input": False}},
)
class BinaryConv2d(nn.Module):
    """A convolution of signs: its weights, and with `binarize_input` its inputs, are +1 or -1.

    y = (sign(x) * sign(W)) K a + b,  a = mean|W| of each filter,  K the mean of |x| over all that
    a filter sees, with zeros around x.

    Gradients are those of `BinaryLinear`. The order that trains well is norm, this, pooling.

    Args:
        in_channels: how many channels it reads.
        out_channels: how many it makes.
        kernel_size: how far it sees.
        stride: how far apart it looks.
        padding: how many zeros are put around x.
        bias: whether b is there.
        binarize_input: whether inputs are signs as well.
        scaled: whether a and K are there, 1 in their places otherwise.

    Shapes: x (batch, in_channels, height, width), y (batch, out_channels, height', width').

    Paper: Rastegari, Ordonez, Redmon, Farhadi, 2016, XNOR-Net: ImageNet Classification Using Binary
    Convolutional Neural Networks.

    >>> layer = BinaryConv2d(3, 8, 3, padding=1)
    >>> x = torch.randn(2, 3, 5, 5)
    >>> torch.allclose(layer.pack()(x), layer(x), atol=1e-6)
    True
    """

    surrogate_gradient = True

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1,
                 padding: int = 0, bias: bool = True, *, binarize_input: bool = True,
                 scaled: bool = True) -> None:
        super().__init__()
        made = nn.Conv2d(in_channels, out_channels, kernel_size, bias=bias)
        self.weight, self.bias = made.weight, made.bias
        self.binarize_input, self.scaled = binarize_input, scaled
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of signs, scaled."""
        signs, scale = _signs_of_weight(self.weight, scaled=self.scaled)
        given = _signs(x) if self.binarize_input else x
        y = conv2d(given, signs, None, self.stride, self.padding) * scale[:, None, None]
        if self.binarize_input and self.scaled:
            y = y * _sizes(x, self.kernel_size, self.stride, self.padding)
        return y if self.bias is None else y + self.bias[:, None, None]

    @torch.no_grad()
    def pack(self) -> "PackedBinary":
        """Return the layer for inference, a bit for each weight."""
        return PackedBinary(self, (self.kernel_size, self.stride, self.padding))


@method("companion")
class PackedBinary(nn.Module):
    """A layer of signs for inference: a bit for each weight, products in whole numbers.

    Signs of inputs and weights are multiplied as numbers of eight bits; the weights are unpacked
    for that. PyTorch has no product that counts bits.
    """

    def __init__(self, layer: BinaryLinear | BinaryConv2d,
                 window: tuple[int, int, int] | None) -> None:
        super().__init__()
        codes = (layer.weight >= 0).flatten(1).to(torch.uint8)
        scale = layer.weight.flatten(1).abs().mean(1, keepdim=True)
        scale = scale if layer.scaled else torch.ones_like(scale)
        self.stored = QuantizedWeight(
            Quantized(codes, scale, None, layer.weight.shape, Grid((-1.0, 1.0))))
        self.bias, self.window = layer.bias, window
        self.binarize_input, self.scaled = layer.binarize_input, layer.scaled

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer that was packed returns."""
        if self.window is None:
            y = self._product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
            y = y * self.stored.scale[:, 0]
            if self.binarize_input and self.scaled:
                y = y * x.abs().mean(-1, keepdim=True)
            return y if self.bias is None else y + self.bias
        kernel, stride, padding = self.window
        around = pad(torch.where(x >= 0, 1.0, -1.0).to(x) if self.binarize_input else x,
                     [padding] * 4)
        patches = unfold(around, kernel, stride=stride).transpose(1, 2)
        flat = self._product(patches.flatten(0, 1), signed=True)
        height = (around.shape[2] - kernel) // stride + 1
        y = flat.view(len(x), -1, flat.shape[1]).transpose(1, 2).unflatten(2, (height, -1))
        y = y * self.stored.scale[:, 0, None, None]
        if self.binarize_input and self.scaled:
            y = y * _sizes(x, kernel, stride, padding)
        return y if self.bias is None else y + self.bias[:, None, None]

    def _product(self, rows: Tensor, *, signed: bool = False) -> Tensor:
        ones = self.stored.signs()
        if not self.binarize_input:
            return rows @ ones.to(rows.dtype).T
        if not signed:
            rows = torch.where(rows >= 0, 1, -1)
        if not len(rows):
            return rows.new_zeros(0, len(ones), dtype=self.stored.dtype)
        return torch._int_mm(rows.to(torch.int8), ones.T).to(self.stored.dtype)


def _signs_of_weight(weight: Tensor, *, scaled: bool) -> tuple[Tensor, Tensor]:
    """Return the signs of a weight, and the scale of each output, a constant."""
    scale = weight.detach().flatten(1).abs().mean(1)
    scale = scale if scaled else torch.ones_like(scale)
    return cast(Tensor, _WeightSigns.apply(weight, scale)), scale


class _WeightSigns(torch.autograd.Function):
    """sign W, whose gradient is such that a sign W has that of the paper with a held constant."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return torch.where(weight >= 0, 1.0, -1.0).to(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        weight, scale = ctx.saved_tensors
        inputs = weight[0].numel()
        each = scale.view(-1, *[1] * (weight.ndim - 1)).clamp_min(torch.finfo(weight.dtype).tiny)
        return gradients[0] * ((weight.abs() <= 1) + 1 / (inputs * each)), None


def _signs(x: Tensor) -> Tensor:
    return cast(Tensor, _Signs.apply(x))


class _Signs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * (x.abs() <= 1)


def _sizes(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Return the mean size of what each place of the output sees, zeros around x among it."""
    return avg_pool2d(x.detach().abs().mean(1, keepdim=True), kernel, stride, padding)
