"""Draws what was measured, from the committed results of the evidence."""

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from netwright.report import PALETTE

matplotlib.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "netwright", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.prop_cycle": cycler(color=[pair[0] for pair in PALETTE]),
})
MOST_BARS = 24


def draw(result: Mapping[str, Any]) -> str:
    """Return an SVG of an evidence result: its curves over the seeds, else its figures as bars."""
    return _curves(result) if result["curves"] else _bars(result)


def _curves(result: Mapping[str, Any]) -> str:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, curve in result["curves"].items():
        lines = [line for line in curve["y"] if line]
        length = min(map(len, lines))
        x = curve["x"][:length]
        columns = list(zip(*(line[:length] for line in lines), strict=True))
        (drawn,) = axes.plot(x, [sum(column) / len(column) for column in columns], label=label,
                             marker="o" if length < 15 else None, markersize=4)
        axes.fill_between(x, [min(column) for column in columns],
                          [max(column) for column in columns], alpha=0.18,
                          color=drawn.get_color(), linewidth=0)
    axes.set_xlabel(result["axes"][0])
    axes.set_ylabel(result["axes"][1])
    _scale(axes, [x for curve in result["curves"].values() for x in curve["x"]])
    if len(result["curves"]) > 3:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3,
                      frameon=False, fontsize=8)
    else:
        axes.legend(frameon=False, fontsize=8, loc="best")
    return _svg(figure)


def _scale(axes: Axes, places: Sequence[float]) -> None:
    """Mark whole numbers where all places are, and powers where they go over decades."""
    steps = [b / a for a, b in pairwise(sorted(set(places))) if a > 0]
    if min(places) > 0 and max(places) > 100 * min(places) and min(steps) > 1.5:
        axes.set_xscale("log")
    elif all(float(x).is_integer() for x in places):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _bars(result: Mapping[str, Any]) -> str:
    summary = list(result["summary"].items())[:MOST_BARS]
    figure = Figure(figsize=(7, 0.6 + 0.32 * len(summary)), layout="constrained")
    axes = figure.subplots()
    axes.barh([name for name, _ in summary], [spread["mean"] for _, spread in summary],
              xerr=[spread["deviation"] for _, spread in summary], color="#4051b5")
    axes.invert_yaxis()
    return _svg(figure)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None})
    return text.getvalue()
