"""Structured feed-forward blocks beside the dense one, at 32 % of its parameters.

    python benchmarks/structured_feedforward.py [--cuda]

A training step is a forward and a backward pass with gradients of the input and of every
parameter; inference is the forward pass alone. The contenders take turns, and a figure is the
median over the turns of the time over the dense block's of the same turn: the processor's time on
the CPU with one thread, the device's own on CUDA. Small numbers of rows are also run with the
factors multiplied out beforehand (`premerge`). On the CPU the widths are dim 1024 with 4096 hidden
units, and dim 4096 with 4096; on CUDA dim 4096 with 16384 hidden units as well.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from netwright.blocks.feedforward import FeedForward, StructuredFeedForward
from netwright.blocks.feedforward.structured_linear import Kind
from netwright.reshape.feedforward import premerge
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results"
KINDS: tuple[Kind, ...] = ("lowrank", "blockdense", "blockshuffle")
BOUND = 0.45


def contenders(dim: int, hidden: int, device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    # The first weights of large layers take minutes and change no time: plain draws stand in.
    blocks: dict[str, nn.Module] = {}
    with torch.device("meta"):
        blocks["dense"] = FeedForward(dim, hidden)
        for kind in KINDS:
            blocks[kind] = StructuredFeedForward(dim, hidden, kind=kind)
    for name, block in blocks.items():
        blocks[name] = block.to_empty(device=device).to(dtype)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
    return blocks


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    run()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1000


def ratios(runs: dict[str, Callable[[], object]], device: str, turns: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            needed = seconds(run, device)
            if turn:
                taken[name].append(needed)
    found = {"dense, ms": 1000 * statistics.median(taken["dense"])}
    for name, times in taken.items():
        if name != "dense":
            found[name] = statistics.median(
                mine / theirs for mine, theirs in zip(times, taken["dense"], strict=True))
    return found


def measured(dim: int, hidden: int, rows: int, device: str, dtype: torch.dtype,
             turns: int) -> dict[str, dict[str, float]]:
    blocks = contenders(dim, hidden, device, dtype)
    whole = sum(p.numel() for p in blocks["dense"].parameters())
    row = {"parameters": {name: sum(p.numel() for p in block.parameters()) / whole
                          for name, block in blocks.items() if name != "dense"}}
    x = torch.randn(rows, dim, device=device, dtype=dtype, requires_grad=True)
    signal = torch.randn_like(x)

    def step(block: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(block(x), [x, *block.parameters()], signal)

    def infer(block: nn.Module, given: Tensor) -> Tensor:
        with torch.inference_mode():
            out: Tensor = block(given)
        return out

    row["training step"] = ratios({name: lambda b=block: step(b)  # type: ignore[misc]
                                   for name, block in blocks.items()}, device, turns)
    row["inference"] = ratios({name: lambda b=block: infer(b, x)  # type: ignore[misc]
                               for name, block in blocks.items()}, device, turns)
    merged = premerge(blocks["blockdense"])
    for few in (1, 16, 64, 256):
        some = {**blocks, "premerged": merged}
        row[f"inference, {few} rows"] = ratios(
            {name: lambda b=block, n=few: infer(b, x[:n].detach())  # type: ignore[misc]
             for name, block in some.items()}, device, 3 * turns)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cuda", action="store_true")
    device = "cuda" if parser.parse_args().cuda else "cpu"
    torch.set_num_threads(1)
    found = {}
    if device == "cpu":
        settings = [(1024, 4096, 1024, torch.float32), (4096, 4096, 512, torch.float32)]
        turns = 7
    else:
        settings = [(dim, hidden, 16384, dtype) for dim, hidden in ((1024, 4096), (4096, 16384))
                    for dtype in (torch.float32, torch.bfloat16)]
        turns = 20
    for dim, hidden, rows, dtype in settings:
        name = f"dim {dim}, hidden {hidden}, {rows} rows, {str(dtype).removeprefix('torch.')}"
        found[name] = measured(dim, hidden, rows, device, dtype, turns)
        for what, values in found[name].items():
            print(name, "|", what, {key: round(value, 3) for key, value in values.items()},
                  flush=True)
    path = RESULTS / f"structured_feedforward{'' if device == 'cpu' else '_cuda'}.json"
    path.write_text(json.dumps({"bound": BOUND, "threads": 1, "times": found,
                                "machine": machine()}, indent=1) + "\n", encoding="utf-8")
    over = [(name, what, kind) for name, row in found.items() if device == "cpu"
            for what in ("training step", "inference") for kind in KINDS if row[what][kind] > BOUND]
    if over:
        raise SystemExit(f"above {BOUND} of dense time: {over}")


if __name__ == "__main__":
    main()
