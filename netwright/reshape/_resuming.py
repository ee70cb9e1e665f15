"""What a reshape has finished, kept in a folder, from where it goes on after it was broken off."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor

from netwright.errors import CorruptCheckpoint
from netwright.runtime.fingerprint import fingerprint


class Finished:
    """Parts of a reshape that are finished, by their names; without a folder nothing is kept.

    `asked` is all that decides what the parts become: arguments, weights, the data's beginning.
    With a `generator` its state goes with each part, so that what is drawn next is the same.

    Raises:
        ValueError: `folder` is no path, or holds what another call finished.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Finished(folder, {"steps": 3}).put("1.mlp", {"error": 0.5}, {"w": torch.ones(2)})
    ...     Finished(folder, {"steps": 3}).get("1.mlp")
    ({'error': 0.5}, {'w': tensor([1., 1.])})
    """

    def __init__(self, folder: str | Path | None, asked: Mapping[str, Any],
                 generator: Generator | None = None) -> None:
        self.folder, self.generator = None if folder is None else _folder(folder), generator
        if self.folder is None:
            return
        self.asked = {key: fingerprint(value) for key, value in asked.items()}
        self.asked["generator"] = fingerprint(generator and generator.get_state())

    def get(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return what was put under `name`, None where it is not finished."""
        if self.folder is None or not (path := self._path(name)).exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                said = json.loads(file.metadata()["said"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CorruptCheckpoint(f"{path} cannot be read ({error}); remove it, and its part is "
                                    "made again") from error
        others = [key for key in self.asked if said["asked"].get(key) != self.asked[key]]
        if others:
            raise ValueError(f"resume must name a folder of the same call, but {self.folder} holds "
                             f"one with other {', '.join(others)}; give another folder, or empty "
                             "it")
        state = tensors.pop("the generator", None)
        if state is not None and self.generator is not None:
            self.generator.set_state(state)
        return said["part"], tensors

    def put(self, name: str, said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep plain data and tensors under `name`."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        held = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
        if self.generator is not None:
            held["the generator"] = self.generator.get_state()
        path = self._path(name)
        partial = path.with_suffix(".partial")
        save_file(held, partial, {"said": json.dumps({"asked": self.asked, "part": dict(said)})})
        os.replace(partial, path)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"


def _folder(folder: Any) -> Path:
    if not isinstance(folder, (str, os.PathLike)) or not str(folder):
        raise ValueError(f"resume must be a folder's path, got {folder!r}; or leave it out")
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"resume must be a folder, got the file {str(folder)!r}")
    return path
