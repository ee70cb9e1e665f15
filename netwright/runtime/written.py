"""Files that are whole or not there, JSON that a user may have broken, and text for a terminal."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from netwright.errors import CorruptCheckpoint


def write_text(path: str | Path, text: str) -> Path:
    """Write a file under a name that nobody can guess, then give it its own; return its path."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path must be a file, got the folder {path}; name a file in it")
    number, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def read_json(path: str | Path, what: str) -> Any:
    """Return what a file of JSON holds; `what` it should be is said where it is not.

    Raises:
        ValueError: there is a folder in the file's place.
        CorruptCheckpoint: it is no JSON, or is nested deeper than anything that was written.
    """
    path = Path(path)
    if path.is_dir():
        raise CorruptCheckpoint(f"{path} must be a file, {what}, got a folder; name the file in it")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        said = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise CorruptCheckpoint(f"{path} must be {what}, and cannot be read: {said}; restore it "
                                "from a copy") from error


def plain(text: object) -> str:
    r"""Return a text on one line, without what would make a terminal do something else than show.

    >>> plain("a \x1b[31mred\x07 name\n")
    'a [31mred name'
    """
    return " ".join("".join(c for c in str(text) if c.isprintable() or c.isspace()).split())
