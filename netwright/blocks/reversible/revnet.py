from collections.abc import Sequence

from torch import nn

from netwright import checks
from netwright.blocks.reversible.coupling import AdditiveCoupling
from netwright.blocks.reversible.dimensions import layers
from netwright.blocks.reversible.sequential import ReversibleSequential
from netwright.catalogue.facets import method

__all__ = ["RevNet"]


@method(
    "block",
    place="whole network",
    takes=("inputs", "classes"),
    saves=["training memory"],
    needs=["images"],
    variants={"small": {"channels": (8, 16), "depths": (1, 1)}},
)
class RevNet(nn.Sequential):
    """A residual classifier of additive couplings, with ordinary layers where the image shrinks.

    stem; stage, shrink, stage, ..., stage; norm, ReLU, mean over positions, linear.
    In a stage: y_1 = x_1 + F(x_2);  y_2 = x_2 + G(y_1);  F, G = norm, ReLU, conv twice.

    A stage stores its output alone, however deep, so that memory grows with the number of stages
    and not with their depth. The published net for CIFAR-10 is `RevNet((32, 64, 112), (3, 3, 3),
    10)`, with three couplings a stage.

    Args:
        channels: The channels of each stage, even numbers.
        depths: The couplings of each stage.
        classes: The classes.
        inputs: The channels of an image.
        dropout: The share of numbers that is dropped within F and G in training.
        dims: The axes of an image: 1, 2 or 3.
        exact: Whether the backward pass reconstructs bit for bit (see `ReversibleSequential`).

    Shapes: x (batch, inputs, *size); out (batch, classes).

    Raises:
        ValueError: `channels` and `depths` are not one number for each stage, or a stage has an
            odd number of channels.

    Paper: Gomez, Ren, Urtasun, Grosse, 2017, The Reversible Residual Network: Backpropagation
    Without Storing Activations.

    >>> import torch
    >>> RevNet((8, 16), (2, 2), 10)(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, channels: Sequence[int], depths: Sequence[int], classes: int, *,
                 inputs: int = 3, dropout: float = 0.0, dims: int = 2,
                 exact: bool = False) -> None:
        checks.count(1, classes=classes, inputs=inputs)
        checks.between(0, 1, ends=(True, False), dropout=dropout)
        if not channels or len(channels) != len(depths):
            raise ValueError("channels and depths must have one number for each stage, got "
                             f"channels={channels}, depths={depths}")
        if any(width % 2 for width in channels):
            raise ValueError(f"channels must be even, since couplings halve them, got {channels}")
        conv, norm, pool = layers(dims)

        def residual(width: int) -> nn.Module:
            return nn.Sequential(
                norm(width), nn.ReLU(), conv(width, width, 3, padding=1, bias=False),
                norm(width), nn.ReLU(), nn.Dropout(dropout),
                conv(width, width, 3, padding=1, bias=False))

        parts: list[nn.Module] = [conv(inputs, channels[0], 3, padding=1, bias=False)]
        for k, (width, depth) in enumerate(zip(channels, depths, strict=True)):
            if k:
                before = channels[k - 1]
                parts.append(nn.Sequential(norm(before), nn.ReLU(), conv(
                    before, width, 3, stride=2, padding=1, bias=False)))
            parts.append(ReversibleSequential(*[
                AdditiveCoupling(residual(width // 2), residual(width // 2))
                for _ in range(depth)], exact=exact))
        super().__init__(*parts, norm(channels[-1]), nn.ReLU(), pool(1), nn.Flatten(),
                         nn.Linear(channels[-1], classes))
