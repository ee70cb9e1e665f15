"""Whether a task can be run at all: what its every run would raise is raised before the first."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.data import Split
from netwright.data.batches import check_samples, named
from netwright.errors import NetwrightError
from netwright.objectives.losses import cross_entropy
from netwright.rules.rule import check_labels
from netwright.runtime.modes import evaluating
from netwright.runtime.random_state import same_random_state
from netwright.stages import call
from netwright.tasks import Parts, Task

__all__ = ["check_ready"]


@checks.annotated
def check_ready(task: Task) -> None:
    """Raise unless the task's data, network, loss, metric and optimizer fit one another.

    Raises:
        NetwrightError: its data is missing.
        ValueError: a part of it raises or is not what it must be.

    >>> from netwright.tasks import task
    >>> check_ready(task("digits-mlp"))
    """
    parts = task.parts(0, tuning=True) if _shaped(task) else None
    with same_random_state(), torch.no_grad():
        network = _tried(task, "network", task.network)
        if not isinstance(network, nn.Module):
            raise ValueError(f"network of task {task.name!r} must build an nn.Module, got "
                             f"{type(network).__name__}; return the network")
        learned = [p for p in network.parameters() if p.requires_grad]
        if not learned:
            raise ValueError(f"network of task {task.name!r} must have parameters to train, got "
                             "none with requires_grad=True")
        _tried(task, "optimizer", lambda: task.optimize(learned, task.learning_rate))
        with evaluating(network):
            for name, batch in _batches(task, parts):
                _check_batch(task, network, name, batch)


def _shaped(task: Task) -> bool:
    """Raise unless the data are tensors that fit together; return whether they are `Parts`."""
    loaded = task.loaded
    if isinstance(loaded, Parts):
        for name, loader in zip(Parts._fields, loaded, strict=True):
            if inspect.isgenerator(loader) or iter(loader) is loader:
                raise ValueError(f"{name} of task {task.name!r} must be something that can be gone "
                                 f"through again and again, got {type(loader).__name__}; use "
                                 "list(...)")
        return True
    if isinstance(loaded, Split):
        for part in ("train", "test"):
            x, y = getattr(loaded, f"x_{part}"), getattr(loaded, f"y_{part}")
            where = f" of task {task.name!r}"
            check_samples(f"y_{part}{where}", y, None)
            for name, tensor in named(x, f"x_{part}").items():
                check_samples(f"{name}{where}", tensor, len(y))
        if len(loaded.y_train) < 2:
            raise ValueError(f"y_train of task {task.name!r} must hold at least 2 samples, since a "
                             f"share is set aside for tuning, got {len(loaded.y_train)}")
        return False
    for name in ("features", "y"):
        check_samples(f"{name} of task {task.name!r}", getattr(loaded, name), len(loaded.y))
    return False


def _batches(task: Task, parts: Parts | None) -> list[tuple[str, Any]]:
    loaded = task.loaded
    if isinstance(loaded, Split):
        # One input shows whether the network takes them; every label is looked at.
        return [(part, (_first(getattr(loaded, f"x_{part}")), getattr(loaded, f"y_{part}")))
                for part in ("train", "test")]
    found = []
    for name, loader in zip(Parts._fields, parts or task.parts(0), strict=True):
        batch = next(iter(loader), None)
        if batch is None:
            raise ValueError(f"{name} of task {task.name!r} must hold at least one batch, got none")
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 \
                or not isinstance(batch[1], Tensor):
            raise ValueError(f"{name} of task {task.name!r} must give pairs (x, y) with a tensor "
                             f"y, got {type(batch).__name__}")
        found.append((name, tuple(batch)))
    return found


def _check_batch(task: Task, network: nn.Module, name: str, batch: tuple[Any, Tensor]) -> None:
    x, y = batch
    scores = _tried(task, "network", lambda: call(network, x), f" on its {name} samples")
    if not isinstance(scores, Tensor):
        raise ValueError(f"network of task {task.name!r} must return a tensor, got "
                         f"{type(scores).__name__}")
    if task.loss is cross_entropy:
        try:
            check_labels(y, scores.shape[-1])
        except ValueError as error:
            raise ValueError(f"in the {name} samples of task {task.name!r} {error}") from error
    if isinstance(task.loaded, Split):
        y = y[:len(scores)]
    value = _tried(task, "loss", lambda: task.loss(scores, y), f" on its {name} samples")
    if not isinstance(value, Tensor) or value.ndim:
        raise ValueError(f"loss of task {task.name!r} must return a tensor without axes, got "
                         f"{_kind(value)}; average over the samples")
    score = _tried(task, "metric", lambda: task.score(scores, y), f" on its {name} samples")
    try:
        float(score)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"metric of task {task.name!r} must return one number, got "
                         f"{_kind(score)}; average over the samples") from error


def _first(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x[:2]
    return {key: part[:2] for key, part in x.items()} if hasattr(x, "items") else \
        tuple(part[:2] for part in x)


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else \
        type(value).__name__


def _tried(task: Task, part: str, action: Callable[[], Any], where: str = "") -> Any:
    try:
        return action()
    except NetwrightError:
        raise
    except Exception as error:
        raise ValueError(f"{part} of task {task.name!r} raised {type(error).__name__}: {error}"
                         f"{where}; try it alone") from error
