"""One change on one task: its tuning runs, then its final ones, and who does which."""

import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from netwright import measure
from netwright.compare.changes import RATE, Change
from netwright.compare.display import Status
from netwright.compare.trials import Job, Ledger, Standing
from netwright.data.batches import Batches
from netwright.errors import Diverged, NetwrightError
from netwright.rules import Rule
from netwright.runtime.fingerprint import fingerprint
from netwright.runtime.random_state import same_random_state
from netwright.signals import moved
from netwright.tasks import Task
from netwright.training import fit

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

T = TypeVar("T")


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
        from netwright.runtime.machine import machine
        from netwright.runtime.version import __version__
        return {"seeds": self.seeds, "trials": self.trials, "device": self.device,
                "epochs": {task.name: task.epochs for task in self.tasks},
                "batch_size": {task.name: task.batch_size for task in self.tasks},
                "machine": machine(), "netwright": __version__}


@dataclass(frozen=True)
class Look:
    """How a cell stands: what is open, whether it is finished, and why it failed.

    `rehearsed` says whether the change is known to run.
    """

    job: Job | None
    ledger: Ledger | None
    finished: bool
    failure: str
    status: Status
    rehearsed: bool = False


class Cell:
    """One change on one task: its tuning runs, then its final ones."""

    def __init__(self, task: Task, change: Change, plan: Plan, name: str, place: int,
                 storage: "BaseStorage", forgiven: tuple[int, int] | None = None) -> None:
        self.task, self.change, self.plan = task, change, plan
        self.about = {
            "task": task.name, "change": change.label, "metric": task.metric_name,
            "maximize": task.maximize, "seeds": plan.seeds, "trials": plan.trials,
            "place": place, "epochs": task.epochs, "batch_size": task.batch_size,
            "device": plan.device, "recipe": change.recipe.plain()}
        asked = {} if forgiven else {"asked": time.time(), "netwright": self.about}
        self.tune = Ledger(storage, name, maximize=task.maximize, attributes=asked)
        self.final = Ledger(storage, f"{name}/final", maximize=task.maximize, attributes={})
        self.forgiven = forgiven or (self.tune.last(), self.final.last())
        space = change.space(task)
        self.jobs = [Job(trial_key(k), settings, space)
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
            # What fails with its defaults cannot run here; what fails with other settings gave
            # one trial that found nothing.
            first = tuned[self.jobs[0].key]
            if _broken(first):
                return self._seen(None, None, tuned, {}, failure=first.failure)
            if any(s.done is None and s.failed is None for s in tuned.values()):
                job = next((job for job in self.jobs if tuned[job.key].open), None)
                found = self._seen(job, self.tune, tuned, {})
                return replace(found, rehearsed=first.rehearsed)
            best = best_of(self.about, trials)
            if best is None:
                return self._seen(None, None, tuned, {}, failure=_diverged([*tuned.values()]))
            self._tuned = tuned, best
        tuned, best = self._tuned
        finals = [Job(final_key(seed, best.params), best.params, best.distributions)
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
        return Look(job, ledger, over, failure, Status(
            self.task.name, self.change.label, ended, total, seconds, running, failure))

    def rehearse(self) -> bool:
        """Find out whether the change can run at all, where nobody has yet; return whether."""
        first, look = self.jobs[0], self.look()
        if look.job is not first or look.rehearsed:
            return False
        trial = self.tune.claim(first)
        if trial is None:
            return False
        def rehearsed() -> bool:
            try:
                with self.tune.beating(trial):
                    rehearse(self.task, self.change, first.settings, self.plan.device)
            except Diverged:
                pass  # it runs, and its trials tell how well
            return True
        if _tried(rehearsed, self.tune, trial):
            self.tune.release(trial)
        return True

    def work(self) -> bool:
        """Do one job of the cell, if one is open and nobody else takes it; return whether."""
        look = self.look()
        job, ledger, tuning = look.job, look.ledger, look.ledger is self.tune
        if job is None or ledger is None:
            return False
        trial = ledger.claim(job)
        if trial is None:
            return False
        seed = 0 if tuning else int(job.key.split()[1])

        def ran() -> dict[str, Any]:
            with ledger.beating(trial) as tell:
                return _run(self.task, self.change, job.settings, seed, tuning=tuning,
                            device=self.plan.device, tell=tell)
        found = _tried(ran, ledger, trial)
        if found is not None:
            ledger.complete(trial, found["score"], found)
        return True


def _tried(action: Callable[[], T], ledger: Ledger, trial: int) -> T | None:
    """Return what `action` gives; record why it failed where it does."""
    try:
        return action()
    except Diverged as error:
        # A comparison keeps no checkpoints, and takes no advice on them.
        ledger.fail(trial, message_of(error).split("; no checkpoint")[0], diverged=True)
    except Exception as error:  # the row says what failed, and the others go on
        ledger.fail(trial, message_of(error), traceback=traceback.format_exc()[-4000:])
    except BaseException:
        ledger.fail(trial, "")
        raise
    return None


def cells_of(plan: Plan, storage: "BaseStorage",
             forgiven: Sequence[tuple[int, int]] = ()) -> list[Cell]:
    """Return the cell of each task and change; `forgiven` is what the asker took as past."""
    pairs = [(task, change) for task in plan.tasks for change in plan.changes]
    return [Cell(task, change, plan, plan.names[place], place, storage,
                 forgiven[place] if forgiven else None)
            for place, (task, change) in enumerate(pairs)]


def work(cells: list[Cell]) -> None:
    """Do jobs until every cell is finished, whoever finished it; see first what can run."""
    while any(cell.rehearse() for cell in cells):
        pass
    while cells:
        if not any(cell.work() for cell in cells):
            cells = [cell for cell in cells if not cell.look().finished]
            if cells:
                time.sleep(0.2)


def done(trials: "Iterable[FrozenTrial]") -> "FrozenTrial | None":
    """Return the trial that holds a job's result, None where there is none."""
    from optuna.trial import TrialState
    return next((t for t in trials if t.state == TrialState.COMPLETE), None)


def best_of(about: Mapping[str, Any],
          trials: "Mapping[str, list[FrozenTrial]]") -> "FrozenTrial | None":
    """Return the best tuning run, the first of equals."""
    tuned = [done(trials.get(trial_key(k), [])) for k in range(about["trials"])]
    sign = 1 if about["maximize"] else -1
    return max((t for t in tuned if t is not None), key=lambda t: sign * (t.value or 0.0),
               default=None)


def trial_key(k: int) -> str:
    """Return the key of a tuning run."""
    return f"trial {k}"


def final_key(seed: int, settings: Mapping[str, Any]) -> str:
    """Return the key of a final run, which depends on the settings that tuning chose."""
    return f"seed {seed} · {fingerprint(dict(settings))}"


def message_of(error: BaseException) -> str:
    """Return an error as one line."""
    text = " ".join(str(error).split())
    plain = isinstance(error, NetwrightError) or type(error) is ValueError
    return text if plain and text else f"{type(error).__name__}: {text}".rstrip(": ")


def rehearse(task: Task, change: Change, settings: Mapping[str, Any], device: str) -> None:
    """Build the change and make one step with it."""
    with same_random_state():
        torch.manual_seed(0)
        rule = change.build(task.network(), task, settings).to(device)
        task = change.task(task)
        batch = moved(change.batch(*task.batch), torch.device(device))
        fit(rule, [batch], epochs=1, optimizer=_optimizer(task, rule, settings), progress=False)


def _optimizer(task: Task, rule: Rule, settings: Mapping[str, Any]) -> Optimizer | None:
    if rule.updates_weights:
        return None
    return task.optimize([p for p in rule.parameters() if p.requires_grad],
                         settings.get(RATE, task.learning_rate))


def _run(task: Task, change: Change, settings: Mapping[str, Any], seed: int, *, tuning: bool,
         device: str, tell: Any) -> dict[str, Any]:
    """Train once; return the score, the curve and, for a final run, what a step costs."""
    with same_random_state():
        torch.manual_seed(seed)
        rule = change.build(task.network(), task, settings).to(device)
        task = change.task(task)
        parts = task.parts(seed, tuning=tuning)
        train: Any = _Mapped(parts.train, change.batch) if change.recipe.data else parts.train
        train, held_out = (_Mapped(part, partial(_on, device)) if device != "cpu" else part
                           for part in (train, parts.validation if tuning else parts.test))
        history = fit(rule, train, epochs=task.epochs, optimizer=_optimizer(task, rule, settings),
                      validation=held_out, metric=task.score, higher_is_better=task.maximize,
                      progress=False, on_epoch=lambda epoch: tell(epoch.epoch))
        score = history[-1].metric
        if not math.isfinite(score):
            raise Diverged(f"the {task.metric_name} is {score} after {task.epochs} epochs; "
                           "lower the learning rate")
        found: dict[str, Any] = {"score": score, "curve": [list(e) for e in history.curve],
                                 "train_time": history[-1].seconds}
        if not tuning:
            batch = moved(task.batch, torch.device(device))
            found["cost"] = asdict(measure.cost(rule, batch, loss=task.loss))
            found["alignment"] = measure.alignment(rule, batch)
        return found


class _Mapped:
    """Batches, each made into another when it is its turn."""

    def __init__(self, loader: Any, function: Callable[[Any, Tensor], tuple[Any, Tensor]]) -> None:
        self.loader, self.function = loader, function

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return (self.function(x, y) for x, y in self.loader)

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.loader, (Batches, _Mapped)):
            self.loader.set_epoch(epoch)


def _on(device: str, x: Any, y: Tensor) -> tuple[Any, Tensor]:
    there: tuple[Any, Tensor] = moved((x, y), torch.device(device))
    return there


def _broken(standing: Standing) -> bool:
    return standing.failed is not None and not standing.failed.user_attrs.get("diverged")


def _diverged(standings: list[Standing]) -> str:
    what = "failed" if any(map(_broken, standings)) else "diverged"
    return f"all {len(standings)} tuning trials {what}; the first: {standings[0].failure}"
