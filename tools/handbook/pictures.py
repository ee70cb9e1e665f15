"""Draws what was measured, from the committed results of the evidence."""

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from netwright.report import PALETTE

matplotlib.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "netwright", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
})
MOST_BARS = 24
KEPT = Path(__file__).resolve().parents[2] / "build/pictures"


def drawn(result: Mapping[str, Any]) -> str:
    """Return what `draw` makes of a result, from the last build where that drew the same.

    Drawing takes half of a first build.
    """
    shown = [result.get(part) for part in ("curves", "axes", "summary")]
    said = json.dumps([shown, Path(__file__).read_text("utf-8"), matplotlib.__version__])
    kept = KEPT / f"{sha256(said.encode()).hexdigest()[:32]}.svg"
    if not kept.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        unfinished.write_text(draw(result), "utf-8")
        os.replace(unfinished, kept)
    return kept.read_text("utf-8")


def draw(result: Mapping[str, Any]) -> str:
    """Return an SVG of an evidence result: its curves over the seeds, else its figures as bars."""
    return _curves(result) if result["curves"] else _bars(result)


def _curves(result: Mapping[str, Any]) -> str:
    """Draw a panel for each part before the first colon or comma where all labels have one."""
    panels: dict[str, dict[str, Any]] = {}
    parts = {label: re.split(r"[:,] ", label, maxsplit=1) for label in result["curves"]}
    shared = {len(part) for part in parts.values()} == {2}
    for label, curve in result["curves"].items():
        title, name = parts[label] if shared else ("", label)
        panels.setdefault(title, {})[name] = curve
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    figure = Figure(figsize=(8, 4 if len(panels) == 1 else 3.6), layout="constrained")
    columns = figure.subplots(1, len(panels), squeeze=False)[0]
    lines = {}
    for axes, (title, curves) in zip(columns, panels.items(), strict=True):
        for name, curve in curves.items():
            lines[name] = _line(axes, curve, PALETTE[names.index(name) % len(PALETTE)][0])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(result["axes"][0])
        _scale(axes, [x for curve in curves.values() for x in curve["x"]])
    columns[0].set_ylabel("\n".join(wrap(result["axes"][1], 34)))
    if len(panels) > 1 or len(names) > 3:
        figure.legend(list(lines.values()), list(lines), loc="outside upper center",
                      ncols=min(len(names), 4 if sum(map(len, names)) < 90 else 2),
                      frameon=False, fontsize=9)
    else:
        columns[0].legend(list(lines.values()), list(lines), frameon=False, fontsize=9)
    return svg(figure)


def _line(axes: Axes, curve: Mapping[str, Any], colour: str) -> Line2D:
    """Draw the mean over the seeds, with a band from the least to the greatest; return the line."""
    seeds = [seed for seed in curve["y"] if seed]
    length = min(map(len, seeds))
    x = curve["x"][:length]
    columns = list(zip(*(seed[:length] for seed in seeds), strict=True))
    axes.fill_between(x, [min(column) for column in columns], [max(column) for column in columns],
                      alpha=0.18, color=colour, linewidth=0)
    return axes.plot(x, [sum(column) / len(column) for column in columns], color=colour,
                     marker="o" if length < 15 else None, markersize=4)[0]


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
    return svg(figure)


def svg(figure: Figure) -> str:
    """Return a figure as the text of an SVG that is the same in every build."""
    text = io.StringIO()
    figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None})
    return text.getvalue()
