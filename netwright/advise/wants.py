"""What is wanted of a changed model: limits on what it costs, as shares or absolute."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from netwright import checks

__all__ = ["RESOURCES", "Resource", "Want"]


@dataclass(frozen=True)
class Resource:
    """Something that a model costs: what it means, its units, and the facets that save it."""

    means: str
    units: Mapping[str, float]
    saved_by: frozenset[str]
    bare: bool = False  # whether a number above 1 needs no unit


BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
         "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40}
SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0,
           "h": 3600.0}
COUNTS = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
RESOURCES: Mapping[str, Resource] = {
    "size": Resource("bytes on disk", BYTES, frozenset({"file size", "parameters"})),
    "inference_time": Resource("seconds that an answer takes", SECONDS,
                               frozenset({"inference time"})),
    "inference_memory": Resource("bytes in memory at the peak of an answer", BYTES,
                                 frozenset({"inference memory", "file size", "parameters"})),
    "training_memory": Resource("bytes in memory at the peak of a training step", BYTES,
                                frozenset({"training memory", "backpropagation"})),
    "training_time": Resource("seconds that a training step takes", SECONDS,
                              frozenset({"training time", "backpropagation"})),
    "flops": Resource("floating-point operations of an answer", COUNTS,
                      frozenset({"inference time", "parameters"}), bare=True),
    "parameters": Resource("numbers that are trained", COUNTS,
                           frozenset({"parameters", "file size"}), bare=True),
}
OF_INFERENCE = ("size", "inference_time", "inference_memory", "flops", "parameters")
OF_TRAINING = ("training_memory", "training_time")
_NUMBER = re.compile(r"\s*([0-9.][0-9.eE+_-]*?)\s*(%|[A-Za-zµ]*)\s*")


@dataclass(frozen=True)
class Want:
    """A limit on one resource: a share of the original, or absolute.

    >>> wanted("size=40MB")[0], wanted({"inference_time": 0.6})[0].share
    (Want(resource='size', limit=40000000.0, share=False), True)
    """

    resource: str
    limit: float
    share: bool

    def absolute(self, original: float) -> float:
        """Return the limit in the resource's own unit."""
        return self.limit * original if self.share else self.limit

    def __str__(self) -> str:
        """Return the want as it is written."""
        return f"{self.resource}={shown(self.resource, self.limit, self.share)}"


def wanted(given: Any) -> list[Want]:
    """Return the limits that are written as `size=0.5`, as a mapping, or as a list of those.

    Raises:
        UnknownName: no resource has that name; the nearest are named.
        ValueError: a limit is no share and no number with a unit, or a resource has two limits.

    >>> [str(want) for want in wanted(["size=50%", "inference_time=5ms"])]
    ['size=0.5', 'inference_time=5 ms']
    """
    found = [_want(name, limit) for name, limit in _pairs(given)]
    for one in found:
        other = next((want for want in found if want.resource == one.resource and want != one),
                     None)
        if other is not None:
            raise ValueError(f"want must hold one limit for each resource, got {one} and {other}; "
                             "keep the one that counts")
    return list(dict.fromkeys(found))


def _pairs(given: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(given, Want):
        return [(given.resource, given)]
    if isinstance(given, Mapping):
        return [(str(name), limit) for name, limit in given.items()]
    if isinstance(given, str):
        name, sign, limit = given.partition("=")
        if not sign:
            raise ValueError(f"want must be written as a resource and its limit, such as size=0.5 "
                             f"or inference_time=5ms, got {given!r}")
        return [(name.strip(), limit)]
    if isinstance(given, (list, tuple)):
        return [pair for entry in given for pair in _pairs(entry)]
    raise ValueError(f"want must be limits such as 'size=0.5' or {{'size': 0.5}}, got "
                     f"{checks.seen(given)}")


def _want(name: str, limit: Any) -> Want:
    checks.one_of(RESOURCES, resource=name)
    if isinstance(limit, Want):
        return limit
    number, unit = _read(name, limit)
    known = RESOURCES[name]
    if unit == "%":
        number, unit = number / 100, ""
    if not math.isfinite(number) or number <= 0:
        _refuse(name, limit)
    if unit:
        if unit.lower() not in known.units:
            _refuse(name, limit)
        return Want(name, number * known.units[unit.lower()], share=False)
    if number < 1:
        return Want(name, number, share=True)
    if number > 1 and known.bare:
        return Want(name, number, share=False)
    if number == 1:
        raise ValueError(f"want {name}=1 is what the original has already; name a smaller share, "
                         "such as 0.5")
    _refuse(name, limit)


def _read(name: str, limit: Any) -> tuple[float, str]:
    fits = isinstance(limit, (int, float, str)) and not isinstance(limit, bool)
    match = _NUMBER.fullmatch(str(limit)) if fits else None
    try:
        if match is not None:
            return float(match[1].replace("_", "")), match[2]
    except ValueError:
        pass  # several points or exponents
    _refuse(name, limit)


def _refuse(name: str, limit: Any) -> NoReturn:
    units = ", ".join(RESOURCES[name].units)
    raise ValueError(f"want {name} must be a share of the original between 0 and 1, such as 0.5, "
                     f"or a number above 0 with a unit ({units}), got {checks.seen(limit)}")


def seconds(given: Any, name: str = "budget") -> float:
    """Return a time as it is written: seconds, or a number with a unit.

    >>> seconds("10m"), seconds("90"), seconds(2.5)
    (600.0, 90.0, 2.5)
    """
    match = _NUMBER.fullmatch(str(given)) if not isinstance(given, bool) else None
    unit = match[2].lower() or "s" if match is not None else ""
    try:
        value = float(match[1]) * SECONDS[unit] if match is not None else math.nan
    except (ValueError, KeyError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a time above 0, such as 90s, 10m or 1h, got "
                         f"{checks.seen(given)}")
    return value


def shown(resource: str, value: float, share: bool = False) -> str:
    """Return a figure as one reads it.

    >>> shown("size", 45_400_000), shown("inference_time", 0.0123), shown("flops", 2.1e9)
    ('45.4 MB', '12.3 ms', '2.1 G')
    """
    if share:
        return f"{value:.4g}"
    units = RESOURCES[resource].units
    if units is SECONDS:
        scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
                            if value >= s), (1e-9, "ns"))
    else:
        scale, unit = next(((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k"))
                            if value >= s), (1.0, ""))
        unit = unit.upper() + "B" if units is BYTES else unit
    return f"{value / scale:.3g} {unit}".strip()
