"""The inverse of a convolution: its backward pass beside that of a dense triangular solve.

    python -m benchmarks.inverse_convolution

The solve over an image's anti-diagonals, its backward pass, and autograd through
`torch.linalg.solve_triangular` on the convolution written as a matrix, by the image's side. Both
have the same weight, image and signal and one thread; they take turns, and a figure is the median
processor time of its turns.
The matrix is left out where it and its gradient would not fit into the memory that is free.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from evidence.flows.convolution_flows import dense_matrix
from netwright.generative.flows.corner import inverse_convolution, starting_weight
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "inverse_convolution.json"
SIDES, CHANNELS, BATCH, KERNEL = (8, 16, 24, 32, 48, 64), 4, 16, 3
ENOUGH = 20.0  # seconds, after which a slow contender is not timed again


def free() -> int:
    """Return the bytes of memory that are free."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measured(side: int) -> dict[str, float]:
    torch.manual_seed(0)
    weight = starting_weight(CHANNELS, KERNEL, "TL", None)
    weight[:, :, -1, -1] = torch.eye(CHANNELS)  # so that the matrix is triangular
    weight.requires_grad_()
    y = torch.randn(BATCH, CHANNELS, side, side, requires_grad=True)
    signal = torch.randn_like(y)

    def triangular() -> Tensor:
        rows = y.permute(2, 3, 1, 0).reshape(-1, BATCH)
        x = torch.linalg.solve_triangular(dense_matrix(weight, side), rows, upper=False)
        return x.view(side, side, CHANNELS, BATCH).permute(3, 2, 0, 1)

    contenders: dict[str, Callable[[], Tensor]] = {
        "over diagonals": lambda: inverse_convolution(y, weight)}
    size = 4 * (CHANNELS * side * side) ** 2
    if 6 * size < free():
        contenders["dense"] = triangular
    there: dict[str, list[float]] = {name: [] for name in contenders}
    back: dict[str, list[float]] = {name: [] for name in contenders}
    gradients: dict[str, tuple[Tensor, ...]] = {}
    for turn in range(32):
        for name, solve in contenders.items():
            if sum(there[name]) + sum(back[name]) > ENOUGH and len(back[name]) > 1:
                continue
            start = time.process_time()
            out = solve()
            between = time.process_time()
            gradients[name] = torch.autograd.grad(out, (y, weight), signal)
            if turn:
                there[name].append(between - start)
                back[name].append(time.process_time() - between)
            del out
    row = {}
    for name in contenders:
        row[f"forward ms, {name}"] = 1000 * statistics.median(there[name])
        row[f"backward ms, {name}"] = 1000 * statistics.median(back[name])
    if "dense" in contenders:
        row["backward, dense / over diagonals"] = (row["backward ms, dense"]
                                                   / row["backward ms, over diagonals"])
        row["matrix MiB"] = size / 2 ** 20
        for mine, theirs in zip(*gradients.values(), strict=True):
            if mine.ndim == 4 and mine.shape[-1] == KERNEL:  # no more of the corner is read there
                mine, theirs = (g.flatten(2)[..., :-1] for g in (mine, theirs))
            most = float(theirs.abs().max())
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * most)
    return row


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for side in SIDES:
        found[side] = measured(side)
        print(side, {name: round(value, 3) for name, value in found[side].items()}, flush=True)
    RESULTS.write_text(json.dumps({
        "channels": CHANNELS, "batch": BATCH, "kernel": KERNEL, "threads": 1,
        "sides": found, "machine": machine()}, indent=1) + "\n", encoding="utf-8")
    factors = [row["backward, dense / over diagonals"] for row in found.values()
               if "backward, dense / over diagonals" in row]
    if any(later <= earlier for earlier, later in pairwise(factors)):
        raise SystemExit(f"the factor does not grow with the image: {factors}")


if __name__ == "__main__":
    main()
