"""A training step of Kolmogorov-Arnold blocks against an MLP with as many parameters.

    python benchmarks/kan.py

Each block stands in turns with a plain block of two linear layers and a SiLU, whose width gives it
the same number of parameters; a figure is the median over the turns of the processor's time of a
forward and backward pass over the plain block's in the same turn. `de Boor` is
the textbook recursion in PyTorch's operations, as most published layers have it, with one product
of bases and weights; published packages are not compared.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from netwright.blocks import kan
from netwright.blocks.kan import KANFeedForward, RationalFeedForward
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "kan.json"
DIMS, ROWS, TURNS, BOUND = (64, 128, 256, 512), 1024, 9, 3.0


class DeBoor(nn.Module):
    """The plain layer with the recursion over orders."""

    def __init__(self, inputs: int, outputs: int, grid: int = 5, order: int = 3) -> None:
        super().__init__()
        self.order = order
        self.base = nn.Parameter(torch.randn(outputs, inputs) / inputs ** 0.5)
        self.spline = nn.Parameter(torch.randn(outputs, inputs * (grid + order)) / inputs ** 0.5)
        knots = torch.arange(-order, grid + order + 1) * (4 / grid) - 2
        self.register_buffer("knots", knots.expand(inputs, -1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        t, z = self.knots, x[..., None]
        found = ((z >= t[:, :-1]) & (z < t[:, 1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            found = ((z - t[:, :-k - 1]) / (t[:, k:-1] - t[:, :-k - 1]) * found[..., :-1]
                     + (t[:, k + 1:] - z) / (t[:, k + 1:] - t[:, 1:-k]) * found[..., 1:])
        return linear(silu(x), self.base) + linear(found.flatten(-2), self.spline)


def autograd(dim: int) -> nn.Module:
    return RationalFeedForward(dim, 4 * dim, backward="autograd")


BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "rational": lambda dim: RationalFeedForward(dim, 4 * dim),
    "rational, autograd": autograd,
    "B-spline": KANFeedForward,
    "B-spline, de Boor": lambda dim: nn.Sequential(DeBoor(dim, 4 * dim // 9),
                                                   DeBoor(4 * dim // 9, dim)),
    "selectable, soft": lambda dim: KANFeedForward(
        dim, bases=("bspline", "fourier", "rbf", "silu"), select="soft"),
    **{name: lambda dim, name=name: KANFeedForward(dim, bases=(name,))
       for name in ("rbf", "fourier", "chebyshev", "wavelet")},
}
if hasattr(kan, "AFKANFeedForward"):
    BLOCKS["activation-based"] = kan.AFKANFeedForward
PEERS = ("B-spline, de Boor", "rational, autograd")


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def taken(network: nn.Module, x: Tensor) -> float:
    for p in network.parameters():
        p.grad = None
    begin = time.process_time()
    network(x).square().mean().backward()
    return time.process_time() - begin


def measured(dim: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    x = torch.randn(ROWS, dim, requires_grad=True)
    found = {}
    for name, make in BLOCKS.items():
        block = make(dim)
        width = max(1, round((parameters(block) - dim) / (2 * dim + 1)))
        plain = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, dim))
        pairs = [(taken(block, x), taken(plain, x)) for _ in range(TURNS + 2)][2:]
        found[name] = {"parameters": parameters(block),
                       "step_ms": 1000 * statistics.median(ours for ours, _ in pairs),
                       "step_over_mlp": statistics.median(a / b for a, b in pairs)}
        print(f"dim {dim:4}  {name:20} {parameters(block):9} parameters  "
              f"{found[name]['step_ms']:8.2f} ms  {found[name]['step_over_mlp']:6.2f}", flush=True)
    return found


def main() -> None:
    found: dict[str, Any] = {str(dim): measured(dim) for dim in DIMS}
    missed = [f"dim {dim}, {name}: {row['step_over_mlp']:.2f} times the MLP"
              for dim, rows in found.items() for name, row in rows.items()
              if name not in PEERS and row["step_over_mlp"] > BOUND]
    RESULTS.write_text(json.dumps({
        "threads": torch.get_num_threads(), "rows": ROWS, "turns": TURNS, "found": found,
        "missed": missed, "machine": machine()}, indent=1) + "\n", encoding="utf-8")
    sys.exit("\n".join(missed) or None)


if __name__ == "__main__":
    main()
