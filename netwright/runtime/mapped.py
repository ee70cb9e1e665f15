"""A model whose weights stay on disk: a part of them is in memory, and written when it is done."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from netwright.errors import CorruptCheckpoint
from netwright.runtime.files import flush

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
           "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
           "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
           "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


class _Place(NamedTuple):
    """Where a tensor lies: its file, the bytes of it, and what they are."""

    file: str
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class MappedCheckpoint:
    """The weights of a model in a folder of safetensors files, and those of a copy being written.

    The model's tensors become views of the files, which take no memory of the process's own.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.folder, self.model = folder, model
        self.index = _index(folder)
        self.files = sorted(set(self.index.values())) if self.index else [_WHOLE]
        self.places = {name: place for file in self.files
                       for name, place in _places(folder / file).items()}
        self.tensors = _known(model)
        self._check()
        for file in self.files:
            shutil.copyfile(folder / file, self._part(file))
        self.maps = {file: np.memmap(self._part(file), np.uint8, "c") for file in self.files}
        for name, place in self.places.items():
            self._point(name, place)

    @contextmanager
    def held(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Have the weights of `modules` in memory, and write what they are at the end of it."""
        inside = {id(t) for module in modules
                  for t in (*module.parameters(), *module.buffers())}
        names = [name for name in self.places if id(self.tensors[name]) in inside]
        for name in names:
            self.tensors[name].data = self.tensors[name].data.clone()
        yield
        for name in names:
            self._write(name, self.places[name])

    def commit(self) -> None:
        """Put the copy in the folder's place: one rename, before which the old weights are whole.

        In a folder of several files that rename is of their index.
        """
        new = {file: file if not self.index else f"{Path(file).stem}-changed.safetensors"
               for file in self.files}
        for file in self.files:
            flush(self._part(file))
            if self.index:
                os.replace(self._part(file), self.folder / new[file])
        if not self.index:
            os.replace(self._part(_WHOLE), self.folder / _WHOLE)
        else:
            part = self.folder / f"{_INDEX}.part"
            content = json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))
            content["weight_map"] = {name: new[file] for name, file in self.index.items()}
            part.write_text(json.dumps(content, indent=1), encoding="utf-8")
            flush(part)
            os.replace(part, self.folder / _INDEX)
            for file in self.files:
                (self.folder / file).unlink()
        flush(self.folder)

    def abandon(self) -> None:
        """Take away what was written so far; the model's tensors keep what they hold."""
        for file in self.files:
            self._part(file).unlink(missing_ok=True)

    def _part(self, file: str) -> Path:
        return self.folder / f"{file}.part"

    def _point(self, name: str, place: _Place) -> None:
        """Let a tensor be a view of the copy that is written."""
        held = torch.from_numpy(self.maps[place.file][place.start:place.end])
        view = (held.view(place.dtype).reshape(place.shape) if len(held)
                else torch.empty(place.shape, dtype=place.dtype))
        tensor = self.tensors[name]
        if tensor.is_meta:  # whose data cannot be anything else
            torch.utils.swap_tensors(tensor, nn.Parameter(view, tensor.requires_grad) if isinstance(
                tensor, nn.Parameter) else view)
        else:
            tensor.data = view

    def _write(self, name: str, place: _Place) -> None:
        now = self.tensors[name].detach()
        if tuple(now.shape) != place.shape or now.dtype != place.dtype:
            raise ValueError(f"visit must leave {name} of shape {place.shape} and {place.dtype}, "
                             f"as it is on disk, got {tuple(now.shape)} and {now.dtype}; change "
                             "its numbers in place")
        content = now.cpu().contiguous().flatten().view(torch.uint8).numpy()
        with self._part(place.file).open("r+b") as file:
            file.seek(place.start)
            file.write(content.data)
        self._point(name, place)

    def _check(self) -> None:
        if (self.folder / "changes.json").exists():
            raise ValueError(f"checkpoint must hold a model that was not reshaped, got "
                             f"{self.folder}, whose changes.json knows its files' digests; load "
                             "it by netwright.load, and stream without checkpoint")
        for name, place in self.places.items():
            if name not in self.tensors:
                raise ValueError(f"checkpoint must hold the weights of model, got {name!r}, which "
                                 f"{type(self.model).__name__} lacks; build the class that was "
                                 "saved")
            if tuple(self.tensors[name].shape) != place.shape:
                raise ValueError(f"checkpoint must hold the weights of model, got {name!r} of "
                                 f"shape {place.shape}, which is {tuple(self.tensors[name].shape)} "
                                 "in it; build it by the saved config")
        there = {id(self.tensors[name]) for name in self.places}
        lacking = [name for name, tensor in self.tensors.items()
                   if tensor.is_meta and id(tensor) not in there]
        if lacking:
            raise ValueError(f"model must hold what checkpoint lacks, got {lacking[0]!r} on the "
                             "meta device; build the model with its buffers, or not on meta")


def _known(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False))}


def _index(folder: Path) -> dict[str, str]:
    """Return in which file each tensor is, nothing where there is one file."""
    if (folder / _INDEX).is_file():
        found: dict[str, str] = json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"]
        return found
    if not (folder / _WHOLE).is_file():
        raise FileNotFoundError(f"checkpoint must be a folder with {_WHOLE} or {_INDEX}, got "
                                f"{folder}; write it by save_pretrained or netwright.save")
    return {}


def _places(path: Path) -> dict[str, _Place]:
    """Return where each tensor of a safetensors file lies in it."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: Mapping[str, Any] = json.loads(file.read(length))
        begin = 8 + length
        found = {name: _Place(path.name, begin + said["data_offsets"][0],
                              begin + said["data_offsets"][1], _DTYPES[said["dtype"]],
                              tuple(said["shape"]))
                 for name, said in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read ({error})") from error
    if path.stat().st_size < max((place.end for place in found.values()), default=0):
        raise CorruptCheckpoint(f"{path} is cut off; restore it from a copy")
    return found
