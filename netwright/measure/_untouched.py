"""What a measurement must put back: everything a training step changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Undo what the body does to `module`: weights, gradients, buffers, modes and random states.

    Attributes of every submodule go back to the objects that they were, tensors among them to
    the values that they had, and generators to the states that they were in. Gradients are
    taken away while the body runs.
    """
    snapshots = [_Snapshot(part) for part in module.modules()]
    gradients = [(p, p.grad) for p in module.parameters()]
    for p, _ in gradients:
        p.grad = None
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        for snapshot in snapshots:
            snapshot.restore()
        for p, gradient in gradients:
            p.grad = gradient
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


class _Snapshot:
    """The attributes of one module, and the values of the tensors and generators among them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(module.__dict__)
        self.tables = {name: dict(self.attributes[name]) for name in ("_parameters", "_buffers")}
        held: list[Any] = [*self.attributes.values()]
        for table in self.tables.values():
            held += table.values()
        self.tensors = [(t, t.detach().clone()) for t in held if isinstance(t, Tensor)]
        self.generators = [(g, g.get_state()) for g in held if isinstance(g, Generator)]

    @torch.no_grad()
    def restore(self) -> None:
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for name, table in self.tables.items():
            self.attributes[name].clear()
            self.attributes[name].update(table)
        for tensor, value in self.tensors:
            if tensor.shape == value.shape:
                tensor.data.copy_(value)
            else:  # some rules resize their weights
                tensor.data = value
        for generator, state in self.generators:
            generator.set_state(state)
