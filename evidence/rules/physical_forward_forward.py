import statistics
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor, nn

from netwright.data import Batches, Split, digits
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.rules import Backprop, PhysicalForwardForward, Rule
from netwright.training import fit

WIDTH, NOISE, DRIFT, JUMP = 100, 0.1, 0.01, 0.7
SHARPNESS, RATES, HELD_OUT = (4.0, 10.0, 30.0), (1e-3, 3e-3, 1e-2), 300
# What the claim takes, in points: ahead of the last layer alone; behind training without a drift
# at the end; ahead of weights that are left as they were when the boxes changed.
AHEAD, BEHIND, FOLLOWS = 1.0, 2.0, 5.0


@evidence(paper="000-034", claim="Local training between positive and negative data trains the "
          "layers around opaque, noisy physical ones, better than the last layer alone, and keeps "
          "working when these drift in the midst of training.",
          shortfall=("open",
                     "It keeps working when the boxes drift (78 % where weights left as they are "
                     "have 34 %). Against the last layer alone it loses with two boxes, 74 "
                     "against 83 %, and wins with three, 82 against 68 %: what passes more boxes "
                     "serves the last layer less. The seeds are far apart, 64 to 80 % and 71 to "
                     "94 %, and a first trial with three boxes gave 68 % for both. What makes "
                     "some seeds fail without a drift, and none with it (78 to 79 %), is not "
                     "known."))
def physical_forward_forward(scale: Scale) -> Outcome:
    """Train digits through drifting black boxes in NumPy, all layers or the last one only."""
    desk = scale == "desk"
    seeds, epochs = (3, 24) if desk else (10, 100)
    split = digits()
    runs: dict[str, list[list[float]]] = {}
    inner = Split(split.x_train[:-HELD_OUT], split.y_train[:-HELD_OUT],
                  split.x_train[-HELD_OUT:], split.y_train[-HELD_OUT:])
    setting: dict[str, object] = {}
    for boxes in (2, 3):
        best: dict[bool, float] = {}
        for last, values in ((False, SHARPNESS), (True, RATES)):
            found = {value: _train(inner, epochs, 100, value, boxes, last=last, drift=False)[-1]
                     for value in values}
            best[last] = max(found, key=lambda value: found[value])
        setting[f"chosen for {boxes} boxes"] = (f"sharpness {best[False]:g}; the last layer's "
                                                f"learning rate {best[True]:g}")
        for name, options in {
                "local, no drift": {"drift": False},
                "local, drift": {},
                "local, drift, weights left after it": {"stop": True},
                "last layer, no drift": {"last": True, "drift": False},
                "last layer, drift": {"last": True}}.items():
            if boxes == 2 or "no drift" in name:
                value = best["last" in options]
                runs[name if boxes == 2 else f"{name}, 3 boxes"] = [
                    _train(split, epochs, seed, value, boxes, **options) for seed in range(seeds)]
    end = {name: _mean(curves) for name, curves in runs.items()}
    beats = end["local, no drift"] >= end["last layer, no drift"] + AHEAD
    survives = (end["local, drift"] >= end["local, no drift"] - BEHIND and end["local, drift"]
                >= end["local, drift, weights left after it"] + FOLLOWS)
    return Outcome(
        verdict="shown" if beats and survives else "partly shown" if beats or survives
        else "not shown",
        setting={**setting, "data": "scikit-learn's digits",
                 "network": f"64, then twice a linear layer of {WIDTH} and a box, then 10",
                 "box": "s / (1 + s) of the squares s of a random mixture of the input, which is "
                        f"of rms 1; noise of deviation {NOISE}; in NumPy, no gradient",
                 "drift": f"the mixture turns by {DRIFT} at each epoch, and by {JUMP} when half of "
                          f"the {epochs} epochs are over",
                 "training": "Adam, batch 64; local: learning rate 0.003",
                 "tuning": f"the best of three values, {SHARPNESS} and {RATES}, on {HELD_OUT} "
                           "held-out training images, one run each without a drift"},
        figures={f"test accuracy, {name} (%)": [curve[-1] for curve in curves]
                 for name, curves in runs.items()},
        note=f"Local training must be {AHEAD:g} point ahead of the last layer alone, in the mean; "
             f"with the drift at most {BEHIND:g} behind training without one, and {FOLLOWS:g} "
             "ahead of weights that are left as they are when the boxes jump. The verdict is of "
             "two boxes, as the paper's networks have. A first trial with three, sharpness 4 and a "
             "learning rate of 0.001 was behind the last layer (68 % and 68 % in the mean, with 47 "
             "to 91 % over seeds), since layers behind more boxes see less of the label and vote "
             "all the same; three boxes are shown beside. Boxes are simulated; the paper's are "
             "measured. That it is faster and takes less power than other training "
             "of such hardware is not looked at.",
        curves={name: Curve(list(range(1, epochs + 1)), curves) for name, curves in runs.items()},
        axes=("epoch", "test accuracy (%)"))


class _Box(nn.Module):
    """A noisy, saturating system without a gradient, whose mixture turns."""

    def __init__(self, draw: numpy.random.Generator) -> None:
        super().__init__()
        self.draw = draw
        self.mixing = draw.standard_normal((WIDTH, WIDTH)) / WIDTH ** 0.5

    def turn(self, size: float) -> None:
        other = self.draw.standard_normal(self.mixing.shape) / WIDTH ** 0.5
        self.mixing = (1 - size ** 2) ** 0.5 * self.mixing + size * other

    def forward(self, h: Tensor) -> Tensor:
        given = h.detach().numpy().astype(float)
        given /= numpy.sqrt((given ** 2).mean(axis=1, keepdims=True)) + 1e-6
        squares = (given @ self.mixing) ** 2
        measured = squares / (1 + squares) + NOISE * self.draw.standard_normal(squares.shape)
        return torch.from_numpy(measured).to(h)


def _train(split: Split, epochs: int, seed: int, value: float, count: int, *, drift: bool = True,
           stop: bool = False, last: bool = False) -> list[float]:
    """Return the test accuracy after each epoch; `value` is the sharpness, or the last's rate."""
    torch.manual_seed(seed)
    draw = numpy.random.default_rng(seed)
    boxes = [_Box(draw) for _ in range(count)]
    layers: list[nn.Module] = []
    for k, box in enumerate(boxes):
        layers += [nn.Linear(WIDTH if k else 64, WIDTH), box]
    network = nn.Sequential(nn.Flatten(), *layers, nn.Linear(WIDTH, 10))
    if last:
        network[:-1].requires_grad_(False)
    rule: Rule = (Backprop(network) if last
                  else PhysicalForwardForward(network, sharpness=value))
    curve: list[float] = []

    def look(_: object) -> None:
        curve.append(_accuracy(rule, split))
        for box in boxes if drift else ():
            box.turn(JUMP if len(curve) == epochs // 2 else DRIFT)
        if stop and len(curve) == epochs // 2:
            network.requires_grad_(False)

    optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad],
                                 value if last else 3e-3)
    batches = Batches(split.x_train, split.y_train, 64, seed=seed)
    if not stop:
        fit(rule, batches, epochs=epochs, seed=seed, progress=False, on_epoch=look,
            optimizer=lambda _: optimizer)
        return curve
    fit(rule, batches, epochs=epochs // 2, seed=seed, progress=False, on_epoch=look,
        optimizer=lambda _: optimizer)
    while len(curve) < epochs:
        look(None)
    return curve


def _accuracy(rule: Rule, split: Split) -> float:
    return 100 * float((rule.predict(split.x_test).argmax(1) == split.y_test).float().mean())


def _mean(curves: Sequence[Sequence[float]]) -> float:
    return statistics.fmean(curve[-1] for curve in curves)
