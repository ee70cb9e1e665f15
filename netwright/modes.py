"""Guards that put a network's mode, the random state and the buffers back as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Hold every module of `network` in eval mode, then give each its own mode back."""
    with _mode(network, training=False):
        yield


@contextmanager
def training(network: nn.Module) -> Iterator[None]:
    """Hold every module of `network` in train mode, then give each its own mode back."""
    with _mode(network, training=True):
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
def same_random_state() -> Iterator[None]:
    """Undo whatever the body draws from PyTorch's global random states."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def same_buffers(network: nn.Module) -> Iterator[None]:
    """Undo what the body does to the buffers of `network`, such as running statistics."""
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
