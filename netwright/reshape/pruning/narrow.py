from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from netwright import checks
from netwright.anatomy.axes import Axes, axes
from netwright.anatomy.layers import is_linear, is_transposed
from netwright.anatomy.unit_groups import UnitGroup
from netwright.calibration import InputStatistics, stream, watched
from netwright.catalogue.facets import method
from netwright.errors import CannotStage, NothingToReshape
from netwright.reshape._calibration import batches_of, few, run_batches
from netwright.reshape.change import decided, reshape
from netwright.reshape.pruning._elimination import Reader, eliminated, refitted
from netwright.reshape.pruning._removing import removal, take_out
from netwright.stages import stages

__all__ = ["narrow"]

DAMPING = 1e-3  # of the mean second moment


@method(
    "reshape",
    place="whole network",
    saves=["parameters", "file size", "inference memory", "inference time"],
    needs=["calibration data"],
    keeps_function=False,
    search={"ratio": (0.1, 0.75)},
    variants={"half": {"ratio": 0.5}, "everywhere": {"ratio": 0.3, "uniform": False}},
)
@reshape
@torch.no_grad()
def narrow(model: nn.Module, calibration: Any, ratio: float = 0.5, *, multiple: int = 8,
           uniform: bool = True) -> nn.Module:
    """Return a copy whose hidden layers have fewer units, the others refitted to make up for them.

    With h what the hidden units give, H = mean h hᵀ, and W the matrix that reads them: the unit j
    goes whose removal costs least, w_j² / (H⁻¹)_jj summed over the rows of W, W is refitted, the
    next goes, until a share `ratio` is gone; at last
    W_K := W H_:K (H_KK)⁻¹ for those that stay,  b := b + (W − W_K) mean h.

    Hidden units are those of feed-forward layers and any others that `nw.axes` finds between linear
    layers or convolutions: one place of a plain layer, several of a convolution's kernel or behind
    a flattening. The network is gone through stage by stage, so that each layer is fitted on what
    the changed layers before it give; positions that `attention_mask` leaves out do not count.
    Nothing is trained. Mean and H are those of the calibration data, so some hundred rows more
    than there are hidden units keep the fit from following chance.

    Args:
        model: any module with such layers.
        calibration: inputs, without labels.
        ratio: the share of hidden units that go.
        multiple: the number of units that stay is a multiple of it, where there are so many.
        uniform: where a Hugging Face configuration states the size of some hidden layers, leave the
            others as they are, so that plain `from_pretrained` loads what is saved.

    Shapes: calibration is what the model takes (a tensor, a tuple of positional or a mapping of
    keyword arguments) or a list of such batches; W (out, hidden), h (rows, hidden).

    Raises:
        NothingToReshape: no hidden units can be removed, or too few to leave a multiple.
        ValueError: `ratio` is not between 0 and 1, or what a layer takes is not finite.

    Papers: LeCun, Denker, Solla, 1990, Optimal Brain Damage. Hassibi, Stork, 1993, Second Order
    Derivatives for Network Pruning: Optimal Brain Surgeon.

    >>> model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> narrow(model, torch.randn(100, 6), ratio=0.5)[2]
    Linear(in_features=16, out_features=4, bias=True)
    """
    checks.between(0, 1, ends=(False, False), ratio=ratio)
    checks.count(1, multiple=multiple)
    batches = batches_of(calibration)
    found = axes(model, few(batches[0]))
    groups = _chosen(model, found, uniform)
    leaving = {g.name: g.count - left for g in groups
               if (left := _left(g.count, ratio, multiple)) < g.count}
    if not leaving:
        sizes = ", ".join(f"{g.name} {g.count}" for g in groups[:4])
        raise NothingToReshape(f"ratio={ratio} with multiple={multiple} takes no unit away from "
                               f"{sizes}; take a smaller multiple")
    trial = deepcopy(model)
    gone = _Narrowing(trial, [g for g in groups if g.name in leaving], leaving).run(batches)
    weights = {name: p for group in groups if group.name in leaving for reader in _readers(group)
               for name, p in trial.named_parameters() if name.rpartition(".")[0] == reader}
    return decided(removal(model, found, gone), keeps_function=False, weights=weights)


@narrow.applies
@torch.no_grad()
def _narrowed(model: nn.Module, decision: Mapping[str, Any],
              weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    held = dict(model.named_parameters())
    for name, weight in (weights or {}).items():
        held[name].data = weight.data
    return take_out(model, decision)


def _left(count: int, ratio: float, multiple: int) -> int:
    """Return how many units stay: a multiple, one at least, where there are more than that."""
    step = multiple if count > multiple else 1
    return max(step, round(count * (1 - ratio) / step) * step)


def _chosen(model: nn.Module, found: Axes, uniform: bool) -> list[UnitGroup]:
    """Return the groups of hidden units that are read by layers which can be fitted anew."""
    hidden = [g for g in found.groups if g.kind == "hidden" and g.blocks == 1]
    reasons = {g.name: _unfit(model, g) for g in hidden}
    fit = [g for g in hidden if not reasons[g.name]]
    if not fit:
        said = "; ".join(f"{name}: {why}" for name, why in reasons.items()) or "there are none"
        blocked = ", ".join(sorted(set(found.unknown.values())))
        raise NothingToReshape(
            f"{type(model).__name__} has no hidden units that can be removed: {said}"
            + (f"; units were not followed through {blocked}" if blocked else ""))
    stated = [g for g in fit if g.config]
    return stated if uniform and stated else fit


def _unfit(model: nn.Module, group: UnitGroup) -> str:
    """Return why a group cannot be narrowed, "" where it can."""
    if not group.removable:
        return group.reason or "its units cannot be removed"
    if group.pooled:
        return "a norm computes with all its units at once"
    for name in _readers(group):
        reader = model.get_submodule(name)
        if is_parametrized(reader):
            return f"{name!r} is parametrized; take that off first"
        if not (is_linear(reader) or (isinstance(reader, nn.Conv2d) and reader.groups == 1)):
            return f"{name!r}, which reads it, is no linear layer or convolution"
    return ""


def _readers(group: UnitGroup) -> dict[str, torch.Tensor]:
    """Return the places at which the units are read, by the layers that do."""
    return {member.tensor.rpartition(".")[0]: torch.from_numpy(member.indices)
            for member in group.members if member.role == "reads"}


class _Narrowing:
    """A copy of a model, the columns of removed units zero, as its stages are gone through."""

    def __init__(self, model: nn.Module, groups: Sequence[UnitGroup],
                 leaving: Mapping[str, int]) -> None:
        self.model, self.leaving = model, leaving
        self.waiting = list(groups)
        self.seen: dict[str, InputStatistics] = {}
        self.gone: dict[str, list[int]] = {}

    def run(self, batches: Sequence[Any]) -> dict[str, list[int]]:
        """Return the units that go by their groups, having refitted what reads them."""
        try:
            stages(self.model, batches[0])
        except CannotStage:
            self._run_whole(batches)
        else:
            stream(self.model, batches, lambda _, taken: self._see(taken),
                   statistics=("gram", "mean"))
        return self.gone

    def _run_whole(self, batches: Sequence[Any]) -> None:
        """Run the whole model for each group, where it is no chain of stages."""
        for group in list(self.waiting):
            modules = [self.model.get_submodule(name) for name in _readers(group)]
            with watched(self.model, modules, ("gram", "mean")) as (taken, padding):
                for batch in batches:
                    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                    padding[:] = [None if mask is None else mask.bool()]
                    run_batches(self.model, [batch], [])
            self._see(taken)

    def _see(self, taken: Mapping[str, InputStatistics]) -> None:
        """Narrow the groups of which all readers have been seen."""
        wanted = {name for group in self.waiting for name in _readers(group)}
        self.seen.update({name: found for name, found in taken.items() if name in wanted})
        for group in list(self.waiting):
            if all(name in self.seen for name in _readers(group)):
                self.waiting.remove(group)
                self.gone[group.name] = self._narrow(group)

    def _narrow(self, group: UnitGroup) -> list[int]:
        layers = {name: self.model.get_submodule(name) for name in _readers(group)}
        readers = [_reader(layer, self.seen.pop(name), places, name)
                   for (name, layer), places in zip(layers.items(), _readers(group).values(),
                                                    strict=True)]
        gone = eliminated([reader for reader, _ in readers], self.leaving[group.name], DAMPING)
        for layer, (reader, mean) in zip(layers.values(), readers, strict=True):
            _write(layer, reader.weight, refitted(reader, gone, DAMPING), mean)
        return sorted(gone)


def _reader(layer: Any, seen: InputStatistics, places: Tensor,
            name: str) -> tuple[Reader, Tensor]:
    """Return a layer as a matrix with the moments of what it takes, and their mean."""
    assert seen.gram is not None
    assert seen.mean is not None
    checks.finite(**{f"what {name} takes": seen.gram, f"the weight of {name}": layer.weight},
                  advice="look for nan in calibration and in the weights")
    weight = layer.weight.T if is_transposed(layer) else layer.weight.flatten(1)
    if layer.weight.ndim > 2:  # each channel stands at all places of the kernel
        size = layer.weight[0, 0].numel()
        places = (places[:, :, None] * size + torch.arange(size)).flatten(1)
    moments = seen.gram
    if layer.bias is not None:  # the mean goes into it
        moments = moments - torch.outer(seen.mean, seen.mean)
    return Reader(weight.to(moments), moments, places.to(weight.device)), seen.mean


def _write(layer: Any, before: Tensor, after: Tensor, mean: Tensor) -> None:
    """Give a layer its refitted weight in place, and what goes with the mean to its bias."""
    weight = after.T if is_transposed(layer) else after.view_as(layer.weight)
    layer.weight.data = weight.to(layer.weight).contiguous()
    if layer.bias is not None:
        layer.bias.data = layer.bias + ((before - after) @ mean).to(layer.bias)
