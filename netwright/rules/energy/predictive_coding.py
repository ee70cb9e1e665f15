from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.readout import without_padding
from netwright.rules.rule import Rule, chain_of, check_labels, targets
from netwright.runtime.modes import same_buffers
from netwright.runtime.random_state import (
    random_state,
    same_draws,
    same_random_state,
    set_random_state,
)
from netwright.stages import Stages

__all__ = ["PredictiveCoding"]


@method(
    "rule",
    papers=["003-167"],
    saves=["backpropagation"],
    needs=["labels", "a chain of stages"],
    variants={"plain": {}, "incremental": {"incremental": True}},
)
class PredictiveCoding(Rule):
    """Let the states settle where the stages are least surprised, then learn from what is left.

    F = sum_{i<L} 1/2 |h_i - f_i(h_{i-1})|^2 + nudge loss(f_L(h_{L-1}), y), for each target;
    h_i := f_i(h_{i-1}), then `steps` times h_i := h_i - state_rate dF/dh_i, all i at once;
    g = dF/dw / nudge at the settled states, its mean over the targets.

    With `incremental`, each step also does w := w - weight_rate dF/dw / nudge, and g is the sum
    over the steps. The weights are put back before the rule returns: SGD with lr=weight_rate
    then ends where those steps did, and any other optimizer can take g.

    An error travels one stage a step: `steps` are by default 2 (L - 2), and never fewer than let
    the first stage learn. A small `nudge` brings g near the exact gradient. `loss` is a mean over
    targets: labels other than -100, or rows of the network's output where y does not hold whole
    numbers. Dropout keeps one mask for all steps, and running statistics see the forward pass
    alone.

    Args:
        steps: of the states; by default 2 (L - 2), and enough for the first stage to learn.
        state_rate: the length of a step of the states, above 0.
        nudge: the weight of the loss, above 0.
        incremental: whether the weights learn with every step of the states.
        weight_rate: the length of those steps of the weights.

    Shapes: x as the network takes it; h_i as stage i returns it; y as the loss takes it.

    Raises:
        ValueError: `steps` are too few for an error to reach the first stage, or a rate or
            `nudge` is not above 0.

    Papers: Whittington, Bogacz, 2017, An Approximation of the Error Backpropagation Algorithm in
    a Predictive Coding Network with Local Hebbian Synaptic Plasticity; with `incremental`
    Salvatori et al., 2024, A Stable, Fast, and Fully Automatic Learning Algorithm for Predictive
    Coding Networks.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = PredictiveCoding(network)
    >>> x, y = torch.randn(2, 4), torch.tensor([0, 2])
    >>> rule(x, y).requires_grad
    False
    >>> energies = rule.energies(x, y)
    >>> energies == sorted(energies, reverse=True)
    True
    """

    @property
    def same_in_shares(self) -> bool:  # type: ignore[override]
        """Not where weights move within a batch, by what is seen of it."""
        return not self.incremental

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 steps: int | None = None, state_rate: float = 0.05, nudge: float = 1.0,
                 incremental: bool = False, weight_rate: float = 0.001,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        chain = chain_of(self, network, example, loss)
        least = len(chain) if incremental else len(chain) - 1
        steps = max(least, 2 * len(chain) - 4) if steps is None else steps
        checks.count(least, steps=steps, advice="an error travels one stage a step and would not "
                     f"reach the first of {len(chain)} stages: raise steps or cut the network "
                     "into fewer stages")
        checks.above(0, state_rate=state_rate, nudge=nudge, weight_rate=weight_rate,
                     advice="try the default")
        self.stages, self.loss, self.steps, self.state_rate = chain, loss, steps, state_rate
        self.nudge, self.incremental, self.weight_rate = nudge, incremental, weight_rate

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add g to `.grad`; return the loss of the forward pass."""
        batch = _Batch(self, x, y)
        loss = batch.loss.detach()
        with batch.undone():
            for _ in range(self.steps):
                batch.step()
            if not self.incremental:
                batch.learn()
        for parameter, total in batch.totals.items():
            if parameter.grad is None:
                parameter.grad = total
            else:
                parameter.grad.add_(total)
        return loss

    @torch.inference_mode(False)
    @torch.enable_grad()
    def energies(self, x: Any, y: Tensor) -> list[float]:
        """Return the mean of F over the targets after 0, 1, ..., `steps` steps; change nothing."""
        with same_buffers(self.network), same_random_state():
            batch = _Batch(self, x, y)
            with batch.undone():
                found = [batch.energy()]
                for _ in range(self.steps):
                    batch.step()
                    found.append(batch.energy())
        return found


class _Batch:
    """The states of one batch, at first a forward pass's, and what the stages predict from them.

    `inputs[i]` is what stage i reads and `outputs[i]` what it makes of that, in a graph of the
    stage's own. An error has reached the stages from `reach` on; those below still predict their
    states exactly, and neither they nor their graphs are touched.
    """

    def __init__(self, rule: PredictiveCoding, x: Any, y: Tensor) -> None:
        self.rule, self.y = rule, y
        self.context = rule.stages.context(x)
        self.inputs: list[Any] = [x]
        self.outputs: list[Tensor] = []
        states = [random_state()]
        for i, stage in enumerate(rule.stages):
            output = stage(self._input(i), self.context)
            self.outputs.append(output)
            # Sums of small steps need more digits than autocast's types hold.
            wide = torch.promote_types(output.dtype, torch.float32)
            self.inputs.append(output.detach().to(wide).requires_grad_())
            states.append(random_state())
        self.inputs.pop()
        self.drawn = {i: before for i, (before, after) in enumerate(pairwise(states))
                      if not same_draws(before, after)}
        if rule.loss is cross_entropy:
            check_labels(y, self.outputs[-1].shape[-1])
        self.loss = rule.loss(self.outputs[-1], y)
        self.scale = rule.nudge * targets(self.outputs[-1], y).to(self.loss.dtype)
        self.weights = [p for p in rule.network.parameters() if p.requires_grad]
        self.totals: dict[nn.Parameter, Tensor] = {}
        self.stale = self.reach = len(rule.stages)
        if rule.incremental:
            self.totals = {p: torch.zeros_like(p) for p in self.weights}
            users = [p for stage in rule.stages for p in stage.parameters()]
            if len(users) > len(set(users)):  # a step on a late stage's weights is felt early
                self.reach = 1

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Put back what the body does to weights, buffers and random states."""
        before = [p.detach().clone() for p in self.totals]
        with same_buffers(self.rule.network), same_random_state():
            try:
                yield
            finally:
                with torch.no_grad():
                    for parameter, value in zip(self.totals, before, strict=True):
                        parameter.copy_(value)
                torch.clear_autocast_cache()

    def step(self) -> None:
        """Move the states, and the weights of the incremental variant, down the energy."""
        self._refresh()
        rule, last = self.rule, len(self.outputs) - 1
        self.reach = max(self.reach - 1, 0)
        errors, outputs, signals = self._errors(self.reach)
        moved = range(max(self.reach, 1), last + 1)
        wanted = [self.inputs[i] for i in moved] + list(self.totals)
        if not wanted:
            return
        gradients = torch.autograd.grad(outputs, wanted, signals, allow_unused=True)
        for i, gradient in zip(moved, gradients, strict=False):
            h = torch.addcmul(self.inputs[i].detach(), gradient, rule.state_rate * self.scale,
                              value=-1)
            if i - 1 in errors:
                h.sub_(errors[i - 1], alpha=rule.state_rate)
            self.inputs[i] = h.requires_grad_()
        with torch.no_grad():
            for (parameter, total), gradient in zip(self.totals.items(), gradients[len(moved):],
                                                    strict=True):
                if gradient is not None:
                    total += gradient
                    parameter.sub_(gradient, alpha=rule.weight_rate)
        if self.totals:
            torch.clear_autocast_cache()  # it holds the weights as they were before the step
        self.stale = self.reach if self.totals else moved.start

    def learn(self) -> None:
        """Add dF/dw at the states to `.grad`."""
        self._refresh()
        _, outputs, signals = self._errors(0)
        if self.weights:
            torch.autograd.backward(outputs, signals, inputs=self.weights)

    def energy(self) -> float:
        """Return F at the states, its mean over the targets."""
        self._refresh()
        squares = sum(error.square().sum() for error in self._errors(max(self.reach - 1, 0))[0]
                      .values())
        return self.rule.nudge * float(self.loss.detach() + squares / (2 * self.scale))

    def _errors(self, start: int) -> tuple[dict[int, Tensor], list[Tensor], list[Tensor | None]]:
        """Return the stages' errors, and what is to be differentiated with which weights."""
        last = len(self.outputs) - 1
        errors = {i: without_padding(self.inputs[0], self.inputs[i + 1].detach()
                                     - self.outputs[i].detach()) for i in range(start, last)}
        learnt = [i for i in errors if self.outputs[i].requires_grad]
        signals = [(errors[i] / -self.scale).to(self.outputs[i].dtype) for i in learnt]
        return errors, [*(self.outputs[i] for i in learnt), self.loss], [*signals, None]

    def _refresh(self) -> None:
        """Run the stages again whose states or weights have moved."""
        for i in range(self.stale, len(self.outputs)):
            if i in self.drawn:
                set_random_state(self.drawn[i])
            self.outputs[i] = self.rule.stages[i](self._input(i), self.context)
        if self.stale < len(self.outputs):
            self.loss = self.rule.loss(self.outputs[-1], self.y)
        self.stale = len(self.outputs)

    def _input(self, i: int) -> Any:
        if i == 0:
            return self.inputs[0]
        # A view, since PyTorch's FLOP counter cannot hook a leaf that autograd.grad is asked for.
        return self.inputs[i].view_as(self.inputs[i]).to(self.outputs[i - 1].dtype)
