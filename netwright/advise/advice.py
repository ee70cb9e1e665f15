"""What an advice is: points that were measured, what was tried besides, and one that is named."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netwright import checks
from netwright.advise.wants import shown
from netwright.runtime.written import read_json, write_text

__all__ = ["Advice"]

FORMAT = 1


@dataclass(frozen=True)
class Advice:
    """An answer to what should be changed in a network; `plain` is all of it as plain data.

    What is printed is a table of the points that were measured: the original, which has the
    number 0, and the finalists, whose checkpoints are in the folder under their numbers.
    """

    plain: Mapping[str, Any] = field(repr=False)
    folder: Path | None = field(default=None, repr=False)

    @property
    def points(self) -> list[dict[str, Any]]:
        """All that was measured, the original first."""
        return list(self.plain["points"])

    @property
    def front(self) -> list[dict[str, Any]]:
        """The points that none of the others beats in everything that counts here."""
        return [point for point in self.points if not point["dominated"]]

    @property
    def recommended(self) -> dict[str, Any]:
        """The point to take: the best of those that meet the limits, the nearest where none does.

        `met` says which of the two it is.
        """
        return next(point for point in self.points
                    if point["number"] == self.plain["recommended"])

    @property
    def met(self) -> bool:
        """Whether a changed model was found that meets the limits, quality with its interval."""
        return bool(self.plain["met"])

    @property
    def verdict(self) -> str:
        """What came of it, in words."""
        return str(self.plain["verdict"])

    def rows(self) -> list[dict[str, str]]:
        """Return the table's rows: a number, the recipe, figures beside the original, a note."""
        return [_row(point, self.plain["resources"]) for point in self.points]

    def __repr__(self) -> str:
        lines = [list(self.rows()[0]), *(list(row.values()) for row in self.rows())]
        widths = [min(48, max(map(len, column))) for column in zip(*lines, strict=True)]
        table = "\n".join("  ".join(word[:48].ljust(width) for word, width in zip(
            line, widths, strict=True)).rstrip() for line in lines)
        return f"{table}\n{self.verdict}"

    def write(self, folder: str | Path) -> Path:
        """Write `advice.json` into a folder and return its path."""
        return write_text(Path(folder) / "advice.json", json.dumps(self.plain, indent=1))

    @classmethod
    def read(cls, path: str | Path) -> "Advice":
        """Return the advice that a folder, or an `advice.json`, holds."""
        path = Path(path)
        path = path / "advice.json" if path.is_dir() else path
        found = read_json(path, "an advice")
        if not isinstance(found, Mapping) or found.get("format") != FORMAT:
            raise ValueError(f"{path} must be an advice of this version of netwright, got "
                             f"{checks.seen(found)}; ask for the advice again")
        return cls(found, path.parent)


def _row(point: Mapping[str, Any], resources: Any) -> dict[str, str]:
    quality = point["quality"]
    row = {"": ("*" if point["recommended"] else " ") + str(point["number"]),
           "recipe": point["recipe"],
           "quality": f"{quality['value']:.4f}" if point["number"] == 0 else
           f"{quality['value']:.4f} ({quality['low']:.4f} to {quality['high']:.4f})"}
    for name in resources:
        if name in point["figures"]:
            row[name.replace("_", " ")] = (f"{shown(name, point['figures'][name])} "
                                           f"({point['shares'][name]:.3f})")
    row["note"] = note(point)
    return row


def note(point: Mapping[str, Any]) -> str:
    """Return in a few words how a point stands."""
    if point["number"] == 0:
        return "as it is"
    said = []
    if point["meets"]:
        said.append("meets the limits")
    said += [f"{miss['resource'].replace('_', ' ')} {miss['is']:.4g} and not {miss['limit']:.4g}"
             for miss in point["misses"]]
    said += ["dominated"] if point["dominated"] else []
    said += ["slower than the original"] if point["slower"] else []
    return ", ".join(said)
