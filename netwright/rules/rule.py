import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from netwright import checks
from netwright.errors import CannotStage, FewStages
from netwright.objectives.losses import cross_entropy
from netwright.rules.batches import labels_apart
from netwright.rules.processes import Processes, is_parallel, refuse_parts
from netwright.rules.scaling import note_call
from netwright.runtime.modes import evaluating, rehearsing
from netwright.runtime.padding import held, holding, real_positions
from netwright.runtime.recomputing import checkpoints
from netwright.signals import all_of, apply, mapped, tensor_of
from netwright.stages import Stage, Stages
from netwright.stages.find import read

__all__ = ["Rule"]

_PACKAGE = str(Path(__file__).parents[1])


@checks.annotated
class Rule(nn.Module):
    """What replaces `loss.backward()`: one call fills `.grad` and returns the loss.

    A rule holds the network and whatever it adds to it (feedback matrices, auxiliary heads), so
    that `rule.parameters()` is what an optimizer steps and `rule.state_dict()` is all of it. It
    adds to `.grad` as `backward()` does.

    A rule that does not speak through `.grad` sets `updates_weights` and changes the weights
    itself when it is called. One that talks to the other processes in its calls sets `together`:
    then every process must have a share of every batch. `remembers` says that a call leaves more
    behind in the state than `.grad`: what the next update will need. `resized` has the names in
    the state of weights whose shapes change as it trains. `needs_labels` is False where a batch
    is x alone, and `same_in_shares` where processes that share a batch out do not train as one
    with all of it would, whatever is averaged. `runs_whole` says that all it does is one run of
    the network and one backward pass, so that what is wrapped around the network sees them.
    `keeps_activations` says that nothing may be computed again in the backward pass, in checkpoints
    and reversible blocks, since weights are others by then or the rule reads the graph itself.

    In a loop of one's own, several processes train `Rule(DistributedDataParallel(network), ...)`:
    each call ends with `.grad` averaged over them, that of the rule's own parameters too.

    Args:
        network: what is trained: a module or its `Stages`.
        example: an input as the network takes it, where its stages or their sizes cannot be known
            without a run; most rules that take one do without it in an `nn.Sequential`.
        loss: what the network's output and the target make a number of, a mean over targets.
        generator: where the rule draws what is random in it; PyTorch's global state without one.
    """

    updates_weights = False
    together = False
    remembers = False
    needs_labels = True
    same_in_shares = True
    resized: Collection[str] = ()
    runs_whole = False
    keeps_activations = False

    def __init__(self, network: nn.Module | Stages, *, generator: Generator | None = None) -> None:
        super().__init__()
        model: Any = network.model if isinstance(network, Stages) else network
        self._processes: Processes | None = None
        self._begun = False
        if not self.runs_whole:
            refuse_parts(self, model)
            if is_parallel(model):
                self._processes, model = Processes(self, model), model.module
        self.network: nn.Module = model
        self.generator = generator

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if any(base.__name__ == "FSDPModule" for base in cls.__mro__):
            raise ValueError("fully_shard must be given the network, not the rule, whose backward "
                             "passes it would not see; write Backprop(fully_shard(network))")

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> Any:
        """What DistributedDataParallel asks for when it is put around a module."""
        raise ValueError("DistributedDataParallel must be put around the network, not around the "
                         "rule, whose backward passes it would not see; write "
                         f"{type(self).__name__}(DistributedDataParallel(network), ...)")

    def __call__(self, x: Any, y: Any = None, *rest: Any, **options: Any) -> Any:
        """Return `forward`'s loss, with gradients on and `x` cut off from whatever made it.

        `y` may be left out where `x` is a mapping that holds "labels", as a Hugging Face batch.
        """
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.enable_grad():
                return self(x, y, *rest, **options)
        if options:
            options = {name: _cut_off(value) for name, value in options.items()}
        x, y = labels_apart(self.network, _cut_off(x), _cut_off(y))
        given = (y, *map(_cut_off, rest)) if y is not None or rest or self._must_be_told() else ()
        self._begin()
        if self._processes is not None:
            self._processes.before(self)
        # Stages that are run one by one are called with no mask; mixtures in them ask for it here.
        with (holding(real_positions(x) if isinstance(x, Mapping) else held()),
              nullcontext() if self.runs_whole else checkpoints(stored=self.keeps_activations)):
            loss = super().__call__(x, *given, **options)
        if self._processes is not None:
            self._processes.after(self)
        return loss

    def _begin(self) -> None:
        """Look at what has to be right before a call."""
        if not self._begun and not self.runs_whole:
            refuse_parts(self, self.network)  # it may have been cut up since it was given
        self._begun = True
        if not self.updates_weights:
            note_call(self)

    def _must_be_told(self) -> bool:
        """Whether `forward` takes a y that may be None but not left out.

        Raises:
            ValueError: it takes no None either.
        """
        _, *others = inspect.signature(self.forward).parameters.values()
        y = others[0] if others else None
        if y is None or y.default is not y.empty or y.kind is y.VAR_POSITIONAL:
            return False
        if self.needs_labels and y.annotation is not y.empty and "None" not in str(y.annotation):
            raise ValueError('y must hold the targets, got None and no "labels" in x; give '
                             f'{type(self).__name__}(...)(x, y), or x as a mapping with "labels"')
        return True

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the batch's update to `.grad` of the parameters; return the detached loss."""
        raise TypeError(f"{type(self).__name__} must define forward(x, y)")

    def stepped_by(self, optimizer: Optimizer) -> None:
        """Be told which optimizer will step, as `nw.fit` does; most rules need not know."""

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return the network's output for `x`, in eval mode, without a graph.

        Where the rule has a loss of one's own, it is what that loss is given.
        """
        with evaluating(self):
            output: Tensor = output_for(getattr(self, "loss", cross_entropy), self.network, x)
            return output


def _cut_off(value: Any) -> Any:
    """Return `value` with its tensors outside the graph that made them, and as it is if they are.

    What was made in inference mode is copied, since no graph may keep it.
    """
    return mapped(value, _detached)


def _detached(t: Tensor) -> Tensor:
    t = t.detach() if t.requires_grad else t
    return t.clone() if t.is_inference() else t


def output_for(loss: Callable[..., Tensor], network: nn.Module, x: Any) -> Any:
    """Return what `loss` is given of the network's output for `x`.

    A loss of one's own gets all of an output that is several tensors, so that it can teach each.
    """
    return meant_for(loss, network(x) if isinstance(x, Tensor) else apply(network, x))


def meant_for(loss: Callable[..., Tensor], output: Any) -> Any:
    """Return what `loss` is given of what a network has returned."""
    if isinstance(output, Tensor):
        return output
    return tensor_of(output) if loss is cross_entropy else all_of(output)


def chain_of(rule: Rule, network: nn.Module | Stages, example: Any,
             loss: Callable[..., Tensor] = cross_entropy, *, apart: bool = True,
             opened: bool = True) -> Stages:
    """Return the stages by which `rule` teaches the network.

    Where it teaches them `apart`, it warns of FewStages: within a stage it is backpropagation.
    Unless they are `opened`, modules that run others in turn are one stage.

    Raises:
        CannotStage: no chain was found, or the network returns several tensors, of which a `loss`
            of one's own would see the first alone.
    """
    if example is not None:
        example, _ = labels_apart(rule.network, example, None)
    if example is not None and loss is not cross_entropy:
        _check_single(rule.network, example, loss)
    net = network if isinstance(network, Stages) else read(rule.network, example, opened=opened)
    if apart and len(net) < 3:
        _warn_of_few(type(rule), net)
    return net


def _warn_of_few(rule: type[Rule], net: Stages) -> None:
    """Warn of a chain that leaves little to teach apart.

    Two stages of one layer each are what many rules' papers begin with; a local rule's loss is the
    network's own in one of them.
    """
    layers = [len(matrix_layers(stage)) for stage in net]
    if len(net) == 1 or max(layers) > 1 or rule.__module__.startswith("netwright.rules.local."):
        warnings.warn(
            f"network reads as {len(net)} stages ({', '.join(net.names)}) of {layers} layers, and "
            f"within a stage {rule.__name__} is backpropagation; give nw.stages(network, example, "
            "cuts=[...]) with more of its modules to cut at", FewStages,
            stacklevel=_frames_inside() + 1)


def _frames_inside() -> int:
    """Return how many callers, from the one of this on, stand within this package."""
    frame, count = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, count = frame.f_back, count + 1
    return count - 1


def matrix_layers(stage: Stage) -> list[nn.Module]:
    """Return the modules in `stage` that hold a matrix of weights, each once."""
    every = dict.fromkeys(m for module in stage.modules for m in module.modules())
    return [m for m in every if any(is_lazy(p) or p.ndim > 1
                                    for p in m.parameters(recurse=False))]


def _check_single(network: nn.Module, example: Any, loss: Callable[..., Tensor]) -> None:
    """Raise CannotStage where `loss` should be given several tensors."""
    try:
        with evaluating(network), rehearsing(network):
            output = output_for(loss, network, example)
    except Exception:  # what is wrong with the example is said by `stages`
        return
    if not isinstance(output, Tensor):
        raise CannotStage(f"network must return one tensor for the loss that was given, got "
                          f"{type(output).__name__} of several, of which a chain of stages ends in "
                          "the first alone; use Backprop, which hands on all of it")


def precise(t: Tensor) -> Tensor:
    """Return `t` in float32 at least, where it holds floating-point numbers."""
    return t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t


def checked(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, y: Tensor) -> Tensor:
    """Return `loss(logits, y)`; where it fails, say what is wrong with the labels.

    They are looked at only then, since looking takes as long as a small layer.
    """
    try:
        return loss(logits, y)
    except (IndexError, RuntimeError):
        if loss is cross_entropy:
            check_labels(y, logits.shape[-1])
        raise


def check_labels(y: Tensor, classes: int) -> None:
    """Raise ValueError unless `y` holds int64 classes below `classes` (-100 is left out).

    Labels on an accelerator are not read, since that would make every step wait for it.
    """
    if y.dtype != torch.int64:
        raise ValueError(f"y must hold class numbers of dtype int64, got {y.dtype}; "
                         "use y.long(), or a loss of your own for other targets")
    if y.device.type != "cpu" or y.numel() == 0:
        return
    low, high = y.aminmax()
    if high >= classes or low < 0:
        bad = y[(y != -100) & ((y < 0) | (y >= classes))]
        if len(bad):
            raise ValueError(f"y must be between 0 and {classes - 1} for a network with {classes} "
                             f"outputs, got {int(bad[0])}; check the labels or the last layer")


def targets(logits: Tensor, y: Tensor) -> Tensor:
    """Return how many targets a mean loss has: the labels but -100, or else rows of `logits`."""
    if y.is_floating_point() or y.is_complex():
        return torch.tensor(logits[..., 0].numel(), device=logits.device)
    return (y != -100).sum().clamp(min=1)
