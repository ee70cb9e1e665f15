"""What a measurement must put back: everything a training step changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from netwright.runtime.attributes import Attributes
from netwright.runtime.random_state import same_random_state


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Undo what the body does to `module`: weights, gradients, buffers, modes and random states.

    Attributes of every submodule go back to the objects that they were, with what was in them,
    tensors to the values that they had, and generators to the states that they were in. Gradients
    are taken away while the body runs.
    """
    attributes = Attributes(module.modules())
    tables = [_Tables(part) for part in module.modules()]
    gradients = [(p, p.grad) for p in module.parameters()]
    for p, _ in gradients:
        p.grad = None
    with same_random_state():
        try:
            yield
        finally:
            for table in tables:
                table.restore()
            attributes.put_back()
            for p, gradient in gradients:
                p.grad = gradient


class _Tables:
    """The mode, the tables and the tensors of one module."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.training = module, module.training
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        self.tables = [(table, dict(table)) for table in tables]
        self.tensors = [(t, t.detach().clone()) for _, held in self.tables
                        for t in held.values() if isinstance(t, Tensor)]

    @torch.no_grad()
    def restore(self) -> None:
        self.module.training = self.training
        for table, held in self.tables:
            table.clear()
            table.update(held)
        for tensor, value in self.tensors:
            if tensor.shape == value.shape:
                tensor.data.copy_(value)
            else:  # some rules resize their weights
                tensor.data = value
