from collections.abc import Callable

from torch import Tensor, nn

from netwright import checks
from netwright.blocks.feedforward import FeedForward
from netwright.blocks.mixing.mlp_mixer import MakeTokenMixing, MixerBlock
from netwright.catalogue.facets import method

__all__ = ["NiNBlock"]


@method("block", papers=["003-076"], place="residual block", takes=("tokens", "dim"))
class NiNBlock(nn.Module):
    """Gate each token by what a mixer inside the block makes of all tokens, then mix channels.

    n = norm(x);  u = x + (W n + b) * MixerBlock(n);  y = u + feedforward(norm(u)).

    The mixer's weights do not depend on the image, but its output multiplies the tokens, so that
    what is mixed into each of them does: what attention has and a mixer has not. Both norms are of
    their own.

    Args:
        tokens: how many tokens there are.
        dim: how many channels each has.
        token_hidden: units of the inner token mixing, half of `dim` where none is given.
        channel_hidden: units of the inner and of the outer feed-forward block, 4 `dim` where none
            is given.
        token_mixing: `token_mixing(tokens, dim)` makes the inner token mixing, as in `MixerBlock`.
        feedforward: `feedforward(dim, channel_hidden)` makes both feed-forward blocks.

    Shapes: x and y (*, tokens, dim).

    Raises:
        ValueError: a size is below 1, or x has another number of tokens.

    Paper: Abdullah, Aydin, 2024, NiNformer: A Network in Network Transformer with Token Mixing
    Generated Gating Function.

    >>> import torch
    >>> NiNBlock(16, 24)(torch.zeros(2, 16, 24)).shape
    torch.Size([2, 16, 24])
    """

    def __init__(self, tokens: int, dim: int, token_hidden: int | None = None,
                 channel_hidden: int | None = None, *,
                 token_mixing: MakeTokenMixing | None = None,
                 feedforward: Callable[[int, int], nn.Module] = FeedForward) -> None:
        super().__init__()
        checks.count(1, tokens=tokens, dim=dim)
        checks.count(1, optional=True, token_hidden=token_hidden, channel_hidden=channel_hidden)
        self.gate_norm, self.channel_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.gate = MixerBlock(tokens, dim, token_hidden, channel_hidden,
                               token_mixing=token_mixing, feedforward=feedforward)
        self.value = nn.Linear(dim, dim)
        self.feedforward = feedforward(dim, 4 * dim if channel_hidden is None else channel_hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, tokens, dim) of (*, tokens, dim)."""
        n = self.gate_norm(x)
        x = x + self.value(n) * self.gate(n)
        y: Tensor = x + self.feedforward(self.channel_norm(x))
        return y
