from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from netwright import checks
from netwright.blocks.reversible.block import ReversibleBlock
from netwright.catalogue.facets import method
from netwright.errors import CannotReverse
from netwright.reversing.engine import Add, Update

__all__ = ["DoubleStreams", "MergeStreams", "ReversibleTransformerBlock"]


@method("block", place="residual block", takes=("dim", "heads"), saves=["training memory"],
        variants={"plain": {}, "causal": {"causal": True}}, batch=lambda: torch.randn(2, 5, 16))
class ReversibleTransformerBlock(ReversibleBlock):
    """Add attention over one copy of the tokens to the other copy, and feed-forward back again.

    y_1 = x_1 + attention(norm(x_2));  y_2 = x_2 + feed_forward(norm(y_1)).
    Inverse: x_2 = y_2 - feed_forward(norm(y_1));  x_1 = y_1 - attention(norm(x_2)).

    Tokens become two equal copies by `DoubleStreams` before the first block, and one again by
    `MergeStreams` after the last. More arguments than x go to the attention alone: the one made
    here takes a `mask`, one given as `attention` what it likes.

    Args:
        dim: The width of a token, half the width of x.
        heads: The heads of the attention made here; None where `attention` is given.
        hidden: The width inside the feed-forward made here; 4 dim where it is None.
        causal: Whether a token sees itself and those before it alone.
        dropout: The share of attention weights, and of both halves' outputs, that is dropped.
        attention: Any module of a token stream (batch, length, dim) that keeps its shape, in
            place of the one made here; it is given the normalised stream.
        feed_forward: The same for the other half.

    Shapes: x and y (batch, length, 2 dim); mask (length, length), (batch, 1 or length, length) or
    (batch, heads, length, length): True, or a number to add to the score, for each query (row)
    and each key (column) that it may see.

    Raises:
        ValueError: `heads` does not divide `dim`, or is missing, or `dropout` is no share, or an
            option is given of a half that is given whole, or the mask has another shape.
        CannotReverse: x is not 2 dim wide, or a half does not keep its shape.

    Paper: Kitaev, Kaiser, Levskaya, 2020, Reformer: The Efficient Transformer; and Mangalam and
    others, 2022, Reversible Vision Transformers.

    >>> block = ReversibleTransformerBlock(16, heads=4, causal=True)
    >>> x = torch.randn(2, 10, 32)
    >>> torch.allclose(block.inverse(block(x)), x, atol=1e-5)
    True
    """

    def __init__(self, dim: int, heads: int | None = None, hidden: int | None = None, *,
                 causal: bool = False, dropout: float = 0.0, attention: nn.Module | None = None,
                 feed_forward: nn.Module | None = None) -> None:
        super().__init__()
        if attention is not None and (heads is not None or causal):
            raise ValueError("heads and causal are of the attention made here, got them beside "
                             "attention=, which has its own; leave one of the two out")
        if feed_forward is not None and hidden is not None:
            raise ValueError("hidden is of the feed-forward made here, got it beside "
                             "feed_forward=, which has its own; leave one of the two out")
        checks.between(0, 1, ends=(True, False), dropout=dropout)
        checks.count(1, dim=dim)
        checks.count(1, optional=True, hidden=hidden)
        self.dim = -1
        self.attention = _Normed(dim, attention or _attention(dim, heads, causal, dropout), dropout)
        self.feed_forward = _Normed(dim, feed_forward or nn.Sequential(
            nn.Linear(dim, hidden or 4 * dim), nn.GELU(), nn.Linear(hidden or 4 * dim, dim)),
            dropout)

    def updates(self, *args: Any, **options: Any) -> list[Update]:
        """Return the two additions."""
        return [Add("attention", self.attention, (1,), 0, args, options),
                Add("feed_forward", self.feed_forward, (0,), 1)]


@method("companion")
class DoubleStreams(nn.Module):
    """Return two copies of `x` side by side, for the halves of reversible blocks.

    y = (x, x) along `dim`.

    Shapes: x (*, dim, *); y (*, 2 dim, *).

    Paper: Kitaev, Kaiser, Levskaya, 2020, Reformer: The Efficient Transformer.

    >>> DoubleStreams()(torch.randn(2, 10, 16)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Return x beside itself."""
        return torch.cat([x, x], self.dim)


@method("companion")
class MergeStreams(nn.Module):
    """Return the mean of the two halves of `y`, after the last reversible block.

    x = (y_1 + y_2) / 2. Without it what follows has both halves, side by side, to read.

    Shapes: y (*, 2 dim, *); x (*, dim, *).

    Raises:
        ValueError: the dimension `dim` of y is odd.

    Paper: Kitaev, Kaiser, Levskaya, 2020, Reformer: The Efficient Transformer.

    >>> MergeStreams()(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 16])
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, y: Tensor) -> Tensor:
        """Return the halves' mean."""
        if y.shape[self.dim] % 2:
            raise ValueError(f"y must have an even number of entries along dim={self.dim}, got "
                             f"{tuple(y.shape)}; merge what DoubleStreams and the blocks made")
        first, second = y.chunk(2, self.dim)
        return (first + second) / 2


class _Normed(nn.Module):
    """What a half adds: its body on the normalised tokens."""

    def __init__(self, dim: int, body: nn.Module, dropout: float) -> None:
        super().__init__()
        self.norm, self.body, self.dropout = nn.LayerNorm(dim), body, nn.Dropout(dropout)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        made = self.body(self.norm(x), *args, **options)
        if not isinstance(made, Tensor) or made.shape != x.shape:
            got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise CannotReverse(f"{type(self.body).__name__} must return a tensor of the shape "
                                f"{tuple(x.shape)} that it is given, got {got}; wrap it in a "
                                "module that does")
        return self.dropout(made)


def _attention(dim: int, heads: int | None, causal: bool, dropout: float) -> nn.Module:
    if heads is None:
        raise ValueError("heads is missing: give the number of heads, or attention= whole")
    if heads < 1 or dim % heads:
        raise ValueError(f"heads must divide dim={dim}, got {heads}")
    return _Attention(dim, heads, causal, dropout)


class _Attention(nn.Module):
    """Scaled dot-product attention of tokens among themselves."""

    def __init__(self, dim: int, heads: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.query_key_value, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, dim = x.shape
        query, key, value = self.query_key_value(x).view(
            batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        if mask is not None and (not 2 <= mask.ndim <= 4 or mask.shape[-1] != length
                                 or mask.shape[-2] not in (1, length)):
            raise ValueError(f"mask must be (queries, keys), (batch, queries, keys) or (batch, "
                             f"heads, queries, keys) with {length} keys and {length} queries or "
                             f"1, got {tuple(mask.shape)}; padding is given as present[:, None]")
        if mask is not None and mask.ndim == 3:
            mask = mask[:, None]
        if mask is not None and self.causal:
            later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            mask = (mask & ~later if mask.dtype == torch.bool
                    else mask.masked_fill(later, float("-inf")))
        mixed = scaled_dot_product_attention(
            query, key, value, mask, self.dropout if self.training else 0.0,
            is_causal=self.causal and mask is None)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
