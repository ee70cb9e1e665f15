"""What is compared: rules, reshapes, and lists of both, each with what there is to tune."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from netwright import reshape, rules
from netwright.catalogue.facets import searched
from netwright.errors import UnknownName
from netwright.objectives.losses import cross_entropy
from netwright.rules import Backprop, Rule
from netwright.tasks import Task

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = ["Change"]

Step = Callable[..., Any]


@dataclass(frozen=True)
class Change:
    """Reshapes, then a rule, under one label; without a rule the network trains by `Backprop`.

    A step is called with the network, then with what it names among its parameters: `example`,
    `task`, `batch` (x, y), `calibration` (x), `num_classes` or `classes`, `loss`. It returns a
    `Rule`, or the network that the next step gets.
    """

    label: str
    steps: tuple[Step, ...]

    def build(self, network: nn.Module, task: Task, options: Mapping[str, Any]) -> Rule:
        """Return the rule that trains `network` on `task`; `options` are the tuned arguments."""
        for i, step in enumerate(self.steps):
            own = {name: value for name, value in options.items() if name in self._tuned(i)}
            result = step(network, **_supplied(step, task, own))
            if isinstance(result, Rule):
                if i < len(self.steps) - 1:
                    raise ValueError(f"change {self.label!r} must end with its one rule, got "
                                     f"{type(result).__name__} as step {i + 1} of "
                                     f"{len(self.steps)}; put reshapes first")
                return result
            if not isinstance(result, nn.Module):
                raise ValueError(f"change {self.label!r} must give a Rule or a network, got "
                                 f"{type(result).__name__} from {name_of(step)}")
            network = result
        return Backprop(network, loss=task.loss)

    def space(self, task: Task) -> "dict[str, BaseDistribution]":
        """Return what is tuned: the learning rate, and each step's own `search`."""
        centre = task.learning_rate
        found = {"learning_rate": distribution((centre / 10, centre * 10))}
        for i, step in enumerate(self.steps):
            search = searched(_origin(step))
            found |= {name: distribution(search[name]) for name in search
                      if name == "learning_rate" or name in self._tuned(i)}
        return found

    def proposals(self, task: Task, trials: int) -> list[dict[str, Any]]:
        """Return the settings that are tried: the defaults, then points spread over the space.

        The points are an additive recurrence with the generalised golden ratio, so that they are
        the same on every machine, and more trials only add to them.
        """
        space = self.space(task)
        ratio = 1.0
        for _ in range(40):
            ratio = (1 + ratio) ** (1 / (len(space) + 1))
        first = {name: _within(kind, self._default(name, task)) for name, kind in space.items()}
        others = [{name: _at(kind, (0.5 + k * ratio ** -(j + 1)) % 1)
                   for j, (name, kind) in enumerate(space.items())} for k in range(1, trials)]
        return [first, *others][:max(trials, 1)]

    def _default(self, name: str, task: Task) -> Any:
        if name == "learning_rate":
            return task.learning_rate
        for step in self.steps:
            if name in _parameters(step):
                return _parameters(step)[name].default
        return None

    def _tuned(self, i: int) -> set[str]:
        """Return the names that step `i` has in its `search` and nobody has set already."""
        step = self.steps[i]
        fixed = step.keywords if isinstance(step, partial) else {}
        return {name for name in searched(_origin(step))
                if name in _parameters(step) and name not in fixed}


def changes(given: Any) -> list[Change]:
    """Return the changes that a user named: one, a list, or a mapping of label to change.

    A change is the name of a rule or a reshape ("A+B" for both), a class, a function, or a list
    of those.

    Raises:
        UnknownName: a name is not known.
        ValueError: something is no change, or two changes have the same label.

    >>> [change.label for change in changes(["Backprop", rules.Backprop, [rules.Backprop]][:1])]
    ['Backprop']
    """
    if isinstance(given, Mapping):
        found = [Change(str(label), _steps(change)) for label, change in given.items()]
    else:
        several = given if isinstance(given, (list, tuple)) else [given]
        found = [_labelled(_steps(change)) for change in several]
    if not found:
        raise ValueError("changes must hold at least one change, got none; try ['Backprop']")
    for change in found:
        for step in change.steps[:-1]:
            origin = _origin(step)
            if isinstance(origin, type) and issubclass(origin, Rule):
                raise ValueError(f"change {change.label!r} must end with its one rule, got "
                                 f"{name_of(step)} before its end; put reshapes first")
    labels = [change.label for change in found]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"changes must have labels of their own, got {label!r} "
                             f"{labels.count(label)} times; pass a mapping of label to change")
        if "/" in label:
            raise ValueError(f"a change's label must have no slash, got {label!r}")
    return found


def known() -> dict[str, Step]:
    """Return the rules and reshapes that have a name."""
    named: dict[str, Step] = {name: getattr(rules, name) for name in rules.__all__
                              if name != "Rule" and isinstance(getattr(rules, name), type)}
    return named | {name: getattr(reshape, name) for name in getattr(reshape, "__all__", ())}


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


def name_of(step: Any) -> str:
    """Return how a step is called in a label.

    >>> name_of(partial(rules.Backprop, loss="own"))
    "Backprop(loss='own')"
    """
    if isinstance(step, partial):
        words = [*map(_short, step.args),
                 *(f"{key}={_short(value)}" for key, value in step.keywords.items())]
        return f"{name_of(step.func)}({', '.join(words)})"
    return getattr(step, "__name__", type(step).__name__)


def _short(value: Any) -> str:
    simple = value is None or isinstance(value, (str, int, float, bool))
    return repr(value) if simple else name_of(value)


def _labelled(steps: tuple[Step, ...]) -> Change:
    label = " + ".join(map(name_of, steps))
    return Change(label.replace("/", "|"), steps)


def _steps(given: Any) -> tuple[Step, ...]:
    if isinstance(given, str):
        named = known()
        steps = [name.strip() for name in given.split("+")]
        for name in steps:
            if name not in named:
                raise UnknownName("change", name, named)
        return tuple(named[name] for name in steps)
    if isinstance(given, (list, tuple)) and given:
        return tuple(step for entry in given for step in _steps(entry))
    if isinstance(given, nn.Module) or not callable(given):
        raise ValueError("a change must be a rule's name, a Rule class, a function of a network, "
                         f"or a list of those, got {type(given).__name__}; "
                         "for options use functools.partial")
    return (given,)


def _supplied(step: Step, task: Task, options: Mapping[str, Any]) -> dict[str, Any]:
    parameters = _parameters(step)
    fixed = step.keywords if isinstance(step, partial) else {}
    supply: dict[str, Callable[[], Any]] = {
        "example": lambda: task.first, "task": lambda: task, "batch": lambda: task.batch,
        "calibration": lambda: task.batch[0], "num_classes": lambda: task.classes,
        "classes": lambda: task.classes, "loss": lambda: task.loss,
        **{name: partial(_same, value) for name, value in options.items()},
    }
    if task.loss is cross_entropy:
        del supply["loss"]  # a rule's own default may be a loss that the method asks for
    free = {name: p for name, p in parameters.items() if name not in fixed}
    unknown = [name for name, p in free.items() if p.default is p.empty and name not in supply]
    if len(unknown) == 2:  # (network, example, task), whatever they are called
        supply |= dict(zip(unknown, (supply["example"], supply["task"]), strict=True))
    elif unknown:
        raise ValueError(f"{name_of(step)} needs {', '.join(unknown)}, which a comparison does not "
                         "know; set it with functools.partial")
    return {name: make() for name, make in supply.items() if name in free}


def _same(value: Any) -> Any:
    return value


def _parameters(step: Step) -> Mapping[str, inspect.Parameter]:
    """Return a step's parameters but the first, which is the network."""
    try:
        parameters: Sequence[inspect.Parameter] = [*inspect.signature(step).parameters.values()]
    except (TypeError, ValueError):
        return {}
    return {p.name: p for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD,
                                                            p.KEYWORD_ONLY)}


def _origin(step: Step) -> Step:
    return _origin(step.func) if isinstance(step, partial) else step


def _at(kind: Any, place: float) -> Any:
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
    return value if number and kind.low <= value <= kind.high else _at(kind, 0.5)
