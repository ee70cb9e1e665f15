from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from netwright.catalogue.facets import method

__all__ = ["gpt"]


@method(
    "model",
    place="whole network",
    takes=("characters", "context"),
    needs=["tokens"],
    search={"width": [32, 64], "depth": [1, 2, 4]},
)
def gpt(characters: int, context: int, *, width: int = 64, depth: int = 2,
        heads: int = 4,
        feedforward: Callable[[int, int], nn.Module] | None = None,
        attention: Callable[[int, int], nn.Module] | None = None) -> nn.Sequential:
    """Return a small language model: an embedding, `depth` transformer blocks, an output layer.

    Each block is h := h + attention(norm(h)), then h := h + mlp(norm(h)); a position sees itself
    and those before it. Blocks keep the signal's shape, so the network is a chain of stages.

    `feedforward(width, 4 * width)` makes the mlp of each block, a module that takes and returns
    (batch, length, width); without it, two linear layers with a GELU between.
    `attention(width, heads)` makes the attention of each block, a module of the same shapes that
    lets no position see a later one.

    Args:
        characters: that are told apart.
        context: the longest row.
        width: of the stream.
        depth: how many blocks there are.
        heads: of each attention.
        feedforward: makes the mlp of a block, see above.
        attention: makes the attention of a block, see above.

    Shapes: x (batch, length) of int64 with length <= context; out (batch, length, characters).

    Raises:
        ValueError: `heads` does not divide `width`.

    Paper: Radford, Narasimhan, Salimans, Sutskever, 2018, Improving Language Understanding by
    Generative Pre-Training.

    >>> gpt(96, context=16)(torch.zeros(2, 16, dtype=torch.long)).shape
    torch.Size([2, 16, 96])
    """
    if width % heads:
        raise ValueError(f"heads must divide width={width}, got {heads}; try 4")
    blocks = [Block(width, heads, feedforward=feedforward, attention=attention)
              for _ in range(depth)]
    return nn.Sequential(Embed(characters, context, width), *blocks, nn.LayerNorm(width),
                         nn.Linear(width, characters))


class Embed(nn.Module):
    """Characters and their positions as vectors."""

    def __init__(self, characters: int, context: int, width: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        for table in (self.characters, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of each character's vector and its position's."""
        context = self.positions.num_embeddings
        if x.shape[1] > context:
            raise ValueError(f"x must hold at most context={context} characters a row, "
                             f"got {x.shape[1]}; cut it into windows")
        return self.characters(x) + self.positions(torch.arange(x.shape[1], device=x.device))


class Block(nn.Module):
    """Attention and a feed-forward module, each on a normalised copy of the signal."""

    def __init__(self, width: int, heads: int, *, causal: bool = True,
                 feedforward: Callable[[int, int], nn.Module] | None = None,
                 attention: Callable[[int, int], nn.Module] | None = None) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        if attention:
            self.attention = attention(width, heads)
        else:
            self.query_key_value = nn.Linear(width, 3 * width)
            self.attention_out = nn.Linear(width, width)
        if feedforward:
            self.feedforward = feedforward(width, 4 * width)
        else:
            self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """Return `h` with what attention and feed-forward module add."""
        h = h + self._attended(self.attention_norm(h))
        if hasattr(self, "feedforward"):
            added: Tensor = self.feedforward(self.mlp_norm(h))
            return h + added
        return h + self.mlp_out(gelu(self.mlp_in(self.mlp_norm(h))))

    def _attended(self, h: Tensor) -> Tensor:
        attended: Tensor = (self.attention(h) if hasattr(self, "attention") else
                            self.attention_out(self._attend(self.query_key_value(h))))
        return attended

    def _attend(self, projected: Tensor) -> Tensor:
        # Written out, since the fused attention has no forward-mode derivative on CPU.
        batch, length, triple = projected.shape
        width = triple // 3
        query, key, value = projected.view(
            batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) / (width // self.heads) ** 0.5
        if self.causal:
            later = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        mixed = scores.softmax(dim=-1) @ value
        return mixed.transpose(1, 2).reshape(batch, length, width)
