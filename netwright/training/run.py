"""A training under way: its epochs, and what is told of them."""

import math
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from netwright.errors import Diverged
from netwright.rules.rule import Rule
from netwright.runtime import distributed
from netwright.runtime.modes import training
from netwright.runtime.progress import Bar
from netwright.runtime.random_state import every_random_state, set_every_random_state
from netwright.signals import moved
from netwright.training import resuming
from netwright.training.arguments import Options, learning, stepped
from netwright.training.batches import Data, described, generators, length, pairs, parts, targets
from netwright.training.checkpoints import FILE
from netwright.training.diagnosis import Finite, bad_batch, where_not_finite
from netwright.training.history import Epoch, History
from netwright.training.identity import description
from netwright.training.scoring import Scores
from netwright.training.steps import steps_of
from netwright.training.weighing import Weigher

LAG = 16  # batches between two looks at the losses on an accelerator, since each waits for it


@dataclass
class Position:
    """Where a training stands: all of its plain numbers, as a checkpoint keeps them."""

    epoch: int = 0  # epochs that are done
    batch: int = 0  # batches of this epoch that are done
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0  # of this epoch, over its samples
    samples: float = 0  # that count in the loss
    waited: int = 0  # epochs since the best one
    best_score: float = math.nan


class Run:
    """A training under way."""

    def __init__(self, rule: Rule, train: Data, validation: Data | None,
                 optimizer: Optimizer | None, scheduler: LRScheduler | None,
                 options: Options) -> None:
        self.rule, self.train, self.validation = rule, train, validation
        self.optimizer, self.scheduler, self.options = optimizer, scheduler, options
        if optimizer is not None:
            rule.stepped_by(optimizer)
        self.parameters = learning(rule)
        self.device = self.parameters[0].device
        self.batches = length(train)
        self.weigher = Weigher(rule)
        self.finite = Finite(rule)
        self.cleared: list[Tensor] = []
        self.generators = generators([*rule.modules(), *parts(train), *parts(validation),
                                      optimizer])
        distributed.join(self.device)
        self.world = distributed.world()
        self.history = History(metric=getattr(options.metric, "__name__", "metric"),
                               higher_is_better=options.higher_is_better)
        self.at, self.steps = Position(), steps_of(self)
        self.best: dict[str, Any] | None = None
        self.random_start: list[dict[str, Any]] = []
        self.unread: list[tuple[str, Any, Tensor, Any, Any]] = []
        self.saved: tuple[int, int] | None = None
        self.described: dict[str, Any] = {}
        self.drifted: list[list[str]] = []  # of what describes it, what it changes itself
        self.begun = False  # whether the first checkpoint is this call's
        self.started, self.has_stepped = 0.0, False
        self.bar: Bar | None = None
        self.writer: Any = None

    # The whole training

    def all(self) -> History:
        """Train from the start, or from the checkpoint, to the end."""
        with resuming.held(self):
            return self._all()

    def _all(self) -> History:
        if self.options.folder is not None:
            self.described = description(self)
        self._begin()
        try:
            self._show()
            with training(self.rule, keep=self.rule.network):
                while self.at.epoch < self.options.epochs and not self._out_of_patience():
                    self._one_epoch()
        finally:
            if self.bar is not None:
                self.bar.stop()
            if self.writer is not None:
                self.writer.close()
        self.check_weights()
        if self.options.patience is not None and self.best is not None:
            resuming.set_weights(self.rule, self.best)
        self.history.steps = self.at.step
        self.history.stopped = "patience" if self._out_of_patience() else "epochs"
        return self.history

    def _begin(self) -> None:
        """Take up the checkpoint; where there is none, seed, and write the first."""
        if self.world > 1:
            distributed.wait()  # process 0 may still be writing what a call before this one left
        stored = resuming.found(self)
        if self.world > 1:
            self._agree(stored is not None)
        if stored is not None:
            resuming.take_up(self, stored)
            return
        if self.options.seed is not None:
            seed = self.options.seed + distributed.rank()
            torch.manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed % 2**32)
        if self.world > 1:
            distributed.share_weights(self.rule)
            distributed.share_generators(generators(self.rule.modules()))
        self.begun = True
        resuming.keep(self)

    def _agree(self, found: bool) -> None:
        """Raise ValueError unless the processes can train together."""
        seen = distributed.gather((found, self.batches))
        if len(set(seen)) > 1:
            raise ValueError("every process must find the same checkpoint and have as many "
                             f"batches as the others, got (found, batches) = {seen}; keep the "
                             "checkpoint where all can read it, give each as many batches")
        if self.rule.updates_weights:
            raise ValueError(f"{type(self.rule).__name__} changes the weights itself, so there "
                             "are no gradients to average; train it in one process")
        if self.steps.alone:
            raise ValueError(f"{type(self.optimizer).__name__} differentiates the loss itself, so "
                             "there are no gradients to average; train in one process")

    def _show(self) -> None:
        if distributed.rank() != 0:
            return
        if self.options.progress:
            self.bar = Bar(self.options.epochs, self.batches, self.history.metric)
            self.bar.start()
        if self.options.tensorboard is not None:
            self.writer = _writer(self.options.tensorboard, first=self.at.epoch + 1)

    def _out_of_patience(self) -> bool:
        return self.options.patience is not None and self.at.waited >= self.options.patience

    # One epoch

    def _one_epoch(self) -> None:
        batches, take = self._open(), self.steps.take
        self.cleared = list({id(p): p for p in [*self.parameters, *stepped(self.optimizer)]
                             }.values())
        self.started = time.perf_counter()
        for x, y in batches:
            take(moved(x, self.device), moved(y, self.device))
        self.steps.finish()
        self.read_losses()
        self.at.seconds += time.perf_counter() - self.started
        if not self.at.samples:
            raise ValueError("train yielded no batches; check that the data set is not empty and "
                             "that drop_last leaves one")
        self._end_epoch()

    def _open(self) -> Iterator[tuple[Any, Tensor]]:
        """Return this epoch's batches, without those that are done."""
        for part in parts(self.train):
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.at.epoch)
        if not self.at.batch:
            if self.options.folder is not None:
                self.random_start = resuming.random_states(self)
            return self._pass(self.train)
        now = every_random_state(self.generators)
        set_every_random_state(self.random_start[distributed.rank()], self.generators)
        batches = self._pass(self.train)
        for _ in range(self.at.batch):
            next(batches, None)
        set_every_random_state(now, self.generators)
        return batches

    def _pass(self, data: Data) -> Iterator[tuple[Any, Any]]:
        """Begin a pass over the batches of `data`."""
        if self.options.folder is not None and getattr(data, "persistent_workers", False):
            # Workers that live on hold random states that no checkpoint can see: with new ones
            # everything follows from the seed that each pass draws.
            data._iterator = None  # type: ignore[attr-defined]
        return pairs(data, self.rule)

    def _end_epoch(self) -> None:
        at, rate = self.at, self._learning_rate()
        if self.world > 1:
            distributed.share_buffers(self.rule)
        score = self._validate()
        record = Epoch(at.epoch + 1, at.seconds, at.loss_sum / at.samples, score, rate)
        self.history.epochs.append(record)
        if self.options.patience is not None:
            self._compare(score)
        if self.scheduler is not None and self.options.scheduler_unit == "epoch":
            self._schedule(record.loss if self.validation is None else score)
        if self.bar is not None:
            self.bar.epoch(at.epoch, record.loss, score)
        self._log(record)
        if self.options.on_epoch is not None:
            self.options.on_epoch(record)
        at.epoch, at.batch, at.loss_sum, at.samples = at.epoch + 1, 0, 0.0, 0
        resuming.keep(self)

    @torch.no_grad()
    def _validate(self) -> float:
        if self.validation is None:
            return math.nan
        scores = Scores(self.options.metric)
        for x, y in self._pass(self.validation):
            if targets(y):
                x, y = moved(x, self.device), moved(y, self.device)
                with self.precision():
                    predicted = self.rule.predict(x)
                scores.add(predicted, y)
        score = scores.of_all(self.world, self.device)
        if score is None:
            raise ValueError("validation yielded no batches; check that its data set is not empty")
        return score

    def _compare(self, score: float) -> None:
        sign = 1 if self.options.higher_is_better else -1
        first = self.best is None and not math.isnan(score)  # NaN is no score to be beaten
        if first or sign * score > sign * self.at.best_score:
            self.at.best_score, self.at.waited = score, 0
            self.best = {name: value.clone() if isinstance(value, Tensor) else deepcopy(value)
                         for name, value in self.rule.state_dict().items()}
        else:
            self.at.waited += 1

    def _log(self, record: Epoch) -> None:
        if self.writer is None:
            return
        figures = {"training/loss": record.loss, f"validation/{self.history.metric}": record.metric,
                   "training/learning rate": record.learning_rate}
        for name, value in figures.items():
            if not math.isnan(value):
                self.writer.add_scalar(name, value, record.epoch)
        self.writer.flush()

    def _learning_rate(self) -> float:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return float(groups[0].get("lr", math.nan)) if groups else math.nan

    def _schedule(self, score: float) -> None:
        assert self.scheduler is not None
        with warnings.catch_warnings():
            if not self.has_stepped:  # the steps came before the checkpoint
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(score)
            else:
                self.scheduler.step()

    # What the steps are made of

    def evaluated(self, x: Any, y: Any, *, graph: bool = False) -> Tensor:
        """Return the rule's loss, with its graph where that is asked for."""
        evaluate: Any = self.rule.loss_with_graph if graph else self.rule
        try:
            if self.options.autocast is None and self.weigher.known:
                return evaluate(x, y)
            with self.precision(), self.weigher.watching():
                return evaluate(x, y)
        except Exception as error:
            seen = f"at {self.place()}, x is {described(x)} and y is {described(y)}"
            if type(error) is RuntimeError and re.search(r"shape|size|dimension|channel|dtype",
                                                         str(error)):
                raise ValueError(f"the network cannot take the batch: {seen}; {error}; check that "
                                 "x fits the first layer and y the last") from error
            error.add_note(f"{seen}.")
            raise

    def weight(self, loss: Tensor, x: Any, y: Any) -> Any:
        """Return how much the batch that was evaluated last counts."""
        if self.world > 1:
            if not self.weigher.settled:
                self.weigher.settle(x, y)
                self.weigher.agree()
        elif loss.device.type == "cpu":
            self.check_loss(float(loss), self.place, x, y)
        return self.weigher.weight(x, y)

    def note(self, loss: Tensor, x: Any, y: Any) -> None:
        """Add a batch's loss to the epoch's."""
        self.note_weighed(loss, self.weight(loss, x, y), x, y)

    def note_weighed(self, loss: Tensor, weight: Any, x: Any, y: Any) -> None:
        """Add a loss to the epoch's; on an accelerator, leave it there for now."""
        if self.device.type == "cpu":
            value = float(loss)
            self.check_loss(value, self.place, x, y)
            self.add_loss(value if self.weigher.summed else value * weight, weight)
        else:
            self.unread.append((self.place(), weight, loss, x, y))
            if len(self.unread) >= LAG:
                self.read_losses()

    def check_loss(self, value: float, place: Callable[[], str], x: Any, y: Any) -> None:
        """Raise an error unless a loss is finite."""
        if not math.isfinite(value):
            self.diverged(f"the loss is {value} at {place()}", x, y)

    def add_loss(self, total: float, counted: float) -> None:
        """Add a loss to the epoch's: its sum over what counts, and how much does."""
        self.at.loss_sum += total
        self.at.samples += counted

    def read_losses(self) -> None:
        """Add the losses that were left on the accelerator to the epoch's."""
        if not self.unread:
            return
        values = torch.stack([loss for _, _, loss, _, _ in self.unread]).tolist()
        for value, (place, weight, _, x, y) in zip(values, self.unread, strict=True):
            self.check_loss(value, partial(str, place), x, y)
            self.add_loss(value if self.weigher.summed else value * float(weight), float(weight))
        self.unread.clear()

    def end_step(self) -> None:
        """Count a step, and do what is done after one."""
        at = self.at
        at.step += 1
        self.has_stepped = True
        if self.scheduler is not None and self.options.scheduler_unit == "step":
            self.scheduler.step()
        if self.bar is not None and at.samples:
            self.bar.step(at.epoch, at.batch, at.loss_sum / at.samples)
        if self.options.checkpoint_every and at.step % self.options.checkpoint_every == 0:
            self.read_losses()
            at.seconds += time.perf_counter() - self.started
            resuming.keep(self)
            self.started = time.perf_counter()

    def clear(self) -> None:
        """Leave no gradient."""
        for p in self.cleared:
            p.grad = None

    def precision(self) -> AbstractContextManager:
        """Return the context in which to compute."""
        if self.options.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.options.autocast)

    # What is said where it goes wrong

    def place(self) -> str:
        """Return in words where the training stands."""
        return f"epoch {self.at.epoch + 1}, step {self.at.step + 1}"

    def last_good(self) -> str:
        """Return in words where the last checkpoint is."""
        if self.saved is None:
            return "no checkpoint was kept: checkpoint= keeps one"
        epoch, step = self.saved
        return (f"the last good checkpoint is {Path(str(self.options.folder)) / FILE}, written "
                f"after epoch {epoch}, step {step}")

    def diverged(self, what: str, x: Any, y: Any) -> NoReturn:
        """Raise an error that says where numbers stopped being finite."""
        self.clear()
        fault = bad_batch(x, y)
        if fault is not None:
            raise ValueError(f"{what}: {fault}; {self.last_good()}")
        with self.precision():
            where = where_not_finite(self.rule, x, self.finite)
        raise Diverged(f"{what}: {where}; lower the learning rate, warm it up or set clip=1.0; "
                       f"{self.last_good()}")

    def check_weights(self) -> None:
        """Raise Diverged unless every weight is finite."""
        name = self.finite.broken()
        if name is not None:
            raise Diverged(f"{name} is not finite after epoch {self.at.epoch}, step "
                           f"{self.at.step}; lower the learning rate, warm it up or set "
                           f"clip=1.0; {self.last_good()}")


def _writer(folder: str | Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard= needs the package tensorboard; install "
                          "netwright[tensorboard], or leave the argument out") from error
    return SummaryWriter(str(folder), purge_step=first)
