"""Records what the pages of the rules show: every rule on both digits tasks, or those named.

    python tools/record.py [RULE ...]

Runs that `runs/netwright.db` holds already are not made again. A rule that is for other networks
than those of the digits gives a row that says so. Where rules are named, the others stay as they
are recorded, and the step times of the named are told by Backprop's in the same run.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import netwright as nw
from netwright import report
from netwright.catalogue.facets import methods
from netwright.compare.changes import changes
from netwright.compare.compare import CHANGES
from netwright.compare.results import Comparison, Row
from netwright.tasks import task as find_task

DOCS = Path(__file__).resolve().parents[1] / "docs"
TURNS, STEPS = 5, 30


def timed(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with step times taken in turns, which tells more than hours apart."""
    torch.set_num_threads(1)
    rules = {}
    for i, row in enumerate(rows):
        if not row.scores:
            continue
        torch.manual_seed(0)
        task, (change,) = find_task(row.task), changes(row.change)
        rule = change.build(task.network(), task, row.hyperparameters)
        for _ in range(STEPS if rule.updates_weights else 0):  # the rank of a weight may fall
            rule(*task.batch)
        rules[i] = rule, task
    times: dict[int, list[float]] = {i: [] for i in rules}
    for _ in range(TURNS):
        for i, (rule, task) in rules.items():
            times[i].append(nw.measure.cost(rule, task.batch, loss=task.loss).step_time)
    return [replace(row, step_time=statistics.median(times[i])) if i in times else row
            for i, row in enumerate(rows)]


def added(old: Comparison, new: Comparison) -> Comparison:
    """Return `old` with the rows of `new`, its times as multiples of the Backprop of `old`."""
    if old.settings != new.settings:
        raise SystemExit(f"what is recorded has the settings {old.settings}, and this run "
                         f"{new.settings}: record all rules again")
    faster = {task: next(row.step_time for row in old.rows
                         if (row.task, row.change) == (task, "Backprop"))
              / next(row.step_time for row in new.rows
                     if (row.task, row.change) == (task, "Backprop"))
              for task in {row.task for row in new.rows}}
    fresh = [replace(row, step_time=row.step_time * faster[row.task]) for row in new.rows
             if row.change != "Backprop"]
    places = {(row.task, row.change) for row in fresh}
    return Comparison([*[row for row in old.rows if (row.task, row.change) not in places], *fresh],
                      old.settings)


def main() -> None:
    """Run what has not been run, and write what the pages show."""
    named = sys.argv[1:]
    rules = [entry.name.removeprefix("rules.") for entry in methods().values()
             if entry.facets.kind == "rule"]
    found = nw.compare(changes=["Backprop", *named] if named else rules)
    found = Comparison(timed(found.rows), found.settings)
    if named:
        found = added(Comparison.load(DOCS / "comparison.json"), found)
    found.save(DOCS / "comparison.json")
    default = Comparison([row for row in found.rows if row.change in CHANGES], found.settings)
    report.picture(default, DOCS / "comparison.svg")


if __name__ == "__main__":
    main()
