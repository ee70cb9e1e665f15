"""What a method is for, said on the method itself; everything that lists methods reads it there."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from torch import nn

from netwright import checks
from netwright.errors import UnknownName
from netwright.runtime.faces import declared, files

__all__ = ["Facets", "Method", "facets", "gist", "method", "methods", "searched"]

M = TypeVar("M")

KINDS = {
    "rule": "stands where loss.backward() stood",
    "reshape": "takes a network and returns a changed one",
    "block": "a module that networks are made of",
    "generative": "a density or a sampler",
    "optimizer": "steps on the parameters",
    "objective": "a loss or a metric",
    "measure": "tells what a network costs, or how it behaves",
    "model": "a whole network, or what grows one",
    "execution": "another way to run a network",
    "companion": "goes with another method",
    "formal": "learning as mathematics: learners, lenses, circuits",
}
PLACES = {
    "activation": "a function of each number",
    "attention": "tokens look at one another",
    "convolution": "a layer over a grid",
    "downsampling": "where a grid gets smaller",
    "embedding": "what an input is made of first",
    "experts": "what a router chooses among",
    "feedforward": "the layers that see each token by itself",
    "head": "what makes the answer of the last features",
    "linear": "one linear layer",
    "normalisation": "what scales and shifts features",
    "residual block": "one of the equal blocks that a network is a row of",
    "residual stream": "what is added up along the network, and the branches that add to it",
    "router": "what says which expert sees which token",
    "token mixing": "tokens look at one another, without attention",
    "transform": "a step of a flow",
    "whole network": "from the input to the answer",
}
SAVES = {
    "backpropagation": "the exact gradient need not be carried back through the whole network",
    "communication": "what machines send one another",
    "derivatives": "parts of the network need not have a derivative",
    "file size": "what is stored on disk",
    "inference memory": "what has to be in memory to use the network",
    "inference time": "the time that an answer takes",
    "labels": "samples that somebody has to label",
    "parameters": "numbers that are trained",
    "training memory": "what has to be in memory to train the network",
    "training time": "the time until the network is trained",
    "tuning": "trials to find good settings",
}
NEEDS = {
    "a chain of stages": "a network of three stages or more",
    "a circuit": "a network of Boolean or modular functions",
    "a graph": "nodes and edges as inputs",
    "a mixer": "tokens mixed by weights of their positions, as an MLPMixer does",
    "a recurrent network": "layers that run over time",
    "a residual network": "blocks that add to what they are given",
    "a transformer": "attention and feed-forward layers on a residual stream",
    "calibration data": "a batch or more of inputs, without labels",
    "classes": "targets that are classes",
    "coordinates": "positions as inputs",
    "dense feed-forward layers": "feed-forward layers that are no mixture of experts",
    "experts": "a mixture of experts in the network",
    "feed-forward layers in a row": "sublayers with nothing but feed-forward layers between",
    "guided layers": "structured layers that dense ones guide",
    "images": "a grid of positions as inputs",
    "labels": "targets to learn from",
    "linear layers": "a chain of linear layers with activations between them",
    "linear layers in a row": "two linear layers with nothing between, or idle units",
    "series": "values over time, or curves",
    "several processes": "a device or a process for each part",
    "tokens": "a row of symbols or of patches as inputs",
    "structured layers": "matrices that are products of smaller or sparser ones",
    "training": "training after the change",
}


@dataclass(frozen=True)
class Facets:
    """What a method says of itself.

    Args:
        kind: of `KINDS`.
        papers: ids of the catalogue.
        place: of `PLACES`, where a block goes, or what a reshape changes.
        takes: the arguments of a block's constructor that the place supplies.
        saves: of `SAVES`, what the method spares the one who uses it, by construction or as its
            evidence shows.
        needs: of `NEEDS`, what it cannot do without.
        keeps_function: whether outputs stay as they were, None where that makes no sense.
        search: what is tuned: (low, high) or a list of choices for an argument.
        variants: the few sets of arguments that take another path through the code, by a label,
            the first of them what a contract builds first.
        network: builds a small network to try them on, where an ordinary one will not do.
        batch: draws what goes in, where ordinary inputs will not do.
    """

    kind: str
    papers: tuple[str, ...] = ()
    place: str = ""
    takes: tuple[str, ...] = ()
    saves: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    keeps_function: bool | None = None
    search: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    network: Callable[[], nn.Module] | None = None
    batch: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Method:
    """A method of netwright's: its name, as in `rules.MonoForward`, what it is, what it says."""

    name: str
    value: Any
    facets: Facets

    @property
    def gist(self) -> str:
        """The first sentence of its docstring."""
        return gist(self.value)

    def __repr__(self) -> str:
        return f"<nw.{self.name}, a {self.facets.kind}: {self.gist}>"


@checks.annotated
def method(kind: str, *, papers: Sequence[str] = (), place: str = "", takes: Sequence[str] = (),
           saves: Sequence[str] = (), needs: Sequence[str] = (),
           keeps_function: bool | None = None, search: Mapping[str, Any] | None = None,
           variants: Mapping[str, Mapping[str, Any]] | None = None,
           network: Callable[[], nn.Module] | None = None,
           batch: Callable[[], Any] | None = None) -> Callable[[M], M]:
    """Say of a class or a function what it is for, see `Facets`; it then checks its arguments.

    Args: those of `Facets`.

    Raises:
        UnknownName: a word is none of those that are in use.

    >>> @method("block", place="feedforward", takes=("dim", "hidden"), saves=["inference time"])
    ... class Small(nn.Module):
    ...     pass
    >>> facets(Small).place
    'feedforward'
    """
    for what, given, known in (
            ("kind", [kind], KINDS), ("place", [place] if place else [], PLACES),
            ("saving", saves, SAVES), ("need", needs, NEEDS)):
        for word in given:
            if word not in known:
                raise UnknownName(what, word, known)
    said = Facets(kind, tuple(papers), place, tuple(takes), tuple(saves), tuple(needs),
                  keeps_function, search or {}, variants or {}, network, batch)

    def say(value: M) -> M:
        checked = checks.annotated(value)
        for known in (value, checked):  # a function may ask what was said of it itself
            known.facets = said  # type: ignore[attr-defined]
        return checked
    return say


def facets(value: Any) -> Facets | None:
    """Return what a class or function says of itself, None where it says nothing.

    What a class inherits from does not speak for it.
    """
    said = vars(value).get("facets") if hasattr(value, "__dict__") else None
    return said if isinstance(said, Facets) else None


def searched(value: Any) -> Mapping[str, Any]:
    """Return what is tuned of a class or function; what it inherits from speaks for it here.

    A class or function that says nothing by `method` may have an attribute `search` instead.
    """
    own = getattr(value, "search", None)
    said = getattr(value, "facets", None)
    if isinstance(own, Mapping):
        return own
    return said.search if isinstance(said, Facets) else {}


@checks.annotated
def gist(value: Any) -> str:
    """Return the first sentence of a docstring on one line.

    >>> gist(gist)
    'Return the first sentence of a docstring on one line.'
    """
    return " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())


@cache
def methods() -> dict[str, Method]:
    """Return every method of netwright's by its name; finding them imports their files.

    >>> methods()["rules.Backprop"].facets.kind
    'rule'
    """
    found = {}
    for module, path in files("netwright"):
        if "\n@method(" not in path.read_text(encoding="utf-8"):
            continue
        loaded = importlib.import_module(module)
        for name in declared(path):
            value = getattr(loaded, name)
            said = facets(value)
            if said is not None:
                public = public_name(module, name)
                found[public] = Method(public, value, said)
    return dict(sorted(found.items()))


def public_name(module: str, name: str) -> str:
    """Return how a name of `module` is written after `nw.`.

    >>> public_name("netwright.generative.flows.ffjord", "FFJORD")
    'flows.FFJORD'
    """
    top = importlib.import_module("netwright")
    rooms = {room: where for room, where in top._rooms.items()
             if module == where or module.startswith(where + ".")}
    if not rooms:
        return name
    return f"{max(rooms, key=lambda room: len(rooms[room]))}.{name}"
