"""What layers that were turned into experts take beside the layer that they were.

    python benchmarks/expert_surgery.py

`moefy`: inference of a ReLU layer split into 16 experts, of which some run, over the dense layer.
What a call of `moefy` and of `swap_feedforward` without distilling costs on 12 layers of width 384,
in passes of the model over the calibration data; the pass and the calls take turns.
`mix_lora`: a training step of 8 low-rank experts, 2 for each token, over one low-rank adapter of
the rank of both, and over the same experts with frozen matrices multiplied anew for each. One
thread; contenders take turns, and a figure is the ratio of the medians of their processor times.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netwright.blocks.experts import MixtureOfExperts
from netwright.blocks.feedforward import FeedForward
from netwright.models import gpt
from netwright.reshape import mix_lora, moefy, swap_feedforward
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "expert_surgery.json"
DIM, HIDDEN, TOKENS, TURNS = 512, 2048, 1024, 15
PASS_TURNS = 3


def medians(contenders: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median processor time (s) of each."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(TURNS + 1):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            if turn:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(some) for name, some in times.items()}


class Anew(nn.Module):
    """A low-rank expert that multiplies the frozen matrices itself."""

    def __init__(self, base: FeedForward, rank: int) -> None:
        super().__init__()
        self.base = [base]
        self.pairs = nn.ParameterList()
        for linear in (base[0], base[2]):
            out, inputs = linear.weight.shape
            self.pairs.extend([nn.Parameter(torch.randn(rank, inputs) / inputs ** 0.5),
                               nn.Parameter(torch.zeros(out, rank))])

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.pairs
        up, activation, down = self.base[0]
        h = activation(up(x) + 2 * x @ a.T @ b.T)
        return down(h) + 2 * h @ c.T @ d.T


def in_passes() -> dict[str, float]:
    """Return what calls cost, in passes over their calibration data."""
    model = gpt(96, context=128, width=384, depth=12, heads=6).eval()
    x = torch.randint(96, (32, 128))

    def pass_over() -> None:
        with torch.no_grad():
            model(x)
    calls: dict[str, Callable[[], Any]] = {
        f"moefy by {split}": lambda split=split: moefy(model, x, split=split, progress=False)
        for split in ("cluster", "coactivation", "random")}
    calls["swap_feedforward, not distilled"] = lambda: swap_feedforward(model, FeedForward, x)
    times: dict[str, list[float]] = {name: [] for name in ("pass", *calls)}
    for _ in range(PASS_TURNS):
        for name, run in calls.items():
            for contender, work in (("pass", pass_over), (name, run)):
                start = time.process_time()
                work()
                times[contender].append(time.process_time() - start)
    return {f"{name} / pass": min(times[name]) / min(times["pass"]) for name in calls}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, float] = in_passes()
    x = torch.randn(TOKENS, DIM)
    dense = FeedForward(DIM, HIDDEN, activation="relu").requires_grad_(False)
    splits = {k: moefy(dense, x, n_experts=16, k=k, steps=20) for k in (1, 2, 4, 8, 16)}
    with torch.no_grad():
        torch.testing.assert_close(splits[16](x), dense(x), rtol=1e-3, atol=1e-4)
        times = medians({"dense": lambda: dense(x), **{
            f"{k} of 16": lambda split=split: split(x) for k, split in splits.items()}})
    found |= {f"moefy, {name} / dense": seconds / times["dense"]
                               for name, seconds in times.items() if name != "dense"}

    x.requires_grad_()  # as inside a network, whose earlier layers have adapters too
    tuned = mix_lora(dense, n_experts=8, rank=8, k=2)
    one = mix_lora(dense, n_experts=1, rank=16, k=1)
    anew = MixtureOfExperts(DIM, [Anew(dense, 8) for _ in range(8)], k=2)

    def step(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            model(x).square().mean().backward()
        return run

    times = medians({"experts": step(tuned), "one": step(one), "anew": step(anew)})
    found["mix_lora step, 2 of 8 experts / one adapter of the rank of both"] = (
        times["experts"] / times["one"])
    found["mix_lora step, shared frozen products / products for each expert"] = (
        times["experts"] / times["anew"])
    RESULTS.write_text(json.dumps({
        "setting": {"dim": DIM, "hidden": HIDDEN, "tokens": TOKENS, "turns": TURNS},
        "ratios": found, "machine": machine()}, indent=1) + "\n")
    for name, ratio in found.items():
        print(f"{name}: {ratio:.2f}")


if __name__ == "__main__":
    main()
