"""Experiments: named functions, found in a folder."""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from netwright import checks
from netwright.errors import UnknownName
from netwright.evidence.claims import Claim, judged
from netwright.evidence.folder import PathLike, folder
from netwright.evidence.outcome import Outcome, Scale, Shortfall, Verdict

__all__ = ["Experiment", "evidence", "experiment", "experiments"]

PACKAGE = "evidence"


@dataclass(frozen=True)
class Experiment:
    """An evidence function with the paper and the claim that it is about."""

    name: str
    paper: str
    claim: str
    run: Callable[[Scale], Outcome]
    module: str
    shown: tuple[Claim, ...] = ()
    partly: Claim | None = None
    shortfall: tuple[Shortfall, str] | None = None

    def judged(self, outcome: Outcome) -> tuple[Verdict, list[dict[str, Any]]]:
        """Return the verdict on what was found, and each declared claim with what came of it.

        Raises:
            ValueError: there is no claim and no verdict, or there are both.
            UnknownName: a claim names a figure that was not measured.
        """
        if bool(self.shown) == (outcome.verdict is not None):
            raise ValueError(f"{self.name} must declare claims (shown=) or return a verdict, not "
                             f"both, got {len(self.shown)} claims and verdict={outcome.verdict!r}")
        if outcome.verdict is not None:
            return outcome.verdict, []
        return judged(self.shown, outcome.figures, partly=self.partly)


_known: dict[str, Experiment] = {}


def evidence(*, paper: str, claim: str, shown: Sequence[Claim] = (),
             partly: Claim | None = None, shortfall: tuple[Shortfall, str] | None = None,
             ) -> Callable[[Callable[[Scale], Outcome]], Callable[[Scale], Outcome]]:
    """Name a function as the experiment for `claim` of `paper`, an id of the catalogue.

    The function takes a scale, `"desk"` (minutes on two cores) or `"full"`, and returns an
    `Outcome`. Its own name is the name of the evidence. `shown` says beforehand what must hold of
    its figures: all of it where the claim is shown, some of it, or `partly`, where it is partly
    shown.

    `shortfall` says, once a result is known, why it does not show all of the claim, and what was
    tried: `("scale", text)` where a desk is too small, with the scale that is needed and the trend
    that can be seen; `("claim", text)` where the claim did not hold in honest attempts;
    `("open", text)` where it is not known which. It has no part in the result or its fingerprint.
    """
    if shortfall is not None:
        checks.one_of(get_args(Shortfall), shortfall=shortfall[0])

    def name_it(run: Callable[[Scale], Outcome]) -> Callable[[Scale], Outcome]:
        _known[run.__name__] = Experiment(run.__name__, paper, claim, run, run.__module__,
                                          tuple(shown), partly, shortfall)
        return run
    return name_it


def experiments(where: PathLike | None = None) -> dict[str, Experiment]:
    """Return every experiment of a folder by name; finding them imports its files as `evidence`.

    `where` is the checkout's own folder by default, or the one that NETWRIGHT_EVIDENCE names.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    package = _package(folder(where))
    for module in pkgutil.walk_packages(package.__path__, PACKAGE + "."):
        importlib.import_module(module.name)
    return dict(sorted(_known.items()))


@checks.annotated
def experiment(name: str, where: PathLike | None = None) -> Experiment:
    """Return the experiment called `name`; raise UnknownName with the nearest names."""
    known = experiments(where)
    if name not in known:
        raise UnknownName("evidence", name, known)
    return known[name]


def _package(home: Path) -> ModuleType:
    """Return the package `evidence` of the files in `home`, new where these are not those it has.

    A result would otherwise bear the fingerprint of files other than those that gave it.
    """
    there, state = sys.modules.get(PACKAGE), {
        path: path.stat().st_mtime_ns for path in home.rglob("*.py")}
    if there is not None and [Path(path).resolve() for path in there.__path__] == [home] and (
            vars(there).setdefault("_state", state) == state):
        return there
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]
    for name, found in list(_known.items()):
        if found.module.split(".")[0] == PACKAGE:
            del _known[name]
    # With a file, whether there is one or not: `inspect` stumbles over a module that has none.
    spec = spec_from_file_location(PACKAGE, home / "__init__.py",
                                   submodule_search_locations=[str(home)])
    assert spec is not None
    sys.modules[PACKAGE] = module_from_spec(spec)
    vars(sys.modules[PACKAGE])["_state"] = state
    importlib.invalidate_caches()
    return sys.modules[PACKAGE]
