from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter


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
        self._held: Any = self._parameters if learned else self._buffers  # read at every step

    def add(self, name: str, matrix: Tensor) -> None:
        """Keep `matrix` under `name`."""
        if self.learned:
            self.register_parameter(_key(name), Parameter(matrix))
        else:
            self.register_buffer(_key(name), matrix)

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
