"""Guards that put a network's mode, the random state and the buffers back as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd import forward_ad

from netwright.runtime.attributes import Attributes
from netwright.runtime.random_state import same_random_state
from netwright.runtime.recomputing import checkpoints


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Hold every module of `network` in eval mode, then give each its own mode back.

    >>> network = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> with evaluating(network):
    ...     network[1].training
    False
    >>> network[1].training
    True
    """
    with _mode(network, training=False):
        yield


@contextmanager
def training(network: nn.Module, keep: nn.Module | None = None) -> Iterator[None]:
    """Hold every module of `network` in train mode, then give each its own mode back.

    Where `keep`, one of them, is in train mode, what in it was put into eval mode stays so, as a
    batch norm that is frozen.

    >>> network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
    >>> with training(network, keep=network):
    ...     [module.training for module in network]
    [True, False]
    """
    frozen = [module for module in keep.modules() if not module.training] \
        if keep is not None and keep.training else []
    with _mode(network, training=True):
        for module in frozen:
            module.training = False
        yield


@contextmanager
def _mode(network: nn.Module, *, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in network.modules()]
    network.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def same_buffers(network: nn.Module) -> Iterator[None]:
    """Undo what the body does to the buffers of `network`, such as running statistics."""
    before = [(module, name, buffer, None if buffer is None else buffer.detach().clone())
              for module in network.modules() for name, buffer in module._buffers.items()]
    try:
        yield
    finally:
        for module, name, buffer, value in before:
            module._buffers[name] = buffer
            if buffer is not None and value is not None:
                # .data, so that a graph that has saved the buffer does not see a new version of it
                buffer.data.copy_(value)


@contextmanager
def same_attributes(network: nn.Module) -> Iterator[None]:
    """Undo what the body does to the attributes of modules: counts, lists, caches, generators.

    >>> network = nn.Linear(2, 2)
    >>> with same_attributes(network):
    ...     network.seen = [3]
    >>> hasattr(network, "seen")
    False
    """
    before = Attributes(network.modules())
    try:
        yield
    finally:
        before.put_back()


def transformed() -> bool:
    """Return whether a `torch.func` transform or forward-mode differentiation is going on.

    A backward pass that is written by hand is in its way; what is made of plain operations is not.
    """
    return (forward_ad._current_level >= 0
            or torch._C._functorch.maybe_current_level() is not None)


@contextmanager
def rehearsing(network: nn.Module) -> Iterator[None]:
    """Let the body run `network` without a trace.

    There is no graph, and random states, buffers and attributes are put back.
    """
    cached = torch.is_autocast_cache_enabled()
    # weights that autocast casts here are cast without a graph and must not be kept for later
    torch.set_autocast_cache_enabled(False)
    try:
        with (torch.inference_mode(False), torch.no_grad(), same_random_state(),
              same_buffers(network), same_attributes(network), checkpoints()):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
