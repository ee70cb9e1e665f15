from typing import Any, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import conv2d, linear

from netwright import checks
from netwright.catalogue.facets import method

__all__ = ["DoReFaConv2d", "DoReFaLinear"]

FLOAT = 32  # bits from which on numbers stay as they are

_SAVES = ["file size", "inference memory"]


@method(
    "block",
    papers=["001-067"],
    place="linear",
    takes=("in_features", "out_features"),
    saves=_SAVES,
    needs=["training"],
    search={"w_bits": [1, 2, 4], "a_bits": [2, 4], "g_bits": [4, 6, 8]},
    variants={"1, 2, 6": {}, "float weights": {"w_bits": 32, "a_bits": 4}},
)
class DoReFaLinear(nn.Module):
    """A linear layer with few bits in its weights, its inputs and the gradients of its outputs.

    q_k(r) = round((2^k - 1) r) / (2^k - 1);  inputs: q_k(clip(x, 0, 1));
    weights: E|w| sign w for one bit, else 2 q_k(tanh w / (2 max|tanh w|) + 1/2) - 1;
    gradients: 2 m (q_k(g / (2m) + 1/2 + s / (2^k - 1)) - 1/2), m = max|g| of each vector or
    image, s uniform between -1/2 and 1/2, so that they are right on average. Rounding passes
    gradients straight through. With 32 bits numbers stay as they are.

    Layers of a network's two ends are best left in floating point.

    Args:
        in_features: how many inputs it has.
        out_features: how many outputs.
        bias: whether a bias is added.
        w_bits: bits of weights.
        a_bits: bits of inputs.
        g_bits: bits of gradients.
        stochastic: whether s is drawn; False leaves it out, which trains worse.
        generator: draws s.

    Shapes: x (*, in_features), y (*, out_features).

    Raises:
        ValueError: a number of bits is not 1 to 32.

    Paper: Zhou, Wu, Ni, Zhou, Wen, Zou, 2016, DoReFa-Net: Training Low Bitwidth Convolutional
    Neural Networks with Low Bitwidth Gradients.

    >>> layer = DoReFaLinear(8, 4)
    >>> layer(torch.rand(2, 8)).shape, len(layer.rounded_weight().unique())
    (torch.Size([2, 4]), 2)
    """

    surrogate_gradient = True

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, w_bits: int = 1,
                 a_bits: int = 2, g_bits: int = 6, stochastic: bool = True,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.between(1, FLOAT, whole=True, w_bits=w_bits, a_bits=a_bits, g_bits=g_bits)
        made = nn.Linear(in_features, out_features, bias)
        self.weight, self.bias = made.weight, made.bias
        self.w_bits, self.a_bits, self.g_bits = w_bits, a_bits, g_bits
        self.stochastic, self.generator = stochastic, generator

    def rounded_weight(self) -> Tensor:
        """Return the weight in its few bits."""
        return _weights(self.weight, self.w_bits)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of what is left of both."""
        y = linear(_inputs(x, self.a_bits), self.rounded_weight(), self.bias)
        return _with_rounded_gradients(y, self)


@method(
    "block",
    papers=["001-067"],
    place="convolution",
    takes=("in_channels", "out_channels"),
    saves=_SAVES,
    needs=["images", "training"],
    search={"w_bits": [1, 2, 4], "a_bits": [2, 4], "g_bits": [4, 6, 8]},
    variants={"1, 2, 6": {"in_channels": 8, "out_channels": 6, "kernel_size": 3}},
)
class DoReFaConv2d(nn.Module):
    """A convolution with few bits in its weights, its inputs and the gradients of its outputs.

    y = q(x) * q(W) + b, rounded as in `DoReFaLinear`.

    Args:
        in_channels: how many channels it reads.
        out_channels: how many it makes.
        kernel_size: how far it sees.
        stride: how far apart it looks.
        padding: how many zeros are put around x.
        bias: whether b is there.
        w_bits: bits of weights.
        a_bits: bits of inputs.
        g_bits: bits of gradients.
        stochastic: whether s is drawn; False leaves it out, which trains worse.
        generator: draws what gradients are rounded with.

    Shapes: x (batch, in_channels, height, width), y (batch, out_channels, height', width').

    Raises:
        ValueError: a number of bits is not 1 to 32.

    Paper: Zhou, Wu, Ni, Zhou, Wen, Zou, 2016, DoReFa-Net: Training Low Bitwidth Convolutional
    Neural Networks with Low Bitwidth Gradients.

    >>> DoReFaConv2d(3, 8, 3, padding=1)(torch.rand(2, 3, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    surrogate_gradient = True

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1,
                 padding: int = 0, bias: bool = True, *, w_bits: int = 1, a_bits: int = 2,
                 g_bits: int = 6, stochastic: bool = True,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.between(1, FLOAT, whole=True, w_bits=w_bits, a_bits=a_bits, g_bits=g_bits)
        made = nn.Conv2d(in_channels, out_channels, kernel_size, bias=bias)
        self.weight, self.bias, self.stride, self.padding = made.weight, made.bias, stride, padding
        self.w_bits, self.a_bits, self.g_bits = w_bits, a_bits, g_bits
        self.stochastic, self.generator = stochastic, generator

    def rounded_weight(self) -> Tensor:
        """Return the weight in its few bits."""
        return _weights(self.weight, self.w_bits)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of what is left of both."""
        y = conv2d(_inputs(x, self.a_bits), self.rounded_weight(), self.bias, self.stride,
                   self.padding)
        return _with_rounded_gradients(y, self)


def _rounded(r: Tensor, bits: int) -> Tensor:
    """Return r between 0 and 1 on 2^bits levels; gradients pass straight through."""
    levels = 2**bits - 1
    return ((r * levels).round() / levels).detach() + (r - r.detach())


def _inputs(x: Tensor, bits: int) -> Tensor:
    return x if bits >= FLOAT else _rounded(x.clamp(0, 1), bits)


def _weights(w: Tensor, bits: int) -> Tensor:
    if bits >= FLOAT:
        return w
    if bits == 1:
        sign = torch.where(w >= 0, 1.0, -1.0).to(w)
        return (sign * w.abs().mean()).detach() + (w - w.detach())
    squeezed = w.tanh()
    most = squeezed.detach().abs().max().clamp_min(torch.finfo(w.dtype).tiny)
    return 2 * _rounded(squeezed / (2 * most) + 0.5, bits) - 1


def _with_rounded_gradients(y: Tensor, layer: DoReFaLinear | DoReFaConv2d) -> Tensor:
    if layer.g_bits >= FLOAT or not y.requires_grad:
        return y
    noise = None
    if layer.stochastic:  # drawn here, so that a pass that runs again gives the same gradients
        noise = torch.rand(y.shape, generator=layer.generator, dtype=y.dtype, device=y.device) - 0.5
    over = (-3, -2, -1) if isinstance(layer, DoReFaConv2d) else (-1,)  # a sample, or a token
    return cast(Tensor, _RoundedGradient.apply(y, noise, layer.g_bits, over))


class _RoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, noise: Tensor | None, bits: int,
                over: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(noise)
        ctx.bits, ctx.over = bits, over
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (noise,) = ctx.saved_tensors
        return rounded_gradient(gradients[0], ctx.bits, noise, ctx.over), None, None, None


def rounded_gradient(gradient: Tensor, bits: int, noise: Tensor | None = None,
                     over: tuple[int, ...] = (-1,)) -> Tensor:
    """Return a gradient on 2^bits levels of its range `over` some axes.

    With noise it is right on average.
    """
    levels = 2**bits - 1
    most = gradient.abs().amax(over, keepdim=True)
    scale = torch.where(most == 0, 1.0, 2 * most)
    share = gradient / scale + 0.5
    if noise is not None:
        share = share + noise / levels
    return scale * ((share.clamp(0, 1) * levels).round() / levels - 0.5) * (most != 0)
