"""Class scores that are read off a stage's output by a matrix of the rule's own."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from netwright import checks
from netwright.stages import Stages


class Readout(nn.Module):
    """Read class scores off the output of one stage by one matrix.

    scores = a M^T, with a the features of h: the last axis of tokens, all axes but the first of
    anything else. A label for each sample is read off the mean of its tokens.

    The matrix is made at the first batch where `width`, the number of features, is None.

    Shapes: h (batch, *size); M (classes, features); scores (batch, classes), or (batch, tokens,
    classes) where every token has a label of its own.

    Raises:
        ValueError: a batch has another number of features than the matrix was made for.

    >>> readout = Readout("0", None, 10)
    >>> readout(torch.randn(2, 3, 4, 4)).shape, readout.weight.shape
    (torch.Size([2, 10]), torch.Size([10, 48]))
    """

    def __init__(self, stage: str, width: int | None, classes: int, *,
                 channels_first: bool = False, zero: bool = False, like: Tensor | None = None,
                 generator: Generator | None = None) -> None:
        super().__init__()
        self.stage, self.channels_first = stage, channels_first
        self.zero, self.generator = zero, generator
        self.linear: nn.Linear
        options: dict[str, Any] = {} if like is None else {"device": like.device,
                                                           "dtype": like.dtype}
        if width is None:
            self.linear = nn.LazyLinear(classes, bias=False, **options)
        else:
            self.linear = nn.utils.skip_init(nn.Linear, width, classes, bias=False, **options)
            self._draw()

    @property
    def weight(self) -> Tensor:
        """The matrix M."""
        return self.linear.weight

    def forward(self, h: Tensor, y: Tensor | None = None, x: Any = None) -> Tensor:
        """Return the scores for labels of the shape of `y`; `x` tells which tokens are padding."""
        return self.scores(h if h.ndim == 2 else self.features(h, y, x))

    def features(self, h: Tensor, y: Tensor | None = None, x: Any = None) -> Tensor:
        """Return what the matrix reads of `h`: (batch, features) or (batch, tokens, features)."""
        a = self._rows(h)
        per_token = y is None or y.shape[:2] == a.shape[:2]
        return a if a.ndim == 2 or per_token else mean_of_tokens(a, x)

    def scores(self, a: Tensor) -> Tensor:
        """Return a M^T."""
        linear = self.linear
        if isinstance(linear, nn.LazyLinear) and linear.has_uninitialized_params():
            linear.initialize_parameters(a)
            self._draw()
        weight = linear.weight
        if a.shape[-1] != weight.shape[1]:
            raise ValueError(f"stage {self.stage} gives {a.shape[-1]} features, and its matrix was "
                             f"made for {weight.shape[1]}; keep the input's size, and give "
                             "example= if the network was read wrongly")
        return functional.linear(a, weight)

    def _rows(self, h: Tensor) -> Tensor:
        if h.ndim == 3 and not self.channels_first:
            return h
        return h.reshape(len(h), -1)

    @torch.no_grad()
    def _draw(self) -> None:
        if self.zero:
            self.weight.zero_()
            return
        bound = 1 / math.sqrt(self.weight.shape[1])
        drawn = self.weight if self.generator is None else torch.empty(
            self.weight.shape, dtype=self.weight.dtype, device=self.generator.device)
        self.weight.copy_(drawn.uniform_(-bound, bound, generator=self.generator))


def mean_of_tokens(a: Tensor, x: Any) -> Tensor:
    """Return the mean of `a` (batch, tokens, *) over the tokens that `x` does not call padding."""
    mask = padding_mask(x, a)
    if mask is None:
        return a.mean(1)
    weight = mask.to(a.dtype).unsqueeze(-1)
    return (a * weight).sum(1) / weight.sum(1).clamp_min(1)


def padding_mask(x: Any, h: Tensor) -> Tensor | None:
    """Return the `attention_mask` of the mapping `x` where it is one entry a token of `h`.

    Where `x` has a decoder's input too, and `h` is of its length, it is the decoder's mask.
    """
    if not isinstance(x, Mapping):
        return None
    decoded = x.get("decoder_input_ids")
    of_decoder = isinstance(decoded, Tensor) and decoded.shape[:2] == h.shape[:2]
    mask = x.get("decoder_attention_mask" if of_decoder else "attention_mask")
    fits = isinstance(mask, Tensor) and h.ndim == 3 and mask.shape == h.shape[:2]
    return mask if fits else None


def without_padding(x: Any, signal: Tensor) -> Tensor:
    """Return `signal` with zeros for the tokens that `x` calls padding, which shall teach nothing.

    >>> x = {"attention_mask": torch.tensor([[1, 0]])}
    >>> without_padding(x, torch.ones(1, 2, 3)).sum(2)
    tensor([[3., 0.]])
    """
    mask = padding_mask(x, signal)
    return signal if mask is None else signal.masked_fill((mask == 0).unsqueeze(-1), 0)


def widths(net: Stages, example: Any) -> tuple[list[int | None], list[bool]]:
    """Return the features of each stage's output, None where unknown, and who is channels first.

    They are looked up in an example's run. Without one they are those that the next stage's
    linear layer reads, in an `nn.Sequential`; the last stage's are what its linear layer returns.
    """
    owners = {id(p): m for m in net.model.modules() for p in m.parameters(recurse=False)}
    layers = [[owners[id(p)] for p in stage.parameters() if nn.parameter.is_lazy(p) or p.ndim > 1]
              for stage in net]
    channels_first = [bool(found) and isinstance(found[-1], nn.Conv1d) for found in layers]
    if example is not None:
        shapes = [row["shape"] for row in net.table(example)]
        return [shape[-1] if len(shape) == 3 and not first else math.prod(shape[1:])
                for shape, first in zip(shapes, channels_first, strict=True)], channels_first
    if not isinstance(net.model, nn.Sequential):
        return [None] * len(net), channels_first
    read = [_size(stage.modules[0], "in_features") for stage in list(net)[1:]]
    last = [m for m in net[len(net) - 1].modules if any(True for _ in m.parameters())][-1:]
    return [*read, _size(last[0], "out_features") if last else None], channels_first


def _size(module: nn.Module, name: str) -> int | None:
    lazy = any(map(nn.parameter.is_lazy, module.parameters()))
    return getattr(module, name) if isinstance(module, nn.Linear) and not lazy else None


def count_classes(net: Stages, num_classes: int | None, last: int | None) -> int:
    """Return the number of classes: `num_classes`, which must agree with the `last` width."""
    if num_classes is None and last is None:
        raise ValueError(f"num_classes is needed, since the outputs of {type(net.model).__name__} "
                         "cannot be counted without a run; give num_classes= or example=")
    if None not in (num_classes, last) and num_classes != last:
        raise ValueError(f"num_classes={num_classes} must be the number of outputs of the last "
                         f"stage, {net.names[-1]}, which has {last}; change one of them")
    classes = last if num_classes is None else num_classes
    assert classes is not None
    checks.count(2, num_classes=classes, advice="give the number of classes")
    return classes


def first_parameter(net: Stages) -> Tensor | None:
    """Return a parameter that shows the network's device and precision, None without any."""
    return next((p for p in net.model.parameters() if p.is_floating_point()), None)
