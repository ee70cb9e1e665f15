from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from netwright.anatomy.layers import is_linear
from netwright.anatomy.replacing import replace
from netwright.blocks.quantized.dynamic_linear import DynamicLinear
from netwright.blocks.quantized.stored import QuantizedWeight
from netwright.catalogue.facets import method
from netwright.reshape.change import decided, reshape
from netwright.reshape.quantization._floats import become, dtype_of, held_back
from netwright.reshape.quantization._targets import finished, nothing, targets, weight_of

__all__ = ["quantize_dynamic"]


@method(
    "reshape",
    place="linear",
    saves=["file size", "inference memory", "inference time"],
    keeps_function=False,
    search={"dtype": [None, "bfloat16"]},
    variants={"float32": {}, "in bfloat16": {"dtype": "bfloat16"}},
)
@reshape
@torch.no_grad()
def quantize_dynamic(model: nn.Module, *, layers: Sequence[str] | None = None,
                     dtype: str | torch.dtype | None = None) -> nn.Module:
    """Return a copy whose linear layers multiply whole numbers of eight bits.

    Weights have a scale for each output, activations one for each row, which is found as they
    come: no calibration is needed, and no row's answer turns on the others. Embeddings,
    convolutions and layers that share their weight with one of these stay as they are;
    `quantize_weights` makes those smaller. What is left is in the record of the change, with the
    reason.

    Args:
        model: any network.
        layers: the names of the linear layers that are changed, all where it is None.
        dtype: what the rest of the model computes in from now on, as `cast` has it.

    Raises:
        NothingToReshape: the model has no linear layer that can be changed.
        UnknownName: no layer or type is called that.
        ValueError: a weight is not finite.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> faster = quantize_dynamic(model)
    >>> faster[0].stored.codes.dtype, faster(torch.randn(3, 64)).shape
    (torch.int8, torch.Size([3, 8]))
    """
    kind = None if dtype is None else dtype_of(dtype)
    found = targets(model, layers, embeddings=True)
    tied = [names for names in found.tied
            if all(is_linear(model.get_submodule(name)) for name in names)]
    others = {name: f"a {type(model.get_submodule(name)).__name__}, or tied to one"
              for names in found.tied if names not in tied for name in names}
    if not tied:
        raise nothing(model, "linear layer", found.left | others)
    for names in tied:
        if not bool(weight_of(model.get_submodule(names[0])).isfinite().all()):
            raise ValueError(f"model must hold finite weights, got {names[0]}.weight with some "
                             "that are not")
    held = {} if kind is None else held_back(model, kind)
    return decided({"tied": tied, "left": found.left | others, "held": held,
                    "dtype": None if kind is None else str(kind)})


@quantize_dynamic.applies
@torch.no_grad()
def with_products_of_codes(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    """Put layers in that multiply whole numbers."""
    for names in decision["tied"]:
        # Where a model is built again, its weights are whatever lay in memory and come later.
        weight = weight_of(model.get_submodule(names[0])).nan_to_num()
        held = QuantizedWeight.of(weight, "int8")
        for name in names:
            layer: Any = model.get_submodule(name)
            model = replace(model, name, DynamicLinear.holding(held, layer.bias))
    if decision["dtype"] is not None:
        become(model, dtype_of(decision["dtype"]), decision["held"])
    return finished(model)
