import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from netwright import checks
from netwright.catalogue.facets import method
from netwright.measure._allocations import Allocations, Saved, peaks, size
from netwright.measure._batch import check_batch
from netwright.measure._untouched import untouched
from netwright.objectives.losses import cross_entropy
from netwright.rules.rule import Rule
from netwright.runtime.modes import evaluating, training
from netwright.signals import mapped
from netwright.stages import Stages, call

__all__ = ["Cost", "cost"]


@dataclass(frozen=True)
class Cost:
    """What one step costs. Times are in seconds, sizes in bytes.

    `parameters` counts every number in every parameter once, the frozen ones too. `flops` are
    those of sums of products (matrix products, convolutions, attention, recurrent layers,
    factorisations and solves), a multiplication and an addition being two; `uncounted` names the
    operations that sum products, or may, and that no formula counts. `step_time` is the median
    over the repeats. `saved_bytes` is the most that waited for a backward pass at any one time:
    activations and inputs, not parameters and buffers. `peak_bytes` is the most that was alive at
    any one time: parameters, buffers, the batch, gradients and all that the step made;
    `peak_by_kind` says what it consisted of. `working_bytes` is the most that the step held at any
    one time besides its gradients and besides what was there before it, which is what depth and
    batch size act on.
    """

    parameters: int
    flops: int
    step_time: float
    saved_bytes: int
    peak_bytes: int
    working_bytes: int
    peak_by_kind: Mapping[str, int]
    uncounted: tuple[str, ...] = ()


@method("measure", variants={"two repeats": {"repeats": 2, "warmup": 1}})
def cost(rule_or_model: nn.Module | Stages, batch: tuple[Any, Any], *,
         loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
         repeats: int = 10, warmup: int = 2) -> Cost:
    """Measure one step of a rule or of a model, and leave it exactly as it was.

    The step of a rule is `rule(x, y)`; that of another module is its forward pass, the loss
    (`loss`) and `backward()`, in train mode; where y is None it is the forward pass alone, in
    eval mode and without a graph. The optimizer's step is not part of it. Gradients are None
    before the step, as after `zero_grad()`.

    On a CPU every figure but the time is the same on every run: bytes are those of the tensors
    that PyTorch's dispatcher sees, so that scratch memory inside an operation does not count.
    On CUDA `peak_bytes` is the allocator's own, with what the dispatcher did not see as
    `unseen`. FLOPs are counted for every operation that runs, those of forward-mode derivatives
    and of `torch.func` among them; elementwise, reducing and scattering operations have none.
    What sums products and cannot be counted (a Fourier transform, an eigenvalue problem, an
    operation of another library) is named in `uncounted`.

    Args:
        rule_or_model: whose step is measured.
        batch: the pair (x, y) that it is taken on.
        loss: of a model that is no rule.
        repeats: steps that are timed; the median counts.
        warmup: steps before them.

    Shapes: batch is (x, y) with x as the model takes it.

    Raises:
        ValueError: `batch` is not a pair, y is None for a rule, or `repeats` or `warmup` is
            too small.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> found = cost(model, (torch.randn(16, 4), torch.zeros(16, dtype=torch.long)))
    >>> found.parameters, found.flops
    (67, 4352)
    >>> model[0].weight.grad is None
    True
    """
    check_batch(batch)
    checks.count(1, repeats=repeats)
    checks.count(0, warmup=warmup)
    module = rule_or_model.model if isinstance(rule_or_model, Stages) else rule_or_model
    # Copies, since a batch is often a view into the storage of a whole data set.
    x, y = mapped(tuple(batch), Tensor.clone)
    if y is None and isinstance(module, Rule):
        raise ValueError(f"batch must be (x, y) for {type(module).__name__}, got y=None; pass "
                         "rule.network to measure the forward pass alone")
    step = _step(module, x, y, loss)
    kept = {"parameters": size(module.parameters()), "buffers": size(module.buffers()),
            "inputs": size(tree_leaves((x, y)))}
    mode = evaluating if y is None else training

    with mode(module):
        with untouched(module):
            _memory(module, step)  # the first pass sets up what stays, and holds tensors longer
        with untouched(module):
            peak, working, gradients, seen = _memory(module, step)
        saved = Saved([*module.parameters(), *module.buffers()])
        with untouched(module), saved.counting():
            step()
        with untouched(module):
            seconds = [_seconds(module, step) for _ in range(warmup + repeats)][warmup:]
        by_kind = {**kept, "gradients": gradients, "working": peak - gradients}
        total = sum(by_kind.values())
        if _on_cuda(module):
            with untouched(module):
                allocated = sum(kept.values()) + _allocated(step)
            by_kind["unseen"], total = allocated - total, allocated
    return Cost(parameters=sum(p.numel() for p in module.parameters()), flops=seen.flops,
                step_time=statistics.median(seconds), saved_bytes=saved.peak, peak_bytes=total,
                working_bytes=working, peak_by_kind=by_kind,
                uncounted=tuple(sorted(seen.uncounted)))


def _step(module: nn.Module, x: Any, y: Any,
          loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
    def learn() -> None:
        module(x, y)

    @torch.enable_grad()
    def differentiate() -> None:
        loss(call(module, x), y).backward()

    @torch.no_grad()
    def predict() -> None:
        call(module, x)

    if isinstance(module, Rule):
        return learn
    return predict if y is None else differentiate


def _memory(module: nn.Module, step: Callable[[], None]) -> tuple[int, int, int, Allocations]:
    """Return the peak of what the step makes, its working part, its gradients, and the book."""
    allocations = Allocations()
    torch.clear_autocast_cache()
    collecting = gc.isenabled()
    gc.disable()  # or the collector's timing would decide when a cycle's tensors die
    try:
        with allocations:
            step()
    finally:
        if collecting:
            gc.enable()
    events = list(allocations.events)
    left = allocations.numbers(p.grad for p in module.parameters())
    peak, gradients, working = peaks(events, left)
    return peak, working, gradients, allocations


def _seconds(module: nn.Module, step: Callable[[], None]) -> float:
    for p in module.parameters():
        p.grad = None
    _wait(module)
    start = time.perf_counter()
    step()
    _wait(module)
    return time.perf_counter() - start


def _on_cuda(module: nn.Module) -> bool:
    return any(p.is_cuda for p in module.parameters())


def _wait(module: nn.Module) -> None:
    if _on_cuda(module):
        torch.cuda.synchronize()


def _allocated(step: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
