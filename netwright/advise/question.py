"""What is asked of an advice, and how near a changed model comes to it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from netwright.advise.wants import RESOURCES, Want, shown

LOSS = 20.0  # how much a lack of quality weighs beside one of a resource, as a logarithm
SEEN = ("size", "inference_time", "inference_memory")  # the front where nothing is wanted


@dataclass(frozen=True)
class Question:
    """Limits on what a model costs, the least quality, and what the original costs."""

    wants: tuple[Want, ...]
    keep: float
    original: Mapping[str, float]

    @property
    def resources(self) -> tuple[str, ...]:
        """What the front is made of beside quality."""
        return tuple(want.resource for want in self.wants) or SEEN

    def limit(self, want: Want) -> float:
        """Return a limit as a share of the original."""
        return want.absolute(self.original[want.resource]) / self.original[want.resource]

    def misses(self, quality: float, shares: Mapping[str, float]) -> list[dict[str, Any]]:
        """Return the limits that are not met, as plain data."""
        found = [{"resource": want.resource, "is": shares.get(want.resource),
                  "limit": self.limit(want)} for want in self.wants
                 if not shares.get(want.resource, math.inf) <= self.limit(want)]
        if not quality >= self.keep:
            found.append({"resource": "quality", "is": quality, "limit": self.keep})
        return found

    def order(self, quality: float, shares: Mapping[str, float]) -> tuple[float, float]:
        """Return what is least for what comes nearest: what lacks, then what could be better.

        Once the limits are met, quality counts; where there are none, the mean saving does.
        """
        lacking = LOSS * max(0.0, self.keep - quality) + sum(
            max(0.0, math.log(max(shares.get(want.resource, 1.0), 1e-9) / self.limit(want)))
            for want in self.wants)
        if self.wants:
            return lacking, -quality
        saved = [math.log(max(shares.get(name, 1.0), 1e-9)) for name in SEEN]
        return lacking, sum(saved) / len(saved)

    def front(self, points: Sequence[tuple[float, Mapping[str, float]]]) -> list[bool]:
        """Return which points no other is at least as good as in everything, and better in one."""
        held = [(-quality, *(shares.get(name, 1.0) for name in self.resources))
                for quality, shares in points]
        return [not any(_beats(other, own) for other in held) for own in held]


def _beats(one: Iterable[float], other: Iterable[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def check_limits(wants: Sequence[Want], keep: float, original: Mapping[str, float]) -> None:
    """Raise where a limit is none: it is met already, or is of what was not measured.

    Raises:
        ValueError: the original meets a limit.
    """
    for want in wants:
        if want.resource not in original:
            raise ValueError(f"want {want} is about training, and the model is advised on as it "
                             "is used; give a Task, an untrained network with its data, to have "
                             "its training advised on")
        if want.absolute(original[want.resource]) >= original[want.resource]:
            raise ValueError(
                f"want {want} is met already: the model has "
                f"{shown(want.resource, original[want.resource])} of {want.resource} "
                f"({RESOURCES[want.resource].means}); ask for less")
