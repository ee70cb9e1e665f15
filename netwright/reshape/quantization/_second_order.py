"""Rounding that the optimal brain surgeon's sweep makes up for, layer by layer."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from netwright.blocks.quantized.grid import (
    Grid,
    Quantized,
    grouped,
    nearest,
    quantize,
    scales,
    valued,
)
from netwright.blocks.quantized.stored import QuantizedWeight
from netwright.calibration import InputStatistics, stream, watched
from netwright.errors import CannotStage
from netwright.obs import sweep
from netwright.reshape._calibration import batches_of, run_batches
from netwright.reshape.quantization._targets import weight_of


def second_order(model: nn.Module, calibration: Any, tied: list[list[str]],
                 grids: Mapping[str, Grid], dtype: torch.dtype | None
                 ) -> dict[str, QuantizedWeight]:
    """Return the codes of each weight, by the first of the names that share it.

    What takes no rows, as a table or an expert that no token went to, gets the nearest levels.
    """
    working = deepcopy(model)
    firsts = {name: names[0] for names in tied for name in names}
    stored: dict[str, QuantizedWeight] = {}

    def settle(name: str, quantized: Quantized) -> None:
        first = firsts[name]
        stored[first] = QuantizedWeight(quantized)
        layer: Any = working.get_submodule(first)
        weight = weight_of(layer)
        weight.copy_(stored[first]().to(weight))

    def visit(_: Any, taken: Mapping[str, InputStatistics]) -> None:
        waiting = {name: seen for name, seen in taken.items()
                   if firsts.get(name) == name and name not in stored and seen.rows}
        for names in _sharing(waiting, grids):
            weights = [weight_of(working.get_submodule(name)) for name in names]
            gram = waiting[names[0]].gram
            assert gram is not None
            swept = _swept(weights, gram, grids[names[0]], dtype or weights[0].dtype)
            for name, quantized in zip(names, swept, strict=True):
                settle(name, quantized)

    for names in tied:  # tables first: what is looked up is what all layers then take
        if any(isinstance(working.get_submodule(name), nn.Embedding) for name in names):
            layer: Any = working.get_submodule(names[0])
            settle(names[0], quantize(weight_of(layer), grids[names[0]], dtype=dtype))
    batches = batches_of(calibration)
    try:
        stream(working, batches, visit)
    except CannotStage:
        with watched(working, [working], ("gram",)) as (taken, _):
            run_batches(working, batches, [])
        visit(None, taken)
    for names in tied:
        if names[0] not in stored:
            layer = working.get_submodule(names[0])
            settle(names[0], quantize(weight_of(layer), grids[names[0]], dtype=dtype))
    return stored


def _swept(weights: list[Tensor], gram: Tensor, grid: Grid, dtype: torch.dtype
           ) -> list[Quantized]:
    """Return the codes of weights that take the same, by one sweep over all their rows.

    The scales of a group are those of its weights as they are when its first column comes.
    """
    rows = torch.cat([grouped(weight, grid) for weight in weights])
    inputs = weights[0][0].numel()
    size = grid.group or inputs
    codes = torch.zeros(rows.flatten(1).shape, dtype=torch.uint8)
    # What a weight's error costs where nothing makes up for it; a little where nothing was seen.
    seen = gram.diagonal() + 1e-6 * gram.diagonal().mean() + 1e-30
    seen = nn.functional.pad(seen, (0, rows[0].numel() - inputs))
    importance = seen.view(rows.shape[1:]).to(rows)
    scale, second = scales(rows, grid, dtype, importance)
    whole = scale.shape[0] == len(rows)  # not one scale for all

    def become(w: Tensor, _: Tensor, column: int) -> Tensor:
        group = column // size
        if column % size == 0 and grid.group:
            ahead = nn.functional.pad(w[:, :size], (0, max(0, size - w.shape[1])))
            found = scales(ahead[:, None], grid, dtype, importance[group:group + 1])
            for held, new in zip((scale, second), found, strict=True):
                if held is not None and new is not None:
                    held[:, group] = new[:, 0]
        at = scale[:, group:group + 1]
        two = None if second is None else second[:, group:group + 1]
        code = nearest(w[:, :1], at, two, grid)
        codes[:, column] = code[:, 0]
        return valued(code, at, two, grid)[:, 0]

    flat = torch.cat([weight.flatten(1) for weight in weights])
    sweep(flat, gram, become, block=size * max(1, 128 // size) if grid.group else 128)
    counts = [len(weight) for weight in weights]
    parts = zip(weights, codes.split(counts), scale.split(counts) if whole else [scale],
                [None] * len(counts) if second is None else
                second.split(counts) if whole else [second], strict=True)
    return [Quantized(code, at, two, weight.shape, grid) for weight, code, at, two in parts]


def _sharing(taken: Mapping[str, InputStatistics], grids: Mapping[str, Grid]) -> list[list[str]]:
    """Return the layers in lists of those that take the same and share a grid.

    They are told by equal Gram matrices. One scale for a whole tensor keeps its layer apart.
    """
    lists: list[list[str]] = []
    for name, seen in taken.items():
        lists.append([name])
        for names in lists[:-1]:
            other = taken[names[0]]
            if (grids[name] == grids[names[0]] and grids[name].per != "tensor"
                    and other.rows == seen.rows and _equal(other.gram, seen.gram)):
                names.append(name)
                lists.pop()
                break
    return lists


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return (one is not None and other is not None and one.shape == other.shape
            and torch.equal(one, other))
