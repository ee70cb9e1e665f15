"""Steps of a recipe: a class or function with arguments set, as text and as plain data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from netwright.catalogue.names import name_of, short_name

__all__ = ["Step"]


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
        words = ", ".join(f"{name}={written(value)}" for name, value in self.arguments.items())
        return f"{self.name}({words})" if words else self.name

    def plain(self) -> dict[str, Any]:
        """Return the step as plain data; a function of one's own is told by where it stands."""
        public = name_of(self.what)
        if public is None:
            return {"function": f"{getattr(self.what, '__module__', '')}:"
                                f"{getattr(self.what, '__qualname__', repr(self.what))}",
                    **({"arguments": plain_value(self.arguments)} if self.arguments else {})}
        return {"name": public,
                **({"arguments": plain_value(self.arguments)} if self.arguments else {})}

    def function(self) -> Callable[..., Any]:
        """Return the class or function with its arguments set, as `functools.partial` does."""
        return partial(self.what, **self.values()) if self.arguments else self.what

    def values(self) -> dict[str, Any]:
        """Return the arguments as Python objects."""
        return {name: _object(value) for name, value in self.arguments.items()}


def step_of(given: Callable[..., Any]) -> Step:
    """Return a class, a function or a `functools.partial` as a step."""
    if isinstance(given, partial) and not given.args:
        inner = step_of(given.func)
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
        return step_of(value)
    return value


def is_plain(value: Any) -> bool:
    """Return whether JSON has a way to write `value`."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and is_plain(entry) for name, entry in value.items())
    return value is None or isinstance(value, (str, int, float, bool))


def plain_value(value: Any) -> Any:
    """Return an argument as plain data, what has none as {"value": how it is called}."""
    if isinstance(value, Step):
        return value.plain()
    if isinstance(value, (list, tuple)):
        return [plain_value(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(name): plain_value(entry) for name, entry in value.items()}
    return value if is_plain(value) else {"value": written(value)}


def written(value: Any) -> str:
    """Return an argument as text."""
    if isinstance(value, Step):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name!r}: {written(entry)}' for name, entry in value.items())}}}"
    if is_plain(value):
        return repr(value).replace("inf", "1e999") if isinstance(value, float) else repr(value)
    return getattr(value, "__name__", type(value).__name__)


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
    return written(value)


def _object(value: Any) -> Any:
    if isinstance(value, Step):
        return value.function()
    if type(value) in (list, tuple):
        return type(value)(map(_object, value))
    if type(value) is dict:
        return {name: _object(entry) for name, entry in value.items()}
    return value
