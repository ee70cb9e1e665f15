"""Jobs that several processes and machines share through an Optuna storage, each done once."""

import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from netwright.compare.urls import url_of, without_password, without_secrets
from netwright.errors import ReadOnlyStorage, UnreachableStorage

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

T = TypeVar("T")
BEAT = 2.0  # seconds between a worker's signs of life
PATIENCE = 60.0  # seconds that a storage that is away is waited for
GRACE = 60.0  # seconds without one after which a worker on another machine counts as dead
LIVES = 3  # deaths of a worker after which a job is given up


def open_storage(storage: "str | Path | BaseStorage", *, wait: bool = False) -> "BaseStorage":
    """Return the Optuna storage at a URL or a file's path, ready for use.

    A path is an SQLite file, made where it does not exist. `postgresql://` uses whichever of
    psycopg and psycopg2 is installed. With `wait` a server that is away may come back, see
    `patient`; one that says itself that it is starting is waited for in any case.

    Raises:
        UnreachableStorage: there is no such server, folder or driver, or the file is no database.
    """
    import optuna
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if isinstance(storage, optuna.storages.BaseStorage):
        return storage
    if not isinstance(storage, (str, Path)):
        raise ValueError("storage must be a path, a database URL or an Optuna storage, got "
                         f"{storage!r} of {type(storage).__name__}; try runs/netwright.db")
    url = url_of(storage)
    shown = without_password(str(storage))
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": 60}
    elif url.startswith("postgresql"):
        options["connect_args"] = {"connect_timeout": 10}
    patience = _Patience()
    while True:
        try:
            opened = optuna.storages.RDBStorage(url, engine_kwargs=options)
            return optuna.storages.get_storage(opened)
        except ImportError as error:
            raise UnreachableStorage(f"storage {shown} needs a database driver that is not "
                                     f"installed ({_line(error)}); PostgreSQL's comes with "
                                     "pip install 'netwright[distributed]'") from error
        except ArgumentError as error:
            said = without_secrets(_line(error), url)
            raise UnreachableStorage(f"storage {shown!r} is neither a path nor a database URL "
                                     f"({said}); try runs/netwright.db or "
                                     "postgresql://user@host/name") from None
        except (SQLAlchemyError, OSError, RuntimeError, AssertionError, ValueError) as error:
            said = without_secrets(_line(error), url)
            # Processes that start together may all be making the tables.
            making = ("already exists", "UNIQUE constraint", "duplicate key", "alembic")
            busy = isinstance(error, (RuntimeError, AssertionError)) or any(
                word in said for word in making)
            away = any(word in said for word in ("starting up", "recovery mode", "shutting down")) \
                or (wait and not url.startswith("sqlite"))
            if not patience.goes_on(said, minute=away, briefly=busy):
                advice = "name another file, or move this one away" \
                    if "not a database" in said or "malformed" in said \
                    else "check that it runs and that you may write to it"
                raise UnreachableStorage(f"storage {shown} could not be opened: {said}; "
                                         f"{advice}") from (error if said == _line(error) else None)


@contextmanager
def storage_at(storage: "str | Path | BaseStorage", *,
               wait: bool = False) -> "Iterator[BaseStorage]":
    """Open a storage, and close its connections afterwards unless it was open before."""
    opened = open_storage(storage, wait=wait)
    try:
        yield opened
    finally:
        if opened is storage:
            opened.remove_session()
        else:
            let_go(opened)


def let_go(storage: "BaseStorage") -> None:
    """Close a storage's connections; it opens others when it is used again."""
    storage.remove_session()
    engine = getattr(getattr(storage, "_backend", None), "engine", None)
    if engine is not None:
        engine.dispose()


def _line(error: BaseException) -> str:
    text = str(getattr(error, "orig", None) or error) or type(error).__name__
    return " ".join(text.split()).rstrip(".")


@dataclass(frozen=True)
class Job:
    """One training: its key within a study, and the settings that it tries."""

    key: str
    settings: Mapping[str, Any]
    space: "Mapping[str, BaseDistribution]" = field(default_factory=dict)


@dataclass(frozen=True)
class Standing:
    """How one job stands: what it gave, why it failed, or who is at it.

    One that is open may have been rehearsed.
    """

    done: "FrozenTrial | None" = None
    failed: "FrozenTrial | None" = None
    running: "FrozenTrial | None" = None
    rehearsed: bool = False

    @property
    def open(self) -> bool:
        """Whether somebody should do the job."""
        return self.done is None and self.failed is None and self.running is None

    @property
    def failure(self) -> str:
        """Why the job failed."""
        if self.failed is None:
            return ""
        return str(self.failed.user_attrs.get("failure", "its process died again and again"))


class Ledger:
    """A study whose trials are jobs, each of which is done once by whoever comes first.

    To claim a job a worker adds a running trial with the job's key, then looks again: of several
    claims that live, the oldest holds. A claim whose worker has died counts no longer: one on
    this machine when its process is gone, one elsewhere when it has shown no sign of life for
    `GRACE` seconds of the looker's own clock. What is done is never done again. A failure holds
    for those who saw it happen, and for ever where it is marked as lasting (`diverged`).
    """

    def __init__(self, storage: "BaseStorage", name: str, *, maximize: bool,
                 attributes: Mapping[str, Any]) -> None:
        from optuna.exceptions import DuplicatedStudyError
        from optuna.study import StudyDirection
        self.storage, self.name = storage, name
        direction = StudyDirection.MAXIMIZE if maximize else StudyDirection.MINIMIZE
        try:  # looked for first, so that what is finished can be read where nothing may be written
            self.study = patient(lambda: storage.get_study_id_from_name(name))
        except KeyError:
            try:
                self.study = patient(lambda: storage.create_new_study([direction], name))
            except DuplicatedStudyError:
                self.study = patient(lambda: storage.get_study_id_from_name(name))
        known = patient(lambda: storage.get_study_user_attrs(self.study))
        try:
            for key, value in attributes.items():
                if known.get(key) != value:
                    self._write(storage.set_study_user_attr, self.study, key, value)
        except ReadOnlyStorage:
            if "netwright" not in known:
                raise
        self._seen: dict[int, tuple[Any, float]] = {}

    def trials(self) -> "dict[str, list[FrozenTrial]]":
        """Return every trial by its job's key, oldest first."""
        found: dict[str, list[FrozenTrial]] = {}
        for trial in patient(lambda: self.storage.get_all_trials(self.study, deepcopy=False)):
            found.setdefault(str(trial.user_attrs.get("job")), []).append(trial)
        return found

    def standing(self, keys: list[str], forgiven: int,
                 trials: "Mapping[str, list[FrozenTrial]]") -> dict[str, Standing]:
        """Return how each job stands; failures up to the trial `forgiven` may be tried again."""
        return {key: self._standing(trials.get(key, []), forgiven) for key in keys}

    def last(self) -> int:
        """Return the number of the newest trial, -1 where there is none."""
        trials = patient(lambda: self.storage.get_all_trials(self.study, deepcopy=False))
        return max((trial.number for trial in trials), default=-1)

    def claim(self, job: Job) -> int | None:
        """Return the id of a trial of one's own for the job, None where somebody was first."""
        from optuna.trial import FrozenTrial, TrialState
        start = FrozenTrial(
            number=-1, trial_id=-1, state=TrialState.RUNNING, value=None, values=None,
            datetime_start=datetime.now(), datetime_complete=None,
            params=dict(job.settings), distributions=dict(job.space),
            user_attrs={"job": job.key, "worker": worker()}, system_attrs={},
            intermediate_values={})
        mine = patient(lambda: self.storage.create_new_trial(self.study, start))
        claims = [trial for trial in self.trials()[job.key]
                  if trial.state == TrialState.COMPLETE or self._lives(trial)]
        if any(trial.state == TrialState.COMPLETE for trial in claims) \
                or min(trial._trial_id for trial in claims) != mine:
            self._end(mine, TrialState.PRUNED, None, {"yielded": True})
            return None
        return mine

    def complete(self, trial: int, score: float, found: Mapping[str, Any]) -> None:
        """Record what a job gave."""
        from optuna.trial import TrialState
        self._end(trial, TrialState.COMPLETE, score, found)

    def fail(self, trial: int, failure: str, **details: Any) -> None:
        """Record why a job failed, or that it was broken off where `failure` is empty."""
        from optuna.trial import TrialState
        about = {"failure": failure} if failure else {"abandoned": True}
        self._end(trial, TrialState.FAIL, None, {**about, **details})

    def release(self, trial: int) -> None:
        """Record that a job can be done, and give it back."""
        from optuna.trial import TrialState
        self._end(trial, TrialState.PRUNED, None, {"rehearsed": True})

    @contextmanager
    def beating(self, trial: int) -> Iterator[Callable[[int], None]]:
        """Show signs of life for a trial while the body runs; yield what tells its epoch."""
        epoch, stop = 0, threading.Event()

        def tell(now: int) -> None:
            nonlocal epoch
            epoch = now

        def beat() -> None:
            beats = 0
            while not stop.wait(BEAT):
                beats += 1
                try:
                    self.storage.set_trial_user_attr(trial, "beat", [beats, epoch])
                except Exception:  # a missed beat only makes the trial look older
                    continue
            self.storage.remove_session()
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield tell
        finally:
            stop.set()
            thread.join()

    def _standing(self, trials: "list[FrozenTrial]", forgiven: int) -> Standing:
        from optuna.trial import TrialState
        done = [t for t in trials if t.state == TrialState.COMPLETE]
        if done:
            return Standing(done=done[0])
        begun = [t for t in trials if t.state == TrialState.RUNNING]
        running = [t for t in begun if self._lives(t)]
        if running:
            return Standing(running=running[0])
        failed = [t for t in trials if t.state == TrialState.FAIL and "failure" in t.user_attrs
                  and (t.number > forgiven or t.user_attrs.get("diverged"))]
        dead = [t for t in trials if t.number > forgiven
                and (t in begun or t.user_attrs.get("died"))]
        if failed or len(dead) >= LIVES:
            return Standing(failed=(failed or dead)[-1])
        return Standing(rehearsed=any(t.user_attrs.get("rehearsed") for t in trials))

    def _lives(self, trial: "FrozenTrial") -> bool:
        """Return whether a trial runs and its worker lives; end it where the worker has died."""
        from optuna.trial import TrialState
        if trial.state != TrialState.RUNNING:
            return False
        who = trial.user_attrs.get("worker", {})
        if who.get("machine") == worker()["machine"] and os.name == "posix":
            lives = who == worker() or _process_lives(who["process"], who["born"])
        else:
            beat, now = trial.user_attrs.get("beat"), time.monotonic()
            before, since = self._seen.get(trial._trial_id, (None, now))
            if trial._trial_id not in self._seen or before != beat:
                self._seen[trial._trial_id] = beat, now
                since = now
            lives = now - since < GRACE
        if not lives:
            self._end(trial._trial_id, TrialState.FAIL, None, {"died": True})
        return lives

    def _end(self, trial: int, state: Any, score: float | None,
             found: Mapping[str, Any]) -> None:
        from optuna.exceptions import UpdateFinishedTrialError
        try:
            for key, value in found.items():
                self._write(self.storage.set_trial_user_attr, trial, key, value)
            values = None if score is None else [score]
            self._write(self.storage.set_trial_state_values, trial, state, values)
        except UpdateFinishedTrialError:
            return  # another worker thought this one dead and has taken the job over

    def _write(self, write: Callable[..., Any], *args: Any) -> None:
        patient(lambda: write(*args))


def patient(call: Callable[[], T]) -> T:
    """Return what `call` gives; try again where the storage is busy or away.

    One that is away is waited for a minute, as long as a server takes to recover from a crash,
    and after three seconds that is said.

    Raises:
        UnreachableStorage: it did not come back.
        ReadOnlyStorage: it may only be read.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DBAPIError
    patience = _Patience()
    while True:
        try:
            return call()
        except (StorageInternalError, DBAPIError) as error:
            said = _line(error.__cause__ or error)
            if any(word in said for word in ("readonly database", "read-only transaction",
                                             "permission denied")):
                raise ReadOnlyStorage(f"the storage may only be read: {said}; name another, or "
                                      "let it be written") from error
            broken = any(word in said for word in ("malformed", "not a database", "no such table",
                                                   "does not exist"))
            if not patience.goes_on(said, minute=not broken, briefly=True):
                raise UnreachableStorage(
                    f"the storage stopped answering: {said}; nothing that was finished "
                    "is lost: run the same again to go on") from error


class _Patience:
    """How long a storage has been waited for, and how long it still may be."""

    def __init__(self) -> None:
        self.start, self.slept, self.attempt, self.said = time.monotonic(), 0.0, 0, False

    def goes_on(self, failure: str, *, minute: bool, briefly: bool) -> bool:
        """Sleep and return True, or return False where it has been long enough."""
        waited = max(time.monotonic() - self.start, self.slept)
        if not ((minute and waited < PATIENCE) or (briefly and self.attempt < 5)):
            return False
        if waited > 3 and not self.said:
            logging.getLogger("netwright").warning(
                "the storage does not answer (%s); it is waited for up to %.0f seconds", failure,
                PATIENCE)
            self.said = True
        pause = min(0.1 * 2 ** self.attempt, 2.0)
        time.sleep(pause)
        self.slept += pause
        self.attempt += 1
        return True


def worker() -> dict[str, Any]:
    """Return who this process is: its machine, its number, and when it was born."""
    process = os.getpid()
    return {"machine": _machine(), "process": process, "born": _born(process)}


def _machine() -> str:
    # A container sees its own processes only, so its process namespace is part of the machine.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{platform.node()}/{uuid.getnode()}"


def _born(process: int) -> str:
    """Return when a process started, in the kernel's ticks, "" where that is not told."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rsplit(")", 1)[1].split()
    return "" if fields[0] == "Z" else fields[19]


def _process_lives(process: int, born: str) -> bool:
    if Path("/proc/self/stat").exists():
        return _born(process) == born != ""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
