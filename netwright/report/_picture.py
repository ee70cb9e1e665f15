"""A comparison as one picture."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

from netwright import checks
from netwright.compare.results import Comparison, Row
from netwright.report._figures import (
    FIGURES,
    PALETTE,
    by_task,
    cost_axis,
    ending,
    is_shown,
    metric_title,
    overlap,
    pareto,
    score_axis,
    score_of,
    spread_of,
    unit_of,
    value_of,
)
from netwright.runtime.written import plain, write_text


@checks.annotated
def picture(comparison: Comparison, path: str | Path, task: str | None = None) -> Path:
    """Write accuracy against peak memory and against training time as an SVG; return its path.

    One row of panels a task, or `task` alone. The Pareto front is dotted, its points are ringed.
    Costs, and the errors that an accuracy leaves, are on a log scale where they differ much.

    Raises:
        ValueError: the comparison has no such task, or nothing that could be drawn.
    """
    tasks = by_task(comparison)
    checks.one_of(tasks, task=task, optional=True)
    chosen = {name: [r for r in rows if is_shown(r)] for name, rows in tasks.items()
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
                     f"{_xml(ending(change))}</text>")
    top += 22 * math.ceil(len(drawn) / 4) + 8
    light, dark = ("".join(f".hue{i} *{{fill:{pair[shade]}}}.hue{i} line{{stroke:{pair[shade]}}}"
                           for i, pair in enumerate(PALETTE)) for shade in (0, 1))
    style = ("text{font:13px system-ui,sans-serif;fill:#1b2330}.task{font-weight:600;"
             "font-size:16px}.soft{fill:#5d6879;font-size:12px}.grid{stroke:#e0e4ea}"
             ".front{stroke:#1b2330;fill:none}.lead{stroke:#8a94a3;stroke-width:.8}"
             f".page{{fill:#fff}}{light}"
             "@media(prefers-color-scheme:dark){text{fill:#e7ebf1}.soft{fill:#9aa6b6}"
             f".grid{{stroke:#2d3643}}.front{{stroke:#e7ebf1}}.page{{fill:#0d1117}}{dark}}}")
    return write_text(path, f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 {top + 8}" '
                        f'role="img" aria-label="Score against memory and time">'
                        f'<style>{style}</style><rect class="page" width="980" '
                        f'height="{top + 8}"/>{"".join(parts)}</svg>\n')


def _panel(rows: Sequence[Row], key: str, looks: Mapping[str, int], left: float,
           top: float) -> str:
    width, height = 370, 290
    known = [r for r in rows if math.isfinite(value_of(r, key))]
    figure = next(f for f in FIGURES if f.key == key)
    factor, unit = unit_of(key, [value_of(r, key) for r in known])
    costs = [value_of(r, key) / factor for r in known]
    across, up = cost_axis(costs), score_axis(known)
    left, top = left + 30, top + 14

    def place(x: float, y: float) -> tuple[float, float]:
        return left + width * across.at(x), top + height * (1 - up.at(y))

    title = metric_title(rows[0]) + (", by the error on a log scale" if up.log else "")
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
    places = [place(x, score_of(r, r.mean)) for x, r in zip(costs, known, strict=True)]
    line = [places[i] for i in pareto(((x, r.mean) for x, r in zip(costs, known, strict=True)),
                                      higher_is_better=rows[0].higher_is_better)]
    parts.append('<polyline class="front" stroke-dasharray="2 4" points="'
                 + " ".join(f"{u:.1f},{v:.1f}" for u, v in line) + '"/>')
    parts += [f'<circle class="front" r="9" cx="{u:.1f}" cy="{v:.1f}"/>' for u, v in line]
    hues = [f"hue{looks[r.change] % len(PALETTE)}" for r in known]
    names = _callouts(places, [ending(r.change) for r in known], hues, line,
                      (left, top - 8, left + width + 24, top + height))
    for r, x, (u, v), hue in zip(known, costs, places, hues, strict=True):
        _, low = place(x, score_of(r, r.mean - spread_of(r)))
        _, high = place(x, score_of(r, r.mean + spread_of(r)))
        parts.append(f'<g class="{hue}"><line opacity=".6" '
                     f'x1="{u:.1f}" x2="{u:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
                     f'<circle r="5.5" cx="{u:.1f}" cy="{v:.1f}"><title>{_xml(r.change)}</title>'
                     "</circle></g>")
    return "".join(parts + names)


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
                        and not any(overlap(box, other) for other in taken)
                        and not any(overlap(dot, other) for dot in dots for other in taken
                                    if not overlap(other, (u - 8, v - 8, u + 8, v + 8)))):
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


def _xml(text: str) -> str:
    """Return `text` escaped, without the control characters that XML has no place for."""
    return escape(plain(text))
