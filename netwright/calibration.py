"""Calibration one stage at a time: what each layer takes, with the stages before it as they are."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.anatomy.layers import is_linear
from netwright.anatomy.replacing import plain_paths
from netwright.runtime.mapped import MappedCheckpoint
from netwright.runtime.modes import evaluating, same_buffers
from netwright.runtime.padding import holding, real_of
from netwright.runtime.random_state import same_random_state
from netwright.signals import apply, few, first_argument
from netwright.stages import Stage, Stages, stages

__all__ = ["InputStatistics", "observe", "stream"]

_KNOWN = ("gram", "mean", "square", "absmax")
_PRECISE = 4096  # features below which a Gram matrix is kept in double precision
_NONE = ("batches must hold what the model takes at least once, got none; a few hundred tokens or "
         "some tens of images are enough")
_CHUNK = 8192  # rows that are taken into account at a time, of which copies are made


class InputStatistics:
    """What a layer takes over all rows so far: number, mean, squares, largest sizes, Gram matrix.

    gram = 1/rows Σ x xᵀ;  mean = 1/rows Σ x;  square_j = 1/rows Σ x_j²;  absmax_j = max |x_j|.

    Shapes: gram (features, features); the others (features,). What was not asked for is None.

    >>> seen = InputStatistics({"gram", "absmax"})
    >>> seen.add(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
    >>> seen.rows, seen.absmax.tolist(), seen.gram.tolist(), seen.mean
    (2, [3.0, 4.0], [[5.0, -5.0], [-5.0, 10.0]], None)
    """

    def __init__(self, wanted: Collection[str]) -> None:
        self.wanted, self.rows = frozenset(wanted), 0
        self.gram: Tensor | None = None
        self.mean: Tensor | None = None
        self.square: Tensor | None = None
        self.absmax: Tensor | None = None

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take more rows (rows, features) into account."""
        for some in rows.split(_CHUNK):
            if len(some):
                self._add(some)

    def _add(self, rows: Tensor) -> None:
        precise = rows.double() if rows.shape[1] < _PRECISE else rows.float()
        share = len(rows) / (self.rows + len(rows))
        self.rows += len(rows)
        if "gram" in self.wanted:
            self.gram = _moved(self.gram, precise.T @ precise / len(rows), share)
        if "mean" in self.wanted:
            self.mean = _moved(self.mean, precise.mean(0), share)
        if "square" in self.wanted:
            self.square = _moved(self.square, precise.square().mean(0), share)
        if "absmax" in self.wanted:
            self.absmax = _largest(self.absmax, rows.abs().amax(0))

    @torch.no_grad()
    def merge(self, other: "InputStatistics") -> None:
        """Take all rows into account that `other` has seen."""
        if not other.rows:
            return
        self.rows += other.rows
        share = other.rows / self.rows
        for name in ("gram", "mean", "square"):
            if name in self.wanted:
                setattr(self, name, _moved(getattr(self, name), getattr(other, name), share))
        if "absmax" in self.wanted and other.absmax is not None:
            self.absmax = _largest(self.absmax, other.absmax)


Visit = Callable[[Stage, Mapping[str, InputStatistics]], Any]


@torch.inference_mode(False)
def stream(model: nn.Module, batches: Iterable[Any], visit: Visit, *,
           statistics: Collection[str] = ("gram",),
           checkpoint: str | Path | None = None) -> nn.Module:
    """Go through the stages of a model with data, and let each be changed before the next sees it.

    For each stage: all batches pass through it, and `visit(stage, statistics)` is given what its
    linear layers and convolutions took, by the layers' names; it may change the stage's weights,
    in place. Then the batches pass again, so that the next stages see what the changed one makes.
    Held are the activations at one boundary and the statistics of one stage, whatever the depth.

    Where a batch has an `attention_mask`, rows of padding are left out of layers that take all
    positions. Returns the model.

    With `checkpoint`, a folder of safetensors as `save_pretrained` writes it, the model's weights
    stay on disk, also where the model is on the meta device: those of a stage are read when it
    comes and written when it is done, into files of another name, which are renamed when all is
    done. A kill at any moment leaves the old weights or the new ones, whole. The model that is
    returned reads its weights from there.

    Args:
        model: any module that `nw.stages` can read; it is changed as `visit` changes it.
        batches: what the model takes, each a tensor, a tuple or a mapping.
        visit: what is done at each stage.
        statistics: of "gram", "mean", "square" and "absmax" those that are needed.
        checkpoint: the folder that holds the model's weights, see above.

    Raises:
        ValueError: there is no batch, `checkpoint` holds another model's weights, or `visit` gave
            a weight another shape or type there.
        UnknownName: no statistic has that name.
        CannotStage: the model is no chain of stages.
        FileNotFoundError: `checkpoint` holds no safetensors.
        CorruptCheckpoint: they cannot be read.

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
        raise ValueError(_NONE)
    if checkpoint is None:
        return _streamed(model, inputs, visit, statistics, lambda _: nullcontext())
    mapped = MappedCheckpoint(model, Path(checkpoint))
    try:
        _streamed(model, inputs, visit, statistics, mapped.held)
        mapped.commit()
    finally:
        mapped.abandon()  # what is left of it, which is nothing after a commit
    return model


def _streamed(model: nn.Module, inputs: list[Any], visit: Visit, statistics: Collection[str],
              held: Callable[[Iterable[nn.Module]], AbstractContextManager[None]]) -> nn.Module:
    net = _chain(model, inputs[0])
    masks = [_mask(x) for x in inputs]
    with evaluating(model), torch.no_grad(), same_random_state(), plain_paths():
        contexts, signals = [net.context(x) for x in inputs], list(inputs)
        for stage in net:
            with held(stage.modules):
                with watched(model, stage.modules, statistics) as (taken, padding):
                    for h, context, mask in zip(signals, contexts, masks, strict=True):
                        padding[:] = [mask]
                        with holding(mask):
                            stage(h, context)
                visit(stage, taken)
                for i, (context, mask) in enumerate(zip(contexts, masks, strict=True)):
                    with holding(mask):
                        signals[i] = stage(signals[i], context)
    return model


def _chain(model: nn.Module, example: Any) -> Stages:
    """Return the stages of a model, found by a few samples: a chain holds what it was run on."""
    try:
        return stages(model, few(example))
    except Exception:  # whatever a model raises that takes batches of one size alone
        return stages(model, example)


@torch.inference_mode(False)
def observe(model: nn.Module, batches: Iterable[Any], *,
            statistics: Collection[str] = ("gram",)) -> dict[str, InputStatistics]:
    """Return what all linear layers and convolutions of a model take, by name, from one pass.

    Nothing is held but the statistics of all layers at once, and the model may be any that runs.

    Raises:
        ValueError: there is no batch.
        UnknownName: no statistic has that name.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> seen = observe(model, [torch.randn(5, 4)], statistics=["square"])
    >>> {name: (layer.rows, layer.square.shape[0]) for name, layer in seen.items()}
    {'0': (5, 4), '2': (5, 8)}
    """
    for name in statistics:
        checks.one_of(_KNOWN, statistics=name)
    count = 0
    with (evaluating(model), torch.no_grad(), same_random_state(), plain_paths(),
          same_buffers(model), watched(model, [model], statistics) as (taken, padding)):
        for x in batches:
            padding[:] = [_mask(x)]
            with holding(padding[0]):
                apply(model, x)
            count += 1
    if not count:
        raise ValueError(_NONE)
    return taken


@contextmanager
def watched(model: nn.Module, modules: Iterable[nn.Module], wanted: Collection[str]
            ) -> Iterator[tuple[dict[str, InputStatistics], list[Tensor | None]]]:
    """Gather what the layers in `modules` take, by name, while the body runs.

    The list that is given with it holds the mask of real positions of the batch that runs.
    Layers that take one tensor, as queries, keys and values do, have it looked at once.
    """
    inside = {part for module in modules for part in module.modules()}
    taken: dict[str, InputStatistics] = {}
    padding: list[Tensor | None] = [None]
    last = _Last()
    handles = []
    for name, module in model.named_modules():
        if module in inside and (is_linear(module) or _is_convolution(module)):
            def take(layer: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                x = first_argument(layer, args, kwargs)
                taken.setdefault(name, InputStatistics(wanted)).merge(
                    last.of(layer, x, padding[0], wanted))
            handles.append(module.register_forward_pre_hook(take, with_kwargs=True))
    try:
        yield taken, padding
    finally:
        for handle in handles:
            handle.remove()
        last.x = last.found = None


class _Last:
    """The statistics of the tensor that was looked at last, which the next layer may take too."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.x: Tensor | None = None  # held, so that no other tensor gets its place in memory
        self.found: InputStatistics | None = None

    def of(self, layer: nn.Module, x: Tensor, mask: Tensor | None,
           wanted: Collection[str]) -> InputStatistics:
        key = (id(x), None if x.is_inference() else x._version, _geometry(layer), id(mask))
        if self.found is None or key != self.key:
            self.key, self.x, self.found = key, x, InputStatistics(wanted)
            self.found.add(_rows(layer, x, mask))
        return self.found


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1


def _geometry(layer: Any) -> Any:
    return (layer.kernel_size, layer.stride, layer.dilation, layer.padding,
            layer.padding_mode) if _is_convolution(layer) else None


def _rows(layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return what a layer takes as (rows, features): patches for a convolution."""
    if _is_convolution(layer):
        return _patches(layer, x)
    real = real_of(x, mask)
    return x.reshape(-1, x.shape[-1]) if real is None else x[real]


def _patches(layer: Any, x: Tensor) -> Tensor:
    """Return the windows of a convolution, each as (channels, *kernel) in a row."""
    grid = len(layer.kernel_size)
    x = x if x.ndim == grid + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for i, (size, stride, gap) in enumerate(zip(
            layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + i, (size - 1) * gap + 1, stride)[..., ::gap]
    places = tuple(range(2, 2 + grid))
    return x.permute(0, *places, 1, *range(2 + grid, x.ndim)).flatten(grid + 1).flatten(0, grid)


def _mask(x: Any) -> Tensor | None:
    mask = x.get("attention_mask") if isinstance(x, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _moved(mean: Tensor | None, new: Tensor, share: float) -> Tensor:
    return new.clone() if mean is None else mean + (new - mean) * share


def _largest(known: Tensor | None, new: Tensor) -> Tensor:
    return new.clone() if known is None else known.maximum(new)
