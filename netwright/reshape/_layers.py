"""Feed-forward layers as plain data, and back."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from netwright.anatomy.elementwise import ITSELF, Expression, Itself, Named
from netwright.anatomy.feedforwards import FeedForwardLayer
from netwright.reshape._naming import name_of, plain, resolved, restored


def plain_layer(layer: FeedForwardLayer, model: nn.Module) -> dict[str, Any]:
    """Return where a layer of `model` is and what it computes, as plain data.

    >>> from netwright.models import gpt
    >>> from netwright.reshape.feedforward import feedforwards
    >>> model = gpt(96, context=16)
    >>> layer = feedforwards(model)[0]
    >>> layer_of(plain_layer(layer, model), model) == layer
    True
    """
    names = {module: name for name, module in model.named_modules()}
    return dict(vars(layer)) | {"activation": _plain(layer.activation, names)}


def layer_of(said: Mapping[str, Any], model: nn.Module) -> FeedForwardLayer:
    """Return the layer of `model` that `plain_layer` described."""
    layer = FeedForwardLayer(**said)
    return replace(layer, activation=_restored(said["activation"], model))


def _plain(part: Any, names: Mapping[nn.Module, str]) -> Any:
    match part:
        case Itself():
            return {"itself": True}
        case Named():
            return {"named": part.name}
        case Expression():
            return {"call": name_of(part.function) or str(part.function),
                    "given": [_plain(a, names) for a in part.args],
                    "options": {k: _plain(a, names) for k, a in part.kwargs.items()}}
        case nn.Module() if part in names:
            return {"module": names[part]}
        case nn.Module() if name_of(type(part)) and str(part) == f"{type(part).__name__}()":
            return {"block": name_of(type(part))}
    return plain(part)


def _restored(said: Any, model: nn.Module) -> Any:
    match said:
        case {"itself": True}:
            return ITSELF
        case {"named": name}:
            return Named(name, model.get_submodule(name))
        case {"call": name}:
            return Expression(resolved(name), tuple(_restored(a, model) for a in said["given"]),
                              {k: _restored(a, model) for k, a in said["options"].items()})
        case {"module": name}:
            return model.get_submodule(name)
        case {"unnamed": _}:
            return None
    return restored(said)
