from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from netwright.catalogue.facets import method
from netwright.errors import CannotReverse
from netwright.reversing.engine import Regroup, Step, Update, forth, undo

__all__ = ["ReversibleBlock"]


@method("companion")
class ReversibleBlock(nn.Module):
    """What a block is whose input can be reconstructed from its output.

    A block of one's own defines `updates`, which returns its steps: each changes some streams by
    what a module makes of the others. `forward`, `inverse` and the backward pass without stored
    activations (in `ReversibleSequential`, under `rules.Reversible`) follow from them.

    By itself a block is an ordinary module under autograd.

    `streams` is into how many parts of equal size, or of the sizes `sizes`, the input is split
    along `dim`. Where `streams` is None, the block takes and returns a tuple of tensors, which
    are the streams.

    >>> from netwright.blocks.reversible import Add
    >>> class Twice(ReversibleBlock):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.f = nn.Linear(2, 2)
    ...     def updates(self):
    ...         return [Add("f", self.f, reads=[1], write=0), Add("f again", self.f, [0], 1)]
    >>> block, x = Twice(), torch.randn(5, 4)
    >>> torch.allclose(block.inverse(block(x)), x, atol=1e-6)
    True
    """

    streams: int | None = 2
    dim: int = 1
    sizes: Sequence[int] | None = None

    def updates(self, *args: Any, **options: Any) -> Sequence[Update]:
        """Return the block's steps, in their order."""
        raise TypeError(f"{type(self).__name__} must define updates(), which returns its steps")

    def steps(self, *args: Any, **options: Any) -> list[Step]:
        """Return the steps from the block's input to its output."""
        updates = self.updates(*args, **options)
        if self.streams is None or self.streams == 1:
            return list(updates)
        kind, layout = type(self).__name__, (self.streams, self.dim, self._parts())
        split = Regroup(f"the split before {kind}", self._split, self._join,
                        kind=("split", layout), undoes=("join", layout))
        join = Regroup(f"the join after {kind}", self._join, self._split,
                       kind=("join", layout), undoes=("split", layout))
        return [split, *updates, join]

    def forward(self, x: Any, *args: Any, **options: Any) -> Any:
        """Return what the steps make of `x`."""
        streams = [x] if isinstance(x, Tensor) else list(x)
        streams = forth(self.steps(*args, **options), streams)
        return streams[0] if len(streams) == 1 else tuple(streams)

    def inverse(self, y: Any, *args: Any, **options: Any) -> Any:
        """Return the `x` of which the block makes `y`."""
        streams = [y] if isinstance(y, Tensor) else list(y)
        streams = undo(self.steps(*args, **options), streams)
        return streams[0] if len(streams) == 1 else tuple(streams)

    def _parts(self) -> tuple[int, ...] | None:
        return None if self.sizes is None else tuple(self.sizes)

    def _split(self, streams: list[Tensor]) -> list[Tensor]:
        x, parts, kind = streams[0], self._parts(), type(self).__name__
        if not -x.ndim <= self.dim < x.ndim:
            raise CannotReverse(f"{kind} splits its input along dim={self.dim}, which an input of "
                                f"shape {tuple(x.shape)} does not have; set dim=")
        size, number = x.shape[self.dim], self.streams or 1
        if parts is not None and sum(parts) != size:
            raise CannotReverse(f"{kind} splits its input into {list(parts)} along dim={self.dim}, "
                                f"which has {size} entries; the sizes must add up to that")
        if parts is None and (size % number or not size):
            raise CannotReverse(f"{kind} splits its input into {number} equal parts along "
                                f"dim={self.dim}, which has {size} entries in {tuple(x.shape)}; "
                                f"give it a multiple of {number}, for instance by padding")
        split = x.chunk(number, self.dim) if parts is None else x.split(list(parts), self.dim)
        order = suggest_memory_format(x)  # channels last stay last
        return [part.contiguous(memory_format=order) for part in split]

    def _join(self, streams: list[Tensor]) -> list[Tensor]:
        return [torch.cat(streams, self.dim)]
