"""A comparison as a page that needs no network."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from netwright import checks
from netwright.compare.results import Comparison, Row
from netwright.compare.steps import text_of
from netwright.report._figures import (
    FIGURES,
    PALETTE,
    best_of,
    by_task,
    ending,
    is_share,
    is_shown,
    log_axis,
    metric_title,
    overlap,
    pareto,
    score_of,
    score_text,
    spread_of,
    unit_of,
    value_of,
)
from netwright.report._writing import write_page
from netwright.runtime.units import digits_of
from netwright.runtime.written import plain


@checks.annotated
def html(comparison: Comparison, path: str | Path) -> Path:
    """Write the comparison as one self-contained page with interactive plots; return its path.

    The page needs no network: it holds its scripts and forbids itself every connection. It is
    written to a temporary name beside `path` and then renamed.
    """
    tasks = by_task(comparison)
    looks = {name: i for i, name in enumerate(dict.fromkeys(r.change for r in comparison.rows))}
    payload = {"palette": PALETTE, "tasks": [_task_data(rows, looks) for rows in tasks.values()]}
    return write_page(
        path, "_page.html", payload,
        title="What each change costs and gives", summary=_summary(comparison),
        tabs=_tabs(tasks), glossary=_glossary(), settings=_settings(comparison),
        sections="\n".join(_section(i, task, rows, looks)
                           for i, (task, rows) in enumerate(tasks.items())) or _NOTHING)


def _task_data(rows: Sequence[Row], looks: Mapping[str, int]) -> dict[str, Any]:
    figures, scaled = {}, {}
    for key in ("peak_bytes", "saved_bytes", "train_time", "step_time"):
        figure = next(f for f in FIGURES if f.key == key)
        values = [value_of(r, key) if is_shown(r) else math.nan for r in rows]
        factor, unit = unit_of(key, values)
        scaled[key] = [value / factor for value in values]
        positive = [v for v in values if v > 0]
        log = bool(positive) and len(positive) == sum(map(math.isfinite, values)) and (
            max(positive) > 20 * min(positive))
        front = pareto(zip(values, (r.mean for r in rows), strict=True),
                       higher_is_better=rows[0].higher_is_better)
        labels = _spots([(math.log(v) if log else v, score_of(r, r.mean)) for v, r in
                         zip(values, rows, strict=True)], [r.change for r in rows],
                        (None if log else 0.0), (480, 270))
        figures[key] = {"title": figure.title, "unit": unit, "front": front, "log": log,
                        "spots": [_SIDES[side] for side in labels],
                        "ticks": log_axis(min(positive) / 2, max(positive) * 2).ticks if log
                        else None}
    described = [{
        "change": r.change, "name": _label(r.change), "look": looks[r.change],
        "shown": is_shown(r), "score": score_of(r, r.mean), "spread": score_of(r, spread_of(r)),
        "scoreText": _label(f"{metric_title(r)} {score_text(r)}"),
        **{key: values[i] for key, values in scaled.items()},
        "text": {f.key: f.write(value_of(r, f.key)) for f in FIGURES},
        "curve": _curve(r), "alignment": _alignment(r)} for i, r in enumerate(rows)]
    return {"metricTitle": _label(metric_title(rows[0])), "figures": figures, "rows": described}


def _label(text: str) -> str:
    """Return `text` as Plotly shows it: its end where it is long, without markup or formulas."""
    return escape(ending(text)).replace("$", "&#36;")


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
                [[score_of(row, v) for v in values] for values in metrics])}


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
            long = 6.6 * min(len(plain(name)), 32)
            boxes = {"right": (u + 9, v - 7, u + 14 + long, v + 7),
                     "left": (u - 14 - long, v - 7, u - 9, v + 7),
                     "above": (u - long / 2, v - 23, u + long / 2, v - 9),
                     "below": (u - long / 2, v + 9, u + long / 2, v + 23)}
            side, box = next(((s, b) for s, b in boxes.items()
                              if b[0] > -10 and b[2] < size[0] + 25
                              and not any(overlap(b, other) for other in taken)), ("", None))
        if box:
            taken.append(box)
        sides.append(side)
    return sides

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
                   f"{escape(plain(task))}</button>" for i, task in enumerate(tasks))


def _section(index: int, task: str, rows: Sequence[Row], looks: Mapping[str, int]) -> str:
    shown = [r for r in rows if not r.failure]
    legend = "".join(
        f'<button data-change="{escape(r.change)}" aria-pressed="true" title="Click to hide, '
        f'double-click to see it alone"><span class="swatch" style="{_colours(r, looks)}"></span>'
        f"{escape(plain(r.change))}</button>" for r in shown)
    legend += '<button data-all>show all</button>' if len(shown) > 1 else ""
    has = {"memory": any(is_shown(r) for r in rows), "time": any(is_shown(r) for r in rows),
           "curves": any(_curve(r) for r in rows), "alignment": any(_alignment(r) for r in rows)}
    metric = escape(metric_title(rows[0]).removesuffix(" (%)"))
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
    return (f'<section data-task="{index}"><div class="card"><h2>{escape(plain(task))}</h2>'
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
    scored = [r for r in rows if is_shown(r)]
    lines = []
    if scored:
        sign = 1 if rows[0].higher_is_better else -1
        top = max(scored, key=lambda r: sign * r.mean)
        metric = escape(metric_title(top).removesuffix(" (%)").lower())
        unit = " %" if is_share(top) else ""
        lines.append(f"Best {metric}: <b>{escape(plain(top.change))}</b>, "
                     f"{score_text(top)}{unit}.")
        for key, what in (("peak_bytes", "Least memory"), ("train_time", "Shortest training")):
            known = [r for r in scored if math.isfinite(value_of(r, key))]
            if len(known) < 2:
                continue
            low = min(known, key=lambda r: value_of(r, key))
            figure = next(f for f in FIGURES if f.key == key)
            line = (f"{what}: <b>{escape(plain(low.change))}</b>, "
                    f"{figure.write(value_of(low, key))}")
            if low is not top and math.isfinite(value_of(top, key)):
                line += (f" ({value_of(low, key) / value_of(top, key):.2f} times that of "
                         f"{escape(plain(top.change))}) at {score_text(low)}{unit}")
            lines.append(line + ".")
    failed = sum(bool(r.failure) for r in rows)
    if failed:
        lines.append(f"{_many(failed, 'change')} failed; the table says why.")
    return lines or ["No seed has finished yet."]


def _html_table(rows: Sequence[Row], looks: Mapping[str, int]) -> str:
    best, unit = best_of(rows), " (%)" if is_share(rows[0]) else ""
    titles = ["Change", escape(metric_title(rows[0]).removesuffix(" (%)")) + unit,
              *(f.title for f in FIGURES)]
    head = "".join(f'<th scope="col"><button title="Sort">{title}</button></th>'
                   for title in titles)
    greatest = {f.key: max((v for r in rows if math.isfinite(v := value_of(r, f.key))), default=0)
                for f in FIGURES}
    base = next((r for r in rows if r.change.lower() == "backprop" and not r.failure), None)
    body = []
    for row in rows:
        cells = (f'<td data-value="{escape(plain(row.change).lower())}"><span class="name">'
                 f'<span class="swatch" style="{_colours(row, looks)}"></span>'
                 f"<span>{escape(plain(row.change))}</span></span></td>")
        if row.failure:
            cells += (f'<td class="failed" colspan="{len(FIGURES) + 1}">'
                      f"failed: {escape(plain(row.failure))}</td>")
        else:
            cells += _td(row.mean, score_text(row), row.change in best["score"])
            for f in FIGURES:
                cells += _td(value_of(row, f.key), f.write(value_of(row, f.key)),
                             row.change in best[f.key],
                             value_of(base, f.key) if base else math.nan, greatest[f.key])
        body.append(f"<tr>{cells}</tr>")
    note = (" The small figures are multiples of Backprop's." if base and len(rows) > 1 else "")
    return (f'<table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
            f'<p class="soft">Mean ± deviation over the seeds; the best of a column is green.'
            f"{note}</p>")


def _td(value: float, text: str, best: bool, base: float = math.nan, top: float = 0) -> str:
    known = math.isfinite(value)
    extra = ""
    if known and base > 0:
        extra = f"<small>{digits_of(value / base)}×</small>"
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
    shared = "".join(f"<dt>{escape(plain(key))}</dt><dd>{escape(_setting(value))}</dd>"
                     for key, value in comparison.settings.items())
    tuned = "".join(
        f"<dt>{escape(plain(r.change))} on {escape(plain(r.task))}</dt>"
        f"<dd>{escape(_setting(r.hyperparameters))}</dd>"
        for r in comparison.rows if r.hyperparameters)
    texts = {r.change: text_of(r.recipe) for r in comparison.rows if r.recipe}
    recipes = "".join(f"<dt>{escape(plain(label))}</dt><dd>{escape(plain(text))}</dd>"
                      for label, text in texts.items() if text != label)
    said = f"<dl>{shared}</dl>" if shared else '<p class="soft">None were recorded.</p>'
    if recipes:
        said += f"<br><details open><summary>What the changes are</summary><dl>{recipes}</dl>" \
                "</details>"
    if tuned:
        said += f"<br><details><summary>What tuning chose</summary><dl>{tuned}</dl></details>"
    return said


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {_setting(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_setting, value))
    return f"{value:.4g}" if isinstance(value, float) else plain(str(value))
