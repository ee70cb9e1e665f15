"""Whether predicted times rank candidates as measured ones do, and predicted bytes are exact.

    python benchmarks/predicting.py

Forty changes of one character model: layers removed x hidden units removed x dtype. Each is
predicted from shapes and this machine's kernels before any has run; then all run in turns on one
thread, and the least processor time of each counts. Bars: Spearman's correlation of predicted with
measured time at least 0.9, predicted bytes those of the saved files.
"""

import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import nn

import netwright as nw
from netwright.advise.predict import Kernels, Predicted, predict
from netwright.models import gpt
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "predicting.json"
REMOVED, NARROWED, DTYPES = (0, 2, 4, 6), (0.0, 0.25, 0.5, 0.75, 0.9), ("float32", "bfloat16")
TURNS, BOUND = 15, 0.9


def recipe(removed: int, narrowed: float, dtype: str) -> str:
    steps = [f"prune_sublayers(remove={removed})"] * (removed > 0)
    steps += [f"narrow(ratio={narrowed})"] * (narrowed > 0)
    steps += [f"cast(dtype='{dtype}')"] * (dtype != "float32")
    return " + ".join(steps)


def candidates(model: nn.Module, x: torch.Tensor) -> dict[str, nn.Module]:
    """Return the changed models by their recipes; those of one beginning share it."""
    found: dict[str, nn.Module] = {}
    for removed, narrowed, dtype in product(REMOVED, NARROWED, DTYPES):
        steps = recipe(removed, narrowed, dtype).split(" + ")
        before, last = " + ".join(steps[:-1]), steps[-1]
        start = found.get(before, model)
        found[" + ".join(steps)] = nw.apply(last, start, x) if last else model
    return found


def measured(models: dict[str, nn.Module], x: torch.Tensor) -> dict[str, float]:
    """Return the least processor time of a pass of each, measured in turns."""
    least = dict.fromkeys(models, float("inf"))
    with torch.inference_mode():
        for _ in range(TURNS):
            for name, model in models.items():
                start = time.process_time()
                model(x)
                least[name] = min(least[name], time.process_time() - start)
    return least


def saved_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        nw.save(model, folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def main() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = gpt(96, width=128, depth=6, context=64).eval(), torch.randint(96, (16, 64))
    models = candidates(model, x)
    with tempfile.TemporaryDirectory() as folder:
        kernels = Kernels(folder)
        start = time.perf_counter()
        predicted: dict[str, Predicted] = {name: predict(changed, x, kernels=kernels)
                                           for name, changed in models.items()}
        seconds = time.perf_counter() - start
    took = measured(models, x)
    exact = all(predicted[name].bytes == saved_bytes(changed) for name, changed in models.items())
    rank = float(spearmanr([predicted[name].seconds for name in models], [*took.values()])[0])
    rows: dict[str, dict[str, float]] = {
        name or "as it is": {"predicted": found.seconds, "measured": took[name],
                             "bytes": found.bytes} for name, found in predicted.items()}
    for name, row in rows.items():
        print(f"{name:60} {1e3 * row['predicted']:8.2f} {1e3 * row['measured']:8.2f} ms")
    print(f"{len(rows)} candidates predicted in {seconds:.1f} s: Spearman {rank:.3f}, bytes "
          f"{'exact' if exact else 'not exact'}")
    RESULTS.write_text(json.dumps(
        {"machine": machine(), "spearman": rank, "bytes_exact": exact, "seconds": seconds,
         "turns": TURNS, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0 if rank >= BOUND and exact and len(rows) == 40 else 1


if __name__ == "__main__":
    sys.exit(main())
