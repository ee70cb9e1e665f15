"""Which part of a network's anatomy its weights and operations belong to."""

from collections.abc import Iterator

import torch

from netwright.anatomy import Anatomy

KINDS = ("embedding", "attention", "feed-forward", "experts", "convolution", "recurrent",
         "linear", "normalisation", "pooling", "gathering", "head", "elementwise", "the rest")
_MIXING = ("softmax", "scaled_dot_product", "bmm", "masked_fill")  # attention, written out


class Kinds:
    """Tells the kind of a module's weights and operations, by the nearest part that holds them.

    A module that holds attention, a feed-forward layer and more besides lends its own operations
    to either by what they are: products of activations are attention's, an activation is the
    feed-forward layer's.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.exact = dict(_exact(anatomy))
        self.whole = {**{cell.name: "recurrent" for cell in anatomy.recurrents},
                      **{block.name: "experts" for block in anatomy.experts}}
        attentions = {part.name for part in anatomy.attentions}
        layers = {part.name for part in anatomy.feedforwards}
        self.activations = {part.name: part.activation for part in anatomy.feedforwards}
        self.mixed = {name for name in attentions | layers if self._is_mixed(name, attentions,
                                                                             layers)}
        self.around = {**dict.fromkeys(layers, "feed-forward"),
                       **dict.fromkeys(attentions, "attention")}

    def of(self, module: str, operation: "torch._ops.OpOverload | None" = None) -> str:
        """Return the kind of what a module holds, or of an operation that runs in it."""
        around = [*_outwards(module)]
        whole = next((self.whole[name] for name in around if name in self.whole), "")
        if whole:
            return whole
        for name in around:
            if name in self.exact:
                return self.exact[name]
            if name in self.mixed:
                kind = self._by_operation(name, operation)
            else:
                kind = self.around.get(name, "")
            if kind:
                return kind
        return _by_nature(operation)

    def of_weight(self, name: str) -> str:
        """Return the kind of a parameter or a buffer."""
        module = name.rpartition(".")[0]
        held = any(around in self.whole for around in _outwards(module))
        return self.of(module) if held else self.exact.get(name) or self.of(module)

    def _by_operation(self, name: str, operation: "torch._ops.OpOverload | None") -> str:
        bare = "" if operation is None else operation.overloadpacket.__name__.strip("_")
        if self.around[name] == "attention" and any(part in bare for part in _MIXING):
            return "attention"
        activation = self.activations.get(name, "")
        return "feed-forward" if bare and activation.startswith(bare) else ""

    def _is_mixed(self, name: str, attentions: set[str], layers: set[str]) -> bool:
        """Return whether a module holds parts of several kinds, norms apart."""
        inside = {kind for part, kind in self.exact.items()
                  if _within(part, name) and kind != "normalisation"}
        inside |= {"attention" for part in attentions if _within(part, name)}
        inside |= {"feed-forward" for part in layers if _within(part, name)}
        return len(inside) > 1


def _exact(anatomy: Anatomy) -> Iterator[tuple[str, str]]:
    """Yield the names of parts with their kinds; of two kinds of one name the later counts."""
    for part in anatomy.linears:
        yield part.name, "linear"
    for norm in anatomy.normalisations:
        yield norm.name, "normalisation"
    for table in anatomy.embeddings:
        yield table.name, "embedding"
    for convolution in anatomy.convolutions:
        yield convolution.name, "convolution"
    for layer in anatomy.feedforwards:
        for name in (layer.up, layer.gate, layer.down):
            if name is not None:
                yield name, "feed-forward"
    for attention in anatomy.attentions:
        for name in (attention.query, attention.key, attention.value, attention.out):
            if name is not None:
                yield name, "attention"
    if anatomy.head is not None and anatomy.head not in {table.name for table in
                                                         anatomy.embeddings}:
        yield anatomy.head, "head"


def _by_nature(operation: "torch._ops.OpOverload | None") -> str:
    if operation is None:
        return "the rest"
    name = operation.overloadpacket.__name__
    for part, kind in (("pool", "pooling"), ("scatter", "gathering"), ("gather", "gathering"),
                       ("index", "gathering")):
        if part in name:
            return kind
    return "elementwise" if torch.Tag.pointwise in operation.tags else "the rest"


def _outwards(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _within(part: str, name: str) -> bool:
    return part == name or not name or part.startswith(f"{name}.")
