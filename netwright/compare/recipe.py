"""Recipes: what is changed, slot by slot, the same as text, as plain data and in Python."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from torch.nn.modules.loss import _Loss
from torch.optim import Optimizer

from netwright import checks
from netwright.catalogue.facets import KINDS, facets
from netwright.catalogue.names import name_of
from netwright.compare.reading import parsed, step_of_data
from netwright.compare.steps import Step, step_of
from netwright.rules.rule import Rule
from netwright.runtime.written import read_json

__all__ = ["Recipe", "recipe"]

SLOTS = {"network": "reshapes, blocks and models, one after another", "rule": "what trains it",
         "objective": "the loss", "optimizer": "what steps", "data": "what is done to a batch"}
SLOT_OF = {"reshape": "network", "block": "network", "model": "network", "generative": "network",
           "rule": "rule", "objective": "objective", "optimizer": "optimizer"}


@dataclass(frozen=True)
class Recipe:
    """What is changed: the network, by steps in order, the rule, the loss, the optimizer, the data.

    A slot without a step is left as the task has it; without a rule the network trains by
    `Backprop`. `str(recipe)` is what `recipe` reads, and so is `recipe.plain()`.
    """

    network: tuple[Step, ...] = ()
    rule: Step | None = None
    objective: Step | None = None
    optimizer: Step | None = None
    data: tuple[Step, ...] = ()

    def __str__(self) -> str:
        """Return the recipe as text."""
        return " + ".join(str(step) for _, step in self.steps()) or "Backprop"

    def steps(self) -> Iterator[tuple[str, Step]]:
        """Yield each step after the name of its slot, in the order in which they are applied."""
        for slot in SLOTS:
            found = getattr(self, slot)
            for step in found if isinstance(found, tuple) else [found]:
                if step is not None:
                    yield slot, step

    def plain(self) -> dict[str, Any]:
        """Return the recipe as plain data, the slots that hold something.

        >>> recipe("prune_sublayers(remove=2) + MonoForward").plain()["rule"]
        {'name': 'rules.MonoForward'}
        """
        found: dict[str, Any] = {}
        for slot, step in self.steps():
            if isinstance(getattr(self, slot), tuple):
                found.setdefault(slot, []).append(step.plain())
            else:
                found[slot] = step.plain()
        return found


@checks.annotated
def recipe(given: Any) -> Recipe:
    """Return what is written as text, as plain data, as JSON or in Python as a `Recipe`.

    Text is names of methods with a plus between them, each with the arguments that are set:
    `swap_feedforward(make=StructuredFeedForward(rank=64)) + MonoForward`. An argument that is a
    method's name stands for the method. Plain data is a mapping of slots, as `Recipe.plain`
    returns it. In Python a step is a class, a function or a `functools.partial` of one, and a
    recipe a step or a list of steps. A `Path` is a file that holds JSON.

    Raises:
        UnknownName: a method, a slot or an argument has a name that is not known.
        ValueError: `given` is none of these, or cannot be part of a recipe.

    >>> str(recipe("nw.blocks.GLU + rules.MonoForward"))
    'GLU + MonoForward'
    >>> recipe({"rule": {"name": "rules.MonoForward"}}) == recipe("MonoForward")
    True
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, Path):
        return recipe(read_json(given, "a recipe"))
    if isinstance(given, str) and given.lstrip().startswith("{"):
        return recipe(_json(given, "the recipe"))
    if isinstance(given, Mapping):
        return _of_slots(given)
    return _filled([(_slot(step), step) for step in _steps(given)])


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        said = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{where} must be JSON, got {text[:60]!r}: {said}") from error


def _steps(given: Any) -> list[Step]:
    if isinstance(given, str):
        return parsed(given)
    if isinstance(given, (Recipe, Mapping)):
        return [step for _, step in recipe(given).steps()]
    if isinstance(given, (list, tuple)) and given:
        return [step for entry in given for step in _steps(entry)]
    if isinstance(given, Step):
        return [given]
    if isinstance(given, nn.Module) or not callable(given):
        raise ValueError("a change must be a rule's name, a Rule class, a function of a network, "
                         f"or a list of those, got {type(given).__name__}; "
                         "for options use functools.partial")
    return [step_of(given)]


def _slot(step: Step) -> str:
    """Return the slot that a step belongs to."""
    said = facets(step.what)
    if said is not None:
        if said.kind not in SLOT_OF:
            raise ValueError(f"{step.name} is of the kind {said.kind} ({KINDS[said.kind]}), which "
                             f"is no change by itself; a recipe holds {', '.join(SLOT_OF)}")
        return SLOT_OF[said.kind]
    if isinstance(step.what, type):
        for kind, slot in ((Rule, "rule"), (Optimizer, "optimizer"), (_Loss, "objective")):
            if issubclass(step.what, kind):
                return slot
    public = name_of(step.what)
    if public is not None and public.startswith("torch.nn.functional."):
        return "objective"
    if public is not None and not public.startswith("torch."):
        raise ValueError(f"{public} does not say of what kind it is, and a recipe cannot hold it; "
                         f"it holds {', '.join(SLOT_OF)}")
    return "network"


def _filled(found: Sequence[tuple[str, Step]]) -> Recipe:
    slots: dict[str, Any] = {}
    for slot, step in found:
        if isinstance(getattr(Recipe, slot), tuple):
            if slot == "network" and "rule" in slots:
                _refuse_second(slots["rule"])
            slots[slot] = (*slots.get(slot, ()), step)
        elif slot not in slots:
            slots[slot] = step
        elif slot == "rule":
            _refuse_second(slots["rule"])
        else:
            raise ValueError(f"a change must have at most one {slot}, got {slots[slot]} and {step}")
    return Recipe(**slots)


def _refuse_second(rule: Step) -> NoReturn:
    raise ValueError(f"a change must end with its one rule, got {rule} before its end; put "
                     "reshapes first")


def _of_slots(given: Mapping[str, Any]) -> Recipe:
    found: list[tuple[str, Step]] = []
    for slot, held in given.items():
        checks.one_of(SLOTS, slot_of_a_recipe=slot)
        for entry in held if isinstance(held, (list, tuple)) else [held]:
            steps = [step_of_data(entry)] if isinstance(entry, Mapping) else _steps(entry)
            found += [(slot, step) for step in steps]
            for step in steps:
                if slot != "data" and name_of(step.what) is not None and _slot(step) != slot:
                    raise ValueError(f"the slot {slot!r} must hold {SLOTS[slot]}, got {step.name}; "
                                     f"put it into {_slot(step)!r}")
    return _filled(sorted(found, key=lambda pair: [*SLOTS].index(pair[0])))
