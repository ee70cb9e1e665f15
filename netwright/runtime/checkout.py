"""The checkout that the package stands in, where it is not installed."""

from pathlib import Path


def checkout() -> Path | None:
    """Return the root of netwright's checkout, None where the package is installed."""
    root = Path(__file__).resolve().parents[2]
    there = (root / "pyproject.toml").is_file() and (root / "evidence").is_dir()
    return root if there else None
