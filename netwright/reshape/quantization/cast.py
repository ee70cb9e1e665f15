from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape.change import decided, reshape
from netwright.reshape.quantization._floats import become, dtype_of, held_back

__all__ = ["cast"]


@method(
    "reshape",
    place="whole network",
    saves=["file size", "inference memory", "inference time", "training memory"],
    keeps_function=False,
    search={"dtype": ["bfloat16", "float16"]},
    variants={"bfloat16": {"dtype": "bfloat16"}, "float16": {"dtype": "float16"}},
)
@reshape
def cast(model: nn.Module, dtype: str | torch.dtype = "bfloat16") -> nn.Module:
    """Return a copy that computes in another floating-point type, but for what must not.

    In a narrower type these stay as they were: running statistics and weights of batch norms,
    which are moved in steps that a narrow type loses; tables that a model makes for itself, as the
    frequencies of rotary positions, which are not in its state; what a class of transformers keeps
    in float32; and what holds numbers beyond the type's largest. They are in the record of the
    change, each with the reason. Inputs are turned into the type when the model is called.

    Args:
        model: any network.
        dtype: "bfloat16", "float16", "float32" or "float64", or the type itself. On a CPU float16
            is slow.

    Raises:
        NothingToReshape: all of the model is in that type, or nothing may be.
        UnknownName: `dtype` is no such type.

    >>> half = cast(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), "bfloat16")
    >>> half(torch.randn(2, 4)).dtype, half[0].weight.dtype, half[1].running_var.dtype
    (torch.bfloat16, torch.bfloat16, torch.float32)
    """
    kind = dtype_of(dtype)
    held = held_back(model, kind)
    others = [name for name, tensor in (*model.named_parameters(), *model.named_buffers())
              if tensor.is_floating_point() and tensor.dtype != kind and name not in held]
    if not others:
        raise NothingToReshape(f"{type(model).__name__} holds nothing that is not in {kind} and "
                               f"may be; {len(held)} tensors stay as they are")
    return decided({"dtype": str(kind), "held": held})


@cast.applies
def in_dtype(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    """Turn `model` into the type."""
    return become(model, dtype_of(decision["dtype"]), decision["held"])
