"""Checks of arguments, which name the argument, what it was and what it must be.

Each takes the arguments by their names, `count(1, width=width, depth=depth)`, and raises ValueError
for the first that does not do. `optional` lets None pass; `advice` is added to the message.
"""

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from netwright.errors import UnknownName


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
