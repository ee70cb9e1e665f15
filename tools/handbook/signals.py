"""Draws the map of the rules: how the teaching signal travels, and what was measured."""

import statistics
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from handbook.measured import rows
from handbook.pages import called, folders, page_of
from handbook.pictures import svg
from netwright.compare.results import Row
from netwright.report import PALETTE

STAGES = 4
INK, SIGNAL = "#333333", PALETTE[1][0]
MARKS = "oDsv"


def families() -> list[str]:
    """Return the families of rules, by name."""
    return folders()["rules"]


def colour(family: str) -> str:
    """Return a family's colour, in light."""
    return PALETTE[families().index(family) % len(PALETTE)][0]


def schemes() -> str:
    """Return an SVG of what goes forwards in each family, and how it is taught, where drawn."""
    figure = Figure(figsize=(9, 6.3), layout="constrained")
    for axes, (group, draw) in zip(figure.subplots(3, 3).flat, _SIGNALS.items(), strict=True):
        family = f"rules/{group}"
        title, what = called(family)
        axes.set(xlim=(-0.75, STAGES + 0.35), ylim=(-1.25, 1.35))
        axes.set_axis_off()
        axes.set_title(f"{title.lower()}: {what.rstrip('.')}", fontsize=8, color=colour(family),
                       fontweight="bold")
        for i in range(STAGES):
            axes.add_patch(FancyBboxPatch((i - 0.22, -0.3), 0.44, 0.6, fc="#f2f2f2", ec=INK,
                                          boxstyle="round,pad=0.02"))
        if group != "denoising":
            axes.text(-0.68, 0, "x", ha="center", va="center", color=INK)
            axes.text(STAGES - 0.2, 0, "y", ha="center", va="center", color=SIGNAL)
            for i in range(-1, STAGES):
                _arrow(axes, (i + (0.4 if i < 0 else 0.25), 0), (i + 0.75, 0), INK)
        draw(axes)
    return svg(figure)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], ink: str = SIGNAL,
           bend: float = 0.0, style: str = "-|>") -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=9, color=ink,
                                   connectionstyle=f"arc3,rad={bend}", linewidth=1.3))


def _exact(axes: Axes) -> None:
    for i in range(STAGES):
        _arrow(axes, (i + 0.95, -0.35), (i + 0.05, -0.35), bend=-0.5)


def _feedback(axes: Axes) -> None:
    for i in range(STAGES):
        _arrow(axes, (STAGES - 0.15, 0.25), (i + 0.05, 0.4), bend=0.3)
    for i in range(STAGES - 1):
        axes.text(i + 0.28, 0.62, "B", fontsize=8, color=SIGNAL)


def _local(axes: Axes) -> None:
    for i in range(STAGES):
        axes.text(i, -1.1, "y", ha="center", color=SIGNAL)
        _arrow(axes, (i, -0.85), (i, -0.36))


def _forward(axes: Axes) -> None:
    axes.text(-0.68, 0.38, "y", ha="center", color=SIGNAL)
    for i in range(-1, STAGES - 1):
        _arrow(axes, (i + (0.42 if i < 0 else 0.05), 0.4), (i + 0.95, 0.4), bend=-0.4)


def _estimators(axes: Axes) -> None:
    axes.text(STAGES - 0.2, -1.05, "one number", ha="right", color=SIGNAL, fontsize=8)
    axes.plot([0, STAGES - 0.1], [-0.75, -0.75], color=SIGNAL, linewidth=1.3)
    _arrow(axes, (STAGES - 0.15, -0.15), (STAGES - 0.15, -0.75), style="-")
    for i in range(STAGES):
        _arrow(axes, (i, -0.75), (i, -0.36))


def _energy(axes: Axes) -> None:
    for i in range(STAGES):
        _arrow(axes, (i + 0.05, -0.4), (i + 0.95, -0.4), bend=0.45, style="<|-|>")


def _hebbian(axes: Axes) -> None:
    for i in range(STAGES):
        _arrow(axes, (i - 0.18, 0.36), (i + 0.18, 0.36), bend=-1.6)


def _denoising(axes: Axes) -> None:
    for i in range(STAGES):
        axes.text(i - 0.12, 0.85, "x", ha="center", color=INK)
        axes.text(i + 0.14, 0.85, "ỹ", ha="center", color=SIGNAL)
        _arrow(axes, (i - 0.1, 0.8), (i - 0.1, 0.36), INK)
        _arrow(axes, (i + 0.1, 0.8), (i + 0.1, 0.36))
        _arrow(axes, (i, -0.36), (i, -0.8))
        axes.text(i, -1.1, "y", ha="center", color=SIGNAL)


def _closed_form(axes: Axes) -> None:
    for i in range(STAGES):
        axes.text(i, -1.0, "min", ha="center", color=SIGNAL, fontsize=8)
        _arrow(axes, (i - 0.42, -0.2), (i - 0.06, -0.72), bend=0.2)
        _arrow(axes, (i + 0.42, -0.2), (i + 0.06, -0.72), bend=-0.2)


_SIGNALS: dict[str, Callable[[Axes], None]] = {
    "exact": _exact, "feedback": _feedback, "local": _local, "forward": _forward,
    "estimators": _estimators, "energy": _energy, "hebbian": _hebbian, "denoising": _denoising,
    "closed_form": _closed_form}


def measured() -> str:
    """Return an SVG of every rule's accuracy and cost: a line for each, a mark for each task."""
    names = sorted({change for _, change in rows()}, key=lambda name: (_family(name), name.lower()))
    marks = dict(zip(dict.fromkeys(task for task, _ in rows()), MARKS, strict=False))
    figure = Figure(figsize=(9, 1.1 + 0.24 * len(names)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    asked: list[tuple[str, Callable[[Row, Row], float]]] = [
        ("accuracy (%)", lambda row, _: 100 * statistics.fmean(row.scores)),
        ("step time, times Backprop's", lambda row, base: row.step_time / base.step_time),
        ("peak memory, times Backprop's", lambda row, base: row.peak_bytes / base.peak_bytes)]
    for axes, (title, value) in zip(panels, asked, strict=True):
        for (task, name), row in rows().items():
            base = rows()[task, "Backprop"]
            axes.plot(value(row, base), names.index(name), marks[task], markersize=5,
                      color=colour(_family(name)), mfc=None if marks[task] == MARKS[0] else "white")
        axes.set_title(title, fontsize=9)
        if title != "accuracy (%)":
            axes.set_xscale("log", base=2)
            axes.axvline(1, color=INK, linewidth=0.8)
            ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)
                     if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    for label, name in zip(panels[0].get_yticklabels(), names, strict=True):
        label.set_color(colour(_family(name)))
    panels[0].invert_yaxis()
    handles = [panels[0].plot([], [], mark, color=INK, mfc=None if marks[task] == MARKS[0] else
                              "white", label=task)[0] for task, mark in marks.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return svg(figure)


def _family(rule: str) -> str:
    return page_of(f"rules.{rule}").uri.rpartition("/")[0]
