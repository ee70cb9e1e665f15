"""Checkpoints that a kill at any moment leaves whole: safetensors and JSON, nothing unpickled."""

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from netwright.errors import CorruptCheckpoint
from netwright.runtime.files import digest, flush, text_digest

FILE = "checkpoint.json"
FORMAT = 2
_TENSORS = re.compile(r"tensors-[0-9a-f]{32}\.safetensors")
_PARTIAL = "checkpoint.partial"  # a folder: safetensors also puts a file of its own beside


def save(folder: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `folder` as its one checkpoint, replacing the one before as a whole.

    `state` nests dictionaries, lists, tuples, tensors, numbers, strings and None. The tensors go
    to a file named by their digest; the JSON file that names it is renamed into place last, so
    that the folder holds either the checkpoint before or this one.

    Raises:
        TypeError: `state` holds something else.
        OSError: the disk is full, or the folder cannot be written to; what it held stays.

    >>> from tempfile import mkdtemp
    >>> folder = mkdtemp()
    >>> save(folder, {"weights": torch.ones(2), "step": 3})
    >>> load(folder)
    {'weights': tensor([1., 1.]), 'step': 3}
    """
    tensors: dict[str, Tensor] = {}
    packed = _pack(state, _Shelf(tensors), "state")
    folder = Path(folder)
    partial = folder / _PARTIAL
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _write(folder, partial, tensors, packed)
    except (OSError, SafetensorError) as error:
        for path in partial.glob("*") if partial.is_dir() else ():
            path.unlink(missing_ok=True)  # what is half written may be what fills the disk
        raise OSError(f"the checkpoint could not be written to {folder}: {error}; free some space "
                      "there, or name another folder with checkpoint=; what the folder held is "
                      "still there") from error


def _write(folder: Path, partial: Path, tensors: dict[str, Tensor], packed: Any) -> None:
    temporary = partial / "tensors"
    safetensors.torch.save_file(tensors, temporary)
    flush(temporary)
    written = digest(temporary)
    name = f"tensors-{written[:32]}.safetensors"
    os.replace(temporary, folder / name)

    content = {"format": FORMAT, "tensors": name, "tensors_sha256": written, "state": packed}
    text = json.dumps({"sha256": text_digest(content), "content": content})
    temporary = partial / FILE
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    flush(folder)  # the tensors' name reaches the disk before the JSON that refers to it
    os.replace(temporary, folder / FILE)
    flush(folder)
    _clear(folder, name)


def remove(folder: str | Path) -> None:
    """Delete the checkpoint in `folder`."""
    (Path(folder) / FILE).unlink(missing_ok=True)
    _clear(Path(folder), kept="")


def tidy(folder: str | Path) -> None:
    """Delete what writings that a kill broke off have left in `folder`."""
    stored = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
    _clear(Path(folder), stored["content"]["tensors"])


def _clear(folder: Path, kept: str) -> None:
    for path in folder.iterdir():
        if _TENSORS.fullmatch(path.name) and path.name != kept:
            path.unlink()
    shutil.rmtree(folder / _PARTIAL, ignore_errors=True)


def load(folder: str | Path) -> dict[str, Any] | None:
    """Return what `save` wrote to `folder`, or None where it wrote nothing.

    Raises:
        CorruptCheckpoint: a file is damaged, truncated or missing.
    """
    path = Path(folder) / FILE
    if not os.path.lexists(path):  # a link to nothing is a checkpoint that was there
        _check_nothing_is_left(path)
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        content = stored["content"]
        if stored["sha256"] != text_digest(content):
            raise CorruptCheckpoint(damaged(path, "its contents do not match its digest"))
        if content["format"] != FORMAT:
            raise CorruptCheckpoint(damaged(path, f"its format is {content['format']}, this "
                                                  f"version of netwright reads {FORMAT}"))
        if not _TENSORS.fullmatch(content["tensors"]):
            raise CorruptCheckpoint(damaged(path, f"it names no file of tensors but "
                                                  f"{content['tensors']!r}"))
        tensors_path = path.with_name(content["tensors"])
        if not tensors_path.exists():
            raise CorruptCheckpoint(damaged(path, f"{tensors_path.name} is missing beside it"))
        if digest(tensors_path) != content["tensors_sha256"]:
            raise CorruptCheckpoint(damaged(tensors_path, "its contents do not match its digest"))
        # Copies, since a sum's rounding can depend on how the tensor lies in memory.
        tensors = {name: tensor.clone()
                   for name, tensor in safetensors.torch.load_file(tensors_path).items()}
        found = _unpack(content["state"], tensors)
        return dict(found.items())
    except CorruptCheckpoint:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
            SafetensorError) as error:
        raise CorruptCheckpoint(damaged(path, f"it cannot be read ({error})")) from error


def _check_nothing_is_left(path: Path) -> None:
    """Raise CorruptCheckpoint where there are tensors that a checkpoint has named.

    A first writing that a kill broke off leaves tensors too, but with them the folder it wrote in.
    """
    folder = path.parent
    if not folder.is_dir() or (folder / _PARTIAL).exists():
        return
    for other in folder.iterdir():
        if _TENSORS.fullmatch(other.name):
            raise CorruptCheckpoint(damaged(path, f"it is missing beside {other.name}"))


class _Shelf:
    """Where tensors are put under a name, those that are the same tensor under one."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self._names: dict[tuple, str] = {}
        self._storages: set[int] = set()

    def put(self, tensor: Tensor, name: str) -> str:
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise TypeError(f"{name} is a tensor of layout {tensor.layout}, which a checkpoint "
                            "cannot hold; make it dense")
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and identity in self._names:  # tied parameters
            return self._names[identity]
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = plain.untyped_storage().data_ptr()
        if storage in self._storages:  # safetensors refuses two views of one storage
            plain = plain.clone()
        self._storages.add(plain.untyped_storage().data_ptr())
        self.tensors[name] = plain
        self._names[identity] = name
        return name


def _pack(value: Any, shelf: _Shelf, path: str) -> Any:
    """Return `value` as what JSON holds; a dictionary with a "$..." key stands for what it lacks.

    Numbers are written so that they are read back as the same bits.
    """
    match value:
        case Tensor():
            return {"$tensor": shelf.put(value, path)}
        case float() if not math.isfinite(value):
            return {"$float": str(float(value))}
        case float():
            return float(value)
        case None | bool() | int() | str():
            return value
        case numpy.generic():
            return _pack(value.item(), shelf, path)
        case Counter():
            return {"$counter": _pack_pairs(value, shelf, path)}
        case Mapping():
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: _pack(v, shelf, f"{path}/{key}") for key, v in value.items()}
            return {"$dict": _pack_pairs(value, shelf, path)}
        case tuple():
            return {"$tuple": [_pack(v, shelf, f"{path}/{i}") for i, v in enumerate(value)]}
        case list():
            return [_pack(v, shelf, f"{path}/{i}") for i, v in enumerate(value)]
        case _:
            raise TypeError(f"{path} is {type(value).__name__}, which a checkpoint cannot hold; "
                            "it holds tensors, numbers, strings, None, lists, tuples and "
                            "dictionaries")


def _pack_pairs(value: Mapping, shelf: _Shelf, path: str) -> list:
    return [[_pack(key, shelf, f"{path}/{key}:key"), _pack(v, shelf, f"{path}/{key}")]
            for key, v in value.items()]


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    match value:
        case list():
            return [_unpack(v, tensors) for v in value]
        case {"$tensor": name}:
            return tensors[name]
        case {"$float": text}:
            return float(text)
        case {"$tuple": items}:
            return tuple(_unpack(v, tensors) for v in items)
        case {"$dict": pairs}:
            return {_unpack(key, tensors): _unpack(v, tensors) for key, v in pairs}
        case {"$counter": pairs}:
            return Counter({_unpack(key, tensors): _unpack(v, tensors) for key, v in pairs})
        case dict():
            return {key: _unpack(v, tensors) for key, v in value.items()}
        case _:
            return value


def damaged(path: Path, why: str) -> str:
    """Return what is said of a checkpoint that cannot be resumed from."""
    return (f"{path} cannot be resumed from: {why}; restore the folder {path.parent} from a copy, "
            "or delete it (or name another with checkpoint=) to train from the start")
