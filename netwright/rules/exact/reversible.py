from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves

from netwright.blocks.reversible.sequential import ReversibleSequential
from netwright.catalogue.facets import method
from netwright.errors import CannotReverse, CannotStage
from netwright.objectives.losses import cross_entropy
from netwright.reversing.engine import Step, Stored, chained, run
from netwright.rules.rule import Rule, chain_of, checked, meant_for
from netwright.runtime.attributes import Memo
from netwright.signals import apply
from netwright.stages import Stages
from netwright.stages._sequential import SequentialStage

__all__ = ["Reversible"]


@method("rule", papers=["001-010"], saves=["training memory"], needs=["labels"],
        variants={"plain": {}, "kept": {"checkpoint": False}})
class Reversible(Rule):
    """Backpropagate through a network that reconstructs its activations instead of storing them.

    Invertible stage:  h_{i-1} = f_i^{-1}(h_i), then the gradient through f_i(h_{i-1}).
    Ordinary stage:  h_{i-1} is kept, the rest computed again (gradient checkpointing).

    The gradients are backpropagation's, up to the rounding of the reconstruction. A run of
    invertible stages keeps its last output alone, however long it is; an ordinary stage between
    them keeps its input, and the first and the last one, if ordinary, what backpropagation keeps.
    Everything that is computed again runs under the random state, the autocast state and the
    buffers of the first time, so that dropout and batch norm do not notice.

    In an `nn.Sequential` a layer is invertible if it has an `inverse`, as those of
    `nw.blocks.reversible` have; `nw.reshape.reversible` makes such blocks of residual ones. In a
    network that is not one, each stage counts as ordinary, and reversible blocks inside it still
    store nothing. A network that cannot be staged but has a `ReversibleSequential` inside runs as
    it is.

    Args:
        network: Any network that can be staged.
        example: An input, where the stages are found by watching a run.
        loss: The loss that is differentiated.
        checkpoint: Whether ordinary stages between others are computed again; otherwise they
            keep their activations, and nothing in them is computed twice.
        exact: Whether rounding is kept too, about a byte for each number and step, so that the
            reconstruction is bit for bit. A `ReversibleSequential` that keeps it sets this.
        generator: Not needed: the rule draws nothing.

    Shapes: x as the network takes it; y as the loss takes it.

    Raises:
        ValueError: nothing in the network is trainable.
        CannotReverse: a stage that should be invertible is not, or works in place; what was
            reconstructed is not finite.

    Paper: Gomez, Ren, Urtasun, Grosse, 2017, The Reversible Residual Network: Backpropagation
    Without Storing Activations.

    >>> import torch
    >>> from netwright.blocks.reversible import AdditiveCoupling
    >>> half = lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    >>> network = nn.Sequential(nn.Linear(4, 16), AdditiveCoupling(half(), half()),
    ...                         AdditiveCoupling(half(), half()), nn.Linear(16, 3))
    >>> loss = Reversible(network)(torch.randn(2, 4), torch.tensor([0, 2]))
    >>> network[0].weight.grad.shape
    torch.Size([16, 4])
    """

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 checkpoint: bool = True, exact: bool = False,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        self.loss, self.checkpoint = loss, checkpoint
        self.exact = exact or any(module.exact for module in self.network.modules()
                                  if isinstance(module, ReversibleSequential))
        self._seen = Memo()
        self.stages: Stages | None = None
        self._parts: list[_Part] = []
        if not isinstance(self.network, ReversibleSequential):
            try:
                self.stages = chain_of(self, network, example, loss, apart=False,
                                       opened=False)
                self._parts = [part for stage in self.stages for part in _parts(stage)]
            except CannotStage:  # a U-Net, say, whose reversible parts need no stages
                if not any(isinstance(m, ReversibleSequential) for m in self.network.modules()):
                    raise

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add dL/dw to `.grad`; return the detached loss."""
        h = meant_for(self.loss, self._chain(x) if self.stages is not None else apply(
            self._alone if isinstance(self.network, ReversibleSequential) else self.network, x))
        self._seen.add(self.training)
        loss = checked(self.loss, h, y)
        if not loss.requires_grad:
            raise ValueError("network has no trainable parameters; set requires_grad on some")
        without = [p for p in self.network.parameters() if p.grad is None]
        try:
            loss.backward()
        except CannotReverse:
            for p in without:  # those behind the failure have theirs by now
                p.grad = None
            raise
        return loss.detach()

    def _alone(self, x: Any, *args: Any, **options: Any) -> Any:
        """Return the output of a network that is reversible as a whole."""
        network: Any = self.network
        return self._run([network.steps(*args, **options)], x)

    def _chain(self, x: Any) -> Any:
        assert self.stages is not None
        context = self.stages.context(x, live=True)
        h, waiting, last = x, list[list[Step]](), len(self._parts) - 1
        several = False
        for k, part in enumerate(self._parts):
            if part.invertible:
                h = _only(h) if k == 0 else h
                waiting.append(_steps(part))
                several = _several(part.modules[0])
            elif 0 < k < last and self.checkpoint and not several and not part.reverses():
                lent = [t for t in tree_leaves(vars(context))
                        if isinstance(t, Tensor) and t.requires_grad]
                step = Stored(part.name, partial(part.tensor, context=context), part.modules,
                              [*part.loose, *lent])
                step.place = part.place
                waiting.append([step])
            else:
                h = part.function(self._run(waiting, h), context=context)
                waiting, several = [], not isinstance(h, Tensor)
        return self._run(waiting, h)

    def _run(self, waiting: list[list[Step]], h: Any) -> Any:
        if not waiting:
            return h
        streams = [h] if isinstance(h, Tensor) else list(h)
        # What is looked at in the first pass may be another in the first of training or of eval.
        streams = run(chained(waiting), streams, exact=self.exact,
                      first=self.training not in self._seen)
        return streams[0] if len(streams) == 1 else tuple(streams)


class _Part(NamedTuple):
    """What is reconstructed, stored or run as one: a stage, or some layers of one."""

    name: str
    place: str
    function: Callable[..., Any]
    modules: list[nn.Module]
    invertible: bool = False
    loose: Sequence[Tensor] = ()

    def tensor(self, h: Tensor, context: Any) -> Tensor:
        """Return what the part makes of `h`, which must be a tensor if it is to run again."""
        output = self.function(h, context=context)
        if not isinstance(output, Tensor):
            raise CannotReverse(f"{self.name} of {self.place} returned {type(output).__name__}, "
                                "and only what returns a tensor can be checkpointed; set "
                                "checkpoint=False")
        return output

    def reverses(self) -> bool:
        """Return whether something inside stores no activations of itself."""
        return any(isinstance(inner, ReversibleSequential)
                   for module in self.modules for inner in module.modules())


def _only(x: Any) -> Any:
    """Return what an nn.Sequential is given, where `x` holds its arguments."""
    if isinstance(x, Tensor):
        return x
    parts = list(x.values() if isinstance(x, Mapping) else x)
    if len(parts) != 1:
        raise ValueError(f"x must hold the one argument of an nn.Sequential, got {len(parts)}; "
                         "put several streams into a tuple of their own, ((a, b),)")
    return parts[0]


def _several(module: nn.Module) -> bool:
    """Return whether `module` returns several streams."""
    if isinstance(module, ReversibleSequential):
        return any(map(_several, module))
    return getattr(module, "streams", 1) is None


def _parts(stage: Any) -> list[_Part]:
    place = f"stage {stage.name!r}"
    if not isinstance(stage, SequentialStage):
        names = " and ".join(dict.fromkeys(type(module).__name__ for module in stage.modules))
        return [_Part(names, place, stage, stage.modules, loose=stage.loose)]
    parts: list[_Part] = []
    for module in stage.modules:
        if callable(getattr(module, "inverse", None)):
            alone = ReversibleSequential(module)
            parts.append(_Part(type(module).__name__, place, alone, [module], invertible=True))
            continue
        before = [] if not parts or parts[-1].invertible else parts.pop().modules
        inside = SequentialStage(stage.name, [*before, module])
        inside.first = stage.first and not parts
        parts.append(_Part(type(module).__name__, place, inside, inside.modules))
    return parts


def _steps(part: _Part) -> list[Step]:
    steps: list[Step] = part.function.steps()  # type: ignore[attr-defined]
    for step in steps:
        step.place = step.place.removesuffix("module '0'") + part.place
    return steps
