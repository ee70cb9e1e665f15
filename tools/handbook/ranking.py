"""Writes the page that ranks the feed-forward blocks, from what the benchmark recorded."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOUND = Path(__file__).parents[2] / "benchmarks/results/feedforward_blocks.json"
TASKS = {"characters": ("Character model of tinyshakespeare", "characters missed (%)"),
         "patches": ("Patch classifier of CIFAR-10", "images missed (%)")}
MATCHES = {"parameters": "At equal parameters", "flops": "At equal arithmetic"}


def page() -> str:
    """Return the page: a table for each task and each way of making blocks equal."""
    found = json.loads(FOUND.read_text("utf-8"))
    parts = [
        "# Feed-forward blocks, ranked", "",
        "The same two networks with each block in place of the plain one, under the same seeds, "
        f"steps and learning rate: {found['steps']} steps of {found['batch']}, {found['seeds']} "
        "seeds, Adam at 3e-3 falling to 0, nothing tuned for any block. `hidden` is chosen so that "
        "the whole network has as many parameters as with the plain block, or does as many "
        f"floating-point operations in a step. Loss and misses are held-out, mean ± deviation over "
        f"the seeds; time and stored bytes are those of a step over those of `{found['plain']}`, "
        f"timed in turns on one thread ({found['machine']['processor']}). Rows stand in the order "
        "of their loss: neighbours that differ by less than their deviations are not told apart.",
        "", "These are small networks and short trainings; `python -m "
        "benchmarks.feedforward_blocks` runs them again, and takes a new block as a line of its "
        "table.", "",
        "What to read with care: `ConvGLU` also sees neighbouring tokens, which the others leave "
        "to attention; `RePa` has batch norms, which help short trainings by themselves; the "
        "experts' parameters are not all active. Not ranked: `AFKANFeedForward`, whose step takes "
        "ten to twenty times as long, and what does not stand for a block of this kind by itself "
        "(`SNNK`, `LehmerMultiplet`, `GatedPerceptron`).", ""]
    for task, (title, misses) in TASKS.items():
        rows = found["tasks"][task]
        for match, heading in MATCHES.items():
            parts += [f"## {title}. {heading}", "",
                      f"| block | hidden | parameters | loss (nats) | {misses} | time | stored |",
                      "|---|---:|---:|---:|---:|---:|---:|"]
            parts += [_line(name, rows[name][match]) for name in sorted(
                rows, key=lambda name: statistics.fmean(rows[name][match]["loss"]))]
            parts.append("")
    return "\n".join(parts)


def _line(name: str, row: Mapping[str, Any]) -> str:
    def spread(values: list[float], digits: int) -> str:
        return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
    return (f"| {name} | {row['hidden']} | {row['parameters']:,} | {spread(row['loss'], 3)} | "
            f"{spread(row['error'], 1)} | {row['time over plain']:.2f} | "
            f"{row['stored over plain']:.2f} |")
