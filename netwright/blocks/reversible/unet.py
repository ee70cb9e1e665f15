import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.blocks.reversible.mbconv import CONVS, ReversibleMBConv
from netwright.blocks.reversible.sequential import ReversibleSequential
from netwright.catalogue.facets import method

__all__ = ["ReversibleUNet"]


@method(
    "block",
    papers=["001-001"],
    place="whole network",
    takes=("inputs", "outputs"),
    saves=["training memory"],
    needs=["images"],
    variants={"small": {"widths": (8, 16), "depths": (1, 1)}},
    batch=lambda: torch.randn(2, 8, 2, 2, 2),
)
class ReversibleUNet(nn.Module):
    """Label every voxel, with reversible blocks at each resolution of a U-Net.

    e_0 = R(stem x);  e_k = R(down e_{k-1});
    d_K = e_K;  d_k = R(up d_{k+1} + e_k);  logits = head d_0.

    R is a run of `ReversibleMBConv`s that stores its output alone. What is between is ordinary, and
    stores what it is given: `down` is a convolution of stride 2, `up` a map of the channels and
    linear interpolation. So memory is that of a U-Net with no blocks, however many there are.

    Args:
        inputs: The channels of the input.
        outputs: The channels of the logits.
        widths: The channels at each resolution, finest first.
        depths: The blocks of each R on the way down, and, but for the coarsest, on the way up.
        dims: 1, 2 or 3 for sequences, images and volumes.
        expand: Of the blocks.
        kernel_size: Of the blocks.
        squeeze: Of the blocks.
        norm: Makes a norm of that many channels; group norm of up to 8 groups where it is None.
        activation: Makes the blocks' nonlinearity.
        stored: Whether the blocks store their activations as ordinary ones do, for comparisons.
        exact: Whether reconstruction is bit for bit, for about a byte a number and step.

    Shapes: x (batch, inputs, *size), each size a multiple of 2^(resolutions - 1); logits (batch,
    outputs, *size).

    Raises:
        ValueError: an argument is out of range, or x has another shape.

    Paper: Pendse, Thangarasa, Chiley, Holmdahl, Hestness, DeCoste, 2021, Memory Efficient 3D U-Net
    with Reversible Mobile Inverted Bottlenecks for Brain Tumor Segmentation.

    >>> import torch
    >>> network = ReversibleUNet(4, 3, widths=(8, 16), depths=(1, 2))
    >>> network(torch.randn(1, 4, 8, 8, 8)).shape
    torch.Size([1, 3, 8, 8, 8])
    """

    def __init__(self, inputs: int, outputs: int, widths: Sequence[int] = (16, 32, 64, 128),
                 depths: Sequence[int] = (1, 1, 1, 1), *, dims: int = 3, expand: float = 6.0,
                 kernel_size: int = 3, squeeze: float = 0.0,
                 norm: Callable[[int], nn.Module] | None = None,
                 activation: Callable[[], nn.Module] = nn.ReLU6, stored: bool = False,
                 exact: bool = False) -> None:
        super().__init__()
        checks.count(1, inputs=inputs, outputs=outputs)
        if len(widths) != len(depths) or not widths:
            raise ValueError(f"depths must name one number for each of the {len(widths)} widths, "
                             f"got {list(depths)}")
        for depth in depths:
            checks.count(0, depths=depth)
        checks.between(1, 3, whole=True, dims=dims)
        self.inputs, self.dims = inputs, dims
        options: dict[str, Any] = {"expand": expand, "dims": dims, "kernel_size": kernel_size,
                                   "squeeze": squeeze, "norm": norm or _group_norm,
                                   "activation": activation}

        def blocks(width: int, depth: int) -> nn.Module:
            made = [ReversibleMBConv(width, **options) for _ in range(depth)]
            return (nn.Sequential(*made) if stored or not made
                    else ReversibleSequential(*made, exact=exact))

        conv: Any = CONVS[dims - 1]
        self.stem = conv(inputs, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(map(blocks, widths, depths))
        self.down = nn.ModuleList(map(lambda a, b: conv(a, b, 2, 2), widths, widths[1:]))
        self.up = nn.ModuleList(map(lambda a, b: conv(b, a, 1), widths, widths[1:]))
        self.decoder = nn.ModuleList(map(blocks, widths[:-1], depths[:-1]))
        kind = ("linear", "bilinear", "trilinear")[dims - 1]
        self.widen = nn.Upsample(scale_factor=2.0, mode=kind)
        self.head = conv(widths[0], outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of every voxel."""
        least = 2 ** len(self.down)
        if (x.ndim != 2 + self.dims or x.shape[1] != self.inputs
                or any(size % least or not size for size in x.shape[2:])):
            raise ValueError(f"x must be (batch, {self.inputs}, {self.dims} sizes that are "
                             f"multiples of {least}), got {tuple(x.shape)}; pad or crop it")
        h = self.encoder[0](self.stem(x))
        skips = []
        for down, blocks in zip(self.down, self.encoder[1:], strict=True):
            skips.append(h)
            h = blocks(down(h))
        for up, blocks, skip in zip(reversed(self.up), reversed(self.decoder), reversed(skips),
                                    strict=True):
            h = blocks(self.widen(up(h)) + skip)
        return self.head(h)


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(math.gcd(8, channels), channels)
