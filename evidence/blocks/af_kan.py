import time
from collections.abc import Callable
from statistics import mean, median

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from netwright.blocks.kan import AFKANLinear, SelectableKANLinear
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.objectives.losses import cross_entropy

HIDDEN, RATES, EPOCHS_SHOWN = 32, (1e-3, 3e-3, 1e-2), 10


def _relu_kan(inputs: int, outputs: int) -> nn.Module:
    return AFKANLinear(inputs, outputs, activation="relu", reduce="none",
                       normalize_functions=False)


WAYS: dict[str, Callable[[], nn.Module]] = {
    "AF-KAN": lambda: nn.Sequential(AFKANLinear(64, HIDDEN), AFKANLinear(HIDDEN, 10)),
    # As many parameters need as many fewer hidden units as there are functions on an edge.
    "ReLU-KAN": lambda: nn.Sequential(_relu_kan(64, 6), _relu_kan(6, 10)),
    "B-spline KAN": lambda: nn.Sequential(
        SelectableKANLinear(64, 5, ("silu", "bspline"), "sum", grid=3, grid_range=(0, 1)),
        SelectableKANLinear(5, 10, ("silu", "bspline"), "sum", grid=3, grid_range=(-2, 2))),
    "MLP": lambda: nn.Sequential(nn.Linear(64, HIDDEN + 2), nn.SiLU(), nn.Linear(HIDDEN + 2, 10)),
}


@evidence(paper="003-121", claim="An activation-based Kolmogorov-Arnold network classifies better "
          "than an MLP, ReLU-KAN and B-splines with as many parameters, and a step takes longer.",
          shortfall=("claim",
                     "Tried twice: at one rate of 0.01 for all and 20 epochs it made 2.8, 12.4 "
                     "and 6.4 % mistakes, the MLP 3.2 to 4.4; with a rate tuned for each, 40 "
                     "epochs and five seeds 5.8 % with a deviation of 4.4, the MLP 2.7, ReLU- "
                     "KAN 4.0, B-splines 5.4. That a step takes longer holds."))
def af_kan(scale: Scale) -> Outcome:
    """Train each on scikit-learn's digits and count what it gets wrong."""
    seeds, epochs = (5, 40) if scale == "desk" else (10, 100)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16).float(), torch.tensor(labels)
    figures: dict[str, list[float]] = {}
    curves: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    rates = {way: _rate(make, x, y, epochs) for way, make in WAYS.items()}
    for seed in range(seeds):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        train, test = order[:1200], order[1200:]
        for way, make in WAYS.items():
            torch.manual_seed(seed)
            network = make()
            errors, step = _trained(network, x, y, train, test, epochs, rates[way])
            curves[way].append(errors)
            figures.setdefault(f"mistakes, {way} (%)", []).append(errors[-1])
            figures.setdefault(f"step, {way} (ms)", []).append(1000 * step)
            figures[f"parameters, {way}"] = [sum(p.numel() for p in network.parameters())]

    def mistakes(way: str) -> float:
        return mean(figures[f"mistakes, {way} (%)"])

    others = [way for way in WAYS if way != "AF-KAN"]
    better = [mistakes("AF-KAN") <= mistakes(way) for way in others]
    slower = mean(figures["step, AF-KAN (ms)"]) > mean(figures["step, MLP (ms)"])
    return Outcome(
        verdict="shown" if all(better) and slower else "partly shown" if any(better) else
        "not shown",
        setting={"data": "scikit-learn's digits, 1200 to train and 597 to test, split by the seed",
                 "networks": f"two layers; AF-KAN of {HIDDEN} hidden units with SiLU, quad1 and "
                 "global attention, grid 3, order 3; the others as wide as gives the same number "
                 "of parameters", "training": f"Adam falling to 0, batch 100, {epochs} epochs",
                 "rates": f"of {RATES}, the best on 300 of the images to train, under a seed that "
                 f"is not reported: {rates}",
                 "step": "median processor time of forward, backward and update"},
        figures=figures,
        note="Shown is a mean share of mistakes not above that of any other, and a longer step "
             "than the MLP's; partly shown, not above that of one other. A first version had one "
             "rate of 0.01 for all, 20 epochs and three seeds, on which AF-KAN made 2.8, 12.4 and "
             "6.4 % mistakes.",
        curves={way: Curve([epochs * (i + 1) / EPOCHS_SHOWN for i in range(EPOCHS_SHOWN)], runs)
                for way, runs in curves.items()},
        axes=("epoch", "mistakes on held-out digits (%)"))


def _rate(make: Callable[[], nn.Module], x: Tensor, y: Tensor, epochs: int) -> float:
    """Return the rate that makes the fewest mistakes on images that are kept back."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(100))[:1200]

    def mistakes(rate: float) -> float:
        torch.manual_seed(100)
        return _trained(make(), x, y, order[:900], order[900:], epochs, rate)[0][-1]
    return min(RATES, key=mistakes)


def _trained(network: nn.Module, x: Tensor, y: Tensor, train: Tensor, test: Tensor,
             epochs: int, rate: float) -> tuple[list[float], float]:
    optimizer = torch.optim.Adam(network.parameters(), rate)
    steps, errors, times = epochs * len(train) // 100, [], []
    for step in range(steps):
        rows = train[torch.randint(len(train), (100,))]
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        begin = time.process_time()
        optimizer.zero_grad()
        cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
        times.append(time.process_time() - begin)
        if (step + 1) % (steps // EPOCHS_SHOWN) == 0:
            with torch.no_grad():
                wrong = network(x[test]).argmax(1) != y[test]
            errors.append(100 * float(wrong.float().mean()))
    return errors, median(times)
