"""A comparison as a table for the terminal."""

from rich import box
from rich.table import Table
from rich.text import Text

from netwright import checks
from netwright.compare.results import Comparison
from netwright.report._figures import (
    FIGURES,
    best_of,
    by_task,
    metric_title,
    score_text,
    value_of,
)
from netwright.runtime.written import plain


@checks.annotated
def table(comparison: Comparison) -> Table:
    """Return the comparison as a table for a terminal, one block a task, the best marked by *.

    Sizes are in powers of 1024. What failed has its reason below the table.

    >>> from netwright.compare.results import Row
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
    for task, rows in by_task(comparison).items():
        if shown.row_count:
            shown.add_section()
        shown.add_row(Text(plain(task), "bold"), Text(_narrow(metric_title(rows[0])), "dim"))
        best = best_of(rows)
        for row in rows:
            if row.failure:
                shown.add_row(Text(plain(row.change)), Text("failed", "red"))
                reasons.append(f"{plain(row.change)} on {plain(task)} failed: ", "bold")
                reasons.append(f"{plain(row.failure)}\n")
                continue
            cells = [_cell(_short(score_text(row)), row.change in best["score"])]
            cells += [_cell(_short(f.write(value_of(row, f.key))), row.change in best[f.key])
                      for f in FIGURES]
            shown.add_row(Text(plain(row.change)), *cells)
    reasons.rstrip()
    shown.caption = reasons or None
    return shown


def _short(text: str) -> str:
    """Return a figure as a column of ten characters can hold it."""
    return text.replace("iB", "").replace(" ", "")[:12]


def _narrow(metric: str) -> str:
    metric = metric.replace("(%)", "%").replace(" per ", "/")
    return metric if len(metric) <= 12 else f"{metric[:11]}…"


def _cell(text: str, best: bool) -> Text:
    return Text(f"*{text}", "bold green") if best else Text(text)
