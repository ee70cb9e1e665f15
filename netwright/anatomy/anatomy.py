from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from netwright import checks
from netwright.anatomy import parts
from netwright.anatomy.attention import Attention, attentions
from netwright.anatomy.elementwise import activation_name
from netwright.anatomy.feedforwards import FeedForwardLayer, feedforward_layers
from netwright.anatomy.products import Product, products
from netwright.anatomy.run import Run, record
from netwright.anatomy.streams import Stream, streams
from netwright.errors import NothingToReshape

__all__ = ["Anatomy", "FeedForward", "anatomy"]


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward layer: down(act(up(x))), or down(act(gate(x)) * up(x)) with a gate.

    `packed` is whether one layer gives both the gate and what it gates; `name` is the smallest
    module that holds it.
    """

    name: str
    up: str
    down: str
    gate: str | None
    activation: str
    dim: int
    hidden: int
    out: int
    packed: bool


@dataclass(frozen=True, repr=False)
class Anatomy:
    """What is inside a network, part by part; every part is plain data with names of modules.

    Attributes:
        network: the name of its class.
        streams: the residual streams with what adds to them, in order.
        attentions: attention layers.
        feedforwards: feed-forward layers, those inside of experts apart.
        experts: mixtures of experts.
        convolutions: convolutions.
        recurrents: recurrent layers and cells.
        linears: every linear map, those of the layers above among them.
        normalisations: norms.
        embeddings: tables of vectors.
        head: the layer whose output is the network's, None where there is no one layer.
        ties: parameters with several names.
        repeated: modules with weights that run several times.
        unused: modules whose weights nothing read.
    """

    network: str
    streams: tuple[Stream, ...]
    attentions: tuple[Attention, ...]
    feedforwards: tuple[FeedForward, ...]
    experts: tuple[parts.Experts, ...]
    convolutions: tuple[parts.Convolution, ...]
    recurrents: tuple[parts.Recurrent, ...]
    linears: tuple[parts.Linear, ...]
    normalisations: tuple[parts.Normalisation, ...]
    embeddings: tuple[parts.Embedding, ...]
    head: str | None
    ties: tuple[parts.Tie, ...]
    repeated: tuple[parts.Repeated, ...]
    unused: tuple[str, ...]

    def table(self) -> list[dict[str, str]]:
        """Return a row for each part: what it is, where it is, and its sizes.

        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> anatomy(network, torch.randn(2, 4)).table()[0]
        {'part': 'feed-forward', 'name': '', 'sizes': '4 -> 8 -> 3, relu'}
        """
        return [{"part": part, "name": name, "sizes": sizes} for part, name, sizes in _rows(self)]

    def __repr__(self) -> str:
        rows = [(part, name or "(the network)", sizes) for part, name, sizes in _rows(self)]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines = [f"  {part:{widths[0]}}  {name:{widths[1]}}  {sizes}".rstrip()
                 for part, name, sizes in rows]
        return "\n".join([f"Anatomy of {self.network}", *lines])


@checks.annotated
@torch.inference_mode(False)
def anatomy(network: nn.Module, example: Any) -> Anatomy:
    """Return what is inside `network`, found by watching it run on `example` in eval mode.

    Nothing is known of any architecture: a feed-forward layer is a product with weights whose
    result goes only through elementwise functions into another one, attention is a softmax
    between two products of activations, a sublayer adds to what it was computed from. What cannot
    be told is left out, or None. Whatever the run shows holds for inputs that take the same path.

    The network's mode, buffers, attributes and caches stay as they were, and so does the random
    state.

    Args:
        network: any module.
        example: what it takes: a tensor, a tuple of positional or a mapping of keyword arguments.

    Raises:
        NothingToReshape: the network was compiled by torch.compile, which hides its parts.

    >>> from netwright.models import gpt
    >>> found = anatomy(gpt(96, context=16, depth=2), torch.zeros(1, 16, dtype=torch.long))
    >>> [sublayer.name for sublayer in found.streams[0].sublayers]
    ['1.attention_out', '1.mlp_out', '2.attention_out', '2.mlp_out']
    >>> found.attentions[0].heads, found.feedforwards[0].activation, found.head
    (4, 'gelu', '4')
    """
    if hasattr(network, "_orig_mod"):
        raise NothingToReshape("network was compiled by torch.compile, which hides its parts; give "
                               "the module that was compiled, and compile the result")
    run = record(network, example)
    found = products(run)
    seen = attentions(run, found)
    mixtures = parts.experts(run, found)
    layers = [layer for layer in feedforward_layers(run, found, square=False)
              if layer.down is not None and not any(
                  _within(layer.down, block.experts) for block in mixtures)]
    norms = parts.norms(run)
    recurrents = parts.recurrents(run)
    convolved = parts.convolutions(run, found)
    marks = _marks(run, found, seen, layers, mixtures, recurrents)
    return Anatomy(
        type(network).__name__, tuple(streams(run, norms, marks)),
        tuple(dict.fromkeys(seen.values())), tuple(map(_plain, layers)), tuple(mixtures),
        tuple(convolved), tuple(recurrents), tuple(parts.linears(found)),
        tuple(dict.fromkeys(norm for norm, _ in norms)), tuple(parts.embeddings(run)),
        parts.head(run, found), tuple(parts.ties(network)), tuple(parts.repeated(run)),
        tuple(parts.unused(run, mixtures)))


def _plain(layer: FeedForwardLayer) -> FeedForward:
    return FeedForward(layer.name, str(layer.up), str(layer.down), layer.gate,
                       activation_name(layer.activation), layer.dim, layer.hidden, layer.out,
                       layer.gate is not None and layer.gate == layer.up)


def _marks(run: Run, found: list[Product], seen: dict[int, Attention],
           layers: list[FeedForwardLayer], mixtures: list[parts.Experts],
           recurrents: list[parts.Recurrent]) -> dict[str, set[int]]:
    """Return the values by which each kind of part shows in what was computed."""
    downs = {layer.down for layer in layers}
    marks = {"attention": set(seen),
             "feedforward": {p.gave for p in found if p.name in downs},
             "experts": {n for block in mixtures for call in run.calls
                         if call.name == block.name or _within(call.name, block.experts)
                         for n in call.gave},
             "convolution": {p.gave for p in found if p.convolution},
             "recurrent": {n for cell in recurrents for call in run.called(cell.name)
                           for n in call.gave}}
    return {kind: numbers for kind, numbers in marks.items() if numbers}


def _rows(found: Anatomy) -> Iterator[tuple[str, str, str]]:
    for stream in found.streams:
        yield ("residual stream", stream.name,
               f"{stream.width} wide, {len(stream.sublayers)} sublayers")
        for sublayer in stream.sublayers:
            holds = " and ".join(sublayer.holds)
            norm = (f"norm {sublayer.norm_place} it: {sublayer.norm}" if sublayer.norm else "")
            yield "sublayer", sublayer.name, ", ".join(filter(None, (holds, norm)))
    for attention in found.attentions:
        yield "attention", attention.name, _heads(attention)
    for layer in found.feedforwards:
        gated = "" if layer.gate is None else ", gated"
        yield ("feed-forward", layer.name,
               f"{layer.dim} -> {layer.hidden} -> {layer.out}, {layer.activation}{gated}")
    for block in found.experts:
        chosen = "" if block.chosen is None else f"{block.chosen} of "
        yield ("experts", block.name,
               f"{chosen}{block.count}, {block.dim} -> {block.hidden}"
               f"{', packed' * block.packed}")
    for convolution in found.convolutions:
        groups = f", {convolution.groups} groups" if convolution.groups > 1 else ""
        yield ("convolution", convolution.name, f"{convolution.inputs} -> {convolution.outputs}, "
               f"kernel {' x '.join(map(str, convolution.kernel))}{groups}")
    for cell in found.recurrents:
        yield "recurrent", cell.name, f"{cell.kind}, {cell.inputs} -> {cell.hidden}"
    for normalisation in found.normalisations:
        yield "normalisation", normalisation.name, f"{normalisation.kind}, {normalisation.width}"
    for table in found.embeddings:
        yield "embedding", table.name, f"{table.rows} x {table.width}"
    if found.head is not None:
        yield "head", found.head, ""
    for tie in found.ties:
        yield "tied", tie.names[0], " = ".join(tie.names[1:])
    for module in found.repeated:
        yield "repeated", module.name, f"runs {module.times} times"
    for name in found.unused:
        yield "unused", name, ""


def _heads(attention: Attention) -> str:
    heads = f"{attention.heads or '?'} heads of {attention.head_dim}"
    fewer = attention.key_heads not in (None, attention.heads)
    return ", ".join(filter(None, (
        heads, f"{attention.key_heads} for keys and values" if fewer else "",
        "one projection" if attention.fused else "", "across" if attention.cross else "")))


def _within(name: str | None, outer: str) -> bool:
    return name is not None and (name == outer or name.startswith(outer + "."))
