import time
from functools import partial
from statistics import fmean, median

import torch
from torch import nn

from evidence.small_models import MakeFeedForward, parameters, train
from netwright.blocks.feedforward import FeedForward, RePaFeedForward
from netwright.data import digits
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.models import patch_transformer
from netwright.reshape import reparameterize as merge


@evidence(paper="004-039", claim="Feed-forward layers most of whose channels skip the activation "
          "are merged into smaller matrices after training: the same outputs, much faster, at "
          "about the same accuracy.")
def reparameterize(scale: Scale) -> Outcome:
    """Train patch transformers of digits with plain and idle channels; merge, compare, time."""
    split, seeds, steps = digits(), 3, 300 if scale == "desk" else 3000
    makes: dict[str, MakeFeedForward] = {"plain": FeedForward, "idle channels": RePaFeedForward}
    figures: dict[str, list[float]] = {}
    curves, apart, right = {}, [], {}
    for name, make in makes.items():
        runs = [train(partial(_network, make), split, seed, steps=steps, batch=64)
                for seed in range(seeds)]
        right[name] = [100 - run.errors[-1] for run in runs]
        figures[f"test accuracy, {name} (%)"] = right[name]
        curves[name] = Curve(runs[0].steps, [[100 - e for e in run.errors] for run in runs])
    merged_right = []
    for run in runs:
        network = run.network.eval()
        merged = merge(network)
        with torch.no_grad():
            before, after = network(split.x_test), merged(split.x_test)
        apart.append(float((before - after).abs().max() / before.abs().max()))
        merged_right.append(100 * float((after.argmax(1) == split.y_test).float().mean()))
    figures["test accuracy, merged (%)"] = merged_right
    figures["largest change of the outputs by merging, relative"] = apart
    blocks: dict[str, nn.Module] = {"plain": FeedForward(384),
                                    "idle channels": RePaFeedForward(384).eval()}
    blocks["merged"] = merge(blocks["idle channels"])
    networks: dict[str, nn.Module] = {
        name: patch_transformer(3, (32, 32), 10, width=192, depth=3, feedforward=make)
        for name, make in makes.items()}
    networks["merged"] = merge(networks["idle channels"].eval())
    rows, images = torch.randn(512, 384), torch.randn(4, 3, 32, 32)
    ratios = {}
    for what, parts, x in (("feed-forward block of 384", blocks, rows),
                           ("network of width 192", networks, images)):
        for name, ratio in _latencies(parts, x, seeds).items():
            figures[f"latency, {what}, {name} over plain"] = ratio
            ratios[what, name] = fmean(ratio)
        figures[f"parameters, {what}, merged over plain"] = [
            parameters(parts["merged"]) / parameters(parts["plain"])]
    exact = max(apart) <= 1e-5
    close = fmean(merged_right) >= fmean(right["plain"]) - 1
    fast = (ratios["feed-forward block of 384", "merged"] <= 0.6
            and ratios["network of width 192", "merged"] <= 0.85)
    return Outcome(
        verdict="shown" if exact and close and fast else
        "partly shown" if exact and (close or fast) else "not shown",
        setting={"accuracy": "digits in patches of 2 x 2, width 48, 2 blocks, 192 hidden units of "
                 "which 144 are idle", "training": f"Adam, learning rate 0.003 falling to 0, "
                 f"{steps} steps of 64, the same for both, not tuned", "latency":
                 "processor time of one thread in eval mode, in turns, medians of 7; the block on "
                 "512 rows, the network (3 blocks, 64 patches) on 4 images, untrained"},
        figures=figures,
        note="Shown is outputs that change by at most 1e-5, a merged accuracy at most 1 "
             "percentage point below the plain network's, and at most 0.6 of the block's and 0.85 "
             "of the network's latency. The layer norm before each block stays, in both. The "
             "paper's gains in accuracy are of models a thousand times larger.",
        curves=curves, axes=("steps", "test accuracy (%)"))


def _network(make: MakeFeedForward) -> nn.Module:
    return patch_transformer(1, (8, 8), 10, patch=2, width=48, depth=2, feedforward=make)


@torch.no_grad()
def _latencies(parts: dict[str, nn.Module], x: torch.Tensor, seeds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in parts if name != "plain"}
    for _ in range(seeds):
        times: dict[str, list[float]] = {name: [] for name in parts}
        for turn in range(8):
            for name, part in parts.items():
                start = time.process_time()
                part.eval()(x)
                if turn:
                    times[name].append(time.process_time() - start)
        for name, ratios in found.items():
            ratios.append(median(times[name]) / median(times["plain"]))
    return found
