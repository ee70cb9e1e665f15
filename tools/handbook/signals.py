"""Draws the map of the rules: how the teaching signal travels, and what was measured."""

import statistics
from collections.abc import Callable, Iterable

from _pictures import _svg
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from netwright import rules
from netwright.compare.results import Comparison, Row
from netwright.report import PALETTE

STAGES = 4
# Each group, in the order of the page, and what its picture says.
GROUPS = {
    "exact": "exact: back through every stage",
    "feedback": "feedback: from the error, by other weights",
    "local": "local: every stage has a loss of its own",
    "forward": "forward: in the input, or along a direction",
    "estimators": "estimators: one number for the whole network",
    "energy": "energy: neighbours answer one another",
    "hebbian": "hebbian: from what a stage sees itself",
    "denoising": "denoising: each block mends a noisy label",
    "closed_form": "closed form: each stage is solved for",
}
INK, SIGNAL = "#333333", PALETTE[1][0]
TASKS = {"digits-mlp": "o", "digits-cnn": "D"}


def colour(group: str) -> str:
    """Return a group's colour, in light."""
    return PALETTE[list(GROUPS).index(group) % len(PALETTE)][0]


def schemes() -> str:
    """Return an SVG with a drawing for each group: what goes forwards, and how it is taught."""
    figure = Figure(figsize=(9, 6.3), layout="constrained")
    for axes, (group, title) in zip(figure.subplots(3, 3).flat, GROUPS.items(), strict=True):
        axes.set(xlim=(-0.75, STAGES + 0.35), ylim=(-1.25, 1.35))
        axes.set_axis_off()
        axes.set_title(title, fontsize=8, color=colour(group), fontweight="bold")
        for i in range(STAGES):
            axes.add_patch(FancyBboxPatch((i - 0.22, -0.3), 0.44, 0.6, fc="#f2f2f2", ec=INK,
                                          boxstyle="round,pad=0.02"))
        if group != "denoising":
            axes.text(-0.68, 0, "x", ha="center", va="center", color=INK)
            axes.text(STAGES - 0.2, 0, "y", ha="center", va="center", color=SIGNAL)
            for i in range(-1, STAGES):
                _arrow(axes, (i + (0.4 if i < 0 else 0.25), 0), (i + 0.75, 0), INK)
        _SIGNALS[group](axes)
    return _svg(figure)


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


def group_of(rule: str) -> str:
    """Return the group that a rule belongs to."""
    return getattr(rules, rule).__module__.split(".")[2]


def ordered(names: Iterable[str]) -> list[str]:
    """Return rules by group, in the order of the map, and by name."""
    return sorted(names, key=lambda name: (list(GROUPS).index(group_of(name)), name.lower()))


def measured(found: Comparison) -> str:
    """Return an SVG of every rule's accuracy and cost: a line for each, a mark for each task."""
    rows = {(row.task, row.change): row for row in found.rows if row.scores}
    names = ordered({change for _, change in rows})
    figure = Figure(figsize=(9, 1.1 + 0.24 * len(names)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    asked: list[tuple[str, Callable[[Row, Row], float]]] = [
        ("accuracy (%)", lambda row, _: 100 * statistics.fmean(row.scores)),
        ("step time, times Backprop's", lambda row, base: row.step_time / base.step_time),
        ("peak memory, times Backprop's", lambda row, base: row.peak_bytes / base.peak_bytes)]
    for axes, (title, value) in zip(panels, asked, strict=True):
        for (task, name), row in rows.items():
            base = rows[task, "Backprop"]
            axes.plot(value(row, base), names.index(name), TASKS[task], markersize=5,
                      color=colour(group_of(name)), mfc=None if task == "digits-mlp" else "white")
        axes.set_title(title, fontsize=9)
        if title != "accuracy (%)":
            axes.set_xscale("log", base=2)
            axes.axvline(1, color=INK, linewidth=0.8)
            ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)
                     if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    for label, name in zip(panels[0].get_yticklabels(), names, strict=True):
        label.set_color(colour(group_of(name)))
    panels[0].invert_yaxis()
    handles = [panels[0].plot([], [], mark, color=INK, mfc=None if task == "digits-mlp" else
                              "white", label=task)[0] for task, mark in TASKS.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return _svg(figure)
