"""The training that experiments share: several contenders, the same data, the same seeds."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain, islice, product, repeat
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler

from netwright.data import Batches, Split
from netwright.errors import Diverged
from netwright.evidence.outcome import Curve
from netwright.objectives.losses import cross_entropy
from netwright.objectives.metrics import accuracy
from netwright.rules import Backprop, Rule
from netwright.training import fit

__all__ = ["Loader", "Runs", "falling", "held_out_accuracy", "held_out_errors", "train"]



class Loader(Protocol):
    """Batches that can be gone through again and again, and counted."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]: ...


Data = Split | tuple[Loader, Loader]
Look = Callable[[Rule, Loader], float]

on_progress: ContextVar[Callable[[float], object]] = ContextVar(
    "on_progress", default=lambda share: None)  # told the share of a `train` that is done


@dataclass(frozen=True)
class Runs:
    """What trainings gave: for each figure and contender, a line over `x` for each seed.

    A figure's name has `{}` where the contender's belongs. `rules` are what was trained, by
    contender and seed.
    """

    x: Sequence[int]
    lines: Mapping[str, Mapping[str, list[list[float]]]]
    rules: Mapping[str, list[Rule]]

    @property
    def figures(self) -> dict[str, list[float]]:
        """The last value of each figure, for each contender and seed."""
        return {name.format(contender): [line[-1] for line in lines]
                for name, found in self.lines.items() for contender, lines in found.items()}

    def curves(self, name: str, label: str = "{}") -> dict[str, Curve]:
        """Return a figure's line for each contender, with `label` for the curve's name."""
        return {label.format(contender): Curve(self.x, lines)
                for contender, lines in self.lines[name].items()}


def train(contenders: Mapping[str, Callable[[], Rule | nn.Module]],
          data: Data | Callable[[int], Data], measure: Mapping[str, Look], *,
          seeds: Iterable[int], optimizer: Callable[[nn.Module], Optimizer],
          epochs: int | None = None, steps: int | None = None, looks: int = 6,
          batch_size: int | None = None,
          loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
          scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
          at_start: bool = False, diverged: float | None = None) -> Runs:
    """Train every contender under every seed by `nw.fit`, and measure each as it learns.

    A contender is a function that builds a rule, or a module that is trained by backpropagation
    of `loss`; it is called under the seed. `data` is a `Split`, in batches of `batch_size` or as
    one batch, a pair of batches to train and to test on, or a function of the seed that returns
    one of these. `measure` maps a figure, with `{}` in place of the contender, to a function of
    the rule and the batches to test on. They are asked after each of `epochs`, or `looks` times in
    `steps` batches, and before the first where `at_start`. `optimizer` is a function of the rule,
    `scheduler` of the optimizer and the number of steps. Where a training diverges, figures are
    `diverged` from then on; where that is None, it is an error.

    Raises:
        ValueError: not one of `epochs` and `steps` is given, or `steps` is no multiple of `looks`.
        Diverged: a loss or a weight is no longer finite, and `diverged` is None.

    >>> from functools import partial
    >>> from netwright.data import digits
    >>> from netwright.models import mlp
    >>> found = train({"narrow": partial(mlp, 64, 10, hidden=(4,))}, digits(),
    ...               {"accuracy, {} (%)": held_out_accuracy}, seeds=[0, 1], epochs=2,
    ...               batch_size=64, optimizer=lambda rule: torch.optim.Adam(rule.parameters()))
    >>> {name: len(values) for name, values in found.figures.items()}
    {'accuracy, narrow (%)': 2}
    """
    if (epochs is None) == (steps is None):
        raise ValueError(f"one of epochs and steps must be given, got epochs={epochs} and "
                         f"steps={steps}")
    if steps is not None and steps % looks:
        raise ValueError(f"steps must be a multiple of looks={looks}, got {steps}")
    seeds, times = list(seeds), looks if epochs is None else epochs
    lines: dict[str, dict[str, list[list[float]]]] = {name: {} for name in measure}
    rules: dict[str, list[Rule]] = {}
    tell, whole = on_progress.get(), len(contenders) * len(seeds)
    for done, (contender, seed) in enumerate(product(contenders, seeds)):
        tell(done / whole)
        torch.manual_seed(seed)
        built = contenders[contender]()
        rule = built if isinstance(built, Rule) else Backprop(built, loss=loss)
        learn, test = _loaders(data(seed) if callable(data) else data, batch_size, seed)
        batches = learn if steps is None else _Portion(learn, steps // looks)
        plan = scheduler and _planned(scheduler, times * len(batches))
        found = _lines(rule, batches, test, measure, times, at_start, diverged, epochs=times,
                       seed=seed, scheduler=plan, scheduler_unit="step", progress=False,
                       optimizer=None if rule.updates_weights else optimizer(rule))
        rules.setdefault(contender, []).append(rule)
        for name, line in found.items():
            lines[name].setdefault(contender, []).append(line)
    apart = 1 if steps is None else steps // looks
    return Runs([apart * i for i in range(0 if at_start else 1, times + 1)], lines, rules)


def _lines(rule: Rule, batches: Loader, test: Loader, measure: Mapping[str, Look], times: int,
           at_start: bool, diverged: float | None, **options: Any) -> dict[str, list[float]]:
    """Train by `fit`; return for each figure what it was at each look."""
    found: dict[str, list[float]] = {name: [] for name in measure}

    def look(_: object = None) -> None:
        for name, of in measure.items():
            found[name].append(of(rule, test))
    if at_start:
        look()
    try:
        fit(rule, batches, on_epoch=look, **options)
    except Diverged:
        if diverged is None:
            raise
        for line in found.values():
            line += [diverged] * (times + at_start - len(line))
    return found


def falling(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Return a schedule whose rate falls linearly to 0 over the training."""
    return LinearLR(optimizer, 1.0, 0.0, steps)


def held_out_accuracy(rule: Rule, test: Loader) -> float:
    """Return how many targets are predicted right (%); targets of -100 do not count."""
    right, counted = 0.0, 0
    for x, y in test:
        some = int((y != -100).sum())
        right += accuracy(rule.predict(x), y) * some if some else 0.0
        counted += some
    return 100 * right / counted


def held_out_errors(rule: Rule, test: Loader) -> float:
    """Return how many targets are predicted wrong (%)."""
    return 100 - held_out_accuracy(rule, test)


def _planned(scheduler: Callable[[Optimizer, int], LRScheduler],
             steps: int) -> Callable[[Optimizer], LRScheduler]:
    return lambda optimizer: scheduler(optimizer, steps)


class _Portion:
    """Every pass is the next `number` batches of data that are gone through again and again."""

    def __init__(self, data: Loader, number: int) -> None:
        self._endless, self._number = chain.from_iterable(repeat(data)), number

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return islice(self._endless, self._number)


def _loaders(data: Data, batch_size: int | None, seed: int) -> tuple[Loader, Loader]:
    if not isinstance(data, Split):
        return data
    test = list(zip(data.x_test.split(500), data.y_test.split(500), strict=True))
    if batch_size is None:
        return [(data.x_train, data.y_train)], test
    return Batches(data.x_train, data.y_train, batch_size, seed=seed), test
