import statistics
import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from netwright.data import Split, digits
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.reshape import parallelize_residual

DEPTHS, WIDTHS = (2, 4, 8, 16), (16, 32, 64)
SEQUENTIAL, PARALLEL, SINGLE = "one after another", "side by side", "one block alone"
NEAR = 0.02  # nats, and what SINGLE must be above that a stack is worth anything


@evidence(paper="004-042", claim="A stack of residual layers put side by side trains to similar "
          "losses, on the training data and on held-out data, as one after another, and its "
          "forward pass is faster.",
          shortfall=("scale",
                     "Training losses are the same in the mean (-0.0002 nats, where a block "
                     "alone has +0.030). On held-out digits the layers side by side are better "
                     "by 0.028, the more so the deeper the stack (-0.003, -0.004, -0.04, -0.06 "
                     "nats at depths 2, 4, 8, 16), more than the 0.02 that were allowed either "
                     "way, though trained to the same losses. One thread takes 1.4 times as "
                     "long. MNIST and CIFAR-10 as in the paper, and a device that runs layers at "
                     "once, are needed."))
def parallelize_residual_stacks(scale: Scale) -> Outcome:
    """Train residual stacks of 2 to 16 layers on the digits, in both layouts."""
    seeds, steps = (range(3), 300) if scale == "desk" else (range(5), 3000)
    split = digits()
    data = Split(split.x_train.flatten(1), split.y_train, split.x_test.flatten(1), split.y_test)
    apart: dict[str, list[list[float]]] = {"training": [], "held-out": []}  # by seed
    single: dict[str, list[list[float]]] = {"training": [], "held-out": []}
    lines: dict[int, list[list[float]]] = {width: [] for width in WIDTHS}
    turned, ratios = [], []
    for seed in seeds:
        found = {(depth, width): _compared(depth, width, seed, data, steps)
                 for width in WIDTHS for depth in DEPTHS}
        for k, on in enumerate(("training", "held-out")):
            apart[on].append([losses[PARALLEL][k] - losses[SEQUENTIAL][k]
                              for losses, *_ in found.values()])
            single[on].append([losses[SINGLE][k] - losses[SEQUENTIAL][k]
                               for losses, *_ in found.values()])
        for width in WIDTHS:
            lines[width].append([found[depth, width][0][PARALLEL][1]
                                 - found[depth, width][0][SEQUENTIAL][1] for depth in DEPTHS])
        turned.append([accuracy for _, accuracy, _ in found.values()])
        ratios.append([ratio for *_, ratio in found.values()])
    figures: dict[str, Sequence[float]] = {}
    for on in ("training", "held-out"):
        figures |= {
            f"{on} loss, side by side less one after another, mean of the grid (nats)":
                [fmean(values) for values in apart[on]],
            f"{on} loss, the same, median of the grid (nats)":
                [statistics.median(values) for values in apart[on]],
            f"{on} loss, the same, largest of the grid (nats)":
                [max(values, key=abs) for values in apart[on]],
            f"{on} loss, one block alone less a stack, mean of the grid (nats)":
                [fmean(values) for values in single[on]]}
    figures |= {"accuracy of a trained stack put side by side as it is, mean of the grid (%)":
                [fmean(values) for values in turned],
                "forward time, side by side over one after another, median of the grid":
                [statistics.median(values) for values in ratios]}
    centre = {on: fmean(fmean(values) for values in apart[on]) for on in apart}
    alone = fmean(fmean(values) for values in single["training"])
    near = all(abs(value) <= NEAR for value in centre.values())
    ratio = fmean(figures["forward time, side by side over one after another, median of the grid"])
    kept = fmean(fmean(values) for values in turned)
    telling, faster = alone > NEAR, ratio < 0.95
    return Outcome(
        verdict="shown" if near and telling and faster else
                "partly shown" if (near and telling) or faster else "not shown",
        setting={"network": "linear, then h + relu(W h + b) of each depth and width, then linear",
                 "grid": f"depths {DEPTHS}, widths {WIDTHS}",
                 "data": "scikit-learn's digits", "training": f"{steps} steps of Adam, batch 64, "
                 "3e-3 for both layouts, the same weights and batches to begin with",
                 "time": "the held-out images in one batch, one thread, medians of 15 turns",
                 "holds if": f"both mean differences are within {NEAR} nats, a block alone has a "
                 f"training loss more than {NEAR} above a stack's, and the time's ratio is below "
                 "0.95"},
        figures=figures,
        note=f"In the mean the layouts differ by {centre['training']:+.3f} nats on the training "
             f"data and {centre['held-out']:+.3f} on held-out data. As a control, a single block "
             f"of each width has a training loss {alone:+.3f} from the stacks'. Side by side the "
             "layers are the same products, run here by one thread, and only where they can run "
             f"at the same time is there time to gain: the ratio is {ratio:.2f}. A stack that was "
             f"trained one after another and is changed then classifies {kept:.0f} % rightly "
             "without training. The paper trains 6912 convolutional networks on MNIST and "
             "CIFAR-10.",
        curves={f"width {width}": Curve(DEPTHS, values) for width, values in lines.items()},
        axes=("residual layers", "held-out loss, side by side less one after another (nats)"))


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.ReLU())

    def forward(self, h: Tensor) -> Tensor:
        added: Tensor = self.branch(h)
        return h + added


def _stack(depth: int, width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), *[_Layer(width) for _ in range(depth)],
                         nn.Linear(width, 10))


def _compared(depth: int, width: int, seed: int, data: Split,
              steps: int) -> tuple[dict[str, tuple[float, float]], float, float]:
    """Return both losses of each layout, the accuracy of one turned into the other, the ratio."""
    networks = {SEQUENTIAL: _stack(depth, width, seed),
                PARALLEL: parallelize_residual(_stack(depth, width, seed), data.x_test[:2]),
                SINGLE: _stack(1, width, seed)}
    losses = {}
    for layout, network in networks.items():
        _train(network, data, seed, steps)
        with torch.no_grad():
            losses[layout] = (float(cross_entropy(network(data.x_train), data.y_train)),
                              float(cross_entropy(network(data.x_test), data.y_test)))
    with torch.no_grad():
        turned = parallelize_residual(networks[SEQUENTIAL], data.x_test[:2])
        right = float(100 * (turned(data.x_test).argmax(1) == data.y_test).float().mean())
    return losses, right, _ratio(networks[PARALLEL], networks[SEQUENTIAL], data.x_test)


def _train(network: nn.Module, data: Split, seed: int, steps: int) -> None:
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(data.x_train), (64,), generator=draws)
        optimizer.zero_grad()
        cross_entropy(network(data.x_train[rows]), data.y_train[rows]).backward()
        optimizer.step()


@torch.no_grad()
def _ratio(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(15):
        for network, times in zip((one, other), taken, strict=True):
            start = time.process_time()
            network(x)
            times.append(time.process_time() - start)
    return statistics.median(taken[0]) / statistics.median(taken[1])
