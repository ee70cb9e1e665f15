from collections.abc import Callable
from statistics import mean

import numpy
import torch
from scipy.interpolate import BSpline
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from netwright.blocks.coordinates import AdaptiveBasisLayer
from netwright.data import mnist1d
from netwright.evidence import Curve, Outcome, Scale, evidence

WAYS = ("adaptive", "B-splines", "FPCA")
SIZES = (2, 4, 8)


@evidence(paper="003-132", claim="Basis functions learnt with the network lose less of a curve "
          "than B-splines or principal components of the same number.",
          shortfall=("open",
                     "With 4 and 8 numbers the claim holds on every seed, and with 2 on two of "
                     "three: there the learnt functions miss 1.7 % of the variance, the "
                     "principal components 20 %; on the third seed they miss 73 %, so that it is "
                     "the training that got stuck. On MNIST-1D, where the question is a class "
                     "and no longer what is lost of a curve, they make 58 % mistakes and the "
                     "components 51 %. Neither another start nor a penalty, nor longer training, "
                     "was tried."))
def adaptive_basis(scale: Scale) -> Outcome:
    """Predict from curves by as many numbers of three kinds."""
    seeds, steps = (3, 500) if scale == "desk" else (5, 5000)
    figures: dict[str, list[float]] = {}
    curves: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        made = _made(seed)
        for way in WAYS:
            errors = [_error(way, size, made, seed, steps, mse_loss, 1) / float(made[3].var())
                      for size in SIZES]
            for size, error in zip(SIZES, errors, strict=True):
                figures.setdefault(f"share of the target's variance missed, {way}, {size} numbers",
                                   []).append(error)
            curves[way].append(errors)
        split = mnist1d(seed=seed)
        strokes = (split.x_train[:, 0], split.y_train, split.x_test[:, 0], split.y_test)
        for way in WAYS:
            figures.setdefault(f"mistakes on MNIST-1D, {way}, 8 numbers (%)", []).append(
                _error(way, 8, strokes, seed, steps, cross_entropy, 10))

    def better(name: str, other: str) -> list[bool]:
        return [a < b for a, b in zip(figures[name], figures[name.replace("adaptive", other)],
                                      strict=True)]

    names = [f"share of the target's variance missed, adaptive, {size} numbers" for size in SIZES]
    strokes_name = "mistakes on MNIST-1D, adaptive, 8 numbers (%)"
    on_made = {name: all(all(better(name, other)) for other in WAYS[1:]) for name in names}
    on_strokes = all(mean(figures[strokes_name])
                     < mean(figures[strokes_name.replace("adaptive", other)])
                     for other in WAYS[1:])
    return Outcome(
        verdict="shown" if all(on_made.values()) and on_strokes else
        "partly shown" if sum(on_made.values()) >= 2 else "not shown",
        setting={"made": "the paper's third simulation: 50 cosines with random coefficients, of "
                 "which the first, third, fifth and tenth are large; the target is <b_2, x> + "
                 "<b_1, x>^2 of two tent-shaped functions, and noise of a tenth of its deviation; "
                 "51 points; 2000 curves to train, 1000 to test",
                 "MNIST-1D": "4000 curves of 40 points to train, 1000 to test, other curves for "
                 "each seed", "adaptive": "networks of 3 hidden layers of 32 for each function, no "
                 "penalty", "B-splines": "products with cubic splines (of fewer than 4, of as high "
                 "a degree as they can have) on even knots", "FPCA":
                 "products with the first principal components", "network":
                 "two hidden layers of 64 behind the numbers, which are made unit in deviation "
                 "(adaptive: by batch norm, as for the others)", "training":
                 f"{steps} steps of 128 curves, Adam 3e-3 falling to 0, for all"},
        figures=figures,
        note="Shown is a smaller error than both on every seed at each of 2, 4 and 8 numbers, and "
             "fewer mistakes in the mean on MNIST-1D; partly shown is the first at two of the "
             "three sizes.",
        curves={way: Curve(list(SIZES), lines) for way, lines in curves.items()},
        axes=("numbers that a curve becomes", "share of the target's variance missed"))


def _made(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = numpy.random.default_rng(seed)
    t, j = numpy.linspace(0, 1, 51), numpy.arange(1, 51)
    waves = numpy.where(j[:, None] == 1, 1.0,
                        numpy.sqrt(2) * numpy.cos((j[:, None] - 1) * numpy.pi * t))
    sizes = numpy.select([(j == 1) | (j == 3), (j == 5) | (j == 10)], [5.0, 3.0], 1.0)
    x = (draw.uniform(-3 ** 0.5, 3 ** 0.5, (3000, 50)) * sizes) @ waves
    first = numpy.where(t <= 0.25, 4 - 16 * t, 0.0)
    second = numpy.where((t >= 0.25) & (t <= 0.75), 4 - 16 * numpy.abs(0.5 - t), 0.0)
    y = (numpy.trapezoid(x * second, t, axis=1) + numpy.trapezoid(x * first, t, axis=1) ** 2)
    y = (y - y.mean()) / y.std() + 0.1 * draw.normal(size=len(y))
    both = [torch.from_numpy(z).float() for z in (x, y[:, None])]
    return both[0][:2000], both[1][:2000], both[0][2000:], both[1][2000:]


def _error(way: str, size: int, data: tuple[Tensor, Tensor, Tensor, Tensor], seed: int, steps: int,
           loss: Callable[[Tensor, Tensor], Tensor], outputs: int) -> float:
    """Return what a network on `size` numbers of each curve gets wrong of the test curves."""
    x, y, x_test, y_test = data
    torch.manual_seed(seed)
    grid = torch.linspace(0, 1, x.shape[1])
    first: nn.Module = (AdaptiveBasisLayer(size, 32, grid) if way == "adaptive"
                        else _Fixed(_splines(size, len(grid)) if way == "B-splines"
                                    else _components(x, size)))
    network = nn.Sequential(first, nn.BatchNorm1d(size, affine=False), nn.Linear(size, 64),
                            nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,), generator=draws)
        optimizer.zero_grad()
        loss(network(x[rows]), y[rows]).backward()
        optimizer.step()
        falling.step()
    network.eval()
    with torch.no_grad():
        found = network(x_test)
        if outputs > 1:
            return 100 * float((found.argmax(1) != y_test).float().mean())
        return float((found - y_test).square().mean())


class _Fixed(nn.Module):
    """The products of curves with functions that stay."""

    basis: Tensor

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.register_buffer("basis", basis)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.basis.T / x.shape[1]


def _splines(size: int, points: int) -> Tensor:
    degree = min(3, size - 1)
    inner = numpy.linspace(0, 1, size - degree + 1)
    knots = numpy.concatenate([[0.0] * degree, inner, [1.0] * degree])
    t = numpy.linspace(0, 1 - 1e-9, points)
    return torch.from_numpy(BSpline.design_matrix(t, knots, degree).toarray().T.copy()).float()


def _components(x: Tensor, size: int) -> Tensor:
    vectors: Tensor = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:size]
    return vectors
