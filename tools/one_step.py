"""Draws one step of three composed learners on a batch of digits, with the numbers of the run.

Run `python tools/one_step.py` to draw it again.
"""

from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from netwright.data import digits
from netwright.formal.learners import cross_entropy_error, learner, squared_error

TARGET = Path(__file__).resolve().parents[1] / "docs/pictures/one-step.svg"
INK, FORWARD, BACK = "#333333", "#4051b5", "#c2410c"


def measured() -> tuple[list[str], list[Tensor], list[Tensor], list[float]]:
    """Return the learners' names, what goes forwards, what comes back, and how far each moves."""
    torch.manual_seed(0)
    rate = 0.1 / 32
    parts = [learner(nn.Sequential(nn.Linear(64, 48), nn.Tanh()), rate=rate),
             learner(nn.Sequential(nn.Linear(48, 32), nn.Tanh()), rate=rate),
             learner(nn.Linear(32, 10), rate=rate, error=cross_entropy_error,
                     request_error=squared_error)]
    split = digits()
    signals, wanted = [split.x_train[:32].flatten(1)], nn.functional.one_hot(
        split.y_train[:32], 10).float()
    for part in parts:
        signals.append(part(signals[-1]))
    requests, moved = [wanted], []
    for part, a in zip(reversed(parts), reversed(signals[:-1]), strict=True):
        after = part.update(part.params, a, requests[0])
        moved.insert(0, float(sum((new - old).square().sum() for new, old in zip(
            tree_leaves(after), tree_leaves(part.params), strict=True))) ** 0.5)
        requests.insert(0, part.request(part.params, a, requests[0]))
    return ["linear 64 → 48, tanh", "linear 48 → 32, tanh", "linear 32 → 10"], signals, \
        requests, moved


def draw() -> Figure:
    """Return the three boxes with what goes in and out of them."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "netwright"})
    names, signals, requests, moved = measured()
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(-0.5, 3.06)
    axes.set_ylim(-0.62, 1.5)
    for i, (name, distance) in enumerate(zip(names, moved, strict=True)):
        axes.add_patch(FancyBboxPatch((i, 0), 0.5, 0.9, boxstyle="round,pad=0.02",
                                      facecolor="#f1f3fb", edgecolor=FORWARD))
        axes.text(i + 0.25, 0.45, name.replace(", ", "\n").replace("linear ", "linear\n"),
                  ha="center", va="center", fontsize=9, color=INK)
        axes.text(i + 0.25, 1.16, f"p moves by {distance:.4f}", ha="center", fontsize=9, color=INK)
    for i, (a, request) in enumerate(zip(signals, requests, strict=True)):
        left, right = i - 0.44, i - 0.05
        last = i == len(names)
        _arrow(axes, left, right, 0.68, FORWARD, f"{'b' if last else 'a'}: 32 × {a.shape[1]}")
        shift = (request - a).square().mean().sqrt()
        _arrow(axes, right, left, 0.22, BACK,
               "wanted: the label" if last else f"request: {shift:.1e} off a", below=True)
    axes.text(1.27, -0.55, "forwards: implement      back: what each would rather have had, as the "
              "wanted output of the one before", ha="center", fontsize=9, color=INK)
    return figure


def _arrow(axes: Axes, start: float, stop: float, height: float, colour: str, text: str,
           below: bool = False) -> None:
    axes.annotate("", (stop, height), (start, height),
                  arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.6})
    axes.text((start + stop) / 2, height + (-0.1 if below else 0.07),
              text.replace(": ", ":\n") if below else text, ha="center",
              va="top" if below else "bottom", fontsize=8, color=colour)


if __name__ == "__main__":
    draw().savefig(TARGET, facecolor="white", metadata={"Date": None})
