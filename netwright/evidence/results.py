"""What was measured: one file for each experiment."""

import json
import os
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from netwright.evidence.experiments import experiment
from netwright.evidence.folder import PathLike, folder
from netwright.evidence.outcome import Scale
from netwright.runtime.machine import machine

__all__ = ["recorded", "run"]


def run(name: str, scale: Scale = "desk", results: PathLike | None = None) -> dict[str, Any]:
    """Run the experiment called `name`, write what it found to `results`, and return it.

    `results` is the folder of that name beside the experiments by default.
    """
    found, home = experiment(name), results_folder(results)
    start = time.perf_counter()
    outcome = found.run(scale)
    seconds = time.perf_counter() - start
    report = {
        "name": name, "paper": found.paper, "claim": found.claim, "scale": scale,
        **asdict(outcome), "summary": outcome.summary,
        "seconds": round(seconds, 1), "date": date.today().isoformat(), "machine": machine(),
    }
    home.mkdir(parents=True, exist_ok=True)
    path = home / f"{name}.json"
    temporary = path.with_suffix(".json.tmp")
    text = json.dumps(report, indent=1)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return json.loads(text)


def recorded(results: PathLike | None = None) -> dict[str, dict[str, Any]]:
    """Return the results in the folder `results`, the experiments' own by default, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(results_folder(results).glob("*.json"))}


def results_folder(results: PathLike | None = None) -> Path:
    """Return the folder of the results: `results`, else the one beside the experiments."""
    return folder() / "results" if results is None else Path(results)
