"""Recipes: what is changed, slot by slot, the same as text, as plain data and in Python."""

import ast
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from torch.nn.modules.loss import _Loss
from torch.optim import Optimizer

from netwright.catalogue.facets import KINDS, facets
from netwright.catalogue.names import locate, name_of, short_name
from netwright.errors import UnknownName
from netwright.rules.rule import Rule

__all__ = ["Recipe", "Step", "recipe"]

SLOTS = {"network": "reshapes, blocks and models, one after another", "rule": "what trains it",
         "objective": "the loss", "optimizer": "what steps", "data": "what is done to a batch"}
SLOT_OF = {"reshape": "network", "block": "network", "model": "network", "generative": "network",
           "rule": "rule", "objective": "objective", "optimizer": "optimizer"}


@dataclass(frozen=True)
class Step:
    """A class or a function, and those of its arguments that are set.

    An argument is plain (None, a number, a string, a list or a mapping of those), a step, which
    stands for a function with arguments set, or any other object that Python code gave.

    >>> from netwright.blocks import GLU
    >>> str(Step(GLU, {"bias": True}))
    'GLU(bias=True)'
    """

    what: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The shortest public name, or what a function of one's own is called."""
        public = name_of(self.what)
        if public is None:
            return getattr(self.what, "__name__", type(self.what).__name__)
        return short_name(public)

    def __str__(self) -> str:
        """Return the step as text."""
        words = ", ".join(f"{name}={_text(value)}" for name, value in self.arguments.items())
        return f"{self.name}({words})" if words else self.name

    def plain(self) -> dict[str, Any]:
        """Return the step as plain data; a function of one's own is told by where it stands."""
        public = name_of(self.what)
        if public is None:
            return {"function": f"{getattr(self.what, '__module__', '')}:"
                                f"{getattr(self.what, '__qualname__', repr(self.what))}",
                    **({"arguments": _plain(self.arguments)} if self.arguments else {})}
        return {"name": public,
                **({"arguments": _plain(self.arguments)} if self.arguments else {})}

    def function(self) -> Callable[..., Any]:
        """Return the class or function with its arguments set, as `functools.partial` does."""
        return partial(self.what, **self.values()) if self.arguments else self.what

    def values(self) -> dict[str, Any]:
        """Return the arguments as Python objects."""
        return {name: _object(value) for name, value in self.arguments.items()}


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
        return recipe(_json(given.read_text(encoding="utf-8"), str(given)))
    if isinstance(given, str) and given.lstrip().startswith("{"):
        return recipe(_json(given, "the recipe"))
    if isinstance(given, Mapping):
        return _of_slots(given)
    return _filled([(_slot(step), step) for step in _steps(given)])


def text_of(data: Mapping[str, Any]) -> str:
    """Return plain data as text, what names functions of one's own included.

    >>> text_of({"network": [{"function": "mine:wider"}], "rule": {"name": "rules.LLS"}})
    'wider + LLS'
    """
    held = [entry if isinstance(entry, list) else [entry] for entry in data.values()]
    return " + ".join(_data_text(step) for steps in held for step in steps) or "Backprop"


def _data_text(value: Any) -> str:
    if isinstance(value, Mapping) and "value" in value:
        return str(value["value"])
    if isinstance(value, Mapping) and ("name" in value or "function" in value):
        name = (short_name(value["name"]) if "name" in value
                else value["function"].rpartition(":")[2].rpartition(".")[2])
        words = ", ".join(f"{key}={_data_text(entry)}"
                          for key, entry in value.get("arguments", {}).items())
        return f"{name}({words})" if words else name
    if isinstance(value, list):
        return f"[{', '.join(map(_data_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_data_text(entry)}' for key, entry in value.items())}}}"
    return _text(value)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} must be JSON, got {text[:60]!r}: {error}") from error


def _steps(given: Any) -> list[Step]:
    if isinstance(given, str):
        return _parsed(given)
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
    return [_step_of(given)]


def _step_of(given: Callable[..., Any]) -> Step:
    """Return a class, a function or a `functools.partial` as a step."""
    if isinstance(given, partial) and not given.args:
        inner = _step_of(given.func)
        set_here = {name: _argument(value) for name, value in given.keywords.items()}
        return Step(inner.what, {**inner.arguments, **set_here})
    return Step(given)


def _argument(value: Any) -> Any:
    """Return an argument with the methods in it as steps."""
    if type(value) in (list, tuple):
        return type(value)(map(_argument, value))
    if type(value) is dict:
        return {name: _argument(entry) for name, entry in value.items()}
    named = value.func if isinstance(value, partial) and not value.args else value
    if callable(named) and name_of(named) is not None:
        return _step_of(value)
    return value


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
        if slot not in SLOTS:
            raise UnknownName("slot of a recipe", str(slot), SLOTS)
        for entry in held if isinstance(held, (list, tuple)) else [held]:
            steps = [_of_data(entry)] if isinstance(entry, Mapping) else _steps(entry)
            found += [(slot, step) for step in steps]
            for step in steps:
                if slot != "data" and name_of(step.what) is not None and _slot(step) != slot:
                    raise ValueError(f"the slot {slot!r} must hold {SLOTS[slot]}, got {step.name}; "
                                     f"put it into {_slot(step)!r}")
    return _filled(sorted(found, key=lambda pair: [*SLOTS].index(pair[0])))


def _of_data(data: Mapping[str, Any]) -> Step:
    if "name" not in data or not {*data} <= {"name", "arguments"}:
        shown = data.get("function")
        if shown is not None:
            raise ValueError(f"{shown} is a function of one's own, of which plain data holds only "
                             "the name; give the function itself, in Python")
        raise ValueError("a step must be a mapping with 'name' and 'arguments', got one with "
                         f"{', '.join(map(repr, data)) or 'nothing'}")
    if not isinstance(data["name"], str) or not isinstance(data.get("arguments", {}), Mapping):
        raise ValueError("a step must have a string as its 'name' and a mapping as its "
                         f"'arguments', got {dict(data)}")
    what = locate(data["name"], "change")
    return _checked(Step(what, {name: _value_of(value)
                                for name, value in data.get("arguments", {}).items()}))


def _value_of(value: Any) -> Any:
    if isinstance(value, Mapping) and ("name" in value or "function" in value):
        return _of_data(value)
    if isinstance(value, Mapping):
        return {name: _value_of(entry) for name, entry in value.items()}
    return [_value_of(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _parsed(text: str) -> list[Step]:
    """Return the steps that a text names, in its order."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"a change must be names with a plus between them, such as "
                         f"'prune_sublayers(remove=2) + MonoForward', got {text!r}: "
                         f"{getattr(error, 'msg', error)}") from error
    return [_node_step(node, text) for node in _summands(tree)]


def _summands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_summands(node.left), *_summands(node.right)]
    return [node]


def _node_step(node: ast.expr, text: str) -> Step:
    if not isinstance(node, ast.Call):
        return Step(locate(_dotted(node, text), "change"))
    name = _dotted(node.func, text)
    what = locate(name, "change")
    if node.args or any(entry.arg is None for entry in node.keywords):
        shown = next((p for p in _parameters(what) if p not in ("network", "model")), "argument")
        raise ValueError(f"the arguments of {name} must be written by name, such as {shown}=..., "
                         f"got {ast.unparse(node)}")
    return _checked(Step(what, {entry.arg: _node_value(entry.value, text)
                                for entry in node.keywords if entry.arg is not None}))


def _dotted(node: ast.expr, text: str) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, text)}.{node.attr}"
    raise ValueError(f"a change must be names with a plus between them, got {ast.unparse(node)!r} "
                     f"in {text!r}")


def _node_value(node: ast.expr, text: str) -> Any:
    if isinstance(node, (ast.Name, ast.Attribute, ast.Call)):
        return _node_step(node, text)
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_node_value(entry, text) for entry in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {ast.literal_eval(key): _node_value(value, text)
                for key, value in zip(node.keys, node.values, strict=True) if key is not None}
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise ValueError(f"an argument must be a number, a string, None, True, False, a list, a "
                         f"mapping or a method's name, got {ast.unparse(node)!r} in {text!r}"
                         ) from error
    if not _is_plain(value):
        raise ValueError(f"an argument must be a number, a string, None, True, False, a list, a "
                         f"mapping or a method's name, got {value!r} in {text!r}")
    return value


def _checked(step: Step) -> Step:
    """Return `step` if what it calls has all the arguments that it sets."""
    known = _parameters(step.what)
    for name in step.arguments:
        if name not in known and "**" not in known:
            raise UnknownName(f"argument of {step.name}", name, known)
    return step


def _parameters(what: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters, with "**" where any name will do."""
    try:
        found = inspect.signature(what).parameters.values()
    except (TypeError, ValueError):
        return ["**"]
    return ["**" if p.kind is p.VAR_KEYWORD else p.name for p in found
            if p.kind is not p.VAR_POSITIONAL]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(entry) for name, entry in value.items())
    return value is None or isinstance(value, (str, int, float, bool))


def _plain(value: Any) -> Any:
    if isinstance(value, Step):
        return value.plain()
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    return value if _is_plain(value) else {"value": _text(value)}


def _text(value: Any) -> str:
    if isinstance(value, Step):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name!r}: {_text(entry)}' for name, entry in value.items())}}}"
    if _is_plain(value):
        return repr(value).replace("inf", "1e999") if isinstance(value, float) else repr(value)
    return getattr(value, "__name__", type(value).__name__)


def _object(value: Any) -> Any:
    if isinstance(value, Step):
        return value.function()
    if type(value) in (list, tuple):
        return type(value)(map(_object, value))
    if type(value) is dict:
        return {name: _object(entry) for name, entry in value.items()}
    return value
