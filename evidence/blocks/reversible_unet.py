from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from netwright.blocks.reversible import ReversibleMBConv, ReversibleSequential, ReversibleUNet
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.measure import cost

WIDTHS, DEPTH = (8, 16, 32), 2
BUDGET = 20 * 2**20
MOST = {"volume": 32, "depth": 12, "channels": 48}  # as far as is searched
BLOCKS = (1, 2, 4, 8)
PAPER = {"volume": 3.0, "depth": 1.25, "channels": 2.0}


@evidence(paper="001-001", claim="In the same memory a reversible 3-D U-Net takes volumes 3 times "
          "as large, is 25 % deeper, or has 2 times the channels of one that is not reversible.")
def reversible_unet(scale: Scale) -> Outcome:
    """Find the largest volume, depth and width that a budget allows; check the gradients."""
    seeds, steps = 3, 40 if scale == "desk" else 200
    figures: dict[str, Sequence[float]] = {}
    largest: dict[str, dict[str, int]] = {}
    for kind, sized in (("volume", _of_length), ("depth", _of_depth), ("channels", _of_width)):
        found = {way: _most(sized, stored, MOST[kind])
                 for way, stored in (("reversible", False), ("stored", True))}
        largest[kind] = found
        unit = {"volume": "fours of slices", "depth": "blocks at each resolution",
                "channels": "eighths of the widths"}[kind]
        for way, n in found.items():
            figures[f"largest {kind} within the budget, {unit}, at most {MOST[kind]}, {way}"] = [n]
        figures[f"{kind} within the budget, reversible as multiple of stored"] = [
            found["reversible"] / found["stored"]]
    back = {dtype: [_blocks(seed, dtype) for seed in range(seeds)]
            for dtype in (torch.float32, torch.float64)}
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64")):
        figures[f"input of 8 blocks reconstructed, relative error, {name}"] = [
            b for b, _ in back[dtype]]
        figures[f"gradient's relative error, {name}"] = [g for _, g in back[dtype]]
    saved = {way: [_cost(_unet(WIDTHS, depth, stored), _volume(8)).saved_bytes for depth in BLOCKS]
             for way, stored in (("reversible", False), ("stored", True))}
    for way, values in saved.items():
        figures[f"stored bytes, 8 blocks at each resolution as multiple of 1, {way}"] = [
            values[-1] / values[0]]
    dice = {way: [_dice(seed, steps, stored) for seed in range(seeds)]
            for way, stored in (("reversible", False), ("stored", True))}
    for way, values in dice.items():
        figures[f"Dice score of both shapes on held-out volumes, {way}"] = values
    exact = (max(b for b, _ in back[torch.float32]) <= 1e-5
             and max(g for _, g in back[torch.float64]) <= 1e-10
             and saved["reversible"][-1] <= 1.05 * saved["reversible"][0])
    level = abs(sum(dice["reversible"]) - sum(dice["stored"])) / seeds <= 0.05
    reached = [largest[kind]["reversible"] >= PAPER[kind] * largest[kind]["stored"]
               for kind in PAPER]
    return Outcome(
        verdict=("shown" if exact and level and all(reached)
                 else "partly shown" if exact and any(reached) else "not shown"),
        setting={"network": f"widths {WIDTHS}, {DEPTH} blocks at each resolution on the way down "
                 "and up, expansion 6, group norm, batch of one volume of two channels",
                 "budget": f"{BUDGET // 2**20} MiB at the peak of a training step: parameters, "
                 "gradients, the volume and all activations; the optimizer's state is not in it",
                 "volume": "slices of 16 x 16 voxels, as many fours as fit",
                 "depth and channels": "at 8 slices of 16 x 16 voxels",
                 "training": f"balls and boxes of noise and brightness, 16 x 16 x 16 voxels, 12 "
                 f"volumes, {steps} steps of Adam of 4 volumes, learning rate 0.01, not tuned"},
        figures=figures,
        curves={way: Curve(BLOCKS, [[s / 2**20 for s in values]]) for way, values in saved.items()},
        axes=("blocks at each resolution", "stored for the backward pass (MiB)"),
        note="Shown means: in the same bytes 3 times the volume, 1.25 times the blocks and 2 times "
             "the channels, the paper's three figures, each alone; the input of eight blocks "
             "comes back within 1e-5 in float32; gradients are autograd's within 1e-10 in "
             "float64; stored bytes with 8 blocks at each resolution are at most 1.05 times those "
             "with 1; Dice scores within 0.05. Partly shown: all but some of the three figures or "
             "the scores. Bytes are those of tensors as the dispatcher sees them, on a CPU, so "
             "that the convolutions' scratch memory does not count. The paper trains on BraTS "
             "with volumes of up to 240 x 240 x 155.")


def _unet(widths: Sequence[int], depth: int, stored: bool) -> ReversibleUNet:
    torch.manual_seed(0)
    return ReversibleUNet(2, 3, widths, [depth] * len(widths), stored=stored)


def _volume(slices: int) -> Tensor:
    return torch.randn(1, 2, slices, 16, 16, generator=torch.Generator().manual_seed(0))


def _cost(network: nn.Module, x: Tensor) -> Any:
    y = torch.zeros(len(x), *x.shape[2:], dtype=torch.long)
    return cost(network, (x, y), loss=cross_entropy, repeats=1, warmup=0)


def _of_length(n: int, stored: bool) -> int:
    return _cost(_unet(WIDTHS, DEPTH, stored), _volume(4 * n)).peak_bytes


def _of_depth(n: int, stored: bool) -> int:
    return _cost(_unet(WIDTHS, n, stored), _volume(8)).peak_bytes


def _of_width(n: int, stored: bool) -> int:
    return _cost(_unet([w * n // 8 for w in WIDTHS], DEPTH, stored), _volume(8)).peak_bytes


def _most(peak: Callable[[int, bool], int], stored: bool, limit: int) -> int:
    """Return the greatest number to `limit` whose peak, which grows with it, is in the budget."""
    if peak(limit, stored) <= BUDGET:
        return limit
    least, beyond = 0, limit
    while beyond - least > 1:
        middle = (least + beyond) // 2
        least, beyond = (middle, beyond) if peak(middle, stored) <= BUDGET else (least, middle)
    return least


def _blocks(seed: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return the relative errors of the reconstructed input and of the gradient."""
    torch.manual_seed(seed)
    network = ReversibleSequential(*[ReversibleMBConv(8) for _ in range(8)]).to(dtype)
    x, found = torch.randn(1, 8, 12, 12, 12, dtype=dtype), []
    for module in (network, nn.Sequential(*network)):
        network.zero_grad()
        module(x).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in network.parameters()
                                if p.grad is not None]))
    network.eval()
    with torch.no_grad():
        back = network.inverse(network(x))
    return (float((back - x).abs().amax() / x.abs().amax()),
            float((found[0] - found[1]).norm() / found[1].norm()))


def _shapes(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return noisy volumes with a ball and a box each, and which voxel is of which."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(16.0)] * 3, indexing="ij"))
    where = torch.randint(4, 12, (2, number, 3, 1, 1, 1), generator=generator)
    ball = (grid - where[0]).square().sum(1) < 14
    box = (grid - where[1]).abs().amax(1) < 3
    y = torch.where(box, 2, ball.long())
    x = torch.randn(number, 2, 16, 16, 16, generator=generator) + (y > 0)[:, None]
    return x, y


def _dice(seed: int, steps: int, stored: bool) -> float:
    """Return the mean Dice score of ball and box after training."""
    generator = torch.Generator().manual_seed(seed)
    x, y = _shapes(12, generator)
    torch.manual_seed(seed)
    network = ReversibleUNet(2, 3, (8, 16), (1, 1), stored=stored)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(steps):
        rows = torch.randperm(len(x), generator=generator)[:4]
        optimizer.zero_grad()
        cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
    x, y = _shapes(6, generator)
    with torch.no_grad():
        found = network(x).argmax(1)
    scores = [2 * ((found == k) & (y == k)).sum() / ((found == k).sum() + (y == k).sum())
              for k in (1, 2)]
    return float(sum(scores)) / 2
