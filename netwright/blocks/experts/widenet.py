from torch import Tensor, nn

from netwright import checks
from netwright.blocks.experts.mixture import MixtureOfExperts
from netwright.blocks.experts.sublayers import SelfAttention
from netwright.blocks.feedforward.feed_forward import FeedForward
from netwright.catalogue.facets import method

__all__ = ["WideNet"]


@method(
    "block",
    papers=["000-006"],
    place="residual block",
    takes=("dim", "depth"),
    saves=["parameters", "file size"],
    search={"n_experts": [2, 4], "k": [1, 2]},
)
class WideNet(nn.Module):
    """Run one transformer block with experts again and again, with norms of its own each time.

    h := h + attention(norm_i(h));  h := h + experts(norm'_i(h));  i = 1 .. depth

    Attention, experts and router are shared over depth. The norms, which are not, show them another
    signal each time, so that a token meets other experts at another depth.

    Args:
        dim: size of the signal's last axis.
        depth: how often the block is run.
        experts: the feed-forward part, (*, dim) in and out; a `MixtureOfExperts` with `n_experts`
            `FeedForward`s of size `hidden` where none is given.
        attention: the attention, (batch, length, dim) in and out; a `SelfAttention` where none is
            given.
        n_experts: how many experts.
        k: how many a token uses.
        hidden: the experts' hidden size, 4 `dim` where none is given.
        heads: of the attention.
        causal: whether a token sees only itself and those before it.
        individual_norms: whether each depth has norms of its own.

    Shapes: h (batch, length, dim).

    Raises:
        ValueError: `depth` is below 1, or the others do not fit.

    Paper: Xue, Shi, Wei, Lou, Liu, You, 2022, Go Wider Instead of Deeper.

    >>> import torch
    >>> WideNet(16, depth=6, n_experts=4)(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, depth: int, *, experts: nn.Module | None = None,
                 attention: nn.Module | None = None, n_experts: int = 4, k: int = 2,
                 hidden: int | None = None, heads: int = 4, causal: bool = False,
                 individual_norms: bool = True) -> None:
        super().__init__()
        checks.count(1, depth=depth)
        self.depth = depth
        self.attention = SelfAttention(dim, heads, causal=causal) if attention is None else (
            attention)
        self.experts = MixtureOfExperts(
            dim, lambda: FeedForward(dim, hidden), n_experts=n_experts,
            k=k) if experts is None else experts
        norms = depth if individual_norms else 1
        self.attention_norms, self.expert_norms = (
            nn.ModuleList(nn.LayerNorm(dim) for _ in range(norms)) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        """Return (batch, length, dim) of (batch, length, dim)."""
        for i in range(self.depth):
            norm = i % len(self.attention_norms)
            h = h + self.attention(self.attention_norms[norm](h))
            h = h + self.experts(self.expert_norms[norm](h))
        return h
