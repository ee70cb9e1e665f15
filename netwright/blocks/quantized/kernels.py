"""Products with weights in packed codes, by PyTorch's own kernels, where these are faster."""

import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import linear

from netwright.blocks.quantized.grid import Grid
from netwright.blocks.quantized.packing import unpacked
from netwright.blocks.quantized.stored import QuantizedWeight
from netwright.runtime.files import cache_folder
from netwright.runtime.random_state import same_random_state

__all__: list[str] = []

SIZE, TRIED, TURNS = 1024, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32), 5
GROUPS = (256, 128, 64, 32)  # what the kernel for four bits knows
# Codes in the order of the kernel, with what says of which state of the weight they are.
_in_order: "WeakKeyDictionary[QuantizedWeight, tuple[Any, Tensor, Tensor]]" = WeakKeyDictionary()


def goes_packed(x: Tensor, held: QuantizedWeight) -> bool:
    """Return whether the product with rows x is one of few rows, for which there is a kernel."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or (
            x.requires_grad and torch.is_grad_enabled()):
        return False
    if held.dtype not in (torch.bfloat16, torch.float16) or not _has_kernel(held):
        return False
    rows = x.numel() // max(1, x.shape[-1])
    return 0 < rows <= packed_rows(held.grid.bits, held.dtype)


def packed_product(x: Tensor, held: QuantizedWeight) -> Tensor:
    """Return x W'^T of rows (rows, inputs), W' what the codes of `held` stand for."""
    if held.grid.bits == 8:
        return torch._weight_int8pack_mm(x, held.codes, held.scale[:, 0])
    codes, scales, group = _ordered(held)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, scales)


def _has_kernel(held: QuantizedWeight) -> bool:
    if not (held.grid.is_integer and held.grid.symmetric) or len(held.scale) != held.shape[0]:
        return False
    outputs, inputs = held.shape
    if outputs % 16 or inputs % 32 or inputs != held.columns:
        return False  # both kernels read in blocks, beyond the end of what is none
    if held.grid.bits == 8:
        return held.scale.shape[1] == 1
    return held.grid.bits == 4 and _group(held) > 0


def _group(held: QuantizedWeight) -> int:
    """Return the largest group that the kernel knows and that scales are equal in, 0 for none."""
    size = held.columns // held.scale.shape[1]
    return next((group for group in GROUPS if size % group == 0), 0)


def _ordered(held: QuantizedWeight) -> tuple[Tensor, Tensor, int]:
    """Return codes and scales as the kernel for four bits takes them, made at the first look."""
    state = (held.codes.data_ptr(), held.codes._version, held.scale.data_ptr(),
             held.scale._version, held.dtype)
    found = _in_order.get(held)
    group = _group(held)
    if found is None or found[0] != state:
        codes = unpacked(held.codes, 4, held.columns).int()
        each = held.scale.repeat_interleave(held.columns // group // held.scale.shape[1], 1).T
        found = (state, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1),
                 torch.stack([each, torch.zeros_like(each)], 2).contiguous())
        _in_order[held] = found
    return found[1], found[2], group


@cache
def packed_rows(bits: int, dtype: torch.dtype) -> int:
    """Return up to how many rows the kernel is faster than the dense product, 0 for none.

    It is measured once on each machine and kept in a file (`NETWRIGHT_CACHE` names its folder), so
    that another process takes the same path and so gives the same numbers.
    """
    try:
        path = _place(bits, dtype)
        return int(path.read_text()) if path.exists() else _agreed(path, _measured(bits, dtype))
    except (OSError, RuntimeError, ValueError):  # no home, or one that cannot be written in
        return _measured(bits, dtype)


def _place(bits: int, dtype: torch.dtype) -> Path:
    name = "-".join([f"packed-rows-{bits}", str(dtype), torch.__version__, platform.machine(),
                     torch.backends.cpu.get_cpu_capability(), str(torch.get_num_threads())])
    return cache_folder() / name.replace(" ", "-")


def _agreed(path: Path, rows: int) -> int:
    """Write what was measured, unless another process did so first; return what stands there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{path.name}.{uuid4().hex}")
    own.write_text(str(rows))
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    finally:
        own.unlink()
    return int(path.read_text())


@torch.no_grad()
def _measured(bits: int, dtype: torch.dtype) -> int:
    grid = Grid(bits=bits, group=None if bits == 8 else GROUPS[-1])
    with same_random_state():
        held = QuantizedWeight.of(torch.randn(SIZE, SIZE).to(dtype), grid)
        most = 0
        for rows in TRIED:
            x = torch.randn(rows, SIZE).to(dtype)
            if _time(packed_product, x, held) > _time(_dense_product, x, held):
                break
            most = rows
    return most


def _dense_product(x: Tensor, held: QuantizedWeight) -> Tensor:
    return linear(x, held())


def _time(product: Callable[[Tensor, QuantizedWeight], Tensor], x: Tensor,
          held: QuantizedWeight) -> float:
    times = []
    for _ in range(TURNS):
        start = time.perf_counter()
        product(x, held)
        times.append(time.perf_counter() - start)
    return min(times)
