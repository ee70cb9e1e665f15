from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import torch
from torch import Generator, Tensor, distributed, nn
from torch.nn import functional
from torch.optim import Optimizer

from netwright import checks
from netwright.anatomy.units import Units, hidden_units
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.rule import Rule, checked, targets
from netwright.runtime.distributed import world
from netwright.runtime.modes import evaluating
from netwright.stages import Stages, call

__all__ = ["BoostedUnits"]


@method(
    "rule",
    papers=["004-020"],
    saves=["inference time"],
    needs=["labels"],
    search={"steps": [25, 100]},
    variants={"plain": {}, "groups": {"units": 5, "steps": 1}},
)
class BoostedUnits(Rule):
    """Train the last hidden layer a few units at a time, each on what those before leave wrong.

    F_t = F_{t-1} + rho_t g_t,  g_t(x) = W_t h_t(x) + b_t,  h_t the `units` units of group t;
    group t descends mean |r - g_t|²/2 for `steps` steps, r = -n dL/dF at F_{t-1} (for the
    cross-entropy: the label less the prediction), n the number of targets in the batch;
    rho_t = -L'(0) / L''(0) along g_t, halved until L is no higher than at F_{t-1}.

    The output layer's weights are [rho_t W_t], its bias F_0 + sum of rho_t b_t, where F_0 is the
    bias that the network comes with. Groups before t stay as they are, and those after it are
    silent: the constructor sets their outgoing weights to 0 and keeps the drawn ones until their
    turn. rho_t is computed on the batch that comes after the group's last step. Layers below the
    last hidden one are shared by all groups, so they learn with the first group and then stay.
    After the last group's steps it goes on with the last group alone, on the loss itself.

    Optimizers with a memory or weight decay move weights without a gradient: what should stay is
    put back at the next call, and before `predict` and `truncate`. Set `optimizer` to yours, as
    `nw.fit` does, and its averages begin at 0 with each group, so that momentum moves none. Not
    for L-BFGS.

    A step is a call that finds gradients cleared. `group` and `calls` count groups and steps.

    Args:
        units: of a group.
        steps: in which a group learns.

    Shapes: h_t (*, units); W_t (outputs, units); r and g_t (*, outputs). The last group has fewer
    units where `units` does not divide the layer. A channel counts as a unit, in all its places.

    Raises:
        ValueError: an option is out of range, there is no example, all is frozen, or the layer
            that makes the output is not linear or reads no hidden units.

    Paper: Emami, Martínez-Muñoz, 2023, Sequential Training of Neural Networks with Gradient
    Boosting.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = BoostedUnits(network, torch.randn(2, 4), units=2, steps=1)
    >>> for _ in range(3):
    ...     rule.zero_grad()
    ...     loss = rule(torch.randn(2, 4), torch.tensor([0, 2]))
    >>> network[2].weight.any(0).tolist()
    [True, True, True, True, True, True, False, False]
    """

    together = True
    remembers = True
    optimizer: Optimizer | None = None

    group: Tensor
    calls: Tensor
    columns: Tensor
    biases: Tensor | None

    def __init__(self, network: nn.Module | Stages, example: Any = None, *, units: int = 4,
                 steps: int = 100, loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        if example is None:
            raise ValueError("example must be an input of the network, in which hidden units are "
                             "looked for, got None; give a batch")
        self.hidden = _last_hidden(self.network, example)
        reader: Any = self.hidden.reader
        count = self.hidden.count
        checks.between(1, count, whole=True, units=units,
                       advice=f"the last hidden layer, {self.hidden.name!r}, has {count} units; "
                              f"try {max(1, count // 8)}")
        checks.count(1, steps=steps, advice="they are for each group; try 100")
        if not reader.weight.requires_grad:
            raise ValueError("network has an output layer that is frozen, which no group can speak "
                             "through; set requires_grad on its weight")
        self.units, self.steps, self.loss = units, steps, loss
        self.groups = -(-count // units)
        places = torch.arange(reader.in_features, device=reader.weight.device)
        self.register_buffer("columns", self.hidden.outgoing(places[None])[0], persistent=False)
        for name in ("group", "calls"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long,
                                                   device=reader.weight.device))
        # What the bias was before each group; and what stays, or in the last one waits, by units.
        self.register_buffer("biases", None if reader.bias is None else
                             reader.bias.detach().repeat(self.groups, 1))
        for i, view in enumerate(self._views()):
            self.register_buffer(f"kept_{i}", view.clone())
        self._put_back()

    def stepped_by(self, optimizer: Optimizer) -> None:
        """Be told which optimizer will step, whose averages of renewed weights begin again."""
        self.optimizer = optimizer

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the group's gradient to `.grad`; return the network's loss, detached."""
        self._put_back()
        fresh = not any(p.grad is not None and bool(p.grad.any()) for p in self._learners())
        if fresh and self.calls >= self.steps and self.group < self.groups:
            self._next(x, y)
        learns = [p for p in self._learners() if p.requires_grad]
        if not learns:
            raise ValueError("network has no trainable parameters that the group could learn; "
                             "set requires_grad on its last hidden layer")
        output, h = self._run(x)
        before, own = self._scores(h)
        loss = checked(self.loss, output.detach(), y).detach()
        if self.group < self.groups:
            objective = self._misfit(before, own, y)
        else:
            objective = self.loss(before + own, y)
        if fresh and self.group:  # zeros would let an optimizer's averages move the layers below
            for p in self.network.parameters():
                if not any(p is q for q in learns):
                    p.grad = None
        objective.backward(inputs=learns)
        if fresh:
            self.calls += 1
        return loss

    def predict(self, x: Any) -> Tensor:
        """Return the network's output for `x`, in eval mode, without a graph."""
        self._put_back()
        return super().predict(x)

    @torch.no_grad()
    def truncate(self, t: int) -> nn.Module:
        """Return a copy of the network in which the units of the first `t` groups alone speak.

        It is the network that the first t groups had made when they were done.

        Raises:
            ValueError: `t` is below 0 or above the number of groups.
        """
        checks.between(0, self.groups, whole=True, t=t, advice=f"there are {self.groups} groups")
        self._put_back()
        hidden, network = deepcopy((self.hidden, self.network))
        hidden.outgoing()[:, t * self.units:] = 0
        reader: Any = hidden.reader
        if self.biases is not None and t <= min(int(self.group), self.groups - 1):
            reader.bias.copy_(self.biases[t])
        return network

    def _span(self) -> tuple[int, int, int]:
        """Return which group learns, its first unit, and the one after its last."""
        group = min(int(self.group), self.groups - 1)
        return group, group * self.units, min((group + 1) * self.units, self.hidden.count)

    def _learners(self) -> list[nn.Parameter]:
        """Return what learns with this group: in the first, all that the network has."""
        modules = [self.network] if self.group == 0 else self.hidden.layers
        return [p for module in modules for p in module.parameters()]

    def _views(self) -> list[Tensor]:
        """Return the units' weights, units first: incoming ones, biases; last, outgoing ones."""
        makers: Any = self.hidden.makers
        biases = [maker.bias.detach() for maker in makers if maker.bias is not None]
        return [*map(self.hidden.incoming, makers), *biases,
                self.hidden.outgoing().transpose(0, 1)]

    @torch.no_grad()
    def _put_back(self) -> None:
        """Undo what an optimizer did to other groups: earlier ones stay, later ones are silent."""
        _, start, end = self._span()
        views = self._views()
        for i, view in enumerate(views):
            kept = self.get_buffer(f"kept_{i}")
            view[:start] = kept[:start]
            view[end:] = 0 if view is views[-1] else kept[end:]

    def _run(self, x: Any) -> tuple[Tensor, Tensor]:
        """Return the network's output, and what its last layer read."""
        read: list[Tensor] = []
        with ExitStack() as stack:
            stack.callback(self.hidden.reader.register_forward_pre_hook(
                lambda _, inputs: read.append(inputs[0])).remove)
            if self.group:  # nothing below learns, and its activations need not wait
                for maker in self.hidden.makers:
                    stack.callback(maker.register_forward_pre_hook(
                        lambda _, inputs: tuple(h.detach() for h in inputs)).remove)
            output = call(self.network, x)
        return output, read[0]

    def _scores(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of the groups before, and what this group adds to them."""
        group, start, end = self._span()
        reader: Any = self.hidden.reader
        early, mine = self.columns[:start].flatten(), self.columns[start:end].flatten()
        bias = own = None
        if self.biases is not None:
            bias = self.biases[group]
            own = reader.bias - bias
        with torch.no_grad():
            before = functional.linear(h[..., early], reader.weight[:, early], bias)
        return before, functional.linear(h[..., mine], reader.weight[:, mine], own)

    def _misfit(self, before: Tensor, own: Tensor, y: Tensor) -> Tensor:
        """Return mean |r - g|²/2, over the targets that count."""
        before = before.detach().requires_grad_()
        (slope,) = torch.autograd.grad(checked(self.loss, before, y), before)
        n = targets(before, y)
        error = (-n * slope - own).square().sum(-1).flatten()
        if not y.is_floating_point() and y.numel() == error.numel():
            error = error.where(y.flatten() != -100, 0)
        return error.sum() / (2 * n)

    @torch.no_grad()
    def _next(self, x: Any, y: Tensor) -> None:
        """Take the best step along what the group has learned, and let the next one speak."""
        with evaluating(self.network):
            before, own = self._scores(self._run(x)[1])
        step = self._best_step(before, own, y)
        reader: Any = self.hidden.reader
        group, start, end = self._span()
        views = self._views()
        if reader.weight.requires_grad:
            views[-1][start:end] *= step
            if self.biases is not None and reader.bias.requires_grad:
                reader.bias.lerp_(self.biases[group], 1 - step)
        for i, view in enumerate(views):
            self.get_buffer(f"kept_{i}")[start:end] = view[start:end]
        self.group += 1
        self.calls.zero_()
        if self.group < self.groups:
            group, start, end = self._span()
            if self.biases is not None:
                self.biases[group:] = reader.bias
            if reader.weight.requires_grad:
                views[-1][start:end] = self.get_buffer(f"kept_{len(views) - 1}")[start:end]
        if self.optimizer is not None:
            for p in self._learners():
                for name, value in self.optimizer.state.get(p, {}).items():
                    # Adam's count too, without which averages that begin at 0 stay too small.
                    if isinstance(value, Tensor) and (name == "step" or value.shape == p.shape):
                        value.zero_()

    def _best_step(self, before: Tensor, own: Tensor, y: Tensor) -> float:
        """Return a Newton step along `own`, halved until the loss is no higher; 0 if it never is.

        1 where the loss has no curvature. Over all processes' samples.
        """
        before, own = (z.float() if z.dtype.itemsize < 4 else z for z in (before, own))

        def everywhere(*values: Tensor) -> list[float]:
            n = targets(before, y).to(before)
            sums = torch.stack([n, *(n * value for value in values)])
            if world() > 1:
                distributed.all_reduce(sums)
            return (sums[1:] / sums[0]).tolist()

        with torch.enable_grad():
            step = before.new_zeros((), requires_grad=True)
            loss = checked(self.loss, before + step * own, y)
            (slope,) = torch.autograd.grad(loss, step, create_graph=True)
            bend = torch.zeros_like(slope)
            if slope.requires_grad:
                (bend,) = torch.autograd.grad(slope, step, materialize_grads=True)
        at_zero, down, curvature = everywhere(loss.detach(), slope.detach(), bend)
        found = -down / curvature if curvature > 1e-12 else 1.0
        for _ in range(30):
            if everywhere(self.loss(before + found * own, y))[0] <= at_zero:
                return found
            found /= 2
        return 0.0


def _last_hidden(model: nn.Module, example: Any) -> Units:
    """Return the units that the layer reads which makes the model's output."""
    made: dict[nn.Module, Tensor] = {}
    with ExitStack() as stack, evaluating(model), torch.no_grad():
        found = [units for units in hidden_units(model, example)
                 if isinstance(units.reader, nn.Linear)]
        for units in found:
            stack.callback(units.reader.register_forward_hook(
                lambda layer, _, output: made.update({layer: output})).remove)
        output = call(model, example)
    for units in found:
        if made[units.reader].shape == output.shape and torch.equal(made[units.reader], output):
            return units
    raise ValueError("network must end in a linear layer that reads hidden units of one layer "
                     "below, unit by unit, such as nn.Linear(8, 3) after nn.Linear(4, 8) and an "
                     "activation, got one in which there are none; train it by Backprop")
