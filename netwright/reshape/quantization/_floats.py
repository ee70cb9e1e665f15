"""A network in another floating-point type, and what of it stays in the one that it had."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map_only

from netwright.errors import UnknownName

__all__: list[str] = []

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
          "float64": torch.float64}


def dtype_of(asked: "str | torch.dtype") -> torch.dtype:
    """Return a floating-point type by its name, or itself.

    Raises:
        UnknownName: it is none in which networks compute.
    """
    name = str(asked).removeprefix("torch.")
    if name not in DTYPES:
        raise UnknownName("dtype", name, DTYPES)
    return DTYPES[name]


def held_back(model: nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """Return the tensors that must stay as they are when `model` becomes of `dtype`, and why."""
    held: dict[str, str] = {}
    tops = _kept_by_class(model, dtype)
    most = torch.finfo(dtype).max
    for path, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        for key, tensor in own.items():
            if tensor is None or not tensor.is_floating_point():
                continue
            name = f"{path}.{key}".lstrip(".")
            narrower = torch.finfo(dtype).eps > torch.finfo(tensor.dtype).eps
            if not narrower:
                continue
            if isinstance(module, _NormBase):
                held[name] = "statistics that are gathered in small steps"
            elif key in module._buffers and key in module._non_persistent_buffers_set:
                held[name] = "a table that the model makes for itself, such as of frequencies"
            elif set(name.split(".")) & tops:
                held[name] = "its class keeps it in full precision"
            elif tensor.numel() and float(tensor.detach().abs().max()) > most:
                held[name] = f"it holds numbers beyond {most:.3g}"
    return held


def _kept_by_class(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Return the names of parts that classes of transformers keep in float32."""
    attributes = ["_keep_in_fp32_modules_strict"]
    if dtype == torch.float16:
        attributes.append("_keep_in_fp32_modules")
    return {name for module in model.modules() for attribute in attributes
            for name in getattr(module, attribute, None) or ()}


def become(model: nn.Module, dtype: torch.dtype, held: dict[str, str]) -> nn.Module:
    """Turn what `model` computes in into `dtype`, in place, but for what is `held`."""
    turned: set[int] = set()
    for path, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                name = f"{path}.{key}".lstrip(".")
                if (tensor is not None and tensor.is_floating_point() and name not in held
                        and id(tensor) not in turned):
                    tensor.data = tensor.data.to(dtype)
                    turned.add(id(tensor))
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string") and hasattr(config, "dtype"):
        config.dtype = dtype
    for hook in list(model._forward_pre_hooks):
        if isinstance(model._forward_pre_hooks[hook], InputsIn):
            model._forward_pre_hooks[hook].dtype = dtype  # type: ignore[attr-defined]
            return model
    model.register_forward_pre_hook(InputsIn(dtype), with_kwargs=True, prepend=True)
    return model


class InputsIn:
    """Turns what a model is given into the floating-point type that it computes in."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the arguments in it."""
        def turned(tensor: Tensor) -> Tensor:
            return tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return tree_map_only(Tensor, turned, (args, kwargs))
