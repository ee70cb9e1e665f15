from collections.abc import Callable

from torch import Tensor, nn

from netwright import checks
from netwright.blocks.feedforward import FeedForward
from netwright.blocks.feedforward.feed_forward import Activation
from netwright.blocks.mixing.mlp_mixer import check_tokens
from netwright.catalogue.facets import method

__all__ = ["RaftBlock", "RaftTokenMixing"]


@method(
    "block",
    papers=["003-084"],
    place="token mixing",
    takes=("height", "width", "channels"),
    saves=["parameters"],
    needs=["images"],
    search={"raft_size": [1, 2, 4]},
)
class RaftTokenMixing(nn.Module):
    """Mix tokens down the columns of a grid, then along its rows, some channels with each other.

    v(x): for each column and each of channels / r rafts, an MLP on its r channels of all rows;
    h(x): for each row and each raft, an MLP on its r channels of all columns;
    y = v(norm(x)) + h(norm(x + v(norm(x)))), which is to be added to x.

    A raft is the channels c, c + channels / r, c + 2 channels / r, and so on. Both MLPs are shared
    by all rafts. It has (r h)^2 + (r w)^2 weights times 2 `expansion`, where one token mixing of
    the whole grid has (h w)^2 times that.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        channels: size of the last axis of x.
        raft_size: r, how many channels are mixed with each other; 1 mixes none.
        expansion: hidden units of the MLPs, in multiples of what they take.
        activation: a name, or what makes a module.

    Shapes: x and y (*, height * width, channels), row by row.

    Raises:
        ValueError: a size is below 1, `raft_size` does not divide `channels`, or x has another
            shape.
        UnknownName: no activation is called that.

    Paper: Tatsunami, Taki, 2022, RaftMLP: How Much Can Be Done Without Attention and with Less
    Spatial Locality?

    >>> import torch
    >>> RaftTokenMixing(4, 6, 8)(torch.zeros(2, 24, 8)).shape
    torch.Size([2, 24, 8])
    """

    def __init__(self, height: int, width: int, channels: int, raft_size: int = 2, *,
                 expansion: int = 2, activation: Activation = "gelu") -> None:
        super().__init__()
        checks.count(1, height=height, width=width, channels=channels, raft_size=raft_size,
                     expansion=expansion)
        if channels % raft_size:
            raise ValueError(f"raft_size must divide channels={channels}, got {raft_size}; "
                             "try 1 or 2")
        self.height, self.width, self.raft_size = height, width, raft_size
        self.vertical_norm, self.horizontal_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.vertical, self.horizontal = (
            FeedForward(raft_size * side, expansion * raft_size * side, activation=activation)
            for side in (height, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return what is to be added to `x`, of the same shape."""
        check_tokens(x, self.height * self.width)
        down = self._mixed(self.vertical_norm(x), self.vertical, rows=True)
        along = self._mixed(self.horizontal_norm(x + down), self.horizontal, rows=False)
        return down + along

    def _mixed(self, x: Tensor, mlp: nn.Module, *, rows: bool) -> Tensor:
        """Apply `mlp` to each raft's channels of all rows, or of all columns."""
        # (*, h, w, r, rafts) -> (*, rafts, w, r, h), or (*, rafts, h, r, w)
        order = (-1, -3, -2, -4) if rows else (-1, -4, -2, -3)
        grid = x.unflatten(-1, (self.raft_size, -1)).unflatten(-3, (self.height, self.width))
        leading = tuple(range(grid.ndim - 4))
        there = (*leading, *(grid.ndim + axis for axis in order))
        back = sorted(range(grid.ndim), key=lambda axis: there[axis])
        rafts = grid.permute(there)
        mixed: Tensor = mlp(rafts.flatten(-2)).view(rafts.shape).permute(back)
        return mixed.flatten(-4, -3).flatten(-2)


@method(
    "block",
    papers=["003-084"],
    place="residual block",
    takes=("height", "width", "dim"),
    saves=["parameters"],
    needs=["images"],
    search={"raft_size": [1, 2, 4]},
)
class RaftBlock(nn.Module):
    """Mix tokens by `RaftTokenMixing`, then channels by a feed-forward block.

    u = x + RaftTokenMixing(x);  y = u + feedforward(norm(u)).

    Args:
        height: rows of the grid.
        width: columns of the grid.
        dim: size of the last axis of x.
        hidden: units of the feed-forward block, 4 `dim` where none is given.
        raft_size: how many channels are mixed with each other.
        expansion: hidden units of the token mixing, in multiples of what it takes.
        feedforward: `feedforward(dim, hidden)` makes the feed-forward block.

    Shapes: x and y (*, height * width, dim), row by row.

    Raises:
        ValueError: a size is below 1, `raft_size` does not divide `dim`, or x has another shape.

    Paper: Tatsunami, Taki, 2022, RaftMLP: How Much Can Be Done Without Attention and with Less
    Spatial Locality?

    >>> import torch
    >>> RaftBlock(4, 6, 8)(torch.zeros(2, 24, 8)).shape
    torch.Size([2, 24, 8])
    """

    def __init__(self, height: int, width: int, dim: int, hidden: int | None = None, *,
                 raft_size: int = 2, expansion: int = 2,
                 feedforward: Callable[[int, int], nn.Module] = FeedForward) -> None:
        super().__init__()
        checks.count(1, height=height, width=width, dim=dim)
        self.token_mixing = RaftTokenMixing(height, width, dim, raft_size, expansion=expansion)
        self.channel_norm = nn.LayerNorm(dim)
        self.feedforward = feedforward(dim, 4 * dim if hidden is None else hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, tokens, dim) of (*, tokens, dim)."""
        x = x + self.token_mixing(x)
        y: Tensor = x + self.feedforward(self.channel_norm(x))
        return y
