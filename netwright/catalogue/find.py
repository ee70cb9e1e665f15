"""Finding methods: by what they save, where they go, what they are, what is written of them."""

from collections.abc import Iterable, Mapping, Sequence
from textwrap import shorten
from typing import Any

from netwright import checks
from netwright.catalogue.facets import KINDS, NEEDS, PLACES, SAVES, Method, methods
from netwright.catalogue.papers import paper, verdicts
from netwright.errors import UnknownName

__all__ = ["Found", "find"]

VERDICTS = ("shown", "partly shown", "not shown")


class Found(list[Method]):
    """Methods, best shown first; what is printed is a table of them.

    >>> found = find(kind="optimizer")
    >>> found.names
    ['optim.BlockProximalDescent', 'optim.GreedyBlockDescent']
    """

    @property
    def names(self) -> list[str]:
        """How each is written after `nw.`."""
        return [entry.name for entry in self]

    def rows(self) -> list[dict[str, Any]]:
        """Return what each says of itself, as plain data."""
        return [{"name": entry.name, "kind": entry.facets.kind, "place": entry.facets.place,
                 "gist": entry.gist, "saves": [*entry.facets.saves],
                 "needs": [*entry.facets.needs], "keeps_function": entry.facets.keeps_function,
                 "search": {name: repr(values) for name, values in entry.facets.search.items()},
                 "papers": [*entry.facets.papers], "measured": measured(entry)}
                for entry in self]

    def __repr__(self) -> str:
        if not self:
            return "no method fits; ask for less"
        lines = [("name", "place", "saves", "measured", "does"),
                 *((entry.name, entry.facets.place, _short(", ".join(entry.facets.saves), 34),
                    ", ".join(measured(entry)), _short(entry.gist, 60)) for entry in self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


@checks.annotated
def find(words: str = "", *, need: str | Sequence[str] = (), place: str = "", kind: str = "",
         without: str | Sequence[str] = ()) -> Found:
    """Return the methods that fit everything that is asked for, those best shown first.

    Args:
        words: every one of these is in the name, the first sentence, the titles of the papers or
            the words of the facets, in upper or lower case.
        need: what shall be saved, as "inference time"; "memory" stands for every kind of it.
        place: where a block goes or what a reshape changes, as "feedforward".
        kind: what it is, as "rule" or "rules".
        without: what must not be needed, as "training".

    Raises:
        UnknownName: a need, a place, a kind or what is to be done without is none of those that
            methods name; the nearest are named.

    >>> "reshape.prune_sublayers" in find(need="inference time", kind="reshape").names
    True
    >>> find("kolmogorov", place="activation").names
    ['blocks.GroupRational']
    """
    wanted = [near("need", entry, SAVES) for entry in several(need)]
    spared = {word for entry in several(without) for word in near("requirement", entry, NEEDS)}
    places = near("place", place, PLACES) if place else set(PLACES) | {""}
    kinds = kind_called(kind) if kind else set(KINDS)
    asked = words.lower().split()
    found = [entry for entry in methods().values()
             if all(saved & {*entry.facets.saves} for saved in wanted)
             and not spared & {*entry.facets.needs}
             and entry.facets.place in places and entry.facets.kind in kinds
             and all(word in _text(entry) for word in asked)]
    return Found(sorted(found, key=lambda entry: (_rank(entry), entry.name)))


def measured(entry: Method) -> list[str]:
    """Return the verdicts on the claims of a method's papers, the best first.

    >>> measured(methods()["rules.DualPropagation"])
    ['shown']
    """
    given = {verdict for id in entry.facets.papers for verdict in verdicts(id).values()}
    return [verdict for verdict in VERDICTS if verdict in given]


def near(what: str, given: str, known: Mapping[str, str]) -> set[str]:
    """Return the words of `known` that `given` means: itself, or those it is a part of.

    Raises:
        UnknownName: it means none of them.

    >>> sorted(near("need", "memory", SAVES))
    ['inference memory', 'training memory']
    >>> near("place", "feed-forward", PLACES), near("need", "less time in training", SAVES)
    ({'feedforward'}, {'training time'})
    """
    if given in known:
        return {given}
    parts = {word: _words(word) for word in known}
    meant = ({word for word in known if _words(given) <= parts[word]}
             or {word for word in known if parts[word] <= _words(given)}
             or {word for word in known if _joined(word) == _joined(given)})
    if not meant:
        raise UnknownName(what, given, known)
    return meant


def kind_called(name: str) -> set[str]:
    """Return the kind of this name, which may be the plural.

    Raises:
        UnknownName: no kind is called that.

    >>> kind_called("reshapes")
    {'reshape'}
    """
    kind = name if name in KINDS else name.removesuffix("s")
    if kind not in KINDS:
        raise UnknownName("kind", name, KINDS)
    return {kind}


def several(given: str | Iterable[str]) -> list[str]:
    """Return a word as a list of one, and several as they are.

    >>> several("labels"), several(("labels", "training"))
    (['labels'], ['labels', 'training'])
    """
    return [given] if isinstance(given, str) else [*given]


def _short(text: str, width: int) -> str:
    return shorten(text, width, placeholder=" …")


def _words(text: str) -> set[str]:
    return set(text.lower().replace("-", " ").split())


def _joined(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _text(entry: Method) -> str:
    said = entry.facets
    titles = (paper(id).title for id in said.papers)
    return " ".join([entry.name, entry.gist, said.kind, said.place, *said.saves, *said.needs,
                     *said.papers, *titles]).lower()


def _rank(entry: Method) -> int:
    given = measured(entry)
    return VERDICTS.index(given[0]) if given else len(VERDICTS)
