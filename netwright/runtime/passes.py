"""Passes that run again: whether one does, what it found the first time, and what it was lent."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from netwright.runtime.attributes import Attributes
from netwright.runtime.modes import same_attributes, same_buffers
from netwright.runtime.padding import held, holding
from netwright.runtime.random_state import random_state, same_random_state, set_random_state

_restored = [0]
_SAMPLED = 64
_NEAR = 0.05


def running_again() -> bool:
    """Return whether modules find again, in a backward pass, what a forward pass made.

    So they do under activation checkpointing. What counts or moves once a pass must not then.
    Where everything is as the first time and will be put back, as in reversible stacks, a module
    runs as it did and this is False.
    """
    if torch.compiler.is_compiling():  # a compiler runs a pass again by graphs of its own
        return False
    return not _restored[0] and torch._C._current_graph_task_id() != -1


@contextmanager
def as_the_first() -> Iterator[None]:
    """Say that for the body everything is as it was the first time, and is put back after it."""
    _restored[0] += 1
    try:
        yield
    finally:
        _restored[0] -= 1


class Pass:
    """What a pass of `network` finds, noted before it, so that it can be run again the same.

    Held are the random states, which positions are padding and, of the network's modules, buffers
    and attributes.

    >>> network = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> this, x = Pass(network), torch.ones(1, 2)
    >>> first = network(x)
    >>> with this.again():
    ...     torch.equal(network(x), first)
    True
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.random, self.real = network, random_state(), held()
        self.attributes = Attributes(network.modules())
        self.buffers = [(module, name, buffer, buffer.detach().clone())
                        for module in network.modules() for name, buffer in module._buffers.items()
                        if buffer is not None]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Let the body run the pass again, and then have everything as it is now."""
        with (same_random_state(), same_attributes(self.network), same_buffers(self.network),
              as_the_first(), holding(self.real)):
            set_random_state(self.random)
            self.attributes.put_back()
            for module, name, buffer, value in self.buffers:
                module._buffers[name] = buffer
                buffer.data.copy_(value)
            yield


class Lent:
    """What a module was lent from elsewhere in its last passes, known again by what it was given.

    For a pass that runs again under activation checkpointing, when others may have come between.

    >>> lent, x = Lent(), torch.randn(2, 5, 3)
    >>> lent.note(x[0], "first")
    >>> lent.note(x[1], "second")
    >>> lent.find(x[0]), lent.find(torch.randn(5, 3))
    ('first', None)
    """

    def __init__(self, most: int = 16) -> None:
        self.kept: deque[tuple[torch.Size, Tensor, Any]] = deque(maxlen=most)

    def note(self, x: Tensor, value: Any) -> None:
        """Keep `value` as what a pass was lent that was given `x`."""
        self.kept.append((x.shape, _sample(x), value))

    def find(self, x: Tensor) -> Any:
        """Return what the pass was lent that was given `x`; None where it is not known."""
        sample = _sample(x)
        known = [(float((sample - other).norm()), value) for shape, other, value in self.kept
                 if shape == x.shape and other.device == sample.device]
        distance, value = min(known, key=lambda pair: pair[0], default=(0.0, None))
        return value if distance <= _NEAR * float(sample.norm()) else None


def _sample(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    return flat[::max(1, len(flat) // _SAMPLED)].float()
