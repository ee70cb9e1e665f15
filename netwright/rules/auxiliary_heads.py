"""Blocks of stages, and the small networks that read class scores off what they return."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from netwright import checks
from netwright.rules.readout import mean_of_tokens
from netwright.stages import Stage, Stages

_POOL: dict[int, Callable[..., Tensor]] = {
    1: functional.adaptive_avg_pool1d, 2: functional.adaptive_avg_pool2d,
    3: functional.adaptive_avg_pool3d}
_CONVOLUTION: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Signal(NamedTuple):
    """What a stage returns: `axes` of space behind the `features`, or none."""

    features: int
    axes: int


class AuxiliaryHead(nn.Module):
    """Read class scores off the output of a block by a small network.

    Of maps (batch, channels, *size): means over a grid of at most 8 cells an axis; a convolution
    of 3 cells to `width` channels; ReLU; means over 2 cells an axis; then as of features:
    linear to `width` units; ReLU; linear to the classes.

    A label for each sample is read off the mean of its tokens; all sizes of maps will do.

    Shapes: h (batch, features), (batch, tokens, features) or (batch, channels, *size); scores
    (batch, classes), or (batch, tokens, classes) where every token has a label of its own.

    >>> head = AuxiliaryHead(Signal(3, axes=2), 10, width=16)
    >>> head(torch.randn(2, 3, 12, 5)).shape
    torch.Size([2, 10])
    """

    def __init__(self, signal: Signal, classes: int, *, width: int, like: Tensor | None = None,
                 generator: Generator | None = None) -> None:
        super().__init__()
        options: dict[str, Any] = {} if like is None else {"device": like.device,
                                                           "dtype": like.dtype}
        features, self.axes = signal
        if self.axes:
            self.convolution = nn.utils.skip_init(_CONVOLUTION[self.axes], features, width, 3,
                                                  padding=1, **options)
            features = width * 2 ** self.axes
        self.hidden = nn.utils.skip_init(nn.Linear, features, width, **options)
        self.scores = nn.utils.skip_init(nn.Linear, width, classes, **options)
        for layer in self.children():
            _draw(layer, generator)

    def forward(self, h: Tensor, y: Tensor | None = None, x: Any = None) -> Tensor:
        """Return the scores for labels of the shape of `y`; `x` tells which tokens are padding."""
        if self.axes:
            pool = _POOL[self.axes]
            h = pool(h, [min(size, 8) for size in h.shape[2:]])
            h = pool(functional.relu(self.convolution(h)), [2] * self.axes).flatten(1)
        elif h.ndim == 3 and y is not None and y.shape[:2] != h.shape[:2]:
            h = mean_of_tokens(h, x)
        return self.scores(functional.relu(self.hidden(h)))


@torch.no_grad()
def _draw(layer: nn.Module, generator: Generator | None) -> None:
    """Draw weights and biases as PyTorch does, from `generator`."""
    weight = layer.get_parameter("weight")
    bound = 1 / math.sqrt(weight[0].numel())
    for p in layer.parameters():
        drawn = p if generator is None else torch.empty(p.shape, dtype=p.dtype,
                                                        device=generator.device)
        p.copy_(drawn.uniform_(-bound, bound, generator=generator))


def blocks_of(net: Stages, blocks: int | Sequence[str] | None) -> list[list[Stage]]:
    """Return the stages in blocks: as many, or beginning at the stages so named, or one each.

    Raises:
        ValueError: there are fewer stages than `blocks`, or the names are not in their order.
        UnknownName: `blocks` holds a name that no stage has.
    """
    stages, names = list(net), net.names
    if blocks is None:
        return [[stage] for stage in stages]
    if isinstance(blocks, int):
        checks.between(1, len(stages), whole=True, blocks=blocks,
                       advice=f"the network has {len(stages)} stages; give fewer, or finer stages")
        starts = [-(-i * len(stages) // blocks) for i in range(blocks)]
    else:
        if isinstance(blocks, str) or not blocks:
            raise ValueError("blocks must be a number or a list of the names of stages, got "
                             f"{blocks!r}; choose from {names}")
        for name in blocks:
            checks.one_of(names, stage_to_begin_a_block_at=name)
        starts = [names.index(name) for name in blocks]
        if starts != sorted(set(starts)):
            raise ValueError("blocks must name stages once each, in the order in which they run, "
                             f"got {blocks!r}; choose from {names}")
        starts[0] = 0  # the first block takes all that comes before it, as the first cut does
    return [stages[a:b] for a, b in zip(starts, [*starts[1:], len(stages)], strict=True)]


def signals(net: Stages, example: Any) -> tuple[list[Signal | None], int | None]:
    """Return what each stage returns, None where unknown, and the width of the last one's output.

    It is looked up in an example's run. Without one it is what the next stage's linear or
    convolutional layer reads, in an `nn.Sequential`; the last stage's layer tells its own width.
    """
    if example is not None:
        found: list[Signal | None] = []
        for row, stage in zip(net.table(example), net, strict=True):
            shape, kinds = row["shape"], [type(m) for m in _weighted(stage)]
            tokens = len(shape) == 3 and not (kinds and issubclass(kinds[-1], nn.Conv1d))
            found.append(Signal(shape[-1], 0) if tokens else Signal(shape[1], len(shape) - 2))
        return found, shape[-1]
    if not isinstance(net.model, nn.Sequential):
        return [None] * len(net), None
    found = [_read(stage.modules[0]) for stage in list(net)[1:]]
    last = _weighted(net[len(net) - 1])[-1:]
    known = last and isinstance(last[0], nn.Linear) and not nn.parameter.is_lazy(last[0].weight)
    return [*found, None], last[0].out_features if known else None  # type: ignore[return-value]


def needed(signal: Signal | None, net: Stages, stage: str) -> Signal:
    """Return `signal`; say that an example is needed where it is not known."""
    if signal is None:
        raise ValueError(f"example is needed, since what stage {stage} of "
                         f"{type(net.model).__name__} returns is not known without a run; give "
                         "an input as example=")
    return signal


def _weighted(stage: Stage) -> list[nn.Module]:
    """Return the layers of a stage that hold a matrix of weights, in their order."""
    return [m for module in stage.modules for m in module.modules()
            if any(nn.parameter.is_lazy(p) or p.ndim > 1 for p in m.parameters(recurse=False))]


def _read(layer: nn.Module) -> Signal | None:
    if any(map(nn.parameter.is_lazy, layer.parameters())):
        return None
    if isinstance(layer, nn.Linear):
        return Signal(layer.in_features, 0)
    axes = next((axes for axes, kind in _CONVOLUTION.items() if isinstance(layer, kind)), None)
    return None if axes is None else Signal(layer.in_channels, axes)  # type: ignore[arg-type]
