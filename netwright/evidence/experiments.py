"""Experiments: named functions, found in a folder."""

import importlib
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

from netwright.errors import UnknownName
from netwright.evidence.folder import PathLike, folder
from netwright.evidence.outcome import Outcome, Scale

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


_known: dict[str, Experiment] = {}


def evidence(*, paper: str, claim: str) -> Callable[
        [Callable[[Scale], Outcome]], Callable[[Scale], Outcome]]:
    """Name a function as the experiment for `claim` of `paper`, an id of the catalogue.

    The function takes a scale, `"desk"` (minutes on two cores) or `"full"`, and returns an
    `Outcome`. Its own name is the name of the evidence.
    """
    def name_it(run: Callable[[Scale], Outcome]) -> Callable[[Scale], Outcome]:
        _known[run.__name__] = Experiment(run.__name__, paper, claim, run, run.__module__)
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


def experiment(name: str, where: PathLike | None = None) -> Experiment:
    """Return the experiment called `name`; raise UnknownName with the nearest names."""
    known = experiments(where)
    if name not in known:
        raise UnknownName("evidence", name, known)
    return known[name]


def _package(home: Path) -> ModuleType:
    """Return the package `evidence` whose files are in `home`, in place of any other's."""
    there = sys.modules.get(PACKAGE)
    if there is not None and [Path(path).resolve() for path in there.__path__] == [home]:
        return there
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]
    for name, found in list(_known.items()):
        if found.module.split(".")[0] == PACKAGE:
            del _known[name]
    spec = ModuleSpec(PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(home)]
    sys.modules[PACKAGE] = module_from_spec(spec)
    return sys.modules[PACKAGE]
