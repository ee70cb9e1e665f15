import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from netwright.blocks.feedforward import QuadraticLinear, relinear_groups
from netwright.data import Split
from netwright.evidence import Loader, Outcome, Scale, evidence, figure, least, most, train
from netwright.rules import Rule

DEPTH, WIDTH, LR, GAMMA = 6, 16, 3e-3, 0.1
WAYS = ("random start", "linear start, one rate", "MLP")
SEPARATES = ((most("mistakes of one quadratic neuron on rings (%)") < 1)
             & (least("mistakes of one ordinary neuron on rings (%)") > 20))


@evidence(paper="001-102", claim="One quadratic neuron separates what no ordinary one does, and "
          "ReLinear lets deep quadratic networks train that collapse from a random start.",
          shown=[SEPARATES, figure("mistakes on spirals, ReLinear (%)") < 10,
                 figure("mistakes on spirals, random start (%)")
                 > figure("mistakes on spirals, ReLinear (%)") + 10],
          partly=SEPARATES)
def quadratic_networks(scale: Scale) -> Outcome:
    """Separate rings by one neuron, and two spirals by deep networks."""
    seeds, steps = (range(3), 600) if scale == "desk" else (range(10), 6000)
    rings = train({"quadratic": lambda: QuadraticLinear(2, 1), "ordinary": lambda: nn.Linear(2, 1)},
                  _rings, {"mistakes of one {} neuron on rings (%)": _mistakes}, seeds=seeds,
                  steps=100, looks=1, loss=_loss,
                  optimizer=lambda rule: torch.optim.Adam(rule.parameters(), 0.1))
    on_spirals = partial(train, data=_spirals, measure={"mistakes on spirals, {} (%)": _mistakes},
                         seeds=seeds, steps=steps, loss=_loss, diverged=50.0)
    plain = on_spirals({way: partial(_deep, way) for way in WAYS},
                       optimizer=lambda rule: torch.optim.Adam(rule.parameters(), LR))
    relinear = on_spirals(
        {"ReLinear": partial(_deep, "ReLinear")},
        optimizer=lambda rule: torch.optim.Adam(relinear_groups(rule, LR, GAMMA), LR))
    both = {**plain.rules, **relinear.rules}
    return Outcome(
        setting={"rings": "1000 points at radii 1 and 2, Adam 0.1, 100 steps", "spirals":
                 "two, of one and a half turns, noise 0.02; 400 points to train, 2000 to test",
                 "networks": f"{DEPTH} layers of {WIDTH} ReLU units; the MLP as wide as gives the "
                 "same number of parameters", "training": f"Adam {LR}, all points, {steps} steps; "
                 f"ReLinear: gamma = {GAMMA}"},
        figures={**rings.figures, **plain.figures, **relinear.figures,
                 **{f"parameters, {way}": [float(sum(p.numel() for p in rules[0].parameters()))]
                    for way, rules in both.items()}},
        note="A network whose outputs are no longer finite counts as 50 %.",
        curves={**relinear.curves("mistakes on spirals, {} (%)"),
                **plain.curves("mistakes on spirals, {} (%)")},
        axes=("step", "mistakes on held-out spirals (%)"))


def _deep(way: str) -> nn.Sequential:
    parts: list[nn.Module] = []
    width = 29 if way == "MLP" else WIDTH
    start = "random" if way == "random start" else "linear"
    for before, after in zip([2, *[width] * (DEPTH - 1)], [*[width] * (DEPTH - 1), 1], strict=True):
        parts += [nn.Linear(before, after) if way == "MLP" else
                  QuadraticLinear(before, after, start=start),  # type: ignore[arg-type]
                  nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def _rings(seed: int) -> Split:
    draw = torch.Generator().manual_seed(seed)
    angle, outer = 2 * math.pi * torch.rand(1000, generator=draw), torch.arange(1000) % 2
    x = torch.stack([angle.cos(), angle.sin()], 1) * (1 + outer)[:, None]
    x = x + 0.05 * torch.randn(1000, 2, generator=draw)
    return Split(x, outer.float(), x, outer.float())


def _spirals(seed: int) -> Split:
    return Split(*_spiral(400, seed), *_spiral(2000, seed + 1000))


def _spiral(n: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    along, which = torch.rand(n, generator=draw).sqrt(), torch.arange(n) % 2
    angle = 3 * math.pi * along + math.pi * which
    x = along[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return x + 0.02 * torch.randn(n, 2, generator=draw), which.float()


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logits[:, 0], y)


def _mistakes(rule: Rule, test: Loader) -> float:
    """Return the share of wrong signs (%), 50 where a logit is not finite."""
    wrong, samples = 0.0, 0
    for x, y in test:
        logits = rule.predict(x)[:, 0]
        if not bool(logits.isfinite().all()):
            return 50.0
        wrong += float(((logits > 0) != (y > 0)).sum())
        samples += len(y)
    return 100 * wrong / samples
