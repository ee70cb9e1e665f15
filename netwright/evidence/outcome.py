"""What an experiment found: figures over seeds, curves, a verdict."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Curve", "Outcome", "Scale", "Shortfall", "Verdict"]

Scale = Literal["desk", "full"]
Verdict = Literal["shown", "partly shown", "not shown"]
Shortfall = Literal["scale", "claim", "open"]


@dataclass(frozen=True)
class Curve:
    """A line of a picture: one list of `y` for each seed over the same `x`."""

    x: Sequence[float]
    y: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Outcome:
    """What an experiment found.

    `figures` maps what was measured, its unit in the name, to one value for each seed. `setting`
    says how, in a few words for each key. `note` says what a reader must know: what differs from
    the paper, and what was tried where the claim did not show. `verdict` is given where the
    experiment declares no claims from which it follows.
    """

    setting: Mapping[str, Any]
    figures: Mapping[str, Sequence[float]]
    note: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    axes: tuple[str, str] = ("", "")
    verdict: Verdict | None = None

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        """Mean, number of seeds and deviation of each figure."""
        return {name: {"mean": statistics.fmean(values), "seeds": len(values),
                       "deviation": statistics.stdev(values) if len(values) > 1 else 0.0}
                for name, values in self.figures.items()}
