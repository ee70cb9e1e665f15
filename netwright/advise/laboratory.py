"""Where recipes are carried out on a copy of the model, and what comes out is measured."""

import hashlib
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netwright.advise.candidates import OFFERED
from netwright.advise.figures import Figures, dtypes, figures, once, only_dtype, ratio, times
from netwright.advise.material import Material, first_rows, joined
from netwright.advise.quality import Judge, score, targets_of
from netwright.compare.apply import apply
from netwright.compare.recipe import Recipe
from netwright.compare.steps import Step
from netwright.compare.supplies import constant, supplied
from netwright.reshape import load, save
from netwright.runtime.random_state import same_random_state

WORTH = 1.0  # seconds of work from which on a step's result is kept on disk
KEPT = 24  # results of steps that are kept
TURNS = 5  # of a screening's timing
AGAIN = 1.0  # seconds after which a try that goes on is told once more to end
HOPELESS = 5  # times of the original's answer above which nothing more is looked at
SLOW = 0.2  # seconds of an answer from which on there are fewer


class TimeUp(BaseException):
    """The time that a try may take is over."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the body when its time is over, where this is the main thread."""
    if not math.isfinite(seconds) or threading.current_thread() is not threading.main_thread() \
            or not hasattr(signal, "setitimer"):
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise TimeUp

    def unheard(lost: Any) -> None:
        if lost.exc_type is not TimeUp:
            hook(lost)
    hook, sys.unraisablehook = sys.unraisablehook, unheard
    before = signal.signal(signal.SIGALRM, end)
    start = time.monotonic()
    # Again and again, since what is raised while the collector runs is lost.
    left, every = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = hook
        if left:  # somebody else's alarm
            signal.setitimer(signal.ITIMER_REAL,
                             max(left - (time.monotonic() - start), 1e-3), every)


class Laboratory:
    """The original, the data and the judge, and what has been made of the original so far."""

    def __init__(self, model: nn.Module, material: Material, judge: Judge, *, folder: Path,
                 batch: int, seed: int, screening: int, calibration: int) -> None:
        self.model, self.material, self.judge, self.seed = model, material, judge, seed
        self.folder = folder
        self.x = joined(material.screening, batch)
        self.screening = first_rows(material.screening, screening)
        self.inputs = [x for x, _ in first_rows(material.calibration, calibration)]
        self.targets = targets_of(judge, self.screening)
        self.reference = judge.outputs(model, self.screening)
        self.original: Figures = figures(model, self.x)
        self.original["inference_time"] = min(times([model], self.x, TURNS)[0])
        self._last: tuple[str, nn.Module] | None = None

    def tried(self, recipe: Recipe) -> dict[str, Any]:
        """Carry out a recipe and return what it costs and gives, as plain data."""
        start = time.perf_counter()
        changed = self.carry_out(recipe)
        made = time.perf_counter()
        found = self.screened(changed)
        return {**found, "seconds_to_make": made - start,
                "seconds": time.perf_counter() - start}

    def screened(self, changed: nn.Module) -> dict[str, Any]:
        """Return the figures of a changed model, its quality on the samples for screening."""
        spent = once(changed, self.x)
        if spent > max(SLOW, HOPELESS * self.original["inference_time"]):
            raise ValueError(f"an answer takes {spent / self.original['inference_time']:.0f} times "
                             "the original's on this machine")
        quality = score(self.judge, self.reference,
                        self.judge.outputs(changed, self.screening), self.targets)
        if not math.isfinite(quality):
            raise ValueError("the changed model's outputs are not finite, or all alike")
        held: Figures = figures(changed, self.x)
        shares = {name: value / self.original[name] for name, value in held.items()
                  if self.original.get(name)}
        turns = TURNS if self.original["inference_time"] < SLOW else TURNS // 2
        shares["inference_time"] = ratio(times([self.model, changed], self.x, turns))
        held["inference_time"] = shares["inference_time"] * self.original["inference_time"]
        return {"quality": quality, "figures": held, "shares": shares, "dtypes": dtypes(changed),
                "plain_dtype": only_dtype(self.model, changed),
                "same_class": type(changed) is type(self.model)}

    def carry_out(self, recipe: Recipe) -> nn.Module:
        """Return the original as a recipe changes it, from the last step that is known."""
        steps = recipe.network
        for known in range(len(steps), 0, -1):
            model = self._known(steps[:known])
            if model is not None:
                break
        else:
            known, model = 0, self.model
        for number in range(known, len(steps)):
            start = time.perf_counter()
            model = self._step(model, steps[number])
            self._keep(steps[:number + 1], model, time.perf_counter() - start)
        return model

    def _step(self, model: nn.Module, step: Step) -> nn.Module:
        inputs = self.inputs
        with same_random_state():
            torch.manual_seed(self.seed)
            if hasattr(step.what, "decide"):
                offers = dict(zip(OFFERED, (inputs[0], inputs, self.model, inputs), strict=True))
                made = step.what(model, **supplied(step, constant(offers)))
            else:
                made = apply(Recipe((step,)), model, inputs)
        if not isinstance(made, nn.Module):
            raise ValueError(f"{step.name} returned {type(made).__name__}, which is no network")
        return made.eval()

    def _keep(self, steps: Sequence[Step], model: nn.Module, seconds: float) -> None:
        self._last = self._key(steps), model
        if seconds < WORTH:
            return
        folder = self.folder / self._key(steps)
        with suppress(ValueError, TypeError, OSError):  # which the finalists say, if it matters
            save(model, folder)
            held = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime)
            for path in held[:-KEPT]:
                shutil.rmtree(path, ignore_errors=True)

    def _known(self, steps: Sequence[Step]) -> nn.Module | None:
        key = self._key(steps)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        self._last = None  # or it would be a third model in memory
        folder = self.folder / key
        if not folder.is_dir():
            return None
        try:
            return loaded(folder, self.model)
        except Exception:  # whatever is wrong with it, it can be made again
            shutil.rmtree(folder, ignore_errors=True)
            return None

    def _key(self, steps: Sequence[Step]) -> str:
        text = " + ".join(map(str, steps)) + f" {self.seed}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def forget(self) -> None:
        """Let go of the model that was made last."""
        self._last = None


def loaded(folder: Path, original: nn.Module) -> nn.Module:
    """Return a saved model, built from what the folder says or, where that is little, anew."""
    try:
        return load(folder).eval()
    except ValueError:
        return load(folder, original).eval()


def digest(model: nn.Module) -> str:
    """Return what changes where a weight of a model, or its class, does."""
    held = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        held.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        held.update(flat.view(torch.uint8).numpy().data)
    return held.hexdigest()[:16]
