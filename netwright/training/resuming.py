"""What a training keeps in its checkpoint, and how it goes on from there."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netwright.errors import CorruptCheckpoint
from netwright.rules.rule import Rule
from netwright.runtime import distributed
from netwright.runtime.files import Busy, alone_in
from netwright.runtime.random_state import every_random_state, set_every_random_state
from netwright.training.checkpoints import FILE, damaged, load, remove, save, tidy
from netwright.training.history import Epoch
from netwright.training.identity import difference, drifted, settings

if TYPE_CHECKING:
    from netwright.training.run import Run


@contextmanager
def held(run: "Run") -> Iterator[None]:
    """Keep other processes from the checkpoint's folder, until this one ends.

    A training that fails before its first step leaves no checkpoint behind.

    Raises:
        ValueError: another training is writing there.
    """
    folder = run.options.folder
    if folder is None:
        yield
        return
    with ExitStack() as stack:
        busy, made = False, not folder.exists()
        if distributed.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(alone_in(folder))
            except Busy:
                busy = True
        if any(distributed.gather(busy) if run.world > 1 else [busy]):
            raise ValueError(f"checkpoint={str(folder)!r} is the folder of a training that is "
                             "running now; wait for it, or name another folder")
        try:
            yield
        except Exception:
            if distributed.rank() == 0 and not run.at.step:
                if run.begun:
                    remove(folder)
                if made and not any(folder.iterdir()):
                    folder.rmdir()
            raise


def found(run: "Run") -> dict[str, Any] | None:
    """Return the checkpoint that is there, None where there is none."""
    return None if run.options.folder is None else load(run.options.folder)


def keep(run: "Run") -> None:
    """Write the checkpoint, unless the weights are no good."""
    if run.options.folder is None:
        return
    if run.world > 1:
        distributed.share_buffers(run.rule)
    run.check_weights()
    now = random_states(run)
    for way in drifted({name: run.described[name] for name in settings(run)}, settings(run)):
        if way not in run.drifted:
            run.drifted.append(way)
    if distributed.rank() == 0:
        save(run.options.folder, {
            "run": run.described, "drifted": run.drifted, "at": asdict(run.at), "best": run.best,
            "history": [asdict(epoch) for epoch in run.history.epochs],
            "rule": dict(run.rule.state_dict()),
            "optimizer": None if run.optimizer is None else run.optimizer.state_dict(),
            "scheduler": None if run.scheduler is None else run.scheduler.state_dict(),
            "random_start": run.random_start, "random_now": now, "weigher": run.weigher.state()})
    run.saved = (run.at.epoch, run.at.step)


def take_up(run: "Run", stored: dict[str, Any]) -> None:
    """Put a training where its checkpoint was written, or leave all as it is.

    Raises:
        CorruptCheckpoint: it is another training's, or does not hold what it must.
    """
    path = Path(str(run.options.folder)) / FILE
    try:
        different = difference(stored["run"], run.described, stored["drifted"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(damaged(path, f"it says of no training ({error!r})")) from error
    if different is not None:
        raise CorruptCheckpoint(f"{path} belongs to another training: {different}; give this "
                                "one another checkpoint=, or delete that folder")
    before: dict[str, Any] = deepcopy({
        "rule": dict(run.rule.state_dict()),
        "optimizer": None if run.optimizer is None else run.optimizer.state_dict(),
        "scheduler": None if run.scheduler is None else run.scheduler.state_dict(),
        "random": every_random_state(run.generators)})
    try:
        _put(run, stored, stored["random_now"][distributed.rank()])
    except Exception as error:
        _put_states(run, before, before["random"])
        raise CorruptCheckpoint(damaged(path, "it does not hold what this training needs "
                                              f"({error!r})")) from error
    if distributed.rank() == 0:
        tidy(str(run.options.folder))


def _put(run: "Run", stored: dict[str, Any], random: dict[str, Any]) -> None:
    at = type(run.at)(**stored["at"])
    for name, value in asdict(at).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (value < 0 and \
                name != "best_score" and name != "loss_sum"):
            raise ValueError(f"{name} is {value!r}")
    history = [Epoch(**epoch) for epoch in stored["history"]]
    if len(history) != at.epoch:
        raise ValueError(f"{len(history)} epochs are told of {at.epoch}")
    here = run.rule.state_dict()
    for state in (stored["rule"], stored["best"]):
        missing = [name for name in here if state is not None and name not in state]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
    _put_states(run, stored, random)
    run.at, run.best, run.history.epochs = at, stored["best"], history
    run.random_start, run.drifted = stored["random_start"], stored["drifted"]
    run.weigher.put_back(stored["weigher"])
    run.saved = (run.at.epoch, run.at.step)


def _put_states(run: "Run", stored: dict[str, Any], random: dict[str, Any]) -> None:
    if run.optimizer is not None:
        run.optimizer.load_state_dict(stored["optimizer"])
    if run.scheduler is not None:
        run.scheduler.load_state_dict(stored["scheduler"])
    set_weights(run.rule, stored["rule"])
    set_every_random_state(random, run.generators)


def random_states(run: "Run") -> list[dict[str, Any]]:
    """Return the random states of every process."""
    mine = every_random_state(run.generators)
    return distributed.gather(mine) if run.world > 1 else [mine]


def set_weights(rule: Rule, stored: dict[str, Any]) -> None:
    """Put stored weights into a rule."""
    state = rule.state_dict()  # holds the modules' versions, which a plain dictionary lacks
    state.update(stored)
    rule.load_state_dict(state)
