"""Modules that run others in turn, on a signal that they join and part: the turns one by one."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format


class Turn(nn.Module):
    """One member's turn in a module that runs its members one after another.

    Such a module has `in_turn()`, which returns its members, and `take_turn(k, h, ...)`, of which
    the first takes what its `forward` takes and the last returns what that returns. Where it
    passes more from turn to turn than it takes, `outside(h)` has the shape that the model knows.
    """

    def __init__(self, whole: nn.Module, k: int, member: nn.Module, name: str) -> None:
        super().__init__()
        self.member, self.k, self.name = member, k, name
        self._whole = (whole,)  # in a tuple, so that the other members are no part of this one

    @property
    def whole(self) -> nn.Module:
        """The module that runs its members in turn."""
        return self._whole[0]

    def forward(self, h: Any, *args: Any, **options: Any) -> Any:
        """Return what the next turn takes."""
        return self.whole.take_turn(self.k, h, *args, **options)  # type: ignore[operator]

    def outside(self, h: Any) -> Any:
        """Return what stands for `h`, which this turn takes, where the model's own code runs."""
        made = getattr(type(self.whole), "outside", None)
        return h if made is None or self.k == 0 else made(self.whole, h)


def turns_of(module: nn.Module) -> list[Turn]:
    """Return the turns of a module, none where it is not one that runs several in turn.

    >>> from netwright.blocks.reversible import AdditiveCoupling, ReversibleSequential
    >>> deep = ReversibleSequential(*[AdditiveCoupling(nn.Tanh(), nn.Tanh()) for _ in range(3)])
    >>> [turn.name for turn in turns_of(deep)]
    ['0', '1', '2']
    """
    if not callable(getattr(type(module), "take_turn", None)) or "forward" in vars(module):
        return []
    members = module.in_turn()  # type: ignore[operator]
    names = {part: name for name, part in reversed(list(module.named_modules()))}
    return [Turn(module, k, member, names[member]) for k, member in enumerate(members)
            ] if len(members) > 1 else []


def joined(*streams: Tensor) -> Tensor:
    """Return streams of one shape as one tensor: side by side along the features."""
    return torch.cat(streams, _features(streams[0]))


def parted(h: Tensor, count: int = 2) -> list[Tensor]:
    """Return what `joined` was given."""
    order = suggest_memory_format(h)
    return [part.contiguous(memory_format=order) for part in h.chunk(count, _features(h))]


def _features(h: Tensor) -> int:
    """Return the dimension of the features: the channels of images, the last one otherwise."""
    return 1 if h.ndim > 3 else -1
