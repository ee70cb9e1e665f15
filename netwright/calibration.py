"""Calibration one stage at a time: what each layer takes, with the stages before it as they are."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from netwright import checks
from netwright.anatomy.layers import is_linear
from netwright.runtime.modes import evaluating
from netwright.runtime.random_state import same_random_state
from netwright.stages import Stage, stages

__all__ = ["InputStatistics", "stream"]

_KNOWN = ("gram", "mean", "absmax")
_PRECISE = 4096  # features below which a Gram matrix is kept in double precision


class InputStatistics:
    """What a layer takes over all rows so far: their number, mean, largest sizes, Gram matrix.

    gram = 1/rows Σ x xᵀ;  mean = 1/rows Σ x;  absmax_j = max |x_j|.

    Shapes: gram (features, features); mean and absmax (features,). What was not asked for is None.

    >>> seen = InputStatistics({"gram", "absmax"})
    >>> seen.add(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
    >>> seen.rows, seen.absmax.tolist(), seen.gram.tolist(), seen.mean
    (2, [3.0, 4.0], [[5.0, -5.0], [-5.0, 10.0]], None)
    """

    def __init__(self, wanted: Collection[str]) -> None:
        self.wanted, self.rows = frozenset(wanted), 0
        self.gram: Tensor | None = None
        self.mean: Tensor | None = None
        self.absmax: Tensor | None = None

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take more rows (rows, features) into account."""
        if not len(rows):
            return
        precise = rows.double() if rows.shape[1] < _PRECISE else rows.float()
        share = len(rows) / (self.rows + len(rows))
        self.rows += len(rows)
        if "gram" in self.wanted:
            self.gram = _moved(self.gram, precise.T @ precise / len(rows), share)
        if "mean" in self.wanted:
            self.mean = _moved(self.mean, precise.mean(0), share)
        if "absmax" in self.wanted:
            largest = rows.abs().amax(0)
            self.absmax = largest if self.absmax is None else self.absmax.maximum(largest)


Visit = Callable[[Stage, Mapping[str, InputStatistics]], Any]


@torch.inference_mode(False)
def stream(model: nn.Module, batches: Iterable[Any], visit: Visit, *,
           statistics: Collection[str] = ("gram",)) -> nn.Module:
    """Go through the stages of a model with data, and let each be changed before the next sees it.

    For each stage: all batches pass through it, and `visit(stage, statistics)` is given what its
    linear layers and convolutions took, by the layers' names; it may change the stage's weights,
    in place. Then the batches pass again, so that the next stages see what the changed one makes.
    Held are the activations at one boundary and the statistics of one stage, whatever the depth.

    Where a batch has an `attention_mask`, rows of padding are left out of layers that take all
    positions. Returns the model.

    Args:
        model: any module that `nw.stages` can read; it is changed as `visit` changes it.
        batches: what the model takes, each a tensor, a tuple or a mapping.
        visit: what is done at each stage.
        statistics: of "gram", "mean" and "absmax" those that are needed.

    Raises:
        ValueError: there is no batch.
        UnknownName: no statistic has that name.
        CannotStage: the model is no chain of stages.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> seen = {}
    >>> _ = stream(model, [torch.randn(5, 4), torch.randn(3, 4)],
    ...            lambda stage, taken: seen.update(taken))
    >>> {name: (layer.rows, layer.gram.shape[0]) for name, layer in seen.items()}
    {'0': (8, 4), '2': (8, 8)}
    """
    for name in statistics:
        checks.one_of(_KNOWN, statistics=name)
    inputs = list(batches)
    if not inputs:
        raise ValueError("batches must hold what the model takes at least once, got none; a few "
                         "hundred tokens or some tens of images are enough")
    net = stages(model, inputs[0])
    masks = [_mask(x) for x in inputs]
    with evaluating(model), torch.no_grad(), same_random_state():
        contexts, signals = [net.context(x) for x in inputs], list(inputs)
        for stage in net:
            with watched(model, stage.modules, statistics) as (taken, padding):
                for h, context, mask in zip(signals, contexts, masks, strict=True):
                    padding[:] = [mask]
                    stage(h, context)
            visit(stage, taken)
            for i, context in enumerate(contexts):
                signals[i] = stage(signals[i], context)
    return model


@contextmanager
def watched(model: nn.Module, modules: Iterable[nn.Module], wanted: Collection[str]
            ) -> Iterator[tuple[dict[str, InputStatistics], list[Tensor | None]]]:
    """Gather what the layers in `modules` take, by name, while the body runs.

    The list that is given with it holds the mask of real positions of the batch that runs.
    """
    inside = {part for module in modules for part in module.modules()}
    taken: dict[str, InputStatistics] = {}
    padding: list[Tensor | None] = [None]
    handles = []
    for name, module in model.named_modules():
        if module in inside and (is_linear(module) or (
                isinstance(module, nn.Conv2d) and module.groups == 1)):
            def take(layer: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                found = taken.setdefault(name, InputStatistics(wanted))
                found.add(_rows(layer, args[0], padding[0]))
            handles.append(module.register_forward_pre_hook(take))
    try:
        yield taken, padding
    finally:
        for handle in handles:
            handle.remove()


def _rows(layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return what a layer takes as (rows, features): patches for a convolution."""
    if isinstance(layer, nn.Conv2d):
        if isinstance(layer.padding, str):
            x = nn.functional.pad(x, layer._reversed_padding_repeated_twice)
        patches = unfold(x, layer.kernel_size, layer.dilation,
                         0 if isinstance(layer.padding, str) else layer.padding, layer.stride)
        return patches.transpose(1, 2).flatten(0, 1)
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.to(x.device)]
    return x.reshape(-1, x.shape[-1])


def _mask(x: Any) -> Tensor | None:
    mask = x.get("attention_mask") if isinstance(x, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _moved(mean: Tensor | None, new: Tensor, share: float) -> Tensor:
    return new if mean is None else mean + (new - mean) * share
