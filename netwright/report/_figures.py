"""What a comparison says: figures, the best ones, and axes for page and picture."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from netwright.compare.results import Comparison, Row
from netwright.runtime.units import bytes_text, count_text, seconds_text
from netwright.runtime.written import plain

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


def by_task(comparison: Comparison) -> dict[str, list[Row]]:
    tasks: dict[str, list[Row]] = {}
    for row in comparison.rows:
        tasks.setdefault(row.task, []).append(row)
    return tasks


def value_of(row: Row, key: str) -> float:
    """Return a figure of `row`, nan where it was not measured."""
    if key == "score":
        return row.mean
    if key == "train_time":
        return fmean(row.train_time) if row.train_time else math.nan
    value = float(getattr(row, key))
    # A step without FLOPs or saved bytes exists, one without memory or parameters does not.
    measured = value > 0 if key in ("peak_bytes", "parameters", "step_time") else row.peak_bytes > 0
    return value if measured else math.nan


def is_shown(row: Row) -> bool:
    return not row.failure and math.isfinite(row.mean)


def best_of(rows: Sequence[Row]) -> dict[str, set[str]]:
    """Return which changes are best in each figure; none where they do not differ."""
    best = {}
    for key in ("score", *(f.key for f in FIGURES)):
        values = {r.change: value_of(r, key) for r in rows if not r.failure}
        values = {change: v for change, v in values.items() if math.isfinite(v)}
        pick = max if key == "score" and rows[0].higher_is_better else min
        top = pick(values.values(), default=math.nan)
        winners = {change for change, v in values.items() if v == top}
        best[key] = winners if len(winners) < len(values) else set()
    return best


def spread_of(row: Row) -> float:
    return row.spread if all(map(math.isfinite, row.scores)) else math.nan


def is_share(row: Row) -> bool:
    return row.metric.lower().endswith("accuracy")


def metric_title(row: Row) -> str:
    name = plain(row.metric) or "score"
    return name[0].upper() + name[1:] + (" (%)" if is_share(row) else "")


def score_of(row: Row, value: float) -> float:
    return 100 * value if is_share(row) else value


def score_text(row: Row) -> str:
    if not math.isfinite(row.mean):
        return "–"
    mean, spread = score_of(row, row.mean), score_of(row, spread_of(row))
    places = 1 if is_share(row) else max(0, 3 - math.floor(math.log10(abs(mean) or 1)) - 1)
    return f"{mean:.{places}f}" + (f" ± {spread:.{places}f}" if len(row.scores) > 1 else "")


def without_nan(value: Any) -> Any:
    """Return `value` with null for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(part) for key, part in value.items()}
    return [without_nan(part) for part in value] if isinstance(value, (list, tuple)) else value


def ending(text: str) -> str:
    text = plain(text)
    return text if len(text) <= 32 else "…" + text[-31:]


def unit_of(key: str, values: Sequence[float]) -> tuple[float, str]:
    """Return the unit, as a factor and a name, in which the greatest of `values` is readable."""
    top = max((v for v in values if math.isfinite(v)), default=1)
    units: tuple[tuple[float, str], ...] = ((1024 ** 3, "GiB"), (1024 ** 2, "MiB"), (1024, "KiB"),
                                            (1, "B"))
    if key.endswith("time"):
        units = ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"))
    return next(((factor, name) for factor, name in units if top >= factor), units[-1])


def overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


class _Axis(NamedTuple):
    """Ticks, and where a value stands on the axis, from 0 at its start to 1 at its end."""

    ticks: list[float]
    at: Callable[[float], float]
    log: bool


def cost_axis(costs: Sequence[float]) -> _Axis:
    low, high = min(costs, default=0), max(costs, default=1)
    if low > 0 and high > 4 * low:
        return log_axis(low / 1.4, high * 1.2)
    ticks = _ticks(0, high)
    return _Axis(ticks, lambda x: x / ticks[-1], False)


def score_axis(rows: Sequence[Row]) -> _Axis:
    """Return an axis of scores: of accuracies by the log of the error, where errors differ much."""
    errors = [100 - score_of(r, r.mean) for r in rows]
    if errors and all(map(is_share, rows)) and min(errors) > 0 and max(errors) > 4 * min(errors):
        least, most = min(errors) / 1.5, min(100, max(errors) * 1.3)
        by_error = log_axis(least, most)
        return _Axis([round(100 - e, 8) for e in by_error.ticks],
                     lambda y: 1 - by_error.at(min(max(100 - y, least), most)), True)
    ticks = _ticks(min((score_of(r, r.mean - spread_of(r)) for r in rows), default=0),
                   max((score_of(r, r.mean + spread_of(r)) for r in rows), default=1))
    span = (ticks[-1] - ticks[0]) or 1
    return _Axis(ticks, lambda y: (y - ticks[0]) / span, False)


def log_axis(low: float, high: float) -> _Axis:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first < 4 else (1,)
    marks = [round(m * 10.0 ** k, 10 - k) for k in range(first, last + 1) for m in steps]
    span = math.log(high / low)
    return _Axis([mark for mark in marks if low <= mark <= high],
                 lambda x: math.log(x / low) / span, True)


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers, at most seven, from below `low` to above `high`."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next((m for m in (1, 2, 5) if span / (m * step) <= 5), 10)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]
