"""What a comparison found, as plain data."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from netwright.errors import CorruptCheckpoint
from netwright.runtime.written import read_json, write_text

__all__ = ["Comparison", "Row"]


@dataclass(frozen=True)
class Row:
    """What one change gave on one task, one entry a seed where a figure is a list.

    Times are in seconds, sizes in bytes; `flops` are those of one training step. `curves` holds
    for each seed the (epoch, seconds, training loss, metric) of each epoch. `alignment` maps a
    stage's name to the cosine between the rule's update and the exact gradient. `failure` says
    why there are no figures, where there are none. `recipe` is the change as plain data.
    """

    task: str
    change: str
    metric: str = "accuracy"
    higher_is_better: bool = True
    scores: Sequence[float] = ()
    train_time: Sequence[float] = ()
    step_time: float = float("nan")
    peak_bytes: int = 0
    saved_bytes: int = 0
    parameters: int = 0
    flops: int = 0
    curves: Sequence[Sequence[tuple[int, float, float, float]]] = ()
    alignment: Mapping[str, float] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 0
    failure: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """The scores' mean over the seeds."""
        return statistics.fmean(self.scores) if self.scores else float("nan")

    @property
    def spread(self) -> float:
        """The scores' standard deviation over the seeds."""
        if not all(map(math.isfinite, self.scores)):
            return math.nan
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


@dataclass(frozen=True)
class Comparison:
    """Every row of a comparison, and the settings that all rows shared."""

    rows: Sequence[Row]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the comparison as JSON."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Comparison":
        """Read a comparison that `save` wrote.

        Raises:
            CorruptCheckpoint: the file holds something else, or is damaged.
        """
        stored = read_json(path, "a comparison that save wrote")
        try:
            return cls([Row(**row) for row in stored["rows"]], stored["settings"])
        except (KeyError, TypeError) as error:
            raise CorruptCheckpoint(f"{path} must be a comparison that save wrote, got JSON of "
                                    f"something else ({type(error).__name__}: {error}); name "
                                    "another file") from error
