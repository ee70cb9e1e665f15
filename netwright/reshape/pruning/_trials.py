"""Runs of a model without one sublayer or another, each from the stage that the sublayer is in."""

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.anatomy.replacing import replace, standing_in
from netwright.anatomy.residual import Silent, Sublayer, Trace
from netwright.reshape._calibration import few
from netwright.reshape.pruning._distances import Distances
from netwright.stages import Stages, call, stages


class Trials:
    """A model, of which sublayers are taken out, and what every stage takes for every batch.

    A sublayer is tried by running on from its own stage, so that a try costs half a pass. Where a
    model is no chain of stages, or a sublayer is not inside of one, the whole model is run.
    """

    def __init__(self, model: nn.Module, found: Trace, batches: Sequence[Any],
                 distances: Distances) -> None:
        self.model, self.found, self.batches, self.distances = model, found, batches, distances
        self.left = list(found.sublayers)
        self.removed: list[Sublayer] = []
        self.net = _chain(model, batches[0])
        self.starts = {s.name: self.start_of([s.name, *s.feeders]) for s in found.sublayers}
        self.contexts: list[Any] = [None] * len(batches)
        self.signals: list[list[Any]] = [[] for _ in batches]
        self.outputs = [distances.prepared(x, output)
                        for x, output in zip(batches, self._record(0), strict=True)]

    def digest(self) -> str:
        """Return what tells the model on these batches from others."""
        digest = hashlib.sha256(" ".join(self.starts).encode())
        for output, _ in self.outputs:
            flat = output.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def distance(self, sublayer: Sublayer) -> tuple[Sublayer | None, float]:
        """Return how far the outputs move when `sublayer` is taken out for once.

        It is returned with those of its feeders that the model runs without; None where it does
        not run without it at all.
        """
        try:
            return sublayer, self._moved(sublayer)
        except Exception:
            fewer = fitting(self.model, sublayer, self.found, few(self.batches[0]))
            if fewer == sublayer:
                raise
        place = self.left.index(sublayer)
        self.left[place:place + 1] = [] if fewer is None else [fewer]
        return fewer, 0.0 if fewer is None else self._moved(fewer)

    def _moved(self, sublayer: Sublayer) -> float:
        with standing_in(self.model, self._stubs(sublayer)):
            return self.moved_from(self.starts[sublayer.name])

    def moved_from(self, start: int) -> float:
        """Return how far the model as it is now moves the outputs, run from a stage on."""
        total = positions = 0.0
        for b, (x, prepared) in enumerate(zip(self.batches, self.outputs, strict=True)):
            moved, counted = self.distances.between(x, prepared, self._run(b, start)[-1])
            total, positions = total + moved, positions + counted
        return total / max(positions, 1)

    def settle(self, start: int) -> None:
        """Take what was changed in the stages from `start` on for what the model is."""
        self._record(start)

    def named(self, name: str) -> Sublayer:
        """Return the sublayer called `name`, as it can be taken out.

        Raises:
            UnknownName: it is not among those that are left.
        """
        known = {sublayer.name: sublayer for sublayer in self.left}
        checks.one_of(known, sublayer=name)
        return fitting(self.model, known[name], self.found, few(self.batches[0])) or known[name]

    def take_out(self, sublayer: Sublayer) -> None:
        """Put `Silent` modules in the place of `sublayer`."""
        for name, stub in self._stubs(sublayer).items():
            replace(self.model, name, stub)
        self.left = [other for other in self.left if other.name != sublayer.name]
        self.removed.append(sublayer)
        self._record(self.starts[sublayer.name])

    def _stubs(self, sublayer: Sublayer) -> dict[str, nn.Module]:
        """Return what stands for the parts of `sublayer` that are not silent yet."""
        return stubs(self.model, sublayer, self.found)

    def start_of(self, names: Sequence[str]) -> int:
        """Return the first stage in which one of the modules is, 0 where one is in none."""
        parts = [self.model.get_submodule(name) for name in names]
        if self.net is None:
            return 0
        inside = [[i for i, stage in enumerate(self.net) if _holds(stage.modules, part)]
                  for part in parts]
        return min((min(found, default=0) for found in inside), default=0)

    def _record(self, start: int) -> list[Tensor]:
        """Run every batch from stage `start`, keep what the stages take, return the outputs."""
        outputs = []
        for b in range(len(self.batches)):
            *signals, output = self._run(b, start, keep=True)
            self.signals[b][start:] = signals
            outputs.append(output)
        return outputs

    def _run(self, b: int, start: int, *, keep: bool = False) -> list[Any]:
        """Return what the stages from `start` on take, and the output; the output unless `keep`."""
        if self.net is None:
            return [call(self.model, self.batches[b])]
        # The first stage makes what the others are given besides, which no later one changes.
        context = self.net.context(self.batches[b]) if not start else _forked(self.contexts[b])
        h = self.signals[b][start] if start else self.batches[b]
        taken = []
        for i in range(start, len(self.net)):
            taken += [h] * keep
            h = self.net[i](h, context)
        if keep:
            self.contexts[b] = context
        return [*taken, h]


def fitting(model: nn.Module, sublayer: Sublayer, found: Trace, x: Any) -> Sublayer | None:
    """Return `sublayer` with those of its feeders that the model runs without, None for none.

    A model may read the weights of a norm before it calls the norm.
    """
    for fewer in (sublayer, Sublayer(sublayer.name)):
        try:
            with standing_in(model, stubs(model, fewer, found)):
                call(model, x)
        except Exception:  # whatever the network's own code raises
            continue
        return fewer
    return None


def stubs(model: nn.Module, sublayer: Sublayer, found: Trace) -> dict[str, nn.Module]:
    """Return what stands for the parts of `sublayer` that are not silent yet, by their names."""
    return {name: copy.deepcopy(found.silent[name]).train(model.get_submodule(name).training)
            for name in (sublayer.name, *sublayer.feeders)
            if not isinstance(model.get_submodule(name), Silent)}


def _chain(model: nn.Module, x: Any) -> Stages | None:
    """Return the stages of `model` where their chain gives what the model gives for all of `x`."""
    try:
        net = stages(model, few(x))
        return net if torch.equal(net(x), call(model, x)) else None
    except Exception:  # it is no chain; what else may be wrong is found when the model is run
        return None


def _holds(modules: Sequence[nn.Module], part: nn.Module) -> bool:
    return any(part is not module and any(part is inner for inner in module.modules())
               for module in modules)


def _forked(context: Any) -> Any:
    """Return a copy of what stages are given, which what they write to it does not change."""
    new = copy.copy(context)
    for name, value in vars(context).items():
        if isinstance(value, (dict, list)):
            new.__dict__[name] = copy.copy(value)
    return new


def sharing(model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose parameters and buffers are the model's own tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})
