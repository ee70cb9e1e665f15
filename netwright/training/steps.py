"""The ways from a batch to a step, of which a training takes one."""

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from netwright.errors import Diverged
from netwright.runtime import distributed
from netwright.runtime.random_state import random_state, replaying
from netwright.training.arguments import differentiates, wants_closure
from netwright.training.batches import targets

if TYPE_CHECKING:
    from netwright.training.run import Run


def steps_of(run: "Run") -> "EachBatch | Grouped | Evaluated | Differentiated":
    """Return the way that the optimizer, the processes and `accumulate` ask for."""
    if run.optimizer is not None and differentiates(run.optimizer):
        return Differentiated(run)
    if run.optimizer is not None and wants_closure(run.optimizer):
        return Evaluated(run)
    return Grouped(run) if run.options.accumulate > 1 or run.world > 1 else EachBatch(run)


def step(run: "Run") -> None:
    """Step on the gradients that are there."""
    if run.options.clip is not None:
        nn.utils.clip_grad_norm_(run.parameters, run.options.clip)
    if run.optimizer is not None:
        run.optimizer.step()
    run.end_step()


class EachBatch:
    """A step with the update of one batch."""

    alone = False

    def __init__(self, run: "Run") -> None:
        self.run = run

    def take(self, x: Any, y: Tensor) -> None:
        """Step with the update of one batch."""
        run = self.run
        run.clear()
        run.at.batch += 1
        run.note(run.evaluated(x, y), y.shape[0] if y.ndim else 1, x, y)
        step(run)

    def finish(self) -> None:
        """Leave nothing over at the end of an epoch."""


class Grouped:
    """A step with the updates of several batches, or of several processes."""

    alone = False

    def __init__(self, run: "Run") -> None:
        self.run = run
        self._begin()

    def _begin(self) -> None:
        self.batches = self.samples = 0
        self.last = 0  # samples of the last batch, by which .grad is divided
        self.loss_sum = 0.0
        self.inputs: list[tuple[Any, Tensor]] = []

    def take(self, x: Any, y: Tensor) -> None:
        """Add the update of one batch; step where that completes the group."""
        run, samples = self.run, targets(y)
        if not self.batches:
            run.clear()
        if self.samples and samples and samples != self.last:
            self._scale(self.last / samples)  # so that .grad is always in units of one mean
        if run.world > 1 and run.rule.together:
            self._check_shares(samples)
        self.last = samples or self.last
        self.batches += 1
        self.samples += samples
        run.at.batch += 1
        if samples or run.world == 1:
            self._note(run.evaluated(x, y), samples, x, y)
        if self.batches == run.options.accumulate:
            self._update()

    def finish(self) -> None:
        """Step with the batches that are left over at the end of an epoch."""
        if self.batches:
            self._update()

    def _check_shares(self, samples: int) -> None:
        """Raise ValueError in every process where one has no share of the batch."""
        run = self.run
        (empty,) = distributed.total([float(not samples)], run.device)
        if empty:
            raise ValueError(f"{type(run.rule).__name__} needs a share of every batch in each of "
                             f"the {run.world} processes, and {int(empty)} had none at "
                             f"{run.place()}; use a data set or a batch size that leaves no "
                             "smaller batch at the end")

    def _note(self, loss: Tensor, samples: int, x: Any, y: Tensor) -> None:
        if self.run.world == 1:
            self.run.note(loss, samples, x, y)
        else:
            self.loss_sum += float(loss) * samples
            self.inputs.append((x, y))

    def _update(self) -> None:
        """Step with the gradients of the group's batches."""
        if self.last and self.samples != self.last:
            self._scale(self.last / self.samples)
        if self.run.world > 1:
            self._average()
        self._begin()
        step(self.run)

    def _average(self) -> None:
        run, mean = self.run, self.loss_sum / self.samples if self.samples else 0.0
        loss, samples = distributed.average_gradients(run.parameters, mean, self.samples,
                                                      run.device)
        if not math.isfinite(loss):
            what = f"the loss is {loss} at {run.place()}"
            if math.isfinite(mean):
                raise Diverged(f"{what}: in another process than this, number "
                               f"{distributed.rank()}; {run.last_good()}")
            run.diverged(what, *next(iter(self.inputs)))
        run.add_loss(loss, samples)

    def _scale(self, factor: float) -> None:
        gradients = [p.grad for p in self.run.parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)


class Evaluated:
    """A step of an optimizer that evaluates the loss several times, at weights of its choice."""

    alone = False

    def __init__(self, run: "Run") -> None:
        self.run = run

    def take(self, x: Any, y: Tensor) -> None:
        """Step with a function that puts the batch's update at the weights of now in `.grad`."""
        run, samples, seen = self.run, targets(y), []
        assert run.optimizer is not None

        def closure() -> Tensor:
            run.clear()
            loss = run.evaluated(x, y) if samples or run.world == 1 else torch.zeros(())
            everyone = samples
            if run.world > 1:
                mean, everyone = distributed.average_gradients(run.parameters, float(loss),
                                                               samples, run.device)
                loss = torch.tensor(mean)
            if not math.isfinite(float(loss)):
                run.diverged(f"the loss is {float(loss)} at {run.place()}", x, y)
            seen.append((float(loss), everyone))
            return loss

        run.at.batch += 1
        run.optimizer.step(closure)  # type: ignore[arg-type]
        run.add_loss(*seen[0])
        run.end_step()

    def finish(self) -> None:
        """Leave nothing over at the end of an epoch."""


class Differentiated:
    """A step of an optimizer that differentiates the loss itself."""

    alone = True  # no other process could add its share of the gradient

    def __init__(self, run: "Run") -> None:
        self.run = run

    def take(self, x: Any, y: Tensor) -> None:
        """Step with a function that returns the batch's loss at the weights of now."""
        run, state = self.run, random_state()
        first: list[float] = []
        assert run.optimizer is not None

        def closure() -> Tensor:
            # What a network draws is drawn again, so that the loss is a function of the weights.
            with replaying(state) if first else nullcontext():
                loss = run.evaluated(x, y, graph=True)
            if not first:
                first.append(float(loss.detach()))
                if not math.isfinite(first[0]):
                    run.diverged(f"the loss is {first[0]} at {run.place()}", x, y)
            return loss

        run.clear()
        run.at.batch += 1
        run.optimizer.step(closure)  # type: ignore[arg-type]
        run.add_loss(first[0], targets(y))
        run.end_step()

    def finish(self) -> None:
        """Leave nothing over at the end of an epoch."""
