from functools import partial
from statistics import fmean

from torch import nn
from torch.nn.functional import interpolate

from evidence.small_models import held_out, images, parameters, train
from netwright.blocks.mixing import MLPMixer, RaftBlock, TokenMixing
from netwright.data import Split
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.reshape import interpolate_mixer

WIDTH, DEPTH, SIDE, LARGER = 48, 3, 8, 12  # the grid of patches, and that of larger images


@evidence(paper="003-084",
          claim="Mixing tokens down and along the grid, two channels with each other, errs no more "
                "than mixing all tokens at once and has fewer parameters, and bicubic "
                "interpolation takes what was learnt to another image size.")
def raft_mlp(scale: Scale) -> Outcome:
    """Train mixers of CIFAR-10 by their token mixing; fine-tune one on larger images."""
    steps, tuning, batch = (300, 60, 16) if scale == "desk" else (6000, 600, 64)
    seeds, data, larger = range(3), images(), _larger(images())

    def raft(size: int, side: int = SIDE) -> MLPMixer:
        return MLPMixer(3, (4 * side, 4 * side), 10, patch=4, width=WIDTH, depth=DEPTH,
                        block=lambda _, dim: RaftBlock(side, side, dim, raft_size=size))

    def full(hidden: int) -> MLPMixer:
        return MLPMixer(3, (32, 32), 10, patch=4, width=WIDTH, depth=DEPTH,
                        token_mixing=lambda tokens, dim: TokenMixing(tokens, hidden))

    small = parameters(raft(2))
    equal = min(range(1, 129), key=lambda hidden: abs(parameters(full(hidden)) - small))
    ways = {"rafts of 2": lambda: raft(2), "rafts of 1": lambda: raft(1),
            "all tokens at once": lambda: full(2 * SIDE ** 2),
            "all tokens at once, as few parameters": lambda: full(equal)}
    runs = {way: [train(make, data, seed, steps=steps, batch=batch) for seed in seeds]
            for way, make in ways.items()}
    errors = {way: [run.errors[-1] for run in found] for way, found in runs.items()}

    untrained: list[float] = []
    tuned: list[float] = []
    fresh: list[float] = []
    for seed, run in zip(seeds, runs["rafts of 2"], strict=True):
        wide = interpolate_mixer(run.network, 4 * LARGER)
        untrained.append(held_out(wide, larger.x_test, larger.y_test)[1])
        for values, make in ((tuned, partial(_same, wide)), (fresh, partial(raft, 2, LARGER))):
            values.append(train(make, larger, seed, steps=tuning, batch=batch, lr=1e-3,
                                looks=1).errors[-1])

    figures = {f"mistakes, {way} (%)": values for way, values in errors.items()}
    figures |= {f"parameters, {way}": [float(parameters(found[0].network))]
                for way, found in runs.items()}
    figures["mistakes, 48 x 48, interpolated, not trained on (%)"] = untrained
    figures[f"mistakes, 48 x 48, interpolated, {tuning} steps (%)"] = tuned
    figures[f"mistakes, 48 x 48, from the start, {tuning} steps (%)"] = fresh
    good = (fmean(errors["rafts of 2"]) <= fmean(errors["all tokens at once"])
            and small < parameters(full(2 * SIDE ** 2)))
    moves = all(a < b for a, b in zip(tuned, fresh, strict=True))
    return Outcome(
        verdict="shown" if good and moves else "partly shown" if good or moves else "not shown",
        setting={"data": "CIFAR-10, 10,000 images, patches of 4 x 4",
                 "networks": f"{DEPTH} blocks of width {WIDTH}; token mixing of twice the units "
                             f"that it takes, and of {equal} where parameters are as few",
                 "training": f"{steps} steps of {batch}, Adam 3e-3, falling linearly to 0",
                 "larger images": f"2,000 of the images, interpolated to 48 x 48; {tuning} steps, "
                                  "Adam 1e-3"},
        figures=figures,
        note="Shown is a mean over the seeds at or below that of mixing all tokens at once, with "
             "fewer parameters, and, on larger images with every seed, fewer mistakes than a "
             "network that starts from nothing and takes as many steps. The paper trains networks "
             "of four resolutions on ImageNet; here all blocks have one."
             f" Rafts make {'no' if good else 'some'} more mistakes than mixing all tokens at "
             "once.",
        curves={way: Curve([float(s) for s in found[0].steps], [run.errors for run in found])
                for way, found in runs.items()},
        axes=("step", "mistakes on held-out images (%)"))


def _same(network: nn.Module) -> nn.Module:
    return network


def _larger(data: Split, some: int = 2000) -> Split:
    x_train, x_test = (interpolate(x[:some], (4 * LARGER, 4 * LARGER), mode="bicubic",
                                   align_corners=False) for x in (data.x_train, data.x_test))
    return Split(x_train, data.y_train[:some], x_test, data.y_test[:some])
