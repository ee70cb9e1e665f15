from torch import nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.generative.flows.coupling import AffineCouplingTransform

__all__ = ["coupling_net", "image_coupling"]


@method("companion", place="transform")
def coupling_net(inputs: int, outputs: int, hidden: int = 64) -> nn.Sequential:
    """Return the small convolutional network of image couplings, which returns zeros at first.

    3x3 convolution, ReLU, 1x1 convolution, ReLU, 3x3 convolution that starts at zero.

    Shapes: (batch, inputs, height, width) to (batch, outputs, height, width).

    Paper: Kingma, Dhariwal, 2018, Glow: Generative Flow with Invertible 1x1 Convolutions.

    >>> import torch
    >>> coupling_net(2, 4)(torch.randn(5, 2, 8, 8)).shape
    torch.Size([5, 4, 8, 8])
    """
    last = nn.Conv2d(hidden, outputs, 3, padding=1)
    nn.init.zeros_(last.weight)
    assert last.bias is not None
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Conv2d(inputs, hidden, 3, padding=1), nn.ReLU(),
                         nn.Conv2d(hidden, hidden, 1), nn.ReLU(), last)


@method("companion", place="transform")
def image_coupling(channels: int, hidden: int = 64, *, clamp: float = 2.0,
                   flip: bool = False) -> AffineCouplingTransform:
    """Return an affine coupling of the halves of an image's channels, by a `coupling_net`.

    It is the identity at first. An odd channel belongs to the half that stays.

    Shapes: x and z (batch, channels, height, width).

    Raises:
        ValueError: there are fewer than 2 channels.

    Paper: Kingma, Dhariwal, 2018, Glow: Generative Flow with Invertible 1x1 Convolutions.

    >>> import torch
    >>> x = torch.randn(5, 4, 8, 8)
    >>> torch.equal(image_coupling(4)(x)[0], x)
    True
    """
    checks.count(2, channels=channels,
                 advice="give one for each half, or put a Squeeze before the coupling")
    changed = channels // 2
    stays = channels - changed
    net = coupling_net(stays, 2 * changed, hidden)
    return AffineCouplingTransform(net, (stays, changed) if flip else (changed, stays),
                                   clamp=clamp, flip=flip)
