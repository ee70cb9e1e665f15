"""A comparison's results for people: a table, a page with plots, and a picture."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from string import Template
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from netwright.results import Comparison, Row

PALETTE = (("#0b66c3", "#6db3ff"), ("#d1560b", "#ff9d5c"), ("#0a8554", "#4fd39b"),
           ("#a8328f", "#f08bd9"), ("#8a6d00", "#e3c33f"), ("#c22f3d", "#ff8590"),
           ("#5b4bd1", "#a99cff"), ("#0b7f95", "#52cfe3"), ("#6b4a2f", "#d2a983"),
           ("#4d5b6b", "#b3bfcd"))  # each for light and for dark


class Figure(NamedTuple):
    """A column of the report: the row's attribute, its title, how it is written, what it means."""

    key: str
    title: str
    write: Callable[[float], str]
    meaning: str


def bytes_text(size: float) -> str:
    """Return a number of bytes in the unit that suits it.

    >>> bytes_text(1536)
    '1.5 KiB'
    """
    if not math.isfinite(size):
        return "–"
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(max(size, 1), 1024)), len(units) - 1)
    return f"{_digits(size / 1024 ** power)} {units[power]}"


def seconds_text(seconds: float) -> str:
    """Return a time in the unit that suits it.

    >>> seconds_text(0.00125), seconds_text(75)
    ('1.25 ms', '1.25 min')
    """
    if not math.isfinite(seconds):
        return "–"
    for below, factor, unit in ((1e-3, 1e6, "µs"), (1, 1e3, "ms"), (60, 1, "s"),
                                (3600, 1 / 60, "min")):
        if seconds < below:
            return f"{_digits(seconds * factor)} {unit}"
    return f"{_digits(seconds / 3600)} h"


def count_text(count: float) -> str:
    """Return a count with the prefix that suits it.

    >>> count_text(26506), count_text(1.2e9)
    ('26.5 k', '1.2 G')
    """
    if not math.isfinite(count):
        return "–"
    prefixes = ("", "k", "M", "G", "T", "P")
    power = min(int(math.log(max(count, 1), 1000)), len(prefixes) - 1)
    return f"{_digits(count / 1000 ** power)} {prefixes[power]}".rstrip()


FIGURES = (
    Figure("step_time", "Step time", seconds_text,
           "Median time of one training step on one batch, without the optimizer."),
    Figure("train_time", "Training time", seconds_text,
           "Time of one whole training run, mean over the seeds."),
    Figure("peak_bytes", "Peak memory", bytes_text,
           "The most that was alive at any one moment of a step: parameters, buffers, the batch, "
           "gradients and everything that the step made."),
    Figure("saved_bytes", "Saved for backward", bytes_text,
           "The most that waited for a backward pass at any one moment, parameters apart."),
    Figure("parameters", "Parameters", count_text,
           "Numbers in the network and in what the change adds to it."),
    Figure("flops", "FLOPs a step", count_text,
           "Operations of matrix products, convolutions and attention in one step; a "
           "multiplication and an addition are two."),
)


def pareto(points: Iterable[tuple[float, float]], *, higher_is_better: bool = True) -> list[int]:
    """Return which of the (cost, score) points no other point beats, cheapest first.

    A point is beaten by one that costs no more and scores no worse, and is better in one of the
    two. Points that are not finite are never on the front; points that are equal are so together.

    >>> pareto([(1, 0.90), (2, 0.95), (3, 0.94)])
    [0, 1]
    """
    sign = 1 if higher_is_better else -1
    finite = [(cost, -sign * score, i) for i, (cost, score) in enumerate(points)
              if math.isfinite(cost) and math.isfinite(score)]
    front: list[tuple[float, float, int]] = []
    for point in sorted(finite):
        if not front or point[1] < front[-1][1] or point[:2] == front[-1][:2]:
            front.append(point)
    return [i for _, _, i in front]


def table(comparison: Comparison) -> Table:
    """Return the comparison as a table for a terminal, one block a task, the best marked by *.

    Sizes are in powers of 1024. What failed has its reason below the table.

    >>> table(Comparison([Row("digits", "Backprop", scores=[0.95, 0.97])])).row_count
    2
    """
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0,
                  caption_justify="left", caption_style="")
    shown.add_column("Change", overflow="fold")
    for title in ("Score", "Step\ntime", "Train\ntime", "Peak\nmem.", "Bytes\nsaved",
                  "Para-\nmeters", "FLOPs\na step"):
        shown.add_column(title, justify="right", no_wrap=True)
    reasons = Text()
    for task, rows in _by_task(comparison).items():
        if shown.row_count:
            shown.add_section()
        shown.add_row(Text(_plain(task), "bold"), Text(_narrow(_metric_title(rows[0])), "dim"))
        best = _best(rows)
        for row in rows:
            if row.failure:
                shown.add_row(Text(_plain(row.change)), Text("failed", "red"))
                reasons.append(f"{_plain(row.change)} on {_plain(task)} failed: ", "bold")
                reasons.append(f"{_plain(row.failure)}\n")
                continue
            cells = [_cell(_short(_score_text(row)), row.change in best["score"])]
            cells += [_cell(_short(f.write(_value(row, f.key))), row.change in best[f.key])
                      for f in FIGURES]
            shown.add_row(Text(_plain(row.change)), *cells)
    reasons.rstrip()
    shown.caption = reasons or None
    return shown


def html(comparison: Comparison, path: str | Path) -> Path:
    """Write the comparison as one self-contained page with interactive plots; return its path.

    The page needs no network: it holds its scripts and forbids itself every connection. It is
    written to a temporary name beside `path` and then renamed.
    """
    from plotly.offline import get_plotlyjs
    tasks = _by_task(comparison)
    looks = {name: i for i, name in enumerate(dict.fromkeys(r.change for r in comparison.rows))}
    payload = {"palette": PALETTE, "tasks": [_task_data(rows, looks) for rows in tasks.values()]}
    template = Template(files("netwright").joinpath("_report_template.html").read_text("utf-8"))
    import netwright
    page = template.substitute(
        title="What each change costs and gives", summary=_summary(comparison),
        tabs=_tabs(tasks), glossary=_glossary(), settings=_settings(comparison),
        sections="\n".join(_section(i, task, rows, looks)
                           for i, (task, rows) in enumerate(tasks.items())) or _NOTHING,
        version=escape(netwright.__version__), plotly=get_plotlyjs(),
        data=json.dumps(_finite(payload), allow_nan=False).replace("<", "\\u003c"))
    return _write(path, page)


def picture(comparison: Comparison, path: str | Path, task: str | None = None) -> Path:
    """Write accuracy against peak memory and against training time as an SVG; return its path.

    One row of panels a task, or `task` alone. The Pareto front is dotted, its points are ringed.
    Costs, and the errors that an accuracy leaves, are on a log scale where they differ much.

    Raises:
        ValueError: the comparison has no such task, or nothing that could be drawn.
    """
    tasks = _by_task(comparison)
    if task is not None and task not in tasks:
        raise ValueError(f"task must be one of {', '.join(tasks)}, got {task!r}")
    chosen = {name: [r for r in rows if _shown(r)] for name, rows in tasks.items()
              if task in (None, name)}
    chosen = {name: rows for name, rows in chosen.items() if rows}
    if not chosen:
        raise ValueError("comparison has no scores to draw; run it with at least one seed")
    looks = {name: i for i, name in enumerate(dict.fromkeys(r.change for r in comparison.rows))}
    parts, top = [], 0
    for name, rows in chosen.items():
        parts.append(f'<text x="24" y="{top + 30}" class="task">{_xml(name)}</text>')
        for column, key in enumerate(("peak_bytes", "train_time")):
            parts.append(_panel(rows, key, looks, 40 + 470 * column, top + 44))
        top += 420
    drawn = dict.fromkeys(r.change for rows in chosen.values() for r in rows)
    for i, change in enumerate(drawn):
        u, v = 30 + 236 * (i % 4), top + 16 + 22 * (i // 4)
        parts.append(f'<g class="hue{looks[change] % len(PALETTE)}"><circle class="key" r="5.5" '
                     f'cx="{u}" cy="{v}"/></g><text x="{u + 12}" y="{v + 4}">'
                     f"{_xml(_ending(change))}</text>")
    top += 22 * math.ceil(len(drawn) / 4) + 8
    light, dark = ("".join(f".hue{i} *{{fill:{pair[shade]}}}.hue{i} line{{stroke:{pair[shade]}}}"
                           for i, pair in enumerate(PALETTE)) for shade in (0, 1))
    style = ("text{font:13px system-ui,sans-serif;fill:#1b2330}.task{font-weight:600;"
             "font-size:16px}.soft{fill:#5d6879;font-size:12px}.grid{stroke:#e0e4ea}"
             ".front{stroke:#1b2330;fill:none}.lead{stroke:#8a94a3;stroke-width:.8}"
             f".page{{fill:#fff}}{light}"
             "@media(prefers-color-scheme:dark){text{fill:#e7ebf1}.soft{fill:#9aa6b6}"
             f".grid{{stroke:#2d3643}}.front{{stroke:#e7ebf1}}.page{{fill:#0d1117}}{dark}}}")
    return _write(path, f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 {top + 8}" '
                        f'role="img" aria-label="Score against memory and time">'
                        f'<style>{style}</style><rect class="page" width="980" '
                        f'height="{top + 8}"/>{"".join(parts)}</svg>\n')


# What rows say.

def _by_task(comparison: Comparison) -> dict[str, list[Row]]:
    tasks: dict[str, list[Row]] = {}
    for row in comparison.rows:
        tasks.setdefault(row.task, []).append(row)
    return tasks


def _value(row: Row, key: str) -> float:
    """Return a figure of `row`, nan where it was not measured."""
    if key == "score":
        return row.mean
    if key == "train_time":
        return fmean(row.train_time) if row.train_time else math.nan
    value = float(getattr(row, key))
    # A step without FLOPs or saved bytes exists, one without memory or parameters does not.
    measured = value > 0 if key in ("peak_bytes", "parameters", "step_time") else row.peak_bytes > 0
    return value if measured else math.nan


def _shown(row: Row) -> bool:
    return not row.failure and math.isfinite(row.mean)


def _best(rows: Sequence[Row]) -> dict[str, set[str]]:
    """Return which changes are best in each figure; none where they do not differ."""
    best = {}
    for key in ("score", *(f.key for f in FIGURES)):
        values = {r.change: _value(r, key) for r in rows if not r.failure}
        values = {change: v for change, v in values.items() if math.isfinite(v)}
        pick = max if key == "score" and rows[0].higher_is_better else min
        top = pick(values.values(), default=math.nan)
        winners = {change for change, v in values.items() if v == top}
        best[key] = winners if len(winners) < len(values) else set()
    return best


def _spread(row: Row) -> float:
    return row.spread if all(map(math.isfinite, row.scores)) else math.nan


def _is_share(row: Row) -> bool:
    return row.metric.lower().endswith("accuracy")


def _metric_title(row: Row) -> str:
    name = _plain(row.metric) or "score"
    return name[0].upper() + name[1:] + (" (%)" if _is_share(row) else "")


def _score(row: Row, value: float) -> float:
    return 100 * value if _is_share(row) else value


def _score_text(row: Row) -> str:
    if not math.isfinite(row.mean):
        return "–"
    mean, spread = _score(row, row.mean), _score(row, _spread(row))
    places = 1 if _is_share(row) else max(0, 3 - math.floor(math.log10(abs(mean) or 1)) - 1)
    return f"{mean:.{places}f}" + (f" ± {spread:.{places}f}" if len(row.scores) > 1 else "")


def _digits(value: float) -> str:
    """Return three significant digits without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    text = f"{value:.{1 if value >= 10 else 2}f}"
    return text.rstrip("0").rstrip(".")


def _plain(text: str) -> str:
    return " ".join(str(text).split())


def _finite(value: Any) -> Any:
    """Return `value` with null for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value


def _write(path: str | Path, text: str) -> Path:
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _short(text: str) -> str:
    """Return a figure as a column of ten characters can hold it."""
    return text.replace("iB", "").replace(" ", "")[:12]


def _narrow(metric: str) -> str:
    metric = metric.replace("(%)", "%").replace(" per ", "/")
    return metric if len(metric) <= 12 else f"{metric[:11]}…"


def _cell(text: str, best: bool) -> Text:
    return Text(f"*{text}", "bold green") if best else Text(text)


# The page's data.

def _task_data(rows: Sequence[Row], looks: Mapping[str, int]) -> dict[str, Any]:
    figures, scaled = {}, {}
    for key in ("peak_bytes", "saved_bytes", "train_time", "step_time"):
        figure = next(f for f in FIGURES if f.key == key)
        values = [_value(r, key) if _shown(r) else math.nan for r in rows]
        factor, unit = _unit(key, values)
        scaled[key] = [value / factor for value in values]
        positive = [v for v in values if v > 0]
        log = bool(positive) and len(positive) == sum(map(math.isfinite, values)) and (
            max(positive) > 20 * min(positive))
        front = pareto(zip(values, (r.mean for r in rows), strict=True),
                       higher_is_better=rows[0].higher_is_better)
        labels = _spots([(math.log(v) if log else v, _score(r, r.mean)) for v, r in
                         zip(values, rows, strict=True)], [r.change for r in rows],
                        (None if log else 0.0), (480, 270))
        figures[key] = {"title": figure.title, "unit": unit, "front": front, "log": log,
                        "spots": [_SIDES[side] for side in labels],
                        "ticks": _log_axis(min(positive) / 2, max(positive) * 2).ticks if log
                        else None}
    described = [{
        "change": r.change, "name": _label(r.change), "look": looks[r.change],
        "shown": _shown(r), "score": _score(r, r.mean), "spread": _score(r, _spread(r)),
        "scoreText": _label(f"{_metric_title(r)} {_score_text(r)}"),
        **{key: values[i] for key, values in scaled.items()},
        "text": {f.key: f.write(_value(r, f.key)) for f in FIGURES},
        "curve": _curve(r), "alignment": _alignment(r)} for i, r in enumerate(rows)]
    return {"metricTitle": _label(_metric_title(rows[0])), "figures": figures, "rows": described}


def _label(text: str) -> str:
    """Return `text` as Plotly shows it: its end where it is long, without markup or formulas."""
    return escape(_ending(text)).replace("$", "&#36;")


def _ending(text: str) -> str:
    text = _plain(text)
    return text if len(text) <= 32 else "…" + text[-31:]


def _unit(key: str, values: Sequence[float]) -> tuple[float, str]:
    """Return the unit, as a factor and a name, in which the greatest of `values` is readable."""
    top = max((v for v in values if math.isfinite(v)), default=1)
    units: tuple[tuple[float, str], ...] = ((1024 ** 3, "GiB"), (1024 ** 2, "MiB"), (1024, "KiB"),
                                            (1, "B"))
    if key.endswith("time"):
        units = ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"))
    return next(((factor, name) for factor, name in units if top >= factor), units[-1])


def _curve(row: Row) -> dict[str, Any] | None:
    """Return the mean and the band over the seeds that reached each epoch."""
    epochs: dict[int, list[Sequence[float]]] = {}
    for seed in row.curves:
        for epoch, *rest in seed:
            epochs.setdefault(int(epoch), []).append([math.nan if v is None else v for v in rest])
    if not epochs or row.failure:
        return None
    at = sorted(epochs)
    seconds, losses, metrics = ([[values[i] for values in epochs[e]] for e in at]
                                for i in range(3))
    return {"epoch": at, "seconds": [_mean(values) for values in seconds],
            "loss": _band(losses), "metric": _band(
                [[_score(row, v) for v in values] for values in metrics])}


def _band(steps: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    means = [_mean(values) for values in steps]
    spreads = [stdev(finite) if len(finite := [v for v in values if math.isfinite(v)]) > 1 else 0.0
               for values in steps]
    return {"mean": means, "low": [m - s for m, s in zip(means, spreads, strict=True)],
            "high": [m + s for m, s in zip(means, spreads, strict=True)]}


def _mean(values: Iterable[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return fmean(finite) if finite else math.nan


def _alignment(row: Row) -> dict[str, Any] | None:
    if not row.alignment or row.failure:
        return None
    cosines = [math.nan if v is None else v for v in row.alignment.values()]
    return {"stages": [_label(s) for s in row.alignment], "cosines": cosines}


_SIDES = {"right": "middle right", "left": "middle left", "above": "top center",
          "below": "bottom center", "": ""}


def _spots(points: Sequence[tuple[float, float]], names: Sequence[str], low_x: float | None,
           size: tuple[float, float]) -> list[str]:
    """Return on which side of its point each name has room in a plot of `size` pixels, if any."""
    finite = [p for p in points if all(map(math.isfinite, p))]
    if not finite:
        return [""] * len(points)
    xs, ys = zip(*finite, strict=True)
    left = min(xs) if low_x is None else min(low_x, *xs)
    width, height = (max(xs) - left) or 1.0, (max(ys) - min(ys)) or 1.0
    at = [(size[0] * (x - left) / width, size[1] * (max(ys) - y) / height)
          if math.isfinite(x) and math.isfinite(y) else None for x, y in points]
    taken = [(u - 8, v - 8, u + 8, v + 8) for place in at if place for u, v in [place]]
    sides = []
    for place, name in zip(at, names, strict=True):
        side, box = "", None
        if place:
            u, v = place
            long = 6.6 * min(len(_plain(name)), 32)
            boxes = {"right": (u + 9, v - 7, u + 14 + long, v + 7),
                     "left": (u - 14 - long, v - 7, u - 9, v + 7),
                     "above": (u - long / 2, v - 23, u + long / 2, v - 9),
                     "below": (u - long / 2, v + 9, u + long / 2, v + 23)}
            side, box = next(((s, b) for s, b in boxes.items()
                              if b[0] > -10 and b[2] < size[0] + 25
                              and not any(_overlap(b, other) for other in taken)), ("", None))
        if box:
            taken.append(box)
        sides.append(side)
    return sides


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# The page's words.

_NOTHING = '<section class="card"><p>This comparison has no rows yet.</p></section>'


def _summary(comparison: Comparison) -> str:
    changes = len({r.change for r in comparison.rows})
    tasks = len({r.task for r in comparison.rows})
    seeds = max((len(r.scores) for r in comparison.rows), default=0)
    trials = max((r.trials for r in comparison.rows), default=0)
    said = [_many(changes, "change"), _many(tasks, "task"), _many(seeds, "seed") + " each"]
    if trials:
        said.append(_many(trials, "tuning trial") + " each")
    return escape(" · ".join(said))


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _tabs(tasks: Mapping[str, Sequence[Row]]) -> str:
    if len(tasks) < 2:
        return ""
    return "".join(f'<button role="tab" data-task="{i}" aria-selected="{str(i == 0).lower()}">'
                   f"{escape(_plain(task))}</button>" for i, task in enumerate(tasks))


def _section(index: int, task: str, rows: Sequence[Row], looks: Mapping[str, int]) -> str:
    shown = [r for r in rows if not r.failure]
    legend = "".join(
        f'<button data-change="{escape(r.change)}" aria-pressed="true" title="Click to hide, '
        f'double-click to see it alone"><span class="swatch" style="{_colours(r, looks)}"></span>'
        f"{escape(_plain(r.change))}</button>" for r in shown)
    legend += '<button data-all>show all</button>' if len(shown) > 1 else ""
    has = {"memory": any(_shown(r) for r in rows), "time": any(_shown(r) for r in rows),
           "curves": any(_curve(r) for r in rows), "alignment": any(_alignment(r) for r in rows)}
    metric = escape(_metric_title(rows[0]).removesuffix(" (%)"))
    heads = {
        "memory": (f"{metric} against memory", [("memory peak_bytes", "peak"),
                                                ("memory saved_bytes", "saved for backward")]),
        "time": (f"{metric} against time", [("time train_time", "training"),
                                            ("time step_time", "one step")]),
        "curves": ("Learning curves, mean and deviation over seeds",
                   [("curveY metric", metric.lower()), ("curveY loss", "training loss"),
                    ("curveX epoch", "by epoch"), ("curveX seconds", "by time")]),
        "alignment": ("Gradient alignment by stage", [])}
    plots = "".join(_plot(name, title, switches if has[name] else [], has[name])
                    for name, (title, switches) in heads.items())
    findings = "".join(f"<li>{line}</li>" for line in _findings(rows))
    return (f'<section data-task="{index}"><div class="card"><h2>{escape(_plain(task))}</h2>'
            f'<ul class="findings">{findings}</ul></div>'
            f'<div class="card"><div class="scroll">{_html_table(rows, looks)}</div></div>'
            f'<div class="legend" aria-label="Changes">{legend}</div>'
            f'<div class="grid">{plots}</div><br></section>')


def _plot(name: str, title: str, switches: Sequence[tuple[str, str]], has: bool) -> str:
    groups: dict[str, str] = {}
    for choose, label in switches:
        key = choose.split()[0]
        pressed = "false" if key in groups else "true"
        groups[key] = groups.get(key, "") + (f'<button data-choose="{choose} {name}" '
                                             f'aria-pressed="{pressed}">{label}</button>')
    chosen = "".join(f'<span class="switch">{buttons}</span>' for buttons in groups.values())
    body = (f'<div class="plot" data-plot="{name}"></div>' if has
            else '<div class="empty">nothing was measured</div>')
    return (f'<div class="card"><div class="head"><h3>{title}</h3>'
            f'<span class="switches">{chosen}</span></div>{body}</div>')


def _findings(rows: Sequence[Row]) -> list[str]:
    """Say in words what the table shows: the best score, and what the cheapest costs and loses."""
    scored = [r for r in rows if _shown(r)]
    lines = []
    if scored:
        sign = 1 if rows[0].higher_is_better else -1
        top = max(scored, key=lambda r: sign * r.mean)
        metric = escape(_metric_title(top).removesuffix(" (%)").lower())
        unit = " %" if _is_share(top) else ""
        lines.append(f"Best {metric}: <b>{escape(_plain(top.change))}</b>, "
                     f"{_score_text(top)}{unit}.")
        for key, what in (("peak_bytes", "Least memory"), ("train_time", "Shortest training")):
            known = [r for r in scored if math.isfinite(_value(r, key))]
            if len(known) < 2:
                continue
            low = min(known, key=lambda r: _value(r, key))
            figure = next(f for f in FIGURES if f.key == key)
            line = (f"{what}: <b>{escape(_plain(low.change))}</b>, "
                    f"{figure.write(_value(low, key))}")
            if low is not top and math.isfinite(_value(top, key)):
                line += (f" ({_value(low, key) / _value(top, key):.2f} times that of "
                         f"{escape(_plain(top.change))}) at {_score_text(low)}{unit}")
            lines.append(line + ".")
    failed = sum(bool(r.failure) for r in rows)
    if failed:
        lines.append(f"{_many(failed, 'change')} failed; the table says why.")
    return lines or ["No seed has finished yet."]


def _html_table(rows: Sequence[Row], looks: Mapping[str, int]) -> str:
    best, unit = _best(rows), " (%)" if _is_share(rows[0]) else ""
    titles = ["Change", escape(_metric_title(rows[0]).removesuffix(" (%)")) + unit,
              *(f.title for f in FIGURES)]
    head = "".join(f'<th scope="col"><button title="Sort">{title}</button></th>'
                   for title in titles)
    greatest = {f.key: max((v for r in rows if math.isfinite(v := _value(r, f.key))), default=0)
                for f in FIGURES}
    base = next((r for r in rows if r.change.lower() == "backprop" and not r.failure), None)
    body = []
    for row in rows:
        cells = (f'<td data-value="{escape(_plain(row.change).lower())}"><span class="name">'
                 f'<span class="swatch" style="{_colours(row, looks)}"></span>'
                 f"<span>{escape(_plain(row.change))}</span></span></td>")
        if row.failure:
            cells += (f'<td class="failed" colspan="{len(FIGURES) + 1}">'
                      f"failed: {escape(_plain(row.failure))}</td>")
        else:
            cells += _td(row.mean, _score_text(row), row.change in best["score"])
            for f in FIGURES:
                cells += _td(_value(row, f.key), f.write(_value(row, f.key)),
                             row.change in best[f.key],
                             _value(base, f.key) if base else math.nan, greatest[f.key])
        body.append(f"<tr>{cells}</tr>")
    note = (" The small figures are multiples of Backprop's." if base and len(rows) > 1 else "")
    return (f'<table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
            f'<p class="soft">Mean ± deviation over the seeds; the best of a column is green.'
            f"{note}</p>")


def _td(value: float, text: str, best: bool, base: float = math.nan, top: float = 0) -> str:
    known = math.isfinite(value)
    extra = ""
    if known and base > 0:
        extra = f"<small>{_digits(value / base)}×</small>"
    if known and top > 0:
        extra += f'<span class="bar"><i style="width:{100 * value / top:.1f}%"></i></span>'
    return (f'<td data-value="{value if known else ""}"{" class=best" if best else ""}>'
            f"{escape(text)}{extra}</td>")


def _colours(row: Row, looks: Mapping[str, int]) -> str:
    light, dark = PALETTE[looks[row.change] % len(PALETTE)]
    return f"--light:{light};--dark:{dark}"


def _glossary() -> str:
    terms = [("Score", "The task's metric on held-out data, mean and standard deviation over the "
                       "seeds."), *((f.title, f.meaning) for f in FIGURES),
             ("Pareto front", "The changes that no other change beats: nothing that costs as "
                              "little scores as well. Dotted line and rings."),
             ("Gradient alignment", "For each stage, the cosine between the change's update and "
                                    "the exact gradient: 1 is the same direction, 0 an unrelated "
                                    "one. Changes that train none of the network's own "
                                    "parameters have none.")]
    return "<dl>" + "".join(f"<dt>{a}</dt><dd>{b}</dd>" for a, b in terms) + "</dl>"


def _settings(comparison: Comparison) -> str:
    shared = "".join(f"<dt>{escape(_plain(key))}</dt><dd>{escape(_setting(value))}</dd>"
                     for key, value in comparison.settings.items())
    tuned = "".join(
        f"<dt>{escape(_plain(r.change))} on {escape(_plain(r.task))}</dt>"
        f"<dd>{escape(_setting(r.hyperparameters))}</dd>"
        for r in comparison.rows if r.hyperparameters)
    said = f"<dl>{shared}</dl>" if shared else '<p class="soft">None were recorded.</p>'
    if tuned:
        said += f"<br><details><summary>What tuning chose</summary><dl>{tuned}</dl></details>"
    return said


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {_setting(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_setting, value))
    return f"{value:.4g}" if isinstance(value, float) else _plain(str(value))


# The picture.

class _Axis(NamedTuple):
    """Ticks, and where a value stands on the axis, from 0 at its start to 1 at its end."""

    ticks: list[float]
    at: Callable[[float], float]
    log: bool


def _panel(rows: Sequence[Row], key: str, looks: Mapping[str, int], left: float,
           top: float) -> str:
    width, height = 370, 290
    known = [r for r in rows if math.isfinite(_value(r, key))]
    figure = next(f for f in FIGURES if f.key == key)
    factor, unit = _unit(key, [_value(r, key) for r in known])
    costs = [_value(r, key) / factor for r in known]
    across, up = _cost_axis(costs), _score_axis(known)
    left, top = left + 30, top + 14

    def place(x: float, y: float) -> tuple[float, float]:
        return left + width * across.at(x), top + height * (1 - up.at(y))

    title = _metric_title(rows[0]) + (", by the error on a log scale" if up.log else "")
    parts = [f'<text x="{left - 46}" y="{top - 12}" class="soft">{_xml(title)}</text>']
    for y in up.ticks:
        v = top + height * (1 - up.at(y))
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{v:.1f}" '
                     f'y2="{v:.1f}"/><text class="soft" text-anchor="end" x="{left - 6}" '
                     f'y="{v + 4:.1f}">{y:g}</text>')
    for x in across.ticks:
        parts.append(f'<text class="soft" text-anchor="middle" x="{left + width * across.at(x):.1f}'
                     f'" y="{top + height + 18}">{x:g}</text>')
    parts.append(f'<text class="soft" text-anchor="middle" x="{left + width / 2}" '
                 f'y="{top + height + 38}">{figure.title} ({unit}'
                 f'{", log scale" if across.log else ""})</text>')
    places = [place(x, _score(r, r.mean)) for x, r in zip(costs, known, strict=True)]
    line = [places[i] for i in pareto(((x, r.mean) for x, r in zip(costs, known, strict=True)),
                                      higher_is_better=rows[0].higher_is_better)]
    parts.append('<polyline class="front" stroke-dasharray="2 4" points="'
                 + " ".join(f"{u:.1f},{v:.1f}" for u, v in line) + '"/>')
    parts += [f'<circle class="front" r="9" cx="{u:.1f}" cy="{v:.1f}"/>' for u, v in line]
    hues = [f"hue{looks[r.change] % len(PALETTE)}" for r in known]
    names = _callouts(places, [_ending(r.change) for r in known], hues, line,
                      (left, top - 8, left + width + 24, top + height))
    for r, x, (u, v), hue in zip(known, costs, places, hues, strict=True):
        _, low = place(x, _score(r, r.mean - _spread(r)))
        _, high = place(x, _score(r, r.mean + _spread(r)))
        parts.append(f'<g class="{hue}"><line opacity=".6" '
                     f'x1="{u:.1f}" x2="{u:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
                     f'<circle r="5.5" cx="{u:.1f}" cy="{v:.1f}"><title>{_xml(r.change)}</title>'
                     "</circle></g>")
    return "".join(parts + names)


def _cost_axis(costs: Sequence[float]) -> _Axis:
    low, high = min(costs, default=0), max(costs, default=1)
    if low > 0 and high > 4 * low:
        return _log_axis(low / 1.4, high * 1.2)
    ticks = _ticks(0, high)
    return _Axis(ticks, lambda x: x / ticks[-1], False)


def _score_axis(rows: Sequence[Row]) -> _Axis:
    """Return an axis of scores: of accuracies by the log of the error, where errors differ much."""
    errors = [100 - _score(r, r.mean) for r in rows]
    if errors and all(map(_is_share, rows)) and min(errors) > 0 and max(errors) > 4 * min(errors):
        least, most = min(errors) / 1.5, min(100, max(errors) * 1.3)
        by_error = _log_axis(least, most)
        return _Axis([round(100 - e, 8) for e in by_error.ticks],
                     lambda y: 1 - by_error.at(min(max(100 - y, least), most)), True)
    ticks = _ticks(min((_score(r, r.mean - _spread(r)) for r in rows), default=0),
                   max((_score(r, r.mean + _spread(r)) for r in rows), default=1))
    span = (ticks[-1] - ticks[0]) or 1
    return _Axis(ticks, lambda y: (y - ticks[0]) / span, False)


def _log_axis(low: float, high: float) -> _Axis:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first < 4 else (1,)
    marks = [round(m * 10.0 ** k, 10 - k) for k in range(first, last + 1) for m in steps]
    span = math.log(high / low)
    return _Axis([mark for mark in marks if low <= mark <= high],
                 lambda x: math.log(x / low) / span, True)


def _callouts(places: Sequence[tuple[float, float]], names: Sequence[str], hues: Sequence[str],
              line: Sequence[tuple[float, float]], frame: tuple[float, float, float, float],
              ) -> list[str]:
    """Return each point's name as near to it as `frame` and `line` leave room."""
    taken = [(u - 8, v - 8, u + 8, v + 8) for u, v in places]
    for (a, b), (c, d) in pairwise(line):
        along = [(a + (c - a) * i / 24, b + (d - b) * i / 24) for i in range(25)]
        taken += [(u - 1, v - 1, u + 1, v + 1) for u, v in along]
    drawn = []
    for (u, v), name, hue in sorted(zip(places, names, hues, strict=True)):
        long = 7.2 * len(name)
        found = None
        for reach in (13, 24, 34, 46, 60, 76, 94, 114):
            for turn in (0, 1, 11, 2, 10, 3, 9, 6, 4, 8, 5, 7):  # from the right
                du, dv = math.cos(turn * math.pi / 6), math.sin(turn * math.pi / 6)
                x, y = u + reach * du, v + reach * dv
                start = x - (0 if du > 0.1 else long if du < -0.1 else long / 2)
                box = (start - 2, y - 8, start + long + 2, y + 8)
                lead = [(u + f * reach * du, v + f * reach * dv) for f in (0.5, 0.7, 0.9)]
                dots = [(a - 1, b - 1, a + 1, b + 1) for a, b in lead] if reach > 13 else []
                if (frame[0] <= box[0] and box[2] <= frame[2] and frame[1] <= box[1]
                        and box[3] <= frame[3]
                        and not any(_overlap(box, other) for other in taken)
                        and not any(_overlap(dot, other) for dot in dots for other in taken
                                    if not _overlap(other, (u - 8, v - 8, u + 8, v + 8)))):
                    found = (x, y, start, box, dots)
                    break
            if found:
                break
        if found is None:
            continue
        x, y, start, box, dots = found
        taken += [box, *dots]
        if dots:
            drawn.append(f'<line class="lead" x1="{u:.1f}" y1="{v:.1f}" x2="{x:.1f}" '
                         f'y2="{y:.1f}"/>')
        drawn.append(f'<g class="{hue}"><text x="{start:.1f}" y="{y + 4:.1f}">{_xml(name)}</text>'
                     "</g>")
    return drawn


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers, at most seven, from below `low` to above `high`."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next((m for m in (1, 2, 5) if span / (m * step) <= 5), 10)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _xml(text: str) -> str:
    """Return `text` escaped, without the control characters that XML has no place for."""
    return escape("".join(c for c in _plain(text) if c.isprintable()))
