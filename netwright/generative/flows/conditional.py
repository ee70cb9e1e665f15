import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu

from netwright import checks
from netwright.catalogue.facets import method
from netwright.generative.flows.flow import Flow, Transform
from netwright.reversing.engine import Regroup, Step, Update

__all__ = ["ConditionalAffineCoupling", "ConditionalFlow"]


@method(
    "generative",
    papers=["003-079"],
    place="transform",
    takes=("channels", "condition_channels"),
    needs=["images"],
    variants={"small": {"hidden": 8}},
    batch=lambda: (torch.randn(2, 4, 4, 4), torch.randn(2, 5, 4, 4)),
)
class ConditionalAffineCoupling(Transform):
    """Scale and shift each half of an image's channels by the other half and by a condition.

    (s, t) = f(x_2, condition):  z_1 = x_1 exp(c(s)) + t;
    (s, t) = g(z_1, condition):  z_2 = x_2 exp(c(s)) + t;
    c(s) = clamp 2/pi atan(s / clamp);  log_det = sum of all c(s).

    f and g are convolutional: a 3x3 convolution, half of whose channels are normalised over the
    image, another, a third that also sees the input, and a gate for each channel made of its mean.
    The last convolution starts at zero, so that the coupling starts as the identity; the paper does
    not say how it starts.

    Args:
        channels: The image's channels, at least 2; an odd one belongs to the second half.
        condition_channels: The condition's channels.
        hidden: The width of f and g.
        clamp: What the logarithm of a scale stays below.

    Shapes: x and z (batch, channels, height, width); condition (batch, condition_channels, height,
    width).

    Raises:
        ValueError: there are fewer than 2 channels, `x` has others, there is no condition of this
            shape, or `hidden` is below 2.

    Paper: Yang, Cao, Xiao, Zhou, Liu, Chen, Meng, 2023, PanFlowNet: A Flow-Based Deep Network for
    Pan-sharpening.

    >>> coupling, condition = ConditionalAffineCoupling(4, 5, 8), torch.randn(2, 5, 6, 6)
    >>> x = torch.randn(2, 4, 6, 6)
    >>> z, log_det = coupling(x, condition)
    >>> torch.allclose(coupling.inverse(z, condition), x, atol=1e-6)
    True
    """

    def __init__(self, channels: int, condition_channels: int, hidden: int = 64, *,
                 clamp: float = 5.0) -> None:
        super().__init__()
        checks.count(2, channels=channels,
                     advice="give one for each half, or put a Squeeze before the coupling")
        checks.count(2, hidden=hidden, advice="half of it is normalised")
        checks.above(0, clamp=clamp)
        self.condition_channels, self.clamp = condition_channels, clamp
        self.sizes = channels // 2, channels - channels // 2
        first, second = self.sizes
        self.f = _Net(second + condition_channels, 2 * first, hidden)
        self.g = _Net(first + condition_channels, 2 * second, hidden)

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the split, the two affine maps and the join."""
        layout = ("halves", *self.sizes)
        return [Regroup("the split before ConditionalAffineCoupling", self._split, self._join,
                        kind=("split", layout), undoes=("join", layout)),
                _Affine("f", self.f, 1, 0, self, condition),
                _Affine("g", self.g, 0, 1, self, condition),
                Regroup("the join after ConditionalAffineCoupling", self._join, self._split,
                        kind=("join", layout), undoes=("split", layout))]

    def _split(self, streams: list[Tensor]) -> list[Tensor]:
        x, log_det = streams
        if x.ndim != 4 or x.shape[1] != sum(self.sizes):
            raise ValueError(f"x must be (batch, {sum(self.sizes)}, height, width), got "
                             f"{tuple(x.shape)}")
        return [*[part.contiguous() for part in x.split(list(self.sizes), 1)], log_det]

    def _join(self, streams: list[Tensor]) -> list[Tensor]:
        return [torch.cat(streams[:2], 1), streams[2]]


class _Affine(Update):

    def __init__(self, name: str, net: nn.Module, read: int, write: int,
                 coupling: ConditionalAffineCoupling, condition: Any) -> None:
        super().__init__(name, net, (read,), (write, 2), (condition,))
        self.clamp, self.channels = coupling.clamp, coupling.condition_channels

    def make(self, reads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the scale, and the shift."""
        (x,), (condition,) = reads, self.args
        wanted = (len(x), self.channels, *x.shape[2:])
        if not isinstance(condition, Tensor) or condition.shape != wanted:
            got = tuple(condition.shape) if isinstance(condition, Tensor) else condition
            raise ValueError(f"condition must be a tensor of shape {tuple(wanted)}, as many images "
                             f"as x and as large, got {got}")
        assert self.module is not None
        s, t = self.module(torch.cat([x, condition.to(x.dtype)], 1)).chunk(2, 1)
        return self.clamp * 2 / math.pi * torch.atan(s / self.clamp), t

    def change(self, x: Sequence[Tensor], made: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Return x exp(s) + t, and log_det + sum s."""
        s, t = made
        return [(x[0] * s.exp() + t).to(x[0].dtype), x[1] + s.flatten(1).sum(1).to(x[1].dtype)]

    def restore(self, y: Sequence[Tensor], made: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Return (y - t) exp(-s), and log_det - sum s."""
        s, t = made
        return [((y[0] - t) * (-s).exp()).to(y[0].dtype),
                y[1] - s.flatten(1).sum(1).to(y[1].dtype)]


class _Net(nn.Module):
    """Three convolutions with half instance normalisation, then a gate for each channel."""

    def __init__(self, inputs: int, outputs: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.norm = nn.GroupNorm(hidden // 2, hidden // 2)  # over the image, for each channel
        self.second = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.last = nn.Conv2d(hidden + inputs, outputs, 3, padding=1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1),
                                  nn.Conv2d(outputs, max(1, outputs // 4), 1), nn.ReLU(),
                                  nn.Conv2d(max(1, outputs // 4), outputs, 1), nn.Sigmoid())
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = leaky_relu(self.first(x), 0.2)
        half = self.norm.num_channels
        h = torch.cat([self.norm(h[:, :half]), h[:, half:]], 1)
        y = self.last(torch.cat([x, leaky_relu(self.second(h), 0.2)], 1))
        return y * self.gate(y)


@method(
    "generative",
    papers=["003-079"],
    place="whole network",
    takes=("channels", "condition_channels"),
    needs=["images"],
    search={"blocks": [2, 4]},
    variants={"small": {"blocks": 2, "hidden": 8},
              "stored": {"blocks": 2, "hidden": 8, "stored": True}},
    batch=lambda: (torch.randn(2, 4, 4, 4), torch.randn(2, 5, 4, 4)),
)
class ConditionalFlow(Flow):
    """The density of images that belong to other images, and samples of it: pan-sharpening.

    z = f_n(... f_1(x, condition), condition),  each f a `ConditionalAffineCoupling`;
    log p(x | condition) = log N(z; 0, 1) + log_det.

    For pan-sharpening x is the multispectral image in high resolution, and the condition the pair
    of the same in low resolution and the panchromatic image in high resolution. Of several images
    the smaller ones are enlarged, bilinearly, to the size of x and all put side by side. Many
    samples belong to one condition: repeat it as often. z = 0 gives the most typical one.

    Every convolution serves any size, so that a flow trained on patches samples whole images.
    The paper's release uses one coupling's weights in all blocks; here each has its own.

    Args:
        blocks: The number of couplings.
        channels: The channels of x.
        condition_channels: The channels of all images of the condition together.
        hidden: The width of the couplings' networks.
        stored: Whether activations are kept.

    Shapes: x and z (batch, channels, height, width); condition a tensor (batch,
    condition_channels, h, w) or a tuple of such images; log_prob and log_det (batch,).

    Raises:
        ValueError: `blocks` is below 1, or an image has another shape than these.

    Paper: Yang, Cao, Xiao, Zhou, Liu, Chen, Meng, 2023, PanFlowNet: A Flow-Based Deep Network for
    Pan-sharpening.

    >>> flow = ConditionalFlow(blocks=2, channels=4, condition_channels=5, hidden=8)
    >>> low, pan = torch.randn(3, 4, 4, 4), torch.randn(3, 1, 8, 8)
    >>> flow.log_prob(torch.randn(3, 4, 8, 8), (low, pan)).shape
    torch.Size([3])
    >>> flow.sample(3, (low, pan)).shape
    torch.Size([3, 4, 8, 8])
    """

    def __init__(self, blocks: int, channels: int = 4, condition_channels: int = 5,
                 hidden: int = 64, *, stored: bool = False) -> None:
        checks.count(1, blocks=blocks)
        super().__init__([ConditionalAffineCoupling(channels, condition_channels, hidden)
                          for _ in range(blocks)], (channels,), stored=stored)

    def forward(self, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        """Return z and log |det dz/dx|."""
        return super().forward(x, _together(condition, x.shape[2:]))

    def inverse(self, z: Tensor, condition: Any = None) -> Tensor:
        """Return the x that the transforms map to `z`."""
        return super().inverse(z, _together(condition, z.shape[2:]))

    @torch.no_grad()
    def sample(self, n: int, condition: Any = None, *,
               generator: torch.Generator | None = None) -> Tensor:
        """Return `n` samples as large as the largest image of the condition, which has n rows."""
        images = _images(condition)
        rows, columns = (max(image.shape[axis] for image in images) for axis in (2, 3))
        like = next(self.parameters())
        z = torch.randn(n, *self.size, rows, columns, generator=generator, dtype=like.dtype,
                        device=like.device if generator is None else generator.device)
        return self.inverse(z.to(like.device), condition)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1:2] != self.size:
            raise ValueError(f"x must be (batch, {self.size[0]}, height, width), got "
                             f"{tuple(x.shape)}")


def _images(condition: Any) -> list[Tensor]:
    images = [condition] if isinstance(condition, Tensor) else list(condition or [])
    if not images or not all(isinstance(i, Tensor) and i.ndim == 4 for i in images):
        raise ValueError("condition must be an image (batch, channels, height, width) or a tuple "
                         f"of them, got {type(condition).__name__}")
    return images


def _together(condition: Any, size: torch.Size) -> Tensor:
    return torch.cat([image if image.shape[2:] == size else
                      interpolate(image, tuple(size), mode="bilinear", align_corners=False)
                      for image in _images(condition)], 1)
