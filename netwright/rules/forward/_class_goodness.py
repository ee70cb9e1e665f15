"""The goodness that a stage has for each class, read off its output by a 1 x 1 convolution."""

from typing import Any

from torch import Tensor

from netwright.rules.readout import Readout, mean_of_tokens
from netwright.stages import Stages


def class_goodness(kernel: Readout, h: Tensor, x: Any = None) -> Tensor:
    """Return the mean over places of the squared class channels that `kernel` reads off `h`.

    g_c = mean_p (sum_k M_ck h_kp)²

    A place is a pixel, or a token that `x` does not call padding.

    Shapes: h (batch, channels, *places), (batch, tokens, channels) or (batch, channels);
    M (classes, channels); g (batch, classes).
    """
    if h.ndim == 2:
        return kernel.scores(h).square()
    if h.ndim == 3 and not kernel.channels_first:
        return mean_of_tokens(kernel.scores(h).square(), x)
    return kernel.scores(h.flatten(2).transpose(1, 2)).square().mean(1)


def channels(net: Stages, example: Any, channels_first: list[bool]) -> list[int | None]:
    """Return how many channels each stage's output has, None where no example tells."""
    if example is None:
        return [None] * len(net)
    shapes = [row["shape"] for row in net.table(example)]
    return [shape[1] if len(shape) > 3 or first else shape[-1]
            for shape, first in zip(shapes, channels_first, strict=True)]
