"""What was measured of the papers' claims, in short.

In a checkout it is read off the results; the package that is built holds it in one file.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from netwright.runtime.checkout import checkout

SHIPPED = Path(__file__).with_name("evidence.json")
SAID = ("paper", "claim", "verdict", "date", "version", "fingerprint")


@cache
def measurements() -> dict[str, dict[str, Any]]:
    """Return the summaries of what was measured of the papers' claims, by the experiments' names.

    >>> measurements()["dual_propagation"]["paper"]
    '001-164'
    """
    root = checkout()
    if root is not None:
        return summarised(root / "evidence" / "results")
    found: dict[str, dict[str, Any]] = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return found


def summarised(results: Path) -> dict[str, dict[str, Any]]:
    """Return the summary of each result in a folder, by the experiments' names."""
    found = {}
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        figures = {figure: {key: float(f"{value:.5g}") for key, value in spread.items()}
                   for figure, spread in result["summary"].items()}
        found[path.stem] = {**{key: result.get(key) for key in SAID}, "summary": figures}
    return found


def ship(root: Path) -> None:
    """Write the file that a package built from the checkout at `root` holds."""
    text = json.dumps(summarised(root / "evidence" / "results"), indent=0)
    (root / "netwright" / "catalogue" / SHIPPED.name).write_text(text + "\n", encoding="utf-8")
