"""What is particular to Hugging Face's models: an example of their input, and their options."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from netwright.errors import CannotStage

_OFF = ("output_hidden_states", "output_attentions", "output_router_logits")


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is a Hugging Face model, without importing transformers."""
    return any(base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
               for base in type(model).__mro__)


def example_for(model: Any) -> dict[str, torch.Tensor]:
    """Return a small input for `model`, made from its configuration.

    Raises:
        CannotStage: the model takes something else than token numbers or images.
    """
    device = next(model.parameters()).device
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    name, config = model.main_input_name, model.config
    if name == "input_ids":
        tokens = torch.arange(16, device=device).view(2, 8) % config.vocab_size
        example = {"input_ids": tokens}
        if getattr(config, "is_encoder_decoder", False):
            example["decoder_input_ids"] = tokens
        return example
    if name == "pixel_values" and hasattr(config, "num_channels"):
        size = getattr(config, "image_size", None) or 64
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        # on a generator of its own, so that the global random state stays as it is
        noise = torch.randn(2, config.num_channels, height, width,
                            generator=torch.Generator().manual_seed(0))
        return {"pixel_values": noise.to(device, dtype)}
    raise CannotStage(f"{type(model).__name__} takes {name}, for which no example can be made; "
                      "give one as example=")


def options_for(model: Any, x: Any) -> dict[str, Any]:
    """Return the arguments that switch off the outputs that are gathered from every layer."""
    names = inspect.signature(type(model).forward).parameters
    catches = any(p.kind is p.VAR_KEYWORD for p in names.values())
    positional = len(x) if isinstance(x, (tuple, list)) else 0
    free = set(names) - set(list(names)[1:1 + positional])
    return {name: False for name in _OFF
            if (isinstance(x, Mapping) and name in x)
            or (getattr(model.config, name, None) and (name in free
                                                       or (catches and name not in names)))}


def is_cache(value: Any) -> bool:
    """Whether `value` is one of the caches that layers write keys and values to."""
    return any(base.__name__ == "Cache" and base.__module__ == "transformers.cache_utils"
               for base in type(value).__mro__)


def fresh(cache: Any) -> Any:
    """Return a cache in the state of `cache`, which what is written to it does not change.

    A cache that is run with cannot be left out where a model makes one: keys that went through
    it lie differently in memory, which changes the rounding.
    """
    new = copy.copy(cache)
    for name, value in vars(cache).items():
        if isinstance(value, list):
            new.__dict__[name] = [fresh(v) if hasattr(v, "__dict__") else v for v in value]
        elif isinstance(value, dict):
            new.__dict__[name] = dict(value)
        elif is_cache(value):
            new.__dict__[name] = fresh(value)
    return new
