from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.blocks.reversible.block import ReversibleBlock
from netwright.catalogue.facets import method
from netwright.reversing.engine import Add, Update

__all__ = ["MBConv", "ReversibleMBConv"]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@method(
    "block",
    place="convolution",
    takes=("inputs", "outputs"),
    needs=["images"],
    search={"expand": [2.0, 4.0, 6.0]},
)
class MBConv(nn.Sequential):
    """Expand the channels, convolve each by itself, and project them: an inverted bottleneck.

    y = norm(P [squeeze(] act(norm(D act(norm(E x)))) [)]),  E and P convolutions of one point, D of
    one channel;  squeeze(h) = h * hardsigmoid(A act(B mean(h))).

    There is no shortcut: it is what a reversible block adds.

    Args:
        inputs: The channels of x.
        outputs: The channels of y.
        expand: How many times `inputs` the channels in between are; at 1 there is no E.
        kernel_size: Of D, odd.
        stride: Of D.
        squeeze: The channels of B as a part of `inputs`; 0 leaves squeeze and excitation out.
        dims: 1, 2 or 3 for sequences, images and volumes.
        norm: Makes a norm of that many channels; batch norm where it is None.
        activation: Makes the nonlinearity.

    Shapes: x (batch, inputs, *size), y (batch, outputs, *size / stride rounded up).

    Raises:
        ValueError: an argument is out of range.

    Paper: Sandler, Howard, Zhu, Zhmoginov, Chen, 2018, MobileNetV2: Inverted Residuals and Linear
    Bottlenecks.

    >>> import torch
    >>> MBConv(4, 6, stride=2, dims=3)(torch.randn(2, 4, 8, 8, 8)).shape
    torch.Size([2, 6, 4, 4, 4])
    """

    def __init__(self, inputs: int, outputs: int, *, expand: float = 2.0, kernel_size: int = 3,
                 stride: int = 1, squeeze: float = 0.0, dims: int = 2,
                 norm: Callable[[int], nn.Module] | None = None,
                 activation: Callable[[], nn.Module] = nn.Hardswish) -> None:
        checks.between(1, 3, whole=True, dims=dims)
        checks.count(1, kernel_size=kernel_size, stride=stride)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        checks.count(1, inputs=inputs, outputs=outputs)
        checks.at_least(0, squeeze=squeeze)
        if inputs * expand < 1:
            raise ValueError(f"expand must leave one channel of inputs={inputs}, got {expand}")
        conv: Any = CONVS[dims - 1]
        norm, wide = norm or BATCH_NORMS[dims - 1], int(inputs * expand)
        layers: list[nn.Module] = []
        if wide != inputs:
            layers += [conv(inputs, wide, 1, bias=False), norm(wide), activation()]
        layers += [conv(wide, wide, kernel_size, stride, kernel_size // 2, groups=wide, bias=False),
                   norm(wide), activation()]
        if squeeze:
            layers.append(_Squeeze(wide, max(1, int(inputs * squeeze)), conv, activation))
        super().__init__(*layers, conv(wide, outputs, 1, bias=False), norm(outputs))


@method(
    "block",
    papers=["001-001"],
    place="residual stream",
    takes=("channels",),
    saves=["training memory"],
    needs=["images"],
    search={"expand": [2.0, 4.0, 6.0]},
    batch=lambda: torch.randn(2, 8, 2, 2, 2),
)
class ReversibleMBConv(ReversibleBlock):
    """Add to each half of the channels an inverted bottleneck of the other half.

    y_1 = x_1 + F(x_2);  y_2 = x_2 + G(y_1);  F and G are `MBConv`s.

    Args:
        channels: The channels of x; the first half is one larger where they are odd.
        expand: How many times a half's channels those in between are.
        kernel_size: Of the depthwise convolutions, odd.
        squeeze: The channels of squeeze and excitation, as a part of a half's; 0 leaves it out.
        dims: 1, 2 or 3 for sequences, images and volumes.
        norm: Makes a norm of that many channels; batch norm where it is None.
        activation: Makes the nonlinearity.

    Shapes: x and y (batch, channels, *size).

    Raises:
        ValueError: an argument is out of range.
        CannotReverse: x has other channels.

    Paper: Pendse, Thangarasa, Chiley, Holmdahl, Hestness, DeCoste, 2021, Memory Efficient 3D U-Net
    with Reversible Mobile Inverted Bottlenecks for Brain Tumor Segmentation.

    >>> import torch
    >>> block, x = ReversibleMBConv(8).eval(), torch.randn(2, 8, 4, 4, 4)
    >>> torch.allclose(block.inverse(block(x)), x, atol=1e-5)
    True
    """

    def __init__(self, channels: int, expand: float = 6.0, dims: int = 3, *, kernel_size: int = 3,
                 squeeze: float = 0.0, norm: Callable[[int], nn.Module] | None = None,
                 activation: Callable[[], nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        checks.count(2, channels=channels, advice="they are cut into halves")
        first, second = self.sizes = (channels - channels // 2, channels // 2)
        options: dict[str, Any] = {"expand": expand, "kernel_size": kernel_size, "squeeze": squeeze,
                                   "dims": dims, "norm": norm, "activation": activation}
        self.f = MBConv(second, first, **options)
        self.g = MBConv(first, second, **options)

    def updates(self, *args: Any, **options: Any) -> list[Update]:
        """Return the two additions."""
        return [Add("f", self.f, (1,), 0, args, options), Add("g", self.g, (0,), 1, args, options)]


class _Squeeze(nn.Module):

    def __init__(self, channels: int, narrow: int, conv: Any,
                 activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.gate = nn.Sequential(conv(channels, narrow, 1), activation(),
                                  conv(narrow, channels, 1), nn.Hardsigmoid())

    def forward(self, h: Tensor) -> Tensor:
        return h * self.gate(h.mean(tuple(range(2, h.ndim)), keepdim=True))
