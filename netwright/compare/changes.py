"""What is compared: recipes under labels, what there is to tune, and how they are carried out."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from inspect import Parameter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netwright import checks
from netwright.catalogue.facets import facets, searched
from netwright.compare.places import check_whole, put
from netwright.compare.recipe import Recipe, recipe
from netwright.compare.steps import Step
from netwright.compare.supplies import offers, parameters, sizes, supplied
from netwright.rules import Backprop, Rule
from netwright.stages import call
from netwright.tasks import Task

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = ["Change", "changes"]

RATE = "learning_rate"
Place = tuple[int | str, ...]


@dataclass(frozen=True)
class Tuned:
    """An argument that is tuned: where its step stands, and how the settings call it."""

    key: str
    place: Place
    name: str
    kind: "BaseDistribution"
    default: Any
    required: bool


@dataclass(frozen=True)
class Change:
    """A recipe under a label.

    What a step takes beside the network is supplied by the names of its parameters: `example`,
    `task`, `batch` (x, y), `calibration` (x), `num_classes` or `classes`, `loss`.
    """

    label: str
    recipe: Recipe

    def task(self, task: Task) -> Task:
        """Return `task` with the loss, the optimizer and the batches that the recipe names."""
        if self.recipe.objective is not None:
            task = replace(task, loss=_loss(self.recipe.objective))
        if self.recipe.optimizer is not None:
            task = replace(task, optimizer=partial(_optimizer, self.recipe.optimizer))
        return task

    def build(self, network: nn.Module, task: Task, options: Mapping[str, Any]) -> Rule:
        """Return the rule that trains `network` on `task`; `options` are the tuned arguments."""
        task, carried_out = self.task(task), self.set(options)
        if carried_out.objective is not None:
            _check_objective(carried_out.objective, network, task)
        changed = self.change(network, task, options)
        if isinstance(changed, Rule):
            return changed
        if carried_out.rule is None:
            return Backprop(changed, loss=task.loss)
        if carried_out.objective is not None and "loss" not in parameters(carried_out.rule.what):
            raise ValueError(f"{carried_out.rule.name} has a loss of its own; leave out "
                             f"{carried_out.objective.name}")
        rule: Rule = carried_out.rule.what(changed, **supplied(carried_out.rule, offers(task)))
        return rule

    def change(self, network: nn.Module, task: Task, options: Mapping[str, Any]) -> nn.Module:
        """Return what the recipe makes of `network`, a rule where its last step gives one."""
        carried_out = self.set(options)
        for step in carried_out.network:
            result = _changed(network, step, task)
            if not isinstance(result, nn.Module):
                raise ValueError(f"change {self.label!r} must give a Rule or a network, got "
                                 f"{type(result).__name__} from {step.name}")
            if isinstance(result, Rule) and (step is not carried_out.network[-1]
                                             or carried_out.rule is not None):
                raise ValueError(f"change {self.label!r} must end with its one rule, got "
                                 f"{type(result).__name__} from {step.name} before its end; put "
                                 "reshapes first")
            network = result
        return network

    def batch(self, x: Any, y: Tensor) -> tuple[Any, Tensor]:
        """Return what the recipe makes of a batch of training samples."""
        for step in self.recipe.data:
            x, y = step.what(x, y, **step.values())
        return x, y

    def set(self, options: Mapping[str, Any]) -> Recipe:
        """Return the recipe with the tuned arguments set; what has no default is always set."""
        tuned = self.tuned()
        slots: dict[str, Any] = {}
        for place, (slot, step) in enumerate(self.recipe.steps()):
            done = _set(step, (place,), tuned, options)
            many = isinstance(getattr(self.recipe, slot), tuple)
            slots[slot] = (*slots.get(slot, ()), done) if many else done
        return Recipe(**slots)

    def tuned(self) -> list[Tuned]:
        """Return the arguments that a method's `search` names and nobody has set already.

        Where several steps tune an argument of one name, each is called by its step as well.
        """
        found = [entry for place, (_, step) in enumerate(self.recipe.steps())
                 for entry in _tuned(step, (place,))]
        names = [entry.name for entry in found]
        return [entry if names.count(entry.name) == 1 or entry.name == RATE else
                replace(entry, key=f"{'.'.join(map(str, entry.place))}.{entry.name}")
                for entry in found]

    def space(self, task: Task) -> "dict[str, BaseDistribution]":
        """Return what is tuned: the learning rate, and each step's own `search`."""
        found = {}
        centre = self.rate(task)
        if centre is not None:
            found[RATE] = distribution((centre / 10, centre * 10))
            for _, step in self.recipe.steps():
                given = searched(step.what)
                for name in (RATE, "lr") if step is self.recipe.optimizer else (RATE,):
                    if name in given:
                        found[RATE] = distribution(given[name])
        return found | {entry.key: entry.kind for entry in self.tuned() if entry.name != RATE}

    def proposals(self, task: Task, trials: int) -> list[dict[str, Any]]:
        """Return the settings that are tried: the defaults, then points spread over the space.

        The points are an additive recurrence with the generalised golden ratio, so that they are
        the same on every machine, and more trials only add to them.
        """
        space = self.space(task)
        ratio = 1.0
        for _ in range(40):
            ratio = (1 + ratio) ** (1 / (len(space) + 1))
        defaults = {RATE: self.rate(task)} | {entry.key: entry.default for entry in self.tuned()
                                               if entry.name != RATE}
        first = {name: _within(kind, defaults[name]) for name, kind in space.items()}
        others = [{name: point_at(kind, (0.5 + k * ratio ** -(j + 1)) % 1)
                   for j, (name, kind) in enumerate(space.items())} for k in range(1, trials)]
        return [first, *others][:max(trials, 1)]

    def rate(self, task: Task) -> float | None:
        """Return where the learning rate's tuning starts, None where it is not tuned."""
        if self.recipe.optimizer is None:
            return task.learning_rate
        rate = parameters(self.recipe.optimizer.what).get("lr")
        if rate is None or "lr" in self.recipe.optimizer.arguments:
            return None
        return rate.default if isinstance(rate.default, float) else task.learning_rate


@checks.annotated
def changes(given: Any) -> list[Change]:
    """Return the changes that a user named: one, a list, or a mapping of label to change.

    A change is what `recipe` reads.

    Raises:
        UnknownName: a name is not known.
        ValueError: something is no change, or two changes have the same label.

    >>> [change.label for change in changes(["Backprop", "prune_sublayers(remove=2) + LLS"])]
    ['Backprop', 'prune_sublayers(remove=2) + LLS']
    """
    if isinstance(given, Mapping):
        found = [Change(str(label), recipe(change)) for label, change in given.items()]
    else:
        several = given if isinstance(given, (list, tuple)) else [given]
        recipes = [recipe(change) for change in several]
        found = [Change(str(one).replace("/", "|"), one) for one in recipes]
    if not found:
        raise ValueError("changes must hold at least one change, got none; try ['Backprop']")
    labels = [change.label for change in found]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"changes must have labels of their own, got {label!r} "
                             f"{labels.count(label)} times; pass a mapping of label to change")
        if "/" in label:
            raise ValueError(f"a change's label must have no slash, got {label!r}")
    return found


def distribution(values: Any) -> "BaseDistribution":
    """Return the distribution for (low, high), a list of choices, or an Optuna distribution.

    A range of floats that spans a factor of ten or more is searched on a logarithmic scale.

    >>> distribution((1e-4, 1e-2)).log, distribution((1, 8)).high, distribution(["a", "b"]).choices
    (True, 8, ('a', 'b'))
    """
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )
    if isinstance(values, BaseDistribution):
        return values
    if isinstance(values, list):
        return CategoricalDistribution(values)
    low, high = values
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=low > 0 and high >= 10 * low)


def _changed(network: nn.Module, step: Step, task: Task) -> Any:
    """Return what a step of the slot "network" makes of `network`."""
    said = facets(step.what)
    kind = "function" if said is None else said.kind
    if kind == "model":
        check_whole(network, step, task)
        made = step.what(**supplied(step, sizes(task), skip=0))
        if not isinstance(made, nn.Module):
            raise ValueError(f"{step.name} cannot run on task {task.name!r} because it is no "
                             "network of PyTorch's but has a fit and a predict of its own; call "
                             "those")
        return made
    if kind in ("block", "generative"):
        return put(network, step, task)
    return step.what(network, **supplied(step, offers(task)))


def _loss(step: Step) -> Any:
    if isinstance(step.what, type):
        return step.what(**step.values())
    needed = [name for name, p in [*parameters(step.what).items()][2:]
              if p.default is p.empty and name not in step.arguments]
    if needed:
        raise ValueError(f"{step.name} needs {', '.join(needed)} beside scores and targets, which "
                         "a comparison does not know")
    return step.function()


def _check_objective(step: Step, network: nn.Module, task: Task) -> None:
    x, y = task.batch
    with torch.no_grad():
        scores = call(network, x)
    value = task.loss(scores.requires_grad_(), y)
    if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
        raise ValueError(f"{step.name} gives no number with a gradient, such as a loss is; make it "
                         "the metric of a task")


def _optimizer(step: Step, given: Iterable[nn.Parameter], lr: float) -> Optimizer:
    optimizer: Optimizer = step.what(given, **supplied(step, {"lr": lambda: lr}))
    return optimizer


def _tuned(step: Step, place: Place) -> list[Tuned]:
    known = parameters(step.what)
    found = [Tuned(name, place, name, distribution(values), known[name].default,
                   known[name].default is Parameter.empty)
             for name, values in searched(step.what).items()
             if name in known and name not in step.arguments]
    for name, value in step.arguments.items():
        if isinstance(value, Step):
            found += _tuned(value, (*place, name))
    return found


def _set(step: Step, place: Place, tuned: Iterable[Tuned], options: Mapping[str, Any]) -> Step:
    inner = {name: _set(value, (*place, name), tuned, options) if isinstance(value, Step) else value
             for name, value in step.arguments.items()}
    for entry in tuned:
        if entry.place == place and entry.key in options:
            inner[entry.name] = options[entry.key]
        elif entry.place == place and entry.required:
            inner[entry.name] = _within(entry.kind, None)
    return Step(step.what, inner)


def point_at(kind: Any, place: float) -> Any:
    """Return the value of distribution `kind` at `place` of 0..1."""
    if hasattr(kind, "choices"):
        return kind.choices[int(place * len(kind.choices))]
    if isinstance(kind.low, int):
        step = kind.step or 1
        return kind.low + step * int(place * ((kind.high - kind.low) // step + 1))
    if kind.log:
        return float(kind.low * (kind.high / kind.low) ** place)
    value = kind.low + place * (kind.high - kind.low)
    if kind.step:
        value = kind.low + kind.step * round((value - kind.low) / kind.step)
    return min(float(value), kind.high)


def _within(kind: Any, value: Any) -> Any:
    """Return `value` where `kind` contains it, else the middle."""
    if hasattr(kind, "choices"):
        return value if value in kind.choices else kind.choices[0]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if number and kind.low <= value <= kind.high else point_at(kind, 0.5)
