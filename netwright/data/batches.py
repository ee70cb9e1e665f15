from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy
import torch
from torch import Generator, Tensor, distributed

from netwright import checks
from netwright.signals import mapped

__all__ = ["Batches"]


@checks.annotated
class Batches:
    """Batches of tensors in memory, in an order that the seed and the epoch alone decide.

    order = a permutation drawn from (seed, epoch);  batch b = samples order[b n : b n + n]

    Each pass is the next epoch; `set_epoch` chooses one. Nothing else is remembered, so an
    interrupted training can be taken up at any batch. In several processes each takes its share
    of every batch, so that together they see what one process would see.

    Shapes: x (samples, ...), or a tuple or mapping of such tensors; y (samples, ...).

    Raises:
        ValueError: no samples, lengths that differ, NaN in x or y, a batch size below 1.

    >>> batches = Batches(torch.randn(10, 4), torch.arange(10), batch_size=4)
    >>> [tuple(x.shape) for x, y in batches]
    [(4, 4), (4, 4), (2, 4)]
    """

    def __init__(self, x: Any, y: Tensor, batch_size: int, *, shuffle: bool = True,
                 drop_last: bool = False, seed: int = 0) -> None:
        samples = (len(y) if y.ndim else 0) if isinstance(y, Tensor) else None
        for name, tensor in {**named(x, "x"), "y": y}.items():
            check_samples(name, tensor, samples)
        checks.count(1, batch_size=batch_size)
        if drop_last and batch_size > len(y):
            raise ValueError(f"batch_size={batch_size} with drop_last=True leaves none of the "
                             f"{len(y)} samples; use a smaller batch_size or drop_last=False")
        checks.count(0, seed=seed)
        self.x, self.y, self.batch_size = x, y, batch_size
        self.shuffle, self.drop_last, self.seed, self.epoch = shuffle, drop_last, seed, 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.y), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self.batches(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass the one of `epoch`, counted from 0."""
        self.epoch = epoch

    def batches(self, epoch: int) -> Iterator[tuple[Any, Tensor]]:
        """Yield the batches of one epoch, whichever is next."""
        order = self._order(epoch).to(self.y.device) if self.shuffle else None
        for i in range(len(self)):
            start, stop = self._share(i)
            index = slice(start, stop) if order is None else order[start:stop]
            yield mapped(self.x, partial(_take, index=index)), _take(self.y, index)

    def _order(self, epoch: int) -> Tensor:
        (state,) = numpy.random.SeedSequence([self.seed, epoch]).generate_state(1, numpy.uint64)
        return torch.randperm(len(self.y), generator=Generator().manual_seed(int(state)))

    def _share(self, i: int) -> tuple[int, int]:
        """Return where this process's part of batch `i` starts and stops."""
        start = i * self.batch_size
        size = min(self.batch_size, len(self.y) - start)
        if not (distributed.is_available() and distributed.is_initialized()):
            return start, start + size
        rank, world = distributed.get_rank(), distributed.get_world_size()
        return start + size * rank // world, start + size * (rank + 1) // world


def named(x: Any, name: str) -> dict[str, Any]:
    """Return a tensor, or each of a tuple or mapping of them, by what an error calls it.

    >>> list(named((torch.zeros(1), torch.ones(1)), "x"))
    ['x[0]', 'x[1]']
    """
    if isinstance(x, (tuple, list, Mapping)):
        parts = x.items() if isinstance(x, Mapping) else enumerate(x)
        return {f"{name}[{key!r}]": value for key, value in parts}
    return {name: x}


def check_samples(name: str, tensor: Any, samples: int | None) -> None:
    """Raise ValueError unless `tensor` holds `samples` samples, at least one, and no NaN."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}; "
                         "use torch.as_tensor")
    if tensor.ndim == 0 or len(tensor) == 0:
        raise ValueError(f"{name} must hold at least one sample, got shape {tuple(tensor.shape)}")
    if samples is not None and len(tensor) != samples:
        raise ValueError(f"{name} must hold as many samples as y, got {len(tensor)} and {samples}; "
                         "for a batch that is not to be split, such as a graph, use [(x, y)]")
    if tensor.is_floating_point() and tensor.isnan().any():
        sample = int(tensor.isnan().flatten(1).any(1).nonzero()[0]) if tensor.ndim > 1 else \
            int(tensor.isnan().nonzero()[0])
        raise ValueError(f"{name} must not hold NaN, got NaN in sample {sample}; "
                         "fill it in or leave the sample out")


def _take(tensor: Tensor, index: slice | Tensor) -> Tensor:
    return tensor[index] if isinstance(index, slice) else tensor.index_select(0, index)
