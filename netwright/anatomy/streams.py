"""The residual streams of a network, with what adds to each."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from netwright.anatomy.calls import Call
from netwright.anatomy.layers import common
from netwright.anatomy.parts import Normalisation
from netwright.anatomy.residual import Sum, feeders, outermost, sums
from netwright.anatomy.run import Run

__all__ = ["Branch", "Stream"]


@dataclass(frozen=True)
class Branch:
    """What adds to a residual stream.

    Attributes:
        name: the outermost module whose output is added.
        feeders: the modules whose weights matter only through it, such as the norm before it.
        holds: what it is made of: "attention", "feedforward", "experts", "convolution",
            "recurrent", none or several of them.
        norm: the norm that goes with it.
        norm_place: "before" where the norm reads the stream, "within" where its result is what is
            added, "after" where it reads the sum.
    """

    name: str
    feeders: tuple[str, ...]
    holds: tuple[str, ...]
    norm: str | None
    norm_place: str | None


@dataclass(frozen=True)
class Stream:
    """A signal that sublayers read and add to.

    `name` is the smallest module that holds all of them, `width` how many features it has.
    """

    name: str
    width: int
    sublayers: tuple[Branch, ...]


def streams(run: Run, norms: list[tuple[Normalisation, Call]],
            marks: Mapping[str, set[int]]) -> list[Stream]:
    """Return the residual streams; `marks` are the values by which each kind of part shows."""
    through = {call.gave[0]: call.taken[0] for _, call in norms}
    ends: dict[int, int] = {}  # what an addition gave -> the number of its stream
    found: list[list[Sum]] = []
    normed: set[int] = set()  # the streams that go through a norm after a sum
    for made in sums(run):
        number, norm = _stream(run, made.before, ends, through)
        if number is None:
            number = len(found)
            found.append([])
        elif norm:
            normed.add(number)
        found[number].append(made)
        ends[made.after] = number
    outer = outermost([name for group in found for made in group for name in made.writers])
    made_streams = []
    for number, group in enumerate(found):
        places = ("before", "within", "after") if number in normed else ("before", "within")
        branches = {name: _branch(run, name, made, norms, marks, ends, places)
                    for made in group for name in made.writers if name in outer}
        if branches:
            made_streams.append(Stream(common(list(branches)), _width(run, group[0], marks),
                                       tuple(branches.values())))
    return made_streams


def _stream(run: Run, number: int, ends: Mapping[int, int],
            through: Mapping[int, int]) -> tuple[int | None, bool]:
    """Return the stream that `number` is, elementwise functions apart, and whether by a norm."""
    normed = False
    while number not in ends:
        if number in through:
            number, normed = through[number], True
            continue
        operation = run.maker.get(number)
        if operation is None or not (operation.layout or operation.elementwise):
            return None, False
        fed = [n for n in operation.taken if run.fed[n] and run.taught[n]]
        if len(fed) != 1:
            return None, False
        number = fed[0]
    return ends[number], normed


def _branch(run: Run, name: str, made: Sum, norms: list[tuple[Normalisation, Call]],
            marks: Mapping[str, set[int]], ends: Collection[int],
            places: Collection[str]) -> Branch:
    number = made.writers[name]
    inside = run.ancestors(number, apart={made.before, *ends})
    holds = tuple(kind for kind, numbers in marks.items() if numbers & inside)
    norm, place = _norm(run, made, inside, norms, places)
    return Branch(name, tuple(outermost(list(feeders(run, name, number)))), holds, norm, place)


def _norm(run: Run, made: Sum, inside: set[int], norms: list[tuple[Normalisation, Call]],
          places: Collection[str]) -> tuple[str | None, str | None]:
    """Return the norm that goes with an addition, and at which of `places` it stands."""
    for place in places:
        for norm, call in norms:
            if _stands(run, made, inside, call, place):
                return norm.name, place
    return None, None


def _stands(run: Run, made: Sum, inside: set[int], call: Call, place: str) -> bool:
    taken, gave = call.taken[0], call.gave[0]
    if place == "before":
        return run.source(taken) == run.source(made.before) and gave in inside
    if place == "within":
        return run.source(made.branch) == run.source(gave)
    return taken == made.after and all(
        reader.call is not None and call in reader.call.around()
        for reader in run.readers[taken])


def _width(run: Run, made: Sum, marks: Mapping[str, set[int]]) -> int:
    """Return how many features a stream has: channels come second where it is convolved."""
    shape = run.shapes[made.after]
    inside = run.ancestors(made.branch, apart=[made.before])
    convolved = len(shape) > 3 and marks.get("convolution", set()) & inside
    return shape[1 if convolved else -1]
