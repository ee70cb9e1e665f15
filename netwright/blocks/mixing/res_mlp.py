from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.blocks.feedforward import FeedForward
from netwright.blocks.mixing.mlp_mixer import MLPMixer, TokenMixing
from netwright.catalogue.facets import method

__all__ = ["Affine", "ResMLP", "ResMLPBlock"]


@method("block", papers=["003-003"], place="normalisation", takes=("dim",))
class Affine(nn.Module):
    """Scale and shift each channel: y = a * x + b, with a = 1 and b = 0 at first.

    What stands where a normalisation would, without statistics of what passes through: at
    inference it can be merged with the linear layer after it.

    Args:
        dim: size of the last axis of x.

    Shapes: x and y (*, dim).

    Raises:
        ValueError: `dim` is below 1.

    Paper: Touvron, Bojanowski, Caron, Cord, El-Nouby, Grave, Izacard, Joulin, Synnaeve, Verbeek,
    Jégou, 2021, ResMLP: Feedforward networks for image classification with data-efficient training.

    >>> import torch
    >>> Affine(5)(torch.zeros(2, 5)).shape
    torch.Size([2, 5])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        checks.count(1, dim=dim)
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, dim) of (*, dim)."""
        return torch.addcmul(self.bias, self.weight, x)


@method(
    "block",
    papers=["003-003"],
    place="residual block",
    takes=("tokens", "dim"),
    search={"expansion": [2, 4]},
)
class ResMLPBlock(nn.Module):
    """A linear layer across patches, then a feed-forward block within each; no normalisation.

    u = x + s_1 * (A aff(x) + a);  y = u + s_2 * (C gelu(B aff(u) + b) + c);  A is along patches.

    The scales s start at `init_scale`, so that a block starts near the identity. The paper's second
    affine layer of each branch is that scale; its shift is left out, as in the authors' code, since
    the linear layer before it has one.

    Args:
        tokens: how many patches there are.
        dim: how many channels each has.
        expansion: hidden units of the feed-forward block, in multiples of `dim`.
        init_scale: what s starts at; `ResMLP` takes it from its depth.
        feedforward: `feedforward(dim, expansion * dim)` makes the feed-forward block.

    Shapes: x and y (*, tokens, dim).

    Raises:
        ValueError: a size is below 1, or x has another number of tokens.

    Paper: Touvron, Bojanowski, Caron, Cord, El-Nouby, Grave, Izacard, Joulin, Synnaeve, Verbeek,
    Jégou, 2021, ResMLP: Feedforward networks for image classification with data-efficient training.

    >>> import torch
    >>> ResMLPBlock(16, 24)(torch.zeros(2, 16, 24)).shape
    torch.Size([2, 16, 24])
    """

    def __init__(self, tokens: int, dim: int, *, expansion: int = 4, init_scale: float = 0.1,
                 feedforward: Callable[[int, int], nn.Module] = FeedForward) -> None:
        super().__init__()
        checks.count(1, tokens=tokens, dim=dim, expansion=expansion)
        self.token_affine, self.channel_affine = Affine(dim), Affine(dim)
        self.token_mixing = TokenMixing(tokens, layers=1)
        self.feedforward = feedforward(dim, expansion * dim)
        self.token_scale = nn.Parameter(torch.full((dim,), float(init_scale)))
        self.channel_scale = nn.Parameter(torch.full((dim,), float(init_scale)))

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, tokens, dim) of (*, tokens, dim)."""
        x = torch.addcmul(x, self.token_scale, self.token_mixing(self.token_affine(x)))
        return torch.addcmul(x, self.channel_scale, self.feedforward(self.channel_affine(x)))


@method(
    "block",
    papers=["003-003"],
    place="whole network",
    takes=("channels", "size", "classes"),
    needs=["images"],
    search={"depth": [4, 12]},
    variants={"small": {"patch": 4, "width": 12, "depth": 2}},
)
class ResMLP(MLPMixer):
    """An image classifier of `ResMLPBlock`s: patches, blocks, an affine layer, their mean, classes.

    The blocks' scales start at 0.1 up to 18 blocks, at 1e-5 up to 24 and at 1e-6 above.

    Args:
        channels: how many the images have.
        size: their height and width.
        classes: how many there are.
        patch: the side of a patch.
        width: the channels of a token.
        depth: how many blocks.
        expansion: as in `ResMLPBlock`.
        init_scale: what the scales start at, in place of what the depth says.
        feedforward: as in `ResMLPBlock`.

    Shapes: x (batch, channels, *size); out (batch, classes).

    Raises:
        ValueError: `patch` does not divide `size`, a size is below 1, or x has another size.

    Paper: Touvron, Bojanowski, Caron, Cord, El-Nouby, Grave, Izacard, Joulin, Synnaeve, Verbeek,
    Jégou, 2021, ResMLP: Feedforward networks for image classification with data-efficient training.

    >>> import torch
    >>> ResMLP(3, (32, 32), 10, patch=4, width=48, depth=3)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, channels: int, size: Sequence[int], classes: int, *, patch: int = 16,
                 width: int = 384, depth: int = 12, expansion: int = 4,
                 init_scale: float | None = None,
                 feedforward: Callable[[int, int], nn.Module] = FeedForward) -> None:
        checks.count(1, classes=classes, depth=depth, width=width, expansion=expansion)
        if init_scale is None:
            init_scale = 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6
        scale = init_scale
        super().__init__(channels, size, classes, patch=patch, width=width, depth=depth,
                         block=lambda tokens, dim: ResMLPBlock(
                             tokens, dim, expansion=expansion, init_scale=scale,
                             feedforward=feedforward), norm=Affine)
