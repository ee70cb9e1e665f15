from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.blocks.reversible.block import ReversibleBlock
from netwright.blocks.reversible.dimensions import layers
from netwright.blocks.reversible.downsample import InjectivePad, InvertibleDownsample
from netwright.blocks.reversible.sequential import ReversibleSequential
from netwright.catalogue.facets import method
from netwright.reversing.engine import Add, Regroup, Step, Update

__all__ = ["IRevNet", "IRevNetBlock"]


@method(
    "block",
    place="convolution",
    takes=("inputs", "channels"),
    saves=["training memory"],
    needs=["images"],
    variants={"plain": {}, "strided": {"channels": 32, "stride": 2}},
    batch=lambda: torch.randn(2, 16, 4, 4),
)
class IRevNetBlock(ReversibleBlock):
    """Add to one half of the channels what a bottleneck makes of the other, and swap the halves.

    y_1 = S x_2;  y_2 = S x_1 + F(x_2);  S is `InvertibleDownsample(stride)`.
    Inverse: x_2 = S^-1 y_1;  x_1 = S^-1 (y_2 - F(x_2)).

    F = conv, norm, ReLU, conv, norm, ReLU, conv, with norm and ReLU before them unless the block
    is a first one; kernels of 3, the first convolution with the stride, the middle ones
    `bottleneck` times narrower than y_2.

    Args:
        inputs: The channels of x_2: half of the block's.
        channels: The channels of y_2, which are inputs * stride ** dims.
        stride: How many times smaller each axis becomes.
        first: Whether norm and ReLU before the first convolution are left out.
        bottleneck: How many times narrower the middle is.
        dropout: The share of the middle's numbers that is dropped in training.
        dims: The axes of the image.

    Shapes: x (batch, 2 inputs, *size); y (batch, 2 channels, *(size / stride)).

    Raises:
        ValueError: `channels` is not inputs * stride ** dims.
        CannotReverse: the channels are odd, or an axis is no multiple of the stride.

    Paper: Jacobsen, Smeulders, Oyallon, 2018, i-RevNet: Deep Invertible Networks.

    >>> import torch
    >>> block, x = IRevNetBlock(3, 12, stride=2).eval(), torch.randn(2, 6, 8, 8)
    >>> block(x).shape
    torch.Size([2, 24, 4, 4])
    >>> torch.allclose(block.inverse(block(x)), x, atol=1e-6)
    True
    """

    def __init__(self, inputs: int, channels: int, *, stride: int = 1, first: bool = False,
                 bottleneck: int = 4, dropout: float = 0.0, dims: int = 2) -> None:
        super().__init__()
        checks.count(1, inputs=inputs, channels=channels, stride=stride, bottleneck=bottleneck)
        if channels != inputs * stride ** dims:
            raise ValueError(f"channels must be inputs * stride ** dims = {inputs} * {stride} ** "
                             f"{dims} = {inputs * stride ** dims}, got {channels}; pad the input "
                             "with InjectivePad for more")
        conv, norm, _ = layers(dims)
        middle = max(1, channels // bottleneck)
        before = [] if first else [norm(inputs), nn.ReLU()]
        self.f = nn.Sequential(
            *before, conv(inputs, middle, 3, stride=stride, padding=1, bias=False),
            norm(middle), nn.ReLU(), conv(middle, middle, 3, padding=1, bias=False),
            nn.Dropout(dropout), norm(middle), nn.ReLU(),
            conv(middle, channels, 3, padding=1, bias=False))
        self.down = InvertibleDownsample(stride)

    def updates(self, *args: Any, **options: Any) -> list[Update]:
        """Return the addition to the first half, which has been downsampled by then."""
        return [Add("f", self.f, (1,), 0)]

    def steps(self, *args: Any, **options: Any) -> list[Step]:
        """Return the steps, those that move numbers among them."""
        split, add, join = super().steps(*args, **options)
        down, up = self.down, self.down.inverse
        return [split,
                Regroup("the downsampling", lambda x: [down(x[0]), x[1]],
                        lambda y: [up(y[0]), y[1]]),
                add,
                Regroup("the swap", lambda x: [down(x[1]), x[0]], lambda y: [y[1], up(y[0])]),
                join]


@method(
    "block",
    papers=["001-010"],
    place="whole network",
    takes=("inputs", "classes"),
    saves=["training memory"],
    needs=["images"],
    variants={"small": {"channels": (16, 64), "depths": (1, 1)}},
)
class IRevNet(nn.Sequential):
    """A classifier that discards nothing before its last layer: its features give the image back.

    S, (zeros), IRevNetBlock, ..., IRevNetBlock | norm, ReLU, mean over positions, linear.

    `features` is all before the bar, a `ReversibleSequential`: trained by any rule, it stores its
    output alone, at any depth. `inverse(features(x))` is x: in eval mode, in which batch norm is
    a fixed map; in train mode only of the same batch, which batch norm counts again then.

    The zeros are shared by both halves, and no norm and ReLU stand between them and the first
    convolution. Appended to the second half alone, as published, they leave the first block
    nothing else to read, and at the kink of ReLU the rounding of a reconstructed 0 would decide
    about gradients.

    The published bijective net for images of 224 pixels is
    `IRevNet((24, 96, 384, 1536), (6, 16, 72, 6), 1000, strides=(2, 2, 2, 2))`; the one for
    CIFAR-10, with zeros appended, `IRevNet((16, 64, 256), (18, 18, 18), 10)`.

    Args:
        channels: The width of each stage, half of all its channels. None: as many as there are
            without appended zeros.
        depths: The blocks of each stage.
        classes: The classes.
        inputs: The channels of an image.
        strides: The stride of each stage's first block; 1 for the first and then 2 where None.
        initial: The factor of the downsampling before all blocks.
        injective_pad: Whether channels of zeros may be appended where a stage is wider than what
            it gets.
        bottleneck: How many times narrower the middle of a block is.
        dropout: The share that is dropped in the middle of a block.
        dims: The axes of an image: 1, 2 or 3.
        exact: Whether the backward pass reconstructs bit for bit (see `ReversibleSequential`).

    Shapes: x (batch, inputs, *size), every axis a multiple of `initial` and of all strides;
    features (batch, 2 channels[-1], *(size / strides)); out (batch, classes).

    Raises:
        ValueError: stages are given that do not go together, or that need zeros though
            `injective_pad` is off, or that are narrower than what they get.
        CannotReverse: an axis is no multiple of the strides.

    Paper: Jacobsen, Smeulders, Oyallon, 2018, i-RevNet: Deep Invertible Networks.

    >>> import torch
    >>> network, x = IRevNet((16, 64), (2, 2), 10).eval(), torch.rand(2, 3, 32, 32)
    >>> network(x).shape
    torch.Size([2, 10])
    >>> torch.allclose(network.inverse(network.features(x)), x, atol=1e-5)
    True
    """

    features: ReversibleSequential
    head: nn.Sequential

    def __init__(self, channels: Sequence[int] | None, depths: Sequence[int], classes: int, *,
                 inputs: int = 3, strides: Sequence[int] | None = None, initial: int = 2,
                 injective_pad: bool = True, bottleneck: int = 4, dropout: float = 0.0,
                 dims: int = 2, exact: bool = False) -> None:
        checks.count(1, classes=classes, inputs=inputs, initial=initial, bottleneck=bottleneck)
        checks.between(0, 1, ends=(True, False), dropout=dropout)
        strides = tuple(strides or [1, *[2] * (len(depths) - 1)])
        if not depths or len(strides) != len(depths) or len(channels or depths) != len(depths):
            raise ValueError("channels, depths and strides must have one number for each stage, "
                             f"got channels={channels}, depths={depths}, strides={strides}")
        _, norm, pool = layers(dims)
        have = inputs * initial ** dims
        blocks: list[nn.Module] = [InvertibleDownsample(initial)] if initial != 1 else []
        first = True
        for k, (depth, stride) in enumerate(zip(depths, strides, strict=True)):
            patch = stride ** dims
            width = have // 2 * patch if channels is None else channels[k]
            if width % patch or not depth or 2 * width // patch < have:
                raise ValueError(f"stage {k} gets {have} channels and makes {patch} times as many "
                                 f"of them, in two halves of channels[{k}]={width} and "
                                 f"depths[{k}]={depth} blocks; the width must be a multiple of "
                                 f"{patch} and at least {-(-have // 2) * patch}, the depth 1 or "
                                 "more")
            missing = 2 * width // patch - have
            if missing and not injective_pad:
                raise ValueError(f"channels[{k}]={width} needs {missing} channels of zeros beside "
                                 f"the {have} there are; allow them with injective_pad=True, or "
                                 f"set it to {have // 2 * patch}")
            if missing:
                odd = have % 2
                blocks += [*[InjectivePad(1)] * odd, InjectivePad(missing - odd, parts=2)]
                first = True
            for i in range(depth):
                step = stride if i == 0 else 1
                blocks.append(IRevNetBlock(width // step ** dims, width, stride=step, first=first,
                                           bottleneck=bottleneck, dropout=dropout, dims=dims))
                first = False
            have = 2 * width
        super().__init__(OrderedDict([
            ("features", ReversibleSequential(*blocks, exact=exact)),
            ("head", nn.Sequential(norm(have), nn.ReLU(), pool(1), nn.Flatten(),
                                   nn.Linear(have, classes)))]))

    def inverse(self, features: Tensor) -> Tensor:
        """Return the image of which `self.features` makes `features`."""
        image: Tensor = self.features.inverse(features)
        return image
