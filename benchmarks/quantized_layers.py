"""Quantized linear layers beside dense ones in float32 and bfloat16, at one row and at many.

    python benchmarks/quantized_layers.py

2048 x 2048, no bias, one thread. The contenders take turns; a figure is the least processor time of
all turns over that of the dense product that its bar names. The floor of what is unpacked first is
the dense product and the writing of the weight in full, which is given beside.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from netwright.blocks import DynamicLinear, QuantizedLinear
from netwright.blocks.quantized.kernels import packed_rows
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "quantized_layers.json"
SIZE, ROWS, TURNS = 2048, (1, 2, 4, 8, 16, 64, 256), 15
ONE_ROW, EVERY, DYNAMIC = 0.5, 1.15, 0.25  # the bars


def least(runs: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Return the least processor time (s) of each, all of them in turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(TURNS):
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    whole = nn.Linear(SIZE, SIZE, bias=False)
    half = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16)
    eight, four = (QuantizedLinear.of(whole, grid, dtype=torch.bfloat16)
                   for grid in ("int8", "int4/32"))
    dynamic = DynamicLinear.of(whole)
    found: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for rows in ROWS:
            x = torch.randn(rows, SIZE)
            near = x.bfloat16()
            times = least({"float32": partial(whole, x), "bfloat16": partial(half, near),
                           "int8": partial(eight, near), "int4/32": partial(four, near),
                           "dynamic": partial(dynamic, x), "unpacking int8": eight.stored})
            better = min(times["float32"], times["bfloat16"])
            found[str(rows)] = {
                "int8 over bfloat16": times["int8"] / times["bfloat16"],
                "int4/32 over bfloat16": times["int4/32"] / times["bfloat16"],
                "int8 over the better": times["int8"] / better,
                "int4/32 over the better": times["int4/32"] / better,
                "dynamic over float32": times["dynamic"] / times["float32"],
                "floor of unpacked int8 over the better":
                    (times["unpacking int8"] + times["bfloat16"]) / better}
            print(rows, {name: round(ratio, 2) for name, ratio in found[str(rows)].items()})
    missed = [f"{name} at {rows} rows: {ratio:.2f}" for rows, ratios in found.items()
              for name, ratio in ratios.items() if (
                  ("over bfloat16" in name and rows == "1" and ratio > ONE_ROW)
                  or (name.startswith("int") and "better" in name and ratio > EVERY)
                  or ("dynamic" in name and ratio > DYNAMIC))]
    RESULTS.write_text(json.dumps({
        "machine": machine(), "setting": {"size": SIZE, "turns": TURNS, "few rows": {
            str(bits): packed_rows(bits, torch.bfloat16) for bits in (8, 4)}},
        "bars": {"over bfloat16 at one row": ONE_ROW, "over the better at every row count": EVERY,
                 "dynamic over float32": DYNAMIC},
        "ratios": found, "missed": missed}, indent=1) + "\n")
    print("missed:", *missed or ["nothing"], sep="\n  ", file=sys.stderr)


if __name__ == "__main__":
    main()
