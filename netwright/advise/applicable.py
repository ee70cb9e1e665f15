"""What can be done to a network, by what is inside it and what it is given."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from itertools import pairwise
from textwrap import shorten
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from netwright import checks
from netwright.anatomy import Anatomy, anatomy
from netwright.blocks.feedforward import RePaFeedForward, SelfGuided, StructuredLinear
from netwright.blocks.mixing import MLPMixer
from netwright.catalogue.facets import Method
from netwright.catalogue.find import find
from netwright.errors import CannotStage, NothingToReshape
from netwright.formal.circuits import PolynomialCircuit
from netwright.runtime.random_state import same_random_state
from netwright.stages import Stages, stages

__all__ = ["Applicable", "Candidate", "applicable"]

KINDS = ("rule", "reshape", "block", "execution", "optimizer")


class Missing(Exception):
    """A network lacks what a method needs; the message says what."""


@dataclass(frozen=True)
class Candidate:
    """A method beside a network: whether it applies, and where, or why not.

    `asks` is what whoever uses it must have besides, such as labels.
    """

    method: Method
    applies: bool
    why: str
    asks: tuple[str, ...]


class Applicable(list[Candidate]):
    """Changes to one network, those best shown first; what is printed is a table of them."""

    @property
    def names(self) -> list[str]:
        """How each method is written after `nw.`."""
        return [change.method.name for change in self]

    def rows(self) -> list[dict[str, Any]]:
        """Return each change as plain data."""
        return [{"name": change.method.name, "kind": change.method.facets.kind,
                 "applies": change.applies, "why": change.why, "asks": [*change.asks],
                 "saves": [*change.method.facets.saves], "gist": change.method.gist}
                for change in self]

    def __repr__(self) -> str:
        if not self:
            return "nothing applies; all=True says why"
        lines = [("name", "where, or why not", "saves", "asks for"),
                 *((change.method.name, ("" if change.applies else "no: ") + change.why,
                    shorten(", ".join(change.method.facets.saves), 40, placeholder=" …"),
                    ", ".join(change.asks)) for change in self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


@checks.annotated
def applicable(model: nn.Module, example: Any, *, need: str | Sequence[str] = (), kind: str = "",
               without: str | Sequence[str] = (), all: bool = False) -> Applicable:
    """Return what can be done to this network, with the places that it is done to.

    The network is watched while it runs on `example`, and what each rule, reshape, block and
    other change says that it needs is looked for in what was seen. A method may still refuse for
    a reason of its own, which it then gives.

    Args:
        model: any module; it is left as it is.
        example: what it takes: a tensor, a tuple of arguments or a mapping of keywords.
        need: what shall be saved, as for `find`.
        kind: only changes of this kind.
        without: what must not be needed, as for `find`.
        all: whether what does not apply is returned too, with the reason.

    Raises:
        UnknownName: a word is none of those that methods name.

    >>> import torch
    >>> from netwright.models import gpt
    >>> x = torch.zeros(2, 16, dtype=torch.long)
    >>> found = applicable(gpt(96, context=16), x, need="inference time", kind="reshape")
    >>> "reshape.moefy" in found.names, found[0].why
    (True, '4 sublayers: 1.attention_out, 1.mlp_out, …')
    """
    seen = Seen(model.model if isinstance(model, Stages) else model, example)
    found = (judged(entry, seen) for entry in find(need=need, kind=kind, without=without)
             if entry.facets.kind in KINDS)
    return Applicable(change for change in found if all or change.applies)


def judged(entry: Method, seen: "Seen") -> Candidate:
    said = entry.facets
    asks = tuple(need for need in said.needs if need not in INSIDE)
    try:
        inside = [INSIDE[need](seen) for need in said.needs if need in INSIDE]
        changed = CHANGED if said.kind == "reshape" else PLACES
        where = [changed.get(said.place, PLACES[said.place])(seen)] if said.place else []
        _ask(entry.value, seen)
    except (Missing, NothingToReshape) as missing:
        return Candidate(entry, False, str(missing), asks)
    return Candidate(entry, True, (where or inside or ["the whole network"])[0], asks)


def _ask(change: Any, seen: "Seen") -> None:
    """Let a reshape that decides without data say whether it finds anything to change."""
    if not hasattr(change, "decide"):
        return
    _, *others = signature(change).parameters.values()
    names = {p.name for p in others}
    if "calibration" in names or any(p.default is p.empty for p in others if p.name != "example"):
        return
    try:
        with same_random_state():
            change.decide(seen.model, **({"example": seen.example} if "example" in names else {}))
    except ValueError as error:
        if isinstance(error, NothingToReshape):
            raise  # any other: it has found its places, and has a reason of its own to refuse them


@dataclass
class Seen:
    """A network and an input, and what is seen of them; only what is asked for is looked at."""

    model: nn.Module
    example: Any

    @cached_property
    def anatomy(self) -> Anatomy:
        return anatomy(self.model, self.example)

    @cached_property
    def stages(self) -> "Stages | CannotStage":
        try:
            return stages(self.model, self.example)
        except CannotStage as error:
            return error

    @cached_property
    def input(self) -> Tensor:
        """The first tensor that goes in."""
        given = self.example
        leaves = tree_leaves(dict(given) if isinstance(given, Mapping) else given)
        return next(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def holds(self, kind: type[nn.Module]) -> list[str]:
        """Return the names of the modules of a class."""
        return [name for name, module in self.model.named_modules() if isinstance(module, kind)]

    @property
    def sublayers(self) -> list[Any]:
        return [sublayer for stream in self.anatomy.streams for sublayer in stream.sublayers]


def _told(what: str, names: Iterable[str], several: str = "") -> str:
    """Return how many there are and what the first are called; raise where there is none."""
    names = [*dict.fromkeys(names)]
    if not names:
        raise Missing(f"the network has no {what}")
    shown = [name or "the network itself" for name in names[:2]] + ["…"] * (len(names) > 2)
    many = several or f"{what}s"
    return f"{len(names)} {what if len(names) == 1 else many}: {', '.join(shown)}"


def _stages(seen: Seen) -> str:
    if isinstance(seen.stages, CannotStage):
        raise Missing("the network is no chain of stages; nw.stages says what was seen")
    if len(seen.stages) < 3:
        raise Missing(f"the network has {len(seen.stages)} stages, so that hardly any is hidden")
    return _told("stage", seen.stages.names)


def _residual(seen: Seen) -> str:
    if not seen.sublayers:
        raise Missing("the network has no residual stream")
    return _told("sublayer", (part.name for part in seen.sublayers))


def _transformer(seen: Seen) -> str:
    _attention(seen)
    return _residual(seen)


def _attention(seen: Seen) -> str:
    return _told("attention layer", (part.name for part in seen.anatomy.attentions))


def _dense(seen: Seen) -> str:
    return _told("feed-forward layer", (part.name for part in seen.anatomy.feedforwards
                                        if part.dim == part.out))


def _feedforward(seen: Seen) -> str:
    mixtures = [part.name for part in seen.anatomy.experts]
    return _told("feed-forward layer", mixtures) if mixtures else _dense(seen)


def _rows_of_feedforwards(seen: Seen) -> str:
    neighbours = (pair for stream in seen.anatomy.streams
                  for pair in pairwise(stream.sublayers))
    return _told("feed-forward layer behind another", (
        second.name for first, second in neighbours
        if first.holds == second.holds == ("feedforward",)),
        "feed-forward layers behind another")


def _linear_rows(seen: Seen) -> str:
    pairs = [name for name, module in seen.model.named_modules()
             if isinstance(module, nn.Sequential) and _two_linear(module)]
    return _told("place where linear maps follow one another",
                 [*seen.holds(RePaFeedForward), *pairs],
                 "places where linear maps follow one another")


def _two_linear(chain: nn.Sequential) -> bool:
    parts = [part for part in chain if not isinstance(part, nn.Identity)]
    return any(isinstance(a, nn.Linear) and isinstance(b, nn.Linear)
               for a, b in pairwise(parts))


def _linear_chain(seen: Seen) -> str:
    found = seen.anatomy
    if not isinstance(seen.model, nn.Sequential) or (
            found.attentions or found.convolutions or found.recurrents or found.normalisations):
        raise Missing("the network is no nn.Sequential of linear layers and activations alone")
    return _told("linear layer", (part.name for part in found.linears))


def _experts(seen: Seen) -> str:
    return _told("mixture of experts", (part.name for part in seen.anatomy.experts),
                 "mixtures of experts")


def _router(seen: Seen) -> str:
    return _experts(seen) if seen.anatomy.experts else _feedforward(seen)


def _convolution(seen: Seen) -> str:
    return _told("convolution", (part.name for part in seen.anatomy.convolutions))


def _downsampling(seen: Seen) -> str:
    return _told("convolution with a stride", (
        part.name for part in seen.anatomy.convolutions if max(part.stride) > 1),
        "convolutions with a stride")


def _recurrent(seen: Seen) -> str:
    return _told("recurrent layer", (part.name for part in seen.anatomy.recurrents))


def _linear(seen: Seen) -> str:
    return _told("linear layer", (part.name for part in seen.anatomy.linears))


def _normalisation(seen: Seen) -> str:
    return _told("norm", (part.name for part in seen.anatomy.normalisations))


def _activation(seen: Seen) -> str:
    modules = [name for name, module in seen.model.named_modules()
               if type(module).__module__ == "torch.nn.modules.activation"
               and not isinstance(module, nn.MultiheadAttention)]
    within = [f"in {part.name}" for part in seen.anatomy.feedforwards]
    return _told("activation", modules or within)


def _embedding(seen: Seen) -> str:
    found = seen.anatomy
    return _told("embedding", [part.name for part in found.embeddings]
                 or [part.name for part in found.linears][:1])


def _head(seen: Seen) -> str:
    return _told("head", [seen.anatomy.head] if seen.anatomy.head is not None else [])


def _structured(seen: Seen) -> str:
    return _told("structured layer", seen.holds(StructuredLinear))


def _guided(seen: Seen) -> str:
    return _told("guided layer", seen.holds(SelfGuided))


def _mixer(seen: Seen) -> str:
    return _told("mixer", seen.holds(MLPMixer))


def _token_mixing(seen: Seen) -> str:
    return _mixer(seen) if seen.holds(MLPMixer) else _attention(seen)


def _circuit(seen: Seen) -> str:
    return _told("circuit", seen.holds(PolynomialCircuit))


def _graph(seen: Seen) -> str:
    given = seen.example
    edges = given.get("edge_index") if isinstance(given, Mapping) else (
        given[1] if isinstance(given, Sequence) and len(given) > 1 else None)
    if not (isinstance(edges, Tensor) and edges.ndim == 2 and len(edges) == 2
            and not edges.is_floating_point()):
        raise Missing("the input is no graph: nodes, and edges (2, edges)")
    return f"a graph of {len(seen.input)} nodes"


def _images(seen: Seen) -> str:
    if not seen.input.is_floating_point() or seen.input.ndim < 4:
        raise Missing(f"the input is no image but {_shape(seen.input)}")
    return f"images {_shape(seen.input)}"


def _tokens(seen: Seen) -> str:
    if seen.input.is_floating_point() and not seen.anatomy.attentions:
        raise Missing(f"the input is no row of tokens but {_shape(seen.input)}")
    return f"tokens {_shape(seen.input)}"


def _coordinates(seen: Seen) -> str:
    if not seen.input.is_floating_point() or seen.input.ndim < 2 or seen.input.shape[-1] > 4:
        raise Missing(f"the input holds no coordinates but {_shape(seen.input)}")
    return f"coordinates {_shape(seen.input)}"


def _series(seen: Seen) -> str:
    if not seen.input.is_floating_point() or seen.input.ndim not in (2, 3):
        raise Missing(f"the input is no series but {_shape(seen.input)}")
    return f"series {_shape(seen.input)}"


def _shape(tensor: Tensor) -> str:
    kind = "floats" if tensor.is_floating_point() else "whole numbers"
    return f"{kind} ({', '.join(map(str, tensor.shape))})"


def _instead(seen: Seen) -> str:
    raise Missing("it is a whole network, to be taken instead of this one")


def _all_of_it(seen: Seen) -> str:
    return "the whole network"


def _flow(seen: Seen) -> str:
    raise Missing("it is a step of a flow")


Look = Callable[[Seen], str]

# What methods need of the network and its inputs; all else they need of whoever uses them.
INSIDE: dict[str, Look] = {
    "a chain of stages": _stages, "a circuit": _circuit, "a graph": _graph, "a mixer": _mixer,
    "a recurrent network": _recurrent, "a residual network": _residual,
    "a transformer": _transformer, "coordinates": _coordinates,
    "dense feed-forward layers": _dense, "experts": _experts,
    "feed-forward layers in a row": _rows_of_feedforwards, "guided layers": _guided,
    "images": _images, "linear layers": _linear_chain, "linear layers in a row": _linear_rows,
    "series": _series, "structured layers": _structured, "tokens": _tokens,
}
PLACES: dict[str, Look] = {
    "activation": _activation, "attention": _attention, "convolution": _convolution,
    "downsampling": _downsampling, "embedding": _embedding, "experts": _router,
    "feedforward": _feedforward, "head": _head, "linear": _linear,
    "normalisation": _normalisation, "residual block": _residual, "residual stream": _residual,
    "router": _router, "token mixing": _token_mixing, "transform": _flow,
    "whole network": _instead,
}
# Where a reshape changes what is there, and a block would be put where something else is.
CHANGED: dict[str, Look] = {"experts": _experts, "token mixing": _mixer,
                            "whole network": _all_of_it}
