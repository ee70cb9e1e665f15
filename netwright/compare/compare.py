"""The main job: changes, seeds and a tuning budget on one or more tasks, measured alike."""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch

from netwright import checks
from netwright.compare.cells import Plan, best_of, cells_of, done, final_key, trial_key
from netwright.compare.changes import Change
from netwright.compare.changes import changes as read
from netwright.compare.display import Display
from netwright.compare.results import Comparison, Row
from netwright.compare.trials import Ledger, patient, storage_at
from netwright.compare.urls import url_of, without_password
from netwright.compare.workers import elsewhere, here, payload_of, why_not
from netwright.errors import UnreachableStorage
from netwright.runtime.fingerprint import fingerprint
from netwright.tasks import Task, load_tasks
from netwright.tasks import task as built_in
from netwright.tasks.ready import check_ready

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

__all__ = ["compare", "recorded"]

TASKS = ("digits-mlp", "digits-cnn")
CHANGES = ("Backprop", "FeedbackAlignment", "DirectFeedbackAlignment", "ForwardForward",
           "MonoForward", "ForwardGradient", "NoProp", "PredictiveCoding")
STORAGE = Path("runs/netwright.db")


@checks.annotated
def compare(task: Any = None, changes: Any = None, *, seeds: int | Sequence[int] = 3,
            trials: int = 4, epochs: int | None = None,
            storage: "str | Path | BaseStorage | None" = None, workers: int | None = None,
            device: str = "cpu", progress: bool = True) -> Comparison:
    """Train a task's network under each change; report what each gives and what it costs.

    Every change gets the same number of tuning `trials` on the task's validation samples, scored
    after the last epoch, then trains with its best settings once for each of the same `seeds`
    and is scored on the test samples. What is recorded in `storage` under the same settings and
    the same code is not run again, so an interrupted comparison goes on where it stopped, and
    machines that start the same comparison on one storage share its runs.

    Before anything is trained each change is built once and makes one step. One that cannot run
    on a task gives a row with its `failure`; the others go on.

    Args:
        task: a `Task`, the name of a built-in one, the path of a file that defines some, or a list
            of those; two on digits by default.
        changes: a list, or a mapping of label to change, each what `nw.recipe` reads; eight rules
            by default.
        seeds: how many final runs each change has, or the seeds themselves.
        trials: tuning runs of each change.
        epochs: of each run; the task's own by default.
        storage: an SQLite file, or any Optuna storage URL; runs/netwright.db by default.
        workers: processes on this machine; by default one a core, at most four.
        device: where to train.
        progress: whether a table shows how far it is.

    Raises:
        UnknownName: a task or a change has a name that is not known.
        BadTaskFile: a task's file raises or defines no task.
        MissingData: the data of a task is not where it was looked for.
        UnreachableStorage: the storage cannot be opened, or goes away.
        ValueError: an argument is not what it must be, or a task's network does not run.

    >>> import netwright as nw
    >>> from optuna.storages import InMemoryStorage
    >>> found = nw.compare("digits-mlp", ["Backprop"], seeds=1, trials=1, epochs=3,
    ...                    storage=InMemoryStorage(), progress=False)
    >>> found.rows[0].change, found.rows[0].mean > 0.8
    ('Backprop', True)
    """
    checks.count(1, optional=True, workers=workers)
    if isinstance(storage, (str, Path)):
        url_of(storage)
    chosen = tasks(list(TASKS) if task is None else task)
    wanted = read(list(CHANGES) if changes is None else changes)
    plan = _plan(chosen, wanted, seeds=seeds, trials=trials, epochs=epochs, device=device)
    for entry in plan.tasks:
        check_ready(entry)
    asked = workers is not None or isinstance(storage, (str, Path, NoneType))
    workers = min(os.cpu_count() or 1, 4) if workers is None else workers
    if storage is None:
        STORAGE.parent.mkdir(parents=True, exist_ok=True)
        storage = STORAGE
    with storage_at(storage) as opened, Display(progress) as display:
        cells = cells_of(plan, opened)
        if not all(cell.look().finished for cell in cells):
            url = storage if isinstance(storage, (str, Path)) else None
            forgiven = [cell.forgiven for cell in cells]
            payload = payload_of(plan, url, forgiven) if workers > 1 else None
            if payload is not None:
                elsewhere(cells, payload, workers, display)
            else:
                if asked and workers > 1:
                    display.note("one process does all the runs: " + why_not(plan, url))
                here(cells, display)
        display.show([cell.look().status for cell in cells])
        rows = [_row(cell.about, cell.tune.trials(), cell.final.trials(), cell.look().failure)
                for cell in cells]
    kept = str(storage) if isinstance(storage, (str, Path)) else type(storage).__name__
    return Comparison(rows, {**plan.settings, "storage": without_password(kept)})


@checks.annotated
def recorded(storage: "str | Path | BaseStorage" = STORAGE) -> Comparison:
    """Return what a storage holds of every comparison, the newest settings of each change.

    Raises:
        UnreachableStorage: the storage cannot be opened, or there is no such file.
    """
    if isinstance(storage, (str, Path)) and "://" not in str(storage) \
            and not Path(storage).exists():
        raise UnreachableStorage(f"storage {without_password(str(storage))} does not exist; run a "
                                 "comparison first, or name another file")
    newest: dict[tuple[str, str], tuple[float, Mapping[str, Any], str]] = {}
    rows = []
    with storage_at(storage) as opened:
        for study in patient(opened.get_all_studies):
            about = study.user_attrs.get("netwright")
            if about is not None:
                key, when = (about["task"], about["change"]), study.user_attrs.get("asked", 0.0)
                if key not in newest or newest[key][0] < when:
                    newest[key] = when, about, study.study_name
        for _, about, name in sorted(newest.values(), key=lambda entry: entry[1]["place"]):
            tune, final = (Ledger(opened, part, maximize=about["maximize"],
                                  attributes={}).trials() for part in (name, f"{name}/final"))
            rows.append(_row(about, tune, final, ""))
    kept = str(storage) if isinstance(storage, (str, Path)) else type(storage).__name__
    return Comparison(rows, {"storage": without_password(kept)})


def tasks(given: Any) -> list[Task]:
    """Return the tasks that a user named: a `Task`, a name, a file's path, or a list of those.

    >>> [task.name for task in tasks("digits-mlp")]
    ['digits-mlp']
    """
    found: list[Task] = []
    for entry in given if isinstance(given, (list, tuple)) else [given]:
        if isinstance(entry, Task):
            found.append(entry)
        elif isinstance(entry, Path) or (isinstance(entry, str) and (
                entry.endswith(".py") or os.sep in entry)):
            found += load_tasks(entry)
        elif isinstance(entry, str):
            found.append(built_in(entry))
        else:
            raise ValueError("task must be a Task, the name of one or the path of a file, got "
                             f"{type(entry).__name__}")
    names = [task.name for task in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"tasks must have names of their own, got {name!r} "
                             f"{names.count(name)} times")
    if not found:
        raise ValueError("task must name at least one task, got none; try 'digits-mlp'")
    return found


def _plan(chosen: list[Task], wanted: list[Change], *, seeds: int | Sequence[int], trials: int,
          epochs: int | None, device: str) -> Plan:
    from netwright.runtime.version import __version__
    numbers = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise ValueError(f"seeds must be a number of at least 1 or a list of different seeds, "
                         f"got {seeds}")
    checks.count(1, trials=trials, advice="1 tries the defaults only")
    if epochs is not None:
        chosen = [replace(task, epochs=epochs) for task in chosen]
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be one that PyTorch has here, got {device!r} "
                         f"({str(error).splitlines()[0]}); try 'cpu'") from error
    names = [f"{task.name}/{change.label}/{_digest(task, change, device, __version__)}"
             for task in chosen for change in wanted]
    return Plan(chosen, wanted, numbers, trials, device, names)


def _digest(task: Task, change: Change, device: str, version: str) -> str:
    """Return what differs when a run would: the task, the change, their code and settings."""
    parts = {name: value for name, value in vars(task).items() if name != "file"}
    source = task.file.read_text(encoding="utf-8") if task.file is not None else ""
    space = {name: repr(kind) for name, kind in change.space(task).items()}
    return fingerprint(parts, source, change.recipe, space, device, version)


def _row(about: Mapping[str, Any], tune: "Mapping[str, list[FrozenTrial]]",
         final: "Mapping[str, list[FrozenTrial]]", failure: str) -> Row:
    row = Row(about["task"], about["change"], about["metric"], about["maximize"],
              trials=sum(done(tune.get(trial_key(k), [])) is not None
                         for k in range(about["trials"])), failure=failure,
              recipe=about.get("recipe", {}))
    best = best_of(about, tune)
    runs = [] if best is None else [run for seed in about["seeds"] if (
        run := done(final.get(final_key(seed, best.params), []))) is not None]
    if best is None or not runs:
        return row if failure else replace(row, failure="it has not been run to its end")
    found = [run.user_attrs for run in runs]
    costs = [one["cost"] for one in found]
    return replace(
        row, scores=[float(one["score"]) for one in found],
        train_time=[float(one["train_time"]) for one in found],
        step_time=statistics.median(cost["step_time"] for cost in costs),
        **{name: costs[0][name] for name in ("peak_bytes", "saved_bytes", "parameters", "flops")},
        curves=[[(int(e), s, loss, metric) for e, s, loss, metric in one["curve"]]
                for one in found],
        alignment=_mean_alignment([one["alignment"] for one in found]),
        hyperparameters=dict(best.params))


def _mean_alignment(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return each stage's mean over the runs in which it learned; a reshape may differ by seed."""
    stages = dict.fromkeys(stage for run in runs for stage in run)
    known = {stage: [run[stage] for run in runs if not math.isnan(run.get(stage, math.nan))]
             for stage in stages}
    return {stage: statistics.fmean(values) if values else math.nan
            for stage, values in known.items()}
