"""Where the experiments and their results are: in a checkout, or in a folder that is named."""

import os
from os import PathLike as _PathLike
from pathlib import Path

from netwright.runtime.checkout import checkout

__all__: list[str] = []

PathLike = str | _PathLike[str]
VARIABLE = "NETWRIGHT_EVIDENCE"


def available() -> bool:
    """Return whether there are experiments: in the checkout, or in the folder that is named."""
    return bool(os.environ.get(VARIABLE)) or checkout() is not None


def folder(where: PathLike | None = None) -> Path:
    """Return the folder of the experiments: `where`, else NETWRIGHT_EVIDENCE, else the checkout's.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    named = where or os.environ.get(VARIABLE)
    root = checkout()
    found = Path(named).resolve() if named else root and root / "evidence"
    if found is None:
        raise FileNotFoundError(
            "experiments are in the folder evidence of netwright's checkout, and this netwright is "
            f"installed without it; clone the repository and set {VARIABLE} to its folder evidence")
    if not found.is_dir():
        given = "the folder of experiments" if where else VARIABLE
        raise FileNotFoundError(f"{given} must be a folder that is there, got {named}; the "
                                "experiments are in the folder evidence of netwright's checkout")
    return found
