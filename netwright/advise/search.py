"""The search: what is tried next, within a time, by what the tries before it gave."""

import hashlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import ceil, inf
from typing import TYPE_CHECKING, Any

from netwright.advise.candidates import Option, is_repair
from netwright.advise.laboratory import Laboratory, TimeUp, limited
from netwright.advise.question import Question
from netwright.catalogue.names import name_of
from netwright.compare.recipe import Recipe, recipe
from netwright.compare.steps import Step
from netwright.compare.supplies import parameters
from netwright.compare.trials import Job, Ledger
from netwright.errors import NetwrightError
from netwright.runtime.fingerprint import fingerprint
from netwright.runtime.written import plain

if TYPE_CHECKING:
    from netwright.advise.showing import Show

BASES = 6  # recipes that others are added to
LONGEST = 4  # steps of a recipe
SHARE = 3  # of the time that is left a try may take one part in this many
LEAST = 5.0  # seconds that it may take anyway
CHEAP = 6  # settings of a method that looks at no data, before any that does
REPAIR = 12  # of the whole time a short training may take one part in this many


@dataclass(frozen=True)
class Tried:
    """A recipe and what came of it."""

    recipe: Recipe
    quality: float
    shares: Mapping[str, float]
    found: Mapping[str, Any]

    @property
    def key(self) -> str:
        """What the recipe is known by."""
        return key_of(self.recipe)


@dataclass(frozen=True)
class Failed:
    """A recipe, why nothing came of it, and the seconds that it took."""

    text: str
    reason: str
    seconds: float

    def plain(self) -> dict[str, Any]:
        """Return the failure as plain data."""
        return {"recipe": self.text, "reason": self.reason, "seconds": self.seconds}


def text_of(given: Recipe) -> str:
    """Return a recipe as it is shown."""
    text = plain(str(given))
    return text if len(text) <= 160 else f"{text[:157]}..."


def key_of(given: Recipe) -> str:
    """Return what a recipe is known by; functions of one's own count with their code."""
    own = [fingerprint(step.what) for step in given.network if name_of(step.what) is None]
    return hashlib.sha256(f"{given} {own}".encode()).hexdigest()[:24]


def _timed(option: Option, seconds: float) -> Option:
    """Return a method that trains with the time that it may take, where it takes one."""
    if not is_repair(option.steps[0]) or "seconds" not in parameters(option.steps[0].what):
        return option
    limit = float(f"{seconds:.1g}")
    return replace(option, steps=tuple(
        Step(step.what, {"seconds": limit, **step.arguments}) for step in option.steps))


def _methods(steps: Sequence[Any]) -> frozenset[str]:
    return frozenset(step.name for step in steps)


class Search:
    """Tries of one model on one data set, kept in a ledger, and the plan of what comes next.

    What is tried next follows from what is in the ledger alone, so that a search that was broken
    off goes on as if it had not been, and several workers share one.
    """

    def __init__(self, laboratory: Laboratory, ledger: Ledger, options: Sequence[Option],
                 also: Sequence[Recipe], question: Question, show: "Show", *,
                 seconds: float) -> None:
        self.laboratory, self.ledger = laboratory, ledger
        self.options = [_timed(option, seconds / REPAIR) for option in options]
        self.also, self.question, self.show = also, question, show
        self.forgiven = ledger.last()
        self.tried: dict[str, Tried] = {}
        self.failed: dict[str, Failed] = {}
        self.spent = 0.0
        self.unfit: set[frozenset[str]] = set()  # methods that cannot follow one another
        self._steps = {str(step): step for option in self.options for step in option.steps}
        self._steps |= {str(step): step for entry in also for step in entry.network}
        self._remember()

    def run(self, deadline: float) -> None:
        """Try one recipe after another until the time is over or nothing is left to try."""
        for entry in self.plan():
            key = key_of(entry)
            if key in self.tried or key in self.failed:
                continue
            if time.monotonic() >= deadline or not self._do(entry, key, deadline):
                return

    def plan(self) -> Iterator[Recipe]:
        """Yield what is to be tried: all methods, then more of those that did well, together.

        What looks at no data comes first, with its settings, since it costs the least.
        """
        yield from self.also
        for option in self.options:
            if option.phase == 0:
                yield Recipe((option.steps[0],))
        for option in self._ranked():
            if option.phase == 0:
                yield from (Recipe((step,)) for step in self._untried(option)[:CHEAP])
                yield from (Recipe((step,)) for step in self._untried(option)[:1])
        for option in self.options:
            if option.phase == 1:
                yield Recipe((option.steps[0],))
        for round in count():
            news = [*self._settings(round), *self._together(4 * (round + 1))]
            news = [entry for entry in news if key_of(entry) not in self.tried
                    and key_of(entry) not in self.failed]
            if not news and round > len(self.options).bit_length():
                return
            yield from news

    def best(self) -> list[Tried]:
        """Return what was tried, the nearest to what is asked first."""
        return sorted(self.tried.values(),
                      key=lambda one: (*self.question.order(one.quality, one.shares), one.key))

    def front(self) -> list[Tried]:
        """Return what nothing else beats in quality and in all that is asked for."""
        held = self.best()
        on = self.question.front([(one.quality, one.shares) for one in held])
        return [one for one, is_on in zip(held, on, strict=True) if is_on]

    def _settings(self, round: int) -> list[Recipe]:
        """Return further settings of the better part of the methods, more for fewer of them."""
        ranked = self._ranked()
        left = ranked[:max(2, ceil(len(ranked) / 2 ** round))]
        found = []
        for option in left:
            found += [Recipe((step,)) for step in self._untried(option)[:2 ** (round + 1)]]
        if not found:
            found = [Recipe((step,)) for option in ranked
                     for step in self._untried(option)][:2 ** round]
        return found

    def _untried(self, option: Option) -> list[Step]:
        """Return settings of a method that were not tried: changes of one argument, then others.

        Those are ordered by what the changes of one promise together.
        """
        left = [step for step in option.steps if not self._known(Recipe((step,)))]
        least = min((len(step.arguments) for step in option.steps), default=0)
        single = [step for step in left if len(step.arguments) <= least + 1]
        several = [step for step in left if len(step.arguments) > least + 1]
        return single + sorted(several, key=lambda step: (self._promised(option, step), str(step)))

    def _promised(self, option: Option, step: Step) -> tuple[float, float]:
        """Return how near settings would come if what each argument does simply added up."""
        plain = self.tried.get(key_of(Recipe((option.steps[0],))))
        if plain is None:
            return inf, 0.0
        quality, shares = plain.quality, dict(plain.shares)
        for name, value in step.arguments.items():
            if option.steps[0].arguments.get(name) == value:
                continue
            alone = Step(step.what, {**option.steps[0].arguments, name: value})
            one = self.tried.get(key_of(Recipe((alone,))))
            if one is None:
                return inf, 0.0
            quality += one.quality - plain.quality
            shares = {name: share * one.shares.get(name, 1.0) / plain.shares.get(name, 1.0)
                      for name, share in shares.items()}
        return self.question.order(quality, shares)

    def _ranked(self) -> list[Option]:
        """Return the methods of which something came, the best first."""
        place = {key: i for i, key in enumerate(one.key for one in self.best())}

        def rank(option: Option) -> int:
            return min((place[key] for step in option.steps
                        if (key := key_of(Recipe((step,)))) in place), default=len(place))
        return sorted((option for option in self.options if not is_repair(option.steps[0])
                       and rank(option) < len(place)), key=rank)

    def _together(self, most: int) -> list[Recipe]:
        """Return recipes of several steps, by what their parts promise."""
        bases = [one for one in self.front() if len(one.recipe.network) < LONGEST][:BASES]
        promised: dict[str, tuple[tuple[float, float], Recipe]] = {}
        for base in bases:
            for entry, quality, shares in self._grown(base):
                key = key_of(entry)
                if key not in self.tried and key not in self.failed:
                    order = self.question.order(quality, shares)
                    promised[key] = min(promised.get(key, (order, entry)), (order, entry),
                                        key=lambda pair: pair[0])
        ordered = sorted(promised.items(), key=lambda item: (item[1][0], item[0]))
        return [entry for _, (_, entry) in ordered[:most]]

    def _grown(self, base: Tried) -> Iterator[tuple[Recipe, float, dict[str, float]]]:
        """Yield a recipe with each step that could be added, and what is to be expected of it."""
        names = {step.what for step in base.recipe.network}
        for option in self.options:
            if option.steps[0].what in names or _methods(
                    (*base.recipe.network, option.steps[0])) in self.unfit:
                continue
            if is_repair(option.steps[0]):
                if any(self._place(step) == 0 for step in base.recipe.network):
                    yield (self._ordered(base.recipe, option.steps[0]),
                           1 - (1 - base.quality) / 2, dict(base.shares))
                continue
            for one in self._own_front(option):
                step, = one.recipe.network
                both = self._place(step) >= 2 and any(
                    self._place(other) >= 2 for other in base.recipe.network)
                shares = {name: min(share, base.shares.get(name, 1.0)) if both else
                          share * base.shares.get(name, 1.0)
                          for name, share in one.shares.items()}
                yield self._ordered(base.recipe, step), base.quality + one.quality - 1, shares

    def _own_front(self, option: Option) -> list[Tried]:
        """Return the settings of a method that none of its others beats."""
        held = [self.tried[key] for step in option.steps
                if (key := key_of(Recipe((step,)))) in self.tried]
        on = self.question.front([(one.quality, one.shares) for one in held])
        return [one for one, is_on in zip(held, on, strict=True) if is_on]

    def _ordered(self, base: Recipe, step: Any) -> Recipe:
        """Return a recipe with a further step: structure, repair, numbers, what runs it."""
        return Recipe(tuple(sorted((*base.network, step), key=self._place)))

    def _place(self, step: Any) -> int:
        """Return where in a recipe a step comes, by what it was seen to change."""
        if is_repair(step):
            return 1
        one = self.tried.get(key_of(Recipe((step,))))
        if one is None:
            return 0
        if not one.found["same_class"]:
            return 4
        if one.found["plain_dtype"]:
            return 3
        return 2 if one.found["dtypes"] != self.dtypes else 0

    @property
    def dtypes(self) -> list[str]:
        """The types of numbers in the original."""
        from netwright.advise.figures import dtypes
        return dtypes(self.laboratory.model)

    def _known(self, entry: Recipe) -> bool:
        return key_of(entry) in self.tried or key_of(entry) in self.failed

    def _do(self, entry: Recipe, key: str, deadline: float) -> bool:
        """Try a recipe that nobody has tried; return whether there is time for another."""
        standing = self.ledger.standing([key], self.forgiven, self.ledger.trials())[key]
        if not standing.open:
            self._take(entry, key, standing)
            return True
        mine = self.ledger.claim(Job(key, {}))
        if mine is None:
            return True
        left = deadline - time.monotonic()
        longest = max((one.found["seconds"] for one in self.tried.values()), default=0.0)
        limit = min(left, max(left / SHARE, LEAST, 2 * longest))
        self.show.trying(text_of(entry), self.best(), deadline)
        start = time.perf_counter()
        about = {"recipe": entry.plain(), "text": text_of(entry),
                 "steps": [str(step) for step in entry.network]}
        try:
            with self.ledger.beating(mine), limited(limit), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = self.laboratory.tried(entry)
        except KeyboardInterrupt:
            self.ledger.fail(mine, "")
            raise
        except TimeUp:
            self._failed(entry, key, mine, time.perf_counter() - start, lasting=False,
                         reason=f"it was not done after {limit:.0f} s, "
                                + ("when the time was over" if limit >= left else
                                   "more than the others take"))
            return time.monotonic() < deadline
        except Exception as error:  # whatever it is, it is said with its name
            said = str(error) if isinstance(error, (NetwrightError, ValueError)) else \
                f"{type(error).__name__}: {error}"
            self._failed(entry, key, mine, time.perf_counter() - start, lasting=True,
                         reason=plain(said)[:300] or type(error).__name__)
            return True
        self.ledger.complete(mine, found["quality"], {"found": found, **about})
        self.tried[key] = Tried(entry, found["quality"], found["shares"], found)
        self.spent += found["seconds"]
        return True

    def _failed(self, entry: Recipe, key: str, trial: int, seconds: float, *, reason: str,
                lasting: bool) -> None:
        self.laboratory.forget()
        if lasting and len(entry.network) > 1:
            self.unfit.add(_methods(entry.network))
        self.failed[key] = Failed(text_of(entry), reason, seconds)
        self.spent += seconds
        self.ledger.fail(trial, reason, diverged=lasting, text=text_of(entry), seconds=seconds)

    def _take(self, entry: Recipe, key: str, standing: Any) -> None:
        """Take over what another worker has found."""
        if standing.done is not None:
            found = standing.done.user_attrs["found"]
            self.tried[key] = Tried(entry, found["quality"], found["shares"], found)
        elif standing.failed is not None:
            self.failed[key] = Failed(text_of(entry), standing.failure,
                                      standing.failed.user_attrs.get("seconds", 0.0))

    def _remember(self) -> None:
        """Take over what the ledger holds of earlier questions and other workers."""
        for key, trials in self.ledger.trials().items():
            for trial in trials:
                held = trial.user_attrs
                self.spent += held.get("seconds", 0.0) + held.get("found", {}).get("seconds", 0.0)
                if "found" in held:
                    entry = self._recipe(held)
                    if entry is not None and key_of(entry) == key:
                        found = held["found"]
                        self.tried[key] = Tried(entry, found["quality"], found["shares"], found)
                elif held.get("diverged"):
                    self.failed[key] = Failed(held["text"], held["failure"], held["seconds"])

    def _recipe(self, held: Mapping[str, Any]) -> Recipe | None:
        """Return a recipe that the ledger names, None where its methods are not known here."""
        if all(text in self._steps for text in held["steps"]):
            return Recipe(tuple(self._steps[text] for text in held["steps"]))
        try:
            return recipe(held["recipe"])
        except ValueError:
            return None
