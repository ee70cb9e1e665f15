import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from netwright import checks
from netwright.anatomy.axes import axes
from netwright.anatomy.replacing import plain_paths
from netwright.anatomy.residual import Sublayer, trace
from netwright.anatomy.unit_groups import UnitGroup, silence
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape._calibration import batches_of, few
from netwright.reshape.change import decided, reshape
from netwright.reshape.pruning._distances import Distances
from netwright.reshape.pruning._removing import beside, removal, take_out
from netwright.reshape.pruning._trials import Trials
from netwright.reshape.pruning.prune_sublayers import decision_of, taken_out
from netwright.runtime.modes import evaluating, same_buffers
from netwright.runtime.progress import Tries
from netwright.runtime.random_state import same_random_state

__all__ = ["prune_structures"]

_SHARE = 16  # a block of channels is this part of a layer's
_EVEN = 8  # kernels like widths that are multiples of it


@method(
    "reshape",
    papers=["003-054"],
    place="whole network",
    saves=["parameters", "file size", "inference memory", "inference time"],
    needs=["calibration data"],
    keeps_function=False,
    search={"ratio": (0.05, 0.5)},
    variants={"all three": {"ratio": 0.3}, "widths": {"ratio": 0.2, "uniform": True}},
)
@reshape
@torch.no_grad()
def prune_structures(model: nn.Module, calibration: Any, ratio: float = 0.2, *,
                     split: Sequence[float] = (44, 52, 4), channels: int | None = None,
                     loss: Callable[[Tensor, Any], Tensor] | None = None,
                     uniform: bool = False) -> nn.Module:
    """Return a copy without a share of its parameters: whole sublayers, then channels, then heads.

    Σ parameters removed <= ratio · Σ parameters, of which `split` says how much goes as sublayers,
    as blocks of hidden channels, and as heads:
    1. the sublayer s of the residual stream whose absence costs least, again and again,
    2. the `channels` hidden units of least norm in the layer where that costs least,
    3. the head of least norm, with all that share its keys and values, where that costs least,
    and once more 2. with what is left of the budget. The norm of a unit is the sum of the L1
    norms of the rows that make it, so that what goes is what would stand last were units sorted;
    every cost is measured on the model as it is by then.

    A cost is `loss(outputs, batch)`, such as a language model's, or where none is given, how far
    the outputs turn from those of the whole model: the angle between them over pi, at positions
    that `attention_mask` lets count. Nothing is trained; tuning afterwards is worth it.

    Args:
        model: any module; what of the three it does not have takes no share of the budget.
        calibration: inputs that the outputs are compared on.
        ratio: the share of all parameters that go.
        split: how the budget is shared among sublayers, channels and heads.
        channels: how many hidden units go at once; about a 16th of a layer's where None is given.
        loss: a number to keep low, of the outputs (logits, say) and the batch that made them.
        uniform: take no sublayers and as many units in every layer, so that plain
            `from_pretrained` loads a Hugging Face model where its configuration states those sizes.

    Shapes: calibration is what the model takes (a tensor, a tuple of positional or a mapping of
    keyword arguments) or a list of such batches; outputs (batch, *, classes).

    Raises:
        NothingToReshape: the model has none of the three, or the smallest part is over the budget.
        ValueError: `ratio` is not between 0 and 1, `split` not three numbers from 0 on with a sum
            above 0, or `calibration` is empty or gives what is not finite.

    Paper: Muñoz, Yuan, Jain, 2025, MultiPruner: Balanced Structure Removal in Foundation Models.

    >>> from netwright.models import gpt
    >>> model = gpt(96, context=16, depth=3)
    >>> smaller = prune_structures(model, torch.randint(96, (4, 16)), ratio=0.3)
    >>> count = lambda network: sum(p.numel() for p in network.parameters())
    >>> 0.65 < count(smaller) / count(model) < 0.75
    True
    """
    checks.between(0, 1, ends=(False, False), ratio=ratio)
    checks.count(1, channels=channels, optional=True)
    if len(split) != 3 or min(split) < 0 or sum(split[uniform:]) <= 0:
        raise ValueError("split must be three shares from 0 on, of sublayers (none where uniform), "
                         f"channels and heads, got {split!r}; try (44, 52, 4)")
    batches = batches_of(calibration)
    example = few(batches[0])
    found = axes(model, example)
    trial = beside(model)
    with same_random_state(), evaluating(trial), same_buffers(trial), plain_paths():
        judge: Any = Distances("angular") if loss is None else _Loss(loss)
        trials = Trials(trial, trace(trial, example), batches, judge)
        search = _Search(trials, [g for g in found.groups if _fits(model, g, uniform)], channels)
        budget = int(ratio * sum(p.numel() for p in model.parameters()))
        with Tries("prune_structures", search.tries(budget, uniform)) as tries:
            search.run(budget, split, uniform, tries)
    if not (trials.removed or search.gone):
        raise NothingToReshape(
            f"ratio={ratio} leaves {budget} parameters to remove, and {type(model).__name__} has "
            f"no sublayer, hidden channels or head of so few that can go; {search.least()}")
    units = removal(model, found, {name: ids for name, ids in search.gone.items()
                                   if not search.inside(found.group(name))})
    depth = decision_of(trial, trials.removed, trials.found, example)
    return decided({"units": units, "depth": depth}, keeps_function=False)


@prune_structures.applies
@torch.no_grad()
def _pruned(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    return taken_out(take_out(model, decision["units"]), decision["depth"])


def _fits(model: nn.Module, group: UnitGroup, uniform: bool) -> bool:
    """Return whether to silence a unit of a group is to remove it, which makes trials cheap."""
    if not group.removable or group.pooled or group.blocks > 1:
        return False
    if group.kind not in ("hidden", "head"):
        return False
    stated = getattr(model, "config", None) is None or group.config
    # A head's width is not in a configuration that divides the model's by the number of heads.
    divided = group.kind == "head" and not hasattr(getattr(model, "config", None), "head_dim")
    return not uniform or (bool(stated) and not divided)


class _Loss:
    """A loss of outputs and their batch, in the place of a distance."""

    def __init__(self, loss: Callable[[Tensor, Any], Tensor]) -> None:
        self.loss = loss

    def prepared(self, x: Any, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return nothing: a loss is no comparison."""
        return output[:0], output[:0]

    def between(self, x: Any, prepared: Any, new: Tensor) -> tuple[float, float]:
        """Return the loss of the new outputs, which counts as one."""
        return float(self.loss(new, x)), 1.0


@dataclass(frozen=True)
class _Cut:
    """What may go next: units of some groups, or a sublayer, and how many parameters it has."""

    parameters: int
    units: tuple[tuple[UnitGroup, tuple[int, ...]], ...] = ()
    sublayer: Sublayer | None = None


class _Search:
    """A copy of a model from which the cheapest cut is taken, again and again."""

    def __init__(self, trials: Trials, groups: Sequence[UnitGroup], channels: int | None) -> None:
        self.trials, self.groups = trials, groups
        self.steps = {g.name: 1 if g.kind == "head" else channels or _block(g.count)
                      for g in groups}
        weights = dict(trials.model.named_parameters())
        self.order = {g.name: np.argsort(_norms(weights, g), kind="stable") for g in groups}
        self.gone: dict[str, list[int]] = {}
        self.starts = {g.name: trials.start_of(sorted({
            m.tensor.rpartition(".")[0] for m in g.members if m.role == "reads"})) for g in groups}
        self.removed = 0

    def run(self, budget: int, split: Sequence[float], uniform: bool, tries: Tries) -> None:
        """Remove parts until nothing more fits into the budget."""
        shares = dict(zip(("sublayer", "hidden", "head"), split, strict=True))
        shares["sublayer"] *= not uniform
        whole, spent = sum(shares.values()), 0.0
        for kind in ("sublayer", "hidden", "head", "hidden"):
            spent += shares[kind]
            limit = int(budget * min(1.0, spent / whole)) if shares[kind] else 0
            while cut := self._cheapest(kind, limit - self.removed, uniform, tries):
                self._take(cut)

    def tries(self, budget: int, uniform: bool) -> int:
        """Return about how many tries there will be."""
        sizes = [cut.parameters for kind in ("sublayer", "hidden", "head")
                 for cut in self._cuts(kind, uniform)]
        return len(sizes) * max(1, budget // max(1, max(sizes, default=1)))

    def least(self) -> str:
        """Return what the smallest part takes."""
        sizes = [cut.parameters for kind in ("sublayer", "hidden", "head")
                 for cut in self._cuts(kind, False)]
        return f"the smallest has {min(sizes)}" if sizes else "it has none of them"

    def inside(self, group: UnitGroup) -> bool:
        """Return whether a group stands in a sublayer that was removed."""
        names = [name for s in self.trials.removed for name in (s.name, *s.feeders)]
        return any(member.tensor.startswith(f"{name}.") for name in names
                   for member in group.members)

    def _cuts(self, kind: str, uniform: bool) -> Iterator[_Cut]:
        if kind == "sublayer":
            for sublayer in self.trials.left:
                yield _Cut(self._size(sublayer), sublayer=sublayer)
            return
        cuts = [_Cut(g.parameters * self.steps[g.name], ((g, self._next(g)),))
                for g in self.groups if g.kind == kind and self._next(g) and not self.inside(g)]
        if uniform and cuts:
            all_here = len(cuts) == sum(g.kind == kind for g in self.groups)
            cuts = [_Cut(sum(c.parameters for c in cuts), tuple(c.units[0] for c in cuts))
                    ] * all_here
        yield from cuts

    def _next(self, group: UnitGroup) -> tuple[int, ...]:
        """Return the units of a group that would go next, none where none would stay."""
        gone, step = len(self.gone.get(group.name, ())), self.steps[group.name]
        return () if gone + step >= group.count else tuple(
            self.order[group.name][gone:gone + step].tolist())

    def _size(self, sublayer: Sublayer) -> int:
        """Return the parameters of a sublayer that are not gone."""
        parts = [self.trials.model.get_submodule(name)
                 for name in (sublayer.name, *sublayer.feeders)]
        return sum(p.numel() for p in {id(p): p for part in parts
                                       for p in part.parameters()}.values())

    def _cheapest(self, kind: str, left: int, uniform: bool, tries: Tries) -> _Cut | None:
        costs: list[tuple[float, _Cut]] = []
        for cut in list(self._cuts(kind, uniform)):
            if not 0 < cut.parameters <= left:
                continue
            cost, tried = self._cost(cut)
            if tried is not None:
                costs.append((cost, tried))
            tries.step(f"best {min((c for c, _ in costs), default=math.nan):.3g}")
        return min(costs, key=lambda pair: pair[0])[1] if costs else None

    def _cost(self, cut: _Cut) -> tuple[float, _Cut | None]:
        if cut.sublayer is not None:
            fewer, cost = self.trials.distance(cut.sublayer)
            cut = _Cut(0 if fewer is None else self._size(fewer), sublayer=fewer)
        else:
            cost = self._without(cut)
        if not math.isfinite(cost):
            raise ValueError("calibration must give finite outputs with any part removed, got nan "
                             "or infinity; check the inputs, the weights and loss")
        return cost, None if cut.sublayer is None and not cut.units else cut

    def _without(self, cut: _Cut) -> float:
        """Return the cost without some units, which are put back."""
        held = dict(self.trials.model.named_parameters())
        read = {m.tensor for group, _ in cut.units for m in group.members if m.role == "reads"}
        before = {name: held[name].data for name in read}
        self._silence(cut)
        try:
            return self.trials.moved_from(min(self.starts[g.name] for g, _ in cut.units))
        finally:
            for name, data in before.items():
                held[name].data = data

    def _silence(self, cut: _Cut) -> None:
        for group, units in cut.units:
            silence(self.trials.model, group, np.array(units), read=True)

    def _take(self, cut: _Cut) -> None:
        self.removed += cut.parameters
        if cut.sublayer is not None:
            self.trials.take_out(cut.sublayer)
            return
        self._silence(cut)
        for group, units in cut.units:
            self.gone.setdefault(group.name, []).extend(units)
        self.trials.settle(min(self.starts[g.name] for g, _ in cut.units))


def _block(count: int) -> int:
    """Return how many channels go at once of `count`."""
    share = max(1, count // _SHARE)
    return share if share < _EVEN else share - share % _EVEN


def _norms(weights: Mapping[str, Tensor], group: UnitGroup) -> np.ndarray:
    """Return the sum of the L1 norms of the rows that make each unit."""
    total = np.zeros(group.count)
    for member in group.members:
        if member.role == "makes" and member.groups == 1:
            weight = weights[member.tensor].detach().double().abs().cpu()
            others = [axis for axis in range(weight.ndim) if axis != member.axis]
            rows = weight.sum(others) if others else weight
            total += rows.numpy()[member.indices].sum(1)
    return total
