from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from netwright import checks
from netwright.blocks.reversible.coupling import AffineCoupling
from netwright.blocks.reversible.sequential import ReversibleSequential
from netwright.catalogue.facets import method
from netwright.generative.flows.image_coupling import coupling_net
from netwright.reversing.engine import Regroup, Step, Stored, Update, run

__all__ = ["InvertibleRescaler"]

Size = tuple[int, int]


@method(
    "generative",
    papers=["002-011"],
    place="whole network",
    takes=("channels",),
    needs=["images"],
    search={"blocks": [2, 4]},
    variants={"small": {"blocks": 2, "hidden": 8}},
    batch=lambda: (torch.rand(2, 4, 8, 8), (4, 6)),
)
class InvertibleRescaler(nn.Module):
    """Make an image small so that it can be made large again, at any scale of either axis.

    down:  low = resize(resize(x)), high = x - low;  (l, h) = blocks(low, high);
           y = resize(x + l - low);
    up:    (low, high) = blocks^{-1}(resize(y), 0);  x' = low + high.

    Resizing is bicubic, smoothed where it makes smaller, to any size. y is the bicubic image with
    what the blocks add to the low part, so that resizing y gives l again but for what is too fine
    in that; at first the blocks add nothing, and both ways are bicubic. The blocks are affine
    couplings of the two parts, which have an exact inverse; two things are lost, h and what
    resizing loses of l. `loss` trains the blocks to lose little there, while y stays near to the
    bicubic image. One model serves all scales, by two things:

    preemptive splitting: the channels are split into low and high before the blocks and at the
    full size, not by a transform that fixes the scale to 2; and
    scale encoding: the blocks are told the two scales, and for each pixel where its centre lies
    between those of the small image's pixels, as a fraction of one, -1/2 to 1/2.

    What the paper leaves open or does otherwise: it draws h from a normal distribution where this
    sets its mean, 0; the blocks' networks are two 3x3 convolutions around one of 1x1.

    Args:
        channels: The image's channels.
        blocks: The number of couplings; both parts are changed in each.
        scale_encoding: Whether the blocks are told scale and position.
        hidden: The width of the blocks' networks.

    Shapes: x (batch, channels, H, W), y (batch, channels, h, w), sizes (rows, columns). `down` and
    `up` return y and x'; `forward` both.

    Raises:
        ValueError: the image has other channels, or a size is not smaller (`down`) or larger
            (`up`) than the image's.

    Paper: Pan, Li, He, Wu, Ding, 2023, Effective Invertible Arbitrary Image Rescaling.

    >>> rescaler, x = InvertibleRescaler(3, blocks=2, hidden=8), torch.rand(2, 3, 15, 20)
    >>> small = rescaler.down(x, (6, 15))
    >>> small.shape, rescaler.up(small, (15, 20)).shape
    (torch.Size([2, 3, 6, 15]), torch.Size([2, 3, 15, 20]))
    """

    def __init__(self, channels: int, blocks: int, scale_encoding: bool = True, *,
                 hidden: int = 32) -> None:
        super().__init__()
        checks.count(1, channels=channels, blocks=blocks, hidden=hidden)
        self.channels, self.scale_encoding = channels, scale_encoding
        told = 4 if scale_encoding else 0
        self.blocks = ReversibleSequential(*[
            AffineCoupling(_Told(coupling_net(channels + told, 2 * channels, hidden)),
                           _Told(coupling_net(channels + told, 2 * channels, hidden)), clamp=1.0)
            for _ in range(blocks)])

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Return `x` made small, and that made large again."""
        small = self.down(x, size)
        return small, self.up(small, _size(x))

    def down(self, x: Tensor, size: Size) -> Tensor:
        """Return `x` at the smaller `size`."""
        z, low = self.encode(x, size), _blurred(x, size)
        return _resized(x + z[:, :self.channels] - low, size)

    def up(self, y: Tensor, size: Size) -> Tensor:
        """Return `y`, made by `down`, at the larger `size`."""
        self._check(y, "y")
        if size[0] < y.shape[2] or size[1] < y.shape[3] or size == _size(y):
            raise ValueError(f"size must be larger than that of y, {_size(y)}, got {tuple(size)}")
        low = _resized(y, size)
        return self.decode(torch.cat([low, torch.zeros_like(low)], 1), _size(y))

    def encode(self, x: Tensor, size: Size) -> Tensor:
        """Return low and high part, one after the other, as the blocks leave them for `size`."""
        self._check(x, "x")
        if not (0 < size[0] <= x.shape[2] and 0 < size[1] <= x.shape[3]) or size == _size(x):
            raise ValueError(f"size must be smaller than that of x, {_size(x)}, and at least 1, "
                             f"got {tuple(size)}")
        low = _blurred(x, size)
        return self.blocks(torch.cat([low, x - low], 1), *self._told(x, size))

    def decode(self, z: Tensor, size: Size) -> Tensor:
        """Return the `x` of which `encode(x, size)` makes `z`."""
        steps = [_backwards(step) for step in reversed(self.blocks.steps(*self._told(z, size)))]
        low, high = run(steps, [z])[0].chunk(2, 1)
        return low + high

    def loss(self, x: Tensor, size: Size, *, guide: float = 1.0) -> Tensor:
        """Return how far `x` comes back from where it was, and the small image from bicubic.

        mean |x' - x| + guide mean (y - resize(x))^2.
        """
        small, back = self(x, size)
        return (back - x).abs().mean() + guide * (small - _resized(x, size)).square().mean()

    def _told(self, x: Tensor, size: Size) -> tuple[Tensor, ...]:
        """Return what the blocks are told: scales and positions (1, 4, H, W)."""
        if not self.scale_encoding:
            return ()
        planes = []
        for axis, (small, large) in enumerate(zip(size, _size(x), strict=True)):
            centre = (torch.arange(large, device=x.device, dtype=x.dtype) + 0.5) * small / large
            offset = centre - centre.floor() - 0.5
            shape = (large, 1) if axis == 0 else (1, large)
            planes += [offset.view(shape).expand(_size(x)),
                       x.new_tensor(small / large).expand(_size(x))]
        return (torch.stack(planes)[None],)

    def _check(self, x: Tensor, name: str) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"{name} must be (batch, {self.channels}, height, width), got "
                             f"{tuple(x.shape)}")


class _Told(nn.Module):
    """A network that is told something besides."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, *told: Tensor) -> Tensor:
        return self.net(torch.cat([x, *[t.expand(len(x), -1, -1, -1) for t in told]], 1))


class _Backwards(Update):
    """A step taken the other way, so that the way up stores no activations either."""

    def __init__(self, step: Update) -> None:
        super().__init__(step.name, step.module, step.reads, step.writes, step.args, step.options)
        self.step = step

    def make(self, reads: Sequence[Tensor]) -> Any:
        return self.step.make(reads)

    def change(self, x: Sequence[Tensor], made: Any) -> Sequence[Tensor]:
        return self.step.restore(x, made)

    def restore(self, y: Sequence[Tensor], made: Any) -> Sequence[Tensor]:
        return self.step.change(y, made)


def _backwards(step: Step) -> Step:
    if isinstance(step, Regroup):
        return Regroup(step.name, step.back, step.there)
    assert not isinstance(step, Stored)
    return _Backwards(step)


def _resized(x: Tensor, size: Size) -> Tensor:
    return interpolate(x, tuple(size), mode="bicubic", align_corners=False, antialias=True)


def _blurred(x: Tensor, size: Size) -> Tensor:
    return _resized(_resized(x, size), _size(x))


def _size(x: Tensor) -> Size:
    return x.shape[2], x.shape[3]
