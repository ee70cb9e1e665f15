"""Calibration data: what a model takes, or several batches of it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from netwright.anatomy.feedforwards import FeedForwardLayer, feedforwards, feedforwards_in
from netwright.anatomy.replacing import plain_paths
from netwright.anatomy.run import Run, record
from netwright.runtime.modes import evaluating, rehearsing
from netwright.runtime.padding import read_padding
from netwright.runtime.progress import Bar
from netwright.signals import apply, few, first_argument


class Stream:
    """Calibration data, batch by batch: one is in memory at a time, beside the `first`.

    They are what `batches_of` takes, looked at when their turn comes. What can be gone through
    once, such as a generator, is gone through once.

    Raises: what `batches_of` raises.

    >>> import torch
    >>> stream = Stream(torch.full((2, 3), float(i)) for i in range(4))
    >>> float(stream.first.sum()), [float(batch.sum()) for batch in stream]
    (0.0, [0.0, 6.0, 12.0, 18.0])
    """

    def __init__(self, calibration: Any) -> None:
        single = _check(calibration)
        self._batches = iter([calibration] if single else calibration)
        self.first = next((_filled(batch) for batch in self._inputs()), None)
        if self.first is None:
            raise ValueError(NONE)

    def __iter__(self) -> Iterator[Any]:
        return chain([self.first], map(_filled, self._inputs()))

    def _inputs(self) -> Iterator[Any]:
        return map(_inputs, self._batches)


def first_run(model: nn.Module, example: Any) -> Run:
    """Return a run of `model` on a few samples, on all of them where a few will not do."""
    some = few(example)
    try:
        return record(model, some)
    except Exception:  # whatever a model raises that takes batches of one size alone
        if some is example:
            raise
    return record(model, example)


def layers_in(model: nn.Module, example: Any, *, square: bool = True) -> list[FeedForwardLayer]:
    """Return what `feedforwards` does; a few samples of the example are enough for it."""
    if example is None:
        return feedforwards(model, square=square)
    return feedforwards_in(first_run(model, example), square=square)


def show_inputs(model: nn.Module, names: Sequence[str], batches: Iterable[Any],
                see: Callable[[str, Tensor], None], bar: Bar | None = None) -> None:
    """Call `see` with what the modules called `names` are given, batch by batch, in eval mode.

    Within it `netwright.runtime.padding` tells what is padding. The model is as it was afterwards.
    """
    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, kwargs: see(name, first_argument(module, args, kwargs).detach())

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
               for name in names]
    run_batches(model, batches, handles, bar)


def run_batches(model: nn.Module, batches: Iterable[Any], handles: list[Any],
                bar: Bar | None = None) -> None:
    """Run `model` on each batch in eval mode and leave it as it was, without the hooks."""
    handles = [*handles, *read_padding(model)]
    try:
        with evaluating(model), plain_paths(), rehearsing(model):
            for number, batch in enumerate(batches):
                apply(model, batch)
                if bar is not None:
                    bar.step(0, number, float("nan"))
    finally:
        for handle in handles:
            handle.remove()


NONE = ("calibration must hold at least one sample, got none; a few hundred tokens or some tens of "
        "images are enough")


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
    batches = [calibration] if _check(calibration) else [_inputs(batch) for batch in calibration]
    if not batches:
        raise ValueError(NONE)
    return [_filled(batch) for batch in batches]


def _check(calibration: Any) -> bool:
    """Raise unless they are calibration data; return whether they are a single batch."""
    if calibration is None:
        raise ValueError("calibration must be given: what is changed is chosen by what the model "
                         "does on it; pass some of what the model takes")
    single = isinstance(calibration, (Tensor, tuple, Mapping))
    if isinstance(calibration, (str, bytes, nn.Module)) or not (
            single or isinstance(calibration, Iterable)):
        raise TypeError("calibration must be what the model takes (a tensor, a tuple or a "
                        "mapping), or batches of it, such as a list or a DataLoader, got "
                        f"{type(calibration).__name__}")
    return single


def _filled(batch: Any) -> Any:
    if (isinstance(batch, Tensor) and not batch.numel()) or (
            isinstance(batch, Mapping) and not batch):
        raise ValueError(NONE)
    return batch


def _inputs(batch: Any) -> Any:
    if isinstance(batch, list) and batch:
        return batch[0]
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}
    return batch
