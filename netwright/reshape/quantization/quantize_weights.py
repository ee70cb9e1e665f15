from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from netwright import checks
from netwright.blocks.quantized.grid import Grid
from netwright.blocks.quantized.stored import QuantizedWeight
from netwright.catalogue.facets import method
from netwright.reshape.change import decided, reshape
from netwright.reshape.quantization._floats import become, dtype_of, held_back
from netwright.reshape.quantization._second_order import second_order
from netwright.reshape.quantization._targets import (
    Targets,
    finished,
    nothing,
    put,
    targets,
    weight_of,
)

__all__ = ["quantize_weights"]

Asked = str | int | Grid | Mapping[str, Any]


@method(
    "reshape",
    place="whole network",
    saves=["file size", "inference memory"],
    keeps_function=False,
    search={"grid": ["int8", "int4/32", "nf4/64"], "method": ["nearest", "gptq"],
            "embeddings": [True, "int4/32"], "dtype": [None, "bfloat16"]},
    variants={"8 bits": {}, "4 bits": {"grid": "int4/8"},
              "8 bits in bfloat16": {"dtype": "bfloat16"},
              "embeddings in 4 bits": {"embeddings": "int4/8"},
              "4 bits by second order": {"grid": "int4/8", "method": "gptq", "calibration":
                                         torch.arange(16).view(2, 8)}},
)
@reshape
@torch.no_grad()
def quantize_weights(model: nn.Module, calibration: Any = None, *, grid: Asked = "int8",
                     method: str = "nearest", embeddings: bool | Asked = True,
                     layers: Sequence[str] | None = None,
                     dtype: str | torch.dtype | None = None) -> nn.Module:
    """Return a copy whose linear layers, convolutions and embeddings hold their weights as codes.

    "nearest": each weight becomes the nearest level of the grid. "gptq": the weights of a layer
    are rounded input by input, and those that are left make up for the error, least in
    E|(W - W') x|^2 over what the layer takes on `calibration`; the layers before it are rounded
    already. Layers that take the same, such as q, k and v, share the factor of their Gram matrix.

    Layers that share a weight, as an embedding and a head do, go on sharing it, on the embedding's
    grid. Activations stay in floating point. What is left as it is stands in the record of the
    change, with the reason: layers with hooks or parametrizations, matrices that a module reads in
    its own way, and weights that such a module shares.

    Args:
        model: any network.
        calibration: what the model takes, for "gptq": some hundreds of rows for each layer.
        grid: the levels, a `Grid` or its short form: "int8", "int4/32" (groups of 32 inputs share
            a scale), "nf4/64", "fp4/128 asymmetric"; or a mapping of names of layers to them, by
            which all other layers stay.
        method: "nearest" or "gptq".
        embeddings: whether tables are rounded, or the grid that they are rounded to.
        layers: the names of the layers that are rounded, all where it is None.
        dtype: what the model computes in from now on, as `cast` has it.

    Raises:
        NothingToReshape: no layer's weight can be held as codes.
        UnknownName: no layer, method, grid or type is called that.
        ValueError: a weight is not finite, a grid's groups do not divide a layer's inputs and it
            does not pad, or "gptq" is given no calibration.

    Paper: Frantar, Ashkboos, Hoefler, Alistarh, 2023, GPTQ: Accurate Post-Training Quantization
    for Generative Pre-trained Transformers.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> smaller = quantize_weights(model, grid="int4/32")
    >>> smaller[0].stored.codes.nbytes, model[0].weight.nbytes
    (2048, 16384)
    """
    checks.one_of(("nearest", "gptq"), method=method)
    if method == "gptq" and calibration is None:
        raise ValueError('calibration must be given for method="gptq": errors are weighed by what '
                         'each layer takes; pass some of what the model takes, or "nearest"')
    kind = None if dtype is None else dtype_of(dtype)
    grids, found = _grids(model, grid, embeddings, layers)
    _check(model, found, grids)
    stored: dict[str, QuantizedWeight] = {}
    if method == "gptq":
        stored = second_order(model, calibration, found.tied, grids, kind)
    held = {} if kind is None else held_back(model, kind)
    return decided({
        "tied": found.tied, "grids": {name: grids[name].as_plain() for name in found.names},
        "left": found.left, "dtype": None if kind is None else str(kind), "held": held},
        stored=stored)


@quantize_weights.applies
@torch.no_grad()
def with_codes(model: nn.Module, decision: Mapping[str, Any],
               stored: Mapping[str, QuantizedWeight] | None = None) -> nn.Module:
    """Put quantized layers in; where no codes are given, those of the nearest levels."""
    kind = None if decision["dtype"] is None else dtype_of(decision["dtype"])
    for names in decision["tied"]:
        held = (stored or {}).get(names[0])
        if held is None:
            # Built again, weights are whatever lay in memory, and come later.
            weight = weight_of(model.get_submodule(names[0])).nan_to_num()
            held = QuantizedWeight.of(weight, Grid.of(decision["grids"][names[0]]), dtype=kind)
        model = put(model, names, held)
    if kind is not None:
        become(model, kind, decision["held"])
    return finished(model)


def _grids(model: nn.Module, grid: Asked, embeddings: bool | Asked,
           layers: Sequence[str] | None) -> tuple[dict[str, Grid], Targets]:
    """Return the grid of each layer, and the layers."""
    each = isinstance(grid, Mapping) and "levels" not in grid
    asked = list(grid) if each and isinstance(grid, Mapping) else layers
    found = targets(model, asked, embeddings=embeddings is not False)
    if not found.names:
        raise nothing(model, "linear layer, convolution or embedding", found.left)
    grids: dict[str, Grid] = {}
    for names in found.tied:
        table = any(isinstance(model.get_submodule(name), nn.Embedding) for name in names)
        if each and isinstance(grid, Mapping):
            chosen: Any = grid[next(name for name in names if name in grid)]
        else:
            chosen = embeddings if table and not isinstance(embeddings, bool) else grid
        grids |= dict.fromkeys(names, Grid.of(chosen))
    return grids, found


def _check(model: nn.Module, found: Targets, grids: Mapping[str, Grid]) -> None:
    for names in found.tied:
        weight, grid = weight_of(model.get_submodule(names[0])), grids[names[0]]
        if not bool(weight.isfinite().all()):
            raise ValueError(f"model must hold finite weights, got {names[0]}.weight with "
                             f"{int((~weight.isfinite()).sum())} numbers that are not")
        width = weight[0].numel()
        if grid.group and width % grid.group and not grid.pad:
            raise ValueError(f"grid={grid} has groups of {grid.group}, which do not divide the "
                             f"{width} inputs of {names[0]}; give pad=True, or another group")
