from typing import Any

from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.generative.flows.corner import Convolve, starting_weight
from netwright.generative.flows.flow import Transform
from netwright.reversing.engine import Step

__all__ = ["InvertibleConv3x3"]

PADS = {"top-left": "TL", "top-right": "TR", "bottom-left": "BL", "bottom-right": "BR"}


@method("generative", papers=["001-038"], place="transform", takes=("channels",), needs=["images"])
class InvertibleConv3x3(Transform):
    """Convolve an image padded at one corner, which has an inverse and an exact determinant.

    z[i, j] = sum_{a, b < k} W[a, b] x[i - k + 1 + a, j - k + 1 + b]   (padded at the top left);
    log_det = height width log |det A|,  A = W[k - 1, k - 1].

    A pixel is made of itself, by the channels' matrix A, and of pixels nearer to the corner. Row
    by row the Jacobian is therefore block triangular with A on its diagonal, and the convolution
    has an inverse if and only if A is nonsingular, whatever the rest of the kernel is. The inverse
    solves for all pixels of an anti-diagonal at once, for all channels and images by one matrix
    product: height + width - 1 steps.

    The paper keeps A triangular, so that the condition says that its diagonal has no zero; here A
    is any matrix, and one LU factorisation of it gives both the determinant and the condition.
    With `kernel_size=1` this is the 1x1 convolution of Glow. At first A is a random rotation and
    the rest of the kernel small; a bias is `ActNorm`'s.

    Args:
        channels: The image's channels.
        pad: The corner that is padded: "top-left", "top-right", "bottom-left", "bottom-right".
        kernel_size: The kernel's rows and columns.
        generator: What the weight is drawn with.

    Shapes: x and z (batch, channels, height, width); weight (channels, channels, k, k).

    Raises:
        CannotReverse: A is singular, or not finite.
        ValueError: `pad` names no corner, or `x` has other channels.

    Paper: Nagar, Dufraisse, Varma, 2021, CInC Flow: Characterizable Invertible 3x3 Convolution.

    >>> import torch
    >>> convolution, x = InvertibleConv3x3(4), torch.randn(2, 4, 6, 6)
    >>> z, log_det = convolution(x)
    >>> torch.allclose(convolution.inverse(z), x, atol=1e-5)
    True
    """

    def __init__(self, channels: int, pad: str = "top-left", *, kernel_size: int = 3,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.one_of(PADS, pad=pad)
        self.pad = pad
        self.weight = nn.Parameter(starting_weight(channels, kernel_size, PADS[pad], generator))

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the convolution."""
        return [Convolve("InvertibleConv3x3", self, PADS[self.pad], inverse=False)]

    def corner(self) -> Tensor:
        """Return the matrix A, on which it depends whether there is an inverse."""
        return self.weight[:, :, -1 if "top" in self.pad else 0, -1 if "left" in self.pad else 0]
