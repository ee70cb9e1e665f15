from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.readout import padding_mask, without_padding
from netwright.rules.rule import Rule, chain_of, check_labels, targets
from netwright.runtime.modes import same_buffers
from netwright.runtime.random_state import random_state, same_random_state, set_random_state
from netwright.stages import Stages

__all__ = ["InferenceLearning"]

HALVINGS = 10  # of the first step, before it is given up
TINY = 1e-30


@method(
    "rule",
    papers=["003-179"],
    saves=["backpropagation"],
    needs=["labels", "a chain of stages"],
    variants={"plain": {}, "few large steps": {"rate": 10.0, "steps": 4}},
)
class InferenceLearning(Rule):
    """Let the states settle where a step of the weights would leave them, and take that step.

    E = loss(h_L, y) + sum_i |h_i - f_i(h_{i-1})|^2 / (2 rate n_i), for each target;
    n_i = 1 + |a_i|^2 for stage i's weighted layer on a_i (their sum, of several layers; the mean
    over a sample's positions, tokens or patches, where it has several);
    h_i := f_i(h_{i-1}), and in the first step, the last first,
    d_L = dloss/dh_L, d_{i-1} = (df_i/dh_{i-1})^T d_i, h_i := f_i(h_{i-1}) - s rate n_i d_i;
    then h_i := h_i - s P_i dE/dh_i, all i at once, with P_i = rate n_i, at the output
    1 / (1 + 1 / (rate n_L)); g = dE/dw there, its mean over targets.

    SGD with lr=rate then ends at W + (h_i - f_i) a_i^T / n_i: the least change of W after which
    the layer returns h_i, and its square is |h_i - f_i|^2 / n_i. So E is the loss after the step
    plus the square of the step over 2 rate, and where it is least is the step of implicit SGD,
    w' = w - rate dL/dw at w', whose size stays bounded however large `rate` is. That is exact for
    one sample and stages that begin with their activation, as `nw.stages(network, cuts=...)` can
    cut them; a batch takes the mean of its samples' steps. As `rate` falls to 0, g becomes the
    exact gradient.

    The first step brings every state what the one above it has just been pulled by, so that all
    stages learn however many there are; steps of all states at once carry an error one stage each,
    and `steps` are at least the number of stages; None is 25, or that number if it is larger. A
    step that would raise E is not taken, and s is halved; s starts at `state_rate`, in the first
    step at what is least along it, and grows by a tenth with each step. Other optimizers than SGD,
    or another lr, can take g, but then the weights do not go where the states have settled. Dropout
    keeps one mask for all steps, and running statistics see the forward pass alone.

    Args:
        rate: the step of the weights that E reckons with, above 0; give SGD the same.
        steps: of the states; by default 25, or the number of stages if that is larger.
        state_rate: the first s.

    Shapes: x as the network takes it; h_i as stage i returns it; y as the loss takes it.

    Raises:
        ValueError: `steps` are too few for an error to reach the first stage, or a rate is not
            above 0.

    Paper: Alonso, Millidge, Krichmar, Neftci, 2022, A Theoretical Framework for Inference Learning
    (the variant nearest to implicit SGD, IL-prox; there n_i is a batch's mean and a constant
    while the states settle).

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = InferenceLearning(network)
    >>> x, y = torch.randn(2, 4), torch.tensor([0, 2])
    >>> rule(x, y).requires_grad
    False
    >>> energies = rule.energies(x, y)
    >>> energies == sorted(energies, reverse=True)
    True
    """

    keeps_activations = True
    same_in_shares = False  # steps are shortened by the share's own energy

    def __init__(self, network: nn.Module | Stages, example: Any = None, *, rate: float = 0.1,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy, steps: int | None = None,
                 state_rate: float = 0.5, generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        chain = chain_of(self, network, example, loss)
        steps = max(25, len(chain)) if steps is None else steps
        checks.count(len(chain), steps=steps, advice="an error travels one stage a step and would "
                     f"not reach the first of {len(chain)} stages: raise steps or cut the network "
                     "into fewer stages")
        checks.above(0, rate=rate, state_rate=state_rate, advice="try the default")
        self.stages, self.loss, self.steps = chain, loss, steps
        self.rate, self.state_rate = rate, state_rate

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add g to `.grad`; return the loss of the forward pass."""
        weights = [p for p in self.network.parameters() if p.requires_grad]
        batch = _Batch(self, x, y)
        if weights:
            with batch.undone():
                for _ in range(self.steps):
                    batch.step()
                energy, _ = batch.energy(batch.states)
                gradients = torch.autograd.grad(energy / batch.count, weights, allow_unused=True)
            for parameter, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None \
                        else parameter.grad.add_(gradient)
        return batch.loss

    @torch.inference_mode(False)
    @torch.enable_grad()
    def energies(self, x: Any, y: Tensor) -> list[float]:
        """Return the mean of E over the targets after 0, 1, ..., `steps` steps; change nothing."""
        with same_buffers(self.network), same_random_state():
            batch = _Batch(self, x, y)
            with batch.undone():
                found = [float(batch.lowest)]
                for _ in range(self.steps):
                    batch.step()
                    found.append(float(batch.lowest))
        return [value / float(batch.count) for value in found]


class _Batch:
    """The states of one batch, at first a forward pass's, and the lowest E that they have had."""

    def __init__(self, rule: InferenceLearning, x: Any, y: Tensor) -> None:
        self.rule, self.x, self.y = rule, x, y
        self.context, self.start = rule.stages.context(x), random_state()
        self.states: list[Tensor] = []
        self.dtypes: list[torch.dtype] = []
        h = x
        with torch.no_grad():
            for stage in rule.stages:
                h = stage(h, self.context)
                # Sums of small steps need more digits than autocast's types hold.
                self.states.append(h.to(torch.promote_types(h.dtype, torch.float32)))
                self.dtypes.append(h.dtype)
            if rule.loss is cross_entropy:
                check_labels(y, h.shape[-1])
            self.loss = rule.loss(h, y)
        self.count = targets(h, y)
        self.lowest = self.loss * self.count
        self.size, self.fresh = rule.state_rate, True

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Listen to the weighted layers; put back what the body does to buffers and randomness."""
        self.heard: list[Tensor] = []
        layers = {m for stage in self.rule.stages for part in stage.modules for m in part.modules()
                  if any(p.ndim > 1 for p in m.parameters(recurse=False))}
        handles = [layer.register_forward_pre_hook(self._hear) for layer in layers]
        try:
            with same_buffers(self.rule.network), same_random_state():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def step(self) -> None:
        """Move all states down E, or shorten the next step where this one would raise it."""
        if self.fresh:
            self.fresh = False
            return self._sweep()
        states = [h.detach().requires_grad_() for h in self.states]
        energy, norms = self.energy(states)
        slopes = torch.autograd.grad(energy, states)
        moved = []
        for i, (h, slope, norm) in enumerate(zip(states, slopes, norms, strict=True)):
            soft = self.rule.rate * _rows(norm, h)
            soft = 1 / (1 + 1 / soft) if i == len(states) - 1 else soft
            moved.append((h - self.size * soft * slope).detach())
        if self._reached(moved):
            self.size *= 1.1
        else:
            self.size /= 2
        return None

    def energy(self, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the sum of E over the targets, and each stage's n for each sample."""
        energy, norms = self.rule.loss(states[-1], self.y) * self.count, []
        for state, (output, norm) in zip(states, self._runs(states), strict=True):
            error = without_padding(self.x, state - output)
            squares = error.square().flatten(1).sum(1) if error.ndim > 1 else error.square()
            energy = energy + (squares / (2 * self.rule.rate * norm)).sum()
            norms.append(norm)
        return energy, norms

    def _sweep(self) -> None:
        """Move the last state first, and each other by what pulls at the one above it."""
        states = [h.detach().requires_grad_() for h in self.states]
        loss = self.rule.loss(states[-1], self.y) * self.count
        pulls = list(torch.autograd.grad(loss, states[-1]))
        outputs, norms = zip(*self._runs(states), strict=True)
        for output, state in zip(outputs[:0:-1], states[-2::-1], strict=True):
            pulls.insert(0, torch.autograd.grad(output, state, pulls[0].to(output.dtype),
                                                materialize_grads=True)[0])
        steps = [self.rule.rate * _rows(norm, pull) * without_padding(self.x, pull)
                 for norm, pull in zip(norms, pulls, strict=True)]
        # where a loss that bends as the output's square would be least along these
        fall = torch.stack([(pull * step).sum() for pull, step in zip(pulls, steps, strict=True)])
        size = 1 / (1 + fall.sum() / pulls[-1].square().sum().clamp_min(TINY))
        for _ in range(HALVINGS):
            with torch.no_grad():
                moved: list[Tensor] = []
                for step, (output, _) in zip(steps, self._runs(moved), strict=True):
                    moved.append(output.to(step.dtype) - size * step)
            if self._reached(moved):
                return
            size = size / 2

    def _reached(self, states: list[Tensor]) -> bool:
        """Take `states` unless they would raise E; return whether they were taken."""
        with torch.no_grad():
            energy, _ = self.energy(states)
        if taken := bool(energy <= self.lowest):
            self.states, self.lowest = states, energy
        return taken

    def _runs(self, states: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each stage's output and n; `states` may grow while they are asked for."""
        set_random_state(self.start)
        h = self.x
        for i, (stage, dtype) in enumerate(zip(self.rule.stages, self.dtypes, strict=True)):
            self.heard.clear()
            output = stage(h, self.context)
            wide = torch.promote_types(output.dtype, torch.float32)
            norm = torch.ones(len(output), dtype=wide, device=output.device)
            for squares in self.heard:
                norm = norm + (squares if len(squares) == len(norm) else squares.mean())
            yield output, norm
            h = states[i].to(dtype)

    def _hear(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Note |a|^2 for each sample, the mean over the tokens or the patches that are read."""
        if not (arguments and isinstance(arguments[0], Tensor)
                and arguments[0].is_floating_point()):
            return
        a = arguments[0].to(torch.promote_types(arguments[0].dtype, torch.float32))
        kernel = getattr(layer, "kernel_size", None)
        mask = padding_mask(self.x, a)
        reads: float = 1.0
        places: float | Tensor = prod(a.shape[1:-1])
        if mask is not None:
            a, places = without_padding(self.x, a), (mask != 0).sum(1).clamp(min=1)
        elif isinstance(kernel, tuple):  # a number is read once for each place it has in a patch
            reads, places = prod(kernel) / getattr(layer, "groups", 1), prod(a.shape[2:])
        self.heard.append(a.square().flatten(1).sum(1) * reads / places)


def _rows(norm: Tensor, h: Tensor) -> Tensor:
    return norm.detach().view(-1, *[1] * (h.ndim - 1))
