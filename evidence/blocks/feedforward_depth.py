import time
from functools import partial
from statistics import mean

import torch
from torch import Tensor, nn

from evidence.small_models import language_model, parameters, text, train, width_for
from netwright.blocks.feedforward import FeedForward
from netwright.evidence import Curve, Outcome, Scale, evidence

WIDTH, BLOCKS, FEWER = 32, 4, 2
NAMES = ("no layers", "1 layer", "2 layers", "3 layers", "3 layers, fewer blocks")


@evidence(paper="003-002", claim="Without feed-forward layers a transformer is worst; three-layer "
          "ones in fewer blocks give at least the two-layer ones' loss, with no more parameters "
          "and in less time.",
          shortfall=("scale",
                     "That three layers in fewer blocks give no higher loss in less time holds "
                     "(2.525 against 2.546 nats). Without feed-forward layers the network, made "
                     "wider for as many parameters, is the best here, by 0.03 nats, but two "
                     "layers come nearer as the training goes on: they are 0.10 behind after 62 "
                     "steps, 0.06, 0.04, and 0.03 after 250. Windows of 32 characters and 250 "
                     "steps are too few for what feed-forward layers store; the full scale has "
                     "5000 steps."))
def feedforward_depth(scale: Scale) -> Outcome:
    """Train character models of equal size whose feed-forward blocks have 0 to 3 layers."""
    seeds, steps = (3, 250) if scale == "desk" else (5, 5000)
    data = text(context=32)
    size = parameters(language_model(WIDTH, BLOCKS, context=32))
    shapes: dict[str, tuple[int, int, int, int]] = {}  # layers, width, blocks, hidden
    for layers, name in enumerate(NAMES[:2]):
        width = width_for(size, lambda w, n=layers: _model(n, w, BLOCKS, w),  # type: ignore[misc]
                          range(WIDTH, 3 * WIDTH, 4))
        shapes[name] = layers, width, BLOCKS, width
    for name, layers, blocks in zip(NAMES[2:], (2, 3, 3), (BLOCKS, BLOCKS, FEWER), strict=True):
        hidden = max(h for h in range(WIDTH, 6 * WIDTH)
                     if parameters(_model(layers, WIDTH, blocks, h)) <= size)
        shapes[name] = layers, WIDTH, blocks, hidden
    figures: dict[str, list[float]] = {}
    curves = {}
    for name, shape in shapes.items():
        runs, seconds = [], []
        for seed in range(seeds):
            start = time.process_time()
            runs.append(train(partial(_model, *shape), data, seed, steps=steps, looks=4))
            seconds.append(time.process_time() - start)
        figures[f"held-out loss, {name} (nats)"] = [run.losses[-1] for run in runs]
        figures[f"processor time of a training, {name} (s)"] = seconds
        figures[f"parameters, {name}"] = [parameters(runs[0].network)]
        curves[name] = Curve(runs[0].steps, [run.losses for run in runs])

    def loss(name: str) -> list[float]:
        return figures[f"held-out loss, {name} (nats)"]

    worst = all(row[0] == max(row) for row in zip(*map(loss, NAMES), strict=True))
    two, fewer = NAMES[2], NAMES[4]
    better = mean(loss(fewer)) <= mean(loss(two))
    cheaper = all(mean(figures[what.format(fewer)]) <= mean(figures[what.format(two)])
                  for what in ("processor time of a training, {} (s)", "parameters, {}"))
    return Outcome(
        verdict="shown" if worst and better and cheaper else
        "partly shown" if worst or (better and cheaper) else "not shown",
        setting={"data": "tinyshakespeare in windows of 32 characters, 512 of its last tenth held "
                 "out", "training": f"{steps} steps of 16 windows, Adam 3e-3 falling to 0, no "
                 "tuning", "two layers": f"{BLOCKS} blocks of width {WIDTH}, hidden {4 * WIDTH}",
                 "equal size": "without layers and with one, wider; with three, narrower hidden "
                 f"layers in {BLOCKS} blocks, wider ones in {FEWER}",
                 "width, blocks, hidden": {name: shape[1:] for name, shape in shapes.items()}},
        figures=figures,
        note="Shown is: no layers are worst on every seed, and three layers in half of the blocks "
             "have no higher mean loss than two, no more parameters, and take less time. A time "
             "is that of a whole training, looks at what is held out among it. This is the second "
             "run: in the first the network of fewer blocks had 176 parameters more than that of "
             "two layers, 0.3 %, so that nothing could be said of no more parameters; its loss was "
             "the lowest there too.",
        curves=curves, axes=("step", "held-out loss (nats)"))


class _Nothing(nn.Module):
    """Adds nothing to the signal."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)


def _model(layers: int, width: int, blocks: int, hidden: int) -> nn.Module:
    def feedforward(dim: int, _: int) -> nn.Module:
        return FeedForward(dim, hidden, layers=layers) if layers else _Nothing()
    return language_model(width, blocks, context=32, feedforward=feedforward)
