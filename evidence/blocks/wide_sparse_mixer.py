from statistics import fmean, stdev
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from netwright.blocks.feedforward import PermutedKroneckerLinear, channels_for, effective_width
from netwright.data import Split, digits
from netwright.evidence import Curve, Outcome, Scale, evidence

CONNECTIONS = 4096  # nonzero entries of a mixing layer's wide matrix
WEIGHTS = 1024  # trainable entries of a token and a channel mixing layer together
SIZES = {
    "equal connections": [(s, channels_for(CONNECTIONS, s)) for s in (2, 4, 8, 16, 32, 64)],
    "equal weights": [(s, round((WEIGHTS - s * s) ** 0.5)) for s in (2, 4, 8, 16, 23, 28, 31)]}
BATCH, LR = 64, 3e-3


@evidence(paper="003-194", claim="A Mixer is a wide MLP with sparse Kronecker weights, and at a "
          "fixed number of weights its accuracy rises with the effective width.",
          shortfall=("scale",
                     "A Mixer is its dense form, and at equal weights accuracy rises with the "
                     "width (rank correlations of 0.99 and 0.90). At equal connections it does "
                     "not (-0.9 and -0.5): there the widest Mixer, 16 x 16, has 512 weights to "
                     "train in two layers and the narrowest, 2 x 63, 3973, and with trained ends "
                     "all lie between 96.7 and 97.2 %. Data less easy than digits, and layers so "
                     "large that the number of weights is not what is short, are needed."))
def wide_sparse_mixer(scale: Scale) -> Outcome:
    """Train Mixers of equal connections, and of equal weights, and different widths on digits."""
    split, seeds, steps = digits(), 3, 300 if scale == "desk" else 3000
    wrong = [_deviation(seed) for seed in range(seeds)]
    figures: dict[str, list[float]] = {
        "largest deviation of a Mixer from its dense Kronecker MLP, float64": wrong}
    curves, rises = {}, {}
    for reading, sizes in SIZES.items():
        widths = [effective_width(*size) for size in sizes]
        for ends in ("frozen", "trained"):
            name = f"{reading}, ends {ends}"
            found = [[_accuracy(split, size, ends == "trained", seed, steps)
                      for seed in range(seeds)] for size in sizes]
            for size, width, values in zip(sizes, widths, found, strict=True):
                figures[f"test accuracy, {name}, width {width} = {size[0]} x {size[1]} (%)"] = (
                    values)
            means = [fmean(values) for values in found]
            rank = float(spearmanr(widths, means).statistic)
            figures[f"rank correlation of width and mean accuracy, {name}"] = [rank]
            best, narrow = widths.index(max(widths)), widths.index(min(widths))
            gains = [a - b for a, b in zip(found[best], found[narrow], strict=True)]
            figures[f"widest over narrowest, {name} (percentage points)"] = gains
            rises[reading, ends] = rank >= 0.7 and fmean(gains) > stdev(gains) / seeds ** 0.5
            order = sorted(range(len(sizes)), key=widths.__getitem__)
            curves[name] = Curve([widths[i] for i in order],
                                 [[found[i][seed] for i in order] for seed in range(seeds)])
    exact = max(wrong) < 1e-6
    whole = [reading for reading in SIZES if all(rises[reading, ends]
                                                 for ends in ("frozen", "trained"))]
    return Outcome(
        verdict="shown" if exact and len(whole) == len(SIZES) else
        "partly shown" if exact and (whole or sum(rises.values()) >= 2) else "not shown",
        setting={"network": "a linear map of the 64 pixels to S x C, two blocks of token and "
                 "channel mixing, each h := h + relu(mix(h)), a linear map to 10",
                 "equal connections": f"{CONNECTIONS} nonzero entries of a mixing layer's wide "
                 "matrix on average, as in the paper's experiments", "equal weights":
                 f"{WEIGHTS} trainable entries of a token and a channel mixing layer",
                 "ends": "the two linear maps, random and frozen, so that what is trained does "
                 "not grow with the width; and trained, as usual", "training":
                 f"Adam, learning rate {LR}, {steps} steps of {BATCH} digits, the same for all, "
                 "not tuned"},
        figures=figures,
        note="A reading counts where, with frozen ends and with trained ones, width and mean "
             "accuracy have a rank correlation of at least 0.7 and the widest Mixer is above the "
             "narrowest by more than the standard error. Shown is both readings and a Mixer "
             "within 1e-6 of its dense form; partly shown is one reading, or two of the four "
             "settings. At equal connections the widest Mixer uses each weight most often and so "
             "has the fewest to train, on digits too few.",
        curves=curves, axes=("effective width S C", "test accuracy (%)"))


class _Mixer(nn.Module):
    """Token and channel mixing on a table that is kept as one vector."""

    def __init__(self, size: tuple[int, int], trained: bool) -> None:
        super().__init__()
        tokens, channels = size
        width = tokens * channels
        self.embed, self.read = nn.Linear(64, width), nn.Linear(width, 10)
        for end in (self.embed, self.read):
            nn.init.normal_(end.weight, std=end.in_features ** -0.5)
            end.requires_grad_(trained)
        self.mixing = nn.ModuleList(
            mix for _ in range(2) for mix in (
                PermutedKroneckerLinear(channels, tokens, tokens, "transpose"),
                PermutedKroneckerLinear(tokens, channels, channels)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.flatten(1))
        for mix in self.mixing:
            h = h + mix(h).relu()
        out: Tensor = self.read(h)
        return out


def _accuracy(split: Split, size: tuple[int, int], trained: bool, seed: int, steps: int) -> float:
    torch.manual_seed(seed)
    network = _Mixer(size, trained)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], LR)
    for _ in range(steps):
        rows = torch.randint(len(split.x_train), (BATCH,))
        optimizer.zero_grad()
        cross_entropy(network(split.x_train[rows]), split.y_train[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        right = network(split.x_test).argmax(1) == split.y_test
    return 100 * float(right.float().mean())


def _deviation(seed: int) -> float:
    """Return how far the mixing layers are from the dense matrices that they stand for."""
    torch.manual_seed(seed)
    network = _Mixer((8, 28), True).double()
    x = torch.randn(16, 64, dtype=torch.double)
    with torch.no_grad():
        h = network.embed(x)
        mix: Any
        for mix in network.mixing:
            ones = (mix.bias.repeat_interleave(mix.copies) if mix.transposes
                    else mix.bias.repeat(mix.copies))
            h = h + (h @ mix.dense_weight().T + ones).relu()
        return float((network.read(h) - network(x)).abs().max())
