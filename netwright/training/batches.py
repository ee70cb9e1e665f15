"""What a loader yields, and what in it decides the order."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from netwright.data.batches import Batches
from netwright.rules.batches import labels_apart
from netwright.rules.rule import Rule
from netwright.runtime.random_state import from_one_start, is_generator
from netwright.signals import tensors
from netwright.training.own_loss import OwnLoss

Data = Iterable[tuple[Any, Any]]
DEPTH = 6  # how many objects lie in one another, at most: what is deeper is another's
MANY = 1000  # things in one container: more are samples, which draw nothing
_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device,
                    torch.Size, torch.nn.Parameter))


def pairs(data: Data, rule: Rule) -> Iterator[tuple[Any, Any]]:
    """Begin a pass over `data` now, and return its batches."""
    return map(partial(as_pair, rule=rule), iter(data))


def as_pair(batch: Any, rule: Rule) -> tuple[Any, Any]:
    """Return a batch as the (x, y) that a rule is given; raise ValueError where it is none."""
    if not rule.needs_labels:
        return unlabelled(batch)
    if isinstance(batch, Mapping):
        return keywords(batch, rule)
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and tensors(batch[1])):
        raise ValueError("a batch must be a pair (x, y) whose y is a tensor, or several in a tuple "
                         "or mapping, or be a mapping that holds labels, got "
                         f"{described(batch)}; several inputs go into x as a tuple or mapping")
    x, y = batch
    return x, y


def keywords(batch: Mapping[str, Any], rule: Rule) -> tuple[Any, Any]:
    """Return a batch of keywords, as loaders of Hugging Face give them, as (x, y).

    A model that computes its loss itself keeps the labels among what it is given.
    """
    x, y = labels_apart(rule.network, batch, None)
    if not isinstance(rule, OwnLoss):
        if y is None:
            raise ValueError('a batch that is a mapping must hold a tensor "labels", got '
                             f"{described(batch)}; give pairs (x, y), or the model itself to train "
                             "with its own loss")
        return x, y
    return dict(batch), unlabelled(batch)[1] if y is None else y


def unlabelled(batch: Any) -> tuple[Any, Tensor]:
    """Return a batch of inputs alone as (x, y), with a y that counts the samples."""
    x = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 1 else batch
    held = [part for part in tensors(x) if part.ndim]
    if not held:
        raise ValueError("a batch must hold a tensor of samples, or a tuple of what the model "
                         f"takes, got {described(batch)}; stack the samples")
    return x, torch.zeros(len(held[0]))


def parts(data: Any) -> list[Any]:
    """Return a loader and those of its parts that decide its order."""
    batch_sampler = getattr(data, "batch_sampler", None)
    parts = [data, getattr(data, "sampler", None), batch_sampler,
             getattr(batch_sampler, "sampler", None), getattr(data, "dataset", None)]
    return list({id(part): part for part in parts if part is not None}.values())


def length(data: Any) -> int | None:
    """Return how many batches a loader says it has, None where it does not know."""
    try:
        return len(data)
    except TypeError:  # among others a DataLoader of an IterableDataset, which has a `__len__`
        return None


def first_batch(data: Any, drawing: Sequence[Any]) -> Any:
    """Return the first batch of `data`, and leave it as it was; None where that is not possible.

    Of a loader's data set it is the first samples, whatever the sampler says. Streams are not
    looked at, since what is read from one is gone.
    """
    try:
        with from_one_start(drawing):
            return _first_batch(data)
    except Exception:  # whatever a data set raises at a number; the training will meet it or not
        return None


def _first_batch(data: Any) -> Any:
    if isinstance(data, Batches):
        return next(data.batches(data.epoch))
    if isinstance(data, (list, tuple)):
        return data[0]
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return None
    if data.batch_size is None and data.batch_sampler is None:
        return data.collate_fn(data.dataset[0])
    return data.collate_fn([data.dataset[i] for i in range(min(2, length(data.dataset) or 0))])


def generators(owners: Iterable[Any]) -> list[Any]:
    """Return the generators that `owners` hold, each once: of PyTorch, numpy and Python.

    They are looked for in attributes, in what those hold, and in what functions enclose, but not
    among many things of one kind, which are data.
    """
    found: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    level = list(owners)
    for _ in range(DEPTH):
        fresh = [value for value in level if type(value) not in _PLAIN and id(value) not in seen]
        seen |= {id(value): value for value in fresh}
        found |= {id(value): value for value in fresh if is_generator(value)}
        level = [part for value in fresh if id(value) not in found for part in _held(value)]
    return list(found.values())


def _held(value: Any) -> Iterable[Any]:
    if isinstance(value, (Tensor, numpy.ndarray, type, ModuleType)):
        return ()
    if isinstance(value, Mapping):
        return value.values() if len(value) <= MANY else ()
    if isinstance(value, (tuple, list)):
        return value if len(value) <= MANY else ()
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return list(getattr(value, "__dict__", {}).values())


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def targets(y: Any) -> int:
    """Return how many targets count in a mean over `y`, or over the first of several."""
    if not isinstance(y, Tensor):
        return targets(tensors(y)[0])
    if y.dtype == torch.int64:
        return int((y != -100).sum())
    return len(y) if y.ndim else 1


def described(value: Any) -> str:
    """Return the types and shapes in `value`, in words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {described(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(described, value)) + ")"
    return type(value).__name__
