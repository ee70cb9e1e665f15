"""Batches as loaders give them: labels among the inputs, and labels that are the next tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100


def labels_apart(network: nn.Module, x: Any, y: Any) -> tuple[Any, Any]:
    """Return what `network` reads and what its output is held against, from a batch (x, y).

    Where `y` is None and `x` a mapping with "labels", those are y, and x is the rest; a model that
    makes its decoder's input of them is given that. Labels of a model that continues its input
    stand at the token itself, as they do in Hugging Face's batches: they are moved to the place
    that predicts it. A y that is the token numbers of x is such labels too.

    >>> from torch import nn, tensor
    >>> x, y = labels_apart(nn.Embedding(3, 2), {"input": 1, "labels": tensor([2])}, None)
    >>> sorted(x), y
    (['input'], tensor([2]))
    """
    within = y is None and isinstance(x, Mapping) and isinstance(x.get("labels"), Tensor)
    if within:
        y = x["labels"]
        x = {**{name: part for name, part in x.items() if name != "labels"},
             **_decoder_input(network, x, y)}
    tokens = _tokens(x)
    if not isinstance(y, Tensor) or tokens is None or tokens.shape != y.shape:
        return x, y
    if not _continues(network):
        return x, y
    if within or y is tokens:
        return x, next_tokens(y)
    same = ((y == tokens) | (y == IGNORED)).all()  # on its device, for no step to wait for it
    return x, torch.where(same, next_tokens(y), y)


def next_tokens(y: Tensor) -> Tensor:
    """Return `y` one place to the left, with nothing to predict at the last.

    Shapes: y (batch, tokens) of int64.

    >>> from torch import tensor
    >>> next_tokens(tensor([[5, 6, 7]]))
    tensor([[   6,    7, -100]])
    """
    shifted = y.new_full(y.shape, IGNORED)
    shifted[:, :-1] = y[:, 1:]
    return shifted


def _tokens(x: Any) -> Tensor | None:
    if isinstance(x, Mapping):
        x = x.get("input_ids")
    elif isinstance(x, (tuple, list)) and x:
        x = x[0]
    whole = isinstance(x, Tensor) and x.ndim == 2 and not x.is_floating_point()
    return x if whole else None


def _continues(network: nn.Module) -> bool:
    """Whether `network` is a Hugging Face model that predicts what follows on its own input."""
    model: Any = next((module for module in network.modules()
                       if hasattr(type(module), "can_generate")), None)
    return (model is not None and bool(model.can_generate())
            and not getattr(model.config, "is_encoder_decoder", False))


def _decoder_input(network: nn.Module, x: Mapping[str, Any], labels: Tensor) -> dict[str, Tensor]:
    """Return the decoder's input where `network` makes it of the labels, and `x` holds none."""
    if "decoder_input_ids" in x or "decoder_inputs_embeds" in x:
        return {}
    make = "prepare_decoder_input_ids_from_labels"
    model: Any = next((m for m in network.modules() if hasattr(type(m), make)), None)
    return {} if model is None else {"decoder_input_ids": getattr(model, make)(labels)}
