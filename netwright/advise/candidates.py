"""What could be tried on a model: methods by what they say of themselves, and their settings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from itertools import product
from math import prod
from typing import Any

from torch import nn

from netwright.advise.applicable import Candidate, Seen, applicable, judged
from netwright.advise.wants import OF_INFERENCE, RESOURCES, Want
from netwright.catalogue.facets import Method, facets, searched
from netwright.catalogue.find import measured
from netwright.compare.changes import distribution, point_at
from netwright.compare.recipe import Recipe, recipe
from netwright.compare.steps import Step, is_plain
from netwright.compare.supplies import parameters
from netwright.reshape.change import own
from netwright.signals import mapped

OFFERED = ("example", "calibration", "teacher", "data")
GIVEN = ("calibration data",)  # of what methods need of their users, what is at hand
KINDS = ("reshape", "execution")
FEW = 2  # samples that show what is in a model
SPREAD = 12  # points of a search that are spread over it, where it has many
PRODUCT = 64  # points of a search that are few
POINTS = 3  # of a range that are tried by themselves


@dataclass(frozen=True)
class Option:
    """A method that can be tried here: its settings, the likeliest first, and what it takes.

    `phase` says how dear it is: 0 looks at no data, 1 calibrates, 2 learns from the original.
    """

    name: str
    steps: tuple[Step, ...]
    phase: int
    where: str
    saves: tuple[str, ...]
    gist: str
    papers: tuple[str, ...]
    evidence: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """Return what the page says of the method."""
        return {"name": self.name, "where": self.where, "saves": [*self.saves], "gist": self.gist,
                "papers": [*self.papers], "evidence": [*self.evidence],
                "settings": len(self.steps)}


@dataclass(frozen=True)
class Aside:
    """A method that is not tried, and why."""

    name: str
    why: str

    def plain(self) -> dict[str, Any]:
        """Return the method as plain data."""
        return {"name": self.name, "why": self.why}


def options(model: nn.Module, example: Any, wants: Sequence[Want]
            ) -> tuple[list[Option], list[Aside]]:
    """Return what can be tried on a trained model, the cheapest first, and what is set aside."""
    found: list[Option] = []
    aside: list[Aside] = []
    example = mapped(example, lambda t: t[:FEW])
    seen = Seen(model, example)
    mine = [_judged_own(name, made, seen) for name, made in own().items()]
    known = [candidate for kind in KINDS
             for candidate in applicable(model, example, kind=kind, all=True)]
    for candidate in [*known, *mine]:
        why = _unfit(candidate, wants)
        if why:
            aside.append(Aside(candidate.method.name, why))
        else:
            found.append(_option(candidate))
    asked_for = [RESOURCES[want.resource].saved_by for want in wants]

    def order(option: Option) -> tuple[int, int, str]:
        return option.phase, -sum(bool(words & {*option.saves}) for words in asked_for), option.name
    return sorted(found, key=order), aside


def _judged_own(name: str, made: Any, seen: Seen) -> Candidate:
    """Return a user's own reshape beside a network, which it may not have been written for."""
    entry = Method(name, made, made.facets)
    try:
        return judged(entry, seen)
    except Exception as error:  # whatever a function of one's own raises
        return Candidate(entry, False, f"it raised {type(error).__name__}: {error}", ())


def asked(also: Any) -> list[Recipe]:
    """Return the recipes that a user wants to be tried besides."""
    given = also if isinstance(also, (list, tuple)) else [also]
    return [recipe(entry) for entry in given]


def is_repair(step: Step) -> bool:
    """Return whether a step learns from the original, which it takes as its `teacher`."""
    return "teacher" in parameters(step.what)


def phase_of(step: Step) -> int:
    """Return how dear a step is: 0 looks at no data, 1 calibrates, 2 learns from the original."""
    known = parameters(step.what)
    needed = known.get("calibration")
    return 2 if is_repair(step) else int(
        needed is not None and needed.default is Parameter.empty)


def about(step: Step) -> dict[str, Any]:
    """Return what the catalogue knows of a step's method."""
    said = facets(step.what)
    if said is None:
        return {"gist": "", "papers": [], "evidence": [], "keeps_function": None}
    entry = Method(step.name, step.what, said)
    return {"gist": entry.gist, "papers": [*said.papers], "evidence": measured(entry),
            "keeps_function": said.keeps_function}


def _unfit(candidate: Candidate, wants: Sequence[Want]) -> str:
    """Return why a method is not tried, "" where it is."""
    entry = candidate.method
    if not candidate.applies:
        return candidate.why
    step = Step(entry.value)
    lacking = [need for need in candidate.asks if need not in GIVEN]
    if lacking and not is_repair(step):
        return f"it asks for {', '.join(lacking)}, which a trained model's advice goes without"
    asked_for = {want.resource for want in wants} or {*OF_INFERENCE}
    saving = set().union(*(RESOURCES[name].saved_by for name in asked_for))
    if not saving & {*entry.facets.saves} and not is_repair(step):
        saves = ", ".join(entry.facets.saves) or "nothing by itself"
        return f"it saves {saves}, and {', '.join(sorted(asked_for))} was asked for" if wants \
            else f"it saves {saves}"
    missing = _missing(step, next(iter(_variants(entry.value)), {}))
    if missing:
        return (f"it needs {', '.join(missing)}, which only you can give: "
                f"also=[functools.partial({entry.name}, {missing[0]}=...)]")
    return ""


def _missing(step: Step, variant: Mapping[str, Any]) -> list[str]:
    return [name for name, p in [*parameters(step.what).items()][1:]
            if p.default is Parameter.empty and name not in OFFERED
            and not _tellable(variant.get(name, ...)) and name not in searched(step.what)]


def _tellable(value: Any) -> bool:
    """Return whether an argument means the same for any network: plain data, or a function."""
    return is_plain(value) or callable(value)


def _option(candidate: Candidate) -> Option:
    entry = candidate.method
    steps = settings(entry.value)
    return Option(entry.name, steps, phase_of(steps[0]), candidate.why, entry.facets.saves,
                  entry.gist, entry.facets.papers, tuple(measured(entry)))


def settings(what: Any) -> tuple[Step, ...]:
    """Return a method with the settings that can be tried: those with fewer changes first.

    They are its defaults, each point of its search, its variants, and all points together where
    these are few, or some that are spread over them.

    >>> from netwright.reshape import prune_sublayers
    >>> [str(step) for step in settings(prune_sublayers)][:3]
    ['prune_sublayers', 'prune_sublayers(remove=1)', 'prune_sublayers(remove=2)']
    """
    known, space = parameters(what), searched(what)
    needed = _needed(what, space)
    points = {name: _points(kind) for name, kind in space.items()}
    found: list[dict[str, Any]] = [{}]
    found += [{name: value} for name, values in points.items() for value in values]
    found += [own for variant in _variants(what)
              if all(map(_tellable, (own := _own(variant)).values()))]
    found += _product(points) if prod(map(len, points.values())) <= PRODUCT else _spread(space)
    made: dict[str, Step] = {}
    for arguments in found:
        full = {**needed, **arguments}
        own = {name: value for name, value in full.items()
               if name in needed or name not in known or not _same(known[name].default, value)}
        step = Step(what, own)
        made.setdefault(str(step), step)
    return tuple(made.values())


def _own(variant: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a variant that are no data."""
    return {name: value for name, value in variant.items() if name not in OFFERED}


def _product(points: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(points, values, strict=True)) for values in product(*points.values())]


def _needed(what: Any, space: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments without a default, from the search or the first variant."""
    variant = _own(next(iter(_variants(what)), {}))
    found = {}
    for name, p in [*parameters(what).items()][1:]:
        if p.default is Parameter.empty and name not in OFFERED:
            if name in space:
                points = _points(space[name])
                found[name] = points[len(points) // 2]
            elif name in variant:
                found[name] = variant[name]
    return found


def _variants(what: Any) -> Iterable[Mapping[str, Any]]:
    said = facets(what)
    return said.variants.values() if said is not None else ()


def _points(values: Any) -> list[Any]:
    kind = distribution(values)
    choices = getattr(kind, "choices", None)
    if choices is not None:
        return list(choices)
    made = [point_at(kind, min((i + 0.5) / POINTS, 0.999)) for i in range(POINTS)]
    return list(dict.fromkeys(made))


def _spread(space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return points in which all arguments move at once, by the generalised golden ratio."""
    if len(space) < 2:
        return []
    step = 1.0
    for _ in range(40):
        step = (1 + step) ** (1 / (len(space) + 1))
    kinds = {name: distribution(values) for name, values in space.items()}
    return [{name: point_at(kind, (0.5 + k * step ** -(j + 1)) % 1)
             for j, (name, kind) in enumerate(kinds.items())} for k in range(1, SPREAD)]


def _same(default: Any, value: Any) -> bool:
    return type(default) is type(value) and default == value
