from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from netwright.stages import Stage


class Matrices(nn.Module):
    """Feedback matrices by name: parameters where they are learned, buffers where they are fixed.

    >>> matrices = Matrices(learned=False)
    >>> matrices.add("encoder.0", torch.zeros(3, 8))
    >>> matrices["encoder.0"].shape, list(matrices.state_dict())
    (torch.Size([3, 8]), ['/encoder/0'])
    """

    def __init__(self, *, learned: bool) -> None:
        super().__init__()
        self.learned = learned
        self.used: set[str] = set()  # the names of those that carried an error in the last call
        self._held: Any = self._parameters if learned else self._buffers  # read at every step

    def add(self, name: str, matrix: Tensor) -> None:
        """Keep `matrix` under `name`."""
        if self.learned:
            self.register_parameter(_key(name), Parameter(matrix))
        else:
            self.register_buffer(_key(name), matrix)

    def learn(self, name: str, update: Tensor) -> None:
        """Add a weight's update to `.grad` of its matrix."""
        accumulate(self[name], update)

    def __getitem__(self, name: str) -> Tensor:
        """Return the matrix that was added under `name`."""
        return self._held[_key(name)]


def _key(name: str) -> str:
    # attributes of a module hold no dots; the leading slash keeps clear of the module's own
    return "/" + name.replace(".", "/")


def draw(shape: Sequence[int], deviation: float, like: Tensor,
         generator: Generator | None) -> Tensor:
    """Return N(0, deviation^2) of `shape`, drawn where the generator is, with `like`'s type."""
    device = "cpu" if generator is None else generator.device
    drawn = torch.randn(*shape, generator=generator, device=device)
    return (drawn * deviation).to(like)  # drawn in float32, so that one seed is one network


def size_of(weight: Tensor, most: float) -> float:
    """Return the root mean square of `weight` but no more than `most`, which it is for zeros.

    An error keeps the size that the weights would give it when the matrices that carry it instead
    are drawn with it; what would make it grow from layer to layer is cut off.

    >>> size_of(torch.full((3, 2), -0.5), 1.0), size_of(torch.full((3, 2), 7.0), 1.0)
    (0.5, 1.0)
    """
    if weight.is_meta or not weight.numel():
        return most
    size = float(weight.detach().abs().double().square().mean().sqrt())
    return min(size, most) if size > 0 else most


@contextmanager
def counted_apart(weights: Sequence[Tensor]) -> Iterator[None]:
    """Let `weights` have no `.grad` but the body's while it lasts; add what was there behind it."""
    before = [weight.grad for weight in weights]
    try:
        for weight in weights:
            weight.grad = None
        yield
    finally:
        for weight, was in zip(weights, before, strict=True):
            found = weight.grad
            if was is not None and found is not None:
                weight.grad = found.add(was) if was.is_sparse else was.add_(found)
            elif was is not None:
                weight.grad = was


@contextmanager
def handed_on(followed: Mapping[str, nn.Module], used: set[str],
              learn: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand `learn` what the body adds to the `.grad` of each module's weight, by name.

    Of those alone whose feedback carried an error, which the body puts into `used`.
    """
    weights: dict[str, Any] = {name: module.weight for name, module in followed.items()}
    used.clear()
    with counted_apart([*weights.values()]):
        yield
        for name, weight in weights.items():
            if name in used and weight.grad is not None:
                learn(name, weight.grad)


@torch.no_grad()
def accumulate(matrix: Tensor, update: Tensor) -> None:
    """Add `update` to the `.grad` of a matrix that learns."""
    if matrix.requires_grad:
        update = (update.to_dense() if update.is_sparse else update).to(matrix.dtype)
        matrix.grad = update.clone() if matrix.grad is None else matrix.grad.add_(update)


def matrices_of(stage: Stage) -> list[Parameter]:
    """Return the parameters of `stage` that are matrices, in their order."""
    return [p for p in stage.parameters() if p.ndim > 1]
