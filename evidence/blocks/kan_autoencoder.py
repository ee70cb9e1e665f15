from collections.abc import Callable
from statistics import mean

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from netwright.blocks.kan import KANAutoencoder
from netwright.evidence import Curve, Outcome, Scale, evidence

CODE, LR, LOOKS = 8, 5e-3, 6


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, CODE), nn.Linear(CODE, 64),
                         nn.SiLU(), nn.Linear(64, 64), nn.Sigmoid())


def _cnn(channels: int = 14) -> nn.Module:
    few, many = channels, 2 * channels
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, few, 3, 2, 1), nn.SiLU(),
        nn.Conv2d(few, many, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(4 * many, CODE),
        nn.Linear(CODE, 4 * many), nn.SiLU(), nn.Unflatten(1, (many, 2, 2)),
        nn.ConvTranspose2d(many, few, 3, 2, 1, output_padding=1), nn.SiLU(),
        nn.ConvTranspose2d(few, 1, 3, 2, 1, output_padding=1), nn.Flatten(), nn.Sigmoid())


WAYS: dict[str, Callable[[], nn.Module]] = {
    "KAN": lambda: KANAutoencoder((64, CODE)), "MLP": _mlp, "CNN": _cnn}


@evidence(paper="003-176", claim="An autoencoder of Kolmogorov-Arnold layers reconstructs images "
          "about as well as a convolutional one with the same code and as many parameters.")
def kan_autoencoder(scale: Scale) -> Outcome:
    """Train three autoencoders on scikit-learn's digits and measure what they reconstruct."""
    seeds, steps = (3, 600) if scale == "desk" else (10, 6000)
    x = torch.tensor(load_digits().data / 16).float()
    figures: dict[str, list[float]] = {}
    curves: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        train, test = x[order[:1200]], x[order[1200:]]
        figures.setdefault("held-out MSE, always the mean (thousandths)", []).append(
            1000 * float(mse_loss(train.mean(0).expand_as(test), test)))
        for way, make in WAYS.items():
            torch.manual_seed(seed)
            network = make()
            found = _trained(network, train, test, steps)
            curves[way].append(found)
            figures.setdefault(f"held-out MSE, {way} (thousandths)", []).append(found[-1])
            figures[f"parameters, {way}"] = [sum(p.numel() for p in network.parameters())]
    kan, mlp, cnn = (mean(figures[f"held-out MSE, {way} (thousandths)"]) for way in WAYS)
    return Outcome(
        verdict="shown" if kan <= 1.1 * min(mlp, cnn) else
        "partly shown" if kan <= 1.1 * max(mlp, cnn) else "not shown",
        setting={"data": "scikit-learn's digits, 1200 to train and 597 to test, split by the seed",
                 "code": f"{CODE} numbers", "KAN": "one layer each way, grid 5, order 3",
                 "MLP": "two layers each way, 64 hidden SiLU units",
                 "CNN": "two strided convolutions and a linear layer each way, SiLU",
                 "training": f"Adam {LR} falling to 0, batch 100, {steps} steps"},
        figures=figures,
        note="Shown is a mean error of at most 1.1 times the better one's of MLP and CNN, partly "
             "shown of the worse one's. Nothing was tuned.",
        curves={way: Curve([steps * (i + 1) / LOOKS for i in range(LOOKS)], runs)
                for way, runs in curves.items()},
        axes=("step", "held-out mean squared error (thousandths)"))


def _trained(network: nn.Module, train: Tensor, test: Tensor, steps: int) -> list[float]:
    optimizer, errors = torch.optim.Adam(network.parameters(), LR), []
    for step in range(steps):
        some = train[torch.randint(len(train), (100,))]
        optimizer.param_groups[0]["lr"] = LR * (1 - step / steps)
        optimizer.zero_grad()
        mse_loss(network(some), some).backward()
        optimizer.step()
        if (step + 1) % (steps // LOOKS) == 0:
            with torch.no_grad():
                errors.append(1000 * float(mse_loss(network(test), test)))
    return errors
