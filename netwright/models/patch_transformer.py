from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from netwright.catalogue.facets import method
from netwright.models.gpt import Block

__all__ = ["patch_transformer"]


@method(
    "model",
    place="whole network",
    takes=("channels", "size", "classes"),
    needs=["images"],
    search={"width": [32, 64], "depth": [2, 4]},
)
def patch_transformer(channels: int, size: Sequence[int], classes: int, *, patch: int = 4,
                      width: int = 64, depth: int = 4, heads: int = 4,
                      feedforward: Callable[[int, int], nn.Module] | None = None,
                      attention: Callable[[int, int], nn.Module] | None = None) -> nn.Sequential:
    """Return a small vision transformer: patches, `depth` transformer blocks, their mean, classes.

    Each block is h := h + attention(norm(h)), then h := h + mlp(norm(h)); every patch sees every
    other. `feedforward(width, 4 * width)` makes the mlp of each block, a module that takes and
    returns (batch, patches, width); without it, two linear layers with a GELU between.
    `attention(width, heads)` makes the attention of each block, a module of the same shapes.

    Args:
        channels: of an image.
        size: its (height, width).
        classes: scores that are returned.
        patch: the side of a patch.
        width: of the stream.
        depth: how many blocks there are.
        heads: of each attention.
        feedforward: makes the mlp of a block, see above.
        attention: makes the attention of a block, see above.

    Shapes: x (batch, channels, *size); out (batch, classes).

    Raises:
        ValueError: `patch` does not divide `size`, or `heads` does not divide `width`.

    Paper: Dosovitskiy, Beyer, Kolesnikov, Weissenborn, Zhai, Unterthiner, Dehghani, Minderer,
    Heigold, Gelly, Uszkoreit, Houlsby, 2021, An Image is Worth 16x16 Words.

    >>> patch_transformer(3, (32, 32), 10)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if any(axis % patch for axis in size):
        raise ValueError(f"patch must divide both axes of size={tuple(size)}, got {patch}")
    if width % heads:
        raise ValueError(f"heads must divide width={width}, got {heads}; try 4")
    height, breadth = (axis // patch for axis in size)
    blocks = [Block(width, heads, causal=False, feedforward=feedforward, attention=attention)
              for _ in range(depth)]
    return nn.Sequential(Patches(channels, height * breadth, patch, width), *blocks,
                         nn.LayerNorm(width), Mean(), nn.Linear(width, classes))


class Patches(nn.Module):
    """An image's patches and their positions as vectors."""

    def __init__(self, channels: int, patches: int, patch: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(patches, width))
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, patches, width), row by row."""
        return self.projection(x).flatten(2).transpose(1, 2) + self.positions


class Mean(nn.Module):
    """The mean over an axis."""

    def forward(self, h: Tensor) -> Tensor:
        """Return (batch, width) of (batch, patches, width)."""
        return h.mean(1)
