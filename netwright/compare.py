"""The main job: changes, seeds and a tuning budget on one or more tasks, measured alike."""

import json
import math
import os
import pickle
import pickletools
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from netwright import changes as catalogue
from netwright import errors, measure
from netwright.changes import Change
from netwright.data.batches import Batches
from netwright.display import Display, Progress
from netwright.errors import Diverged, NetwrightError
from netwright.fingerprint import fingerprint
from netwright.modes import same_random_state
from netwright.results import Comparison, Row
from netwright.tasks import Task, load_tasks
from netwright.tasks import task as built_in
from netwright.training import fit
from netwright.trials import Job, Ledger, Standing, open_storage, patient

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

TASKS = ("digits-mlp", "digits-cnn")
CHANGES = ("Backprop", "FeedbackAlignment", "DirectFeedbackAlignment", "ForwardForward",
           "MonoForward", "ForwardGradient", "NoProp", "PredictiveCoding")
STORAGE = Path("runs/netwright.db")


def compare(task: Any = None, changes: Any = None, *, seeds: int | Sequence[int] = 3,
            trials: int = 4, epochs: int | None = None,
            storage: "str | Path | BaseStorage | None" = None, workers: int | None = None,
            device: str = "cpu", progress: bool = True) -> Comparison:
    """Train a task's network under each change; report what each gives and what it costs.

    Every change gets the same number of tuning `trials` on the task's validation samples, scored
    after the last epoch, then trains with its best settings once for each of the same `seeds`
    and is scored on the test samples. `task` is a `Task`, the name of a built-in one, the path
    of a file that defines some, or a list of those; `changes` a list, or a mapping of label to
    change, as `netwright.changes.changes` reads them.

    Every run is recorded in `storage`, an SQLite file (runs/netwright.db where it is None) or
    any Optuna storage URL. What is recorded under the same settings and the same code is not run
    again, so an interrupted comparison goes on where it stopped, and machines that start the
    same comparison on one storage share its runs. `workers` processes run on this machine, one
    a core and at most four where it is None.

    A change that cannot run on a task gives a row with its `failure`; the others go on.

    Raises:
        UnknownName: a task or a change has a name that is not known.
        BadTaskFile: a task's file raises or defines no task.
        UnreachableStorage: the storage cannot be opened, or goes away.
        ValueError: an argument is not what it must be.

    >>> import netwright as nw
    >>> from optuna.storages import InMemoryStorage
    >>> found = nw.compare("digits-mlp", ["Backprop"], seeds=1, trials=1, epochs=3,
    ...                    storage=InMemoryStorage(), progress=False)
    >>> found.rows[0].change, found.rows[0].mean > 0.8
    ('Backprop', True)
    """
    chosen = tasks(list(TASKS) if task is None else task)
    wanted = catalogue.changes(list(CHANGES) if changes is None else changes)
    plan = _plan(chosen, wanted, seeds=seeds, trials=trials, epochs=epochs, device=device)
    asked = workers is not None or isinstance(storage, (str, Path, NoneType))
    workers = min(os.cpu_count() or 1, 4) if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if storage is None:
        STORAGE.parent.mkdir(parents=True, exist_ok=True)
        storage = STORAGE
    opened = open_storage(storage)
    cells = _cells(plan, opened)
    forgiven = [cell.forgiven for cell in cells]
    with Display(progress) as display:
        if not all(cell.look().finished for cell in cells):
            url = storage if isinstance(storage, (str, Path)) else None
            payload = _payload(plan, url, forgiven) if workers > 1 else None
            if payload is None:
                if asked and workers > 1:
                    display.note("one process does all the runs: " + _why(plan, url))
                _here(cells, display)
            else:
                _there(cells, payload, workers, display)
        display.show([cell.look().progress for cell in cells])
    rows = [_row(cell.about, cell.tune.trials(), cell.final.trials(), cell.look().failure)
            for cell in cells]
    return Comparison(rows, {**plan.settings, "storage": str(storage) if isinstance(
        storage, (str, Path)) and "@" not in str(storage) else type(opened).__name__})


def recorded(storage: "str | Path | BaseStorage" = STORAGE) -> Comparison:
    """Return what a storage holds of every comparison, the newest settings of each change.

    Raises:
        UnreachableStorage: the storage cannot be opened, or there is no such file.
    """
    if isinstance(storage, (str, Path)) and "://" not in str(storage) \
            and not Path(storage).is_file():
        raise errors.UnreachableStorage(f"storage {storage} does not exist; run a comparison "
                                        "first, or name another file")
    opened = open_storage(storage)
    studies = {study.study_name: study for study in patient(opened.get_all_studies)}
    newest: dict[tuple[str, str], tuple[float, Mapping[str, Any], str]] = {}
    for name, study in studies.items():
        about = study.user_attrs.get("netwright")
        if about is not None:
            key, when = (about["task"], about["change"]), study.user_attrs.get("asked", 0.0)
            if key not in newest or newest[key][0] < when:
                newest[key] = when, about, name
    rows = []
    for _, about, name in sorted(newest.values(), key=lambda entry: entry[1]["place"]):
        tune, final = (Ledger(opened, part, maximize=about["maximize"], attributes={}).trials()
                       for part in (name, f"{name}/final"))
        rows.append(_row(about, tune, final, ""))
    return Comparison(rows, {"storage": Path(str(storage)).name})


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


@dataclass(frozen=True)
class Plan:
    """All that workers must agree on."""

    tasks: list[Task]
    changes: list[Change]
    seeds: list[int]
    trials: int
    device: str
    names: list[str]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all rows share."""
        from netwright import __version__
        from netwright.evidence.evidence import machine
        return {"seeds": self.seeds, "trials": self.trials, "device": self.device,
                "epochs": {task.name: task.epochs for task in self.tasks},
                "batch_size": {task.name: task.batch_size for task in self.tasks},
                "machine": machine(), "netwright": __version__}


def _plan(chosen: list[Task], wanted: list[Change], *, seeds: int | Sequence[int], trials: int,
          epochs: int | None, device: str) -> Plan:
    from netwright import __version__
    numbers = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise ValueError(f"seeds must be a number of at least 1 or a list of different seeds, "
                         f"got {seeds}")
    if not isinstance(trials, int) or trials < 1:
        raise ValueError(f"trials must be a whole number of at least 1, got {trials!r}; "
                         "1 tries the defaults only")
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
    return fingerprint(parts, source, list(change.steps), space, device, version)


@dataclass(frozen=True)
class Look:
    """How a cell stands: what is open, whether it is finished, and why it failed."""

    job: Job | None
    ledger: Ledger | None
    finished: bool
    failure: str
    progress: Progress


class Cell:
    """One change on one task: its tuning runs, then its final ones."""

    def __init__(self, task: Task, change: Change, plan: Plan, name: str, place: int,
                 storage: "BaseStorage", forgiven: tuple[int, int] | None = None) -> None:
        self.task, self.change, self.plan = task, change, plan
        self.about = {
            "task": task.name, "change": change.label, "metric": task.metric_name,
            "maximize": task.maximize, "seeds": plan.seeds, "trials": plan.trials,
            "place": place, "epochs": task.epochs, "batch_size": task.batch_size,
            "device": plan.device}
        asked = {} if forgiven else {"asked": time.time(), "netwright": self.about}
        self.tune = Ledger(storage, name, maximize=task.maximize, attributes=asked)
        self.final = Ledger(storage, f"{name}/final", maximize=task.maximize, attributes={})
        self.forgiven = forgiven or (self.tune.last(), self.final.last())
        space = change.space(task)
        self.jobs = [Job(_trial(k), settings, space)
                     for k, settings in enumerate(change.proposals(task, plan.trials))]
        self._over: Look | None = None
        self._tuned: tuple[dict[str, Standing], FrozenTrial] | None = None

    def look(self) -> Look:
        """Return how the cell stands, which is not read again once it is finished."""
        if self._over is None:
            found = self._look()
            if not found.finished:
                return found
            self._over = found
        return self._over

    def _look(self) -> Look:
        if self._tuned is None:
            trials = self.tune.trials()
            tuned = self.tune.standing([job.key for job in self.jobs], self.forgiven[0], trials)
            broken = [standing for standing in tuned.values() if _broken(standing)]
            if broken:
                return self._seen(None, None, tuned, {}, failure=broken[0].failure)
            if any(s.done is None and s.failed is None for s in tuned.values()):
                job = next((job for job in self.jobs if tuned[job.key].open), None)
                return self._seen(job, self.tune, tuned, {})
            best = _best(self.about, trials)
            if best is None:
                return self._seen(None, None, tuned, {}, failure=_diverged([*tuned.values()]))
            self._tuned = tuned, best
        tuned, best = self._tuned
        finals = [Job(_final(seed, best.params), best.params, best.distributions)
                  for seed in self.plan.seeds]
        run = self.final.standing([job.key for job in finals], self.forgiven[1],
                                  self.final.trials())
        broken = [standing for standing in run.values() if _broken(standing)]
        if broken:
            return self._seen(None, None, tuned, run, failure=broken[0].failure)
        if any(s.done is None and s.failed is None for s in run.values()):
            job = next((job for job in finals if run[job.key].open), None)
            return self._seen(job, self.final, tuned, run)
        failures = [f"seed {seed}: {standing.failure}"
                    for seed, standing in zip(self.plan.seeds, run.values(), strict=True)
                    if standing.failed is not None]
        return self._seen(None, None, tuned, run, failure="; ".join(failures), finished=True)

    def _seen(self, job: Job | None, ledger: Ledger | None, tuned: Mapping[str, Standing],
              run: Mapping[str, Standing], *, failure: str = "",
              finished: bool = False) -> Look:
        standings = [*tuned.values(), *run.values()]
        total = len(self.jobs) + len(self.plan.seeds)
        over = finished or bool(failure)
        ended = total if over else sum(s.done is not None or s.failed is not None
                                       for s in standings)
        seconds = [s.done.duration.total_seconds() for s in standings
                   if s.done is not None and s.done.duration is not None]
        running = []
        for key, standing in {**tuned, **run}.items():
            if standing.running is not None:
                beat = standing.running.user_attrs.get("beat", [0, 0])
                running.append((key.split(" · ")[0], int(beat[1]), self.task.epochs))
        return Look(job, ledger, over, failure, Progress(
            self.task.name, self.change.label, ended, total, seconds, running, failure))

    def work(self) -> bool:
        """Do one job of the cell, if one is open and nobody else takes it; return whether."""
        look = self.look()
        if look.job is None or look.ledger is None:
            return False
        trial = look.ledger.claim(look.job)
        if trial is None:
            return False
        ledger, tuning = look.ledger, look.ledger is self.tune
        seed = 0 if tuning else int(look.job.key.split()[1])
        try:
            with ledger.beating(trial) as tell:
                found = _run(self.task, self.change, look.job.settings, seed, tuning=tuning,
                             device=self.plan.device, tell=tell)
        except Diverged as error:
            ledger.fail(trial, _message(error), diverged=True)
        except Exception as error:  # the row says what failed, and the others go on
            ledger.fail(trial, _message(error), traceback=traceback.format_exc()[-4000:])
        except BaseException:
            ledger.fail(trial, "")
            raise
        else:
            ledger.complete(trial, found["score"], found)
        return True


def _cells(plan: Plan, storage: "BaseStorage",
           forgiven: Sequence[tuple[int, int]] = ()) -> list[Cell]:
    pairs = [(task, change) for task in plan.tasks for change in plan.changes]
    return [Cell(task, change, plan, plan.names[place], place, storage,
                 forgiven[place] if forgiven else None)
            for place, (task, change) in enumerate(pairs)]


def _work(cells: list[Cell]) -> None:
    """Do jobs until every cell is finished, whoever finished it."""
    while cells:
        if not any(cell.work() for cell in cells):
            cells = [cell for cell in cells if not cell.look().finished]
            if cells:
                time.sleep(0.2)


def _run(task: Task, change: Change, settings: Mapping[str, Any], seed: int, *, tuning: bool,
         device: str, tell: Any) -> dict[str, Any]:
    """Train once; return the score, the curve and, for a final run, what a step costs."""
    with same_random_state():
        torch.manual_seed(seed)
        rule = change.build(task.network(), task, settings).to(device)
        parts = task.parts(seed, tuning=tuning)
        train, held_out = (_On(part, device) if device != "cpu" else part
                           for part in (parts.train, parts.validation if tuning else parts.test))
        parameters = [p for p in rule.parameters() if p.requires_grad]
        optimizer = task.optimize(parameters, settings["learning_rate"])
        history = fit(rule, train, epochs=task.epochs, optimizer=optimizer, validation=held_out,
                      metric=task.score, higher_is_better=task.maximize, progress=False,
                      on_epoch=lambda epoch: tell(epoch.epoch))
        score = history[-1].metric
        if not math.isfinite(score):
            raise Diverged(f"the {task.metric_name} is {score} after {task.epochs} epochs; "
                           "lower the learning rate")
        found: dict[str, Any] = {"score": score, "curve": [list(e) for e in history.curve],
                                 "train_time": history[-1].seconds}
        if not tuning:
            batch = _moved(task.batch, device)
            found["cost"] = asdict(measure.cost(rule, batch, loss=task.loss))
            found["alignment"] = measure.alignment(rule, batch)
        return found


class _On:
    """Batches, moved to a device one by one."""

    def __init__(self, loader: Any, device: str) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return (_moved(batch, self.device) for batch in self.loader)

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.loader, Batches):
            self.loader.set_epoch(epoch)


def _moved(batch: Any, device: str) -> Any:
    from torch.utils._pytree import tree_map
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


def _trial(k: int) -> str:
    return f"trial {k}"


def _final(seed: int, settings: Mapping[str, Any]) -> str:
    return f"seed {seed} · {fingerprint(dict(settings))}"


def _broken(standing: Standing) -> bool:
    return standing.failed is not None and not standing.failed.user_attrs.get("diverged")


def _diverged(standings: list[Standing]) -> str:
    return f"all {len(standings)} tuning trials diverged; the first: {standings[0].failure}"


def _done(trials: "Iterable[FrozenTrial]") -> "FrozenTrial | None":
    from optuna.trial import TrialState
    return next((t for t in trials if t.state == TrialState.COMPLETE), None)


def _best(about: Mapping[str, Any],
          trials: "Mapping[str, list[FrozenTrial]]") -> "FrozenTrial | None":
    """Return the best tuning run, the first of equals."""
    done = [_done(trials.get(_trial(k), [])) for k in range(about["trials"])]
    sign = 1 if about["maximize"] else -1
    return max((t for t in done if t is not None), key=lambda t: sign * (t.value or 0.0),
               default=None)


def _row(about: Mapping[str, Any], tune: "Mapping[str, list[FrozenTrial]]",
         final: "Mapping[str, list[FrozenTrial]]", failure: str) -> Row:
    row = Row(about["task"], about["change"], about["metric"], about["maximize"],
              trials=sum(_done(tune.get(_trial(k), [])) is not None
                         for k in range(about["trials"])), failure=failure)
    best = _best(about, tune)
    runs = [] if best is None else [run for seed in about["seeds"] if (
        run := _done(final.get(_final(seed, best.params), []))) is not None]
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
        alignment={stage: statistics.fmean(one["alignment"].get(stage, math.nan)
                                           for one in found)
                   for stage in found[0]["alignment"]},
        hyperparameters=dict(best.params))


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    plain = isinstance(error, NetwrightError) or type(error) is ValueError
    return text if plain and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _here(cells: list[Cell], display: Display) -> None:
    """Do the jobs in this process while a thread shows how they stand."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(1.0):
            try:
                display.show([cell.look().progress for cell in cells])
            except NetwrightError:
                return  # the work itself meets the same error, and raises it
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        _work(cells)
    finally:
        stop.set()
        watcher.join()


def _payload(plan: Plan, url: Any, forgiven: list[tuple[int, int]]) -> bytes | None:
    """Return the plan for other processes, None where they could not read it."""
    if url is None:
        return None
    try:
        data = pickle.dumps((plan, str(url), forgiven))
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    # What the main script defines cannot be imported by another process.
    return None if any(arg == "__main__" for _, arg, _ in pickletools.genops(data)) else data


def _why(plan: Plan, url: Any) -> str:
    if url is None:
        return "a storage that is not a URL or a file cannot be shared"
    alone = [(task.name, replace(plan, tasks=[task], changes=[])) for task in plan.tasks]
    alone += [(change.label, replace(plan, tasks=[], changes=[change])) for change in plan.changes]
    for name, part in alone:
        if _payload(part, url, []) is None:
            return (f"{name!r} has a function that another process cannot import (a lambda, or "
                    "one of the main script); put it into a module or a task file")
    return "the plan cannot be sent to another process"


def _there(cells: list[Cell], payload: bytes, workers: int, display: Display) -> None:
    """Let other processes do the jobs, and show how they stand."""
    with tempfile.TemporaryFile() as log:
        crew = [_hire(payload, log) for _ in range(workers)]
        deaths = 0
        try:
            while True:
                looks = [cell.look() for cell in cells]
                display.show([look.progress for look in looks])
                if all(look.finished for look in looks):
                    return
                for i, process in enumerate(crew):
                    if process.poll() is not None:
                        deaths += 1
                        _inquire(process, log, deaths)
                        crew[i] = _hire(payload, log)
                time.sleep(0.3)
        finally:
            for process in crew:
                process.terminate()
            for process in crew:
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()


def _hire(payload: bytes, log: Any) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    process = subprocess.Popen([sys.executable, "-c", "from netwright.compare import serve; "
                                "serve()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=log, env=environment)
    assert process.stdin is not None
    # The pipe stays open: when this process dies the worker sees its end, and ends too.
    try:
        process.stdin.write(len(payload).to_bytes(8, "big") + payload)
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it died at once, which the next look at it tells
    return process


def _inquire(process: "subprocess.Popen[bytes]", log: Any, deaths: int) -> None:
    """Raise what ended a worker, unless it was killed and another may take its place."""
    assert process.stdout is not None
    said = process.stdout.read()
    process.stdout.close()
    if said:
        report = json.loads(said)
        kind = getattr(errors, report["error"], RuntimeError)
        if kind is not errors.UnknownName:
            raise kind(report["message"])
        raise RuntimeError(report["message"])
    if process.returncode == 0:
        return
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    if process.returncode > 0 or deaths > 10:
        raise RuntimeError(f"a worker process ended with status {process.returncode}: "
                           f"{lines[-1] if lines else 'it said nothing'}; "
                           "workers=1 runs everything in this process")


def serve() -> None:
    """Do the jobs of the plan that comes on standard input; what a worker process runs."""
    source, answer = sys.stdin.buffer, os.dup(1)
    os.dup2(2, 1)  # what a task prints goes to the log
    payload = source.read(int.from_bytes(source.read(8), "big"))

    def end_with_parent() -> None:
        source.read(1)
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        plan, url, forgiven = pickle.loads(payload)
        _work(_cells(plan, open_storage(url), forgiven))
        # The last look of the one who started this worker ends it.
        threading.Event().wait()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        traceback.print_exc()
        os.write(answer, json.dumps({"error": type(error).__name__,
                                     "message": _message(error)}).encode())
        sys.exit(1)
