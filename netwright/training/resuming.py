"""What a training keeps in its checkpoint, and how it goes on from there."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from netwright.errors import CorruptCheckpoint
from netwright.rules.rule import Rule
from netwright.runtime import distributed
from netwright.runtime.random_state import every_random_state, set_every_random_state
from netwright.training.arguments import stepped
from netwright.training.checkpoints import FILE, load, save, tidy
from netwright.training.history import Epoch

if TYPE_CHECKING:
    from netwright.training.run import Run


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
    if distributed.rank() == 0:
        save(run.options.folder, {
            "run": description(run), "at": asdict(run.at), "best": run.best,
            "history": [asdict(epoch) for epoch in run.history.epochs],
            "rule": dict(run.rule.state_dict()),
            "optimizer": None if run.optimizer is None else run.optimizer.state_dict(),
            "scheduler": None if run.scheduler is None else run.scheduler.state_dict(),
            "random_start": run.random_start, "random_now": now, "weigher": run.weigher.state()})
    run.saved = (run.at.epoch, run.at.step)


def take_up(run: "Run", stored: dict[str, Any]) -> None:
    """Put a training where its checkpoint was written.

    Raises:
        CorruptCheckpoint: it is another training's.
    """
    path = Path(str(run.options.folder)) / FILE
    different = difference(stored["run"], description(run))
    if different is not None:
        raise CorruptCheckpoint(f"{path} belongs to another training: {different}; give this "
                                "one another checkpoint=, or delete that folder")
    set_weights(run.rule, stored["rule"])
    if run.optimizer is not None:
        run.optimizer.load_state_dict(stored["optimizer"])
    if run.scheduler is not None:
        run.scheduler.load_state_dict(stored["scheduler"])
    run.at, run.best = type(run.at)(**stored["at"]), stored["best"]
    run.history.epochs = [Epoch(**epoch) for epoch in stored["history"]]
    run.random_start = stored["random_start"]
    run.weigher.put_back(stored["weigher"])
    set_every_random_state(stored["random_now"][distributed.rank()], run.generators)
    run.saved = (run.at.epoch, run.at.step)
    if distributed.rank() == 0:
        tidy(str(run.options.folder))


def description(run: "Run") -> dict[str, Any]:
    """Return what a checkpoint must agree with to be this training's."""
    options, optimizer, data = run.options, run.optimizer, run.train
    return {
        "rule": type(run.rule).__name__,
        "weights": {name: str(value.dtype) if name in run.rule.resized
                    else f"{value.dtype} {tuple(value.shape)}"
                    for name, value in run.rule.state_dict().items()
                    if isinstance(value, Tensor)},
        "optimizer": {"type": type(optimizer).__name__,
                      **{key: repr(value) for key, value in
                         (optimizer.defaults if optimizer else {}).items()
                         if value is not None and value is not False}},
        "optimized parameters": len(stepped(optimizer)),
        "scheduler": type(run.scheduler).__name__,
        "scheduler_unit": options.scheduler_unit,
        "train": {"type": type(data).__name__, "batches": run.batches,
                  **{key: getattr(data, key) for key in ("batch_size", "seed", "shuffle")
                     if isinstance(getattr(data, key, None), int)}},
        "validation": run.validation is not None, "metric": run.history.metric,
        "patience": options.patience, "accumulate": options.accumulate, "clip": options.clip,
        "autocast": str(options.autocast), "seed": options.seed, "processes": run.world,
        "generators": len(run.generators),
    }


def random_states(run: "Run") -> list[dict[str, Any]]:
    """Return the random states of every process."""
    mine = every_random_state(run.generators)
    return distributed.gather(mine) if run.world > 1 else [mine]


def set_weights(rule: Rule, stored: dict[str, Any]) -> None:
    """Put stored weights into a rule."""
    state = rule.state_dict()  # holds the modules' versions, which a plain dictionary lacks
    state.update(stored)
    rule.load_state_dict(state)


def difference(there: Any, here: Any, name: str = "") -> str | None:
    """Return in words the first difference between two nested dictionaries, None if none."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            found = difference(there.get(key), here.get(key), f"{name}.{key}" if name else key)
            if found is not None:
                return found
        return None
    return None if there == here else f"its {name} is {there}, here it is {here}"
