"""What a search for sublayers has found so far, in a folder from which it goes on."""

import json
import os
import time
from pathlib import Path
from typing import Any

from netwright.errors import CorruptCheckpoint
from netwright.reshape._naming import plain

FILE, FORMAT = "sublayers.json", 1
PAUSE = 1.0  # seconds between two writes


class Found:
    """The sublayers that were removed, and how far the outputs move without each of the others.

    With a `folder` it is read from there and kept there, after every second at the latest.
    """

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]) -> None:
        if not (folder is None or isinstance(folder, (str, Path))) or folder == "":
            raise ValueError(f"resume must be a folder's path, got {folder!r}; or leave it out")
        self.path = None if folder is None else Path(folder) / FILE
        self.settings = {name: plain(value) for name, value in settings.items()}
        self.removed: list[str] = []
        self.tried: dict[str, float] = {}
        self._due = 0.0
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def note(self, name: str, moved: float) -> None:
        """Keep how far the outputs move without sublayer `name`."""
        self.tried[name] = moved
        if time.monotonic() >= self._due:
            self._write()

    def remove(self, name: str) -> None:
        """Keep that `name` was removed, after which all others are to be tried anew."""
        self.removed.append(name)
        self.tried = {}
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        content = {"format": FORMAT, "settings": self.settings, "removed": self.removed,
                   "tried": self.tried}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(temporary, self.path)
        self._due = time.monotonic() + PAUSE

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kind, settings = content["format"], dict(content["settings"])
            self.removed, self.tried = list(content["removed"]), dict(content["tried"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptCheckpoint(f"resume: {path} cannot be read ({error}); remove it to "
                                    "begin anew") from error
        if kind != FORMAT:
            raise CorruptCheckpoint(f"resume: {path} is of format {kind}, and this version "
                                    f"reads {FORMAT}; remove it to begin anew")
        other = [name for name, value in self.settings.items() if settings.get(name) != value]
        if other:
            raise CorruptCheckpoint(f"resume: {path} belongs to another call, with other "
                                    f"{' and '.join(other)}; name another folder, or remove it to "
                                    "begin anew")
