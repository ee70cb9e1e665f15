from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


class Mixing:
    """Whether a network's samples depend on each other, found out once for each of its modes.

    Batch norm mixes them in training and not in eval, so that what one mode has shown says nothing
    of another. Graphs are looked at anew until one has shown that they do, since another graph may
    tie what this one does not.

    >>> mixing, network = Mixing(nn.Linear(2, 2)), nn.Linear(2, 2)
    >>> mixing.known is None
    True
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.by_mode: dict[tuple[bool, ...], bool] = {}

    @property
    def known(self) -> bool | None:
        """What has been found in the mode in which the network is now."""
        return self.by_mode.get(self._mode())

    def found(self, x: Any, look: Callable[[], bool], *, rows: int) -> bool:
        """Return what is known, or what `look()` finds; one row alone does not show it."""
        known = self.known
        if rows > 1 and (known is None or not (known or _one_kind(x))):
            known = self.by_mode[self._mode()] = look()
        return bool(known)

    def _mode(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self.network.modules())


def _one_kind(x: Any) -> bool:
    """Whether what ties the samples of `x` is in the network alone, and not in `x` as in graphs."""
    return isinstance(x, Tensor) or (isinstance(x, Mapping) and "edge_index" not in x)
