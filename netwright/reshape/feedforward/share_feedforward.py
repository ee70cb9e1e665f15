from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.anatomy.exchanging import (
    FeedForwardWeights,
    feedforward_weights,
    put_block,
    write_feedforward,
)
from netwright.anatomy.feedforwards import FeedForwardLayer, feedforwards
from netwright.anatomy.replacing import replace
from netwright.anatomy.residual import Place, Silent, trace
from netwright.catalogue.facets import method
from netwright.reshape._layers import layer_of, plain_layer
from netwright.reshape.change import decided, reshape
from netwright.runtime.random_state import same_random_state

__all__ = ["share_feedforward"]

STARTS = ("new", "first")


@method(
    "reshape",
    papers=["003-064"],
    place="feedforward",
    saves=["parameters", "file size", "inference memory", "inference time"],
    needs=["dense feed-forward layers", "training"],
    keeps_function=False,
    search={"hidden": [None, "budget"], "start": ["new", "first"]},
    variants={"new": {}, "first": {"start": "first", "hidden": 80}},
)
@reshape
@torch.no_grad()
def share_feedforward(model: nn.Module, hidden: int | Literal["budget"] | None = None,
                      example: Any = None, *, drop_decoder: bool = True,
                      start: Literal["new", "first"] = "new",
                      generator: Generator | None = None) -> nn.Module:
    """Return a copy in which one feed-forward layer serves every layer of the encoder.

    h_i := h_i + FFN(norm_i(h_i)) with the same FFN in each encoder layer i;  in the decoder, the
    feed-forward layers are taken out:  h := h + 0.

    Norms, activations and dropout stay each layer's own; what is shared are the linear layers.
    The decoder is what lies in a module called `decoder` where other feed-forward layers do not;
    a model of one stack has none, and all its layers share.

    The paper trains its models from the beginning, so the shared layer's weights are drawn anew,
    uniformly within 1 / sqrt(inputs), unless `start` is "first". Either way the function of a
    trained model is lost: train the result.

    Args:
        model: any module with layers that `feedforwards` finds.
        hidden: hidden units of the shared layer; as many as each layer had where None is given;
            "budget" for as many as give the weights that all layers had, those of the decoder
            among them if they are dropped ("One Wide FFN").
        example: what the model takes; see `feedforwards`. With it, a norm before a dropped layer
            goes too where it feeds only that; without it, such a norm stays and learns nothing.
        drop_decoder: whether the decoder loses its feed-forward layers; else they stay as they
            are.
        start: "new", or "first" to begin with the first encoder layer's units; further units then
            begin with zeros on their way out.
        generator: draws new weights.

    Raises:
        NothingToReshape: the model has no feed-forward layer.
        UnknownName: `start` is neither of the two.
        ValueError: the layers to be shared differ in their sizes, gates or biases, one is a block
            of experts, `hidden` is below 1, or below the first layer's where `start` is "first".

    Paper: Pires, Lopes, Assogba, Setiawan, 2023, One Wide Feedforward is All You Need.

    >>> model = nn.Transformer(16, 2, 2, 2, 32, batch_first=True)
    >>> wide = share_feedforward(model, "budget")
    >>> wide.encoder.layers[0].linear1 is wide.encoder.layers[1].linear1
    True
    >>> wide.encoder.layers[0].linear1.out_features
    129
    """
    checks.one_of(STARTS, start=start)
    found = feedforwards(model, example)
    dropped = _decoder(found) if drop_decoder else []
    shared = [layer for layer in found if layer not in _decoder(found)]
    first = shared[0]
    _check_alike(model, shared)
    width = _width(model, [*shared, *dropped], first) if hidden == "budget" else (
        first.hidden if hidden is None else hidden)
    checks.count(first.hidden if start == "first" else 1, hidden=width,
                 advice=f"start={start!r} needs as many")
    return decided({"shared": [plain_layer(layer, model) for layer in shared],
                    "dropped": [plain_layer(layer, model) for layer in dropped],
                    "norms": _norms(model, example, dropped), "hidden": width, "start": start},
                   generator=generator)


@share_feedforward.applies
@torch.no_grad()
def _shared(model: nn.Module, decision: Mapping[str, Any],
            generator: Generator | None = None) -> nn.Module:
    first, *others = (layer_of(said, model) for said in decision["shared"])
    dropped = [layer_of(said, model) for said in decision["dropped"]]
    result: Any = model
    write_feedforward(result, first, _drawn(feedforward_weights(model, first), decision["hidden"],
                                            decision["start"], generator))
    for layer in others:
        for name, source in zip(_linears(layer), _linears(first), strict=True):
            result = replace(result, name, result.get_submodule(source))
    for layer in dropped:
        result = put_block(result, layer, Silent(None, Place.STREAM))
    for name in decision["norms"]:
        result = replace(result, name, nn.Identity())
    result.shared_feedforward = tuple(layer.down for layer in (first, *others))
    return result


def _linears(layer: FeedForwardLayer) -> list[str]:
    return list(dict.fromkeys(
        name for name in (layer.up, layer.down, layer.gate) if name is not None))


def _decoder(found: Sequence[FeedForwardLayer]) -> list[FeedForwardLayer]:
    """Return the layers of the decoder of an encoder and a decoder."""
    inside = [layer for layer in found if "decoder" in (layer.down or layer.name).split(".")]
    return inside if len(inside) < len(found) else []


def _check_alike(model: nn.Module, layers: Sequence[FeedForwardLayer]) -> None:
    mixture = next((layer for layer in layers if layer.experts is not None), None)
    if mixture is not None:
        raise ValueError(f"layers that share must be pairs of matrices, but {mixture} is a block "
                         f"of {mixture.experts} experts behind a router; give a dense model, which "
                         "upcycle or moefy make a mixture of afterwards")
    first, *others = layers
    biases = [weights is not None for weights in feedforward_weights(model, first)]
    for layer in others:
        if (layer.dim, layer.hidden, layer.out, layer.gate is None, layer.packed) != (
                first.dim, first.hidden, first.out, first.gate is None, first.packed) or (
                [weights is not None for weights in feedforward_weights(model, layer)] != biases):
            raise ValueError(f"layers that share must be alike, but {first.down!r} has "
                             f"{first.dim} inputs, {first.hidden} hidden units and "
                             f"{'a' if first.gate else 'no'} gate, and {layer.down!r} has "
                             f"{layer.dim}, {layer.hidden} and {'a' if layer.gate else 'no'} gate, "
                             "or another bias")


def _width(model: nn.Module, layers: Sequence[FeedForwardLayer], first: FeedForwardLayer) -> int:
    """Return how many hidden units give the weights that `layers` have."""
    def count(layer: FeedForwardLayer) -> int:
        return sum(t.numel() for t in feedforward_weights(model, layer) if t is not None)

    down_bias = feedforward_weights(model, first).down_bias
    fixed = 0 if down_bias is None else down_bias.numel()
    unit = (count(first) - fixed) // first.hidden
    return (sum(map(count, layers)) - fixed) // unit


def _drawn(weights: FeedForwardWeights, width: int, start: str,
           generator: Generator | None) -> FeedForwardWeights:
    """Return weights of `width` hidden units."""
    hidden, dim = weights.up.shape

    def uniform(like: Tensor, shape: tuple[int, ...], inputs: int) -> Tensor:
        drawn = torch.rand(shape, generator=generator, dtype=torch.float32) * 2 - 1
        return (drawn / inputs ** 0.5).to(like.device, like.dtype)

    shapes = ((width, dim), (len(weights.down), width), (width, dim), (width,),
              (len(weights.down),), (width,))
    inputs = (dim, width, dim, dim, width, dim)
    drawn: list[Any] = [None if t is None else uniform(t, shape, fan_in)
                        for t, shape, fan_in in zip(weights, shapes, inputs, strict=True)]
    new = FeedForwardWeights(*drawn)
    if start == "first":
        for t, old in zip(new, weights, strict=True):
            if t is None or old is None:
                continue
            if old is weights.down:
                t.zero_()
                t[:, :hidden] = old
            else:
                t[:len(old)] = old
    return new


def _norms(model: nn.Module, example: Any, dropped: Sequence[FeedForwardLayer]) -> list[str]:
    """Return what feeds only the layers that are dropped, their own parts apart."""
    if example is None or not dropped:
        return []
    with same_random_state(), torch.enable_grad():
        sublayers = trace(deepcopy(model), example).sublayers
    parts = {name for layer in dropped for name in (*_linears(layer), layer.name if layer.whole
                                                    else layer.down)}
    names = []
    for sublayer in sublayers:
        if parts & {sublayer.name, *sublayer.feeders}:
            inner = [name for name in sublayer.feeders if name not in parts and not any(
                layer.whole and name.startswith(layer.name + ".") for layer in dropped)]
            names += inner
    return names
