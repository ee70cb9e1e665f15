from collections.abc import Callable, Sequence

from torch import nn

from netwright import checks
from netwright.catalogue.facets import method

__all__ = ["cnn"]


@method(
    "model",
    place="whole network",
    takes=("channels", "size", "classes"),
    needs=["images"],
    search={"kernel": [3, 5]},
)
def cnn(channels: int, size: Sequence[int], classes: int, *, widths: Sequence[int] = (16, 32),
        kernel: int = 3, activation: Callable[[], nn.Module] = nn.ReLU,
        norm: bool = False) -> nn.Sequential:
    """Return a convolutional network that halves every axis after each convolution.

    `size` is an image's (height, width), or (length,) for signals; `norm` adds batch
    normalisation after each convolution.

    Args:
        channels: of an image.
        size: its (height, width), or (length,) for signals.
        classes: scores that are returned.
        widths: channels of each convolution.
        kernel: its size in every axis.
        activation: makes what follows each convolution.
        norm: whether a batch normalisation stands between.

    Shapes: x (batch, channels, *size); out (batch, classes).

    Raises:
        ValueError: `size` has not one or two axes, or is too small to be halved so often.

    >>> import torch
    >>> cnn(1, (8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    >>> cnn(1, (40,), 10)(torch.zeros(2, 1, 40)).shape
    torch.Size([2, 10])
    """
    if len(size) not in (1, 2):
        raise ValueError(f"size must be (length,) or (height, width), got {tuple(size)}")
    checks.count(2 ** len(widths), size=min(size),
                 advice=f"each axis is halved {len(widths)} times; give fewer widths")
    one = len(size) == 1
    convolution, pool = (nn.Conv1d, nn.MaxPool1d) if one else (nn.Conv2d, nn.MaxPool2d)
    batch_norm = nn.BatchNorm1d if one else nn.BatchNorm2d
    layers: list[nn.Module] = []
    pixels = 1
    for axis in size:
        pixels *= axis // 2 ** len(widths)
    for before, after in zip([channels, *widths], widths, strict=False):
        layers.append(convolution(before, after, kernel, padding=kernel // 2))
        layers += [batch_norm(after)] if norm else []
        layers += [activation(), pool(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * pixels, classes))
