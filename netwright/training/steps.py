"""The ways from a batch to a step, of which a training takes one."""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

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
        clip(run.parameters, run.options.clip)
    if run.optimizer is not None:
        run.optimizer.step()
    run.end_step()


def clip(parameters: Iterable[Parameter], most: float) -> None:
    """Scale gradients, sparse ones among them, so that their norm is at most `most`."""
    held = [p for p in parameters if p.grad is not None]
    sparse = [p for p in held if p.grad is not None and p.grad.is_sparse]
    if not sparse:
        nn.utils.clip_grad_norm_(held, most)
        return
    for p in sparse:
        assert p.grad is not None
        p.grad = p.grad.coalesce()  # one value for each place, which the norm is taken of
    values: Any = [p.grad.values() if p.grad.is_sparse else p.grad
                   for p in held if p.grad is not None]
    factor = (most / (nn.utils.get_total_norm(values) + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(factor.to(value.device))


class EachBatch:
    """A step with the update of one batch."""

    alone = False

    def __init__(self, run: "Run") -> None:
        self.run = run

    def take(self, x: Any, y: Any) -> None:
        """Step with the update of one batch."""
        run = self.run
        run.clear()
        run.at.batch += 1
        run.note(run.evaluated(x, y), x, y)
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
        self.batches = 0
        self.counted = self.last = 0.0  # in the group, and in the mean that .grad is in units of
        self.loss_sum = 0.0
        self.inputs: list[tuple[Any, Any]] = []

    def take(self, x: Any, y: Any) -> None:
        """Add the update of one batch; step where that completes the group."""
        run = self.run
        if not self.batches:
            run.clear()
        there = bool(targets(y))
        if run.world > 1 and run.rule.together:
            self._check_shares(there)
        self.batches += 1
        run.at.batch += 1
        if there or run.world == 1:
            self._add(x, y)
        elif not run.weigher.settled:
            run.weigher.agree()
        if self.batches == run.options.accumulate:
            self._update()

    def finish(self) -> None:
        """Step with the batches that are left over at the end of an epoch."""
        if self.batches:
            self._update()

    def _check_shares(self, there: bool) -> None:
        """Raise ValueError in every process where one has no share of the batch."""
        run = self.run
        (empty,) = distributed.total([float(not there)], run.device)
        if empty:
            raise ValueError(f"{type(run.rule).__name__} needs a share of every batch in each of "
                             f"the {run.world} processes, and {int(empty)} had none at "
                             f"{run.place()}; use a data set or a batch size that leaves no "
                             "smaller batch at the end")

    def _add(self, x: Any, y: Any) -> None:
        """Add a batch's update to `.grad`, which stays in units of the last batch's mean."""
        run = self.run
        if run.weigher.known:  # what counts is known before, and .grad is scaled in its place
            weight: Any = targets(y)
            self._rescale(weight)
            self._note(run.evaluated(x, y), weight, x, y)
            return
        before = [p.grad for p in run.parameters]
        run.clear()
        loss = run.evaluated(x, y)
        weight = run.weight(loss, x, y)
        self._check_mean()
        fresh = [p.grad for p in run.parameters]
        for p, gradient in zip(run.parameters, before, strict=True):
            p.grad = gradient
        self._rescale(float(weight))
        for p, gradient in zip(run.parameters, fresh, strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad + gradient
        self._note(loss, float(weight), x, y)

    def _check_mean(self) -> None:
        run = self.run
        if run.options.accumulate > 1 and run.weigher.unlike:
            run.clear()
            raise ValueError(f"accumulate={run.options.accumulate} cannot make the step of one "
                             "larger batch, since the loss is neither a mean nor a sum over "
                             f"samples ({run.weigher.unlike}); use larger batches, or a loss "
                             "that is a mean over all of a batch's targets")

    def _rescale(self, weight: float) -> None:
        """Put `.grad` in units of the mean of a batch that counts so much."""
        if self.run.weigher.summed:
            self.counted = self.last = 1.0  # what is added up needs no scale
            return
        if self.counted and weight and weight != self.last:
            self._scale(self.last / weight)
        self.last = weight or self.last
        self.counted += weight

    def _note(self, loss: Tensor, weight: float, x: Any, y: Any) -> None:
        if self.run.world == 1:
            self.run.note_weighed(loss, weight, x, y)
        else:
            self.loss_sum += float(loss) * (1 if self.run.weigher.summed else weight)
            self.inputs.append((x, y))

    def _update(self) -> None:
        """Step with the gradients of the group's batches."""
        if self.last and self.counted != self.last:
            self._scale(self.last / self.counted)
        if self.run.world > 1:
            self._average()
        self._begin()
        step(self.run)

    def _average(self) -> None:
        run, mean = self.run, self.loss_sum / self.counted if self.counted else 0.0
        loss, counted = distributed.average_gradients(run.parameters, mean, self.counted,
                                                      run.device)
        if not math.isfinite(loss):
            what = f"the loss is {loss} at {run.place()}"
            if math.isfinite(mean):
                raise Diverged(f"{what}: in another process than this, number "
                               f"{distributed.rank()}; {run.last_good()}")
            run.diverged(what, *next(iter(self.inputs)))
        if run.weigher.summed:  # each process that has a share counts 1
            self._scale(counted)
            (told,) = distributed.total([float(sum(targets(y) for _, y in self.inputs))],
                                        run.device)
            run.add_loss(loss * counted, told)
        else:
            run.add_loss(loss * counted, counted)

    def _scale(self, factor: float) -> None:
        gradients = [p.grad for p in self.run.parameters if p.grad is not None]
        sparse = [g for g in gradients if g.is_sparse]
        for g in sparse:
            g.mul_(factor)
        dense = [g for g in gradients if not g.is_sparse]
        if dense:
            torch._foreach_mul_(dense, factor)


class Evaluated:
    """A step of an optimizer that evaluates the loss several times, at weights of its choice."""

    alone = False

    def __init__(self, run: "Run") -> None:
        self.run = run

    def take(self, x: Any, y: Any) -> None:
        """Step with a function that puts the batch's update at the weights of now in `.grad`."""
        run, samples, seen = self.run, targets(y), []
        assert run.optimizer is not None

        def closure() -> Tensor:
            run.clear()
            loss = run.evaluated(x, y) if samples or run.world == 1 else torch.zeros(())
            weight = float(run.weight(loss, x, y)) if samples or run.world == 1 else 0.0
            if run.world > 1:
                if not samples and not run.weigher.settled:
                    run.weigher.agree()
                loss, weight = self._averaged(loss, weight)
                if not math.isfinite(float(loss)):
                    run.diverged(f"the loss is {float(loss)} at {run.place()}", x, y)
            seen.append((float(loss), weight))
            return loss

        run.at.batch += 1
        run.optimizer.step(closure)  # type: ignore[arg-type]
        loss, weight = seen[0]
        run.add_loss(loss if run.weigher.summed else loss * weight, weight)
        run.end_step()

    def _averaged(self, loss: Tensor, weight: float) -> tuple[Tensor, float]:
        """Share the update out, weighed by what each process counts."""
        run = self.run
        shares = float(weight > 0) if run.weigher.summed else weight
        mean, counted = distributed.average_gradients(run.parameters, float(loss), shares,
                                                      run.device)
        if run.weigher.summed:
            for p in run.parameters:
                p.grad = None if p.grad is None else p.grad * counted
            (weight,) = distributed.total([weight], run.device)
            return torch.tensor(mean * counted), weight
        return torch.tensor(mean), counted

    def finish(self) -> None:
        """Leave nothing over at the end of an epoch."""


class Differentiated:
    """A step of an optimizer that differentiates the loss itself."""

    alone = True  # no other process could add its share of the gradient

    def __init__(self, run: "Run") -> None:
        self.run = run

    def take(self, x: Any, y: Any) -> None:
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
        weight = float(run.weight(torch.tensor(first[0]), x, y))
        run.add_loss(first[0] if run.weigher.summed else first[0] * weight, weight)
        run.end_step()

    def finish(self) -> None:
        """Leave nothing over at the end of an epoch."""
