from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, mse_loss

from netwright import checks
from netwright.blocks.reversible.block import ReversibleBlock
from netwright.blocks.reversible.downsample import InjectivePad, InvertibleDownsample
from netwright.blocks.reversible.sequential import ReversibleSequential
from netwright.catalogue.facets import method
from netwright.errors import CannotReverse
from netwright.reversing.engine import Update

__all__ = ["ReversibleDecoupler", "TransmissionPrompt"]

LEAST_SCALE = 1e-3


@method(
    "block",
    papers=["001-003"],
    place="whole network",
    takes=("inputs",),
    saves=["training memory"],
    needs=["images"],
    search={"columns": [2, 4]},
    variants={"small": {"channels": (4, 6), "columns": 2, "inputs": 1}},
    batch=lambda: torch.randn(2, 1, 4, 4),
)
class ReversibleDecoupler(nn.Module):
    """Separate what shines through a pane from what it reflects, by an encoder that can be undone.

    x = prompt(I) stem(I);  c_0 = (S I, 0), c_l = 0 for l > 0;  S is `InvertibleDownsample(2)`.
    In each column, l = 0, 1, ...:  c_l' = a_l c_l + F_l(c_{l-1}', c_{l+1}),  c_{-1} = x.
    Inverse, l = ..., 1, 0:  c_l = (c_l' - F_l(c_{l-1}', c_{l+1})) / a_l.
    T = I - D_T(c_0, c_1, ...);  R = I - D_R(c_0, c_1, ...).

    F_l fuses the level above, halved by a convolution, with the level below, enlarged, and runs
    gated convolutions (NAF blocks) on it; the scales a_l are learned. The two decoders begin at the
    coarsest level and multiply what they have by each finer one. The encoder stores its last
    column alone, however many there are, and `inverse` gives the image back from that.

    Args:
        channels: The channels of each level, fine to coarse; the first holds the four pixels of a
            patch, so it is at least 4 * inputs.
        columns: How often the levels are gone through.
        depths: The gated blocks of each level in a column; one each where None.
        inputs: The channels of an image.
        prompt: Whether a `TransmissionPrompt` weighs the stem's channels; a module of one's own
            that makes (batch, channels[0], 1, 1) of the image does too.
        exact: Whether the backward pass reconstructs bit for bit (see `ReversibleSequential`).

    Shapes: I, T, R (batch, inputs, height, width), height and width multiples of
    2 ** len(channels); features: a tuple of x and every c_l, (batch, channels[l], height /
    2 ** (l + 1), width / 2 ** (l + 1)).

    Raises:
        ValueError: `channels` is too few for the image, or `depths` is not one for each level.
        CannotReverse: height or width is no multiple of 2 ** len(channels).

    Paper: Zhao, Li, Hu, Guo, 2025, Reversible Decoupling Network for Single Image Reflection
    Removal.

    >>> network, image = ReversibleDecoupler((16, 32), columns=3), torch.rand(2, 3, 16, 16)
    >>> transmission, reflection = network(image)
    >>> transmission.shape
    torch.Size([2, 3, 16, 16])
    >>> torch.allclose(network.inverse(network.encode(image)), image, atol=1e-4)
    True
    """

    def __init__(self, channels: Sequence[int] = (64, 128, 256, 512), columns: int = 4, *,
                 depths: Sequence[int] | None = None, inputs: int = 3,
                 prompt: bool | nn.Module = True, exact: bool = False) -> None:
        super().__init__()
        depths = (1,) * len(channels) if depths is None else depths
        if not channels or len(depths) != len(channels) or columns < 1:
            raise ValueError("channels and depths must have one number for each level, and columns "
                             f"be at least 1, got {channels=}, {depths=}, {columns=}")
        checks.count(1, inputs=inputs)
        checks.count(4 * inputs, channels=channels[0],
                     advice="the first level's hold the 4 * inputs pixels of a patch")
        self.channels = tuple(channels)
        self.stem = nn.Sequential(nn.Conv2d(inputs, channels[0], 5, stride=2, padding=2),
                                  _ChannelNorm(channels[0]))
        self.prompt = (prompt if isinstance(prompt, nn.Module)
                       else TransmissionPrompt(channels[0], inputs=inputs) if prompt else None)
        self.start = ReversibleSequential(InvertibleDownsample(2),
                                          InjectivePad(channels[0] - 4 * inputs))
        self.columns = ReversibleSequential(
            *[_Column(channels, depths, first=k == 0) for k in range(columns)], exact=exact)
        self.transmission = _Decoder(channels, inputs)
        self.reflection = _Decoder(channels, inputs)

    def encode(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the features of all levels after the last column, x before them."""
        shrunk = 2 ** len(self.channels)
        if image.ndim != 4 or any(n % shrunk for n in image.shape[2:]):
            raise CannotReverse(f"image must be (batch, channels, height, width), the last two "
                                f"multiples of {shrunk} for {len(self.channels)} levels, got "
                                f"{tuple(image.shape)}; pad or crop it")
        x = self.stem(image)
        if self.prompt is not None:
            x = x * self.prompt(image)
        batch, _, height, width = image.shape
        coarse = [image.new_zeros(batch, channels, height >> level, width >> level)
                  for level, channels in enumerate(self.channels[1:], start=2)]
        features: tuple[Tensor, ...] = self.columns((x, self.start(image), *coarse))
        return features

    def inverse(self, features: Sequence[Tensor]) -> Tensor:
        """Return the image of which `encode` makes `features`."""
        image: Tensor = self.start.inverse(self.columns.inverse(features)[1])
        return image

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return transmission and reflection."""
        _, *levels = self.encode(image)
        return image - self.transmission(levels), image - self.reflection(levels)


@method("companion", papers=["001-003"])
class TransmissionPrompt(nn.Module):
    """Weigh channels by how much of each colour seems to shine through the pane.

    (a, b) = estimator(I), one number for each colour, so that a I + b is nearest to T;
    prompt = star(W_2 star(W_1 (a, b)));  star(x) = s relu(x)^2 + t with learned s and t.

    The estimator learns from `loss` alone, and the rest from what the prompt is used for: no
    gradient passes from the prompt to the estimator. A new prompt is 1 for every channel.

    Args:
        dim: The channels that are weighed.
        inputs: The colours.
        hidden: The width of the layer between.
        estimator: What makes (batch, 2 * inputs) of an image; a small convolutional network where
            None.

    Shapes: I (batch, inputs, height, width); prompt (batch, dim, 1, 1).

    Raises:
        ValueError: the estimator does not return (batch, 2 * inputs).

    Paper: Zhao, Li, Hu, Guo, 2025, Reversible Decoupling Network for Single Image Reflection
    Removal.

    >>> prompt = TransmissionPrompt(16)
    >>> prompt(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 16, 1, 1])
    """

    def __init__(self, dim: int, *, inputs: int = 3, hidden: int = 512,
                 estimator: nn.Module | None = None) -> None:
        super().__init__()
        self.inputs = inputs
        self.estimator = estimator or nn.Sequential(
            nn.Conv2d(inputs, 16, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2 * inputs))
        self.weigh = nn.Sequential(nn.Linear(2 * inputs, hidden), _StarReLU(),
                                   nn.Linear(hidden, dim), _StarReLU(scale=0.0, offset=1.0))

    def rates(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b, each (batch, inputs, 1, 1)."""
        found = self.estimator(image)
        if found.shape != (len(image), 2 * self.inputs):
            raise ValueError(f"estimator must return (batch, {2 * self.inputs}), two numbers for "
                             f"each colour, got {tuple(found.shape)}")
        a, b = found.unsqueeze(-1).unsqueeze(-1).chunk(2, 1)
        return a, b

    def loss(self, image: Tensor, transmission: Tensor) -> Tensor:
        """Return the mean squared distance of a I + b from the transmission."""
        a, b = self.rates(image)
        return mse_loss(a * image + b, transmission)

    def forward(self, image: Tensor) -> Tensor:
        """Return the weight of each channel."""
        rates = torch.cat(self.rates(image), 1).flatten(1).detach()
        weights: Tensor = self.weigh(rates)
        return weights.unsqueeze(-1).unsqueeze(-1)


class _Column(ReversibleBlock):

    streams = None

    def __init__(self, channels: Sequence[int], depths: Sequence[int], *, first: bool) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            _Level(channels, level, depth, below=not first and level < len(channels) - 1)
            for level, depth in enumerate(depths))

    def updates(self, *args: Any, **options: Any) -> list[Update]:
        """Return the levels' updates, fine to coarse; stream 0 is x, stream l + 1 is c_l."""
        return [_Scaled(f"level {k}", level, (k, k + 2) if level.below else (k,), (k + 1,))
                for k, level in enumerate(self.levels)]


class _Scaled(Update):
    """c' = a c + made."""

    def change(self, x: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        """Return a c + made."""
        return [(self._scale() * x[0] + made).to(x[0].dtype)]

    def restore(self, y: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        """Return (c' - made) / a."""
        return [((y[0] - made) / self._scale()).to(y[0].dtype)]

    def _scale(self) -> Tensor:
        """Return the scales, none nearer to 0 than LEAST_SCALE; the gradient passes by that."""
        scale: Any = self.module.scale  # type: ignore[union-attr]
        sign = torch.where(scale < 0, -1.0, 1.0).to(scale.dtype)
        away = sign * scale.abs().clamp(min=LEAST_SCALE)
        return scale + (away - scale).detach()


class _Level(nn.Module):
    """What is added to a level: blocks on the finer level, halved, and the coarser, enlarged."""

    def __init__(self, channels: Sequence[int], level: int, depth: int, *, below: bool) -> None:
        super().__init__()
        width = channels[level]
        self.below = below
        self.scale = nn.Parameter(torch.full((1, width, 1, 1), 0.5))
        self.halve = nn.Identity() if level == 0 else nn.Sequential(
            nn.Conv2d(channels[level - 1], width, 2, stride=2), _ChannelNorm(width))
        self.enlarge = nn.Sequential(
            nn.Conv2d(channels[level + 1], width, 1), _ChannelNorm(width),
            nn.Upsample(scale_factor=2, mode="bilinear")) if below else None
        self.blocks = nn.Sequential(*[_Gated(width, 4 * width) for _ in range(depth)])

    def forward(self, above: Tensor, below: Tensor | None = None) -> Any:
        h = self.halve(above)
        if self.enlarge is not None:
            h = h + self.enlarge(below)
        return self.blocks(h)


class _Decoder(nn.Module):
    """What is subtracted from the image: coarse to fine, each level multiplied in."""

    def __init__(self, channels: Sequence[int], inputs: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(coarse, fine, 1), _ChannelNorm(fine), nn.GELU(),
                          nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
                          _Gated(fine, 2 * (fine // 2 or 1)))
            for fine, coarse in pairwise(channels))
        self.out = nn.Sequential(nn.Conv2d(channels[0], 4 * inputs, 1), nn.PixelShuffle(2))

    def forward(self, levels: Sequence[Tensor]) -> Any:
        h = levels[-1]
        for up, level in zip(reversed(self.up), reversed(levels[:-1]), strict=True):
            h = up(h) * level
        return self.out(h)


class _Gated(nn.Module):
    """A NAF block: two residual branches whose nonlinearity is a product of two halves."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        half = inner // 2
        self.spread = nn.Sequential(_ChannelNorm(width), nn.Conv2d(width, inner, 1),
                                    nn.Conv2d(inner, inner, 3, padding=1, groups=inner))
        self.attend = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(half, half, 1))
        self.gather = nn.Conv2d(half, width, 1)
        self.widen = nn.Sequential(_ChannelNorm(width), nn.Conv2d(width, inner, 1))
        self.narrow = nn.Conv2d(half, width, 1)
        self.beta = nn.Parameter(torch.full((1, width, 1, 1), 1e-6))
        self.gamma = nn.Parameter(torch.full((1, width, 1, 1), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.spread(x).chunk(2, 1)
        h = a * b
        x = x + self.beta * self.gather(h * self.attend(h))
        a, b = self.widen(x).chunk(2, 1)
        return x + self.gamma * self.narrow(a * b)


class _ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, 1e-6)
        return x.movedim(-1, 1)


class _StarReLU(nn.Module):
    """s relu(x)^2 + t."""

    def __init__(self, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([scale]))
        self.offset = nn.Parameter(torch.tensor([offset]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.relu().square() + self.offset
