import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Generator, Tensor, distributed, nn
from torch.optim import Optimizer

from netwright import checks
from netwright.anatomy.units import Units, hidden_units
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.rule import Rule, checked, output_for
from netwright.runtime.distributed import world
from netwright.stages import Stages

__all__ = ["ContinualBackprop"]


@method("rule", papers=["001-136"], needs=["labels"],
        variants={"plain": {}, "replacing": {"replacement_rate": 0.5, "maturity": 0}})
class ContinualBackprop(Rule):
    """Train with the exact gradient, and after every step renew a few units that do little.

    u_i := d u_i + (1 - d) |h_i| sum_k |w_ki|,  its mean over the batch, w_ki what reads unit i.
    Of each layer's units that are older than `maturity` steps, `replacement_rate` are renewed
    after every step, those of the lowest u_i / (1 - d^age) first; fractions add up over steps.
    A renewed unit gets new incoming weights, a bias of 0, outgoing weights of 0, u_i = 0, age 0.

    The new unit changes nothing until its outgoing weights have learned, and what the old one
    gave on average, moves into the bias of the layer that read it. Incoming weights are drawn
    uniformly with the variance that the layer's had at the start. Units are found by
    `netwright.anatomy.hidden_units`: also convolutions' channels, and a transformer's feed-forward
    units. Those that a layer norm or an attention mixes, and the outputs, are left alone, and so
    are those of a frozen layer. A batch norm's weights stay with the place.

    Units are renewed at the beginning of the next call that finds gradients cleared, when the
    optimizer has made its step. `renewed` counts them. Set `optimizer` to it, as `nw.fit` does,
    and its running averages of renewed weights begin at 0 too (Adam's count of steps goes on).

    Args:
        replacement_rate: the share of a layer's mature units that is renewed in each step.
        maturity: steps in which a unit is left alone.
        decay: d, how slowly a unit's use is forgotten.

    Shapes: x and y as the network and the loss take them; u_i and age one number for each unit.

    Raises:
        ValueError: an option is out of range, there is no hidden unit, or no example to find it.

    Paper: Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood, Sutton, 2024, Loss of Plasticity in
    Deep Continual Learning.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> rule = ContinualBackprop(network, torch.randn(2, 4), replacement_rate=0.25, maturity=1)
    >>> optimizer = rule.optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
    >>> for _ in range(4):
    ...     optimizer.zero_grad()
    ...     loss = rule(torch.randn(2, 4), torch.tensor([0, 2]))
    ...     optimizer.step()
    >>> int(rule.renewed)
    3
    """

    together = True
    remembers = True
    optimizer: Optimizer | None = None
    utility: Tensor
    activity: Tensor
    size_sum: Tensor
    value_sum: Tensor
    age: Tensor
    rows: Tensor
    owed: Tensor
    renewed: Tensor
    spread: Tensor
    layer: Tensor

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 replacement_rate: float = 1e-4, maturity: int = 100, decay: float = 0.99,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.between(0, 1, replacement_rate=replacement_rate,
                       advice="it is the share of a layer's units renewed in a step; try 1e-4")
        checks.count(0, maturity=maturity, advice="it is a number of steps; try 100")
        checks.between(0, 1, ends=(True, False), decay=decay, advice="try 0.99")
        if example is None:
            raise ValueError("example must be an input of the network, in which hidden units are "
                             "looked for, got None; give a batch")
        self.replacement_rate, self.maturity, self.decay = replacement_rate, maturity, decay
        self.loss = loss
        self.units = hidden_units(self.network, example)
        if not self.units:
            raise ValueError("network has no hidden units to renew: none of its linear layers or "
                             "convolutions is read, unit by unit, by one other alone; train it by "
                             "Backprop")
        self.weights: list[Tensor] = [layer.weight for units in self.units
                        for layer in units.layers]
        counts = [units.count for units in self.units]
        like = self.weights[0].new_zeros(sum(counts), dtype=max(
            (w.dtype for w in self.weights), key=lambda kind: torch.finfo(kind).bits))
        like = like.float() if like.dtype.itemsize < 4 else like
        for name in ("utility", "activity", "size_sum", "value_sum"):
            self.register_buffer(name, like.clone())
        self.register_buffer("age", torch.zeros_like(like, dtype=torch.long))
        self.register_buffer("rows", like.new_zeros(len(counts)))
        self.register_buffer("owed", like.new_zeros(len(counts)))
        self.register_buffer("renewed", torch.zeros((), dtype=torch.long, device=like.device))
        # The variance of weights is kept, since a resumed training has forgotten the first ones.
        self.register_buffer("spread", torch.stack([
            units.incoming(maker).to(like).std(correction=0)
            for units in self.units for maker in units.makers]))
        self.register_buffer("layer", torch.repeat_interleave(
            torch.arange(len(counts)), torch.tensor(counts)).to(like.device), persistent=False)

    def stepped_by(self, optimizer: Optimizer) -> None:
        """Be told which optimizer will step, whose averages of renewed weights begin again."""
        self.optimizer = optimizer

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Renew what the last step left over; add dL/dw to `.grad`; return the detached loss."""
        fresh = not any(w.grad is not None and bool(w.grad.any()) for w in self.weights)
        if fresh and bool(self.rows.any()):
            self._test()
        found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        with ExitStack() as stack:
            for i, units in enumerate(self.units):
                def watch(_: nn.Module, inputs: tuple, i: int = i, units: Units = units) -> None:
                    found[i] = self._watched(units, inputs[0].detach())
                stack.callback(units.reader.register_forward_pre_hook(watch).remove)
            loss = checked(self.loss, output_for(self.loss, self.network, x), y)
        if not loss.requires_grad:
            raise ValueError("network has no trainable parameters; set requires_grad on some")
        loss.backward()
        sizes, values, rows = zip(*(found[i] for i in range(len(self.units))), strict=True)
        seen = torch.cat([*sizes, *values, *rows])
        if world() > 1:  # every process renews the same units
            distributed.all_reduce(seen)
        count = len(self.layer)
        self.size_sum += seen[:count]
        self.value_sum += seen[count:2 * count]
        self.rows += seen[2 * count:]
        return loss.detach()

    @torch.no_grad()
    def _watched(self, units: Units, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of |h| and of h over what the reader takes, and of how much that is."""
        values = units.values(h)
        sizes = torch.linalg.vector_norm(values, 1, (0, 2), dtype=self.utility.dtype)
        rows = sizes.new_tensor([values.shape[0] * values.shape[2]])
        return sizes, values.sum((0, 2), dtype=sizes.dtype), rows

    @torch.no_grad()
    def _test(self) -> None:
        """Bring utilities up to date, and renew the units whose turn it is."""
        rows = self.rows[self.layer].clamp_min(1)
        reading = torch.cat([units.outgoing().abs().movedim(1, 0).flatten(1).sum(1)
                             for units in self.units]).to(self.utility)
        self.age += 1
        self.utility.lerp_(self.size_sum / rows * reading, 1 - self.decay)
        self.activity.lerp_(self.value_sum / rows, 1 - self.decay)
        for sums in (self.size_sum, self.value_sum, self.rows):
            sums.zero_()
        learns = torch.tensor([all(p.requires_grad for layer in units.layers
                                   for p in layer.parameters(recurse=False))
                               for units in self.units], device=self.age.device)
        eligible = (self.age > self.maturity) & learns[self.layer]
        self.owed.index_add_(0, self.layer, eligible.to(self.owed) * self.replacement_rate)
        # A rate that adds up to a whole number must not stay below it by rounding.
        due = (self.owed + 1e-4).floor()
        if not bool(due.any()):
            return
        corrected = self.utility / (1 - self.decay ** self.age)
        by_utility = torch.where(eligible, corrected, math.inf).argsort(stable=True)
        order = by_utility[self.layer[by_utility].argsort(stable=True)]  # layer by layer
        first = torch.searchsorted(self.layer, torch.arange(len(due), device=due.device))
        place = torch.arange(len(order), device=due.device) - first[self.layer]
        chosen = torch.zeros_like(eligible)
        chosen[order] = place < due[self.layer]
        chosen &= eligible
        self.owed.index_add_(0, self.layer, -chosen.to(self.owed))
        self._renew(chosen.nonzero().squeeze(1))

    @torch.no_grad()
    def _renew(self, picked: Tensor) -> None:
        ends = torch.tensor([units.count for units in self.units]).cumsum(0)
        mean = self.activity / (1 - self.decay ** self.age)
        spread = iter(self.spread)
        for units, end in zip(self.units, ends.tolist(), strict=True):
            start = end - units.count
            mine = picked[(picked >= start) & (picked < end)]
            drawn_from = [next(spread) for _ in units.makers]
            if not len(mine):
                continue
            index = mine - start
            outgoing = units.outgoing()[:, index]
            bias = getattr(units.reader, "bias", None)
            if bias is not None:
                bias += outgoing.flatten(2).sum(2) @ mean[mine].to(outgoing)
            for maker, width in zip(units.makers, drawn_from, strict=True):
                fresh = units.incoming(maker)[index]
                units.incoming(maker)[index] = self._draw(fresh, width)
                bias = getattr(maker, "bias", None)
                if bias is not None:
                    bias[index] = 0
            units.outgoing()[:, index] = 0
            self._forget(units, index)
        self.utility[picked], self.activity[picked], self.age[picked] = 0, 0, 0
        self.renewed += len(picked)

    def _draw(self, like: Tensor, spread: Tensor) -> Tensor:
        device = like.device if self.generator is None else self.generator.device
        drawn = torch.rand(like.shape, generator=self.generator, device=device)
        drawn = (drawn.to(like) * 2 - 1) * (math.sqrt(3) * spread.to(like))
        if world() > 1:
            distributed.broadcast(drawn, src=0)
        return drawn

    def _forget(self, units: Units, index: Tensor) -> None:
        """Set the optimizer's running averages of renewed weights to 0."""
        for average in self._averages(units.reader, "weight"):
            units.outgoing(average)[:, index] = 0
        for maker in units.makers:
            for average in self._averages(maker, "weight"):
                units.incoming(maker, average)[index] = 0
            for average in self._averages(maker, "bias"):
                average[index] = 0

    def _averages(self, layer: nn.Module, name: str) -> list[Tensor]:
        parameter: Any = getattr(layer, name, None)
        kept = {} if self.optimizer is None else self.optimizer.state.get(parameter, {})
        return [value for value in kept.values()
                if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape]
