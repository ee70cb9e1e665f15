from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from netwright import checks
from netwright.blocks.feedforward import FeedForward
from netwright.blocks.feedforward.feed_forward import Activation
from netwright.catalogue.facets import method

__all__ = ["MLPMixer", "MixerBlock", "TokenMixing"]

MakeTokenMixing = Callable[[int, int], nn.Module]  # of tokens and dim
MakeFeedForward = Callable[[int, int], nn.Module]  # of dim and hidden


@method("block", place="token mixing", takes=("tokens",), search={"layers": [1, 2]})
class TokenMixing(nn.Module):
    """Mix tokens with linear layers that every channel shares.

    y = (W_2 s(W_1 x + b_1) + b_2), along the tokens; with `layers=1`, y = W x + b.

    Args:
        tokens: how many tokens there are.
        hidden: units between the layers, 4 `tokens` where none is given.
        layers: how many linear layers.
        activation: a name, or what makes a module.

    Shapes: x and y (*, tokens, dim).

    Raises:
        ValueError: a size is below 1, or x has another number of tokens.
        UnknownName: no activation is called that.

    >>> import torch
    >>> TokenMixing(16, 8)(torch.zeros(2, 16, 5)).shape
    torch.Size([2, 16, 5])
    """

    def __init__(self, tokens: int, hidden: int | None = None, *, layers: int = 2,
                 activation: Activation = "gelu") -> None:
        super().__init__()
        checks.count(1, tokens=tokens)
        self.tokens = tokens
        self.layers = FeedForward(tokens, hidden, layers=layers, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, tokens, dim) of (*, tokens, dim)."""
        check_tokens(x, self.tokens)
        y: Tensor = self.layers(x.mT).mT
        return y


@method("block", place="residual block", takes=("tokens", "dim"))
class MixerBlock(nn.Module):
    """Mix tokens, then channels, each on a normalised copy of the signal.

    u = x + token_mixing(norm(x));  y = u + feedforward(norm(u)).

    Args:
        tokens: how many tokens there are.
        dim: how many channels each has.
        token_hidden: units of the usual token mixing, half of `dim` where none is given.
        channel_hidden: units of the feed-forward block, 4 `dim` where none is given.
        token_mixing: `token_mixing(tokens, dim)` makes what mixes tokens, a module of
            (*, tokens, dim); without it, a `TokenMixing` of `token_hidden` units.
        feedforward: `feedforward(dim, channel_hidden)` makes what mixes channels, a module of
            (*, dim); without it, two linear layers with a GELU between.
        norm: `norm(dim)` makes the normalisation.

    Shapes: x and y (*, tokens, dim).

    Raises:
        ValueError: a size is below 1, or x has another number of tokens.

    Paper: Tolstikhin, Houlsby, Kolesnikov, Beyer, Zhai, Unterthiner, Yung, Steiner, Keysers,
    Uszkoreit, Lucic, Dosovitskiy, 2021, MLP-Mixer: An all-MLP Architecture for Vision.

    >>> import torch
    >>> MixerBlock(16, 24)(torch.zeros(2, 16, 24)).shape
    torch.Size([2, 16, 24])
    """

    def __init__(self, tokens: int, dim: int, token_hidden: int | None = None,
                 channel_hidden: int | None = None, *,
                 token_mixing: MakeTokenMixing | None = None,
                 feedforward: MakeFeedForward | None = None,
                 norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        checks.count(1, tokens=tokens, dim=dim)
        checks.count(1, optional=True, token_hidden=token_hidden, channel_hidden=channel_hidden)
        hidden = 4 * dim if channel_hidden is None else channel_hidden
        self.token_norm, self.channel_norm = norm(dim), norm(dim)
        self.token_mixing = (token_mixing(tokens, dim) if token_mixing else TokenMixing(
            tokens, max(1, dim // 2) if token_hidden is None else token_hidden))
        self.feedforward = (feedforward or FeedForward)(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, tokens, dim) of (*, tokens, dim)."""
        x = x + self.token_mixing(self.token_norm(x))
        y: Tensor = x + self.feedforward(self.channel_norm(x))
        return y


@method(
    "block",
    place="whole network",
    takes=("channels", "size", "classes"),
    needs=["images"],
    search={"depth": [2, 4], "width": [32, 64]},
    variants={"small": {"width": 12, "depth": 2},
              "two scales": {"width": 12, "depth": 2, "scales": (1, 2)}},
)
class MLPMixer(nn.Sequential):
    """An image classifier of patches whose blocks mix tokens and channels without attention.

    patches -> linear -> `depth` blocks -> norm -> mean over the patches -> linear.

    Patches have no position embeddings, since what mixes tokens knows where they are. The blocks
    are `MixerBlock`s, with the token mixing and the feed-forward block that are given, or whatever
    `block` makes. `grid` says how many patches there are in each direction.

    Args:
        channels: how many the images have.
        size: their height and width.
        classes: how many there are.
        patch: the side of a patch.
        width: the channels of a token.
        depth: how many blocks.
        scales: patches of these multiples of `patch` are seen at each place, and added up once
            they are embedded: (1, 2) is RaftMLP's hierarchical embedding of two sizes.
        token_mixing: as in `MixerBlock`.
        feedforward: as in `MixerBlock`.
        block: `block(tokens, width)` makes a block, in place of a `MixerBlock`.
        norm: `norm(width)` makes the normalisation of the `MixerBlock`s and of the last layer.

    Shapes: x (batch, channels, *size); out (batch, classes).

    Raises:
        ValueError: `patch` does not divide `size`, a scale does not keep the grid, `block` is given
            with `token_mixing` or `feedforward`, or x has another size.

    Paper: Tolstikhin, Houlsby, Kolesnikov, Beyer, Zhai, Unterthiner, Yung, Steiner, Keysers,
    Uszkoreit, Lucic, Dosovitskiy, 2021, MLP-Mixer: An all-MLP Architecture for Vision.

    >>> import torch
    >>> model = MLPMixer(3, (32, 32), 10, patch=4)
    >>> model.grid, model(torch.zeros(2, 3, 32, 32)).shape
    ((8, 8), torch.Size([2, 10]))
    """

    def __init__(self, channels: int, size: Sequence[int], classes: int, *, patch: int = 4,
                 width: int = 64, depth: int = 4, scales: Sequence[int] = (1,),
                 token_mixing: MakeTokenMixing | None = None,
                 feedforward: MakeFeedForward | None = None,
                 block: Callable[[int, int], nn.Module] | None = None,
                 norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        checks.count(1, channels=channels, classes=classes, width=width)
        checks.count(0, depth=depth)
        if block and (token_mixing or feedforward):
            raise ValueError("block makes whole blocks, so that token_mixing and feedforward would "
                             "not be used; give either block or those two")
        embed = PatchEmbedding(channels, size, patch, width, scales=scales)
        tokens = embed.grid[0] * embed.grid[1]
        blocks = [block(tokens, width) if block else MixerBlock(
            tokens, width, token_mixing=token_mixing, feedforward=feedforward, norm=norm)
            for _ in range(depth)]
        super().__init__(embed, *blocks, norm(width), TokenMean(), nn.Linear(width, classes))

    def __getitem__(self, index: Any) -> Any:
        """Return a part, or the parts of a slice as a plain `nn.Sequential`."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self.named_children())[index]))
        return super().__getitem__(index)

    @property
    def embedding(self) -> "PatchEmbedding":
        """The first layer, which makes tokens of patches."""
        first = self[0]
        assert isinstance(first, PatchEmbedding)
        return first

    @property
    def grid(self) -> tuple[int, int]:
        """How many patches there are in each direction."""
        return self.embedding.grid


class PatchEmbedding(nn.Module):
    """An image's patches as vectors, row by row."""

    def __init__(self, channels: int, size: Sequence[int], patch: int, width: int, *,
                 scales: Sequence[int] = (1,)) -> None:
        super().__init__()
        if patch < 1 or len(size) != 2 or any(axis % patch or axis < 1 for axis in size):
            raise ValueError(f"patch must divide both axes of size={tuple(size)}, got {patch}")
        if not scales or any(s < 1 or (s - 1) * patch % 2 for s in scales):
            raise ValueError(f"scales must be whole numbers from 1 on, and odd where patch={patch} "
                             f"is, got {tuple(scales)}; try (1,) or (1, 2)")
        self.patch = patch
        self.grid = (size[0] // patch, size[1] // patch)
        # A linear layer on the patches of all sizes is a sum of one for each size.
        self.projections = nn.ModuleList(
            nn.Conv2d(channels, width, s * patch, stride=patch, padding=(s - 1) * patch // 2,
                      bias=i == 0) for i, s in enumerate(scales))

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, patches, width) of (batch, channels, height, width)."""
        size = (self.grid[0] * self.patch, self.grid[1] * self.patch)
        if tuple(x.shape[-2:]) != size:
            raise ValueError(f"x must be (batch, channels, {size[0]}, {size[1]}), got "
                             f"{tuple(x.shape)}; netwright.reshape.interpolate_mixer(model, size) "
                             "gives a network for another size")
        first, *others = self.projections
        h: Tensor = first(x)
        for projection in others:
            h = h + projection(x)
        return h.flatten(2).transpose(1, 2)


class TokenMean(nn.Module):
    """The mean over the tokens."""

    def forward(self, h: Tensor) -> Tensor:
        """Return (batch, width) of (batch, tokens, width)."""
        return h.mean(1)


def check_tokens(x: Tensor, tokens: int) -> None:
    """Raise ValueError where `x` is not (*, tokens, dim)."""
    if x.ndim < 2 or x.shape[-2] != tokens:
        raise ValueError(f"x must be (*, tokens, dim) with tokens={tokens}, got {tuple(x.shape)}")
