"""Checks of arguments, which name the argument, what it was and what it must be.

Each takes the arguments by their names, `count(1, width=width, depth=depth)`, and raises ValueError
for the first that does not do. `optional` lets None pass; `advice` is added to the message.
`annotated` does so for what annotations say already, of every argument.
"""

import cmath
import inspect
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, wraps
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor

from netwright.errors import UnknownName

F = TypeVar("F")
Check = Callable[[Any], bool]
MOST = 2**63  # where a number no longer fits into what tensors count with


def annotated(public: F) -> F:
    """Return a function or a class that refuses arguments which are not what it says they are.

    The annotations of its arguments say so; a number must be finite, a whole one below 2**63,
    unless it is the default. Nothing has happened when it raises.

    >>> @annotated
    ... def area(width: float, *, sides: int = 4) -> float:
    ...     return width * sides
    >>> area(2.0, sides=2.5)
    Traceback (most recent call last):
        ...
    ValueError: sides must be a whole number, got 2.5
    """
    if isinstance(public, type):
        if "__init__" in vars(public):
            public.__init__ = _guarded(public.__init__)  # type: ignore[misc]
        return public
    if inspect.isfunction(public) and not inspect.isgeneratorfunction(public):
        return _guarded(public)  # type: ignore[return-value]
    return public


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    refuse = _Arguments(function)
    compiling = torch.compiler.is_compiling

    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiling():
            refuse(args, kwargs)
        return function(*args, **kwargs)
    # Its globals are the function's own: by them doctest knows where a function is from.
    own = types.FunctionType(call.__code__, getattr(function, "__globals__", globals()),
                             closure=call.__closure__)
    own.__kwdefaults__ = call.__kwdefaults__
    guarded = wraps(function)(own)
    guarded.__bare__ = function  # type: ignore[attr-defined]
    return guarded


class _Arguments:
    """What the arguments of a function must be; read when it is first called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.known: dict[str, tuple[Any, Any]] | None = None
        self.names: list[str] = []
        self.own = _checked_by(function)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.known is None:
            self.names, self.known = self._read()
        for name, value in (*zip(self.names, args, strict=False), *kwargs.items()):
            kind, default = self.known.get(name, (Any, None))
            if kind is not Any and value is not default:
                left = name in self.own and _is_odd(value) and _is_numeric(kind)
                must = "" if left else _unfit(name, value, kind)
                if must:
                    raise ValueError(must)

    def _read(self) -> tuple[list[str], dict[str, tuple[Any, Any]]]:
        found = inspect.signature(self.function).parameters
        scope = getattr(inspect.unwrap(self.function), "__globals__", {})
        known = {name: (_kind(p.annotation, scope), p.default) for name, p in found.items()
                 if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        places = [name for name, p in found.items()
                  if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        return places, known


def _checked_by(function: Callable[..., Any]) -> set[str]:
    """Return the arguments that a function checks itself, and can say more of when they are odd.

    Those are the ones that it gives by name to a check, or begins a message with.
    """
    code = inspect.unwrap(function).__code__
    given = [each for each in code.co_consts if isinstance(each, tuple)]
    said = " ".join(each for each in code.co_consts if isinstance(each, str))
    by_name = {name for each in given for name in each} if "checks" in code.co_names else set()
    places = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]
    return {name for name in places if name in by_name or f"{name} must" in said}


def _is_odd(value: Any) -> bool:
    """Return whether a value is a number that few arguments take: not finite, or not whole."""
    return isinstance(value, float) and not value.is_integer()


def _is_numeric(kind: Any) -> bool:
    """Return whether nothing but a number, or None, is asked for."""
    return set(_alternatives(kind) or [Any]) <= {int, float, type(None)}


def _kind(annotation: Any, scope: Mapping[str, Any]) -> Any:
    """Return what an annotation means, Any where it is written only for type checkers."""
    if annotation is inspect.Parameter.empty:
        return Any
    if isinstance(annotation, str):
        try:
            return eval(annotation, dict(scope))  # an annotation of this library's own
        except (NameError, AttributeError, TypeError):
            return Any
    return annotation


def _unfit(name: str, value: Any, kind: Any) -> str:
    """Return why a value does not fit an annotation, "" where it does."""
    kinds = _alternatives(kind)
    if kinds is None or any(_fits(value, each) for each in kinds):
        return ""
    if len([each for each in kinds if each is not type(None)]) == 1:
        within = _within(name, value, next(each for each in kinds if each is not type(None)))
        if within:
            return within
    must = " or ".join(dict.fromkeys(_words(each) for each in kinds))
    if _integral(value):
        must = must.replace("number", "number below 2**63")
    return f"{name} must be {must}, got {seen(value)}"


def _within(name: str, value: Any, kind: Any) -> str:
    """Return why a part of a row or of a mapping does not fit."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, Sequence, set, frozenset) and isinstance(value, (list, tuple)):
        entries: Iterable[tuple[Any, Any, Any]] = (
            (i, each, parts[0]) for i, each in enumerate(value))
    elif origin is tuple and isinstance(value, (list, tuple)):
        if len(parts) == 2 and parts[1] is Ellipsis:
            entries = ((i, each, parts[0]) for i, each in enumerate(value))
        elif len(parts) == len(value):
            entries = ((i, *both) for i, both in enumerate(zip(value, parts, strict=True)))
        else:
            return ""
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        entries = ((key, each, parts[1]) for key, each in value.items())
    else:
        return ""
    return next(filter(None, (_unfit(f"{name}[{key!r}]", each, part)
                              for key, each, part in entries if not _is_number(each, part))), "")


@cache
def _alternatives(kind: Any) -> tuple[Any, ...] | None:
    """Return the kinds of a union, None where anything does."""
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    if isinstance(kind, TypeVar):
        kind = kind.__bound__ or Any
    if kind in (Any, object) or isinstance(kind, (str, typing.ForwardRef, typing.ParamSpec)):
        return None
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        found = [_alternatives(each) for each in typing.get_args(kind)]
        return None if None in found else tuple(
            each for part in found for each in part or ())
    return (type(None),) if kind is None else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        # A word that is none of them gets the nearest from the method's own check.
        return (isinstance(value, str) and any(isinstance(each, str) for each in parts)) or any(
            value is each or (type(value) is type(each) and value == each) for each in parts)
    if origin is None and kind in _SIMPLE:
        return _SIMPLE[kind](value)
    if origin is type:
        return isinstance(value, type)
    if origin is Callable or kind is Callable:
        return callable(value)
    what = origin or kind
    if not isinstance(what, type) or getattr(what, "_is_protocol", False):
        return True
    if what in (list, tuple, Sequence, Iterable, Iterator, set, frozenset):
        return _is_row(value, what, parts)
    if what in (dict, Mapping):
        return hasattr(value, "keys") and (len(parts) != 2 or not isinstance(value, Mapping) or all(
            not _unfit("", each, parts[1]) for each in value.values()))
    return isinstance(value, Tensor if what is torch.nn.Parameter else what)


def _is_row(value: Any, what: Any, parts: tuple[Any, ...]) -> bool:
    if isinstance(value, (str, bytes)) or not hasattr(
            value, "__iter__" if what in (Iterable, set, frozenset) else "__getitem__"
            if what is not Iterator else "__next__") or isinstance(value, type):
        return False
    if isinstance(value, Mapping) and what not in (Iterable,):
        return False
    if isinstance(value, Tensor):
        return value.ndim > 0
    if not parts or not isinstance(value, (list, tuple)):
        return True
    if what is Iterable or Any in parts:
        return True  # parameters or their groups, a batch: what they hold is looked at elsewhere
    if what is tuple and Ellipsis not in parts and len(parts) != len(value):
        return False
    each = parts if what is tuple and Ellipsis not in parts else [parts[0]] * len(value)
    return all(_is_number(part, kind) or not _unfit("", part, kind)
               for part, kind in zip(value, each, strict=True))


def _is_number(value: Any, kind: Any) -> bool:
    """Return whether a part is a number where one is asked for; its method says what is wrong."""
    return kind is float and isinstance(value, float)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.SymFloat) or (_finite(value) and not _integral(value))


def _is_int(value: Any) -> bool:
    return isinstance(value, torch.SymInt) or (_whole(value) and -MOST < operator.index(value)
                                               < MOST)


def _integral(value: Any) -> bool:
    return _whole(value) and not isinstance(value, Tensor) and abs(operator.index(value)) >= MOST


_SIMPLE: dict[Any, Check] = {
    int: _is_int,
    float: _is_float,
    bool: lambda value: isinstance(value, (bool, numpy.bool_)),
    str: lambda value: isinstance(value, str),
    complex: lambda value: isinstance(value, (int, float, complex)) and cmath.isfinite(value),
}
_WORDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string",
          complex: "a finite number",
          Tensor: "a tensor", torch.nn.Module: "an nn.Module", type(None): "None"}


def _words(kind: Any) -> str:
    """Return what an annotation asks for, as one says it."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, parts))
    if kind in _WORDS:
        return _WORDS[kind]
    if origin is Callable or kind is Callable:
        return "a function"
    if origin is type:
        return "a class"
    if origin is tuple and Ellipsis not in parts and parts:
        return "(" + ", ".join(_all_words(part) for part in parts) + ")"
    if (origin or kind) in (list, tuple, Sequence, Iterable, set, frozenset):
        return "a list of " + _all_words(parts[0]) if parts else "a list"
    if (origin or kind) in (dict, Mapping):
        return "a mapping" + (f" to {_all_words(parts[1])}" if parts else "")
    what = getattr(origin or kind, "__name__", str(kind))
    return f"{'an' if what[0] in 'AEIOU' else 'a'} {what}"


def _all_words(kind: Any) -> str:
    kinds = _alternatives(kind)
    return "anything" if kinds is None else " or ".join(dict.fromkeys(map(_words, kinds)))


def seen(value: Any) -> str:
    """Return a value as a message can hold it."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, list, tuple)):
        text = " ".join(repr(value).split())
        return text if len(text) <= 80 else f"{text[:77]}... ({type(value).__name__})"
    return value.__name__ if isinstance(value, type) else type(value).__name__


def count(least: int, /, *, advice: str = "", optional: bool = False, **numbers: Any) -> None:
    """Raise unless each is a whole number of at least `least`; True and False are none.

    >>> count(1, width=3)
    >>> count(1, width=2.5)
    Traceback (most recent call last):
        ...
    ValueError: width must be a whole number of at least 1, got 2.5
    """
    for name, value in numbers.items():
        if optional and value is None:
            continue
        if not _whole(value):
            _refuse(name, f"a whole number of at least {least}", value, advice)
        if value < least:
            _refuse(name, f"at least {least}", value, advice)


def at_least(least: float, /, *, advice: str = "", optional: bool = False, **numbers: Any) -> None:
    """Raise unless each is a finite number of at least `least`."""
    for name, value in numbers.items():
        if optional and value is None:
            continue
        if not (_finite(value) and value >= least):
            _refuse(name, f"at least {least}", value, advice)


def above(bound: float, /, *, advice: str = "", optional: bool = False, **numbers: Any) -> None:
    """Raise unless each is a finite number above `bound`.

    >>> above(0, rate=float("nan"), advice="try 0.1")
    Traceback (most recent call last):
        ...
    ValueError: rate must be above 0, got nan; try 0.1
    """
    for name, value in numbers.items():
        if optional and value is None:
            continue
        if not (_finite(value) and value > bound):
            _refuse(name, f"above {bound}", value, advice)


def between(low: float, high: float, /, *, ends: tuple[bool, bool] = (True, True),
            whole: bool = False, advice: str = "", optional: bool = False, **numbers: Any) -> None:
    """Raise unless each is a number from `low` to `high`, a whole one where `whole`.

    `ends` says which of the two it may be itself.

    >>> between(0, 1, ends=(False, True), share=0.0)
    Traceback (most recent call last):
        ...
    ValueError: share must be above 0 and at most 1, got 0.0
    """
    reach = _reach(low, high, *ends)
    for name, value in numbers.items():
        if optional and value is None:
            continue
        inside = _finite(value) and low <= value <= high
        if whole and inside and not _whole(value):
            _refuse(name, f"a whole number {reach}", value, advice)
        if not inside or (value == low and not ends[0]) or (value == high and not ends[1]):
            _refuse(name, reach, value, advice)


def one_of(known: Iterable[Any], /, *, optional: bool = False, **names: Any) -> None:
    """Raise UnknownName, with the nearest, unless each is one of `known`.

    >>> one_of(["sum", "mean"], reduction="men")
    Traceback (most recent call last):
        ...
    netwright.errors.UnknownName: no reduction is called 'men'; did you mean mean?
    """
    known = list(known)
    for name, value in names.items():
        if not (optional and value is None) and value not in known:
            raise UnknownName(name.replace("_", " "), str(value), known)


def pair(*, advice: str = "", **values: Any) -> None:
    """Raise unless each is a tuple or a list of two."""
    for name, value in values.items():
        if not (isinstance(value, (tuple, list)) and len(value) == 2):
            seen = f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else ""
            _refuse(name, "a pair", value, advice, seen)


def finite(*, advice: str = "", **values: Any) -> None:
    """Raise unless each, a number or a tensor, is finite throughout."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            if not bool(torch.isfinite(value).all()):
                bad = int((~torch.isfinite(value)).sum())
                _refuse(name, "finite", value, advice,
                        f"{bad} of {value.numel()} numbers that are not")
        elif not _finite(value):
            _refuse(name, "a finite number", value, advice)


def _reach(low: float, high: float, with_low: bool, with_high: bool) -> str:
    if with_low and with_high:
        return f"between {low} and {high}"
    least, most = "at least" if with_low else "above", "at most" if with_high else "below"
    return f"{least} {low} and {most} {high}"


def _whole(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _finite(value: Any) -> bool:
    if isinstance(value, (bool, str, bytes)):
        return False
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        return False


def _refuse(name: str, must: str, value: Any, advice: str, seen: str = "") -> None:
    seen = seen or (repr(value) if isinstance(value, str) else str(value))
    raise ValueError(f"{name} must be {must}, got {seen}" + (f"; {advice}" if advice else ""))
