"""Tasks that changes are compared on: the built-in ones, and a user's own from a file."""

import hashlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import mse_loss
from torch.optim import Adam, Optimizer

from netwright import checks, data, models
from netwright.blocks.mixing.mlp_mixer import MLPMixer
from netwright.data.batches import Batches
from netwright.errors import BadTaskFile, NetwrightError, UnknownName
from netwright.objectives.losses import cross_entropy
from netwright.objectives.metrics import accuracy, mean_over_targets
from netwright.runtime.modes import evaluating
from netwright.runtime.random_state import same_random_state
from netwright.signals import mapped
from netwright.stages import call
from netwright.tasks import densities, forecasts

__all__ = ["TASKS", "Parts", "Task", "load_tasks", "task"]

Loader = Iterable[tuple[Any, Tensor]]


class Parts(NamedTuple):
    """Batches for training, for choosing hyperparameters and for the final score.

    Each is a list, a `DataLoader` or anything else that can be gone through again and again.
    """

    train: Loader
    validation: Loader
    test: Loader


@mean_over_targets
def bits_per_character(scores: Tensor, y: Tensor) -> float:
    """Return the cross-entropy of the next character in bits; targets of -100 do not count.

    >>> round(bits_per_character(torch.zeros(2, 5, 8), torch.zeros(2, 5, dtype=torch.long)), 3)
    3.0
    """
    return float(cross_entropy(scores, y)) / math.log(2)


METRICS: Mapping[str, tuple[Callable[[Tensor, Tensor], float | Tensor], bool]] = {
    "accuracy": (accuracy, True),
    "bits per character": (bits_per_character, False),
    "mean squared error": (mse_loss, False),
    "nats": (densities.negative_log_likelihood, False),
}


@checks.annotated
@dataclass(frozen=True)
class Task:
    """What changes are compared on: a network builder, data, a loss and a metric.

    Args:
        name: what results call it.
        network: a function without arguments that returns a fresh network.
        data: a function without arguments or what it would return: a `Split` (or any four tensors
            x_train, y_train, x_test, y_test), a `Graph`, or `Parts`.
        loss: of scores and targets.
        metric: a name of `METRICS`, or a function of all predictions and targets of a set, or an
            object with `update`, `compute` and `reset`.
        higher_is_better: whether more of `metric` is better; needed where it is a function.
        epochs: of each run.
        batch_size: in training.
        learning_rate: where tuning starts.
        optimizer: takes parameters and `lr`.
        validation: the share of a split's training samples that is set aside while
            hyperparameters are tuned, and used for training afterwards.
        num_classes: found where it is not given.
        example: an input, found where it is not given.
        file: the file that defines the task, where one does.

    Raises:
        ValueError: an argument is not what it must be.
        UnknownName: `metric` is a name that is not known.

    >>> task = Task("small", network=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    ...             data=data.digits, epochs=2)
    >>> task.classes, tuple(task.first.shape)
    (10, (2, 1, 8, 8))
    """

    name: str
    network: Callable[[], nn.Module]
    data: Any
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    metric: str | Callable[[Tensor, Tensor], float | Tensor] = "accuracy"
    higher_is_better: bool | None = None
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    optimizer: Callable[..., Optimizer] = Adam
    validation: float = 0.2
    num_classes: int | None = None
    example: Any = None
    file: Path | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or "/" in self.name:
            raise ValueError(f"name must be a few words without a slash, got {self.name!r}")
        if isinstance(self.network, nn.Module) or not callable(self.network):
            raise ValueError(f"network must be a function that builds a fresh network, got "
                             f"{type(self.network).__name__}; use network=lambda: "
                             "nn.Sequential(...)")
        if isinstance(self.metric, str) and self.metric not in METRICS:
            raise UnknownName("metric", self.metric, METRICS)
        if not isinstance(self.metric, str) and self.higher_is_better is None:
            raise ValueError("higher_is_better must be given with a metric of your own; use "
                             "higher_is_better=True where more is better")
        checks.count(1, epochs=self.epochs, batch_size=self.batch_size)
        checks.above(0, learning_rate=self.learning_rate, advice="try 1e-3")
        checks.between(0, 1, ends=(False, False), validation=self.validation,
                       advice="it is a share of the training samples; try 0.2")
        for name in ("loss", "optimizer", *(() if isinstance(self.metric, str) else ("metric",))):
            if not callable(getattr(self, name)):
                raise ValueError(f"{name} must be a function, got "
                                 f"{type(getattr(self, name)).__name__}")

    def __reduce__(self) -> Any:
        # A task from a file is found again by reading the file, in another process as well.
        if self.file is not None:
            return _from_file, (self.file, self.name, self.epochs)
        return Task, tuple(getattr(self, part.name) for part in fields(self))

    @property
    def metric_name(self) -> str:
        """The metric's name."""
        return self.metric if isinstance(self.metric, str) else _name(self.metric)

    @property
    def score(self) -> Callable[[Tensor, Tensor], float | Tensor]:
        """The metric's function."""
        return METRICS[self.metric][0] if isinstance(self.metric, str) else self.metric

    @property
    def maximize(self) -> bool:
        """Whether a higher score is a better one."""
        if self.higher_is_better is not None:
            return self.higher_is_better
        return METRICS[self.metric][1] if isinstance(self.metric, str) else True

    @property
    def first(self) -> Any:
        """An input: `example`, or the first two training samples, or the first batch as it is."""
        if self.example is not None:
            return self.example
        if isinstance(self.loaded, data.Split):
            return _part(self.loaded.x_train, slice(2))
        return next(iter(self.parts(0).train))[0]

    @property
    def classes(self) -> int:
        """The number of classes: `num_classes`, or the last axis of what the network returns."""
        if self.num_classes is not None:
            return self.num_classes
        with same_random_state(), torch.no_grad():
            network = self.network()
            with evaluating(network):
                return call(network, self.first).shape[-1]

    @property
    def batch(self) -> tuple[Any, Tensor]:
        """The batch that costs and alignments are measured on."""
        loaded = self.loaded
        if isinstance(loaded, data.Split):
            index = slice(self.batch_size)
            return _part(loaded.x_train, index), loaded.y_train[index]
        return next(iter(self.parts(0).train))

    def parts(self, seed: int, *, tuning: bool = False) -> Parts:
        """Return the batches of one run; a split sets its validation share aside for `tuning`.

        The share is the same for every seed and every change.
        """
        loaded = self.loaded
        if isinstance(loaded, Parts):
            return loaded
        if isinstance(loaded, data.Graph):
            return Parts(*(loaded.batches(part) for part in ("train", "validation", "test")))
        x, y = loaded.x_train, loaded.y_train
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        held = max(1, round(len(y) * self.validation))
        aside = self._batches(_part(x, order[:held]), y[order[:held]])
        if tuning:
            x, y = _part(x, order[held:]), y[order[held:]]
        return Parts(Batches(x, y, self.batch_size, seed=seed), aside,
                     self._batches(loaded.x_test, loaded.y_test))

    def optimize(self, parameters: list[Parameter], learning_rate: float) -> Optimizer:
        """Return the optimizer of one run."""
        return self.optimizer(parameters, lr=learning_rate)

    @property
    def loaded(self) -> Any:
        """The data: a `Split`, a `Graph` or `Parts`. A function is called once in a process."""
        return _load(self.data, self.name)

    def _batches(self, x: Any, y: Tensor) -> Batches:
        return Batches(x, y, max(self.batch_size, 256), shuffle=False)


@checks.annotated
def task(name: str) -> Task:
    """Return the built-in task called `name`; raise UnknownName with the nearest names.

    >>> task("digits-mlp").metric_name
    'accuracy'
    """
    checks.one_of(TASKS, task=name)
    return TASKS[name]


@checks.annotated
def load_tasks(path: str | Path) -> list[Task]:
    """Return the tasks that a Python file defines, as `Task` objects or by a function `task()`.

    Raises:
        BadTaskFile: there is no such file, it raises, or it defines no task.
    """
    path = Path(path).resolve()
    module = _module(path)
    found = [value for value in vars(module).values() if isinstance(value, Task)]
    builder = getattr(module, "task", None)
    if inspect.isfunction(builder) and builder.__module__ == module.__name__:
        made = _guarded(path, builder)
        found += [entry for entry in (made if isinstance(made, (list, tuple)) else [made])
                  if isinstance(entry, Task)]
    named = {entry.name: replace(entry, file=path) for entry in found}
    for name in named:
        if len({id(entry) for entry in found if entry.name == name}) > 1:
            raise BadTaskFile(f"{path} defines two tasks called {name!r}; give each a name of its "
                              "own")
    if not named:
        raise BadTaskFile(f"{path} defines no task; write task = nw.Task('my task', "
                          "network=..., data=...), or a function task() that returns one")
    return list(named.values())


def _from_file(path: Path, name: str, epochs: int) -> Task:
    found = next(entry for entry in load_tasks(path) if entry.name == name)
    return replace(found, epochs=epochs)


def _module(path: Path) -> ModuleType:
    if not path.is_file():
        raise BadTaskFile(f"{path} does not exist; give the path of a Python file that defines a "
                          f"nw.Task, or one of the tasks {', '.join(sorted(TASKS))}")
    name = f"netwright_task_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadTaskFile(f"{path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # Where pickle, dataclasses and inspect look a module's classes and functions up.
    sys.modules[name] = module
    _guarded(path, partial(spec.loader.exec_module, module))
    return module


def _guarded(path: Path, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, GeneratorExit and others' own kinds too
        if isinstance(error, SyntaxError) and error.filename == str(path):
            line: int | None = error.lineno
        else:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__)
                      if Path(frame.filename) == path]
            line = frames[-1].lineno if frames else None
        where = f"{path}, line {line}" if line else f"{path}"
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        raise BadTaskFile(f"{where} raised {type(error).__name__}: {message}; mend the file, "
                          f"then try it with python {path.name}") from error


_cache: dict[int, tuple[Any, Any]] = {}


def _load(source: Any, name: str) -> Any:
    if not callable(source):
        return _checked(source, name)
    if id(source) not in _cache:
        try:
            made = source()
        except NetwrightError:
            raise
        except Exception as error:
            raise ValueError(f"data of task {name!r} raised {type(error).__name__}: {error}; try "
                             "it alone") from error
        _cache[id(source)] = source, _checked(made, name)
    return _cache[id(source)][1]


def _checked(loaded: Any, name: str) -> Any:
    if isinstance(loaded, (Parts, data.Graph, data.Split)):
        return loaded
    if isinstance(loaded, (tuple, list)) and len(loaded) == 4:
        return data.Split(*loaded)
    if isinstance(loaded, (tuple, list)) and len(loaded) == 3:
        return Parts(*loaded)
    kind = f"{type(loaded).__name__} of {len(loaded)}" if isinstance(loaded, (tuple, list)) else \
        type(loaded).__name__
    raise ValueError(f"data of task {name!r} must be (x_train, y_train, x_test, y_test), a Graph "
                     f"or Parts(train, validation, test), got {kind}")


def _part(x: Any, index: slice | Tensor) -> Any:
    return mapped(x, lambda t: t[index])


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__).replace("_", " ")


def _pydoc_windows() -> data.Split:
    return data.characters(data.pydoc_text()[:200_000], context=64)


def _shakespeare_windows() -> data.Split:
    return data.characters(data.tinyshakespeare(), context=64)


_gpt = partial(models.gpt, len(data.CHARACTERS), 64)

TASKS: Mapping[str, Task] = {entry.name: entry for entry in [
    Task("digits-mlp", partial(models.mlp, 64, 10), data.digits, epochs=15,
         learning_rate=2e-3, num_classes=10),
    Task("digits-cnn", partial(models.cnn, 1, (8, 8), 10), data.digits, epochs=15,
         learning_rate=2e-3, num_classes=10),
    Task("digits-linear", partial(models.mlp, 64, 10, hidden=()), data.digits, epochs=15,
         learning_rate=2e-3, num_classes=10),
    Task("digits-transformer", partial(models.patch_transformer, 1, (8, 8), 10, patch=2, depth=2),
         data.digits, epochs=15, learning_rate=2e-3, num_classes=10),
    Task("digits-mixer", partial(MLPMixer, 1, (8, 8), 10, patch=2, depth=2), data.digits,
         epochs=15, learning_rate=2e-3, num_classes=10),
    Task("moons-flow", densities.points_flow, densities.moons,
         loss=densities.negative_log_likelihood, metric="nats", epochs=15, learning_rate=2e-3,
         num_classes=1),
    Task("digits-flow", densities.images_flow, densities.smooth_digits,
         loss=densities.negative_log_likelihood, metric="nats", epochs=15, learning_rate=2e-3,
         num_classes=1),
    Task("waves-gru", forecasts.Forecaster, forecasts.waves, loss=mse_loss,
         metric="mean squared error", epochs=15, learning_rate=5e-3,
         num_classes=forecasts.HORIZON),
    Task("mnist1d-cnn", partial(models.cnn, 1, (40,), 10, widths=(25, 25, 25), kernel=5),
         data.mnist1d, epochs=30, batch_size=100, num_classes=10),
    Task("char-gpt", _gpt, _pydoc_windows, metric="bits per character", epochs=4, batch_size=32,
         num_classes=len(data.CHARACTERS)),
    Task("karate-gcn", partial(models.gcn, 34, 2), data.karate, epochs=100, learning_rate=1e-2,
         num_classes=2),
    Task("cora-gcn", partial(models.gcn, 1433, 7), data.cora, epochs=100, learning_rate=1e-2,
         optimizer=partial(Adam, weight_decay=5e-4), num_classes=7),
    Task("mnist-mlp", partial(models.mlp, 784, 10, hidden=(512, 512)), data.mnist, epochs=5,
         batch_size=128, num_classes=10),
    Task("mnist-cnn", partial(models.cnn, 1, (28, 28), 10), data.mnist, epochs=3, batch_size=128,
         num_classes=10),
    Task("cifar10-mlp", partial(models.mlp, 3072, 10, hidden=(512, 512)), data.cifar10, epochs=10,
         batch_size=128, num_classes=10),
    Task("cifar10-cnn", partial(models.cnn, 3, (32, 32), 10, widths=(32, 64, 128), norm=True),
         data.cifar10, epochs=10, batch_size=128, num_classes=10),
    Task("tinyshakespeare-gpt", _gpt, _shakespeare_windows, metric="bits per character",
         epochs=3, batch_size=32, num_classes=len(data.CHARACTERS)),
]}
