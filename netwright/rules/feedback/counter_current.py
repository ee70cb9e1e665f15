import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter, functional

from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.feedback.matrices import draw
from netwright.rules.readout import first_parameter, mean_of_tokens, widths
from netwright.rules.rule import Rule, chain_of, check_labels
from netwright.stages import Stage, Stages

__all__ = ["CounterCurrent"]

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {
    1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@method(
    "rule",
    papers=["001-089"],
    saves=["backpropagation"],
    needs=["labels", "a chain of stages"],
)
class CounterCurrent(Rule):
    """Train every hidden stage and a feedback network, fed with the targets, to meet each other.

    a_0 = x,  a_l = stage_l(a_(l-1));  b_n = targets,  b_l = ELU(V_(l+1) b_(l+1)), down to b_1;
    S_l = norm(a_l) norm(b_l)^T;  L_l = mean over samples of |S_l - I|^2;  L_n = loss(a_n, y);
    stage l and V_(l+1) descend L_l, with a_(l-1) and b_(l+1) cut off from their graphs.

    No gradient crosses a layer in either network, and neither waits for the other's answer. A
    stage's activations are freed before the next stage runs.

    Where `y` are class numbers, the targets are the one-hot vectors of all classes, each once,
    and a row of I is the sample's own: the feedback network runs on as many rows as there are
    classes. Where `y` is like the output (an autoencoder's, a regression's), it is the target
    itself, and I the identity. Samples without a label (-100) do not count. norm(v) = v / |v|.

    V takes a signal to the size of the one below it: a linear map between vectors, and from a
    vector to maps; between maps of one dimension a convolution of 3 cells an axis, behind the
    nearest neighbour's enlargement where the map below is larger, in strides where it is
    smaller. Maps that a stage pools or flattens itself are taken as it hands them on. Tokens are
    compared by their mean, or each with its own target where there is one. The layer of the
    paper's feedback network that ends at the input is left out, since nothing learns from it.

    Shapes: a_l (batch, *size_l); b_l (classes, *size_l) or (batch, *size_l); S_l (batch, classes)
    or (batch, batch); y (batch,), (batch, tokens), or as the output.

    Raises:
        ValueError: no example; targets that are neither class numbers nor shaped as the output;
            an input of another size than the example's.

    Paper: Kao, Hariharan, 2024, Counter-Current Learning: A Biologically Plausible Dual Network
    Approach for Deep Learning.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 3))
    >>> rule = CounterCurrent(network, torch.randn(2, 4))
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> [mirror.weight.shape for mirror in rule.feedback]
    [torch.Size([8, 3])]
    """

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        if example is None:
            raise ValueError("example must be an input of the network, got None; the feedback "
                             "network takes its sizes from it")
        self.stages, self.loss = chain_of(self, network, example, loss), loss
        self._signals = _signals(self.stages, example)
        like = first_parameter(self.stages)
        self.feedback = nn.ModuleList(
            Mirror(above.size, below.size, like=like, generator=generator)
            for below, above in zip(self._signals, self._signals[1:], strict=False))

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add each layer's own gradient to `.grad`; return the loss of the network's output."""
        targets, labels = self._targets(y)
        signals = self.signals(targets)
        context, h, last = self.stages.context(x), x, len(self.stages) - 1
        for i, stage in enumerate(self.stages):
            h = stage(h, context)
            loss = self.loss(h, y) if i == last else self._meet(i, h, signals.pop(), y, labels, x)
            if loss.requires_grad:  # not so in a last stage that is frozen
                loss.backward()
            h = h.detach()
        return loss.detach()

    def signals(self, targets: Tensor) -> list[Tensor]:
        """Return the feedback network's signals b_(n-1), ..., b_1 for `targets` (rows, *size)."""
        found, b = [], targets
        for mirror in reversed(self.feedback):
            found.append(mirror(b))
            b = found[-1].detach()
        return found

    def _targets(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what feeds the feedback network, and the class of each row where `y` has some."""
        signal = self._signals[-1]
        like = first_parameter(self.stages)
        dtype = torch.get_default_dtype() if like is None else like.dtype
        if self.loss is cross_entropy or not y.is_floating_point():
            classes = signal.size[0]
            check_labels(y, classes)
            return torch.eye(classes, dtype=dtype, device=y.device), y.flatten()
        if y.shape[2 if signal.tokens else 1:] != signal.size:
            raise ValueError("y must hold class numbers of dtype int64 or be shaped as the output "
                             f"(batch, {', '.join(map(str, signal.size))}), got {y.dtype} of "
                             f"{tuple(y.shape)}; use y.long() or y.view_as(output)")
        return (y.flatten(0, 1) if signal.tokens else y).to(dtype), None

    def _meet(self, i: int, h: Tensor, b: Tensor, y: Tensor, labels: Tensor | None,
              x: Any) -> Tensor:
        """Return the local loss of the hidden stage `i`."""
        if not self._signals[i].tokens:
            a = h.flatten(1)
        else:
            a = h.flatten(0, 1) if y.shape[:2] == h.shape[:2] else mean_of_tokens(h, x)
        b = b.flatten(1)
        rows = len(b) if labels is None else len(labels)
        if a.shape != (rows, b.shape[1]):
            raise ValueError(
                f"x must give stage {self.stages.names[i]} an output of {rows} rows, one for each "
                f"target, and {b.shape[1]} features, as the example did, got {tuple(a.shape)}; "
                "give y a target for each sample, and build the rule with an example like x")
        own = torch.arange(rows, device=a.device) if labels is None else labels
        meant = own[:, None] == torch.arange(len(b), device=a.device)
        similarity = functional.linear(functional.normalize(a), functional.normalize(b))
        distance = (similarity - meant.to(similarity.dtype)).square().sum(1)
        counted = own != -100
        return (distance * counted).sum() / counted.sum().clamp(min=1)


class Mirror(nn.Module):
    """Take a signal down to the size of the one below it, behind an ELU, without a bias.

    Shapes: b (rows, *above) -> (rows, *below).

    >>> Mirror((5, 4, 4), (3, 8, 8))(torch.randn(2, 5, 4, 4)).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(self, above: torch.Size, below: torch.Size, *, like: Tensor | None = None,
                 generator: Generator | None = None) -> None:
        super().__init__()
        self.below, self.axes = torch.Size(below), len(below) - 1
        self.convolves = len(above) == len(below) > 1
        shape = ((below[0], above[0], *[3] * self.axes) if self.convolves
                 else (self.below.numel(), math.prod(above)))
        self.strides = [max(1, a // b) for a, b in zip(above[1:], below[1:], strict=False)]
        like = torch.empty(0) if like is None else like
        self.weight = Parameter(draw(shape, math.prod(shape[1:]) ** -0.5, like, generator))

    def forward(self, b: Tensor) -> Tensor:
        """Return the signal below."""
        if not self.convolves:
            return functional.elu(functional.linear(b.flatten(1), self.weight)).unflatten(
                1, self.below)
        sizes = self.below[1:]
        larger = [max(pair) for pair in zip(b.shape[2:], sizes, strict=True)]
        b = _CONVOLUTIONS[self.axes](_resized(b, larger), self.weight, stride=self.strides,
                                     padding=1)
        return functional.elu(_resized(b, sizes))


def _resized(b: Tensor, sizes: Any) -> Tensor:
    return b if b.shape[2:] == tuple(sizes) else functional.interpolate(b, tuple(sizes))


class _Signal(NamedTuple):
    """What a stage hands on for each sample, or each token, with its maps if it has any."""

    size: torch.Size
    tokens: bool


def _signals(net: Stages, example: Any) -> list[_Signal]:
    """Look up what the stages hand on in an example's run."""
    maps: list[dict[int, torch.Size]] = [{} for _ in net]
    with ExitStack() as hooks:
        for stage, found in zip(net, maps, strict=True):
            for module in _inside(stage):
                hooks.enter_context(module.register_forward_hook(
                    lambda module, args, out, found=found: _note(found, out)))
        shapes = [torch.Size(row["shape"]) for row in net.table(example)]
    _, channels_first = widths(net, None)
    signals: list[_Signal] = []
    for shape, found, first in zip(shapes, maps, channels_first, strict=True):
        tokens = len(shape) == 3 and not first
        size = shape[2:] if tokens else shape[1:]
        # a vector that a hidden stage has made by flattening maps keeps their shape
        flattened = len(size) == 1 and not tokens and len(signals) < len(net) - 1
        signals.append(_Signal(found.get(size.numel(), size) if flattened else size, tokens))
    return signals


def _inside(stage: Stage) -> list[nn.Module]:
    return [m for module in stage.modules for m in module.modules()]


def _note(found: dict[int, torch.Size], out: Any) -> None:
    if isinstance(out, Tensor) and out.ndim > 2:
        found[out[0].numel()] = out.shape[1:]
