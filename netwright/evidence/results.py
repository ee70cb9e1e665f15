"""What was measured: one file for each experiment."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from netwright import checks
from netwright.catalogue.measurements import measurements
from netwright.evidence.code import fingerprints
from netwright.evidence.experiments import experiment, experiments
from netwright.evidence.folder import PathLike, folder
from netwright.evidence.outcome import Scale
from netwright.runtime.machine import machine
from netwright.runtime.version import __version__
from netwright.runtime.written import write_text

__all__ = ["ages", "recorded", "run"]

PACKAGE = Path(__file__).resolve().parents[1]

Age = Literal["of this code", "older than its code", "not known", "not run"]


@checks.annotated
def run(name: str, scale: Scale = "desk", results: PathLike | None = None) -> dict[str, Any]:
    """Run the experiment called `name`, write what it found to `results`, and return it.

    `results` is the folder of that name beside the experiments by default.

    Raises:
        UnknownName: no experiment is called that.
        FileNotFoundError: there is no folder of experiments.
        ValueError: `results` is inside the package.
    """
    found, home = experiment(name), results_folder(results)
    code = fingerprints([found.module])[found.module]
    start = time.perf_counter()
    outcome = found.run(scale)
    seconds = time.perf_counter() - start
    verdict, claims = found.judged(outcome)
    report = {
        "name": name, "paper": found.paper, "claim": found.claim, "scale": scale,
        **asdict(outcome), "verdict": verdict, "claims": claims, "summary": outcome.summary,
        "seconds": round(seconds, 1), "date": date.today().isoformat(), "version": __version__,
        "fingerprint": code, "machine": machine(),
    }
    home.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1)
    write_text(home / f"{name}.json", text + "\n")
    measurements.cache_clear()
    return json.loads(text)


@checks.annotated
def recorded(results: PathLike | None = None) -> dict[str, dict[str, Any]]:
    """Return the results in the folder `results`, the experiments' own by default, by name.

    They are read again only when a file there has changed.
    """
    paths = sorted(results_folder(results).glob("*.json"))
    stats = [path.stat() for path in paths]
    return dict(_read(tuple((path, stat.st_mtime_ns, stat.st_size)
                            for path, stat in zip(paths, stats, strict=True))))


@checks.annotated
def ages() -> dict[str, Age]:
    """Return for each experiment whether its result is of the code that there is now."""
    results, known = recorded(), experiments()
    now = fingerprints(found.module for found in known.values())
    return {name: _age(results.get(name), now[found.module]) for name, found in known.items()}


def results_folder(results: PathLike | None = None) -> Path:
    """Return the folder of the results: `results`, else the one beside the experiments."""
    found = folder() / "results" if results is None else Path(results).resolve()
    if found.is_relative_to(PACKAGE):
        raise ValueError(f"results must be outside of the package, got {found}; name a folder of "
                         "your own, or run the experiments in netwright's checkout")
    return found


def _age(result: Mapping[str, Any] | None, now: str) -> Age:
    if result is None:
        return "not run"
    if "fingerprint" not in result:
        return "not known"
    return "of this code" if result["fingerprint"] == now else "older than its code"


@lru_cache(maxsize=4)
def _read(state: tuple[tuple[Path, int, int], ...]) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path, *_ in state}
