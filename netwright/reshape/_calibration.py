"""Calibration data: what a model takes, or several batches of it."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from netwright.signals import tensors

ROWS = 2  # of a batch: the least with which batch normalisation runs in train mode


def batches_of(calibration: Any) -> list[Any]:
    """Return calibration data as a list of batches, each of which the model takes.

    One batch is a tensor, a tuple of positional or a mapping of keyword arguments; anything else
    that can be gone through holds batches: a list, a generator, a loader. A list within gives its
    first entry, since that is how loaders hand over inputs with their targets, and labels are
    left out.

    Raises:
        TypeError: it is neither.
        ValueError: there is none.

    >>> import torch
    >>> x, y = torch.ones(4, 2), torch.zeros(4)
    >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
    >>> [batch.shape for batch in batches_of(loader)], len(batches_of(x))
    ([torch.Size([2, 2]), torch.Size([2, 2])], 1)
    """
    if calibration is None:
        raise ValueError("calibration must be given: what is changed is chosen by what the model "
                         "does on it; pass some of what the model takes")
    single = isinstance(calibration, (Tensor, tuple, Mapping))
    if isinstance(calibration, (str, bytes, nn.Module)) or not (
            single or isinstance(calibration, Iterable)):
        raise TypeError("calibration must be what the model takes (a tensor, a tuple or a "
                        "mapping), or batches of it, such as a list or a DataLoader, got "
                        f"{type(calibration).__name__}")
    batches = [calibration] if single else [_inputs(batch) for batch in calibration]
    if not batches or any(isinstance(x, Tensor) and not x.numel() for x in batches):
        raise ValueError("calibration must hold at least one sample, got none; a few hundred "
                         "tokens or some tens of images are enough")
    return batches


def few(x: Any) -> Any:
    """Return the first rows of a batch, or `x` where it does not look like one.

    >>> import torch
    >>> few({"x": torch.ones(8, 3)})["x"].shape
    torch.Size([2, 3])
    """
    sizes = {t.shape[:1] for t in tensors(x)}
    if len(sizes) != 1 or not (size := sizes.pop()) or size[0] <= ROWS:
        return x
    return tree_map(lambda t: t[:ROWS] if isinstance(t, Tensor) else t,
                    dict(x) if isinstance(x, Mapping) else x)


def _inputs(batch: Any) -> Any:
    if isinstance(batch, list) and batch:
        return batch[0]
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}
    return batch
