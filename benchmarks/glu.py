"""Gated blocks: a step and an inference of each beside the bare products that they need.

    python benchmarks/glu.py

Dimension 512, hidden 1024, 4096 tokens, no biases: three products forwards, six backwards, of which
two add up in the gradient of the input. The contenders take turns, one thread; a figure is the
median over the turns of the processor's time over that of the products in the same turn. The
products make their results as linear layers do and hold them as long as a step does.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from netwright.blocks.feedforward import GLU
from netwright.measure import cost
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "glu.json"
DIM, HIDDEN, TOKENS, TURNS, BOUND = 512, 1024, 4096, 21, 1.05
VARIANTS = {"GLU": "sigmoid", "bilinear": "identity", "ReGLU": "relu", "GEGLU": "gelu",
            "SwiGLU": "silu"}


def forwards(x: Tensor, h: Tensor, weights: list[Tensor]) -> list[Tensor]:
    gate, up, down = weights
    return [linear(x, gate), linear(x, up), linear(h, down)]


def bare_step(x: Tensor, h: Tensor, weights: list[Tensor], signal: Tensor) -> list[Tensor]:
    gate, up, down = weights
    back = [signal @ down, signal.T @ h, h.T @ x, h.T @ x]
    return [*forwards(x, h, weights), *back, (h @ gate).addmm_(h, up)]


def stepping(block: GLU, x: Tensor, signal: Tensor) -> Callable[[], None]:
    given = x.clone().requires_grad_()

    def step() -> None:
        for leaf in (given, *block.parameters()):
            leaf.grad = None
        block(given).backward(signal)
    return step


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, h = torch.randn(TOKENS, DIM), torch.randn(TOKENS, HIDDEN)
    signal = torch.randn(TOKENS, DIM)
    blocks = {name: GLU(DIM, HIDDEN, activation=activation)  # type: ignore[arg-type]
              for name, activation in VARIANTS.items()}
    weights = [p.detach() for p in blocks["SwiGLU"].parameters()]
    contenders: dict[str, dict[str, Callable[[], object]]] = {
        "step": {"products": lambda: bare_step(x, h, weights, signal),
                 **{name: stepping(block, x, signal) for name, block in blocks.items()}},
        "inference": {"products": lambda: forwards(x, h, weights),
                      **{name: torch.no_grad()(lambda block=block: block(x))
                         for name, block in blocks.items()}}}
    found: dict[str, dict[str, float]] = {}
    for kind, runs in contenders.items():
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(TURNS + 2):
            for name, run in runs.items():
                begin = time.process_time()
                run()
                if turn > 1:
                    times[name].append(time.process_time() - begin)
        found[f"{kind}, products (ms)"] = {
            "median": 1000 * statistics.median(times["products"])}
        found[f"{kind} over products"] = {
            name: statistics.median(a / b for a, b in zip(times[name], times["products"],
                                                          strict=True)) for name in blocks}
    found["stored bytes"] = {name: cost(block, (x, signal), repeats=1, warmup=0,
                                        loss=lambda y, _: y.sum()).saved_bytes
                             for name, block in blocks.items()}
    for key, row in found.items():
        print(key, {name: round(value, 3) for name, value in row.items()})
    missed = [f"{key}, {name}: {value:.3f} above {BOUND}" for key, row in found.items()
              if "over" in key for name, value in row.items() if value > BOUND]
    RESULTS.write_text(json.dumps({
        "dimension": DIM, "hidden": HIDDEN, "tokens": TOKENS, "turns": TURNS,
        "threads": torch.get_num_threads(), "found": found, "missed": missed,
        "machine": machine()}, indent=1) + "\n", encoding="utf-8")
    sys.exit("\n".join(missed) or None)


if __name__ == "__main__":
    main()
