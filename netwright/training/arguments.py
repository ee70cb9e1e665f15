"""What a training is asked for, looked at before anything changes."""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from netwright import checks
from netwright.objectives.metrics import is_mean_over_targets
from netwright.rules.rule import Rule
from netwright.runtime.modes import rehearsing
from netwright.signals import moved, tensors
from netwright.training.batches import (
    as_pair,
    described,
    first_batch,
    generators,
    parts,
    targets,
)
from netwright.training.history import Epoch
from netwright.training.scoring import has_state

Metric = Callable[[Tensor, Tensor], float | Tensor]


@dataclass(frozen=True)
class Options:
    """What a training was asked for, besides what it trains and on what."""

    epochs: int
    metric: Metric
    higher_is_better: bool
    scheduler_unit: str
    patience: int | None
    accumulate: int
    clip: float | None
    autocast: torch.dtype | None
    seed: int | None
    folder: Path | None
    checkpoint_every: int | None
    on_epoch: Callable[[Epoch], object] | None
    tensorboard: str | Path | None
    progress: bool


def learning(rule: Rule) -> list[Parameter]:
    """Return the parameters that a training changes: whole numbers only where the rule does."""
    return [p for p in rule.parameters()
            if p.requires_grad or (rule.updates_weights and not p.is_floating_point())]


def check_data(name: str, data: Any) -> None:
    """Raise ValueError unless `data` can be passed over again and again."""
    if not hasattr(data, "__iter__") or isinstance(data, (Tensor, Mapping, str)):
        raise ValueError(f"{name} must be an iterable of (x, y) batches, got "
                         f"{type(data).__name__}; use Batches(x, y, batch_size), a DataLoader or "
                         "a list")
    if isinstance(data, Iterator):
        raise ValueError(f"{name} must be something that can be passed over in every epoch, got "
                         f"{type(data).__name__}, which is used up after one; use list(...)")


def check_functions(metric: Any, on_epoch: Any) -> None:
    """Raise ValueError unless what is called once an epoch can be called."""
    if not (callable(metric) or has_state(metric)):
        raise ValueError("metric must be a function of (predictions, y), or an object with update, "
                         f"compute and reset, got {metric!r}")
    if on_epoch is not None and not callable(on_epoch):
        raise ValueError(f"on_epoch must be a function of an epoch's figures, got {on_epoch!r}")


def made_folder(name: str, given: Any) -> Path | None:
    """Return where a folder is to be, None where none is asked for.

    Raises:
        ValueError: it is no path, or something else is there.
    """
    if given is None:
        return None
    if not isinstance(given, (str, os.PathLike)) or not os.fspath(given):
        raise ValueError(f"{name} must be the path of a folder, got {given!r}")
    folder = Path(given)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{name} must be a folder, got the file {folder}")
    return folder


@contextmanager
def moved_to(rule: Rule, device: Any) -> Iterator[None]:
    """Put a rule on a device, and back where the body fails.

    Raises:
        ValueError: it is no device, or none of this machine's.
    """
    if device is None:
        yield
        return
    try:
        if not isinstance(device, (str, torch.device)):
            raise TypeError(f"{type(device).__name__} is no device")
        torch.zeros((), device=device)
    except Exception as error:  # whatever PyTorch raises for a device that is not there
        raise ValueError(f"device must be one of this machine's, such as 'cpu', got {device!r}: "
                         f"{error}") from error
    before = next(rule.parameters()).device
    rule.to(device)
    try:
        yield
    except BaseException:
        rule.to(before)
        raise


def rehearse(rule: Rule, train: Any, validation: Any, metric: Any) -> None:
    """Look at the first batches, where that leaves no trace.

    Where validation's is of another kind than that of training, it is judged now.

    Raises:
        ValueError: there is none, it is no batch, or the rule or the metric cannot take it.
    """
    seen = []
    for name, data in (("train", train), ("validation", validation)):
        if isinstance(data, (list, tuple)) and not data:
            raise ValueError(f"{name} yielded no batches; it is an empty {type(data).__name__}")
        batch = None if data is None else first_batch(data, generators(parts(data)))
        seen.append(None if batch is None else as_pair(batch, rule))
    first, judged = seen
    if judged is not None and targets(judged[1]) and (first is None or _kind(first) !=
                                                      _kind(judged)):
        _judge(rule, *judged, metric)


def _kind(batch: tuple[Any, Any]) -> list[Any]:
    return [(t.dtype, t.shape[1:]) for t in tensors(batch)]


@torch.no_grad()
def _judge(rule: Rule, x: Any, y: Any, metric: Any) -> None:
    device = next(rule.parameters()).device
    x, y = moved(x, device), moved(y, device)
    try:
        with rehearsing(rule):
            scores = rule.predict(x)
            if is_mean_over_targets(metric):  # another might count its calls
                float(metric(scores, y))
    except Exception as error:  # whatever a network or a metric raises
        raise ValueError(f"validation cannot be judged: x is {described(x)} and y is "
                         f"{described(y)}; {error}; check that x fits the network and y the "
                         "metric") from error


def made_optimizer(rule: Rule, given: Optimizer | Callable[[list[Parameter]], Optimizer] | None,
                   accumulate: int, clip: float | None) -> Optimizer:
    """Return the optimizer that was given, or is made by what was given.

    Raises:
        ValueError: it is none, steps nothing of the rule's, or cannot be used so.
    """
    parameters = [p for p in rule.parameters() if p.requires_grad]
    if given is None:
        return torch.optim.Adam(parameters)
    optimizer = given if isinstance(given, Optimizer) else given(parameters)
    if not isinstance(optimizer, Optimizer):
        raise ValueError("optimizer must be a torch.optim.Optimizer, or a function of the "
                         f"parameters that returns one, got {type(optimizer).__name__}")
    if not {id(p) for p in parameters} & {id(p) for p in stepped(optimizer)}:
        raise ValueError("optimizer steps none of the rule's parameters; build it from "
                         "rule.parameters()")
    several = differentiates(optimizer) or wants_closure(optimizer)
    for name, value in (("accumulate", accumulate if accumulate > 1 else None), ("clip", clip)):
        if several and value is not None:
            raise ValueError(f"{name}={value} cannot be used with {type(optimizer).__name__}, "
                             "which evaluates one batch several times; use larger batches, or "
                             "another optimizer")
    if differentiates(optimizer) and not hasattr(rule, "loss_with_graph"):
        raise ValueError(f"{type(optimizer).__name__} differentiates the loss itself, which "
                         f"{type(rule).__name__} does not give; train with Backprop, or take an "
                         "optimizer that steps on .grad")
    return optimizer


def differentiates(optimizer: Optimizer) -> bool:
    """Return whether `step` is given a function that returns the loss with its graph."""
    return bool(getattr(optimizer, "differentiates", False))


def wants_closure(optimizer: Optimizer) -> bool:
    """Return whether `step` cannot do without a function that evaluates the batch again."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def made_scheduler(optimizer: Optimizer | None,
                   given: LRScheduler | Callable[[Optimizer], LRScheduler] | None,
                   validated: bool, options: Options) -> LRScheduler | None:
    """Return the scheduler that was given, or is made by what was given.

    Raises:
        ValueError: it is none, or another optimizer's, or looks at something else.
    """
    checks.one_of(["epoch", "step"], scheduler_unit=options.scheduler_unit)
    if given is None or optimizer is None:
        return None
    scheduler = given if isinstance(given, LRScheduler) else given(optimizer)
    if not isinstance(scheduler, LRScheduler):
        raise ValueError("scheduler must be a learning-rate scheduler, or a function of the "
                         f"optimizer that returns one, got {type(scheduler).__name__}")
    if scheduler.optimizer is not optimizer:
        raise ValueError("scheduler was made for another optimizer than the one given; give the "
                         "same, or a function of the optimizer")
    if isinstance(scheduler, ReduceLROnPlateau):
        mode = "max" if validated and options.higher_is_better else "min"
        if options.scheduler_unit == "step":
            raise ValueError('scheduler_unit must be "epoch" with ReduceLROnPlateau, which looks '
                             "at an epoch's result")
        if scheduler.mode != mode:
            raise ValueError(f"scheduler must be made with mode={mode!r} to look at "
                             f"{'the metric' if validated else 'the loss'}, got "
                             f"mode={scheduler.mode!r}")
    return scheduler


def stepped(optimizer: Optimizer | None) -> list[Tensor]:
    """Return the parameters that an optimizer steps."""
    groups = optimizer.param_groups if optimizer is not None else []
    return [p for group in groups for p in group["params"]]
