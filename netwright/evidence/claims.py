"""Claims on what an experiment measures, written before it runs: the verdict follows from them."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from netwright.errors import UnknownName
from netwright.evidence.outcome import Verdict

__all__ = ["Claim", "Quantity", "deviation", "every", "figure", "least", "most"]

Figures = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class _Measured:
    """The figures that a claim is held to: their means, or the values of one seed."""

    figures: Figures
    seed: int | None = None

    def all(self, name: str) -> Sequence[float]:
        if name not in self.figures:
            raise UnknownName("figure of this experiment", name, self.figures)
        return self.figures[name]

    def one(self, name: str) -> float:
        values = self.all(name)
        if self.seed is None:
            return statistics.fmean(values)
        return values[self.seed if len(values) > 1 else 0]


@dataclass(frozen=True, eq=False)
class Quantity:
    """A number that follows from an experiment's figures; comparing two of them gives a `Claim`.

    Quantities and numbers are added, subtracted, multiplied and divided.
    """

    text: str
    names: frozenset[str]
    value: Callable[[_Measured], float]

    def __add__(self, other: "Quantity | float") -> "Quantity":
        return _combined(self, "+", other, lambda a, b: a + b)

    def __sub__(self, other: "Quantity | float") -> "Quantity":
        return _combined(self, "-", other, lambda a, b: a - b)

    def __mul__(self, other: "Quantity | float") -> "Quantity":
        return _combined(self, "*", other, lambda a, b: a * b)

    def __rmul__(self, other: float) -> "Quantity":
        return _combined(_quantity(other), "*", self, lambda a, b: a * b)

    def __truediv__(self, other: "Quantity | float") -> "Quantity":
        return _combined(self, "/", other, lambda a, b: a / b)

    def __gt__(self, other: "Quantity | float") -> "Claim":
        return _compared(self, ">", other, lambda a, b: a > b)

    def __ge__(self, other: "Quantity | float") -> "Claim":
        return _compared(self, ">=", other, lambda a, b: a >= b)

    def __lt__(self, other: "Quantity | float") -> "Claim":
        return _compared(self, "<", other, lambda a, b: a < b)

    def __le__(self, other: "Quantity | float") -> "Claim":
        return _compared(self, "<=", other, lambda a, b: a <= b)


@dataclass(frozen=True, eq=False)
class Claim:
    """What must hold of an experiment's figures; `&` joins two claims, `|` asks for one of them."""

    text: str
    names: frozenset[str]
    judge: Callable[[_Measured], dict[str, Any]]

    def __and__(self, other: "Claim") -> "Claim":
        return _joined(self, "and", other, all)

    def __or__(self, other: "Claim") -> "Claim":
        return _joined(self, "or", other, any)

    def __bool__(self) -> bool:
        raise TypeError(f"whether {self.text} holds is known after the run; join claims with & and "
                        "|, each in brackets, in place of and, or and a < b < c")


def figure(name: str) -> Quantity:
    """Return the figure called `name`: its mean over the seeds, in `every` the value of each seed.

    >>> (figure("accuracy, ours (%)") > figure("accuracy, theirs (%)") + 5).text
    'accuracy, ours (%) > accuracy, theirs (%) + 5'
    """
    return Quantity(name, frozenset([name]), lambda measured: measured.one(name))


def least(name: str) -> Quantity:
    """Return the least value of a figure over the seeds."""
    return Quantity(f"least {name}", frozenset([name]), lambda measured: min(measured.all(name)))


def most(name: str) -> Quantity:
    """Return the greatest value of a figure over the seeds."""
    return Quantity(f"most {name}", frozenset([name]), lambda measured: max(measured.all(name)))


def deviation(name: str) -> Quantity:
    """Return the standard deviation of a figure over the seeds."""
    return Quantity(f"deviation of {name}", frozenset([name]),
                    lambda measured: statistics.stdev(measured.all(name)))


def every(claim: Claim) -> Claim:
    """Return the claim that `claim` holds in every seed by itself, not only in the mean.

    A figure with one value has the same in every seed.

    >>> claim = every(figure("ours") > figure("theirs"))
    >>> judged([claim], {"ours": [2.0, 4.0], "theirs": [1.0, 4.0]})[0]
    'not shown'
    """
    def judge(measured: _Measured) -> dict[str, Any]:
        seeds = sorted({len(measured.all(name)) for name in claim.names} - {1})
        if len(seeds) > 1:
            raise ValueError(f"the figures of {claim.text} must have as many seeds as each other, "
                             f"got {seeds}")
        found = [claim.judge(_Measured(measured.figures, seed))
                 for seed in range(seeds[0] if seeds else 1)]
        values = {"parts": found} if "parts" in found[0] else {
            side: [seed[side] for seed in found] for side in ("left", "right")}
        return {"claim": text, "holds": all(seed["holds"] for seed in found), **values}
    text = f"in every seed, {claim.text}"
    return Claim(text, claim.names, judge)


def judged(claims: Sequence[Claim], figures: Figures, *, partly: Claim | None = None,
           ) -> tuple[Verdict, list[dict[str, Any]]]:
    """Return the verdict that the figures give, and each claim with its values and what came of it.

    Shown is where every claim holds, partly shown where `partly` does, or where it is None any of
    them.
    """
    measured = _Measured(figures)
    found = [claim.judge(measured) for claim in claims]
    held = [claim["holds"] for claim in found]
    if all(held):
        return "shown", found
    some = any(held) if partly is None else partly.judge(measured)["holds"]
    return "partly shown" if some else "not shown", found


def _quantity(value: Quantity | float) -> Quantity:
    if isinstance(value, Quantity):
        return value
    return Quantity(f"{value:g}", frozenset(), lambda _: value)


def _combined(left: Quantity, sign: str, right: Quantity | float,
              value: Callable[[float, float], float]) -> Quantity:
    right = _quantity(right)
    return Quantity(f"{left.text} {sign} {right.text}", left.names | right.names,
                    lambda measured: value(left.value(measured), right.value(measured)))


def _compared(left: Quantity, sign: str, right: Quantity | float,
              holds: Callable[[float, float], bool]) -> Claim:
    right = _quantity(right)
    text = f"{left.text} {sign} {right.text}"

    def judge(measured: _Measured) -> dict[str, Any]:
        a, b = left.value(measured), right.value(measured)
        return {"claim": text, "holds": holds(a, b), "left": a, "right": b}
    return Claim(text, left.names | right.names, judge)


def _joined(left: Claim, word: str, right: Claim, of: Callable[[list[bool]], bool]) -> Claim:
    text = f"{left.text}, {word} {right.text}"

    def judge(measured: _Measured) -> dict[str, Any]:
        parts = [claim.judge(measured) for claim in (left, right)]
        return {"claim": text, "holds": of([part["holds"] for part in parts]), "parts": parts}
    return Claim(text, left.names | right.names, judge)
