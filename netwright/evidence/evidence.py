"""Experiments that show a paper's central claim, or that it does not hold."""

import importlib
import json
import os
import pkgutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

from netwright.errors import UnknownName
from netwright.runtime.machine import machine

Scale = Literal["desk", "full"]
Verdict = Literal["shown", "partly shown", "not shown"]

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Curve:
    """A line of a picture: one list of `y` for each seed over the same `x`."""

    x: Sequence[float]
    y: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Outcome:
    """What an experiment found.

    `figures` maps what was measured, its unit in the name, to one value for each seed. `setting`
    says how, in a few words for each key. `note` says what a reader must know: what differs from
    the paper, and what was tried where the claim did not show.
    """

    verdict: Verdict
    setting: Mapping[str, Any]
    figures: Mapping[str, Sequence[float]]
    note: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    axes: tuple[str, str] = ("", "")


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


def experiments() -> dict[str, Experiment]:
    """Return every experiment in the package by name; finding them imports `netwright.evidence`."""
    import netwright.evidence as package
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    return dict(sorted(_known.items()))


def experiment(name: str) -> Experiment:
    """Return the experiment called `name`; raise UnknownName with the nearest names."""
    known = experiments()
    if name not in known:
        raise UnknownName("evidence", name, known)
    return known[name]


def run(name: str, scale: Scale = "desk", results: Path = RESULTS) -> dict[str, Any]:
    """Run the experiment called `name`, write what it found to `results`, and return it."""
    found = experiment(name)
    start = time.perf_counter()
    outcome = found.run(scale)
    seconds = time.perf_counter() - start
    report = {
        "name": name, "paper": found.paper, "claim": found.claim, "scale": scale,
        **asdict(outcome),
        "summary": {key: _spread(values) for key, values in outcome.figures.items()},
        "seconds": round(seconds, 1), "date": date.today().isoformat(), "machine": machine(),
    }
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    temporary = path.with_suffix(".json.tmp")
    text = json.dumps(report, indent=1)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return json.loads(text)


def recorded(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return the committed results by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(results.glob("*.json"))}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "seeds": len(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else 0.0}
