from typing import Any

from torch import Generator, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.generative.flows.corner import CORNERS, Convolve, starting_weight
from netwright.generative.flows.flow import Transform
from netwright.reversing.engine import Step

__all__ = ["InvConv2d"]


@method(
    "generative",
    papers=["001-047"],
    place="transform",
    takes=("channels",),
    saves=["inference time"],
    needs=["images"],
    search={"kernel_size": [3, 5]},
)
class InvConv2d(Transform):
    """Undo a convolution on the way to the base, so that a sample needs convolutions only.

    z solves  W * z = x  for a kernel W on images padded at one corner, whose own-pixel matrix is A;
    log_det = -height width log |det A|;  inverse(z) = W * z.

    The solve and its backward pass go over the image's anti-diagonals, height + width - 1 of them,
    and do all pixels of one, of all channels and images, by one matrix product:
    dL/dx solves the transposed convolution from the opposite corner, and dL/dW is minus the weight
    gradient of an ordinary convolution at z. No matrix of pixels by pixels is made.

    As for `InvertibleConv3x3`, A may be any nonsingular matrix; the paper fixes its determinant.

    Args:
        channels: The image's channels.
        kernel_size: The kernel's rows and columns.
        order: The corner that is padded, from which the pixels are solved for: "TL" (top left),
            "TR", "BL" or "BR".
        generator: What the weight is drawn with.

    Shapes: x and z (batch, channels, height, width); weight (channels, channels, k, k).

    Raises:
        CannotReverse: A is singular, or not finite.
        ValueError: `order` names no corner, or `x` has other channels.

    Paper: Nagar, Varma, 2025, Parallel Backpropagation for Inverse of a Convolution with
    Application to Normalizing Flows.

    >>> import torch
    >>> layer, x = InvConv2d(4, order="BR"), torch.randn(2, 4, 6, 6)
    >>> z, log_det = layer(x)
    >>> torch.allclose(layer.inverse(z), x, atol=1e-5)
    True
    """

    def __init__(self, channels: int, kernel_size: int = 3, order: str = "TL", *,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.one_of(CORNERS, order=order)
        self.order = order
        self.weight = nn.Parameter(starting_weight(channels, kernel_size, order, generator))

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the inverse of the convolution."""
        return [Convolve("InvConv2d", self, self.order, inverse=True)]
