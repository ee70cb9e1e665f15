"""Tensors in files of fewer bytes: zeros left out, exponents in as few bits as they need."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TABLE = "netwright.packed"  # the entry of a file's metadata that says how its tensors are packed


def write_packed(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file of bytes, as `pack` packs them one by one.

    >>> from tempfile import mkdtemp
    >>> path = Path(mkdtemp()) / "packed.safetensors"
    >>> write_packed({"a": torch.eye(64)}, path)
    >>> path.stat().st_size < 1500, torch.equal(read_tensors(path)["a"], torch.eye(64))
    (True, True)
    """
    from safetensors.numpy import save_file
    packed = {name: pack(tensor) for name, tensor in tensors.items()}
    save_file({name: held for name, (held, _) in packed.items()}, path, metadata={
        "format": "pt", _TABLE: json.dumps({name: how for name, (_, how) in packed.items()})})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, whether they are packed or not.

    Raises:
        ValueError: what is packed is damaged.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file
    with safe_open(path, "numpy") as file:
        table = json.loads((file.metadata() or {}).get(_TABLE, "{}"))
        if not table:
            return load_file(path)
        return {name: unpack(file.get_tensor(name), how) for name, how in table.items()}


def pack(tensor: Tensor) -> tuple[np.ndarray, dict[str, Any]]:
    """Return a tensor's content in few bytes, to the bit, and what `unpack` must know of it.

    Where it pays, zeros are left out, of which a bit for each number tells. Floating-point numbers
    are turned by a bit, so that one byte is the exponent; the bytes of a place are then coded by
    how often each occurs, where that makes them fewer.

    Paper: Hershcovitch, Wood, Choshen, Girmonsky, Leibovitz, Ennmouri, Malka, Chin, Sundararaman,
    Harnik, 2024, ZipNN: Lossless Compression for AI Models.
    """
    numbers = _numbers(tensor)
    kept = numbers != 0
    width, bits = numbers.itemsize, b""
    if (len(numbers) - int(kept.sum())) * width > -(-len(numbers) // 8):
        bits, numbers = np.packbits(kept).tobytes(), numbers[kept]
    if _has_exponents(tensor.dtype):
        numbers = numbers << 1 | numbers >> (8 * width - 1)
    planes = [_coded(plane.tobytes()) for plane in numbers.view(np.uint8).reshape(-1, width).T]
    how = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape),
           "bits": len(bits), "planes": [[len(held), coded] for held, coded in planes]}
    return np.frombuffer(b"".join([bits, *(held for held, _ in planes)]), np.uint8), how


def unpack(held: np.ndarray, how: Mapping[str, Any]) -> Tensor:
    """Return the tensor that `pack` packed.

    Raises:
        ValueError: the bytes are fewer, or others, than they must be.
    """
    dtype = getattr(torch, how["dtype"])
    width = torch.empty(0, dtype=dtype).element_size() // (2 if dtype.is_complex else 1)
    count = int(np.prod(how["shape"])) * (2 if dtype.is_complex else 1)
    content, place = held.tobytes(), how["bits"]
    needed = place + sum(length for length, _ in how["planes"])
    if len(content) != needed:
        raise ValueError(f"{len(content)} bytes packed where {needed} are needed")
    kept = np.ones(count, bool) if not place else np.unpackbits(
        np.frombuffer(content[:place], np.uint8), count=count).astype(bool)
    planes = []
    for length, coded in how["planes"]:
        part, place = content[place:place + length], place + length
        planes.append(np.frombuffer(zlib.decompress(part, -15) if coded else part, np.uint8))
    numbers = np.ascontiguousarray(np.stack(planes, 1)).view(f"<u{width}")[:, 0]
    if _has_exponents(dtype):
        numbers = numbers >> 1 | numbers << (8 * width - 1)
    whole = np.zeros(count, numbers.dtype)
    whole[kept] = numbers
    return torch.from_numpy(whole.view(np.uint8)).view(dtype).reshape(how["shape"])


def _numbers(tensor: Tensor) -> np.ndarray:
    """Return a tensor's bytes as one unsigned number for each of its numbers, in a row."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    width = flat.element_size() // (2 if flat.is_complex() else 1)
    return flat.view(torch.uint8).numpy().view(f"<u{width}")


def _has_exponents(dtype: torch.dtype) -> bool:
    return (dtype.is_floating_point or dtype.is_complex) and dtype.itemsize > 1


def _coded(plane: bytes) -> tuple[bytes, bool]:
    """Return bytes as coded by their frequencies alone, or as they are where that is not less."""
    coder = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    coded = coder.compress(plane) + coder.flush()
    return (coded, True) if len(coded) < len(plane) else (plane, False)
