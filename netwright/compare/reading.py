"""Steps of a recipe read from text and from plain data; nothing is run by reading."""

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from netwright.catalogue.names import locate
from netwright.compare.steps import Step, is_plain
from netwright.errors import UnknownName


def parsed(text: str) -> list[Step]:
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
    if not is_plain(value):
        raise ValueError(f"an argument must be a number, a string, None, True, False, a list, a "
                         f"mapping or a method's name, got {value!r} in {text!r}")
    return value


def step_of_data(data: Mapping[str, Any]) -> Step:
    """Return the step that a mapping of its name and its arguments tells."""
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
        return step_of_data(value)
    if isinstance(value, Mapping):
        return {name: _value_of(entry) for name, entry in value.items()}
    return [_value_of(entry) for entry in value] if isinstance(value, (list, tuple)) else value


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
