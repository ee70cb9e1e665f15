import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss

from netwright import checks
from netwright.anatomy.exchanging import put_block
from netwright.anatomy.feedforwards import FeedForwardLayer, feedforwards, feedforwards_in
from netwright.anatomy.replacing import replace
from netwright.anatomy.run import Run
from netwright.blocks.feedforward.feed_forward import GLU, FeedForward
from netwright.catalogue.facets import method
from netwright.errors import Diverged, UnknownName
from netwright.reshape._calibration import Stream, first_run, run_batches
from netwright.reshape._layers import layer_of, plain_layer
from netwright.reshape._naming import Built, restored
from netwright.reshape._resuming import Finished
from netwright.reshape.change import History, decided, history, remember, reshape
from netwright.runtime.modes import evaluating, rehearsing
from netwright.runtime.padding import real_of
from netwright.runtime.progress import Bar
from netwright.runtime.random_state import drawing_from
from netwright.signals import first_argument

__all__ = ["Swap", "swap_feedforward", "unswap_feedforward"]

ROWS = 2048  # about as many vectors are in a step of the distillation


class Sample(NamedTuple):
    """What a layer takes and gives in one batch, and which of its vectors are no padding.

    Shapes: x (*, dim), zeros at padding; y (*, out); real (*), None where all are real.
    """

    x: Tensor
    y: Tensor
    real: Tensor | None

    def rows(self, given: Tensor) -> Tensor:
        """Return the vectors of `given` (*, out) that are no padding, (rows, out)."""
        return given.reshape(-1, given.shape[-1]) if self.real is None else given[self.real]


Samples = list[Sample]


class Swap(NamedTuple):
    """A feed-forward layer that was swapped, and how near its block came to it.

    `error` is E|block(x) - layer(x)|^2 / Var(layer(x)) over the calibration data, None where the
    block was not distilled.
    """

    layer: FeedForwardLayer
    error: float | None


@method(
    "reshape",
    place="feedforward",
    needs=["training"],
    keeps_function=False,
    variants={"made": {"make": GLU},
              "distilled": {"make": partial(FeedForward, activation="relu"), "steps": 2,
                            "progress": False, "calibration": torch.arange(16).view(2, 8)}},
)
@reshape
def swap_feedforward(model: nn.Module, make: Callable[[int, int], nn.Module], example: Any = None,
                     *, calibration: Any = None, layers: Sequence[str] | None = None,
                     steps: int = 200, lr: float = 1e-2, rows: int = 16384,
                     generator: Generator | None = None, progress: bool = True,
                     resume: str | Path | None = None) -> nn.Module:
    """Return a copy in which every feed-forward layer is the block that `make(dim, hidden)` makes.

    With `calibration` each block learns, on its own, to be the layer that it replaces:

        minimise  E|block(x) - layer(x)|^2 / Var(layer(x))  over the block's weights,

    by `steps` of Adam with a rate that falls linearly to 0, on what the layer takes and gives when
    the model runs on the calibration data in eval mode; then a linear layer that the block ends in
    is set to its least squares. Without `calibration` the blocks are as they are made. Padding, as
    the data's `attention_mask` has it, is shown to them as zeros and teaches nothing. Norms,
    residual sums and the dropout on the layer's output stay where they are; the dropout on its
    hidden units goes with it.

    The result's `swapped_feedforward` tells what was swapped. `unswap_feedforward(result, model)`
    puts the layers of `model` back.

    Args:
        model: any module with layers that `feedforwards` finds.
        make: makes a block from the size that a layer takes and gives and its hidden units.
        example: what the model takes; see `feedforwards`.
        calibration: what the model takes, or batches of it, such as a loader, of which one is in
            memory at a time.
        layers: the names of those to swap, of the modules that hold them or of their last linear
            layers; all where none are given.
        steps: of Adam for each layer.
        lr: its rate in the beginning.
        rows: how many vectors each block learns from, about: no more batches are read and kept.
        generator: draws what `make` draws, and the rows of each step.
        progress: whether to show a bar in a terminal where it takes more than two seconds.
        resume: a folder where each distilled block is kept. A call that was broken off goes on
            from there when it is made again with the same arguments, and ends the same.

    Raises:
        NothingToReshape: the model has no feed-forward layer.
        UnknownName: no feed-forward layer is called that.
        TypeError: `make` does not return a module.
        ValueError: a block does not give what the layer gave, `calibration` is empty or nothing
            but padding, or `resume` holds what another call left.
        Diverged: a block's loss or output is no longer finite.

    >>> from netwright.blocks.feedforward import GLU
    >>> from netwright.models import gpt
    >>> model, x = gpt(96, context=16), torch.zeros(1, 16, dtype=torch.long)
    >>> swapped = swap_feedforward(model, lambda dim, hidden: GLU(dim, 2 * hidden // 3))
    >>> [swap.layer.down for swap in swapped.swapped_feedforward]
    ['1.mlp_out', '2.mlp_out']
    >>> torch.equal(unswap_feedforward(swapped, model)(x), model(x))
    True
    """
    checks.count(1, steps=steps, rows=rows)
    checks.above(0, lr=lr)
    stream = None if calibration is None else Stream(calibration)
    if example is None and stream is not None:
        example = stream.first
    run = None if example is None else first_run(model, example)
    chosen = choose(feedforwards(model) if run is None else feedforwards_in(run), layers)
    built, blocks = Built(), list[nn.Module]()
    said: list[dict[str, Any]] = []
    for layer in chosen:
        with drawing_from(generator), built.watching():
            block: Any = make(layer.dim, layer.hidden)
        blocks.append(_fitting(block, layer, model))
        said.append({"layer": plain_layer(layer, model), "block": built.said(block),
                     "error": None})
        _check(block, layer, None if run is None else _shapes(run, layer))
    if stream is not None:
        finished = Finished(resume, {"reshape": "swap_feedforward", "steps": steps, "lr": lr,
                                     "rows": rows, "data": stream.first,
                                     "weights": model.state_dict(),
                                     "blocks": list(map(str, blocks))}, generator)
        errors = _distil_all(model, dict(zip(chosen, blocks, strict=True)), stream, rows, steps,
                             lr, generator, progress, finished)
        for entry, error in zip(said, errors, strict=True):
            entry["error"] = error
    return decided({"layers": said}, layers=chosen, blocks=blocks)


def _distil_all(model: nn.Module, blocks: Mapping[FeedForwardLayer, nn.Module], stream: Stream,
                rows: int, steps: int, lr: float, generator: Generator | None, progress: bool,
                finished: Finished) -> list[float]:
    """Train each block to give what its layer gives; return how far from it they stay."""
    errors: list[float] = []
    bar = Bar(len(blocks), steps, "error", unit="layer")
    if progress:
        bar.start(after=2.0)
    try:
        samples = record(model, list(blocks), stream, rows)
        for number, (layer, block) in enumerate(blocks.items()):
            seen, name = samples.pop(layer), layer.down or layer.name
            known = finished.get(name)
            if known is not None:
                block.load_state_dict(known[1])
            errors.append(known[0]["error"] if known is not None else _distil_wide(
                block, seen, layer, steps, lr, generator, bar, number))
            if known is None:
                finished.put(name, {"error": errors[-1]}, block.state_dict())
    finally:
        bar.stop()
    return errors


@swap_feedforward.applies
@torch.no_grad()
def _swapped(model: nn.Module, decision: Mapping[str, Any],
             layers: Sequence[FeedForwardLayer] | None = None,
             blocks: Sequence[nn.Module] | None = None) -> nn.Module:
    layers = layers or [layer_of(said["layer"], model) for said in decision["layers"]]
    blocks = blocks or [_fitting(restored(said["block"]), layer, model)
                        for said, layer in zip(decision["layers"], layers, strict=True)]
    result: Any = model
    for layer, block in zip(layers, blocks, strict=True):
        result = put_block(result, layer, block)
    result.swapped_feedforward = tuple(
        Swap(layer, said["error"])
        for layer, said in zip(layers, decision["layers"], strict=True))
    return result


@method("companion")
@torch.inference_mode(False)
def unswap_feedforward(swapped: nn.Module, model: nn.Module, *,
                       layers: Sequence[str] | None = None) -> nn.Module:
    """Return a copy of `swapped` with the feed-forward layers of `model` where they were.

    `swapped` is what `swap_feedforward(model, ...)` returned, and `model` what it was given; both
    may have been trained since. All other weights are those of `swapped`.

    Raises:
        ValueError: nothing in `swapped` was swapped, or `model` has no such layers.
        UnknownName: no swapped layer is called that.
    """
    swaps: tuple[Swap, ...] = getattr(swapped, "swapped_feedforward", ())
    if not swaps:
        raise ValueError("swapped must be what swap_feedforward returned; this "
                         f"{type(swapped).__name__} does not say what was swapped in it")
    chosen = choose([swap.layer for swap in swaps], layers)
    known = dict(model.named_modules())
    for layer in chosen:
        for name in _stood(layer):
            if name not in known:
                raise ValueError(f"model must be the one that was given to swap_feedforward, but "
                                 f"this {type(model).__name__} has no {name!r}")
    result: Any = deepcopy(swapped)
    for layer in chosen:
        for name in _stood(layer):
            result = replace(result, name, deepcopy(known[name]))
        holder = known[layer.name]
        if isinstance(holder, nn.TransformerEncoderLayer):
            result.get_submodule(layer.name).activation_relu_or_gelu = (
                holder.activation_relu_or_gelu)
    left = tuple(swap for swap in swaps if swap.layer not in chosen)
    result.swapped_feedforward = left or getattr(model, "swapped_feedforward", ())
    remember(result, _without(history(swapped), {layer.down or layer.name for layer in chosen}))
    return result


def _without(past: History, undone: set[str]) -> History:
    """Return a history whose last swap did not touch some layers."""
    *_, last = (i for i, change in enumerate(past.records)
                     if change.name == swap_feedforward.__name__)
    records = list(past.records)
    left = [said for said in records[last].decision["layers"]
            if (said["layer"]["down"] or said["layer"]["name"]) not in undone]
    again = dataclasses.replace(records[last], decision={"layers": left})
    records[last:last + 1] = [again] if left else []
    return History(past.origin, tuple(records))


def choose(found: Sequence[FeedForwardLayer],
           layers: Sequence[str] | None) -> list[FeedForwardLayer]:
    """Return those of `found` that `layers` names, all where it is None."""
    if layers is None:
        return list(found)
    if isinstance(layers, str):
        raise TypeError(f"layers must be a sequence of names, got {layers!r}; write [{layers!r}]")
    known = {name for layer in found for name in (layer.name, layer.down) if name is not None}
    for name in layers:
        if name not in known:
            raise UnknownName("feed-forward layer", name, known)
    return [layer for layer in found if layer.name in layers or layer.down in layers]


def record(model: nn.Module, layers: Sequence[FeedForwardLayer], batches: Iterable[Any],
           rows: float = math.inf) -> dict[FeedForwardLayer, Samples]:
    """Return what each layer takes and gives when `model` runs on the batches in eval mode.

    No more batches are run once there are `rows` vectors.
    """
    samples: dict[FeedForwardLayer, Samples] = {layer: [] for layer in layers}
    taken: dict[FeedForwardLayer, list[tuple[Tensor, Tensor | None]]] = {
        layer: [] for layer in layers}

    def before(layer: FeedForwardLayer, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = first_argument(module, args, kwargs).detach()
        real = real_of(x)
        # A copy, since a later operation in place may change it.
        taken[layer].append((x.clone() if real is None else
                             x.masked_fill(~real[..., None], 0), real))

    def after(layer: FeedForwardLayer, _: nn.Module, __: Any, output: Tensor) -> None:
        x, real = taken[layer].pop()
        if real is None or bool(real.any()):
            samples[layer].append(Sample(x, output.detach().clone(), real))

    handles = []
    for layer in layers:
        first, last = (model.get_submodule(name) for name in _ends(layer))
        handles += [first.register_forward_pre_hook(partial(before, layer), with_kwargs=True),
                    last.register_forward_hook(partial(after, layer))]
    run_batches(model, _until(batches, lambda: any(
        sum(map(_count, seen)) >= rows for seen in samples.values())), handles)
    for layer, seen in samples.items():
        if not sum(map(_count, seen)):
            raise ValueError(f"calibration must give {layer} vectors that are no padding, got "
                             "none; check its attention_mask")
    return samples


def _until(batches: Iterable[Any], enough: Callable[[], bool]) -> Iterator[Any]:
    for batch in batches:
        yield batch
        if enough():
            return


def _count(sample: Sample) -> int:
    return sample.y[..., 0].numel() if sample.real is None else int(sample.real.sum())


def _ends(layer: FeedForwardLayer) -> tuple[str, str]:
    """Return the names of the modules that take and give what the layer does."""
    if layer.up is not None and layer.down is not None:
        return layer.up, layer.down
    return layer.name, layer.name


def _shapes(run: Run, layer: FeedForwardLayer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of what a layer took and gave in `run`."""
    if not layer.whole and layer.down is None:
        raise ValueError(f"{layer} must return one tensor for a block to stand in its place, but "
                         "it returns more, such as router scores; leave it out by layers=")
    first, last = _ends(layer)
    return (run.shapes[run.called(first)[0].taken[0]], run.shapes[run.called(last)[0].gave[0]])


def _stood(layer: FeedForwardLayer) -> list[str]:
    """Return the names of the modules that `put_block` replaces."""
    if layer.whole:
        return [layer.name]
    return list(dict.fromkeys(
        name for name in (layer.up, layer.gate, layer.down) if name is not None))


def _fitting(block: Any, layer: FeedForwardLayer, model: nn.Module) -> nn.Module:
    """Return what was made, on the layer's device and of its dtype."""
    if not isinstance(block, nn.Module):
        raise TypeError(f"make(dim, hidden) must return a module, got {type(block).__name__}")
    like = next(model.get_submodule(layer.down or layer.name).parameters())
    return block.to(like.device, like.dtype)


def _check(block: nn.Module, layer: FeedForwardLayer,
           shapes: tuple[tuple[int, ...], tuple[int, ...]] | None) -> None:
    """Raise unless `block` gives what `layer` gave, by the shapes of a run where there was one."""
    like = next((p for p in block.parameters()), torch.empty(0))
    taken, wanted = shapes or ((1, 3, layer.dim), (1, 3, layer.out))
    x = torch.zeros(taken, device=like.device, dtype=like.dtype)
    with evaluating(block), rehearsing(block):
        try:
            given = block(x)
        except Exception as error:
            raise ValueError(f"the block that make({layer.dim}, {layer.hidden}) makes must take "
                             f"{tuple(x.shape)}, but {error}"
                             + ("" if shapes else "; pass example=, so that it is tried on what "
                                "the layer takes")) from error
    if not isinstance(given, Tensor) or given.shape != wanted:
        what = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"the block that make({layer.dim}, {layer.hidden}) makes must give "
                         f"{wanted} for {taken}, as {layer} does, "
                         f"got {what}")


def _distil_wide(block: nn.Module, samples: Samples, *how: Any) -> float:
    """Train `block` in float32 where the model is narrower; return how far from the layer it is."""
    dtype = samples[0].x.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return _distil(block, samples, *how)
    wide = [Sample(x.float(), y.float(), real) for x, y, real in samples]
    _distil(block.float(), wide, *how)
    return _error(block.to(dtype), samples, max(_variance(wide), torch.finfo(torch.float32).tiny))


def _distil(block: nn.Module, samples: Samples, layer: FeedForwardLayer, steps: int, lr: float,
            generator: Generator | None, bar: Bar, number: int) -> float:
    """Train `block` to give what the layer gave; return how far from it it stays."""
    learns = [p for p in block.parameters() if p.requires_grad]
    variance = max(_variance(samples), torch.finfo(torch.float32).tiny)
    last = _last_linear(block, samples[0].x)
    # A block that ends in a linear layer learns at scale 1, whatever the layer's scale is.
    scale = 1.0 if last is None else variance ** 0.5
    if learns:
        optimizer = torch.optim.Adam(learns, lr)
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        modes = [(part, part.training) for part in block.modules()]
        block.train()
        with torch.enable_grad():
            for step in range(steps):
                some = _drawn(samples, generator)
                loss = mse_loss(some.rows(block(some.x)).float(),
                                some.rows(some.y).float() / scale) * (scale ** 2 / variance)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise Diverged(f"the loss of the block for {layer} became {value} at "
                                   f"step {step}; try a lower lr than {lr}")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                falling.step()
                bar.step(number, step, value)
        for part, mode in modes:
            part.training = mode
        for p in learns:
            p.grad = None
    if last is not None:
        with torch.no_grad():
            for p in last.parameters():
                p.mul_(scale)
        error = _fit(block, last, samples, variance)
    else:
        error = _error(block, samples, variance)
    if not math.isfinite(error):
        raise Diverged(f"the block for {layer} does not give finite outputs after "
                       f"{steps} steps; try a lower lr than {lr}")
    bar.epoch(number, error, error)
    return error


def _error(block: nn.Module, samples: Samples, variance: float) -> float:
    with evaluating(block), rehearsing(block):
        squares = sum(float((some.rows(block(some.x)).double()
                             - some.rows(some.y).double()).square().sum()) for some in samples)
    return squares / sum(some.rows(some.y).numel() for some in samples) / variance


def _last_linear(block: nn.Module, x: Tensor) -> nn.Linear | None:
    """Return the linear layer whose output is the block's, if it learns and runs once."""
    gave: list[tuple[nn.Linear, Any]] = []
    handles = [part.register_forward_hook(
        lambda part, _, output: gave.append((part, output)))
        for part in block.modules() if isinstance(part, nn.Linear)]
    try:
        with evaluating(block), rehearsing(block):
            output = block(x)
    finally:
        for handle in handles:
            handle.remove()
    ends = [part for part, given in gave if given is output]
    if len(ends) != 1 or sum(part is ends[0] for part, _ in gave) != 1 or not all(
            p.requires_grad for p in ends[0].parameters()) or "weight" not in ends[0]._parameters:
        return None
    return ends[0]


@torch.no_grad()
def _fit(block: nn.Module, last: nn.Linear, samples: Samples, variance: float) -> float:
    """Set `last` to its least squares where that is nearer; return how far the block is."""
    read: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    square: Any = 0.0
    product: Any = 0.0
    try:
        with evaluating(block), rehearsing(block):
            for some in samples:
                block(some.x)
                h = some.rows(read.pop()).double()
                h = torch.cat([h, h.new_ones(len(h), 1)], 1) if last.bias is not None else h
                square = square + h.T @ h
                product = product + h.T @ some.rows(some.y).double()
    finally:
        handle.remove()
    before, error = [p.detach().clone() for p in last.parameters()], _error(block, samples,
                                                                            variance)
    if not (square.isfinite().all() and product.isfinite().all()):
        return error
    ridge = 1e-6 * square.diagonal().mean() + torch.finfo(torch.float64).tiny
    solved = torch.linalg.solve(square + ridge * torch.eye(
        len(square), dtype=square.dtype, device=square.device), product)
    last.weight.copy_(solved[:last.in_features].T)
    if last.bias is not None:
        last.bias.copy_(solved[-1])
    nearer = _error(block, samples, variance)
    if nearer <= error:
        return nearer
    for p, old in zip(last.parameters(), before, strict=True):
        p.copy_(old)
    return error


def _variance(samples: Samples) -> float:
    return float(torch.cat([some.rows(some.y).double() for some in samples]).var(
        0, unbiased=False).mean())


def _drawn(samples: Samples, generator: Generator | None) -> Sample:
    """Return some entries of one batch, about `ROWS` vectors; padding is in no count."""
    x, y, real = samples[int(torch.randint(len(samples), (), generator=generator))]
    each = max(1, (x[..., 0].numel() if real is None else int(real.sum())) // len(x))
    some = min(len(x), max(1, ROWS // each))
    rows = torch.randperm(len(x), generator=generator)[:some].to(x.device)
    if real is not None and not real[rows].any():
        rows = real.reshape(len(x), -1).any(1).nonzero().flatten()[:some]
    return Sample(x[rows], y[rows], None if real is None else real[rows])
