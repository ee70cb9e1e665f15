import math
import random
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy
import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from netwright import checks
from netwright.errors import CorruptCheckpoint, Diverged
from netwright.objectives.metrics import accuracy
from netwright.rules.exact.backprop import Backprop
from netwright.rules.rule import Rule
from netwright.runtime import distributed
from netwright.runtime.modes import training
from netwright.runtime.progress import Bar
from netwright.runtime.random_state import every_random_state, set_every_random_state
from netwright.signals import moved
from netwright.training.checkpoints import FILE, load, save, tidy
from netwright.training.diagnosis import bad_batch, weights_not_finite, where_not_finite
from netwright.training.history import Epoch, History

__all__ = ["fit"]

LAG = 16  # batches between two looks at the losses on an accelerator, since each waits for it

Data = Iterable[tuple[Any, Tensor]]
Metric = Callable[[Tensor, Tensor], float | Tensor]


def fit(rule: Rule | nn.Module, train: Data, *, epochs: int,
        optimizer: Optimizer | Callable[[list[Parameter]], Optimizer] | None = None,
        validation: Data | None = None,
        metric: Metric = accuracy,
        higher_is_better: bool = True,
        scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
        scheduler_unit: Literal["epoch", "step"] = "epoch",
        patience: int | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        autocast: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None,
        on_epoch: Callable[[Epoch], object] | None = None,
        tensorboard: str | Path | None = None,
        progress: bool = True) -> History:
    """Train with `rule` on the batches of `train` and return what each epoch gave.

    With `checkpoint` the same call made again goes on where it stopped, and ends with the weights
    of a training that was never interrupted: on CPU bit for bit.

    Under `torchrun` every process trains on its own batches (`Batches` takes its share by
    itself), and gradients are averaged before each step.

    Args:
        rule: a rule, or a module to train by backpropagation.
        train: (x, y) that can be passed over again: a `Batches`, a `DataLoader`, a list.
        epochs: passes over `train`.
        optimizer: one, or a function of the parameters that returns one; by default Adam with a
            rate of 0.001.
        validation: batches like those of `train`, to judge each epoch by.
        metric: takes predictions and targets of `validation`.
        higher_is_better: whether more of `metric` is better.
        scheduler: one, or a function of the optimizer.
        scheduler_unit: when it is stepped, after each "epoch" or each "step".
        patience: epochs without a better one after which training stops and the best epoch's
            weights are put back.
        accumulate: batches that make one step, as one batch of all their samples would.
        clip: the most that the norm of the gradient may be.
        autocast: the type to compute in, `torch.bfloat16`.
        device: where to train; where the rule is without one.
        seed: of PyTorch, Python and numpy.
        checkpoint: a folder that the state of the training is kept in, after every epoch.
        checkpoint_every: steps after which it is kept as well.
        on_epoch: is called with what each epoch gave.
        tensorboard: a folder to log to.
        progress: whether a line shows how far it is.

    Raises:
        CorruptCheckpoint: the checkpoint is damaged, or another training's.
        Diverged: the loss or a weight is no longer finite.
        ValueError: an argument or a batch is not what it must be.

    >>> from netwright.data import Batches
    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> train = Batches(torch.randn(20, 4), torch.randint(3, (20,)), batch_size=8)
    >>> len(fit(network, train, epochs=2))
    2
    """
    rule = rule if isinstance(rule, Rule) else Backprop(rule)
    _check_counts(epochs=epochs, accumulate=accumulate, patience=patience,
                  checkpoint_every=checkpoint_every)
    _check_data("train", train)
    if validation is not None:
        _check_data("validation", validation)
    elif patience is not None:
        raise ValueError(f"patience={patience} needs validation= to see which epoch is the best")
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is None and checkpoint_every is not None:
        raise ValueError(f"checkpoint_every={checkpoint_every} needs checkpoint=, a folder")
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"checkpoint must be a folder, got the file {folder}")
    checks.above(0, clip=clip, optional=True)
    if autocast not in (None, torch.bfloat16):
        raise ValueError(f"autocast must be torch.bfloat16 or None, got {autocast}; float16 needs "
                         "scaled losses, which a rule's own update does not know")
    if rule.updates_weights and (optimizer, scheduler, clip, accumulate) != (None, None, None, 1):
        raise ValueError(f"{type(rule).__name__} changes the weights itself; leave out optimizer, "
                         "scheduler, clip and accumulate")
    if not _learning(rule):
        raise ValueError("rule has no parameter to train: every one has requires_grad=False, or "
                         "there is none")
    if device is not None:
        rule.to(device)
    stepper = None if rule.updates_weights else _optimizer(rule, optimizer, accumulate)
    options = _Options(epochs=epochs, metric=metric, higher_is_better=higher_is_better,
                       scheduler_unit=scheduler_unit, patience=patience, accumulate=accumulate,
                       clip=clip, autocast=autocast, seed=seed, folder=folder,
                       checkpoint_every=checkpoint_every, on_epoch=on_epoch,
                       tensorboard=tensorboard, progress=progress)
    return _Training(rule, train, validation, stepper,
                     _scheduler(stepper, scheduler, validation is not None, options),
                     options).all()


@dataclass(frozen=True)
class _Options:
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


@dataclass
class _Position:
    """Where a training stands: all of its plain numbers, as a checkpoint keeps them."""

    epoch: int = 0  # epochs that are done
    batch: int = 0  # batches of this epoch that are done
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0  # of this epoch, over its samples
    samples: int = 0
    waited: int = 0  # epochs since the best one
    best_score: float = math.nan


@dataclass
class _Group:
    """The batches that will make the next step."""

    batches: int = 0
    samples: int = 0
    last: int = 0  # samples of the last batch, by which .grad is divided
    loss_sum: float = 0.0
    inputs: list[tuple[Any, Tensor]] = field(default_factory=list)


class _Training:
    """A training under way."""

    def __init__(self, rule: Rule, train: Data, validation: Data | None,
                 optimizer: Optimizer | None, scheduler: LRScheduler | None,
                 options: _Options) -> None:
        self.rule, self.train, self.validation = rule, train, validation
        self.optimizer, self.scheduler, self.options = optimizer, scheduler, options
        rule.optimizer = optimizer
        self.parameters = _learning(rule)
        self.device = self.parameters[0].device
        self.batches = len(train) if isinstance(train, Sized) else None
        self.cleared: list[Tensor] = []
        self.generators = _generators([*rule.modules(), *_parts(train), *_parts(validation)])
        distributed.join(self.device)
        self.world = distributed.world()
        self.history = History(metric=getattr(options.metric, "__name__", "metric"),
                               higher_is_better=options.higher_is_better)
        self.at, self.group = _Position(), _Group()
        self.best: dict[str, Any] | None = None
        self.random_start: list[dict[str, Any]] = []
        self.unread: list[tuple[str, int, Tensor, Any, Tensor]] = []
        self.saved: tuple[int, int] | None = None
        self.started, self.has_stepped = 0.0, False
        self.bar: Bar | None = None
        self.writer: Any = None

    # The whole training

    def all(self) -> History:
        """Train from the start, or from the checkpoint, to the end."""
        self._begin()
        try:
            self._show()
            with training(self.rule):
                while self.at.epoch < self.options.epochs and not self._out_of_patience():
                    self._one_epoch()
        finally:
            if self.bar is not None:
                self.bar.stop()
            if self.writer is not None:
                self.writer.close()
        self._check_weights()
        if self.options.patience is not None and self.best is not None:
            _set_weights(self.rule, self.best)
        self.history.steps = self.at.step
        self.history.stopped = "patience" if self._out_of_patience() else "epochs"
        return self.history

    def _begin(self) -> None:
        """Take up the checkpoint; where there is none, seed, and write the first."""
        folder, seed = self.options.folder, self.options.seed
        if self.world > 1:
            distributed.wait()  # process 0 may still be writing what a call before this one left
        stored = None if folder is None else load(folder)
        if self.world > 1:
            self._agree(stored is not None)
        if stored is not None:
            self._resume(stored)
            if distributed.rank() == 0:
                tidy(str(folder))
        elif seed is not None:
            seed += distributed.rank()
            torch.manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed % 2**32)
        if self.world > 1 and stored is None:
            distributed.share_weights(self.rule)
            distributed.share_generators(_generators(self.rule.modules()))
        if stored is None:
            self._save()

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
        batches = self._open()
        use = self._closure_step if isinstance(self.optimizer, torch.optim.LBFGS) else \
            self._grouped if self.options.accumulate > 1 or self.world > 1 else self._batch
        self.cleared = list({id(p): p for p in [*self.parameters, *_stepped(self.optimizer)]
                             }.values())
        self.started = time.perf_counter()
        for x, y in batches:
            use(moved(x, self.device), moved(y, self.device))
        if self.group.batches:
            self._update()
        self._read_losses()
        self.at.seconds += time.perf_counter() - self.started
        if not self.at.samples:
            raise ValueError("train yielded no batches; check that the data set is not empty and "
                             "that drop_last leaves one")
        self._end_epoch()

    def _open(self) -> Iterator[tuple[Any, Tensor]]:
        """Return this epoch's batches, without those that are done."""
        for part in _parts(self.train):
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.at.epoch)
        if not self.at.batch:
            if self.options.folder is not None:
                self.random_start = self._random_states()
            return _pairs(self.train)
        now = every_random_state(self.generators)
        set_every_random_state(self.random_start[distributed.rank()], self.generators)
        batches = _pairs(self.train)
        for _ in range(self.at.batch):
            next(batches, None)
        set_every_random_state(now, self.generators)
        return batches

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
            self._schedule(record.loss if math.isnan(score) else score)
        if self.bar is not None:
            self.bar.epoch(at.epoch, record.loss, score)
        self._log(record)
        if self.options.on_epoch is not None:
            self.options.on_epoch(record)
        at.epoch, at.batch, at.loss_sum, at.samples = at.epoch + 1, 0, 0.0, 0
        self._save()

    @torch.no_grad()
    def _validate(self) -> float:
        if self.validation is None:
            return math.nan
        value_sum, count = 0.0, 0
        for x, y in _pairs(self.validation):
            targets = _targets(y)
            if targets:
                x, y = moved(x, self.device), moved(y, self.device)
                with self._precision():
                    scores = self.rule.predict(x)
                value_sum += float(self.options.metric(scores, y)) * targets
                count += targets
        if self.world > 1:
            value_sum, everyone = distributed.total([value_sum, count], self.device)
            count = round(everyone)
        if not count:
            raise ValueError("validation yielded no batches; check that its data set is not empty")
        return value_sum / count

    def _compare(self, score: float) -> None:
        sign = 1 if self.options.higher_is_better else -1
        if self.best is None or sign * score > sign * self.at.best_score:
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

    # One step

    def _batch(self, x: Any, y: Tensor) -> None:
        """Step with the update of one batch."""
        self._clear()
        self.at.batch += 1
        self._note(self._call(x, y), y.shape[0] if y.ndim else 1, x, y)
        self._step()

    def _grouped(self, x: Any, y: Tensor) -> None:
        """Add the update of one batch; step where that completes the group."""
        group, samples = self.group, _targets(y)
        if not group.batches:
            self._clear()
        if group.samples and samples and samples != group.last:
            self._scale(group.last / samples)  # so that .grad is always in units of one mean
        if self.world > 1 and self.rule.together:
            self._check_shares(samples)
        group.last = samples or group.last
        group.batches += 1
        group.samples += samples
        self.at.batch += 1
        if samples or self.world == 1:
            self._note(self._call(x, y), samples, x, y)
        if group.batches == self.options.accumulate:
            self._update()

    def _check_shares(self, samples: int) -> None:
        """Raise ValueError in every process where one has no share of the batch."""
        (empty,) = distributed.total([float(not samples)], self.device)
        if empty:
            raise ValueError(f"{type(self.rule).__name__} needs a share of every batch in each of "
                             f"the {self.world} processes, and {int(empty)} had none at "
                             f"{self._place()}; use a data set or a batch size that leaves no "
                             "smaller batch at the end")

    def _call(self, x: Any, y: Tensor) -> Tensor:
        try:
            if self.options.autocast is None:
                return self.rule(x, y)
            with self._precision():
                return self.rule(x, y)
        except Exception as error:
            seen = f"at {self._place()}, x is {_shape(x)} and y is {_shape(y)}"
            if type(error) is RuntimeError and re.search(r"shape|size|dimension|channel|dtype",
                                                         str(error)):
                raise ValueError(f"the network cannot take the batch: {seen}; {error}; check that "
                                 "x fits the first layer and y the last") from error
            error.add_note(f"{seen}.")
            raise

    def _note(self, loss: Tensor, samples: int, x: Any, y: Tensor) -> None:
        """Add a batch's loss to the epoch's; on an accelerator, leave it there for now."""
        if self.world > 1:
            self.group.loss_sum += float(loss) * samples
            self.group.inputs.append((x, y))
        elif self.device.type == "cpu":
            value = float(loss)
            if not math.isfinite(value):
                self._diverged(f"the loss is {value} at {self._place()}", x, y)
            self.at.loss_sum += value * samples
            self.at.samples += samples
        else:
            self.unread.append((self._place(), samples, loss, x, y))
            if len(self.unread) >= LAG:
                self._read_losses()

    def _read_losses(self) -> None:
        if not self.unread:
            return
        values = torch.stack([loss for _, _, loss, _, _ in self.unread]).tolist()
        for value, (place, samples, _, x, y) in zip(values, self.unread, strict=True):
            if not math.isfinite(value):
                self._diverged(f"the loss is {value} at {place}", x, y)
            self.at.loss_sum += value * samples
            self.at.samples += samples
        self.unread.clear()

    def _update(self) -> None:
        """Step with the gradients of the group's batches."""
        group, self.group = self.group, _Group()
        if group.last and group.samples != group.last:
            self._scale(group.last / group.samples)
        if self.world > 1:
            self._average(group)
        self._step()

    def _step(self) -> None:
        if self.options.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.options.clip)
        if self.optimizer is not None:
            self.optimizer.step()
        self._end_step()

    def _average(self, group: _Group) -> None:
        mean = group.loss_sum / group.samples if group.samples else 0.0
        loss, samples = distributed.average_gradients(self.parameters, mean, group.samples,
                                                      self.device)
        if not math.isfinite(loss):
            what = f"the loss is {loss} at {self._place()}"
            if math.isfinite(mean):
                raise Diverged(f"{what}: in another process than this, number "
                               f"{distributed.rank()}; {self._last_good()}")
            self._diverged(what, *next(iter(group.inputs)))
        self.at.loss_sum += loss * samples
        self.at.samples += samples

    def _closure_step(self, x: Any, y: Tensor) -> None:
        """Step an optimizer that evaluates the loss several times, at weights of its choice."""
        assert self.optimizer is not None
        samples, seen = _targets(y), []

        def closure() -> Tensor:
            self._clear()
            loss = self._call(x, y) if samples or self.world == 1 else torch.zeros(())
            if self.world > 1:
                mean, everyone = distributed.average_gradients(self.parameters, float(loss),
                                                               samples, self.device)
                loss = torch.tensor(mean)
            else:
                everyone = samples
            if not math.isfinite(float(loss)):
                self._diverged(f"the loss is {float(loss)} at {self._place()}", x, y)
            seen.append((float(loss), everyone))
            return loss

        self.at.batch += 1
        self.optimizer.step(closure)  # type: ignore[arg-type]
        loss, everyone = seen[0]
        self.at.loss_sum += loss * everyone
        self.at.samples += everyone
        self._end_step()

    def _end_step(self) -> None:
        at = self.at
        at.step += 1
        self.has_stepped = True
        if self.scheduler is not None and self.options.scheduler_unit == "step":
            self.scheduler.step()
        if self.bar is not None and at.samples:
            self.bar.step(at.epoch, at.batch, at.loss_sum / at.samples)
        if self.options.checkpoint_every and at.step % self.options.checkpoint_every == 0:
            self._read_losses()
            at.seconds += time.perf_counter() - self.started
            self._save()
            self.started = time.perf_counter()

    def _clear(self) -> None:
        for p in self.cleared:
            p.grad = None

    def _scale(self, factor: float) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)

    def _precision(self) -> AbstractContextManager:
        if self.options.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.options.autocast)

    def _learning_rate(self) -> float:
        return math.nan if self.optimizer is None else float(self.optimizer.param_groups[0]["lr"])

    def _schedule(self, score: float) -> None:
        assert self.scheduler is not None
        with warnings.catch_warnings():
            if not self.has_stepped:  # the steps came before the checkpoint
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(score)
            else:
                self.scheduler.step()

    # Checkpoints

    def _save(self) -> None:
        """Write the checkpoint, unless the weights are no good."""
        if self.options.folder is None:
            return
        if self.world > 1:
            distributed.share_buffers(self.rule)
        self._check_weights()
        now = self._random_states()
        if distributed.rank() == 0:
            save(self.options.folder, {
                "run": self._description(), "at": asdict(self.at), "best": self.best,
                "history": [asdict(epoch) for epoch in self.history.epochs],
                "rule": dict(self.rule.state_dict()),
                "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "random_start": self.random_start, "random_now": now})
        self.saved = (self.at.epoch, self.at.step)

    def _resume(self, stored: dict[str, Any]) -> None:
        path = Path(str(self.options.folder)) / FILE
        different = _difference(stored["run"], self._description())
        if different is not None:
            raise CorruptCheckpoint(f"{path} belongs to another training: {different}; give this "
                                    "one another checkpoint=, or delete that folder")
        _set_weights(self.rule, stored["rule"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(stored["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(stored["scheduler"])
        self.at, self.best = _Position(**stored["at"]), stored["best"]
        self.history.epochs = [Epoch(**epoch) for epoch in stored["history"]]
        self.random_start = stored["random_start"]
        set_every_random_state(stored["random_now"][distributed.rank()], self.generators)
        self.saved = (self.at.epoch, self.at.step)

    def _description(self) -> dict[str, Any]:
        """Return what a checkpoint must agree with to be this training's."""
        options, optimizer, data = self.options, self.optimizer, self.train
        return {
            "rule": type(self.rule).__name__,
            "weights": {name: str(value.dtype) if name in self.rule.resized
                        else f"{value.dtype} {tuple(value.shape)}"
                        for name, value in self.rule.state_dict().items()
                        if isinstance(value, Tensor)},
            "optimizer": {"type": type(optimizer).__name__,
                          **{key: repr(value) for key, value in
                             (optimizer.defaults if optimizer else {}).items()
                             if value is not None and value is not False}},
            "optimized parameters": len(_stepped(optimizer)),
            "scheduler": type(self.scheduler).__name__,
            "scheduler_unit": options.scheduler_unit,
            "train": {"type": type(data).__name__, "batches": self.batches,
                      **{key: getattr(data, key) for key in ("batch_size", "seed", "shuffle")
                         if isinstance(getattr(data, key, None), int)}},
            "validation": self.validation is not None, "metric": self.history.metric,
            "patience": options.patience, "accumulate": options.accumulate, "clip": options.clip,
            "autocast": str(options.autocast), "seed": options.seed, "processes": self.world,
            "generators": len(self.generators),
        }

    def _random_states(self) -> list[dict[str, Any]]:
        mine = every_random_state(self.generators)
        return distributed.gather(mine) if self.world > 1 else [mine]

    # What is said where it goes wrong

    def _place(self) -> str:
        return f"epoch {self.at.epoch + 1}, step {self.at.step + 1}"

    def _last_good(self) -> str:
        if self.saved is None:
            return "no checkpoint was kept: checkpoint= keeps one"
        epoch, step = self.saved
        return (f"the last good checkpoint is {Path(str(self.options.folder)) / FILE}, written "
                f"after epoch {epoch}, step {step}")

    def _diverged(self, what: str, x: Any, y: Tensor) -> NoReturn:
        self._clear()
        fault = bad_batch(x, y)
        if fault is not None:
            raise ValueError(f"{what}: {fault}; {self._last_good()}")
        with self._precision():
            where = where_not_finite(self.rule, x)
        raise Diverged(f"{what}: {where}; lower the learning rate, warm it up or set clip=1.0; "
                       f"{self._last_good()}")

    def _check_weights(self) -> None:
        name = weights_not_finite(self.rule)
        if name is not None:
            raise Diverged(f"{name} is not finite after epoch {self.at.epoch}, step "
                           f"{self.at.step}; lower the learning rate, warm it up or set "
                           f"clip=1.0; {self._last_good()}")


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)
                                  or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _learning(rule: Rule) -> list[Parameter]:
    """Return the parameters that a training changes: whole numbers only where the rule does."""
    return [p for p in rule.parameters()
            if p.requires_grad or (rule.updates_weights and not p.is_floating_point())]


def _check_data(name: str, data: Any) -> None:
    if not hasattr(data, "__iter__") or isinstance(data, (Tensor, Mapping)):
        raise ValueError(f"{name} must be an iterable of (x, y) batches, got "
                         f"{type(data).__name__}; use Batches(x, y, batch_size), a DataLoader or "
                         "a list")
    if isinstance(data, Iterator):
        raise ValueError(f"{name} must be something that can be passed over in every epoch, got "
                         f"{type(data).__name__}, which is used up after one; use list(...)")


def _optimizer(rule: Rule, given: Optimizer | Callable[[list[Parameter]], Optimizer] | None,
               accumulate: int) -> Optimizer:
    parameters = [p for p in rule.parameters() if p.requires_grad]
    if given is None:
        return torch.optim.Adam(parameters)
    optimizer = given if isinstance(given, Optimizer) else given(parameters)
    if not isinstance(optimizer, Optimizer):
        raise ValueError("optimizer must be a torch.optim.Optimizer, or a function of the "
                         f"parameters that returns one, got {type(optimizer).__name__}")
    if not {id(p) for p in parameters} & {id(p) for p in _stepped(optimizer)}:
        raise ValueError("optimizer steps none of the rule's parameters; build it from "
                         "rule.parameters()")
    if isinstance(optimizer, torch.optim.LBFGS) and accumulate > 1:
        raise ValueError(f"accumulate={accumulate} cannot be used with LBFGS, which evaluates one "
                         "batch several times; use larger batches")
    return optimizer


def _scheduler(optimizer: Optimizer | None,
               given: LRScheduler | Callable[[Optimizer], LRScheduler] | None,
               validated: bool, options: _Options) -> LRScheduler | None:
    if options.scheduler_unit not in ("epoch", "step"):
        raise ValueError('scheduler_unit must be "epoch" or "step", got '
                         f"{options.scheduler_unit!r}")
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


def _stepped(optimizer: Optimizer | None) -> list[Tensor]:
    groups = optimizer.param_groups if optimizer is not None else []
    return [p for group in groups for p in group["params"]]


def _pairs(data: Data) -> Iterator[tuple[Any, Tensor]]:
    """Begin a pass over `data` now, and return its batches."""
    return map(_pair, iter(data))


def _pair(batch: Any) -> tuple[Any, Tensor]:
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        raise ValueError(f"a batch must be a pair (x, y) whose y is a tensor, got {_shape(batch)}; "
                         "several inputs go into x as a tuple or mapping")
    x, y = batch
    return x, y


def _parts(data: Any) -> list[Any]:
    """Return a loader and those of its parts that decide its order."""
    batch_sampler = getattr(data, "batch_sampler", None)
    parts = [data, getattr(data, "sampler", None), batch_sampler,
             getattr(batch_sampler, "sampler", None), getattr(data, "dataset", None)]
    return list({id(part): part for part in parts if part is not None}.values())


def _generators(owners: Iterable[Any]) -> list[Generator]:
    """Return the generators that are attributes of `owners`, each once."""
    found = [value for owner in owners for value in getattr(owner, "__dict__", {}).values()
             if type(value) is Generator]  # isinstance takes many times as long here
    return list({id(generator): generator for generator in found}.values())


def _targets(y: Tensor) -> int:
    """Return how many targets count in a mean over `y`."""
    return int((y != -100).sum()) if y.dtype == torch.int64 else len(y)


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shape(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_shape, value)) + ")"
    return type(value).__name__


def _set_weights(rule: Rule, stored: dict[str, Any]) -> None:
    state = rule.state_dict()  # holds the modules' versions, which a plain dictionary lacks
    state.update(stored)
    rule.load_state_dict(state)


def _difference(there: Any, here: Any, name: str = "") -> str | None:
    """Return in words the first difference between two nested dictionaries, None if none."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            found = _difference(there.get(key), here.get(key), f"{name}.{key}" if name else key)
            if found is not None:
                return found
        return None
    return None if there == here else f"its {name} is {there}, here it is {here}"


def _writer(folder: str | Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard= needs the package tensorboard; install "
                          "netwright[tensorboard], or leave the argument out") from error
    return SummaryWriter(str(folder), purge_step=first)
