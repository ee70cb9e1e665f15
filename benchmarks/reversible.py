"""A step of the same couplings: plain backpropagation, ours, and the published peers.

    python benchmarks/reversible.py

Two streams; F and G are each two layers with a ReLU between. All contenders run the same weights in
turns, and a figure is the median over the turns of the time over plain backpropagation's of the
same turn: of the processor's time, which neighbours on the machine hardly change, and of the wall
clock's. Bytes are those of one step, seen by `nw.measure.cost`: `saved` waits for the backward
pass, `working` is the most that lives besides weights, gradients of weights and what was there
before, `peak` everything. The peers are memcnn 1.5.2, revtorch 0.2.4, revlib 1.7.2 and
`torch.utils.checkpoint`; gradients are compared first, in float64.

The floor is plain's step and one more forward pass without gradients, in the same turns: the
arithmetic that any way back needs that keeps nothing, without what that way itself costs.
"""

import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from netwright.blocks.reversible import AdditiveCoupling, ReversibleSequential
from netwright.measure import cost
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "reversible.json"
DEPTHS, TURNS = (8, 16, 32, 64), 7
PEERS = ("memcnn", "revtorch", "revlib, function", "revlib, graph", "checkpoint")
BOUND, FLAT = 1.20, 1.05


def mlp_half() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def cnn_half() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


NETWORKS = {"mlp": (mlp_half, (2048, 128)), "cnn": (cnn_half, (4, 16, 48, 48))}


class Checkpointed(nn.Sequential):
    """One segment for each coupling."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def contenders(couplings: nn.Sequential) -> dict[str, nn.Module]:
    """Return networks that share the weights of `couplings`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import memcnn
        import revlib
        import revtorch
    halves = [half for block in couplings for half in (block.f, block.g)]

    def library(mode: Any) -> nn.Module:
        return revlib.ReversibleSequential(*halves, split_dim=1, memory_mode=mode)
    return {
        "plain": couplings,
        "netwright": ReversibleSequential(*couplings),
        "netwright, exact": ReversibleSequential(*couplings, exact=True),
        "memcnn": nn.Sequential(*[
            memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(block.f, block.g))
            for block in couplings]),
        "revtorch": revtorch.ReversibleSequence(nn.ModuleList([
            revtorch.ReversibleBlock(block.f, block.g) for block in couplings])),
        "revlib, function": library(revlib.MemoryModes.autograd_function),
        "revlib, graph": library(revlib.MemoryModes.autograd_graph),
        "checkpoint": Checkpointed(*couplings),
    }


def loss(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean()


def stepping(network: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    def step() -> None:
        for p in network.parameters():
            p.grad = None
        # An input with a gradient and a copy of it, since revtorch and revlib learn nothing
        # without the one, and memcnn frees the storage of the other.
        loss(network(x.clone().requires_grad_()), target).backward()
    return step


def floor(couplings: nn.Module, x: Tensor, plain: Callable[[], None]) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            couplings(x)
        plain()
    return step


def differing(couplings: nn.Sequential, x: Tensor) -> dict[str, str]:
    """Return the contenders that do not learn what plain backpropagation does, and why."""
    couplings, x = copy.deepcopy(couplings).double(), x[:2].double()
    found, wrong = {}, {}
    for name, network in contenders(couplings).items():
        try:
            stepping(network, x, torch.zeros_like(x))()
        except RuntimeError as error:
            wrong[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            continue
        found[name] = [p.grad for p in couplings.parameters()]
        if any(g is None or not torch.allclose(g, expected, rtol=1e-6, atol=1e-12)
               for g, expected in zip(found[name], found["plain"], strict=True)):
            wrong[name] = "other gradients"
    return wrong


class Given(nn.Module):
    """Takes a copy that needs a gradient, as every contender's step does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x.clone().requires_grad_())


def measured(kind: str, depth: int) -> dict[str, dict[str, float]]:
    half, shape = NETWORKS[kind]
    torch.manual_seed(0)
    couplings = nn.Sequential(*[AdditiveCoupling(half(), half()) for _ in range(depth)])
    with torch.no_grad():
        for p in couplings.parameters():
            p.mul_(0.5)
    x = torch.randn(shape)
    target = torch.randn(shape)
    networks = contenders(couplings)
    for name, why in differing(couplings, x).items():
        print(f"  left out: {name}, {why}")
        del networks[name]
    steps = {name: stepping(network, x, target) for name, network in networks.items()}
    steps["floor"] = floor(couplings, x, steps["plain"])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(TURNS + 2):
        for name, step in steps.items():
            begin = time.process_time(), time.perf_counter()
            step()
            if turn > 1:
                times[name].append((time.process_time() - begin[0], time.perf_counter() - begin[1]))
    found = {}
    for name, taken in times.items():
        ratios = [statistics.median(a[clock] / b[clock] for a, b in
                                    zip(taken, times["plain"], strict=True)) for clock in (0, 1)]
        found[name] = {"step_ms": 1000 * statistics.median(wall for _, wall in taken),
                       "step_over_plain": ratios[0], "wall_over_plain": ratios[1]}
    for name, network in networks.items():
        bytes_ = cost(Given(network), (x, target), loss=loss, repeats=1, warmup=0)
        found[name] |= {"saved_bytes": bytes_.saved_bytes, "working_bytes": bytes_.working_bytes,
                        "peak_bytes": bytes_.peak_bytes}
    return found


def shortfalls(found: dict[str, Any]) -> list[str]:
    """Return which targets are missed."""
    missed = []
    for kind, depths in found.items():
        for depth, rows in depths.items():
            ours, peers = rows["netwright"], {n: rows[n] for n in PEERS if n in rows}
            fastest = min(peers, key=lambda name: peers[name]["step_over_plain"])
            smallest = min(peers, key=lambda name: peers[name]["peak_bytes"])
            place = f"{kind}, {depth} couplings"
            if ours["step_over_plain"] > BOUND:
                missed.append(f"{place}: {ours['step_over_plain']:.2f} of plain's time")
            if ours["step_over_plain"] > peers[fastest]["step_over_plain"]:
                missed.append(f"{place}: slower than {fastest}")
            if ours["peak_bytes"] >= peers[smallest]["peak_bytes"]:
                missed.append(f"{place}: a peak above {smallest}'s")
        few, many = (depths[str(d)]["netwright"]["saved_bytes"] for d in (DEPTHS[0], DEPTHS[-1]))
        if many > FLAT * few:
            missed.append(f"{kind}: stored bytes grow by {many / few:.2f}")
    return missed


def main() -> None:
    found: dict[str, Any] = {}
    for kind in NETWORKS:
        found[kind] = {}
        for depth in DEPTHS:
            print(f"{kind}, {depth} couplings, {torch.get_num_threads()} threads")
            found[kind][str(depth)] = measured(kind, depth)
            print(f"  {'':18}{'ms':>8}{'/ plain':>9}{'(wall)':>9}{'saved KiB':>11}{'working':>9}"
                  f"{'peak':>9}")
            for name, row in found[kind][str(depth)].items():
                sizes = "".join(f"{row[f'{size}_bytes'] / 1024:{width}.0f}" for size, width in
                                (("saved", 11), ("working", 9), ("peak", 9))
                                if f"{size}_bytes" in row)
                print(f"  {name:18}{row['step_ms']:8.1f}{row['step_over_plain']:9.3f}"
                      f"{row['wall_over_plain']:9.3f}{sizes}", flush=True)
    missed = shortfalls(found)
    RESULTS.write_text(json.dumps({
        "threads": torch.get_num_threads(), "turns": TURNS, "found": found, "missed": missed,
        "machine": machine()}, indent=1) + "\n", encoding="utf-8")
    sys.exit("\n".join(missed) or None)


if __name__ == "__main__":
    main()
