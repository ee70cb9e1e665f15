"""Prints the lower ends of the ranges in pyproject.toml as pins, those of the tools left out.

python tools/oldest.py > pins
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANGE = re.compile(r"(?P<name>[\w.-]+)(\[[\w,-]+\])?>=(?P<lower>[\w.]+)(,.*)?")


def oldest(settings: dict) -> list[str]:
    """Return a pin for each dependency and each extra that is no tool of development."""
    project, tools = settings["project"], settings["tool"]["deptry"]
    ranges = list(project["dependencies"])
    for extra, entries in project["optional-dependencies"].items():
        if extra not in tools["optional_dependencies_dev_groups"]:
            ranges += entries
    pins = []
    for requirement in ranges:
        found = RANGE.fullmatch(requirement)
        if found is None:
            raise ValueError(f"{requirement!r} in pyproject.toml must have a lower end, as in "
                             "'numpy>=1.26'")
        pins.append(f"{found['name']}=={found['lower']}")
    return sorted(pins)


if __name__ == "__main__":
    print("\n".join(oldest(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")))))
