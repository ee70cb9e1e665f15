"""What a model is judged by: data in three parts that share no sample."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.data import Split
from netwright.runtime.modes import evaluating, rehearsing
from netwright.signals import call, mapped, tensors
from netwright.tasks import Parts, Task

Batch = tuple[Any, Tensor | None]  # what the model takes, and the targets where there are any
LEAST = 12  # samples below which three parts say nothing
MOST = 4096  # samples that are looked at
SHARES = (0.25, 0.25, 0.5)  # of the samples that calibrate, that screen, that are for the end


@dataclass(frozen=True)
class Material:
    """Batches to calibrate with, to screen by and to judge by at the end, all different."""

    calibration: list[Batch]
    screening: list[Batch]
    final: list[Batch]

    @property
    def inputs(self) -> list[Any]:
        """What reshapes look at."""
        return [x for x, _ in self.calibration]

    @property
    def labelled(self) -> bool:
        """Whether every sample has a target."""
        return all(y is not None for part in self.parts for _, y in part)

    @property
    def parts(self) -> tuple[list[Batch], list[Batch], list[Batch]]:
        """The three parts."""
        return self.calibration, self.screening, self.final

    def digest(self) -> str:
        """Return what changes where a sample does."""
        held = hashlib.sha256()
        for part in self.parts:
            for x, y in part:
                _add(held, (x, y))
        return held.hexdigest()[:16]


def material(model: nn.Module, data: Any, *, labels: bool, batch: int) -> Material:
    """Return data in three parts, after the model has run on a batch of it.

    Raises:
        ValueError: the model cannot take the data, targets are missing where `labels`, or there
            are too few different samples for three parts.
    """
    batches = [_pair(model, entry, labels) for entry in _batches(data)]
    if not batches:
        raise ValueError(f"data must hold at least {LEAST} different samples for three parts, got "
                         "none")
    _check_runs(model, batches[0][0])
    chunks = _chunks(batches, batch)
    parts: tuple[list[Batch], ...] = ([], [], [])
    for chunk in chunks:
        behind = min(range(3), key=lambda i: rows(parts[i]) / SHARES[i])
        parts[behind].append(chunk)
    return Material(*parts)


def rows(part: Iterable[Batch]) -> int:
    """Return how many samples a part has."""
    return sum(length(x) for x, _ in part)


def length(x: Any) -> int:
    """Return how many samples an input has.

    Raises:
        ValueError: its tensors differ in that, as those of a graph do.
    """
    sizes = {len(t) if t.ndim else 0 for t in _inside(x)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"data must be samples along the first axis of every tensor, got axes of "
                         f"{sorted(sizes)}; give batches whose tensors have a row each sample")
    return sizes.pop()


def first_rows(part: Sequence[Batch], count: int) -> list[Batch]:
    """Return as many whole batches as hold `count` samples, at least one."""
    found: list[Batch] = []
    for chunk in part:
        found.append(chunk)
        if rows(found) >= count:
            break
    return found


def joined(part: Sequence[Batch], count: int) -> Any:
    """Return an input of `count` samples, repeated where there are fewer of one shape."""
    x = part[0][0]
    same = [entry for entry, _ in part if _shapes(entry) == _shapes(x)]
    several: list[Any] = []
    while sum(map(length, several)) < count:
        several.append(same[len(several) % len(same)])
    return mapped(_stacked(several), lambda t: t[:count].clone())


def _stacked(several: Sequence[Any]) -> Any:
    columns = zip(*(_inside(x) for x in several), strict=True)
    made = iter([torch.cat(column) for column in columns])
    return mapped(several[0], lambda _: next(made))


def _shapes(x: Any) -> list[torch.Size]:
    return [t.shape[1:] for t in _inside(x)]


def _inside(x: Any) -> list[Tensor]:
    return tensors(dict(x) if isinstance(x, Mapping) else x)


def _batches(data: Any) -> Iterator[Any]:
    """Yield what data hold, batch by batch, until there is enough."""
    if isinstance(data, Task):
        data = data.loaded
    if isinstance(data, Split):
        yield [data.x_test, data.y_test]
        return
    if isinstance(data, Parts):
        data = data.test
    if isinstance(data, (Tensor, tuple, Mapping)) or hasattr(data, "keys"):
        yield data
        return
    if isinstance(data, (str, bytes, nn.Module)) or not isinstance(data, Iterable):
        raise ValueError(f"data must be what the model takes, batches of it (a list, a DataLoader) "
                         f"or a Task, got {checks.seen(data)}")
    seen = 0
    for batch in islice(data, MOST):
        yield batch
        seen += len(_inside(batch)[0]) if _inside(batch) and _inside(batch)[0].ndim else 0
        if seen >= MOST:
            return


def _pair(model: nn.Module, batch: Any, labels: bool) -> Batch:
    """Return a batch as inputs and targets, which are None where none are looked at."""
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        named = {name: batch[name] for name in batch}
        y = named.pop("labels", None)
        x: Any = named
    elif isinstance(batch, list) or (labels and isinstance(batch, tuple)):
        x, y = batch[0] if batch else None, batch[1] if len(batch) > 1 else None
    else:
        x, y = batch, None
    if labels and not isinstance(y, Tensor):
        raise ValueError("data must be pairs of inputs and targets where a metric judges, got "
                         f"{checks.seen(batch)}; leave metric out to compare with the original's "
                         "own outputs, which needs no targets")
    if not _inside(x):
        raise ValueError(f"data must hold tensors, got {checks.seen(x)}")
    return x, y if labels else None


def _check_runs(model: nn.Module, x: Any) -> None:
    some = mapped(x, lambda t: t[:2]) if len({len(t) for t in _inside(x) if t.ndim}) == 1 else x
    try:
        with evaluating(model), rehearsing(model):
            call(model, some)
    except Exception as error:
        shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"
                           for t in _inside(x))
        raise ValueError(f"the model cannot take the data ({shapes}): {type(error).__name__}: "
                         f"{' '.join(str(error).split())[:200]}; give what its forward takes, "
                         "labels only together with metric=") from error


def _chunks(batches: Sequence[Batch], batch: int) -> list[Batch]:
    """Return batches of at most `batch` samples, each sample once."""
    seen: set[str] = set()
    different = [_without_known(entry, seen) for entry in batches]
    held = [entry for entry in different if entry is not None]
    count = rows(held)
    if count < LEAST:
        raise ValueError(f"data must hold at least {LEAST} different samples, so that three parts "
                         f"share none, got {count}; give more")
    size = max(1, min(batch, count // 8))
    return [(_part(x, slice(i, i + size)), None if y is None else y[i:i + size])
            for x, y in held for i in range(0, length(x), size)]


def _part(x: Any, index: int | slice) -> Any:
    return mapped(x, lambda t: t[index])


def _without_known(batch: Batch, seen: set[str]) -> Batch | None:
    """Return the samples of a batch that were not in those before."""
    x, y = batch
    kept = []
    for i in range(length(x)):
        held = hashlib.sha256()
        _add(held, _part(x, i))
        if held.hexdigest() not in seen:
            seen.add(held.hexdigest())
            kept.append(i)
    if len(kept) == length(x):
        return batch
    index = torch.tensor(kept, dtype=torch.long)
    return (mapped(x, lambda t: t[index.to(t.device)]), None if y is None else y[index]) \
        if kept else None


def _add(held: Any, value: Any) -> None:
    for tensor in _inside(value):
        held.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        held.update(flat.view(torch.uint8).numpy().data)
