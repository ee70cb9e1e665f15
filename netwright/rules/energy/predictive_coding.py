from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import ceil
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

START = 0.2  # of the states' rate, stable where stages stretch a change by up to twice its size
RISE = 1e-3  # of the energy: states that swing by less, as at the kink of a ReLU, are left alone


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

    An error travels one stage a step, and `state_rate` of it, so that by default there are as many
    steps as bring most of it to the first stage. Without a `state_rate` it starts at 0.2 for each
    batch and is halved whenever F has risen by more than a thousandth. A small `nudge` brings g
    near the exact gradient. `loss` is a mean over targets: labels other than -100, or rows of the
    network's output where y does not hold whole numbers. Dropout keeps one mask for all steps, and
    running statistics see the forward pass alone.

    Args:
        steps: of the states; by default 1.5 (L - 1) / 0.2, or `state_rate` in its place if it is
            given.
        state_rate: the length of a step of the states, above 0; by default it follows F.
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
        """Not where weights or the states' rate follow what is seen of a batch."""
        return not self.incremental and self.state_rate is not None

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 steps: int | None = None, state_rate: float | None = None, nudge: float = 1.0,
                 incremental: bool = False, weight_rate: float = 0.001,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        chain = chain_of(self, network, example, loss)
        least = len(chain) if incremental else len(chain) - 1
        checks.above(0, state_rate=state_rate, advice="try the default", optional=True)
        if steps is None:
            steps = max(least, ceil(1.5 * (len(chain) - 1) / (state_rate or START)))
        checks.count(least, steps=steps, advice="an error travels one stage a step and would not "
                     f"reach the first of {len(chain)} stages: raise steps or cut the network "
                     "into fewer stages")
        checks.above(0, nudge=nudge, weight_rate=weight_rate,
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
    """The states of one batch, at first a forward pass's, and one stage at a time between them.

    `inputs[i]` is what stage i reads. An error has reached the stages from `reach` on; those below
    still predict their states exactly and are not touched. `first[i]` is what the forward pass
    made, in a graph of the stage's own, until it is used: of all other graphs, errors and
    gradients there are never more than one stage's.
    """

    def __init__(self, rule: PredictiveCoding, x: Any, y: Tensor) -> None:
        self.rule, self.y = rule, y
        self.context = rule.stages.context(x)
        self.inputs: list[Any] = [x]
        self.dtypes: list[torch.dtype] = []
        self.first: dict[int, Tensor] = {}
        states = [random_state()]
        for i, stage in enumerate(rule.stages):
            output = stage(self._input(i), self.context)
            self.first[i] = output
            self.dtypes.append(output.dtype)
            # Sums of small steps need more digits than autocast's types hold.
            wide = torch.promote_types(output.dtype, torch.float32)
            self.inputs.append(output.detach().to(wide).requires_grad_())
            states.append(random_state())
        self.inputs.pop()
        self.drawn = {i: before for i, (before, after) in enumerate(pairwise(states))
                      if not same_draws(before, after)}
        if rule.loss is cross_entropy:
            check_labels(y, output.shape[-1])
        loss = rule.loss(output, y)
        self.loss = loss.detach()
        self.scale = rule.nudge * targets(output, y).to(loss.dtype)
        self.rate = torch.tensor(START if rule.state_rate is None else rule.state_rate).to(
            loss.device, torch.promote_types(loss.dtype, torch.float32))
        self.lowest = torch.full_like(self.loss, torch.inf)
        self.weights = [p for p in rule.network.parameters() if p.requires_grad]
        self.totals: dict[nn.Parameter, Tensor] = {}
        self.reach = len(rule.stages)
        users = Counter(p for stage in rule.stages for p in stage.parameters())
        self.shared = {p for p, count in users.items() if count > 1}
        if rule.incremental:
            self.totals = {p: torch.zeros_like(p) for p in self.weights}
            if self.shared:  # a step on a late stage's weights is felt early
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
        self.reach = max(self.reach - 1, 0)
        error: Tensor | None = None  # of the stage before, at the states as they were
        moves: dict[nn.Parameter, Tensor] = {}
        squares: Tensor | float = 0.0
        for i in range(self.reach, len(self.rule.stages)):
            weights = [p for p in self.rule.stages[i].parameters() if p in self.totals]
            wanted = [*([self.inputs[i]] if i else []), *weights]
            output = self._output(i, keep=not wanted)
            root, signal, here = self._pull(i, output)
            if here is not None:
                squares = squares + here.square().sum()
            gradients = list(torch.autograd.grad(root, wanted, signal, allow_unused=True)
                             if root.requires_grad and wanted else [None] * len(wanted))
            if i:
                self.inputs[i] = self._moved(self.inputs[i].detach(), gradients.pop(0), error)
            self._learn_now(dict(zip(weights, gradients, strict=True)), moves)
            error = here
        self._step_weights(moves)
        if self.rule.state_rate is None:
            energy = (self.scale * root.detach() + squares / 2).detach()
            self.rate = torch.where(energy > self.lowest * (1 + RISE), self.rate / 2,
                                    self.rate)
            self.lowest = torch.minimum(energy, self.lowest)

    def learn(self) -> None:
        """Add dF/dw at the states to `.grad`."""
        for i in range(len(self.rule.stages)):
            root, signal, _ = self._pull(i, self._output(i))
            if self.weights and root.requires_grad:
                torch.autograd.backward(root, signal, inputs=self.weights)

    @torch.no_grad()
    def energy(self) -> float:
        """Return F at the states, its mean over the targets."""
        squares: Tensor | float = 0.0
        for i in range(max(self.reach - 1, 0), len(self.rule.stages)):
            root, _, error = self._pull(i, self._output(i, keep=True))
            squares = squares if error is None else squares + error.square().sum()
        return self.rule.nudge * float(root + squares / (2 * self.scale))

    def _pull(self, i: int, output: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return what of stage i is differentiated, with which weights, and the stage's error."""
        if i == len(self.rule.stages) - 1:
            return self.rule.loss(output, self.y), None, None
        error = without_padding(self.inputs[0], self.inputs[i + 1].detach() - output.detach())
        return output, (error / -self.scale).to(output.dtype), error

    def _moved(self, h: Tensor, gradient: Tensor | None, error: Tensor | None) -> Tensor:
        """Return a state after a step: by what pulls from above, and from its own stage."""
        if gradient is not None:
            h = torch.addcmul(h, gradient, self.rate * self.scale, value=-1)
        if error is not None:
            h = torch.addcmul(h, error, self.rate.to(error), value=-1)
        return h.requires_grad_()

    def _learn_now(self, gradients: dict[nn.Parameter, Tensor | None],
                   later: dict[nn.Parameter, Tensor]) -> None:
        """Step the weights of one stage, and those that others use too not before all have run."""
        now = {p: g for p, g in gradients.items() if g is not None}
        for p in [p for p in now if p in self.shared]:
            later[p] = later[p] + now.pop(p) if p in later else now.pop(p)
        self._step_weights(now)

    @torch.no_grad()
    def _step_weights(self, moves: dict[nn.Parameter, Tensor]) -> None:
        for parameter, gradient in moves.items():
            self.totals[parameter] += gradient
            parameter.sub_(gradient, alpha=self.rule.weight_rate)
        if moves:
            torch.clear_autocast_cache()  # it holds the weights as they were before the step

    def _output(self, i: int, *, keep: bool = False) -> Tensor:
        """Return what stage i makes of its input: at first the forward pass's, then run again."""
        if i in self.first:
            return self.first[i] if keep else self.first.pop(i)
        if i in self.drawn:
            set_random_state(self.drawn[i])
        return self.rule.stages[i](self._input(i), self.context)

    def _input(self, i: int) -> Any:
        if i == 0:
            return self.inputs[0]
        # A view, since PyTorch's FLOP counter cannot hook a leaf that autograd.grad is asked for.
        return self.inputs[i].view_as(self.inputs[i]).to(self.dtypes[i - 1])
