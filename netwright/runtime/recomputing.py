"""What is computed again in a backward pass, and where nothing may be."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch.utils import checkpoint as checkpointing

_stored = [0]


def stores() -> bool:
    """Return whether nothing may be computed again in the backward pass."""
    return bool(_stored[0])


@contextmanager
def checkpoints(*, stored: bool = False) -> Iterator[None]:
    """Let activation checkpoints in the body give right gradients, whatever the body goes back by.

    A reentrant one gives its weights no gradient where no gradient is asked of its inputs, as
    those of a stage that learns by itself, and refuses `torch.autograd.grad`; it runs as one that
    is not reentrant, whose gradients are the same. Where weights are others by the time of the
    backward pass, nothing can be computed again: then activations are `stored`, those of
    reversible blocks as well.

    >>> import torch
    >>> layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    >>> with checkpoints():
    ...     y = checkpointing.checkpoint(layer, x, use_reentrant=True)
    >>> torch.autograd.grad(y.sum(), layer.bias)
    (tensor([1., 1.]),)
    """
    def run(function: Any, preserve: bool, *args: Any) -> Any:
        return function(*args) if stored else checkpointing.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve)

    def once(*_: Any, **__: Any) -> Iterator[None]:
        yield

    module: Any = checkpointing
    _stored[0] += stored
    before = module.CheckpointFunction, module._checkpoint_without_reentrant_generator
    module.CheckpointFunction = SimpleNamespace(apply=run)
    if stored:
        module._checkpoint_without_reentrant_generator = once
    try:
        yield
    finally:
        _stored[0] -= stored
        module.CheckpointFunction, module._checkpoint_without_reentrant_generator = before
